"""The exported graph of a backbone: what flows where, what each step costs, and pieces of it that run alone.

It refuses to know module names people would type, classifiers and policies. All of it is evaluation mode.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from shallowdeep.inputs import Inputs, call, inputs_from, logits_of, signature_of, tensors
from shallowdeep.types import InputSignature

_IDENTITY = {"clone.default", "alias.default", "detach.default", "contiguous.default", "dropout.default"}
_lock, _quiet = threading.Lock(), threading.RLock()
_evaluated: WeakKeyDictionary[nn.Module, tuple[bool, int]] = WeakKeyDictionary()
"""Modules that somebody needs in eval mode: the mode they had, and how many need it."""
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")


class _FromLeaves(nn.Module):
    """The backbone called with a flat tuple of tensors, answering logits alone: what is exported."""

    def __init__(self, backbone: nn.Module, signature: InputSignature) -> None:
        super().__init__()
        self.backbone, self.signature = backbone, signature

    def forward(self, leaves: tuple[Tensor, ...]) -> Tensor:
        return logits_of(call(self.backbone, inputs_from(self.signature, leaves)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode without gradients; every module's own mode flag comes back when the last thread that
    needs it so is done.
    """
    modules = [*model.modules()]
    with _lock:
        for module in modules:
            training, users = _evaluated.get(module, (module.training, 0))
            _evaluated[module] = training, users + 1
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            for module in modules:
                training, users = _evaluated.pop(module)
                if users > 1:
                    _evaluated[module] = training, users - 1
                else:
                    module.training = training


@dataclass(frozen=True, eq=False)
class Crossing:
    """A position in the graph that one computed tensor, ``node``, crosses, beside parameter-free ``sides``.

    ``side_rows`` says of each side tensor whether its first axis is the batch, so that rows can leave it.
    """

    node: fx.Node
    sides: tuple[fx.Node, ...]
    side_rows: tuple[bool, ...]
    macs_before: int


@dataclass(frozen=True, eq=False)
class BackboneGraph:
    """The functional graph of one backbone for one input signature, with macs per node (one sample)."""

    module: fx.GraphModule
    leaves: tuple[fx.Node, ...]
    logits: fx.Node
    macs: dict[fx.Node, int]
    total_macs: int

    def crossings(self) -> list[Crossing]:
        """Every crossing in order of execution whose tensor has its rows first; see design.md, "cut point"."""
        kinds = _Kinds(self)
        last_use = {n: max((kinds.place[u] for u in n.users if kinds.reads(u)), default=-1) for n in kinds.place}
        found: list[Crossing] = []
        live: dict[fx.Node, None] = dict.fromkeys(self.leaves)
        before = 0
        seen: set[fx.Node] = set()
        for node, place in kinds.place.items():
            before += self.macs.get(node, 0)
            if node.op == "call_function" and (node in kinds.computed or node in kinds.side):
                live[node] = None
            live = {n: None for n in live if last_use.get(n, -1) > place}
            computed = [n for n in live if n in kinds.computed]
            if len(computed) != 1 or computed[0] in seen:
                continue
            seen.add(computed[0])
            sides = tuple(n for n in live if n in kinds.side)
            if kinds.rows_first(computed[0]) and all(kinds.rows_first(n) or kinds.rowless(n) for n in sides):
                found.append(Crossing(computed[0], sides, tuple(map(kinds.rows_first, sides)), before))
        return found

    def piece(self, start: Crossing | None, end: Crossing | None) -> fx.GraphModule:
        """The graph from ``start`` (None: the inputs) to ``end`` (None: the logits) as a module of its own.

        It is called with the crossing tensor (or nothing), then its side inputs, then every input leaf, and
        returns the next crossing tensor followed by its side inputs, or the logits.
        """
        kinds = _Kinds(self)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        if start is not None:
            for node in (start.node, *(s for s in start.sides if s not in self.leaves)):
                env[node] = graph.placeholder(node.name)
        for leaf in self.leaves:
            env[leaf] = graph.placeholder(leaf.name)
        anchor = env[start.node] if start is not None else env[self.leaves[0]]

        def fetch(node: fx.Node) -> fx.Node:
            if node not in env:
                if kinds.is_batch_size(node):
                    env[node] = graph.call_function(torch.ops.aten.sym_size.int, (anchor, 0))
                else:
                    for needed in node.all_input_nodes:
                        fetch(needed)
                    env[node] = graph.node_copy(node, lambda n: env[n])
            return env[node]

        wanted = [self.logits] if end is None else [end.node, *(s for s in end.sides if s not in self.leaves)]
        # In the order of the whole graph, so that a deep network needs no deep recursion.
        needed = _ancestors(wanted, stop=set(env))
        for node in self.module.graph.nodes:
            if node in needed and not kinds.is_size(node):
                fetch(node)
        graph.output(tuple(fetch(node) for node in wanted))
        piece = fx.GraphModule(self.module, graph)
        piece.graph.eliminate_dead_code()
        piece.recompile()
        return piece


