"""Orthogonalised momentum for convolution filters: few epochs teach what plain momentum needs many for.

It refuses to know networks, losses and schedules. Source: Keller Jordan, "Muon: an optimizer for hidden layers in
neural networks" (2024); filters keep their norms as in his CIFAR-10 records (arXiv 2404.00498).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a Newton-Schulz step that raises small singular values fast; they end between .7 and 1.2."""

TINY = 1e-12


def filters_of(model: nn.Module) -> list[nn.Parameter]:
    """The filters of ``model``'s 2d convolutions that read several channels and have a norm to keep, each once."""
    weights = dict.fromkeys(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    return [w for w in weights if isinstance(w, nn.Parameter) and w.shape[1] > 1 and bool(w.detach().any())]


class Muon(torch.optim.Optimizer):
    """Every step brings each bank of filters [O, I, H, W] to the norm it started with, and turns it by ``lr`` of that.

    The direction is Nesterov's momentum with all its singular values brought near 1, so that rare directions move as
    far as common ones. A norm that stays is meant for filters that a normalisation follows.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.6, rounds: int = 4) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "rounds": rounds})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the filters that have gradients. ``closure`` is there for the interface and is not called."""
        for group in self.param_groups:
            for filters in group["params"]:
                if filters.grad is not None:
                    self._turn(filters, filters.grad, group)

    def _turn(self, filters: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[filters]
        if not state:
            state["norm"], state["momentum"] = filters.norm(), torch.zeros_like(filters)
        moving = state["momentum"].mul_(group["momentum"]).add_(grad)
        ahead = grad.add(moving, alpha=group["momentum"])
        turn = orthogonal(ahead.flatten(1), group["rounds"]).view_as(filters)
        lr = group["lr"] / turn.norm().clamp_min(TINY)  # a gradient of zeros turns nothing
        filters.div_(filters.norm()).sub_(turn.mul_(lr)).mul_(state["norm"])


def orthogonal(matrix: Tensor, rounds: int) -> Tensor:
    """``matrix`` [O, I] with its singular values near 1, by ``rounds`` Newton-Schulz steps in bfloat16."""
    a, b, c = QUINTIC
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = (wide / wide.norm().clamp_min(TINY)).bfloat16()
    for _ in range(rounds):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    near: Tensor = x if wide is matrix else x.t()
    return near.to(matrix.dtype)
