"""A backbone with its internal classifiers, as one ordinary module; and the files that hold what was added.

It refuses to know policies and training. The backbone is shared with the user, never changed, and its own code always
runs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.classifiers import Factory, InternalClassifier, Said, make_classifier
from shallowdeep.files import FormatError, read_json, read_tensors, replacing, write_tensors, write_text
from shallowdeep.graph import evaluating
from shallowdeep.inputs import Inputs, as_inputs, call, example_of, logits_of, mask_of, signature_of
from shallowdeep.taps import Visitor, check_audible, tapped
from shallowdeep.types import (
    BackboneMismatch,
    ClassifierSpec,
    ConfusionReference,
    CutError,
    CutPoint,
    DataError,
    InputSignature,
    Plan,
    table,
)

FORMAT = 1


class ShallowDeepNetwork(nn.Module):
    """A backbone that answers at every exit: ``sdn(inputs)`` gives logits [E, B, C], the backbone's own last.

    ``inputs`` is one tensor, tuple or dict, as the backbone takes it. ``class_names`` and ``preprocessing`` (JSON-able)
    travel with ``save``; ``trained_hashes`` are the hashes of the rows its ICs were trained on.
    """

    confusion_mean_EE: Tensor
    confusion_covariance_EEE: Tensor

    def __init__(self, backbone: nn.Module, plan: Plan, classifiers: Sequence[InternalClassifier]) -> None:
        super().__init__()
        self.backbone = backbone
        self.plan = plan
        self.classifiers = nn.ModuleList(classifiers)
        self.class_names: tuple[str, ...] = ()
        self.preprocessing: dict[str, Any] = {}
        self.trained_hashes = torch.zeros(0, dtype=torch.int64)
        exits = len(plan.cuts) + 1
        device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        unknown = torch.full((exits, exits, exits), float("nan"), device=device)
        self.register_buffer("confusion_mean_EE", unknown[0].clone())
        self.register_buffer("confusion_covariance_EEE", unknown)

    @property
    def num_exits(self) -> int:
        """E, the backbone's own answer included."""
        return len(self.plan.cuts) + 1

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [E, B, C]; the last exit is what the backbone itself answers, bit for bit in eval mode."""
        answers: Tensor = self.answers(inputs)
        return answers

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled pass would keep its first call's taps
    def answers(self, inputs: Inputs, *, rescale_gradients: bool = False, linked: bool = False) -> Tensor:
        """As ``forward``; with ``rescale_gradients``, on the way back an exit and all behind it weigh the same.

        At a cut with k exits ahead the own IC's gradient counts 1/(k + 1) and what comes from behind k/(k + 1)
        (gradient equilibrium, arXiv 1908.06294). With ``linked``, gradients also flow back through what an exit passes
        on to the next IC: the whole truth, where training keeps ICs apart.
        """
        answers: list[tuple[Tensor, Tensor | None]] = []
        said: Said | None = None
        inputs = as_inputs(inputs)

        def visit(position: int, x: Tensor) -> None:
            nonlocal said
            ahead = self.num_exits - 1 - position
            ready = x
            if torch.is_grad_enabled() and x.requires_grad:
                ready = x.clone()  # the backbone may write into x
                if rescale_gradients:
                    ready = _scale_gradient(ready, 1 / ahead)
                    x.register_hook(lambda gradient: gradient * (ahead / (ahead + 1)))
            answers.append(self.classifier(position)(ready, said, self._mask(position, inputs)))
            said = Said.of(*answers[-1], linked=linked)

        full = self._pass(inputs, visit, answers)
        return torch.stack([*(logits.to(full.dtype) for logits, _ in answers), full])

    def reduce(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """Every IC's reduced features [B, V, D] and the backbone's logits [B, C]: what IC-only training caches."""
        reduced: list[Tensor] = []
        inputs = as_inputs(inputs)

        def visit(position: int, x: Tensor) -> None:
            features = self.classifier(position).reduce(x, self._mask(position, inputs))
            # Without pooling this is a view of x, which the backbone may overwrite in its next step.
            reduced.append(features.clone() if features.untyped_storage() is x.untyped_storage() else features)

        full = self._pass(inputs, visit, reduced)
        return reduced, full

    def classify(self, reduced: Sequence[Tensor], absent: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Logits [B, C] of every IC from reduced features; ``absent[e]`` [B] marks rows whose exit before e is
        silent.
        """
        answers: list[Tensor] = []
        said: Said | None = None
        for position, features in enumerate(reduced):
            silent = absent[position].unsqueeze(1) if absent is not None else None
            if said is not None and silent is not None:
                said = said.each(functools.partial(torch.masked_fill, mask=silent, value=0.0))
            logits, hidden = self.classifier(position).classify(features, said)
            answers.append(logits)
            said = Said.of(logits, hidden)
        return answers

    def classifier(self, position: int) -> InternalClassifier:
        """The IC of exit ``position``."""
        classifier = self.classifiers[position]
        assert isinstance(classifier, InternalClassifier)
        return classifier

    def _mask(self, position: int, inputs: Inputs) -> Tensor | None:
        return mask_of(inputs, self.plan.cuts[position].mask)

    def _pass(self, inputs: Inputs, visit: Visitor, heard: Sequence[object]) -> Tensor:
        try:
            with tapped(self.backbone, self.plan.cuts, visit):
                full = logits_of(call(self.backbone, inputs))
        except RuntimeError as error:
            if (found := signature_of(inputs)) == self.plan.inputs:
                raise
            raise DataError(
                f"{self.plan.model} is planned for {self.plan.inputs} and fails for {found}: {error}"
            ) from error
        if len(heard) != len(self.plan.cuts):
            passed = len(heard)
            raise CutError(f"The network took another path: it passed {passed} of {len(self.plan.cuts)} cut points.")
        return full

    @property
    def confusion_reference(self) -> ConfusionReference | None:
        """The moments that ``fit_confusion`` stored, on the CPU, or None before."""
        if bool(self.confusion_mean_EE.isnan().any()):
            return None
        return ConfusionReference(
            mean_EE=self.confusion_mean_EE.detach().cpu().double(),
            covariance_EEE=self.confusion_covariance_EEE.detach().cpu().double(),
        )

    def set_confusion_reference(self, reference: ConfusionReference) -> None:
        """Store the moments that standardise confusion; collect and engines use them from now on."""
        # In place, so that engines notice; a trace with a second look brings moments of one exit more.
        self.confusion_mean_EE.resize_as_(reference.mean_EE).copy_(reference.mean_EE)
        self.confusion_covariance_EEE.resize_as_(reference.covariance_EEE).copy_(reference.covariance_EEE)

    def __str__(self) -> str:
        params = sum(p.numel() for p in self.backbone.parameters())
        rows = [("exit", "classifier", "IC macs", "of backbone", "IC params", "of backbone")]
        for cut, spec in zip(self.plan.cuts, self.plan.classifiers, strict=True):
            shares = f"{spec.macs / self.plan.total_macs:.2%}", f"{spec.params / max(params, 1):.2%}"
            rows.append((cut.name, spec.kind, f"{spec.macs:,}", shares[0], f"{spec.params:,}", shares[1]))
        macs = sum(spec.macs for spec in self.plan.classifiers)
        own = sum(spec.params for spec in self.plan.classifiers)
        rows.append(
            (
                "all ICs",
                "",
                f"{macs:,}",
                f"{macs / self.plan.total_macs:.2%}",
                f"{own:,}",
                f"{own / max(params, 1):.2%}",
            )
        )
        return f"Shallow-deep network of {self.plan.model}, {self.num_exits} exits\n" + table(rows)


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``scale`` on the way back."""
    return x.detach() + (x - x.detach()) * scale


def attach(model: nn.Module, plan: Plan, *, num_classes: int | None = None) -> ShallowDeepNetwork:
    """An SDN over ``model`` with fresh ICs at the plan's cut points; ``model`` is shared and not changed.

    ICs are initialised from torch's global generator, on the backbone's device and dtype. Raises ``CutError`` when
    the plan does not fit the model and ``DataError`` when it answers another number of classes than ``num_classes``.

    >>> import torch, shallowdeep as sd
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)), torch.nn.Linear(8, 3))
    >>> sdn = sd.attach(net, sd.plan(net, torch.zeros(1, 8), at=(0.25, 0.5)))
    >>> sdn(torch.zeros(5, 8)).shape
    torch.Size([3, 5, 3])
    """
    if num_classes is not None and num_classes != plan.num_classes:
        raise DataError(f"num_classes={num_classes}, but {plan.model} answers {plan.num_classes} classes.")
    check_audible(model)
    _check_fits(model, plan)
    some = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    classifiers = [make_classifier(spec, plan.factory).to(some.device, some.dtype) for spec in plan.classifiers]
    return ShallowDeepNetwork(model, plan, classifiers)


def detach(sdn: ShallowDeepNetwork) -> nn.Module:
    """The backbone itself, the very object that ``attach`` was given."""
    return sdn.backbone


def check_attached(sdn: object) -> None:
    """Raises ``TypeError`` for anything but a ``ShallowDeepNetwork``, a network without its ICs above all."""
    if not isinstance(sdn, ShallowDeepNetwork):
        raise TypeError(
            f"{type(sdn).__name__} has no internal classifiers: give what attach(model, plan(model, inputs)) returns."
        )


def _check_fits(model: nn.Module, plan: Plan) -> None:
    if not plan.cuts:
        raise CutError("The plan has no exits; choose some with `plan(..., at=...)`.")
    shapes: list[tuple[int, ...]] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model), tapped(model, plan.cuts, lambda _, x: shapes.append(tuple(x.shape[1:]))):
            logits = logits_of(call(model, example_of(plan.inputs, 2, device)))
    except (RuntimeError, TypeError, IndexError) as error:
        taken = f"{plan.inputs.kind} of rows {plan.inputs.shapes}"
        raise CutError(
            f"The plan was made for another network: {type(model).__name__} does not take a {taken} ({error})."
        ) from error
    if shapes != [cut.shape for cut in plan.cuts] or logits.shape[1] != plan.num_classes:
        raise CutError(
            f"The plan was made for another network: it expects {[cut.shape for cut in plan.cuts]} and "
            f"{plan.num_classes} classes, {type(model).__name__} gives {shapes} and {logits.shape[1]}."
        )


# ---------------------------------------------------------------- files


def fingerprint(model: nn.Module) -> str:
    """Sha256 over names, shapes, dtypes and bits of every parameter and buffer of ``model``."""
    return _digest({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def float_type(model: nn.Module) -> torch.dtype:
    """The type of number ``model`` computes with: that of its first floating parameter, float32 without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def weights_hash(sdn: ShallowDeepNetwork) -> str:
    """What tells these weights of backbone and ICs from others, in 16 characters; nothing else that an SDN keeps."""
    parts = (fingerprint(sdn.backbone), fingerprint(sdn.classifiers))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(sdn: ShallowDeepNetwork, folder: str | os.PathLike[str]) -> None:
    """Write what was added to the backbone into ``folder``: ``sdn.safetensors`` (ICs, confusion moments, hashes of the
    training rows) and ``sdn.json`` (plan, preprocessing, class names, fingerprint of the backbone, format version).

    The backbone's own weights are not written. Both files are replaced together; ``sdn.json`` names the weights' hash,
    so that a pair of different ages is found when loading.
    """
    tensors = {f"classifiers.{name}": value for name, value in sdn.classifiers.state_dict().items()}
    tensors |= {"confusion_mean_EE": sdn.confusion_mean_EE, "confusion_covariance_EEE": sdn.confusion_covariance_EEE}
    tensors["trained_hashes"] = sdn.trained_hashes
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint(sdn.backbone),
        "weights": _digest(tensors),
        "class_names": list(sdn.class_names),
        "preprocessing": sdn.preprocessing,
        "plan": plan_to_json(sdn.plan),
    }
    path, text = Path(folder), json.dumps(about, indent=1)
    with replacing(path / "sdn.safetensors", path / "sdn.json") as (weights, described):
        write_tensors(weights, tensors, {"shallowdeep_sdn": str(FORMAT)})
        write_text(described, text)


