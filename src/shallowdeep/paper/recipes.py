"""How the study trains: the authors' recipe as their code really runs, and a faster one, for all four regimes.

It refuses to know files and results; every step of training is the library's own. Source: arXiv 1810.07052, section 5.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from shallowdeep.augment import Augment, Chain, ColorJitter, FlipCrop
from shallowdeep.cuts import plan
from shallowdeep.joint import JointRecipe, train_backbone, train_jointly
from shallowdeep.network import ShallowDeepNetwork, attach
from shallowdeep.paper.datasets import StudySet
from shallowdeep.paper.networks import Normalised, make_network
from shallowdeep.training import PAPER_EXITS, ExitRecipe, train_exits

Regime: TypeAlias = Literal["cnn", "ic-only", "sdn-training", "mixed"]
REGIMES: tuple[Regime, ...] = ("cnn", "ic-only", "sdn-training", "mixed")
FAST_EPOCHS = {"vgg16": 30, "wrn32-4": 30, "resnet56": 50, "mobilenet": 32}
FAST = JointRecipe(nesterov=True, milestones=())
FAST_WHOLE = {
    "vgg16": dataclasses.replace(FAST, muon_lr=0.05, batch_size=256),
    "mobilenet": dataclasses.replace(FAST, muon_lr=0.05),
}
"""Networks without shortcuts, where ``Muon`` teaches more in as many epochs; the others are trained by ``FAST``."""
WEIGHT_DECAY = {"vgg16": 5e-4, "wrn32-4": 5e-4, "resnet56": 1e-4, "mobilenet": 1e-4}
EXITS = {
    "vgg16": tuple(f"blocks.{i}:out" for i in (1, 3, 5, 6, 8, 9)),
    "resnet56": tuple(f"layer{stage}.{i}:out" for stage, i in ((1, 3), (1, 7), (2, 2), (2, 6), (3, 1), (3, 5))),
    "wrn32-4": tuple(f"stages.{stage}.{i}:out" for stage, i in ((0, 2), (0, 4), (1, 1), (1, 3), (2, 0), (2, 2))),
    "mobilenet": tuple(f"blocks.{i}:out" for i in (2, 4, 6, 8, 11)),
}
"""Cut points of the study's internal classifiers: after these blocks of each network."""
Rows: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained: alone or jointly (``whole``), its ICs alone (``exits``), and jointly from a trained
    network (``after``). ``holds_out`` says whether 5,000 training rows are kept for choosing; ``cached`` whether ICs
    learn from three views made once, or the network runs in every epoch, as the authors' does.
    """

    name: str
    epochs: int
    whole: JointRecipe
    exits: ExitRecipe
    after: JointRecipe
    after_epochs: int
    holds_out: bool
    bf16: bool
    cached: bool

    def of(self, regime: Regime) -> tuple[JointRecipe | ExitRecipe, int]:
        """By what ``regime`` trains, and for how many epochs, those of the network it starts from not counted."""
        if regime == "ic-only":
            return self.exits, self.exits.epochs
        return (self.after, self.after_epochs) if regime == "mixed" else (self.whole, self.epochs)


def make_recipe(name: str, network: str) -> Recipe:
    """The recipe ``name``, "paper" or "fast", for ``network``. Raises ``ValueError``."""
    decay = WEIGHT_DECAY[network]
    authors = Recipe(
        name="paper",
        epochs=100,
        whole=JointRecipe(weight_decay=decay),
        exits=dataclasses.replace(PAPER_EXITS, weight_decay=decay),
        after=JointRecipe(weight_decay=decay, lr=0.01, milestones=(0.5,)),
        after_epochs=50,
        holds_out=False,
        bf16=False,
        cached=False,
    )
    if name == "paper":
        return authors
    if name != "fast":
        raise ValueError(f"No recipe {name!r}. Recipes: paper, fast.")
    whole = FAST_WHOLE.get(network, FAST)
    return dataclasses.replace(
        authors,
        name=name,
        epochs=FAST_EPOCHS[network],
        whole=whole,
        after=dataclasses.replace(whole, lr=0.2 * whole.lr, muon_lr=0.2 * whole.muon_lr),
        after_epochs=10,
        holds_out=True,
        bf16=True,
        cached=True,
    )


def fresh_network(network: str, chosen: StudySet, seed: int) -> Normalised:
    """The untrained network for ``chosen``, taking bytes."""
    torch.manual_seed(seed)
    return Normalised(make_network(network, chosen.num_classes, chosen.side), chosen.mean, chosen.std)


def with_exits(model: Normalised, network: str, chosen: StudySet, seed: int) -> ShallowDeepNetwork:
    """``model`` with the paper's ICs, untrained, at the paper's places."""
    example = torch.zeros(2, 3, chosen.side, chosen.side, dtype=torch.uint8)
    device = next(model.parameters()).device
    planned = plan(model, example.to(device), at=[f"network.{name}" for name in EXITS[network]], classifier="paper")
    torch.manual_seed(seed)
    sdn = attach(model, planned)
    for exit in range(len(planned.cuts)):
        linear = sdn.classifier(exit).get_submodule("linear")
        assert isinstance(linear, nn.Linear)
        if network == "vgg16":  # drawn on the CPU: the same start on every device
            linear.weight.data.copy_(0.01 * torch.randn(linear.weight.shape))
        if network in ("vgg16", "wrn32-4"):
            nn.init.zeros_(linear.bias)
    return sdn


def train(
    regime: Regime,
    recipe: Recipe,
    network: str,
    chosen: StudySet,
    rows: Rows,
    *,
    start: Normalised,
    folder: Path,
    seed: int,
) -> tuple[nn.Module, str]:
    """Train under ``regime`` from ``start`` (untrained for "cnn" and "sdn-training", trained for the others).

    Returns the plain network for "cnn", else the SDN, and the precision of the network's passes. A killed run goes on
    from ``folder``.
    """
    device = next(start.parameters()).device
    shift = FlipCrop(padding=chosen.padding)
    augment: Augment = Chain((shift, ColorJitter())) if chosen.name == "tinyimagenet" else shift
    if regime == "ic-only":
        return _train_exits(with_exits(start, network, chosen, seed), recipe, rows, augment, folder, seed)
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if recipe.bf16 else "32-true"
    fabric = Fabric(accelerator=device.type, devices=1, precision=precision)
    whole, epochs = recipe.of(regime)
    assert isinstance(whole, JointRecipe)
    if regime == "cnn":
        train_backbone(
            start,
            rows,
            num_classes=chosen.num_classes,
            epochs=epochs,
            recipe=whole,
            augment=augment,
            checkpoint_dir=folder,
            seed=seed,
            compiled=recipe.bf16 and device.type == "cuda",
            fabric=fabric,
        )
        return start, precision
    trained = train_jointly(
        with_exits(start, network, chosen, seed),
        rows,
        epochs=epochs,
        recipe=whole,
        augment=augment,
        in_place=True,
        checkpoint_dir=folder,
        seed=seed,
        fabric=fabric,
    )
    return trained, precision


def _train_exits(
    sdn: ShallowDeepNetwork, recipe: Recipe, rows: Rows, augment: Augment, folder: Path, seed: int
) -> tuple[nn.Module, str]:
    # A GPU runs the network again faster than a disk brings its features back.
    on_disk = recipe.cached and next(sdn.parameters()).device.type == "cpu"
    done = train_exits(
        sdn,
        rows,
        augment=augment,
        recipe=recipe.exits,
        cache="disk" if on_disk else "auto" if recipe.cached else "off",
        cache_dir=folder / "features" if on_disk else None,
        checkpoint_dir=folder,
        seed=seed,
        precision="auto" if recipe.bf16 else "fp32",
    )
    shutil.rmtree(folder / "features", ignore_errors=True)
    return sdn, done.precision
