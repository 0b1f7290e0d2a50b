"""Grad-CAM at any exit: the textbook's formula, captum on the module itself, tokens, and what has no places."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

import shallowdeep as sd
from nets import ZOO, planned
from shallowdeep.explain import enlarged, grad_cam
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import CutError


def made(name: str, classifier: Literal["strong", "paper"] = "strong") -> ShallowDeepNetwork:
    torch.manual_seed(3)
    return sd.attach(ZOO[name].make(), planned(name, classifier)).eval()


def by_formula(sdn: ShallowDeepNetwork, x: Tensor, exit: int, classes_B: Tensor) -> Tensor:
    """Channels weighed by the mean gradient of the class's logit, summed, negatives dropped."""
    kept: list[Tensor] = []
    cut = sdn.plan.cuts[exit]
    module = sdn.backbone.get_submodule(cut.module)
    handle = module.register_forward_hook(lambda _, __, out: kept.append(out))
    logits = sdn(x)[exit]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, classes_B[:, None]).sum(), kept[0])
    return (kept[0] * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach()


def test_it_is_the_papers_formula_at_every_ic() -> None:
    sdn, x = made("residual", "paper"), ZOO["residual"].batch(4)
    assert isinstance(x, Tensor)
    before = {name: value.clone() for name, value in sdn.state_dict().items()}
    checked = 0
    for exit, cut in enumerate(sdn.plan.cuts):
        if cut.port != "out":
            continue
        classes = torch.tensor([0, 1, 2, 3])
        torch.testing.assert_close(grad_cam(sdn, x, exit, classes), by_formula(sdn, x, exit, classes))
        checked += 1
    assert checked
    after = sdn.state_dict()
    assert all(torch.equal(before[name].nan_to_num(9.0), after[name].nan_to_num(9.0)) for name in before)
    assert all(parameter.grad is None for parameter in sdn.parameters()), "no gradient is left behind"


def test_the_last_exit_is_captum_on_the_deepest_map() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 8, 3, 1, 1), nn.ReLU()) for c in (3, 8, 8, 8)))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 3, 8, 8)
    sdn = sd.attach(net, sd.plan(net, x, at=(0.5,)))
    classes = net(x).argmax(1)
    expected = LayerGradCam(net, net.body[3]).attribute(x, target=classes, relu_attributions=True)
    assert float(expected.detach().abs().sum()) > 0
    torch.testing.assert_close(grad_cam(sdn, x, -1), expected.squeeze(1).detach())


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("residual",)])
def test_any_network_and_any_exit(name: str) -> None:
    sdn, inputs = made(name), ZOO[name].batch(3)
    if all(cut.layout == "vector" for cut in sdn.plan.candidates):
        with pytest.raises(CutError, match="maps or tokens"):
            grad_cam(sdn, inputs, -1)
        return
    for exit in range(sdn.num_exits):
        cut = sdn.plan.cuts[exit] if exit < sdn.num_exits - 1 else None
        if cut is not None and cut.layout == "vector":
            with pytest.raises(CutError, match="vector"):
                grad_cam(sdn, inputs, exit)
            continue
        heat = grad_cam(sdn, inputs, exit)
        assert heat.shape[0] == 3
        assert bool((heat >= 0).all()) and bool(torch.isfinite(heat).all())  # noqa: PT018
        if cut is not None:
            assert heat.shape[1:] == (cut.shape[1:] if cut.channel_dim == 1 else cut.shape[:-1])


def test_bytes_can_be_explained() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ZOO["residual"].make()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float() / 255)  # type: ignore[no-any-return]

    x = torch.randint(0, 256, ZOO["residual"].batch(2).shape, dtype=torch.uint8)  # type: ignore[union-attr]
    net = Bytes().eval()
    sdn = sd.attach(net, sd.plan(net, x))
    assert grad_cam(sdn, x, 0).shape[0] == 2


def test_a_network_of_vectors_has_no_places() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))
    sdn = sd.attach(net, sd.plan(net, torch.zeros(2, 8), at=(0.5,)))
    with pytest.raises(CutError, match="maps or tokens"):
        grad_cam(sdn, torch.zeros(2, 8), -1)


def test_enlarged_heat_is_scaled_per_picture() -> None:
    heat = torch.zeros(2, 2, 2)
    heat[0, 0, 0] = 7.0
    big = enlarged(heat, (8, 8))
    assert big.shape == (2, 8, 8)
    assert float(big[0].max()) == 1.0
    assert float(big[1].abs().max()) == 0.0
    assert float(big[0, 0, 0]) > float(big[0, 7, 7])
