"""Whether this installation works here: libraries, machine, and every backend on a tiny network beside ``simulate``.

It refuses to install or mend anything; it says what to type.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from shallowdeep.collection import collect
from shallowdeep.cuts import plan
from shallowdeep.network import ShallowDeepNetwork, attach
from shallowdeep.policies import Confidence
from shallowdeep.progress import steps
from shallowdeep.runs import describe_device, plain
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.engine import Engine
from shallowdeep.timing import compare
from shallowdeep.types import MissingExtra, Trace, table
from shallowdeep.walking import simulate

BACKENDS: tuple[BackendName, ...] = ("torch", "onnxruntime", "openvino", "torch-compile")
ROWS, SIDE, CLASSES = 64, 8, 4
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-3}
"""Largest difference of logits near 1 that counts as the same; a GPU multiplies float32 with ten bits (TF32)."""
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class Library:
    """One requirement of the library, of the core (``extra`` "") or of an extra, and what is installed of it."""

    extra: str
    name: str
    wanted: str
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether the version installed is one that is wanted."""
        requirement = Requirement(f"{self.name}{self.wanted}")
        return self.installed is not None and requirement.specifier.contains(self.installed, prereleases=True)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one backend made of the tiny network: the same exits as ``simulate``, and how far its logits are off."""

    backend: str
    state: Literal["works", "fails", "absent", "not tried"]
    says: str = ""
    largest_difference: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Libraries, machine and checks; ``print`` it into a bug report."""

    machine: dict[str, str]
    libraries: tuple[Library, ...]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Backends that fail, libraries whose version does not fit, and what the core lacks."""
        wrong = [lib.name for lib in self.libraries if not lib.fits and (lib.installed or not lib.extra)]
        return (*dict.fromkeys(wrong), *(check.backend for check in self.checks if check.state == "fails"))

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        rows = [("library", "extra", "wanted", "installed")]
        for lib in self.libraries:
            found = (lib.installed or "-") + ("" if lib.fits or lib.installed is None else " (does not fit)")
            rows.append((lib.name, lib.extra, lib.wanted or "any", found))
        absent = dict.fromkeys(lib.extra for lib in self.libraries if lib.extra and not lib.fits)
        installs = [f"{extra}: pip install 'shallowdeep[{extra}]'" for extra in absent]
        checked = [("backend", "state", "seconds", "logits off by")]
        for one in self.checks:
            off = "" if one.largest_difference is None else f"{one.largest_difference:.0e}"
            checked.append((one.backend, one.state, f"{one.seconds:.1f}", off))
        says = [f"{one.backend}: {one.says}" for one in self.checks if one.says]
        end = f"failed: {', '.join(self.failed)}" if self.failed else "All that is installed works."
        parts = ["\n".join(lines), table(rows), "\n".join(installs), table(checked), "\n".join(says), end]
        return "\n\n".join(part for part in parts if part)


def diagnose(*, compiling: bool = False) -> Diagnosis:
    """What is installed, what the machine is, and which backends answer here as they should.

    ``compiling`` says whether torch.compile is tried, too, which takes half a minute where it has never run before.
    """
    devices = [torch.device(name) for name in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]
    asked = [(name, device) for device in devices for name in BACKENDS if device.type == "cpu" or "torch" in name]
    checks = []
    for backend, device in steps(asked, "check backends", len(asked)):
        if backend != "torch-compile" or compiling:
            checks.append(check(backend, device))
        else:
            says = "`sdn doctor --compile` tries it, which may take half a minute"
            checks.append(Check(backend=_called(backend, device), state="not tried", says=says))
    return Diagnosis(machine=machine(), libraries=libraries(), checks=tuple(checks))


def doctor_verb(*, compiling: bool) -> dict[str, Any]:
    """What ``sdn doctor`` prints."""
    found = diagnose(compiling=compiling)
    print(found)
    versions = {lib.name: lib.installed for lib in found.libraries if lib.installed}
    return {
        "verb": "doctor",
        "failed": list(found.failed),
        "machine": found.machine,
        "versions": {"python": platform.python_version(), "shallowdeep": version("shallowdeep"), **versions},
        "checks": plain([asdict(one) for one in found.checks]),
    }


def libraries() -> tuple[Library, ...]:
    """Requirements of this installed distribution, the developers' left out, and the versions found."""
    found = []
    for line in requires("shallowdeep") or ():
        requirement = Requirement(line)
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        extra = named[1] if named else ""
        if extra in ("dev", "docs") or requirement.name == "shallowdeep":
            continue
        wanted = str(requirement.specifier)
        found.append(Library(extra=extra, name=requirement.name, wanted=wanted, installed=_installed(requirement.name)))
    return tuple(found)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """The machine in words."""
    full_DD = torch.ones(512, 512)
    half_DD = full_DD.bfloat16()
    gain = compare(lambda: full_DD @ full_DD, lambda: half_DD @ half_DD, rounds=15).ratio
    facts = {
        "shallowdeep": f"{version('shallowdeep')} on Python {platform.python_version()}",
        "system": platform.platform(),
        "device": f"{describe_device()} of {os.cpu_count()} cores",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": f"matrix products take {1 / gain:.2f} of float32's time (measured)",
        "C++ compiler": _compiler() or "none",
    }
    if torch.cuda.is_available():
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return facts


