"""The CUDA kernels: compiled for the host against tests/cuda/cuda_runtime.h and, where there is one, on a GPU.

LFQ_REQUIRE_GPU=1 turns the skip without a GPU into a failure.
"""

import ctypes
import os
import subprocess
import sys

import emulated
import numpy as np
import pytest

import lfq
from lfq import _core, _cuda, _gpu, reference
from lfq.observables import heat_kernel


class Host(int):
    """The address of an array on the host."""

    def __new__(cls, array):
        address = super().__new__(cls, array.ctypes.data)
        address.array = array
        return address


class OnGpu:
    """liblfq_cuda for arrays of the host: they are copied to the GPU, at as many bytes from alignment, and back."""

    def __init__(self, library):
        self._library = library
        self.architectures, self.workspace_bytes = library.architectures, library.workspace_bytes
        self.device_count = library.device_count

    def call(self, name, dtype, *arguments):
        import cupy

        copies = {}

        def there(argument):
            if isinstance(argument, np.ndarray) and argument.dtype == _cuda.FLOW_RECORD:
                argument = argument.copy()
                weights = ctypes.c_double * int(argument["n_weights"][0])
                weights = np.ctypeslib.as_array(weights.from_address(int(argument["weights"][0])))
                argument["weights"] = there(Host(weights))
            if not isinstance(argument, Host):
                return argument
            array, offset = argument.array, argument % 64
            if argument not in copies:
                memory = cupy.zeros(offset + array.nbytes, dtype=np.uint8)
                memory[offset:] = cupy.asarray(np.frombuffer(array.tobytes(), dtype=np.uint8))
                copies[argument] = array, memory, offset
            return copies[argument][1].data.ptr + offset

        result = self._library.call(name, dtype, *map(there, arguments))
        for array, memory, offset in copies.values():
            bytes_of = cupy.asnumpy(memory[offset:])
            if array.flags.writeable:
                array[...] = bytes_of.view(array.dtype).reshape(array.shape)
        return result


@pytest.fixture(scope="session", params=["emulated", "gpu"])
def library(request, tmp_path_factory):
    if request.param == "emulated":
        if emulated.GXX is None:
            pytest.skip("no g++")
        return emulated.library(tmp_path_factory)
    reason = _gpu.missing()
    if reason is not None:
        if os.environ.get("LFQ_REQUIRE_GPU") == "1":
            pytest.fail(f"LFQ_REQUIRE_GPU=1, but {reason}")
        pytest.skip(reason)
    return OnGpu(_cuda.library())


def pointer(array):
    return None if array is None else Host(array)


