"""One ONNX graph that skips by itself: after every question an ``If`` answers, or goes on with the rows that are left;
and graphs of single steps that say what their rows are answered.

It refuses to know who runs it: an engine and an exported file hold the same graph.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shallowdeep.steps import Step
from shallowdeep.trajectory import LEAST, Alarm
from shallowdeep.walking import inverse


def nested_model(
    steps: Sequence[Step],
    models: Sequence[onnx.ModelProto],
    fresh: Mapping[str, Any],
    answers: Sequence[str],
    spoilt: Mapping[str, bool] | None = None,
    *,
    single: bool = False,
) -> onnx.ModelProto:
    """The model, of the ``steps`` and the graph of each: its inputs are theirs (``input.NAME``), its outputs those of
    ``label``, ``logits`` [batch, C], ``probabilities`` [batch, C], ``exit``, ``confidence``, ``confusion`` and
    ``alarm`` [batch] (where the steps' rule has one) that ``answers`` names.

    Rows leave inside the graph: those that go on are gathered, and their answers put back in place; with ``single``
    there is one row, which leaves or goes on. ``fresh`` holds a
    row of what the policy remembers before its first question, as NumPy arrays. Rows with NaN in one of the inputs
    that ``spoilt`` names (with True: or an infinity) get logits that are NaN, also from runtimes that forget NaN.
    """
    inputs = {given.name: given for model in models for given in model.graph.input}
    inputs = {name: given for name, given in inputs.items() if name.startswith("input.")}
    graph = _Nodes()
    rows = {name: name for name in inputs}
    batch = graph.add("Slice", graph.add("Shape", next(iter(inputs))), graph.ints([0]), graph.ints([1]))
    for name, row in fresh.items():
        size = graph.add("Concat", batch, graph.ints(list(row.shape[1:])), axis=0) if row.ndim > 1 else batch
        rows[name] = graph.add("Expand", graph.constant(row), size)
    rows |= _lost(graph, inputs, spoilt or {})
    outputs = _outputs(steps[0], models[0], answers)
    types = {value.name: value.type.tensor_type.elem_type for value in outputs}
    found = _Nest([*zip(steps, models, strict=True)], answers, types, single).ask(graph, 0, rows)
    return _model(graph, [*inputs.values()], found, outputs, models[0])


def _lost(graph: _Nodes, inputs: Mapping[str, onnx.ValueInfoProto], spoilt: Mapping[str, bool]) -> dict[str, str]:
    """Name of which rows are ``lost`` (bool [B, 1]), for what ``spoilt`` inputs hold; nothing where none is read."""
    found = []
    for name, infinite in spoilt.items():
        if name not in inputs:
            continue
        kind = inputs[name].type.tensor_type
        endless = graph.constant(np.array(np.inf, helper.tensor_dtype_to_np_dtype(kind.elem_type)))
        bad = graph.add("Not", graph.add("Less", graph.add("Abs", name), endless)) if infinite else ""
        part = graph.add("Cast", bad or graph.add("IsNaN", name), to=TensorProto.FLOAT)
        axes = [*range(1, len(kind.shape.dim))]
        found.append(graph.add("ReduceMax", part, graph.ints(axes), keepdims=0) if axes else part)
    if not found:
        return {}
    lost = graph.add("Cast", graph.add("Max", *found), to=TensorProto.BOOL)
    return {"lost": graph.add("Unsqueeze", lost, graph.ints([1]))}


def answering_model(
    step: Step,
    model: onnx.ModelProto,
    later: Collection[str],
    answers: Sequence[str],
    spoilt: Mapping[str, bool] | None = None,
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph of a ``step`` that also gives its rows' ``answers`` (as above), and the names of what it gives.

    These are what ``later`` steps take; but for the last step, ``said`` and, with ``spoilt`` inputs, ``lost``, which
    the next takes, and ``leave`` (bool [batch]), whose rows are answered here; then ``answers``.
    """
    graph, inputs, kind = _Nodes(), [*model.graph.input], TensorProto.DOUBLE
    outputs = [value for name, value in zip(step.gives, model.graph.output, strict=True) if name in later]
    names = [name for name in step.gives if name in later]
    said = ["batch", step.place, _logits(step, model).shape.dim[1].dim_value]
    if step.place:
        inputs.append(helper.make_tensor_value_info("said", kind, said))
    lost = helper.make_tensor_value_info("lost", TensorProto.BOOL, ["batch", 1])
    if step.place and spoilt:
        inputs.append(lost)
    rows = {given.name: given.name for given in inputs}
    if not step.place:
        rows |= _lost(graph, {given.name: given for given in inputs}, spoilt or {})
    rows = _run(graph, step, model, rows)
    if "leave" in rows:
        outputs.append(helper.make_tensor_value_info("said", kind, [said[0], step.place + 1, said[2]]))
        outputs.append(helper.make_tensor_value_info("leave", TensorProto.BOOL, ["batch"]))
        names += ["said", "leave"]
        if spoilt:
            outputs.append(lost)
            names.append("lost")
    outputs, names = [*outputs, *_outputs(step, model, answers)], [*names, *answers]
    rows |= _answered(graph, step, rows, answers)
    given = {f"next.{name}": rows[name] for name in names}
    # Copies: ``model`` is kept for others, who know its outputs by their own names.
    outputs = [copy.deepcopy(value) for value in outputs]
    for name, value in zip(given, outputs, strict=True):
        value.name = name
    return _model(graph, inputs, given, outputs, model), names


def _model(
    graph: _Nodes,
    inputs: Sequence[onnx.ValueInfoProto],
    found: Mapping[str, str],
    outputs: Sequence[onnx.ValueInfoProto],
    like: onnx.ModelProto,
) -> onnx.ModelProto:
    """The model of ``graph``, whose ``outputs`` are called otherwise inside."""
    graph.nodes.extend(helper.make_node("Identity", [found[value.name]], [value.name]) for value in outputs)
    made = helper.make_graph(graph.nodes, "early_exits", inputs, outputs, graph.weights)
    for value in (*made.input, *made.output):
        for axis in value.type.tensor_type.shape.dim[:1]:
            if axis.dim_param:  # the exporter's own symbol
                axis.dim_param = "batch"
    return helper.make_model(made, opset_imports=like.opset_import, ir_version=like.ir_version)


def _outputs(step: Step, model: onnx.ModelProto, answers: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """The ``answers`` of ``step`` as a graph declares them."""
    logits = _logits(step, model)
    kinds = {"label": TensorProto.INT64, "exit": TensorProto.INT64, "logits": logits.elem_type}
    classes = [logits.shape.dim[1].dim_value]
    shapes = {name: ["batch", *classes * (name in ("logits", "probabilities"))] for name in answers}
    return [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.DOUBLE), shapes[name]) for name in answers]


