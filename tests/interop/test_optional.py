"""lfq works without the packages it can talk to, and says what is missing when asked."""

import subprocess
import sys

import pytest

HIDDEN = ["jax", "torch", "xarray", "arviz", "pyerrors", "h5py"]


def outcome(code):
    hide = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, timeout=300)


def test_lfq_imports_and_samples_without_them():
    code = """
import lfq
run = lfq.HMC(lfq.Phi4((4, 4), 0.5, 0.5)).sample(2, 3)
print(run.n_samples, sorted(name for name in ("lfq.jax", "lfq.torch") if name in sys.modules))
"""
    done = outcome(code)
    assert (done.returncode, done.stdout.strip()) == (0, "3 []"), done.stderr


@pytest.mark.parametrize(
    "call, missing",
    [
        ("import lfq.jax", "jax"),
        ("import lfq.torch", "torch"),
        ("run.to_xarray()", r"xarray, which is not installed: pip install 'lfq\[interchange\]'"),
        ("run.to_pyerrors()", "pyerrors, which is not installed"),
        ("lfq.save_fields('x.h5', run.phi)", "h5py, which is not installed"),
    ],
)
def test_what_is_missing_is_named(call, missing):
    code = f"""
import lfq
run = lfq.HMC(lfq.Phi4((4, 4), 0.5, 0.5)).sample(2, 3)
try:
    {call}
except ImportError as error:
    print(error)
"""
    done = outcome(code)
    assert done.returncode == 0, done.stderr
    import re

    assert re.search(missing, done.stdout), done.stdout
