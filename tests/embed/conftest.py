"""Other programs, built against the installed package and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lfq
from lfq import embedding

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "embedding.md"


def run(*command, **options):
    """Output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(*names):
    """The first of these programs that is installed."""
    for name in names:
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip(f"needs {' or '.join(names)}")


@pytest.fixture(scope="session")
def programs():
    """The programs of docs/embedding.md by name."""
    found = re.findall(r"<!-- program: (\S+) -->\n+```\w+\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    return dict(found)


@pytest.fixture
def compiled(programs, tmp_path):
    """Compiles a program of the guide with what `python -m lfq` prints; returns the executable."""

    def build(name, *compiler, sources=(), suffix, libraries="--libs"):
        source = tmp_path / f"{name}{suffix}"
        source.write_text(programs[name])
        executable = tmp_path / name
        flags = run(sys.executable, "-m", "lfq", "--includes", libraries).split()
        run(*compiler, *sources, source, *flags, "-o", executable, cwd=tmp_path)
        return executable

    return build


@pytest.fixture(scope="module")
def flow_file(tmp_path_factory):
    """A flow with weights that do something."""
    flow = lfq.AffineFlow(kernel_size=3, n_blocks=2, hidden=(4,), bias=True, scale="exp(s)", seed=3)
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    flow.save(path)
    return path


@pytest.fixture
def cmake_built(tmp_path):
    """Builds one of the examples with CMake against the installed package; returns its executable."""

    def build(name):
        cmake = tool("cmake")
        options = [f"-Dlfq_DIR={embedding.cmake_dir()}", "-DCMAKE_BUILD_TYPE=Release"]
        run(cmake, "-S", ROOT / "examples" / name, "-B", tmp_path / "build", *options)
        run(cmake, "--build", tmp_path / "build")
        return tmp_path / "build" / name

    return build
