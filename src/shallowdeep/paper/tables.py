"""The study's tables, rebuilt from the records in a results folder, beside what is known of the paper's own figures.

It refuses to train, to read data sets, and to hide a difference: every row names recipe, epochs, training rows and
device, and a figure below the paper's is printed as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowdeep.files import read_json, write_text
from shallowdeep.paper.experiments import early_exits, error_alarms, overthinking_by_exit
from shallowdeep.paper.figures import confusion_figure, early_exits_figure, overthinking_figure, save_figure
from shallowdeep.paper.records import ReducedTrace
from shallowdeep.types import DataError

# Table 3 of arXiv 1810.07052: the CNN's accuracy, and the best of early exits, IC-only and after SDN training. CIFAR-10
# cells could not be seen; for them the CNN accuracies are those to reach.
KNOWN_CNN = {
    ("cifar10", "vgg16"): 0.930,
    ("cifar10", "resnet56"): 0.920,
    ("cifar10", "wrn32-4"): 0.944,
    ("cifar10", "mobilenet"): 0.906,
    ("cifar100", "vgg16"): 0.709,
    ("cifar100", "resnet56"): 0.688,
    ("cifar100", "wrn32-4"): 0.751,
    ("cifar100", "mobilenet"): 0.649,
    ("tinyimagenet", "vgg16"): 0.586,
}
KNOWN_BEST = {
    ("cifar100", "vgg16"): {"ic-only": 0.726, "sdn-training": 0.744},
    ("cifar100", "resnet56"): {"ic-only": 0.697, "sdn-training": 0.709},
    ("cifar100", "wrn32-4"): {"ic-only": 0.755, "sdn-training": 0.773},
    ("cifar100", "mobilenet"): {"ic-only": 0.676, "sdn-training": 0.689},
    ("tinyimagenet", "vgg16"): {"ic-only": 0.604, "sdn-training": 0.634},
}
KNOWN_EXITS = {("cifar10", "vgg16", "ic-only"): (0.677, 0.825, 0.907, 0.922, 0.926, 0.925, 0.925)}
KNOWN_WASTEFUL = {"cifar10": 0.95, "cifar100": 0.81, "tinyimagenet": 0.69}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run as it lies in the results folder."""

    about: Mapping[str, Any]
    reduced: ReducedTrace
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.about["dataset"], self.about["network"]

    @property
    def how(self) -> str:
        """Recipe, epochs, training rows and device in a few words."""
        a = self.about
        return f"{a['recipe']}, {a['epochs']} epochs, {a['training_rows']:,} rows, {a['device']}"


def read_records(folder: Path) -> list[Record]:
    """Every run in ``folder``, by name. Raises ``DataError`` when there is none, ``FormatError`` for a damaged one."""
    paths = sorted(path for path in folder.glob("*.json"))
    if not paths:
        raise DataError(f"No runs in {folder}; make some: sdn paper run DATA_DIR --results {folder}")
    return [
        Record(about=read_json(path), reduced=ReducedTrace.load(path.with_suffix(".safetensors")), name=path.stem)
        for path in paths
    ]


def make_tables(results: Path, out: Path, *, figures: bool = True) -> str:
    """All tables as Markdown, also written to ``out/tables.md``; with ``figures`` three SVG per run beside it."""
    records = read_records(results)
    text = "\n\n".join(
        f"## {title}\n\n{_markdown(rows)}"
        for title, rows in (
            ("Accuracy of every exit", accuracy_rows(records)),
            ("Overthinking (section 4)", overthinking_rows(records)),
            ("Early exits (section 5.1)", early_exit_rows(records)),
            ("Finding errors (section 5.2)", alarm_rows(records)),
            ("Beside the paper", paper_rows(records)),
        )
    )
    write_text(out / "tables.md", text + "\n")
    for record in records if figures else ():
        if record.about["regime"] == "cnn":
            continue
        title = f"{record.name} ({record.about['epochs']} epochs)"
        charts = {
            "overthinking": overthinking_figure(overthinking_by_exit(record.reduced), title),
            "early-exits": early_exits_figure(early_exits(record.reduced), title),
            "confusion": confusion_figure(error_alarms(record.reduced), title),
        }
        for what, chart in charts.items():
            save_figure(chart, out / f"{record.name}-{what}.svg")
    return text


