"""What a verb leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shallowdeep.files import FormatError
from shallowdeep.runs import describe_device, plain, read_run, write_run


def test_a_run_is_written_and_read(tmp_path: Path) -> None:
    write_run(tmp_path / "new", "train", {"epochs": 3, "data": Path("a/b")}, {"loss_E": torch.tensor([0.5, 1.0])})
    about = read_run(tmp_path / "new", "train")
    assert about["verb"] == "train"
    assert about["choices"] == {"epochs": 3, "data": "a/b"}
    assert about["results"] == {"loss_E": [0.5, 1.0]}
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"] == describe_device()
    assert (tmp_path / "new" / "run.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.0, math.nan]), [1.0, None]),
        (float("-inf"), None),
        ((1, (True, None)), [1, [True, None]]),
        ({1: Path("x")}, {"1": "x"}),
        (torch.float32, "torch.float32"),
    ],
)
def test_anything_becomes_json(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"No folder of `sdn train` at .*: sdn train writes one"):
        read_run(tmp_path, "train")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FormatError, match=r"run\.json is damaged"):
        read_run(tmp_path, "train")
    for content in ("[]", "{}"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(FormatError, match="is no folder of this library's: give one of `sdn train`"):
            read_run(tmp_path, "train")
    write_run(tmp_path, "plan", {}, {})
    with pytest.raises(FormatError, match="is a folder of `sdn plan`: give one of `sdn train`"):
        read_run(tmp_path, "train")
