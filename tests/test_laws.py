"""The laws of the house, over a zoo of small nasty networks and all policies."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import shallowdeep as sd
from nets import CLASSES, ZOO, Nasty
from shallowdeep.inputs import Inputs, call, each, logits_of, tensors
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import (
    Accumulated,
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
from shallowdeep.types import Plan, Trace

ROWS = 96


@dataclass(frozen=True, eq=False)
class Made:
    name: str
    nasty: Nasty
    model: torch.nn.Module
    plan: Plan
    sdn: ShallowDeepNetwork
    inputs: Inputs
    labels: torch.Tensor
    trace: Trace


@pytest.fixture(scope="module", params=ZOO)
def made(request: pytest.FixtureRequest) -> Made:
    """A zoo member in float64 with ICs that know a little, and its trace."""
    nasty = ZOO[request.param]
    model = nasty.make().double()
    found = sd.plan(model, nasty.batch(2, torch.float64))
    sdn = sd.attach(model, found).eval()
    inputs = nasty.batch(ROWS, torch.float64)
    with torch.no_grad():
        labels = logits_of(call(model, inputs)).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    torch.manual_seed(0)
    sd.train_exits(sdn, (inputs, labels), epochs=12)
    for parameter in sdn.classifiers.parameters():
        parameter.data.mul_(1.5)  # surer than they should be, so that rows leave everywhere
    return Made(request.param, nasty, model, found, sdn, inputs, labels, sd.collect(sdn, (inputs, labels)))


def policies(trace: Trace) -> list[Policy]:
    """All kinds; thresholds are quantiles of what this trace's exits say, so that rows leave at every exit."""
    exits = trace.num_exits
    softmax = trace.logits_ENC.softmax(-1)
    top = softmax.topk(2, -1).values
    entropy = -(softmax * softmax.log()).sum(-1)
    some = tuple(e % 2 == 0 for e in range(exits))

    def split(score_EN: torch.Tensor, q: float) -> tuple[float, ...]:
        """Midway between two neighbouring observed scores, never on one."""
        ordered = score_EN.sort(1).values
        at = int(q * (ordered.shape[1] - 2))
        return tuple(((ordered[:, at] + ordered[:, at + 1]) / 2)[:-1].tolist())

    levels = split(top[..., 0], 0.7)
    return [
        Confidence(threshold=levels),
        Confidence(threshold=max(levels), fallback="most_confident"),
        Confidence(threshold=levels, enabled_E=some, fallback="most_confident"),
        Confidence(threshold=float("-inf")),
        Confidence(threshold=float("inf")),
        Entropy(threshold=split(entropy, 0.3)),
        Margin(threshold=split(top[..., 0] - top[..., 1], 0.7)),
        PerClass(threshold_C=tuple(levels[0] + 0.01 * c for c in range(trace.num_classes))),
        Score(threshold=tuple(4 * level for level in levels), margin=0.3, entropy=-0.1, agreement=0.2),
        Accumulated(threshold=tuple(level + 0.4 * e for e, level in enumerate(levels))),
        Confidence(threshold=levels, ensemble=Ensemble(weight_EE=[[0.3] * e + [1.0] for e in range(exits)])),
        Patience(patience=1),
        Patience(patience=2, enabled_E=some),
        Tempered(policy=Confidence(threshold=levels), temperature_E=tuple(1 + 0.1 * e for e in range(exits))),
        *(Fixed(exit=e) for e in range(exits)),
    ]


def test_plan_finds_what_there_is(made: Made) -> None:
    assert made.plan.via == made.nasty.via
    assert len(made.plan.candidates) >= made.nasty.least_cuts


def test_law_1_last_exit_is_the_backbone_bit_for_bit(made: Made) -> None:
    before = copy.deepcopy(made.model)
    with torch.no_grad():
        assert torch.equal(made.sdn(made.inputs)[-1], logits_of(call(before, made.inputs)))
    single = copy.deepcopy(made.sdn).float().eval()
    inputs = each(made.inputs, lambda t: t.float() if t.is_floating_point() else t)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            last, alone = single(inputs)[-1], logits_of(call(single.backbone, inputs))
        assert last.dtype == alone.dtype
        assert torch.equal(last, alone)
    assert sd.detach(made.sdn) is made.model


