"""Kernels inside njit functions: the same numbers, every function of lfq.h, cached across processes."""

import os
import re
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest
from numba import njit, prange

import lfq
from lfq import _core, embedding, native

THEORY = lfq.Phi4((4, 6), 0.5, 0.3)
FLOW = lfq.AffineFlow(seed=1)
# Arguments that are double in both twins of a function.
DOUBLES = {"action", "value", "log_det", "dlog_det", "dweights", "observables", "smear", "dh"}


@pytest.fixture
def phi(rng, dtype):
    return rng.normal(size=(5, 4, 6)).astype(dtype)


def test_every_function_of_the_header_is_there_with_its_arguments():
    text = re.sub(r"/\*.*?\*/", "", (embedding.include_dir() / "lfq" / "lfq.h").read_text(), flags=re.DOTALL)
    letters = {"int32_t": "i", "int": "i", "int64_t": "l", "uint64_t": "u", "double": "x", "size_t": "z"}
    pointers = {"double": "d", "uint8_t": "b", "int64_t": "k"}
    wanted = {}
    for result, name, arguments in re.findall(r"LFQ_API\s+([^;(]*?)\b(lfq_\w+)\s*\(([^)]*)\)", text):
        if name == "lfq_philox4x32":
            continue
        real = {"f32": "float", "f64": "double"}.get(name[-3:])
        spec = ""
        for argument in filter(None, (a.strip() for a in arguments.replace("\n", " ").split(","))):
            if argument == "void":
                continue
            kind, star = re.match(r"(?:const )?(\w+)(\*?)", argument).groups()
            variable = argument.split()[-1]
            if not star:
                spec += letters[kind]
            elif kind == real and variable not in DOUBLES:
                spec += "r"
            else:
                spec += pointers.get(kind, "v")
        wanted[name] = f"{letters.get(result.strip(), '?')}:{spec}"
    strings = {"lfq_version", "lfq_last_error", "lfq_status_message", "lfq_isa", "lfq_isas", "lfq_set_isa"}
    assert set(wanted) - set(native.SIGNATURES) == strings
    for name, (spec, _) in native.SIGNATURES.items():
        assert spec == wanted[name], name


def of(dtype, name):
    return getattr(native, f"lfq_{name}_f{8 * dtype.itemsize}")


@pytest.mark.parametrize("own", [FLOW, lfq.AffineFlow(scale="site", sublattices=True, seed=2)], ids=["", "sublattices"])
def test_the_kernels_give_the_numbers_of_python(phi, dtype, own):
    action_of, force_of, forward, inverse = (
        of(dtype, n) for n in ("phi4_action", "phi4_force", "flow_forward", "flow_inverse")
    )
    size, flow_size = of(dtype, "phi4_workspace"), of(dtype, "flow_workspace")

    @njit(nogil=True)
    def all_of_them(theory, flow, phi):
        n = len(phi)
        space = np.empty(max(size(theory, n, 1), flow_size(flow, n, 1)), dtype=np.uint8)
        action, log_det, back = np.empty(n), np.empty(n), np.empty(n)
        force, x, z = np.empty_like(phi), np.empty_like(phi), np.empty_like(phi)
        status = action_of(theory, n, phi, action, space, space.size, 1)
        status |= force_of(theory, n, phi, force, space, space.size, 1)
        status |= forward(flow, n, phi, x, log_det, space, space.size, 1)
        status |= inverse(flow, n, x, z, back, space, space.size, 1)
        return status, action, force, x, log_det, z, back

    flow = native.flow_record(own, (4, 6))
    status, action, force, x, log_det, z, back = all_of_them(native.theory_record(THEORY), flow, phi)
    assert status == 0
    np.testing.assert_array_equal(action, THEORY.action(phi))
    np.testing.assert_array_equal(force, THEORY.force(phi))
    np.testing.assert_array_equal(x, own.forward(phi)[0])
    np.testing.assert_array_equal(log_det, own.forward(phi)[1])
    np.testing.assert_array_equal(z, own.inverse(x)[0])
    np.testing.assert_array_equal(back, own.inverse(x)[1])


def test_flow_hmc_with_null_for_what_is_not_wanted(phi, dtype):
    hmc = lfq.HMC(THEORY.pullback(FLOW), n_steps=5, dtype=str(dtype))
    kernel, size = of(dtype, "hmc"), of(dtype, "hmc_workspace")

    @njit
    def trajectories(flow, theory, settings, z, dh):
        space = np.empty(size(flow, theory, len(z), 2), dtype=np.uint8)
        return kernel(flow, theory, settings, len(z), z, None, dh, None, None, None, None, space, space.size, 2)

    start, dh = hmc.start(5, seed=3), np.empty((4, 5))
    z = start.latent.copy()
    settings = native.hmc_record(hmc, 4, seed=3, trajectory=start.trajectory)
    assert trajectories(native.flow_record(FLOW, (4, 6)), native.theory_record(THEORY), settings, z, dh) == 0
    block = hmc.advance(start, 4)
    np.testing.assert_array_equal(z, block.state.latent)
    np.testing.assert_array_equal(dh, block.dh)


