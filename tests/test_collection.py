"""From a network and data to a trace: equal to a slow loop, however the data comes and wherever the logits lie."""

from __future__ import annotations

import gc
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shallowdeep as sd
from nets import CLASSES, ZOO, images, planned
from shallowdeep.costs import feeds, own_costs
from shallowdeep.graph import evaluating
from shallowdeep.inputs import each, row_hashes
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import DataError, Trace

ROWS = 23


@cache
def made(name: str = "residual") -> ShallowDeepNetwork:
    torch.manual_seed(1)
    return sd.attach(ZOO[name].make(), planned(name)).eval()


def labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % CLASSES


def same(a: Trace, b: Trace) -> None:
    torch.testing.assert_close(a.logits_ENC, b.logits_ENC)
    assert torch.equal(a.labels_N, b.labels_N)
    assert a.hash_N is not None
    assert b.hash_N is not None
    assert torch.equal(a.hash_N, b.hash_N)


@pytest.mark.parametrize("name", ZOO)
def test_a_trace_is_what_the_slow_loop_says(name: str) -> None:
    sdn, inputs = made(name), ZOO[name].batch(ROWS)
    trace = sd.collect(sdn, (inputs, labels()), batch_size=10)
    for row in range(ROWS):
        with torch.no_grad():
            alone = sdn(each(inputs, lambda tensor, row=row: tensor[row : row + 1]))  # type: ignore[misc]
        torch.testing.assert_close(trace.logits_ENC[:, row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(trace.labels_N, labels())
    assert trace.cost_E.tolist() == list(sdn.plan.cost_E)
    assert trace.full_exit == len(sdn.plan.cuts)
    assert trace.exit_names == sdn.plan.exit_names
    assert trace.feeds_EE is not None
    assert torch.equal(trace.feeds_EE, feeds(sdn))
    assert trace.own_cost_E is not None
    assert torch.equal(trace.own_cost_E, own_costs(sdn))
    assert not trace.logits_ENC.requires_grad


def test_every_form_of_data_gives_the_same_trace() -> None:
    x, y = images(ROWS), labels()
    whole = sd.collect(made(), (x, y))
    pairs = list(zip(x.split(5), y.split(5), strict=True))
    empty = (x[:0], y[:0])
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=False)
    for data in (loader, pairs, iter(pairs), [pairs[0], empty, *pairs[1:]]):
        same(sd.collect(made(), data), whole)
    same(sd.collect(made(), (x, y.to(torch.uint8)), batch_size=1), whole)


def test_inputs_may_be_dicts_and_tuples() -> None:
    for name in ("masked_tokens", "batch_length"):
        batches = [(ZOO[name].batch(rows), labels(rows)) for rows in (3, 4)]
        trace = sd.collect(made(name), batches)
        assert trace.num_samples == 7
        assert trace.hash_N is not None
        assert torch.equal(trace.hash_N, torch.cat([row_hashes(inputs) for inputs, _ in batches]))


def scratch() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("shallowdeep-trace-*"))


