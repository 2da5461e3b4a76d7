"""The shared library as a thing by itself: its symbols, its C header, its environment, forks, imports."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lfq
from lfq import _core
from lfq.custom import _RECORD as CUSTOM_RECORD
from lfq.native import FLOW_RECORD

PACKAGE = Path(lfq.__file__).parent
HEADER = PACKAGE / "include" / "lfq" / "lfq.h"
LIBRARY = next(PACKAGE.glob("liblfq.*"))


def declared():
    """Names of the functions of lfq.h."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"LFQ_API\s[^;(]*?\b(lfq_\w+)\s*\(", text))


def symbols(*options):
    """(type, demangled name) of every defined symbol."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    out = subprocess.run(
        [nm, "-C", "--defined-only", *options, LIBRARY], capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=2)[1:] for line in out.stdout.splitlines()]
    if not found:
        pytest.skip("the library is stripped")
    return found


def run_python(code, **environment):
    """Output of a script in an interpreter of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LFQ_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, **environment},
    )


# ---- symbols --------------------------------------------------------------------------------


def test_kernels_of_different_instruction_sets_share_nothing():
    """The linker merges equal weak symbols: one that is not in its instruction set's namespace could make
    an AVX2 machine run AVX-512 code."""
    found = symbols()
    for kind, name in found:
        if kind in "WVu":
            assert re.search(r"\bisa_\w+::", name), f"{name} is weak and in no instruction set's namespace"
        assert not re.search(r"\blfq::(?!isa_\w+::|generic::)", name), (
            f"{name} is in no instruction set's namespace"
        )
        assert len(set(re.findall(r"\bisa_\w+", name))) <= 1, f"{name} mixes instruction sets"


def test_no_standard_templates_come_from_the_kernels():
    """Functions of std:: are weak until linked: only the thread pool may make some."""
    allowed = re.compile(r"thread|mutex|lock|once|condition|lfq_internal")
    for kind, name in symbols():
        if kind in "tTWVu" and re.match(r"(\w+ )*(std|__gnu_cxx)::|(\w+ )*operator ", name):
            assert allowed.search(name), f"{name} may have been compiled for another instruction set"


def test_every_instruction_set_is_compiled_in():
    names = " ".join(name for _, name in symbols())
    for isa in _core.isas().split(","):
        tag = "isa_" + isa.removeprefix("x86-64-")
        for function in ("run_hmc", "trajectory", "phi4_group"):
            assert re.search(rf"\blfq::{tag}::{function}\b", names)


def test_exported_symbols_are_those_of_the_header():
    exported = {name for _, name in symbols("-D")}
    assert exported == declared()
    assert len(exported) > 30 and all(name.startswith("lfq_") for name in exported)


# ---- the header -----------------------------------------------------------------------------


def compile_c(source, *options):
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("needs a C compiler")
    return subprocess.run(
        [
            cc,
            *options,
            *"-Wall -Wextra -pedantic -Werror -fsyntax-only".split(),
            f"-I{HEADER.parents[1]}",
            "-",
        ],
        input=source,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("standard", ["c99", "c11", "c++11", "c++17"])
def test_header_compiles_alone(standard):
    language = "c++" if "++" in standard else "c"
    result = compile_c("#include <lfq/lfq.h>\n#include <lfq/lfq.h>\n", "-x", language, f"-std={standard}")
    if language == "c++" and "c++" in result.stderr and "not recognized" in result.stderr:
        pytest.skip("needs a C++ compiler")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "struct, dtype",
    [
        ("lfq_phi4", _core.theory_dtype),
        ("lfq_layer", _core.layer_dtype),
        ("lfq_hmc", _core.hmc_dtype),
        ("lfq_integrator", _core.hmc_dtype["integrator"]),
        ("lfq_cluster", _core.cluster_dtype),
        ("lfq_heat_bath", _core.heat_bath_dtype),
        ("lfq_flow", FLOW_RECORD),
        ("lfq_custom_f64", CUSTOM_RECORD),
    ],
)
def test_records_have_the_layout_of_the_header(struct, dtype):
    checks = [f"sizeof({struct}) == {dtype.itemsize}"]
    for name, (field, offset) in ((name, found[:2]) for name, found in dtype.fields.items()):
        checks.append(f"offsetof({struct}, {name}) == {offset}")
        checks.append(f"sizeof((({struct}*)0)->{name}) == {field.itemsize}")
    lines = [f"extern char check{i}[({check}) ? 1 : -1];" for i, check in enumerate(checks)]
    source = "#include <lfq/lfq.h>\n" + "\n".join(lines) + "\n"
    result = compile_c(source, "-x", "c", "-std=c99")
    assert result.returncode == 0, result.stderr
    wrong = source.replace(f"== {dtype.itemsize})", f"== {dtype.itemsize + 8})", 1)
    assert compile_c(wrong, "-x", "c", "-std=c99").returncode != 0