class _Kinds:
    """Which nodes are computed (from inputs and parameters), side (from inputs alone), sizes, or static."""

    def __init__(self, graph: BackboneGraph) -> None:
        relevant = _ancestors([graph.logits], stop=set())
        order = [n for n in graph.module.graph.nodes if n in relevant]
        self.place = {node: i for i, node in enumerate(order)}
        self.batch_symbols = {_dim0(leaf) for leaf in graph.leaves} - {None}
        parameters = {name for name, _ in graph.module.named_parameters(remove_duplicate=False)}
        from_input: set[fx.Node] = set(graph.leaves)
        from_parameter = {n for n in order if n.op == "get_attr" and n.target in parameters}
        for node in order:
            sources = [n for n in node.all_input_nodes if not self.is_size(n)]
            if not self.is_size(node):
                if any(n in from_input for n in sources):
                    from_input.add(node)
                if any(n in from_parameter for n in sources if n is not _yardstick(node)):
                    from_parameter.add(node)
        self.computed = from_input & from_parameter
        self.side = from_input - from_parameter

    @staticmethod
    def is_size(node: fx.Node) -> bool:
        """Whether the node's value is a number (a size), which no tensor needs to carry."""
        value = node.meta.get("val")
        return node.op == "call_function" and isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat))

    def is_batch_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and str(value.node.expr) in self.batch_symbols

    def reads(self, node: fx.Node) -> bool:
        """Whether ``node`` takes part in the answer and reads values, not only a size."""
        return node in self.place and not self.is_size(node)

    def rows_first(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.ndim > 0 and _dim0(node) in self.batch_symbols

    def rowless(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)


def _dim0(node: fx.Node) -> str | None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.ndim and isinstance(value.shape[0], torch.SymInt):
        return str(value.shape[0].node.expr)
    return None


def _yardstick(node: fx.Node) -> object:
    """The argument of which the node reads shape, type and device alone, no values; None for most."""
    name = operator_name(node).partition(".")[0]
    if name.startswith("new_") or name.endswith("_like"):
        return node.args[0]
    return node.args[1] if name.endswith("_as") and node.args[0] is not node.args[1] else None


def _ancestors(nodes: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if n not in stop]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if n not in stop)
    return seen


def operator_name(node: fx.Node) -> str:
    """``conv2d.default`` of an ATen call; the function's name otherwise."""
    target: Any = node.target
    return str(getattr(target, "__name__", target)) if node.op == "call_function" else ""


def is_identity(node: fx.Node) -> bool:
    """Whether the node only copies its input in evaluation mode (dropout becomes a clone)."""
    return operator_name(node) in _IDENTITY


def export_graph(model: nn.Module, inputs: Inputs) -> BackboneGraph:
    """The backbone's graph for inputs like ``inputs`` (two rows or more), for any batch. Raises what export raises."""
    leaves = tensors(inputs)
    batch = torch.export.Dim("batch")
    wrapped = _FromLeaves(model, signature_of(inputs))
    wrapped.training = False
    with silence(), evaluating(model):
        program = torch.export.export(
            wrapped, (leaves,), dynamic_shapes=(tuple({0: batch} for _ in leaves),), strict=False
        )
        module = program.module(check_guards=False)
        if not _made_functional(module):
            module = program.run_decompositions({}).module(check_guards=False)
    for node in reversed(list(module.graph.nodes)):
        if any(name in operator_name(node) for name in _CHECKS) and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    output = next(n for n in module.graph.nodes if n.op == "output")
    logits = output.all_input_nodes[0]
    placeholders = tuple(n for n in module.graph.nodes if n.op == "placeholder")
    macs = _count(module, leaves)
    relevant = _ancestors([logits], stop=set())
    macs = {node: n for node, n in macs.items() if node in relevant}
    return BackboneGraph(module, placeholders, logits, macs, sum(macs.values()))


