"""Switches of the test suite."""

import os

import numpy as np
import pytest

import lfq
from lfq import _core


def pytest_addoption(parser):
    parser.addoption("--validate", action="store_true", help="also run the long statistical tests")
    parser.addoption("--kills", type=int, default=50, help="how many SIGKILLs to try in all, with --validate")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--validate"):
        skip = pytest.mark.skip(reason="long statistical run: give --validate")
        for item in items:
            if "validate" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def away_from_the_sources(tmp_path, monkeypatch):
    """A child process started in the source tree would import that, not the installed package."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=_core.isas().split(","))
def isa(request):
    """Runs a test on every instruction set of this machine."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture
def n_kills(request):
    """SIGKILLs for each of the five tests that take this fixture."""
    return -(-request.config.getoption("--kills") // 5) if request.config.getoption("--validate") else 3


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(os.fsencode(request.node.nodeid)))


@pytest.fixture(scope="session")
def paper():
    """Target and coarse theory of the paper's example (arXiv:2310.03381)."""
    return lfq.Phi4((16, 16), beta=0.634, lam=0.5), lfq.Phi4((8, 8), beta=0.576, lam=0.5)
