"""The study's data: reading and splitting it, what is missing, and fetching it from a local server."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from shallowdeep.cli import main
from shallowdeep.files import FormatError
from shallowdeep.paper import downloads
from shallowdeep.paper.datasets import DATASETS, TINY_COUNTS, class_names, read_rows, read_tiny, split_rows, study_set
from shallowdeep.types import DataError

# ---------------------------------------------------------------- splits


def test_the_split_is_even_disjoint_and_the_same_every_time() -> None:
    labels = torch.arange(10).repeat_interleave(60)[torch.randperm(600)]
    kept, held = split_rows(labels, 100)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(600))
    assert labels[held].bincount().tolist() == [10] * 10
    again = split_rows(labels, 100)
    assert torch.equal(held, again[1])
    assert not torch.equal(held, split_rows(labels, 100, seed=1)[1])
    kept_mean = kept.double().mean()
    assert 200 < kept_mean < 400, "held-out rows come from everywhere"


def test_cifar_rows_are_bytes(cifar10: Path) -> None:
    images, labels = read_rows("cifar10", cifar10.parent, "train")
    assert (images.shape, images.dtype, len(labels)) == ((50000, 3, 32, 32), torch.uint8, 50000)
    mean = images[::50].double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.49, 0.48, 0.45]).double(), atol=0.02)


def test_missing_data_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sdn paper data .* --download"):
        read_rows("cifar100", tmp_path, "train")
    with pytest.raises(ValueError, match="tinyimagenet"):
        study_set("imagenet")


# ---------------------------------------------------------------- Tiny ImageNet, in miniature


def miniature(root: Path, images: int = 3) -> Path:
    """The official layout: three classes, a few images each, grey ones among them."""
    folder = root / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    generator = np.random.default_rng(0)
    for label, wnid in enumerate(sorted(wnids)):
        place = folder / "train" / wnid / "images"
        place.mkdir(parents=True)
        for i in range(images):
            shape = (64, 64) if i == 0 else (64, 64, 3)
            pixels = np.full(shape, 40 * label, np.uint8) + generator.integers(0, 9, shape, np.uint8)
            Image.fromarray(pixels).save(place / f"{wnid}_{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(["n02", "n01"]):
        Image.fromarray(np.full((64, 64, 3), 100 * i, np.uint8)).save(folder / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n02\tdog, domestic dog\nn01\tgoldfish\nn77\tno class of it\n")
    return folder


def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of the miniature in place of the official ones."""
    for name, count in (("ids", 3), ("train", 9), ("val", 2)):
        monkeypatch.setitem(TINY_COUNTS, name, count)


def test_tiny_imagenet_in_its_official_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature(tmp_path)
    small_counts(monkeypatch)
    images, labels = read_rows("tinyimagenet", tmp_path, "train")
    assert images.shape == (9, 3, 64, 64)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2], "ids are numbered in order"
    assert (images[6:].double().mean() - images[:3].double().mean()) > 60
    images, labels = read_rows("tinyimagenet", tmp_path, "test")
    assert labels.tolist() == [1, 0]
    assert float(images[1].double().mean()) == pytest.approx(100, abs=2)


