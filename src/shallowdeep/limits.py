"""What one client may cost: a bound on the mean cost of its latest rows that holds whatever it sends.

It refuses to know attacks: it counts what was spent and caps what may be.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

from shallowdeep.costs import exits_of
from shallowdeep.inputs import as_inputs, num_rows
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Policy
from shallowdeep.types import Answer
from shallowdeep.views import SecondLook

CLIENTS = 10_000
ROUNDING = 1 + 1e-12
"""Sums of costs round: what fits to this much fits."""


class Answers(Protocol):
    """An engine, as far as this room knows it."""

    sdn: ShallowDeepNetwork
    policy: Policy
    second_look: SecondLook | None

    def __call__(self, inputs: object, *, max_cost: float | None = None) -> Answer:
        """The answers to a batch, no row of which spends more than ``max_cost``."""


class OverBudget(RuntimeError):
    """A client has spent what its window allows, and the window refuses."""


@dataclass(eq=False)
class _Spent:
    """The cost of one row: what it may cost while it runs, then what it did cost."""

    cost: float


class CostWindow:
    """``window(inputs, client=name)`` answers with ``engine``; a client's last ``rows`` rows cost ``max_mean_cost`` at
    most, in the mean, at every moment and whatever it sends.

    A row over budget is answered at the exit that the budget still reaches (``over="cap"``, ``capped_B`` True), which
    is never below the first; with ``over="refuse"`` a request that may not run to the end raises ``OverBudget``, and
    its rows count as rows that cost nothing. A new client stands as if all its earlier rows had left at the first exit,
    so that no burst can lock it out. Several threads may call: a row counts as what it may cost until it is answered,
    and for good where answering it failed. The ``clients`` seen last are remembered. Raises ``ValueError`` for a mean
    below the cost of the first exit asked.
    """

    def __init__(
        self,
        engine: Answers,
        *,
        max_mean_cost: float,
        rows: int = 100,
        over: Literal["cap", "refuse"] = "cap",
        clients: int = CLIENTS,
    ) -> None:
        self.engine, self.max_mean_cost, self.rows, self.over, self.clients = engine, max_mean_cost, rows, over, clients
        costs = costs_asked(engine)
        self.first_cost, self.full_cost = costs[0], costs[-1]
        if rows < 1 or clients < 1 or over not in ("cap", "refuse"):
            raise ValueError(
                f"Need rows >= 1, clients >= 1, over 'cap' or 'refuse'; found {rows}, {clients}, {over!r}."
            )
        if not max_mean_cost >= self.first_cost:
            raise ValueError(
                f"max_mean_cost={max_mean_cost:g} is below {self.first_cost:.3f}, the cost of the first exit asked: "
                "no row could be answered."
            )
        self._spent: OrderedDict[Hashable, deque[_Spent]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, inputs: object, *, client: Hashable) -> Answer:
        """The engine's answers to the batch ``inputs`` of ``client``, within its budget."""
        entries = self._reserve(client, num_rows(as_inputs(inputs)))
        answer = self.engine(inputs, max_cost=entries[0].cost if entries else None)
        for entry, cost in zip(entries, answer.cost_B.tolist(), strict=True):
            entry.cost = cost
        return answer

    def mean_cost(self, client: Hashable) -> float:
        """What the last ``rows`` rows of ``client`` cost in the mean; running ones count as what they may cost."""
        with self._lock:
            return sum(entry.cost for entry in self._of(client)) / self.rows

    def allowance(self, client: Hashable, rows: int = 1) -> float:
        """What each of the next ``rows`` rows of ``client`` may cost."""
        with self._lock:
            return self._allowed(self._of(client), rows)

    def _reserve(self, client: Hashable, rows: int) -> list[_Spent]:
        """Entries for ``rows`` rows, each at what it may cost. Raises ``OverBudget``."""
        with self._lock:
            window = self._of(client)
            allowed = self._allowed(window, rows)
            refused = self.over == "refuse" and allowed < self.full_cost
            entries = [_Spent(0.0 if refused else allowed) for _ in range(rows)]
            window.extend(entries)
        if refused:
            raise OverBudget(
                f"Client {client!r} may spend {allowed:.3f} a row on {rows} rows, to the end it takes "
                f"{self.full_cost:.3f}: its last {self.rows} rows may cost {self.max_mean_cost:g} in the mean."
            )
        return entries

    def _of(self, client: Hashable) -> deque[_Spent]:
        """The window of ``client``, now the one seen last."""
        if client not in self._spent:
            fresh = (_Spent(self.first_cost) for _ in range(self.rows))
            self._spent[client] = deque(fresh, maxlen=self.rows)
            if len(self._spent) > self.clients:
                self._spent.popitem(last=False)
        self._spent.move_to_end(client)
        return self._spent[client]

    def _allowed(self, window: deque[_Spent], rows: int) -> float:
        """The greatest cost for each of ``rows`` rows that overdraws no window which ends at any of them."""
        budget = self.max_mean_cost * self.rows * ROUNDING
        # After j new rows the j oldest have left: what remains, and j times the allowance, must fit.
        kept = list(itertools.accumulate(reversed([entry.cost for entry in window]), initial=0.0))[::-1]
        allowed = min((budget - kept[j]) / j for j in range(1, min(max(rows, 1), self.rows) + 1))
        return min(max(allowed, 0.0 if self.over == "refuse" else self.first_cost), self.full_cost)


def costs_asked(engine: Answers) -> list[float]:
    """What stopping costs at each exit that the engine's policy asks, from the first to the last."""
    exits = exits_of(engine.sdn, engine.second_look)
    rule = exits.rule(engine.policy)
    return [cost for cost, on in zip(exits.costs(rule).tolist(), rule.asked, strict=True) if on]
