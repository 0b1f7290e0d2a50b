"""The report: its numbers against slow loops, its words, and a page that no name can break."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from oracle import softmax
from shallowdeep.calibration import evaluate
from shallowdeep.collection import collect
from shallowdeep.cuts import plan
from shallowdeep.demo import SmallNet
from shallowdeep.explain import enlarged, grad_cam
from shallowdeep.files import FormatError
from shallowdeep.network import attach, save
from shallowdeep.policies import CalibrationRecord, Confidence, Fixed, Patience
from shallowdeep.report import numbers, words
from shallowdeep.report.compact import NOBODY, kept_rows, packed, steps_of, threshold_of, top_three
from shallowdeep.report.facts import Facts, facts_of
from shallowdeep.report.page import page_of
from shallowdeep.report.pictures import COLUMNS, GRID, as_pictures, sheets_of
from shallowdeep.report_cli import Images
from shallowdeep.report_verbs import report_verb
from shallowdeep.runs import write_run
from shallowdeep.spelling import to_json
from shallowdeep.types import DataError, Trace
from shallowdeep.verbs import DataChoice

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\u2028b\u2029",
    "'\"`${7*7}{{7*7}}&lt;",
)


def a_trace(samples: int = 300, exits: int = 4, classes: int = 5, seed: int = 0, **more: Any) -> Trace:
    draw = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(classes, (samples,), generator=draw)
    truth_NC = torch.nn.functional.one_hot(labels_N, classes) * 1.0
    strength_E11 = torch.linspace(1, 3, exits)[:, None, None]
    logits_ENC = 1.5 * (strength_E11 * truth_NC + torch.randn(exits, samples, classes, generator=draw))
    cost_E = torch.linspace(0.3, 1.05, exits) if exits > 1 else torch.ones(1)
    return Trace(logits_ENC=logits_ENC, labels_N=labels_N, cost_E=cost_E, **more)


def some_facts(trace: Trace | None = None, **more: Any) -> Facts:
    return facts_of(trace or a_trace(), Confidence(threshold=0.8), **more)


def a_bench(*names: str) -> dict[str, Any]:
    """Measurements of exits called so; default: of ``a_trace``, every exit asked."""
    one = {"backend": "torch", "batch_size": 4, "threads": 1, "best_full_ms": 8.0, "early_exit_ms": 5.0}
    one |= {"speedup": 1.6, "speedup_quartiles": [1.5, 1.7], "ideal_speedup": 2.0}
    slow = one | {
        "batch_size": 1,
        "early_exit_ms": 3.0,
        "best_full_ms": 2.0,
        "speedup": 0.7,
        "speedup_quartiles": [0.6, 0.8],
    }
    asked = list(names or ("exit0", "exit1", "exit2", "full"))
    return {
        "measured": [one, slow],
        "exits_asked": asked,
        "policy": {"kind": "Confidence", "fallback": "last", "threshold": 0.8},
    }


# ---------------------------------------------------------------- numbers


def test_the_flow_is_what_a_slow_walk_gives() -> None:
    facts = some_facts()
    trace, threshold = facts.trace, 0.8
    left = [[0, 0] for _ in range(4)]
    for n in range(trace.num_samples):
        for e in range(4):
            probabilities = softmax(trace.logits_ENC[e, n].tolist())
            if max(probabilities) >= threshold or e == 3:
                left[e][probabilities.index(max(probabilities)) == int(trace.labels_N[n])] += 1
                break
    rows = numbers.flow(facts)
    assert [row["right"] for row in rows] == pytest.approx([right / 300 for _, right in left])
    assert [row["wrong"] for row in rows] == pytest.approx([wrong / 300 for wrong, _ in left])
    assert rows[0]["arrive"] == 1
    assert rows[-1]["on"] == pytest.approx(0)
    assert all(a["on"] == pytest.approx(b["arrive"]) for a, b in itertools.pairwise(rows))


def test_rows_per_exit_and_class_agree_with_the_library() -> None:
    facts = some_facts()
    rows, how = numbers.by_exit(facts), facts.overthinking
    assert [row["accuracy"] for row in rows] == pytest.approx(how.accuracy_E.tolist())
    assert [row["so_far"] for row in rows] == pytest.approx(how.cumulative_accuracy_E.tolist())
    assert sum(row["first"] for row in rows) == pytest.approx(1 - how.never)
    classes = numbers.by_class(facts)
    for name, value in (("wasteful", how.wasteful), ("destructive", how.destructive)):
        assert sum(row[name] * row["rows"] for row in classes) / 300 == pytest.approx(value)
    assert float(facts.destructive_N.double().mean()) == pytest.approx(how.destructive)
    wrong = sum(row["policy_errors"] * row["rows"] for row in classes) / 300
    assert wrong == pytest.approx(1 - facts.evaluation.accuracy_early_exit)


def test_calibration_error_and_risk_against_loops() -> None:
    facts = some_facts()
    trace = facts.trace
    sure = [max(softmax(row.tolist())) for row in trace.logits_ENC[1]]
    right = (trace.logits_ENC[1].argmax(1) == trace.labels_N).tolist()
    gaps = [0.0] * 15
    for s, r in zip(sure, right, strict=True):
        gaps[min(int(s * 15), 14)] += s - r
    assert numbers.by_exit(facts)[1]["ece"] == pytest.approx(sum(map(abs, gaps)) / 300, abs=1e-6)
    bins = [row for row in numbers.reliability(facts) if row["exit"] == "2"]
    assert sum(row["rows"] for row in bins) == 300
    full = [max(softmax(row.tolist())) for row in trace.logits_ENC[3]]
    wrong = (trace.logits_ENC[3].argmax(1) != trace.labels_N).tolist()
    best = sorted(range(300), key=lambda n: -full[n])[:150]
    found = [r for r in numbers.risks(facts) if r["what"] == "full network, by confidence" and r["coverage"] == 0.5]
    assert found[0]["risk"] == pytest.approx(sum(wrong[n] for n in best) / 150)


def test_confusions_are_shares_of_right_and_of_wrong_answers() -> None:
    rows = numbers.confusions(some_facts())
    assert sum(row["right"] for row in rows) == pytest.approx(1)
    assert sum(row["wrong"] for row in rows) == pytest.approx(1)


def test_milliseconds_take_the_fastest_backend_and_divide_by_rows() -> None:
    bench = a_bench()
    bench["measured"].append(bench["measured"][0] | {"backend": "slow", "early_exit_ms": 7.0})
    small, large = numbers.milliseconds(bench)
    assert (small["early"], large["early"], large["whole"], large["ideal"]) == (3.0, 1.25, 2.0, 1.0)
    assert large["backend"] == "torch"
    said = words.on_milliseconds([small, large])
    assert "1.60x" in said
    assert "batch 1, 1 thread early exits are slower" in said


# ---------------------------------------------------------------- which rows


def test_rows_that_the_policy_has_seen_are_left_out() -> None:
    trace = a_trace(hash_N=torch.arange(300))
    record = CalibrationRecord(hash_N=tuple(range(0, 300, 2)))
    policy = Confidence(threshold=0.8, calibrated_on=record)
    facts = facts_of(trace, policy)
    assert facts.row_N.tolist() == list(range(1, 300, 2))
    assert facts.evaluation.mean_cost == evaluate(policy, trace.rows(facts.row_N)).mean_cost
    assert "have not seen" in words.rows_said(facts)
    everything = dataclasses.replace(policy, calibrated_on=CalibrationRecord(hash_N=tuple(range(300))))
    seen = facts_of(trace, everything)
    assert seen.seen
    assert "flatter" in words.rows_said(seen)
    with pytest.warns(UserWarning, match="ICs trained on 100.0% of these rows: they flatter"):
        trained = facts_of(a_trace(trained_N=torch.ones(300, dtype=torch.bool)), Confidence(threshold=0.8))
    assert "which the ICs were trained on" in words.rows_said(trained)


def test_without_a_policy_one_half_chooses_and_the_other_is_shown() -> None:
    facts = facts_of(a_trace())
    assert facts.trace.num_samples == 150
    assert facts.chosen_here
    assert "chosen here" in words.rows_said(facts)
    few = facts_of(a_trace(samples=10))
    assert few.policy == Fixed(exit=3)
    assert few.trace.num_samples == 10


# ---------------------------------------------------------------- words


def test_the_summary_is_computed() -> None:
    facts = some_facts(bench=a_bench())
    said = "".join(text for text, _ in words.summary(facts))
    assert f"{round(100 * (1 - facts.evaluation.mean_cost))}\u202f% of the compute" in said
    assert "(1.6x in time, measured with batches of 4)" in said
    assert f"AUROC {facts.finding.confusion_auroc:.2f}, confidence alone with {facts.finding.msp_auroc:.2f}" in said
    assert f"{words.percent(facts.overthinking.destructive_of_errors, 0)} of the full network's errors" in said
    assert words.saved(1.034) == "add 3\u202f% to the compute"
    assert f"± {100 * facts.doubt:.1f} points" in said
    assert words.points(-0.004, 0.002) == "and gain 0.4 ± 0.2 points of accuracy"
    assert words.points(0.0002, 0.01) == "at the same accuracy (± 1.0 points)"


def test_the_certificate_is_the_record() -> None:
    record = CalibrationRecord(info={"max_accuracy_drop": 0.01, "note": "A bound: so it is."})
    facts = facts_of(a_trace(), Confidence(threshold=0.8, calibrated_on=record))
    assert ("note", "A bound: so it is.") in words.certificate(facts.policy)
    assert "A bound: so it is." in words.on_tradeoff(facts)
    assert "no certificate" in words.on_tradeoff(some_facts())


def test_the_drop_comes_with_its_doubt() -> None:
    facts = some_facts()
    end = (facts.trace.logits_ENC[-1].argmax(1) == facts.trace.labels_N).tolist()
    gaps = [float(a) - float(b) for a, b in zip(end, facts.answered_right_N.tolist(), strict=True)]
    doubt = 1.96 * (np.var([*gaps, 1, -1]) / 302) ** 0.5
    said = f"The drop is {100 * np.mean(gaps):.2f} points, give or take {100 * doubt:.2f} (95 %)"
    assert said in words.on_tradeoff(facts)


# ---------------------------------------------------------------- rows for the script


def test_packed_rows_walk_as_simulate_does() -> None:
    facts = some_facts()
    pack = packed(facts, torch.arange(300))
    step_EN = np.frombuffer(base64.b64decode(pack["step"]), "<u2").reshape(4, 300)
    said_EN = np.frombuffer(base64.b64decode(pack["said"]), "<u2").reshape(4, 300)
    for level in (20_000, 30_000, 34_000):
        stops = np.where(np.vstack([step_EN[:-1] >= level, np.ones((1, 300), bool)]), 1, 0).argmax(0)
        found = evaluate(Confidence(threshold=threshold_of(level)), facts.trace)
        assert np.bincount(stops, minlength=4) / 300 == pytest.approx(found.share_E.numpy())
        right = said_EN[stops, np.arange(300)] == facts.trace.labels_N.numpy()
        assert right.mean() == pytest.approx(found.accuracy_early_exit)
    top, share = top_three(facts, torch.tensor([5, 7]))
    label_GE3 = np.frombuffer(base64.b64decode(top), "<u2").reshape(2, 4, 3)
    assert label_GE3[1, 2].tolist() == facts.trace.logits_ENC[2, 7].topk(3).indices.tolist()
    share_GE3 = np.frombuffer(base64.b64decode(share), "<u2").reshape(2, 4, 3) / 65535
    assert share_GE3[0, 0, 0] == pytest.approx(max(softmax(facts.trace.logits_ENC[0, 5].tolist())), abs=1e-4)


def test_answers_that_are_not_finite_are_nobodys() -> None:
    trace = a_trace()
    trace.logits_ENC[0, :7] = math.nan
    facts = some_facts(trace)
    pack = packed(facts, torch.arange(300))
    assert set(np.frombuffer(base64.b64decode(pack["said"]), "<u2")[:7]) == {NOBODY}
    assert not np.frombuffer(base64.b64decode(pack["step"]), "<u2")[:7].any()
    assert steps_of(torch.tensor([math.inf])).item() == 65534


def test_many_rows_are_thinned_evenly() -> None:
    facts = some_facts(a_trace(samples=300))
    assert len(kept_rows(facts, 1)) == 300
    assert kept_rows(facts, 4000).tolist() == [n * 300 // 25 for n in range(25)]


# ---------------------------------------------------------------- the page


class Reader(HTMLParser):
    """What a browser would make of the page: elements, scripts and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def hostile_page() -> str:
    trace = a_trace(samples=60, exits=2, classes=4, exit_names=(HOSTILE[1], HOSTILE[0]), info={HOSTILE[0]: HOSTILE[3]})
    record = CalibrationRecord(info={"family": HOSTILE[1], "note": HOSTILE[0]})
    policy = Confidence(threshold=(0.7, 0.7), calibrated_on=record)
    facts = facts_of(trace, policy, name=HOSTILE[2], class_names=HOSTILE, bench=a_bench())
    return page_of([facts, facts], title=HOSTILE[0], made=HOSTILE[3])


