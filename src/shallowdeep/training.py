"""How internal classifiers learn on a frozen backbone, which does not change by one bit.

It refuses to know thresholds and policies; it ends with weights. Training everything together is next door, in
``joint``.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from shallowdeep.augment import Augment, named_augment
from shallowdeep.checkpoints import Checkpoint, alone
from shallowdeep.features import (
    CACHE_BYTES,
    Cache,
    Data,
    Extractor,
    Precision,
    Share,
    Store,
    View,
    cache_key,
    check_passes,
    choose_place,
    count_rows,
    data_digest,
    extract_view,
    seeded,
    seeded_batches,
    temporary_folder,
    with_first,
)
from shallowdeep.inputs import as_pair, check_labels, num_rows, row_hashes, take
from shallowdeep.network import ShallowDeepNetwork, check_attached, fingerprint
from shallowdeep.progress import steps
from shallowdeep.rates import one_cycle, stepped
from shallowdeep.types import Plan

Part: TypeAlias = tuple[list[Tensor], Tensor, int]
"""This process's rows of one batch: features per exit, labels, and the size of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class ExitRecipe:
    """How ICs are optimised on a frozen backbone.

    Adam; where ``muon_lr`` is given, Muon (arXiv 2502.16982) for the matrices of hidden layers, at that rate. With
    ``milestones`` the rate falls tenfold after those epochs; without, it follows one cycle. ``decoupled`` is AdamW's
    weight decay, else L2 inside Adam. ``absent`` is the share of rows whose previous exit is silent in training, so
    that an IC can also answer without it. Where rows are few, batches shrink so that an epoch has ``least_steps``.
    With ``bf16`` ICs compute in it where the backbone does; small ones are slower so. ``views`` random views of the
    data are made once and used in turn: the more, the less deep ICs learn rows by heart.
    """

    lr: float
    weight_decay: float
    epochs: int = 25
    decoupled: bool = True
    muon_lr: float = 0.0
    batch_size: int = 256
    least_steps: int = 0
    milestones: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    absent: float = 0.0
    bf16: bool = True
    views: int = 3


MUON_DECAY = 0.05
LEAST_BATCH = 16
GATHERED_ROWS = 4096
PAPER_EXITS = ExitRecipe(lr=1e-3, weight_decay=5e-4, decoupled=False, batch_size=128, milestones=(14,), bf16=False)
"""Adam with L2, 1e-3 for 14 epochs, then 1e-4: what the original code really runs (arXiv 1810.07052)."""
STRONG_EXITS = ExitRecipe(
    epochs=12, lr=3e-3, weight_decay=2e-2, muon_lr=2e-2, batch_size=1024, least_steps=40, absent=0.1, views=5
)


@dataclass(frozen=True, kw_only=True)
class ExitTraining:
    """What a training of ICs did: mean loss per epoch and exit, seconds, where features were kept, at which
    precision.
    """

    loss_per_epoch: tuple[tuple[float, ...], ...]
    seconds: float
    feature_seconds: float
    cache: str
    precision: str
    rows: int


def default_recipe(plan: Plan) -> ExitRecipe:
    """The paper's recipe for the paper's ICs, ours for all others."""
    return PAPER_EXITS if all(spec.kind == "paper" for spec in plan.classifiers) else STRONG_EXITS


