"""The walk equals the slow loop for every policy; its laws; and the edges where walks go wrong."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import shallowdeep.policies as policies
import shallowdeep.walking as walking
from shallowdeep.disagreement import fit_confusion
from shallowdeep.policies import (
    Accumulated,
    CalibrationRecord,
    Confidence,
    Ensemble,
    Entropy,
    Fixed,
    Margin,
    Oracle,
    Patience,
    PerClass,
    Policy,
    Score,
    Tempered,
)
from shallowdeep.reliability import scaled
from shallowdeep.spelling import from_json, to_json
from shallowdeep.types import Outcome, Trace
from shallowdeep.walking import Walk, policy_costs, rule_of, simulate


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, Trace]:
    exits, classes = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    trace = oracle.random_trace(
        draw(st.integers(1, 12)),
        exits=exits,
        classes=classes,
        seed=draw(st.integers(0, 10**6)),
        full_exit=draw(st.integers(0, exits - 1)) if draw(st.booleans()) else -1,
        broken=draw(st.sampled_from([0.0, 0.3])),
        own=draw(st.booleans()),
    )
    if draw(st.booleans()):
        reference = fit_confusion(None, oracle.random_trace(30, exits=exits, classes=classes, seed=1))
        trace = dataclasses.replace(trace, confusion_reference=reference)
    return draw(some_policy(exits, classes)), trace


@st.composite
def some_policy(draw: st.DrawFn, exits: int, classes: int = 3) -> Policy:
    enabled = draw(st.none() | st.tuples(*[st.booleans()] * exits))
    fallback = draw(st.sampled_from(["last", "most_confident"]))
    kind = draw(st.sampled_from([*KINDS_DRAWN, Tempered]))
    if kind is Tempered:
        temperature = st.sampled_from([0.3, 1.0, 7.0])
        inner = draw(some_policy(exits, classes).filter(lambda policy: policy.ensemble is None))
        return Tempered(policy=inner, temperature_E=draw(st.tuples(*[temperature] * exits)))
    if kind is Fixed:
        return Fixed(exit=draw(st.integers(0, exits - 1)))
    if kind is Oracle:
        return Oracle()
    weight = st.floats(-0.5, 2.0)
    ensemble = None
    if fallback == "last" and draw(st.booleans()):
        weight_EE = [draw(st.just([]) | st.lists(weight, min_size=e + 1, max_size=e + 1)) for e in range(exits)]
        bias_EC = [draw(st.lists(weight, min_size=classes, max_size=classes)) for _ in range(exits)]
        ensemble = Ensemble(weight_EE=weight_EE, bias_EC=bias_EC if draw(st.booleans()) else ())
    chosen = {"enabled_E": enabled, "fallback": fallback, "ensemble": ensemble}
    if kind is Patience:
        return Patience(patience=draw(st.integers(1, 3)), **chosen)
    bar = st.floats(0.05, 1.05) | st.just(math.inf)
    if kind is PerClass:
        return PerClass(threshold_C=draw(st.lists(bar, min_size=classes, max_size=classes).map(tuple)), **chosen)
    some = st.lists(bar, min_size=max(exits - 1, 1), max_size=exits).map(tuple)
    if kind is Score:
        names = ("confidence", "margin", "entropy", "agreement")
        return Score(threshold=draw(bar | some), **{name: draw(weight) for name in names}, **chosen)
    if kind is Accumulated:
        weight_E = draw(st.none() | st.lists(weight, min_size=exits, max_size=exits).map(tuple))
        return Accumulated(threshold=draw(bar | some), weight_E=weight_E, **chosen)
    return kind(threshold=draw(bar | some), **chosen)


KINDS_DRAWN = [Confidence, Entropy, Margin, PerClass, Score, Accumulated, Patience, Fixed, Oracle]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_simulate_is_the_slow_loop(case: tuple[Policy, Trace]) -> None:
    policy, trace = case
    fast, slow = simulate(policy, trace), oracle.walk(policy, trace)
    assert fast.exit_N.tolist() == slow["exit"]
    assert fast.labels_N.tolist() == slow["label"]
    expected = torch.tensor(slow["logits"], dtype=torch.float64)
    off = 0 if policy.ensemble is None else 1e-9
    torch.testing.assert_close(fast.logits_NC, expected, rtol=off, atol=off, equal_nan=True)
    for name, got in (("cost", fast.cost_N), ("confidence", fast.confidence_N), ("confusion", fast.confusion_N)):
        wanted = torch.tensor(slow[name], dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


EVERY_KIND = (
    Confidence(threshold=0.8),
    Confidence(threshold=(0.99, 0.9, 0.8, 0.7), fallback="most_confident"),
    Entropy(threshold=0.5),
    Margin(threshold=0.6, enabled_E=(True, False, True, True, True)),
    PerClass(threshold_C=(0.7, 0.95) * 5),
    Score(threshold=1.0, margin=0.5, entropy=-0.2, agreement=0.4),
    Accumulated(threshold=(1.1, 1.7, 1.9, 2.5), weight_E=(1.0, 1.0, 1.2, 1.2)),
    Confidence(threshold=0.9, ensemble=Ensemble(weight_EE=((), (), (0.1, 0.3, 1.0), (), (0.2, 0.0, 0.1, 0.5, 1.0)))),
    Patience(patience=2, fallback="most_confident"),
    Fixed(exit=2),
    Oracle(),
)


@pytest.mark.parametrize("policy", EVERY_KIND, ids=lambda policy: type(policy).__name__)
def test_a_row_does_not_see_its_batch(policy: Policy) -> None:
    """Alone, in another order, among others, in chunks: the same answers."""
    trace = oracle.bed(300, exits=5)
    whole = simulate(policy, trace)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert same(simulate(policy, trace.rows(order)), take(whole, order))
    for n in range(0, 300, 23):
        assert same(simulate(policy, trace.rows(torch.tensor([n]))), take(whole, torch.tensor([n])))


@pytest.mark.parametrize("policy", EVERY_KIND, ids=lambda policy: type(policy).__name__)
def test_chunks_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = oracle.bed(300, exits=5)
    whole = simulate(policy, trace)
    monkeypatch.setattr(walking, "CHUNK_ELEMENTS", 70 * 5 * 10)
    assert same(simulate(policy, trace), whole)


def take(outcome: Outcome, index: torch.Tensor) -> Outcome:
    return Outcome(**{name: x[index] for name, x in vars(outcome).items() if x is not None})


def same(a: Outcome, b: Outcome) -> bool:
    """Decisions to the bit, sums to the last digits: the order of a sum may depend on a batch's shape."""
    exact = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("exit_N", "labels_N", "logits_NC", "cost_N"))
    pairs = ((a.confidence_N, b.confidence_N), (a.confusion_N, b.confusion_N))
    return exact and all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in pairs)


