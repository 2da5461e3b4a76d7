"""The local heat bath: the chain of lfq/reference.py, and the exact conditional density of every site.

Statistical tests have fixed seeds and say how many sigma they allow.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad

import lfq
from lfq import reference

# Odd extents, axes of one site and of two, and lattices that are and are not spread over the lanes of a vector.
SHAPES = [(9,), (2,), (13, 6), (3, 2), (1, 4), (16, 16), (3, 3), (4, 6, 8), (3, 2, 5, 4), (1,)]
LARGE = [(64, 64), (24, 172), (32, 129)]


def updated(theory, phi, n_sweeps, seed, trajectory, first_chain):
    """One trajectory of the kernel, and the sites that changed."""
    sampler = lfq.HeatBath(theory, n_sweeps, dtype=str(phi.dtype))
    block = sampler.advance(lfq.State(phi, trajectory, seed, first_chain), 1)
    changed = block.accepted[0] * n_sweeps * theory.volume
    return block.phi, changed.round().astype(int)


def assert_is_reference(theory, phi, n_sweeps):
    seed, trajectory, first_chain = 0x123456789ABCDEF, (1 << 40) + 3, 5
    kept = phi.copy()
    found, changed = updated(theory, phi, n_sweeps, seed, trajectory, first_chain)
    wanted, count = reference.heat_bath(
        phi, theory.beta, theory.lam, n_sweeps, seed, trajectory, first_chain, phi.dtype
    )
    assert found.dtype == phi.dtype
    np.testing.assert_array_equal(phi, kept)
    np.testing.assert_array_equal(changed, count)
    # float32: a proposal's mean and width carry rounding errors of the neighbours' sum into the next parity.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=400 * np.finfo(phi.dtype).eps)
    assert (found != phi).mean() > 0.2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta, lam", [(0.6, 0.5), (-0.4, 0.5), (0.3, 1.1), (0.2, 0.1), (0.2, 0.0)])
def test_chains_match_the_reference(isa, dtype, shape, beta, lam, rng):
    phi = rng.normal(size=(3, *shape)).astype(dtype)
    assert_is_reference(lfq.Phi4(shape, beta, lam), phi, 2)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_lattices_match_the_reference(isa, dtype, shape, rng):
    """Slabs in the lanes of a vector, or not, where their depth would be odd."""
    assert_is_reference(lfq.Phi4(shape, 0.6, 0.5), 0.5 * rng.normal(size=(2, *shape)).astype(dtype), 1)


@pytest.mark.parametrize("cluster", ["swendsen-wang", "wolff"])
def test_sweeps_and_clusters_in_turn_match_the_reference(isa, cluster, rng):
    """More chains than a task takes."""
    theory = lfq.Phi4((6, 4), 0.5, 0.5)
    sampler = lfq.HeatBath(theory, n_sweeps=2, cluster=cluster, n_updates=2)
    start = sampler.start(19, seed=9, first_chain=3)
    block = sampler.advance(start, 3, thin=2)
    phi = start.latent
    for i in range(6):
        phi, changed = reference.heat_bath(phi, 0.5, 0.5, 2, 9, i, 3)
        np.testing.assert_allclose(block.accepted[i], changed / 48)
        phi, flipped = reference.cluster_update(phi, 0.5, cluster, 2, 9, i, 3)
        np.testing.assert_array_equal(block.flipped[i], flipped)
    np.testing.assert_allclose(block.phi, phi, atol=1e-11)
    np.testing.assert_allclose(block.observables["M"][-1], phi.mean(axis=(1, 2)), atol=1e-12)
    assert (block.dh == 0).all()


def distribution(a, lam, b):
    """Mass and distribution function of exp(-a x^2 - lam x^4 + b x) on a fine grid."""
    x = np.linspace(-9, 9, 60001)
    exponent = -a * x**2 - lam * x**4 + b * x
    density = np.exp(exponent - exponent.max())
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return x, cumulative / cumulative[-1]


def kolmogorov(samples, x, cumulative):
    """sqrt(n) times the largest distance of the samples' distribution function from the exact one; above 1.95 once in
    1000 times."""
    n, found = len(samples), np.interp(np.sort(samples), x, cumulative)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - found).max(), (found - steps[:-1]).max())


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 1.1, 10.0])
@pytest.mark.parametrize("b", [0.0, 0.8, -4.0])
def test_sites_have_their_conditional_density(lam, b, dtype):
    """Sites that changed, from any old value: Kolmogorov and Smirnov's test, one in 1000; and so many changed as the
    acceptance says, to 4 sigma. A density whose exponent is 20% smaller fails."""
    theory, n = lfq.Phi4((2,), 0.4, lam), 40000
    phi = np.full((n, 2), b / (2 * theory.beta))  # two neighbours, one site
    phi[:, 0] = 7.0
    sampler = lfq.HeatBath(theory, dtype=str(dtype))
    site = sampler.advance(lfq.State(phi, 0, 17), 1, measure=False).phi[:, 0].astype(np.float64)
    changed = site[site != 7.0]
    a = 1 - 2 * lam
    assert kolmogorov(changed, *distribution(a, lam, b)) < 1.95
    assert kolmogorov(changed, *distribution(0.8 * a, 0.8 * lam, 0.8 * b)) > 1.95

    alpha, c = (float(found[0]) for found in reference.heat_bath_proposal(a, lam, np.array([b])))
    mean, sigma = b / (2 * alpha), math.sqrt(0.5 / alpha)
    accept = quad(
        lambda y: math.exp(-0.5 * y * y - lam * ((mean + sigma * y) ** 2 - c) ** 2) / math.sqrt(2 * math.pi), -9, 9
    )[0]
    expected = 1 - (1 - accept) ** 2
    assert abs(len(changed) / n - expected) <= 4 * math.sqrt(expected * (1 - expected) / n)
    if lam <= 0.5:
        assert accept > 0.57


def test_a_site_that_stays_leaves_the_density_as_it_is():
    """The whole sweep, sites that stay included, of fields that have the conditional density: it keeps it."""
    lam, b, n = 3.0, 0.5, 60000
    x, cumulative = distribution(1 - 2 * lam, lam, b)
    theory = lfq.Phi4((2,), 0.4, lam)
    phi = np.full((n, 2), b / (2 * theory.beta))
    phi[:, 0] = np.interp(np.random.default_rng(5).uniform(size=n), cumulative, x)
    assert kolmogorov(phi[:, 0], x, cumulative) < 1.95
    block = lfq.HeatBath(theory).advance(lfq.State(phi, 0, 18), 1, measure=False)
    stayed = (block.phi[:, 0] == phi[:, 0]).mean()
    assert 0.3 < stayed < 0.6
    assert kolmogorov(block.phi[:, 0], x, cumulative) < 1.95


def test_no_start_is_too_far():
    """Fields from which no trajectory of HMC comes back do within some sweeps, in either type."""
    theory = lfq.Phi4((8, 8), 0.6, 0.5)
    for dtype, size in (("float64", 1e20), ("float32", 1e8)):
        sampler = lfq.HeatBath(theory, dtype=dtype)
        state = sampler.start(16, 3, phi=np.full((16, 8, 8), size))
        phi = sampler.advance(state, 1, 400, measure=False).phi
        assert np.abs(phi).max() < 5


def test_clusters_take_over_from_the_heat_bath_near_criticality():
    """L = 16, beta = 0.634: tau_int of M^2 of fewer than 3 trajectories against more than 9."""
    theory = lfq.Phi4((16, 16), 0.634, 0.5)
    alone, clusters = lfq.HeatBath(theory), lfq.HeatBath(theory, cluster="swendsen-wang")
    taus = [
        lfq.analysis.integrated_time(sampler.sample(64, 1000, n_warmup=200, seed=3).observables["M2"])
        for sampler in (alone, clusters)
    ]
    assert taus[0] > 9 and taus[1] < 3


def test_what_is_not_finite_is_named():
    sampler = lfq.HeatBath(lfq.Phi4((4, 4), 0.5, 0.5))
    phi = np.ones((20, 4, 4))
    phi[13, 1, 2] = np.inf
    for one in (sampler, replace(sampler, cluster="wolff")):
        with pytest.raises(lfq.NotFiniteError, match="chain 13 has inf at site 6"):
            one.advance(lfq.State(phi, 0, 1), 1)
