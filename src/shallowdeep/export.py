"""Deployable artefacts: network, exits and policy as files that run without this library and without PyTorch.

It refuses to leave behind what does not answer as the engine does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shallowdeep.costs import Exits, exits_of
from shallowdeep.files import FormatError, read_json
from shallowdeep.graph import silence, told
from shallowdeep.inputs import Inputs, as_inputs, example_of, in_order, num_rows, signature_of, take, tensors
from shallowdeep.network import ShallowDeepNetwork, fingerprint, float_type, plan_to_json, weights_hash
from shallowdeep.onnx import onnx_program
from shallowdeep.policies import Policy, finite_rows
from shallowdeep.progress import steps as shown
from shallowdeep.progress import waiting
from shallowdeep.runtime.engine import Engine, why_void
from shallowdeep.spelling import to_json
from shallowdeep.steps import Step, chain, export_step, make_steps, named, remembered
from shallowdeep.trajectory import LEAST, Alarm
from shallowdeep.types import Answer, DataError, ExportError, MissingExtra
from shallowdeep.views import Look, SecondLook, check_view, second_look_of
from shallowdeep.walking import Rule, inverse

try:
    from onnx import helper

    from shallowdeep.host import EarlyExits, manifest_hash
    from shallowdeep.nested import answering_model, nested_model
except ImportError as error:
    raise MissingExtra(f"Exports need {error.name}: pip install 'shallowdeep[export]'.") from error

FORMAT = 3
SAID = ("label", "probabilities", "exit", "confidence", "confusion")
"""What every artefact says of a row, beside the alarm."""
DIFFER = 0.001
"""Share of rows whose exit may differ from PyTorch's, as scores within rounding of a threshold do: none of 999."""
FAR = 0.001
"""How far numbers may lie from PyTorch's, and two classes from each other that rounding puts in another order."""
IN_A_BATCH = "decided rows keep their answer and are not computed on"
"""What the single file does with rows that are decided before others."""
TRIED = 16
"""Places of an input where a NaN is tried, one at a time."""
CHECKED = (1, 2, 7)
"""Batch sizes at which an artefact is compared, beside all rows at once."""


def export_folder(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    folder: str | os.PathLike[str],
    inputs: Inputs,
    *,
    second_look: Look = None,
    alarm: Alarm | None = None,
) -> None:
    """Write ``folder``: an ONNX file a step, ``manifest.json``, and ``host.py``, which runs them with NumPy and ONNX
    Runtime alone. With an ``alarm`` its answers say how probably they are wrong.

    ``inputs`` are real rows on which the artefact is compared with the engine before it is put in place; an earlier
    export there is replaced whole. Raises ``ExportError`` where answers differ, where ``folder`` holds something else,
    and for networks that cannot be exported, ``BackendError`` for a ``second_look`` (as in ``collect``) whose view
    cannot be part of a graph.
    """
    with _put_in_place(Path(folder)) as fresh:
        what = _what(sdn, policy, second_look, alarm)
        inputs = _rows(what, inputs)
        steps, examples, state = _steps(what)
        written, answers = [], ("logits", *SAID, *["alarm"] * (alarm is not None))
        spoilt = {name: sort for name, sort in _spoilt(what, steps, inputs).items() if name in steps[0].takes}
        for step, given in shown(zip(steps, examples, strict=True), "export", len(steps)):
            later = {name for one in steps[step.place + 1 :] for name in one.takes}
            model, gives = answering_model(step, onnx_program(step, given), later, answers, spoilt)
            written.append({"exit": step.exit, **_saved(model, fresh / f"step{step.place}.onnx", gives)})
        facts = _loop_facts(steps, written, state) | {"answers": _arrays(model, answers)}
        _finish(what, fresh, "folder", facts, inputs)


def export_programs(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    folder: str | os.PathLike[str],
    inputs: Inputs,
    *,
    second_look: Look = None,
    alarm: Alarm | None = None,
) -> None:
    """Write ``folder``: a ``torch.export`` program (``.pt2``) a step and ``manifest.json``, for runtimes of others.

    Every program is read back and compared with its step on ``inputs``, at full depth. Errors as in ``export_folder``.
    """
    with _put_in_place(Path(folder)) as fresh:
        what = _what(sdn, policy, second_look, alarm)
        inputs = _rows(what, inputs)
        steps, examples, state = _steps(what)
        written = []
        for step, given in shown(zip(steps, examples, strict=True), "export", len(steps)):
            file = fresh / f"step{step.place}.pt2"
            with silence():
                torch.export.save(export_step(step, given), file)
            passed = {"takes": step.takes, "gives": step.gives}
            written.append({"exit": step.exit, **_known(file), **passed, **_formulas(what, step)})
        _write(fresh, "programs", _about(what, "torch") | _loop_facts(steps, written, state))
        _compare_programs(what, steps, fresh, inputs)


