"""A slowdown attack on the CIFAR-10 demo's network, and its defences.

    python benchmarks/attack.py DATA_DIR WEIGHTS SDN_DIR WORK_DIR OUT.json

SDN_DIR is the folder of `sdn demo --data cifar10`, WORK_DIR keeps attacked images: a killed run goes on where it was.
The first half of the test set (a fixed shuffle) chooses thresholds, 2,000 rows of the other half are attacked, and
10,000 training images harden the ICs. As `sdn attack slowdown`, which takes the folder of `sdn train`.
All of it takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from shallowdeep.attack_study import StudyChoices, attack_study
from shallowdeep.attacks import Attack, Pixels
from shallowdeep.data import Dataset, Preprocessing, halves, read_data, spread
from shallowdeep.demo import public_resnet
from shallowdeep.files import write_text
from shallowdeep.network import load
from shallowdeep.runs import describe_device, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "weights", "sdn", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--training", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    sdn = load(given.sdn, public_resnet(given.weights)).eval()
    preprocessing = Preprocessing.from_json(sdn.preprocessing)

    def pair(rows: Dataset) -> tuple[Tensor, Tensor]:
        assert isinstance(rows.inputs, Tensor)
        return preprocessing.apply(rows.inputs), rows.labels_N

    test = read_data(given.data, split="test")
    half, other = halves(len(test))
    attack = Attack(steps=given.steps, bf16=True)
    choices = StudyChoices(attack=attack, pixels=Pixels.of(preprocessing), second_look="mirror")
    for found in attack_study(
        sdn,
        given.work,
        choices,
        calibration=pair(test.rows(half)),
        reported=pair(test.rows(other[spread(len(other), given.rows)])),
        training=pair(read_data(given.data, split="train", limit=given.training)),
    ):
        print(found.pop("text"), flush=True)
        found |= {"device": describe_device(), "choices": plain(dataclasses.asdict(choices))}
        write_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
