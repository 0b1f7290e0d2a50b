"""Rows of numbers -> Altair charts, one function per picture; needs the extra ``report``.

It refuses to compute: what is drawn is what the tables show. Names of exits and classes enter as data alone, never as
parts of an expression. Charts that follow the slider name the data that the page's script replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from shallowdeep.calibration import Tradeoff
from shallowdeep.report.numbers import Row
from shallowdeep.report.style import DASHES, INKS, RIGHT, TEXT, WALKING, WRONG, altair

Span = tuple[float, float]
HEIGHT = 250
CLASSES = 20
"""So many classes are drawn; the table shows all."""
FLOW = {"goes on": WALKING, "leaves, right": RIGHT, "leaves, wrong": WRONG}
PERCENT, SHORT = ".0%", ".1f"
LEAST = 20
"""Rows that a bin must have to be drawn."""
LINK = "#edf1f3"


def exits_chart(rows: Sequence[Row], accuracy: Span, most: float) -> Any:
    """Accuracy of every exit over what reaching it costs."""
    alt = altair()
    base = alt.Chart(_data(rows)).encode(
        x=_cost("cost of stopping there (whole network = 1)", most),
        y=_share("accuracy:Q", "accuracy", accuracy),
        tooltip=["exit:N", "name:N", alt.Tooltip("accuracy:Q", format=".2%"), alt.Tooltip("cost:Q", format=".3f")],
    )
    line = base.mark_line(color=INKS[0], strokeWidth=1.5, opacity=0.5)
    dots = base.mark_point(filled=True, size=70, color=INKS[0], opacity=1)
    names = base.mark_text(dy=-13, fontSize=12, color=TEXT).encode(text="exit:N")
    return _sized(line + dots + names)


def tradeoff_chart(found: Tradeoff, exits: Sequence[Row], chosen: Row, accuracy: Span, most: float) -> Any:
    """Accuracy over mean cost: curves of thresholds, networks cut at one exit, the full network, the chosen policy."""
    alt = altair()
    curves = [
        {"what": curve.family, "cost": cost, "accuracy": right}
        for curve in found.curves
        for cost, right in zip(curve.cost_P.tolist(), curve.accuracy_P.tolist(), strict=True)
    ]
    full = {"what": "full network", "cost": found.full_cost, "accuracy": found.full_accuracy}
    marks = [{**row, "what": "everything stops at one exit"} for row in exits[:-1]]
    marks += [full, {**chosen, "what": "the chosen policy"}]
    encoded = {
        "x": _cost("mean cost (whole network = 1)", most),
        "y": _share("accuracy:Q", "accuracy", accuracy, ".1%"),
    }
    families = [curve.family for curve in found.curves]
    lines = (
        alt.Chart(_data(curves))
        .mark_line(clip=True, color=INKS[0], strokeWidth=1.8)
        .encode(**encoded, strokeDash=alt.StrokeDash("what:N", scale=alt.Scale(domain=families, range=DASHES[:2])))
    )
    kinds = ["everything stops at one exit", "full network", "the chosen policy", "where the slider is"]
    shaped = alt.Shape("what:N", scale=alt.Scale(domain=kinds, range=["square", "cross", "diamond", "triangle-up"]))
    inked = alt.Color("what:N", scale=alt.Scale(domain=kinds, range=["#a9b5ba", TEXT, INKS[1], INKS[4]]))
    dots = alt.Chart(_data(marks)).mark_point(
        clip=True, filled=True, opacity=1, size=150, stroke="white", strokeWidth=1
    )
    # The script keeps the triangle on the axes, and at their edge it must not be cut in half.
    now = alt.Chart(_data([], "now")).mark_point(filled=True, opacity=1, size=170, stroke="white", strokeWidth=1)
    drawn = [chart.encode(**encoded, shape=shaped, color=inked) for chart in (dots, now)]
    # A network without early exits has no curve, and Vega gives a legend of nothing an endless height.
    return _sized(alt.layer(*[lines] * bool(curves), *drawn).resolve_scale(shape="shared", color="shared"))


def flow_chart(rows: Sequence[Row]) -> Any:
    """The stream of rows from exit to exit: what goes on, and what leaves, right and wrong."""
    alt = altair()
    order = [row["exit"] for row in rows]
    encoded = {
        "y": alt.Y("low:Q", title="share of all rows", axis=alt.Axis(format=PERCENT), scale=alt.Scale(domain=[0, 1])),
        "y2": "high:Q",
        "color": alt.Color("part:N", scale=alt.Scale(domain=list(FLOW), range=list(FLOW.values()))),
    }
    x = _place("exit:N", order, title="exit", padding=0.45)
    shares = alt.Tooltip("share:Q", format=".1%")
    bars = (
        alt.Chart(_data(flow_parts(rows), "flow"))
        .mark_bar(stroke="white", strokeWidth=0.5)
        .encode(x=x, tooltip=["exit:N", "part:N", shares], **encoded)
    )
    links = (
        alt.Chart(_data(flow_links(rows), "links"))
        .mark_bar(color=LINK)
        .encode(
            x=x.bandPosition(1),
            x2=alt.X2("next:N", bandPosition=0),
            y=encoded["y"],
            y2="high:Q",
        )
    )
    return _sized(alt.layer(links, bars))


def flow_parts(rows: Sequence[Row]) -> list[Row]:
    """Every exit's bar in three parts, from the bottom."""
    parts = []
    for row in rows:
        low = 0.0
        for what, share in zip(FLOW, (row["on"], row["right"], row["wrong"]), strict=True):
            parts.append({"exit": row["exit"], "part": what, "low": low, "high": low + share, "share": share})
            low += share
    return parts


