"""Cluster updates, Fourier acceleration and trajectories of random length: exact against lfq/reference.py, right in
distribution, and the same bits whatever the batch.

Statistical tests run many independent chains from fixed seeds; an error is the standard deviation of
the chains' means over the square root of their number. Each says how many sigma it allows.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from test_hmc import assert_same_blocks

import lfq
from lfq import _core, analysis, reference
from lfq.observables import virial

SHAPES = [(9,), (13, 6), (2, 3), (1, 4), (16, 16), (4, 6, 8), (3, 2, 5, 4)]
CLUSTERS = pytest.mark.parametrize("cluster", ["swendsen-wang", "wolff"])
SMALL = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
# Of SMALL, from an independent code: (value, one standard error).
INDEPENDENT = {
    "phi2": (0.6363605, 5.4e-5),
    "phi4": (0.8002626, 1.1e-4),
    "chi": (6.506331, 5.2e-3),
    "nn": (0.2606352, 7.6e-5),
}


def make(kind, theory, **settings):
    """A sampler by its name here; a heat bath has no use for some settings."""
    common = {key: value for key, value in settings.items() if key not in ("n_steps", "tau")}
    makers = {
        "random length": lambda: lfq.HMC(theory, length_spread=0.5, **settings),
        "swendsen-wang": lambda: lfq.ClusterHMC(theory, **settings),
        "wolff": lambda: lfq.ClusterHMC(theory, cluster="wolff", n_updates=3, **settings),
        "fourier": lambda: lfq.FourierHMC(theory, mass=1.5, **settings),
        "heat bath": lambda: lfq.HeatBath(theory, n_sweeps=2, **common),
        "heat bath, swendsen-wang": lambda: lfq.HeatBath(theory, cluster="swendsen-wang", **common),
        "heat bath, wolff": lambda: lfq.HeatBath(theory, cluster="wolff", n_updates=3, **common),
        "fourier, random length": lambda: lfq.FourierHMC(theory, mass=1.5, length_spread=0.5, **settings),
    }
    return makers[kind]()


SAMPLERS = pytest.mark.parametrize(
    "kind", ["random length", "swendsen-wang", "wolff", "fourier", "heat bath", "heat bath, wolff"]
)


def mean_and_error(chain_means):
    return float(chain_means.mean()), float(chain_means.std(ddof=1) / math.sqrt(len(chain_means)))


def assert_mean(chain_means, wanted, sigma=4.0):
    value, error = mean_and_error(np.asarray(chain_means))
    assert abs(value - wanted) <= sigma * error, f"{value} +- {error}, must be {wanted}"


def thermal_block(sampler, n_chains, n_samples, seed, n_warmup=150, measure=True):
    state = sampler.advance(sampler.start(n_chains, seed), 1, n_warmup).state
    return sampler.advance(state, n_samples, measure=measure)


# ---- kernels against the reference ----------------------------------------------------------


@CLUSTERS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", [0.6, -0.4])
def test_clusters_match_the_reference(isa, dtype, cluster, shape, beta, rng):
    """The same spins, for either sign of the coupling and any extents."""
    sampler = lfq.ClusterHMC(lfq.Phi4(shape, beta, 0.5), cluster=cluster, n_updates=3)
    phi = rng.normal(size=(3, *shape)).astype(dtype)
    kept = phi.copy()
    found, flipped = sampler.update(phi, seed=0x123456789ABCDEF, trajectory=(1 << 40) + 3, first_chain=5)
    wanted, count = reference.cluster_update(phi, beta, cluster, 3, 0x123456789ABCDEF, (1 << 40) + 3, 5)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(flipped, count)
    np.testing.assert_array_equal(phi, kept)
    assert found.dtype == dtype and (found != phi).any()


@CLUSTERS
def test_cluster_chain_matches_the_reference(cluster, isa, rng):
    """Trajectories and clusters in turn, more chains than a task takes."""
    theory = lfq.Phi4((6, 4), 0.5, 0.5)
    sampler = lfq.ClusterHMC(theory, n_steps=4, cluster=cluster, n_updates=2)
    start = sampler.start(19, seed=9, first_chain=3)
    block = sampler.advance(start, 3, thin=2)
    z, scheme = start.latent, lfq.INTEGRATORS["leapfrog"]
    for i in range(6):
        z, dh, accepted = reference.hmc(
            z, 0.5, 0.5, scheme.kick, scheme.drift, 0.25, 4, 1, 9, first_chain=3, first_trajectory=i
        )
        np.testing.assert_allclose(block.dh[i], dh[0], atol=1e-11)
        np.testing.assert_array_equal(block.accepted[i], accepted[0])
        z, flipped = reference.cluster_update(z[0], 0.5, cluster, 2, 9, i, 3)
        np.testing.assert_array_equal(block.flipped[i], flipped)
    np.testing.assert_allclose(block.phi, z, atol=1e-12)
    np.testing.assert_allclose(block.observables["M"][-1], z.mean(axis=(1, 2)), atol=1e-13)


@pytest.mark.parametrize("shape", [(8,), (6, 10), (5, 7), (1, 4), (16, 8), (4, 6, 8), (3, 2, 5, 4)], ids=str)
@pytest.mark.parametrize("integrator", ["leapfrog", "omf2"])
def test_accelerated_evolution_matches_the_reference(isa, dtype, shape, integrator, rng):
    hmc = lfq.FourierHMC(lfq.Phi4(shape, 0.2, 0.5), tau=0.6, n_steps=3, integrator=integrator, mass=1.3)
    phi, momenta = (rng.normal(size=(11, *shape)).astype(dtype) for _ in range(2))
    i = hmc.integrator
    wanted = reference.fourier_evolve(
        phi.astype(np.float64), momenta.astype(np.float64), 0.2, 0.5, 1.3, i.kick, i.drift, hmc.step_size, 3
    )
    for found, exact in zip(hmc.evolve(phi, momenta), wanted, strict=True):
        assert np.abs(found - exact).max() < 2000 * np.finfo(dtype).eps * np.abs(exact).max()


def test_the_hartley_transform_diagonalises_the_lattice_laplacian(rng):
    """The reference's transform: its own inverse, and the Laplacian is -p^2 on it."""
    phi = rng.normal(size=(2, 6, 5))
    np.testing.assert_allclose(reference.hartley(reference.hartley(phi, 2), 2), phi, atol=1e-13)
    laplacian = sum(np.roll(phi, s, axis) - phi for axis in (1, 2) for s in (1, -1))
    p2 = 1 / reference.fourier_inverse_mass((6, 5), 1.0) * 9 - 1
    np.testing.assert_allclose(reference.hartley(laplacian, 2), -p2 * reference.hartley(phi, 2), atol=1e-12)