def load(folder: str | os.PathLike[str], model: nn.Module, *, classifier: Factory | None = None) -> ShallowDeepNetwork:
    """The SDN that ``save`` wrote, over ``model``, which must have the very weights it was made with.

    ``classifier`` is the factory of a plan with the user's own ICs. Raises ``BackboneMismatch`` for another network
    and ``FormatError`` for a damaged folder or a newer format; ``model`` is not changed.
    """
    path, about = Path(folder), read_about(folder)
    if about["fingerprint"] != fingerprint(model):
        raise BackboneMismatch(
            f"{path} was made for a {about['plan']['model']} with other weights than this {type(model).__name__}; "
            "load the weights it was trained with."
        )
    tensors, _ = read_tensors(path / "sdn.safetensors")
    if _digest(tensors) != about["weights"]:
        raise FormatError(f"{path}: sdn.json and sdn.safetensors are not of one save; save the SDN again.")
    plan = dataclasses.replace(plan_from_json(about["plan"]), factory=classifier)
    sdn = attach(model, plan)
    weights = {k.removeprefix("classifiers."): v for k, v in tensors.items() if k.startswith("classifiers.")}
    try:
        sdn.classifiers.load_state_dict(weights)
    except RuntimeError:
        raise FormatError(f"{path / 'sdn.safetensors'} does not hold the classifiers that sdn.json plans.") from None
    mean_EE, covariance_EEE = tensors["confusion_mean_EE"], tensors["confusion_covariance_EEE"]
    sdn.set_confusion_reference(ConfusionReference(mean_EE=mean_EE, covariance_EEE=covariance_EEE))
    sdn.trained_hashes = tensors["trained_hashes"]
    sdn.class_names, sdn.preprocessing = tuple(about["class_names"]), dict(about["preprocessing"])
    return sdn


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """``plan`` as plain JSON values; a factory of the user's own is left out."""
    about = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "factory"}
    about["inputs"] = dataclasses.asdict(plan.inputs)
    for name in ("cuts", "classifiers", "candidates"):
        about[name] = [dataclasses.asdict(item) for item in about[name]]
    return dict(json.loads(json.dumps(about)))


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``sdn.json`` in ``folder`` says. Raises ``FormatError``."""
    path = Path(folder)
    about = read_json(path / "sdn.json")
    written = {"format", "fingerprint", "weights", "class_names", "preprocessing", "plan"}
    if not isinstance(about, dict) or not written <= about.keys() or not isinstance(about["format"], int):
        raise FormatError(f"{path / 'sdn.json'} does not describe an SDN; make one with `sdn train`.")
    if about["format"] > FORMAT:
        raise FormatError(f"{path} has SDN format {about['format']}; this version reads up to {FORMAT}: upgrade.")
    return about


def plan_from_json(about: Mapping[str, Any]) -> Plan:
    """The plan that ``plan_to_json`` wrote. Raises ``FormatError``."""
    try:
        values = dict(about)
        values["inputs"] = InputSignature(**_tuples(about["inputs"]))
        for name, kind in (("cuts", CutPoint), ("classifiers", ClassifierSpec), ("candidates", CutPoint)):
            values[name] = tuple(kind(**_tuples(item)) for item in about[name])
        return Plan(**values)
    except (KeyError, TypeError) as error:
        raise FormatError(f"Not a plan: {error}.") from None


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    def deep(value: Any) -> Any:
        return tuple(deep(v) for v in value) if isinstance(value, list) else value

    return {name: deep(value) for name, value in values.items()}
