"""The command line ``sdn paper``: thin doors to the study.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from shallowdeep.choices import LOOK, Count, Minutes

app = App(
    name="paper",
    help="The ICML 2019 study, from training to tables (arXiv 1810.07052).",
    group=LOOK,
    group_commands="Commands",
    sort_key=99,
)
RESULTS = Path("results/paper")
SOME = Parameter(consume_multiple=(1, None), negative=())
DataSet = Literal["cifar10", "cifar100", "tinyimagenet"]
Network = Literal["vgg16", "resnet56", "wrn32-4", "mobilenet"]
Regime = Literal["cnn", "ic-only", "sdn-training", "mixed"]


@app.command
def run(
    data_dir: Path,
    *,
    datasets: Annotated[tuple[DataSet, ...], SOME] = ("cifar10", "cifar100"),
    networks: Annotated[tuple[Network, ...], SOME] = ("vgg16", "resnet56", "wrn32-4", "mobilenet"),
    regimes: Annotated[tuple[Regime, ...], SOME] = ("cnn", "ic-only", "sdn-training", "mixed"),
    recipe: Literal["fast", "paper"] = "fast",
    minutes: Minutes = math.inf,
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

    runs = study.all_runs(datasets, networks, regimes, recipe, seed)
    report = study.work_off(runs, data_dir, results=results, work=work, minutes=minutes)
    for state, names in report.items():
        print(f"{state}: {', '.join(names) or 'none'}")
    return dict(report)


@app.command
def data(
    data_dir: Path, *, download: bool = False, datasets: Annotated[tuple[DataSet, ...], SOME] = ()
) -> dict[str, Any]:
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
    from shallowdeep.paper.datasets import DATASETS, study_set
    from shallowdeep.types import table

    wanted = [study_set(name).name for name in datasets or DATASETS]
    for name in wanted if download else ():
        downloads.fetch(name, data_dir)
    looked = downloads.look(data_dir, wanted)
    rows = [("data set", "folder", "state"), *((f.name, f.folder, f.state) for f in looked)]
    print(table(rows))
    for found in looked:
        if found.state != "whole":
            first = "" if found.state == "missing" else f"move {data_dir / found.folder} away, then "
            print(f"{found.name}: {found.address} (md5 {found.md5}); {first}fetch it with --download")
    return {"state": {found.name: found.state for found in looked}}


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
    return {"tables": str(out / "tables.md")}


Experiment = Literal["overthinking", "early-exits", "confusion"]


@app.command
def experiment(what: Experiment, run: str, *, results: Path = RESULTS, out: Path | None = None) -> dict[str, Any]:
    """Make one experiment from a run's record, with its figure.

    Parameters
    ----------
    what
        overthinking (section 4), early-exits (5.1) or confusion (5.2).
    run
        Name of a record, for example cifar10-vgg16-ic-only-fast.
    results
        Folder with the records of the runs.
    out
        SVG file to write the figure to.
    """
    from shallowdeep.paper import experiments, figures, study
    from shallowdeep.paper.records import run_with_exits
    from shallowdeep.paper.tables import titled
    from shallowdeep.runs import plain

    about, reduced = run_with_exits(results, run)
    if what == "early-exits":
        cnn = study.plain_network(study.run_of(about), results)
        found, draw = experiments.early_exits(reduced, cnn), figures.early_exits_figure
    elif what == "overthinking":
        found, draw = experiments.overthinking_by_exit(reduced), figures.overthinking_figure
    else:
        found, draw = experiments.error_alarms(reduced), figures.confusion_figure
    if out is not None:
        figures.save_figure(draw(found, titled(run, [about])), out)
    return dict(plain(found))


@app.command
def gallery(run: str, data_dir: Path, *, results: Path = RESULTS, out: Path = Path("runs/gallery")) -> dict[str, Any]:
    """Draw the simple images of a run, the complex ones, and those that only its first exit gets right.

    Parameters
    ----------
    run
        Name of a record, for example cifar10-vgg16-ic-only-fast.
    data_dir
        Folder that holds the official data folders.
    results
        Folder with the records of the runs.
    out
        Folder to write PNG files to.
    """
    from shallowdeep.paper import pictures

    return pictures.draw_galleries(run, data_dir, results=results, out=out)


@app.command
def grad_cam(
    run: str, data_dir: Path, *, results: Path = RESULTS, work: Path = Path("runs/paper"), out: Path = Path("looks.png")
) -> dict[str, Any]:
    """Draw where the first and the last exit looked on images about which they differ.

    Images that only the first exit gets right come first.

    Parameters
    ----------
    run
        Name of a record whose weights are still in the work folder.
    data_dir
        Folder that holds the official data folders.
    results
        Folder with the records of the runs.
    work
        Folder with weights and checkpoints.
    out
        PNG file to write.
    """
    from shallowdeep.paper import pictures

    return pictures.draw_looks(run, data_dir, results=results, work=work, out=out)


@app.command
def backdoor(
    data_dir: Path,
    *,
    rates: Annotated[tuple[float, ...], SOME] = (0.005, 0.02, 0.1),
    network: Network = "vgg16",
    epochs: Count | None = None,
    minutes: Minutes = math.inf,
    results: Path = RESULTS,
    work: Path = Path("runs/paper"),
    out: Path | None = None,
) -> dict[str, Any]:
    """Train victims of BadNets, and measure what early exits win back and what confusion notices.

    Parameters
    ----------
    data_dir
        Folder that holds the official data folders.
    rates
        Poisoned shares of the training rows, one victim each.
    network
        Network of the victims.
    epochs
        Default: the fast recipe's.
    minutes
        Stop between two epochs when the time is over; the next call goes on.
    results
        Folder to write one JSON per victim.
    work
        Folder for checkpoints.
    out
        SVG file to write the figure to.
    """
    from shallowdeep.paper import figures
    from shallowdeep.paper.backdoor import Victim, work_off
    from shallowdeep.paper.tables import backdoor_rows, titled
    from shallowdeep.types import table

    victims = [Victim(rate=rate, network=network, epochs=epochs) for rate in rates]
    report = work_off(victims, data_dir, results=results, work=work, minutes=minutes)
    print(table(backdoor_rows(report["victims"])))
    for state in ("open", "failed"):
        print(f"{state}: {', '.join(report[state]) or 'none'}")
    if out is not None and report["victims"]:
        title = titled("BadNets", report["victims"])
        figures.save_figure(figures.backdoor_figure(report["victims"], title), out)
    return report