def call(library, name, dtype, *arguments, workspace=None):
    """A call with arrays of the host; `workspace` names the function for its size and the arguments."""
    if workspace is not None:
        space = np.full(library.workspace_bytes(workspace[0], dtype, *workspace[1:]), 0xA5, dtype=np.uint8)
        arguments += (pointer(space), space.size)
    return library.call(name, dtype, *arguments, None)


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone, and not on where it runs."""
    name = request.node.name.replace("gpu-", "").replace("emulated-", "")
    return np.random.default_rng(list(os.fsencode(name)))


def close(dtype, scale=1.0, of=0.0):
    """What may lie between an array and `of`, the one expected, whose sums grow beyond 10^4 where maps are steep."""
    scale *= max(1, np.abs(of).max() / 1000)
    return {"rtol": 8 * np.finfo(dtype).eps, "atol": scale * (2e-4 if dtype == np.float32 else 1e-11)}


SHAPES = [(6,), (37,), (4, 4), (5, 3), (16, 16), (10, 34), (2, 1), (48, 16), (4, 6, 3), (11, 2, 8), (8, 6, 8)]
SHAPES += [(2, 4, 2, 6), (2, 3, 2, 4), (16, 2, 3, 4)]


def theory(shape):
    return lfq.Phi4(shape, beta=0.15 if len(shape) > 2 else 0.4, lam=0.35)


def test_every_kernel_source_is_compiled(library):
    on_gpu = isinstance(library, OnGpu)
    assert (library.architectures == "emulated") != on_gpu
    assert library.device_count()[0] >= 1 if on_gpu else library.device_count() == (1, "")


@pytest.mark.parametrize("n", [1, 5, 64, 1030])
def test_normals_have_the_bits_of_the_cpu(library, dtype, n):
    seed, purpose, trajectory, first = 2**63 + 17, 3, 2**40 + 5, 2**32 - 3
    found, expected = np.full((3, n), np.nan, dtype=dtype), np.empty((3, n), dtype=dtype)
    call(library, "normal", dtype, seed, purpose, trajectory, first, 3, n, pointer(found))
    _core.normal(seed, purpose, trajectory, first, 3, expected)
    if "v3" in _core.isas() and not isinstance(library, OnGpu):  # whose quotients are not rounded to nearest
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        found, reference.normals(seed, purpose, trajectory, first + np.arange(3), n, dtype), **close(dtype)
    )


@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 256), (9, 2, 4, 128)], ids=str)
def test_action_force_and_observables(library, dtype, rng, shape):
    t = theory(shape)
    phi = rng.normal(size=(3, *shape)).astype(dtype)
    record, exact = t._record(), phi.astype(np.float64)
    action, force = np.empty(3), np.empty_like(phi)
    call(library, "phi4_action", dtype, record, 3, pointer(phi), pointer(action), workspace=("phi4", record, 3))
    call(library, "phi4_force", dtype, record, 3, pointer(phi), pointer(force))
    np.testing.assert_allclose(action, reference.phi4_action(exact, t.beta, t.lam, t.ndim), **close(dtype, t.volume))
    np.testing.assert_allclose(force, reference.phi4_force(exact, t.beta, t.lam, t.ndim), **close(dtype, 10))
    values = np.empty((3, 6))
    call(
        library,
        "phi4_observables",
        dtype,
        record,
        3,
        pointer(phi),
        t._smear(),
        pointer(values),
        workspace=("phi4", record, 3),
    )
    np.testing.assert_allclose(values, reference.observables(exact, t.ndim), **close(dtype, 10))


# Too large for the shared memory of a block; rows of whole vectors and not, axes longer and shorter than segments.
LARGE = [(60001,), (3, 20000), (246, 255), (11000, 6), (40, 38, 41), (3, 80, 260), (8, 16, 18, 28)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_observables_beyond_a_block(library, dtype, rng, shape):
    t = theory(shape)
    phi = rng.normal(size=(2, *shape)).astype(dtype)
    record, values = t._record(), np.empty((2, 6))
    arguments = (record, 2, pointer(phi), t._smear(), pointer(values))
    call(library, "phi4_observables", dtype, *arguments, workspace=("phi4", record, 2))
    np.testing.assert_allclose(values, reference.observables(phi.astype(np.float64), t.ndim), **close(dtype))


def misaligned(array):
    """A copy that does not begin at a multiple of 16 bytes."""
    copy = np.empty(array.size + 1, dtype=array.dtype)[1:].reshape(array.shape)
    copy[...] = array
    assert copy.ctypes.data % 16 != 0
    return copy


@pytest.mark.parametrize(
    "shape", [(16, 16), (5, 3), (10, 34), (21, 136), (1, 8), (4, 6, 8), (2, 4, 2, 4), (3, 80, 260)], ids=str
)
def test_where_fields_lie_does_not_matter(library, dtype, rng, shape):
    t = theory(shape)
    hmc = lfq.HMC(t, tau=0.7, n_steps=5, dtype=str(dtype))
    record, n = t._record(), 2
    fields = rng.normal(size=(3, n, *shape)).astype(dtype)

    def results(place):
        phi, momenta, force = (place(field) for field in fields)
        action, values, dh = np.empty(n), np.empty((n, 6)), np.empty((1, n))
        call(library, "phi4_action", dtype, record, n, pointer(phi), pointer(action), workspace=("phi4", record, n))
        call(library, "phi4_force", dtype, record, n, pointer(phi), pointer(force))
        arguments = (record, n, pointer(phi), t._smear(), pointer(values))
        call(library, "phi4_observables", dtype, *arguments, workspace=("phi4", record, n))
        arguments = (record, hmc._settings(1), TILED, n, pointer(phi), pointer(dh), None, None, None)
        call(library, "hmc", dtype, *arguments, workspace=("hmc", record, n))
        arguments = (record, hmc._settings(), n, pointer(phi), pointer(momenta))
        call(library, "evolve", dtype, *arguments, workspace=("hmc", record, n))
        normals = place(force)
        call(library, "normal", dtype, 1, 2, 3, 4, n, t.volume, pointer(normals))
        return action, force, values, dh, phi, momenta, normals

    for found, expected in zip(results(misaligned), results(np.copy), strict=True):
        np.testing.assert_array_equal(found, expected)


def run_hmc(library, hmc, phi, n_samples, thin, path, seed=3, first_chain=5, trajectory=7, measure=True):
    t, n = hmc.theory, len(phi)
    settings = hmc._settings(n_samples, thin, seed, first_chain, trajectory)
    phi = phi.copy()
    dh, accepted = np.empty((n_samples * thin, n)), np.empty((n_samples * thin, n), dtype=np.uint8)
    values = np.empty((n_samples, n, 6)) if measure else None
    record = t._record()
    call(
        library,
        "hmc",
        phi.dtype,
        record,
        settings,
        path,
        n,
        pointer(phi),
        pointer(dh),
        pointer(accepted),
        t._smear(),
        pointer(values),
        workspace=("hmc", record, n),
    )
    return phi, dh, accepted, values


AUTO, RESIDENT, TILED = 0, 1, 2


HMC_CASES = [(shape, "leapfrog") for shape in SHAPES] + [((5, 3), "omf4"), ((4, 6, 3), "omf4")]


@pytest.mark.parametrize("path", [RESIDENT, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("shape, integrator", HMC_CASES, ids=str)
def test_hmc_follows_the_chains_of_the_cpu(library, dtype, shape, integrator, path):
    t = theory(shape)
    hmc = lfq.HMC(t, tau=1.0, n_steps=3, integrator=integrator, dtype=str(dtype), length_spread=0.5)
    start = hmc.start(3, seed=3, first_chain=5)
    # Two blocks: the second continues the streams.
    state = hmc.advance(start, 1, 7).state
    expected = hmc.advance(state, 3, 2)
    phi, dh, accepted, values = run_hmc(library, hmc, state.latent, 3, 2, path)
    assert 0 < expected.accepted.mean()
    np.testing.assert_array_equal(accepted.astype(bool), expected.accepted)
    np.testing.assert_allclose(dh, expected.dh, **close(dtype, 10 + t.volume / 10))
    np.testing.assert_allclose(phi, expected.phi, **close(dtype, 10))
    for i, name in enumerate(expected.observables):
        np.testing.assert_allclose(values[..., i], expected.observables[name], **close(dtype, 10))


REJECTED = [((36, 34), 4), ((66, 200), 7), ((64, 64), 7), ((32, 128), 7), ((16, 16, 16), 7), ((16, 8, 4, 8), 5)]


@pytest.mark.parametrize("shape, n_steps", REJECTED, ids=str)
def test_large_shares_are_rejected_and_accepted(library, dtype, shape, n_steps):
    """Lattices of long strips and of tiles, with a step so coarse that trajectories are rejected."""
    t = lfq.Phi4(shape, beta=0.55, lam=0.5)
    if not library.call("resident", dtype, t._record()):
        pytest.skip("a chain of this type does not fit one block")
    hmc = lfq.HMC(t, tau=1.0, n_steps=n_steps, dtype=str(dtype))
    state = hmc.advance(hmc.start(4, seed=3, first_chain=5), 1, 7).state
    expected = hmc.advance(state, 4)
    assert 0 < expected.accepted.mean() < 1
    for path in (RESIDENT, TILED):
        phi, dh, accepted, values = run_hmc(library, hmc, state.latent, 4, 1, path)
        np.testing.assert_array_equal(accepted.astype(bool), expected.accepted)
        np.testing.assert_allclose(phi, expected.phi, **close(dtype, 10))
        np.testing.assert_allclose(values[..., 4], expected.observables["phi2_smeared"], **close(dtype, 10))
        # A chain does not depend on the batch.
        alone, _, _, _ = run_hmc(library, hmc, state.latent[2:3], 4, 1, path, first_chain=7)
        np.testing.assert_array_equal(alone[0], phi[2])


def test_what_fits_a_block(library):
    def resident(shape, dtype):
        return library.call("resident", dtype, lfq.Phi4(shape, 0.1, 0.5)._record())

    assert resident((64, 64), "float64") and resident((128, 128), "float32") and resident((16, 16, 16), "float64")
    assert resident((8, 8, 8, 8), "float32") and resident((8, 8, 8, 8), "float64")
    assert not resident((256, 256), "float32")
    record = lfq.Phi4((256, 256), 0.1, 0.5)._record()
    with pytest.raises(ValueError, match="does not fit"):
        library.call(
            "hmc",
            "float32",
            record,
            lfq.HMC(lfq.Phi4((4, 4), 0.1, 0.5))._settings(1),
            RESIDENT,
            1,
            1,
            1,
            None,
            None,
            None,
            None,
            0,
            None,
        )


@pytest.mark.parametrize("path", [RESIDENT, TILED], ids=["resident", "tiled"])
def test_a_diverging_chain_stays_and_says_so(library, dtype, path):
    t = lfq.Phi4((8, 8), beta=0.5, lam=0.5)
    hmc = lfq.HMC(t, tau=6.0, n_steps=4, dtype=str(dtype))
    phi = lfq.HMC(t, dtype=str(dtype)).start(3, seed=1).latent
    phi[1] *= 30
    after, dh, accepted, values = run_hmc(library, hmc, phi, 3, 1, path)
    assert not np.isfinite(dh[:, 1]).any() and not accepted[:, 1].any()
    np.testing.assert_array_equal(after[1], phi[1])
    if path == RESIDENT:
        np.testing.assert_array_equal(np.isnan(values), ~np.isfinite(dh)[..., None].repeat(6, axis=2))
    else:
        np.testing.assert_allclose(values[:, 1, 1], (phi[1].astype(np.float64) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["evolve", "hmc"])
@pytest.mark.parametrize("shape", [(16, 64), (8, 6, 8)], ids=str)
def test_a_launch_that_fails_is_an_error(library, shape, name):
    """Whichever of a call's it is."""
    if isinstance(library, OnGpu):
        pytest.skip("launches fail in the emulator only")
    t = lfq.Phi4(shape, 0.2, 0.5)
    hmc = lfq.HMC(t, tau=0.1, n_steps=10)
    phi, record = np.zeros((1, *shape)), t._record()
    left = ctypes.c_int.in_dll(library._library, "emulated_launches_left")
    try:
        for launches in range(6):
            left.value = launches
            with pytest.raises(RuntimeError, match="CUDA says: invalid configuration"):
                if name == "hmc":
                    run_hmc(library, hmc, phi, 1, 1, TILED)
                else:
                    arguments = (record, hmc._settings(), 1, pointer(phi.copy()), pointer(phi.copy()))
                    call(library, "evolve", "float64", *arguments, workspace=("hmc", record, 1))
    finally:
        left.value = 1 << 30


