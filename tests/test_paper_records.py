"""Reduced traces and experiments: what is kept gives the figures of the whole trace, and those of slow loops."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

import shallowdeep as sd
from shallowdeep import cli
from shallowdeep.files import FormatError, write_tensors
from shallowdeep.finding import error_auroc
from shallowdeep.paper import study, tables
from shallowdeep.paper.experiments import disputed, early_exits, error_alarms, galleries, overthinking_by_exit
from shallowdeep.paper.records import GRID, VICTIM, ReducedTrace, figures, find_run, read_record, reduce_traces
from shallowdeep.policies import Confidence
from shallowdeep.runs import plain
from shallowdeep.types import DataError, Trace

COSTS = (0.2, 0.5, 0.8, 1.01)


def made(rows: int, seed: int, classes: int = 10) -> Trace:
    """Exits that grow better and surer, with errors of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    noise = torch.randn(4, rows, classes, generator=generator)
    strength = torch.tensor([1.5, 2.5, 3.5, 4.0])[:, None, None]
    logits = noise + strength * torch.nn.functional.one_hot(labels, classes)
    return Trace(logits_ENC=2 * logits, labels_N=labels, cost_E=torch.tensor(COSTS, dtype=torch.float64))


@pytest.fixture(scope="module")
def traces() -> tuple[Trace, Trace]:
    return made(600, 0), made(900, 1)


def test_the_surrogate_trace_acts_like_the_real_one(traces: tuple[Trace, Trace]) -> None:
    held, test = traces
    found = reduce_traces(held, test).part("test").trace()
    for q in GRID:
        for fallback in ("last", "most_confident"):
            policy = Confidence(threshold=q, fallback=fallback)  # type: ignore[arg-type]
            a, b = sd.simulate(policy, found), sd.simulate(policy, test)
            # half precision moves the confidence of a row by less than a part in a thousand
            assert (a.exit_N != b.exit_N).double().mean() < 0.005
            assert (a.labels_N != b.labels_N).double().mean() < 0.005
    a, b = sd.overthinking(found), sd.overthinking(test)
    assert torch.equal(a.first_correct_N, b.first_correct_N)
    assert a.destructive_of_errors == b.destructive_of_errors


def test_what_is_kept_is_what_the_softmax_says(traces: tuple[Trace, Trace]) -> None:
    _, test = traces
    reduced = reduce_traces(None, test)
    p = test.logits_ENC[1, 7].double().softmax(0)
    top = float(p.max())
    assert float(reduced.log_odds_EN[1, 7]) == pytest.approx(math.log(top / (1 - top)), rel=1e-3)
    assert float(reduced.entropy_EN[1, 7]) == pytest.approx(-float((p * p.log()).sum()), rel=2e-3)
    last = test.logits_ENC[3, 7].double()
    two = last.softmax(0).sort(descending=True).values[:2]
    margin = float(two[0] - two[1])
    assert float(reduced.margin_N[7]) == pytest.approx(math.log((1 + margin) / (1 - margin)), rel=1e-3)
    assert float(reduced.energy_N[7]) == pytest.approx(-math.log(float(last.exp().sum())), rel=1e-3)
    raw = sum(float((e.double().softmax(0) - last.softmax(0)).abs().sum()) for e in test.logits_ENC[:, 7])
    assert float(reduced.confusion_N[7]) == pytest.approx(raw, rel=2e-3)
    held, _ = traces
    reference = sd.fit_confusion(None, held)
    standard = sd.confusion(test, reference)
    kept = reduce_traces(held, test).part("test").confusion_N
    torch.testing.assert_close(kept, standard, rtol=1e-2, atol=5e-3)


def test_certainty_beyond_single_precision_is_kept() -> None:
    logits = torch.tensor([[[40.0, 0.0], [0.0, 60.0]]])
    reduced = reduce_traces(None, Trace(logits_ENC=logits, labels_N=torch.tensor([0, 1]), cost_E=torch.ones(1)))
    assert reduced.log_odds_EN.tolist() == [[40.0, 60.0]]
    assert reduced.margin_N.tolist() == [40.0, 60.0], "with two classes the margin says what the confidence says"


