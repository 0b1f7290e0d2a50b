"""The project's words: what a trace, a plan and a reference accept, keep and refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shallowdeep.files import FormatError, write_tensors
from shallowdeep.types import ConfusionReference, CutPoint, DataError, Trace, table


def trace(**changes: Any) -> Trace:
    """Three exits, four samples, two classes."""
    logits_ENC = torch.arange(24.0).reshape(3, 4, 2).sin()
    given = {"logits_ENC": logits_ENC, "labels_N": torch.tensor([0, 1, 1, 0]), "cost_E": torch.tensor([0.2, 0.6, 1.1])}
    return Trace(**(given | changes))


def full_trace() -> Trace:
    return trace(
        full_exit=1,
        own_cost_E=torch.tensor([0.1, 0.1, 0.0], dtype=torch.float64),
        feeds_EE=torch.eye(3).roll(1, 1).bool(),
        hash_N=torch.tensor([5, -(2**62), 7, 8]),
        trained_N=torch.tensor([True, False, False, True]),
        confusion_reference=ConfusionReference(mean_EE=torch.rand(3, 3), covariance_EEE=torch.rand(3, 3, 3)),
        exit_names=("a", "full", "mirrored"),
        info={"model": "Net"},
    )


def test_three_tensors_suffice() -> None:
    made = trace(cost_E=[0.2, 0.6, 1.1])
    assert (made.num_exits, made.num_samples, made.num_classes) == (3, 4, 2)
    assert made.full_exit == 2
    assert made.exit_names == ("exit0", "exit1", "full")
    assert made.cost_E.dtype == torch.float64
    assert trace(labels_N=torch.tensor([0, 1, 1, 0], dtype=torch.uint8)).labels_N.dtype == torch.int64
    assert trace(full_exit=-2).exit_names == ("exit0", "full", "exit2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_ENC": torch.zeros(4, 2)}, r"found torch\.float32 \(4, 2\)"),
        ({"logits_ENC": torch.zeros(3, 4, 2, dtype=torch.int64)}, r"found torch\.int64 \(3, 4, 2\)"),
        ({"logits_ENC": torch.zeros(3, 0, 2)}, r"found \(3, 0, 2\)"),
        ({"logits_ENC": torch.zeros(0, 4, 2)}, r"found \(0, 4, 2\)"),
        ({"logits_ENC": torch.zeros(3, 4, 1)}, r"found \(3, 4, 1\)"),
        ({"labels_N": torch.tensor([0, 1, 1])}, r"4 integers, found torch\.int64 \(3,\)"),
        ({"labels_N": torch.tensor([0.0, 1, 1, 0])}, r"found torch\.float32 \(4,\)"),
        ({"labels_N": torch.tensor([True, True, False, False])}, r"found torch\.bool \(4,\)"),
        ({"labels_N": torch.tensor([0, 1, 2, 0])}, r"lie in 0\.\.1, found 0\.\.2"),
        ({"labels_N": torch.tensor([0, 1, -1, 0])}, r"lie in 0\.\.1, found -1\.\.1"),
        ({"cost_E": torch.tensor([0.2, 1.1])}, r"3 finite shares, found \[0\.2"),
        ({"cost_E": torch.tensor([0.2, float("nan"), 1.1])}, "nan"),
        ({"cost_E": torch.tensor([0.5, 0.25, 1.0])}, r"not fall along the exits, found \[0\.5, 0\.25, 1\.0\]"),
        ({"full_exit": 3}, "full_exit 3 is not one of 3"),
        ({"full_exit": -4}, "full_exit -4 is not one of 3"),
        ({"own_cost_E": torch.zeros(2)}, r"own_cost_E must have the shape \(3,\), found \(2,\)"),
        ({"feeds_EE": torch.zeros(3)}, r"feeds_EE must have the shape \(3, 3\), found \(3,\)"),
        ({"hash_N": torch.zeros(5)}, r"hash_N must have the shape \(4,\), found \(5,\)"),
        ({"trained_N": torch.zeros(1)}, r"trained_N must have the shape \(4,\), found \(1,\)"),
        ({"exit_names": ("a", "full")}, r"3 names, found \('a', 'full'\)"),
    ],
)
def test_a_trace_says_what_is_wrong_with_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        trace(**changes)


@pytest.mark.parametrize("index", [torch.tensor([3, 0, 0]), torch.tensor([True, False, False, True])])
def test_rows_picks_everything_that_has_rows(index: Tensor) -> None:
    whole = full_trace()
    some = whole.rows(index)
    assert torch.equal(some.logits_ENC, whole.logits_ENC[:, index])
    for name in ("labels_N", "hash_N", "trained_N"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[index]), name
    assert some.full_exit == 1
    assert some.exit_names == whole.exit_names
    assert some.confusion_reference is whole.confusion_reference
    bare = trace().rows(index)
    assert bare.hash_N is None
    with pytest.raises(DataError, match=r"found \(3, 0, 2\)"):
        whole.rows(torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("made", [trace(), full_trace()], ids=["bare", "full"])
def test_saved_and_loaded_is_the_same(made: Trace, tmp_path: Path) -> None:
    made.save(tmp_path / "new" / "trace.safetensors")
    back = Trace.load(tmp_path / "new" / "trace.safetensors")
    for field in dataclasses.fields(Trace):
        before, after = getattr(made, field.name), getattr(back, field.name)
        if isinstance(before, Tensor):
            assert torch.equal(before, after), field.name
            assert before.dtype == after.dtype
        elif isinstance(before, ConfusionReference):
            assert torch.equal(before.mean_EE, after.mean_EE)
            assert torch.equal(before.covariance_EEE, after.covariance_EEE)
        else:
            assert before == after, field.name


def test_a_trace_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    trace().save(path)
    whole = path.read_bytes()
    monkeypatch.setattr("shallowdeep.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        full_trace().save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def written(path: Path, tensors: dict[str, Tensor], about: object) -> Path:
    write_tensors(path, tensors, {"shallowdeep_trace": about if isinstance(about, str) else json.dumps(about)})
    return path


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    parts = {"logits_ENC": torch.zeros(1, 1, 2), "labels_N": torch.zeros(1).long(), "cost_E": torch.ones(1)}
    about = {"format": 1, "full_exit": 0, "exit_names": ["full"], "info": {}}
    assert Trace.load(written(path, parts, about)).num_exits == 1, "the file that is damaged below is whole"
    with pytest.raises(FormatError, match=r"x\.safetensors has trace format 2; this version reads up to 1"):
        Trace.load(written(path, parts, about | {"format": 2}))
    with pytest.raises(FormatError, match=r"x\.safetensors holds no logits_ENC, cost_E: a trace is what"):
        Trace.load(written(path, {"labels_N": parts["labels_N"]}, about))
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged: .*0\.\.1, found 7\.\.7"):
        Trace.load(written(path, parts | {"labels_N": torch.tensor([7])}, about))
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged"):
        Trace.load(written(path, parts, "{"))
    write_tensors(path, parts, {})
    with pytest.raises(FormatError, match=r"x\.safetensors holds tensors but is not a trace; .*sdn collect"):
        Trace.load(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged or not a safetensors file"):
        Trace.load(path)
    with pytest.raises(FormatError, match=r"No file .*absent"):
        Trace.load(tmp_path / "absent")


def test_confusion_moments_of_a_subset_are_those_of_the_sum() -> None:
    distances_IN = torch.rand(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stop, asked = 2, torch.tensor([True, False, True, True])
    covariance_EEE = torch.zeros(4, 4, 4, dtype=torch.float64)
    mean_EE = torch.zeros(4, 4, dtype=torch.float64)
    mean_EE[stop], covariance_EEE[stop] = distances_IN.mean(1), torch.cov(distances_IN, correction=0)
    mean, std = ConfusionReference(mean_EE=mean_EE, covariance_EEE=covariance_EEE).moments(stop, asked)
    total_N = distances_IN[0] + distances_IN[2]
    assert mean == pytest.approx(float(total_N.mean()), abs=1e-12)
    assert std == pytest.approx(float(total_N.std(correction=0)), abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "channel_dim", "layout"),
    [((7,), -1, "vector"), ((5, 7), -1, "tokens"), ((7, 5), 1, "map"), ((3, 4, 4), 1, "map"), ((4, 4, 3), -1, "map")],
)
def test_layout_follows_from_shape_and_channels(shape: tuple[int, ...], channel_dim: int, layout: str) -> None:
    cut = CutPoint(name="", module="", call=0, port="out", macs_before=1, shape=shape, channel_dim=channel_dim)
    assert cut.layout == layout


def test_table_is_aligned() -> None:
    assert table([("exit", "n"), ("a", "100")]).split("\n") == ["exit    n", "---------", "a     100"]


ROWS = [
    ("score", "AUROC", "false positives at 95 %", "difference, 95 %"),
    ("max-softmax", "0.9262", "0.2626", ""),
    ("standardised confusion", "0.8719", "0.4303", "-0.0543 (-0.0666 to -0.0429)"),
]


def test_a_table_is_as_wide_as_it_likes_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    said = table(ROWS).splitlines()
    assert len(said) == 4
    assert len(said[1]) == 22 + 2 + 6 + 2 + 23 + 2 + 28


@pytest.mark.parametrize("width", [79, 60, 40, 30])
def test_a_table_fits_the_terminal_and_loses_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = table(ROWS)
    assert max(map(len, said.splitlines())) <= width
    for word in " ".join(" ".join(row) for row in ROWS).split():
        assert word in said, "no number and no name is broken"


def test_heads_are_wrapped_before_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "75")
    assert "-0.0543 (-0.0666 to -0.0429)" in table(ROWS)


def test_a_table_too_narrow_for_its_words_goes_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert table(ROWS).count("max-softmax") > 1
    monkeypatch.setenv("COLUMNS", "5")
    assert table([("name", "a"), ("x", "0.123456")]).splitlines()[-1].endswith("0.123456"), "two columns stay"
    assert table([("alone",), ("abcdefgh",)]).endswith("abcdefgh")