@pytest.mark.parametrize("shape", [(6,), (6, 10), (4, 2, 6)], ids=str)
def test_evolve(library, dtype, rng, shape):
    t = theory(shape)
    hmc = lfq.HMC(t, tau=0.7, n_steps=5, integrator="omf2", dtype=str(dtype))
    phi, momenta = rng.normal(size=(2, 3, *shape)).astype(dtype)
    expected = hmc.evolve(phi, momenta)
    record = t._record()
    call(
        library,
        "evolve",
        dtype,
        record,
        hmc._settings(),
        3,
        pointer(phi),
        pointer(momenta),
        workspace=("hmc", record, 3),
    )
    np.testing.assert_allclose(phi, expected[0], **close(dtype, 10))
    np.testing.assert_allclose(momenta, expected[1], **close(dtype, 10))


def test_bad_arguments_are_named(library):
    record = lfq.Phi4((4, 4), 0.1, 0.5)._record()
    phi = np.zeros((1, 4, 4))
    with pytest.raises(RuntimeError, match="workspace: 0 bytes given"):
        library.call("phi4_action", "float64", record, 1, pointer(phi), pointer(phi), None, 0, None)
    record["ndim"] = 5
    with pytest.raises(ValueError, match="ndim is 5"):
        library.call("phi4_force", "float64", record, 1, pointer(phi), pointer(phi), None)
    settings = lfq.HMC(lfq.Phi4((4, 4), 0.1, 0.5))._settings(0)
    record["ndim"] = 2
    with pytest.raises(ValueError, match="path: unknown value 7"):
        library.call("hmc", "float64", record, settings, 7, 1, pointer(phi), pointer(phi), *3 * (None,), None, 0, None)
    training = np.zeros(1, dtype=_cuda.TRAINING_RECORD)
    training["n"] = training["total_steps"] = 1
    with pytest.raises(ValueError, match="training: an array is null"):
        library.call("train_step", "float64", training, None, None)
    wide = np.full(200, 1 / 200)
    record = lfq.Phi4((200,), 0.1, 0.5)._record()
    with pytest.raises(ValueError, match="reaches farther than 31"):
        call(
            library,
            "phi4_observables",
            "float64",
            record,
            1,
            pointer(np.zeros(200)),
            wide,
            pointer(np.zeros(6)),
            workspace=("phi4", record, 1),
        )
    assert heat_kernel(4096)[32] < 1e-16


