"""moebench: a benchmark of the adversarial robustness of mixture-of-experts vision models.

The public names are resolved when they are first used, so that `import moebench` and the command line's listings do not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebench.attacks import list_attacks, load_attack
    from moebench.evaluation import EvalSpec, evaluate
    from moebench.models import list_models, load_model
    from moebench.schema import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "EvalSpec",
    "ThreatModel",
    "__version__",
    "evaluate",
    "list_attacks",
    "list_models",
    "load_attack",
    "load_model",
]

_HOMES = {
    "EvalSpec": "moebench.evaluation",
    "ThreatModel": "moebench.schema",
    "evaluate": "moebench.evaluation",
    "list_attacks": "moebench.attacks",
    "list_models": "moebench.models",
    "load_attack": "moebench.attacks",
    "load_model": "moebench.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
