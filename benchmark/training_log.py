"""The log of a training run: one JSON line per epoch beside the weights, and TensorBoard events where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from moebench.errors import RunError, UsageError
from moebench.files import replace_file

Line = Mapping[str, Any]


class TrainingLog:
    """Appends a line per epoch, flushed. Nothing is written before the first line.

    Args:
        path: the JSONL file. An earlier run's file is replaced at the first line.
        events: folder of the TensorBoard events, None for none.

    Raises:
        UsageError: events are asked for and TensorBoard is not installed.
    """

    def __init__(self, path: Path, events: Path | None = None) -> None:
        self.path = path
        self._events = events
        self._earlier: list[Line] = []
        self._begun = False
        self._file: TextIO | None = None
        self._writer: Any = None
        self._make_writer: Any = _summary_writer() if events is not None else None

    @property
    def left(self) -> str:
        """What a run that failed leaves behind, for its message."""
        return f"nothing was saved but {self.path}" if self.path.exists() else "nothing was saved"

    def go_on(self, epochs: Sequence[Line]) -> None:
        """Continues the log of an interrupted run after these epochs.

        Args:
            epochs: what the checkpoint knows of them: `epoch` and `loss` at least. The file's own lines, which say
                more, are kept where they agree; lines of later epochs go.
        """
        found: dict[Any, Line] = {}
        try:
            rows = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            rows = []
        for row in rows:
            try:
                line = json.loads(row)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("epoch")) is int:
                found[line["epoch"]] = line
        self._earlier = [
            found[line["epoch"]] if found.get(line["epoch"], {}).get("loss") == line["loss"] else line
            for line in epochs
        ]

    def write(self, line: Line) -> None:
        """Adds one epoch: `epoch`, and numbers, None or lists of numbers by their names.

        Raises:
            RunError: the file or the events cannot be written.
        """
        self.catch_up()
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(f"{json.dumps(line)}\n")
            self._file.flush()
            if self._events is not None:
                self._write_events(line)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from None

    def catch_up(self) -> None:
        """Puts the epochs of an interrupted run in place, of whose last one the file may know nothing.

        Raises:
            RunError: the file cannot be written.
        """
        if self._begun:
            return
        try:
            replace_file(self.path, "".join(f"{json.dumps(earlier)}\n" for earlier in self._earlier).encode())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._begun = True

    def close(self) -> None:
        """Closes the file and the events; harmless where nothing was written, or could be."""
        # What a full disk did not take is still in the buffer, and would be tried once more.
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _write_events(self, line: Line) -> None:
        epoch = line["epoch"]
        if self._writer is None:
            # What an interrupted run wrote of this epoch and later ones is left out by TensorBoard.
            self._writer = self._make_writer(log_dir=str(self._events), purge_step=epoch)
        for key, value in line.items():
            if key == "epoch" or value is None:
                continue
            values = {f"{key}/{number}": one for number, one in enumerate(value)} if isinstance(value, list) else {}
            for name, number in (values or {key: value}).items():
                self._writer.add_scalar(name, number, epoch)
        self._writer.flush()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard needs the package tensorboard ({str(error).splitlines()[0]}); "
            "`pip install 'moebench[tensorboard]'`"
        ) from None
    return SummaryWriter