# ---- flows -----------------------------------------------------------------------------------


def reference_layer(layer):
    """A layer of a program, as the reference writes it."""
    shape = tuple(int(n) for n in layer["extent"][: layer["ndim"]])
    if layer["kind"] != _core.LAYERS["coupling"]:
        kinds = {"rescale": reference.Rescale, "interleave": reference.Interleave, "upsample": reference.Upsample}
        return next(kinds[name] for name in kinds if _core.LAYERS[name] == layer["kind"])(shape)
    return reference.Coupling(
        shape,
        int(layer["parity"]),
        int(layer["kernel_size"]),
        tuple(int(c) for c in layer["hidden"][: layer["n_hidden"]]),
        ["tanh", "leaky_relu"][layer["activation"]],
        bool(layer["bias"]),
        ["exp(-|s|)", "exp(s)", "even", "site"][layer["scale"]],
        int(layer["n_features"]),
        bool(layer["sublattices"]),
        int(layer["active"]),
        int(layer["frozen"]),
    )


def with_random_weights(flow, rng, width=0.3):
    flow.weights = width * rng.normal(size=flow.n_weights)
    return flow


FLOWS = {
    "paper": ((8, 6), lambda: lfq.AffineFlow()),
    "paper, one lane a row": ((8, 4), lambda: lfq.AffineFlow(bias=True)),
    "paper, half a warp": ((24, 8), lambda: lfq.AffineFlow(rescale=False)),
    "paper, a warp": ((16, 16), lambda: lfq.AffineFlow()),
    "paper, long rows": ((8, 128), lambda: lfq.AffineFlow(bias=True, rescale=False)),
    "paper, large tiles": ((68, 32), lambda: lfq.AffineFlow(bias=True)),
    "large kernel on a small lattice": ((2, 4), lambda: lfq.AffineFlow(kernel_size=9, scale="exp(s)")),
    "hidden": ((4, 6), lambda: lfq.AffineFlow(hidden=(9, 3), bias=True, n_blocks=2)),
    "leaky": ((6, 4), lambda: lfq.AffineFlow(kernel_size=5, hidden=(4,), activation="leaky_relu")),
    "1-d": ((34,), lambda: lfq.AffineFlow(kernel_size=5, bias=True, ndim=1)),
    "3-d": ((4, 2, 6), lambda: lfq.AffineFlow(hidden=(2,), ndim=3)),
    "4-d": ((2, 4, 2, 4), lambda: lfq.AffineFlow(ndim=4, rescale=False)),
    "interleave": ((8, 4), lambda: lfq.Compose([lfq.InterleaveMap(), lfq.AffineFlow()])),
    "upsample twice": (
        (8, 12),
        lambda: lfq.Compose([lfq.UpsampleMap(), lfq.AffineFlow(), lfq.UpsampleMap(), lfq.AffineFlow()]),
    ),
    "upsample 3-d": ((4, 4, 8), lambda: lfq.UpsampleMap(ndim=3)),
    "even 1": ((4, 6), lambda: lfq.AffineFlow(scale="even", features=1)),
    "even 2": ((4, 6), lambda: lfq.AffineFlow(scale="even", features=2)),
    "even 4, hidden": ((6, 4), lambda: lfq.AffineFlow(hidden=(3,), bias=True, scale="even", features=4)),
    "even 8": ((4, 6), lambda: lfq.AffineFlow(kernel_size=5, bias=True, scale="even", features=8)),
    "site": ((8, 6), lambda: lfq.AffineFlow(scale="site", n_blocks=2)),
    "site, hidden": ((4, 2, 6), lambda: lfq.AffineFlow(hidden=(2,), bias=True, scale="site", ndim=3)),
    "site, sublattices": ((8, 6), lambda: lfq.AffineFlow(scale="site", n_blocks=2, sublattices=True)),
    "even 2, sublattices": ((4, 6), lambda: lfq.AffineFlow(scale="even", features=2, sublattices=True)),
    "kernel 5, bias, sublattices": ((6, 4), lambda: lfq.AffineFlow(kernel_size=5, bias=True, sublattices=True)),
    "3-d, sublattices": ((4, 2, 6), lambda: lfq.AffineFlow(scale="site", bias=True, ndim=3, sublattices=True)),
    "4-d, sublattices": ((2, 4, 2, 4), lambda: lfq.AffineFlow(scale="even", features=1, ndim=4, sublattices=True)),
    "order": ((6, 4), lambda: lfq.AffineFlow(scale="site", sublattices=True, order="e|c c|eo o|c", n_blocks=2)),
    "even 2, bias, kernel 5, order": (
        (4, 6),
        lambda: lfq.AffineFlow(
            kernel_size=5, bias=True, scale="even", features=2, sublattices=True, order="c|e ce|o e|co"
        ),
    ),
    "3-d, order": ((4, 2, 6), lambda: lfq.AffineFlow(ndim=3, sublattices=True, order="e|c o|e c|eo")),
    "4-d, order": ((2, 4, 2, 4), lambda: lfq.AffineFlow(scale="exp(s)", ndim=4, sublattices=True, order="e|c c|eo")),
    "multiscale": ((8, 4), lambda: lfq.MultiscaleFlow(2, n_blocks=1)),
    "multiscale, interpolating": ((8, 4), lambda: lfq.MultiscaleFlow(2, interpolate=True)),
    "multiscale 3-d": ((2, 2, 2), lambda: lfq.MultiscaleFlow(1, n_blocks=1, ndim=3)),
    "multiscale from one site": ((4, 4), lambda: lfq.MultiscaleFlow(2, n_blocks=1, scale="even", features=2)),
    # Extents that are powers of two have kernels of their own.
    "paper, 2^n": ((8, 4), lambda: lfq.AffineFlow()),
    "exp, kernel 5, bias, 2^n": ((4, 16), lambda: lfq.AffineFlow(kernel_size=5, bias=True, scale="exp(s)")),
    "large kernel, 2^n": ((2, 4), lambda: lfq.AffineFlow(kernel_size=9, n_blocks=2)),
    "1-d, 2^n": ((64,), lambda: lfq.AffineFlow(kernel_size=5, bias=True, ndim=1)),
    "3-d, 2^n": ((4, 2, 8), lambda: lfq.AffineFlow(scale="site", bias=True, ndim=3)),
    "even 1, 2^n": ((4, 8), lambda: lfq.AffineFlow(scale="even", features=1)),
    "even 4, sublattices, 2^n": ((8, 4), lambda: lfq.AffineFlow(scale="even", features=4, sublattices=True)),
    "even 8, bias, 2^n": ((4, 4), lambda: lfq.AffineFlow(bias=True, scale="even", features=8)),
    "order, 2^n": (
        (8, 4),
        lambda: lfq.AffineFlow(scale="site", bias=True, sublattices=True, order="e|c c|eo ce|o o|c", n_blocks=2),
    ),
    "interleave twice, 2^n": (
        (8, 8),
        lambda: lfq.Compose([lfq.AffineFlow(), lfq.InterleaveMap(), lfq.AffineFlow(scale="site"), lfq.InterleaveMap()]),
    ),
    "upsample 1-d, 2^n": ((16,), lambda: lfq.MultiscaleFlow(3, n_blocks=1, ndim=1)),
    "multiscale 3-d, twice": ((4, 8, 4), lambda: lfq.MultiscaleFlow(2, n_blocks=1, ndim=3)),
    "multiscale 4-d": ((4, 2, 2, 4), lambda: lfq.MultiscaleFlow(1, n_blocks=1, ndim=4)),
    # A thread has two sites of a sublattice here, and four.
    "multiscale, a warp": ((16, 16), lambda: lfq.MultiscaleFlow(4, n_blocks=1)),
    "multiscale, two warps": ((32, 32), lambda: lfq.MultiscaleFlow(1, n_blocks=1)),
    "even 2, two warps": ((32, 32), lambda: lfq.AffineFlow(scale="even", features=2, sublattices=True)),
}


