"""The study's tables, rebuilt from the records in a results folder, beside what is known of the paper's own figures.

It refuses to train, to read data sets, and to hide a difference: every row names recipe, epochs, training rows and
device, and a figure below the paper's is printed as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from shallowdeep.files import write_text
from shallowdeep.paper.experiments import accuracy_cost_curve, error_alarms, galleries, overthinking_by_exit
from shallowdeep.paper.figures import (
    backdoor_figure,
    confusion_figure,
    early_exits_figure,
    overthinking_figure,
    save_figure,
)
from shallowdeep.paper.records import NOT_AVAILABLE, ReducedTrace, read_record, trace_of
from shallowdeep.progress import steps
from shallowdeep.types import DataError

# Table 3 of arXiv 1810.07052: the CNN's accuracy, and the best of early exits, IC-only and after SDN training.
KNOWN_CNN = {
    ("cifar100", "vgg16"): 0.709,
    ("cifar100", "resnet56"): 0.688,
    ("cifar100", "wrn32-4"): 0.751,
    ("cifar100", "mobilenet"): 0.649,
    ("tinyimagenet", "vgg16"): 0.586,
}
AIMED_CNN = {
    ("cifar10", "vgg16"): 0.930,
    ("cifar10", "resnet56"): 0.920,
    ("cifar10", "wrn32-4"): 0.944,
    ("cifar10", "mobilenet"): 0.906,
}
"""CIFAR-10 cells of Table 3 could not be seen; these are accuracies to reach."""
KNOWN_BEST = {
    ("cifar100", "vgg16"): {"ic-only": 0.726, "sdn-training": 0.744},
    ("cifar100", "resnet56"): {"ic-only": 0.697, "sdn-training": 0.709},
    ("cifar100", "wrn32-4"): {"ic-only": 0.755, "sdn-training": 0.773},
    ("cifar100", "mobilenet"): {"ic-only": 0.676, "sdn-training": 0.689},
    ("tinyimagenet", "vgg16"): {"ic-only": 0.604, "sdn-training": 0.634},
}
SLOTH_EXITS = {("cifar10", "vgg16", "ic-only"): (0.677, 0.825, 0.907, 0.922, 0.926, 0.925, 0.925)}
"""From the code of DeepSloth (ICLR 2021), the next paper of the same authors."""
KNOWN_WASTEFUL = {"cifar10": 0.95, "cifar100": 0.81, "tinyimagenet": 0.69}
KNOWN_COST = {"cifar10": 0.5, "cifar100": 0.5, "tinyimagenet": 0.75}
KNOWN_DESTRUCTIVE, KNOWN_RECOVERY = 0.5, 0.84
LEARNED = 0.5
"""Share of other classes' images that a learned trigger turns, at the least: below, there is nothing to win back."""
Lines: TypeAlias = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run as it lies in the results folder, with its experiments."""

    about: Mapping[str, Any]
    reduced: ReducedTrace
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        """Data set and network."""
        return self.about["dataset"], self.about["network"]

    @property
    def how(self) -> str:
        """Recipe, epochs, training rows and device in a few words."""
        return how_made(self.about)

    @property
    def found(self) -> Mapping[str, Any]:
        """Its figures that no threshold enters, which are the same under both protocols."""
        figures: Mapping[str, Any] = self.about["paper"]
        return figures

    @property
    def protocols(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Its figures under both protocols."""
        return ("clean", self.about), ("paper", self.found)

    @cached_property
    def overthinking(self) -> dict[str, Any]:
        """Section 4."""
        return overthinking_by_exit(self.reduced)

    @cached_property
    def alarms(self) -> dict[str, Any]:
        """Section 5.2."""
        return error_alarms(self.reduced)


def read_records(folder: Path) -> list[Record]:
    """Every run in ``folder``, by name. Raises ``DataError`` when there is none, ``FormatError`` for a damaged one
    and for a trace of another training.
    """
    found = {path: read_record(path) for path in sorted(folder.glob("*.json"))}
    records = [
        Record(about=about, reduced=trace_of(about, path), name=path.stem)
        for path, about in found.items()
        if about["regime"] != "backdoor"
    ]
    if not records:
        raise DataError(f"No runs in {folder}; make some: sdn paper run DATA_DIR --results {folder}")
    return records