@pytest.mark.parametrize("way", ["backward", "negated momenta"])
def test_accelerated_trajectories_are_reversible(way, dtype, rng):
    hmc = lfq.FourierHMC(SMALL, tau=1.0, n_steps=10, mass=1.0, dtype=str(dtype))
    phi, momenta = (scale * rng.normal(size=(5, 8, 8)).astype(dtype) for scale in (0.7, 1))
    there = hmc.evolve(phi, momenta)
    assert np.abs(there[0] - phi).max() > 1
    back = hmc.evolve(*there, backward=True) if way == "backward" else hmc.evolve(there[0], -there[1])
    assert np.abs(back[0] - phi).max() < 4000 * np.finfo(dtype).eps


def test_a_large_mass_is_plain_hmc(rng):
    """Up to its modes: the Hartley transform of the momenta of plain HMC."""
    phi, momenta = rng.normal(size=(2, 3, 8, 8))
    heavy = lfq.FourierHMC(SMALL, n_steps=8, mass=1e6).evolve(phi, reference.hartley(momenta, 2))
    plain = lfq.HMC(SMALL, n_steps=8).evolve(phi, momenta)
    np.testing.assert_allclose(heavy[0], plain[0], atol=1e-9)
    np.testing.assert_allclose(reference.hartley(heavy[1], 2), plain[1], atol=1e-9)


def test_the_matching_mass_gives_every_free_mode_one_frequency(rng):
    """lam = 0, m^2 = 2 / beta - 2 D: after half a period of cos, phi -> -phi whatever its modes."""
    beta = 0.4
    m2 = 2 / beta - 4
    frequency = math.sqrt(beta * (8 + m2))  # of a mode: inverse mass times beta (p^2 + m^2)
    hmc = lfq.FourierHMC(lfq.Phi4((8, 6), beta, 0.0), tau=math.pi / frequency, n_steps=2000, mass=math.sqrt(m2))
    phi, momenta = rng.normal(size=(2, 3, 8, 6))
    end = hmc.evolve(phi, momenta)
    np.testing.assert_allclose(end[0], -phi, atol=2e-5)
    np.testing.assert_allclose(end[1], -momenta, atol=2e-5)


