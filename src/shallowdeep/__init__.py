"""Any PyTorch classifier in, an honest early-exit classifier out: Shallow-Deep Networks (arXiv 1810.07052) as software.

Names load on first use (PEP 562), so that ``sdn --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallowdeep.calibration import calibrate as calibrate
    from shallowdeep.calibration import evaluate as evaluate
    from shallowdeep.calibration import tradeoff as tradeoff
    from shallowdeep.collection import collect as collect
    from shallowdeep.cuts import plan as plan
    from shallowdeep.disagreement import confusion as confusion
    from shallowdeep.disagreement import fit_confusion as fit_confusion
    from shallowdeep.effects import overthinking as overthinking
    from shallowdeep.joint import train_jointly as train_jointly
    from shallowdeep.network import ShallowDeepNetwork as ShallowDeepNetwork
    from shallowdeep.network import attach as attach
    from shallowdeep.network import detach as detach
    from shallowdeep.network import load as load
    from shallowdeep.network import save as save
    from shallowdeep.runtime.engine import Engine as Engine
    from shallowdeep.training import train_exits as train_exits
    from shallowdeep.types import Answer as Answer
    from shallowdeep.types import Plan as Plan
    from shallowdeep.types import Trace as Trace
    from shallowdeep.walking import simulate as simulate

__version__ = "0.1.0"

_HOMES = {
    "plan": "cuts",
    "attach": "network",
    "detach": "network",
    "save": "network",
    "load": "network",
    "ShallowDeepNetwork": "network",
    "train_exits": "training",
    "train_jointly": "joint",
    "collect": "collection",
    "overthinking": "effects",
    "confusion": "disagreement",
    "fit_confusion": "disagreement",
    "simulate": "walking",
    "calibrate": "calibration",
    "evaluate": "calibration",
    "tradeoff": "calibration",
    "Engine": "runtime.engine",
    "Answer": "types",
    "Plan": "types",
    "Trace": "types",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shallowdeep' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"shallowdeep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
