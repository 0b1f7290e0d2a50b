"""What a classifier is called with and what it answers: a tensor, a tuple or a dict in, logits out.

It refuses to know what the rows mean; it only keeps them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from shallowdeep.types import DataError, InputSignature

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Batches: TypeAlias = Iterable[tuple[Inputs, Tensor]]


def as_inputs(value: object) -> Inputs:
    """``value`` as a tensor, a tuple or a dict of tensors with rows first. Raises ``DataError``."""
    if isinstance(value, Tensor):
        found: Inputs = value
    elif isinstance(value, Mapping) and value:
        found = {str(name): _tensor(tensor, f"input {name!r}") for name, tensor in value.items()}
    elif isinstance(value, (tuple, list)) and value:
        found = tuple(_tensor(tensor, f"input {i}") for i, tensor in enumerate(value))
    else:
        raise DataError(f"Inputs must be a tensor, a tuple or a dict of tensors, found {type(value).__name__}.")
    rows = {tensor.shape[0] if tensor.ndim else None for tensor in tensors(found)}
    if None in rows or len(rows) != 1:
        shapes = [tuple(tensor.shape) for tensor in tensors(found)]
        raise DataError(f"Every input needs the same number of rows on its first axis, found shapes {shapes}.")
    return found


def _tensor(value: object, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"{what} must be a tensor, found {type(value).__name__}.")
    return value


def tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of ``inputs`` in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs


def like(inputs: Inputs, leaves: Sequence[Tensor]) -> Inputs:
    """``leaves`` put together the way ``inputs`` is."""
    if isinstance(inputs, Tensor):
        return leaves[0]
    return dict(zip(inputs, leaves, strict=True)) if isinstance(inputs, dict) else tuple(leaves)


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """``change`` applied to every tensor of ``inputs``."""
    return like(inputs, [change(tensor) for tensor in tensors(inputs)])


def num_rows(inputs: Inputs) -> int:
    """B, the length of the first axis."""
    return tensors(inputs)[0].shape[0]


def take(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    """The rows ``rows`` of every tensor."""
    return each(inputs, lambda tensor: tensor[rows])


def join(parts: Sequence[Inputs]) -> Inputs:
    """Rows of several inputs of one kind, one after another."""
    columns = zip(*(tensors(part) for part in parts), strict=True)
    return like(parts[0], [torch.cat(column) for column in columns])


def signature_of(inputs: Inputs) -> InputSignature:
    """Kind, names, shapes (without the batch axis) and dtypes of ``inputs``."""
    kind = "tensor" if isinstance(inputs, Tensor) else "dict" if isinstance(inputs, dict) else "tuple"
    leaves = tensors(inputs)
    return InputSignature(
        kind=kind,  # type: ignore[arg-type]
        names=tuple(inputs) if isinstance(inputs, dict) else tuple(str(i) for i in range(len(leaves))),
        shapes=tuple(tuple(leaf.shape[1:]) for leaf in leaves),
        dtypes=tuple(str(leaf.dtype).removeprefix("torch.") for leaf in leaves),
    )


def in_order(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """``inputs``, a dict of them in the order of ``names`` where it has just those."""
    if isinstance(inputs, dict) and inputs.keys() == set(names):
        return {name: inputs[name] for name in names}
    return inputs


def inputs_from(signature: InputSignature, leaves: Sequence[Tensor]) -> Inputs:
    """``leaves`` put together as ``signature`` says."""
    if signature.kind == "tensor":
        return leaves[0]
    return dict(zip(signature.names, leaves, strict=True)) if signature.kind == "dict" else tuple(leaves)


def example_of(signature: InputSignature, batch: int, device: torch.device) -> Inputs:
    """``batch`` rows that fit ``signature``: ones for integers (a valid token, an open mask), else noise. Of booleans
    the first of a row is true: a mask is then open somewhere, whether true means a token or padding.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for shape, name in zip(signature.shapes, signature.dtypes, strict=True):
        dtype: torch.dtype = getattr(torch, name)
        if dtype.is_floating_point:
            leaves.append(torch.randn(batch, *shape, generator=generator).to(device, dtype))
        else:
            leaves.append(torch.ones(batch, *shape, dtype=dtype, device=device))
        if dtype is torch.bool:
            leaves[-1].view(batch, -1)[:, 1:] = False
    return inputs_from(signature, leaves)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` returns for ``inputs``: a tuple is passed as positional, a dict as named arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits_of(output: Any) -> Tensor:
    """Logits [B, C] of what a backbone returned: a tensor, ``.logits``, or the first of a tuple. Raises
    ``DataError``.
    """
    found = output
    if isinstance(found, Mapping):
        if "logits" not in found:
            raise DataError(
                f"The network returns a dict without 'logits'; it has {sorted(map(str, found))};"
                " wrap it to return them alone."
            )
        found = found["logits"]
    elif not isinstance(found, Tensor):
        first = found[0] if isinstance(found, (tuple, list)) and found else found
        found = getattr(found, "logits", first)  # of a named tuple, too, wherever they stand
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise DataError(f"The network must return logits [B, C]; it returns {type(output).__name__}.")
    if found.ndim == 1 or (found.ndim == 2 and found.shape[1] == 1):
        raise DataError(
            f"The network answers with a single logit {tuple(found.shape)}; wrap it to two: "
            "torch.cat([torch.zeros_like(z), z], dim=1) with z of shape [B, 1]."
        )
    if found.ndim != 2:
        raise DataError(f"The network must return logits [B, C], found shape {tuple(found.shape)}.")
    return found


def check_labels(labels: object, rows: int, num_classes: int) -> Tensor:
    """``labels`` as int64 class indices [B] in 0..C-1. Raises ``DataError`` naming what was found instead."""
    if not isinstance(labels, Tensor):
        raise DataError(f"Labels must be a tensor of class indices, found {type(labels).__name__}.")
    if labels.ndim == 2:
        raise DataError(
            f"Labels have shape {tuple(labels.shape)}: multi-label or one-hot targets are not supported; "
            "give one class index per row (labels.argmax(1) for one-hot)."
        )
    if labels.is_floating_point():
        raise DataError(f"Labels are {labels.dtype}: a regression target? Give integer class indices.")
    if labels.shape != (rows,) or labels.dtype == torch.bool:
        raise DataError(f"Labels must be {rows} class indices, found {labels.dtype} {tuple(labels.shape)}.")
    if rows and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise DataError(f"Labels must lie in 0..{num_classes - 1} for {num_classes} classes, found {found}.")
    return labels.to(torch.int64)


def batches(data: object, batch_size: int = 256) -> Iterator[tuple[Inputs, Tensor]]:
    """``(inputs, labels)`` batches of a DataLoader, an iterable of such pairs, or one pair of tensors, in order."""
    pair = as_pair(data)
    if pair is not None:
        inputs, labels = pair
        for start in range(0, num_rows(inputs), batch_size):
            rows = slice(start, start + batch_size)
            yield take(inputs, rows), labels[rows]
        return
    if not isinstance(data, Iterable):
        raise DataError(
            "Data must be a DataLoader, an iterable of (inputs, labels) batches or one (inputs, labels) pair, "
            f"found {type(data).__name__}."
        )
    if isinstance(data, tuple) and len(data) == 2 and data[1] is None:
        raise DataError("Labels are missing: found (inputs, None).")
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"Each batch must be a pair (inputs, labels), found {type(batch).__name__}.")
        yield as_inputs(batch[0]), _tensor(batch[1], "Labels")


def as_pair(data: object) -> tuple[Inputs, Tensor] | None:
    """``data`` as one ``(inputs, labels)`` pair held in memory, or None when it is a stream of batches."""
    if not isinstance(data, tuple) or len(data) != 2 or not isinstance(data[1], Tensor):
        return None
    inputs = as_inputs(data[0])
    if data[1].ndim == 0 or data[1].shape[0] != num_rows(inputs):
        raise DataError(f"{num_rows(inputs)} rows of inputs but labels of shape {tuple(data[1].shape)}.")
    return inputs, data[1]


HASHED_TOGETHER = 32
"""Rows whose wide numbers stay in the processor's cache."""


def row_hashes(inputs: Inputs) -> Tensor:
    """A 64-bit hash of every row's bits, int64 [B]: equal rows of equal dtype agree, whatever batch they come in."""
    total = torch.zeros(num_rows(inputs), dtype=torch.int64)
    for position, tensor in enumerate(tensors(inputs)):
        rows = tensor.detach().cpu().contiguous().reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
        # At most 32 bits a number: the top bit of 64 survives no odd factor, so that two flipped signs would cancel.
        bits = rows.view({1: torch.uint8, 2: torch.int16}.get(rows.element_size(), torch.int32))
        generator = torch.Generator().manual_seed(position)
        odd = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
        sums = [(part.to(torch.int64) * odd).sum(1) for part in torch.split(bits, HASHED_TOGETHER)]
        total = _mix(total * 31 + torch.cat(sums))
    return total


def _mix(x: Tensor) -> Tensor:
    # splitmix64's finaliser: without it, rows that differ in one value would differ by a multiple of one number.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, images with their channels last: convolutions are faster so, twice in bf16."""
    tensor = tensor.to(device)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def mask_of(inputs: Inputs, name: str) -> Tensor | None:
    """The mask [B, T] called ``name`` among the inputs, or None when ``name`` is empty."""
    if not name:
        return None
    return inputs[name] if isinstance(inputs, dict) else tensors(inputs)[int(name)]


def mask_name(inputs: Inputs, tokens: int) -> str:
    """The input that masks ``tokens`` positions: ``attention_mask`` of a dict, or a later integer input of a tuple
    whose rows are ones and then, perhaps, zeros. Others may be token types, or masks where 1 means padding.
    """
    if isinstance(inputs, dict):
        mask = inputs.get("attention_mask")
        return "attention_mask" if mask is not None and mask.shape[1:] == (tokens,) else ""
    for i, tensor in enumerate(tensors(inputs)[1:], start=1):
        if tensor.is_floating_point() or tensor.shape[1:] != (tokens,):
            continue
        x = tensor.long()
        if bool((x[:, 0] == 1).all()) and bool(((x == 0) | (x == 1)).all()) and bool((x.diff(dim=1) <= 0).all()):
            return str(i)
    return ""
