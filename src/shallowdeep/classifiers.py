"""Internal classifiers: how a crossing tensor becomes logits, and how large such a head may be.

It refuses to know where in a network it sits and how it is trained. Every IC has two halves: ``reduce`` has no
parameters, so its result can be cached while the weights of ``classify`` are trained.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shallowdeep.types import ClassifierSpec, CutPoint, DataError

PAPER_GRID = 4
MACS_LIMIT = 0.02
PARAMS_LIMIT = 0.05
PARAMS_FLOOR = 1 << 19
"""Half a million parameters (2 MB) are no burden even where they are over 5 % of a small network, and make good
exits.
"""
LEAST_HIDDEN, GOOD_HIDDEN, MOST_HIDDEN = 16, 256, 512
Factory = Callable[[tuple[int, ...], int], nn.Module]


class Said(NamedTuple):
    """What an exit passes on to the next IC: log-probabilities [B, C] and its hidden layer [B, H], if any."""

    log_probs_BC: Tensor
    hidden_BH: Tensor | None

    @classmethod
    def of(cls, logits_BC: Tensor, hidden_BH: Tensor | None, *, linked: bool = False) -> Said:
        """What an exit with this answer passes on; gradients flow back through it only when ``linked``."""
        if not linked:
            logits_BC, hidden_BH = logits_BC.detach(), None if hidden_BH is None else hidden_BH.detach()
        return cls(logits_BC.log_softmax(-1), hidden_BH)

    def each(self, change: Callable[[Tensor], Tensor]) -> Said:
        """``change`` applied to both: rows picked, or silenced by zeros."""
        return Said(change(self.log_probs_BC), None if self.hidden_BH is None else change(self.hidden_BH))


class InternalClassifier(nn.Module, ABC):
    """A head at a cut point: ``classify(reduce(x))`` gives logits [B, C], and its hidden layer for the next IC."""

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

    @abstractmethod
    def classify(self, reduced_BVD: Tensor, previous: Said | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C] and the hidden layer [B, H] or None; ``previous`` is the exit before, None when it is
        absent.
        """

    def matrices(self) -> list[Tensor]:
        """Weights of hidden layers: what an optimiser for matrices may take."""
        return []

    def forward(
        self, x: Tensor, previous: Said | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        # A backbone with an autocast of its own hands over bf16, and an engine asks outside of it.
        own = next((weight.dtype for weight in self.parameters()), x.dtype)
        return self.classify(self.reduce(x, mask).to(own), previous)


def _reduce_map(x: Tensor, spec: ClassifierSpec) -> Tensor:
    kernel = [math.ceil(side / cells) for side, cells in zip(x.shape[2:], spec.grid, strict=True)]
    cells = [side // k for side, k in zip(x.shape[2:], kernel, strict=True)] if spec.views > 1 else list(x.shape[2:])
    if x.shape[1] * math.prod(cells) != spec.features:
        raise DataError(
            f"A classifier for maps {spec.shape} cannot read a map {tuple(x.shape[1:])}; plan for that size."
        )
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
    mean = x.masked_fill(mask.unsqueeze(-1) == 0, 0.0).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.stack([first, mean], dim=1)


class PaperClassifier(InternalClassifier):
    """The IC of arXiv 1810.07052, section 4: learned mix of max and mean pooling, then one linear layer."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__(spec)
        self.mix = nn.Parameter(torch.rand(1)) if spec.views == 2 else None
        self.linear = nn.Linear(spec.features, spec.num_classes)

    def classify(self, reduced_BVD: Tensor, previous: Said | None = None) -> tuple[Tensor, Tensor | None]:
        x = reduced_BVD[:, 0]
        if self.mix is not None:
            x = torch.lerp(reduced_BVD[:, 1], x, self.mix.to(x.dtype))
        return self.linear(x), None


class StrongClassifier(InternalClassifier):
    """All reductions side by side, normalised; a linear path beside a hidden layer; both read the exit before.

    The hidden layer also sees the previous hidden layer, the answer also the previous log-probabilities. An absent
    exit before counts as zeros; rows trained so now and then keep an IC able to answer alone.
    """

    def __init__(self, spec: ClassifierSpec, dropout: float = 0.4) -> None:
        super().__init__(spec)
        features = spec.views * spec.features
        self.norm = nn.LayerNorm(features)
        self.linear = _linear(features, spec.num_classes, spec.rank)
        self.feed = nn.Linear(spec.num_classes, spec.num_classes, bias=False) if spec.fed else None
        self.up = nn.Linear(features, spec.hidden) if spec.hidden else None
        self.along = nn.Linear(spec.fed_hidden, spec.hidden, bias=False) if spec.hidden and spec.fed_hidden else None
        self.down = nn.Linear(spec.hidden, spec.num_classes) if spec.hidden else None
        self.dropout = nn.Dropout(dropout)

    def classify(self, reduced_BVD: Tensor, previous: Said | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.norm(reduced_BVD.flatten(1))
        logits: Tensor = self.linear(x)
        if self.feed is not None and previous is not None:
            logits = logits + self.feed(previous.log_probs_BC.to(x.dtype))
        if self.up is None or self.down is None:
            return logits, None
        hidden: Tensor = self.up(x)
        if self.along is not None and previous is not None and previous.hidden_BH is not None:
            hidden = hidden + self.along(previous.hidden_BH.to(x.dtype))
        hidden = F.gelu(hidden)
        return logits + self.down(self.dropout(hidden)), hidden

    def matrices(self) -> list[Tensor]:
        return [layer.weight for layer in (self.up, self.along) if layer is not None]


def _linear(features: int, classes: int, rank: int) -> nn.Module:
    if not rank:
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, classes))


class CustomClassifier(InternalClassifier):
    """A user's own module: it sees the whole crossing tensor, and its answer is its own."""

    def __init__(self, spec: ClassifierSpec, module: nn.Module) -> None:
        super().__init__(spec)
        self.module = module

    def reduce(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x

    def classify(self, reduced_BVD: Tensor, previous: Said | None = None) -> tuple[Tensor, Tensor | None]:
        return self.module(reduced_BVD), None


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
    previous: ClassifierSpec | None,
    factory: Factory | None = None,
) -> ClassifierSpec:
    """How large an IC of ``kind`` is at ``cut``, after the IC ``previous``.

    The paper's keeps the paper's size. A strong one keeps to ``MACS_LIMIT`` of the macs and the larger of
    ``PARAMS_LIMIT`` of the parameters and ``PARAMS_FLOOR``: it pools to a coarser grid, narrows its hidden layer or
    goes without, then takes a linear path of low rank. Raises ``DataError`` for an unknown kind.
    """
    if kind == "custom" and factory is not None:
        return _size_custom(cut, num_classes, factory)
    if kind not in ("paper", "strong"):
        raise DataError(f"No classifier {kind!r}. Possible: 'strong', 'paper', or a function (shape, num_classes).")
    if kind == "paper":
        return _size(kind, cut, num_classes, None, PAPER_GRID)
    macs, params = int(MACS_LIMIT * total_macs), max(int(PARAMS_LIMIT * total_params), PARAMS_FLOOR)
    sizes = [_size(kind, cut, num_classes, previous, grid) for grid in (PAPER_GRID, 2, 1)]
    for least in (GOOD_HIDDEN, LEAST_HIDDEN):
        for spec in sizes:
            hidden = _widest(spec, macs, params)
            if hidden >= least:
                return _counted(dataclasses.replace(spec, hidden=hidden))
    for spec in sizes:
        if spec.macs <= macs and spec.params <= params:
            return spec
    smallest = sizes[-1]
    own = smallest.views * smallest.features
    rank = max(1, min(macs, params - 2 * own - num_classes) // (own + num_classes))
    return _counted(dataclasses.replace(smallest, fed=False, fed_hidden=0, rank=min(rank, num_classes)))


def _widest(spec: ClassifierSpec, macs: int, params: int) -> int:
    """The widest hidden layer within the limits, in steps of 8; 0 where none fits."""
    one, two = (_counted(dataclasses.replace(spec, hidden=width)) for width in (8, 16))
    if one.macs > macs or one.params > params:
        return 0
    # Every further step adds the same.
    more = min((macs - one.macs) // (two.macs - one.macs), (params - one.params) // (two.params - one.params))
    return min(8 * (1 + more), MOST_HIDDEN)


def _size(kind: str, cut: CutPoint, num_classes: int, previous: ClassifierSpec | None, cells: int) -> ClassifierSpec:
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
            fed=previous is not None,
            fed_hidden=previous.hidden if previous is not None else 0,
            macs=0,
            params=0,
        )
    )


@lru_cache(maxsize=1024)  # the cut points of a transformer ask for the same few sizes over and over
def _counted(spec: ClassifierSpec) -> ClassifierSpec:
    """``spec`` with the macs and parameters that its module really has, counted on the meta device."""
    with torch.device("meta"):
        module = make_classifier(spec)
        reduced = torch.empty(1, spec.views, spec.features)
        hidden = torch.empty(1, spec.fed_hidden) if spec.fed_hidden else None
        previous = Said(torch.empty(1, spec.num_classes), hidden) if spec.fed else None
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
