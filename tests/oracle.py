"""Slow truth for fast code: loops over samples written straight from the definitions, and traces to run them on.

It refuses to use the library's own arithmetic: only the shapes of its data are shared.
"""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from shallowdeep.policies import (
    Accumulated,
    Confidence,
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
from shallowdeep.types import ConfusionReference, Trace


def softmax(logits: list[float]) -> list[float]:
    """nan throughout when a logit is NaN or +inf, as a float softmax has it."""
    top = max(logits) if not any(map(math.isnan, logits)) else math.nan
    if not math.isfinite(top):
        return [math.nan] * len(logits)
    parts = [math.exp(value - top) for value in logits]
    return [part / math.fsum(parts) for part in parts]


def best(values: list[float]) -> int:
    """The first greatest; the first NaN if there is one, as argmax has it."""
    for index, value in enumerate(values):
        if math.isnan(value):
            return index
    return values.index(max(values))


def finite(logits: list[float]) -> bool:
    return all(map(math.isfinite, logits))


def distance(p: list[float], q: list[float]) -> float:
    total = math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))
    return 2.0 if math.isnan(total) else total


def asked(policy: Policy, trace: Trace) -> list[int]:
    exits = range(trace.num_exits)
    if isinstance(policy, Tempered):
        return asked(policy.policy, trace)
    if isinstance(policy, Fixed):
        return [e for e in exits if e in (policy.exit, trace.full_exit)]
    if isinstance(policy, Oracle):
        return [e for e in exits if e <= trace.full_exit]
    return [e for e in exits if policy.enabled_E is None or policy.enabled_E[e] or e == trace.full_exit]


def mixed(policy: Policy, exit: int, own: dict[int, list[float]]) -> list[float]:
    """What the policy compares and answers at ``exit``: the exit's logits, or those of its ensemble."""
    if policy.ensemble is None or not policy.ensemble.weight_EE[exit] or not finite(own[exit]):
        return own[exit]
    total = list(policy.ensemble.bias_EC[exit]) if policy.ensemble.bias_EC else [0.0] * len(own[exit])
    for other, logits in own.items():
        for c, part in enumerate(softmax(logits)):
            if not math.isnan(part):
                total[c] += policy.ensemble.weight_EE[exit][other] * math.log(max(part, 1e-12))
    return total


def repeats(said: dict[int, list[float]]) -> int:
    """How many exits in a row, up to the last, said what the one before them said."""
    labels = [best(logits) if finite(logits) else None for logits in said.values()]
    count = 0
    while count + 1 < len(labels) and labels[-1] is not None and labels[-count - 2] == labels[-1]:
        count += 1
    return count


def score_of(policy: Score, said: dict[int, list[float]]) -> float:
    p = softmax(list(said.values())[-1])
    if math.isnan(p[0]):
        return math.nan
    top, second = sorted(p)[::-1][:2]
    others = list(p)
    others.remove(top)
    rest = max(math.fsum(others), 1e-12)
    total = policy.confidence * math.log(top / rest) + policy.margin * math.log((1 + top - second) / (rest + second))
    total += policy.entropy * -math.fsum(x * math.log(x) for x in p if x > 0)
    return total + policy.agreement * repeats(said)


def wants_to_stop(policy: Policy, exit: int, said: dict[int, list[float]], label: int) -> bool:
    """Whether a row stops at ``exit``, given the logits of the exits asked so far (in order)."""
    p = sorted(softmax(said[exit]), reverse=True)
    match policy:
        case Confidence() | Entropy() | Margin():
            bar = policy.threshold if isinstance(policy.threshold, float) else policy.threshold[exit]
            if isinstance(policy, Confidence):
                return p[0] >= bar
            if isinstance(policy, Margin):
                return p[0] - p[1] >= bar
            return -math.fsum(x * math.log(x) for x in p if x > 0) <= bar
        case PerClass():
            return p[0] >= policy.threshold_C[best(said[exit])]
        case Score() | Accumulated():
            bar = policy.threshold if isinstance(policy.threshold, float) else policy.threshold[exit]
            if isinstance(policy, Score):
                return score_of(policy, said) >= bar
            last = list(said)[-repeats(said) - 1 :]
            weights = policy.weight_E or [1.0] * (exit + 1)
            return math.fsum(weights[e] * max(softmax(said[e])) for e in last) >= bar
        case Patience():
            labels = [best(logits) if finite(logits) else None for logits in said.values()]
            tail = labels[-policy.patience - 1 :]
            return len(tail) == policy.patience + 1 and len(set(tail)) == 1 and tail[0] is not None
        case Fixed():
            return exit == policy.exit
        case Oracle():
            return best(said[exit]) == label
        case Tempered():
            softer = {e: [value / policy.temperature_E[e] for value in logits] for e, logits in said.items()}
            return wants_to_stop(policy.policy, exit, softer, label)
    raise AssertionError(policy)


