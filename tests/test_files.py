"""Files are whole or absent."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from conftest import full_disk
from shallowdeep import files
from shallowdeep.files import FormatError, read_json, read_tensors, replacing, write_tensors, write_text


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).t(), "b": torch.tensor([True, False])}
    write_tensors(tmp_path / "deep" / "er" / "x", tensors, {"k": "v"})
    back, metadata = read_tensors(tmp_path / "deep" / "er" / "x")
    assert metadata == {"k": "v"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def half(content: object, place: Path, *_: object) -> None:
        Path(place).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(1)}, {})
    monkeypatch.setattr(files.os, "replace", lambda *_: half("", path.with_name(".other")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    (tmp_path / ".other").unlink()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written lies about"


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "{}")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_damaged_files_name_themselves(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"run\.json is damaged or not JSON"):
        read_json(path)
    with pytest.raises(FormatError, match=r"run\.json is damaged or not a safetensors file"):
        read_tensors(path)


def test_absent_files_name_themselves(tmp_path: Path) -> None:
    for read in (read_json, read_tensors):
        with pytest.raises(FormatError, match=r"No file .*gone"):
            read(tmp_path / "gone")
        with pytest.raises(FormatError, match="No file"):
            read(tmp_path)


def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1)}, {})

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        write_tensors(path, {"a": torch.zeros(1)}, {})
    assert float(read_tensors(path)[0]["a"]) == 1.0
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_disk_that_is_full_names_the_file_and_why(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*note\.txt"):
        write_text(tmp_path / "note.txt", "x" * 10**6)
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"{name} is a folder or a device"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()


def test_threads_write_into_files_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool, replacing(tmp_path / "x") as (own,):
        own.write_text("own")
        pool.submit(write_text, tmp_path / "x", "another").result()
        assert (tmp_path / "x").read_text() == "another"
        assert own.read_text() == "own"
    assert (tmp_path / "x").read_text() == "own"