def test_random_lengths_match_the_reference(isa, rng):
    """Every trajectory of every chain takes the number of steps that the reference draws."""
    theory, scheme = lfq.Phi4((6, 4), 0.4, 0.5), lfq.INTEGRATORS["leapfrog"]
    hmc = lfq.HMC(theory, tau=1.2, n_steps=6, length_spread=0.5)
    assert hmc.n_steps_spread == 3
    start = hmc.start(5, seed=3, first_chain=2)
    block = hmc.advance(start, 12)
    states, dh, accepted = reference.hmc(
        start.latent, 0.4, 0.5, scheme.kick, scheme.drift, 0.2, 6, 12, 3, first_chain=2, spread=3
    )
    np.testing.assert_allclose(block.dh, dh, atol=1e-11)
    np.testing.assert_array_equal(block.accepted, accepted)
    np.testing.assert_allclose(block.phi, states[-1], atol=1e-11)
    drawn = [reference.drawn_steps(6, 3, 3, trajectory) for trajectory in range(2000)]
    assert set(drawn) == set(range(3, 10))
    counts = np.bincount(drawn)[3:]
    assert ((counts - 2000 / 7) ** 2).sum() / (2000 / 7) < 22.5  # chi^2 of 6 degrees of freedom: one in 1000


def test_uniforms_are_those_of_accept_steps():
    out = np.empty((4, 7))
    _core.uniform(99, _core.PURPOSES["accept"], (1 << 33) + 5, 3, 7, out)
    for i in range(4):
        np.testing.assert_array_equal(out[i], reference.accept_uniform(99, (1 << 33) + 5 + i, np.arange(3, 10)))


# ---- the same bits --------------------------------------------------------------------------


@SAMPLERS
def test_results_depend_neither_on_batch_nor_on_threads(kind, dtype):
    sampler = make(kind, SMALL, n_steps=5, dtype=str(dtype))
    start = sampler.start(37, seed=4, first_chain=2)
    whole = sampler.advance(start, 8)
    assert_same_blocks(replace(sampler, n_threads=3).advance(start, 8), whole)
    for chains in (slice(0, 5), slice(5, 22), slice(22, 37)):
        part = sampler.advance(lfq.State(start.latent[chains], 0, 4, 2 + chains.start), 8)
        np.testing.assert_array_equal(part.phi, whole.phi[chains])
        np.testing.assert_array_equal(part.observables["G_pmin"], whole.observables["G_pmin"][:, chains])
        if whole.flipped is not None:
            np.testing.assert_array_equal(part.flipped, whole.flipped[:, chains])


@SAMPLERS
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [12]])
def test_a_chain_in_pieces_is_the_same_chain(kind, pieces):
    sampler = make(kind, SMALL, n_steps=5)
    start = sampler.start(9, seed=6)
    whole, state, seen = sampler.advance(start, 12), start, []
    for n in pieces:
        block = sampler.advance(state, n)
        state, seen = block.state, [*seen, block.observables["phi4"]]
    np.testing.assert_array_equal(state.latent, whole.state.latent)
    np.testing.assert_array_equal(np.concatenate(seen), whole.observables["phi4"])
    assert state.trajectory == whole.state.trajectory == 12


@SAMPLERS
def test_runs_continue_from_their_state(kind):
    sampler = make(kind, SMALL, n_steps=5)
    whole = sampler.sample(9, 20, n_warmup=3, seed=8)
    first = sampler.sample(9, 8, n_warmup=3, seed=8)
    second = sampler.sample(9, 12, start=first.state)
    np.testing.assert_array_equal(second.phi, whole.phi)
    assert (whole.n_samples, whole.n_chains, whole.thin) == (20, 9, 1)
    assert (whole.flipped is None) == (getattr(sampler, "cluster", None) is None)


# ---- the right distribution -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "random length",
        "swendsen-wang",
        "wolff",
        "fourier, random length",
        "heat bath",
        "heat bath, swendsen-wang",
        "heat bath, wolff",
    ],
)
def test_samplers_agree_with_an_independent_code(kind):
    """L = 8; 3.5 sigma. <exp(-dH)> = 1 and the virial identity: 4 sigma."""
    sampler = make(kind, SMALL, n_steps=6)
    block = thermal_block(sampler, 256, 1000, seed=31)
    o = dict(block.observables)
    o["chi"] = 64 * o["M"] ** 2
    for name, (wanted, uncertainty) in INDEPENDENT.items():
        value, error = mean_and_error(o[name].mean(axis=0))
        assert abs(value - wanted) < 3.5 * math.hypot(error, uncertainty), f"{name}: {value} +- {error}, not {wanted}"
    assert_mean(np.exp(-block.dh).mean(axis=0), 1)
    assert_mean(virial(SMALL, o).mean(axis=0), 1)
    assert_mean(o["M"].mean(axis=0), 0)


