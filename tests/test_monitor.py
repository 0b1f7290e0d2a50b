"""A monitor is seldom wrong, notices and names what changes, remembers nothing that grows, and goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import oracle
import shallowdeep.monitor as monitor_module
from shallowdeep.audits import Audit, Tally
from shallowdeep.files import FormatError
from shallowdeep.monitor import Monitor
from shallowdeep.policies import Confidence, Fixed
from shallowdeep.reference import Reference, SeenRows, refer, seen_in
from shallowdeep.sequential import mean_limits, share_limits
from shallowdeep.types import DataError, Trace
from shallowdeep.walking import simulate

POLICY = Confidence(threshold=0.8)
WORLD = oracle.bed(6000, exits=3, classes=4, seed=1)
"""A population: streams are drawn from its rows with replacement, so that its means are the true ones."""
SEEN = seen_in(simulate(POLICY, WORLD))
HARDER = seen_in(simulate(POLICY, oracle.bed(4000, exits=3, classes=4, seed=2, sharp=1.0)))


def drawn(seen: SeenRows, rows: int, seed: int) -> SeenRows:
    index = torch.randint(len(seen.exit_B), (rows,), generator=torch.Generator().manual_seed(seed))
    parts = {field.name: getattr(seen, field.name)[index] for field in dataclasses.fields(seen)}
    return SeenRows(**parts)


def reference(rows: int = 1000, seed: int = 0, **other: float) -> Reference:
    index = torch.randint(WORLD.num_samples, (rows,), generator=torch.Generator().manual_seed(seed))
    return refer(POLICY, WORLD.rows(index), **other)  # type: ignore[arg-type]


def audit_of(answered: list[int], full: list[int]) -> Audit:
    return Audit(row_S=torch.arange(len(full)), answered_S=torch.tensor(answered), full_S=torch.tensor(full))


# ---------------------------------------------------------------- false alarms and power


def alarms(streams: int, rows: int, **changed: tuple[float, ...]) -> int:
    count = 0
    for stream in range(streams):
        monitor = Monitor(dataclasses.replace(reference(1000, stream, alpha=0.2), **changed))
        monitor.see(drawn(SEEN, rows, 1000 + stream))
        count += monitor.verdict().action != "keep"
    return count


def test_a_small_reference_raises_few_false_alarms() -> None:
    assert binomtest(alarms(40, 4000), 40, 0.2, alternative="greater").pvalue > 0.001


def test_limits_that_forget_the_size_of_the_reference_raise_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the limits are for: bets against the reference's own means are wrong most of the time."""
    from shallowdeep import reference as module

    monkeypatch.setattr(module, "share_limits", lambda hits, rows, alpha: (hits / rows, max(hits / rows, 1e-6)))
    monkeypatch.setattr(module, "mean_limits", lambda x_N, count_N, alpha: (x_N.mean(), x_N.mean()))
    assert alarms(20, 20_000) > 10


