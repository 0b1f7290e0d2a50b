"""Small nasty networks: every way in which a backbone can make cutting it hard. Each answers `classes` classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallowdeep.cuts import plan
from shallowdeep.inputs import Inputs
from shallowdeep.types import Plan

CLASSES = 5


class Residual(nn.Module):
    """Residual blocks with BatchNorm, in-place relu and an in-place addition."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(self.Block(8) for _ in range(4)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu_()).mean((2, 3)))


class DenseSkip(nn.Module):
    """A tensor of the second layer is read again near the end: nothing in between is a cut point."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))])
        self.join = nn.Conv2d(16, 8, 1)
        self.after = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[1](F.relu(self.layers[0](x))))
        early = x
        for layer in self.layers[2:5]:
            x = F.relu(layer(x))
        x = F.relu(self.join(torch.cat([x, early], 1)))
        x = F.relu(self.after(F.relu(self.layers[5](x))))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One block applied four times: four cut points with one module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class BranchAndJoin(nn.Module):
    """Two branches of the same input joined late, then a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)
        self.trunk = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(self.trunk(x).mean((2, 3)))


class MaskedTokens(nn.Module):
    """Token ids and a mask in a dict; the answer is a dict, too. Padding must not change an answer."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(1))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(self.Layer(16) for _ in range(4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return {"logits": self.head(x[:, 0])}


class DropoutNorm(nn.Module):
    """Dropout and BatchNorm: train differs from eval."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in (3 * 8 * 8, 32, 32):
            layers += [nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ControlFlow(nn.Module):
    """A branch on data: it cannot be exported, so module outputs are tried."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual.Block(8) for _ in range(3)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.detach().abs().max()) > 1e6:
            x = x / 1e6
        return self.head(self.blocks(x).mean((2, 3)))


class BatchLength(nn.Module):
    """Uses `len()` of the batch inside; also takes and returns tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.head = nn.Linear(8 * 4, CLASSES)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x * scale[:, None, None, None]
        for layer in self.layers:
            x = F.relu(layer(x))
        pooled = F.adaptive_avg_pool2d(x, 2)
        return self.head(pooled.reshape(len(pooled), -1)), pooled


class ChannelsLast(nn.Module):
    """Maps as [B, H, W, C], as Swin keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU()) for _ in range(5))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean((1, 2)))


class Functional(nn.Module):
    """All work at the top level, weights shared by functions: cut points between functions of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.1)
        self.head = nn.Parameter(torch.randn(8, CLASSES) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.stem, padding=1).add(0.1)
        for _ in range(3):
            x = torch.conv2d(x, self.weight, padding=1).add(0.1).relu()
        return x.mean((2, 3)) @ self.head


def images(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def token_batch(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 50, (rows, 10), generator=generator)
    length = torch.randint(3, 11, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(10) < length).to(torch.int64)}


def scaled_images(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return images(rows, dtype), torch.linspace(0.5, 2.0, rows, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Nasty:
    """A zoo member: how to build it, what it eats, and how many cut points it has at least."""

    build: Callable[[], nn.Module]
    batch: Callable[..., Inputs]
    least_cuts: int
    via: str = "export"

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        return model.eval()


ZOO = {
    "residual": Nasty(Residual, images, 4),
    "dense_skip": Nasty(DenseSkip, images, 3),
    "shared": Nasty(Shared, images, 4),
    "branch_and_join": Nasty(BranchAndJoin, images, 3),
    "masked_tokens": Nasty(MaskedTokens, token_batch, 4),
    "dropout_norm": Nasty(DropoutNorm, images, 2),
    "control_flow": Nasty(ControlFlow, images, 3, via="modules"),
    "batch_length": Nasty(BatchLength, scaled_images, 3, via="modules"),
    "channels_last": Nasty(ChannelsLast, images, 4),
    "functional": Nasty(Functional, images, 3),
}


@cache
def planned(name: str, classifier: Literal["strong", "paper"] = "strong") -> Plan:
    """The plan of a zoo member, made once for all tests."""
    return plan(ZOO[name].make(), ZOO[name].batch(2), classifier=classifier)
