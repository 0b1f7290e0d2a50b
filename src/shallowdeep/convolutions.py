"""Training convolutions in bf16 on a CPU at the speed that the processor has.

oneDNN's bf16 gradients leave it unused in two places: small images (the weight gradient of 512 channels on 2x2 pixels
takes 27 ms of a step where one matrix product takes 2) and depthwise convolutions (with stride 2 forty times the time
of float32). It refuses to know networks and recipes; ``benchmarks/convolutions.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MATRIX_SIDE = 4
"""The largest side of images that are convolved as one matrix product; at 8 pixels oneDNN is as fast."""


class QuickConvolutions(TorchFunctionMode):
    """Within it, 2d convolutions under CPU bf16 autocast run in the quicker of equal ways; others are untouched."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and args and _low(args[0]):
            return _convolved(*args, **kwargs)
        return func(*args, **kwargs)


def _low(x: Tensor) -> bool:
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return cast and x.device.type == "cpu" and x.ndim == 4 and x.dtype in (torch.float32, torch.bfloat16)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] | str = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    low = torch.bfloat16
    if groups > 1:
        with torch.autocast("cpu", enabled=False):
            bias = bias if bias is None else bias.float()
            return F.conv2d(x.float(), weight.float(), bias, stride, padding, dilation, groups).to(low)
    kernel = weight.shape[2:]
    same = stride == dilation == (1, 1) and padding == tuple(k // 2 for k in kernel) and all(k % 2 for k in kernel)
    if not same or max(x.shape[2:]) > MATRIX_SIDE:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y: Tensor = _AsProduct.apply(x.to(low), weight.to(low))  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(low)[:, None, None]


class _AsProduct(torch.autograd.Function):
    """Convolution with stride 1 and an output as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        out, into, height, width = weight.shape
        columns = _columns(x, (height, width))
        grad_weight = grad.permute(0, 2, 3, 1).reshape(-1, out).t() @ columns
        turned = weight.flip(2, 3).transpose(0, 1)
        return _product(grad, turned), grad_weight.view(out, height, width, into).permute(0, 3, 1, 2)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    out, _, height, width = weight.shape
    y = _columns(x, (height, width)) @ weight.permute(0, 2, 3, 1).reshape(out, -1).t()
    return y.view(x.shape[0], *x.shape[2:], out).permute(0, 3, 1, 2)


def _columns(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """What each output pixel sees, [B * H * W, kernel height * width * channels], channels innermost."""
    height, width = kernel
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, width // 2, width // 2, height // 2, height // 2))
    seen = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    return seen.reshape(seen.shape[:3].numel(), -1)
