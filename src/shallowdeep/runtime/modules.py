"""The walk of a network that cannot be exported: through its own modules, rows leave inside hooks.

It refuses to know backends: it is plain PyTorch, and no faster than the modules are.
"""

from __future__ import annotations

import operator
from contextlib import suppress

from torch import Tensor

from shallowdeep.classifiers import Said
from shallowdeep.graph import evaluating
from shallowdeep.inputs import Inputs, call, logits_of, mask_of, num_rows, take
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.runtime.loop import Limit
from shallowdeep.taps import tapped
from shallowdeep.views import SecondLook
from shallowdeep.walking import Left, Rule, Walk


class _AllLeft(BaseException):
    """Every row is answered: the rest of the pass is not needed.

    No ``Exception``: where one passes, a module goes through its hooks, which other threads may just be changing.
    """


def walk_modules(
    sdn: ShallowDeepNetwork,
    rule: Rule,
    runs: tuple[int, ...],
    inputs: Inputs,
    limit: Limit | None,
    look: SecondLook | None,
) -> list[Left]:
    """The exits and answers of a batch, in the order of stopping; ``runs`` are the ICs that run."""
    with evaluating(sdn):  # ICs, too: their dropout would make other answers at every call
        return _Pass(sdn, rule, runs, inputs, limit, look)()


class _Pass:
    """One batch's pass."""

    def __init__(
        self,
        sdn: ShallowDeepNetwork,
        rule: Rule,
        runs: tuple[int, ...],
        inputs: Inputs,
        limit: Limit | None,
        look: SecondLook | None,
    ) -> None:
        self.sdn, self.rule, self.runs, self.limit = sdn, rule, runs, limit or Limit(rule.last)
        self.look = look
        self.inputs = self.alive = inputs
        self.walk = Walk(rule, batch=num_rows(inputs), device=next(sdn.parameters()).device)
        self.said: Said | None = None
        self.place = -1

    def __call__(self) -> list[Left]:
        cuts = [self.sdn.plan.cuts[exit] for exit in self.runs]
        with suppress(_AllLeft):
            with tapped(self.sdn.backbone, cuts, self._visit):
                logits = logits_of(call(self.sdn.backbone, self.inputs))
            stay = self._ask(self.rule.full_exit, logits)
            assert self.look is not None, "rows walk past the full exit only to a second look"
            alive, logits = (self.alive, logits) if stay is None else (take(self.alive, stay), logits[stay])
            again = logits_of(call(self.sdn.backbone, self.look.view(alive)))
            self._ask(self.rule.last, self.look.joined(logits, again))
        return self.walk.left

    def _visit(self, position: int, x: Tensor) -> Tensor | None:
        exit = self.runs[position]
        mask = mask_of(self.alive, self.sdn.plan.cuts[exit].mask)
        logits, hidden = self.sdn.classifier(exit)(x, self.said, mask)
        stay = self._ask(exit, logits) if self.rule.asked[exit] else None
        self.said = Said.of(logits, hidden)
        if stay is None:
            return None
        self.alive, self.said = take(self.alive, stay), self.said.each(operator.itemgetter(stay))
        return x[stay]

    def _ask(self, exit: int, logits_SC: Tensor) -> Tensor | None:
        """Positions of the rows that go on, or None when all do."""
        self.place += 1
        stay_S = self.walk.ask(exit, logits_SC, ends=self.place >= self.limit.place)
        if not self.walk.alive:
            raise _AllLeft
        return None if self.walk.alive == len(logits_SC) else stay_S.nonzero().flatten()
