"""The README's code, run as it stands; the public names that it and others rely on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import shallowdeep
from nets import ZOO, images

ROOT = Path(__file__).resolve().parents[1]
STABLE = (
    "plan attach detach train_exits train_jointly collect Trace overthinking confusion fit_confusion",
    "simulate calibrate tradeoff Engine save load",
)
RIVER = (
    "files progress types bounds certificates policies spelling trajectory walking effects finding disagreement",
    "reliability paths families rivals thresholds guarantees calibration alarming abstention comparison",
    "sequential audits reference monitor",
    "inputs views taps classifiers graph cuts network costs proof collection rates muon checkpoints segments",
    "augment features convolutions training joint timing steps onnx nested runs",
    "runtime runtime.backends runtime.times runtime.loop runtime.on_torch runtime.on_onnxruntime runtime.on_openvino",
    "runtime.programs runtime.modules runtime.streams runtime.engine",
    "runtime.bench watched host export tuning explain cifar data models shifts",
    "report report.style report.facts report.numbers report.words report.charts report.compact report.pictures",
    "report.sections report.page",
    "limits resistance attacks hardening attack_study",
    "paper paper.networks paper.datasets paper.downloads paper.recipes paper.costs paper.records paper.experiments",
    "paper.figures paper.tables paper.study paper.backdoor paper.pictures",
    "verbs engine_verbs trust_verbs report_verbs demo doctor choices paper.cli engine_cli report_cli trust_cli cli",
)


def test_the_nine_lines_run() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    model = ZOO["residual"].make()
    x = images(200)
    rare = model(x).argmax(1).bincount(minlength=5).argmin()
    names = {
        "model": model,
        "example": x[:2],
        # One class that the untrained backbone seldom says and the ICs learn at once: leaving early must pay.
        "train_data": (x[:100], rare.expand(100)),
        "validation_data": (x[100:], rare.expand(100)),
        "images": x[:7],
    }
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["answer"].labels_B.shape == (7,)  # type: ignore[attr-defined]
    assert len([line for line in code[1].splitlines() if line]) == 8


def test_public_names_are_the_stable_ones() -> None:
    stable = [name for line in STABLE for name in line.split()]
    assert set(stable) <= set(shallowdeep.__all__)
    assert all(getattr(shallowdeep, name).__name__ == name for name in stable)
    assert len(shallowdeep.__all__) <= 22


def test_a_name_that_is_none_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="attach"):
        shallowdeep.atach  # noqa: B018


def test_no_import_goes_down_the_river() -> None:
    """Files import only from files above them; core never imports torchvision or an extra."""
    order = [name for line in RIVER for name in line.split()]
    source = ROOT / "src" / "shallowdeep"
    found = {
        ".".join(p.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for p in source.rglob("*.py")
    }
    assert found - {"__init__"} == set(order), "a file is missing from the river's order"
    for name in order:
        path = source / Path(*name.split(".")).with_suffix(".py")
        path = path if path.exists() else source / name / "__init__.py"
        for line in path.read_text().splitlines():
            match = re.match(r"\s*from shallowdeep\.([\w.]+) import|\s*from shallowdeep import (\w+)", line)
            target = match and (match[1] or match[2])
            if target and name not in ("cli",):
                assert order.index(target) < order.index(name), f"{name} imports {target}, which is below it"
            if name not in ("host", "nested"):  # which export asks for, behind one error
                assert not re.match(r"(import|from) (torchvision|timm|transformers|pyarrow|captum|altair|onnx)", line)


def test_benchmarks_import_names_from_where_they_are_made() -> None:
    """A name that another module merely imports may turn into another one's overnight, and no benchmark runs here."""
    made: dict[str, set[str]] = {}
    for file in (ROOT / "src").rglob("*.py"):
        parts = file.relative_to(ROOT / "src").with_suffix("").parts
        body = ast.parse(file.read_text(encoding="utf-8")).body
        named = [getattr(node, "name", None) for node in body]
        assigned = [getattr(node, "targets", None) or [getattr(node, "target", None)] for node in body]
        leaves = [leaf for targets in assigned for target in targets if target for leaf in ast.walk(target)]
        made[".".join(parts)] = {*filter(None, named), *(leaf.id for leaf in leaves if isinstance(leaf, ast.Name))}
    found = [
        (node.module, alias.name)
        for file in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shallowdeep.")
        for alias in node.names
    ]
    assert len(found) > 100
    assert [f"{module}.{name}" for module, name in found if module and name not in made[module]] == []
