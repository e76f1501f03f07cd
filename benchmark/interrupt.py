"""Ctrl-C and SIGTERM: the work ends at its next safe point, and two seconds after the signal in any case.

Where work is `deferring`, the first signal only asks for a stop: what is decided is committed between two steps of the
attack, and then KeyboardInterrupt is raised. Where no safe point comes within `SOFT` seconds (a long pass), it is
raised between two calls of Python. Where not even that is reached within `HARD` seconds (one long call of a library,
during which Python runs no signal handler), a second thread marks the run and ends the process; every commit is a
whole transaction, so nothing that was committed is lost. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SOFT = 1.0
"""Seconds after the signal at which a safe point is no longer waited for."""

HARD = 1.5
"""Seconds after the signal at which the process is ended from outside of its main thread."""

MARKING = 0.3
"""Seconds that marking the run may take then."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """What the main thread and the watching thread tell each other."""

    def __init__(self) -> None:
        self.wanted = False
        self.raised = False
        self.overdue = False
        self.deferring = 0
        self.marks: list[Callable[[], None]] = []

    def raise_it(self) -> None:
        self.raised = True
        raise KeyboardInterrupt


_state = _State()


def requested() -> bool:
    """Whether work that is deferring should stop at this safe point, by raising KeyboardInterrupt."""
    return _state.wanted


@contextmanager
def deferring() -> Iterator[None]:
    """Work that asks `requested` at its safe points; a signal that it has not seen is raised at its end."""
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1
    if _state.wanted and not _state.raised:
        _state.raise_it()


def at_forced_end(mark: Callable[[], None]) -> Callable[[], None]:
    """Has `mark` called, in another thread, if the process is ended from outside of its main thread.

    Returns: what takes this back.
    """
    marks = _state.marks
    marks.append(mark)
    return lambda: marks.remove(mark)


@contextmanager
def handling(say: Callable[[], None]) -> Iterator[None]:
    """Handles the signals while a command runs; a signal that is ignored stays so.

    Args:
        say: prints how to go on; called if the process is ended from outside of the main thread.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    state = _state = _State()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def handle(number: int, frame: FrameType | None) -> None:
        state.wanted = True
        if not state.raised and (state.overdue or not state.deferring):
            state.raise_it()

    for number in taken:
        signal.signal(number, handle)
    # The C part of the handler writes here at once, even while the main thread is inside of a library.
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, state, say), name="interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        _state = _State()
        signal.set_wakeup_fd(descriptor)
        for number in taken:
            signal.signal(number, before[number])
        with suppress(OSError):
            theirs.send(b"\0")  # no signal has this number: the watcher ends
        watcher.join(1.0)
        theirs.close()
        ours.close()


def _watch(told: socket.socket, state: _State, say: Callable[[], None]) -> None:
    """Waits for signals beside the main thread, and sees to it that they are followed."""
    first = _next(told, None)
    if not first:
        return
    if _ended_in(told, SOFT):
        return
    if not state.raised:
        state.overdue = True
        signal.raise_signal(signal.Signals(first))  # runs `handle` again, between two calls of Python
        if _next(told, None) == 0:
            return
    if _ended_in(told, HARD - SOFT):
        return
    if state.raised:
        _ended_in(told, None)  # the main thread is on its way out; the second signal is still heard
        return
    marking = threading.Thread(target=_mark, args=(list(state.marks),), daemon=True)
    marking.start()
    marking.join(MARKING)
    say()
    os._exit(1)


def _mark(marks: list[Callable[[], None]]) -> None:
    for mark in marks:
        with suppress(Exception):  # the process ends now whatever happens; a run without its mark is taken over too
            mark()


def _ended_in(told: socket.socket, seconds: float | None) -> bool:
    """Whether the command ended within so many seconds; a second signal ends the process here and now."""
    number = _next(told, seconds)
    if number:
        os._exit(128 + number)
    return number == 0


def _next(told: socket.socket, seconds: float | None) -> int | None:
    """The number of the next signal that ends the work, 0 at the end of the command, None if none came in time."""
    told.settimeout(seconds)
    try:
        while True:
            number = told.recv(1)[0]
            if number == 0 or number in SIGNALS:
                return number
    except (TimeoutError, IndexError, OSError):
        return None if seconds is not None else 0