def flow_record(shape, layers, weights):
    """lfq_flow, with its weights on the host."""
    record = np.zeros(1, dtype=_cuda.FLOW_RECORD)
    record["volume"], record["n_weights"], record["n_layers"] = np.prod(shape), weights.size, layers.size
    record["layers"], record["weights"] = layers.ctypes.data, weights.ctypes.data
    return record


@pytest.fixture(params=FLOWS)
def case(request, rng):
    """A flow with random weights, its shape, records, and layers of the reference."""
    shape, make = FLOWS[request.param]
    flow = make()
    # Many random couplings one behind the other would make the map too steep to compare.
    with_random_weights(flow, rng, min(0.3, 2.4 / flow.ndim / len(flow.program(shape))))
    layers, weights = flow.program(shape), flow.weights
    record = flow_record(shape, layers, weights)
    return flow, shape, record, (layers, weights)


def test_flow_forward_and_inverse(library, dtype, rng, case):
    flow, shape, record, (layers, weights) = case
    z = rng.normal(size=(3, *shape)).astype(dtype)
    x, log_det, back, back_log_det = np.empty_like(z), np.empty(3), np.empty_like(z), np.empty(3)
    call(
        library,
        "flow_forward",
        dtype,
        record,
        pointer(layers),
        3,
        pointer(z),
        pointer(x),
        pointer(log_det),
        workspace=("flow", record, 3),
    )
    expected = reference.flow_forward(
        [reference_layer(layer) for layer in layers], weights, z.reshape(3, -1).astype(np.float64)
    )
    np.testing.assert_allclose(x, expected[0], **close(dtype, 10))
    np.testing.assert_allclose(log_det, expected[1], **close(dtype, 10))
    call(
        library,
        "flow_inverse",
        dtype,
        record,
        pointer(layers),
        3,
        pointer(x),
        pointer(back),
        pointer(back_log_det),
        workspace=("flow", record, 3),
    )
    np.testing.assert_allclose(back, z, **close(dtype, 100))
    np.testing.assert_allclose(back_log_det, -log_det, **close(dtype, 10))


