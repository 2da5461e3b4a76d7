"""JAX functions: the same numbers as lfq, under jit, vmap and grad, on the CPU and on a GPU.

The handlers for CUDA also run without a GPU, on the kernels that emulated.py compiles for the host, as targets of
XLA's CPU platform. LFQ_REQUIRE_GPU=1 turns the skip without a GPU into a failure.
"""

import os
import shutil
import subprocess
import sys

import emulated
import numpy as np
import pytest

import lfq
from lfq import _cuda, embedding

jax = pytest.importorskip("jax")
if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    pytest.skip("lfq.jax compiles its handlers with a C++ compiler", allow_module_level=True)
jax.config.update("jax_enable_x64", True)
lfq_jax = pytest.importorskip("lfq.jax")
jnp = jax.numpy

THEORY = lfq.Phi4((4, 4), 0.5, 0.3)
FLOWS = {
    "paper": lfq.AffineFlow(seed=1),
    "deep": lfq.AffineFlow(n_blocks=2, hidden=(3,), bias=True, scale="exp(s)", seed=2),
    "ladder": lfq.Compose([lfq.UpsampleMap(1.2, (0.3, 0.5), 0.8), lfq.AffineFlow(seed=3)]),
    "multiscale": lfq.MultiscaleFlow(2, n_blocks=1, seed=4),
}
PHI = np.random.default_rng(0).normal(size=(3, 4, 4))


@pytest.fixture(scope="session")
def emulated_handlers(tmp_path_factory):
    """The handlers for CUDA as targets of the CPU, with names of their own; returns their library."""
    if emulated.GXX is None:
        pytest.skip("no g++")
    kernels = emulated.library(tmp_path_factory).path
    options, _ = lfq_jax._build(cuda=True)
    options = [f"-I{emulated.ROOT / 'tests' / 'cuda'}", *(o if o != "-llfq_cuda" else str(kernels) for o in options)]
    handlers = lfq_jax._handlers(options, tmp_path_factory.mktemp("jax") / "handlers.so")
    lfq_jax._register(handlers, "cpu", "lfq_emulated_")
    return handlers


def first_gpu():
    """JAX's; skips where lfq's handlers have none."""
    try:
        if _cuda.library_path() is None:
            raise RuntimeError("lfq was built without CUDA")
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        if os.environ.get("LFQ_REQUIRE_GPU") == "1":
            pytest.fail(f"LFQ_REQUIRE_GPU=1, but {error}")
        pytest.skip(str(error))


@pytest.fixture(params=["cpu", "emulated", "gpu"])
def platform(request, monkeypatch):
    """Where the kernels run."""
    device = first_gpu() if request.param == "gpu" else jax.devices("cpu")[0]
    if request.param == "emulated":
        request.getfixturevalue("emulated_handlers")
        monkeypatch.setattr(lfq_jax, "_prefix", "lfq_emulated_")
        # Traces remember the targets they were made with.
        jax.clear_caches()
        request.addfinalizer(jax.clear_caches)
    with jax.default_device(device):
        yield request.param


def agree(platform, found, wanted):
    """To the bit on the CPU; sums take another order on a GPU."""
    if platform == "cpu":
        return np.testing.assert_array_equal(found, wanted)
    eps = np.finfo(found.dtype).eps
    np.testing.assert_allclose(found, wanted, rtol=50 * eps, atol=500 * eps)


