"""Exports: they answer as the engine does, without this library, and refuse what is broken in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import shallowdeep as sd
from nets import ZOO, planned
from shallowdeep import export as export_module
from shallowdeep.export import export_file, export_folder, export_programs
from shallowdeep.host import EarlyExits
from shallowdeep.inputs import take, tensors
from shallowdeep.network import weights_hash
from shallowdeep.policies import CalibrationRecord, Confidence
from shallowdeep.runtime.engine import Engine
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Answer, BackendError, DataError, ExportError
from test_backends import NAMES, Bessel, middle, narrow, policies, rectified, rows, spoilt, tiny
from test_certificates import PROVED


def same(found: Mapping[str, Any], expected: Answer) -> None:
    good_B, found = expected.valid_B, {name: torch.from_numpy(array) for name, array in found.items()}
    assert found["exit"].tolist() == expected.exit_B.tolist()
    assert found["label"][good_B].tolist() == expected.labels_B[good_B].tolist()
    for name in set(found) & {"confidence", "confusion", "cost"}:
        right_B = getattr(expected, f"{name}_B")[good_B].double()
        torch.testing.assert_close(found[name][good_B].double(), right_B, rtol=1e-4, atol=1e-5)
    if "valid" in found:  # an ONNX file in another runtime does not say
        assert found["valid"].tolist() == good_B.tolist()
    softmax_BC = expected.logits_BC.double().softmax(1)[good_B]
    torch.testing.assert_close(found["probabilities"][good_B].double(), softmax_BC, rtol=1e-4, atol=1e-5)


def openvino_of(file: Path) -> Any:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.get_any_name() for output in compiled.outputs]
    return lambda *arrays: dict(zip(names, map(np.array, compiled(list(arrays)).values()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_law_4_every_policy(name: str, tmp_path: Path) -> None:
    policy = policies()[name]
    engine = Engine(tiny(), policy, backend="torch")
    export_folder(tiny(), policy, tmp_path / "folder", rows(60))
    export_file(tiny(), policy, tmp_path / "file", rows(60))
    exported, single = EarlyExits(tmp_path / "folder"), EarlyExits(tmp_path / "file")
    in_openvino = openvino_of(tmp_path / "file/model.onnx")
    broken = rows(7)
    broken[[1, 4]] = torch.nan
    for batch in (rows(1), rows(2), rows(7), rows(60), broken):
        expected = engine(batch)
        same(exported(batch.numpy()), expected)
        same(single(batch.numpy()), expected)
        if bool(expected.valid_B.all()):
            same(in_openvino(batch.numpy()), expected)
    assert exported(np.zeros((0, 6), np.float32))["label"].shape == (0,)


@pytest.mark.parametrize("fallback", ["last", "most_confident"])
def test_rows_that_are_no_numbers_get_no_answer(fallback: Any, tmp_path: Path) -> None:
    sdn = rectified()
    policy = Confidence(threshold=middle(sdn, spoilt(40)[6:]), fallback=fallback)
    export_folder(sdn, policy, tmp_path / "folder", spoilt(40))
    export_file(sdn, policy, tmp_path / "file", spoilt(40))
    file = tmp_path / "file/model.onnx"
    runners = (EarlyExits(tmp_path / "folder"), EarlyExits(tmp_path / "file"), openvino_of(file))
    for batch in (spoilt(40), spoilt(6)[4:], spoilt(6)[1:2]):
        expected = Engine(sdn, policy, backend="torch")(batch)
        for run in runners:
            found = run(batch.numpy())
            same(found, expected)
            assert np.isfinite(found["probabilities"]).all(1).tolist() == expected.valid_B.tolist()
    assert int((~expected.valid_B).sum()) > 0


class Cropped(torch.nn.Module):
    """A network that does not read the middle of its input, and whose pooling forgets a NaN in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = torch.nn.Conv1d(1, 4, 3), torch.nn.Conv1d(4, 4, 1), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool1d(self.first(x[:, :, :6]), 2)
        return self.head(self.second(x).relu().mean(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_number_that_is_none_is_seen_wherever_it_is_read(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(30, 1, 20)
    sdn = sd.attach(Cropped(), sd.plan(Cropped(), inputs[:1], at=(0.4,))).eval()
    policy = Confidence(threshold=middle(sdn, inputs))
    {"folder": export_folder, "file": export_file}[kind](sdn, policy, tmp_path / "out", inputs)
    inputs[3, 0, 2], inputs[5, 0, 1] = torch.nan, torch.inf
    expected = Engine(sdn, policy, backend="torch")(inputs)
    assert expected.valid_B.logical_not().nonzero().flatten().tolist() == [3, 5]
    same(EarlyExits(tmp_path / "out")(inputs.numpy()), expected)
    inputs[7, 0, 15] = torch.nan  # which the network does not read: an export has no eye for that
    assert not EarlyExits(tmp_path / "out")(inputs.numpy())["valid"][7]


class Gated(torch.nn.Module):
    """A network in which an infinity means something: who is not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (torch.nn.Linear(6, n) for n in (6, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x.softmax(1)).tanh()).relu())  # type: ignore[no-any-return]


def test_an_infinity_that_a_network_understands_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sdn = sd.attach(Gated(), sd.plan(Gated(), torch.zeros(1, 6), at=(0.4,))).eval()
    masked = rows(20)
    masked[:, 3] = -torch.inf
    policy = Confidence(threshold=middle(sdn, masked))
    export_file(sdn, policy, tmp_path / "out", masked)
    expected = Engine(sdn, policy, backend="torch")(masked)
    assert bool(expected.valid_B.all())
    same(EarlyExits(tmp_path / "out")(masked.numpy()), expected)
    same(openvino_of(tmp_path / "out/model.onnx")(masked.numpy()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "masked_tokens"])
def test_law_4_nasty_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    sdn, inputs = sd.attach(ZOO[name].make(), planned(name)).eval(), ZOO[name].batch(60)
    policy = Confidence(threshold=middle(sdn, inputs))
    export_folder(sdn, policy, tmp_path / "folder", inputs)
    export_file(sdn, policy, tmp_path / "file", inputs)
    exported, single = EarlyExits(tmp_path / "folder"), EarlyExits(tmp_path / "file")
    engine = Engine(sdn, policy, backend="torch")
    for size in (1, 2, 7, 60):
        batch = take(inputs, slice(0, size))
        arrays = [leaf.numpy() for leaf in tensors(batch)]
        same(exported(*arrays), engine(batch))
        same(single(*arrays), engine(batch))


class Programs:
    """A loop of others over the programs in ``folder``, written from ``manifest.json`` and docs/export.md alone."""

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "manifest.json").read_text())
        self.programs = [torch.export.load(folder / step["file"]).module() for step in self.about["steps"]]

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, where = len(inputs[0]), torch.arange(len(inputs[0]))
        rows = {f"input.{one['name']}": x for one, x in zip(self.about["inputs"], inputs, strict=True)}
        for name, one in self.about["fresh"].items():
            row = torch.tensor(one["row"], dtype=getattr(torch, one["dtype"]))
            rows[name] = row.repeat(batch, *(1,) * (row.ndim - 1))
        answer = {"exit": where * 0, "label": where * 0, "confidence": where.double(), "confusion": where.double()}
        for place, (step, program) in enumerate(zip(self.about["steps"], self.programs, strict=True)):
            if not len(where):
                break
            rows |= dict(zip(step["gives"], program(*(rows[name] for name in step["takes"])), strict=True))
            finite = rows[f"logits.{place}"].isfinite().all(1)
            stop = rows.pop("stop", torch.ones(len(where), dtype=torch.bool))
            if place + 1 < len(self.programs):
                stop = stop | ~finite if step["exit"] == self.about["full_exit"] else stop & finite
            logits, softmax = (
                rows.get(f"answer.{name}.{place}", rows[f"{name}.{place}"]) for name in ("logits", "softmax")
            )
            apart = sum((rows[f"softmax.{k}"] - softmax).abs().sum(1) for k in range(place + 1))
            said = {"exit": where[:1] * 0 + step["exit"], "label": logits.argmax(1), "confidence": softmax.amax(1)}
            said["confusion"] = (apart - step["mean"]) * step["scale"]
            for name, x in said.items():
                answer[name][where[stop]] = x.expand(len(where))[stop]
            rows = {name: x if name in self.about["rowless"] else x[~stop] for name, x in rows.items()}
            where = where[~stop]
        return answer


@pytest.mark.parametrize("name", NAMES)
def test_law_4_every_policy_by_the_manifest_of_programs(name: str, tmp_path: Path) -> None:
    policy = policies()[name]
    export_programs(tiny(), policy, tmp_path / "out", rows(60))
    engine, exported, left_at = Engine(tiny(), policy, backend="torch"), Programs(tmp_path / "out"), set[int]()
    broken = rows(7)
    broken[[1, 4]] = torch.nan
    for batch in (rows(1), rows(2), rows(7), rows(60), broken):
        expected, found = engine(batch), exported(batch)
        good_B = expected.valid_B
        assert found["exit"].tolist() == expected.exit_B.tolist()
        assert found["label"][good_B].tolist() == expected.labels_B[good_B].tolist()
        for figure, right_B in (("confidence", expected.confidence_B), ("confusion", expected.confusion_B)):
            torch.testing.assert_close(found[figure][good_B], right_B[good_B], rtol=1e-4, atol=1e-5)
        left_at |= set(found["exit"].tolist())
    assert len(left_at) > 1 or name in ("fixed", "never"), "rows that never part check nothing"


def test_programs_for_others(tmp_path: Path) -> None:
    policy = policies()["patience"]
    export_programs(tiny(), policy, tmp_path / "out", rows(60))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    first = manifest["steps"][0]
    assert first["takes"] == ["input.0", "state.0", "state.1"]
    program = torch.export.load(tmp_path / "out" / first["file"]).module()
    fresh = [torch.tensor(manifest["fresh"][name]["row"] * 5) for name in ("state.0", "state.1")]
    found = dict(zip(first["gives"], program(rows(5), *fresh), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(found["logits.0"], tiny()(rows(5))[0])


@pytest.fixture(scope="module", params=["folder", "file"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    export = {"folder": export_folder, "file": export_file}[request.param]
    export(tiny(), policies()["confidence"], folder, rows(60))
    return folder


def test_the_axis_of_rows_is_the_batch(exported: Path) -> None:
    for file in exported.glob("*.onnx"):
        graph = onnx.load(file).graph
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}


def test_the_single_file_answers_no_rows_by_itself(tmp_path: Path) -> None:
    export_file(tiny(), policies()["confidence"], tmp_path / "out", rows(60))
    none = EarlyExits(tmp_path / "out").sessions[0].run(["label", "probabilities"], {"input.0": rows(0).numpy()})
    assert [found.shape for found in none] == [(0,), (0, 4)]


def test_it_runs_where_neither_torch_nor_this_library_is(exported: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, shallowdeep=None); sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np; from host import EarlyExits; x = np.load(sys.argv[2])\n"
        "print(EarlyExits(sys.argv[1])(x)['exit'].tolist())"
    )
    np.save(exported.parent / "x.npy", rows(7).numpy())
    command = [sys.executable, "-c", code, str(exported), str(exported.parent / "x.npy")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=exported.parent).stdout
    engine = Engine(tiny(), policies()["confidence"], backend="torch")
    assert json.loads(said) == engine(rows(7)).exit_B.tolist()


def test_the_manifest_says_what_it_is(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["policy"]["kind"] == "Confidence"
    assert [one["name"] for one in manifest["exits"]] == list(tiny().plan.exit_names)
    assert [one["cost"] for one in manifest["exits"]] == pytest.approx(tiny().plan.cost_E)
    assert manifest["inputs"] == [{"name": "0", "shape": [6], "dtype": "float32"}]
    assert manifest["precision"] == "float32"
    assert manifest["versions"]["torch"] == version("torch")
    graphs = {"folder": ["step0.onnx", "step1.onnx", "step2.onnx"], "file": ["model.onnx"]}[manifest["kind"]]
    assert [step["file"] for step in manifest["steps"]] == graphs
    assert sorted(p.name for p in exported.iterdir()) == ["host.py", "manifest.json", *graphs]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((np.zeros((2, 6)),), r"Input '0' is float32 \[rows, 6\], found float64 \[2, 6\]"),
        ((np.zeros((2, 6, 1), np.float32),), r"found float32 \[2, 6, 1\]"),
        ((np.zeros((2, 5), np.float32),), r"Input '0' is float32 \[rows, 6\], found float32 \[2, 5\]"),
        ((np.float32(1),), r"found float32 \[\]"),
        (([[0.0]],), r"found list \[\]"),
        ((), r"The network takes \['0'\], found 0 arrays"),
    ],
)
def test_inputs_that_do_not_fit(exported: Path, inputs: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EarlyExits(exported)(*inputs)


def test_inputs_of_different_lengths(exported: Path) -> None:
    network = EarlyExits(exported)
    first = network.manifest["inputs"][0]
    network.manifest = {**network.manifest, "inputs": [first, {**first, "name": "meta"}]}
    with pytest.raises(ValueError, match=r"Input 'meta' is float32 \[2, 6\], found float32 \[3, 6\]"):
        network(np.zeros((2, 6), np.float32), np.zeros((3, 6), np.float32))


def manifest_of(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def test_files_that_are_not_what_was_exported(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no manifest"):
        EarlyExits(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    last = max(folder.glob("*.onnx"))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{last.name} is not the file that was exported: its hash has changed"):
        EarlyExits(folder)
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name} is missing"):
        EarlyExits(folder)
    for text in (manifest_of(exported)[:-9], "[]", "[1]"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"manifest\.json (is damaged: export the network again|has the format None)"
        ):
            EarlyExits(folder)
    about = json.loads(manifest_of(exported))
    for part in ("steps", "inputs", "answers", "exits", "fresh", "policy", "sha256"):
        for damaged in (about | {part: about[part][:-1] if isinstance(about[part], list) else None}, {**about}):
            if damaged == about:
                del damaged[part]
            (folder / "manifest.json").write_text(json.dumps(damaged))
            with pytest.raises(ValueError, match=r"manifest\.json is not what was exported: its hash has changed"):
                EarlyExits(folder)
    (folder / "manifest.json").write_text(json.dumps(json.loads(manifest_of(exported)) | {"kind": "programs"}))
    with pytest.raises(ValueError, match="copy is an export of kind 'programs'; this loop runs 'folder' and 'file'"):
        EarlyExits(folder)
    (folder / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has the format 9; this loop reads format 3"):
        EarlyExits(folder)


def test_nothing_is_left_of_an_export_that_answers_otherwise(tmp_path: Path, monkeypatch: Any) -> None:
    policy = policies()["confidence"]
    export_folder(tiny(), policy, tmp_path / "out", rows(60))
    before = (tmp_path / "out/manifest.json").read_text()
    real = EarlyExits.__call__
    monkeypatch.setattr(EarlyExits, "__call__", lambda *args: (found := real(*args)) | {"exit": 0 * found["exit"] + 1})
    with pytest.raises(ExportError, match=r"The export sends .* of .* rows to another exit than the engine"):
        export_folder(tiny(), policy, tmp_path / "out", rows(60))
    monkeypatch.setattr(
        EarlyExits,
        "__call__",
        lambda *args: (found := real(*args)) | {"exit": (found["exit"] + (len(args[1]) == 1)) % 3},
    )
    with pytest.raises(ExportError, match=r"The export sends 1 of 1 rows to another exit than the engine"):
        export_folder(tiny(), policy, tmp_path / "out", rows(60))
    assert (tmp_path / "out/manifest.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="give at least 7 real rows, found 3"):
        export_folder(tiny(), policy, tmp_path / "out", rows(3))


def spoil(name: str, row: int, value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Answers with another value in one row, wherever there are that many."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        array = found[name].copy()
        array[row : row + 1] = value if array.dtype.kind == "f" else array[row : row + 1] ^ True
        return found | {name: array}

    return change


WRONG = (
    ("exit", 40, 0, r"sends 1 of 60 rows to another exit than the engine"),
    ("label", 40, 0, r"gives 1 rows another label than the engine"),
    ("probabilities", 40, np.nan, r"'s probabilities lies nan away from the engine's"),
    ("probabilities", 40, 0.5, r"'s probabilities lies .* away from the engine's, allowed 0\.001"),
    ("confidence", 40, np.nan, r"'s confidence lies nan away from the engine's"),
    ("confidence", 3, 0.1, r"'s confidence lies .* away"),
    ("confusion", 3, 99.0, r"'s confusion lies .* away"),
    ("alarm", 3, 7.0, r"'s alarm lies .* away"),
    ("cost", 3, 7.0, r"'s cost lies .* away"),
    ("valid", 3, 0, r"says otherwise than the engine whether 1 rows have an answer"),
)


ALARM = Alarm(asked_E=(True,) * 3, bias_E=(0.1, 0.2, 0.3), weight_EE=((-0.5, 0.0, 0.0), (-0.3, -0.2, 0.0), (-0.1,) * 3))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_wrong_artefacts_are_refused(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    policy = policies()["confidence"]
    export = export_folder if kind == "folder" else export_file
    export(tiny(), policy, tmp_path / "out", rows(60), alarm=ALARM)
    right: Any = EarlyExits(tmp_path / "out")
    what = export_module._what(tiny(), policy, None, ALARM)
    export_module._compare(what, lambda: right, rows(60))
    for name, row, value, sentence in WRONG:
        change = spoil(name, row, value)
        with pytest.raises(ExportError, match=sentence):
            export_module._compare(what, lambda change=change: lambda *x: change(dict(right(*x))), rows(60))
    monkeypatch.setattr(export_module, "EarlyExits", lambda *args: lambda *x: spoil("confidence", 40, 0)(right(*x)))
    with pytest.raises(ExportError, match="'s confidence lies"):
        export(tiny(), policy, tmp_path / "other", rows(60), alarm=ALARM)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_programs_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    real = torch.export.load

    def wrong(program: Any, rows_from: int) -> Any:
        factor = lambda x: 1.01 if len(x) == rows_from else 1  # noqa: E731
        return lambda *given: [x * factor(x) if x.is_floating_point() else x for x in program(*given)]

    for size in (1, 2, 7, 60):
        load = lambda file, size=size: SimpleNamespace(module=lambda: wrong(real(file).module(), size))  # noqa: E731
        monkeypatch.setattr(torch.export, "load", load)
        with pytest.raises(ExportError, match=r"The program of exit 0 computes 'logits\.0' otherwise than PyTorch"):
            export_programs(tiny(), policies()["confidence"], tmp_path / "out", rows(60))
    monkeypatch.setattr(torch.export, "load", lambda file: SimpleNamespace(module=lambda: lambda *given: 1 / 0))
    with pytest.raises(ExportError, match="The program of exit 0 fails for 60 rows: "):
        export_programs(tiny(), policies()["confidence"], tmp_path / "out", rows(60))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_the_old_one(tmp_path: Path, monkeypatch: Any) -> None:
    policy = policies()["confidence"]
    export_folder(tiny(), policy, tmp_path / "out", rows(60))
    real = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_folder(tiny(), policy, tmp_path / "out", rows(60))
    monkeypatch.setattr(os, "replace", real)
    assert len(EarlyExits(tmp_path / "out")(rows(60).numpy())["label"]) == 60


def test_what_is_not_exported(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sdn = sd.attach(ZOO["control_flow"].make(), planned("control_flow")).eval()
    with pytest.raises(ExportError, match="ControlFlow cannot be exported: only its own modules run it"):
        export_folder(sdn, Confidence(threshold=0.5), tmp_path / "out", ZOO["control_flow"].batch(8))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").touch()
    with pytest.raises(ExportError, match="photos is there and is no export"):
        export_folder(tiny(), policies()["never"], tmp_path / "photos", rows(60))
    (tmp_path / "photos/manifest.json").write_text('{"name": "an app of mine"}')
    with pytest.raises(ExportError, match="photos is there and is no export"):
        export_folder(tiny(), policies()["never"], tmp_path / "photos", rows(60))
    (tmp_path / "empty").mkdir()
    export_folder(tiny(), policies()["never"], tmp_path / "empty", rows(60))
    assert (tmp_path / "empty/manifest.json").is_file()
    for export in (export_folder, export_file, export_programs):
        with pytest.raises(
            DataError, match=r"takes float32 \[rows, 6\]; the rows to compare it on are float64 \[rows, 6"
        ):
            export(tiny(), policies()["never"], tmp_path / "out", rows(60).double())
    with pytest.raises(DataError, match="Inputs must be a tensor"):
        export_folder(tiny(), policies()["never"], tmp_path / "out", rows(60).numpy())  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_onnx_cannot_say(tmp_path: Path) -> None:
    sdn = sd.attach(Bessel(), sd.plan(Bessel(), torch.zeros(1, 6), at=(0.3,)))
    half = sd.attach(narrow(), sd.plan(narrow(), torch.zeros(1, 6, dtype=torch.bfloat16), at=(0.3,)))
    for export in (export_folder, export_file):
        with pytest.raises(BackendError, match=r"^The network cannot be an ONNX graph: .*bessel_i0.*\.$"):
            export(sdn, policies()["never"], tmp_path / "out", rows(60))
        with pytest.raises(ExportError, match=r"^ONNX Runtime cannot read the export: .*\.$"):
            export(half, policies()["never"], tmp_path / "out", rows(60).bfloat16())
    assert not list(tmp_path.iterdir())


def test_a_certificate_goes_only_with_the_runtime_that_made_its_trace(tmp_path: Path) -> None:
    here = {"backend": "onnxruntime", "weights": weights_hash(tiny()), "exit_names": tiny().plan.exit_names}
    proved = dataclasses.replace(PROVED, **here)
    policy = Confidence(threshold=0.5, calibrated_on=CalibrationRecord(certificate=proved))
    export_folder(tiny(), policy, tmp_path / "folder", rows(60))
    export_programs(tiny(), policy, tmp_path / "programs", rows(60))
    kept, gone = (
        json.loads((tmp_path / kind / "manifest.json").read_text())["policy"]["calibrated_on"]
        for kind in ("folder", "programs")
    )
    assert kept["certificate"]["data_hash"] == proved.data_hash
    assert "certificate" not in gone
    elsewhere = dataclasses.replace(proved, precision="torch.float64")
    policy = dataclasses.replace(policy, calibrated_on=CalibrationRecord(certificate=elsewhere))
    export_folder(tiny(), policy, tmp_path / "folder", rows(60))
    kept = json.loads((tmp_path / "folder" / "manifest.json").read_text())["policy"]["calibrated_on"]
    assert "certificate" not in kept, "tested in another precision"
