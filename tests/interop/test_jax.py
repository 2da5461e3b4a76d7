"""JAX functions: the same numbers as lfq, under jit, vmap and grad."""

import shutil

import numpy as np
import pytest

import lfq
from lfq import embedding

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


def finite_difference(f, x, direction, step=1e-6):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def test_action_and_force_are_those_of_lfq():
    np.testing.assert_array_equal(jax.jit(lambda p: lfq_jax.action(THEORY, p))(PHI), THEORY.action(PHI))
    np.testing.assert_array_equal(lfq_jax.force(THEORY, PHI), THEORY.force(PHI))
    gradient = jax.jit(jax.grad(lambda p: lfq_jax.action(THEORY, p).sum()))(PHI)
    np.testing.assert_array_equal(gradient, -THEORY.force(PHI))
    np.testing.assert_array_equal(lfq_jax.action(THEORY, PHI[0]), THEORY.action(PHI[0]))


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_those_of_lfq(name):
    flow = FLOWS[name]
    for jax_map, numpy_map in ((lfq_jax.forward, flow.forward), (lfq_jax.inverse, flow.inverse)):
        for found, wanted in zip(jax.jit(lambda p, f=jax_map: f(flow, p))(PHI), numpy_map(PHI), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_flows(name, direction):
    """A random direction of field and weights, against central differences."""
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


def test_vmap_over_fields_weights_and_both():
    flow, rng = FLOWS["deep"], np.random.default_rng(5)
    weights = flow.weights * (1 + 0.1 * rng.normal(size=(2, 1)))
    fields = rng.normal(size=(2, 3, 4, 4))

    def one(field, w):
        x, log_det = lfq_jax.forward(flow, field, w)
        return x, log_det, jax.grad(lambda f, v: lfq_jax.inverse(flow, f, v)[1].sum(), (0, 1))(field, w)

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


def test_single_precision():
    phi = PHI.astype(np.float32)
    action = lfq_jax.action(THEORY, phi)
    assert action.dtype == np.float32
    np.testing.assert_array_equal(action, THEORY.action(phi).astype(np.float32))
    x, log_det = lfq_jax.forward(FLOWS["paper"], phi)
    assert x.dtype == log_det.dtype == np.float32
    np.testing.assert_allclose(x, FLOWS["paper"].forward(phi)[0], rtol=1e-5, atol=1e-5)


def test_handlers_are_compiled_anew_for_another_interface(tmp_path, monkeypatch):
    """Records of another layout would be read beyond their ends."""
    shutil.copytree(embedding.include_dir() / "lfq", tmp_path / "lfq")
    monkeypatch.setattr(embedding, "include_dir", lambda: tmp_path)
    before = lfq_jax._build()
    assert before == lfq_jax._build()
    header = tmp_path / "lfq" / "lfq.h"
    header.write_text(header.read_text().replace("int32_t reserved;", "int64_t reserved;"))
    options, library = lfq_jax._build()
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
    with pytest.raises(Exception, match="chain 1"):
        lfq_jax.action(THEORY, np.where(np.arange(3)[:, None, None] == 1, np.nan, PHI)).block_until_ready()