def test_nobody_beats_the_oracle_and_rows_leave_everywhere() -> None:
    trace = oracle.bed(1500, exits=5)
    best = (simulate(Oracle(), trace).labels_N == trace.labels_N).double().mean()
    left = torch.zeros(5, dtype=torch.int64)
    for policy in EVERY_KIND:
        outcome = simulate(policy, trace)
        left += outcome.exit_N.bincount(minlength=5)
        if policy.fallback == "last" and policy.ensemble is None:
            assert (outcome.labels_N == trace.labels_N).double().mean() <= best
    assert (left > 0).all()


def test_the_oracle_stops_where_it_is_first_right() -> None:
    trace = oracle.bed(400, exits=5, full_exit=3)
    outcome = simulate(Oracle(), trace)
    right_EN = trace.logits_ENC.argmax(2)[:4] == trace.labels_N
    assert outcome.exit_N.max() == 3
    assert torch.equal(outcome.labels_N == trace.labels_N, right_EN.any(0))


def said(*exits: list[list[float]], full_exit: int = -1) -> Trace:
    """A trace from the logits of each exit, labels 0."""
    logits = torch.tensor(exits, dtype=torch.float64)
    labels = torch.zeros(logits.shape[1], dtype=torch.int64)
    costs = torch.linspace(0.5, 1, len(exits)) if len(exits) > 1 else torch.ones(1)
    return Trace(logits_ENC=logits, labels_N=labels, cost_E=costs, full_exit=full_exit)


