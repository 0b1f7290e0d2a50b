import doctest
import json
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import shallowdeep.models
from shallowdeep.files import FormatError
from shallowdeep.models import load_model, load_weights
from shallowdeep.types import MissingExtra
from torchvision_shim import define_operators

CODE = """
from torch import nn

class Tools:
    @staticmethod
    def make():
        return nn.Linear(2, 3)

def net(num_classes=3):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, num_classes))

def wide(**options):
    return net(**options)

def words():
    return "no network"

def broken():
    raise KeyError("my own mistake")

instance = nn.Linear(2, 3)
number = 7
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of the user's in the working directory, under a name that no other test has imported."""
    name = f"users_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield name
    sys.modules.pop(name, None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> bool:
    text = str(error.value)
    return "\n" not in text and len(text) < 400


# --- module:callable ------------------------------------------------------------------------------------------------


def test_module_callable_runs_code_in_the_working_directory(code, tmp_path):
    model = load_model(f"{code}:net", num_classes=5)
    assert model[-1].out_features == 5
    assert not model.training
    assert not model[2].training
    assert load_model(f"{code}:net")[-1].out_features == 3
    assert load_model(f"{code}:wide", num_classes=6)[-1].out_features == 6
    assert load_model(f"{code}:Tools.make", num_classes=5).out_features == 3
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize(
    ("attribute", "error", "message"),
    [
        ("nett", ValueError, "No 'nett' in module '{code}'. Nearest: net."),
        ("Tools.mke", ValueError, "No 'Tools.mke' in module '{code}'."),
        ("words", TypeError, "{code}:words returned str, an nn.Module is needed."),
        ("instance", TypeError, "{code}:instance is Linear; name what is called to make an nn.Module."),
        ("number", TypeError, "{code}:number is int; name what is called"),
        ("broken", KeyError, "my own mistake"),
    ],
)
def test_a_wrong_callable_is_named_and_changes_nothing(code, attribute, error, message):
    before = list(sys.path)
    with pytest.raises(error) as raised:
        load_model(f"{code}:{attribute}")
    assert message.format(code=code) in str(raised.value)
    assert one_sentence(raised)
    assert sys.path == before


def test_a_module_that_is_not_there_is_ours_to_say_and_one_it_misses_is_theirs(code, tmp_path):
    with pytest.raises(ValueError, match="No module 'no_such_place' in"):
        load_model("no_such_place:net")
    with pytest.raises(ValueError, match=r"No module 'no_such_place\.inner' in"):
        load_model("no_such_place.inner:net")
    (tmp_path / f"{code}_needy.py").write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_model(f"{code}_needy:net")


@pytest.mark.parametrize("source", ["resnet20", "", ":", "timm:", ":net"])
def test_a_source_of_no_kind_lists_the_kinds(source):
    with pytest.raises(ValueError, match="'module:callable', 'timm:NAME' or 'hf:FOLDER'") as raised:
        load_model(source)
    assert repr(source) in str(raised.value)


@pytest.mark.parametrize("module", ["nets/mine.py", ".nets", "a b", "../up"])
def test_a_file_name_is_not_a_module(module):
    with pytest.raises(ValueError, match="does not name a module") as raised:
        load_model(f"{module}:net")
    assert repr(module) in str(raised.value)


@settings(deadline=None)
@given(st.text(max_size=30).filter(lambda s: not s.startswith(("timm:", "hf:"))))
def test_any_text_is_a_model_or_one_clear_error(source):
    # Letters alone could name a real module; none of these has a real callable.
    with pytest.raises(ValueError, match=r"A model is|does not name a module|No module|No '"):
        load_model(source.replace(":", ":no_such_callable_"))


def test_one_class_is_refused(code):
    with pytest.raises(ValueError, match="num_classes must be 2 or more, found 1"):
        load_model(f"{code}:net", num_classes=1)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "wrapped", "prefixed", "without counters"])
