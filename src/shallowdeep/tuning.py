"""Which exits to ask on this machine: milliseconds instead of macs, measured, and the policy that spends least of them.

It refuses to change an accuracy aim: a policy that cannot keep it runs the full network.
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import calibrate
from shallowdeep.cuts import plan
from shallowdeep.inputs import as_inputs, example_of, take
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Confidence, Fixed, Policy
from shallowdeep.progress import steps
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.engine import Engine
from shallowdeep.timing import compare, threads_of_torch
from shallowdeep.types import DataError, Plan, Trace
from shallowdeep.views import Look

PAYS = 0.01
"""Least share of the time by which a smaller plan must be better to be worth training anew."""


@dataclass(frozen=True, kw_only=True)
class MachineCosts:
    """Milliseconds per row on one machine with one backend, at one batch size.

    ``full_ms`` is the untouched network in one piece, ``reach_ms_E`` the way to each exit with every exit asked on it,
    ``own_ms_E`` what asking each adds.
    """

    backend: BackendName
    batch_size: int
    full_ms: float
    reach_ms_E: Tensor
    own_ms_E: Tensor

    def timed(self, trace: Trace) -> Trace:
        """``trace`` with shares of the untouched network's time for costs, in place of shares of its macs. Raises
        ``DataError`` for a trace of other exits.
        """
        if len(self.reach_ms_E) != trace.num_exits:
            raise DataError(
                f"The costs are of {len(self.reach_ms_E)} exits, the trace of {trace.num_exits}: "
                "measure with the second look of the trace, or without where it has none."
            )
        return dataclasses.replace(
            trace, cost_E=self.reach_ms_E / self.full_ms, own_cost_E=self.own_ms_E / self.full_ms
        )


def machine_costs(
    sdn: ShallowDeepNetwork,
    *,
    second_look: Look = None,
    backend: BackendName = "auto",
    threads: int | None = None,
    batch_size: int = 1,
    inputs: object = None,
    rounds: int = 5,
) -> MachineCosts:
    """What this machine takes for ``sdn`` at ``batch_size``; ``inputs`` are rows to measure with (None: noise).

    Whole calls are measured, in turn, ``rounds`` times: of an engine that asks every exit and lets nobody leave, and of
    the network in one piece. The steps' own times say which share of the first is the way to each exit. What asking
    adds (the IC, the rule) is taken to be the same at every exit: the difference of the two, shared out. With a
    ``second_look`` its exit is the last one. Whatever the backend, PyTorch's included, it has ``threads`` meanwhile.
    """
    if batch_size < 1 or rounds < 1:
        raise ValueError(f"batch_size and rounds are at least 1, found {batch_size} and {rounds}.")
    full = sdn.num_exits - 1
    with threads_of_torch(threads):
        every = Engine(sdn, Confidence(threshold=torch.inf), second_look=second_look, backend=backend, threads=threads)
        whole = Engine(sdn, Fixed(exit=full), backend=every.backend, threads=threads)
        batch = example_of(sdn.plan.inputs, batch_size, next(sdn.parameters()).device) if inputs is None else inputs
        batch = take(as_inputs(batch), slice(0, batch_size))
        shares, calls = [], []
        for _ in steps(range(rounds), "measure exits", rounds):
            times = every.measure(batch, sizes=(batch_size,), rounds=5)
            reached = [times.up_to(place, batch_size) for place in range(len(times.ms_PS))]
            shares.append([ms / reached[-1] for ms in reached])
            calls.append(compare(lambda: every(batch), lambda: whole(batch), rounds=5))
    share_E = torch.tensor([statistics.median(found) for found in zip(*shares, strict=True)], dtype=torch.float64)
    reach_E = share_E.cummax(0).values * statistics.median(call.a_ms for call in calls) / batch_size
    full_ms = statistics.median(call.b_ms for call in calls) / batch_size
    own_E = torch.full_like(reach_E, max(0.0, float(reach_E[full]) - full_ms) / max(full, 1))
    own_E[full:] = 0.0
    return MachineCosts(
        backend=every.backend, batch_size=batch_size, full_ms=full_ms, reach_ms_E=reach_E, own_ms_E=own_E
    )


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The policy that takes least time, the share of the untouched network's time that it should take, and, where ICs
    that nobody asks still have to run because they feed others, a smaller plan to train anew and its share.
    """

    policy: Policy
    expected_time: float
    plan: Plan | None
    plan_time: float


def tune(sdn: ShallowDeepNetwork, trace: Trace, costs: MachineCosts, *, max_accuracy_drop: float) -> Tuned:
    """Exits and thresholds for the least milliseconds within a drop of accuracy, chosen on the rows of ``trace``.

    Exits are left out one after the other as long as that saves time. Where none pays the policy is
    ``Fixed(exit=full)``. To certify, calibrate anew: ``calibrate(other_rows, enabled_E=policy.enabled_E, ...)``.
    """
    timed = costs.timed(trace)
    policy, time = _least(timed, max_accuracy_drop)
    if trace.feeds_EE is None or not bool(trace.feeds_EE.any()):
        return Tuned(policy=policy, expected_time=time, plan=None, plan_time=time)
    free, free_time = _least(dataclasses.replace(timed, feeds_EE=None), max_accuracy_drop)
    asked = free.asks(trace.num_exits, trace.full_exit)
    names = [cut.name for cut, on in zip(sdn.plan.cuts, asked, strict=False) if on]
    if free_time > time - PAYS or not 0 < len(names) < len(sdn.plan.cuts):
        return Tuned(policy=policy, expected_time=time, plan=None, plan_time=time)
    example = example_of(sdn.plan.inputs, 2, next(sdn.parameters()).device)
    kind: Any = sdn.plan.classifiers[0].kind
    smaller = plan(sdn.backbone, example, at=names, classifier=kind)
    return Tuned(policy=policy, expected_time=time, plan=smaller, plan_time=free_time)


def _least(timed: Trace, max_accuracy_drop: float) -> tuple[Policy, float]:
    """The best policy over sets of exits, leaving out one after the other, and its expected time."""
    full = timed.full_exit

    def tried(asked: Iterable[int]) -> tuple[bool, float, Policy]:
        """Whether it misses the aim, its time, and the policy."""
        enabled_E = tuple(exit in asked for exit in range(timed.num_exits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no exit pays is one of the answers
            policy = calibrate(timed, max_accuracy_drop=max_accuracy_drop, enabled_E=enabled_E)
        assert policy.calibrated_on is not None
        misses = max_accuracy_drop < 0 and isinstance(policy, Fixed)  # the full network gains nothing on itself
        return misses, float(policy.calibrated_on.info["expected_mean_cost"]), policy

    asked = frozenset(range(timed.num_exits)) - {full}
    best = tried(asked)
    while asked:
        without = steps(asked, f"leave out one of {len(asked)} exits", len(asked))
        found = min(((*tried(asked - {exit}), asked - {exit}) for exit in without), key=lambda one: one[:2])
        if found[:2] >= best[:2] and not isinstance(best[2], Fixed):
            break
        best, asked = found[:3], found[3]
    return best[2], best[1]
