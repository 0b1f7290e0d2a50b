"""Where each exit looked: Grad-CAM of any exit of any network, maps and tokens alike; needs the extra ``explain``.

It refuses to draw. The heat is captum's (arXiv 1610.02391); this room only leads captum to the tensor at a cut point.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallowdeep.classifiers import Said
from shallowdeep.graph import evaluating
from shallowdeep.inputs import Inputs, as_inputs, call, each, logits_of, mask_of
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.taps import listening, tapped
from shallowdeep.types import CutError, CutPoint, MissingExtra, Port


def grad_cam(sdn: ShallowDeepNetwork, inputs: Inputs, exit: int, classes_B: Tensor | None = None) -> Tensor:
    """Heat [B, H, W] (maps) or [B, T] (tokens) at exit ``exit``: how much each place speaks for a class, 0 or more.

    ``classes_B`` are the classes asked about; default: what the exit answers. An IC is asked at its own cut point, the
    backbone's own answer (the last exit) at the last module whose output still has places. The SDN runs in eval mode
    and is not changed. Raises ``CutError`` where no tensor with places is, ``MissingExtra`` without captum.
    """
    layer_grad_cam = _captum()
    inputs = each(as_inputs(inputs), lambda tensor: tensor.to(next(sdn.parameters()).device))
    exit = range(sdn.num_exits)[exit]
    with evaluating(sdn):
        looking = _Looking(sdn, inputs, exit)
        if classes_B is None:
            classes_B = looking().argmax(1)
        with torch.enable_grad():
            # captum wants something to differentiate by; the real inputs may be bytes or words.
            start = torch.zeros(len(classes_B), 1, device=classes_B.device)
            heat: Tensor = layer_grad_cam(looking, looking.look).attribute(
                start, target=classes_B.to(start.device), relu_attributions=True
            )
    return heat.detach().squeeze(1)


def enlarged(heat_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The heat [B, *size] by bilinear interpolation, each picture scaled from its least to its greatest value to 0..1
    (an even heat gives zeros).
    """
    big = F.interpolate(heat_BHW.unsqueeze(1).float(), size, mode="bilinear", align_corners=False).squeeze(1)
    above = big - big.amin((1, 2), keepdim=True)
    most = above.amax((1, 2), keepdim=True)
    return above / most.where(most > 0, 1.0)


class _Looking(nn.Module):
    """One exit's logits for fixed inputs, with the tensor it looks at passing through ``look``, channels first."""

    def __init__(self, sdn: ShallowDeepNetwork, inputs: Inputs, exit: int) -> None:
        super().__init__()
        self.sdn, self.inputs, self.exit = sdn, inputs, exit
        self.look = nn.Identity()
        self.cut = _place(sdn, inputs, exit)
        self.said: Said | None = None
        if 0 < exit < sdn.num_exits - 1:  # what the exits before say is given, not explained
            reduced, _ = sdn.reduce(inputs)
            for position in range(exit):
                self.said = Said.of(*sdn.classifier(position).classify(reduced[position], self.said))

    def forward(self, *_start: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def visit(_: int, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()
            last = self.cut.channel_dim == -1
            # Copies: the backbone may write into what it goes on with.
            looked = self.look((x.movedim(-1, 1) if last else x).clone())
            seen.append(looked.movedim(1, -1) if last else looked)
            return seen[0].clone()

        with tapped(self.sdn.backbone, [self.cut], visit):
            full = logits_of(call(self.sdn.backbone, self.inputs))
        if self.exit == self.sdn.num_exits - 1:
            return full
        mask = mask_of(self.inputs, self.cut.mask)
        logits: Tensor = self.sdn.classifier(self.exit)(seen[0], self.said, mask)[0]
        return logits


def _place(sdn: ShallowDeepNetwork, inputs: Inputs, exit: int) -> CutPoint:
    """Where ``exit`` looks: its own cut point, or for the backbone's own answer the last output that has places."""
    if exit < sdn.num_exits - 1:
        cut = sdn.plan.cuts[exit]
        if cut.layout == "vector":
            raise CutError(f"Exit {cut.name!r} reads a vector, which has no places to look at.")
        return cut
    mapped = [cut for cut in sdn.plan.candidates if cut.layout != "vector"]
    if not mapped:
        raise CutError(f"No cut point of {sdn.plan.model} has places to look at; Grad-CAM needs maps or tokens.")
    # Plans offer no exit just before the end, but that is where the last map is.
    deepest = mapped[-1]

    def hear(path: str, port: Port, call: int, value: object) -> None:
        nonlocal deepest
        if port == "out" and isinstance(value, Tensor) and value.ndim == len(mapped[-1].shape) + 1:
            found = dataclasses.replace(
                mapped[-1], module=path, call=call, port="out", leaf=0, function="", shape=tuple(value.shape[1:])
            )
            places = found.shape[1:] if found.channel_dim == 1 else found.shape[:-1]
            deepest = found if value.is_floating_point() and math.prod(places) > 1 else deepest

    with listening(sdn.backbone, [name for name, _ in sdn.backbone.named_modules() if name], hear):
        call(sdn.backbone, inputs)
    return deepest


def _captum() -> Any:
    try:
        from captum.attr import LayerGradCam
    except (ImportError, RuntimeError) as error:
        raise MissingExtra("Grad-CAM needs the extra explain: pip install 'shallowdeep[explain]'.") from error
    return LayerGradCam
