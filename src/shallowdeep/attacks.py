"""Small changes of images that keep a network from answering early: what an attacker who knows its weights can do.

It refuses to know policies and defences: pixels are moved until no exit is sure, and what that costs is measured
elsewhere. Source: DeepSloth, arXiv 2010.02432.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shallowdeep.data import Preprocessing
from shallowdeep.graph import evaluating
from shallowdeep.inputs import placed
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import DataError

ATTACK_BATCH = 256
ROUNDING = 1e-4
"""How far outside its range a pixel may lie by the rounding of a normalisation and its inverse."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How images became inputs: ``input = (pixel - mean) / std`` per channel (one entry: all alike).

    Pixels lie in ``low``..``high``, and an attacker's images must, too.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0 or not self.low < self.high:
            raise ValueError(
                "Pixels need a mean and a std above 0 per channel and low below high; "
                f"found mean {self.mean}, std {self.std}, {self.low:g}..{self.high:g}."
            )

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Pixels:
        """The pixels of images in [0, 1] that ``preprocessing`` normalises."""
        return cls(mean=preprocessing.mean, std=preprocessing.std)

    def per_channel(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lowest input, highest input and the size of one pixel unit, each [C or 1, 1, ...], for inputs ``like``.

        Raises ``DataError`` unless ``like`` holds floating images [B, C, ...] whose pixels lie in the range.
        """
        if not isinstance(like, Tensor) or not like.is_floating_point() or like.ndim < 2:
            found = f"{like.dtype} {list(like.shape)}" if isinstance(like, Tensor) else type(like).__name__
            raise DataError(f"An attack moves one tensor of floating images [B, C, ...] by gradients, found {found}.")
        if len(self.mean) not in (1, like.shape[1]):
            raise DataError(f"Pixels have {len(self.mean)} channels, the images {like.shape[1]}.")
        shape = (-1, *(1,) * (like.ndim - 2))
        mean_C, std_C = (torch.tensor(values, dtype=torch.float64).reshape(shape) for values in (self.mean, self.std))
        given = like.detach().double().cpu() * std_C + mean_C
        if not bool(((given >= self.low - ROUNDING) & (given <= self.high + ROUNDING)).all()):
            found = f"{float(given.min()):.3g}..{float(given.max()):.3g}"
            raise DataError(
                f"Pixels lie in {found}, not in {self.low:g}..{self.high:g}; "
                "say how images became inputs: Pixels(mean=..., std=..., low=..., high=...)."
            )
        bounds = (self.low - mean_C) / std_C, (self.high - mean_C) / std_C, 1 / std_C
        low, high, unit = (bound.to(like.device, like.dtype) for bound in bounds)
        return low, high, unit


PLAIN = Pixels()
"""Images in [0, 1] that nobody normalised."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How hard an attacker tries: no pixel moves by more than ``eps``, in ``steps`` steps of ``step_size``.

    Sizes are in the units of pixels. A row starts at a random place within ``step_size`` of its image. ``exits`` are
    those pushed towards the uniform distribution; None: all but the last, where rows stop anyhow. The defaults are
    DeepSloth's. In ``bf16`` a CPU that knows it takes half of the time.
    """

    eps: float = 8 / 255
    steps: int = 30
    step_size: float = 0.002
    exits: tuple[int, ...] | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        if not self.eps >= 0 or not self.step_size > 0 or self.steps < 0 or self.exits == ():
            raise ValueError(
                "An attack needs eps >= 0, steps >= 0, step_size > 0 and an exit to push; "
                f"found {self.eps}, {self.steps}, {self.step_size}, {self.exits}."
            )

    def pushes(self, sdn: ShallowDeepNetwork) -> list[int]:
        """The exits of ``sdn`` that are pushed. Raises ``ValueError`` for one that it does not have."""
        last = sdn.num_exits - 1
        wrong = [exit for exit in self.exits or () if not 0 <= exit <= last]
        if wrong:
            raise ValueError(f"No exit {wrong[0]} to push; the exits are 0..{last}.")
        return list(range(last)) if self.exits is None else list(self.exits)


DEEPSLOTH = Attack()


def slowdown(
    sdn: ShallowDeepNetwork,
    images_B: Tensor,
    attack: Attack = DEEPSLOTH,
    *,
    pixels: Pixels = PLAIN,
    batch_size: int = ATTACK_BATCH,
    seed: int = 0,
) -> Tensor:
    """``images_B`` (inputs [B, C, ...]) changed, each on its own, so that no exit of ``sdn`` is sure of anything.

    Projected gradient steps on the cross-entropy of every pushed exit with the uniform distribution, summed over exits
    (arXiv 2010.02432, section 4). Gradients are whole: they also flow through what an IC reads of the exit before it.
    ``sdn`` is left as it was: weights, gradients, statistics, modes. Raises ``DataError`` for inputs that are not
    floating images within ``pixels``.

    >>> import shallowdeep as sd
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), *(torch.nn.Linear(4, 4) for _ in range(3)))
    >>> sdn = sd.attach(net, sd.plan(net, torch.zeros(2, 1, 2, 2), at=(0.3,)))
    >>> moved = slowdown(sdn, torch.full((3, 1, 2, 2), 0.5), Attack(eps=0.1, step_size=0.05))
    >>> bool(((moved - 0.5).abs() <= 0.1 + 1e-6).all())
    True
    """
    exits = attack.pushes(sdn)
    low, high, unit = pixels.per_channel(images_B)
    images_B = images_B.detach()
    if not len(images_B):
        return images_B.clone()
    start = torch.rand(images_B.shape, generator=torch.Generator().manual_seed(seed)).to(images_B) * 2 - 1
    parts = []
    with evaluating(sdn):
        for x, start_B in zip(torch.split(images_B, batch_size), torch.split(start, batch_size), strict=True):
            # Rounding may have put a pixel a hair outside; it may stay where it is.
            lowest = torch.maximum(x - attack.eps * unit, torch.minimum(low, x))
            highest = torch.minimum(x + attack.eps * unit, torch.maximum(high, x))
            moved = torch.clamp(x + start_B * min(attack.step_size, attack.eps) * unit, lowest, highest)
            for _ in range(attack.steps):
                step = _gradient(sdn, moved, exits, bf16=attack.bf16).sign() * attack.step_size * unit
                moved = torch.clamp(moved - step, lowest, highest)
            parts.append(moved)
    return torch.cat(parts)


def universal(
    sdn: ShallowDeepNetwork,
    images_B: Tensor,
    attack: Attack = DEEPSLOTH,
    *,
    pixels: Pixels = PLAIN,
    batch_size: int = 128,
    seed: int = 0,
) -> Tensor:
    """One change [C, ...], in the units of pixels, that slows all images down when ``added`` to them.

    As ``slowdown``, but a step follows the gradient summed over a batch, and batches of ``images_B``, which are the
    attacker's own, take turns. Starts at random within ``eps``.
    """
    exits = attack.pushes(sdn)
    low, high, unit = pixels.per_channel(images_B)
    if not len(images_B):
        raise DataError("A universal perturbation needs images to be made from, found none.")
    generator = torch.Generator().manual_seed(seed)
    delta = (torch.rand(images_B.shape[1:], generator=generator).to(images_B) * 2 - 1) * attack.eps
    order_B = torch.randperm(len(images_B), generator=generator).to(images_B.device)
    batches = torch.split(order_B, batch_size)
    with evaluating(sdn):
        for turn in range(attack.steps):
            x = images_B.detach()[batches[turn % len(batches)]] + delta * unit
            inside = (x >= low) & (x <= high)
            gradient = _gradient(sdn, torch.clamp(x, low, high), exits, bf16=attack.bf16) * inside
            delta = torch.clamp(delta - gradient.sum(0).sign() * attack.step_size, -attack.eps, attack.eps)
    return delta


def added(images_B: Tensor, delta: Tensor, pixels: Pixels = PLAIN) -> Tensor:
    """``images_B`` (inputs [B, C, ...]) with ``delta`` (pixel units, [C, ...] or [B, C, ...]) added, kept in range.

    >>> added(torch.full((1, 1, 2), 0.9), torch.tensor([[0.25, -0.25]])).tolist()
    [[[1.0, 0.6499999761581421]]]
    """
    low, high, unit = pixels.per_channel(images_B)
    moved = images_B + delta.to(images_B) * unit
    return torch.clamp(moved, torch.minimum(low, images_B), torch.maximum(high, images_B))


def noise(images_B: Tensor, eps: float = 8 / 255, *, pixels: Pixels = PLAIN, seed: int = 0) -> Tensor:
    """``images_B`` with every pixel moved up or down by ``eps``, at random: what an attack must beat.

    >>> (noise(torch.full((1, 1, 3), 0.5), 0.25) - 0.5).abs().tolist()
    [[[0.25, 0.25, 0.25]]]
    """
    draws = torch.rand(images_B.shape, generator=torch.Generator().manual_seed(seed)).to(images_B.device)
    return added(images_B, torch.where(draws < 0.5, -eps, eps), pixels)


def _gradient(sdn: ShallowDeepNetwork, x: Tensor, exits: list[int], *, bf16: bool) -> Tensor:
    """Of the summed cross-entropy of ``exits`` with the uniform distribution, at inputs ``x``; 0 where not a number."""
    # Whatever mode the caller runs in, gradients are needed here, and only those of the inputs are asked for.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = placed(x, next(sdn.parameters()).device).clone().requires_grad_()
        with torch.autocast(leaf.device.type, torch.bfloat16, enabled=bf16):
            logits_EBC = sdn.answers(leaf, linked=True)
        away = -logits_EBC[exits].float().log_softmax(-1).mean(-1).sum()
        (gradient,) = torch.autograd.grad(away, leaf)
    return gradient.nan_to_num(nan=0.0).to(x.device)