def export_file(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    folder: str | os.PathLike[str],
    inputs: Inputs,
    *,
    second_look: Look = None,
    alarm: Alarm | None = None,
) -> None:
    """Write ``folder``: ``model.onnx``, one graph with nested ``If`` that skips by itself, ``manifest.json``, and
    ``host.py``, which checks its hash and what it is given.

    Its outputs are ``label``, ``probabilities``, ``exit``, ``confidence``, ``confusion`` and, where one is given,
    ``alarm``. Rows leave inside the graph: who is answered is not computed on. ``inputs`` and errors as in
    ``export_folder``.
    """
    with _put_in_place(Path(folder)) as fresh:
        what = _what(sdn, policy, second_look, alarm)
        inputs = _rows(what, inputs)
        steps, examples, state = _steps(what)
        pairs = shown(zip(steps, examples, strict=True), "export", len(steps))
        models = [onnx_program(step, given) for step, given in pairs]
        answers = (*SAID, *["alarm"] * (alarm is not None))
        first = {name: x.numpy() for name, x in state.items()}
        model = nested_model(steps, models, first, answers, _spoilt(what, steps, inputs))
        whole = _saved(model, fresh / "model.onnx", answers)
        facts = {"fresh": {}, "rowless": [], "steps": [whole], "answers": _arrays(model, answers), "batch": IN_A_BATCH}
        _finish(what, fresh, "file", facts, inputs)


class _What(NamedTuple):
    """What is exported."""

    sdn: ShallowDeepNetwork
    policy: Policy
    look: SecondLook | None
    alarm: Alarm | None
    exits: Exits
    rule: Rule


def _what(sdn: ShallowDeepNetwork, policy: Policy, second_look: Look, alarm: Alarm | None) -> _What:
    """All of it, if it can be exported."""
    if sdn.plan.via != "export":
        raise ExportError(f"{sdn.plan.model} cannot be exported: only its own modules run it.")
    if next(sdn.parameters()).device.type != "cpu":
        raise ExportError("Exports are made on the CPU: call sdn.cpu() first.")
    look = second_look_of(second_look)
    check_view(policy, look)
    exits = exits_of(sdn, look)
    return _What(sdn, policy, look, alarm, exits, exits.rule(policy, alarm))


def _rows(what: _What, inputs: Inputs) -> Inputs:
    """``inputs`` as the network was planned for, enough of them to compare."""
    planned = what.sdn.plan.inputs
    inputs = in_order(as_inputs(inputs), planned.names)
    if signature_of(inputs) != planned:
        raise DataError(f"The export takes {planned}; the rows to compare it on are {signature_of(inputs)}.")
    if num_rows(inputs) < max(CHECKED):
        raise ExportError(f"To compare an export give at least {max(CHECKED)} real rows, found {num_rows(inputs)}.")
    return inputs


def _steps(what: _What) -> tuple[list[Step], list[list[Tensor]], dict[str, Tensor]]:
    """The steps, what each is exported with, and a row of what the policy remembers at first."""
    cpu, signature = torch.device("cpu"), what.sdn.plan.inputs
    example = example_of(signature, 2, cpu)
    rows = named(signature.names, example) | remembered(what.policy, 2, cpu)
    with torch.no_grad(), waiting("cut into steps"):
        steps = make_steps(what.sdn, what.policy, example, what.look, what.alarm)
        examples = [given for _, given, _ in chain(steps, rows)]
    return steps, examples, remembered(what.policy, 1, cpu)