def test_a_score_on_the_threshold_stops() -> None:
    even = said([[0.0, 0.0]], [[1.0, 0.0]])
    assert simulate(Confidence(threshold=0.5), even).exit_N.item() == 0
    assert simulate(Confidence(threshold=math.nextafter(0.5, 1)), even).exit_N.item() == 1
    assert simulate(Margin(threshold=0.0), even).exit_N.item() == 0
    bound = torch.special.entr(torch.tensor([0.5, 0.5], dtype=torch.float64)).sum().item()
    assert simulate(Entropy(threshold=bound), even).exit_N.item() == 0
    assert simulate(Entropy(threshold=math.nextafter(bound, 0)), even).exit_N.item() == 1


def test_the_last_exit_asked_is_not_tested() -> None:
    trace = said([[1.0, 0.0]], [[0.0, 0.0]])
    for threshold in (math.inf, (math.inf,), (math.inf, math.inf)):
        outcome = simulate(Confidence(threshold=threshold), trace)
        assert (outcome.exit_N.item(), outcome.labels_N.item()) == (1, 0)


def test_all_leave_at_once_and_none_leaves() -> None:
    trace = oracle.bed(50, exits=4)
    assert simulate(Confidence(threshold=0.0), trace).exit_N.tolist() == [0] * 50
    assert simulate(Confidence(threshold=math.inf), trace).exit_N.tolist() == [3] * 50
    assert torch.equal(simulate(Confidence(threshold=math.inf), trace).logits_NC, trace.logits_ENC[3])


def test_one_exit_only() -> None:
    trace = said([[3.0, 0.0], [math.nan, 0.0]])
    for policy in (Confidence(threshold=0.9), Patience(patience=1), Fixed(exit=0), Oracle()):
        outcome = simulate(policy, trace)
        assert outcome.exit_N.tolist() == [0, 0]
        assert outcome.confusion_N[0] == 0


def test_saturated_softmaxes_stop_at_one() -> None:
    trace = said([[1e4, 0.0], [40.0, 0.0]], [[0.0, 1e4], [0.0, 40.0]])
    outcome = simulate(Confidence(threshold=1.0), trace)
    assert outcome.exit_N.tolist() == [0, 0]
    assert simulate(Confidence(threshold=math.inf), trace).confusion_N.tolist() == [2.0, 2.0]