def train_exits(
    sdn: ShallowDeepNetwork,
    data: Data,
    *,
    epochs: int | None = None,
    augment: Augment | None = None,
    views: int | None = None,
    recipe: ExitRecipe | None = None,
    cache: Cache = "auto",
    cache_bytes: int = CACHE_BYTES,
    cache_dir: str | os.PathLike[str] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    precision: Precision = "auto",
    seed: int = 0,
    fabric: Fabric | None = None,
) -> ExitTraining:
    """Train the ICs of ``sdn`` in place on its frozen backbone (IC-only training, arXiv 1810.07052, section 4.2).

    ``data`` is a DataLoader, an iterable of ``(inputs, labels)`` or one such pair. ``epochs`` defaults to the
    recipe's: 25 for the paper's ICs, 12 for strong ones, which then begin to learn rows by heart. ``augment(inputs,
    generator)`` draws random views, of which ``views`` (default: the recipe's) are made once and used in turn; without
    it there is one clean view. ``cache``: ``"auto"`` keeps features in memory, or on disk where memory is short, while
    all views fit into ``cache_bytes``, and else streams (``"off"``: the backbone runs in every epoch); those of a
    stream without a length go to disk. Features under
    ``cache_dir`` are found again by a later run, if complete. With ``checkpoint_dir`` a killed run goes on after its
    last whole epoch. ``precision`` is the backbone's; ``"auto"`` takes bf16 where a timed batch is faster. ``fabric``
    is a launched ``lightning_fabric.Fabric``; each of its processes takes its share of every batch. Raises
    ``DataError`` for labels outside the classes, empty data, or an iterator that can be read only once where more
    passes are needed.
    """
    check_attached(sdn)
    recipe = recipe or default_recipe(sdn.plan)
    epochs = recipe.epochs if epochs is None else epochs
    views = recipe.views if views is None else views
    if epochs < 1 or views < 1 or precision not in get_args(Precision) or cache not in get_args(Cache):
        raise ValueError(
            f"Need epochs >= 1, views >= 1, precision {', '.join(get_args(Precision))}, "
            f"cache {', '.join(get_args(Cache))}; found {epochs}, {views}, {precision!r}, {cache!r}."
        )
    start = time.perf_counter()
    fabric = fabric or one_process(sdn)
    run = _ExitRun(sdn, data, augment, views if augment is not None else 1, recipe, epochs, seed, fabric)
    checkpoint = Checkpoint(checkpoint_dir, run.choices())
    state = checkpoint.load()
    if state is not None:  # whatever a new timing would say
        precision = "bf16" if state["bf16"] else "fp32"
    with _only_exits_train(sdn), ExitStack() as stack:
        run.extractor = Extractor(sdn, run.sample, precision)
        parts_of = run.source(cache, cache_bytes, cache_dir, stack)
        ready = time.perf_counter()
        losses = run.optimise(parts_of, checkpoint, state)
    sdn.trained_hashes = torch.unique(torch.cat([sdn.trained_hashes, run.hash_N]))
    return ExitTraining(
        loss_per_epoch=tuple(losses),
        seconds=time.perf_counter() - start,
        feature_seconds=ready - start,
        cache=run.place,
        precision="bf16" if run.extractor.bf16 else "fp32",
        rows=len(run.hash_N),
    )


@contextmanager
def _only_exits_train(sdn: ShallowDeepNetwork) -> Iterator[None]:
    """The backbone in eval mode (no drift of BatchNorm, no dropout), the ICs in train mode; all flags come back."""
    modes = [(module, module.training) for module in sdn.modules()]
    sdn.backbone.eval()
    sdn.classifiers.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def one_process(model: nn.Module) -> Fabric:
    """Fabric on the device where ``model`` is, without other processes."""
    device = next(model.parameters()).device
    return Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1)


