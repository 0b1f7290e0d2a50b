"""Answers as early as the policy allows: run a segment, ask, let answered rows leave the batch, go on.

It refuses to make a choice that could change an answer; those are policy data. Faster backends enter through
``backend=``.
"""

from __future__ import annotations

import copy
import operator
import threading
from typing import Literal

import torch
from torch import Tensor

from shallowdeep.classifiers import Said
from shallowdeep.costs import feeds, own_costs
from shallowdeep.inputs import (
    Inputs,
    as_inputs,
    call,
    each,
    example_of,
    logits_of,
    mask_of,
    num_rows,
    signature_of,
    take,
    tensors,
)
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Policy
from shallowdeep.segments import Segment, cut_segments, keep_rows
from shallowdeep.taps import tapped
from shallowdeep.types import Answer, BackboneMismatch, DataError, InputSignature
from shallowdeep.walking import Walk, costs_when_asking

BACKENDS = ("auto", "torch")
PROGRAMS_KEPT = 8
"""Input shapes whose segments stay ready."""


class Engine:
    """``engine(inputs)`` answers each row at the exit where ``policy`` stops it; the rest of the network is skipped.

    ``inputs`` is a batch as the backbone takes it, on any device; the answer is on the network's. Weights are
    snapshotted when the engine is made: a call raises ``BackboneMismatch`` when the SDN has changed since. A backbone
    that cannot be exported runs through its own modules. Several threads may call one engine. Rows whose logits are
    not finite are answered by the backbone's own exit with ``valid_B`` False. Source: arXiv 1810.07052, section 5.1.
    """

    def __init__(self, sdn: ShallowDeepNetwork, policy: Policy, *, backend: Literal["auto", "torch"] = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"No backend {backend!r}. Possible: {', '.join(map(repr, BACKENDS))}.")
        self.sdn, self.policy, self.backend = sdn, policy, "torch"
        self._device = next(sdn.parameters()).device
        self._exits, self._full = sdn.num_exits, sdn.num_exits - 1
        asked = policy.asks(self._exits, self._full)
        policy.init(1, None, self._device)  # a rule that needs labels says so now
        cost_E = torch.tensor(sdn.plan.cost_E, dtype=torch.float64)
        self._cost_E = costs_when_asking(asked, cost_E=cost_E, own_cost_E=own_costs(sdn), feeds_EE=feeds(sdn)).to(
            self._device
        )
        self._run = needed_ics(asked, feeds(sdn))
        self._reference = sdn.confusion_reference
        self._classifiers = copy.deepcopy(sdn.classifiers).eval().requires_grad_(False)
        self._watched = [*sdn.parameters(), *sdn.buffers()]
        self._seen = self._state()
        self._programs: dict[InputSignature, list[Segment]] = {}
        self._lock = threading.Lock()
        if sdn.plan.via == "export":
            self._program(sdn.plan.inputs)

    def __call__(self, inputs: object) -> Answer:
        """The answers to one batch, in its order: labels, logits, exits, confidence, confusion and cost per row."""
        batch, planned = each(as_inputs(inputs), lambda tensor: tensor.to(self._device)), self.sdn.plan.inputs
        if isinstance(batch, dict) and batch.keys() == set(planned.names):
            batch = {name: batch[name] for name in planned.names}
        found = signature_of(batch)
        if (found.kind, found.names, found.dtypes) != (planned.kind, planned.names, planned.dtypes):
            raise DataError(
                f"{self.sdn.plan.model} takes {planned.kind} {dict(zip(planned.names, planned.dtypes, strict=True))}, "
                f"found {found.kind} {dict(zip(found.names, found.dtypes, strict=True))}."
            )
        if tuple(map(len, found.shapes)) != tuple(map(len, planned.shapes)):
            raise DataError(f"{self.sdn.plan.model} takes rows of shape {planned.shapes}, found {found.shapes}.")
        if self._state() != self._seen:
            raise BackboneMismatch("The SDN has changed since this engine was made; make a new Engine(sdn, policy).")
        if num_rows(batch) == 0:
            return self._nothing()
        walk = Walk(
            self.policy,
            num_exits=self._exits,
            full_exit=self._full,
            cost_E=self._cost_E,
            reference=self._reference,
            batch=num_rows(batch),
            device=self._device,
        )
        with torch.inference_mode():
            if self.sdn.plan.via == "export":
                self._walk_segments(walk, batch, self._program(found))
            else:
                self._walk_modules(walk, batch)
            outcome, valid_B = walk.finish()
        return Answer(
            labels_B=outcome.labels_N,
            logits_BC=outcome.logits_NC,
            exit_B=outcome.exit_N,
            confidence_B=outcome.confidence_N,
            confusion_B=outcome.confusion_N,
            cost_B=outcome.cost_N,
            valid_B=valid_B,
        )

    def _walk_segments(self, walk: Walk, inputs: Inputs, program: list[Segment]) -> None:
        carried: tuple[Tensor, ...] = ()
        said: Said | None = None
        for exit, segment in zip([*self._run, self._full], program, strict=True):
            carried = segment.run(*carried, *tensors(inputs))
            logits, hidden = (carried[0], None) if exit == self._full else self._ask(exit, carried[0], said, inputs)
            keep = _leave(walk, exit, logits)
            if not walk.alive:
                return
            said = Said.of(logits, hidden)
            if keep is not None:
                carried = keep_rows(carried, segment.carried_rows, keep)
                inputs, said = take(inputs, keep), said.each(operator.itemgetter(keep))

    def _walk_modules(self, walk: Walk, inputs: Inputs) -> None:
        """Through the user's own modules: rows leave inside hooks, and when none is left the pass is abandoned."""
        said: Said | None = None
        alive = inputs

        def visit(position: int, x: Tensor) -> Tensor | None:
            nonlocal said, alive
            exit = self._run[position]
            logits, hidden = self._ask(exit, x, said, alive)
            keep = _leave(walk, exit, logits)
            if not walk.alive:
                raise _AllLeft
            said = Said.of(logits, hidden)
            if keep is None:
                return None
            alive, said = take(alive, keep), said.each(operator.itemgetter(keep))
            return x[keep]

        modes = [module.training for module in self.sdn.backbone.modules()]
        if any(modes):
            raise BackboneMismatch(
                "The backbone is in training mode and runs through its own modules; call sdn.eval()."
            )
        cuts = [self.sdn.plan.cuts[exit] for exit in self._run]
        try:
            with tapped(self.sdn.backbone, cuts, visit):
                logits = logits_of(call(self.sdn.backbone, inputs))
        except _AllLeft:
            return
        _leave(walk, self._full, logits)

    def _ask(self, exit: int, x: Tensor, said: Said | None, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        logits, hidden = self._classifiers[exit](x, said, mask_of(inputs, self.sdn.plan.cuts[exit].mask))
        return logits, hidden

    def _program(self, signature: InputSignature) -> list[Segment]:
        """The segments for inputs of this shape, exported on first sight."""
        with self._lock:
            if signature not in self._programs:
                example = example_of(signature, 2, self._device)
                try:
                    with torch.inference_mode(False):
                        segments = cut_segments(self.sdn.backbone, self.sdn.plan, self._run, example)
                except RuntimeError as error:
                    found, planned = signature.shapes, self.sdn.plan.inputs.shapes
                    raise DataError(
                        f"{self.sdn.plan.model} is planned for rows of shape {planned} and fails for {found}: {error}"
                    ) from error
                if len(self._programs) >= PROGRAMS_KEPT:
                    self._programs.pop(next(iter(self._programs)))
                self._programs[signature] = segments
            return self._programs[signature]

    def _state(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._watched]

    def _nothing(self) -> Answer:
        some = next((p for p in self.sdn.parameters() if p.is_floating_point()), torch.zeros(0))
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        floats = none.double()
        logits = torch.zeros(0, self.sdn.plan.num_classes, dtype=some.dtype, device=self._device)
        return Answer(
            labels_B=none,
            logits_BC=logits,
            exit_B=none,
            confidence_B=floats,
            confusion_B=floats,
            cost_B=floats,
            valid_B=none.bool(),
        )


class _AllLeft(Exception):
    """Every row is answered: the rest of the pass is not needed."""


def _leave(walk: Walk, exit: int, logits: Tensor) -> Tensor | None:
    """Positions of the rows that go on, or None when all do, or the exit is not asked."""
    if not walk.asks(exit):
        return None
    before = walk.alive
    stay_B = walk.ask(exit, logits)
    return stay_B.nonzero().flatten() if 0 < walk.alive < before else None


def needed_ics(asked: tuple[bool, ...], feeds_EE: Tensor) -> tuple[int, ...]:
    """ICs that must run: those asked, and those that feed one of them, directly or through others."""
    needed = list(asked[:-1])
    for exit in reversed(range(len(needed))):
        if needed[exit]:
            needed = [on or bool(feeds_EE[i, exit]) for i, on in enumerate(needed)]
    return tuple(exit for exit, on in enumerate(needed) if on)
