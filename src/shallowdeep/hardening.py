"""Internal classifiers trained on attacked images, so that an attack slows them down less.

It refuses to touch the backbone: whatever an attack does to its features stays done, and only their readers learn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from shallowdeep.attacks import PLAIN, Attack, Pixels, slowdown
from shallowdeep.inputs import Inputs, num_rows
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.training import ExitRecipe, ExitTraining, train_exits
from shallowdeep.types import DataError

HARDENING = Attack(steps=5, step_size=2 / 255, bf16=True)
"""Five steps that together may cross the whole of eps."""
HARDENED_EXITS = ExitRecipe(epochs=3, lr=1e-3, weight_decay=2e-2, batch_size=256, absent=0.1, views=1)
"""A warm start wants smaller steps than a training from scratch: Adam alone, a third of the rate."""


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """An augmentation that attacks the ``share`` of rows it draws, with the weights ``sdn`` has at that moment.

    It sees ICs without their dropout, and leaves their mode as it was.
    """

    sdn: ShallowDeepNetwork
    attack: Attack = HARDENING
    pixels: Pixels = PLAIN
    share: float = 1.0

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        if not isinstance(inputs, Tensor):
            raise DataError(f"An attack moves one tensor of images, found a {type(inputs).__name__} of inputs.")
        rows = torch.rand(num_rows(inputs), generator=generator) < self.share
        seed = int(torch.randint(2**62, (1,), generator=generator))
        attacked = inputs.clone()
        attacked[rows] = slowdown(self.sdn, inputs[rows], self.attack, pixels=self.pixels, seed=seed)
        return attacked


def harden(
    sdn: ShallowDeepNetwork,
    data: tuple[Tensor, Tensor],
    *,
    pixels: Pixels = PLAIN,
    attack: Attack = HARDENING,
    recipe: ExitRecipe = HARDENED_EXITS,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> ExitTraining:
    """Train the ICs of ``sdn``, from where they are, on rows attacked anew in every epoch; the backbone does not move.

    ``data`` is (images, labels). Every row comes twice an epoch, and half of what comes is attacked, so that what ICs
    knew of clean rows is not lost. A killed run goes on after its last whole epoch when given ``checkpoint_dir``.
    Adversarial training (arXiv 1706.06083) with the slowdown as the adversary, as DeepSloth tries it (arXiv
    2010.02432), here of ICs alone.
    """
    images, labels = data
    twice = torch.cat([images, images]), torch.cat([labels, labels])
    adversary = Adversary(sdn=sdn, attack=attack, pixels=pixels, share=0.5)
    return train_exits(
        sdn, twice, augment=adversary, views=1, recipe=recipe, cache="off", checkpoint_dir=checkpoint_dir, seed=seed
    )
