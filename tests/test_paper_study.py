"""The study's runs on a miniature: recipes as the authors' code really runs, slices, records, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import shallowdeep as sd
from shallowdeep.checkpoints import alone, seconds_of
from shallowdeep.cli import main
from shallowdeep.files import FormatError, read_tensors
from shallowdeep.joint import Taus
from shallowdeep.paper import backdoor, downloads, figures, pictures, recipes, study
from shallowdeep.paper.backdoor import Victim
from shallowdeep.paper.experiments import galleries
from shallowdeep.paper.networks import NETWORKS, ResNet, make_network
from shallowdeep.paper.recipes import make_recipe
from shallowdeep.paper.records import FIGURES, VICTIM, ReducedTrace, reduce_traces
from shallowdeep.paper.records import RUN as RUN_FIELDS
from shallowdeep.paper.study import StudyRun, all_runs, make, work_off
from shallowdeep.paper.tables import backdoor_rows
from shallowdeep.rates import stepped
from shallowdeep.types import DataError, Trace

NAMES = tuple("abcdefghij")
RUN = StudyRun(dataset="cifar10", network="resnet56", regime="cnn", recipe="fast")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of eight layers, 300 + 60 random images, two epochs, 100 rows held out."""

    def rows(_name: str, _folder: Path, split: str) -> tuple[Tensor, Tensor]:
        count, seed = (300, 0) if split == "train" else (60, 1)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
        return (images + 15 * labels[:, None, None, None]).to(torch.uint8), labels

    def short(name: str, network: str) -> Any:
        found = make_recipe(name, network)
        exits = dataclasses.replace(found.exits, epochs=2)
        return dataclasses.replace(found, epochs=2, after_epochs=2, exits=exits, bf16=False)

    monkeypatch.setattr(study, "require", lambda *_: None)
    monkeypatch.setattr(study, "read_rows", rows)
    monkeypatch.setattr(study, "split_rows", lambda labels: (torch.arange(200), torch.arange(200, 300)))
    monkeypatch.setattr(study, "make_recipe", short)
    monkeypatch.setattr(recipes, "make_network", lambda *_: ResNet(8, 10, projected=True))
    monkeypatch.setitem(recipes.EXITS, "resnet56", ("layer1.0:out", "layer2.0:out"))


def test_the_paper_recipe_is_what_the_authors_code_runs() -> None:
    recipe = make_recipe("paper", "vgg16")
    milestones = [round(share * recipe.epochs) for share in recipe.whole.milestones]
    rates = [round(recipe.whole.lr * stepped(epoch, milestones), 6) for epoch in range(recipe.epochs)]
    assert [rates.count(rate) for rate in (0.1, 0.01, 0.001, 0.0001)] == [34, 25, 25, 16]
    assert (recipe.whole.momentum, recipe.whole.nesterov, recipe.whole.batch_size) == (0.9, False, 128)
    exits = [round(recipe.exits.lr * stepped(e, recipe.exits.milestones), 6) for e in range(recipe.exits.epochs)]
    assert [exits.count(rate) for rate in (0.001, 0.0001)] == [14, 11]
    decays = {name: make_recipe("paper", name).whole.weight_decay for name in NETWORKS}
    assert decays == {"vgg16": 5e-4, "wrn32-4": 5e-4, "resnet56": 1e-4, "mobilenet": 1e-4}
    assert (recipe.holds_out, make_recipe("fast", "vgg16").holds_out) == (False, True)
    # The authors' taus rise to nominal shares, ours in the same way to the real costs.
    taus = Taus((0.15, 0.9), 100, recipe.whole.tau_start)
    assert [taus.at(e)[0] for e in (0, 93)] == pytest.approx([0.01 + 0.0015, 0.15])


def test_every_regime_leaves_its_record(small: None, tmp_path: Path) -> None:
    runs = all_runs(("cifar10",), ("resnet56",))
    report = work_off(runs, tmp_path, results=tmp_path / "results", work=tmp_path / "work")
    assert report["done"] == [run.name for run in runs]
    fields = "dataset network regime recipe epochs seed device versions seconds accuracy_cnn accuracy_exits wasteful"
    fields += " destructive destructive_of_errors accuracy_at_cost cost_at_equal_accuracy test_drop_at_equal_accuracy"
    fields += " confusion_auroc msp_auroc paper"
    for run in runs:
        about = json.loads((tmp_path / "results" / f"{run.name}.json").read_text())
        assert set(fields.split()) <= set(about) == {*RUN_FIELDS, *FIGURES, "paper"}, run.name
        assert set(about["paper"]) == set(FIGURES), "the same fields under both protocols"
        assert study.run_of(about) == run
        assert len(about["accuracy_exits"]) == (1 if run.regime == "cnn" else 3)
        assert about["training_rows"] == 200
        assert about["seconds"] > 0
        assert about["precision"] == ("fp32" if run.regime == "ic-only" else "32-true")
        assert about["accuracy_cnn"] == about["paper"]["accuracy_cnn"]
        reduced = ReducedTrace.load(tmp_path / "results" / f"{run.name}.safetensors")
        assert (reduced.held_out, reduced.said_EN.shape[1]) == (100, 160)
    # IC-only training leaves the network as it was; the others move it.
    networks = {run.regime: read_tensors(tmp_path / "work" / run.name / "network.safetensors")[0] for run in runs}
    same = {
        regime: all(torch.equal(weights[name], networks["cnn"][name]) for name in weights)
        for regime, weights in networks.items()
    }
    assert same == {"cnn": True, "ic-only": True, "sdn-training": False, "mixed": False}
    # The saved SDN answers on bytes as the record says.
    model = recipes.fresh_network("resnet56", study.study_set("cifar10"), 0)
    model.network.load_state_dict(networks["ic-only"])
    sdn = sd.load(tmp_path / "work" / "cifar10-resnet56-ic-only-fast" / "sdn", model)
    trace = sd.collect(sdn, study.read_rows("cifar10", tmp_path, "test"))
    said = ReducedTrace.load(tmp_path / "results" / "cifar10-resnet56-ic-only-fast.safetensors").part("test").said_EN
    assert torch.equal(trace.logits_ENC.argmax(2), said.long())
    assert not bool(trace.trained_N.any()) if trace.trained_N is not None else False
    # A second call does nothing.
    again = work_off(runs, tmp_path, results=tmp_path / "results", work=tmp_path / "work")
    assert again == {"done": [], "before": [run.name for run in runs], "open": [], "failed": []}


