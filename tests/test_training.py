"""IC-only training: caches, streams, resumption, several processes; and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO, images
from shallowdeep import training
from shallowdeep.augment import FlipCrop
from shallowdeep.checkpoints import alone
from shallowdeep.files import FormatError
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.training import PAPER_EXITS, ExitRecipe
from shallowdeep.types import DataError, Plan

DROPLESS = ExitRecipe(lr=1e-3, weight_decay=0.0, batch_size=24, milestones=(2,))


@cache
def planned(name: str, classifier: str) -> Plan:
    return sd.plan(ZOO[name].make(), ZOO[name].batch(2), classifier=classifier)  # type: ignore[arg-type]


def made(classifier: str = "paper", name: str = "residual") -> ShallowDeepNetwork:
    plan, model = planned(name, classifier), ZOO[name].make()
    torch.manual_seed(1)
    return sd.attach(model, plan)


def rows(count: int = 60) -> tuple[Tensor, Tensor]:
    return images(count), torch.arange(count) % CLASSES


def weights(sdn: ShallowDeepNetwork) -> list[Tensor]:
    return [p.detach().clone() for p in sdn.classifiers.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_exit_learns_and_says_what_it_did() -> None:
    sdn = made("strong")
    done = sd.train_exits(sdn, rows(), epochs=30)
    first, last = done.loss_per_epoch[0], done.loss_per_epoch[-1]
    assert len(first) == len(sdn.classifiers)
    assert all(b < a for a, b in zip(first, last, strict=True))
    assert done.rows == 60
    assert done.cache == "memory"


def test_cached_and_streamed_learn_the_same_without_augmentation() -> None:
    cached, streamed, on_disk = made(), made(), made()
    options = {"epochs": 4, "recipe": DROPLESS, "precision": "fp32"}
    sd.train_exits(cached, rows(), **options)
    sd.train_exits(streamed, rows(), cache="off", **options)
    sd.train_exits(on_disk, rows(), cache="disk", **options)
    assert equal(weights(cached), weights(on_disk))
    for a, b in zip(weights(cached), weights(streamed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_budget_decides_where_features_live() -> None:
    places = [sd.train_exits(made(), rows(), epochs=1, cache_bytes=b).cache for b in (1, 1 << 30)]
    assert places == ["off", "memory"]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), 16)
    assert sd.train_exits(made(), loader, epochs=1, cache_bytes=1).cache == "off", "a loader has a budget, too"


def test_views_differ_and_the_seed_says_all() -> None:
    augment = FlipCrop(padding=2)
    one, again, other, clean = made(), made(), made(), made()
    options = {"epochs": 3, "precision": "fp32"}
    sd.train_exits(one, rows(), augment=augment, views=2, **options)
    sd.train_exits(again, rows(), augment=augment, views=2, **options)
    sd.train_exits(other, rows(), augment=augment, views=2, seed=7, **options)
    sd.train_exits(clean, rows(), **options)
    assert equal(weights(one), weights(again))
    assert not equal(weights(one), weights(other))
    assert not equal(weights(one), weights(clean))


def test_the_users_generator_is_not_touched() -> None:
    sdn = made("strong")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sd.train_exits(sdn, rows(), epochs=2, augment=FlipCrop())
    assert torch.equal(torch.rand(3), expected)


def test_loader_and_batches_are_data_too() -> None:
    x, y = rows()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    for data in (loader, list(zip(x.split(16), y.split(16), strict=True))):
        sdn = made()
        assert sd.train_exits(sdn, data, epochs=2, cache="off").rows == 60
        assert len(sdn.trained_hashes) == 60


def test_one_shot_iterator_serves_one_pass_only() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*(part.split(20) for part in rows()), strict=True)

    assert sd.train_exits(made(), stream(), epochs=3).rows == 60
    with pytest.raises(DataError, match="can be read only once; give a DataLoader"):
        sd.train_exits(made(), stream(), epochs=3, cache="off")
    with pytest.raises(DataError, match="2 passes"):
        sd.train_exits(made(), stream(), epochs=3, augment=FlipCrop(), views=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((60,), CLASSES), f"0..{CLASSES - 1} for {CLASSES} classes, found {CLASSES}..{CLASSES}"),
        (torch.rand(60), "a regression target"),
        (torch.zeros(60, CLASSES), "multi-label or one-hot"),
        (torch.zeros(60, dtype=torch.bool), "class indices, found torch.bool"),
    ],
)
def test_labels_that_are_none(labels: Tensor, message: str) -> None:
    sdn = made()
    before = weights(sdn)
    with pytest.raises(DataError, match=message):
        sd.train_exits(sdn, (images(60), labels), epochs=1)
    assert equal(before, weights(sdn))


def test_no_rows_and_no_epochs() -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        sd.train_exits(made(), (images(2)[:0], torch.zeros(0, dtype=torch.int64)), epochs=1)
    with pytest.raises(DataError, match="no rows to train on"):
        sd.train_exits(made(), [], epochs=1)
    with pytest.raises(ValueError, match="epochs >= 1"):
        sd.train_exits(made(), rows(), epochs=0)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_a_row_that_is_not_finite_spoils_nothing(cache: str) -> None:
    sdn, (x, y) = made(), rows()
    before = weights(sdn)
    x[7, 0] = float("nan")
    with pytest.raises(DataError, match="Features are not finite for 1 rows of a batch: NaN inputs"):
        sd.train_exits(sdn, (x, y), epochs=1, cache=cache)  # type: ignore[arg-type]
    assert equal(before, weights(sdn))


def test_half_written_features_are_found_and_made_again(tmp_path: Path) -> None:
    augment = FlipCrop(padding=1)
    options = {"epochs": 2, "cache_dir": tmp_path, "augment": augment, "views": 2, "precision": "fp32"}
    whole = made()
    sd.train_exits(whole, rows(), **options)
    files = sorted(tmp_path.rglob("exit0.bin"))
    assert len(files) == 2
    kept = files[1].stat().st_mtime_ns
    files[0].write_bytes(files[0].read_bytes()[:-8])
    again = made()
    sd.train_exits(again, rows(), **options)
    assert equal(weights(whole), weights(again))
    assert files[1].stat().st_mtime_ns == kept, "a whole view is used as it is"
    relabelled = made()
    sd.train_exits(relabelled, (rows()[0], rows()[1].flip(0)), **options)
    assert not equal(weights(whole), weights(relabelled)), "labels of other rows are never used"
    other = made()
    sd.train_exits(other, (rows()[0] + 1, rows()[1]), **options)
    assert not equal(weights(whole), weights(other)), "features of other rows are never used"


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    sd.train_exits(made(), rows(), epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(FormatError, match="seed was 0, now 1"):
        sd.train_exits(made(), rows(), epochs=1, seed=1, checkpoint_dir=tmp_path)
    with pytest.raises(FormatError, match="data was "):
        sd.train_exits(made(), rows(40), epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(FormatError, match=r"augment was None, now FlipCrop\(padding=4"):
        sd.train_exits(made(), rows(), epochs=1, augment=FlipCrop(), views=1, checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(FormatError, match="delete it to start again"):
        sd.train_exits(made(), rows(), epochs=1, checkpoint_dir=tmp_path)


KILLED = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    import shallowdeep as sd
    import test_{what} as t
    torch.set_num_threads(1)
    t.long_run({folder!r})
    """