def test_weights_in_every_accepted_form_give_the_same_network(tmp_path, suffix):
    source = net()
    source[1].running_mean += 1
    state = source.state_dict()
    path = tmp_path / "weights.pth"
    if suffix == "pt":
        torch.save(state, path)
    elif suffix == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif suffix == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif suffix == "prefixed":
        torch.save({"state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items())}, path)
    else:
        torch.save(
            {k: v for k, v in state.items() if "num_batches" not in k}, path, _use_new_zipfile_serialization=False
        )
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    load_weights(model, path)
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.eval()(x), source.eval()(x), rtol=0, atol=0)


def test_a_model_whose_own_names_start_with_module_keeps_them(tmp_path):
    path = tmp_path / "weights.pt"
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save({k: v + 1 for k, v in model.state_dict().items()}, path)
    before = model["module"].weight.clone()
    load_weights(model, path)
    torch.testing.assert_close(model["module"].weight, before + 1)


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path):
    path, model = tmp_path / "weights.pt", net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items() if not k.startswith("1.") or k == "1.weight"}
    state["2.weight"] = torch.zeros(7, 8)
    state |= {f"head.{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not fit Sequential") as raised:
        load_weights(model, path)
    assert one_sentence(raised)
    text = str(raised.value)
    assert "3 missing (1.bias, 1.running_mean, 1.running_var)" in text
    assert "5 unexpected (head.0, head.1, head.2 and 2 more)" in text
    assert "1 of another shape (2.weight [7, 8] for [3, 8])" in text
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"weight": Bomb()}, path)
    with pytest.raises(FormatError, match="holds objects, which are never unpickled") as raised:
        load_weights(nn.Linear(2, 2), path)
    assert one_sentence(raised)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FormatError, match="holds objects, which are never unpickled"):
        load_weights(nn.Linear(2, 2), path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "absent"])