def test_files_come_back_and_are_small(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    reduced = reduce_traces(*traces)
    reduced.save(tmp_path / "run.safetensors")
    again = ReducedTrace.load(tmp_path / "run.safetensors")
    assert figures(again) == figures(reduced)
    assert again.held_out == 600
    assert (tmp_path / "run.safetensors").stat().st_size < 1500 * (4 * 5 + 7) + 2000
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(FormatError, match="not a reduced trace"):
        ReducedTrace.load(tmp_path / "other.safetensors")


def test_clean_figures_choose_on_held_out_rows_alone(traces: tuple[Trace, Trace]) -> None:
    held, test = traces
    reduced = reduce_traces(held, test)
    found = figures(reduced)
    # The slow way: every threshold between two confidences of held-out rows, the cheapest at least as accurate there.
    selection, reported = reduced.part("held_out").trace(), reduced.part("test").trace()
    seen = torch.unique(selection.logits_ENC[:-1].softmax(2).amax(2))
    tried = torch.cat([torch.zeros(1), (seen[1:] + seen[:-1]) / 2, torch.tensor([math.inf])]).tolist()
    full = float((selection.logits_ENC[-1].argmax(1) == selection.labels_N).double().mean())
    best = (math.inf, 0.0)
    for q in tried[:: max(1, len(tried) // 300)]:
        here = sd.evaluate(Confidence(threshold=q), selection)
        if here.accuracy_early_exit >= full and here.mean_cost < best[0]:
            best = (here.mean_cost, q)
    slow = sd.evaluate(Confidence(threshold=best[1]), reported)
    assert found["cost_at_equal_accuracy"] == pytest.approx(slow.mean_cost, abs=0.02)
    assert set(found["accuracy_at_cost"]) == {"0.25", "0.5", "0.75"}
    # The labels of the test rows move no choice: who stops where, and its cost, stay as they were.
    others = dataclasses.replace(test, labels_N=test.labels_N[torch.randperm(900)])
    moved = figures(reduce_traces(held, others))
    assert moved["cost_at_equal_accuracy"] == found["cost_at_equal_accuracy"]
    assert moved["best"]["cost"] == found["best"]["cost"]
    assert moved["best"]["accuracy"] != found["best"]["accuracy"]


def test_of_equally_accurate_thresholds_the_cheapest_is_taken() -> None:
    """Both exits are always right: nobody needs to be asked twice."""
    said = torch.nn.functional.one_hot(torch.arange(40) % 4, 4) * torch.linspace(1, 4, 40)[:, None]
    whole = Trace(logits_ENC=torch.stack([said, said]), labels_N=torch.arange(40) % 4, cost_E=torch.tensor([0.25, 1.0]))
    found = figures(reduce_traces(whole, whole))
    assert found["best"] == {"accuracy": 1.0, "cost": 0.25, "drop": 0.0}
    assert found["cost_at_budget"] == {"0.25": 0.25, "0.5": 0.25, "0.75": 0.25}


def test_equal_accuracy_is_the_plain_networks(traces: tuple[Trace, Trace]) -> None:
    """Beside a weaker plain network equal accuracy is cheap, beside a perfect one it cannot be had."""
    held, test = traces
    reduced = reduce_traces(held, test)

    own, weak = figures(reduced), figures(reduced, reduce_traces(*alone(0, held, test)))
    assert weak["accuracy_cnn"] == own["accuracy_exits"][0] == weak["paper"]["accuracy_cnn"]
    assert weak["cost_at_equal_accuracy"] < own["cost_at_equal_accuracy"]
    assert weak["best"]["drop"] == pytest.approx(weak["accuracy_cnn"] - weak["best"]["accuracy"])
    perfect = [
        Trace(logits_ENC=9.0 * torch.eye(10)[t.labels_N][None], labels_N=t.labels_N, cost_E=torch.ones(1))
        for t in traces
    ]
    never = figures(reduced, reduce_traces(*perfect))
    assert never["cost_at_equal_accuracy"] is never["paper"]["cost_at_equal_accuracy"] is None


def test_paper_figures_are_the_eleven_thresholds_on_the_test_rows(traces: tuple[Trace, Trace]) -> None:
    reduced = reduce_traces(*traces)
    found, test = figures(reduced)["paper"], reduced.part("test").trace()
    tried = [sd.evaluate(Confidence(threshold=q, fallback="most_confident"), test) for q in GRID]
    assert found["best"]["accuracy"] == max(t.accuracy_early_exit for t in tried)
    within = max((t for t in tried if t.mean_cost <= 0.5), key=lambda t: t.accuracy_early_exit)
    assert found["accuracy_at_cost"]["0.5"] == within.accuracy_early_exit
    assert found["cost_at_budget"]["0.5"] == within.mean_cost
    assert len(GRID) == 11


def test_without_held_out_rows_nothing_clean_is_chosen(traces: tuple[Trace, Trace]) -> None:
    found = figures(reduce_traces(None, traces[1]))
    assert found["accuracy_at_cost"] == found["accuracy_exits"] == "not available"
    assert found["paper"]["best"]["accuracy"] > 0.5


def test_a_plain_network_has_no_confusion_and_nothing_to_choose(traces: tuple[Trace, Trace]) -> None:
    found = figures(reduce_traces(*alone(3, *traces)))
    assert found["confusion_auroc"] is found["best"] is found["cost_at_equal_accuracy"] is None
    assert found["msp_auroc"] > 0.5
    assert found["paper"]["accuracy_cnn"] == found["accuracy_exits"][-1]


def test_experiments_against_slow_loops(traces: tuple[Trace, Trace]) -> None:
    held, test = traces
    reduced = reduce_traces(held, test)
    right = (test.logits_ENC.argmax(2) == test.labels_N).tolist()
    rows = range(test.num_samples)
    sure_EN = test.logits_ENC.double().softmax(2).amax(2)
    found = overthinking_by_exit(reduced)
    for exit in range(4):
        spoiled = sum(right[exit][n] and not right[3][n] for n in rows) / len(rows)
        assert found["destructive"][exit] == pytest.approx(spoiled)
        so_far = sum(any(right[e][n] for e in range(exit + 1)) for n in rows) / len(rows)
        assert found["cumulative_accuracy"][exit] == pytest.approx(so_far)
        lost = [float(sure_EN[exit, n]) for n in rows if right[exit][n] and not right[3][n]]
        mean = found["confidence_spoiled"][exit]
        assert mean is None if exit == 3 else mean == pytest.approx(sum(lost) / len(lost), rel=1e-3)
        kept = [float(sure_EN[exit, n]) for n in rows if right[exit][n]]
        assert found["confidence_right"][exit] == pytest.approx(sum(kept) / len(kept), rel=1e-3)
    shown = galleries(reduced, limit=10_000)
    assert sorted(shown["simple"]) == [n for n in rows if all(right[e][n] for e in range(4))]
    assert sorted(shown["complex"]) == [n for n in rows if [right[e][n] for e in range(4)] == [False] * 3 + [True]]
    assert sorted(shown["only_first"]) == [n for n in rows if [right[e][n] for e in range(4)] == [True] + [False] * 3]
    sure = reduced.part("test").log_odds_EN[0]
    assert shown["simple"] == sorted(shown["simple"], key=lambda n: -float(sure[n])), "the surest first"
    alarms = error_alarms(reduced)
    wrong = torch.tensor([not r for r in right[3]])
    confusion = reduced.part("test").confusion_N.double()
    assert alarms["scores"]["confusion"]["auroc"] == pytest.approx(roc_auc_score(wrong, confusion))
    assert alarms["scores"]["confusion"]["auroc"] == error_auroc(confusion, wrong)
    above = (confusion[~wrong] > confusion[wrong].mean()).double().mean()
    assert alarms["shares"]["confusion"]["right_above_mean_wrong"] == pytest.approx(float(above))
    unsure = 1 - test.logits_ENC[3].double().softmax(1).amax(1)
    mean = alarms["shares"]["1 - max-softmax"]["mean_of_right"]
    assert mean == pytest.approx(float(unsure[~wrong].mean()), rel=1e-3), "a mean is named for what it is the mean of"
    assert sum(alarms["histogram"]["confusion"]["wrong"]) == pytest.approx(1)
    curve = early_exits(reduced)["curve"]
    assert min(curve["cost"]) == pytest.approx(0.2)


def test_disputed_images_are_those_on_which_first_and_last_exit_differ(traces: tuple[Trace, Trace]) -> None:
    _, test = traces
    costs = torch.tensor([0.5, 1.0])
    good_first = Trace(logits_ENC=test.logits_ENC[[3, 0]], labels_N=test.labels_N, cost_E=costs)
    reduced = reduce_traces(None, good_first)
    said = good_first.logits_ENC.argmax(2).tolist()
    only_first = galleries(reduced, limit=None)["only_first"]
    found = disputed(reduced, limit=None)
    assert sorted(found) == [n for n in range(900) if said[0][n] != said[1][n]]
    assert 0 < len(only_first) < len(found)
    assert found[: len(only_first)] == only_first, "those that the first exit alone gets right come first"
    others = reduced.log_odds_EN[0][found[len(only_first) :]].tolist()
    assert others == sorted(others, reverse=True), "the surest first"
    assert disputed(reduced, limit=3) == found[:3]


def alone(exit: int, *traces: Trace) -> list[Trace]:
    """Traces of a plain network that answers as ``exit`` does."""
    return [Trace(logits_ENC=t.logits_ENC[exit : exit + 1], labels_N=t.labels_N, cost_E=torch.ones(1)) for t in traces]


def write(folder: Path, run: str, reduced: ReducedTrace, cnn: ReducedTrace | None = None) -> Path:
    """The two files that a run leaves in ``folder``; the JSON's path."""
    dataset, network, *regime, recipe = run.split("-")
    about = figures(reduced, cnn) | {
        "dataset": dataset,
        "network": network,
        "regime": "-".join(regime),
        "recipe": recipe,
        "epochs": 3,
        "epochs_before": 9 if regime == ["ic", "only"] else 0,
        "training_rows": 45000,
        "held_out_rows": reduced.held_out,
        "seed": 0,
        "seconds": 120.0,
        "training": {},
        "data_fingerprint": "",
        "device": "a test",
        "precision": "fp32",
        "versions": {},
    }
    reduced.save(folder / f"{run}.safetensors")
    path = folder / f"{run}.json"
    path.write_text(json.dumps(plain(about)))
    return path


def test_tables_and_figures_from_the_folder_alone(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    write(tmp_path, "cifar10-resnet56-cnn-fast", reduce_traces(*alone(3, *traces)))
    write(tmp_path, "cifar10-resnet56-ic-only-fast", reduce_traces(*traces))
    shares = {"accuracy_clean": 0.9, "attack_success": 0.8, "accuracy_triggered": 0.2}
    victim = dict.fromkeys(VICTIM, 0) | shares | {"dataset": "cifar10", "network": "vgg16", "regime": "backdoor"}
    victim |= {"recipe": "fast", "epochs": 5, "poisoning_rate": 0.1, "detection": {"auroc": 1}}
    victim |= {"training_rows": 45000, "device": "a test", "early_exits": shares, "paper": shares}
    (tmp_path / "cifar10-vgg16-backdoor-fast-rate0.1.json").write_text(json.dumps(victim))
    text = tables.make_tables(tmp_path, tmp_path / "out")
    assert "| fast, 3 after 9 epochs, 45,000 rows, a test |" in text
    full = float((traces[1].logits_ENC[-1].argmax(1) == traces[1].labels_N).double().mean())
    assert f"| CNN accuracy | 92.0 (aim) | {100 * full:.1f} | {100 * (full - 0.92):+.1f}" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith(" how |")]
    assert all(re.search(r"\| fast, .* epochs, 45,000 rows, a test \|$", row) for row in rows), "every row says how"
    assert sum("0.1" in row and "vgg16" in row for row in rows) == 3
    for protocol in ("clean", "paper"):
        assert f"| vgg16, 0.1 poisoned | triggered, early exits, {protocol} | 84.0 | 20.0 | -64.0 (below) |" in text
    assert "| cost at equal accuracy, clean | 50.0 | 71.2 | +21.2 (above) |" in text, "a shortfall is marked"
    figures_made = sorted(path.name for path in (tmp_path / "out").glob("*.svg"))
    kinds = ("confusion", "early-exits", "overthinking")
    expected = ["backdoor.svg", *(f"cifar10-resnet56-ic-only-fast-{kind}.svg" for kind in kinds)]
    assert figures_made == expected, "none for a plain network"
    drawn = [(tmp_path / "out" / figure).read_text() for figure in figures_made]
    assert "right at some exit so far" in drawn[3]
    assert "fast, all by SGD, 5 epochs, 45,000 rows, a test" in drawn[0], "a figure says how, too"
    assert all("fast, 3 after 9 epochs, 45,000 rows, a test" in svg for svg in drawn[1:])


def test_a_trigger_that_was_not_learned_leaves_nothing_to_win_back() -> None:
    shares = {"accuracy_clean": 0.78, "accuracy_triggered": 0.779}
    victim = dict.fromkeys(VICTIM, 0) | shares | {"network": "mobilenet", "regime": "backdoor", "recipe": "fast"}
    victim |= {"early_exits": shares, "paper": shares, "detection": {"auroc": 0.5}, "poisoning_rate": 0.005}
    for success, cells in ((0.499, ["trigger not learned"] * 2), (0.5, ["77.9"] * 2)):
        one = victim | {"attack_success": success}
        assert list(tables.backdoor_rows([one])[1][5:7]) == cells
        beside = tables.paper_rows([], [one])[1:]
        assert [row[3] for row in beside] == cells
        assert [row[4] for row in beside] == ([""] * 2 if success < 0.5 else ["-6.1 (below)"] * 2)


def test_mobilenets_cost_in_the_paper_is_of_another_count(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    for network in ("mobilenet", "vgg16"):
        write(tmp_path, f"cifar100-{network}-mixed-fast", reduce_traces(*traces))
    costs = {row[0]: row[2] for row in tables.paper_rows(tables.read_records(tmp_path)) if "equal accuracy" in row[1]}
    assert costs == {"cifar100-mobilenet-mixed-fast": "50.0 (profiler)", "cifar100-vgg16-mixed-fast": "50.0"}


def test_early_exits_are_compared_with_the_plain_network_recorded(
    traces: tuple[Trace, Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two joint trainings alike but for their plain networks, one weak, one strong, and ICs on a frozen network."""
    reduced, said = reduce_traces(*traces), {}
    for network, exit in (("vgg16", 0), ("resnet56", 2)):
        cnn = reduce_traces(*alone(exit, *traces))
        write(tmp_path, f"cifar10-{network}-cnn-fast", cnn)
        for regime in ("sdn-training", "mixed"):
            path = write(tmp_path, f"cifar10-{network}-{regime}-fast", reduced, cnn)
            cli.main(["paper", "experiment", "early-exits", path.stem, "--results", str(tmp_path)])
            said[network] = json.loads(capsys.readouterr().out.splitlines()[-1])
            about = json.loads(path.read_text())
            for protocol, recorded in (("clean", about), ("paper", about["paper"])):
                assert {name: recorded[name] for name in said[network][protocol]} == said[network][protocol]
            assert said[network]["accuracy_cnn"] == about["accuracy_cnn"] == cnn.accuracy("test")
    weak, strong = said["vgg16"], said["resnet56"]
    assert weak["clean"]["cost_at_equal_accuracy"] < strong["clean"]["cost_at_equal_accuracy"]
    ics = write(tmp_path, "cifar10-vgg16-ic-only-fast", reduced)
    cli.main(["paper", "experiment", "early-exits", ics.stem, "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy_cnn"] == reduced.accuracy("test")


def test_comparison_with_the_paper_hides_nothing(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    held, test = traces
    perfect = reduce_traces(
        *(
            Trace(logits_ENC=9.0 * torch.eye(10)[t.labels_N][None], labels_N=t.labels_N, cost_E=torch.ones(1))
            for t in traces
        )
    )
    write(tmp_path, "tinyimagenet-vgg16-ic-only-fast", reduce_traces(held, test))
    write(tmp_path, "cifar100-vgg16-sdn-training-fast", reduce_traces(held, test), perfect)
    write(tmp_path, "cifar100-vgg16-ic-only-paper", reduce_traces(None, test))
    write(tmp_path, "cifar100-mobilenet-cnn-fast", reduce_traces(*alone(3, *traces)))
    rows = {tuple(row[:2]): row[2:5] for row in tables.paper_rows(tables.read_records(tmp_path))}
    tiny, joint, authors = (f"{name}" for name in sorted({run for run, _ in rows if "vgg16" in run}, reverse=True))
    found = figures(reduce_traces(held, test))
    cost = 100 * found["cost_at_equal_accuracy"]
    assert rows[tiny, "cost at equal accuracy, clean"] == ("75.0", f"{cost:.1f}", f"{cost - 75:+.1f}")
    assert 50 < cost < 75, "above the CIFAR anchor, below Tiny ImageNet's"
    for protocol in ("clean", "paper"):
        assert rows[joint, f"cost at equal accuracy, {protocol}"] == ("50.0", "none", "(above)")
        assert rows[joint, f"best early exits, {protocol}"][0] == "74.4"
    assert rows[authors, "best early exits, clean"][1:] == ("not available", "")
    assert rows[authors, "cost at equal accuracy, clean"][1:] == ("not available", "")
    best = 100 * found["paper"]["best"]["accuracy"]
    assert rows[authors, "best early exits, paper"][:2] == ("72.6", f"{best:.1f}")
    assert rows["cifar100-mobilenet-cnn-fast", "CNN accuracy"][0] == "64.9", "seen in the paper"


def test_what_is_below_before_rounding_is_below() -> None:
    def mark(known: float, here: float, less: bool) -> str:
        return tables._beside("run", "figure", known, here, "how", less=less)[4]

    assert mark(0.925, 0.9246, less=False) == "-0.0 (below)"
    assert mark(0.925, 0.925, less=False) == mark(0.925, 0.925, less=True) == "+0.0"
    assert mark(0.5, 0.5004, less=True) == "+0.0 (above)"
    assert mark(0.5, 0.6, less=False) == "+10.0"


def test_values_that_are_not_the_papers_say_so(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    costs = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0])
    seven = [Trace(logits_ENC=t.logits_ENC[[0, 1, 2, 3, 3, 3, 3]], labels_N=t.labels_N, cost_E=costs) for t in traces]
    write(tmp_path, "cifar10-vgg16-ic-only-fast", reduce_traces(*seven))
    write(tmp_path, "cifar10-vgg16-cnn-fast", reduce_traces(*alone(3, *traces)))
    rows = tables.paper_rows(tables.read_records(tmp_path))
    assert [row[2] for row in rows if row[1].startswith("exit")][::6] == ["67.7 (DeepSloth)", "92.5 (DeepSloth)"]
    assert [row[2] for row in rows if row[1] == "CNN accuracy"] == ["93.0 (aim)"]
    (spoiled,) = (row for row in rows if row[1].startswith("destructive"))
    assert ("(above)" in spoiled[4]) is (float(spoiled[3]) > 50)
    assert float(spoiled[3]) > 50


def test_cost_on_the_test_rows_stands_beside_what_was_reached_within_a_budget(
    traces: tuple[Trace, Trace], tmp_path: Path
) -> None:
    path = write(tmp_path, "cifar10-vgg16-ic-only-fast", reduce_traces(*traces))
    about = json.loads(path.read_text())
    clean, paper = tables.early_exit_rows(tables.read_records(tmp_path))[1:]
    for row, found in ((clean, about), (paper, about["paper"])):
        right, cost = found["accuracy_at_cost"]["0.75"], found["cost_at_budget"]["0.75"]
        assert row[5] == f"{100 * right:.1f} at {cost:.3f}"
    assert about["paper"]["cost_at_budget"]["0.75"] <= 0.75, "the authors choose on the rows they report"
    held, test = (reduce_traces(*traces).part(name).trace() for name in ("held_out", "test"))
    curve = sd.tradeoff(held).curves[0]
    points = zip(curve.accuracy_P.tolist(), (-curve.cost_P).tolist(), range(len(curve.cost_P)), strict=True)
    *_, point = max((round(right, 9), saved, p) for right, saved, p in points if -saved <= 0.75)
    chosen = Confidence(threshold=tuple(curve.threshold_PE[point].tolist()))
    assert about["cost_at_budget"]["0.75"] == pytest.approx(sd.evaluate(chosen, test).mean_cost)


def test_foreign_and_half_records_are_named(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    path = write(tmp_path, "cifar10-resnet56-ic-only-fast", reduce_traces(*traces))
    whole = json.loads(path.read_text())
    assert read_record(path) == whole
    less = {name: value for name, value in whole["paper"].items() if name != "best"}
    for half, missing in (
        ({}, r"no dataset, network, regime, recipe, epochs and 27 more\."),
        ([], "no dataset"),
        ({"regime": "backdoor"}, "no dataset, network, recipe, poisoning_rate, epochs and 15 more"),
        ({name: whole[name] for name in whole if name != "cost_at_budget"}, r"no cost_at_budget\."),
        (whole | {"paper": less}, r"no paper\.best\."),
        (whole | {"paper": None}, r"no paper\.accuracy_cnn"),
    ):
        path.write_text(json.dumps(half))
        with pytest.raises(
            FormatError, match=f"ic-only-fast.json is not a whole record of the study: it has {missing}"
        ):
            tables.make_tables(tmp_path, tmp_path / "out", figures=False)
    path.write_text("{}")
    (run,) = study.all_runs(("cifar10",), ("resnet56",), ("ic-only",))
    with pytest.raises(FormatError, match="is not a whole record of the study"):
        study.work_off([run], tmp_path / "no data", results=tmp_path, work=tmp_path / "work")


def test_a_trace_of_another_training_is_refused(
    traces: tuple[Trace, Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row more right at one exit, or one row more held out, are enough."""
    held, test = traces
    path, reduced = tmp_path / "cifar10-resnet56-ic-only-fast.json", reduce_traces(held, test)
    write(tmp_path, path.stem, reduced)
    assert len(tables.read_records(tmp_path)) == 1
    said = reduced.said_EN.clone()
    wrong = int((said[1, 600:] != reduced.labels_N[600:]).nonzero()[0])
    said[1, 600 + wrong] = reduced.labels_N[600 + wrong]
    for other in (dataclasses.replace(reduced, said_EN=said), dataclasses.replace(reduced, held_out=599)):
        other.save(path.with_suffix(".safetensors"))
        with pytest.raises(FormatError, match=rf"{path.stem}\.safetensors does not give .* that {path.name} says"):
            tables.make_tables(tmp_path, tmp_path / "out", figures=False)
        with pytest.raises(SystemExit, match="2"):
            cli.main(["paper", "experiment", "overthinking", path.stem, "--results", str(tmp_path)])
        assert f"sdn: {path.with_suffix('.safetensors')} does not give the accuracies" in capsys.readouterr().err


def test_an_unknown_run_is_answered_with_the_nearest(
    traces: tuple[Trace, Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"No run x in .*\. Runs there: none\."):
        find_run(tmp_path, "x")
    for number in range(10):
        (tmp_path / f"cifar100-wrn32-4-mixed-fast-seed{number}.safetensors").touch()
    path = write(tmp_path, "cifar10-resnet56-ic-only-fast", reduce_traces(*traces))
    assert find_run(tmp_path, path.stem) == tmp_path / path.stem
    with pytest.raises(SystemExit) as stopped:
        cli.main(["paper", "experiment", "overthinking", "cifar10-resnet-ic-only", "--results", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Runs there: cifar10-resnet56-ic-only-fast, cifar100" in said
    assert said.count("seed") == 7, "the eight nearest"


def test_an_empty_folder_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sdn paper run"):
        tables.make_tables(tmp_path, tmp_path)


# ---------------------------------------------------------------- what is committed

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"
COMMITTED = sorted(path.stem for path in RESULTS.glob("*.json") if "-backdoor-" not in path.stem)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_follow_from_their_trace(name: str) -> None:
    about = json.loads((RESULTS / f"{name}.json").read_text())
    reduced = ReducedTrace.load(RESULTS / f"{name}.safetensors")
    run = study.run_of(about)
    again = json.loads(json.dumps(plain(figures(reduced, study.plain_network(run, RESULTS)))))
    assert {field: about[field] for field in again} == again
    assert (RESULTS / f"{name}.safetensors").stat().st_size <= 650_000
    assert name == run.name
    assert run.regime != "ic-only" or study.same_network(run, RESULTS), "ICs over the plain network committed"
    assert about["paper"]["cost_exits"][-1] >= 1, "the full network pays for every IC passed"


@pytest.mark.skipif(not COMMITTED, reason="no run is committed yet")
def test_the_committed_tables_are_fresh(tmp_path: Path) -> None:
    text = tables.make_tables(RESULTS, tmp_path, figures=False)
    assert (RESULTS / "tables.md").read_text() == text + "\n"