def test_no_name_becomes_an_element(hostile_page: str) -> None:
    reader = Reader()
    reader.feed(hostile_page)
    kinds = [tag for tag, _ in reader.tags]
    assert kinds.count("script") == 6  # three of data, the library, two of ours
    assert "img" not in kinds
    assert not [
        name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "style"
    ]
    assert "\u2028" not in "".join(reader.scripts[:3])
    for text in reader.scripts[:3]:
        json.loads(text)
    assert html.escape(HOSTILE[0], quote=False) in hostile_page


def test_the_policy_of_the_page_allows_its_own_scripts_alone(hostile_page: str) -> None:
    reader = Reader()
    reader.feed(hostile_page)
    policy = next(
        a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", hostile_page, re.S)
    for text in scripts:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    links = [a for t, a in reader.tags if t in ("link", "iframe", "object") or str(a.get("src", "")) != ""]
    assert not links
    assert len(hostile_page.encode()) < 5e6


@pytest.mark.parametrize(
    ("exits", "classes", "policy"),
    [
        (1, 3, None),
        (2, 2, None),
        (3, 1000, Confidence(threshold=0.5)),
        (4, 5, Patience(patience=1)),
        (4, 5, Fixed(exit=1)),
    ],
)
def test_any_shape_makes_a_page(exits: int, classes: int, policy: Any) -> None:
    trace = a_trace(samples=200, exits=exits, classes=classes)
    if exits == 3:
        trace.logits_ENC[1, :50] = math.nan
        trace.logits_ENC[:, 60] = math.nan
    page = page_of([facts_of(trace, policy)], title="t", made="m")
    assert page.count("data-chart=") == 11
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower()


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9")  # what Python makes of a file name in Latin-1
    facts = facts_of(a_trace(), name=strange, class_names=(strange, "", "c", "d", "e"))
    assert facts.class_names[:2] == ("caf?", "class 1")
    page_of([facts, facts], title=strange, made=strange).encode()


def test_a_network_without_errors_has_nothing_to_find() -> None:
    trace = a_trace(samples=80)
    right = torch.nn.functional.one_hot(trace.labels_N, 5) * 9.0
    facts = some_facts(dataclasses.replace(trace, logits_ENC=right.expand(4, -1, -1)))
    assert "AUROC" not in "".join(text for text, _ in words.summary(facts))
    assert "No class loses" in words.on_classes(numbers.by_class(facts), 5)
    page_of([facts], title="t", made="m")


# ---------------------------------------------------------------- the verb


def test_sheets_hold_the_pictures_in_order() -> None:
    pictures = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 3, 8, 8) * 8
    sheets = sheets_of(pictures)
    file = base64.b64decode(sheets.uris[0].partition(",")[2])
    sheet = np.array(Image.open(io.BytesIO(file)).convert("L")).astype(int)
    assert sheet.shape == (16, 8 * COLUMNS)
    assert abs(sheet[12, 4] - 20 * 8) < 8
    assert abs(sheet[4, 8 * 3 + 4] - 3 * 8) < 8
    assert (sheets_of(torch.zeros(1, 3, 200, 400, dtype=torch.uint8)).width, len(sheets.uris)) == (96, 1)
    assert as_pictures(torch.tensor([[[[-1.0, 1.0]]]]), "x").flatten().tolist() == [0, 255] * 3


