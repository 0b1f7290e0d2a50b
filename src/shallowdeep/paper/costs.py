"""What the study's networks cost, counted on the networks themselves: parameters, macs, shares per exit.

It refuses to know training. Macs are multiply-accumulates of convolutions and matrix products, nothing else.
"""

from __future__ import annotations

from typing import Any

from shallowdeep.paper.datasets import DATASETS
from shallowdeep.paper.networks import NETWORKS
from shallowdeep.paper.recipes import fresh_network, with_exits
from shallowdeep.types import table


def cost_rows() -> list[dict[str, Any]]:
    """One row per data set and network; ``exit_cost_shares`` are of the CNN's macs, ICs passed included."""
    rows = []
    for chosen in DATASETS.values():
        for network in NETWORKS:
            model = fresh_network(network, chosen, 0)
            sdn = with_exits(model, network, chosen, 0)
            cnn, added = (sum(p.numel() for p in module.parameters()) for module in (model, sdn.classifiers))
            rows.append(
                {
                    "dataset": chosen.name,
                    "network": network,
                    "cnn_params": cnn,
                    "sdn_params": cnn + added,
                    "cnn_macs": sdn.plan.total_macs,
                    "exit_cost_shares": list(sdn.plan.cost_E),
                }
            )
    return rows


def cost_table(rows: list[dict[str, Any]]) -> str:
    """``cost_rows`` as text."""
    lines = [("data set", "network", "CNN params", "SDN params", "CNN macs", "cost of each exit, % of the CNN")]
    for row in rows:
        shares = " ".join(f"{100 * share:.1f}" for share in row["exit_cost_shares"])
        numbers = (f"{row[name]:,}" for name in ("cnn_params", "sdn_params", "cnn_macs"))
        lines.append((row["dataset"], row["network"], *numbers, shares))
    return table(lines)
