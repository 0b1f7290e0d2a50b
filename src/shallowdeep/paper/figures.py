"""The study's figures, drawn from what the experiments say; needs the extra ``report`` (Altair and vl-convert).

It refuses to compute anything; how lines look is the report's, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shallowdeep.files import write_text
from shallowdeep.report.style import DASHES, INKS, altair, finished, vl_convert

WIDTH, HEIGHT = 340, 220


def overthinking_figure(found: Mapping[str, Any], title: str | Sequence[str]) -> Any:
    """Accuracy, cumulative accuracy and destructive share of every exit (``experiments.overthinking_by_exit``)."""
    rows = [
        {"exit": exit + 1, "share": value, "what": what}
        for what, name in (
            ("right at some exit so far", "cumulative_accuracy"),
            ("right at this exit", "accuracy"),
            ("right here, wrong at the end", "destructive"),
        )
        for exit, value in enumerate(found[name])
    ]
    return line_figure(rows, "exit:O", "exit", "share:Q", "share of test rows", title)


def early_exits_figure(found: Mapping[str, Any], title: str | Sequence[str]) -> Any:
    """Accuracy against mean cost of one threshold (``experiments.early_exits``), and the plain network's."""
    curve = found["curve"]
    rows = [
        {"cost": cost, "accuracy": right, "what": "early exits"}
        for cost, right in zip(curve["cost"], curve["accuracy"], strict=True)
    ]
    plain = [{"cost": cost, "accuracy": found["accuracy_cnn"], "what": "plain network"} for cost in (0.0, 1.0)]
    return line_figure([*rows, *plain], "cost:Q", "mean cost (full network = 1)", "accuracy:Q", "accuracy", title)


def confusion_figure(found: Mapping[str, Any], title: str | Sequence[str]) -> Any:
    """How confusion is spread over right and over wrong answers (``experiments.error_alarms``)."""
    bins = found["histogram"]["confusion"]
    middles = [(a + b) / 2 for a, b in zip(bins["edges"], bins["edges"][1:], strict=False)]
    rows = [
        {"confusion": middle, "share": value, "what": what}
        for what in ("right", "wrong")
        for middle, value in zip(middles, bins[what], strict=True)
    ]
    return line_figure(rows, "confusion:Q", "confusion", "share:Q", "share of the answers", title)


def backdoor_figure(victims: Sequence[Mapping[str, Any]], title: str | Sequence[str]) -> Any:
    """What the trigger does and what early exits win back, by poisoning rate; a panel per network and epochs."""
    lines: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
        "trigger works (full network)": lambda one: one["attack_success"],
        "triggered images right, full network": lambda one: one["accuracy_triggered"],
        "triggered images right, early exits": lambda one: one["early_exits"]["accuracy_triggered"],
        "clean images right, early exits": lambda one: one["early_exits"]["accuracy_clean"],
    }
    rows = [
        {
            "rate": f"{one['poisoning_rate']}",
            "share": value(one),
            "what": what,
            "victim": f"{one['network']}, {one['epochs']} epochs",
        }
        for what, value in lines.items()
        for one in sorted(victims, key=lambda one: float(one["poisoning_rate"]))
    ]
    chart = line_figure(rows, "rate:O", "poisoned share of the training rows", "share:Q", "share of test rows", title)
    return chart.encode(column=altair().Column("victim:N", title=None))


def line_figure(
    rows: list[dict[str, Any]], x: str, x_title: str, y: str, y_title: str, title: str | Sequence[str]
) -> Any:
    """A line for every ``what`` among the rows, in the style of all figures."""
    alt = altair()
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    inks, dashes = ([range_[i % len(range_)] for i in range(len(kinds))] for range_ in (INKS, DASHES))
    return (
        alt.Chart(alt.Data(values=rows), title=title, width=WIDTH, height=HEIGHT)
        .mark_line(point=alt.OverlayMarkDef(size=12) if len(rows) < 60 else False)
        .encode(
            x=alt.X(x, title=x_title),
            y=alt.Y(y, title=y_title, scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", scale=alt.Scale(domain=kinds, range=inks)),
            strokeDash=alt.StrokeDash("what:N", scale=alt.Scale(domain=kinds, range=dashes)),
        )
    )


def save_figure(chart: Any, path: Path) -> None:
    """Write the chart as SVG."""
    write_text(path, vl_convert().vegalite_to_svg(finished(chart)))