def test_flow_gradients(library, dtype, rng, case):
    flow, shape, record, (layers, weights) = case
    t = theory(shape)
    z, dx = rng.normal(size=(2, 3, *shape)).astype(dtype)
    flat, reference_flow = z.reshape(3, -1).astype(np.float64), [reference_layer(layer) for layer in layers]
    dlog_det, dz, dweights = rng.normal(size=3), np.empty_like(z), np.full(weights.size, np.nan)
    scale = 20 if dtype == np.float32 else 100

    def vjp(dz, dweights):
        call(
            library,
            "flow_vjp",
            dtype,
            record,
            pointer(layers),
            3,
            pointer(z),
            pointer(dx),
            pointer(dlog_det),
            pointer(dz),
            dweights,
            workspace=("flow", record, 3),
        )

    vjp(dz, pointer(dweights))
    expected = reference.flow_vjp(reference_flow, weights, flat, dx.astype(np.float64), dlog_det)
    np.testing.assert_allclose(dz.reshape(3, -1), expected[0], **close(dtype, scale))
    np.testing.assert_allclose(dweights, expected[1], **close(dtype, scale, expected[1]))
    without = np.empty_like(z)
    vjp(without, None)
    np.testing.assert_array_equal(without, dz)

    action, log_det = np.empty((2, 3))
    call(
        library,
        "flow_loss",
        dtype,
        record,
        pointer(layers),
        t._record(),
        3,
        pointer(z),
        pointer(action),
        pointer(log_det),
        pointer(dweights),
        workspace=("flow", record, 3),
    )
    expected = reference.loss(reference_flow, weights, flat, t.beta, t.lam)
    for found, wanted in zip((action, log_det, dweights), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **close(dtype, scale, wanted))

    force = np.empty_like(z)
    call(
        library,
        "pullback_force",
        dtype,
        record,
        pointer(layers),
        t._record(),
        3,
        pointer(z),
        pointer(action),
        pointer(force),
        workspace=("flow", record, 3),
    )
    expected = reference.pullback(reference_flow, weights, flat, t.beta, t.lam)
    np.testing.assert_allclose(action, expected[0], **close(dtype, scale))
    np.testing.assert_allclose(force.reshape(3, -1), expected[1], **close(dtype, scale))