def check(backend: BackendName, device: torch.device) -> Check:
    """An engine on ``backend`` beside ``simulate`` on the trace of the same network: same exits, same logits."""
    name, start = _called(backend, device), time.perf_counter()
    if backend == "torch-compile" and not _compiler():
        return Check(backend=name, state="absent", says="it needs a C++ compiler: apt-get install g++")
    try:
        sdn, images = tiny_network(device)
        trace = collect(sdn, (images, torch.zeros(ROWS, dtype=torch.int64)))
        policy = Confidence(threshold=_between(trace))
        expected, answer = simulate(policy, trace), Engine(sdn, policy, backend=backend)(images)
    except MissingExtra as error:
        return Check(backend=name, state="absent", says=str(error))
    except Exception as error:  # whatever it is, the report of it is what was asked for
        return Check(backend=name, state="fails", says=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    other = int((answer.exit_B.cpu() != expected.exit_N).sum())
    off = float((answer.logits_BC.cpu() - expected.logits_NC).abs().max())
    right = other == 0 and off <= TOLERANCE[device.type]
    return Check(
        backend=name,
        state="works" if right else "fails",
        says="" if right else f"{other} of {ROWS} rows leave elsewhere; logits are off by {off:.1e}",
        largest_difference=off,
        seconds=round(time.perf_counter() - start, 2),
    )


def tiny_network(device: torch.device) -> tuple[ShallowDeepNetwork, Tensor]:
    """Two convolutions with an exit between them, the same everywhere, and images; the caller's randomness stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        second = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        model = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).eval()
        images = torch.randn(ROWS, 3, SIDE, SIDE)
        sdn = attach(model, plan(model, images[:2], at=(0.3,), classifier="paper")).eval()
    return sdn.to(device), images.to(device)


def _between(trace: Trace) -> float:
    """A threshold in the widest gap among the middle half of the IC's confidences: no rounding crosses it."""
    sure_K = trace.logits_ENC[: trace.full_exit].double().softmax(-1).amax(-1).flatten().sort().values
    middle_K = sure_K[len(sure_K) // 4 : 3 * len(sure_K) // 4]
    at = int(middle_K.diff().argmax())
    return float(middle_K[at] + middle_K[at + 1]) / 2


def _called(backend: BackendName, device: torch.device) -> str:
    return backend if device.type == "cpu" else f"{backend} on {device.type}"


def _compiler() -> str | None:
    named = [os.environ["CXX"]] if "CXX" in os.environ else []
    return next((found for name in (*named, *COMPILERS) if (found := shutil.which(name))), None)