@pytest.mark.parametrize("kind", ["swendsen-wang", "wolff"])
def test_clusters_alone_sample_the_embedded_ising_model(kind):
    """Magnitudes stay, and signs visit all 2^6 configurations of a ring with their weights; 4 sigma.

    The ring is so strongly coupled that its two ordered states hold most of the weight.
    """
    theory = lfq.Phi4((6,), 1.2, 0.5)
    magnitudes = np.array([0.5, 1.0, 1.5, 0.8, 0.3, 1.2])
    sampler = replace(make(kind, theory), n_updates=1)
    phi = np.tile(magnitudes, (4000, 1))
    for trajectory in range(40):
        phi, _ = sampler.update(phi, seed=12, trajectory=trajectory)
    np.testing.assert_array_equal(np.abs(phi), np.tile(magnitudes, (4000, 1)))
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    weights = np.exp(-theory.action(signs * magnitudes))
    exact = weights / weights.sum()
    found = np.bincount(((phi < 0) * 2 ** np.arange(5, -1, -1)).sum(axis=1), minlength=64)
    expected = 4000 * exact
    often = expected > 5
    chi2 = ((found - expected)[often] ** 2 / expected[often]).sum()
    dof = often.sum() - 1
    assert dof > 20 and abs(chi2 - dof) < 4 * math.sqrt(2 * dof)


def test_a_wrong_bond_probability_is_noticed():
    """Clusters of a theory with 3% more coupling leave another distribution: 10 sigma."""
    wrong = lfq.ClusterHMC(replace(SMALL, beta=1.03 * SMALL.beta), n_updates=2)
    hmc = lfq.HMC(SMALL, n_steps=6)
    state = hmc.start(256, seed=33)
    sums = []
    for trajectory in range(600):
        block = hmc.advance(state, 1, measure=False)
        phi, _ = wrong.update(block.phi, 33, trajectory)
        state = replace(block.state, latent=phi)
        if trajectory >= 100 and trajectory % 5 == 0:
            sums.append(SMALL.measure(phi)["nn"])
    value, error = mean_and_error(np.mean(sums, axis=0))
    assert abs(value - INDEPENDENT["nn"][0]) > 10 * error


@pytest.mark.parametrize("kind", ["random length", "swendsen-wang", "fourier", "heat bath"])
@pytest.mark.parametrize("shape", [(10,), (8, 6), (4, 6, 4), (2, 4, 2, 4)], ids=str)
def test_free_propagator(kind, shape):
    """lam = 0 in 1 to 4 dimensions: chi and <phi^2> of G(p) = 1 / (beta p^2 + 2 - 2 D beta); 4 sigma."""
    theory = lfq.Phi4(shape, 0.6 / len(shape), 0.0)
    block = thermal_block(make(kind, theory, tau=1.3, n_steps=8), 256, 200, seed=41)
    momenta = np.meshgrid(*[2 * np.pi * np.arange(n) / n for n in shape], indexing="ij")
    propagator = 1 / (2 - 2 * theory.beta * sum(np.cos(p) for p in momenta))
    assert_mean(theory.volume * (block.observables["M"] ** 2).mean(axis=0), propagator.flat[0])
    assert_mean(block.observables["phi2"].mean(axis=0), propagator.mean())


def test_clusters_end_critical_slowing_down():
    """L = 32, beta = 0.661: tau_int of chi falls from over 100 trajectories of length 1 to near 2.4."""
    theory = lfq.Phi4((32, 32), beta=0.661, lam=0.5)
    run = lfq.ClusterHMC(theory, tau=1.0, n_steps=11).sample(32, 600, n_warmup=60, seed=5)
    tau = analysis.estimate(run.observables["chi"])
    assert 1.8 < tau.tau_int < 3.2 and tau.tau_int_error < 0.4