def write_rows(folder: Path, trace: Trace, side: int = 8) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (trace.num_samples, side, side, 3), np.uint8)
    path = folder / "rows.npz"
    np.savez(path, images=images, labels=trace.labels_N.numpy(), class_names=np.array((*HOSTILE, "dog")))
    return path


def test_the_verb_writes_a_page_with_an_explorer(tmp_path: Path) -> None:
    trace = a_trace(samples=120)
    trace.save(tmp_path / "trace.safetensors")
    (tmp_path / "policy.json").write_text(json.dumps(to_json(Confidence(threshold=0.8))))
    (tmp_path / "bench.json").write_text(json.dumps(a_bench()))
    images = DataChoice(source=str(write_rows(tmp_path, trace)))
    out = tmp_path / "deep" / "report.html"
    found = report_verb([tmp_path], out, policies=[tmp_path], benches=[tmp_path], images=images, thumbnails=50)
    assert found["samples_shown"] == 50
    assert found["bytes"] == out.stat().st_size
    data = json.loads(re.findall(r'id="explorer-data">(.*?)</script>', out.read_text("utf-8"), re.S)[0])
    assert len(data["rows"]) == len(data["numbers"]) == 50
    facts = facts_of(trace, Confidence(threshold=0.8))
    wrong = (~facts.right_EN[3]).nonzero().flatten().tolist()
    assert len(wrong) > 50 or set(wrong) <= set(data["numbers"])
    assert str(tmp_path) not in out.read_text("utf-8")
    assert "<h2>50 of 120 samples</h2>" in out.read_text("utf-8")


