"""What several verbs of the command line are asked: which rows, which backend, where to write.

It refuses to do any work itself, and imports torch only when rows are chosen, so that help does not wait for it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Group, Parameter
from cyclopts.validators import Number
from cyclopts.validators import Path as PathCheck

if TYPE_CHECKING:
    from shallowdeep.verbs import DataChoice

RUNS = Path("runs")
CONVERT, FASTER, TRUST, LOOK, OPTIONS = map(
    Group.create_ordered, ("From a model to answers", "Make it fast", "Trust it", "Look and check", "Options")
)
"""How help orders the verbs."""
Measured: TypeAlias = Literal["torch", "torch-compile", "onnxruntime", "openvino", "openvino-bf16"]
Backend: TypeAlias = Literal["auto", Measured]
Count: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1))]
Device: TypeAlias = Annotated[str, Parameter(help="Where the network runs: cpu, cuda, cuda:1, ...")]
Minutes: TypeAlias = Annotated[float, Parameter(validator=Number(gte=0))]
Folder: TypeAlias = Annotated[Path, Parameter(validator=PathCheck(file_okay=False))]
"""A folder to write, there or not: a file in its place is refused before any work is done."""


@Parameter(name="*")
@dataclass(frozen=True)
class Rows:
    """Which rows to read.

    Parameters
    ----------
    data
        A folder of class folders of images, an .npz of named arrays, parquet of images, or the CIFAR python files.
    split
        The part to read where the data has several (train, test, ...).
    size
        Height and width to which images are resized.
    limit
        Use so many rows, spread evenly.
    half
        A fixed random half of the rows: choose thresholds on "a", report on "b".
    """

    data: str
    _: KW_ONLY
    split: str | None = None
    size: Annotated[tuple[int, int] | None, Parameter(negative=())] = None
    limit: Count | None = None
    half: Literal["all", "a", "b"] = "all"

    def choice(self) -> DataChoice:
        from shallowdeep.verbs import DataChoice

        return DataChoice(source=self.data, split=self.split, size=self.size, limit=self.limit, half=self.half)