def long_run(folder: str) -> list[Tensor]:
    sdn = made("strong")
    sd.train_exits(sdn, rows(), epochs=60, checkpoint_dir=folder, precision="fp32")
    return weights(sdn)


def kill_in_the_middle(what: str, folder: Path) -> None:
    """Start the run in a process of its own and kill -9 it once it has saved an epoch."""
    code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(folder), what=what)
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_run_goes_on_to_equal_weights(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kill_in_the_middle("training", tmp_path / "killed")
        saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["state"]["epoch"]
        assert 0 < saved < 60
        assert equal(long_run(str(tmp_path / "killed")), long_run(str(tmp_path / "whole")))
    finally:
        torch.set_num_threads(threads)


def test_the_papers_recipe_is_the_papers() -> None:
    from shallowdeep.rates import stepped

    rates = [PAPER_EXITS.lr * stepped(epoch, PAPER_EXITS.milestones) for epoch in range(25)]
    assert rates.count(1e-3) == 14
    assert sum(abs(rate - 1e-4) < 1e-12 for rate in rates) == 11


class Branching(nn.Module):
    """With batch normalisation and a branch on data, so that it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.second, self.last = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x * 2 if float(x.sum()) > 1e9 else x)))


def test_timing_the_passes_moves_no_statistics() -> None:
    torch.manual_seed(0)
    net = Branching()
    sdn = sd.attach(net, sd.plan(net, torch.randn(4, 8), at=(0.3,)))
    assert sdn.plan.via == "modules"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sd.train_exits(sdn, (torch.randn(64, 8), torch.arange(64) % 3), epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_rows_of_another_type_are_one_sentence() -> None:
    x, y = rows()
    with pytest.raises(DataError):
        sd.train_exits(made("paper"), (x.double(), y), epochs=1)
    with pytest.raises(ValueError, match=r"cache auto, memory, disk, off; found .* 'ram'"):
        sd.train_exits(made("paper"), (x, y), epochs=1, cache="ram")  # type: ignore[arg-type]


def test_two_runs_do_not_write_one_cache(tmp_path: Path) -> None:
    with alone(tmp_path / "rank0"), pytest.raises(DataError, match="Another process is at work"):
        sd.train_exits(made("paper"), rows(), epochs=1, cache_dir=tmp_path)


def test_the_cache_takes_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, place = [], training.choose_place

    def noted(cache: Any, needed: int | None, budget: int) -> Any:
        expected.append(needed)
        return place(cache, needed, budget)

    monkeypatch.setattr(training, "choose_place", noted)
    x, y = rows()
    sdn = made("paper").double()
    with torch.no_grad():
        reduced, _ = sdn.reduce(x.double())
    sd.train_exits(sdn, (x.double(), y), epochs=1, precision="fp32")
    assert expected == [sum(f.nbytes for f in reduced)]