def test_flow_hmc_follows_the_chains_of_the_cpu(library, dtype, rng, case):
    flow, shape, record, (layers, weights) = case
    t = theory(shape)
    # Nearer to the weights of a new flow, where site maps have slope one.
    start = lfq.flows._from_dict(flow.to_dict()).weights
    flow.weights = weights = start + 0.2 * (weights - start)
    record["weights"] = weights.ctypes.data
    hmc = lfq.HMC(t.pullback(flow), tau=0.3, n_steps=3, dtype=str(dtype), length_spread=0.4)
    z = (0.3 * rng.normal(size=(3, *shape))).astype(dtype)
    start = lfq.State(z, 2**33, seed=11, first_chain=4)
    expected = hmc.advance(start, 2, 2)
    settings = hmc._settings(2, 2, 11, 4, 2**33)
    z = z.copy()
    phi, dh, accepted, values = (
        np.empty_like(z),
        np.empty((4, 3)),
        np.empty((4, 3), dtype=np.uint8),
        np.empty((2, 3, 6)),
    )
    call(
        library,
        "flow_hmc",
        dtype,
        record,
        pointer(layers),
        t._record(),
        settings,
        3,
        pointer(z),
        pointer(phi),
        pointer(dh),
        pointer(accepted),
        t._smear(),
        pointer(values),
        workspace=("flow", record, 3),
    )
    np.testing.assert_array_equal(accepted.astype(bool), expected.accepted)
    np.testing.assert_allclose(dh, expected.dh, **close(dtype, 50))
    np.testing.assert_allclose(z, expected.state.latent, **close(dtype, 50))
    np.testing.assert_allclose(phi, expected.phi, **close(dtype, 50))
    for i, name in enumerate(expected.observables):
        np.testing.assert_allclose(values[..., i], expected.observables[name], **close(dtype, 50))

    momenta = rng.normal(size=z.shape).astype(dtype)
    wanted = hmc.evolve(z, momenta)
    call(
        library,
        "flow_evolve",
        dtype,
        record,
        pointer(layers),
        t._record(),
        hmc._settings(),
        3,
        pointer(z),
        pointer(momenta),
        workspace=("flow", record, 3),
    )
    np.testing.assert_allclose(z, wanted[0], **close(dtype, 50))
    np.testing.assert_allclose(momenta, wanted[1], **close(dtype, 50))


def test_flows_beyond_shared_memory(library, rng):
    """A lattice whose buffers lie in the workspace, and more chains than blocks."""
    flow, shape = with_random_weights(lfq.AffineFlow(hidden=(2,), n_blocks=2), rng, 0.1), (96, 64)
    layers, weights = flow.program(shape), flow.weights
    record = flow_record(shape, layers, weights)
    z = rng.normal(size=(2, *shape))
    dz, dweights = np.empty_like(z), np.empty(weights.size)
    call(
        library,
        "flow_vjp",
        "float64",
        record,
        pointer(layers),
        2,
        pointer(z),
        pointer(z),
        pointer(np.ones(2)),
        pointer(dz),
        pointer(dweights),
        workspace=("flow", record, 2),
    )
    expected = flow.vjp(z, z, np.ones(2), weights=True)
    np.testing.assert_allclose(dz, expected[0], **close(np.float64, 100))
    np.testing.assert_allclose(dweights, expected[1], rtol=1e-11, atol=1e-9)