def test_scores_are_float64_whatever_the_logits() -> None:
    """In float32 both rows would be exactly 1.0."""
    logits = torch.tensor([[[20.0, 0.0], [25.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trace = Trace(logits_ENC=logits.to(dtype), labels_N=torch.tensor([0, 0]), cost_E=torch.tensor([0.5, 1.0]))
        outcome = simulate(Confidence(threshold=1 - 1e-9), trace)
        assert outcome.exit_N.tolist() == [1, 0]
        assert outcome.logits_NC.dtype == dtype


BROKEN = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("policy", [p for p in EVERY_KIND if not isinstance(p, Fixed)] + [Fixed(exit=0)])
def test_nobody_stops_on_logits_that_are_not_finite(policy: Policy, value: float) -> None:
    """Broken everywhere: answered at the full exit, not at the second look behind it, and marked."""
    if isinstance(policy, Margin):
        policy = Margin(threshold=0.6)
    if isinstance(policy, PerClass):
        policy = PerClass(threshold_C=(0.9, 0.8, 0.9))
    logits = torch.zeros(5, 2, 3)
    logits[:, 0, 0] = value
    logits[:, 1, 0] = 9.0
    rule = rule_of(policy, 5, 3, None)
    walk = Walk(rule, batch=2, labels_B=torch.tensor([0, 0]))
    for exit in range(5):
        if rule.asked[exit] and walk.alive:
            walk.ask(exit, logits[exit] if walk.row_S is None else logits[exit][walk.row_S])
    outcome = walk.finish(torch.linspace(0.2, 1, 5))
    assert outcome.exit_N[0] == 3
    assert outcome.logits_NC.isfinite().all(1).tolist() == [False, True]
    assert outcome.confusion_N.isfinite().all()


def test_most_confident_ignores_exits_that_are_not_finite() -> None:
    nan = math.nan
    trace = said([[1.0, 0.0]], [[nan, 0.0]], [[0.0, 0.5]])
    outcome = simulate(Confidence(threshold=math.inf, fallback="most_confident"), trace)
    assert (outcome.exit_N.item(), outcome.labels_N.item()) == (2, 0)
    late = said([[1.0, 0.0]], [[nan, 0.0]], [[0.0, 5.0]], full_exit=1)
    outcome = simulate(Confidence(threshold=math.inf, fallback="most_confident"), late)
    assert (outcome.exit_N.item(), outcome.labels_N.item()) == (1, 0)
    broken = simulate(Confidence(threshold=math.inf, fallback="most_confident"), said([[nan, 0.0]], [[nan, 0.0]]))
    assert broken.exit_N.item() == 1


def test_a_sure_row_answers_for_itself_beside_one_that_is_lost() -> None:
    """At the full exit with a second look behind it: one row stops there of itself, the other on broken logits."""
    early, full = [[0.0, 9.0], [0.0, 9.0]], [[1.0, 0.0], [math.nan, 0.0]]
    policy = Confidence(threshold=(math.inf, 0.6), fallback="most_confident")
    outcome = simulate(policy, said(early, full, early, full_exit=1))
    assert outcome.exit_N.tolist() == [1, 1]
    assert outcome.labels_N.tolist() == [0, 1]


def test_the_papers_fallback() -> None:
    """Nobody reaches q: the most confident of all exits answers, of equals the earliest; the whole network is paid."""
    trace = said([[2.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.0]])
    outcome = simulate(Confidence(threshold=0.99, fallback="most_confident"), trace)
    assert outcome.labels_N.tolist() == [1, 0]
    assert outcome.exit_N.tolist() == [2, 2]
    assert outcome.cost_N.tolist() == [1.0, 1.0]
    torch.testing.assert_close(outcome.confidence_N, torch.tensor([3.0, 1.0]).double().sigmoid())


def test_patience_counts_repeats_of_the_exit_before() -> None:
    """PABEE: labels 0 1 1 1 stop with patience 2 at the fourth exit, 0 1 0 1 never."""
    steady, fickle = [0, 1, 1, 1, 0], [0, 1, 0, 1, 0]
    rows = [[[1.0, 0.0] if label == 0 else [0.0, 1.0] for label in pair] for pair in zip(steady, fickle, strict=True)]
    assert simulate(Patience(patience=2), said(*rows)).exit_N.tolist() == [3, 4]
    assert simulate(Patience(patience=1), said(*rows)).exit_N.tolist() == [2, 4]


def test_exits_behind_the_full_exit_are_exits() -> None:
    trace = oracle.bed(400, exits=5, full_exit=3)
    outcome = simulate(Confidence(threshold=0.999), trace)
    assert (outcome.exit_N.bincount(minlength=5) > 0).all()
    without = Confidence(threshold=0.999, enabled_E=(True,) * 4 + (False,))
    assert simulate(without, trace).exit_N.max() == 3


def test_an_empty_batch_walks() -> None:
    walk = Walk(rule_of(Confidence(threshold=0.5), 2, 1, None), batch=0)
    assert walk.ask(0, torch.zeros(0, 3)).shape == (0,)
    outcome = walk.finish(torch.ones(2))
    assert outcome.logits_NC.shape == (0, 3)


def test_skipped_ics_are_not_paid_unless_they_feed() -> None:
    own = torch.tensor([0.01, 0.02, 0.04, 0.0])
    feeds = torch.zeros(4, 4, dtype=torch.bool)
    feeds[0, 1] = feeds[1, 2] = True
    trace = Trace(
        logits_ENC=torch.zeros(4, 1, 2),
        labels_N=torch.tensor([0]),
        cost_E=torch.tensor([0.2, 0.4, 0.6, 1.0]).double() + own.double().cumsum(0),
        own_cost_E=own,
        feeds_EE=feeds,
    )

    def paid(*enabled: int) -> list[float]:
        return [round(c, 6) for c in policy_costs(trace, [bool(e) for e in enabled]).tolist()]

    assert torch.equal(policy_costs(trace), trace.cost_E)
    assert paid(0, 0, 0, 0) == [0.2, 0.4, 0.6, 1.0]
    assert paid(0, 0, 1, 0) == [0.21, 0.43, 0.67, 1.07]
    assert paid(1, 0, 0, 0) == [0.21, 0.41, 0.61, 1.01]
    assert simulate(Fixed(exit=3), trace).cost_N.item() == pytest.approx(1.0)
    plain = dataclasses.replace(trace, own_cost_E=None)
    assert torch.equal(policy_costs(plain, [False] * 4), trace.cost_E)


@settings(max_examples=100, deadline=None)
@given(some_policy(4))
def test_json_is_exact(policy: Policy) -> None:
    record = CalibrationRecord(hash_N=(-(2**63), 2**63 - 1), info={"note": "an aim", "max_accuracy_drop": 0.1})
    policy = dataclasses.replace(policy, calibrated_on=record)
    again = from_json(json.loads(json.dumps(to_json(policy), allow_nan=False)))
    assert again == policy
    assert again.calibrated_on == record


def test_the_record_is_no_part_of_equality() -> None:
    record = CalibrationRecord(hash_N=(1,), info={})
    assert Fixed(exit=1) == Fixed(exit=1, calibrated_on=record)
    assert hash(Fixed(exit=1)) == hash(Fixed(exit=1, calibrated_on=record))


def test_what_json_cannot_be() -> None:
    with pytest.raises(
        ValueError, match="Kinds: Confidence, Entropy, Margin, PerClass, Score, Accumulated, Patience, Fixed, Oracle"
    ):
        from_json({"kind": "Certainty"})
    with pytest.raises(ValueError, match="found none"):
        from_json({"kind": "Patience"})
    with pytest.raises(ValueError, match="Fixed has the fields calibrated_on, exit; found exit, q"):
        from_json({"kind": "Fixed", "exit": 1, "q": 0.5})
    assert from_json({"kind": "Confidence", "threshold": "inf"}) == Confidence(threshold=math.inf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Confidence(threshold=math.nan), "one number per exit"),
        (lambda: Entropy(threshold=(0.1, math.nan)), "one number per exit"),
        (lambda: Margin(threshold=()), "one number per exit"),
        (lambda: Confidence(threshold=0.5, fallback="first"), "'last' or 'most_confident', found 'first'"),
        (lambda: Patience(patience=0), "from 1, found 0"),
        (lambda: Patience(patience=1.5), "found 1.5"),
    ],
)
def test_policies_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Confidence(threshold=(0.5,)), "1 thresholds; 5 exits need 4"),
        (Confidence(threshold=(0.5,) * 6), "6 thresholds; 5 exits need 4"),
        (Patience(patience=1, enabled_E=(True, False)), "2 entries; 5 exits need 5"),
        (Fixed(exit=5), "exits are 0..4"),
        (Fixed(exit=-1), "exits are 0..4"),
    ],
)
def test_policies_that_do_not_fit_the_network(policy: Policy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(policy, oracle.bed(10, exits=5))


def test_the_oracle_cannot_run_without_labels() -> None:
    with pytest.raises(ValueError, match="only simulate"):
        Walk(rule_of(Oracle(), 2, 1, None), batch=1)


def test_a_reference_of_another_network_is_refused() -> None:
    reference = fit_confusion(None, oracle.bed(20, exits=3))
    trace = dataclasses.replace(oracle.bed(20, exits=4), confusion_reference=reference)
    with pytest.raises(ValueError, match="speaks of 3 exits, not of 4"):
        simulate(Confidence(threshold=0.5), trace)


def test_lists_become_tuples_and_numbers_floats() -> None:
    policy = Confidence(threshold=[1, 0], enabled_E=[1, 0, 1])
    assert policy == Confidence(threshold=(1.0, 0.0), enabled_E=(True, False, True))
    assert isinstance(hash(policy), int)


def test_the_examples_run() -> None:
    oracle.run_examples(policies, "policies")
    oracle.run_examples(walking, "walking")


def test_a_tempered_policy_decides_as_the_plain_one_on_scaled_logits() -> None:
    """Bit for bit: same exits and costs; but answers, and how sure they are, are the network's own."""
    trace, temperature_E = oracle.bed(800), (0.5, 2.0, 3.0, 1.5, 4.0)
    softer = scaled(trace, temperature_E)
    for plain in (Confidence(threshold=0.7), Entropy(threshold=0.5), Margin(threshold=0.4), Patience(patience=2)):
        found, wanted = simulate(Tempered(policy=plain, temperature_E=temperature_E), trace), simulate(plain, softer)
        assert torch.equal(found.exit_N, wanted.exit_N)
        assert torch.equal(found.labels_N, wanted.labels_N)
        assert torch.equal(found.logits_NC, trace.logits_ENC[found.exit_N, torch.arange(800)])
        assert torch.equal(found.confidence_N, found.logits_NC.softmax(1, dtype=torch.float64).amax(1))
        assert len(found.exit_N.unique()) > 1
    assert not torch.equal(simulate(Confidence(threshold=0.7), trace).exit_N, simulate(plain, softer).exit_N)


def test_a_tempered_policy_keeps_its_record_and_refuses_what_does_not_fit() -> None:
    plain = Confidence(threshold=0.5, fallback="most_confident", calibrated_on=CalibrationRecord(hash_N=(1, 2)))
    policy = Tempered(policy=plain, temperature_E=(2, 1))
    assert policy.calibrated_on is plain.calibrated_on
    assert policy.policy.calibrated_on is None, "one record is enough"
    assert policy.fallback == "most_confident"
    facts = json.loads(json.dumps(to_json(policy)))
    assert facts["policy"]["kind"] == "Confidence"
    back = from_json(facts)
    assert back == policy
    assert back.calibrated_on == plain.calibrated_on
    assert hash(back) == hash(policy)
    with pytest.raises(ValueError, match="3 exits need as many temperatures, found 2"):
        policy.asks(3, 2)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite numbers above 0"):
            Tempered(policy=plain, temperature_E=(1.0, wrong))
    mixed = Confidence(threshold=0.5, ensemble=policies.Ensemble(weight_EE=((), (0.5, 1.0))))
    with pytest.raises(ValueError, match="its policies take no temperatures"):
        Tempered(policy=mixed, temperature_E=(2, 1))


def test_an_ensemble_of_a_second_look_that_is_not_asked_runs_without_it() -> None:
    weight_EE = ((), (), (0.2, 0.3, 1.0), (0.1, 0.1, 0.5, 0.5))
    asked = (True, True, True, False)
    policy = Confidence(threshold=0.9, enabled_E=asked, ensemble=Ensemble(weight_EE=weight_EE))
    twice = dataclasses.replace(oracle.bed(200, exits=4, seed=1), full_exit=2)
    plain = dataclasses.replace(
        twice,
        logits_ENC=twice.logits_ENC[:3],
        cost_E=twice.cost_E[:3],
        exit_names=twice.exit_names[:3],
        own_cost_E=None,
        feeds_EE=None,
    )
    one, other = (simulate(policy, trace) for trace in (twice, plain))
    assert torch.equal(one.labels_N, other.labels_N)
    assert torch.equal(one.exit_N, other.exit_N)
    with pytest.raises(ValueError, match="ensemble speaks of 4 exits, not of 3"):
        dataclasses.replace(policy, enabled_E=None).asks(3, 2)
