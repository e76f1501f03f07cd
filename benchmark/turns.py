"""In which order a run does its cells: its own order, and those that another process works on when it is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from moebench.errors import InWorkError

POLL = 1.0
"""Seconds between two looks at a cell that is waited for."""


class Turns:
    """The numbers of a run's cells, one after the other.

    Two commands that want the same cells share them in this way, be it on two machines: each takes what the other has
    not begun, and at the end waits for the last one, or goes on with it if its process dies.

    Args:
        count: of the cells.
        waiting: told the number of a cell that is waited for, and who works on it.
    """

    def __init__(self, count: int, waiting: Callable[[int, InWorkError], None]) -> None:
        self._waiting = waiting
        self._left = deque(range(count))
        self._held: dict[int, InWorkError] = {}
        self.changed = False
        """Whether cells came in another order than their own."""

    def __iter__(self) -> Iterator[int]:
        while self._left:
            number = self._left.popleft()
            if number in self._held:
                # All cells that nobody held have had their turn.
                self._waiting(number, self._held.pop(number))
                time.sleep(POLL)
            yield number

    def put_off(self, number: int, holder: InWorkError) -> None:
        """Another process works on the cell; it comes again."""
        self.changed = True
        self._held[number] = holder
        self._left.append(number)