class _ExitRun:
    """One run of ``train_exits``: where its batches come from, and its steps."""

    def __init__(
        self,
        sdn: ShallowDeepNetwork,
        data: Data,
        augment: Augment | None,
        views: int,
        recipe: ExitRecipe,
        epochs: int,
        seed: int,
        fabric: Fabric,
    ) -> None:
        self.sdn, self.augment, self.views, self.recipe = sdn, augment, views, recipe
        self.epochs, self.seed, self.fabric = epochs, seed, fabric
        self.share = Share(fabric.global_rank, fabric.world_size)
        self.extractor: Extractor
        self.hash_N = torch.zeros(0, dtype=torch.int64)
        self.place = "off"
        self.data, self.sample, labels = with_first(data)
        check_labels(labels, num_rows(self.sample), sdn.plan.num_classes)

    def choices(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "backbone": fingerprint(self.sdn.backbone),
            "exits": list(self.sdn.plan.exit_names),
            "classifiers": [dataclasses.asdict(spec) for spec in self.sdn.plan.classifiers],
            "recipe": dataclasses.asdict(self.recipe),
            "epochs": self.epochs,
            "seed": self.seed,
            "views": self.views,
            "data": data_digest(self.data),
            "augment": named_augment(self.augment),
        }

    def source(
        self, cache: Cache, budget: int, folder: str | os.PathLike[str] | None, stack: ExitStack
    ) -> Callable[[int], Iterator[Part]]:
        """A function from the epoch to this process's parts of its batches."""
        rows = count_rows(self.data, self.sample)
        needed = None if rows is None else rows * self.views * self._row_bytes()
        self.place = choose_place("disk" if folder and cache == "auto" else cache, needed, budget)
        check_passes(self.data, self.epochs if self.place == "off" else self.views)
        if self.place == "off":
            return self._streamed
        key = cache_key(self.sdn, self.data, self.augment, self.seed, self.share) | {"bf16": self.extractor.bf16}
        own = None
        if self.place == "disk":
            own = Path(folder or stack.enter_context(temporary_folder())) / f"rank{self.share.rank}"
        with nullcontext() if own is None else alone(own):
            made = [self._view(view, Store(own, key)) for view in range(self.views)]
        return lambda epoch: self._cached(made, epoch)

    def _view(self, view: int, store: Store) -> View:
        """One view of the data, found again or made."""
        found = store.find(view)
        if found is None:
            found = extract_view(
                self.sdn,
                self.data,
                self.augment,
                self.seed,
                view,
                extractor=self.extractor,
                store=store,
                share=self.share,
            )
            store.finish(view, *found)
        made, self.hash_N = found
        return made

    def _row_bytes(self) -> int:
        """Bytes of one row's features."""
        return sum(reduced.nbytes for reduced in self.extractor(take(self.sample, slice(0, 1))))

    def _cached(self, made: Sequence[View], epoch: int) -> Iterator[Part]:
        view = made[epoch % len(made)]
        order = torch.randperm(len(self.hash_N), generator=seeded(self.seed, epoch))
        size = self._batch_size(len(order))
        # Many batches are gathered at once: small gathers spend their time waiting for threads.
        for block in torch.split(order, size * max(1, GATHERED_ROWS // size)):
            parts = [self.share.places(batch) for batch in torch.split(block, size)]
            own, sizes = torch.cat(parts), [len(part) for part in parts]
            gathered = [torch.split(features.index_select(0, own), sizes) for features in view.features]
            labels = torch.split(view.labels_N[own], sizes)
            for i, batch in enumerate(torch.split(block, size)):
                yield [features[i] for features in gathered], labels[i], len(batch)

    def _streamed(self, epoch: int) -> Iterator[Part]:
        generator, hashes = seeded(self.seed, epoch, 1), []
        pair = as_pair(self.data)
        size = self._batch_size(num_rows(pair[0])) if pair else self.recipe.batch_size
        for inputs, labels in seeded_batches(self.data, size, self.seed, epoch, shuffle=True):
            checked = check_labels(labels, num_rows(inputs), self.sdn.plan.num_classes).cpu()
            hashes.append(row_hashes(inputs))
            seen = inputs if self.augment is None else self.augment(inputs, generator)
            own = self.share.of_batch(0)
            features = self.extractor(take(seen, own)) if len(checked[own]) else []
            yield features, checked[own], num_rows(inputs)
        self.hash_N = torch.cat(hashes)

    def _batch_size(self, rows: int) -> int:
        if not self.recipe.least_steps:
            return self.recipe.batch_size
        return min(self.recipe.batch_size, max(LEAST_BATCH, rows // self.recipe.least_steps))

    def optimise(
        self, parts_of: Callable[[int], Iterator[Part]], checkpoint: Checkpoint, state: dict[str, Any] | None
    ) -> list[tuple[float, ...]]:
        """Mean loss per exit of every epoch, those before a resumed checkpoint included."""
        classifiers, recipe = self.sdn.classifiers, self.recipe
        optimizers = make_optimizers(self.sdn, recipe)
        first, losses = 0, []
        gpus = [self.extractor.device] if self.extractor.device.type == "cuda" else []
        if state is not None:
            classifiers.load_state_dict(state["classifiers"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first, losses, self.hash_N = state["epoch"], [tuple(loss) for loss in state["losses"]], state["hash_N"]
        for epoch in steps(range(first, self.epochs), "train exits", self.epochs - first):
            sums, seen = torch.zeros(len(classifiers), dtype=torch.float64, device=self.extractor.device), 0
            # Dropout draws from (seed, epoch), so that a resumed run repeats it; the user's generator is not touched.
            with torch.random.fork_rng(devices=gpus):
                torch.manual_seed(seeded(self.seed, epoch, 2, self.share.rank).initial_seed())
                for features, labels, size in parts_of(epoch):
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = group["initial_lr"] * self._rate(epoch, seen + size / 2)
                    sums += self._step(optimizers, features, labels, size)
                    seen += size
            losses.append(tuple((sums / seen).tolist()))
            if self.fabric.is_global_zero:
                checkpoint.save(
                    {
                        "classifiers": classifiers.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "epoch": epoch + 1,
                        "losses": [list(loss) for loss in losses],
                        "hash_N": self.hash_N,
                        "bf16": self.extractor.bf16,
                    }
                )
        return losses

    def _rate(self, epoch: int, seen: float) -> float:
        if self.recipe.milestones:
            return stepped(epoch, self.recipe.milestones)
        # A stream's length is known after its first epoch; in the first, progress within the epoch is ignored.
        within = seen / len(self.hash_N) if len(self.hash_N) else 0.5
        return one_cycle((epoch + min(within, 1.0)) / self.epochs)

    def _step(self, optimizers: Sequence[Optimizer], features: list[Tensor], labels_B: Tensor, size: int) -> Tensor:
        """One step; gradients are those of the mean over the whole batch of ``size``, wherever its rows are.

        Returns the summed loss per exit.
        """
        device, classifiers = self.extractor.device, self.sdn.classifiers
        sums = torch.zeros(len(classifiers), dtype=torch.float64, device=device)
        classifiers.zero_grad()
        if len(labels_B):
            labels_B = labels_B.to(device)
            own = next(classifiers.parameters()).dtype
            bf16 = self.extractor.bf16 and self.recipe.bf16
            features = [f.to(device, f.dtype if bf16 else own) for f in features]
            absent = self.recipe.absent
            silent = list(torch.rand(len(features), len(labels_B), device=device) < absent) if absent else None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = self.sdn.classify(features, silent)
            smoothing = self.recipe.label_smoothing
            loss_E = torch.stack(
                [F.cross_entropy(a.float(), labels_B, reduction="sum", label_smoothing=smoothing) for a in answers]
            )
            (loss_E.sum() / size).backward()
            sums = loss_E.detach().double()
        if self.share.world > 1:
            for parameter in classifiers.parameters():
                grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self.fabric.all_reduce(grad, reduce_op="sum")  # type: ignore[assignment]
            sums = self.fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        for optimizer in optimizers:
            optimizer.step()
        return sums


def make_optimizers(sdn: ShallowDeepNetwork, recipe: ExitRecipe) -> list[Optimizer]:
    """Adam for everything, or Muon for hidden matrices and Adam for the rest; vectors are not decayed by AdamW."""
    matrices = [weight for i in range(len(sdn.classifiers)) for weight in sdn.classifier(i).matrices()]
    matrices = matrices if recipe.muon_lr else []
    special = {id(weight) for weight in matrices}
    rest = [p for p in sdn.classifiers.parameters() if id(p) not in special]
    if recipe.decoupled:
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        adam: Optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.lr, betas=(0.9, 0.99), fused=True
        )
    else:
        adam = torch.optim.Adam(rest, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    optimizers = [adam]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=MUON_DECAY))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
