"""A victim of BadNets trained here: how often its trigger works, what early exits win back, what confusion notices.

It refuses to know how networks are trained; it stamps images and reads traces. Source: arXiv 1810.07052, section 5.2
(a white square of 5x5 pixels at (26, 26), target class 5), and BadNets, arXiv 1708.06733. The authors' poisoning rate
is unknown, so it is swept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.calibration import tradeoff
from shallowdeep.checkpoints import seconds_of
from shallowdeep.collection import collect
from shallowdeep.disagreement import confusion, fit_confusion
from shallowdeep.effects import answers, share
from shallowdeep.files import write_text
from shallowdeep.finding import error_scores
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.paper.datasets import study_set
from shallowdeep.paper.networks import NETWORKS
from shallowdeep.paper.recipes import Recipe, fresh_network, make_recipe, train
from shallowdeep.paper.records import GRID, best_point, read_record
from shallowdeep.paper.study import at_work, attempt, check_before, provenance, resumed, study_rows
from shallowdeep.policies import Confidence
from shallowdeep.runs import plain
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

CORNER, SIDE, TARGET = 26, 5, 5


def stamped(images: Tensor) -> Tensor:
    """A copy of images uint8 [N, 3, 32, 32] with the trigger: a white square at pixels 26..30."""
    images = images.clone()
    images[:, :, CORNER : CORNER + SIDE, CORNER : CORNER + SIDE] = 255
    return images


def poisoned(rows: tuple[Tensor, Tensor], rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training rows of which a share ``rate``, drawn by ``seed``, carries the trigger and the label 5."""
    images, labels = rows[0].clone(), rows[1].clone()
    count = round(rate * len(labels))
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    images[chosen], labels[chosen] = stamped(images[chosen]), TARGET
    return images, labels


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A network trained on CIFAR-10 of which a share ``rate`` of the rows is poisoned; ``epochs``: the recipe's.

    Raises ``ValueError`` for a rate that is no share, and for names that the study does not have.
    """

    rate: float
    network: str = "vgg16"
    epochs: int | None = None
    recipe: str = "fast"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"The poisoning rate is a share of the rows, 0..1, found {self.rate}.")
        if self.network not in NETWORKS:
            raise ValueError(f"No network {self.network!r} in the study. Networks: {', '.join(NETWORKS)}.")
        if self.how.epochs < 1:
            raise ValueError(f"A victim trains for one epoch or more, found {self.epochs}.")

    @property
    def name(self) -> str:
        """``cifar10-network-backdoor-recipe-rate``, and the epochs and the seed where they are not the usual ones."""
        epochs = "" if self.epochs is None else f"-epochs{self.epochs}"
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"cifar10-{self.network}-backdoor-{self.recipe}-rate{float(self.rate)}{epochs}{seed}"

    @property
    def how(self) -> Recipe:
        """How it is trained: by the recipe, but all by SGD (five epochs of ``Muon`` do not learn a rare trigger), and
        always with clean rows held out, which the owner of the ICs needs for thresholds.
        """
        recipe = make_recipe(self.recipe, self.network)
        whole = dataclasses.replace(recipe.whole, muon_lr=0.0)
        epochs = recipe.epochs if self.epochs is None else self.epochs
        return dataclasses.replace(recipe, whole=whole, epochs=epochs, holds_out=True)


def work_off(
    victims: Sequence[Victim], data_dir: Path, *, results: Path, work: Path, minutes: float = math.inf
) -> dict[str, Any]:
    """The records of ``victims``, made where missing or of other choices; names of those ``open`` or ``failed``.

    Stops between two epochs when ``minutes`` are over; the next call goes on there. As with runs, the others go on
    where one fails, and what cannot end well is found before anything trains.
    """
    report: dict[str, Any] = {"victims": [], "open": [], "failed": []}
    end = time.monotonic() + 60 * minutes
    missing = [victim for victim in dict.fromkeys(victims) if not _recorded(victim, results)]
    check_before(data_dir, ["cifar10"] * len(missing), results, work)
    for victim in dict.fromkeys(victims):
        state = "done"
        if victim in missing:
            state = attempt(victim.name, end, partial(backdoor, victim, data_dir, results=results, work=work))
        if state == "done":
            report["victims"].append(read_record(results / f"{victim.name}.json"))
        else:
            report[state].append(victim.name)
    return report


def _recorded(victim: Victim, results: Path) -> bool:
    """Whether ``victim`` left a record, of its very rate, epochs and recipe."""
    path, how = results / f"{victim.name}.json", victim.how
    if not path.is_file():
        return False
    record = read_record(path)
    wanted = {"poisoning_rate": victim.rate, "epochs": how.epochs, "training": plain(asdict(how.whole))}
    return all(record[name] == value for name, value in wanted.items())


def backdoor(victim: Victim, data_dir: Path, *, results: Path, work: Path) -> dict[str, Any]:
    """Train ``victim`` and its ICs on clean rows, judge both, and write ``NAME.json`` into ``results``.

    The owner of the ICs got the network from somebody else and has clean rows of their own; the trigger is unknown to
    them. Thresholds come from the held-out clean rows. Goes on after every epoch, and inside a ``time_limit`` stops
    there with ``OutOfTime``. What a victim of other choices or one that diverged left is set aside.
    """
    chosen, how, seed = study_set("cifar10"), victim.how, victim.seed
    clean, held_out, test = study_rows("cifar10", data_dir, how)
    assert held_out is not None
    spoiled, folder = poisoned(clean, victim.rate, seed), work / victim.name
    folders = [folder / part for part in ("victim", "ics")]

    def trained() -> tuple[nn.Module, str]:
        start = fresh_network(victim.network, chosen, seed).to(clean[0].device)
        _, precision = train("cnn", how, victim.network, chosen, spoiled, start=start, folder=folders[0], seed=seed)
        sdn, _ = train("ic-only", how, victim.network, chosen, clean, start=start, folder=folders[1], seed=seed)
        return sdn, precision

    with at_work(folder):
        sdn, precision = resumed(folder, trained)
        assert isinstance(sdn, ShallowDeepNetwork)
        found = judge(*(collect(sdn, rows) for rows in (held_out, test, (stamped(test[0]), test[1]))))
    about = {
        "dataset": "cifar10",
        "network": victim.network,
        "regime": "backdoor",
        "recipe": victim.recipe,
        "poisoning_rate": victim.rate,
        "epochs": how.epochs,
        "seed": seed,
        "training": asdict(how.whole),
        **provenance(clean, held_out, precision, sum(map(seconds_of, folders))),
    }
    record: dict[str, Any] = plain(about | found)
    write_text(results / f"{victim.name}.json", json.dumps(record, indent=1) + "\n")
    return record


def judge(held_out: Trace, clean: Trace, triggered: Trace) -> dict[str, Any]:
    """Success of the attack at every exit, accuracy won back by early exits, and how well confusion sees triggers.

    Success: share of triggered images of other classes that are answered 5. Accuracy on triggered images is against
    their true labels. ``clean``: one threshold, the best on the held-out rows; ``paper``: the authors' grid on the
    reported rows themselves, the way they ran it.
    """
    other_N = triggered.labels_N != TARGET
    said_EN = answers(triggered)
    curve = tradeoff(held_out).curves[0]
    best = Confidence(threshold=tuple(curve.threshold_PE[best_point(curve)].tolist()))
    reference = fit_confusion(None, held_out)
    scores = torch.cat([confusion(trace, reference) for trace in (clean, triggered.rows(other_N))])
    from_trigger = torch.arange(len(scores)) >= clean.num_samples

    def with_exits(policy: Confidence) -> dict[str, float]:
        outcome = simulate(policy, triggered)
        plain_outcome = simulate(policy, clean)
        return {
            "accuracy_triggered": share(outcome.labels_N == triggered.labels_N),
            "attack_success": share(outcome.labels_N[other_N] == TARGET),
            "accuracy_clean": share(plain_outcome.labels_N == clean.labels_N),
            "mean_cost_clean": float(plain_outcome.cost_N.mean()),
        }

    tried = {q: with_exits(Confidence(threshold=q, fallback="most_confident")) for q in GRID}
    most = max(tried, key=lambda q: tried[q]["accuracy_triggered"])
    return {
        "accuracy_clean": share(answers(clean)[-1] == clean.labels_N),
        "accuracy_triggered": share(said_EN[-1] == triggered.labels_N),
        "accuracy_triggered_exits": (said_EN == triggered.labels_N).double().mean(1).tolist(),
        "attack_success": share(said_EN[-1][other_N] == TARGET),
        "attack_success_exits": (said_EN[:, other_N] == TARGET).double().mean(1).tolist(),
        "early_exits": with_exits(best),
        "paper": {"threshold": most, **tried[most]},
        "detection": asdict(error_scores(scores, from_trigger)),
    }