def _spoilt(what: _What, steps: Sequence[Step], inputs: Inputs) -> dict[str, bool]:
    """Float inputs whose NaN leave a row without an answer in PyTorch, and whether one infinity does so, too, wherever
    one NaN does: that of an attention mask does not.
    """
    cpu, names, found = torch.device("cpu"), what.sdn.plan.inputs.names, {}
    row = named(names, take(inputs, slice(0, 1)))

    def lost(name: str, value: float, places: Tensor) -> Tensor:
        """Whether ``value`` at one of ``places`` leaves a row without an answer, each tried in a row of its own."""
        given = {name: x.to(cpu).repeat(len(places), *(1,) * (x.ndim - 1)) for name, x in row.items()}
        given[name].view(len(places), -1).scatter_(1, places, value)
        for _, _, said in chain(steps, given | remembered(what.policy, len(places), cpu)):
            last = said
        return ~finite_rows(last[steps[-1].gives.index(f"logits.{steps[-1].place}")])

    with torch.no_grad():
        for name, x in row.items():
            if not x.is_floating_point() or not bool(lost(name, math.nan, torch.arange(x.numel())[None]).any()):
                continue
            single_P1 = (torch.arange(TRIED) * x.numel() // TRIED)[:, None]
            read_P1 = single_P1[lost(name, math.nan, single_P1)]
            endless = [lost(name, sign * math.inf, read_P1) for sign in (1, -1)] if len(read_P1) else []
            found[name] = bool(endless) and bool(torch.cat(endless).all())
    return found


def _loop_facts(steps: Sequence[Step], written: Sequence[Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a loop over the steps that were ``written`` must know."""
    fresh = {name: {"row": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")} for name, x in state.items()}
    return {"fresh": fresh, "rowless": sorted(steps[0].rowless), "steps": written}


def _arrays(model: Any, answers: Sequence[str]) -> list[dict[str, Any]]:
    """The answers that ``model`` gives last, as a loop must make room for them."""
    found = []
    for name, value in zip(answers, model.graph.output[-len(answers) :], strict=True):
        kind = value.type.tensor_type
        shape = [axis.dim_value for axis in kind.shape.dim][1:]
        found.append({"name": name, "shape": shape, "dtype": helper.tensor_dtype_to_np_dtype(kind.elem_type).name})
    return found


def _saved(model: Any, file: Path, gives: Sequence[str]) -> dict[str, Any]:
    """What a loop must know of ``model`` in ``file``, which is written."""
    file.write_bytes(model.SerializeToString())
    return {**_known(file), "takes": [one.name for one in model.graph.input], "gives": gives}


def _finish(what: _What, fresh: Path, kind: str, facts: Mapping[str, Any], inputs: Inputs) -> None:
    """Put manifest and loop beside the graphs, and compare what it answers."""
    _write(fresh, kind, {**_about(what, "onnxruntime"), **facts})
    shutil.copyfile(Path(__file__).with_name("host.py"), fresh / "host.py")
    _compare(what, lambda: EarlyExits(fresh), inputs)


def _known(file: Path) -> dict[str, Any]:
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _write(folder: Path, kind: str, manifest: Mapping[str, Any]) -> None:
    about = json.loads(json.dumps({"format": FORMAT, "kind": kind, **manifest}))  # as a reader will find it
    text = json.dumps({**about, "sha256": manifest_hash(about)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _about(what: _What, runtime: str) -> dict[str, Any]:
    """What is true of every kind of artefact; of certificates only those that hold on ``runtime``."""
    sdn, facts = what.sdn, to_json(what.policy)
    watched = None if what.alarm is None else what.alarm.to_json()
    for record, written in (
        (what.policy.calibrated_on, facts.get("calibrated_on")),
        (None if what.alarm is None else what.alarm.fitted_on, (watched or {}).get("fitted_on")),
    ):
        if record is None or written is None:
            continue
        del written["hash_N"]
        if why_void(record, sdn, what.policy, look=what.look, backend=runtime, weights=weights_hash(sdn)):
            del written["certificate"]
    signature, costs = sdn.plan.inputs, what.exits.costs(what.rule).tolist()
    leaves = zip(signature.names, signature.shapes, signature.dtypes, strict=True)
    return {
        "model": sdn.plan.model,
        "fingerprint": fingerprint(sdn.backbone),
        "inputs": [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in leaves],
        "precision": str(float_type(sdn)).removeprefix("torch."),
        "num_classes": sdn.plan.num_classes,
        "class_names": sdn.class_names,
        "preprocessing": sdn.preprocessing,
        "exits": [{"name": n, "cost": c} for n, c in zip(what.exits.exit_names, costs, strict=True)],
        "full_exit": what.exits.full_exit,
        "second_look": None if what.look is None else what.look.name,
        "policy": facts,
        "alarm": watched,
        "plan": plan_to_json(sdn.plan),
        "versions": {name: version(name) for name in ("shallowdeep", "torch", "onnx", "onnxruntime")},
    }


def _formulas(what: _What, step: Step) -> dict[str, Any]:
    """What a loop must know to work out confusions and alarms itself."""
    (mean, std), alarm = what.rule.moments[step.exit], what.alarm
    watch = alarm and {"bias": alarm.bias_E[step.exit], "weights": alarm.weights(step.exit), "least": LEAST}
    return {"mean": mean, "scale": inverse(std), "alarm": watch}


def _compare(what: _What, load: Callable[[], Callable[..., Mapping[str, Any]]], inputs: Inputs) -> None:
    """Raise ``ExportError`` unless the artefact that ``load`` reads answers ``inputs`` as the engine does."""
    try:
        exported = load()
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot read the export: {told(error)}.") from error
    # Compared in PyTorch whatever was certified, and with whatever view: the rule alone matters.
    plain: Any = what.policy
    rule = dataclasses.replace(plain, calibrated_on=None)
    engine = Engine(what.sdn, rule, second_look=what.look, alarm=what.alarm, backend="torch")
    odd_N: Tensor | None = None  # the few rows of the largest batch that rounding sends elsewhere, and no other
    for size in shown((num_rows(inputs), *CHECKED), "compare with the engine", len(CHECKED) + 1):
        batch = take(inputs, slice(0, size))
        expected, said = engine(batch), exported(*(leaf.cpu().numpy() for leaf in tensors(batch)))
        found = {name: torch.from_numpy(array) for name, array in said.items()}
        same_B = found["exit"] == expected.exit_B
        odd_N = ~same_B if odd_N is None else odd_N
        if int(odd_N.sum()) > int(DIFFER * len(odd_N)) or bool((~same_B & ~odd_N[: len(same_B)]).any()):
            raise ExportError(
                f"The export sends {int((~same_B).sum())} of {size} rows to another exit than the engine."
            )
        _compare_answers(what.rule, expected, found, same_B)


def _compare_answers(rule: Rule, expected: Answer, found: Mapping[str, Tensor], same_B: Tensor) -> None:
    """Raise ``ExportError`` unless rows that left at the ``same_B`` exit are answered the same but for rounding."""
    softmax_BC, own_BC = expected.logits_BC.double().softmax(1), found["probabilities"].double()
    odd_B = (found["valid"] != expected.valid_B) & same_B
    if bool(odd_B.any()):
        raise ExportError(f"The export says otherwise than the engine whether {int(odd_B.sum())} rows have an answer.")
    good_B = same_B & expected.valid_B
    scale_E = torch.tensor([max(1.0, inverse(std)) * len(rule.asked) for _, std in rule.moments])
    numbers: dict[str, tuple[Tensor | None, float | Tensor]] = {
        "probabilities": (softmax_BC, 1.0),
        "confidence": (expected.confidence_B, 1.0),
        "confusion": (expected.confusion_B, scale_E[expected.exit_B]),
        "cost": (expected.cost_B, 1.0),
        "alarm": (expected.alarm_B, 1.0),
    }
    for name, (right, scale) in numbers.items():
        if right is None:
            continue
        far = float(((found[name].double() - right).abs() / scale)[good_B].max()) if bool(good_B.any()) else 0.0
        if not far <= FAR:  # nor NaN
            raise ExportError(f"The export's {name} lies {far:.2g} away from the engine's, allowed {FAR:g}.")
    named_BC = found["label"][:, None] == torch.arange(softmax_BC.shape[1])
    near_BC = (own_BC == own_BC.amax(1, keepdim=True)) & (softmax_BC >= softmax_BC.amax(1, keepdim=True) - FAR)
    wrong_B = good_B & ~(named_BC & near_BC).any(1)
    if bool(wrong_B.any()):
        raise ExportError(f"The export gives {int(wrong_B.sum())} rows another label than the engine.")


def _compare_programs(what: _What, steps: Sequence[Step], folder: Path, inputs: Inputs) -> None:
    """Raise ``ExportError`` unless the programs in ``folder`` compute what the ``steps`` do, at every size of batch."""
    with silence():
        programs = [torch.export.load(folder / f"step{step.place}.pt2").module() for step in steps]
    for size in shown((num_rows(inputs), *CHECKED), "compare with the steps", len(CHECKED) + 1):
        rows = named(what.sdn.plan.inputs.names, take(inputs, slice(0, size)))
        rows |= remembered(what.policy, size, torch.device("cpu"))
        with torch.no_grad():
            for program, (step, given, expected) in zip(programs, chain(steps, rows), strict=True):
                try:
                    found = program(*given)
                except Exception as error:
                    raise ExportError(
                        f"The program of exit {step.exit} fails for {size} rows: {told(error)}."
                    ) from error
                for name, right, other in zip(step.gives, expected, found, strict=True):
                    close = right.shape == other.shape and torch.allclose(
                        right.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True
                    )
                    if not close:
                        raise ExportError(f"The program of exit {step.exit} computes {name!r} otherwise than PyTorch.")


def _is_export(folder: Path) -> bool:
    """Whether ``folder`` holds what was exported before; others have files of that name, too."""
    try:
        manifest = read_json(folder / "manifest.json")
    except FormatError:
        return False
    return isinstance(manifest, dict) and {"format", "fingerprint", "policy"} <= manifest.keys()


@contextmanager
def _put_in_place(folder: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of ``folder`` when all went well; else nothing is left of it."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not _is_export(folder):
        raise ExportError(f"{folder} is there and is no export: give another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as room:
        fresh = Path(room) / "new"
        fresh.mkdir()
        yield fresh
        old = Path(room) / "old"
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
        except BaseException:  # interrupted in between, too
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