def costs(trace: Trace, exits: list[int]) -> list[float]:
    """Cost of stopping at each exit when ``exits`` are asked: backbone up to there and every IC needed on the way."""
    if trace.own_cost_E is None:
        return trace.cost_E.tolist()
    own = trace.own_cost_E.tolist()

    def needed(i: int) -> bool:
        later = range(i + 1, trace.num_exits)
        return i in exits or any(bool(trace.feeds_EE[i, j]) and needed(j) for j in later if trace.feeds_EE is not None)

    backbone = [cost - sum(own[: e + 1]) for e, cost in enumerate(trace.cost_E.tolist())]
    return [backbone[e] + sum(own[i] for i in range(e + 1) if needed(i)) for e in range(trace.num_exits)]


def walk(policy: Policy, trace: Trace) -> dict[str, list]:
    """What ``policy`` does with every sample, one by one."""
    exits, out = (
        asked(policy, trace),
        {"exit": [], "label": [], "logits": [], "cost": [], "confidence": [], "confusion": []},
    )
    cost = costs(trace, exits)
    for n in range(trace.num_samples):
        own: dict[int, list[float]] = {}
        said: dict[int, list[float]] = {}  # what the policy sees: an ensemble in place of some exits' own logits
        for exit in exits:
            own[exit] = trace.logits_ENC[exit, n].double().tolist()
            said[exit] = mixed(policy, exit, own)
            sure = exit != exits[-1] and finite(own[exit]) and wants_to_stop(policy, exit, said, int(trace.labels_N[n]))
            lost = exit == trace.full_exit and not finite(own[exit])
            if sure or lost or exit == exits[-1]:
                break
        answer = exit
        candidates = [e for e in said if finite(said[e])]
        if not sure and policy.fallback == "most_confident" and candidates:
            answer = max(candidates, key=lambda e: (max(softmax(said[e])), -e))
        p = softmax(said[answer])
        raw = sum(distance(softmax(logits), p) for logits in own.values())
        out["exit"].append(exit)
        out["label"].append(best(said[answer]))
        out["logits"].append(said[answer])
        out["cost"].append(cost[exit])
        out["confidence"].append(p[best(p)])
        out["confusion"].append(standardised(raw, trace.confusion_reference, exit, list(said)))
    return out


def standardised(raw: float, reference: ConfusionReference | None, stop: int, exits: list[int]) -> float:
    if reference is None:
        return raw
    mean = sum(float(reference.mean_EE[stop, i]) for i in exits)
    variance = sum(float(reference.covariance_EEE[stop, i, j]) for i in exits for j in exits)
    return (raw - mean) / math.sqrt(variance) if variance > 1e-20 else 0.0


