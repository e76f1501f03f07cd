"""A store that is read once: several pages are made from the same results and the same evidence."""

from __future__ import annotations

from collections.abc import Sequence

from moebench.report.evidence import ReadableStore
from moebench.schema import Claim, Example, IntArray, Outcomes, ProtocolRecord, StoredResult, StoredRun


class Cached:
    """Answers like the store that it is given, and asks it each question once."""

    def __init__(self, store: ReadableStore) -> None:
        self._store = store
        self._claims: Sequence[Claim] | None = None
        self._runs: Sequence[StoredRun] | None = None
        self._results: dict[bool, Sequence[StoredResult]] = {}
        self._outcomes: dict[int, Outcomes] = {}
        self._labels: dict[ProtocolRecord, IntArray | None] = {}

    def results(self, *, newest_only: bool = True) -> Sequence[StoredResult]:
        """Finished cells; without `newest_only` also those that a later one replaces."""
        if newest_only not in self._results:
            self._results[newest_only] = self._store.results(newest_only=newest_only)
        return self._results[newest_only]

    def outcomes(self, result_id: int, /) -> Outcomes:
        """The per-sample evidence of one of them."""
        if result_id not in self._outcomes:
            self._outcomes[result_id] = self._store.outcomes(result_id)
        return self._outcomes[result_id]

    def labels(self, protocol: ProtocolRecord, /) -> IntArray | None:
        """The labels (n,) of a protocol's samples; None where they are not stored."""
        if protocol not in self._labels:
            self._labels[protocol] = self._store.labels(protocol)
        return self._labels[protocol]

    def examples(self, result_id: int, /) -> Sequence[Example]:
        """A few samples that a result broke, as pictures; asked for once each, so not kept."""
        return self._store.examples(result_id)

    def claims(self) -> Sequence[Claim]:
        """The published numbers."""
        if self._claims is None:
            self._claims = self._store.claims()
        return self._claims

    def runs(self) -> Sequence[StoredRun]:
        """All runs, failed ones too."""
        if self._runs is None:
            self._runs = self._store.runs()
        return self._runs