def test_parallel_loops_give_the_same_bits():
    normal, purpose = native.lfq_normal_f64, _core.PURPOSES["user"]

    @njit(parallel=True)
    def many(out):
        for i in prange(len(out)):
            normal(7, purpose, i, 0, 1, out.shape[1], out[i], 1)

    out, wanted = np.empty((40, 30)), np.empty((1, 30))
    many(out)
    for trajectory in (0, 17, 39):
        _core.normal(7, purpose, trajectory, 0, 1, wanted, 1)
        np.testing.assert_array_equal(out[trajectory], wanted[0])


def test_python_code_calls_the_same_functions(phi, dtype):
    action, space = np.empty(5), native.workspace("phi4", dtype, THEORY._record(), 5, 1)
    call = of(dtype, "phi4_action")
    assert call(THEORY._record(), 5, phi, action, space, space.size, 1) == 0
    np.testing.assert_array_equal(action, THEORY.action(phi))
    assert call(THEORY._record(), 5, phi, action, space, space.size - 1, 1) == -2
    assert "needed" in native.last_error()


@pytest.mark.parametrize("wrong", [np.zeros((1, 4, 6), dtype=np.float32), np.zeros((4, 6, 1)).T, 0.5, "phi"])
def test_the_wrong_array_is_an_error_before_anything_runs(wrong):
    action, space = np.empty(1), np.empty(10000, dtype=np.uint8)

    def call(phi):
        return native.lfq_phi4_action_f64(0, 1, phi, action, space, space.size, 1)

    with pytest.raises((TypeError, numba.TypingError), match="argument 3|float|str"):
        njit(call)(wrong)
    if isinstance(wrong, np.ndarray):
        with pytest.raises(TypeError, match="argument 3"):
            call(wrong)


# ---- Phi4 as an argument -----------------------------------------------------------------------


def test_a_theory_is_an_argument(phi):
    @njit
    def use(theory, phi):
        return theory.action(phi), theory.force(phi), theory.action(phi[0]), theory.beta, theory.shape, theory.volume

    action, force, single, *rest = use(THEORY, phi)
    np.testing.assert_array_equal(action, THEORY.action(phi))
    np.testing.assert_array_equal(force, THEORY.force(phi))
    np.testing.assert_array_equal(single, THEORY.action(phi[0]))
    assert rest == [0.5, (4, 6), 24]


def test_a_theory_is_a_constant_and_errors_are_errors():
    @njit
    def use(phi):
        return THEORY.action(phi)

    phi = np.ones((2, 4, 6))
    np.testing.assert_array_equal(use(phi), THEORY.action(phi))
    with pytest.raises(ValueError, match="lattice"):
        use(np.ones((2, 6, 4)))
    with pytest.raises(ValueError, match="NaN"):
        use(np.full((2, 4, 6), np.nan))
    with pytest.raises(numba.TypingError):
        use(np.ones((2, 4, 6), dtype=np.int64))


def test_compiled_code_is_cached_across_processes(tmp_path):
    """A second process loads the machine code, finds the symbols by name, and gives the same numbers."""
    (tmp_path / "cached.py").write_text(
        textwrap.dedent("""
            import numpy as np
            from numba import njit
            import lfq
            from lfq import native

            @njit(cache=True, nogil=True)
            def kernel(theory, phi, action, space):
                return native.lfq_phi4_action_f64(theory, len(phi), phi, action, space, space.size, 1)

            @njit(cache=True, nogil=True)
            def method(theory, phi):
                return theory.action(phi)

            theory = lfq.Phi4((4, 6), 0.5, 0.3)
            phi = np.linspace(-1, 1, 48).reshape(2, 4, 6)
            action = np.empty(2)
            space = native.workspace("phi4", "float64", theory._record(), 2, 1)
            assert kernel(theory._record(), phi, action, space) == 0
            assert (action == theory.action(phi)).all() and (method(theory, phi) == action).all()
            print([sum(f.stats.cache_hits.values()) for f in (kernel, method)], *action)
        """)
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def output():
        done = subprocess.run(
            [sys.executable, tmp_path / "cached.py"], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, second = output(), output()
    assert first.startswith("[0, 0]") and second.startswith("[1, 1]")
    assert first.split("]")[1] == second.split("]")[1]


def test_the_entry_point_names_what_exists():
    tomllib = pytest.importorskip("tomllib")
    from importlib import import_module
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, function = project["project"]["entry-points"]["numba_extensions"]["init"].split(":")
    assert getattr(import_module(module), function)() is None
