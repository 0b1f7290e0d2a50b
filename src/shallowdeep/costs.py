"""What an SDN's exits cost on paper: macs and parameters, counted, never estimated.

It refuses to know seconds; those are measured where engines run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Policy
from shallowdeep.trajectory import Alarm
from shallowdeep.types import ConfusionReference, Costs, table
from shallowdeep.views import SecondLook, check_record
from shallowdeep.walking import Rule, costs_when_asking, rule_of

LOOKED = "full+"
"""How the name of a second look's exit begins; the view's follows."""


def costs_of(sdn: ShallowDeepNetwork) -> Costs:
    """Macs per sample before each exit and in its IC, and parameters of its IC; the last entry is the backbone's
    end.
    """
    plan = sdn.plan
    return Costs(
        exit_names=plan.exit_names,
        before_macs_E=(*(cut.macs_before for cut in plan.cuts), plan.total_macs),
        own_macs_E=(*(spec.macs for spec in plan.classifiers), 0),
        params_E=(*(spec.params for spec in plan.classifiers), 0),
        total_macs=plan.total_macs,
        total_params=plan.total_params,
    )


def own_costs(sdn: ShallowDeepNetwork) -> Tensor:
    """Share of the backbone's macs that each exit's own IC adds, float64 [E]; 0 for the backbone's own answer."""
    costs = costs_of(sdn)
    return torch.tensor(costs.own_macs_E, dtype=torch.float64) / costs.total_macs


def feeds(sdn: ShallowDeepNetwork) -> Tensor:
    """``feeds_EE[i, j]`` is True where exit j's IC reads exit i's answer, bool [E, E]."""
    feeds_EE = torch.zeros(sdn.num_exits, sdn.num_exits, dtype=torch.bool)
    for position, spec in enumerate(sdn.plan.classifiers):
        if spec.fed:
            feeds_EE[position - 1, position] = True
    return feeds_EE


@dataclass(frozen=True, kw_only=True, eq=False)
class Exits:
    """What is known of an SDN's exits before anybody asks them: what a ``Trace`` of them calls by the same names."""

    exit_names: tuple[str, ...]
    full_exit: int
    cost_E: Tensor
    own_cost_E: Tensor
    feeds_EE: Tensor
    confusion_reference: ConfusionReference | None

    def rule(self, policy: Policy, alarm: Alarm | None = None) -> Rule:
        """What ``policy`` means on them. Raises ``ValueError`` where it, or ``alarm``, speaks of other exits, or
        ``alarm`` of another second look.
        """
        if alarm is not None:
            behind = self.exit_names[self.full_exit + 1 :]
            check_record("alarm", alarm.fitted_on, behind[0].removeprefix(LOOKED) if behind else None)
        return rule_of(policy, len(self.exit_names), self.full_exit, self.confusion_reference, alarm)

    def costs(self, rule: Rule) -> Tensor:
        """Cost of stopping at each exit under ``rule``, float64 [E]."""
        return costs_when_asking(rule.asked, cost_E=self.cost_E, own_cost_E=self.own_cost_E, feeds_EE=self.feeds_EE)


def exits_of(sdn: ShallowDeepNetwork, look: SecondLook | None = None) -> Exits:
    """The exits of ``sdn``, and behind them that of a second look, which costs one pass more than the full exit."""
    again = int(look is not None)
    cost_E = torch.tensor([*sdn.plan.cost_E, *[sdn.plan.cost_E[-1] + 1] * again], dtype=torch.float64)
    reference = sdn.confusion_reference
    return Exits(
        exit_names=(*sdn.plan.exit_names, *([LOOKED + look.name] if look is not None else [])),
        full_exit=sdn.num_exits - 1,
        cost_E=cost_E,
        own_cost_E=F.pad(own_costs(sdn), (0, again)),
        feeds_EE=F.pad(feeds(sdn), (0, again, 0, again)),
        confusion_reference=None if reference is None else reference.first(len(cost_E)),
    )


def table_of(costs: Costs) -> str:
    """``costs`` as text: one line per exit."""
    rows = [("exit", "macs before", "share", "IC macs", "IC params")]
    for name, before, own, params in zip(
        costs.exit_names, costs.before_macs_E, costs.own_macs_E, costs.params_E, strict=True
    ):
        rows.append((name, f"{before:,}", f"{before / costs.total_macs:.3f}", f"{own:,}", f"{params:,}"))
    return table(rows)
