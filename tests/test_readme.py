"""The README's code, run as it stands; the public names that it and others rely on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from nets import ZOO, images

import shallowdeep

ROOT = Path(__file__).resolve().parents[1]


def test_the_nine_lines_run() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    model = ZOO["residual"].make()
    x = images(200)
    names = {
        "model": model,
        "example": x[:2],
        "train_data": (x[:100], torch.arange(100) % 5),
        "validation_data": (x[100:], model(x[100:]).argmax(1)),
        "images": x[:7],
    }
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["answer"].labels_B.shape == (7,)  # type: ignore[attr-defined]
    assert len([line for line in code[1].splitlines() if line]) == 8


def test_public_names_are_the_stable_ones() -> None:
    stable = """plan attach detach train_exits train_jointly collect Trace overthinking confusion fit_confusion simulate
    calibrate tradeoff Engine save load""".split()
    assert set(stable) <= set(shallowdeep.__all__)
    assert all(getattr(shallowdeep, name).__name__ == name for name in stable)
    assert len(shallowdeep.__all__) <= 22


def test_a_name_that_is_none_says_what_there_is() -> None:
    code = "import shallowdeep\ntry: shallowdeep.atach\nexcept AttributeError as e: assert 'attach' in str(e)\nelse: raise 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_import_goes_down_the_river() -> None:
    """Files import only from files above them; core never imports torchvision or an extra."""
    order = """files types policies effects disagreement inputs taps classifiers graph cuts network costs progress collection
    calibration rates checkpoints features training joint augment timing runtime runtime.segments runtime.engine cifar data
    models runs paper paper.networks verbs demo cli""".split()
    source = ROOT / "src" / "shallowdeep"
    found = {".".join(p.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for p in source.rglob("*.py")}
    assert found - {"__init__"} == set(order), "a file is missing from the river's order"
    for name in order:
        path = source / Path(*name.split(".")).with_suffix(".py")
        path = path if path.exists() else source / name / "__init__.py"
        for line in path.read_text().splitlines():
            match = re.match(r"\s*from shallowdeep\.([\w.]+) import|\s*from shallowdeep import (\w+)", line)
            target = match and (match[1] or match[2])
            if target and name not in ("cli",):
                assert order.index(target) < order.index(name), f"{name} imports {target}, which is below it"
            assert not re.match(r"(import|from) (torchvision|timm|transformers|pyarrow|captum|altair|onnx)", line)