def test_a_damaged_file_is_one_sentence(tmp_path, suffix, damage):
    path = tmp_path / f"weights.{suffix}"
    torch.save(net().state_dict(), path) if suffix == "pt" else save_file(net().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "noise": bytes(range(256)), "empty": b"", "absent": b""}[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises(FormatError, match=path.name) as raised:
        load_weights(net(), path)
    assert one_sentence(raised)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds list, not a state dict"),
        ({"model": {"weight": torch.zeros(1)}}, "'model' is dict, not a tensor"),
        ({3: torch.zeros(1)}, "3 is Tensor, not a tensor"),
    ],
)
def test_what_is_no_state_dict_is_said(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(FormatError, match=message):
        load_weights(net(), tmp_path / "weights.pt")


def test_load_model_loads_weights(code, tmp_path):
    state = {k: torch.full_like(v, 2) for k, v in load_model(f"{code}:net").state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(f"{code}:net", weights=tmp_path / "weights.pt")
    assert float(model.state_dict()["0.weight"].min()) == 2


def test_the_public_cifar_weights_are_read(resnet20_weights):
    with pytest.raises(ValueError, match=r"unexpected \(conv1.weight, bn1.weight, bn1.bias and \d+ more\)"):
        load_weights(nn.Linear(2, 2), resnet20_weights)


# --- timm -----------------------------------------------------------------------------------------------------------


def test_timm_builds_an_architecture():
    define_operators()
    model = load_model("timm:test_resnet", num_classes=7)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert not model.training


@pytest.mark.parametrize(
    ("name", "offered"),
    [("resnet81", "Nearest: resnet18"), ("hf-hub:timm/resnet18", "Nearest: "), ("local-dir:somewhere", "There are ")],
)
def test_unknown_timm_names_are_refused_with_the_nearest(name, offered):
    define_operators()
    with pytest.raises(ValueError, match=f"No model '{name}' in timm") as raised:
        load_model(f"timm:{name}")
    assert offered in str(raised.value)
    assert one_sentence(raised)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("import no_such_torchvision", "No module named 'no_such_torchvision'"),
    ],
)
def test_a_broken_timm_names_the_extra(tmp_path, monkeypatch, body, message):
    (tmp_path / "timm.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(MissingExtra, match=r"timm:resnet18 needs timm.*pip install 'shallowdeep\[zoo\]'") as raised:
        load_model("timm:resnet18")
    assert message in str(raised.value)
    assert one_sentence(raised)


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders as ``save_pretrained`` writes them, by name."""
    define_operators()
    import transformers

    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11, num_labels=3
    )
    transformers.BertForSequenceClassification(bert).save_pretrained(root / "text")
    transformers.BertForMaskedLM(bert).save_pretrained(root / "masked")
    resnet = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    transformers.ResNetForImageClassification(resnet).save_pretrained(root / "images")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved / "text", tmp_path / "text")
    return tmp_path / "text"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_hugging_face_folders_of_both_kinds_load(saved, monkeypatch):
    monkeypatch.chdir(saved)
    text = load_model("hf:text")
    assert text(input_ids=torch.ones(2, 5, dtype=torch.int64)).logits.shape == (2, 3)
    stored = load_file(saved / "text" / "model.safetensors")
    assert torch.equal(text.state_dict()["classifier.weight"], stored["classifier.weight"])
    images = load_model(f"hf:{saved / 'images'}", num_classes=4)
    assert images(torch.zeros(2, 3, 16, 16)).logits.shape == (2, 4)
    assert not text.training
    assert not images.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "regression"}, "is for 'regression'; early exits need one class per row"),
        ({"problem_type": "multi_label_classification"}, "is for 'multi_label_classification'"),
        ({"auto_map": {"AutoModel": "modeling_mine.Mine"}}, "asks for code of its own (auto_map), which is not run"),
        ({"text_config": [{"auto_map": {}}]}, "asks for code of its own (auto_map)"),
        ({"attn_implementation": "someone/kernel"}, "asks for code of its own (attn_implementation)"),
        ({"architectures": ["BertForMaskedLM"]}, "is for ['BertForMaskedLM']; one of *ForSequenceClassification"),
        ({"architectures": None}, "is for []; one of"),
        ({"id2label": {"0": "score"}, "label2id": {"score": 0}}, "do not fit"),
    ],
)
def test_what_has_no_classes_or_brings_code_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_model(f"hf:{folder}")
    assert message in str(raised.value)
    assert one_sentence(raised)


def test_the_number_of_classes_is_the_folders(folder):
    with pytest.raises(ValueError, match="has 3 classes, 10 are needed"):
        load_model(f"hf:{folder}", num_classes=10)


def test_a_single_output_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights |= {name: weights[name][:1].clone() for name in ("classifier.weight", "classifier.bias")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, id2label={"0": "score"}, label2id={"score": 0})
    with pytest.raises(ValueError, match="has 1 classes, 2 or more are needed"):
        load_model(f"hf:{folder}")


def test_weights_only_in_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors.*found config\.json, pytorch_model\.bin"):
        load_model(f"hf:{folder}")


def test_pickles_are_not_read_in_place_of_missing_tensors(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "optimizer.safetensors")
    with pytest.raises(FormatError, match=r"cannot be loaded.*no file named model\.safetensors") as raised:
        load_model(f"hf:{folder}")
    assert one_sentence(raised)


def test_a_head_without_weights_is_not_filled_with_noise(saved, tmp_path):
    shutil.copytree(saved / "masked", tmp_path / "masked")
    edit(tmp_path / "masked", architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match=r"has no weights for \d of the model's tensors") as raised:
        load_model(f"hf:{tmp_path / 'masked'}")
    assert "classifier.bias" in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors", b"xx"), ("config.json", b"{"), ("config.json", b"[]")]
)
def test_damaged_folders_are_one_sentence(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(FormatError, match=folder.name) as raised:
        load_model(f"hf:{folder}")
    assert one_sentence(raised)


def test_an_adapter_and_a_hub_name_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter to another model"):
        load_model(f"hf:{folder}")
    with pytest.raises(ValueError, match="No folder bert-base-uncased; hf: takes a local one"):
        load_model("hf:bert-base-uncased")


def test_a_missing_transformers_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"needs transformers.*pip install 'shallowdeep\[zoo\]'") as raised:
        load_model(f"hf:{folder}")
    assert one_sentence(raised)


def test_the_examples_in_docstring_and_docs_run():
    page = Path(__file__).parents[1] / "docs" / "models.md"
    for result in (doctest.testmod(shallowdeep.models), doctest.testfile(str(page), module_relative=False)):
        assert result.attempted
        assert not result.failed