def moments(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Mean [E, E] and covariance [E, E, E] of the distances between exits' softmaxes."""
    exits, rows = trace.num_exits, range(trace.num_samples)
    p = [[softmax(trace.logits_ENC[e, n].double().tolist()) for n in rows] for e in range(exits)]
    mean, covariance = np.zeros((exits, exits)), np.zeros((exits, exits, exits))
    for e in range(exits):
        d = np.array([[distance(p[i][n], p[e][n]) for n in rows] for i in range(exits)])
        mean[e], covariance[e] = d.mean(1), np.cov(d, ddof=0)
    return mean, covariance


def fates(trace: Trace) -> dict[str, float | list]:
    """Everything that ``overthinking`` reports, counted sample by sample."""
    end, count = trace.full_exit, trace.num_samples
    seen = dict.fromkeys(("early_and_kept", "early_and_spoiled", "only_at_the_end", "never"), 0)
    first, cumulative, paid, marks = [], [0] * (end + 1), 0.0, 0.0
    for n in range(count):
        truth = int(trace.labels_N[n])
        logits = [trace.logits_ENC[e, n].double().tolist() for e in range(end + 1)]
        said = [best(row) if finite(row) else -1 for row in logits]
        early, right = truth in said[:end], said[end] == truth
        name = (
            ("early_and_kept" if right else "early_and_spoiled") if early else "only_at_the_end" if right else "never"
        )
        seen[name] += 1
        first.append(said.index(truth) if truth in said else -1)
        paid += float(trace.cost_E[first[-1] if truth in said else end])
        for e in range(end + 1):
            cumulative[e] += truth in said[: e + 1]
        if not right:
            tried = set(said[:end]) - {said[end], -1}
            others = trace.num_classes - (said[end] >= 0)
            if len(tried) < others:
                marks += 1.0 if early else -len(tried) / (others - len(tried))
    shares = {name: value / count for name, value in seen.items()}
    return shares | {
        "first": first,
        "cumulative": [value / count for value in cumulative],
        "oracle_cost": paid / count,
        "corrected": marks / count,
    }


def auroc(score: list[float], wrong: list[bool]) -> float:
    """The chance that an error scores above a right answer, over all pairs; ties count half."""
    errors = [s for s, w in zip(score, wrong, strict=True) if w]
    rights = [s for s, w in zip(score, wrong, strict=True) if not w]
    if not errors or not rights:
        return math.nan
    return sum((e > r) + (e == r) / 2 for e in errors for r in rights) / (len(errors) * len(rights))


def bed(
    samples: int = 2000, *, exits: int = 5, classes: int = 10, seed: int = 0, sharp: float = 1.5, full_exit: int = -1
) -> Trace:
    """A trace like a trained network's: hard samples are hard for all exits, errors persist, confidence exaggerates."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    hard = rng.normal(size=samples)
    noise = rng.normal(size=(samples, classes))
    logits = np.empty((exits, samples, classes))
    for e in range(exits):
        noise = 0.85 * noise + math.sqrt(1 - 0.85**2) * rng.normal(size=noise.shape)
        skill = 2.6 + 2.0 * e / max(exits - 1, 1)
        evidence = noise.copy()
        evidence[np.arange(samples), labels] += skill - 1.4 * hard
        logits[e] = sharp * (1 + 0.3 * e) * evidence
    return Trace(
        logits_ENC=torch.from_numpy(logits).float(),
        labels_N=torch.from_numpy(labels),
        cost_E=torch.linspace(0.2, 1.0, exits, dtype=torch.float64) if exits > 1 else torch.ones(1),
        full_exit=full_exit,
        hash_N=torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, size=samples)),
    )


def random_trace(
    samples: int, *, exits: int, classes: int, seed: int, full_exit: int = -1, broken: float = 0.0, own: bool = False
) -> Trace:
    """Logits without sense: every branch of a walk is taken; a share ``broken`` of rows per exit is not finite."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(exits, samples, classes)) * rng.choice([0.3, 3.0, 60.0], size=(exits, samples, 1))
    ruined = rng.random((exits, samples)) < broken
    logits[ruined, 0] = rng.choice([math.nan, math.inf, -math.inf], size=int(ruined.sum()))
    feeds = torch.from_numpy(np.triu(rng.random((exits, exits)) < 0.5, 1))
    shares = np.r_[rng.random(exits - 1) * 0.03, 0.0]
    return Trace(
        logits_ENC=torch.from_numpy(logits),
        labels_N=torch.from_numpy(rng.integers(classes, size=samples)),
        cost_E=torch.from_numpy(np.linspace(0.2, 1.0, exits) + shares.cumsum()),
        full_exit=full_exit,
        own_cost_E=torch.from_numpy(shares) if own else None,
        feeds_EE=feeds if own else None,
    )


def run_examples(module: ModuleType, page: str) -> None:
    """The examples of a module and of its page in docs/ print what they say."""
    assert doctest.testmod(module).failed == 0
    found = doctest.testfile(str(Path(__file__).parents[1] / "docs" / f"{page}.md"), module_relative=False)
    assert found.attempted > 0
    assert found.failed == 0