def flow_links(rows: Sequence[Row]) -> list[Row]:
    """The stream between neighbouring exits."""
    return [
        {"exit": a["exit"], "next": b["exit"], "part": "goes on", "low": 0.0, "high": a["on"]}
        for a, b in pairwise(rows)
    ]


def overthinking_chart(rows: Sequence[Row], span: Span) -> Any:
    """Per exit: right so far, and right here."""
    kinds = {"right at some exit so far": "so_far", "right at this exit": "accuracy"}
    long = [{"exit": row["exit"], "what": what, "share": row[key]} for what, key in kinds.items() for row in rows]
    return _lines(long, "exit:O", "exit", "share:Q", "share of rows", span, sort=[row["exit"] for row in rows])


def spoiled_chart(rows: Sequence[Row], most: float) -> Any:
    """Per exit before the end: the share of rows that are right there and wrong at the end, up to ``most``."""
    alt = altair()
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(color=WRONG, stroke=INKS[1], strokeWidth=1, width={"band": 0.6})
        .encode(
            x=_place("exit:N", [row["exit"] for row in rows], title="exit"),
            y=alt.Y(
                "spoiled:Q",
                title="right here, wrong at the end",
                axis=alt.Axis(format=".1%", tickCount=5),
                scale=alt.Scale(domain=[0, most]),
            ),
            tooltip=["exit:N", alt.Tooltip("spoiled:Q", format=".2%")],
        )
    )
    return _sized(bars)


def wasteful_chart(rows: Sequence[Row]) -> Any:
    """Per class: the share of rows that some exit before the end gets right."""
    alt = altair()
    shown = _worst(rows)
    bars = (
        alt.Chart(_data(shown))
        .mark_bar(color=WALKING, stroke=INKS[2], strokeWidth=1, height={"band": 0.6})
        .encode(
            x=_share("wasteful:Q", "right before the end (share of the class)", (0.0, 1.0), axis="x"),
            y=_classes(shown),
            tooltip=["class:N", alt.Tooltip("wasteful:Q", format=".1%")],
        )
    )
    return _sized(bars, 40 + 22 * len(shown))