def small_net(num_classes: int) -> SmallNet:
    return SmallNet(width=4, depth=3, num_classes=num_classes)


def test_maps_of_where_exits_looked_come_with_an_sdn(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    torch.manual_seed(0)
    net = small_net(5).eval()
    save_model(net, str(tmp_path / "weights.safetensors"))
    sdn = attach(net, plan(net, torch.zeros(2, 1, 8, 8), at=(0.5,)))
    sdn.class_names = (*HOSTILE, "dog")
    save(sdn, tmp_path)
    half = {"mean": [0.5], "std": [0.5], "size": [8, 8]}
    about = {"model": "test_report:small_net", "num_classes": 5, "preprocessing": half}
    write_run(tmp_path, "train", about | {"weights": tmp_path / "weights.safetensors"}, {})
    grey = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), np.uint8)
    inputs = torch.from_numpy(grey).permute(0, 3, 1, 2).float() / 127.5 - 1
    trace = collect(sdn, (inputs, torch.arange(60) % 5))
    trace.save(tmp_path / "trace.safetensors")
    np.savez(tmp_path / "rows.npz", images=grey, labels=trace.labels_N.numpy(), class_names=np.array(sdn.class_names))
    out = tmp_path / "report.html"
    report_verb([tmp_path], out, images=DataChoice(source=str(tmp_path / "rows.npz")), sdn_dir=tmp_path, heats=3)
    data = json.loads(re.findall(r'id="explorer-data">(.*?)</script>', out.read_text("utf-8"), re.S)[0])
    assert len(data["heat"]) == 3
    for g, packed_heat in data["heat"].items():
        row = data["numbers"][int(g)]
        image = inputs[row : row + 1]
        wanted = torch.stack([enlarged(grad_cam(sdn, image, exit), (GRID, GRID))[0] for exit in range(2)])
        heat = np.frombuffer(base64.b64decode(packed_heat), np.uint8).reshape(2, GRID, GRID) / 255
        assert np.abs(heat - wanted.numpy()).max() < 0.01
    collect(sdn, (inputs, trace.labels_N), second_look="mirror").save(tmp_path / "trace.safetensors")
    report_verb([tmp_path], out, images=DataChoice(source=str(tmp_path / "rows.npz")), sdn_dir=tmp_path, heats=1)
    data = json.loads(re.findall(r'id="explorer-data">(.*?)</script>', out.read_text("utf-8"), re.S)[0])
    assert [len(base64.b64decode(heat)) for heat in data["heat"].values()] == [2 * GRID * GRID]  # none behind the end
    images = DataChoice(source=str(tmp_path / "rows.npz"))
    for exits in (1, 2, 3):  # fewer, as many of other names, more
        dataclasses.replace(a_trace(samples=60, exits=exits), labels_N=trace.labels_N).save(
            tmp_path / "trace.safetensors"
        )
        for shown in (images, None):
            with pytest.raises(DataError, match=r"the trace .*: they do not belong together"):
                report_verb([tmp_path], out, images=shown, sdn_dir=tmp_path)
    dataclasses.replace(trace, logits_ENC=trace.logits_ENC.roll(1, 2)).save(tmp_path / "trace.safetensors")
    with pytest.raises(DataError, match="answers otherwise than the trace says"):
        report_verb([tmp_path], out, images=images, sdn_dir=tmp_path)