def test_random_length_frees_a_resonant_mode():
    """lam = 0, tau a whole period of the zero mode: it never moves, and with random lengths it does."""
    theory = lfq.Phi4((4, 4), 0.4, 0.0)
    period = 2 * math.pi / math.sqrt(2 - 4 * theory.beta)
    taus = {}
    for spread in (0.0, 0.5):
        hmc = lfq.HMC(theory, tau=period, n_steps=200, length_spread=spread)
        block = thermal_block(hmc, 64, 200, seed=43)
        taus[spread] = analysis.integrated_time(block.observables["M"])
    assert taus[0.0] > 20 and taus[0.5] < 3


# ---- tuning ---------------------------------------------------------------------------------


def test_tuning_to_least_cost_beats_unit_length():
    """L = 16: at least twice as cheap in force evaluations as tuning the acceptance alone at tau = 1."""
    theory = lfq.Phi4((16, 16), beta=0.634, lam=0.5)
    costs = {}
    for name, hmc in {
        "acceptance": lfq.HMC(theory, length_spread=0.2).tune(0.9),
        "cost": lfq.HMC(theory, length_spread=0.2).tune_cost(n_chains=32, max_trajectories=400, clock="forces"),
    }.items():
        run = hmc.sample(64, 500, n_warmup=200, seed=7)
        costs[name] = 2 * analysis.integrated_time(run.observables["M2"]) * run.force_evaluations_per_trajectory
        assert 0.5 < run.acceptance < 0.97
    assert costs["cost"] < costs["acceptance"] / 2


@pytest.mark.parametrize("kind", ["wolff", "heat bath, wolff"])
def test_wolff_clusters_cover_the_lattice(kind):
    """As many as flip V sites a trajectory, to 25%; tuned to least cost there are no more."""
    sampler = make(kind, SMALL, n_steps=6)
    covering = sampler._covering(thermal_block(sampler, 64, 1, seed=3, measure=False).state)
    block = thermal_block(covering, 64, 50, seed=4)
    assert block.flipped.mean() == pytest.approx(64, rel=0.25) and covering.n_updates > 1
    tuned = sampler.tune_cost(n_chains=32, max_trajectories=100, clock="forces")
    assert 1 <= tuned.n_updates <= 1.25 * covering.n_updates


def test_tuning_finds_the_sweeps_of_a_heat_bath():
    """L = 16: no dearer in force evaluations than one sweep or sixteen between cluster updates; 20%."""
    theory = lfq.Phi4((16, 16), beta=0.634, lam=0.5)
    tuned = lfq.HeatBath(theory, cluster="swendsen-wang").tune_cost(n_chains=32, clock="forces")
    costs = {}
    for n_sweeps in {1, 16, tuned.n_sweeps}:
        run = replace(tuned, n_sweeps=n_sweeps).sample(64, 1000, n_warmup=100, seed=7)
        tau_int = max(analysis.integrated_time(run.observables[name]) for name in analysis.SLOW_OBSERVABLES)
        costs[n_sweeps] = 2 * tau_int * run.force_evaluations_per_trajectory
    assert costs[tuned.n_sweeps] < 1.2 * min(costs.values())
    assert lfq.HeatBath(theory).tune_cost() == lfq.HeatBath(theory)


def test_tuning_finds_a_mass():
    tuned = lfq.FourierHMC(SMALL).tune_cost(
        masses=(4.0, 1.0), n_chains=32, longest=2.0, max_trajectories=200, clock="forces"
    )  # fmt: skip
    assert tuned.mass in (4.0, 1.0) and 1 <= tuned.tau <= 2


def test_integrated_time_is_that_of_the_gamma_method(rng):
    """An AR(1) process of known tau_int; within 10%, and equal to pyerrors' within 10%."""
    a, n = 0.9, 4000
    x = np.empty((n, 16))
    x[0] = rng.normal(size=16)
    for t in range(1, n):
        x[t] = a * x[t - 1] + math.sqrt(1 - a * a) * rng.normal(size=16)
    exact = 0.5 * (1 + a) / (1 - a)
    assert analysis.integrated_time(x) == pytest.approx(exact, rel=0.1)
    pytest.importorskip("pyerrors")
    assert analysis.integrated_time(x) == pytest.approx(analysis.estimate(x).tau_int, rel=0.1)
    assert analysis.integrated_time(rng.normal(size=(1000, 4))) == pytest.approx(0.5, abs=0.05)