def read_victims(folder: Path) -> list[dict[str, Any]]:
    """Every backdoor run in ``folder``, by poisoning rate."""
    found = [read_record(path) for path in sorted(folder.glob("*-backdoor-*.json"))]
    return sorted(found, key=lambda one: (one["network"], one["epochs"], one["poisoning_rate"]))


def make_tables(results: Path, out: Path, *, figures: bool = True) -> str:
    """All tables as Markdown, also written to ``out/tables.md``; with ``figures`` three SVG per run beside it."""
    records, victims = read_records(results), read_victims(results)
    tables = {
        "Accuracy of every exit": accuracy_rows(records),
        "Overthinking (section 4)": overthinking_rows(records),
        "Confidence of answers that the end spoils (section 4)": spoiled_rows(records),
        "Simple, complex and only-first images (section 4)": gallery_rows(records),
        "Early exits (section 5.1)": early_exit_rows(records),
        "Finding errors (section 5.2)": alarm_rows(records),
        "Confusion of right and wrong answers (section 5.2)": share_rows(records),
        "Backdoors (section 5.2)": backdoor_rows(victims),
        "Beside the paper": paper_rows(records, victims),
    }
    text = "\n\n".join(f"## {title}\n\n{_markdown(rows)}" for title, rows in tables.items() if len(rows) > 1)
    write_text(out / "tables.md", text + "\n")
    drawn = _with_exits(records) if figures else []
    for record in steps(drawn, "draw figures", len(drawn)):
        title = titled(record.name, [record.about])
        curve = {"curve": accuracy_cost_curve(record.reduced), "accuracy_cnn": record.found["accuracy_cnn"]}
        save_figure(overthinking_figure(record.overthinking, title), out / f"{record.name}-overthinking.svg")
        save_figure(early_exits_figure(curve, title), out / f"{record.name}-early-exits.svg")
        save_figure(confusion_figure(record.alarms, title), out / f"{record.name}-confusion.svg")
    if victims and figures:
        save_figure(backdoor_figure(victims, titled("BadNets", victims)), out / "backdoor.svg")
    return text


def accuracy_rows(records: Sequence[Record]) -> Lines:
    """One row per run: accuracy on the test set of every exit, the full network last."""
    rows: Lines = [("run", "exits, % right", "minutes", "how")]
    for record in records:
        exits = " ".join(map(_percent, record.found["accuracy_exits"]))
        rows.append((record.name, exits, f"{record.about['seconds'] / 60:.0f}", record.how))
    return rows


def overthinking_rows(records: Sequence[Record]) -> Lines:
    """Wasteful and destructive overthinking of every run with exits."""
    rows: Lines = [("run", "wasteful", "destructive", "of the errors", "beyond luck", "oracle cost", "how")]
    shares = ("wasteful_in_all", "destructive_in_all", "destructive_of_errors", "destructive_corrected")
    for record in _with_exits(records):
        found = record.overthinking
        cells = [_percent(found[name]) for name in shares]
        rows.append((record.name, *cells, f"{found['oracle_cost']:.3f}", record.how))
    return rows


def spoiled_rows(records: Sequence[Record]) -> Lines:
    """Mean confidence at every exit of the rows that it gets right, and of those of them that the end gets wrong."""
    rows: Lines = [("run", "of right answers, %", "of those spoiled later, %", "how")]
    for record in _with_exits(records):
        found = record.overthinking
        means = [" ".join(map(_percent, found[name][:-1])) for name in ("confidence_right", "confidence_spoiled")]
        rows.append((record.name, *means, record.how))
    return rows