def _made_functional(module: fx.GraphModule) -> bool:
    """Drop steps that answer their very input, make those that write in place return; False where views forbid it.

    The exporter's own decomposition does the same, and all else, in three times the time of the export itself.
    """
    memory: dict[fx.Node, int] = {}
    really: dict[int, int] = {}
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in tuple(place):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        address, source = node.meta["val"].untyped_storage()._cdata, node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in memory and _is_very(source, node):
            really[address] = memory[source]
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        else:
            memory[node] = really.get(address, address)
    for node in module.graph.nodes:
        if _writes(node):
            twin = _without_writing(node)
            if twin is None:
                return False
            node.target = twin
            for earlier in (n for n, address in memory.items() if address == memory[node] and place[n] < place[node]):
                later = [user for user in earlier.users if place[user] > place[node]]
                if earlier.op != "call_function" or (later and _geometry(earlier) != _geometry(node)):
                    return False
                for user in later:
                    user.replace_input_with(earlier, node)
    return True


def _is_very(source: fx.Node, node: fx.Node) -> bool:
    """Whether ``node`` answers the tensor ``source`` itself, as dropout does in evaluation."""
    if "dropout" in operator_name(node):  # the exporter's values show a copy
        return node.args[2] is False
    before, after = source.meta["val"], node.meta["val"]
    shared = before.untyped_storage()._cdata == after.untyped_storage()._cdata
    return shared and not _writes(node) and _geometry(source) == _geometry(node)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _without_writing(node: fx.Node) -> torch._ops.OpOverload | None:
    """``relu`` for ``relu_``: the operator that returns what the node writes into its first argument, if there is
    one.
    """
    target: Any = node.target
    arguments = target._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)} - {torch.bool}
    name = target._schema.name.removeprefix("aten::")
    if target.namespace != "aten" or written != [0] or len(dtypes) != 1 or not name.endswith("_"):
        return None
    twin: torch._ops.OpOverload | None = getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)
    if twin is None or [(a.name, str(a.type)) for a in twin._schema.arguments] != [
        (a.name, str(a.type)) for a in arguments
    ]:
        return None
    return twin


def _geometry(node: fx.Node) -> tuple[object, ...]:
    """How the tensor looks at its memory."""
    value = node.meta["val"]
    places = map(str, (*value.shape, *value.stride(), value.storage_offset()))
    return (value.dtype, value.is_conj(), value.is_neg(), *places)


def told(error: BaseException) -> str:
    """The first line of what the error says that caused all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__


@contextmanager
def silence() -> Iterator[None]:
    """The exporter's warnings and log lines: what matters of them is in the exception, which the plan reports.

    One thread at a time: what is switched off belongs to the process.
    """
    with _quiet:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


def _count(module: fx.GraphModule, leaves: Sequence[Tensor]) -> dict[fx.Node, int]:
    """Macs of every node for one sample, exact for convolutions, matrix products and attention, on meta tensors."""
    counter = _MacCounter(module)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        counter.run(*(torch.empty_like(leaf[:1], device="meta") for leaf in leaves))
    return counter.macs


class _MacCounter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[fx.Node, int] = {}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, named = self.fetch_args_kwargs_from_env(n)
        args, named = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, named))
        # The exporter wrote views for this device's strides; another attention kernel lays its answer out otherwise.
        target: Any = torch.ops.aten.reshape.default if n.target is torch.ops.aten.view.default else n.target
        with FlopCounterMode(display=False) as counter:
            result = target(*args, **named)
        self.macs[n] = counter.get_total_flops() // 2
        return result


class Values(fx.Interpreter):
    """Runs a graph and keeps the values of ``wanted`` nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.kept = wanted, {}  # type: ignore[var-annotated]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = result
        return result