def test_classes_have_names(tmp_path: Path, cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature(tmp_path)
    small_counts(monkeypatch)
    assert class_names("tinyimagenet", tmp_path) == ("goldfish", "dog", "n03"), "in the order of the labels"
    assert class_names("cifar10", cifar10.parent)[5] == "dog"


def test_a_damaged_tiny_imagenet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = miniature(tmp_path)
    small_counts(monkeypatch)
    lost = folder / "train" / "n02" / "images" / "n02_1.JPEG"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(DataError, match=r"n02 has 2 images, expected 3"):
        read_tiny(folder, "train")
    lost.write_bytes(kept[:200])
    with pytest.raises(FormatError, match=r"n02_1\.JPEG"):
        read_tiny(folder, "train")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("wnids.txt", None, r"No file .*wnids\.txt"),
        ("wnids.txt", b"n01\nn02\n", r"wnids\.txt lists 2 of 3"),
        ("wnids.txt", b"n01\nn02\nn02\n", r"wnids\.txt lists 2 of 3"),
        ("words.txt", b"", r"words\.txt lists no words"),
        ("words.txt", b"n02\tdog\nn01 goldfish\n", r"words\.txt is damaged: line 2 has no 2 columns"),
        ("words.txt", b"n02\t\xff\xfe\n", r"words\.txt is damaged: it is not text"),
        ("val/val_annotations.txt", b"", r"val_annotations\.txt lists 0 of 2"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn02\t0\n", r"val_annotations\.txt lists 1 of 2"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn02\nval_1.JPEG n01\n", r"annotations\.txt is damaged: line 2"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn02\nval_1.JPEG\tn77\n", r"annotations\.txt names 'n77', which"),
    ],
)
def test_a_damaged_list_of_tiny_imagenet_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, said: str
) -> None:
    """By the look at the folder, and by whoever reads rows or names from it."""
    small_counts(monkeypatch)
    folder = miniature(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert re.search(said, downloads.look(tmp_path, ["tinyimagenet"])[0].state)
    for read in (partial(read_tiny, folder, "train"), partial(class_names, "tinyimagenet", tmp_path)):
        with pytest.raises(FormatError, match=said):
            read()


# ---------------------------------------------------------------- downloads


class Server(BaseHTTPRequestHandler):
    """Sends one file, honours ranges, and hangs up after ``cut`` bytes while there are ``cuts`` left; or ``raw``."""

    content: ClassVar[bytes] = b""
    raw: ClassVar[bytes] = b""
    cut: ClassVar[int] = 0
    cuts: ClassVar[int] = 0
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        Server.asked.append(wanted)
        if Server.raw:
            self.wfile.write(Server.raw)
            return
        start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        rest = self.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if Server.cuts:
            Server.cuts -= 1
            rest = rest[: self.cut]
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked, Server.cuts, Server.raw = [], 0, b""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/archive.tar.gz"
    running.shutdown()
    running.server_close()
    thread.join()


def tarred(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


GOOD = {"cifar-10-batches-py/data_batch_1": bytes(range(256)) * 4000, "cifar-10-batches-py/readme": b"hello"}
fetch = partial(downloads.fetch, "cifar10")


def test_a_broken_download_goes_on_where_it_was(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tarred(GOOD)
    Server.content, Server.cut, Server.cuts = content, len(content) // 2, 1
    with pytest.raises(DataError, match="run it again"):
        fetch(tmp_path, address=server, md5=md5(content))
    assert not (tmp_path / "cifar-10-batches-py").exists()
    folder = fetch(tmp_path, address=server, md5=md5(content))
    assert (folder / "data_batch_1").read_bytes() == GOOD["cifar-10-batches-py/data_batch_1"]
    assert Server.asked == [None, f"bytes={len(content) // 2}-"]
    with pytest.raises(DataError, match=r"is damaged .* move it away"):
        fetch(tmp_path, address=server, md5="nobody looks")
    monkeypatch.setattr(downloads, "_state", lambda *_: "whole")
    assert fetch(tmp_path, address=server, md5="nobody looks") == folder, "what is there is not fetched again"
    assert len(Server.asked) == 2
    assert not list(tmp_path.glob(".unpack-*"))


def test_a_download_that_ended_before_its_rename_is_taken(server: str, tmp_path: Path) -> None:
    Server.content = tarred(GOOD)
    (tmp_path / "archive.tar.gz.partial").write_bytes(Server.content)
    assert fetch(tmp_path, address=server, md5=md5(Server.content)).is_dir()


def test_a_wrong_sum_leaves_nothing(server: str, tmp_path: Path) -> None:
    Server.content = tarred(GOOD)
    with pytest.raises(DataError, match="expected 0123"):
        fetch(tmp_path, address=server, md5="0123")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_leads_out_is_refused(server: str, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    Server.content = tarred({**GOOD, "../escaped": b"!"})
    with pytest.raises(FormatError, match="escaped"):
        fetch(inside, address=server, md5=md5(Server.content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("cifar-10-batches-py/readme", "hello")
        archive.writestr("../escaped", "!")
    Server.content = out.getvalue()
    with pytest.raises(DataError, match="leads out"):
        fetch(inside, address=server.replace(".tar.gz", ".zip"), md5=md5(Server.content))
    assert not (tmp_path / "escaped").exists()
    assert not (inside / "cifar-10-batches-py").exists()


def test_an_archive_of_something_else_or_damaged_is_refused(server: str, tmp_path: Path) -> None:
    Server.content = tarred({"other/readme": b"hello"})
    with pytest.raises(DataError, match="holds no folder cifar-10-batches-py"):
        fetch(tmp_path / "a", address=server, md5=md5(Server.content))
    Server.content = tarred(GOOD)[:-2000]
    with pytest.raises(FormatError, match="cannot be unpacked"):
        fetch(tmp_path / "b", address=server, md5=md5(Server.content))


def test_a_bomb_is_refused(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Server.content = tarred(GOOD)
    monkeypatch.setattr(downloads, "UNPACKED_BYTES", 1000)
    with pytest.raises(DataError, match="the limit is 1,000"):
        fetch(tmp_path, address=server, md5=md5(Server.content))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"what is this\r\n\r\n", "BadStatusLine.*what is this"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "IncompleteRead"),
        (b"HTTP/1.1 404 Gone fishing\r\n\r\n", r"answers 404 Gone fishing; fetch it yourself to .*archive\.tar\.gz"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc", "has the md5"),
    ],
)
def test_a_server_that_talks_nonsense_is_one_sentence(server: str, tmp_path: Path, raw: bytes, said: str) -> None:
    Server.raw = raw
    with pytest.raises(DataError, match=said):
        fetch(tmp_path, address=server, md5="")
    assert not (tmp_path / "archive.tar.gz").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("size", [100, 5 << 20])
def test_a_full_disk_while_fetching_is_said(server: str, tmp_path: Path, size: int) -> None:
    """The first bytes fail where they are flushed, many where they are written."""
    Server.content = bytes(size)
    (tmp_path / "archive.tar.gz.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"archive\.tar\.gz\.partial cannot be written: no space left on device"):
        fetch(tmp_path, address=server, md5="")


def test_a_folder_that_may_not_be_written_is_said(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    Server.content = b"x"
    monkeypatch.setattr(downloads.Path, "open", refused)
    with pytest.raises(DataError, match=r"archive\.tar\.gz\.partial cannot be written: permission denied"):
        fetch(tmp_path, address=server, md5="")


def test_an_archive_fetched_by_hand_is_taken_and_never_deleted(server: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(tarred(GOOD))
    with pytest.raises(DataError, match=r"archive\.tar\.gz has the md5 .*, expected 0123; move it away"):
        fetch(tmp_path, address=server, md5="0123")
    assert archive.read_bytes() == tarred(GOOD)
    assert fetch(tmp_path, address=server, md5=md5(tarred(GOOD))).is_dir()
    assert Server.asked == []


def test_offline_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(tmp_path, address="http://127.0.0.1:9/x.tar.gz", md5="")


def test_what_is_there_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    found = {f.name: f for f in downloads.look(tmp_path)}
    assert found["cifar10"].state == found["tinyimagenet"].state == "missing"
    assert found["cifar100"].state.startswith("No file")
    assert all(f.address.endswith((".tar.gz", ".zip")) and len(f.md5) == 32 for f in found.values())
    assert set(found) == set(DATASETS)
    miniature(tmp_path)
    (tiny,) = downloads.look(tmp_path, ["tinyimagenet"])
    lists = f"{tmp_path / 'tiny-imagenet-200' / 'wnids.txt'} lists 3 of 200"
    assert tiny.state == f"{lists}; train has 9 of 100,000 images; val has 2 of 10,000 images"
    small_counts(monkeypatch)
    assert downloads.look(tmp_path, ["tinyimagenet"])[0].state == "whole"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train/n02/images/n02_1.JPEG", b"", "train/n02/images/n02_1.JPEG is not a JPEG"),
        ("val/images/val_1.JPEG", b"junk", "val/images/val_1.JPEG is not a JPEG"),
    ],
)
def test_tiny_imagenet_is_more_than_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, said: str
) -> None:
    small_counts(monkeypatch)
    path = miniature(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert downloads.look(tmp_path, ["tinyimagenet"])[0].state == said


def test_official_files_are_whole(cifar10: Path) -> None:
    assert downloads.look(cifar10.parent, ["cifar10"])[0].state == "whole"


# ---------------------------------------------------------------- the door: sdn paper data


def test_the_door_says_what_to_do_in_each_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_counts(monkeypatch)
    miniature(tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    main(["paper", "data", str(tmp_path)])
    *lines, last = capsys.readouterr().out.splitlines()
    advice = {line.split(":")[0]: line.rsplit("); ", 1)[1] for line in lines if "(md5" in line}
    assert advice == {
        "cifar10": "fetch it with --download",
        "cifar100": f"move {tmp_path / 'cifar-100-python'} away, then fetch it with --download",
    }
    state = json.loads(last)["state"]
    assert (state["cifar10"], state["tinyimagenet"]) == ("missing", "whole")
    with pytest.raises(SystemExit, match="2"):
        main(["paper", "data", str(tmp_path), "--download", "--datasets", "cifar100"])
    assert "is damaged" in capsys.readouterr().err


def test_the_door_refuses_a_name_before_it_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(downloads, "fetch", lambda name, _: fetched.append(name))
    with pytest.raises(SystemExit, match="2"):
        main(["paper", "data", str(tmp_path), "--download", "--datasets", "cifar10", "nosuch"])
    assert 'Invalid value "nosuch" for --datasets. Choose from: "cifar10"' in capsys.readouterr().err
    assert fetched == []
    main(["paper", "data", str(tmp_path), "--download", "--datasets", "cifar10", "tinyimagenet"])
    assert fetched == ["cifar10", "tinyimagenet"]