def accuracy_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row per run: accuracy on the test set of every exit, the full network last."""
    rows: list[tuple[str, ...]] = [("run", "exits, % right", "how", "minutes")]
    for record in records:
        exits = " ".join(_percent(value) for value in record.about["accuracy_exits"])
        rows.append((record.name, exits, record.how, f"{record.about['seconds'] / 60:.0f}"))
    return rows


def overthinking_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Wasteful and destructive overthinking of every run with exits, beside the paper's wasteful share."""
    rows: list[tuple[str, ...]] = [
        ("run", "wasteful", "paper (data set)", "destructive", "of the errors", "beyond luck", "oracle cost")
    ]
    for record in _with_exits(records):
        found = overthinking_by_exit(record.reduced)
        shares = ("destructive_in_all", "destructive_of_errors", "destructive_corrected")
        known = KNOWN_WASTEFUL[record.about["dataset"]]
        rows.append(
            (
                record.name,
                _percent(found["wasteful_in_all"]),
                f"about {100 * known:.0f}",
                *(_percent(found[name]) for name in shares),
                f"{found['oracle_cost']:.3f}",
            )
        )
    return rows


def early_exit_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Accuracy within 25, 50 and 75 % of the cost, cost at equal accuracy, and the best, under both protocols."""
    rows: list[tuple[str, ...]] = [
        ("run", "protocol", "CNN", "<= 25 %", "<= 50 %", "<= 75 %", "cost at equal accuracy", "drop there", "best")
    ]
    for record in _with_exits(records):
        found = early_exits(record.reduced)
        for protocol in ("clean", "paper"):
            chosen = found[protocol]
            if chosen["best"] == "not available":
                rows.append((record.name, protocol, _percent(found["accuracy_cnn"]), *("not available",) * 6))
                continue
            budgets = [_percent(value) for value in chosen["accuracy_at_cost"].values()]
            cost, drop = chosen["cost_at_equal_accuracy"], chosen["test_drop_at_equal_accuracy"]
            equal = ("none", "") if cost is None else (f"{cost:.3f}", f"{100 * drop:.2f}")
            best = f"{_percent(chosen['best']['accuracy'])} at {chosen['best']['cost']:.2f}"
            rows.append((record.name, protocol, _percent(found["accuracy_cnn"]), *budgets, *equal, best))
    return rows


def alarm_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """How five scores find the full network's errors in every run with exits."""
    rows: list[tuple[str, ...]] = [("run", "score", "AUROC", "AUPR", "FPR at 95 % TPR", "AURC")]
    for record in _with_exits(records):
        for name, score in error_alarms(record.reduced)["scores"].items():
            rows.append((record.name, name, *(f"{score[part]:.4f}" for part in score)))
    return rows


def paper_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """What is known of the paper, what was measured, and the difference in points, shortfalls marked."""
    rows: list[tuple[str, ...]] = [("run", "figure", "paper", "here", "difference")]
    for record in records:
        exits = record.about["accuracy_exits"]
        known = KNOWN_CNN.get(record.pair)
        if record.about["regime"] == "cnn" and known is not None:
            rows.append(_beside(record, "CNN accuracy", known, exits[-1]))
        best = KNOWN_BEST.get(record.pair, {}).get(record.about["regime"])
        chosen = record.about["best"]
        if best is not None and chosen != "not available":
            rows.append(_beside(record, "best early exits (clean)", best, chosen["accuracy"]))
        for exit, value in enumerate(KNOWN_EXITS.get((*record.pair, record.about["regime"]), ())):
            rows.append(_beside(record, f"exit {exit + 1}", value, exits[exit]))
    return rows


def _beside(record: Record, what: str, known: float, here: float) -> tuple[str, ...]:
    points = 100 * (here - known)
    return record.name, what, _percent(known), _percent(here), f"{points:+.1f}" + (" (below)" if points < 0 else "")


def _with_exits(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.about["regime"] != "cnn"]


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
