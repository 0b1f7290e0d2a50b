"""The work behind ``sdn report``: files of traces, policies, measurements and images in, one page out.

It refuses to know how choices are typed; that is the command line's.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.data import Dataset, spread
from shallowdeep.files import read_json, write_text
from shallowdeep.inputs import take
from shallowdeep.network import plan_from_json, read_about
from shallowdeep.progress import steps, waiting
from shallowdeep.report.compact import eights, kept_rows, top_three
from shallowdeep.report.facts import Facts, facts_of
from shallowdeep.report.page import Explorer, page_of
from shallowdeep.report.pictures import COLUMNS, GRID, SHEET, as_pictures, looks, sheets_of
from shallowdeep.report.words import summary
from shallowdeep.runs import inside
from shallowdeep.spelling import rule_to_json
from shallowdeep.types import DataError, Trace
from shallowdeep.verbs import DataChoice, load_sdn, policy_for, read_trace, ready

CONFUSED = 0.05
OTHER_NETWORK = 0.05
"""How far probabilities may lie from those of a trace, on average: more is not another precision's rounding."""


def report_verb(
    traces: Sequence[Path],
    out: Path,
    *,
    policies: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    names: Sequence[str] = (),
    class_names: Sequence[str] = (),
    title: str = "",
    images: DataChoice | None = None,
    sdn_dir: Path | None = None,
    thumbnails: int = 2000,
    heats: int = 24,
) -> dict[str, Any]:
    """One page about ``traces``: writes ``out``. ``policies``, ``benches`` and ``names``: one each, or one for all."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give the file to write, say --out {out / 'report.html'}.")
    named = _names(traces, names)
    given = _one_each(policies, len(traces), "--policy")
    measured = _one_each(benches, len(traces), "--bench")
    data = images.read() if images is not None else None
    called = class_names or (data.class_names if data is not None else _class_names(sdn_dir))
    found: list[Facts] = []
    for path, policy, bench, name in zip(traces, given, measured, named, strict=True):
        trace = read_trace(path)
        if data is not None and not found:
            _same_rows(trace, data, path)
        fits = called if not found or len(called) == trace.num_classes else ()
        facts = facts_of(trace, policy_for(trace, policy) if policy else None, name=name, class_names=fits)
        found.append(facts if bench is None else replace(facts, bench=_bench(bench, facts)))
    if sdn_dir is not None:
        _same_exits(sdn_dir, found[0].trace)
    explorer = _explorer(found, data, sdn_dir, thumbnails, heats) if data is not None else None
    made = _made(traces, given, benches, images)
    with waiting("draw the page"):
        page = page_of(found, title=title or ", ".join(named), made=made, explorer=explorer)
    write_text(out, page)
    print(f"{''.join(text for text, _ in summary(found[0]))}\nThe page: {out}")
    shown = found[0].evaluation
    return {
        "verb": "report",
        "out": str(out),
        "bytes": out.stat().st_size,
        "traces": named,
        "rows": shown.samples,
        "accuracy": shown.accuracy_early_exit,
        "drop": shown.drop,
        "mean_cost": shown.mean_cost,
        "samples_shown": len(explorer.data["rows"]) if explorer is not None else 0,
    }


def _one_each(paths: Sequence[Path], traces: int, option: str) -> list[Path | None]:
    if len(paths) not in (0, 1, traces):
        raise ValueError(f"{option} was given {len(paths)} times for {traces} traces: give one for all, or one each.")
    found: list[Path | None] = [*paths] or [None]
    return found * (traces if len(found) == 1 else 1)


def _names(traces: Sequence[Path], names: Sequence[str]) -> list[str]:
    if not traces:
        raise ValueError("A report needs a trace: sdn report runs/collect.")
    if names and len(names) != len(traces):
        raise ValueError(f"{len(names)} names for {len(traces)} traces: give one each.")
    found = list(names) or [path.stem if path.suffix else path.resolve().name for path in traces]
    return [name if found.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(found)]


def _bench(path: Path, facts: Facts) -> Mapping[str, Any]:
    found = read_json(inside(path, "bench.json"))
    if not isinstance(found, dict) or not found.get("measured"):
        raise DataError(f"{path} holds no measurements; make them with `sdn bench`.")
    trace = facts.trace
    asked = facts.policy.asks(trace.num_exits, trace.full_exit)
    names = [name for name, on in zip(trace.exit_names, asked, strict=True) if on]
    if found.get("exits_asked") != names:
        measured = ", ".join(map(str, found.get("exits_asked", ()))) or "exits without a name"
        raise DataError(
            f"{path} measured {measured}, the policy of {facts.name} asks {', '.join(names)}: give what `sdn bench` "
            "measured of this network under this policy."
        )
    if found.get("policy") != rule_to_json(facts.policy):
        raise DataError(f"{path} measured another policy than that of {facts.name}: give both the same --policy.")
    return found


def _class_names(sdn_dir: Path | None) -> tuple[str, ...]:
    return tuple(read_about(sdn_dir)["class_names"]) if sdn_dir is not None else ()


def _same_exits(sdn_dir: Path, trace: Trace) -> None:
    names, wanted = plan_from_json(read_about(sdn_dir)["plan"]).exit_names, trace.exit_names[: trace.full_exit + 1]
    if names != wanted:
        raise DataError(
            f"{sdn_dir} has the exits {', '.join(names)}, the trace {', '.join(wanted)}: they do not belong together."
        )


def _same_rows(trace: Trace, data: Dataset, path: Path) -> None:
    if len(data) != trace.num_samples or not torch.equal(data.labels_N, trace.labels_N):
        found = f"{path} is of {trace.num_samples:,} rows, the images are {len(data):,}"
        found += "" if len(data) != trace.num_samples else " with other labels"
        raise DataError(f"{found}: give the data, split, half and limit that `sdn collect` was given.")


def _explorer(found: Sequence[Facts], data: Dataset, sdn_dir: Path | None, thumbnails: int, heats: int) -> Explorer:
    facts = found[0]
    kept = kept_rows(facts, len(found))
    chosen_G = _gallery(facts, kept, thumbnails)
    pictures = as_pictures(data.inputs, data.source)
    number_G = facts.row_N[kept[chosen_G]]
    sheets = sheets_of(pictures[number_G])
    top, share = top_three(facts, kept[chosen_G])
    heat = _heat(facts, data, sdn_dir, kept, chosen_G, heats) if sdn_dir is not None and heats else {}
    all_shown = len(chosen_G) == facts.trace.num_samples
    title = f"{'All' if all_shown else f'{len(chosen_G):,} of'} {facts.trace.num_samples:,} samples"
    how = "" if all_shown else "Every error and oddity first, then others, spread evenly. "
    how += f"Click a sample, or press Enter, to see what each exit says of it{' and where it looks' if heat else ''}."
    return Explorer(
        title=title,
        how=f"{how} The slider above moves where samples stop.",
        data={
            "rows": chosen_G,
            "numbers": number_G,
            "classes": facts.class_names,
            "top": top,
            "share": share,
            "top3": min(3, facts.trace.num_classes),
            "sheets": [uri.partition(",")[2] for uri in sheets.uris],
            "columns": COLUMNS,
            "perSheet": SHEET,
            "width": sheets.width,
            "height": sheets.height,
            "grid": GRID,
            "heat": heat,
        },
    )


def _odd(facts: Facts) -> Tensor:
    """Rows that nobody should miss: errors, overthought ones, the first exit's alone, the most confused twentieth."""
    wrong_N = ~facts.answered_right_N | ~facts.right_EN[facts.trace.full_exit]
    confused = facts.confusion_N.argsort(descending=True)[: max(1, round(CONFUSED * len(facts.confusion_N)))]
    odd_N = wrong_N | facts.destructive_N | facts.first_right_only_N
    odd_N[confused] = True
    return odd_N