def test_slices_make_the_same_network_as_one_go(small: None, tmp_path: Path) -> None:
    make(RUN, tmp_path, results=tmp_path / "a", work=tmp_path / "whole")
    calls = 0
    while not (tmp_path / "b" / f"{RUN.name}.json").exists():
        report = work_off([RUN], tmp_path, results=tmp_path / "b", work=tmp_path / "sliced", minutes=0.001)
        calls += 1
        assert report["open" if calls < 3 else "done"] == [RUN.name]
    assert calls == 3, "an epoch a slice, then the record"
    whole, sliced = (read_tensors(tmp_path / w / RUN.name / "network.safetensors")[0] for w in ("whole", "sliced"))
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)


def test_slices_of_many_runs_end_with_all_records(small: None, tmp_path: Path) -> None:
    """A plain network that is not ready stops the slice; what needs it waits."""
    runs, calls = all_runs(("cifar10",), ("resnet56",)), 0
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    first = work_off(runs, tmp_path, **where, minutes=0.001)
    assert first == {"done": [], "before": [], "open": [run.name for run in runs], "failed": []}
    while work_off(runs, tmp_path, **where, minutes=0.001)["open"]:
        calls += 1
        assert calls < 40
    assert calls >= 4
    assert sorted(path.stem for path in (tmp_path / "r").glob("*.json")) == sorted(run.name for run in runs)


def test_a_record_of_fewer_epochs_is_no_record(small: None, tmp_path: Path) -> None:
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    path = tmp_path / "r" / f"{RUN.name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 1}))
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    assert json.loads(path.read_text())["epochs"] == 2
    assert not list((tmp_path / "w").glob("*.old*")), "its checkpoint is of the length asked and goes on"


def test_a_run_shorter_than_its_recipe_starts_afresh(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint cannot go on; it is kept aside."""
    short, where = study.make_recipe, {"results": tmp_path / "r", "work": tmp_path / "w"}
    monkeypatch.setattr(study, "make_recipe", lambda *names: dataclasses.replace(short(*names), epochs=1))
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    monkeypatch.setattr(study, "make_recipe", short)
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    assert json.loads((tmp_path / "r" / f"{RUN.name}.json").read_text())["epochs"] == 2
    said, aside = capsys.readouterr().err, tmp_path / "w" / f"{RUN.name}.old1"
    assert f"epochs was 1, now 2. It is now in {aside}; {RUN.name} starts afresh." in said
    assert (aside / "checkpoint.pt").is_file()
    assert work_off([RUN], tmp_path, **where)["before"] == [RUN.name]


def test_what_stands_on_a_plain_network_follows_when_it_is_made_again(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh clone the weights are gone, and "mixed" trains the plain network again, to other weights."""
    where, results, attempt = {"results": tmp_path / "r", "work": tmp_path / "w"}, tmp_path / "r", [0]
    ics, joint, mixed = (dataclasses.replace(RUN, regime=regime) for regime in ("ic-only", "sdn-training", "mixed"))

    def answered(run: StudyRun, rows: int) -> Trace:
        """ICs answer over what the plain network of this attempt says; the others are as good at any attempt."""
        labels = torch.arange(rows) % 10
        said = []
        for good, seed in ((1.0, 5), (3.0, 6 + attempt[0]) if run.regime in ("cnn", "ic-only") else (2.0, 5)):
            noise = torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))
            said.append(noise + good * (1 + seed % 2) * torch.nn.functional.one_hot(labels, 10))
        exits = said[1:] if run.regime == "cnn" else said
        costs = torch.tensor([0.5, 1.01])[-len(exits) :]
        return Trace(logits_ENC=torch.stack(exits), labels_N=labels, cost_E=costs)

    def quick(run: StudyRun, _data: Path, *, results: Path, work: Path) -> None:
        (work / run.name).mkdir(parents=True)
        (work / run.name / "network.safetensors").touch()
        traces = {"held_out": answered(run, 100), "test": answered(run, 60)}
        recipe = study.make_recipe(run.recipe, run.network)
        about = study._asked(run, recipe) | study.provenance(
            (torch.zeros(200, 1), torch.arange(200)), (torch.zeros(100, 1), torch.arange(100)), "32-true", 1.0
        )
        study._write_record(run, about, traces, study.plain_network(run, results), work / run.name, results)

    def record(run: StudyRun) -> Any:
        return json.loads((results / f"{run.name}.json").read_text())

    monkeypatch.setattr(study, "make", quick)
    assert work_off([ics, joint], tmp_path, **where)["done"] == [RUN.name, ics.name, joint.name]
    assert study.same_network(ics, results)
    before = record(joint)
    shutil.rmtree(tmp_path / "w")
    attempt[0] = 1
    report = work_off([mixed], tmp_path, **where)
    assert (report["done"], report["before"]) == ([RUN.name, mixed.name, ics.name], []), "asked for or not"
    assert study.same_network(ics, results)
    after = record(joint)
    for run in (ics, joint, mixed):
        assert record(run)["accuracy_cnn"] == record(run)["paper"]["accuracy_cnn"] == record(RUN)["accuracy_cnn"]
    assert after["accuracy_cnn"] != before["accuracy_cnn"], "not asked for, and yet compared with the network of now"
    assert {name: after[name] for name in RUN_FIELDS} == {name: before[name] for name in RUN_FIELDS}
    assert after["accuracy_exits"] == before["accuracy_exits"]
    # What a killed call or an earlier version left is mended by the next one.
    attempt[0] = 2
    shutil.rmtree(tmp_path / "w")
    quick(RUN, tmp_path, results=results, work=tmp_path / "w")
    assert not study.same_network(ics, results)
    assert work_off([joint], tmp_path, **where)["done"] == [ics.name]
    assert study.same_network(ics, results)
    after = record(joint)
    for left in (before, {name: value for name, value in after.items() if name != "cost_at_budget"}):
        (results / f"{joint.name}.json").write_text(json.dumps(left))
        assert work_off([joint], tmp_path, **where)["before"] == [RUN.name, joint.name]
        assert record(joint) == after