def test_bad_requests_are_one_sentence(tmp_path: Path) -> None:
    trace = a_trace(samples=60)
    trace.save(tmp_path / "trace.safetensors")
    out = tmp_path / "report.html"
    with pytest.raises(FormatError, match="No file"):
        report_verb([tmp_path / "absent"], out)
    with pytest.raises(DataError, match="No file or folder"):
        report_verb([tmp_path], out, images=DataChoice(source=str(tmp_path / "absent")))
    other = DataChoice(source=str(write_rows(tmp_path, a_trace(samples=60, seed=1))))
    with pytest.raises(DataError, match="with other labels: give the data, split, half and limit"):
        report_verb([tmp_path], out, images=other)
    fewer = DataChoice(source=other.source, limit=9)
    with pytest.raises(DataError, match="of 60 rows, the images are 9"):
        report_verb([tmp_path], out, images=fewer)
    np.savez(tmp_path / "flat.npz", inputs=np.zeros((60, 4), np.float32), labels=trace.labels_N.numpy())
    with pytest.raises(DataError, match="The explorer shows images"):
        report_verb([tmp_path], out, images=DataChoice(source=str(tmp_path / "flat.npz")))
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(DataError, match="sdn bench"):
        report_verb([tmp_path], out, benches=[tmp_path])
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(to_json(Confidence(threshold=0.8, enabled_E=(True, False, True, True)))))
    for names in ((), ("exit0", "full"), ("exit0", "layer7", "full")):  # all exits, too few, another network's
        (tmp_path / "bench.json").write_text(json.dumps(a_bench(*names)))
        with pytest.raises(DataError, match=r"the policy of .* asks exit0, exit2, full: give what `sdn bench`"):
            report_verb([tmp_path], out, policies=[policy], benches=[tmp_path])
    (tmp_path / "bench.json").write_text(json.dumps({"measured": a_bench()["measured"]}))
    with pytest.raises(DataError, match="measured exits without a name"):
        report_verb([tmp_path], out, policies=[policy], benches=[tmp_path])
    other_thresholds = a_bench("exit0", "exit2", "full")
    other_thresholds["policy"] |= {"enabled_E": [True, False, True, True], "threshold": 0.9}
    (tmp_path / "bench.json").write_text(json.dumps(other_thresholds))
    with pytest.raises(DataError, match=r"measured another policy than that of .*: give both the same --policy"):
        report_verb([tmp_path], out, policies=[policy], benches=[tmp_path])
    with pytest.raises(ValueError, match="one for all, or one each"):
        report_verb([tmp_path], out, policies=[tmp_path] * 2)
    with pytest.raises(ValueError, match="class names"):
        facts_of(trace, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"is a folder: give the file to write, say --out .*report.html"):
        report_verb([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="give --images, too"):
        Images(split="test").choice()
    assert not out.exists()
