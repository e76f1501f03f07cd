"""Floating-point operations of a forward pass, counted by torch's formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the formulas of `FlopCounterMode`, decomposing the operations that have none, as it does.

    That class also keeps torch's compiler out of its way, which imports the compiler: two seconds of every command.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def count_flops(module: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Floating-point operations of one sample's forward pass by torch's formulas; None where zeros are refused."""
    counter = _Counter()
    training, fused = module.training, torch.backends.mha.get_fastpath_enabled()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        # Fused attention is one operation that has no formula.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), counter:
            module.eval()(torch.zeros(1, *shape, device=device))
        return counter.total
    except Exception:
        # Any failure of the model on real images is reported by the checks that follow; here the number is only
        # missing.
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        module.train(training)
