"""The command line's door to the report: traces in, one page out.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from shallowdeep.choices import RUNS, Count

if TYPE_CHECKING:
    from shallowdeep.verbs import DataChoice


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Images:
    """Which images to show.

    Parameters
    ----------
    images
        The rows of the first trace, to be looked at one by one: the data that `sdn collect` was given.
    split
        The part of the images to read.
    size
        Height and width to which images are resized.
    limit
        Use so many images, spread evenly.
    half
        The half of the images that was collected.
    """

    images: str | None = None
    split: str | None = None
    size: Annotated[tuple[int, int] | None, Parameter(negative=())] = None
    limit: Count | None = None
    half: Literal["all", "a", "b"] = "all"

    def choice(self) -> DataChoice | None:
        from shallowdeep.verbs import DataChoice

        if self.images is None:
            if self != NO_IMAGES:
                raise ValueError("--split, --size, --limit and --half say which images: give --images, too.")
            return None
        return DataChoice(source=self.images, split=self.split, size=self.size, limit=self.limit, half=self.half)


NO_IMAGES = Images()


def report(
    *traces: Path,
    rows: Images = NO_IMAGES,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = RUNS / "report.html",
    policy: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative=())] = (),
    bench: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative=())] = (),
    names: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    class_names: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    title: str = "",
    sdn_dir: Annotated[Path | None, Parameter(name="--sdn")] = None,
    thumbnails: Count = 2000,
    heats: Annotated[int, Parameter(validator=Number(gte=0))] = 24,
) -> dict[str, Any]:
    """Make one page to look at, of one trace or of several side by side.

    Parameters
    ----------
    traces
        Folders of `sdn collect`, or trace files.
    out
        File to write.
    policy
        Folder of `sdn calibrate` or `sdn tune`, or its file: one, or one each; default: chosen on half of the rows.
    bench
        Folder of `sdn bench`, or its file: one for all traces, or one each.
    names
        What to call the traces.
    class_names
        What to call the classes; default: as the images or the network with its exits call them.
    title
        The page's title.
    sdn_dir
        Folder of `sdn train`: names of classes, and maps of where each exit looked.
    thumbnails
        Samples shown at most.
    heats
        Samples with maps of where each exit looked; needs --sdn and the extra explain.
    """
    from shallowdeep import report_verbs

    return report_verbs.report_verb(
        traces,
        out,
        policies=policy,
        benches=bench,
        names=names,
        class_names=class_names,
        title=title,
        images=rows.choice(),
        sdn_dir=sdn_dir,
        thumbnails=thumbnails,
        heats=heats,
    )


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (report,)
