"""Internal classifiers: how a crossing tensor becomes logits, and how large such a head may be.

It refuses to know where in a network it sits and how it is trained. Every IC has two halves: ``reduce`` has no
parameters, so its result can be cached while the weights of ``classify`` are trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shallowdeep.types import ClassifierSpec, CutPoint, DataError

PAPER_GRID = 4
MACS_LIMIT = 0.02
PARAMS_LIMIT = 0.05
Factory = Callable[[tuple[int, ...], int], nn.Module]


class InternalClassifier(nn.Module):
    """A head at a cut point: ``classify(reduce(x))`` gives logits [B, C]."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec

    def reduce(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The crossing tensor [B, ...] as ``spec.views`` feature vectors [B, V, D]; no parameters take part.

        Maps are pooled to at most ``spec.grid`` by maximum and by mean; tokens give the first real token and the mean
        of the real ones (``mask`` [B, T], non-zero = real), so padding cannot change them; vectors pass.
        """
        spec = self.spec
        if spec.layout == "vector":
            return x.unsqueeze(1)
        if spec.layout == "tokens":
            return _reduce_tokens(x, mask, spec.views)
        return _reduce_map(x.movedim(-1, 1) if spec.channel_dim == -1 else x, spec)

    def classify(self, reduced_BVD: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Logits [B, C]; ``previous_BC`` are the log-probabilities of the exit before, or None when it is absent."""
        raise NotImplementedError

    def forward(self, x: Tensor, previous_BC: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.reduce(x, mask), previous_BC)


def _reduce_map(x: Tensor, spec: ClassifierSpec) -> Tensor:
    kernel = [math.ceil(side / cells) for side, cells in zip(x.shape[2:], spec.grid, strict=True)]
    if spec.views == 1:
        return x.flatten(1).unsqueeze(1)
    pools = {1: (F.max_pool1d, F.avg_pool1d), 2: (F.max_pool2d, F.avg_pool2d), 3: (F.max_pool3d, F.avg_pool3d)}
    largest, mean = pools[x.ndim - 2]
    return torch.stack([largest(x, kernel).flatten(1), mean(x, kernel).flatten(1)], dim=1)


def _reduce_tokens(x: Tensor, mask: Tensor | None, views: int) -> Tensor:
    if views == 1:
        return x.flatten(1).unsqueeze(1)
    if mask is None or mask.shape != x.shape[:2]:
        return torch.stack([x[:, 0], x.mean(1)], dim=1)
    real = (mask != 0).to(x.dtype)
    # The first real token, not position 0: with padding on the left that would be a pad.
    first = x[torch.arange(x.shape[0], device=x.device), real.argmax(1)]
    mean = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.stack([first, mean], dim=1)


class PaperClassifier(InternalClassifier):
    """The IC of arXiv 1810.07052, section 4: learned mix of max and mean pooling, then one linear layer."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__(spec)
        self.mix = nn.Parameter(torch.rand(1)) if spec.views == 2 else None
        self.linear = nn.Linear(spec.features, spec.num_classes)

    def classify(self, reduced_BVD: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        return self.linear(_mixed(reduced_BVD, self.mix))


def _mixed(reduced_BVD: Tensor, mix: Tensor | None) -> Tensor:
    if mix is None:
        return reduced_BVD[:, 0]
    return mix * reduced_BVD[:, 0] + (1 - mix) * reduced_BVD[:, 1]


class StrongClassifier(InternalClassifier):
    """A linear path beside a normalised hidden layer, fed with the previous exit's log-probabilities."""

    def __init__(self, spec: ClassifierSpec, dropout: float = 0.25) -> None:
        super().__init__(spec)
        self.mix = nn.Parameter(torch.full((1,), 0.5)) if spec.views == 2 else None
        self.linear: nn.Module = nn.Linear(spec.features, spec.num_classes)
        self.hidden = None
        if spec.hidden:
            self.hidden = nn.Sequential(
                nn.LayerNorm(spec.features),
                nn.Linear(spec.features, spec.hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(spec.hidden, spec.num_classes),
            )
        self.feed = nn.Linear(spec.num_classes, spec.num_classes, bias=False) if spec.fed else None

    def classify(self, reduced_BVD: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        x = _mixed(reduced_BVD, self.mix)
        logits = self.linear(x)
        if self.hidden is not None:
            logits = logits + self.hidden(x)
        if self.feed is not None and previous_BC is not None:
            logits = logits + self.feed(previous_BC.to(logits.dtype))
        return logits


class CustomClassifier(InternalClassifier):
    """A user's own module: it sees the whole crossing tensor, and its answer is its own."""

    def __init__(self, spec: ClassifierSpec, module: nn.Module) -> None:
        super().__init__(spec)
        self.module = module

    def reduce(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x

    def classify(self, reduced_BVD: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        return self.module(reduced_BVD)


def make_classifier(spec: ClassifierSpec, factory: Factory | None = None) -> InternalClassifier:
    """A new IC of the size ``spec``, freshly initialised from torch's global generator."""
    if spec.kind == "paper":
        return PaperClassifier(spec)
    if spec.kind == "strong":
        return StrongClassifier(spec)
    if factory is None:
        raise DataError(f"The plan's classifiers are of the user's own kind {spec.kind!r}; give the factory again.")
    return CustomClassifier(spec, factory(spec.shape, spec.num_classes))


def size_classifier(
    kind: str,
    cut: CutPoint,
    num_classes: int,
    total_macs: int,
    total_params: int,
    fed: bool,
    factory: Factory | None = None,
) -> ClassifierSpec:
    """How large an IC of ``kind`` is at ``cut``; a strong one keeps to 2 % of the macs and 5 % of the parameters.

    The paper's keeps the paper's size. A strong one that would pass a limit pools to a coarser grid, then narrows its hidden
    layer, then takes a linear path of low rank. Raises ``DataError`` for an unknown kind.
    """
    if kind == "custom" and factory is not None:
        return _size_custom(cut, num_classes, factory)
    if kind not in ("paper", "strong"):
        raise DataError(f"No classifier {kind!r}. Possible: 'strong', 'paper', or a function (shape, num_classes).")
    sizes = [_size(kind, cut, num_classes, fed and kind == "strong", grid) for grid in (PAPER_GRID, 2, 1)]
    if kind == "paper":
        return sizes[0]
    macs, params = int(MACS_LIMIT * total_macs), int(PARAMS_LIMIT * total_params)
    for spec in sizes:
        hidden = _widest(spec, macs, params)
        if hidden >= LEAST_HIDDEN or (spec is sizes[-1] and hidden > 0):
            return _counted(dataclasses.replace(spec, hidden=hidden))
    for spec in sizes:
        if spec.macs <= macs and spec.params <= params:
            return spec
    smallest = sizes[-1]
    rank = max(1, min(macs, params) // (smallest.features + smallest.num_classes + 1))
    return _counted(dataclasses.replace(smallest, fed=False, rank=min(rank, smallest.num_classes)))


LEAST_HIDDEN, MOST_HIDDEN = 64, 512


def _widest(spec: ClassifierSpec, macs: int, params: int) -> int:
    """The widest hidden layer within the limits, in steps of 8; 0 where none fits."""
    low, high = 0, MOST_HIDDEN // 8
    while low < high:
        middle = (low + high + 1) // 2
        grown = _counted(dataclasses.replace(spec, hidden=8 * middle))
        fits = grown.macs <= macs and grown.params <= params
        low, high = (middle, high) if fits else (low, middle - 1)
    return 8 * low


def _size(kind: str, cut: CutPoint, num_classes: int, fed: bool, cells: int) -> ClassifierSpec:
    layout, shape = cut.layout, cut.shape
    grid: tuple[int, ...] = ()
    if layout == "map":
        sides = shape[:-1] if cut.channel_dim == -1 else shape[1:]
        channels = shape[-1] if cut.channel_dim == -1 else shape[0]
        grid = tuple(min(cells, side) for side in sides)
        pooled = math.prod(side // math.ceil(side / g) for side, g in zip(sides, grid, strict=True))
        # The paper mixes two poolings from side 4 on (there both are the map itself); below, nothing is pooled.
        views = 2 if max(sides) >= PAPER_GRID or grid != tuple(sides) else 1
        features = channels * pooled
    else:
        views = 2 if layout == "tokens" and shape[0] > 1 else 1
        features = shape[-1]
    return _counted(
        ClassifierSpec(
            kind=kind,
            layout=layout,
            channel_dim=cut.channel_dim,
            shape=shape,
            num_classes=num_classes,
            grid=grid,
            views=views,
            features=features,
            fed=fed,
            macs=0,
            params=0,
        )
    )


def _counted(spec: ClassifierSpec) -> ClassifierSpec:
    """``spec`` with the macs and parameters that its module really has, counted on the meta device."""
    with torch.device("meta"):
        module = make_classifier(spec)
        reduced = torch.empty(1, spec.views, spec.features)
        previous = torch.empty(1, spec.num_classes) if spec.fed else None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module.eval().classify(reduced, previous)
    params = sum(p.numel() for p in module.parameters())
    return dataclasses.replace(spec, macs=counter.get_total_flops() // 2, params=params)


def _size_custom(cut: CutPoint, num_classes: int, factory: Factory) -> ClassifierSpec:
    module = factory(cut.shape, num_classes)
    if not isinstance(module, nn.Module):
        raise DataError(f"The classifier factory must return a module, found {type(module).__name__}.")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    modes = module.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer = module.eval()(torch.zeros(2, *cut.shape, device=device))
    module.train(modes)
    if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise DataError(f"The classifier at {cut.name!r} must answer [B, {num_classes}], found {found} for two rows.")
    return ClassifierSpec(
        kind="custom",
        layout=cut.layout,
        channel_dim=cut.channel_dim,
        shape=cut.shape,
        num_classes=num_classes,
        features=math.prod(cut.shape),
        macs=counter.get_total_flops() // 4,
        params=sum(p.numel() for p in module.parameters()),
    )
