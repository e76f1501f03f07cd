"""Choices that users make by name: a wrong one is answered with the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from moebench.errors import UsageError

SHOWN = 12
"""How many choices a message lists."""


def one_of(kind: str, wanted: str, known: Iterable[str]) -> str:
    """The choice that was meant: the name itself, whatever its case.

    Raises:
        UsageError: nothing has that name; the nearest are offered.
    """
    names = list(dict.fromkeys(known))
    if wanted in names:
        return wanted
    folded = {name.casefold(): name for name in reversed(names)}
    if wanted.casefold() in folded:
        return folded[wanted.casefold()]
    close = difflib.get_close_matches(wanted.casefold(), folded, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(folded[one] for one in close)}? " if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UsageError(f"unknown {kind} {wanted!r}; {hint}there is {', '.join(names[:SHOWN]) or 'none'}{more}")
