"""One ONNX graph that skips by itself: after every question an ``If`` answers, or goes on with the rows that are left.

It refuses to know who runs it: an engine and an exported file hold the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shallowdeep.steps import Step
from shallowdeep.trajectory import LEAST, Alarm
from shallowdeep.walking import inverse

_TYPES = {"label": TensorProto.INT64, "exit": TensorProto.INT64}


def nested_model(
    steps: Sequence[Step], models: Sequence[onnx.ModelProto], fresh: Mapping[str, Any], answers: Sequence[str]
) -> onnx.ModelProto:
    """The model, of the ``steps`` and the graph of each: its inputs are theirs (``input.NAME``), its outputs those of
    ``label``, ``logits`` [batch, C], ``probabilities`` [batch, C], ``exit``, ``confidence``, ``confusion`` and
    ``alarm`` [batch] (where the steps' rule has one) that ``answers`` names.

    Rows leave inside the graph: those that go on are gathered, and their answers put back in place. ``fresh`` holds a
    row of what the policy remembers before its first question, as NumPy arrays.
    """
    inputs = {given.name: given for model in models for given in model.graph.input}
    inputs = {name: given for name, given in inputs.items() if name.startswith("input.")}
    graph = _Nodes()
    rows = {name: name for name in inputs}
    batch = graph.add("Slice", graph.add("Shape", next(iter(inputs))), graph.ints([0]), graph.ints([1]))
    for name, row in fresh.items():
        size = graph.add("Concat", batch, graph.ints(list(row.shape[1:])), axis=0) if row.ndim > 1 else batch
        rows[name] = graph.add("Expand", graph.constant(row), size)
    found = _ask(graph, [*zip(steps, models, strict=True)], 0, rows, answers)
    said = models[0].graph.output[1].type.tensor_type  # logits, of the type that the network computes in
    types = _TYPES | {"logits": said.elem_type}
    outputs = []
    for name in answers:
        graph.nodes.append(helper.make_node("Identity", [found[name]], [name]))
        shape: list[Any] = ["batch", *[said.shape.dim[1].dim_value] * (name in ("logits", "probabilities"))]
        outputs.append(helper.make_tensor_value_info(name, types.get(name, TensorProto.DOUBLE), shape))
    made = helper.make_graph(graph.nodes, "early_exits", list(inputs.values()), outputs, graph.weights)
    return helper.make_model(made, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)


@dataclass(eq=False)
class _Nodes:
    """A graph, or the branch of an ``If``, while it is written; names are unique in the whole model."""

    prefix: str = "n"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def add(
        self, kind: str, *inputs: str, axis: int | None = None, keepdims: int | None = None, to: int | None = None
    ) -> str:
        """The name of what a new node answers."""
        name = f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, axis=axis, keepdims=keepdims, to=to))
        return name

    def constant(self, value: Any) -> str:
        name = f"{self.prefix}.c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def inline(self, step: Step, model: onnx.ModelProto, rows: Mapping[str, str]) -> dict[str, str]:
        """The step's own nodes; names of what it gives."""
        graph = model.graph
        names = {given.name: rows[name] for name, given in zip(step.takes, graph.input, strict=True)}
        tag = f"{self.prefix}.step."
        for weight in graph.initializer:
            copied = onnx.TensorProto()
            copied.CopyFrom(weight)
            copied.name = names[weight.name] = tag + weight.name
            self.weights.append(copied)
        for node in graph.node:
            copied_node = onnx.NodeProto()
            copied_node.CopyFrom(node)
            copied_node.name = tag + node.name
            del copied_node.input[:], copied_node.output[:]
            copied_node.input.extend(names.get(name, "") for name in node.input)
            for name in node.output:
                names[name] = tag + name if name else ""
            copied_node.output.extend(names[name] for name in node.output)
            self.nodes.append(copied_node)
        return dict(zip(step.gives, (names[value.name] for value in graph.output), strict=True))


def _ask(
    graph: _Nodes,
    steps: Sequence[tuple[Step, onnx.ModelProto]],
    place: int,
    rows: dict[str, str],
    answers: Sequence[str],
) -> dict[str, str]:
    """Names of the ``answers`` of the rows that step ``place`` and those behind it are asked about."""
    step, model = steps[place]
    rows = rows | graph.inline(step, model, rows)
    here = {name: value for name, value in _answered(graph, step, rows).items() if name in answers}
    if place + 1 == len(steps):
        return here
    own = graph.add("Cast", rows[f"logits.{place}"], to=TensorProto.DOUBLE)
    total = graph.add("ReduceSum", own, graph.ints([1]), keepdims=0)
    finite = graph.add("Less", graph.add("Abs", total), graph.constant(np.array(np.inf)))
    if step.exit == step.rule.full_exit:
        stop = graph.add("Or", rows["stop"], graph.add("Not", finite))
    else:
        stop = graph.add("And", rows["stop"], finite)
    goes_on = graph.add("Not", stop)
    number = graph.add("Cast", goes_on, to=TensorProto.INT64)
    some = graph.add("Cast", graph.add("ReduceMax", number, keepdims=0), to=TensorProto.BOOL)
    deeper, shallow = _Nodes(f"{graph.prefix}.{place}on"), _Nodes(f"{graph.prefix}.{place}off")
    index = deeper.add("Squeeze", deeper.add("NonZero", goes_on), deeper.ints([0]))
    needed = {name for later, _ in steps[place + 1 :] for name in later.takes}
    needed |= {f"softmax.{k}" for k in range(place + 1)}
    picked = {
        name: value if name in step.rowless else deeper.add("Gather", value, index, axis=0)
        for name, value in rows.items()
        if name in needed
    }
    found = _ask(deeper, steps, place + 1, picked, answers)
    column = deeper.add("Unsqueeze", index, deeper.ints([1]))
    put = {name: deeper.add("ScatterND", here[name], column, found[name]) for name in here}
    kept = {name: shallow.add("Identity", here[name]) for name in here}
    names = [f"{graph.prefix}.{place}if.{name}" for name in here]
    types = _TYPES | {"logits": model.graph.output[1].type.tensor_type.elem_type}
    branches = {"then_branch": _branch(deeper, put, types), "else_branch": _branch(shallow, kept, types)}
    graph.nodes.append(helper.make_node("If", [some], names, **branches))
    return dict(zip(here, names, strict=True))


def _answered(graph: _Nodes, step: Step, rows: Mapping[str, str]) -> dict[str, str]:
    """Names of all that rows are answered which end at ``step``."""
    place = step.place
    logits = rows.get(f"answer.logits.{place}", rows[f"logits.{place}"])
    answer = rows.get(f"answer.softmax.{place}", rows[f"softmax.{place}"])
    said = [rows[f"softmax.{k}"] for k in range(place + 1)]
    label = graph.add("ArgMax", logits, axis=1, keepdims=0)
    found = {
        "label": label,
        "logits": logits,
        "probabilities": answer,
        "exit": graph.add("Add", graph.add("Mul", label, graph.ints([0])), graph.ints([step.exit])),
        "confidence": graph.add("ReduceMax", answer, graph.ints([1]), keepdims=0),
        "confusion": _confusion(graph, said, answer, *step.rule.moments[step.exit]),
    }
    if step.rule.alarm is not None:
        found["alarm"] = _alarm(graph, said, answer, step.rule.alarm, step.exit)
    return found


def _branch(graph: _Nodes, answers: Mapping[str, str], types: Mapping[str, int]) -> onnx.GraphProto:
    values = [
        helper.make_tensor_value_info(value, types.get(name, TensorProto.DOUBLE), None)
        for name, value in answers.items()
    ]
    return helper.make_graph(graph.nodes, graph.prefix, [], values, graph.weights)


def _confusion(graph: _Nodes, said: Sequence[str], answer: str, mean: float, std: float) -> str:
    """See ``Rule.confusion``."""
    total = ""
    for softmax in said:
        apart = graph.add("ReduceSum", graph.add("Abs", graph.add("Sub", softmax, answer)), graph.ints([1]), keepdims=0)
        apart = graph.add("Where", graph.add("IsNaN", apart), graph.constant(np.array(2.0)), apart)
        total = graph.add("Add", total, apart) if total else apart
    centred = graph.add("Sub", total, graph.constant(np.array(mean)))
    return graph.add("Mul", centred, graph.constant(np.array(inverse(std))))


def _alarm(graph: _Nodes, said: Sequence[str], answer: str, alarm: Alarm, exit: int) -> str:
    """How probably the answer is wrong: see ``Alarm``."""

    def log_odds(probability: str) -> str:
        probability = graph.add("Where", graph.add("IsNaN", probability), graph.constant(np.array(0.0)), probability)
        rest, least_ = graph.add("Sub", graph.constant(np.array(1.0)), probability), graph.constant(np.array(LEAST))
        return graph.add("Sub", *(graph.add("Log", graph.add("Max", one, least_)) for one in (probability, rest)))

    label = graph.add("ArgMax", answer, axis=1, keepdims=1)
    total = graph.constant(np.array([[alarm.bias_E[exit]]]))
    for weight, softmax in zip(alarm.weights(exit), said, strict=True):
        odds = log_odds(graph.add("GatherElements", softmax, label, axis=1))
        total = graph.add("Add", total, graph.add("Mul", odds, graph.constant(np.array(weight))))
    lost = graph.add("IsNaN", graph.add("ReduceSum", answer, graph.ints([1]), keepdims=1))
    wrong = graph.add("Where", lost, graph.constant(np.array(1.0)), graph.add("Sigmoid", total))
    return graph.add("Squeeze", wrong, graph.ints([1]))