def test_more_chains_than_blocks(library, rng):
    flow, shape, n = with_random_weights(lfq.AffineFlow(), rng), (2, 2), 1030
    layers, weights = flow.program(shape), flow.weights
    record = flow_record(shape, layers, weights)
    z, t = rng.normal(size=(n, *shape)), theory(shape)
    action, log_det, dweights = np.empty(n), np.empty(n), np.empty(weights.size)
    call(
        library,
        "flow_loss",
        "float64",
        record,
        pointer(layers),
        t._record(),
        n,
        pointer(z),
        pointer(action),
        pointer(log_det),
        pointer(dweights),
        workspace=("flow", record, n),
    )
    expected = reference.loss([reference_layer(layer) for layer in layers], weights, z.reshape(n, -1), t.beta, t.lam)
    for found, wanted in zip((action, log_det, dweights), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **close(np.float64, 100))


def test_more_chains_than_slots_of_flow_hmc(library, dtype, rng):
    """A chain is the same wherever in a batch it is, to the bit."""
    flow, shape, n = lfq.MultiscaleFlow(1, n_blocks=1), (2, 2), 4300
    layers, weights = flow.program(shape), flow.weights
    record, t = flow_record(shape, layers, weights), theory(shape)
    settings = lfq.HMC(t.pullback(flow), tau=0.5, n_steps=1, dtype=str(dtype))._settings()
    z, momenta = rng.normal(size=(2, n, *shape)).astype(dtype)

    def evolve(z, momenta):
        z, momenta = z.copy(), momenta.copy()
        call(
            library,
            "flow_evolve",
            dtype,
            record,
            pointer(layers),
            t._record(),
            settings,
            len(z),
            pointer(z),
            pointer(momenta),
            workspace=("flow", record, len(z)),
        )
        return z, momenta

    all_of_them = evolve(z, momenta)
    for chain in (0, 2149, 2150, n - 1):
        alone = evolve(z[chain : chain + 1], momenta[chain : chain + 1])
        for found, wanted in zip(all_of_them, alone, strict=True):
            np.testing.assert_array_equal(found[chain], wanted[0])
    expected = lfq.HMC(t.pullback(flow), tau=0.5, n_steps=1, dtype=str(dtype)).evolve(z, momenta)
    np.testing.assert_allclose(all_of_them[0], expected[0], **close(dtype, 10))


def test_a_theory_on_another_lattice_of_as_many_sites(library, rng):
    flow, shape = with_random_weights(lfq.AffineFlow(), rng), (4, 16)
    layers, weights = flow.program(shape), flow.weights
    record, t = flow_record(shape, layers, weights), theory((8, 8))
    z = rng.normal(size=(2, *shape))
    action, force = np.empty(2), np.empty_like(z)
    call(
        library,
        "pullback_force",
        "float64",
        record,
        pointer(layers),
        t._record(),
        2,
        pointer(z),
        pointer(action),
        pointer(force),
        workspace=("flow", record, 2),
    )
    x, log_det = flow.forward(z)
    np.testing.assert_allclose(action, t.action(x.reshape(2, 8, 8)) - log_det, **close(np.float64, 100))
    expected = flow.vjp(z, t.force(x.reshape(2, 8, 8)).reshape(z.shape), np.ones(2))
    np.testing.assert_allclose(force, expected, **close(np.float64, 100))


@pytest.mark.parametrize("shapes", [((16, 16), (8, 32)), ((8, 8), (4, 16)), ((8, 8), (8, 8), (4, 16))], ids=str)
def test_layers_that_reshape(library, rng, shapes):
    """Sites in order, on a lattice of another shape from one layer to the next."""
    flow = with_random_weights(lfq.AffineFlow(bias=True, rescale=len(shapes) > 2), rng)
    layers = np.concatenate([flow.program(shape)[i : i + 1] for i, shape in enumerate(shapes)])
    weights, volume = flow.weights, int(np.prod(shapes[0]))
    record = flow_record(shapes[0], layers, weights)
    z = rng.normal(size=(3, volume))
    found, expected = (np.empty_like(z), np.empty(3)), (np.empty_like(z), np.empty(3))
    arguments = (3, pointer(z), *map(pointer, found))
    call(library, "flow_forward", "float64", record, pointer(layers), *arguments, workspace=("flow", record, 3))
    _core.flow_forward(volume, layers, weights, z, *expected, 1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **close(np.float64, 100))


@pytest.mark.validate
@pytest.mark.skipif(bool(emulated.SANITIZE), reason="this is the sanitized run")
def test_under_sanitizers(tmp_path):
    """All of the above again, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    runtimes = [
        subprocess.run([emulated.GXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("no sanitizer runtimes")
    environment = os.environ | {
        "LFQ_EMULATOR_SANITIZE": "address,undefined",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    # One type of field is enough for addresses.
    only = "not float32 and not gpu"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", only, __file__],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
