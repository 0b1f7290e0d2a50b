"""Facts -> one HTML page that needs nothing else: charts, tables, words and the explorer; needs the extra ``report``.

It refuses to compute numbers. Whatever comes from outside (names of classes, exits, files) is escaped by the template
or packed as JSON without a ``<``, and the page's security policy allows its own scripts and styles alone, by their
hashes, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from shallowdeep.report import numbers, words
from shallowdeep.report.compact import kept_rows, packed
from shallowdeep.report.facts import Facts
from shallowdeep.report.sections import sections_of
from shallowdeep.report.style import vl_convert
from shallowdeep.report.words import percent
from shallowdeep.runs import plain
from shallowdeep.types import MissingExtra

SCRIPTS = ("live.js", "explorer.js")


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """The gallery of the first trace: title and a sentence for people, and what the script needs."""

    title: str
    how: str
    data: dict[str, Any]


def page_of(found: Sequence[Facts], *, title: str, made: str, explorer: Explorer | None = None) -> str:
    """The page as text. Raises ``MissingExtra`` without Altair, vl-convert or Jinja."""
    jinja2 = _jinja2()
    kept = [packed(one, kept_rows(one, len(found))) for one in found]
    sections = sections_of(found)
    specs = [chart.spec for section in sections for block in section.blocks for chart in block.charts]
    css, scripts = _file("page.css"), [_library(), *map(_file, SCRIPTS)]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_file("page.html"))

    def as_it_is(text: str) -> Any:
        assert not re.search(r"</(script|style)|<!--", text, re.I), "a script or style of ours would end early"
        return jinja2.utils.markupsafe.Markup(text)

    text: str = template.render(
        policy=_security(scripts, [css]),
        css=as_it_is(css),
        scripts=[as_it_is(script) for script in scripts],
        title=title,
        made=made,
        views=[_view(index, one) for index, one in enumerate(found)],
        comparison=_comparison(found),
        sections=sections,
        explorer=explorer,
        charts=as_it_is(_json(specs)),
        live=as_it_is(_json(kept)),
        samples=as_it_is(_json(explorer.data if explorer else {})),
    )
    return text.encode("utf-8", "replace").decode()  # names of files may hold what is no text


def _view(index: int, one: Facts) -> dict[str, Any]:
    """What the template shows of a trace outside its sections."""
    found, flow = one.evaluation, numbers.flow(one)
    values = {
        "accuracy": ("accuracy", percent(found.accuracy_early_exit)),
        "drop": ("points lost", f"{100 * found.drop:.1f}".replace("-", "−")),
        "cost": ("compute", percent(found.mean_cost, 0)),
        "early": ("leave early", percent(1 - flow[one.trace.full_exit]["arrive"], 0)),
    }
    return {
        "index": index,
        "name": one.name,
        "summary": words.summary(one),
        "rows": words.rows_said(one),
        "rule": words.rule(one),
        "record": words.record_title(one.policy),
        "certificate": words.certificate(one.policy),
        "info": [(str(name), str(value)) for name, value in one.trace.info.items()],
        "figures": [{"key": key, "name": name, "value": value} for key, (name, value) in values.items()],
    }


def _comparison(found: Sequence[Facts]) -> dict[str, Any]:
    """The traces' main numbers, a row each."""
    head = (
        "trace",
        "rows",
        "full network",
        "early exits",
        "cost",
        "wasteful",
        "destructive",
        "of its errors",
        "confusion AUROC",
    )
    rows: list[tuple[str, ...]] = []
    for one in found:
        how, said = one.overthinking, one.evaluation
        shares = (how.wasteful, how.destructive, how.destructive_of_errors)
        accuracies = percent(said.accuracy_full), percent(said.accuracy_early_exit), f"{said.mean_cost:.3f}"
        auroc = f"{one.finding.confusion_auroc:.3f}"
        rows.append((one.name, f"{said.samples:,}", *accuracies, *map(percent, shares), auroc))
    return {"head": head, "rows": rows}


def _json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever text is in it."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _security(scripts: Sequence[str], styles: Sequence[str]) -> str:
    def hashes(texts: Sequence[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    own = f"script-src {hashes(scripts)}; style-src {hashes(styles)}; img-src blob:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega and its interpreter of expressions, which needs no eval, as one script."""
    bundle: str = vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _file(name: str) -> str:
    return files("shallowdeep.report").joinpath(name).read_text(encoding="utf-8")


def _jinja2() -> Any:
    try:
        import jinja2
        import markupsafe  # noqa: F401
    except ImportError as error:
        raise MissingExtra("The report needs the extra report: pip install 'shallowdeep[report]'.") from error
    return jinja2
