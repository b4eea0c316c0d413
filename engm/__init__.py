"""ENGM, the outer optimizer for adversarial training of arXiv 2209.01199: learn, test, use it.

    from engm import ENGM, PGD, PGDAT

Names are looked up when they are first used, so that `import engm` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engm.attacks import FGSM, PGD
    from engm.config import RunConfig
    from engm.evaluation.suite import evaluate
    from engm.methods import AWP, MART, PGDAT, TRADES, Natural
    from engm.optim import ENGM, MSGD
    from engm.training import fit

__all__ = [
    "AWP", "ENGM", "FGSM", "MART", "MSGD", "PGD", "PGDAT", "TRADES",
    "Natural", "RunConfig", "evaluate", "fit",
]  # fmt: skip

_HOMES = {
    "attacks": ("FGSM", "PGD"),
    "config": ("RunConfig",),
    "methods": ("AWP", "MART", "Natural", "PGDAT", "TRADES"),
    "optim": ("ENGM", "MSGD"),
    "evaluation.suite": ("evaluate",),
    "training": ("fit",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"engm.{module}"), name)
    raise AttributeError(f"module 'engm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for completion: those that are not loaded yet, too
