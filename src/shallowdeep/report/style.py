"""How every picture of the project looks: inks, dashes, type; needs the extra ``report`` (Altair and vl-convert).

It refuses to know what is drawn. Right, wrong and "still computing" differ in lightness as well as in hue, and lines
in dash, so that a greyscale print and colour-blind eyes lose nothing.
"""

from __future__ import annotations

from typing import Any

from shallowdeep.types import MissingExtra

INKS = ["#0b4f6c", "#d9722e", "#67757c", "#b8860b", "#6c3483"]
RIGHT, WRONG, WALKING, TEXT, FAINT = INKS[0], "#eda15f", "#d7dfe3", "#1d2b33", "#e6eaec"
# Seven, which shares no divisor with five: only the 36th line looks like the first.
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [8, 2], [8, 2, 2, 2, 2, 2]]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG = {
    "font": FONT,
    "background": "#ffffff",
    "view": {"stroke": None},
    "axis": {
        "labelColor": TEXT,
        "titleColor": TEXT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": FAINT,
        "domainColor": "#9aa7ad",
        "tickColor": "#9aa7ad",
        "tickSize": 4,
        "titlePadding": 8,
        "labelOverlap": True,
    },
    "axisX": {"grid": False, "labelAngle": 0},
    "axisY": {"domain": False, "ticks": False},
    "legend": {
        "orient": "bottom",
        "title": None,
        "labelFontSize": 12,
        "labelColor": TEXT,
        "labelLimit": 340,
        "symbolStrokeWidth": 2,
        "columns": 1,
        "rowPadding": 3,
        "offset": 10,
        "symbolOpacity": 1,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
    },
    "title": {"anchor": "start", "fontSize": 13, "color": TEXT},
    "range": {"category": INKS},
}


def altair() -> Any:
    """Altair itself. Raises ``MissingExtra``."""
    try:
        import altair
    except ImportError as error:
        raise MissingExtra("Pictures need the extra report: pip install 'shallowdeep[report]'.") from error
    return altair


def vl_convert() -> Any:
    """The converter of Vega-Lite, which also carries its JavaScript. Raises ``MissingExtra``."""
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtra("Pictures need the extra report: pip install 'shallowdeep[report]'.") from error
    return vl_convert


def finished(chart: Any) -> dict[str, Any]:
    """The chart as a Vega-Lite specification in the house's style."""
    return {**chart.to_dict(), "config": CONFIG}
