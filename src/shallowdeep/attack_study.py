"""A slowdown attack measured from end to end, with its defences, in parts that a killed run does not lose.

It refuses to know the command line and file formats of data: an SDN and rows come in, figures go out.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shallowdeep.attacks import DEEPSLOTH, PLAIN, Attack, Pixels, added, noise, slowdown, universal
from shallowdeep.calibration import calibrate
from shallowdeep.collection import collect
from shallowdeep.files import read_tensors, write_tensors, write_text
from shallowdeep.hardening import HARDENING, harden
from shallowdeep.inputs import row_hashes
from shallowdeep.limits import CostWindow
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.policies import Policy
from shallowdeep.progress import steps
from shallowdeep.resistance import Limited, Resistance, resistance, under_cap, under_window
from shallowdeep.runs import plain
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.types import table

Rows: TypeAlias = tuple[Tensor, Tensor]
"""Images (inputs) and their labels."""
PART = 250
"""Rows attacked between two files."""
WINDOW_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class StudyChoices:
    """What is measured: the attack, how pixels became inputs, the aim of the policy under attack, the windows' budget
    as a multiple of the policy's mean cost on clean rows, and the attack that ICs are hardened with.
    """

    attack: Attack = DEEPSLOTH
    pixels: Pixels = PLAIN
    universal_steps: int = 100
    hardening: Attack = HARDENING
    max_accuracy_drop: float = 0.005
    window_budget: float = 1.1
    seed: int = 0


def attack_study(
    sdn: ShallowDeepNetwork,
    out: Path,
    choices: StudyChoices,
    *,
    calibration: Rows,
    reported: Rows,
    training: Rows | None = None,
) -> dict[str, Any]:
    """What the attack does to ``reported`` rows and what defences make of it: figures, and ``text`` for people.

    A policy is calibrated on ``calibration`` rows, from which the universal perturbation is made, too; with
    ``training`` rows ICs are hardened on them, thresholds chosen anew, and the attack is repeated against the result.
    Images made so far lie in ``out/parts``; a later call with the same choices, network and rows goes on from there.
    """
    parts = _Parts(out, choices, sdn, (calibration, reported, training))
    policy = calibrate(collect(sdn, calibration), max_accuracy_drop=choices.max_accuracy_drop)
    images, labels = reported
    kinds = {
        "noise": noise(images, choices.attack.eps, pixels=choices.pixels, seed=choices.seed),
        "universal": parts.universal(sdn, calibration[0], images),
        "slowdown": parts.slowdown("slowdown", sdn, images),
    }
    clean = collect(sdn, reported)
    found = resistance(policy, clean, {kind: collect(sdn, (moved, labels)) for kind, moved in kinds.items()})
    limits = _limits(Engine(sdn, policy, backend="torch"), reported, kinds["slowdown"], choices, found)
    told: dict[str, Any] = {"policy": _brief(policy), "undefended": dataclasses.asdict(found), "limits": limits}
    text = [f"without defence\n{found}", _limits_table(limits)]
    if training is not None:
        tough = parts.hardened(sdn, training)
        for name, one in _hardened(parts, tough, policy, kinds["slowdown"], calibration, reported, choices).items():
            told[name] = dataclasses.asdict(one)
            text.append(f"{name}\n{one}")
    told["processor_seconds"] = parts.seconds
    return {**dict(plain(told)), "text": "\n\n".join(text)}


def _hardened(
    parts: _Parts,
    tough: ShallowDeepNetwork,
    policy: Policy,
    old: Tensor,
    calibration: Rows,
    reported: Rows,
    choices: StudyChoices,
) -> dict[str, Resistance]:
    """The hardened SDN under the old images and under an attack on itself, with the old thresholds and with its own."""
    images, labels = reported
    anew = calibrate(collect(tough, calibration), max_accuracy_drop=choices.max_accuracy_drop)
    kinds = {"old slowdown": old, "slowdown": parts.slowdown("hardened", tough, images)}
    clean = collect(tough, reported)
    attacked = {kind: collect(tough, (moved, labels)) for kind, moved in kinds.items()}
    return {
        "hardened, thresholds chosen anew": resistance(anew, clean, attacked),
        "hardened, thresholds as before": resistance(policy, clean, attacked),
    }


def _limits(
    engine: Engine, reported: Rows, moved: Tensor, choices: StudyChoices, found: Resistance
) -> list[dict[str, Any]]:
    """Caps at every second exit asked, and a window per client, on clean and on attacked rows, by the engine itself."""
    images, labels = reported
    budget = choices.window_budget * found.found["clean"].mean_cost
    window = CostWindow(engine, max_mean_cost=budget, rows=WINDOW_ROWS)
    asked = engine.policy.asks(engine.sdn.num_exits, engine.sdn.num_exits - 1)
    costs = [cost for cost, on in zip(engine.sdn.plan.cost_E, asked, strict=True) if on]
    lines: list[dict[str, Any]] = []

    def add(limit: str, value: float, kind: str, one: Limited) -> None:
        lines.append({"limit": limit, "value": value, "rows": kind, **dataclasses.asdict(one)})

    for kind, rows in (("clean", images), ("slowdown", moved)):
        for cap in costs[1:-1:2]:
            add("cap a row", cap, kind, under_cap(engine, rows, labels, cap))
        add(f"window of {WINDOW_ROWS}", budget, kind, under_window(window, rows, labels))
    return lines


def _limits_table(lines: list[dict[str, Any]]) -> str:
    rows = [("limit", "at", "rows", "accuracy", "mean cost", "greatest", "stopped", "worst window")]
    for line in lines:
        worst = "" if line["greatest_window"] is None else f"{line['greatest_window']:.3f}"
        figures = f"{line['accuracy']:.2%}", f"{line['mean_cost']:.3f}", f"{line['greatest_cost']:.3f}"
        rows.append((line["limit"], f"{line['value']:.3f}", line["rows"], *figures, f"{line['capped']:.1%}", worst))
    return table(list(rows))


def _brief(policy: Policy) -> dict[str, Any]:
    facts = to_json(policy)
    record = facts.pop("calibrated_on", {"info": {}})
    return {**facts, "info": record["info"]}


class _Parts:
    """Tensors that took long to make, in a folder named after all that they depend on, and processor seconds."""

    def __init__(self, out: Path, choices: StudyChoices, sdn: ShallowDeepNetwork, rows: Sequence[Rows | None]) -> None:
        self.choices = choices
        self.seconds: dict[str, float] = {}
        made_from = [json.dumps(dataclasses.asdict(choices)), fingerprint(sdn)]
        made_from += [str(one and [row_hashes(one[0]).tolist(), one[1].tolist()]) for one in rows]
        self.folder = out / "parts" / hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]

    def find(self, name: str, group: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors called ``name``, made now unless they are there; their seconds count for ``group``."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            start = time.process_time()
            tensors = make()
            write_tensors(path, tensors, {"seconds": f"{time.process_time() - start:.1f}"})
        tensors, about = read_tensors(path)
        self.seconds[group] = round(self.seconds.get(group, 0.0) + float(about["seconds"]), 1)
        return tensors

    def slowdown(self, name: str, sdn: ShallowDeepNetwork, images: Tensor) -> Tensor:
        """``images`` attacked, some at a time."""
        choices = self.choices

        def part(start: int) -> dict[str, Tensor]:
            some, seed = images[start : start + PART], choices.seed + start
            return {"images": slowdown(sdn, some, choices.attack, pixels=choices.pixels, seed=seed)}

        starts = steps(range(0, len(images), PART), f"attack ({name})", -(-len(images) // PART))
        return torch.cat([self.find(f"{name}-{i}", name, partial(part, i))["images"] for i in starts])

    def universal(self, sdn: ShallowDeepNetwork, own: Tensor, images: Tensor) -> Tensor:
        """``images`` with one perturbation added that was made from the attacker's ``own`` images."""
        choices = self.choices
        attack = dataclasses.replace(choices.attack, steps=choices.universal_steps)
        found = self.find(
            "universal",
            "universal",
            lambda: {"delta": universal(sdn, own, attack, pixels=choices.pixels, seed=choices.seed)},
        )
        return added(images, found["delta"], choices.pixels)

    def hardened(self, sdn: ShallowDeepNetwork, training: Rows) -> ShallowDeepNetwork:
        """A copy of ``sdn`` whose ICs were trained on attacked rows."""
        tough, choices = copy.deepcopy(sdn), self.choices

        def make() -> Mapping[str, Tensor]:
            harden(
                tough,
                training,
                pixels=choices.pixels,
                attack=choices.hardening,
                checkpoint_dir=self.folder / "hardening",
                seed=choices.seed,
            )
            return tough.classifiers.state_dict()

        tough.classifiers.load_state_dict(self.find("hardened", "hardening", make))
        return tough


def write_study(out: Path, found: dict[str, Any]) -> str:
    """Write ``attack.json`` and ``table.txt``; returns the table."""
    text = str(found.pop("text"))
    write_text(out / "attack.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "table.txt", text + "\n")
    return text
