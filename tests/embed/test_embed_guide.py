"""The Python programs of docs/embedding.md run as they stand; what they assert is what they show."""

import shutil
import subprocess
import sys

import pytest

from .conftest import GUIDE, ROOT

NEEDS = {
    "numba": ["numba"],
    "jax": ["jax"],
    "torch": ["torch"],
    "interchange": ["xarray", "arviz", "pyerrors", "h5py"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_program(programs, name, tmp_path):
    from importlib.util import find_spec

    for package in NEEDS[name]:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if name == "jax" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    (tmp_path / "program.py").write_text(programs[name])
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_tables_are_those_of_the_results():
    import json

    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import overhead
    finally:
        sys.path.remove(str(ROOT))
    guide = GUIDE.read_text()
    for name, table in overhead.tables(json.loads(overhead.RESULTS.read_text())).items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in guide
