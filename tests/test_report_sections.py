"""The report's sections: what charts, tables and sentences call things, and where they end."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import torch

from shallowdeep.certificates import Certificate
from shallowdeep.disagreement import fit_confusion
from shallowdeep.policies import CalibrationRecord, Confidence, Ensemble, Fixed
from shallowdeep.report import numbers, words
from shallowdeep.report.compact import packed
from shallowdeep.report.facts import Facts, facts_of
from shallowdeep.report.page import page_of
from shallowdeep.report.sections import sections_of
from shallowdeep.report.words import percent
from test_report import a_trace, some_facts


def test_only_a_proof_is_called_a_certificate() -> None:
    note = "An aim, not a bound: met on average; give confidence= for a bound."
    record = CalibrationRecord(info={"family": "one threshold", "note": note})
    aimed = Confidence(threshold=0.8, calibrated_on=record)
    page = page_of([facts_of(a_trace(), aimed)], title="t", made="m")
    assert page.count("<summary>The policy&#39;s record</summary>") == 2
    assert "<summary>The certificate</summary>" not in page
    assert "An aim, not a bound: met on average." in page
    assert "confidence=" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    proof = Certificate(
        method="ltt", test="binomial", risk="harm", bound=0.01, delta=0.05, observed=0.0, rows=9, tested_rows=9,
        data_hash="", backend="", precision="", weights="", exit_names=(), asked_E=(), view="", versions="",
    )  # fmt: skip
    proved = dataclasses.replace(aimed, calibrated_on=dataclasses.replace(record, certificate=proof))
    assert words.record_title(proved) == "The certificate"


def test_an_ensemble_is_named_and_says_where_exits_answer_together() -> None:
    ensemble = Ensemble(weight_EE=((), (), (), (1.0, 1.0, 1.0, 1.0)))
    policy = Confidence(threshold=0.8, ensemble=ensemble)
    assert words.rule(facts_of(a_trace(), policy)).endswith(", exits passed have a say in the answer")
    assert packed(facts_of(a_trace(), policy), torch.arange(9))["together"] == [False, False, False, True]
    assert packed(some_facts(), torch.arange(9))["together"] == [False] * 4
    assert "have a say" not in words.rule(some_facts())


def chart_rows(facts: Facts, section: str, chart: int, key: str) -> list[dict[str, Any]]:
    """The rows with ``key`` that a chart of the page draws."""
    spec = next(one for one in sections_of([facts]) if one.id == section).blocks[0].charts[chart].spec
    return [row for data in spec["data"] for row in data.get("values", ()) if key in row]


def test_charts_of_overthinking_end_where_the_network_ends() -> None:
    facts = some_facts(a_trace(full_exit=2, exit_names=("a", "b", "full", "again:mirror")))
    assert [row["exit"] for row in chart_rows(facts, "overthinking", 1, "spoiled")] == ["1", "2"]
    assert {row["exit"] for row in chart_rows(facts, "overthinking", 0, "share")} == {"1", "2", "full"}
    table = next(one for one in sections_of([facts]) if one.id == "overthinking").blocks[0].tables[0]
    assert [row[0] for row in table.rows] == ["1", "2", "full"]


def test_confusion_says_in_what_it_is_counted() -> None:
    raw = a_trace()
    reference = fit_confusion(None, raw)
    facts = [some_facts(raw), some_facts(dataclasses.replace(raw, confusion_reference=reference))]
    sections = [
        next(one for one in sections_of(some) if one.id == "confusion") for some in ([facts[0]], [facts[1]], facts)
    ]
    assert sections[0].how.endswith("the sum of L1 distances of softmaxes.")
    assert "standardised: 0 is the mean" in sections[1].how
    assert "standardised where the axis says so" in sections[2].how
    axes = [json.dumps(block.charts[0].spec) for block in sections[2].blocks]
    assert "a sum of distances" in axes[0]
    assert "in deviations from the mean" in axes[1]
    assert [packed(one, torch.arange(9))["standardised"] for one in facts] == [False, True]


def test_the_last_bin_of_confusion_is_as_wide_as_the_others() -> None:
    facts = some_facts()
    bins = numbers.confusions(facts)
    wrong = [row for row in chart_rows(facts, "confusion", 0, "confusion") if row["what"] == "wrong answers"]
    assert [row["confusion"] for row in wrong] == [row["from"] for row in bins] + [bins[-1]["to"]]
    assert wrong[-1]["share"] == bins[-1]["wrong"]


def test_every_picture_can_be_read_aloud() -> None:
    charts = [chart for one in sections_of([some_facts()]) for block in one.blocks for chart in block.charts]
    assert len(charts) == 11
    assert all(chart.spec["description"] == chart.alt for chart in charts)


def test_what_stops_everything_is_called_as_the_axes_call_it() -> None:
    trace = a_trace(full_exit=2, exit_names=("a", "b", "full", "again:mirror"))
    said = [words.rule(facts_of(trace, Fixed(exit=exit))) for exit in (1, 2)]
    assert said == ["everything stops at exit 2", "everything stops at the full network"]


def test_what_saves_nothing_says_so() -> None:
    assert words.saved(1.001) == "neither save nor add compute"


def test_every_point_of_the_reliability_picture_is_in_a_table() -> None:
    facts = some_facts()
    drawn = [row for row in chart_rows(facts, "reliability", 0, "confidence") if "what" in row]
    tables = next(one for one in sections_of([facts]) if one.id == "reliability").blocks[0].tables
    assert drawn
    for row in drawn:
        assert (row["exit"], percent(row["confidence"]), percent(row["accuracy"]), f"{row['rows']:,}") in tables[1].rows


def domain(spec: dict[str, Any], name: str) -> list[float]:
    found: list[float] = next(one for one in spec["scales"] if one["name"] == name)["domain"]
    return found


def test_right_so_far_stays_on_its_axis_and_traces_share_axes() -> None:
    weak, strong = some_facts(a_trace(seed=1)), some_facts(a_trace(samples=40, seed=2))
    blocks = next(one for one in sections_of([weak, strong]) if one.id == "overthinking").blocks
    for chart, axis in ((0, "y"), (1, "y"), (3, "x")):
        assert domain(blocks[0].charts[chart].spec, axis)[1] == domain(blocks[1].charts[chart].spec, axis)[1]
    for facts, block in zip((weak, strong), blocks, strict=True):
        assert max(row["so_far"] for row in numbers.by_exit(facts)) <= domain(block.charts[0].spec, "y")[1]
        assert max(row["errors"] for row in numbers.by_class(facts)) <= domain(block.charts[3].spec, "x")[1]
