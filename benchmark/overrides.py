"""Overrides of a trained model's routing, as `--routing` writes them; without torch, so that typos answer at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moebench.errors import UsageError

PART = re.compile(r"(?P<kind>top-k|drop-best)(?:=(?P<count>[1-9][0-9]{0,4}))?")


@dataclass(frozen=True)
class RoutingOverride:
    """What every MoE layer is made to do, however it was trained.

    Attributes:
        top_k: experts per sample or token; None leaves each layer its own number.
        barred: so many of the best experts do as if they were not there; 0 for as many as the layer selects, None for
            none.
    """

    top_k: int | None = None
    barred: int | None = None

    def __str__(self) -> str:
        parts = [] if self.top_k is None else [f"top-k={self.top_k}"]
        if self.barred is not None:
            parts.append(f"drop-best={self.barred}" if self.barred else "drop-best")
        return ",".join(parts)

    def on(self, top_ks: Iterable[int]) -> RoutingOverride:
        """The override by its one name on a model.

        Where every layer selects K, `top-k=K` says nothing (by itself, it is no override at all), and `drop-best=K` is
        `drop-best`. Where layers differ, `top-k=K` changes some of them and `drop-best=K` means something else.

        Args:
            top_ks: how many experts each MoE layer of the model selects, before it is overridden.
        """
        before = set(top_ks)
        after = before if self.top_k is None else {self.top_k}
        return RoutingOverride(
            top_k=None if before == {self.top_k} else self.top_k, barred=0 if after == {self.barred} else self.barred
        )


def parse_routing(text: str) -> RoutingOverride:
    """The override that a text such as "top-k=1", "drop-best", "drop-best=1" or "top-k=1,drop-best" asks for.

    Raises:
        UsageError: the text is none of these.
    """
    found: dict[str, int] = {}
    for part in (word.strip() for word in text.split(",")):
        match = PART.fullmatch(part)
        if match is None or (match["kind"] == "top-k" and match["count"] is None) or match["kind"] in found:
            raise UsageError(
                "--routing takes top-k=N, drop-best (the selected experts) or drop-best=N (the N best), each once and "
                f"N >= 1, such as top-k=1,drop-best; got {text!r}"
            )
        found[match["kind"]] = int(match["count"] or 0)
    return RoutingOverride(found.get("top-k"), found.get("drop-best"))