def test_audits_raise_few_false_alarms() -> None:
    """Disagreement and drop exactly as large as tolerated, the hardest case."""
    draw, wrong, streams = np.random.default_rng(0), 0, 100
    for _ in range(streams):
        differ = Tally.fresh((0.0, 1.0), 0.05, alpha=0.1).after(torch.from_numpy(draw.binomial(1, 0.05, 3000)))
        lost = torch.from_numpy(draw.choice(3, 3000, p=[0.02, 0.95, 0.03]))
        wrong += differ.alarmed or Tally.fresh((-1.0, 0.0, 1.0), 0.01, alpha=0.1).after(lost).alarmed
    assert binomtest(wrong, streams, 0.2, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize("before", [0, 5000])
def test_a_shift_is_found_and_named(before: int) -> None:
    monitor = Monitor(reference(2000))
    monitor.see(drawn(SEEN, before, 1))
    assert monitor.verdict().action == "keep"
    monitor.see(drawn(HARDER, 2000, 2))
    verdict = monitor.verdict()
    assert verdict.action == "recalibrate"
    assert monitor.exits_on
    assert monitor.drift is not None
    row, name = monitor.drift
    assert before < row < before + 1000
    assert f"by row {row:,}, {name} was " in verdict.why
    assert "2,000 reference rows" in verdict.why
    by_name = {one.name: one for one in verdict.statistics}
    assert not by_name[name].low <= by_name[name].recent <= by_name[name].high
    assert "recalibrate: by row" in str(verdict)
    monitor.see(drawn(SEEN, 20_000, 3))
    assert monitor.verdict().why == verdict.why, "an alarm stays"
    monitor.reset()
    assert monitor.verdict().action == "keep"
    assert monitor.verdict().rows == 0


def test_a_drift_within_the_slack_is_none() -> None:
    monitor = Monitor(reference(2000, slack=0.3))
    monitor.see(drawn(HARDER, 5000, 2))
    assert monitor.verdict().action == "keep"


def test_rows_that_are_no_numbers_are_noticed() -> None:
    monitor, calm = Monitor(reference()), drawn(SEEN, 200, 5)
    ruined = torch.arange(200) % 4 == 0
    seen = dataclasses.replace(
        calm,
        valid_B=~ruined,
        confidence_B=torch.where(ruined, torch.nan, calm.confidence_B),
        confusion_B=calm.confusion_B,
    )
    monitor.see(seen)
    assert monitor.drift is not None
    assert monitor.drift[1] == "share not finite"


# ---------------------------------------------------------------- audits


def test_disagreement_switches_exits_off() -> None:
    monitor = Monitor(reference(max_disagreement=0.1))
    monitor.audit(audit_of([0] * 300, ([0] * 29 + [1]) * 10))
    verdict = monitor.verdict()
    assert (verdict.action, monitor.exits_on) == ("keep", True)
    assert verdict.disagreement.mean == pytest.approx(10 / 300)
    assert verdict.drop_guess == pytest.approx(10 / 300 * monitor.reference.harm_ratio)
    limits = mean_limits(np.array([0.0, 1.0]), np.array([290, 10]), 0.05 / 8)
    assert (verdict.disagreement.low, verdict.disagreement.high) == pytest.approx(limits)
    monitor.audit(audit_of([0] * 60, [1] * 40 + [0] * 20))
    verdict = monitor.verdict()
    assert (verdict.action, monitor.exits_on) == ("switch exits off", False)
    assert "over 10.00% of answers contradict" in verdict.why
    monitor.reset()
    assert monitor.exits_on


def test_late_labels_switch_exits_off_for_harm_alone() -> None:
    harmed, mended = audit_of([1] * 200, [0] * 200), audit_of([0] * 200, [1] * 200)
    monitor = Monitor(reference(max_accuracy_drop=0.05))
    monitor.labels(mended, torch.zeros(200, dtype=torch.int64))
    assert monitor.verdict().drop.mean == -1
    assert monitor.exits_on, "early exits that are right where the end is wrong do no harm"
    monitor.labels(harmed, torch.full((200,), 2))
    assert monitor.verdict().drop.mean == -0.5, "both wrong: nothing lost"
    monitor.labels(harmed, torch.zeros(200, dtype=torch.int64))
    verdict = monitor.verdict()
    assert verdict.action == "switch exits off"
    assert "labels show that early exits lose more than 5.00%" in verdict.why
    assert verdict.drop.rows == 600
    assert verdict.drop.low <= verdict.drop.mean == 0.0 <= verdict.drop.high
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(200)):
        with pytest.raises(DataError, match="200 rows were audited"):
            monitor.labels(harmed, labels)
    assert monitor.verdict().drop.rows == 600


# ---------------------------------------------------------------- memory, files, threads


def size(monitor: Monitor, path: Path) -> int:
    monitor.save(path)
    state = json.loads(path.read_text())["state"]
    return sum(
        np.asarray(part[name]).size for part in (state["drift"], state["drop"]) for name in ("wealth_JG", "rows")
    )


def test_memory_does_not_grow(tmp_path: Path) -> None:
    monitor = Monitor(reference())
    monitor.see(drawn(SEEN, 10, 0))
    before = size(monitor, tmp_path / "m.json")
    monitor.see(drawn(SEEN, 50_000, 0))
    monitor.audit(audit_of([0] * 5000, [0] * 5000))
    assert size(monitor, tmp_path / "m.json") == before
    assert (tmp_path / "m.json").stat().st_size < 20_000


