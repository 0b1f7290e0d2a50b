"""Which score of an answer tells that it is wrong: all of them measured on a trace, and the best one fitted.

It refuses to know networks. A fitted score judges only rows that did not fit it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from shallowdeep.effects import share
from shallowdeep.finding import AurocDifference, ErrorScores, auroc_differences, error_scores
from shallowdeep.policies import OVERLAP, CalibrationRecord, Confidence, Policy, finite_rows
from shallowdeep.progress import steps
from shallowdeep.spelling import rule_to_json
from shallowdeep.trajectory import Alarm, log_odds
from shallowdeep.types import DataError, Outcome, Trace, table
from shallowdeep.walking import CHUNK_ELEMENTS, simulate

RIVAL = "max-softmax"
"""The score that the others are compared with."""
FOLDS = 5
FIT_ROWS = 20_000
"""An alarm is fitted on so many rows at most; more do not move it."""
PASSED = 0.1
"""Weight, in the fit, of what an exit would have answered to a row that it let pass: early exits have few answers."""
RIDGE = 0.1
"""scikit-learn's ``C`` on columns of deviation 1."""
NEAR = 4
"""The log-odds of so many exits before the answer are a score of their own: the best at full depth without a fit."""


def full_network(trace: Trace) -> Policy:
    """The policy that asks every exit up to the full one and answers there: what the network says, exits and all.

    >>> trace = Trace(logits_ENC=torch.zeros(2, 1, 2), labels_N=torch.tensor([0]), cost_E=torch.ones(2))
    >>> full_network(trace).asks(2, 1)
    (True, True)
    """
    return Confidence(threshold=math.inf, enabled_E=tuple(e <= trace.full_exit for e in range(trace.num_exits)))


def wrong_answers(outcome: Outcome, trace: Trace) -> Tensor:
    """Which answers are wrong (bool [N]); one that is not finite is."""
    return (outcome.labels_N != trace.labels_N) | ~finite_rows(outcome.logits_NC)


def fit_alarm(trace: Trace, policy: Policy | None = None) -> Alarm:
    """The alarm for answers of ``policy`` (None: of the full network), fitted on all rows of ``trace``.

    A logistic regression of whether an answer is wrong on the log-odds that the exits passed give its label: a weight
    per exit, one per distance from the answer, one for the answering exit's own, and a level per answering exit. What
    exits would have answered to rows that they let pass counts a little (``PASSED``). It judges other rows than these.

    Raises ``ValueError`` when no answer is wrong, or none right: there is nothing to learn then.
    >>> row = torch.arange(100)
    >>> logits_ENC = torch.stack([torch.stack([row - 49.5, 49.5 - row], 1)] * 2)
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=(row < 52).long(), cost_E=torch.tensor([0.5, 1.0]))
    >>> alarm = fit_alarm(trace)
    >>> simulate(full_network(trace), trace, alarm).alarm_N.argmax() in range(48, 53)
    True
    """
    policy = policy or full_network(trace)
    thin = trace.rows(torch.arange(0, trace.num_samples, math.ceil(trace.num_samples / FIT_ROWS)))
    outcome = simulate(policy, thin)
    wrong_N = wrong_answers(outcome, thin)
    errors = int(wrong_N.sum())
    asked_E = policy.asks(trace.num_exits, trace.full_exit)
    exits = [e for e, on in enumerate(asked_E) if on]
    columns, wrong, weight = _examples(thin, outcome, exits)
    if errors in (0, len(wrong_N)) or len(np.unique(wrong)) < 2:  # answers that are not finite teach nothing
        raise ValueError(
            f"An alarm is learned from wrong and right answers; of {len(wrong_N)} answers {errors} are wrong. "
            "Give more rows, or rows that are harder."
        )
    scale_D = columns.std(0)
    scale_D[scale_D < 1e-9] = 1.0
    fitted = LogisticRegression(C=RIDGE, solver="newton-cholesky").fit(columns / scale_D, wrong, weight)
    own_K, back_K, last_K, level_K = np.split(fitted.coef_[0] / scale_D, 4)
    bias_E, weight_EE = np.zeros(trace.num_exits), np.zeros((trace.num_exits, trace.num_exits))
    for place, exit in enumerate(exits):
        bias_E[exit] = fitted.intercept_[0] + level_K[place]
        weight_EE[exit, exits[: place + 1]] = own_K[: place + 1] + back_K[: place + 1][::-1]
        weight_EE[exit, exit] += last_K[place]
    return Alarm(
        asked_E=asked_E,
        bias_E=tuple(bias_E.tolist()),
        weight_EE=tuple(map(tuple, weight_EE.tolist())),
        fitted_on=CalibrationRecord.of(
            trace, asked_E, {"rows": len(wrong_N), "errors": errors, "policy": rule_to_json(policy)}
        ),
    )


