"""Training backbone and internal classifiers together: the paper's weighted objective, from scratch or from a trained
one.

It refuses to know thresholds and policies; it ends with weights.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from shallowdeep.augment import Augment, named_augment
from shallowdeep.checkpoints import Checkpoint
from shallowdeep.convolutions import QuickConvolutions
from shallowdeep.features import Data, Share, check_passes, data_digest, seeded, seeded_batches, with_first
from shallowdeep.inputs import (
    Inputs,
    as_pair,
    call,
    check_labels,
    each,
    logits_of,
    num_rows,
    placed,
    row_hashes,
    take,
)
from shallowdeep.muon import Muon, filters_of
from shallowdeep.network import ShallowDeepNetwork, check_attached, fingerprint
from shallowdeep.progress import steps
from shallowdeep.rates import one_cycle, stepped
from shallowdeep.training import one_process


@dataclass(frozen=True, kw_only=True)
class JointRecipe:
    """How everything is optimised together.

    The loss is the last exit's cross-entropy plus each IC's, weighted by ``tau``, which grows linearly from
    ``tau_start`` to the IC's real cost (arXiv 1810.07052, 4.3). SGD with momentum; ``milestones`` are shares of the
    epochs after which the rate falls tenfold (the original code really runs .34 .59 .84), none means one cycle.
    ``distillation`` is the weight of every IC's divergence from the last exit's softened answer (arXiv 1905.08094);
    ``rescale_gradients`` gives every block gradients of one scale however many exits follow (arXiv 1908.06294). With a
    ``muon_lr`` above 0 banks of convolution filters move by ``Muon``, what is left by SGD.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    batch_size: int = 128
    milestones: tuple[float, ...] = (0.34, 0.59, 0.84)
    tau_start: float = 0.01
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 3.0
    rescale_gradients: bool = False
    muon_lr: float = 0.0


def train_jointly(
    sdn: ShallowDeepNetwork,
    data: Data,
    *,
    epochs: int = 100,
    recipe: JointRecipe | None = None,
    augment: Augment | None = None,
    in_place: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    fabric: Fabric | None = None,
) -> ShallowDeepNetwork:
    """An SDN whose backbone and ICs were trained together (SDN training, arXiv 1810.07052, 4.3).

    Works on a deep copy unless ``in_place``. The backbone trains on from the weights it has: fresh ones give the
    paper's SDN training, trained ones "mixed" training (Kubaty et al., ICML 2025). ``augment(inputs, generator)``
    draws a view of every batch. With ``checkpoint_dir`` a killed run goes on after its last whole epoch. ``fabric``
    is a launched ``lightning_fabric.Fabric`` (devices, processes, precision). Raises ``DataError`` for labels outside
    the classes, empty data or an iterator that can be read only once.
    """
    check_attached(sdn)
    data = _checked(data, epochs)
    recipe, fabric = recipe or JointRecipe(), fabric or one_process(sdn)
    trained = sdn if in_place else copy.deepcopy(sdn)
    run = _Run(
        _Answers(trained, recipe.rescale_gradients),
        trained.plan.cost_E[:-1],
        trained.plan.num_classes,
        data,
        recipe,
        augment,
        epochs,
        seed,
        fabric,
    )
    hash_N = run(checkpoint_dir, trained)
    with torch.no_grad():
        trained.confusion_mean_EE.fill_(float("nan"))  # the reference spoke of other weights
        trained.confusion_covariance_EEE.fill_(float("nan"))
    trained.trained_hashes = torch.unique(torch.cat([sdn.trained_hashes, hash_N]))
    return trained


def train_backbone(
    model: nn.Module,
    data: Data,
    *,
    num_classes: int,
    epochs: int = 100,
    recipe: JointRecipe | None = None,
    augment: Augment | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    compiled: bool = False,
    fabric: Fabric | None = None,
) -> Tensor:
    """Train a plain classifier in place, as its owner would before ever hearing of exits; hashes [N] of its rows.

    Everything is as in ``train_jointly``, which with no IC is this. ``compiled`` runs the network through
    ``torch.compile``, which pays on a GPU.
    """
    data = _checked(data, epochs)
    recipe, fabric = recipe or JointRecipe(), fabric or one_process(model)
    alone = _Alone(model)
    if compiled:
        alone.compile()
    return _Run(alone, (), num_classes, data, recipe, augment, epochs, seed, fabric)(checkpoint_dir, model)


def _checked(data: Data, epochs: int) -> Data:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, found {epochs}.")
    check_passes(data, epochs)
    return with_first(data)[0]


class Taus:
    """The weight of each IC's loss, growing to its real cost over the epochs."""

    def __init__(self, cost_E: Sequence[float], epochs: int, start: float) -> None:
        self.targets, self.epochs, self.start = tuple(cost_E), epochs, start

    def at(self, epoch: int) -> tuple[float, ...]:
        """The weights in epoch ``epoch``, counted from 0: min(C, start + (epoch + 1) C / epochs)."""
        return tuple(min(c, self.start + (epoch + 1) * c / self.epochs) for c in self.targets)


class _Answers(nn.Module):
    """What fabric wraps, so that every process's pass goes through its gradient exchange."""

    def __init__(self, sdn: ShallowDeepNetwork, rescale_gradients: bool) -> None:
        super().__init__()
        self.sdn, self.rescale_gradients = sdn, rescale_gradients

    def forward(self, inputs: Inputs) -> Tensor:
        answers: Tensor = self.sdn.answers(inputs, rescale_gradients=self.rescale_gradients)
        return answers


