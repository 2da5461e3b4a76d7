"""Priors: densities against brute force with NumPy and SciPy, samples against the theories they come from.

Statistical tests use independent samples and fixed seeds; each says how many sigma it allows.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, norm

import lfq

COARSE = {1: lfq.Phi4((6,), beta=0.5, lam=0.3), 2: lfq.Phi4((4, 6), beta=0.4, lam=0.5)}
WIDTHS, MEANS, SCALE = (0.3, 0.7), (0.9, 0.6), 1.4


def upsample(coarse, **chain):
    d = coarse.ndim
    return lfq.Upsample(coarse, width=WIDTHS[:d], scale=SCALE, interpolation=MEANS[:d], **chain)


def make(kind, ndim=2, **chain):
    coarse = COARSE[ndim]
    fine = tuple(2 * extent for extent in coarse.shape)
    return {
        "gaussian": lambda: lfq.Gaussian(fine),
        "lattice": lambda: lfq.Lattice(lfq.Phi4(fine, beta=0.3, lam=0.5), **chain),
        "interleave": lambda: lfq.Interleave(coarse, **chain),
        "upsample": lambda: upsample(coarse, **chain),
    }[kind]()


KINDS = pytest.mark.parametrize("kind", ["gaussian", "lattice", "interleave", "upsample"])
DIMENSIONS = pytest.mark.parametrize("ndim", [1, 2])


def interpolation_1d(z):
    """Mean of the two even neighbours of each odd site, by an explicit loop."""
    n = len(z) // 2
    return [(z[2 * i] + z[(2 * i + 2) % (2 * n)]) / 2 for i in range(n)]


def residuals(z):
    """(noise / width, width) of every site that is not on the coarse lattice, by explicit loops."""
    if z.ndim == 1:
        means = interpolation_1d(z)
        return [((z[2 * i + 1] - MEANS[0] * mean) / WIDTHS[0], WIDTHS[0]) for i, mean in enumerate(means)]
    n, m = z.shape
    found = []
    for i, j in itertools.product(range(n), range(m)):
        above, below, left, right = (i - 1) % n, (i + 1) % n, (j - 1) % m, (j + 1) % m
        if i % 2 and j % 2:
            c, mean = 1, (z[above, left] + z[above, right] + z[below, left] + z[below, right]) / 4
        elif i % 2:
            c, mean = 0, (z[above, j] + z[below, j]) / 2
        elif j % 2:
            c, mean = 0, (z[i, left] + z[i, right]) / 2
        else:
            continue
        found.append(((z[i, j] - MEANS[c] * mean) / WIDTHS[c], WIDTHS[c]))
    return found


# ---- densities ------------------------------------------------------------------------------


def test_gaussian_density(dtype, rng):
    z = rng.normal(size=(7, 4, 6)).astype(dtype)
    wanted = norm.logpdf(z.astype(np.float64)).sum(axis=(1, 2))
    np.testing.assert_allclose(lfq.Gaussian((4, 6)).log_prob(z), wanted, rtol=1e-13)


def test_lattice_density(rng):
    prior = make("lattice")
    z = rng.normal(size=(7, *prior.shape))
    np.testing.assert_allclose(prior.log_prob(z), -prior.theory.action(z), rtol=1e-13)


@DIMENSIONS
def test_interleave_density_is_that_of_its_sublattices(ndim, rng):
    coarse = COARSE[ndim]
    z = rng.normal(size=(7, *(2 * extent for extent in coarse.shape)))
    if ndim == 1:
        parts = [z[:, 0::2], z[:, 1::2]]
    else:
        parts = [z[:, 0::2, 0::2], z[:, 0::2, 1::2], z[:, 1::2, 0::2], z[:, 1::2, 1::2]]
    wanted = -sum(coarse.action(part) for part in parts)
    np.testing.assert_allclose(lfq.Interleave(coarse).log_prob(z), wanted, rtol=1e-12)


@DIMENSIONS
def test_upsample_density_by_loops(ndim, rng):
    coarse = COARSE[ndim]
    prior = upsample(coarse)
    z = rng.normal(size=(5, *prior.shape))
    even = z[(slice(None), *[slice(0, None, 2)] * ndim)]
    wanted = -coarse.action(even / SCALE) - coarse.volume * math.log(SCALE)
    for i in range(len(z)):
        found = residuals(z[i])
        assert len(found) == prior.base.n_noise == coarse.volume * (2**ndim - 1)
        wanted[i] += sum(norm.logpdf(r) - math.log(width) for r, width in found)
    np.testing.assert_allclose(prior.log_prob(z), wanted, rtol=1e-12)


def precision(extent, beta):
    """Of the free theory on a ring: S = phi P phi / 2."""
    ring = np.roll(np.eye(extent), 1, axis=0)
    return 2 * np.eye(extent) - beta * (ring + ring.T)


@pytest.mark.parametrize("kind", ["lattice", "interleave", "upsample"])
def test_free_theory_density_is_the_normalised_one_up_to_its_constant(kind, rng):
    """lam = 0, D = 1: multivariate normals, with covariances made here."""
    n, beta = 4, 0.6
    coarse = lfq.Phi4((n,), beta=beta, lam=0.0)
    covariance = np.linalg.inv(precision(n, beta))
    if kind == "lattice":
        prior, exact = lfq.Lattice(coarse), covariance
    elif kind == "interleave":
        prior, exact = lfq.Interleave(coarse), np.zeros((2 * n, 2 * n))
        exact[0::2, 0::2] = exact[1::2, 1::2] = covariance
    else:
        prior, exact = upsample(coarse), np.zeros((2 * n, 2 * n))
        exact[:n, :n], exact[n:, n:] = covariance, np.eye(n)
        jacobian = np.zeros((2 * n, 2 * n))
        for i in range(n):
            jacobian[2 * i, i] = SCALE
        for i, mean in enumerate(interpolation_1d(jacobian)):
            jacobian[2 * i + 1] = MEANS[0] * mean
            jacobian[2 * i + 1, n + i] = WIDTHS[0]
        exact = jacobian @ exact @ jacobian.T
    z = rng.normal(size=(9, len(exact)))
    wanted = multivariate_normal(np.zeros(len(exact)), exact).logpdf(z)
    found = prior.log_prob(z)
    np.testing.assert_allclose(found - found[0], wanted - wanted[0], rtol=0, atol=1e-11)
    # The constant is that of the coarse theories alone: log Z = n/2 log 2 pi - log det P / 2 of each copy.
    copies = 2 if kind == "interleave" else 1
    log_z = 0.5 * n * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(precision(n, beta))[1]
    np.testing.assert_allclose(found - wanted, copies * log_z, rtol=0, atol=1e-11)


@KINDS
def test_density_takes_any_leading_axes_and_leaves_its_argument_alone(kind, rng):
    prior = make(kind)
    z = rng.normal(size=(2, 3, *prior.shape))
    kept = z.copy()
    found = prior.log_prob(z)
    np.testing.assert_array_equal(z, kept)
    assert found.shape == (2, 3) and found.dtype == np.float64
    single = prior.log_prob(z[1, 2])
    assert single.shape == () and single == found[1, 2]
    np.testing.assert_array_equal(prior.log_prob(np.asfortranarray(z)), found)
    np.testing.assert_allclose(prior.log_prob(z.astype(np.float32)), found, rtol=1e-5, atol=1e-3)


# ---- samples --------------------------------------------------------------------------------


@KINDS
@DIMENSIONS
def test_sample_shapes_and_dtypes(kind, ndim, dtype):
    prior = make(kind, ndim, n_warmup=5)
    for given in (dtype, str(dtype)):
        z = prior.sample(7, seed=3, dtype=given)
        assert z.shape == (7, *prior.shape) and z.dtype == dtype
        assert np.isfinite(z).all() and np.isfinite(prior.log_prob(z)).all()
    assert prior.shape == tuple(2 * extent for extent in COARSE[ndim].shape)
    assert prior.base.volume == math.prod(prior.shape)


@KINDS
def test_samples_depend_on_the_seed_alone(kind):
    prior = make(kind, n_warmup=10)
    z = prior.sample(20, seed=4)
    np.testing.assert_array_equal(prior.sample(20, seed=4), z)
    for n_threads in (1, 2):
        np.testing.assert_array_equal(prior.sample(20, seed=4, n_threads=n_threads), z)
    assert (prior.sample(20, seed=5) != z).all()
    assert len(np.unique(z)) == z.size


def test_gaussian_samples_are_unit_normals():
    """Kolmogorov-Smirnov at p > 1e-3."""
    z = lfq.Gaussian((4, 6)).sample(2000, seed=6)
    assert kstest(z.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(lfq.Gaussian((4, 6)).sample(2000, seed=6, dtype="float32"), z, atol=2e-5)


def assert_zero_mean(products, sigma=4.0):
    """Mean over the first axis, of independent entries."""
    error = products.std(axis=0, ddof=1) / math.sqrt(len(products))
    assert (np.abs(products.mean(axis=0)) < sigma * error).all()


def sublattices(z):
    return [z[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]


def test_interleave_sublattices_are_independent():
    """M, phi^2 and fields of different copies, and M of consecutive samples, are uncorrelated: 4 sigma."""
    z = lfq.Interleave(COARSE[2], n_warmup=100).sample(3000, seed=7)
    parts = sublattices(z)
    m = np.stack([part.mean(axis=(1, 2)) for part in parts], axis=1)
    square = np.stack([(part**2).mean(axis=(1, 2)) for part in parts], axis=1)
    square = square - square.mean(axis=0)
    for a, b in itertools.combinations(range(4), 2):
        assert_zero_mean(m[:, a] * m[:, b])
        assert_zero_mean(square[:, a] * square[:, b])
        assert_zero_mean((parts[a] * parts[b]).mean(axis=(1, 2)))
    flat = m.reshape(-1)
    assert_zero_mean(flat[:-1] * flat[1:])
    # Within one copy they are correlated: the check has power.
    inside = (parts[0] * np.roll(parts[0], 1, axis=2)).mean(axis=(1, 2))
    assert inside.mean() > 10 * inside.std(ddof=1) / math.sqrt(len(inside))


# <phi^2> of the 8 x 8 lattice at beta = 0.576, lam = 0.5 from an independent HMC + Swendsen-Wang code.
PHI2 = 0.6363605


@pytest.mark.parametrize("kind", ["lattice", "interleave", "upsample"])
def test_coarse_samples_reproduce_the_coarse_theory(kind):
    """4 sigma, over independent fields."""
    coarse = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
    if kind == "lattice":
        parts = [lfq.Lattice(coarse).sample(4000, seed=8)]
    elif kind == "interleave":
        parts = sublattices(lfq.Interleave(coarse).sample(1000, seed=8))
    else:
        parts = [upsample(coarse).sample(4000, seed=8)[:, ::2, ::2] / SCALE]
    for part in parts:
        phi2 = (part**2).mean(axis=(1, 2))
        assert phi2.std() / math.sqrt(len(phi2)) < 0.01
        assert_zero_mean(phi2 - PHI2)
        assert_zero_mean(part.mean(axis=(1, 2)))


def test_coarse_samples_of_a_free_theory():
    """Variance and correlation at every distance of a ring, 4 sigma."""
    n, beta = 6, 0.7
    z = lfq.Lattice(lfq.Phi4((n,), beta=beta, lam=0.0), tau=1.3).sample(4000, seed=9)
    covariance = np.linalg.inv(precision(n, beta))
    for distance in range(n):
        assert_zero_mean((z * np.roll(z, distance, axis=1)).mean(axis=1) - covariance[0, distance])


@DIMENSIONS
def test_upsample_noise_is_what_the_density_says(ndim):
    """Residuals over the widths are unit normals (KS, p > 1e-3) that ignore the coarse field (4 sigma)."""
    z = upsample(COARSE[ndim], n_warmup=20).sample(300, seed=10)
    found = np.array([[r for r, _ in residuals(one)] for one in z])
    assert kstest(found.ravel(), "norm").pvalue > 1e-3
    magnetisation = z[(slice(None), *[slice(0, None, 2)] * ndim)].reshape(len(z), -1).mean(axis=1)
    assert_zero_mean(found.mean(axis=1) * magnetisation)


@KINDS
def test_batches_move_on_between_trajectories(kind):
    """n_warmup = 0 is the start of the chains; more of it changes the sample."""
    if kind == "gaussian":
        assert make(kind).base.start(5, 0, "float64") is None
        return
    first = make(kind, n_warmup=0).base.start(5, 0, "float64")
    later = make(kind, n_warmup=3).base.start(5, 0, "float64")
    assert (first.trajectory, later.trajectory) == (0, 3)
    assert not np.array_equal(first.latent, later.latent)
    assert first.n_chains == {"lattice": 5, "interleave": 20, "upsample": 5}[kind]


# ---- Upsample's parameters ------------------------------------------------------------------


def test_upsample_parameters():
    prior = lfq.Upsample(COARSE[2], width=(0.2, 0.4), scale=1.5, interpolation=0.8)
    np.testing.assert_allclose(prior.width, [0.2, 0.4], rtol=1e-14)
    np.testing.assert_allclose(prior.interpolation, [0.8, 0.8])
    assert prior.scale == pytest.approx(1.5, rel=1e-14)
    paper = lfq.Upsample(COARSE[2])
    np.testing.assert_allclose(paper.width, 0.1, rtol=1e-14)
    assert paper.scale == 1 and (paper.interpolation == 1).all()


def test_other_map_weights_make_another_prior():
    prior = lfq.Upsample(COARSE[2], n_between=3, n_warmup=4, tau=0.7, n_steps=5)
    weights = prior.map.weights + 0.25
    twin = prior.with_map_weights(weights)
    np.testing.assert_array_equal(twin.map.weights, weights)
    assert prior.scale == 1 and twin.scale == pytest.approx(math.exp(0.25))
    assert (twin.base.n_between, twin.base.n_warmup, twin.base.tau, twin.base.n_steps) == (3, 4, 0.7, 5)
    gaussian = make("gaussian")
    assert gaussian.with_map_weights(np.empty(0)) is gaussian


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda t: lfq.Gaussian(()), ValueError, "shape"),
        (lambda t: lfq.Gaussian((4, 0)), ValueError, "shape"),
        (lambda t: lfq.Gaussian((4, 2.5)), ValueError, "shape"),
        (lambda t: lfq.Gaussian(8), ValueError, "shape"),
        (lambda t: lfq.Lattice(t, n_between=0), ValueError, "n_between"),
        (lambda t: lfq.Interleave(t, n_between=2.5), TypeError, "n_between"),
        (lambda t: lfq.Interleave(t, n_warmup=-1), ValueError, "n_warmup"),
        (lambda t: lfq.Upsample(t, tau=0), ValueError, "tau"),
        (lambda t: lfq.Upsample(t, n_steps=0), ValueError, "n_steps"),
        (lambda t: lfq.Interleave(t, warmup=3), TypeError, "warmup"),
        (lambda t: lfq.Upsample(t, width=0), ValueError, "width"),
        (lambda t: lfq.Upsample(t, width=(0.1, -0.1)), ValueError, "width"),
        (lambda t: lfq.Upsample(t, width=np.nan), ValueError, "width"),
        (lambda t: lfq.Upsample(t, scale=0), ValueError, "scale"),
        (lambda t: lfq.Upsample(t, scale=np.inf), ValueError, "scale"),
        (lambda t: lfq.Upsample(t, interpolation=np.nan), ValueError, "interpolation"),
    ],
)
def test_bad_settings(call, error, match):
    with pytest.raises(error, match=match):
        call(lfq.Phi4((4, 4), beta=0.5, lam=0.5))


@KINDS
@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(n=0, seed=1), ValueError, "n: "),
        (dict(n=-3, seed=1), ValueError, "n: "),
        (dict(n=2.5, seed=1), TypeError, "n: "),
        (dict(n=2, seed=-1), ValueError, "seed"),
        (dict(n=2, seed=2**64), ValueError, "seed"),
        (dict(n=2, seed=0.5), TypeError, "seed"),
        (dict(n=2, seed=1, dtype="float16"), ValueError, "dtype"),
        (dict(n=2, seed=1, n_threads=-1), ValueError, "n_threads"),
    ],
)
def test_bad_sample_arguments(kind, arguments, error, match):
    with pytest.raises(error, match=match):
        make(kind).sample(**arguments)


@KINDS
def test_bad_fields(kind):
    prior = make(kind)
    n, m = prior.shape
    for shape in [(n, m + 2), (m,), (), (n, m, 3)]:
        with pytest.raises(ValueError, match="z: shape"):
            prior.log_prob(np.zeros(shape))
    with pytest.raises(TypeError, match="z: "):
        prior.log_prob(np.zeros((n, m), complex))


@pytest.mark.parametrize("kind", ["lattice", "interleave", "upsample"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_field_that_is_not_finite(kind, value):
    prior = make(kind)
    z = np.zeros((3, *prior.shape))
    z[1, 2, 3] = value
    with pytest.raises(lfq.NotFiniteError):
        prior.log_prob(z)


def test_a_lattice_that_cannot_be_halved_is_no_problem_of_the_coarse_one():
    """Coarse lattices may have odd extents: only the fine one needs a checkerboard."""
    prior = upsample(lfq.Phi4((3, 5), beta=0.4, lam=0.5), n_warmup=2)
    z = prior.sample(3, seed=1)
    assert z.shape == (3, 6, 10) and np.isfinite(prior.log_prob(z)).all()