@pytest.fixture
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("own_scratch")
@pytest.mark.parametrize("limit", [0, 500, 1 << 30])
def test_a_spilled_trace_is_the_same_and_leaves_no_file(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    real = tempfile.TemporaryDirectory

    def noted(*, prefix: str) -> tempfile.TemporaryDirectory[str]:
        folder = real(prefix=prefix)
        folders.append(folder.name)
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", noted)
    data = images(ROWS), labels()
    trace = sd.collect(made(), data, batch_size=4, memory_limit_bytes=limit)
    assert len(folders) == (limit < 1 << 30)
    assert not scratch()
    gc.collect()
    same(trace, sd.collect(made(), data, batch_size=4))
    assert trace.rows(torch.tensor([22, 0])).labels_N.tolist() == [22 % CLASSES, 0]


@pytest.mark.usefixtures("own_scratch")
def test_an_error_after_spilling_leaves_no_file() -> None:
    x = images(ROWS)
    x[17] = float("nan")
    with pytest.raises(DataError, match="not finite for 1 rows of a batch, first row 17: NaN inputs"):
        sd.collect(made(), (x, labels()), batch_size=4, memory_limit_bytes=0)
    assert not scratch()
    gc.collect()  # a folder left to the collector would warn, and a warning is an error


def test_rows_that_are_not_finite_are_counted_from_the_first_batch_on() -> None:
    x = images(ROWS)
    x[[9, 11]] = float("inf")
    with pytest.raises(DataError, match="not finite for 2 rows of a batch, first row 9"):
        sd.collect(made(), (x, labels()), batch_size=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no rows to collect"),
        ((images(2)[:0], labels(0)), "no rows to collect"),
        (
            (images(3), torch.tensor([0, 1, CLASSES])),
            rf"0\.\.{CLASSES - 1} for {CLASSES} classes, found 0\.\.{CLASSES}",
        ),
        ((images(3), torch.zeros(3)), "regression"),
        ((images(3), labels(2)), "3 rows of inputs but labels of shape"),
        ([images(3)], r"pair \(inputs, labels\), found Tensor"),
        (None, "found NoneType"),
    ],
)
def test_data_that_is_none(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sd.collect(made(), data)  # type: ignore[arg-type]


def test_rows_trained_on_are_marked() -> None:
    torch.manual_seed(0)
    sdn = sd.attach(made().backbone, made().plan)
    x, y = images(ROWS), labels()
    assert sd.collect(sdn, (x, y)).trained_N.any() == torch.tensor(False)  # type: ignore[union-attr]
    sd.train_exits(sdn, (x[5:12], y[5:12]), epochs=1)
    trained_N = sd.collect(sdn, (x, y)).trained_N
    assert trained_N is not None
    assert trained_N.nonzero().flatten().tolist() == list(range(5, 12))


def test_modes_come_back() -> None:
    sdn = sd.attach(ZOO["dropout_norm"].make(), made("dropout_norm").plan).train()
    sdn.backbone.body[1].eval()  # type: ignore[index,union-attr]
    before = [module.training for module in sdn.modules()]
    statistics = {name: buffer.clone() for name, buffer in sdn.named_buffers()}
    first, again = (sd.collect(sdn, (images(ROWS), labels())) for _ in range(2))
    assert torch.equal(first.logits_ENC, again.logits_ENC), "no dropout, no drift"
    assert [module.training for module in sdn.modules()] == before
    assert all(torch.equal(statistics[n], b) for n, b in sdn.named_buffers() if "running" in n)
    with pytest.raises(DataError):
        sd.collect(sdn, [])
    assert [module.training for module in sdn.modules()] == before


def test_the_reference_of_confusion_travels_along() -> None:
    sdn = sd.attach(made().backbone, made().plan)
    trace = sd.collect(sdn, (images(ROWS), labels()))
    assert trace.confusion_reference is None
    sd.fit_confusion(sdn, trace)
    assert sd.collect(sdn, (images(ROWS), labels())).confusion_reference is not None


def test_low_precision_logits_are_kept_in_float32() -> None:
    sdn = sd.attach(made().backbone, made().plan)
    with torch.autocast("cpu", torch.bfloat16):
        trace = sd.collect(sdn, (images(ROWS), labels()))
    assert trace.logits_ENC.dtype == torch.float32
    assert trace.info["precision"] == "torch.bfloat16"


def test_modes_come_back_when_the_last_thread_is_done() -> None:
    net, inside, done = ZOO["residual"].make().train(), Event(), Event()

    def hold() -> None:
        with evaluating(net):
            inside.set()
            done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with evaluating(net):
            other = pool.submit(hold)
            assert inside.wait(10)
        assert not any(module.training for module in net.modules()), "the other thread still needs it so"
        done.set()
        other.result()
    assert all(module.training for module in net.modules())


def test_rows_are_known_again_where_the_network_writes_into_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    sdn = sd.attach(net, sd.plan(net, torch.rand(4, 6), at=(0.5,)))
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    sd.train_exits(sdn, (x.clone(), y), epochs=1)
    trained_N = sd.collect(sdn, (x.clone(), y)).trained_N
    assert trained_N is not None
    assert bool(trained_N.all())
