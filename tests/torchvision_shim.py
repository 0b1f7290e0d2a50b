"""timm and transformers import torchvision, whose wheel on PyPI is built for CUDA and fails beside a CPU torch.

All they need of its compiled part are two names; ``define_operators`` declares them where the real ones are missing.
"""

import contextlib

import torch

_kept: list[torch.library.Library] = []


def define_operators() -> None:
    """Declare ``torchvision::nms`` and ``qnms`` once, unless the installed torchvision brings them."""
    if _kept:
        return
    # What else is missing or broken, the test that needs torchvision will say.
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The declarations last only as long as the library object.
    _kept.append(library)