def gallery_rows(records: Sequence[Record]) -> Lines:
    """How many test images every run gets right everywhere, at the end alone and at the first exit alone."""
    rows: Lines = [
        ("run", "simple: right at every exit", "complex: at the end alone", "at the first exit alone", "how")
    ]
    for record in _with_exits(records):
        chosen = galleries(record.reduced, limit=None)
        rows.append((record.name, *(f"{len(found):,}" for found in chosen.values()), record.how))
    return rows


def early_exit_rows(records: Sequence[Record]) -> Lines:
    """Accuracy within 25, 50 and 75 % of the cost, cost at equal accuracy, and the best, under both protocols.

    A clean threshold keeps to its budget on the held-out rows; the cost on the test rows, beside it, may lie above.
    """
    budgets = ("<= 25 %", "<= 50 %", "<= 75 %")
    rows: Lines = [("run", "protocol", "CNN", *budgets, "cost at equal accuracy", "drop there", "best", "how")]
    for record in _with_exits(records):
        for protocol, found in record.protocols:
            cnn = _percent(record.found["accuracy_cnn"])
            if found["best"] == NOT_AVAILABLE:
                rows.append((record.name, protocol, cnn, *(NOT_AVAILABLE,) * 6, record.how))
                continue
            within = [
                "none" if value is None else f"{_percent(value)} at {found['cost_at_budget'][budget]:.3f}"
                for budget, value in found["accuracy_at_cost"].items()
            ]
            cost, drop = found["cost_at_equal_accuracy"], found["test_drop_at_equal_accuracy"]
            equal = ("none", "") if cost is None else (f"{cost:.3f}", f"{100 * drop:.2f}")
            best = f"{_percent(found['best']['accuracy'])} at {found['best']['cost']:.2f}"
            rows.append((record.name, protocol, cnn, *within, *equal, best, record.how))
    return rows


def alarm_rows(records: Sequence[Record]) -> Lines:
    """How five scores find the full network's errors in every run with exits."""
    rows: Lines = [("run", "score", "AUROC", "AUPR", "FPR at 95 % TPR", "AURC", "how")]
    for record in _with_exits(records):
        for name, score in record.alarms["scores"].items():
            rows.append((record.name, name, *(f"{score[part]:.4f}" for part in score), record.how))
    return rows


def share_rows(records: Sequence[Record]) -> Lines:
    """The paper's shares: right answers above the mean of wrong ones, wrong ones below the mean of right ones."""
    rows: Lines = [("run", "score", "mean of right", "mean of wrong", "right above", "wrong below", "how")]
    for record in _with_exits(records):
        for name, found in record.alarms["shares"].items():
            means = [f"{found[part]:.3f}" for part in ("mean_of_right", "mean_of_wrong")]
            shares = [_percent(found[part]) for part in ("right_above_mean_wrong", "wrong_below_mean_right")]
            rows.append((record.name, name, *means, *shares, record.how))
    return rows


def backdoor_rows(victims: Sequence[Mapping[str, Any]]) -> Lines:
    """One row per victim: what its trigger does, what early exits win back, how confusion sees triggered images.

    Where the trigger was not learned, that stands for what would be won back.
    """
    rows: Lines = [
        (
            "network",
            "poisoned",
            "clean",
            "attack works",
            "triggered: full",
            "early exits, clean protocol",
            "early exits, paper's",
            "AUROC of confusion",
            "how",
        )
    ]
    for one in victims:
        shares = [_percent(one[name]) for name in ("accuracy_clean", "attack_success", "accuracy_triggered")]
        early = [won if isinstance(won, str) else _percent(won) for _, won in _won_back(one)]
        auroc = f"{one['detection']['auroc']:.3f}"
        rows.append((one["network"], f"{one['poisoning_rate']}", *shares, *early, auroc, how_made(one)))
    return rows