def _logits(step: Step, model: onnx.ModelProto) -> Any:
    """Number type and shape of the step's logits."""
    return model.graph.output[step.gives.index(f"logits.{step.place}")].type.tensor_type


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
        graph = onnx.GraphProto()
        graph.CopyFrom(model.graph)
        given = {value.name: rows[name] for name, value in zip(step.takes, graph.input, strict=True)}
        del graph.input[:]
        _rename(graph, {"": "", **given}, f"{self.prefix}.step.")
        self.nodes.extend(graph.node)
        self.weights.extend(graph.initializer)
        return dict(zip(step.gives, (value.name for value in graph.output), strict=True))

    def branch(self, condition: str, yes: _Branch, no: _Branch, types: Mapping[str, int]) -> dict[str, str]:
        """An ``If`` of two branches that answer the same; names of its answers."""
        names = {name: f"{self.prefix}.{len(self.nodes)}.{name}" for name in yes[1]}
        then_branch, else_branch = (_graph(nodes, answers, types) for nodes, answers in (yes, no))
        made = helper.make_node("If", [condition], [*names.values()], then_branch=then_branch, else_branch=else_branch)
        self.nodes.append(made)
        return names


_Branch = tuple[_Nodes, Mapping[str, str]]
"""Nodes, and the names in them of what is answered."""


