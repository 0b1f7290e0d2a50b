"""Listening at cut points while the user's own modules run; hooks live only inside the ``with``.

It refuses to know why anybody listens. A visitor may replace the tensor, which is how rows leave an eager network.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from shallowdeep.types import CutError, CutPoint, Port

Hearer: TypeAlias = Callable[[str, Port, int, Any], Any]
Visitor: TypeAlias = Callable[[int, Tensor], Tensor | None]
"""Called as ``visit(position of the cut, tensor)``; what it returns, unless None, takes the tensor's place."""
Scope: TypeAlias = tuple[str, int]
"""One call of one module: its path and which call of it in the pass (from 0)."""

# torch numbers hooks by an unguarded global counter: two threads registering at once could overwrite each other.
_registration = threading.Lock()


def check_audible(model: nn.Module) -> None:
    """Raise ``CutError`` for a network that does not run its modules one by one."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CutError(f"{name} is TorchScript, which cannot be cut: give the nn.Module it was made from.")
        if path.endswith("_orig_mod") or module._compiled_call_impl is not None:
            raise CutError(
                f"{name} is compiled and cannot be cut: give the network as it was before torch.compile (its _orig_mod;"
                " a copy.deepcopy where model.compile() was called). Engine(..., backend='torch-compile') compiles."
            )


@contextmanager
def tapped(model: nn.Module, cuts: Sequence[CutPoint], visit: Visitor) -> Iterator[None]:
    """While open, every pass of *this thread* through ``model`` shows ``visit`` the tensor at each cut point.

    Calls are counted from the ``with`` on: open it once per pass. Raises ``CutError`` when the network lacks a module
    of a cut point or takes a path without its tensor.
    """
    by_call: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    by_function: dict[tuple[Scope, str, int], int] = {}
    for position, cut in enumerate(cuts):
        if cut.port == "call":
            by_function[(cut.module, cut.call), cut.function, cut.leaf] = position
        else:
            by_call[cut.module, cut.port, cut.call].append(position)

    def hear(path: str, port: Port, call: int, value: Any) -> Any:
        functions.pass_door((path, call), port)
        wanted = by_call.get((path, port, call))
        if wanted is None:
            return None
        leaves, spec = pytree.tree_flatten(value)
        changed = False
        for position in wanted:
            leaf = cuts[position].leaf
            if leaf >= len(leaves) or not isinstance(leaves[leaf], Tensor):
                raise CutError(f"The network took another path: no tensor at the cut point {cuts[position].name!r}.")
            with functions.deaf():
                replacement = visit(position, leaves[leaf])
            if replacement is not None:
                leaves[leaf], changed = replacement, True
        return pytree.tree_unflatten(leaves, spec) if changed else None

    def hear_function(scope: Scope, name: str, count: int, result: Tensor) -> Tensor | None:
        position = by_function.get((scope, name, count))
        return None if position is None else visit(position, result)

    functions = counting_functions({scope for scope, _, _ in by_function}, hear_function)
    with listening(model, {cut.module for cut in cuts}, hear):
        if not by_function:
            yield
            return
        with functions:
            yield


@contextmanager
def listening(model: nn.Module, paths: Iterable[str], hear: Hearer) -> Iterator[None]:
    """While open, ``hear(path, "in" | "out", call, value)`` gets what enters and leaves the modules at ``paths``.

    ``value`` is ``(args, named args)`` or the output; what ``hear`` returns, unless None, takes its place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(set(paths) - set(modules))
    if missing:
        raise CutError(f"No module {missing[0]!r} in {type(model).__name__}.")
    with ExitStack() as stack:
        stack.enter_context(_every_layer_is_called)
        for path in paths:
            for handle in _Ears(path, hear).attach(modules[path]):
                stack.callback(_remove, handle)
        yield


class _NoFastPath:
    """While entered, by whatever thread, PyTorch's transformer encoders call their layers with plain tensors."""

    def __init__(self) -> None:
        self.entered, self.before, self.lock = 0, True, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.entered:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.entered += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                torch.backends.mha.set_fastpath_enabled(self.before)


_every_layer_is_called = _NoFastPath()


def _remove(handle: RemovableHandle) -> None:
    with _registration:
        handle.remove()


class _Ears:
    """The two hooks on one module; deaf to other threads, which may run the same module at the same time."""

    def __init__(self, path: str, hear: Hearer) -> None:
        self.path, self.hear = path, hear
        self.thread = threading.get_ident()
        self.entered = 0
        self.open_calls: list[int] = []

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        with _registration:
            return [
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                module.register_forward_hook(self.leave),
            ]

    def enter(self, module: nn.Module, args: Any, named: Any = None) -> Any:
        # A hook that another thread is just putting on or off may be called here, even without the named arguments.
        if threading.get_ident() != self.thread:
            return None
        self.open_calls.append(self.entered)
        self.entered += 1
        return self.hear(self.path, "in", self.open_calls[-1], (args, named))

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        return self.hear(self.path, "out", self.open_calls.pop(), output)


class counting_functions(TorchFunctionMode):  # noqa: N801  (used as a context manager)
    """While open, ``hear(scope, name, count, result)`` gets every torch function's result inside the ``scopes``.

    It is counted by name from 1 in each call of the scope's module, so that what happens elsewhere, for instance how
    a mask is made, does not matter. This reaches cut points that no module call ends or enters.
    """

    def __init__(self, scopes: Collection[Scope], hear: Callable[[Scope, str, int, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.scopes, self.hear = scopes, hear
        self.open: list[Scope] = []
        self.counts: Counter[tuple[Scope, str]] = Counter()
        self.listens = True

    def pass_door(self, scope: Scope, port: Port) -> None:
        """A module call begins (``"in"``) or ends (``"out"``)."""
        if scope in self.scopes:
            if port == "in":
                self.open.append(scope)
            else:
                self.open.remove(scope)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """What runs inside is not counted: a visitor's own functions are none of the network's."""
        before, self.listens = self.listens, False
        try:
            yield
        finally:
            self.listens = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.listens:
            return result
        name = str(getattr(func, "__name__", ""))
        for scope in tuple(self.open):
            self.counts[scope, name] += 1
            replacement = (
                self.hear(scope, name, self.counts[scope, name], result) if isinstance(result, Tensor) else None
            )
            result = result if replacement is None else replacement
        return result
