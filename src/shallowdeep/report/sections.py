"""Facts -> the sections of the page: every question with its charts, its caption and its tables, trace beside trace.

It refuses to know HTML, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shallowdeep.report import charts, numbers, words
from shallowdeep.report.facts import Facts
from shallowdeep.report.style import finished, vl_convert
from shallowdeep.report.words import percent


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture: its specification, its number on the page, what to read aloud, what of it follows the slider."""

    spec: dict[str, Any]
    number: int
    alt: str
    title: str = ""
    live: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers as text, the first column being what the row is about; ``live`` names cells that follow the slider.

    ``at`` says, where the script must know it exactly, which share or label every row speaks of.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    live: str = ""
    at: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a section says of one trace."""

    trace: int
    name: str
    charts: tuple[Chart, ...]
    caption: str
    tables: tuple[Table, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question, answered for every trace side by side; ``how`` says how to read the pictures."""

    id: str
    short: str
    title: str
    how: str
    blocks: tuple[Block, ...]


def sections_of(found: Sequence[Facts]) -> list[Section]:
    """All sections, their charts numbered from 0 in the order of the page."""
    writer = _Writer(found)
    sections = [
        writer.section("exits", "Exits", "What each exit knows, and what it costs", HOW["exits"], writer.exits),
        writer.section("tradeoff", "Trade-off", "Accuracy against compute", HOW["tradeoff"], writer.tradeoff),
        writer.section("flow", "Where rows leave", "Where samples leave", HOW["flow"], writer.flow),
        writer.section("overthinking", "Overthinking", "Overthinking", HOW["overthinking"], writer.overthinking),
        writer.section("confusion", "Confusion", "Confusion finds errors", _measure(found), writer.confusion),
        writer.section("risk", "Risk", "Fewer answers, fewer errors", HOW["risk"], writer.risk),
        writer.section("reliability", "Reliability", "Is confidence honest?", HOW["reliability"], writer.reliability),
    ]
    if any(one.bench is not None for one in found):
        title = "Milliseconds, measured and ideal"
        sections.append(writer.section("time", "Time", title, HOW["time"], writer.milliseconds))
    return sections


HOW = {
    "exits": "Each dot is an exit, numbered in order of depth; further right costs more, higher is more often right.",
    "tradeoff": "Each point of a line is one setting of the thresholds, on these rows in hindsight; up and left is "
    "better. One shift over levels: every exit has a threshold of its own, and one number raises or lowers them all. "
    "The diamond is the chosen policy; once moved, the slider is a triangle, at the edge where it is off the axes.",
    "flow": "The stream of all rows, from exit to exit: pale goes on, dark leaves with a right answer, orange with a "
    "wrong one.",
    "overthinking": "Wasteful: an exit was right, and computing went on. Destructive: an exit was right, and the end "
    "is wrong.",
    "confusion": "Confusion is how far the exits' answers are from the full network's: the sum of L1 distances of "
    "softmaxes",
    "risk": "Answer only the surest share of the rows (from the left), and count the errors among them.",
    "reliability": "On the grey diagonal, answers given with 80 % confidence are right 80 % of the time; below it an "
    "exit claims too much.",
    "time": "Milliseconds a row, per batch size, of the fastest whole network and of early exits under the chosen "
    "policy; the triangle is what early exits would take if deciding and regrouping rows cost nothing.",
}