class _Alone(nn.Module):
    """A plain classifier as a network of one exit."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Inputs) -> Tensor:
        return logits_of(call(self.backbone, inputs)).unsqueeze(0)


class _Run:
    """One training of a module that answers [E, B, C]: its epochs, steps and state."""

    def __init__(
        self,
        answers: nn.Module,
        cost_E: Sequence[float],
        num_classes: int,
        data: Data,
        recipe: JointRecipe,
        augment: Augment | None,
        epochs: int,
        seed: int,
        fabric: Fabric,
    ) -> None:
        self.num_classes, self.data, self.recipe, self.augment = num_classes, data, recipe, augment
        self.epochs, self.seed, self.fabric = epochs, seed, fabric
        self.share = Share(fabric.global_rank, fabric.world_size)
        self.taus = Taus(cost_E, epochs, recipe.tau_start)
        self.model, *self.optimizers = fabric.setup(answers, *_optimizers(answers, recipe))
        pair = as_pair(data)
        self.hash_N = torch.zeros(0, dtype=torch.int64) if pair is None else torch.unique(row_hashes(pair[0]))
        self.rows = 0 if pair is None else num_rows(pair[0])
        if pair is not None:  # once, not in every step: looking at a label makes a GPU wait
            self.data = (pair[0], check_labels(pair[1], self.rows, num_classes))

    def __call__(self, checkpoint_dir: str | os.PathLike[str] | None, trained: nn.Module) -> Tensor:
        """Train ``trained`` to the end from the last checkpoint; returns the hashes of the rows seen."""
        about = {"recipe": dataclasses.asdict(self.recipe), "epochs": self.epochs, "seed": self.seed}
        about |= {"data": data_digest(self.data), "augment": named_augment(self.augment)}
        checkpoint = Checkpoint(checkpoint_dir, {"start": fingerprint(trained), **about})
        state, first = checkpoint.load(), 0
        if state is not None:
            trained.load_state_dict(state["weights"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first, self.hash_N, self.rows = state["epoch"], state["hash_N"], state["rows"]
        modes = [(module, module.training) for module in trained.modules()]
        gpus = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        try:
            for epoch in steps(range(first, self.epochs), "train", self.epochs - first):
                trained.train()
                with torch.random.fork_rng(devices=gpus):
                    torch.manual_seed(seeded(self.seed, epoch, 2, self.share.rank).initial_seed())
                    self._epoch(epoch)
                if self.fabric.is_global_zero:
                    optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
                    state = {"weights": trained.state_dict(), "optimizers": optimizers, "epoch": epoch + 1}
                    checkpoint.save({**state, "hash_N": self.hash_N, "rows": self.rows})
        finally:
            for module, training in modes:
                module.training = training
        return self.hash_N

    def _epoch(self, epoch: int) -> None:
        generator, hashes, seen = seeded(self.seed, epoch, 1), [], 0
        streamed = as_pair(self.data) is None
        for inputs, labels in seeded_batches(self.data, self.recipe.batch_size, self.seed, epoch, shuffle=True):
            size = num_rows(inputs)
            if size < self.share.world:
                continue  # a process without rows would keep the others waiting
            if streamed:
                labels = check_labels(labels, size, self.num_classes)
                hashes.append(row_hashes(inputs))
            view = inputs if self.augment is None else self.augment(inputs, generator)
            own = self.share.of_batch(0)
            for optimizer, lr in zip(self.optimizers, (self.recipe.lr, self.recipe.muon_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * self._rate(epoch, seen)
            self._step(take(view, own), labels[own], size, self.taus.at(epoch))
            seen += size
        if hashes:
            self.hash_N, self.rows = torch.unique(torch.cat(hashes)), seen

    def _rate(self, epoch: int, seen: int) -> float:
        if self.recipe.milestones:
            return stepped(epoch, [round(share * self.epochs) for share in self.recipe.milestones])
        return one_cycle((epoch + (min(seen / self.rows, 1.0) if self.rows else 0.5)) / self.epochs)

    def _step(self, inputs: Inputs, labels_B: Tensor, size: int, taus: tuple[float, ...]) -> None:
        device = self.fabric.device
        with QuickConvolutions() if device.type == "cpu" else nullcontext():
            answers_EBC = self.model(each(inputs, lambda tensor: placed(tensor, device))).float()
        labels_B = labels_B.to(device)
        loss = _cross_entropy(answers_EBC[-1], labels_B, self.recipe)
        for answer_BC, tau in zip(answers_EBC[:-1], taus, strict=True):
            loss = loss + tau * _cross_entropy(answer_BC, labels_B, self.recipe)
            if self.recipe.distillation:
                loss = loss + tau * self.recipe.distillation * self._divergence(answer_BC, answers_EBC[-1])
        self.model.zero_grad()
        # Processes average their gradients: a sum over the own rows times their number is the mean over the whole
        # batch.
        self.fabric.backward(loss * (self.share.world / size))
        for optimizer in self.optimizers:
            optimizer.step()

    def _divergence(self, answer_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the last exit's softened answer, summed over rows."""
        heat = self.recipe.temperature
        student, teacher = (answer_BC / heat).log_softmax(-1), (teacher_BC.detach() / heat).log_softmax(-1)
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * heat**2


def _optimizers(answers: nn.Module, recipe: JointRecipe) -> list[torch.optim.Optimizer]:
    """SGD, and Muon for the filters where the recipe has a rate for it."""
    filters = filters_of(answers) if recipe.muon_lr else []
    taken = {id(p) for p in filters}
    sgd = torch.optim.SGD(
        [p for p in answers.parameters() if id(p) not in taken],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    return [sgd, Muon(filters, lr=recipe.muon_lr)] if filters else [sgd]


def _cross_entropy(answer_BC: Tensor, labels_B: Tensor, recipe: JointRecipe) -> Tensor:
    return F.cross_entropy(answer_BC, labels_B, reduction="sum", label_smoothing=recipe.label_smoothing)
