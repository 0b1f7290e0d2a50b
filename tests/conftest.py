"""What tests share: two threads at most, and the real data where it is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    # Workers side by side must not fight for the same two cores.
    os.environ.pop("COLUMNS", None)  # workers have it, and tables would be made to fit
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official CIFAR-10 folder, made from the shared packs."""
    if not (SHARED / "make_official.py").is_file():
        pytest.skip("CIFAR-10 is not at hand (../shared/data)")
    out = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, str(SHARED / "make_official.py"), str(out), "10"], check=True, capture_output=True)
    return out / "cifar-10-batches-py"


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, every write fails as on a full disk, in the system itself: no file may grow beyond 64 KiB."""
    resource = pytest.importorskip("resource", reason="no limits for the size of files here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def resnet20_weights() -> Path:
    """Public ResNet-20 weights."""
    path = SHARED / "weights" / "resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip("the public ResNet weights are not at hand (../shared/data)")
    return path
