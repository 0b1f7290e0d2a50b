"""A slowdown attack measured from end to end, with its defences, in parts that a killed run does not lose.

It refuses to know the command line and file formats of data: an SDN and rows come in, figures go out.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shallowdeep.alarming import fit_alarm, wrong_answers
from shallowdeep.attacks import DEEPSLOTH, PLAIN, Attack, Pixels, added, noise, slowdown, universal
from shallowdeep.calibration import calibrate
from shallowdeep.collection import collect
from shallowdeep.files import read_tensors, write_tensors, write_text
from shallowdeep.hardening import HARDENING, harden
from shallowdeep.inputs import row_hashes
from shallowdeep.limits import CostWindow, costs_asked
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.policies import Policy
from shallowdeep.progress import steps
from shallowdeep.resistance import Limited, Resistance, resistance, under_cap, under_window
from shallowdeep.runs import plain
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Trace, table
from shallowdeep.views import view_of
from shallowdeep.walking import simulate

Rows: TypeAlias = tuple[Tensor, Tensor]
"""Images (inputs) and their labels."""
PART = 250
"""Rows attacked between two files."""
WINDOW_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class StudyChoices:
    """What is measured: the attack, how pixels became inputs, the aim of the policy under attack, the windows' budget
    as a multiple of the policy's mean cost on clean rows, the attack that ICs are hardened with, and the view of a
    second look, of which the attack is then measured, too.
    """

    attack: Attack = DEEPSLOTH
    pixels: Pixels = PLAIN
    universal_steps: int = 100
    hardening: Attack = HARDENING
    max_accuracy_drop: float = 0.005
    window_budget: float = 1.1
    second_look: str | None = None
    seed: int = 0


def attack_study(
    sdn: ShallowDeepNetwork,
    out: Path,
    choices: StudyChoices,
    *,
    calibration: Rows,
    reported: Rows,
    training: Rows | None = None,
) -> Iterator[dict[str, Any]]:
    """What the attack does to ``reported`` rows and what defences make of it: figures, and ``text`` for people; again
    and more after each part of the study, because the next may take long.

    Policy and alarm come from ``calibration`` rows, as does the universal perturbation; with ``training`` rows ICs are
    hardened on them, thresholds chosen anew, and the attack is repeated against the result. With a second look the
    policy aims to gain as much, and an attack that pushes the full exit, too, is made. Images made so far lie in
    ``out/parts``; a later call with the same choices, network and rows goes on from there.
    """
    parts = _Parts(out, choices, sdn, (calibration, reported, training))
    images = reported[0]
    kinds = {
        "noise": noise(images, choices.attack.eps, pixels=choices.pixels, seed=choices.seed),
        "universal": parts.universal(sdn, calibration[0], images),
        "slowdown": parts.slowdown("slowdown", sdn, images, choices.attack),
    }
    policy, told, text = _undefended(sdn, kinds, calibration, reported, choices, None)

    def so_far() -> dict[str, Any]:
        return {**dict(plain(told)), "processor_seconds": dict(parts.seconds), "text": "\n\n".join(text)}

    yield so_far()
    if choices.second_look is not None:
        pushed = dataclasses.replace(choices.attack, exits=tuple(range(sdn.num_exits)))
        kinds["slowdown, full exit too"] = parts.slowdown("full-too", sdn, images, pushed)
        _, told["second look"], more = _undefended(sdn, kinds, calibration, reported, choices, choices.second_look)
        text += [f"with the second look {choices.second_look!r}", *more]
        yield so_far()
    if training is not None:
        tough = parts.hardened(sdn, training)
        for name, one in _hardened(parts, tough, policy, kinds["slowdown"], calibration, reported, choices).items():
            told[name] = dataclasses.asdict(one)
            text += [name, str(one)]
        yield so_far()


def _undefended(
    sdn: ShallowDeepNetwork,
    kinds: Mapping[str, Tensor],
    calibration: Rows,
    reported: Rows,
    choices: StudyChoices,
    look: str | None,
) -> tuple[Policy, dict[str, Any], list[str]]:
    """A policy, what ``kinds`` of attacked images do to it, and what limits make of the last kind.

    With a second look the policy aims to gain what it may lose without: else it would hardly ever look twice.
    """
    known = collect(sdn, calibration, second_look=look)
    policy = calibrate(known, max_accuracy_drop=choices.max_accuracy_drop * (1 if look is None else -1))
    clean = collect(sdn, reported, second_look=look)
    attacked = {kind: collect(sdn, (moved, reported[1]), second_look=look) for kind, moved in kinds.items()}
    found = resistance(policy, clean, attacked, _alarm(known, policy))
    engine = Engine(sdn, policy, second_look=view_of(policy), backend="torch")
    limits = _limits(engine, reported, list(kinds.items())[-1], choices, found)
    facts = {"policy": _brief(policy), "undefended": dataclasses.asdict(found), "limits": limits}
    return policy, facts, [str(found), _limits_table(limits)]


def _alarm(trace: Trace, policy: Policy) -> Alarm | None:
    """The alarm that ``trace`` teaches, if any of its answers is wrong."""
    wrong_N = wrong_answers(simulate(policy, trace), trace)
    return fit_alarm(trace, policy) if 0 < int(wrong_N.sum()) < len(wrong_N) else None


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
    kinds = {"old slowdown": old, "slowdown": parts.slowdown("hardened", tough, images, choices.attack)}
    clean = collect(tough, reported)
    attacked = {kind: collect(tough, (moved, labels)) for kind, moved in kinds.items()}
    return {
        "hardened, thresholds chosen anew": resistance(anew, clean, attacked),
        "hardened, thresholds as before": resistance(policy, clean, attacked),
    }


def _limits(
    engine: Engine, reported: Rows, attacked: tuple[str, Tensor], choices: StudyChoices, found: Resistance
) -> list[dict[str, Any]]:
    """Caps at every second exit asked, and a window per client, on clean and on attacked rows, by the engine itself."""
    images, labels = reported
    budget = choices.window_budget * found.found["clean"].mean_cost
    window = CostWindow(engine, max_mean_cost=budget, rows=WINDOW_ROWS)
    lines: list[dict[str, Any]] = []

    def add(limit: str, value: float, kind: str, one: Limited) -> None:
        lines.append({"limit": limit, "value": value, "rows": kind, **dataclasses.asdict(one)})

    for kind, rows in (("clean", images), attacked):
        for cap in costs_asked(engine)[1:-1:2]:
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
        unseen = dict.fromkeys(("max_accuracy_drop", "window_budget", "second_look"))  # no image depends on them
        made_from = [json.dumps(dataclasses.asdict(choices) | unseen), fingerprint(sdn)]
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

    def slowdown(self, name: str, sdn: ShallowDeepNetwork, images: Tensor, attack: Attack) -> Tensor:
        """``images`` attacked, some at a time."""
        choices = self.choices

        def part(start: int) -> dict[str, Tensor]:
            some, seed = images[start : start + PART], choices.seed + start
            return {"images": slowdown(sdn, some, attack, pixels=choices.pixels, seed=seed)}

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
