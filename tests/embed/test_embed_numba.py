"""Kernels inside njit functions: the same numbers, every function of lfq.h, cached across processes."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import njit, prange

import lfq
from lfq import _core, embedding, native

from .conftest import ROOT, run

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


# ---- every other kernel, with what Python makes of the same input --------------------------------

PHI, OTHER = np.random.default_rng(1).normal(size=(2, 5, 4, 6)) / 2
COTANGENT = np.linspace(-1, 1, 5)
OWN = lfq.CustomAction.from_sites(
    (4, 6), lambda p, forward: p * (p - 0.3 * forward), lambda p, neighbours: 0.3 * neighbours - 2 * p
)
PROGRAM = FLOW.program((4, 6)), FLOW.weights


def outputs(*shapes):
    return [np.full(shape, np.nan) for shape in shapes]


def observables_case(theory, flow):
    (values,) = outputs((5, 6))
    expected = np.stack(list(THEORY.measure(PHI).values()), axis=-1)
    return ("phi4", theory), (theory, 5, PHI, THEORY._smear(), values), [(values, expected)]


def vjp_case(theory, flow):
    dz, dweights = outputs(PHI.shape, FLOW.n_weights)
    expected = FLOW.vjp(PHI, OTHER, COTANGENT, weights=True)
    return ("flow", flow), (flow, 5, PHI, OTHER, COTANGENT, dz, dweights), zip((dz, dweights), expected, strict=True)


def inverse_vjp_case(theory, flow):
    dx, dweights = outputs(PHI.shape, FLOW.n_weights)
    expected = FLOW.inverse_vjp(PHI, OTHER, COTANGENT, weights=True)
    arguments = flow, 5, PHI, OTHER, COTANGENT, dx, dweights
    return ("flow_inverse_vjp", flow), arguments, zip((dx, dweights), expected, strict=True)


def loss_case(theory, flow):
    found, expected = (outputs(5, 5, FLOW.n_weights) for _ in range(2))
    _core.flow_loss(24, *PROGRAM, theory, PHI, *expected, 1)
    return ("flow", flow), (flow, theory, 5, PHI, *found), zip(found, expected, strict=True)


def pullback_case(theory, flow):
    action, force = outputs(5, PHI.shape)
    pulled = THEORY.pullback(FLOW)
    expected = pulled.action(PHI), pulled.force(PHI)
    return ("flow", flow), (flow, theory, 5, PHI, action, force), zip((action, force), expected, strict=True)


def evolve_case(theory, flow):
    z, momenta, hmc = PHI.copy(), OTHER.copy(), lfq.HMC(THEORY.pullback(FLOW), n_steps=3)
    expected = hmc.evolve(PHI, OTHER)
    arguments = flow, theory, native.hmc_record(hmc, 0), 5, z, momenta
    return ("hmc", flow, theory), arguments, zip((z, momenta), expected, strict=True)


def fourier_evolve_case(theory, flow):
    phi, momenta, hmc = PHI.copy(), OTHER.copy(), lfq.FourierHMC(THEORY, n_steps=3, mass=1.5)
    expected = hmc.evolve(PHI, OTHER)
    arguments = theory, native.hmc_record(hmc, 0), 1.5, 5, phi, momenta
    return ("fourier", theory), arguments, zip((phi, momenta), expected, strict=True)


def chain(sampler):
    """What two trajectories of a sampler give, and empty arrays for the same."""
    block = sampler.advance(lfq.State(PHI, 0, 3), 2)
    values = np.stack(list(block.observables.values()), axis=-1)
    found = PHI.copy(), *outputs((2, 5)), np.empty((2, 5), np.uint8), *outputs((2, 5, 6))
    return sampler._settings(2, 1, 3), found, (block.phi, block.dh, block.accepted, values), block.flipped


def fourier_case(theory, flow):
    settings, found, expected, _ = chain(lfq.FourierHMC(THEORY, n_steps=3, mass=1.5))
    arguments = theory, settings, 1.5, 5, *found[:3], THEORY._smear(), found[3], None
    return ("fourier", theory), arguments, zip(found, expected, strict=True)


def cluster_case(theory, flow):
    sampler, flipped = lfq.ClusterHMC(THEORY, n_steps=3), np.zeros((2, 5), dtype=np.int64)
    settings, found, expected, flips = chain(sampler)
    arguments = theory, settings, sampler._record(), 5, *found[:3], flipped, THEORY._smear(), found[3], None
    return ("cluster_hmc", theory), arguments, zip((*found, flipped), (*expected, flips), strict=True)


def cluster_update_case(theory, flow):
    sampler, phi, flipped = lfq.ClusterHMC(THEORY), PHI.copy(), np.zeros(5, dtype=np.int64)
    expected = sampler.update(PHI, seed=3, trajectory=2)
    arguments = theory, sampler._record(), 3, 0, 2, 5, phi, flipped
    return ("cluster", theory), arguments, zip((phi, flipped), expected, strict=True)


def heat_bath_case(theory, flow):
    sampler, (changed, flipped) = lfq.HeatBath(THEORY, cluster="wolff"), np.zeros((2, 2, 5), dtype=np.int64)
    settings, found, expected, flips = chain(sampler)
    phi, _, _, values = found
    arguments = theory, settings, sampler._record(), 5, phi, changed, flipped, THEORY._smear(), values, None
    results = (phi, expected[0]), (values, expected[3]), (flipped, flips), (changed, np.rint(24 * expected[2]))
    return ("heat_bath", theory), arguments, results


def custom_force_case(theory, flow):
    value, force = outputs(5, PHI.shape)
    record = OWN._record(PHI.dtype)
    return ("custom", None, record), (None, record, 5, PHI, value, force), [
        (value, OWN.action(PHI)), (force, OWN.force(PHI))
    ]  # fmt: skip


def custom_evolve_case(theory, flow):
    z, momenta, hmc = PHI.copy(), OTHER.copy(), lfq.HMC(OWN.pullback(FLOW), n_steps=3)
    expected, record = hmc.evolve(PHI, OTHER), OWN._record(PHI.dtype)
    arguments = flow, record, native.hmc_record(hmc, 0), 5, z, momenta
    return ("custom", flow, record), arguments, zip((z, momenta), expected, strict=True)


def custom_hmc_case(theory, flow):
    settings, found, expected, _ = chain(lfq.HMC(OWN, n_steps=3))
    record, (phi,) = OWN._record(PHI.dtype), outputs(PHI.shape)
    arguments = None, record, settings, 5, found[0], phi, *found[1:3], OWN._smear(), found[3], None
    return ("custom", None, record), arguments, zip((phi, *found), (expected[0], *expected), strict=True)


def custom_loss_case(theory, flow):
    found, expected = (outputs(5, 5, FLOW.n_weights) for _ in range(2))
    record = OWN._record(PHI.dtype)
    _core.custom_loss(*PROGRAM, record.view(np.uint8), PHI, *expected, 1)
    return ("custom", flow, record), (flow, record, 5, PHI, *found), zip(found, expected, strict=True)


CASES = {
    "phi4_observables": observables_case,
    "flow_vjp": vjp_case,
    "flow_inverse_vjp": inverse_vjp_case,
    "flow_loss": loss_case,
    "pullback_force": pullback_case,
    "evolve": evolve_case,
    "fourier_evolve": fourier_evolve_case,
    "fourier_hmc": fourier_case,
    "cluster_hmc": cluster_case,
    "cluster_update": cluster_update_case,
    "heat_bath": heat_bath_case,
    "custom_force": custom_force_case,
    "custom_evolve": custom_evolve_case,
    "custom_hmc": custom_hmc_case,
    "custom_loss": custom_loss_case,
}
# Those that have tests of their own here.
TESTED = {"normal", "phi4_action", "phi4_force", "flow_forward", "flow_inverse", "hmc"}


def test_no_kernel_is_left_out():
    kernels = {name[4:-4] for name, (_, real) in native.SIGNATURES.items() if real}
    assert {name for name in kernels if "workspace" not in name} == TESTED | set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_gives_the_bits_of_python(name):
    size, arguments, results = CASES[name](native.theory_record(THEORY), native.flow_record(FLOW, (4, 6)))
    kernel, space = of(PHI.dtype, name), native.workspace(size[0], "float64", *size[1:], 5, 2)

    @njit(nogil=True)
    def inside(arguments, space):
        return kernel(*arguments, space, space.size, 2)

    assert inside(arguments, space) == 0, native.last_error()
    for found, expected in results:
        np.testing.assert_array_equal(found, expected)


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
            from numba import njit, prange
            import lfq
            from lfq import native

            @njit(cache=True, nogil=True)
            def kernel(theory, phi, action, space):
                return native.lfq_phi4_action_f64(theory, len(phi), phi, action, space, space.size, 1)

            @njit(cache=True, nogil=True)
            def method(theory, phi):
                return theory.action(phi)

            @njit(cache=True, parallel=True)
            def loop(theory, phi, action, spaces):
                for i in prange(len(phi)):
                    space = spaces[i]
                    native.lfq_phi4_action_f64(theory, 1, phi[i], action[i : i + 1], space, space.size, 1)

            theory = lfq.Phi4((4, 6), 0.5, 0.3)
            phi = np.linspace(-1, 1, 48).reshape(2, 4, 6)
            action, again = np.empty(2), np.empty(2)
            space = native.workspace("phi4", "float64", theory._record(), 2, 1)
            assert kernel(theory._record(), phi, action, space) == 0
            assert (action == theory.action(phi)).all() and (method(theory, phi) == action).all()
            loop(theory._record(), phi, again, np.empty((2, space.size), np.uint8))
            assert (action == again).all()
            print([sum(f.stats.cache_hits.values()) for f in (kernel, method, loop)], *action)
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
    assert first.startswith("[0, 0, 0]") and second.startswith("[1, 1, 1]")
    assert first.split("]")[1] == second.split("]")[1]


def test_numba_finds_the_symbols_by_the_entry_point(tmp_path):
    """A program that does not import lfq, beside metadata with the entry point of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "entry" / "lfq_entry-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lfq-entry\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[numba_extensions]\ninit = {project['entry-points']['numba_extensions']['init']}\n"
    )
    program = """
        import sys
        from llvmlite import binding
        from numba import njit

        assert binding.address_of_symbol("lfq_phi4_action_f64") is None
        assert njit(lambda: 7)() == 7
        assert "lfq.native" in sys.modules and binding.address_of_symbol("lfq_phi4_action_f64")
    """
    package = str(Path(lfq.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "entry"), package])}
    run(sys.executable, "-c", textwrap.dedent(program), env=environment)
