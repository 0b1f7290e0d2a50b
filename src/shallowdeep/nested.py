"""One ONNX graph that skips by itself: after every question an ``If`` answers, or goes on with the rows that are left.

It refuses to know how the steps came about; it sees their graphs and names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_TYPES = {"label": TensorProto.INT64, "exit": TensorProto.INT64}


@dataclass(frozen=True, eq=False)
class Question:
    """One step as a graph, and what its answer is made of: see ``Step`` and the manifest of an exported folder."""

    model: onnx.ModelProto
    exit: int
    takes: Sequence[str]
    gives: Sequence[str]
    mean: float
    scale: float
    alarm: Mapping[str, Any] | None


def nested_model(
    questions: Sequence[Question], *, full_exit: int, fresh: Mapping[str, Any], rowless: frozenset[str]
) -> onnx.ModelProto:
    """The model: inputs are those of the steps (``input.NAME``), outputs [batch] each: ``label``, ``probabilities``
    [batch, C], ``exit``, ``confidence``, ``confusion``, and ``alarm`` where the questions have one.

    Rows leave inside the graph: those that go on are gathered, and their answers put back in place. ``fresh`` holds a
    row of what the policy remembers before its first question, as NumPy arrays.
    """
    inputs = {given.name: given for question in questions for given in question.model.graph.input}
    inputs = {name: given for name, given in inputs.items() if name.startswith("input.")}
    graph = _Nodes()
    rows = {name: name for name in inputs}
    first = next(iter(inputs))
    batch = graph.add("Slice", graph.add("Shape", first), graph.ints([0]), graph.ints([1]))
    for name, row in fresh.items():
        size = graph.add("Concat", batch, graph.ints(list(row.shape[1:])), axis=0) if row.ndim > 1 else batch
        rows[name] = graph.add("Expand", graph.constant(row), size)
    answers = _ask(graph, questions, 0, rows, full_exit, rowless)
    classes = questions[0].model.graph.output[1].type.tensor_type.shape.dim[1].dim_value
    outputs = []
    for name, value in answers.items():
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
        shape: list[Any] = ["batch", classes] if name == "probabilities" else ["batch"]
        outputs.append(helper.make_tensor_value_info(name, _TYPES.get(name, TensorProto.DOUBLE), shape))
    model = questions[0].model
    made = helper.make_graph(graph.nodes, "early_exits", list(inputs.values()), outputs, graph.weights)
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


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

    def inline(self, question: Question, rows: Mapping[str, str]) -> dict[str, str]:
        """The step's own nodes; names of what it gives."""
        graph = question.model.graph
        names = {given.name: rows[name] for name, given in zip(question.takes, graph.input, strict=True)}
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
        return dict(zip(question.gives, (names[value.name] for value in graph.output), strict=True))


