"""What an SDN's exits cost on paper: macs and parameters, counted, never estimated.

It refuses to know seconds; those are measured where engines run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import Costs, table


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


def table_of(costs: Costs) -> str:
    """``costs`` as text: one line per exit."""
    rows = [("exit", "macs before", "share", "IC macs", "IC params")]
    for name, before, own, params in zip(
        costs.exit_names, costs.before_macs_E, costs.own_macs_E, costs.params_E, strict=True
    ):
        rows.append((name, f"{before:,}", f"{before / costs.total_macs:.3f}", f"{own:,}", f"{params:,}"))
    return table(rows)
