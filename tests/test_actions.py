"""The theory: its action in every convention, its couplings and fields, and what it refuses."""

import math

import numpy as np
import pytest

import lfq
from lfq.observables import OBSERVABLES

SHAPES = [(5,), (4, 6), (3, 4, 5), (2, 3, 4, 2)]
LATTICES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def axes(phi, shape):
    return range(phi.ndim - len(shape), phi.ndim)


def site_sum(values, shape):
    return values.sum(axis=tuple(axes(values, shape)))


def beta_lambda_action(phi, shape, beta, lam):
    hopping = sum(phi * np.roll(phi, -1, axis) for axis in axes(phi, shape))
    return site_sum(-beta * hopping + (1 - 2 * lam) * phi**2 + lam * phi**4, shape)


def kappa_lambda_action(phi, shape, kappa, lam):
    hopping = sum(phi * np.roll(phi, -1, axis) for axis in axes(phi, shape))
    return site_sum(-2 * kappa * hopping + (1 - 2 * lam) * phi**2 + lam * phi**4, shape)


def mass_action(phi, shape, m2, g, half):
    kinetic = sum((np.roll(phi, -1, axis) - phi) ** 2 for axis in axes(phi, shape))
    quadratic = kinetic + m2 * phi**2
    return site_sum((0.5 if half else 1.0) * quadratic + g * phi**4, shape)


# ---- conventions ----------------------------------------------------------------------------


@LATTICES
@pytest.mark.parametrize("beta, lam", [(0.2, 0.5), (0.13, 0.0), (-0.3, 1.7), (0.0, 0.3), (1.4, 0.02)])
def test_beta_lambda(shape, beta, lam, rng):
    phi = rng.normal(size=(3, *shape))
    wanted = beta_lambda_action(phi, shape, beta, lam)
    np.testing.assert_allclose(lfq.Phi4(shape, beta, lam).action(phi), wanted, rtol=1e-12, atol=1e-11)


@LATTICES
def test_kappa_lambda(shape, rng):
    phi = rng.normal(size=(3, *shape))
    theory = lfq.Phi4.from_kappa(shape, kappa=0.11, lam=0.4)
    wanted = kappa_lambda_action(phi, shape, 0.11, 0.4)
    np.testing.assert_allclose(theory.action(phi), wanted, rtol=1e-12, atol=1e-11)
    assert theory.beta == 0.22 and theory.kappa == 0.11


@LATTICES
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "m2, g", [(0.7, 0.3), (-1.3, 0.8), (-4.0, 1.24), (-7.0, 2.0), (0.25, 0.0), (2.0, 1e-14)]
)
def test_mass(shape, half, m2, g, rng):
    """Negative m2, m2 = -2 D (no linear term) and below, the free theory and almost the free theory."""
    theory = lfq.Phi4.from_mass(shape, m2=m2, g=g, half=half)
    phi = rng.normal(size=(3, *shape))
    wanted = mass_action(theory.field_to_mass(phi, half), shape, m2, g, half)
    np.testing.assert_allclose(theory.action(phi), wanted, rtol=1e-11, atol=1e-11)
    back = rng.normal(size=(3, *shape))
    np.testing.assert_allclose(
        theory.action(theory.field_from_mass(back, half)),
        mass_action(back, shape, m2, g, half),
        rtol=1e-11,
        atol=1e-11,
    )


@LATTICES
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "m2, g", [(0.7, 0.3), (-1.3, 0.8), (-4.0, 1.24), (-9.0, 0.1), (0.25, 0.0), (1e3, 1e-6)]
)
def test_mass_parameters_round_trip(shape, half, m2, g):
    theory = lfq.Phi4.from_mass(shape, m2=m2, g=g, half=half)
    found = theory.mass_parameters(half)
    np.testing.assert_allclose(found, (m2, g), rtol=1e-11, atol=1e-11)
    again = lfq.Phi4.from_mass(shape, *found, half=half)
    np.testing.assert_allclose((again.beta, again.lam), (theory.beta, theory.lam), rtol=1e-10)


@LATTICES
@pytest.mark.parametrize("half", [True, False])
def test_couplings_round_trip(shape, half):
    for beta, lam in [(0.576 / len(shape), 0.5), (0.05, 3.0), (0.9 / len(shape), 0.0), (2.0, 0.01)]:
        theory = lfq.Phi4(shape, beta, lam)
        again = lfq.Phi4.from_mass(shape, *theory.mass_parameters(half), half=half)
        np.testing.assert_allclose((again.beta, again.lam), (beta, lam), rtol=1e-10, atol=1e-14)