def _ask(
    graph: _Nodes,
    questions: Sequence[Question],
    place: int,
    rows: dict[str, str],
    full_exit: int,
    rowless: frozenset[str],
) -> dict[str, str]:
    """Names of the answers of the rows that step ``place`` and those behind it are asked about."""
    question, last = questions[place], place + 1 == len(questions)
    rows = rows | graph.inline(question, rows)
    own, answer = rows[f"logits.{place}"], rows.get(f"answer.softmax.{place}", rows[f"softmax.{place}"])
    said = [rows[f"softmax.{k}"] for k in range(place + 1)]
    label = graph.add("ArgMax", rows.get(f"answer.logits.{place}", own), axis=1, keepdims=0)
    here = {
        "label": label,
        "probabilities": answer,
        "exit": graph.add("Add", graph.add("Mul", label, graph.ints([0])), graph.ints([question.exit])),
        "confidence": graph.add("ReduceMax", answer, graph.ints([1]), keepdims=0),
        "confusion": _confusion(graph, said, answer, question),
    }
    if question.alarm is not None:
        here["alarm"] = _alarm(graph, said, answer, **question.alarm)
    if last:
        return here
    total = graph.add("ReduceSum", graph.add("Cast", own, to=TensorProto.DOUBLE), graph.ints([1]), keepdims=0)
    finite = graph.add("Less", graph.add("Abs", total), graph.constant(np.array(np.inf)))
    if question.exit == full_exit:
        stop = graph.add("Or", rows["stop"], graph.add("Not", finite))
    else:
        stop = graph.add("And", rows["stop"], finite)
    goes_on = graph.add("Not", stop)
    number = graph.add("Cast", goes_on, to=TensorProto.INT64)
    some = graph.add("Cast", graph.add("ReduceMax", number, keepdims=0), to=TensorProto.BOOL)
    deeper, shallow = _Nodes(f"{graph.prefix}.{place}on"), _Nodes(f"{graph.prefix}.{place}off")
    index = deeper.add("Squeeze", deeper.add("NonZero", goes_on), deeper.ints([0]))
    needed = {name for later in questions[place + 1 :] for name in later.takes}
    needed |= {f"softmax.{k}" for k in range(place + 1)}
    picked = {
        name: value if name in rowless else deeper.add("Gather", value, index, axis=0)
        for name, value in rows.items()
        if name in needed
    }
    found = _ask(deeper, questions, place + 1, picked, full_exit, rowless)
    column = deeper.add("Unsqueeze", index, deeper.ints([1]))
    put = {name: deeper.add("ScatterND", here[name], column, found[name]) for name in here}
    kept = {name: shallow.add("Identity", here[name]) for name in here}
    names = [f"{graph.prefix}.{place}if.{name}" for name in here]
    branches = {"then_branch": _branch(deeper, put), "else_branch": _branch(shallow, kept)}
    graph.nodes.append(helper.make_node("If", [some], names, **branches))
    return dict(zip(here, names, strict=True))


def _branch(graph: _Nodes, answers: Mapping[str, str]) -> onnx.GraphProto:
    values = [
        helper.make_tensor_value_info(value, _TYPES.get(name, TensorProto.DOUBLE), None)
        for name, value in answers.items()
    ]
    return helper.make_graph(graph.nodes, graph.prefix, [], values, graph.weights)


def _confusion(graph: _Nodes, said: Sequence[str], answer: str, question: Question) -> str:
    total = ""
    for softmax in said:
        apart = graph.add("ReduceSum", graph.add("Abs", graph.add("Sub", softmax, answer)), graph.ints([1]), keepdims=0)
        apart = graph.add("Where", graph.add("IsNaN", apart), graph.constant(np.array(2.0)), apart)
        total = graph.add("Add", total, apart) if total else apart
    centred = graph.add("Sub", total, graph.constant(np.array(question.mean)))
    return graph.add("Mul", centred, graph.constant(np.array(question.scale)))


def _alarm(
    graph: _Nodes, said: Sequence[str], answer: str, *, bias: float, weights: Sequence[float], least: float
) -> str:
    """How probably the answer is wrong: see ``Alarm``."""

    def log_odds(probability: str) -> str:
        probability = graph.add("Where", graph.add("IsNaN", probability), graph.constant(np.array(0.0)), probability)
        rest, least_ = graph.add("Sub", graph.constant(np.array(1.0)), probability), graph.constant(np.array(least))
        return graph.add("Sub", *(graph.add("Log", graph.add("Max", one, least_)) for one in (probability, rest)))

    label = graph.add("ArgMax", answer, axis=1, keepdims=1)
    total = graph.constant(np.array([[bias]]))
    for weight, softmax in zip(weights, said, strict=True):
        odds = log_odds(graph.add("GatherElements", softmax, label, axis=1))
        total = graph.add("Add", total, graph.add("Mul", odds, graph.constant(np.array(weight))))
    lost = graph.add("IsNaN", graph.add("ReduceSum", answer, graph.ints([1]), keepdims=1))
    alarm = graph.add("Where", lost, graph.constant(np.array(1.0)), graph.add("Sigmoid", total))
    return graph.add("Squeeze", alarm, graph.ints([1]))