def _examples(
    trace: Trace, outcome: Outcome, exits: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """What is fitted, a line for every exit that a row passed or left at: columns [., 4 K], wrong or not, weights."""
    finite_KN = torch.stack([finite_rows(trace.logits_ENC[exit]) for exit in exits])
    label_KN = torch.stack([trace.logits_ENC[exit].argmax(1) for exit in exits])
    stop_KN = outcome.exit_N == torch.tensor(exits)[:, None]
    label_KN = torch.where(stop_KN, outcome.labels_N, label_KN)
    finite_KN = torch.where(stop_KN, finite_rows(outcome.logits_NC), finite_KN)
    odds_KKN = _odds(trace, exits, label_KN)
    lines, wrong, weight, eye = list[Tensor](), list[Tensor](), list[Tensor](), torch.eye(len(exits)).double()
    for place, exit in enumerate(exits):
        here_N = (outcome.exit_N >= exit) & finite_KN[place]
        odds_SK = odds_KKN[place, :, here_N].T
        back_SK = torch.zeros_like(odds_SK)
        back_SK[:, : place + 1] = odds_SK[:, : place + 1].flip(1)
        level_SK = eye[place].expand(len(odds_SK), -1)
        lines.append(torch.cat([odds_SK, back_SK, level_SK * odds_SK, level_SK], 1))
        wrong.append(label_KN[place, here_N] != trace.labels_N[here_N])
        weight.append(torch.where(stop_KN[place, here_N], 1.0, PASSED))
    return torch.cat(lines).numpy(), torch.cat(wrong).numpy(), torch.cat(weight).double().numpy()


def _odds(trace: Trace, exits: list[int], label_LN: Tensor) -> Tensor:
    """Log-odds [L, K, N] that each of ``exits`` gives each line of labels; the l-th line's of exits up to the l-th, or
    of all if there is one line; else 0.
    """
    odds_LKN = torch.zeros(len(label_LN), len(exits), trace.num_samples, dtype=torch.float64)
    rows = max(1, CHUNK_ELEMENTS // trace.num_classes)
    for k, exit in enumerate(exits):
        lines = slice(k if len(label_LN) > 1 else 0, None)
        for start in range(0, trace.num_samples, rows):
            part = slice(start, start + rows)
            softmax_BC = torch.softmax(trace.logits_ENC[exit, part].detach(), 1, dtype=torch.float64)
            odds_LKN[lines, k, part] = log_odds(softmax_BC.gather(1, label_LN[lines, part].T)).T
    return odds_LKN


def suspicions(trace: Trace, policy: Policy | None = None, alarm: Alarm | None = None) -> dict[str, Tensor]:
    """How suspicious each answer of ``policy`` (None: the full network) is by every score: float64 [N] each.

    Higher is more suspicious; an answer that is not finite is so beyond all (infinity). ``confusion`` is the raw sum,
    ``disagreements`` counts the exits asked that say another label, ``max-softmax``, ``entropy``, ``margin`` and
    ``energy`` (arXiv 2010.03759) are of the answer alone, ``log-odds`` the mean over the exits passed of what they give
    the answer's label, ``near log-odds`` over the last of them, ``alarm`` the given alarm's.
    >>> trace = Trace(logits_ENC=torch.eye(2).expand(3, 2, 2), labels_N=torch.tensor([0, 1]), cost_E=torch.ones(3))
    >>> suspicions(trace)["disagreements"].tolist()
    [0.0, 0.0]
    """
    policy = policy or full_network(trace)
    outcome = simulate(policy, trace, alarm)
    exits = [e for e, on in enumerate(policy.asks(trace.num_exits, trace.full_exit)) if on]
    passed_KN = torch.tensor(exits)[:, None] <= outcome.exit_N
    near_KN = passed_KN & (passed_KN.flip(0).cumsum(0).flip(0) <= NEAR)
    odds_KN = _odds(trace, exits, outcome.labels_N[None])[0]
    said_KN = torch.stack([trace.logits_ENC[exit].argmax(1) for exit in exits])
    logits_NC, softmax_NC = outcome.logits_NC.double(), outcome.logits_NC.softmax(1, dtype=torch.float64)
    top_N2 = softmax_NC.topk(2).values
    found = {
        "confusion": simulate(policy, dataclasses.replace(trace, confusion_reference=None)).confusion_N,
        "standardised confusion": outcome.confusion_N,
        "disagreements": ((said_KN != outcome.labels_N) & passed_KN).sum(0),
        "max-softmax": -outcome.confidence_N,
        "entropy": torch.special.entr(softmax_NC).sum(1),
        "margin": top_N2[:, 1] - top_N2[:, 0],
        "energy": -logits_NC.logsumexp(1),
        "log-odds": -(odds_KN * passed_KN).sum(0) / passed_KN.sum(0),
        "near log-odds": -(odds_KN * near_KN).sum(0) / near_KN.sum(0),
    }
    if trace.confusion_reference is None:
        del found["standardised confusion"]
    if outcome.alarm_N is not None:
        found["alarm"] = outcome.alarm_N
    finite_N = finite_rows(outcome.logits_NC)
    return {name: torch.where(finite_N, score_N.double(), math.inf) for name, score_N in found.items()}


@dataclass(frozen=True, kw_only=True)
class AlarmScores:
    """How well each score of the answers finds what was looked for (``target``), and its AUROC beside max-softmax's.

    ``alarm`` is the learned score, cross-fitted: every row is judged by an alarm that was fitted without it. It is
    missing where there are not two wrong and two right answers to learn from.
    """

    target: str
    positives: int
    samples: int
    accuracy: float
    mean_cost: float
    scores: Mapping[str, ErrorScores]
    lead: Mapping[str, AurocDifference]

    def __str__(self) -> str:
        answers = f"{self.samples} answers; accuracy {self.accuracy:.2%} at mean cost {self.mean_cost:.3f}"
        if self.positives in (0, self.samples):
            return f"There is nothing to tell apart: {self.positives} {self.target} among {answers}"
        head = "score", "AUROC", "AUPR", "FPR at 95 % TPR", "AURC", f"AUROC less {RIVAL}'s, 95 %"
        rows: list[tuple[str, ...]] = [head]
        for name, own in self.scores.items():
            figures = (f"{value:.4f}" for value in (own.auroc, own.aupr, own.fpr_at_95_tpr, own.aurc))
            rows.append((name, *figures, "" if name == RIVAL else str(self.lead[name])))
        return f"{table(rows)}\n{self.positives} {self.target} among {answers}"


def alarms(trace: Trace, policy: Policy | None = None, *, against: Trace | None = None) -> AlarmScores:
    """How well scores of the answers that ``policy`` gives (None: the full network's) find the wrong ones.

    With ``against``, a trace of other inputs through the same exits (backdoored ones, or ones from elsewhere; their
    labels are not looked at), the scores are to tell its rows from those of ``trace``. Every score is computed from
    exits that the answer has paid for. ``accuracy`` and ``mean_cost`` are of the policy on ``trace``. A confusion
    standardised by the trace's reference is listed too, where it has one. Raises ``DataError`` when exits or classes
    differ.
    >>> row = torch.arange(100)
    >>> logits_ENC = torch.stack([torch.stack([row - 49.5, 49.5 - row], 1)] * 2)
    >>> trace = Trace(logits_ENC=logits_ENC, labels_N=(row < 52).long(), cost_E=torch.tensor([0.5, 1.0]))
    >>> alarms(trace).scores["max-softmax"].auroc > 0.5
    True
    """
    policy, traces = policy or full_network(trace), [trace]
    if (seen := trace.trained_share) > OVERLAP:
        warnings.warn(f"The ICs trained on {seen:.1%} of these rows: errors look rarer, alarms better.", stacklevel=2)
    if policy.calibrated_on is not None and (seen := share(policy.calibrated_on.seen(trace))) > OVERLAP:
        warnings.warn(f"The policy was calibrated on {seen:.1%} of these rows: its errors look rarer.", stacklevel=2)
    if against is not None:
        if against.logits_ENC.shape[::2] != trace.logits_ENC.shape[::2]:
            found, wanted = (tuple(given.logits_ENC.shape[::2]) for given in (against, trace))
            raise DataError(f"The other trace has {found} exits and classes, this one {wanted}: not the same network.")
        traces.append(dataclasses.replace(against, confusion_reference=trace.confusion_reference))
    outcome = simulate(policy, trace)
    wrong_N = wrong_answers(outcome, trace)
    each = [suspicions(given, policy) for given in traces]
    scores = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    if min(int(wrong_N.sum()), int((~wrong_N).sum())) >= 2:
        scores["alarm"] = torch.cat(crossfitted(traces, policy, wrong_N))
    target_N = wrong_N
    if against is not None:
        target_N = torch.arange(len(scores[RIVAL])) >= trace.num_samples
    return AlarmScores(
        target="wrong ones" if against is None else "of the other trace",
        positives=int(target_N.sum()),
        samples=len(target_N),
        accuracy=1 - share(wrong_N),
        mean_cost=float(outcome.cost_N.mean()),
        scores={name: error_scores(score_N, target_N) for name, score_N in scores.items()},
        lead=auroc_differences(scores, RIVAL, target_N),
    )


def crossfitted(traces: Sequence[Trace], policy: Policy, wrong_N: Tensor) -> list[Tensor]:
    """The learned alarm of every row of ``traces`` ([N] each), by alarms fitted on parts of the first: its own rows
    (``wrong_N`` says which answers are wrong) are judged by one that was fitted without them.
    """
    rng = np.random.default_rng(0)
    fold_N = torch.empty(len(wrong_N), dtype=torch.int64)
    for kind_N in (wrong_N, ~wrong_N):  # every fold's share of errors
        fold_N[kind_N] = torch.from_numpy(rng.permutation(int(kind_N.sum())) % FOLDS)
    folds = [fold_N, *(torch.arange(trace.num_samples) % FOLDS for trace in traces[1:])]
    found = [torch.empty(trace.num_samples, dtype=torch.float64) for trace in traces]
    for fold in steps(range(FOLDS), "fit alarms", FOLDS):
        alarm = fit_alarm(traces[0].rows(fold_N != fold), policy)
        for trace, fold_M, alarm_M in zip(traces, folds, found, strict=True):
            if bool((fold_M == fold).any()):
                scored = simulate(policy, trace.rows(fold_M == fold), alarm).alarm_N
                assert scored is not None
                alarm_M[fold_M == fold] = scored
    return found