def _rename(graph: onnx.GraphProto, names: dict[str, str], tag: str) -> None:
    """``tag`` in front of every name that ``graph`` and the branches in it make; ``names`` holds those from outside."""
    del graph.value_info[:]
    for made in (*graph.input, *graph.initializer):
        names[made.name] = tag + made.name
        made.name = names[made.name]
    for node in graph.node:
        node.name = tag + node.name
        node.input[:] = [names[name] for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, dict(names), tag)
        names |= {name: tag + name for name in node.output if name}
        node.output[:] = [names[name] for name in node.output]
    for value in graph.output:
        value.name = names[value.name]


def _graph(nodes: _Nodes, answers: Mapping[str, str], types: Mapping[str, int]) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(value, types[name], None) for name, value in answers.items()]
    return helper.make_graph(nodes.nodes, nodes.prefix, [], values, nodes.weights)


@dataclass(frozen=True, eq=False)
class _Nest:
    """What is asked in turn: steps and their graphs, the ``answers`` wanted and their number ``types``; whether of a
    ``single`` row.
    """

    steps: Sequence[tuple[Step, onnx.ModelProto]]
    answers: Sequence[str]
    types: Mapping[str, int]
    single: bool

    def ask(self, graph: _Nodes, place: int, rows: dict[str, str]) -> dict[str, str]:
        """Names of the answers of the rows that step ``place`` and those behind it are asked about.

        What rows are answered is worked out for those that leave alone: for one row every node counts.
        """
        step, model = self.steps[place]
        rows = _run(graph, step, model, rows)
        if place + 1 == len(self.steps):
            return _answered(graph, step, rows, self.answers)
        deeper, shallow = _Nodes(f"{graph.prefix}.{place}on"), _Nodes(f"{graph.prefix}.{place}off")
        leaving = shallow, _answered(shallow, step, rows, self.answers)
        if self.single:
            return graph.branch(rows["leave"], leaving, (deeper, self.ask(deeper, place + 1, rows)), self.types)
        index = graph.add("Squeeze", graph.add("NonZero", graph.add("Not", rows["leave"])), graph.ints([0]))
        number = graph.add("Size", index)
        some_on = graph.add("Cast", number, to=TensorProto.BOOL)
        return graph.branch(some_on, (deeper, self._ask_some(deeper, place, rows, index, number)), leaving, self.types)

    def _ask_some(self, graph: _Nodes, place: int, rows: dict[str, str], index: str, number: str) -> dict[str, str]:
        """Names of all rows' answers, where the ``number`` of rows at ``index`` go on from step ``place``."""
        step, _ = self.steps[place]
        needed = {name for later, _ in self.steps[place + 1 :] for name in later.takes} | {"said", "lost"}
        picked = {
            name: value if name in step.rowless else graph.add("Gather", value, index, axis=0)
            for name, value in rows.items()
            if name in needed
        }
        found = self.ask(graph, place + 1, picked)
        all_go, some_go = _Nodes(f"{graph.prefix}.all"), _Nodes(f"{graph.prefix}.some")
        kept = {name: all_go.add("Identity", found[name]) for name in self.answers}
        here, column = _answered(some_go, step, rows, self.answers), some_go.add("Unsqueeze", index, some_go.ints([1]))
        put = {name: some_go.add("ScatterND", here[name], column, found[name]) for name in self.answers}
        all_on = graph.add("Equal", number, graph.add("Size", rows["leave"]))
        return graph.branch(all_on, (all_go, kept), (some_go, put), self.types)