def test_fitted_exponents(rng):
    """Unbiased with errors that are right: 400 fits of 4 noisy costs; 4 sigma. Larger where no power law fits."""
    extents, z = np.array([8, 16, 32, 64]), 2.1
    fits = []
    for _ in range(400):
        noise = 1 + 0.02 * rng.normal(size=4)
        fits.append(analysis.fit_exponent(extents, 3 * extents**z * noise, [0.02] * 4))
    found = np.array([fit[0] for fit in fits])
    exact = 0.02 / math.sqrt(((np.log(extents) - np.log(extents).mean()) ** 2).sum())
    assert abs(found.mean() - z) < 4 * exact / 20
    assert found.std() == pytest.approx(exact, rel=0.15)
    assert min(fit[1] for fit in fits) == pytest.approx(exact, rel=1e-9)
    assert analysis.fit_exponent(extents, extents**2.0 + 100, [0.01] * 4)[1] > 5 * exact
    with pytest.raises(ValueError, match="fit_exponent"):
        analysis.fit_exponent([8], [1.0], [0.1])


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda t: lfq.HMC(t, length_spread=1.0), ValueError, "length_spread"),
        (lambda t: lfq.HMC(t, length_spread=-0.1), ValueError, "length_spread"),
        (lambda t: lfq.HMC(t, length_spread="some"), ValueError, "length_spread"),
        (lambda t: lfq.ClusterHMC(t, cluster="metropolis"), ValueError, "cluster.*swendsen-wang"),
        (lambda t: lfq.HeatBath("phi4"), TypeError, "theory"),
        (lambda t: lfq.HeatBath(t.pullback(lfq.AffineFlow())), TypeError, "theory"),
        (lambda t: lfq.HeatBath(t, n_sweeps=0), ValueError, "n_sweeps"),
        (lambda t: lfq.HeatBath(t, n_sweeps=2**30), ValueError, "n_sweeps"),
        (lambda t: lfq.HeatBath(t, cluster="metropolis"), ValueError, "cluster.*swendsen-wang"),
        (lambda t: lfq.HeatBath(t, dtype="int8"), ValueError, "dtype"),
        (lambda t: lfq.ClusterHMC(t, n_updates=-1), ValueError, "n_updates"),
        (lambda t: lfq.ClusterHMC(t, n_updates=2**31), ValueError, "n_updates"),
        (lambda t: lfq.ClusterHMC(t.pullback(lfq.AffineFlow())), TypeError, "theory"),
        (lambda t: lfq.FourierHMC(t, mass=0.0), ValueError, "mass"),
        (lambda t: lfq.FourierHMC(t, mass=math.nan), ValueError, "mass"),
        (lambda t: lfq.FourierHMC(t.pullback(lfq.AffineFlow())), TypeError, "theory"),
        (lambda t: lfq.ClusterHMC(t).update(np.ones((4, 4)), 0), ValueError, "phi"),
        (lambda t: lfq.ClusterHMC(t).update(np.full((1, 4, 4), np.nan), 0), lfq.NotFiniteError, "chain 0"),
        (lambda t: lfq.ClusterHMC(t).update(np.ones((1, 4, 4)), -1), ValueError, "seed"),
        (lambda t: lfq.HMC(t, tau=4.0).tune_cost(longest=2.0), ValueError, "longest"),
        (lambda t: lfq.HMC(t).tune_cost(clock="sundial"), ValueError, "clock"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(lfq.Phi4((4, 4), beta=0.5, lam=0.5))


@pytest.mark.parametrize("kind", ["wolff", "swendsen-wang"])
def test_clusters_find_what_is_not_finite(kind):
    """A strongly coupled chain: a Wolff cluster is the whole of it, or meets the NaN on its way."""
    phi = np.ones((20, 4, 4))
    phi[17, 2, 1] = np.nan
    with pytest.raises(lfq.NotFiniteError, match="chain 17 has nan at site 9"):
        make(kind, lfq.Phi4((4, 4), 5.0, 0.5)).update(phi, 1)


@pytest.mark.parametrize("kind", ["swendsen-wang", "fourier"])
def test_divergence_names_chain_and_trajectory(kind):
    """One chain far out, beyond the first task: it alone is named, and the state is kept."""
    sampler = make(kind, SMALL, n_steps=4)
    phi = np.random.default_rng(82).normal(size=(40, 8, 8)) / 2
    phi[33] = 1e90
    state = sampler.start(40, seed=83, phi=phi, first_chain=100)
    with pytest.raises(lfq.NotFiniteError, match=r"chain 133 \(trajectory"):
        sampler.advance(state, 2)
    np.testing.assert_array_equal(state.latent, phi)
