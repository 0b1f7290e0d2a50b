"""What goes in and comes out of a classifier: kept together by rows, refused in one sentence."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nets import images, scaled_images, token_batch
from shallowdeep.inputs import (
    Inputs,
    as_inputs,
    as_pair,
    batches,
    call,
    check_labels,
    each,
    example_of,
    inputs_from,
    join,
    logits_of,
    mask_name,
    mask_of,
    num_rows,
    row_hashes,
    signature_of,
    take,
    tensors,
)
from shallowdeep.types import DataError

CPU = torch.device("cpu")
KINDS = {"tensor": images(6), "tuple": scaled_images(6), "dict": token_batch(6)}


def equal(a: Inputs, b: Inputs) -> bool:
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_together(kind: str) -> None:
    inputs = KINDS[kind]
    assert signature_of(inputs).kind == kind
    assert num_rows(inputs) == 6
    assert equal(join([take(inputs, slice(0, 2)), take(inputs, torch.tensor([2, 3, 4, 5]))]), inputs)
    assert equal(inputs_from(signature_of(inputs), tensors(inputs)), inputs)
    example = example_of(signature_of(inputs), 3, torch.device("cpu"))
    assert num_rows(example) == 3
    assert signature_of(example) == signature_of(inputs)


def test_lists_and_mappings_are_taken_as_tuples_and_dicts() -> None:
    assert isinstance(as_inputs([torch.zeros(2), torch.zeros(2, 3)]), tuple)
    assert isinstance(as_inputs(UserDict(x=torch.zeros(2))), dict)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "found NoneType"),
        (3, "found int"),
        ((), "found tuple"),
        ({}, "found dict"),
        ([torch.zeros(2), 1], "input 1 must be a tensor, found int"),
        ({"x": [1, 2]}, "input 'x' must be a tensor, found list"),
        ((torch.zeros(2), torch.zeros(3)), r"same number of rows on its first axis, found shapes \[\(2,\), \(3,\)\]"),
        (torch.tensor(1.0), r"found shapes \[\(\)\]"),
    ],
)
def test_what_no_network_takes(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_inputs(value)


def test_a_network_is_called_as_its_inputs_say() -> None:
    class Echo(nn.Module):
        def forward(self, *args: Any, **named: Any) -> Any:
            return args, named

    echo = Echo()
    assert call(echo, KINDS["tensor"])[0][0] is KINDS["tensor"]
    assert len(call(echo, KINDS["tuple"])[0]) == 2
    assert set(call(echo, KINDS["dict"])[1]) == {"input_ids", "attention_mask"}


class Output(NamedTuple):
    """What a network answers, logits not first."""

    features: Tensor
    logits: Tensor


def test_logits_are_found_where_networks_put_them() -> None:
    assert logits_of(Output(torch.zeros(2, 64), torch.ones(2, 10))).shape == (2, 10)
    logits = torch.zeros(2, 3)
    for output in (logits, (logits, None), [logits], {"logits": logits, "loss": None}, SimpleNamespace(logits=logits)):
        assert logits_of(output) is logits


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(4), r"single logit \(4,\); wrap it to two: torch\.cat"),
        (torch.zeros(4, 1), r"single logit \(4, 1\); wrap it to two"),
        (torch.zeros(4, 3, 2), r"found shape \(4, 3, 2\)"),
        (torch.zeros(4, 3, dtype=torch.int64), "it returns Tensor"),
        ({"scores": torch.zeros(4, 3)}, r"without 'logits'; it has \['scores'\]; wrap it to return them alone"),
        (None, "it returns NoneType"),
        ("text", "it returns str"),
        ((), "it returns tuple"),
    ],
)
def test_answers_that_are_no_logits(output: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        logits_of(output)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "found list"),
        (torch.zeros(2, 3), r"shape \(2, 3\): multi-label or one-hot"),
        (torch.zeros(2), "a regression target"),
        (torch.zeros(3, dtype=torch.int64), r"2 class indices, found torch\.int64 \(3,\)"),
        (torch.tensor([True, False]), r"found torch\.bool"),
        (torch.tensor([0, 3]), r"0\.\.2 for 3 classes, found 0\.\.3"),
        (torch.tensor([-1, 0]), r"found -1\.\.0"),
    ],
)
def test_labels_that_are_none(labels: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(labels, 2, 3)


def test_labels_of_any_integer_type_become_int64() -> None:
    assert check_labels(torch.tensor([2, 0], dtype=torch.uint8), 2, 3).dtype == torch.int64
    assert len(check_labels(torch.zeros(0, dtype=torch.int64), 0, 3)) == 0


def test_batches_of_every_form_of_data() -> None:
    x, y = images(10), torch.arange(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    pairs = list(zip(x.split(4), y.split(4), strict=True))
    for data in ((x, y), loader, pairs, iter(pairs), tuple(pairs[:2]) + tuple(pairs[2:])):
        found = list(batches(data, 4))
        assert [len(labels) for _, labels in found] == [4, 4, 2]
        assert torch.equal(torch.cat([inputs for inputs, _ in found]), x)  # type: ignore[misc]
    assert list(batches((x[:0], y[:0]))) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "found int"),
        ([torch.zeros(2)], r"pair \(inputs, labels\), found Tensor"),
        ([(torch.zeros(2), [0, 1])], "Labels must be a tensor, found list"),
        ((torch.zeros(2), torch.zeros(3)), r"2 rows of inputs but labels of shape \(3,\)"),
        ((torch.zeros(2), torch.tensor(0)), r"labels of shape \(\)"),
    ],
)
def test_data_that_is_none(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(batches(data))


def test_a_pair_is_told_from_a_stream() -> None:
    assert as_pair((images(2), torch.zeros(2))) is not None
    assert as_pair([images(2), torch.zeros(2)]) is None
    assert as_pair(((images(2), torch.zeros(2)), (images(2), torch.zeros(2)))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_hashes_do_not_depend_on_the_batch(kind: str) -> None:
    inputs = KINDS[kind]
    whole = row_hashes(inputs)
    parts = [row_hashes(take(inputs, slice(i, i + step))) for i, step in ((0, 1), (1, 3), (4, 0), (4, 2))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    assert torch.equal(row_hashes(take(inputs, order)), whole[order])
    assert len(whole.unique()) == 6


DTYPES = (torch.uint8, torch.bool, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hashes_of_every_dtype_tell_rows_apart(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).to(dtype)
    assert len(row_hashes(rows).unique()) == 5
    assert torch.equal(row_hashes(rows.t().contiguous().t()), row_hashes(rows)), "strides do not matter"


def test_hashes_scatter() -> None:
    rows = torch.arange(20_000).reshape(-1, 1)
    hashes = row_hashes(rows)
    assert len(hashes.unique()) == 20_000
    ones = torch.stack([(hashes >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert float((ones - 0.5).abs().max()) < 0.02, "every bit is a coin"
    signs = torch.tensor([[1.0, 1, -1, -1], [-1, 1, 1, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, -1, 1, 1]])
    for dtype in (torch.float32, torch.float64):
        assert len(row_hashes(signs.to(dtype)).unique()) == 5, "signs do not cancel"


def test_masks_are_recognised() -> None:
    ids = torch.randint(2, 9, (3, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    named = {"input_ids": ids, "attention_mask": mask}
    assert mask_name(named, 4) == "attention_mask"
    assert mask_name(named, 5) == ""
    assert mask_name((ids, mask), 4) == "1"
    assert mask_name((ids, torch.zeros_like(mask)), 4) == "", "all closed: token types, no mask"
    assert mask_name((ids, ids), 4) == ""
    padding, second = torch.tensor([[False, False, True, True]] * 2), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert mask_name((ids, padding), 4) == "", "true where there is padding, as in nn.TransformerEncoder"
    assert mask_name((ids, second, mask), 4) == "2", "types of tokens come before the mask"
    assert mask_name(ids, 4) == ""
    assert mask_of(named, "attention_mask") is mask
    assert mask_of((ids, mask), "1") is mask
    assert mask_of(named, "") is None


def test_each_keeps_the_kind() -> None:
    def double(tensor: Tensor) -> Tensor:
        return tensor * 2

    for inputs in KINDS.values():
        assert equal(each(inputs, double), inputs_from(signature_of(inputs), [double(t) for t in tensors(inputs)]))


def test_a_mask_of_booleans_is_open_somewhere_in_the_example() -> None:
    """Whether true means a token or, as in nn.TransformerEncoder, padding."""
    mask, flag = example_of(signature_of((torch.ones(2, 4, dtype=torch.bool), torch.ones(2, dtype=torch.bool))), 3, CPU)
    assert mask.tolist() == [[True, False, False, False]] * 3
    assert flag.tolist() == [True] * 3