@pytest.mark.parametrize("rows", [0, 700, 3000])
def test_a_monitor_read_from_a_file_goes_on(rows: int, tmp_path: Path) -> None:
    one = Monitor(reference(1500, max_disagreement=0.2))
    one.see(drawn(HARDER, rows, 1))
    one.audit(audit_of([0, 1, 1], [0, 0, 1]))
    one.labels(audit_of([0, 1], [0, 0]), torch.tensor([0, 0]))
    one.save(tmp_path / "m.json")
    two = Monitor.load(tmp_path / "m.json")
    for monitor in (one, two):
        monitor.see(drawn(SEEN, 300, 2))
        monitor.audit(audit_of([0] * 9, [1] * 9))
    assert two.verdict() == one.verdict()
    assert two.reference == one.reference
    assert two.drift == one.drift


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    Monitor(reference()).save(path)
    good = json.loads(path.read_text())
    for change in ({"format": 9}, {"state": {}}, {"reference": {}}, {"state": good["state"] | {"drift": {}}}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(FormatError, match=r"m\.json"):
            Monitor.load(path)
    path.write_text("[]")
    with pytest.raises(FormatError, match="not a monitor"):
        Monitor.load(path)


def test_threads_lose_no_rows() -> None:
    monitor, batch = Monitor(reference()), drawn(SEEN, 7, 0)
    usual = sys.getswitchinterval()

    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        for _ in range(150):
            monitor.see(batch)
        for _ in range(40):
            monitor.audit(audit_of([0], [0]))
        assert monitor.verdict().rows

    threads = [threading.Thread(target=work) for _ in range(4)]
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert monitor.verdict().rows == 4 * 150 * 7
    assert monitor.verdict().disagreement.rows == 160


def test_batches_change_nothing() -> None:
    rows, whole, parts = drawn(SEEN, 500, 1), Monitor(reference()), Monitor(reference())
    whole.see(rows)
    for first in range(0, 500, 9):
        parts.see(SeenRows(**{f.name: getattr(rows, f.name)[first : first + 9] for f in dataclasses.fields(rows)}))
    a, b = whole.verdict(), parts.verdict()
    assert (a.rows, a.evidence, a.why) == (b.rows, b.evidence, b.why)
    np.testing.assert_allclose([one.recent for one in a.statistics], [one.recent for one in b.statistics])


def test_recent_means_fade() -> None:
    monitor = Monitor(reference())
    monitor.see(drawn(SEEN, 3000, 1))
    late = drawn(SEEN, 1000, 2)
    monitor.see(late)
    age = np.exp(-np.arange(1000)[::-1] / monitor_module.RECENT)
    before = np.exp(-np.arange(3000)[::-1] / 1000) * np.exp(-1)
    early = drawn(SEEN, 3000, 1)
    expected = (age @ late.confidence_B.numpy() + before @ early.confidence_B.numpy()) / (age.sum() + before.sum())
    recent = {one.name: one.recent for one in monitor.verdict().statistics}
    assert recent["confidence"] == pytest.approx(expected)


# ---------------------------------------------------------------- edges


def test_nothing_seen_yet() -> None:
    monitor = Monitor(reference())
    monitor.see(drawn(SEEN, 0, 0))
    monitor.audit(audit_of([], []))
    verdict = monitor.verdict()
    assert (verdict.action, verdict.rows, verdict.evidence) == ("keep", 0, 0.0)
    assert "no rows yet" in str(verdict)


def test_one_exit_and_exits_that_nobody_uses() -> None:
    single = Trace(logits_ENC=WORLD.logits_ENC[-1:], labels_N=WORLD.labels_N, cost_E=torch.ones(1))
    for policy, trace in ((POLICY, single), (Fixed(exit=2), WORLD), (Confidence(threshold=(9.0, 9.0)), WORLD)):
        monitor = Monitor(refer(policy, trace))
        monitor.see(seen_in(simulate(policy, trace)))
        assert monitor.verdict().action == "keep"


def test_an_exit_that_nobody_used_and_now_some_do() -> None:
    monitor = Monitor(refer(Confidence(threshold=(9.0, 9.0)), WORLD))
    seen = drawn(seen_in(simulate(Confidence(threshold=(9.0, 9.0)), WORLD)), 300, 0)
    monitor.see(dataclasses.replace(seen, exit_B=torch.where(torch.arange(300) % 50 == 0, 1, 2)))
    assert monitor.drift is not None
    assert monitor.drift[1] == "share of exit1"
    assert share_limits(0, 6000, 0.05)[1] < 0.001


def test_another_policys_answers_change_nothing() -> None:
    monitor = Monitor(refer(Fixed(exit=2), WORLD))
    with pytest.raises(ValueError, match=r"stop at exits \[0, 1\]"):
        monitor.see(SEEN)
    assert monitor.verdict().rows == 0
