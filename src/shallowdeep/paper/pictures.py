"""Pictures of a run: galleries of simple, complex and only-first-exit-right images, and where two exits looked.

It refuses to choose the images; experiments do.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from shallowdeep.explain import enlarged, grad_cam
from shallowdeep.files import replacing
from shallowdeep.network import ShallowDeepNetwork, load
from shallowdeep.paper.datasets import class_names, read_rows, study_set
from shallowdeep.paper.experiments import disputed, galleries
from shallowdeep.paper.recipes import fresh_network
from shallowdeep.paper.records import run_with_exits
from shallowdeep.paper.study import StudyRun, has_weights, load_network, run_of
from shallowdeep.paper.tables import titled
from shallowdeep.types import DataError

SCALE, GAP, TEXT = 3, 6, 12


def gallery(images: Tensor, captions: Sequence[str], columns: int = 5) -> Image.Image:
    """Images uint8 [N, 3, H, W] in a grid, threefold enlarged, each with its caption of one or more lines below."""
    side = images.shape[2] * SCALE
    cell = side + TEXT * max((len(caption.splitlines()) for caption in captions), default=1) + GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * cell + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + (i % columns) * (side + GAP), GAP + (i // columns) * cell
        sheet.paste(_picture(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for line, words in enumerate(caption.splitlines()):
            pen.text((left, top + side + TEXT * line), words, fill="black")
    return sheet


def looks(sdn: ShallowDeepNetwork, images: Tensor, class_names: Sequence[str], labels_N: Tensor) -> Image.Image:
    """Rows of three: the image, what the first exit looked at for its answer, and what the last did for its own."""
    first, last = (grad_cam(sdn, images, exit) for exit in (0, -1))
    size = (images.shape[2], images.shape[3])
    with torch.no_grad():
        said_EN = sdn.eval()(images).argmax(2)
    panels, captions = [], []
    for n, image in enumerate(images):
        panels.append(image)
        captions.append(f"is {class_names[int(labels_N[n])]}")
        for exit, heat in ((0, first), (-1, last)):
            panels.append(_heated(image, enlarged(heat[n : n + 1], size)[0]))
            captions.append(f"{'first' if exit == 0 else 'last'}: {class_names[int(said_EN[exit, n])]}")
    return gallery(torch.stack(panels), captions, columns=3)


def draw_galleries(name: str, data_dir: Path, *, results: Path, out: Path) -> dict[str, Any]:
    """PNG galleries of the run ``name`` in ``out``; how many images each holds.

    A caption says the class and how sure the exit that got it right is; where only the first did, also what the end
    said.
    """
    about, reduced = run_with_exits(results, name)
    images, _ = read_rows(about["dataset"], data_dir, "test")
    names, test = class_names(about["dataset"], data_dir), reduced.part("test")
    found = galleries(reduced)
    for kind, rows in found.items():
        exit = -1 if kind == "complex" else 0
        sure_N = torch.sigmoid(test.log_odds_EN[exit].float())
        captions = [f"{names[int(test.labels_N[row])]} {min(float(sure_N[row]), 0.99):.2f}" for row in rows]
        if kind == "only_first":
            ends = [names[int(test.said_EN[-1, row])] for row in rows]
            captions = [f"{caption}\nend: {end}" for caption, end in zip(captions, ends, strict=True)]
        if rows:
            save_picture(gallery(images[rows], captions), out / f"{name}-{kind}.png", titled(name, [about]))
    return {"images": {kind: len(rows) for kind, rows in found.items()}, "out": str(out)}


def draw_looks(name: str, data_dir: Path, *, results: Path, work: Path, out: Path) -> dict[str, Any]:
    """A PNG of where the first and the last exit looked on images about which they differ, if possible such as only the
    first gets right.
    """
    about, reduced = run_with_exits(results, name)
    images, labels_N = read_rows(about["dataset"], data_dir, "test")
    rows = disputed(reduced, limit=6)
    if not rows:
        raise DataError(f"The first and the last exit of {name} give every image the same answer.")
    if not has_weights(run_of(about), results, work):
        raise DataError(_where_from(run_of(about), data_dir, results, work))
    network = fresh_network(about["network"], study_set(about["dataset"]), 0)
    load_network(network, work / name, name)
    sdn = load(work / name / "sdn", network)
    sheet = looks(sdn, images[rows], class_names(about["dataset"], data_dir), labels_N[rows])
    save_picture(sheet, out, titled(name, [about]))
    return {"rows": rows, "out": str(out)}


def _where_from(run: StudyRun, data_dir: Path, results: Path, work: Path) -> str:
    """How to come by weights for pictures of ``run`` without a change of its record."""
    other = results.with_name(f"{results.name}-again")
    where = f"--results {shlex.quote(str(other))} --work {shlex.quote(str(work))}"
    data = shlex.quote(str(data_dir))
    chosen = f"--datasets {run.dataset} --networks {run.network} --regimes {run.regime}"
    chosen += f" --recipe {run.recipe} --seed {run.seed}"
    return (
        f"{work / run.name} does not hold the weights of which the record {run.name} speaks. To train it again beside "
        f"that record: sdn paper run {data} {chosen} {where}; then: sdn paper grad-cam {run.name} {data} {where}"
    )


def save_picture(picture: Image.Image, path: Path, about: Sequence[str] = ()) -> None:
    """Write a PNG whose text "Description" holds the lines ``about`` it."""
    text = PngInfo()
    text.add_text("Description", "\n".join(about))
    with replacing(path) as (partial,):
        picture.save(partial, "PNG", pnginfo=text)


def _heated(image: Tensor, heat: Tensor) -> Tensor:
    """The image in grey, red where the heat is."""
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    red = torch.tensor([255.0, 60.0, 0.0]).view(3, 1, 1)
    mix = 0.65 * heat.cpu().unsqueeze(0)
    return (grey.cpu() * (1 - mix) + red * mix).round().to(torch.uint8)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