def paper_rows(records: Sequence[Record], victims: Sequence[Mapping[str, Any]] = ()) -> Lines:
    """What is known of the paper, what was measured, and the difference, shortfalls marked.

    Values that are not the paper's say so: "(aim)", or "(DeepSloth)" for exits in a later paper of the same authors.
    "(profiler)": the authors' counts depthwise convolutions too dear; MobileNet's costs here are of true macs.
    """
    rows: Lines = [("run", "figure", "paper", "here", "difference", "how")]
    for record in records:
        for known, source in ((KNOWN_CNN, ""), (AIMED_CNN, " (aim)")):
            if record.about["regime"] == "cnn" and record.pair in known:
                right = record.found["accuracy_exits"][-1]
                rows.append(_beside(record.name, "CNN accuracy", known[record.pair], right, record.how, source=source))
        best = KNOWN_BEST.get(record.pair, {}).get(record.about["regime"])
        if best is not None:
            for protocol, found in record.protocols:
                here = found["best"] if found["best"] == NOT_AVAILABLE else found["best"]["accuracy"]
                rows.append(_beside(record.name, f"best early exits, {protocol}", best, here, record.how))
        for exit, value in enumerate(SLOTH_EXITS.get((*record.pair, record.about["regime"]), ())):
            here = record.found["accuracy_exits"][exit]
            rows.append(_beside(record.name, f"exit {exit + 1}", value, here, record.how, source=" (DeepSloth)"))
    for record in _with_exits(records):
        dataset, about = record.about["dataset"], record.overthinking
        rows.append(
            _beside(record.name, "wasteful (about)", KNOWN_WASTEFUL[dataset], about["wasteful_in_all"], record.how)
        )
        up_to, spoiled = "destructive, of the errors (up to)", about["destructive_of_errors"]
        rows.append(_beside(record.name, up_to, KNOWN_DESTRUCTIVE, spoiled, record.how, less=True))
        source = " (profiler)" if record.about["network"] == "mobilenet" else ""
        for protocol, found in record.protocols:
            what, cost = f"cost at equal accuracy, {protocol}", found["cost_at_equal_accuracy"]
            rows.append(_beside(record.name, what, KNOWN_COST[dataset], cost, record.how, less=True, source=source))
    for one in victims:
        name = f"{one['network']}, {one['poisoning_rate']} poisoned"
        for protocol, won in _won_back(one):
            rows.append(_beside(name, f"triggered, early exits, {protocol}", KNOWN_RECOVERY, won, how_made(one)))
    return rows


def _won_back(victim: Mapping[str, Any]) -> tuple[tuple[str, float | str], ...]:
    """Accuracy of early exits on triggered images under both protocols, or that the trigger was not learned."""
    learned = victim["attack_success"] >= LEARNED
    protocols = (("clean", "early_exits"), ("paper", "paper"))
    return tuple(
        (name, victim[at]["accuracy_triggered"] if learned else "trigger not learned") for name, at in protocols
    )


def titled(name: str, abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a figure's title: ``name``, and how what it shows was made."""
    return [name, *dict.fromkeys(map(how_made, abouts))]


def how_made(about: Mapping[str, Any]) -> str:
    """Recipe, epochs, training rows and device of a run or a victim in a few words."""
    by = ", all by SGD" if about["regime"] == "backdoor" else ""
    earlier = f" after {about['epochs_before']}" if about.get("epochs_before") else ""
    rows = f"{about['training_rows']:,} rows"
    return f"{about['recipe']}{by}, {about['epochs']}{earlier} epochs, {rows}, {about['device']}"


def _beside(
    name: str, what: str, known: float, here: float | str | None, how: str, *, less: bool = False, source: str = ""
) -> tuple[str, ...]:
    """One line of the comparison; ``less`` where less is better, ``here`` None where it was never reached."""
    mark = " (above)" if less else " (below)"
    if isinstance(here, str):
        shown, difference = here, ""
    elif here is None:
        shown, difference = "none", mark.strip()
    else:
        short = here > known if less else here < known  # before rounding: .9246 is below .925
        shown, difference = _percent(here), f"{100 * (here - known):+.1f}{mark if short else ''}"
    return name, what, f"{_percent(known)}{source}", shown, difference, how


def _with_exits(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.about["regime"] != "cnn"]


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


def _markdown(rows: Lines) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
