"""The verbs, joined by files, as a user types them; their help, their last line and their errors."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from cyclopts import App
from torch import nn

from shallowdeep import choices
from shallowdeep.cli import app, main
from shallowdeep.data import Dataset, Preprocessing
from shallowdeep.files import write_text
from shallowdeep.paper import cli as paper_cli
from shallowdeep.paper.datasets import DATASETS
from shallowdeep.paper.networks import NETWORKS
from shallowdeep.paper.recipes import Regime
from shallowdeep.policies import CalibrationRecord, Confidence
from shallowdeep.runtime.backends import BackendName
from shallowdeep.spelling import from_json, to_json
from shallowdeep.trajectory import Alarm
from shallowdeep.verbs import ready

SIDE = 12


class Tiny(nn.Module):
    """Somebody's classifier: found by the command line as `test_cli:tiny`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x.amax((2, 3)))


def tiny(num_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Tiny(num_classes)


def lonely(num_classes: int = 3) -> nn.Module:
    """No cut point: one layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, num_classes))


def grey(num_classes: int = 3) -> nn.Module:
    """It reads images of one channel."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, num_classes))


def single(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), nn.Linear(8, 1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs whose colour is their class."""
    path = tmp_path_factory.mktemp("data") / "photos.npz"
    draw = np.random.default_rng(0)
    labels = np.arange(240) % 3
    images = draw.integers(0, 120, (240, SIDE, SIDE, 3), dtype=np.uint8)
    images[np.arange(240), :, :, labels] += 80
    np.savez(path, images=images, labels=labels, class_names=np.array(["red", "green", "blue"]))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    main([str(word) for word in words])
    return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said, "one sentence"
    assert said.startswith("sdn: ")
    return said


def test_all_verbs_one_after_another(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = run(capsys, "plan", "test_cli:tiny", photos, "--at", "0.2", "0.5")
    assert planned["exits"] == ["layers.0:in", "layers.2:in", "full"] or len(planned["exits"]) == 3  # type: ignore[arg-type]
    trained = run(capsys, "train", photos, "--half", "a", "--epochs", "3", "--augment", "crop")
    assert trained["rows"] == 120
    collected = run(capsys, "collect", photos, "--half", "b", "--reference")
    assert len(collected["accuracy"]) == 3  # type: ignore[arg-type]
    assert 0 <= run(capsys, "analyze")["wasteful"] <= 1  # type: ignore[operator]
    calibrated = run(capsys, "calibrate", "--max-accuracy-drop", "0.05")
    assert "kind" in calibrated
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["evaluate"])
    said = capsys.readouterr()
    assert said.err == "sdn: warning: The policy was calibrated on 100.0% of these rows: they flatter it.\n"
    evaluated = json.loads(said.out.splitlines()[-1])
    assert 0 < evaluated["mean_cost"] < 1.1
    tuned = run(capsys, "tune", "--max-accuracy-drop", "0.05", "--backend", "torch")
    assert tuned["asked"][-1] is True  # type: ignore[index]
    main(["tune", "--max-accuracy-drop", "-0.9", "--backend", "torch", "--out", "runs/gain"])
    assert "whole network gain anything on itself): the policy is the whole network." in capsys.readouterr().out
    asked = run(
        capsys, "calibrate", "--max-accuracy-drop", "0.05", "--exits-of", "runs/calibrate", "--out", "runs/again"
    )
    assert asked["kind"] in ("Confidence", "Margin", "Fixed")
    elsewhere = Confidence(threshold=0.9, calibrated_on=CalibrationRecord(hash_N=(1, 2, 3)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "policy.json").write_text(json.dumps(to_json(elsewhere)))
    run(capsys, "calibrate", "--max-accuracy-drop", "0.05", "--exits-of", "elsewhere", "--out", "runs/again")
    built = from_json(json.loads((tmp_path / "runs" / "again" / "policy.json").read_text()))
    assert built.calibrated_on is not None
    assert len({1, 2, 3} & set(built.calibrated_on.hash_N)) == 3, "rows that chose the exits have taught the policy"
    assert len(built.calibrated_on.hash_N) > 3
    with pytest.raises(SystemExit):
        main(["calibrate", "--max-accuracy-drop", "0.05", "--confidence", "0.9", "--exits-of", "runs/calibrate"])
    assert "The policy of these exits has seen 100.0% of these rows, so no bound would hold" in capsys.readouterr().err
    words = ("--backends", "torch", "--batch-sizes", "1", "8", "--threads", "1", "--blocks", "2")
    benched = run(capsys, "bench", photos, "--half", "b", *words, "--rival", "test_cli:tiny")
    assert len(benched["measured"]) == 2  # type: ignore[arg-type]
    assert str(benched["verdict"]).startswith("batch 1, 1 threads: ")
    for kind, file in (("folder", "host.py"), ("file", "model.onnx"), ("programs", "step0.pt2")):
        run(capsys, "export", photos, "--half", "b", "--kind", kind, "--out", f"runs/export-{kind}")
        assert (tmp_path / f"runs/export-{kind}" / file).is_file()
    alarm = Alarm(
        asked_E=(True,) * 3,
        bias_E=(0.0,) * 3,
        weight_EE=((-1.0, 0.0, 0.0), (-0.5, -0.5, 0.0), (0.0, 0.0, -1.0)),
        threshold=0.2,
    )
    write_text(tmp_path / "runs/alarms/alarm.json", json.dumps(alarm.to_json()))
    for verb in (("train", photos), ("collect", photos), ("tune",), ("bench", photos), ("predict", photos)):
        said = refused(capsys, *verb, "--device", "nowhere")
        assert said.startswith("sdn: PyTorch cannot compute on 'nowhere' here: ")
    predicted = run(capsys, "predict", photos, "--half", "b", "--backend", "torch", "--alarm", "runs/alarms")
    assert predicted["rows"] == 120
    with (tmp_path / "runs/predict/predictions.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    kept = [float(line["alarm"]) <= 0.2 for line in answers]
    assert 0 < sum(kept) < 120
    assert [line["kept"] == "1" for line in answers] == kept
    assert predicted["kept"] == sum(kept) / 120
    watched = run(capsys, "watch")
    assert (watched["action"], watched["rows"]) == ("keep", 120), "predictions and reference scale confusion alike"
    assert json.loads((tmp_path / "runs/watch/monitor.json").read_text())["reference"]["standardised"]
    lines = (tmp_path / "runs/predict/predictions.csv").read_text().splitlines()
    assert len(lines) == 121
    assert lines[1].split(",")[2] in ("red", "green", "blue")
    for verb in ("plan", "train", "collect", "analyze", "calibrate", "evaluate", "tune", "bench", "predict"):
        about = json.loads((tmp_path / "runs" / verb / "run.json").read_text())
        assert about["verb"] == verb
        assert about["versions"]["torch"]
    joint = run(
        capsys, "train", photos, "--half", "a", "--epochs", "1", "--jointly", "--lr", "0.01", "--out", "runs/joint"
    )
    assert joint["regime"] == "joint"
    assert run(capsys, "collect", photos, "--sdn", "runs/joint", "--out", "runs/joint-trace")["rows"] == 240


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plan", "test_cli:lonely", "DATA"), "No cut point in Sequential"),
        (("plan", "test_cli:single", "DATA"), "wrap it to two"),
        (("plan", "test_cli:tiny", "DATA", "--at", "nowhere"), "No cut point 'nowhere' in Tiny. Cut points: "),
        (("plan", "test_cli:nothing", "DATA"), "nothing"),
        (("plan", "timm:resnet999", "DATA"), "resnet"),
        (("plan", "test_cli:tiny", "elsewhere"), "No file or folder elsewhere: give a folder of class folders"),
        (("plan", "resnet18", "DATA"), "Perhaps 'timm:resnet18'?"),
        (("plan", ".", "DATA"), "Perhaps 'hf:.'?"),
        (("plan", "test_cli:tiny", "DATA", "--num-classes", "2"), "give --num-classes 3"),
        (("collect", "DATA", "--sdn", "nowhere"), "sdn train writes one"),
        (("evaluate", "--trace", "nowhere"), "No file nowhere/trace.safetensors: sdn collect writes one"),
        (("calibrate",), "sdn calibrate --max-accuracy-drop 0.005"),
        (("calibrate", "--trace", "nowhere", "--max-mean-cost", "1"), "sdn collect writes one"),
        (("report", "nowhere"), "No file nowhere"),
        (("prove-guarantee", "nowhere"), "No file nowhere"),
        (("colect", "DATA"), 'Did you mean "collect"?'),
        (("paper", "tabels"), 'Did you mean "tables"?'),
        (("collect",), "--data requires an argument. See sdn collect --help."),
        (("collect", "DATA", "--bacth-size", "4"), "Did you mean --batch-size? See sdn collect --help."),
        (("collect", "DATA", "--batch-size", "0"), "Must be >= 1. See sdn collect --help."),
        (("collect", "DATA", "--batch-size", "many"), 'unable to convert "many" into int'),
        (("collect", "DATA", "--half", "c"), 'Choose from: "all", "a", "b".'),
        (("collect", "DATA", "--out", "DATA"), "is a file. See sdn collect --help."),
        (("train", "DATA", "--lr", "0.1"), "lr is the rate of joint training: give --jointly, too."),
        (("train", "DATA", "--views", "2"), "Views are drawn for ICs alone, and with an augmentation"),
        (("bench", "DATA", "--batch-sizes", "1", "0"), "Must be >= 1"),
        (("bench", "DATA", "--rival-weights", "DATA"), "are the weights of a rival: give --rival, too."),
        (("tune", "--backend", "tensorrt"), '"onnxruntime"'),
        (("doctor", "me"), "See sdn doctor --help."),
        (("demo", "--data", "cifar10"), "--data-dir"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *(photos if word == "DATA" else word for word in words))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_nan_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.zeros((6, 3, SIDE, SIDE), dtype=np.float32)
    images[4, 0, 0, 0] = np.nan
    np.savez("nan.npz", images=images, labels=np.arange(6) % 3)
    said = refused(capsys, "plan", "test_cli:tiny", "nan.npz")
    assert "NaN" in said
    assert "row 4" in said


def test_what_nobody_foresaw_is_one_sentence_and_status_1(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plan", "test_cli:grey", str(photos)])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("sdn: RuntimeError: ")
    assert "to have 1 channels" in said
    assert "SDN_DEBUG=1" in said
    monkeypatch.setenv("SDN_DEBUG", "1")
    with pytest.raises(RuntimeError, match="channels"):
        main(["plan", "test_cli:grey", str(photos)])


def test_what_the_system_refuses_is_said_without_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*words: object, **choices: object) -> None:
        raise OSError(28, "No space left on device", "runs/doctor")

    monkeypatch.setattr("shallowdeep.doctor.doctor_verb", full)
    assert refused(capsys, "doctor") == "sdn: runs/doctor: no space left on device."


def test_an_interrupted_verb_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*words: object, **choices: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shallowdeep.doctor.doctor_verb", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "sdn: interrupted; files that were there are whole.\n"


def test_a_policy_of_another_network_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, at in (("one", ("0.5",)), ("two", ("0.3", "0.6"))):
        run(capsys, "plan", "test_cli:tiny", photos, "--at", *at, "--out", f"{name}/plan")
        words = ("--plan", f"{name}/plan", "--epochs", "1", "--views", "1", "--out", f"{name}/train")
        run(capsys, "train", photos, "--half", "a", *words)
    run(capsys, "collect", photos, "--half", "b", "--sdn", "two/train", "--out", "two/collect")
    main(["calibrate", "--trace", "two/collect", "--max-accuracy-drop", "0.5", "--out", "two/calibrate"])
    said = capsys.readouterr().out
    assert "stops at" not in said
    assert "threshold" in said.splitlines()[0]
    assert '"kind"' not in "".join(said.splitlines()[:-1]), "a table for people, JSON in the last line alone"
    for verb in (("predict", photos), ("export", photos), ("bench", photos)):
        sentence = refused(capsys, *verb, "--sdn", "one/train", "--policy", "two/calibrate")
        assert "two/calibrate is of another network" in sentence
        assert "sdn calibrate" in sentence
    write_text(tmp_path / "bare.json", '{"kind": "Confidence", "threshold": null}')
    for sentence, *words in (
        ("one/plan is a folder of `sdn plan`: give one of `sdn train`.", "collect", photos, "--sdn", "one/plan"),
        ("give one of `sdn plan`", "train", photos, "--plan", "two/calibrate"),
        (
            "two/train is a folder of `sdn train`, which sdn calibrate would spoil: give another --out.",
            *("calibrate", "--trace", "two/collect", "--max-accuracy-drop", "0.5", "--out", "two/train"),
        ),
        ("collected from another network than one/train", "tune", "--sdn", "one/train", "--trace", "two/collect"),
        (
            "two/collect/run.json holds no policy",
            "evaluate",
            "--policy",
            "two/collect/run.json",
            "--trace",
            "two/collect",
        ),
        ("bare.json holds no policy: TypeError(", "evaluate", "--policy", "bare.json", "--trace", "two/collect"),
        (
            "bare.json holds no alarm: An alarm has the fields",
            "predict",
            photos,
            "--sdn",
            "two/train",
            "--alarm",
            "bare.json",
            "--policy",
            "two/calibrate",
        ),
        ("are of the CIFAR-10 demo: give --data cifar10, too", "demo", "--at", "0.2"),
        ("No file tune/policy.json: sdn tune writes one", "evaluate", "--policy", "tune", "--trace", "two/collect"),
    ):
        assert sentence in refused(capsys, *words)
    policy = json.loads((tmp_path / "two/calibrate/policy.json").read_text())
    assert len(policy["calibrated_on"]["exit_names"]) == 3
    policy["calibrated_on"]["exit_names"][1] = "layer9"
    write_text(tmp_path / "other/policy.json", json.dumps(policy))
    said = refused(capsys, "evaluate", "--policy", "other", "--trace", "two/collect/trace.safetensors")
    assert "calibrated for the exits" in said
    assert "layer9" in said


HEAVY = ("torch", "numpy", "scipy", "sklearn", "safetensors", "lightning_fabric", "markdown_it", "pygments")


@pytest.mark.parametrize("words", [["--help"], ["collect", "--help"], ["report", "--help"], ["paper", "run", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Under 200 ms by what is not imported; a clock would measure the machine (docs/cli.md names figures)."""
    code = f"""if True:
        import sys
        from shallowdeep.cli import app, main
        main({words})
        loaded = {{name.split(".")[0] for name in sys.modules}} & set({HEAVY})
        assert not loaded, loaded"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: sdn" in done.stdout


def verbs_of(of: App, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    for name in of:
        if not name.startswith("-"):
            yield (*before, name), of[name]
            yield from verbs_of(of[name], (*before, name))


def test_help_shows_defaults_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, verb in verbs_of(app):
        main([*words, "--help"])
        said = capsys.readouterr().out
        assert "[default: None]" not in said
        assert "[default: (" not in said
        for argument in verb.assemble_argument_collection() if verb.default_command else ():
            # Plain text keeps the docstring's own breaks, which are in the wrong place at any width.
            assert "\n" not in str(argument.parameter.help), f"{words}: describe {argument.name} in one line"


def test_floating_images_are_said_to_be_taken_as_they_are() -> None:
    halves = Preprocessing(mean=(0.5,), std=(0.5,), size=(2, 2))
    rows = Dataset(
        inputs=torch.rand(3, 1, 2, 2), labels_N=torch.tensor([0, 1, 0]), class_names=("a", "b"), source="floats.npz"
    )
    with pytest.warns(UserWarning, match=r"^floats.npz holds floating numbers, .* is for uint8 images.$"):
        assert ready(rows, halves) is rows.inputs
    images = Dataset(
        inputs=torch.full((2, 1, 2, 2), 255, dtype=torch.uint8), labels_N=torch.tensor([0, 1]), class_names=("a", "b")
    )
    assert torch.equal(ready(images, halves), torch.ones(2, 1, 2, 2))


def test_verbs_offer_what_the_library_has() -> None:
    """They name it once more, so that help need not import it."""
    assert get_args(choices.Backend) == get_args(BackendName)
    assert get_args(paper_cli.DataSet) == tuple(DATASETS)
    assert get_args(paper_cli.Network) == NETWORKS
    assert get_args(paper_cli.Regime) == get_args(Regime)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_options_and_choices(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "completion"
    app(
        ["--install-completion", "--shell", shell, "--output", str(file)],
        result_action="return_value",
    )
    script = file.read_text()
    for word in ("calibrate", "max-accuracy-drop", "onnxruntime", "prove-guarantee", "grad-cam"):
        assert word in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(file)], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path) -> None:
    file = tmp_path / "completion"
    file.write_text(app.generate_completion(prog_name="sdn", shell="bash"))
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _sdn; echo "${COMPREPLY[@]}"'

    def completed(*words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ask, "-", str(file), *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("sdn", "cal") == ["calibrate"]
    assert set(completed("sdn", "co")) == {"collect", "compare"}
    assert completed("sdn", "calibrate", "--max-a") == ["--max-accuracy-drop"]
    assert completed("sdn", "calibrate", "--risk", "h") == ["harm"]
    assert completed("sdn", "paper", "ta") == ["tables"]