def finite_difference(f, x, direction, step=1e-6):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def test_action_and_force_are_those_of_lfq(platform):
    agree(platform, jax.jit(lambda p: lfq_jax.action(THEORY, p))(PHI), THEORY.action(PHI))
    agree(platform, lfq_jax.force(THEORY, PHI), THEORY.force(PHI))
    gradient = jax.jit(jax.grad(lambda p: lfq_jax.action(THEORY, p).sum()))(PHI)
    agree(platform, gradient, -THEORY.force(PHI))
    agree(platform, lfq_jax.action(THEORY, PHI[0]), THEORY.action(PHI[0]))


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_those_of_lfq(platform, name):
    flow = FLOWS[name]
    for jax_map, numpy_map in ((lfq_jax.forward, flow.forward), (lfq_jax.inverse, flow.inverse)):
        for found, wanted in zip(jax.jit(lambda p, f=jax_map: f(flow, p))(PHI), numpy_map(PHI), strict=True):
            agree(platform, found, wanted)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_flows(platform, name, direction):
    """A random direction of field and weights, against central differences."""
    if platform != "cpu" and direction == "inverse":
        with pytest.raises(Exception, match="derivatives of an inverse run on the CPU only"):
            jax.block_until_ready(jax.grad(lambda field: lfq_jax.inverse(FLOWS[name], field)[1].sum())(PHI))
        return
    flow, rng = FLOWS[name], np.random.default_rng(4)
    apply, a, b = getattr(lfq_jax, direction), rng.normal(size=PHI.shape), rng.normal(size=3)

    def loss(field, weights):
        image, log_det = apply(flow, field, weights)
        return (image * a).sum() + (log_det * b).sum()

    for argument, at in ((0, PHI), (1, flow.weights)):
        both = [PHI, flow.weights]
        gradient = jax.grad(loss, argument)(*both)
        towards = rng.normal(size=at.shape)

        def moved(x, argument=argument, both=both):
            return float(loss(*(x if i == argument else both[i] for i in range(2))))

        # central differences of step 1e-6: rounding of 1e-16 * loss / 1e-6 dominates
        wanted = finite_difference(moved, at, towards)
        np.testing.assert_allclose((gradient * towards).sum(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_those_of_lfq(platform, name):
    flow, rng = FLOWS[name], np.random.default_rng(6)
    a, b = rng.normal(size=PHI.shape), rng.normal(size=3)
    _, pull = jax.vjp(lambda z, w: lfq_jax.forward(flow, z, w), jnp.asarray(PHI), jnp.asarray(flow.weights))
    for found, wanted in zip(pull((jnp.asarray(a), jnp.asarray(b))), flow.vjp(PHI, a, b, weights=True), strict=True):
        agree(platform, found, wanted)


def test_vmap_over_fields_weights_and_both(platform):
    flow, rng = FLOWS["deep"], np.random.default_rng(5)
    weights = flow.weights * (1 + 0.1 * rng.normal(size=(2, 1)))
    fields = rng.normal(size=(2, 3, 4, 4))

    def one(field, w):
        x, log_det = lfq_jax.forward(flow, field, w)
        back = lfq_jax.inverse if platform == "cpu" else lfq_jax.forward
        return x, log_det, jax.grad(lambda f, v: back(flow, f, v)[1].sum(), (0, 1))(field, w)

    def same(found, wanted):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)

    def stack(results):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    same(jax.vmap(one, (0, None))(fields, weights[0]), stack([one(f, weights[0]) for f in fields]))
    same(jax.vmap(one, (None, 0))(fields[0], weights), stack([one(fields[0], w) for w in weights]))
    same(jax.vmap(one)(fields, weights), stack([one(f, w) for f, w in zip(fields, weights, strict=True)]))
    nested = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(fields, weights)
    same(nested, stack([stack([one(f, w) for w in weights]) for f in fields]))
    same(jax.vmap(lambda p: lfq_jax.action(THEORY, p))(fields), THEORY.action(fields))


def test_single_precision(platform):
    phi, flow = PHI.astype(np.float32), FLOWS["paper"]
    action = lfq_jax.action(THEORY, phi)
    assert action.dtype == np.float32
    agree(platform, action, THEORY.action(phi).astype(np.float32))
    x, log_det = lfq_jax.forward(flow, phi)
    assert x.dtype == log_det.dtype == np.float32
    np.testing.assert_allclose(x, flow.forward(phi)[0], rtol=1e-5, atol=1e-5)


SINGLE = """
import sys
import jax, numpy as np
import lfq, lfq.jax as lj
if sys.argv[1:]:
    lj._register(sys.argv[1], "cpu", "lfq_emulated_")
    lj._prefix = "lfq_emulated_"
theory, flow = lfq.Phi4((4, 4), 0.5, 0.3), lfq.AffineFlow(seed=1)
z, weights = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("f4"), flow.weights.astype("f4")

def loss(z, weights):
    x, log_det = lj.forward(flow, z, weights)
    return (lj.action(theory, x) - log_det).sum()

dz, dweights = jax.jit(jax.grad(loss, (0, 1)))(z, weights)
each = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))(z, weights)
of_two = jax.vmap(loss, (None, 0))(z, np.stack([weights, weights]))
assert not jax.config.jax_enable_x64
assert {str(v.dtype) for v in (dz, dweights, *each, of_two)} == {"float32"}
x, _ = flow.forward(z)
wanted = flow.vjp(z, -theory.force(x), -1.0, weights=True)
np.testing.assert_allclose(dz, wanted[0], rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(dweights, wanted[1], rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(each[0], dz, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(each[1].sum(0), dweights, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(of_two, 2 * [loss(z, weights)], rtol=1e-5)
"""


def test_without_jax_enable_x64(platform, request):
    """The kernels take and return doubles even where JAX has none."""
    handlers = [request.getfixturevalue("emulated_handlers")] if platform == "emulated" else []
    done = subprocess.run(
        [sys.executable, "-c", SINGLE, *map(str, handlers)],
        env={**os.environ, "JAX_PLATFORMS": "cuda" if platform == "gpu" else "cpu", "JAX_ENABLE_X64": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_no_fields(platform):
    none, flow = PHI[:0], FLOWS["paper"]
    assert lfq_jax.action(THEORY, none).shape == (0,) and lfq_jax.force(THEORY, none).shape == none.shape
    image, log_det = lfq_jax.forward(flow, none)
    assert image.shape == none.shape and log_det.shape == (0,)
    gradient = jax.grad(lambda w: lfq_jax.forward(flow, none, w)[1].sum())(flow.weights)
    np.testing.assert_array_equal(gradient, np.zeros(flow.n_weights))


def test_nan_reaches_the_results_of_a_gpu_and_is_an_error_on_the_cpu(platform):
    phi = np.where(np.arange(3)[:, None, None] == 1, np.nan, PHI)
    if platform == "cpu":
        with pytest.raises(Exception, match="chain 1"):
            lfq_jax.action(THEORY, phi).block_until_ready()
    else:
        np.testing.assert_array_equal(np.isnan(lfq_jax.action(THEORY, phi)), [False, True, False])


@pytest.mark.parametrize("cuda, header", [(False, "lfq.h"), (True, "lfq.h"), (True, "lfq_cuda.h")])
def test_handlers_are_compiled_anew_for_another_interface(tmp_path, monkeypatch, cuda, header):
    """Records of another layout would be read beyond their ends."""
    shutil.copytree(embedding.include_dir() / "lfq", tmp_path / "lfq")
    monkeypatch.setattr(embedding, "include_dir", lambda: tmp_path)
    before = lfq_jax._build(cuda)
    assert before == lfq_jax._build(cuda) and before[1] != lfq_jax._build(not cuda)[1]
    changed = tmp_path / "lfq" / header
    changed.write_text(changed.read_text().replace("int32_t reserved;", "int64_t reserved;"))
    options, library = lfq_jax._build(cuda)
    assert options == before[0] and library != before[1]


def test_bad_arrays_are_named():
    with pytest.raises(ValueError, match="phi: .*lattice"):
        lfq_jax.action(THEORY, PHI[:, :3])
    with pytest.raises(TypeError, match="phi: .*int"):
        lfq_jax.action(THEORY, np.zeros((4, 4), dtype=int))
    with pytest.raises(ValueError, match="weights"):
        lfq_jax.forward(FLOWS["paper"], PHI, np.zeros(3))
    with pytest.raises(ValueError, match="odd"):
        lfq_jax.forward(FLOWS["paper"], PHI[:, :3])