def _gallery(facts: Facts, kept: Tensor, limit: int) -> Tensor:
    """Positions among the rows ``kept`` that are shown, in order: all that fit, odd ones first."""
    if limit < 1:
        raise ValueError(f"thumbnails must be at least 1, found {limit}.")
    if len(kept) <= limit:
        return torch.arange(len(kept))
    odd_K = _odd(facts)[kept]
    odd, even = odd_K.nonzero().flatten(), (~odd_K).nonzero().flatten()
    odd = odd[spread(len(odd), limit)]
    return torch.cat([odd, even[spread(len(even), limit - len(odd))]]).sort().values


def _heat(facts: Facts, data: Dataset, sdn_dir: Path, kept: Tensor, chosen_G: Tensor, heats: int) -> dict[str, str]:
    """Where every exit looked, for so many of the rows shown: destructive ones first, then the most confused."""
    sdn, preprocessing = load_sdn(sdn_dir)
    rows_G = kept[chosen_G]
    score_G = facts.confusion_N[rows_G].nan_to_num(nan=0.0) + 1e6 * facts.destructive_N[rows_G]
    picked = score_G.argsort(descending=True, stable=True)[:heats].sort().values
    inputs = ready(data.rows(facts.row_N[rows_G[picked]]), preprocessing)
    found = []
    for i in steps(range(0, len(picked), 8), "look where exits look", -(-len(picked) // 8)):
        batch, row_B = take(inputs, slice(i, i + 8)), rows_G[picked[i : i + 8]]
        with torch.inference_mode():
            said_EBC = sdn(batch).double().softmax(-1)
        known_EBC = facts.trace.logits_ENC[: len(said_EBC), row_B].double().softmax(-1)
        if not float((said_EBC - known_EBC).abs().mean()) <= OTHER_NETWORK:
            raise DataError(f"{sdn_dir} answers otherwise than the trace says: they do not belong together.")
        found.append(looks(sdn, batch))
    return {str(g): eights(one) for g, one in zip(picked.tolist(), torch.cat(found), strict=True)}


def _made(
    traces: Sequence[Path], policies: Sequence[Path | None], benches: Sequence[Path], images: DataChoice | None
) -> str:
    parts = [f"sdn report {' '.join(path.name for path in traces)}"]
    parts += [f"policy {path.name}" for path in dict.fromkeys(policies) if path is not None]
    parts += [f"bench {path.name}" for path in benches]
    parts += [f"images {Path(images.source).name}"] if images is not None else []
    libraries = ", ".join(f"{name} {version(name)}" for name in ("shallowdeep", "torch", "altair", "vl-convert-python"))
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{', '.join(parts)}. {libraries}, Python {platform.python_version()}; {when}."
