"""The driver's loop: hands shards to workers, hands on what they find, and repeats what is lost. It knows no Ray.

A shard that fails is tried again at the end of the queue, up to a number of times; one that is lost with its machine is
tried again at once, for that says nothing of the shard. When nothing waits any more and a worker is free, shards that
take far longer than the others are started a second time; what comes first counts, and both give the same verdicts.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class ShardError(Exception):
    """A shard failed in its worker; the message is one line."""


class LostError(Exception):
    """A machine went away with a shard; the message is one line."""


class Workers(Protocol[Item_contra, Result_co]):
    """Where shards run. A ticket stands for one that was handed in."""

    def room(self) -> int:
        """How many shards run at the same time, as things stand."""

    def submit(self, item: Item_contra) -> Hashable:
        """Hands a shard in."""

    def ready(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        """Those that are over, well or not; waits up to so many seconds for the first."""

    def result(self, ticket: Hashable) -> Result_co:
        """What came out of one that is over.

        Raises:
            ShardError: it failed, or ended its worker.
            LostError: its machine is gone.
        """

    def cancel(self, ticket: Hashable) -> None:
        """Gives one up."""


@dataclass(frozen=True)
class Policy:
    """When to try again.

    Attributes:
        tries: how often a shard may fail.
        losses: how often a shard may be lost with its machine.
        slow_factor, slow_seconds: a shard is slow that takes longer than so many times the median, and than so long.
        ahead: share of the workers for which one more shard is handed in, so that they need not wait for it.
        together: results that are handed on at once, at most.
        poll: seconds between two looks at how many workers there are.
    """

    tries: int = 3
    losses: int = 10
    slow_factor: float = 4.0
    slow_seconds: float = 60.0
    ahead: float = 0.25
    together: int = 64
    poll: float = 2.0


@dataclass(frozen=True)
class Failure:
    """A shard that was given up: its place among the items, how often it was tried, and the last error in one line."""

    place: int
    tries: int
    error: str


@dataclass
class _Running:
    place: int
    begun: float


@dataclass
class Drive(Generic[Item, Result]):
    """One run of all items through the workers.

    Args:
        items: the shards.
        workers: where they run.
        keep: is given results as they come in; what it raises ends the run.
        policy: when to try again.
    """

    items: Sequence[Item]
    workers: Workers[Item, Result]
    keep: Callable[[list[Result]], None]
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        self._waiting = deque(range(len(self.items)))
        self._running: dict[Hashable, _Running] = {}
        self._over: set[int] = set()
        self._failures: dict[int, Failure] = {}
        self._failed: Counter[int] = Counter()
        self._lost: Counter[int] = Counter()
        self._seconds: deque[float] = deque(maxlen=1001)
        self._room = 0
        self._looked = float("-inf")

    def run(self) -> list[Failure]:
        """Runs all items; returns those that were given up, in their order."""
        try:
            while len(self._over) < len(self.items):
                self._fill()
                done = self.workers.ready(list(self._running), min(self.policy.poll, 0.5))
                for first in range(0, len(done), self.policy.together):
                    self._collect(done[first : first + self.policy.together])
                self._double_slow_ones()
        finally:
            for ticket in self._running:
                self.workers.cancel(ticket)
        return [self._failures[place] for place in sorted(self._failures)]

    def _fill(self) -> None:
        now = time.monotonic()
        if now - self._looked >= self.policy.poll:
            self._room, self._looked = self.workers.room(), now
        # At least one, so that a cluster without machines for the moment has something to start machines for.
        limit = max(1, self._room + round(self._room * self.policy.ahead))
        while self._waiting and len(self._running) < limit:
            self._start(self._waiting.popleft())

    def _start(self, place: int) -> None:
        self._running[self.workers.submit(self.items[place])] = _Running(place, time.monotonic())

    def _collect(self, tickets: Sequence[Hashable]) -> None:
        found: list[Result] = []
        for ticket in tickets:
            one = self._running.pop(ticket, None)
            if one is None:
                continue  # the other of two attempts was first
            try:
                result = self.workers.result(ticket)
            except ShardError as error:
                self._failed[one.place] += 1
                self._again(one.place, str(error), self._failed[one.place] < self.policy.tries, at_once=False)
            except LostError as error:
                self._lost[one.place] += 1
                self._again(one.place, str(error), self._lost[one.place] < self.policy.losses, at_once=True)
            else:
                found.append(result)
                self._over.add(one.place)
                self._seconds.append(time.monotonic() - one.begun)
                self._forget_double(one.place)
        if found:
            self.keep(found)

    def _again(self, place: int, error: str, more: bool, *, at_once: bool) -> None:
        if any(one.place == place for one in self._running.values()):
            return  # a second attempt is on its way
        if not more:
            self._over.add(place)
            self._failures[place] = Failure(place, self._failed[place] + self._lost[place], error)
        elif at_once:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)

    def _forget_double(self, place: int) -> None:
        for ticket in [ticket for ticket, one in self._running.items() if one.place == place]:
            self.workers.cancel(ticket)
            del self._running[ticket]

    def _double_slow_ones(self) -> None:
        if self._waiting or len(self._seconds) < 3:
            return
        limit = max(self.policy.slow_seconds, self.policy.slow_factor * median(self._seconds))
        attempts = Counter(one.place for one in self._running.values())
        now = time.monotonic()
        for one in list(self._running.values()):
            if len(self._running) >= self._room:
                return
            if attempts[one.place] == 1 and now - one.begun > limit:
                self._start(one.place)