def test_the_conventions_by_hand():
    """D = 2, lam = beta = 1/2: m2 = -4, g = 2 and a field factor sqrt(1/2); without the half, 8 and 1/2."""
    theory = lfq.Phi4((4, 4), beta=0.5, lam=0.5)
    assert theory.mass_parameters() == pytest.approx((-4, 2), rel=1e-15)
    assert theory.mass_parameters(half=False) == pytest.approx((-4, 8), rel=1e-15)
    assert theory.field_to_mass(2.0) == pytest.approx(math.sqrt(2))
    assert theory.field_to_mass(2.0, half=False) == pytest.approx(1)
    assert theory.field_from_mass(1.0, half=False) == pytest.approx(2)
    assert theory.kappa == 0.25


@pytest.mark.parametrize("half", [True, False])
def test_fields_round_trip(half, rng, dtype):
    theory, phi = lfq.Phi4((4, 4), beta=0.6, lam=0.5), rng.normal(size=(3, 4, 4)).astype(dtype)
    kept = phi.copy()
    there = theory.field_to_mass(phi, half)
    assert there.dtype == dtype and np.abs(there - phi).max() > 0.1
    np.testing.assert_allclose(theory.field_from_mass(there, half), phi, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(phi, kept)


def test_the_free_mass_theory_has_its_mass():
    """g = 0: beta = 2 / (m2 + 2 D), and G(0) = 1 / m2 in the field of that convention."""
    for half in (True, False):
        theory = lfq.Phi4.from_mass((4, 4), m2=0.8, g=0.0, half=half)
        assert (theory.beta, theory.lam) == (pytest.approx(2 / 4.8), 0)
        propagator = theory.beta / (2 - 4 * theory.beta)
        assert propagator == pytest.approx(1 / 0.8)


# ---- the action as a function ---------------------------------------------------------------


@LATTICES
def test_force_is_minus_the_gradient(shape, rng):
    theory = lfq.Phi4(shape, 0.2, 0.6)
    phi, v = rng.normal(size=(3, *shape)), rng.normal(size=(3, *shape))
    h = 1e-5
    wanted = -(theory.action(phi + h * v) - theory.action(phi - h * v)) / (2 * h)
    np.testing.assert_allclose(site_sum(theory.force(phi) * v, shape), wanted, rtol=0, atol=1e-7)


def test_arrays_of_any_kind(rng):
    theory = lfq.Phi4((4, 6), 0.4, 0.5)
    phi = rng.integers(-3, 4, size=(2, 3, 4, 6)).astype(np.float64)
    action, force, measured = theory.action(phi), theory.force(phi), theory.measure(phi)
    assert action.shape == (2, 3) and force.shape == phi.shape and set(measured) == set(OBSERVABLES)
    for variant in [
        np.asfortranarray(phi), phi.astype(int), phi.astype(np.float16), phi.astype(">f8"), phi.tolist(),
        np.repeat(phi, 2, axis=-1)[..., ::2],
    ]:  # fmt: skip
        np.testing.assert_array_equal(theory.action(variant), action)
        np.testing.assert_array_equal(theory.force(variant), force)
        for name, values in theory.measure(variant).items():
            np.testing.assert_array_equal(values, measured[name])
    single = phi.astype(np.float32)
    assert theory.force(single).dtype == np.float32 and theory.action(single).dtype == np.float64
    for index in np.ndindex(2, 3):
        assert theory.action(phi[index]) == action[index] and theory.action(phi[index]).shape == ()
    assert theory.action(np.zeros((0, 4, 6))).shape == (0,)
    phi.flags.writeable = False
    assert not np.shares_memory(theory.force(phi), phi)


def test_threads_do_not_change_a_bit(rng, dtype):
    theory, phi = lfq.Phi4((8, 8), 0.5, 0.5), rng.normal(size=(70, 8, 8)).astype(dtype)
    for n_threads in (2, 3):
        np.testing.assert_array_equal(theory.action(phi, n_threads), theory.action(phi, 1))
        np.testing.assert_array_equal(theory.force(phi, n_threads), theory.force(phi, 1))
        for name, values in theory.measure(phi, n_threads).items():
            np.testing.assert_array_equal(values, theory.measure(phi, 1)[name])


def test_a_theory_is_a_value():
    theory = lfq.Phi4([4, np.int64(6)], beta=np.float32(0.5), lam=1)
    assert theory == lfq.Phi4((4, 6), 0.5, 1.0) and hash(theory) == hash(lfq.Phi4((4, 6), 0.5, 1.0))
    assert theory.shape == (4, 6) and isinstance(theory.beta, float) and isinstance(theory.lam, float)
    assert (theory.ndim, theory.volume) == (2, 24)
    with pytest.raises(AttributeError):
        theory.beta = 0.3


# ---- the pullback ---------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["affine", "upsampled"])
def test_pullback_is_the_action_of_the_field_less_log_det(structure, rng):
    flow = lfq.AffineFlow(hidden=(3,), bias=True)
    flow.weights = 0.2 * rng.normal(size=flow.n_weights)
    if structure == "upsampled":
        flow = lfq.Compose([lfq.UpsampleMap(1.3, 0.5), flow])
    theory = lfq.Phi4((4, 6), 0.4, 0.5)
    pulled, z = theory.pullback(flow), rng.normal(size=(3, 4, 6))
    x, log_det = flow.forward(z)
    np.testing.assert_allclose(pulled.action(z), theory.action(x) - log_det, rtol=0, atol=1e-11)
    np.testing.assert_allclose(pulled.force(z), flow.vjp(z, theory.force(x), 1.0), rtol=0, atol=1e-11)
    np.testing.assert_array_equal(pulled.field(z), x)
    np.testing.assert_allclose(pulled.latent(x), z, rtol=0, atol=1e-12)
    assert (pulled.shape, pulled.ndim, pulled.volume) == ((4, 6), 2, 24)


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(), (0, 4), (-4, 4), (4, 2.5), (4.0, 4), "44x", 8, None, (4,) * 5, (2**31, 4), (2**16, 2**16)],
    ids=str,
)
def test_bad_shapes(shape):
    for make in (
        lambda: lfq.Phi4(shape, 0.1, 0.5),
        lambda: lfq.Phi4.from_kappa(shape, 0.1, 0.5),
        lambda: lfq.Phi4.from_mass(shape, 0.1, 0.5),
    ):
        with pytest.raises(ValueError, match="shape: "):
            make()


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: lfq.Phi4((4, 4), 0.5, -0.1), ValueError, "lam: .*unbounded"),
        (lambda: lfq.Phi4((4, 4), 0.5, -1e-300), ValueError, "lam: "),
        (lambda: lfq.Phi4((4, 4), math.nan, 0.5), ValueError, "beta: must be finite"),
        (lambda: lfq.Phi4((4, 4), math.inf, 0.5), ValueError, "beta: must be finite"),
        (lambda: lfq.Phi4((4, 4), 0.5, math.nan), ValueError, "lam: must be finite"),
        (lambda: lfq.Phi4((4, 4), 0.5, math.inf), ValueError, "lam: must be finite"),
        (lambda: lfq.Phi4((4, 4), "half", 0.5), TypeError, "beta: must be a number"),
        (lambda: lfq.Phi4((4, 4), 0.5, None), TypeError, "lam: must be a number"),
        (lambda: lfq.Phi4((4, 4), 0.5 + 1j, 0.5), TypeError, "beta: must be a number"),
        (lambda: lfq.Phi4((4, 4), 0.5, 0.0), ValueError, "beta: .*free theory"),
        (lambda: lfq.Phi4((4, 4), -0.5, 0.0), ValueError, "beta: .*free theory"),
        (lambda: lfq.Phi4((8,), 1.0, 0.0), ValueError, "beta: .*free theory"),
        (lambda: lfq.Phi4((2, 2, 2, 2), 0.25, 0.0), ValueError, "beta: .*free theory"),
        (lambda: lfq.Phi4.from_kappa((4, 4), math.nan, 0.5), ValueError, "kappa: must be finite"),
        (lambda: lfq.Phi4.from_kappa((4, 4), "k", 0.5), TypeError, "kappa: must be a number"),
        (lambda: lfq.Phi4.from_kappa((4, 4), 0.1, -0.5), ValueError, "lam: .*unbounded"),
        (lambda: lfq.Phi4.from_kappa((4, 4), 0.25, 0.0), ValueError, "free theory"),
        (lambda: lfq.Phi4.from_mass((4, 4), -1.0, -0.1), ValueError, "g: .*unbounded"),
        (lambda: lfq.Phi4.from_mass((4, 4), math.nan, 0.1), ValueError, "m2: must be finite"),
        (lambda: lfq.Phi4.from_mass((4, 4), 1.0, math.inf), ValueError, "g: must be finite"),
        (lambda: lfq.Phi4.from_mass((4, 4), "m", 0.1), TypeError, "m2: must be a number"),
        (lambda: lfq.Phi4.from_mass((4, 4), -5.0, 0.0), ValueError, "m2: "),
        (lambda: lfq.Phi4.from_mass((4, 4), 0.0, 0.0), ValueError, "free theory|m2"),
        (lambda: lfq.Phi4.from_mass((4, 4), -0.5, 0.0), ValueError, "free theory|m2"),
        (lambda: lfq.Phi4((4, 4), 0.0, 0.5).mass_parameters(), ValueError, "beta: "),
        (lambda: lfq.Phi4((4, 4), -0.1, 0.5).field_to_mass(1.0), ValueError, "beta: "),
        (lambda: lfq.Phi4((4, 4), -0.1, 0.5).field_from_mass(1.0), ValueError, "beta: "),
        (lambda: lfq.Phi4((4, 6, 4), 0.1, 0.5).pullback(lfq.AffineFlow()), ValueError, "axes"),
        (lambda: lfq.Phi4((4, 5), 0.1, 0.5).pullback(lfq.AffineFlow()), ValueError, "odd"),
    ],
)
def test_bad_couplings(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("method", ["action", "force", "measure"])
def test_bad_fields(method):
    call = getattr(lfq.Phi4((4, 6), 0.4, 0.5), method)
    for shape in [(4,), (6, 4), (4, 6, 1), (6,), (), (2, 4, 5)]:
        with pytest.raises(ValueError, match=r"phi: shape .*\(4, 6\)"):
            call(np.zeros(shape))
    for dtype in (complex, np.complex64, bool, object, "U3", "M8[s]"):
        with pytest.raises(TypeError, match="phi: "):
            call(np.zeros((4, 6), dtype))
    for value in (np.nan, np.inf, -np.inf):
        for dtype in (np.float32, np.float64):
            phi = np.zeros((20, 4, 6), dtype)
            phi[17, 2, 3] = value
            with pytest.raises(lfq.NotFiniteError, match="phi: chain 17 .*site 15"):
                call(phi)
    large = lfq.Phi4((64, 64), 0.4, 0.5)
    phi = np.zeros((3, 64, 64))
    phi[1, 50, 7] = np.nan
    with pytest.raises(lfq.NotFiniteError, match=f"phi: chain 1 .*site {50 * 64 + 7}"):
        getattr(large, method)(phi)
    for n_threads, error in [(-1, ValueError), (1.5, TypeError), ("2", TypeError)]:
        with pytest.raises(error, match="n_threads: "):
            call(np.zeros((4, 6)), n_threads=n_threads)


def test_a_nan_is_a_value_error_and_an_arithmetic_error():
    assert issubclass(lfq.NotFiniteError, ValueError) and issubclass(lfq.NotFiniteError, ArithmeticError)


def test_bad_latents(rng):
    pulled = lfq.Phi4((4, 6), 0.4, 0.5).pullback(lfq.AffineFlow())
    for call in (pulled.action, pulled.force):
        with pytest.raises(ValueError, match="z: shape"):
            call(np.zeros((4, 4)))
        with pytest.raises(lfq.NotFiniteError, match="z: chain 0"):
            call(np.full((4, 6), np.nan))


# ---- the installation -----------------------------------------------------------------------


def test_info():
    found = lfq.info()
    gpu = {"cuda_built", "cuda_architectures", "cupy", "gpu", "gpu_missing"}
    assert set(found) == {"version", "isa", "isas", "threads", "library"} | gpu
    assert found["cuda_built"] == (found["cuda_architectures"] is not None)
    assert (found["gpu"] is None) <= (found["gpu_missing"] is not None)
    assert found["version"] == lfq.__version__
    assert found["isa"] in found["isas"] and len(set(found["isas"])) == len(found["isas"])
    assert found["threads"] >= 1 and isinstance(found["cuda_built"], bool)


def test_info_follows_the_instruction_set(isa):
    assert lfq.info()["isa"] == isa