def test_law_1_nothing_stays_on_the_backbone(made: Made) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())
    assert list(made.model.state_dict()) == list(ZOO[made.name].make().state_dict())


def test_law_2_training_exits_leaves_the_backbone_alone(made: Made) -> None:
    sdn = copy.deepcopy(made.sdn).train()
    before = {name: tensor.clone() for name, tensor in sdn.backbone.state_dict().items()}
    exits_before = copy.deepcopy(sdn.classifiers.state_dict())
    sd.train_exits(sdn, (made.inputs, made.labels), epochs=1, cache="off")
    assert all(torch.equal(before[name], tensor) for name, tensor in sdn.backbone.state_dict().items())
    assert any(not torch.equal(exits_before[name], t) for name, t in sdn.classifiers.state_dict().items())
    assert all(module.training for module in sdn.modules()), "mode flags come back"


def test_law_3_engine_answers_as_simulate(made: Made) -> None:
    sdn = copy.deepcopy(made.sdn)
    sd.fit_confusion(sdn, made.trace)
    trace = sd.collect(sdn, (made.inputs, made.labels))
    left_at: set[int] = set()
    for policy in policies(trace):
        outcome = sd.simulate(policy, trace)
        engine = sd.Engine(sdn, policy, backend="torch")
        answer = engine(made.inputs)
        assert torch.equal(answer.exit_B, outcome.exit_N), policy
        assert torch.equal(answer.labels_B, outcome.labels_N), policy
        assert torch.equal(answer.cost_B, outcome.cost_N), policy
        torch.testing.assert_close(answer.logits_BC, outcome.logits_NC, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answer.confusion_B, outcome.confusion_N, rtol=1e-9, atol=1e-9)
        assert bool(answer.valid_B.all())
        left_at |= set(answer.exit_B.tolist())
    assert left_at == set(range(trace.num_exits)), "a run in which rows do not leave everywhere checks nothing"
    one = engine(each(made.inputs, lambda tensor: tensor[:1]))
    assert one.labels_B.tolist() == [int(outcome.labels_N[0])]


def test_law_4_saved_and_loaded_is_the_same(made: Made, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(made.name)
    sd.save(made.sdn, folder)
    back = sd.load(folder, made.model).eval()
    assert back.plan == made.plan
    with torch.no_grad():
        assert torch.equal(back(made.inputs), made.sdn(made.inputs))
    made.trace.save(folder / "trace")
    assert torch.equal(Trace.load(folder / "trace").logits_ENC, made.trace.logits_ENC)


def test_law_5_costs_rise(made: Made) -> None:
    cost_E = made.trace.cost_E
    assert bool((cost_E.diff() > 0).all())
    ics = sum(spec.macs for spec in made.plan.classifiers) / made.plan.total_macs
    assert float(cost_E[-1]) == pytest.approx(1 + ics, abs=1e-12)


def test_law_6_fates_sum_to_one(made: Made) -> None:
    found = sd.overthinking(made.trace)
    fates = found.early_and_kept, found.early_and_spoiled, found.only_at_the_end, found.never
    assert sum(fates) == pytest.approx(1, abs=1e-12)
    assert found.wasteful == pytest.approx(fates[0] + fates[1], abs=1e-12)


def test_law_7_nobody_beats_the_oracle(made: Made) -> None:
    best = (sd.simulate(Oracle(), made.trace).labels_N == made.labels).double().mean()
    for policy in policies(made.trace):
        if policy.ensemble is not None:
            continue  # its answers are its own
        assert (sd.simulate(policy, made.trace).labels_N == made.labels).double().mean() <= best


def test_inputs_are_not_changed(made: Made) -> None:
    fresh = made.nasty.batch(ROWS, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(tensors(fresh), tensors(made.inputs), strict=True))
