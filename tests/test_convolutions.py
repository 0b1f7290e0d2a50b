"""Quick convolutions: the same numbers and gradients by another way, and only where they are asked for."""

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from shallowdeep.convolutions import QuickConvolutions, _AsProduct
from shallowdeep.joint import train_backbone

LAYERS = {
    "small, with bias": (nn.Conv2d(6, 8, 3, padding=1), (4, 4)),
    "small, one by one": (nn.Conv2d(6, 8, 1, bias=False), (2, 3)),
    "small, wide kernel": (nn.Conv2d(6, 8, (1, 5), padding=(0, 2)), (4, 3)),
    "small, strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 4)),
    "small, dilated": (nn.Conv2d(6, 8, 3, padding=1, dilation=2), (4, 4)),
    "small, reflected": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (4, 4)),
    "large": (nn.Conv2d(6, 8, 3, padding="same"), (9, 9)),
    "depthwise, strided": (nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), (9, 9)),
    "grouped": (nn.Conv2d(6, 12, 3, padding=1, groups=3), (4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_float32_within_bf16(name):
    layer, size = LAYERS[name]
    x = torch.randn(5, 6, *size, generator=torch.Generator().manual_seed(0))

    def passed(*, quick):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", enabled=quick), QuickConvolutions():
            y = layer(inputs)
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y.float() * weight).sum().backward()
        assert y.dtype == (torch.bfloat16 if quick else torch.float32)
        return [y.detach().float(), inputs.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    for found, exact in zip(passed(quick=True), passed(quick=False), strict=True):
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_gradient_of_the_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_AsProduct.apply, (x, weight))
    torch.testing.assert_close(_AsProduct.apply(x, weight), F.conv2d(x, weight, padding=(1, 0)))


@pytest.mark.parametrize("x", [torch.randn(6, 4, 4), torch.randn(2, 6, 4, 4, dtype=torch.float64)])
def test_leaves_others_alone(x):
    layer = LAYERS["small, with bias"][0].to(x.dtype)
    with torch.autocast("cpu"):
        plain = layer(x)
        with QuickConvolutions():
            assert torch.equal(layer(x), plain)
    layer.float()


def test_training_in_bf16_on_a_cpu_uses_them():
    torch.manual_seed(0)
    small = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model = nn.Sequential(small, nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    ways = []
    small.register_forward_hook(lambda module, inputs, y: ways.append(y.grad_fn.name()))
    rows = torch.randn(64, 3, 4, 4), torch.arange(64) % 2
    start = small.weight.detach().clone()
    for precision in ("bf16-mixed", "32-true"):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        train_backbone(model, rows, num_classes=2, epochs=1, fabric=fabric)
    assert "_AsProductBackward" in ways[0]
    assert "_AsProductBackward" not in ways[-1]
    assert not torch.equal(small.weight, start)