def _run(graph: _Nodes, step: Step, model: onnx.ModelProto, rows: Mapping[str, str]) -> dict[str, str]:
    """Names of ``rows`` behind ``step``, of what all exits ``said`` so far [B, exits asked, C], and, except at the last
    step, of who may ``leave`` [B]: a stop counts where logits are numbers, else the full exit does.
    """
    found = {**rows, **graph.inline(step, model, rows)}
    for name, value in zip(step.gives, model.graph.output, strict=True) if "lost" in rows else ():
        if name.startswith(("logits.", "softmax.", "answer.")):
            number = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            found[name] = graph.add("Where", rows["lost"], graph.constant(np.array(np.nan, number)), found[name])
    own = graph.add("Unsqueeze", found[f"softmax.{step.place}"], graph.ints([1]))
    found["said"] = graph.add("Concat", rows["said"], own, axis=1) if step.place else own
    if "stop" not in step.gives:
        return found
    own, kind = found[f"logits.{step.place}"], _logits(step, model).elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        own, kind = graph.add("Cast", own, to=TensorProto.FLOAT), TensorProto.FLOAT
    if kind == TensorProto.FLOAT:  # whose sum may be too large for it; OpenVINO has no float64 to sum in
        own = graph.add("Mul", own, graph.constant(np.array(2.0**-32, np.float32)))
    size = graph.add("ReduceL1", own, graph.ints([1]), keepdims=0)
    finite = graph.add("Less", size, graph.constant(np.array(np.inf, helper.tensor_dtype_to_np_dtype(kind))))
    if step.exit == step.rule.full_exit:
        found["leave"] = graph.add("Or", found["stop"], graph.add("Not", finite))
    else:
        found["leave"] = graph.add("And", found["stop"], finite)
    return found


def _answered(graph: _Nodes, step: Step, rows: Mapping[str, str], answers: Sequence[str]) -> dict[str, str]:
    """Names of the ``answers`` of rows that end at ``step``."""
    logits = rows.get(f"answer.logits.{step.place}", rows[f"logits.{step.place}"])
    softmax = rows.get(f"answer.softmax.{step.place}", rows[f"softmax.{step.place}"])
    label = graph.add("ArgMax", logits, axis=1, keepdims=0)
    found = {
        "label": label,
        "logits": graph.add("Identity", logits),
        "probabilities": graph.add("Identity", softmax),
        "exit": graph.add("Add", graph.add("Mul", label, graph.ints([0])), graph.ints([step.exit])),
        "confidence": graph.add("ReduceMax", softmax, graph.ints([1]), keepdims=0),
        "confusion": _confusion(graph, rows["said"], softmax, *step.rule.moments[step.exit]),
    }
    if step.rule.alarm is not None:
        found["alarm"] = _alarm(graph, rows["said"], softmax, step.rule.alarm, step.exit)
    return {name: found[name] for name in answers}


def _confusion(graph: _Nodes, said: str, softmax: str, mean: float, std: float) -> str:
    """See ``Rule.confusion``; ``said`` [B, exits asked, C]."""
    apart = graph.add("Abs", graph.add("Sub", said, graph.add("Unsqueeze", softmax, graph.ints([1]))))
    apart = graph.add("ReduceSum", apart, graph.ints([2]), keepdims=0)
    apart = graph.add("Where", graph.add("IsNaN", apart), graph.constant(np.array(2.0)), apart)
    total = graph.add("ReduceSum", apart, graph.ints([1]), keepdims=0)
    centred = graph.add("Sub", total, graph.constant(np.array(mean)))
    return graph.add("Mul", centred, graph.constant(np.array(inverse(std))))


def _alarm(graph: _Nodes, said: str, softmax: str, alarm: Alarm, exit: int) -> str:
    """See ``Alarm.score``; ``said`` [B, exits asked, C]."""
    own, weights = graph.add("ArgMax", softmax, axis=1, keepdims=1), np.array(alarm.weights(exit))
    label = graph.add("Concat", *[graph.add("Unsqueeze", own, graph.ints([2]))] * len(weights), axis=1)
    chance = graph.add("Squeeze", graph.add("GatherElements", said, label, axis=2), graph.ints([2]))
    chance = graph.add("Where", graph.add("IsNaN", chance), graph.constant(np.array(0.0)), chance)
    rest, least = graph.add("Sub", graph.constant(np.array(1.0)), chance), graph.constant(np.array(LEAST))
    odds = graph.add("Sub", *(graph.add("Log", graph.add("Max", part, least)) for part in (chance, rest)))
    total = graph.add("ReduceSum", graph.add("Mul", odds, graph.constant(weights)), graph.ints([1]), keepdims=0)
    wrong = graph.add("Sigmoid", graph.add("Add", total, graph.constant(np.array(alarm.bias_E[exit]))))
    lost = graph.add("IsNaN", graph.add("ReduceSum", softmax, graph.ints([1]), keepdims=0))
    return graph.add("Where", lost, graph.constant(np.array(1.0)), wrong)