def test_constants_are_those_of_the_header():
    text = HEADER.read_text()
    defined = {name: int(value) for name, value in re.findall(r"#define LFQ_(\w+) (\d+)", text)}
    assert defined["N_OBSERVABLES"] == _core.N_OBSERVABLES == len(lfq.observables.OBSERVABLES)
    assert (defined["MAX_HIDDEN"], defined["MAX_CHANNELS"]) == (_core.MAX_HIDDEN, _core.MAX_CHANNELS)
    assert (defined["MAX_STAGES"], defined["ABI_VERSION"]) == (_core.MAX_STAGES, _core.abi_version())
    for name, value in re.findall(r"LFQ_PURPOSE_(\w+) = (\d+)", text):
        assert _core.PURPOSES[name.lower()] == int(value)
    for name, value in re.findall(r"LFQ_LAYER_(\w+) = (\d+)", text):
        assert _core.LAYERS[name.lower()] == int(value)
    assert _core.version() == lfq.__version__


# ---- the C interface ------------------------------------------------------------------------


@pytest.fixture
def library():
    found = ctypes.CDLL(str(LIBRARY))
    found.lfq_last_error.restype = ctypes.c_char_p
    found.lfq_phi4_workspace_f64.restype = ctypes.c_size_t
    return found


def test_errors_come_back_as_codes_with_a_message(library):
    theory = lfq.Phi4((4, 4), 0.5, 0.5)._record()
    pointer = ctypes.c_void_p(theory.ctypes.data)
    n, one = ctypes.c_int64(3), ctypes.c_int32(1)
    phi, action = np.ones((3, 4, 4)), np.empty(3)
    size = library.lfq_phi4_workspace_f64(pointer, n, one)
    space = np.empty(size + 1, np.uint8)

    def call(theory=pointer, n=n, phi=phi.ctypes.data, offset=0, size=size):
        code = library.lfq_phi4_action_f64(
            theory, n, ctypes.c_void_p(phi), ctypes.c_void_p(action.ctypes.data),
            ctypes.c_void_p(space.ctypes.data + offset), ctypes.c_size_t(size), one,
        )  # fmt: skip
        return code, library.lfq_last_error().decode()

    assert call()[0] == 0
    np.testing.assert_allclose(action, lfq.Phi4((4, 4), 0.5, 0.5).action(phi))
    assert call(offset=1)[0] == 0  # workspaces need no alignment
    for arguments, code, match in [
        (dict(theory=None), -1, "theory is null"),
        (dict(phi=None), -1, "null"),
        (dict(n=ctypes.c_int64(-1)), -1, "n_chains"),
        (dict(size=size - 1), -2, f"{size - 1} bytes given, {size} needed"),
    ]:
        found = call(**arguments)
        assert found[0] == code and match in found[1]
    phi[1, 2, 3] = np.inf
    code, message = call()
    assert code == -3 and "chain 1" in message and "site 11" in message


# ---- the environment ------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _core.isas().split(","))
def test_lfq_isa_chooses_the_instruction_set(isa):
    result = run_python("import lfq; print(lfq.info()['isa'])", LFQ_ISA=isa)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, isa, "")


def test_an_unknown_lfq_isa_is_said_and_passed_over():
    result = run_python("import lfq; print(lfq.info()['isa'])", LFQ_ISA="mmx")
    assert (result.returncode, result.stdout.strip()) == (0, _core.isas().split(",")[0])
    assert "LFQ_ISA=mmx" in result.stderr and _core.isas() in result.stderr


def test_set_isa_names_what_there_is():
    before = _core.isa()
    with pytest.raises(ValueError, match=f"{_core.isas()}.*mmx"):
        _core.set_isa("mmx")
    assert _core.isa() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_lfq_num_threads_limits_the_threads(threads):
    code = """
import os, lfq, numpy as np
def count(): return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before = count()
lfq.Phi4((32, 32), 0.5, 0.5).force(np.ones((256, 32, 32)))
print(lfq.info()["threads"], count() - before)
"""
    result = run_python(code, LFQ_NUM_THREADS=str(threads))
    assert result.returncode == 0, result.stderr
    reported, started = map(int, result.stdout.split())
    assert reported == threads
    assert started == (threads - 1 if os.path.isdir("/proc/self/task") else 0)


def test_other_values_of_lfq_num_threads_mean_all():
    code = """
import os, lfq
found = [lfq.info()["threads"]]
for value in ["", "0", "-2", "many", "2"]:
    os.environ["LFQ_NUM_THREADS"] = value
    found.append(lfq.info()["threads"])
print(*found)
"""
    everything, *found = map(int, run_python(code).stdout.split())
    assert found == [everything] * 4 + [2]


def test_import_brings_no_optional_package():
    code = """
import sys, lfq
heavy = {"matplotlib", "h5py", "pyerrors", "typer", "rich", "tomli", "cupy", "pandas"}
heavy |= {"jax", "torch", "xarray", "arviz"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    result = run_python(code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_can_use_threads():
    """The child has none of the parent's workers: it must start its own, and get the same bits."""
    code = """
import os, signal, sys, warnings, lfq, numpy as np
warnings.simplefilter("ignore")
hmc = lfq.HMC(lfq.Phi4((8, 8), 0.5, 0.5), n_threads=2)
start = hmc.start(64, seed=1)
wanted = hmc.advance(start, 3).phi
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    same = all(np.array_equal(hmc.advance(start, 3).phi, wanted) for _ in range(3))
    os._exit(0 if same else 3)
status = os.waitpid(pid, 0)[1]
assert np.array_equal(hmc.advance(start, 3).phi, wanted)
print(status)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout.strip()) == (0, "0"), result.stderr
