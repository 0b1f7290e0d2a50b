"""The command line ``sdn paper``: thin doors to the study.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

app = App(name="paper", help="The ICML 2019 study, from training to tables (arXiv 1810.07052).")
RESULTS = Path("results/paper")
Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]


@app.command
def run(
    data_dir: Path,
    *,
    datasets: Names = ("cifar10", "cifar100"),
    networks: Names = ("vgg16", "resnet56", "wrn32-4", "mobilenet"),
    regimes: Names = ("cnn", "ic-only", "sdn-training", "mixed"),
    recipe: Literal["fast", "paper"] = "fast",
    minutes: float | None = None,
    seed: int = 0,
    results: Path = RESULTS,
    work: Path = Path("runs/paper"),
) -> dict[str, Any]:
    """Train what is still missing, for at most so many minutes; the next call goes on after the last whole epoch.

    Parameters
    ----------
    data_dir
        Folder that holds the official data folders (see sdn paper data).
    datasets
        cifar10, cifar100, tinyimagenet.
    networks
        vgg16, resnet56, wrn32-4, mobilenet.
    regimes
        cnn (the plain network), ic-only, sdn-training (from scratch, jointly), mixed (jointly from the trained cnn).
    recipe
        fast, or paper: as the authors ran it.
    minutes
        Stop between two epochs when the time is over.
    seed
        Of everything random.
    results
        Folder for the records that are kept.
    work
        Folder for weights and checkpoints.
    """
    from shallowdeep.paper import study

    runs = study.all_runs(datasets, networks, regimes, recipe, seed)  # type: ignore[arg-type]
    report = study.work_off(runs, data_dir, results=results, work=work, minutes=minutes)
    for state, names in report.items():
        print(f"{state}: {', '.join(names) or 'none'}")
    return dict(report)


@app.command
def data(data_dir: Path, *, download: bool = False, datasets: Names = ()) -> dict[str, Any]:
    """Say which data sets are there and where the missing ones come from; fetch them if asked.

    Parameters
    ----------
    data_dir
        Folder that holds, or shall hold, the official data folders.
    download
        Fetch what is missing (resumable; sums are checked).
    datasets
        Only these: cifar10, cifar100, tinyimagenet. Default: all three.
    """
    from shallowdeep.paper import downloads
    from shallowdeep.types import table

    wanted = datasets or tuple(found.name for found in downloads.look(data_dir))
    for name in wanted if download else ():
        downloads.fetch(name, data_dir)
    looked = [found for found in downloads.look(data_dir) if found.name in wanted]
    rows = [("data set", "folder", "here", "address", "md5")]
    rows += [(f.name, f.folder, "yes" if f.here else "missing", f.address, f.md5) for f in looked]
    print(table(rows))
    return {"here": [f.name for f in looked if f.here], "missing": [f.name for f in looked if not f.here]}


@app.command
def costs() -> dict[str, Any]:
    """Print parameters and macs of the study's networks and of their SDNs, for all three data sets."""
    from shallowdeep.paper import costs as made

    rows = made.cost_rows()
    print(made.cost_table(rows))
    return {"rows": rows}


@app.command
def tables(*, results: Path = RESULTS, out: Path = Path("runs/paper-tables"), figures: bool = True) -> dict[str, Any]:
    """Rebuild every table and figure from the records alone, beside the paper's known figures.

    Parameters
    ----------
    results
        Folder with the records of the runs.
    out
        Folder to write: tables.md and SVG figures.
    figures
        Draw figures too (needs the extra report).
    """
    from shallowdeep.paper import tables as made

    print(made.make_tables(results, out, figures=figures))
    return {"tables": str(out / "tables.md"), "runs": len(made.read_records(results))}
