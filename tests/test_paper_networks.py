"""The study's networks: parameters and macs of every row of Table A to the digit, cost shares to a tenth of a point."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from shallowdeep import cli
from shallowdeep.paper import costs
from shallowdeep.paper.costs import cost_rows, cost_table
from shallowdeep.paper.datasets import DATASETS
from shallowdeep.paper.networks import NETWORKS, ResNet, make_network
from shallowdeep.paper.recipes import EXITS

# data set, network, CNN parameters, SDN parameters, CNN macs, cost of each exit in % of the CNN
TABLE_A = """
cifar10 vgg16 15253578 15468683 313725952 12.6 30.7 48.7 60.8 78.8 90.9 100.1
cifar10 resnet56 855770 891676 125747840 15.4 30.4 44.6 59.6 73.8 88.8 100.0
cifar10 wrn32-4 7404074 7547500 1185335808 16.8 29.6 45.7 58.4 74.5 87.3 100.0
cifar10 mobilenet 3217226 3483520 46354432 21.6 35.8 49.8 68.4 91.4 100.6
cifar100 vgg16 15299748 17450753 313772032 12.6 30.7 48.9 61.1 79.4 91.5 100.7
cifar100 resnet56 861620 1220626 125753600 15.4 30.4 44.6 59.7 73.9 89.0 100.3
cifar100 wrn32-4 7427204 8861410 1185358848 16.9 29.6 45.7 58.5 74.6 87.4 100.1
cifar100 mobilenet 3309476 5972380 46446592 22.0 36.9 52.4 72.6 96.4 105.7
tinyimagenet vgg16 21222664 26753470 1259282432 12.6 30.6 48.6 60.7 78.8 90.9 100.4
tinyimagenet resnet56 868120 1586126 125760000 15.4 30.4 44.7 59.8 74.1 89.3 100.6
tinyimagenet wrn32-4 7452904 10321310 1185384448 16.9 29.6 45.8 58.5 74.7 87.5 100.2
tinyimagenet mobilenet 3411976 11195381 185581568 21.8 36.3 51.0 70.2 95.0 104.2
"""
INPUTS_OF_ICS = {
    "vgg16": (1024, 2048, 4096, 4096, 8192, 2048),
    "resnet56": (256, 256, 512, 512, 1024, 1024),
    "wrn32-4": (1024, 1024, 2048, 2048, 4096, 4096),
    "mobilenet": (2048, 4096, 8192, 8192, 4096),
}


@cache
def rows() -> list[dict[str, Any]]:
    return cost_rows()


def test_every_row_of_table_a() -> None:
    expected = [line.split() for line in TABLE_A.strip().splitlines()]
    assert len(rows()) == len(expected) == 12
    for row, (dataset, network, cnn, sdn, macs, *shares) in zip(rows(), expected, strict=True):
        assert (row["dataset"], row["network"]) == (dataset, network)
        assert (row["cnn_params"], row["sdn_params"], row["cnn_macs"]) == (int(cnn), int(sdn), int(macs))
        assert [round(100 * share, 1) for share in row["exit_cost_shares"]] == [float(share) for share in shares]
    assert "105.7" in cost_table(rows())


def test_the_door_of_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(costs, "cost_rows", rows)  # counted once for this file: it takes half a minute
    cli.main(["paper", "costs"])
    lines = capsys.readouterr().out.splitlines()
    assert list(json.loads(lines[-1])) == ["rows"]
    found = json.loads(lines[-1])["rows"]
    fields = ["dataset", "network", "cnn_params", "sdn_params", "cnn_macs", "exit_cost_shares"]
    assert [list(row) for row in found] == 12 * [fields]
    assert found[-1]["exit_cost_shares"][-1] > 1, "fractions of the plain network's macs"
    assert sum("3,411,976" in line for line in lines) == 1, "the table comes first"


@pytest.mark.parametrize("network", NETWORKS)
def test_ics_read_what_the_papers_read(network: str) -> None:
    from shallowdeep.paper.recipes import fresh_network, with_exits

    chosen = DATASETS["cifar10"]
    sdn = with_exits(fresh_network(network, chosen, 0), network, chosen, 0)
    assert tuple(spec.features for spec in sdn.plan.classifiers) == INPUTS_OF_ICS[network]
    mixed = [spec.views == 2 for spec in sdn.plan.classifiers]
    assert mixed == [cut.shape[-1] >= 4 for cut in sdn.plan.cuts], "no mix where nothing is pooled"
    linear = sdn.classifier(0).get_submodule("linear")
    assert isinstance(linear, nn.Linear)
    assert bool((linear.bias == 0).all()) is (network in ("vgg16", "wrn32-4"))


def test_details_where_the_authors_leave_the_textbook() -> None:
    vgg = make_network("vgg16", 10, 32)
    tail = [type(m).__name__ for m in list(vgg.modules()) if isinstance(m, (nn.Linear, nn.Dropout, nn.ReLU))][-6:]
    assert tail == ["Linear", "ReLU", "Dropout", "Linear", "Dropout", "Linear"], "no activation between the last two"
    wide = make_network("wrn32-4", 10, 32)
    assert wide.get_submodule("bn1").momentum == 0.9  # type: ignore[comparison-overlap]
    strides = [m.stride for m in wide.get_submodule("stages.1.0").children() if isinstance(m, nn.Conv2d)]
    assert strides == [(1, 1), (2, 2), (2, 2)], "the second convolution has the stride"
    assert set(EXITS) == set(NETWORKS)


def test_option_a_has_no_parameters_in_its_shortcuts() -> None:
    a, b = ResNet(56, 10), ResNet(56, 10, projected=True)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (a, b)]
    assert sizes == [853018, 855770]
    x = torch.randn(2, 16, 8, 8)
    block = a.layer2[0].eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        out = block(x)
    assert torch.equal(out[:, 8:24], torch.relu(x[:, :, ::2, ::2])), "every second pixel, zero channels on both sides"
    assert not bool(out[:, :8].any())
    assert not bool(out[:, 24:].any())


def test_a_network_that_is_none_says_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"wrn32-4"):
        make_network("wrn28-10", 10, 32)