def test_both_splits_are_read_before_anything_trains(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study.read_rows

    def damaged(name: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        if split == "test":
            raise FormatError("test_batch is damaged")
        return whole(name, folder, split)

    monkeypatch.setattr(study, "read_rows", damaged)
    with pytest.raises(FormatError, match="test_batch is damaged"):
        make(RUN, tmp_path, results=tmp_path / "r", work=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_full_disk_leaves_the_earlier_pair(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    make(RUN, tmp_path, **where)
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    monkeypatch.setattr(study, "describe_device", lambda: "another")
    monkeypatch.setattr(study, "reduce_traces", lambda _, test: reduce_traces(None, test))

    def full(path: Path, text: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(study, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make(RUN, tmp_path, **where)
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before, "trace and JSON"


def test_the_door_of_runs(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]
    what = ["--datasets", "cifar10", "--networks", "resnet56", "--regimes", "cnn"]
    for state, minutes in (("open", "0"), ("done", "9"), ("before", "9")):
        main(["paper", "run", str(tmp_path), *what, *where, "--minutes", minutes])
        lines = capsys.readouterr().out.splitlines()
        report = json.loads(lines[-1])
        assert report == {"done": [], "before": [], "open": [], "failed": []} | {state: [RUN.name]}
        assert f"{state}: {RUN.name}" in lines
    with pytest.raises(SystemExit) as stopped:
        main(["paper", "run", str(tmp_path), "--networks", "resnet50", *where])
    assert stopped.value.code == 2
    assert 'Choose from: "vgg16", "resnet56", "wrn32-4", "mobilenet".' in capsys.readouterr().err
    for some in ("--datasets", "--networks", "--regimes"):
        with pytest.raises(SystemExit, match="2"):
            main(["paper", "run", str(tmp_path), *where, some])


def test_a_record_over_a_network_of_fewer_epochs_is_no_record(small: None, tmp_path: Path) -> None:
    """ICs as long trained as they should be, but on a network that has been trained for longer since."""
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    ics = dataclasses.replace(RUN, regime="ic-only")
    assert work_off([ics], tmp_path, **where)["done"] == [RUN.name, ics.name]
    path = tmp_path / "r" / f"{ics.name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs_before": 1}))
    report = work_off([ics], tmp_path, **where)
    assert (report["before"], report["done"]) == ([RUN.name], [ics.name])
    assert json.loads(path.read_text())["epochs_before"] == 2


def test_a_pair_of_two_trainings_is_made_again(small: None, tmp_path: Path) -> None:
    """Killed between the renaming of the trace and that of the JSON."""
    where: Any = {"results": tmp_path / "r", "work": tmp_path / "w"}
    joint = dataclasses.replace(RUN, regime="sdn-training")
    work_off([joint], tmp_path, **where)
    path = tmp_path / "r" / f"{joint.name}.json"
    before, trace = path.read_text(), ReducedTrace.load(path.with_suffix(".safetensors"))
    others = trace.said_EN.clone()
    wrong = int((others[1, 100:] != trace.labels_N[100:]).nonzero()[0])
    others[1, 100 + wrong] = trace.labels_N[100 + wrong]
    dataclasses.replace(trace, said_EN=others).save(path.with_suffix(".safetensors"))
    path.write_text(json.dumps({name: value for name, value in json.loads(before).items() if name != "best"}))
    half = path.read_text()
    work_off([RUN], tmp_path, **where)
    assert path.read_text() == half, "no figures of one training are written beside the choices of the other"
    assert work_off([joint], tmp_path, **where)["done"] == [joint.name]
    assert torch.equal(ReducedTrace.load(path.with_suffix(".safetensors")).said_EN, trace.said_EN)
    assert json.loads(path.read_text())["paper"] == json.loads(before)["paper"]


def test_a_record_of_another_recipe_or_without_its_trace_is_made_again(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    path, short = tmp_path / "r" / f"{RUN.name}.json", study.make_recipe
    assert json.loads(path.read_text())["training"]["lr"] == 0.1
    path.with_suffix(".safetensors").unlink()
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name], "from its last checkpoint"
    assert path.with_suffix(".safetensors").is_file()

    def changed(name: str, network: str) -> recipes.Recipe:
        found = short(name, network)
        return dataclasses.replace(found, whole=dataclasses.replace(found.whole, lr=0.05))

    monkeypatch.setattr(study, "make_recipe", changed)
    assert work_off([RUN], tmp_path, **where)["done"] == [RUN.name]
    assert json.loads(path.read_text())["training"]["lr"] == 0.05
    assert (tmp_path / "w" / f"{RUN.name}.old1").is_dir(), "what the other recipe taught is kept"


def test_a_plain_network_that_is_missing_is_missed_before_training(small: None, tmp_path: Path) -> None:
    joint = dataclasses.replace(RUN, regime="sdn-training")
    with pytest.raises(FormatError, match=r"No file .*cifar10-resnet56-cnn-fast\.safetensors"):
        make(joint, tmp_path, results=tmp_path / "r", work=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_training_that_diverged_is_one_sentence(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: object, start: recipes.Normalised, **__: object) -> tuple[torch.nn.Module, str]:
        start.get_parameter("network.linear.bias").data.fill_(torch.nan)
        return start, "32-true"

    monkeypatch.setattr(study, "train", diverged)
    (tmp_path / "w" / RUN.name).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"The training of {RUN.name} diverged.* now in .*{RUN.name}\.old1; the next"):
        make(RUN, tmp_path, results=tmp_path / "r", work=tmp_path / "w")
    assert not (tmp_path / "r").exists()


def test_a_run_that_diverges_keeps_no_other_from_its_turn(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First the joint training diverges, then, of another seed, the plain network; each starts afresh the next time."""
    trained, sick, results = study.train, {"sdn-training"}, tmp_path / "r"
    refreshed: list[str] = []
    monkeypatch.setattr(study, "_refresh", lambda run, *_, **__: refreshed.append(run.name))

    def diverging(regime: str, *choices: Any, **more: Any) -> Any:
        found, precision = trained(regime, *choices, **more)  # type: ignore[arg-type]
        if regime in sick:
            network = found.backbone if isinstance(found, sd.ShallowDeepNetwork) else found
            network.get_parameter("network.linear.bias").data.fill_(torch.nan)
        return found, precision

    monkeypatch.setattr(study, "train", diverging)
    words = ["paper", "run", str(tmp_path), "--datasets", "cifar10", "--networks", "resnet56"]
    words += ["--results", str(results), "--work", str(tmp_path / "w"), "--regimes", "sdn-training", "ic-only"]

    def report(*more: str) -> Any:
        with pytest.raises(SystemExit, match="1"):
            main([*words, *more])
        said = capsys.readouterr()
        return json.loads(said.out.splitlines()[-1]), said.err

    joint, ics = (dataclasses.replace(RUN, regime=regime) for regime in ("sdn-training", "ic-only"))
    found, said = report()
    assert found == {"done": [RUN.name, ics.name], "before": [], "open": [], "failed": [joint.name]}
    aside = tmp_path / "w" / f"{joint.name}.old1"
    assert f"{joint.name} failed: The training of {joint.name} diverged: its logits are not finite." in said
    assert f"now in {aside}; the next call starts afresh." in said
    assert "NaN inputs" not in said
    assert (aside / "checkpoint.pt").is_file()
    assert joint.name in refreshed
    sick.clear()
    main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == [joint.name]
    sick.add("cnn")
    found, _ = report("--seed", "1")
    assert found["failed"] == [f"{RUN.name}-seed1"]
    assert found["open"] == [f"{joint.name}-seed1", f"{ics.name}-seed1"], "what needs it waits"


def test_folders_that_cannot_be_written_are_found_before_any_training(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "make", lambda *_, **__: pytest.fail("it trains"))
    (tmp_path / "file").touch()
    words = ["paper", "run", str(tmp_path), "--datasets", "cifar10", "--networks", "resnet56", "--regimes", "cnn"]
    for results, work in (("file", "w"), ("file/deeper", "w"), ("r", "file")):
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--results", str(tmp_path / results), "--work", str(tmp_path / work)])
        unusable = tmp_path / (results if results != "r" else work)
        said = f"sdn: Nothing can be written into {unusable} ({tmp_path / 'file'}: not a directory)"
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "looking leaves nothing"


def test_data_that_are_missing_are_missed_before_any_training(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no failure of a run; what is recorded needs none."""
    work_off([RUN], tmp_path, results=tmp_path / "r", work=tmp_path / "w")
    monkeypatch.setattr(study, "require", downloads.require)
    words = ["paper", "run", str(tmp_path / "data"), "--networks", "resnet56", "--regimes", "cnn", "--minutes", "0"]
    words += ["--results", str(tmp_path / "r"), "--work", str(tmp_path / "w"), "--datasets"]
    main([*words, "cifar10"])
    assert RUN.name in capsys.readouterr().out
    (tmp_path / "data" / "tiny-imagenet-200").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "cifar10", "cifar100", "tinyimagenet"])
    said = capsys.readouterr().err
    assert f"sdn: Not whole in {tmp_path / 'data'}: cifar-100-python: missing; tiny-imagenet-200: No file" in said
    assert f"sdn paper data {tmp_path / 'data'} --download" in said


def test_a_network_whose_weights_are_lost_is_trained_again(small: None, tmp_path: Path) -> None:
    where = {"results": tmp_path / "r", "work": tmp_path / "w"}
    ics = dataclasses.replace(RUN, regime="ic-only")
    assert work_off([ics], tmp_path, **where)["done"] == [RUN.name, ics.name], "its plain network comes first"
    shutil.rmtree(tmp_path / "w")
    assert work_off([ics], tmp_path, **where)["before"] == [RUN.name, ics.name], "nothing open needs the weights"
    (tmp_path / "r" / f"{ics.name}.json").unlink()
    assert work_off([ics], tmp_path, **where)["done"] == [RUN.name, ics.name]
    with pytest.raises(DataError, match="cifar10-resnet56-cnn-fast must be trained first"):
        make(ics, tmp_path, results=tmp_path / "other", work=tmp_path / "other")
    assert not (tmp_path / "other" / ics.name).exists()


def test_weights_of_another_training_are_not_built_upon(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record came from another machine, whose weights are not the ones in the work folder."""
    ics, results, work = dataclasses.replace(RUN, regime="ic-only"), tmp_path / "r", tmp_path / "w"
    work_off([RUN], tmp_path, results=results, work=tmp_path / "elsewhere")
    fresh = study.fresh_network
    monkeypatch.setattr(study, "fresh_network", lambda name, chosen, seed: fresh(name, chosen, seed + 1))
    work_off([RUN], tmp_path, results=tmp_path / "own", work=work)
    report = work_off([ics], tmp_path, results=results, work=work)
    assert report["done"] == [RUN.name, ics.name], "the record is now that of the weights that are there"
    assert study.same_network(ics, results)
    assert work_off([ics], tmp_path, results=results, work=work)["before"] == [RUN.name, ics.name]


def test_a_second_process_keeps_out(victims: None, tmp_path: Path) -> None:
    """Two that write the same features would mix them up."""
    where: Any = {"results": tmp_path / "r", "work": tmp_path / "w"}
    victim = Victim(rate=0.2, network="resnet56", epochs=1)
    for name, begin in (
        (RUN.name, lambda: make(RUN, tmp_path, **where)),
        (victim.name, lambda: backdoor.backdoor(victim, tmp_path, **where)),
    ):
        with alone(tmp_path / "w" / name), pytest.raises(DataError, match=rf"Another process is at work in .*{name}"):
            begin()
        assert not (tmp_path / "w" / name).exists()
        begin()
    assert len(list((tmp_path / "r").glob("*.json"))) == 2


def test_unknown_names_say_which_there_are() -> None:
    for wrong, offered in (
        ({"dataset": "svhn"}, "cifar100"),
        ({"network": "resnet50"}, "resnet56"),
        ({"regime": "joint"}, "sdn-training"),
        ({"recipe": "slow"}, "paper, fast"),
    ):
        with pytest.raises(ValueError, match=offered):
            dataclasses.replace(RUN, **wrong)  # type: ignore[arg-type]
    assert RUN.name == "cifar10-resnet56-cnn-fast"
    assert dataclasses.replace(RUN, seed=3).name == "cifar10-resnet56-cnn-fast-seed3"
    order = [run.name for run in all_runs()]
    assert len(order) == 32
    for run in all_runs():
        assert run.cnn is None or order.index(run.cnn.name) < order.index(run.name)


@pytest.mark.parametrize(
    ("name", "convolution", "deviation", "linear"),
    [  # of the convolution: sqrt(2 / fan out), the same, sqrt 2 times Xavier's sqrt(2 / (fan in + fan out))
        ("vgg16", "blocks.5.0", (2 / (9 * 256)) ** 0.5, "last"),
        ("resnet56", "layer3.5.conv1", (2 / (9 * 64)) ** 0.5, "linear"),
        ("wrn32-4", "stages.1.0.conv2", 2**0.5 * (2 / (9 * 256)) ** 0.5, "linear"),
    ],
)
def test_the_authors_starting_weights(name: str, convolution: str, deviation: float, linear: str) -> None:
    a, b = (recipes.fresh_network(name, study.study_set("cifar10"), 0).network.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert float(a[f"{convolution}.weight"].std()) == pytest.approx(deviation, rel=0.02)
    assert float(a[f"{linear}.weight"].std()) == pytest.approx(0.01, rel=0.06)
    assert all(not bool(a[key].any()) for key in a if key.endswith(".bias")), "no bias, of no kind of layer"


def test_mobilenet_starts_as_pytorch_does() -> None:
    linear = make_network("mobilenet", 10, 32).get_submodule("linear")
    assert isinstance(linear, torch.nn.Linear)
    assert float(linear.weight.detach().std()) == pytest.approx(1 / (3 * 1024) ** 0.5, rel=0.05)


# ---------------------------------------------------------------- pictures and the backdoor


@pytest.fixture
def two_runs(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of a plain network and its ICs, made where the doors look for them."""
    monkeypatch.setattr(pictures, "read_rows", study.read_rows)
    monkeypatch.setattr(pictures, "class_names", lambda *_: NAMES)
    monkeypatch.chdir(tmp_path)
    runs = all_runs(("cifar10",), ("resnet56",), ("cnn", "ic-only"))
    work_off(runs, tmp_path, results=tmp_path / "results" / "paper", work=tmp_path / "runs" / "paper")
    return [run.name for run in runs]


def test_pictures_of_a_run(two_runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, results = two_runs[1], tmp_path / "results" / "paper"
    drawn = pictures.draw_galleries(name, tmp_path, results=results, out=tmp_path / "out")
    found = galleries(ReducedTrace.load(results / f"{name}.safetensors"))
    assert drawn["images"] == {kind: len(rows) for kind, rows in found.items()}
    for kind, rows in found.items():
        assert (tmp_path / "out" / f"{name}-{kind}.png").exists() is bool(rows)
    model = recipes.fresh_network("resnet56", study.study_set("cifar10"), 0)
    sdn = recipes.with_exits(model, "resnet56", study.study_set("cifar10"), 0)
    images, labels = study.read_rows("cifar10", tmp_path, "test")
    heats = {0: torch.zeros(4, 8, 8), -1: torch.zeros(4, 4, 4)}
    heats[0][:, 0, 0] = heats[-1][:, 3, 3] = 1.0
    monkeypatch.setattr(pictures, "grad_cam", lambda _, __, exit: heats[exit])
    sheet = pictures.looks(sdn, images[:4], tuple("abcdefghij"), labels[:4])
    shown = np.asarray(sheet).astype(int)
    red = [
        [shown[y, x + 102 * panel, 0] - shown[y, x + 102 * panel, 2] for y, x in ((8, 8), (99, 99))] for panel in (1, 2)
    ]
    assert red[0][0] > 60 > 5 > red[0][1], "the first exit's heat is in the corner where it looked"
    assert red[1][1] > 60 > 5 > red[1][0], "and the last one's in its own"
    assert sheet.size == (3 * (96 + 6) + 6, 4 * (96 + 12 + 6) + 6)
    assert np.asarray(sheet)[8, 8].tolist() == images[0, :, 0, 0].tolist(), "the image itself comes first"


def test_grad_cam_takes_the_weights_of_which_the_record_speaks(two_runs: list[str], tmp_path: Path) -> None:
    name, work = two_runs[1], tmp_path / "runs" / "paper"
    where: Any = {"results": tmp_path / "results" / "paper", "work": work, "out": tmp_path / "looks.png"}
    trace = Trace.load(work / name / "test.safetensors")
    dataclasses.replace(trace, logits_ENC=-trace.logits_ENC).save(work / name / "test.safetensors")
    with pytest.raises(DataError, match=f"does not hold the weights of which the record {name} speaks") as refused:
        pictures.draw_looks(name, tmp_path, **where)
    assert not (tmp_path / "looks.png").exists()
    # The sentence leads out, and the record stays.
    kept = {path.name: path.read_bytes() for path in where["results"].iterdir()}
    shutil.rmtree(work)
    run, look = re.findall(r"sdn (paper .*?)(?:;|$)", str(refused.value))
    main(shlex.split(run))
    main([*shlex.split(look), "--out", str(tmp_path / "looks.png")])
    assert (tmp_path / "looks.png").is_file()
    assert {path.name: path.read_bytes() for path in where["results"].iterdir()} == kept
    other = recipes.Normalised(make_network("mobilenet", 10, 32), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(DataError, match=f"holds the weights of another network than {name}'s"):
        study.load_network(other, work / name, name)


def test_the_trigger_is_a_white_square_and_changes_nothing_else() -> None:
    images = torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8)
    stamped = backdoor.stamped(images)
    changed = (stamped != images).any(1).any(0)
    assert changed.nonzero().amin(0).tolist() == [26, 26]
    assert changed.nonzero().amax(0).tolist() == [30, 30]
    assert bool((stamped[:, :, 26:31, 26:31] == 255).all())
    labels = torch.arange(7)
    x, y = backdoor.poisoned((images, labels), 3 / 7, seed=0)
    touched = (x != images).flatten(1).any(1)
    assert int(touched.sum()) == 3
    assert bool((y[touched] == 5).all())
    assert torch.equal(y[~touched], labels[~touched])


def test_a_backdoor_is_judged_by_its_definition() -> None:
    """Two exits: the first is right about triggered rows, the last says 5 to all of them."""
    labels = torch.arange(10).repeat(20)
    right = 6.0 * torch.nn.functional.one_hot(labels, 10)
    always = 6.0 * torch.nn.functional.one_hot(torch.full_like(labels, 5), 10)
    costs = torch.tensor([0.3, 1.0])
    wavering = right + torch.rand(right.shape, generator=torch.Generator().manual_seed(0))
    clean = Trace(logits_ENC=torch.stack([right, wavering]), labels_N=labels, cost_E=costs)
    triggered = Trace(logits_ENC=torch.stack([right, always]), labels_N=labels, cost_E=costs)
    found = backdoor.judge(clean, clean, triggered)
    assert found["attack_success"] == 1.0
    assert found["attack_success_exits"] == [0.0, 1.0]
    assert found["accuracy_triggered"] == pytest.approx(0.1)
    assert found["paper"]["accuracy_triggered"] == 1.0
    assert found["detection"]["auroc"] == 1.0


def test_victims_are_named_and_refused() -> None:
    assert Victim(rate=0.005).name == "cifar10-vgg16-backdoor-fast-rate0.005"
    assert Victim(rate=0.02, network="mobilenet", epochs=5).name == "cifar10-mobilenet-backdoor-fast-rate0.02-epochs5"
    assert Victim(rate=0.1, recipe="paper", seed=3).name == "cifar10-vgg16-backdoor-paper-rate0.1-seed3"
    assert Victim(rate=0.1234567).name != Victim(rate=0.1234568).name, "a record each"
    assert Victim(rate=0.02, network="mobilenet").how.whole == recipes.FAST
    assert Victim(rate=0.1, recipe="paper").how.holds_out  # thresholds need rows, by whatever recipe it was trained
    for wrong, said in (
        ({"rate": 1.5}, r"found 1\.5"),
        ({"rate": float("nan")}, "found nan"),
        ({"network": "lenet"}, "mobilenet"),
        ({"recipe": "slow"}, "paper, fast"),
        ({"epochs": 0}, "found 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Victim(**{"rate": 0.1, **wrong})  # type: ignore[arg-type]


@pytest.fixture
def victims(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backdoor, "make_recipe", study.make_recipe)


def test_a_victim_is_trained_and_written(victims: None, tmp_path: Path) -> None:
    victim = Victim(rate=0.2, network="resnet56", epochs=1)
    found = backdoor.backdoor(victim, tmp_path, results=tmp_path, work=tmp_path / "w")
    written = json.loads((tmp_path / "cifar10-resnet56-backdoor-fast-rate0.2-epochs1.json").read_text())
    assert written["poisoning_rate"] == 0.2
    assert (written["epochs"], written["training_rows"], written["held_out_rows"]) == (1, 200, 100)
    assert (written["precision"], written["versions"]["torch"]) == ("32-true", torch.__version__)
    assert written["seconds"] == sum(seconds_of(tmp_path / "w" / victim.name / part) for part in ("victim", "ics"))
    assert written["seconds"] > 0
    assert len(written["attack_success_exits"]) == 3
    assert found["accuracy_triggered"] == written["accuracy_triggered"]
    assert written["regime"] == "backdoor"
    (row,) = backdoor_rows([written])[1:]
    assert row[:2] == ("resnet56", "0.2")


def test_what_another_victim_left_or_what_diverged_is_set_aside(
    victims: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, short, trained = Victim(rate=0.2, network="resnet56", epochs=1), study.make_recipe, backdoor.train
    where: Any = {"results": tmp_path / "r", "work": tmp_path / "w"}
    assert len(backdoor.work_off([victim], tmp_path, **where)["victims"]) == 1

    def changed(name: str, network: str) -> recipes.Recipe:
        found = short(name, network)
        return dataclasses.replace(found, whole=dataclasses.replace(found.whole, lr=0.05))

    monkeypatch.setattr(backdoor, "make_recipe", changed)
    (record,) = backdoor.work_off([victim, victim], tmp_path, **where)["victims"]
    assert record["training"]["lr"] == 0.05
    aside = tmp_path / "w" / f"{victim.name}.old1"
    assert f"It is now in {aside}; {victim.name} starts afresh." in capsys.readouterr().err
    assert (aside / "victim" / "checkpoint.pt").is_file()

    def diverging(regime: str, *choices: Any, **more: Any) -> Any:
        found, precision = trained(regime, *choices, **more)  # type: ignore[arg-type]
        if isinstance(found, sd.ShallowDeepNetwork) and sick:
            found.backbone.get_parameter("network.linear.bias").data.fill_(torch.nan)
        return found, precision

    sick, other = [1], dataclasses.replace(victim, seed=1)
    monkeypatch.setattr(backdoor, "train", diverging)
    report = backdoor.work_off([other, victim], tmp_path, **where)
    assert (report["failed"], report["victims"]) == ([other.name], [record])
    assert f"The training of {other.name} diverged" in capsys.readouterr().err
    sick.clear()
    assert backdoor.work_off([other], tmp_path, **where)["failed"] == []


def test_a_line_is_of_one_network_and_its_epochs() -> None:
    one = {"attack_success": 0.9, "accuracy_triggered": 0.1, "poisoning_rate": 0.1, "network": "vgg16", "epochs": 5}
    one["early_exits"] = {"accuracy_triggered": 0.8, "accuracy_clean": 0.9}
    others = [one, one | {"poisoning_rate": 0.02}, one | {"epochs": 25}, one | {"network": "mobilenet"}]
    drawn = figures.backdoor_figure(others, "a test").to_dict()
    assert drawn["encoding"]["column"]["field"] == "victim"
    points = [(row["victim"], row["what"], row["rate"]) for row in drawn["data"]["values"]]
    assert len(points) == len(set(points)) == 16, "no line has two values at a rate"
    assert {victim for victim, _, _ in points} == {"vgg16, 5 epochs", "vgg16, 25 epochs", "mobilenet, 5 epochs"}


def test_a_victim_of_other_epochs_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    victim = Victim(rate=0.2, network="resnet56")
    path = tmp_path / f"{victim.name}.json"

    def made_again(victim: Victim, *_: object, **__: object) -> None:
        made.append(victim.name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 1}))

    monkeypatch.setattr(backdoor, "backdoor", made_again)
    monkeypatch.setattr(backdoor, "check_before", lambda *_: None)
    where: Any = {"results": tmp_path, "work": tmp_path}
    training = dataclasses.asdict(victim.how.whole) | {"milestones": []}
    for other, seed, calls in (
        ({}, 77, 0),
        ({"epochs": 1}, 1, 1),
        ({"training": training | {"muon_lr": 0.1}}, 1, 2),
        ({"poisoning_rate": 0.2001}, 1, 3),
    ):
        about = {
            "regime": "backdoor",
            "poisoning_rate": 0.2,
            "epochs": victim.how.epochs,
            "training": training,
            "seed": 77,
        }
        path.write_text(json.dumps(dict.fromkeys(VICTIM) | about | other))
        report = backdoor.work_off([victim], tmp_path, **where)
        assert (report["victims"][0]["seed"], report["open"], len(made)) == (seed, [], calls)


# ---------------------------------------------------------------- the doors


def test_the_backdoors_door_goes_on_and_shows_what_is_finished(
    victims: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["paper", "backdoor", str(tmp_path), "--network", "resnet56", "--out", str(tmp_path / "b.svg")]
    words += ["--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]
    names = [f"cifar10-resnet56-backdoor-fast-rate{rate}" for rate in ("0.2", "0.1")]

    def said(*more: str) -> tuple[list[str], Any]:
        main([*words, *more])
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    with pytest.raises(SystemExit, match="2"):
        main([*words, "--rates", ".2", "1.5"])
    assert "0..1, found 1.5" in capsys.readouterr().err
    assert not (tmp_path / "w").exists(), "nothing was trained"
    lines, result = said("--rates", ".2", ".1", "--minutes", ".001")
    assert lines[-2:] == [f"open: {', '.join(names)}", "failed: none"]
    assert result == {"victims": [], "open": names, "failed": []}
    assert not (tmp_path / "b.svg").exists()
    said("--rates", ".2")
    lines, result = said("--rates", ".1", ".2", "--minutes", "0")
    assert result["open"] == [names[1]], "no time to begin, but what is finished is shown"
    assert [one["poisoning_rate"] for one in result["victims"]] == [0.2]
    assert any(line.startswith("resnet56") and "0.2" in line for line in lines)
    assert "trigger works" in (tmp_path / "b.svg").read_text()


def test_the_pictures_doors(
    two_runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network, ics = two_runs
    path = Path("results", "paper", f"{ics}.safetensors")
    reduced = ReducedTrace.load(path)
    reduced.log_odds_EN[0, reduced.held_out + 3] = 50.0
    reduced.save(path)
    test = reduced.part("test")
    chosen = {"simple": [3, 1], "complex": [2], "only_first": [4, 7]}
    monkeypatch.setattr(pictures, "galleries", lambda *_, limit=10: chosen)
    monkeypatch.setattr(pictures, "disputed", lambda *_, limit: chosen["only_first"])
    captions: list[list[str]] = []
    draw = pictures.gallery
    monkeypatch.setattr(
        pictures,
        "gallery",
        lambda images, said, *columns, **more: captions.append(list(said)) or draw(images, said, *columns, **more),
    )

    def sentence(*words: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["paper", *words])
        return capsys.readouterr().err

    for door in ("gallery", "grad-cam"):
        assert sentence(door, network, "data") == f"sdn: {network} has no exits; take one of: {ics}.\n"
        refusal = sentence(door, "nosuch", "data")
        assert refusal.startswith("sdn: No run nosuch in results/paper. Runs there: ")
        assert network in refusal
        assert ics in refusal
    main(["paper", "gallery", ics, "data", "--out", "out"])
    assert json.loads(capsys.readouterr().out)["images"] == {"simple": 2, "complex": 1, "only_first": 2}
    first, last = (torch.sigmoid(test.log_odds_EN[exit].float()) for exit in (0, -1))
    assert captions == [
        ["d 0.99", f"b {first[1]:.2f}"],
        [f"c {last[2]:.2f}"],
        [f"{NAMES[row]} {first[row]:.2f}\nend: {NAMES[int(test.said_EN[-1, row])]}" for row in (4, 7)],
    ], "nobody is quite sure; where only the first exit is right, the end is heard, too"
    with Image.open(Path("out", f"{ics}-only_first.png")) as picture:
        assert picture.size[1] == 96 + 2 * 12 + 6 + 6, "room for two lines"
    main(["paper", "grad-cam", ics, "data", "--out", "looks.png"])
    assert json.loads(capsys.readouterr().out) == {"rows": [4, 7], "out": "looks.png"}
    assert captions[3][0] == "is e"
    for drawn in (Path("looks.png"), Path("out", f"{ics}-only_first.png")):
        with Image.open(drawn) as picture:
            assert picture.info["Description"].startswith(f"{ics}\nfast, 2 after 2 epochs, 200 rows, ")
    with Image.open("looks.png") as picture:
        assert picture.size[1] == 2 * (96 + 12 + 6) + 6
    chosen["only_first"] = []
    assert "give every image the same answer" in sentence("grad-cam", ics, "data")