def destructive_chart(rows: Sequence[Row], most: float) -> Any:
    """Per class: errors of the full network, up to ``most``, and those of them that were right earlier."""
    alt = altair()
    shown = _worst(rows)
    kinds = {"wrong at the end": "errors", "of these, right earlier": "destructive"}
    long = [{"class": row["class"], "what": what, "share": row[key]} for row in shown for what, key in kinds.items()]
    y = _classes(shown)
    dots = (
        alt.Chart(_data(long))
        .mark_point(filled=True, size=80, opacity=1, stroke=TEXT, strokeWidth=1)
        .encode(
            x=_share("share:Q", "share of the class", (0.0, most), axis="x"),
            y=y,
            color=alt.Color("what:N", scale=alt.Scale(domain=list(kinds), range=["#ffffff", INKS[0]])),
            shape=alt.Shape("what:N", scale=alt.Scale(domain=list(kinds), range=["circle", "circle"])),
            tooltip=["class:N", "what:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    links = alt.Chart(_data(shown)).mark_rule(color=INKS[2]).encode(x="destructive:Q", x2="errors:Q", y=y)
    return _sized(links + dots, 40 + 22 * len(shown))


def confusion_chart(rows: Sequence[Row], unit: str) -> Any:
    """How confusion, counted in ``unit``, is spread over right and over wrong answers."""
    alt = altair()
    closed = [*rows, {**rows[-1], "from": rows[-1]["to"]}]  # a step of no width, so that the last bin has one
    long = [
        {"confusion": row["from"], "share": row[what], "what": f"{what} answers"}
        for what in ("right", "wrong")
        for row in closed
    ]
    kinds = ["right answers", "wrong answers"]
    base = alt.Chart(_data(long)).encode(
        x=alt.X("confusion:Q", title=f"confusion, {unit}"),
        color=alt.Color(
            "what:N",
            scale=alt.Scale(domain=kinds, range=[RIGHT, WRONG]),
            legend=alt.Legend(symbolStrokeWidth=0, symbolType="square"),
        ),
    )
    y = {"axis": alt.Axis(format=PERCENT), "stack": None, "title": "share of the right, of the wrong answers"}
    filled = base.mark_area(interpolate="step-after", opacity=0.35).encode(y=alt.Y("share:Q", **y))
    lined = base.mark_line(interpolate="step-after").encode(
        y=alt.Y("share:Q", **y),
        strokeDash=alt.StrokeDash("what:N", scale=alt.Scale(domain=kinds, range=DASHES[:2]), legend=None),
    )
    return _sized(filled + lined)


def risk_chart(rows: Sequence[Row]) -> Any:
    """Errors among the answers kept, over the share kept."""
    return _lines(
        rows, "coverage:Q", "share of rows answered, surest first", "risk:Q", "errors among them", None, name="risk"
    )


def reliability_chart(rows: Sequence[Row], labels: Sequence[str]) -> Any:
    """Accuracy over confidence of four exits at most, and the diagonal of honesty."""
    alt = altair()
    last = len(labels) - 1
    chosen = list(dict.fromkeys(labels[place] for place in (0, last // 3, 2 * last // 3, last)))
    called = {label: "full network" if label == "full" else f"exit {label}" for label in chosen}
    long = [{**row, "what": called[row["exit"]]} for row in rows if row["exit"] in called and row["rows"] >= LEAST]
    honest = alt.Chart(_data([{"confidence": v, "accuracy": v} for v in (0, 1)])).mark_line(
        color=INKS[2], strokeWidth=1
    )
    honest = honest.encode(x="confidence:Q", y="accuracy:Q")
    drawn = _lines(
        long, "confidence:Q", "confidence", "accuracy:Q", "accuracy", (0.0, 1.0), kinds=list(called.values())
    )
    return _sized(alt.layer(honest, drawn))


def honesty_chart(rows: Sequence[Row]) -> Any:
    """Per exit: mean confidence minus accuracy."""
    alt = altair()
    order = [row["exit"] for row in rows]
    long = [{"exit": row["exit"], "gap": row["sure"] - row["accuracy"], "ece": row["ece"]} for row in rows]
    bars = (
        alt.Chart(_data(long))
        .mark_bar(color=INKS[0], width={"band": 0.6})
        .encode(
            x=_place("exit:N", order, title="exit"),
            y=alt.Y("gap:Q", title="mean confidence − accuracy", axis=alt.Axis(format="+.1%")),
            tooltip=["exit:N", alt.Tooltip("gap:Q", format="+.2%"), alt.Tooltip("ece:Q", format=".2%")],
        )
    )
    zero = alt.Chart(_data([{"gap": 0}])).mark_rule(color=TEXT).encode(y="gap:Q")
    return _sized(bars + zero)


def milliseconds_chart(rows: Sequence[Row]) -> Any:
    """Milliseconds a row: the whole network, early exits as measured, and as they ideally would be."""
    alt = altair()
    kinds = {"whole network": "whole", "early exits": "early", "early exits, ideally": "ideal"}
    long = [{"where": row["where"], "what": what, "ms": row[key]} for row in rows for what, key in kinds.items()]
    scales = {
        "shape": alt.Shape("what:N", scale=alt.Scale(domain=list(kinds), range=["square", "circle", "triangle-up"])),
        "color": alt.Color("what:N", scale=alt.Scale(domain=list(kinds), range=[INKS[2], INKS[0], WRONG])),
    }
    order = [row["where"] for row in rows]
    dots = (
        alt.Chart(_data(long))
        .mark_point(filled=True, size=100, opacity=1)
        .encode(
            x=alt.X("ms:Q", title="milliseconds per row", scale=alt.Scale(domainMin=0)),
            y=alt.Y("where:N", sort=None, title=None, axis=alt.Axis(grid=True), scale=alt.Scale(domain=order)),
            tooltip=["where:N", "what:N", alt.Tooltip("ms:Q", format=".3f")],
            **scales,
        )
    )
    return _sized(dots, 60 + 34 * len(rows))


def _lines(
    rows: Sequence[Row],
    x: str,
    x_title: str,
    y: str,
    y_title: str,
    span: Span | None,
    *,
    kinds: Sequence[str] = (),
    sort: Sequence[str] | None = None,
    name: str | None = None,
) -> Any:
    """Lines by ``what``, told apart by ink, dash and, where there are few points, their shape."""
    alt = altair()
    kinds = list(kinds) or list(dict.fromkeys(row["what"] for row in rows))
    scale = {"domain": kinds, "range": INKS[: len(kinds)]}
    base = alt.Chart(_data(rows, name)).encode(
        x=_place(x, sort, title=x_title) if sort else alt.X(x, title=x_title, axis=alt.Axis(format=PERCENT)),
        y=_share(y, y_title, span),
        color=alt.Color("what:N", scale=alt.Scale(**scale)),
    )
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash("what:N", scale=alt.Scale(domain=kinds, range=DASHES[: len(kinds)]))
    )
    if len(rows) > 20 * len(kinds):
        return _sized(lines)
    flat = alt.Legend(symbolStrokeWidth=0)  # dashes would fray the shapes in the legend
    lines.encoding.color.legend = lines.encoding.strokeDash.legend = flat
    shapes = ["circle", "square", "triangle-up", "diamond", "cross"][: len(kinds)]
    dots = base.mark_point(filled=True, size=50, opacity=1).encode(
        shape=alt.Shape("what:N", legend=flat, scale=alt.Scale(domain=kinds, range=shapes))
    )
    dots.encoding.color.legend = flat
    return _sized(lines + dots)


def _place(field: str, order: Sequence[str], *, title: str, padding: float = 0.1) -> Any:
    """Places along x in a given order: by a domain, which is data; of a list to sort by Vega-Lite makes code."""
    alt = altair()
    return alt.X(field, sort=None, title=title, scale=alt.Scale(domain=list(order), paddingInner=padding))


def _worst(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row["destructive"])[:CLASSES]


def _classes(shown: Sequence[Row]) -> Any:
    alt = altair()
    axis, names = alt.Axis(labelLimit=110, grid=False), [row["class"] for row in shown]
    return alt.Y("class:N", sort=None, title=None, axis=axis, scale=alt.Scale(domain=names))


def _cost(title: str, most: float) -> Any:
    alt = altair()
    return alt.X("cost:Q", title=title, scale=alt.Scale(domain=[0, most]), axis=alt.Axis(format=SHORT, tickCount=6))


def _share(field: str, title: str, span: Span | None, format: str = PERCENT, *, axis: str = "y") -> Any:
    alt = altair()
    scale = alt.Scale(zero=axis == "x") if span is None else alt.Scale(domain=list(span), zero=False)
    channel = alt.Y if axis == "y" else alt.X
    return channel(field, title=title, axis=alt.Axis(format=format, tickCount=6), scale=scale)


def _data(rows: Sequence[Row], name: str | None = None) -> Any:
    alt = altair()
    return alt.InlineData(values=list(rows), name=name) if name else alt.InlineData(values=list(rows))


def _sized(chart: Any, height: int = HEIGHT) -> Any:
    return chart.properties(width="container", height=height)
