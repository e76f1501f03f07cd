"""The driver's loop with workers that do what a test says: retries, losses, stragglers, and what ends a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import pytest

from moebench.cluster.loop import Drive, Failure, LostError, Policy, ShardError

Outcome = str | Exception
QUICK = Policy(slow_seconds=0.05, poll=0.0)


class Fakes:
    """Workers whose answer to the n-th attempt at a shard is `say(shard, n)`; None never comes."""

    def __init__(self, say: Callable[[int, int], Outcome | None], room: int = 3) -> None:
        self.say, self.places = say, room
        self.attempts: Counter[int] = Counter()
        self.tickets: dict[Hashable, Outcome | None] = {}
        self.most = 0
        self.cancelled: list[Hashable] = []

    def room(self) -> int:
        return self.places

    def submit(self, item: int) -> Hashable:
        self.attempts[item] += 1
        ticket = (item, self.attempts[item])
        self.tickets[ticket] = self.say(*ticket)
        self.most = max(self.most, len(self.tickets))
        return ticket

    def ready(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        assert set(tickets) == set(self.tickets)
        found = [ticket for ticket in tickets if self.tickets[ticket] is not None]
        if not found:
            time.sleep(min(seconds, 0.01))
        return found

    def result(self, ticket: Hashable) -> str:
        outcome = self.tickets.pop(ticket)
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def cancel(self, ticket: Hashable) -> None:
        self.cancelled.append(ticket)
        del self.tickets[ticket]


def drive(fakes: Fakes, count: int, policy: Policy = QUICK) -> tuple[list[str], list[Failure]]:
    kept: list[str] = []
    failures = Drive(range(count), fakes, kept.extend, policy).run()
    assert fakes.tickets == {}
    return kept, failures


def test_every_shard_comes_back_once_and_the_window_is_kept() -> None:
    fakes = Fakes(lambda item, attempt: f"{item}", room=8)
    kept, failures = drive(fakes, 100)
    assert sorted(map(int, kept)) == list(range(100)) and failures == []
    assert fakes.most == 10  # eight, and a quarter ahead


def test_nothing_to_do() -> None:
    assert drive(Fakes(lambda item, attempt: None), 0) == ([], [])


def test_a_cluster_without_machines_still_has_a_task_that_asks_for_one() -> None:
    fakes = Fakes(lambda item, attempt: f"{item}", room=0)
    assert len(drive(fakes, 3)[0]) == 3 and fakes.most == 1


def test_an_error_is_tried_again_behind_the_others() -> None:
    fakes = Fakes(lambda item, attempt: ShardError("once") if (item, attempt) == (0, 1) else f"{item}", room=1)
    kept, failures = drive(fakes, 4, Policy(ahead=0.0, poll=0.0))
    assert (kept, failures) == (["1", "2", "3", "0"], [])


def test_a_shard_that_always_fails_is_given_up_and_the_rest_finishes() -> None:
    fakes = Fakes(lambda item, attempt: ShardError(f"attempt {attempt}") if item == 2 else f"{item}")
    kept, failures = drive(fakes, 6)
    assert sorted(kept) == ["0", "1", "3", "4", "5"] and failures == [Failure(2, 3, "attempt 3")]


def test_a_lost_machine_does_not_count_against_its_shard() -> None:
    fakes = Fakes(lambda item, attempt: LostError("gone") if attempt <= 5 else f"{item}")
    kept, failures = drive(fakes, 4)
    assert sorted(kept) == ["0", "1", "2", "3"] and failures == []
    forever = Fakes(lambda item, attempt: LostError("gone"))
    assert drive(forever, 1, Policy(losses=4, poll=0.0))[1] == [Failure(0, 4, "gone")]


def test_a_straggler_is_overtaken_and_cancelled() -> None:
    fakes = Fakes(lambda item, attempt: None if (item, attempt) == (1, 1) else f"{item}")
    kept, failures = drive(fakes, 6)
    assert sorted(kept) == [str(item) for item in range(6)] and failures == []
    assert fakes.cancelled == [(1, 1)] and fakes.attempts[1] == 2


def test_a_straggler_is_started_no_third_time() -> None:
    begun = time.monotonic()

    def say(item: int, attempt: int) -> Outcome | None:
        return f"{item}" if item else None

    fakes = Fakes(say)
    original = fakes.ready

    def ready(tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        if time.monotonic() - begun > 0.4:
            fakes.tickets[0, 1] = "late"
        return original(tickets, seconds)

    fakes.ready = ready  # type: ignore[method-assign]
    assert sorted(drive(fakes, 5)[0]) == ["1", "2", "3", "4", "late"]
    assert fakes.attempts[0] == 2 and fakes.cancelled == [(0, 2)]


def test_both_attempts_at_a_straggler_may_fail() -> None:
    def say(item: int, attempt: int) -> Outcome | None:
        if item:
            return f"{item}"
        return None if attempt == 1 else ShardError(f"attempt {attempt}")

    fakes = Fakes(say)
    original = fakes.ready

    def ready(tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        if fakes.attempts[0] >= 2 and (0, 1) in fakes.tickets:
            fakes.tickets[0, 1] = LostError("gone")
        return original(tickets, seconds)

    fakes.ready = ready  # type: ignore[method-assign]
    kept, failures = drive(fakes, 5)
    assert sorted(kept) == ["1", "2", "3", "4"]
    assert len(failures) == 1 and failures[0].place == 0 and failures[0].tries >= 3


def test_two_attempts_that_end_together_count_once() -> None:
    fakes = Fakes(lambda item, attempt: None if item == 0 else f"{item}")
    original = fakes.ready

    def ready(tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        if fakes.attempts[0] == 2:
            fakes.tickets = {ticket: "both" for ticket in fakes.tickets}
        return original(tickets, seconds)

    fakes.ready = ready  # type: ignore[method-assign]
    assert sorted(drive(fakes, 5)[0]) == ["1", "2", "3", "4", "both"]


def test_what_the_caller_raises_ends_the_run_and_cancels_the_rest() -> None:
    fakes = Fakes(lambda item, attempt: f"{item}" if item == 0 else None)

    def keep(found: list[str]) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        Drive(range(5), fakes, keep, QUICK).run()
    assert fakes.tickets == {} and len(fakes.cancelled) == 3


def test_results_are_handed_on_in_groups() -> None:
    groups: list[int] = []
    fakes = Fakes(lambda item, attempt: f"{item}", room=40)
    Drive(range(100), fakes, lambda found: groups.append(len(found)), Policy(together=7, poll=0.0)).run()
    assert sum(groups) == 100 and max(groups) == 7