class _Writer:
    """Sections of the traces in order; accuracies, costs and overthinking are on the same scales for all traces."""

    def __init__(self, found: Sequence[Facts]) -> None:
        self.found = found
        self.rows = {id(one): numbers.by_exit(one) for one in found}
        self.span = _span([row[key] for mine in self.rows.values() for row in mine for key in ("accuracy", "so_far")])
        self.most_cost = max(row["cost"] for mine in self.rows.values() for row in mine)
        self.classes = {id(one): numbers.by_class(one) for one in found}
        self.most_spoiled = _most(row["spoiled"] for mine in self.rows.values() for row in mine)
        self.most_errors = _most(row["errors"] for mine in self.classes.values() for row in mine)
        self.charts = 0

    def section(self, id: str, short: str, title: str, how: str, write: Callable[[Facts], dict[str, Any]]) -> Section:
        several = len(self.found) > 1
        blocks = [
            Block(trace=index, name=one.name if several else "", **write(one)) for index, one in enumerate(self.found)
        ]
        return Section(id=id, short=short, title=title, how=how, blocks=tuple(blocks))

    def chart(self, chart: Any, alt: str, *, title: str = "", live: str = "") -> Chart:
        spec = vl_convert().vegalite_to_vega({**finished(chart), "description": alt})
        self.charts += 1
        return Chart(spec=spec, number=self.charts - 1, alt=alt, title=title, live=live)

    def exits(self, one: Facts) -> dict[str, Any]:
        rows = self.rows[id(one)]
        head = ("exit", "name", "cost", "accuracy", "right so far", "first right here")
        cells = [
            (r["exit"], r["name"], f"{r['cost']:.3f}", *map(percent, (r["accuracy"], r["so_far"], r["first"])))
            for r in rows
        ]
        chart = self.chart(
            charts.exits_chart(rows, self.span, self.most_cost),
            "Accuracy of every exit over the cost of stopping there",
        )
        caption = words.on_exits(one, rows)
        return _said(caption, [chart], Table(title="The numbers", head=head, rows=tuple(cells)))

    def tradeoff(self, one: Facts) -> dict[str, Any]:
        found = one.evaluation
        full = [f.evaluation.accuracy_full for f in self.found]
        early = [f.evaluation.accuracy_early_exit for f in self.found]
        best = [float(curve.accuracy_P.max()) for f in self.found for curve in f.tradeoff.curves]
        # What matters happens near the full network's accuracy; far below it, lines are cut off.
        span = (max(0.0, min(min(full) - 0.08, min(early) - 0.01)), min(1.0, max(*full, *early, *best) + 0.01))
        chosen = {"cost": found.mean_cost, "accuracy": found.accuracy_early_exit}
        chart = charts.tradeoff_chart(one.tradeoff, self.rows[id(one)], chosen, span, self.most_cost)
        cells = [
            (f"{curve.family}", f"{float(curve.cost_P[p]):.3f}", percent(float(curve.accuracy_P[p]), 2))
            for curve in one.tradeoff.curves
            for p in range(0, len(curve.cost_P), max(1, len(curve.cost_P) // 12))
        ]
        cells += [("full network", f"{one.tradeoff.full_cost:.3f}", percent(one.tradeoff.full_accuracy, 2))]
        cells += [("the chosen policy", f"{found.mean_cost:.3f}", percent(found.accuracy_early_exit, 2))]
        table = Table(title="The numbers", head=("rule", "mean cost", "accuracy"), rows=tuple(cells))
        kept = tuple(words.certificate(one.policy))
        promised = Table(title=words.record_title(one.policy), head=("what", "value"), rows=kept)
        tables = [table, promised] if promised.rows else [table]
        alt = "Accuracy over mean cost of confidence thresholds, with the chosen policy and the full network"
        return _said(words.on_tradeoff(one), [self.chart(chart, alt, live="now")], *tables)

    def flow(self, one: Facts) -> dict[str, Any]:
        rows = numbers.flow(one)
        cells = [
            (
                row["exit"],
                f"{row['cost']:.3f}" if row["asked"] else "not asked",
                percent(row["arrive"]),
                percent(row["right"] + row["wrong"]),
                "none" if row["accuracy"] is None else percent(row["accuracy"]),
                percent(row["on"]),
            )
            for row in rows
        ]
        head = ("exit", "cost", "arrive", "leave there", "right among them", "go on")
        table = Table(title="The numbers", head=head, rows=tuple(cells), live="flow")
        chart = self.chart(charts.flow_chart(rows), "Shares of rows that go on and leave at every exit", live="flow")
        return _said(words.on_flow(one, rows), [chart], table)

    def overthinking(self, one: Facts) -> dict[str, Any]:
        rows, classes = self.rows[id(one)], self.classes[id(one)]
        full, shares = one.trace.full_exit, ("so_far", "accuracy", "spoiled")
        rows = rows[: full + 1]  # a second look comes after the end
        exits = [(row["exit"], *(percent(row[name]) for name in shares)) for row in rows]
        head = ("exit", "right so far", "right here", "right here, wrong at the end")
        by_exit = Table(title="The numbers, per exit", head=head, rows=tuple(exits))
        kinds = ("wasteful", "destructive", "errors", "policy_errors")
        cells = [(row["class"], f"{row['rows']:,}", *(percent(row[name]) for name in kinds)) for row in classes]
        columns = ("class", "rows", "wasteful", "destructive", "full network wrong", "wrong where they stop")
        labels = tuple(row["label"] for row in classes)
        by_class = Table(title="The numbers, per class", head=columns, rows=tuple(cells), live="class", at=labels)
        drawn = [
            self.chart(
                charts.overthinking_chart(rows, self.span),
                "Right so far and right here, per exit",
                title="Wasteful, per exit",
            ),
            self.chart(
                charts.spoiled_chart(rows[:full], self.most_spoiled),
                "Right here and wrong at the end, per exit",
                title="Destructive, per exit",
            ),
            self.chart(charts.wasteful_chart(classes), "Right before the end, per class", title="Wasteful, per class"),
            self.chart(
                charts.destructive_chart(classes, self.most_errors),
                "Errors, and errors that were right earlier",
                title="Destructive, per class",
            ),
        ]
        caption = f"{words.on_overthinking(one)} {words.on_classes(classes, min(charts.CLASSES, len(classes)))}"
        return _said(caption, drawn, by_exit, by_class)

    def confusion(self, one: Facts) -> dict[str, Any]:
        rows = numbers.confusions(one)
        cells = [(f"{r['from']:.2f} to {r['to']:.2f}", percent(r["right"]), percent(r["wrong"])) for r in rows]
        table = Table(title="The numbers", head=("confusion", "right answers", "wrong answers"), rows=tuple(cells))
        unit = "in deviations from the mean" if one.standardised else "a sum of distances"
        chart = self.chart(
            charts.confusion_chart(rows, unit), "How confusion is spread over right and over wrong answers"
        )
        return _said(words.on_confusion(one), [chart], table)

    def risk(self, one: Facts) -> dict[str, Any]:
        rows = numbers.risks(one)
        kinds = list(dict.fromkeys(row["what"] for row in rows))
        curves = [[row for row in rows if row["what"] == what] for what in kinds]
        every = max(1, len(curves[0]) // 20)
        shown = list(zip(*curves, strict=True))[every - 1 :: every]
        cells = [(percent(at[0]["coverage"], 0), *(percent(row["risk"], 2) for row in at)) for at in shown]
        shares = tuple(at[0]["coverage"] for at in shown)
        table = Table(title="The numbers", head=("rows answered", *kinds), rows=tuple(cells), live="risk", at=shares)
        chart = self.chart(charts.risk_chart(rows), "Errors among the surest share of the rows", live="risk")
        return _said(words.on_risks(rows), [chart], table)

    def reliability(self, one: Facts) -> dict[str, Any]:
        rows, bins = self.rows[id(one)], numbers.reliability(one)
        cells = [
            (
                r["exit"],
                *map(percent, (r["sure"], r["accuracy"])),
                f"{100 * (r['sure'] - r['accuracy']):+.1f}",
                percent(r["ece"]),
            )
            for r in rows
        ]
        head = ("exit", "mean confidence", "accuracy", "gap in points", "calibration error (15 bins)")
        drawn = [
            self.chart(charts.reliability_chart(bins, one.labels), "Accuracy over confidence", title="Some exits"),
            self.chart(charts.honesty_chart(rows), "Mean confidence minus accuracy per exit", title="Every exit"),
        ]
        by_exit = Table(title="The numbers, per exit", head=head, rows=tuple(cells))
        places = [(b["exit"], percent(b["confidence"]), percent(b["accuracy"]), f"{b['rows']:,}") for b in bins]
        columns = ("exit", "mean confidence in the bin", "accuracy", "rows")
        by_bin = Table(title="The numbers, per exit and bin of confidence", head=columns, rows=tuple(places))
        return _said(words.on_reliability(one, rows), drawn, by_exit, by_bin)

    def milliseconds(self, one: Facts) -> dict[str, Any]:
        if one.bench is None:
            return _said("Nobody has measured this one.", [])
        rows = numbers.milliseconds(one.bench)
        cells = [
            (r["where"], r["backend"], *(f"{r[k]:.3f}" for k in ("whole", "early", "ideal")), f"{r['speedup']:.2f}x")
            for r in rows
        ]
        head = ("where", "backend", "whole network ms", "early exits ms", "ideal ms", "speedup")
        table = Table(title="The numbers", head=head, rows=tuple(cells))
        chart = self.chart(charts.milliseconds_chart(rows), "Milliseconds a row: whole network, early exits, ideal")
        return _said(words.on_milliseconds(rows), [chart], table)


def _measure(found: Sequence[Facts]) -> str:
    """What confusion is on this page: a sum, or that sum standardised by a trace's reference."""
    if not any(one.standardised for one in found):
        return f"{HOW['confusion']}."
    where = ", standardised" if all(one.standardised for one in found) else "; standardised where the axis says so"
    standard = "0 is the mean of the rows that the network was given as reference, 1 one deviation above it."
    return f"{HOW['confusion']}{where}: {standard}"


def _said(caption: str, drawn: Sequence[Chart], *tables: Table) -> dict[str, Any]:
    return {"charts": tuple(drawn), "caption": caption, "tables": tables}


def _most(shares: Iterable[float]) -> float:
    """Where an axis of shares ends: a little after the largest, and somewhere if all are 0."""
    return min(1.0, 1.05 * max(shares)) or 0.01


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A range for an axis of accuracies, in steps of a tenth."""
    low, high = min(values), max(values)
    return max(0.0, int(low * 10 - 0.3) / 10), min(1.0, int(high * 10 + 1) / 10)
