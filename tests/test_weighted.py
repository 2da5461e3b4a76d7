"""Independence Metropolis, reweighting, annealed importance sampling and sequential Monte Carlo.

All must hold whatever the flow or the schedule: exact partition functions at lam = 0, exact one-site
integrals at beta = 0, and agreement with HMC. Fixed seeds; each test says how many sigma it allows.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad

import lfq
from lfq import reference
from lfq.observables import OBSERVABLES

FREE = lfq.Phi4((2, 4), beta=0.3, lam=0.0)
SMALL = lfq.Phi4((4, 4), beta=0.5, lam=0.5)


def make_flow(size=0.15, seed=3, **structure):
    """A flow far from the identity and from any use: moderate random weights."""
    flow = lfq.AffineFlow(**structure)
    weights = size * np.random.default_rng(seed).normal(size=flow.n_weights)
    weights[-1] = 0.2  # wider fields than the theory's: no weight is far above the others
    flow.weights = weights
    return flow


def free_log_z(theory):
    momenta = np.meshgrid(*(2 * np.pi * np.arange(n) / n for n in theory.shape), indexing="ij")
    return float(0.5 * np.log(np.pi / (1 - theory.beta * sum(np.cos(p) for p in momenta))).sum())


@pytest.fixture(scope="module")
def trained():
    """A flow of some use for SMALL: half the acceptance of independent samples or more."""
    flow = lfq.AffineFlow(n_blocks=3, hidden=(4,))
    return lfq.train(flow, lfq.Gaussian(SMALL.shape), SMALL, n_steps=400, batch_size=128, seed=1)


@pytest.fixture(scope="module")
def by_hmc():
    """phi2, abs_M and nn of SMALL, (value, error)."""
    run = lfq.ClusterHMC(SMALL, n_steps=5).sample(256, 1500, n_warmup=100, seed=2)
    means = {name: run.observables[name].mean(axis=0) for name in ("phi2", "abs_M", "nn")}
    return {name: (m.mean(), m.std(ddof=1) / math.sqrt(m.size)) for name, m in means.items()}


WEIGHTED = {
    "reweighting": lambda theory, flow: lfq.Reweighting(theory, flow),
    "annealing": lambda theory, flow: lfq.Annealing(theory, n_temperatures=8, n_steps=5),
    "two trajectories": lambda theory, flow: lfq.Annealing(theory, n_temperatures=4, n_steps=5, n_trajectories=2),
    "resampling": lambda theory, flow: lfq.Annealing(theory, n_temperatures=8, n_steps=5, resample=0.9),
    "annealing a flow": lambda theory, flow: lfq.Annealing(theory, flow, n_temperatures=6, n_steps=4),
    "resampling a flow": lambda theory, flow: lfq.Annealing(theory, flow, n_temperatures=6, n_steps=4, resample=0.9),
}
ALL = pytest.mark.parametrize("kind", WEIGHTED)

COARSE = {"n_between": 3, "n_warmup": 60}
PRIORS = {
    "lattice": lambda: lfq.Lattice(lfq.Phi4((4, 4), 0.4, 0.5), **COARSE),
    "interleave": lambda: lfq.Interleave(lfq.Phi4((2, 2), 0.3, 0.5), **COARSE),
    "upsample": lambda: lfq.Upsample(lfq.Phi4((2, 2), 0.3, 0.5), width=0.7, interpolation=0.6, **COARSE),
}
FROM_LATTICES = pytest.mark.parametrize("prior", PRIORS)


@ALL
def test_log_z_of_the_free_theory(kind, dtype):
    """lam = 0, an untrained flow: log Z exactly; 4 sigma, of an error below 0.05."""
    sampler = replace(WEIGHTED[kind](FREE, make_flow(0.1)), dtype=str(dtype))
    found = sampler.sample(64 * 128, seed=4)
    assert found.log_z_error < 0.05
    assert abs(found.log_z - free_log_z(FREE)) < 4 * found.log_z_error


@ALL
def test_log_z_of_independent_sites(kind):
    """beta = 0, lam = 0.5: log Z and <phi^2> are one-dimensional integrals; 4 sigma."""
    theory = lfq.Phi4((2, 4), beta=0.0, lam=0.5)
    z, second = (quad(lambda x, n=n: x**n * math.exp(-0.5 * x**4), -9, 9)[0] for n in (0, 2))
    found = WEIGHTED[kind](theory, make_flow(0.1)).sample(64 * 64, seed=5)
    assert found.log_z_error < 0.05
    assert abs(found.log_z - 8 * math.log(z)) < 4 * found.log_z_error
    value, error = found.mean("phi2")
    assert abs(value - second / z) < 4 * error


@ALL
def test_weighted_means_agree_with_hmc(kind, trained, by_hmc):
    """4 sigma; and without their weights the fields of the flow and of a fast schedule disagree."""
    found = WEIGHTED[kind](SMALL, trained.flow).sample(64 * 128, seed=6)
    for name, (wanted, uncertainty) in by_hmc.items():
        value, error = found.mean(name)
        assert abs(value - wanted) < 4 * math.hypot(error, uncertainty), name
    assert 0 < found.ess <= 1 and found.n_effective > 300
    assert found.phi.shape == (8192, 4, 4) and found.seconds > 0 and found.force_evaluations >= 8192


def test_weights_are_needed(by_hmc):
    """The negative control: fields after a fast anneal, weights ignored."""
    found = lfq.Annealing(SMALL, n_temperatures=5, n_steps=2, tau=0.2).sample(8192, seed=6)
    unweighted = replace(found, log_w=np.zeros(8192))
    deviation = {}
    for name, run in (("weighted", found), ("unweighted", unweighted)):
        value, error = run.mean("phi2")
        deviation[name] = abs(value - by_hmc["phi2"][0]) / math.hypot(error, by_hmc["phi2"][1])
    assert deviation["weighted"] < 4 and deviation["unweighted"] > 10


def test_slow_annealing_raises_the_ess_and_resampling_helps():
    fast, slow = (lfq.Annealing(SMALL, n_temperatures=n, n_steps=5).sample(2048, seed=7) for n in (2, 30))
    assert slow.ess > 2 * fast.ess and slow.log_z_error < fast.log_z_error
    assert abs(slow.log_z - fast.log_z) < 4 * math.hypot(slow.log_z_error, fast.log_z_error)


def test_errors_are_those_of_repeated_runs():
    """The spread of 60 estimates of log Z and <phi^2> over their errors; 4 sigma of a chi^2 with 60 degrees."""
    for sampler in (WEIGHTED["annealing"](SMALL, None), WEIGHTED["resampling"](SMALL, None)):
        runs = [sampler.sample(64 * 16, seed=seed) for seed in range(60)]
        for values, errors in (
            ([r.log_z for r in runs], [r.log_z_error for r in runs]),
            *[zip(*[r.mean("phi2") for r in runs], strict=True)],
        ):
            ratio = np.var(values, ddof=1) / np.mean(np.square(errors))
            assert abs(ratio - 1) < 4 * math.sqrt(2 / 59) + 0.1  # the errors' own noise


def test_annealing_interpolates_between_the_gaussian_and_the_theory(rng):
    """S_t(s psi) of the rescaled theory is (1 - t) phi^2 / 2 + t S(phi), up to nothing."""
    sampler, phi = lfq.Annealing(SMALL), rng.normal(size=(3, 4, 4))
    for t in (0.0, 0.3, 1.0):
        theory, s = sampler._theory_at(t)
        wanted = (1 - t) * 0.5 * (phi**2).sum(axis=(1, 2)) + t * SMALL.action(phi)
        np.testing.assert_allclose(theory.action(phi / s), wanted, rtol=1e-12)
    assert sampler._theory_at(1.0) == (SMALL, 1.0)


def test_the_tail_index_is_that_of_a_pareto_distribution(rng):
    """P(w > x) = x^(-1/k): k to 4 sigma of its estimator, k over the root of the number of weights it takes."""
    for k in (0.25, 0.8):
        w = rng.pareto(1 / k, size=20000) + 1
        found = lfq.Weighted(SMALL, np.empty(0), np.log(w), {}, np.arange(20000), 1.0, 1.0).tail_index
        assert abs(found - k) < 4 * k / math.sqrt(3 * math.sqrt(20000))


# ---- independence Metropolis ----------------------------------------------------------------


def test_independence_metropolis_agrees_with_hmc(trained, by_hmc, dtype):
    """4 sigma; <exp(-dH)> = <w / w_old> = 1 in equilibrium too."""
    sampler = lfq.IndependenceMetropolis(SMALL, trained.flow, dtype=str(dtype))
    run = sampler.sample(128, 500, n_warmup=50, seed=8)
    assert 0.4 < run.acceptance < 0.99
    assert abs(run.acceptance - trained.acceptance) < 0.05
    for name, (wanted, uncertainty) in by_hmc.items():
        means = run.observables[name].mean(axis=0)
        error = means.std(ddof=1) / math.sqrt(means.size)
        assert abs(means.mean() - wanted) < 4 * math.hypot(error, uncertainty), name
    assert run.force_evaluations_per_trajectory == 1 and run.seconds_per_trajectory > 0


def test_independence_metropolis_follows_its_rule(trained):
    """The chain made again from the definition, in NumPy."""
    sampler = lfq.IndependenceMetropolis(SMALL, trained.flow)
    start = sampler.start(7, seed=9, first_chain=3)
    block = sampler.advance(start, 5, thin=2)
    chains = np.arange(3, 10)

    def log_w(z):
        phi, log_det = trained.flow.forward(z)
        return phi, log_det - SMALL.action(phi) + 0.5 * (z**2).sum(axis=(1, 2))

    z = start.latent
    for trajectory in range(10):
        new = reference.normals(9, reference.PURPOSE_PROPOSAL, trajectory, chains, 16).reshape(7, 4, 4)
        ratio = log_w(new)[1] - log_w(z)[1]
        np.testing.assert_allclose(block.dh[trajectory], -ratio, atol=1e-10)
        accept = reference.accept_uniform(9, trajectory, chains) < np.exp(ratio)
        np.testing.assert_array_equal(block.accepted[trajectory], accept)
        z = np.where(accept[:, None, None], new, z)
        if trajectory % 2:
            found = {name: block.observables[name][trajectory // 2] for name in OBSERVABLES}
            wanted = SMALL.measure(trained.flow.forward(z)[0])
            for name in OBSERVABLES:
                np.testing.assert_allclose(found[name], wanted[name], atol=1e-10)
    np.testing.assert_allclose(block.phi, log_w(z)[0], atol=1e-12)
    assert block.accepted.any() and not block.accepted.all()


def test_independence_metropolis_is_the_same_in_pieces_and_batches(trained):
    sampler = lfq.IndependenceMetropolis(SMALL, trained.flow)
    start = sampler.start(20, seed=10)
    whole = sampler.advance(start, 12)
    first = sampler.advance(start, 5)
    second = sampler.advance(first.state, 7)
    np.testing.assert_array_equal(second.state.latent, whole.state.latent)
    np.testing.assert_array_equal(second.observables["nn"], whole.observables["nn"][5:])
    part = sampler.advance(lfq.State(start.latent[6:15], 0, 10, 6), 12)
    np.testing.assert_array_equal(part.phi, whole.phi[6:15])
    np.testing.assert_array_equal(part.dh, whole.dh[:, 6:15])


# ---- lattice priors ---------------------------------------------------------------------------


def assert_agrees(found, wanted, sigma=4.0):
    for name, (value, uncertainty) in wanted.items():
        mean, error = found(name)
        assert abs(mean - value) < sigma * math.hypot(error, uncertainty), f"{name}: {mean} +- {error}, not {value}"


@FROM_LATTICES
def test_proposals_from_lattices_agree_with_hmc(prior, by_hmc):
    """Coarse fields only three trajectories apart: exact all the same; 4 sigma.

    So is <w / w_old> = 1, but where the variance of w is infinite (tail index above 1/2).
    """
    sampler = lfq.IndependenceMetropolis(SMALL, scaled_gaussian(1.05), PRIORS[prior]())
    run = sampler.sample(512, 400, n_warmup=100, seed=21)
    assert 0.05 < run.acceptance < 0.95
    means = {name: run.observables[name].mean(axis=0) for name in by_hmc}
    assert_agrees(lambda name: (means[name].mean(), means[name].std(ddof=1) / math.sqrt(512)), by_hmc)
    ratio = np.exp(-run.dh).mean(axis=0)
    assert prior == "upsample" or abs(ratio.mean() - 1) < 4 * ratio.std(ddof=1) / math.sqrt(512)
    coarse = {"lattice": 16, "interleave": 16, "upsample": 4}[prior]
    assert run.force_evaluations_per_trajectory == pytest.approx(1 + 3 * 11 * coarse / 16)


@FROM_LATTICES
def test_proposals_from_lattices_are_the_same_in_pieces_and_batches(prior):
    sampler = lfq.IndependenceMetropolis(SMALL, scaled_gaussian(1.05), PRIORS[prior]())
    start = sampler.start(20, seed=10, first_chain=2)
    whole = sampler.advance(start, 12)
    first = sampler.advance(start, 5)
    second = sampler.advance(first.state, 7)
    np.testing.assert_array_equal(second.state.latent, whole.state.latent)
    part = sampler.advance(lfq.State(start.latent[6:15], 0, 10, 8), 12)
    np.testing.assert_array_equal(part.phi, whole.phi[6:15])
    np.testing.assert_array_equal(sampler.start(9, seed=10, first_chain=8).latent, start.latent[6:15])
    assert whole.accepted.any() and not whole.accepted.all()


@FROM_LATTICES
@pytest.mark.parametrize("resample", [0.0, 0.9])
@pytest.mark.parametrize("flow", ["flow", "no flow"])
def test_annealing_from_lattices_agrees_with_hmc(prior, resample, flow, by_hmc):
    """4 sigma; a log Z relative to the prior's own does not depend on the speed."""
    given = scaled_gaussian(1.05) if flow == "flow" else None
    annealing = lfq.Annealing(SMALL, given, PRIORS[prior](), n_temperatures=8, n_steps=5, resample=resample)
    found = annealing.sample(64 * 96, seed=22)
    assert_agrees(found.mean, by_hmc)
    assert found.n_effective > 500
    slow = replace(annealing, n_temperatures=20).sample(64 * 32, seed=23)
    assert abs(slow.log_z - found.log_z) < 4 * math.hypot(slow.log_z_error, found.log_z_error)


def test_annealing_from_another_coupling_takes_the_ratio_of_partition_functions():
    """lam = 0: log Z(0.3) - log Z(0.1) exactly; 4 sigma."""
    prior = lfq.Lattice(replace(FREE, beta=0.1), n_warmup=60)
    found = lfq.Annealing(FREE, prior=prior, n_temperatures=5, n_steps=6).sample(4096, seed=24)
    assert found.log_z_error < 0.01
    wanted = free_log_z(FREE) - free_log_z(replace(FREE, beta=0.1))
    assert abs(found.log_z - wanted) < 4 * found.log_z_error


@FROM_LATTICES
def test_the_potential_of_a_prior_is_its_density(prior, rng):
    """-log_prob up to a constant, and its gradient by finite differences."""
    base = PRIORS[prior]().base
    latent = 0.7 * rng.normal(size=(5, 16))
    energy, force = base.potential(latent)
    np.testing.assert_allclose(np.diff(energy + base.log_prob(latent)), 0, atol=1e-12)
    direction, step = rng.normal(size=(5, 16)), 1e-5
    up, down = (base.potential(latent + sign * step * direction)[0] for sign in (1, -1))
    np.testing.assert_allclose(-(force * direction).sum(axis=1), (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


# ---- reverse ESS ----------------------------------------------------------------------------


def scaled_gaussian(scale, ndim=2):
    """The flow that multiplies by `scale` and does nothing else."""
    flow = lfq.AffineFlow(ndim=ndim)
    flow.weights = np.append(np.zeros(flow.n_weights - 1), math.log(scale))
    return flow


def one_sided_flow():
    """Fields of positive sign, near one of the two ordered states of L = 2, beta = 0.9."""
    flow = lfq.AffineFlow(bias=True, scale="exp(s)")
    weights = np.zeros(flow.n_weights)
    n = (flow.n_weights - 1) // 2
    # The biases of t move every site by tanh(3), those of s narrow the fields around that.
    weights[[n - 1, 2 * n - 1]], weights[[n - 2, 2 * n - 2]], weights[-1] = 3.0, -0.8, 0.2
    flow.weights = weights
    return flow


def test_reverse_ess_of_gaussians():
    """lam = 0: 1 / ESS is the product of s^2 / sqrt(v (2 s^2 - v)) over modes of variance v; within 5%."""
    theory, scale = lfq.Phi4((4, 4), beta=0.15, lam=0.0), 0.75
    p = 2 * np.pi * np.arange(4) / 4
    v = 1 / (2 - 2 * 0.15 * (np.cos(p)[:, None] + np.cos(p)))
    exact = np.prod(np.sqrt(v * (2 * scale**2 - v)) / scale**2)
    phi = lfq.HMC(theory, tau=1.3, n_steps=10).sample(8000, 1, n_warmup=60, seed=13).phi
    assert lfq.reverse_ess(scaled_gaussian(scale), lfq.Gaussian((4, 4)), theory, phi) == pytest.approx(exact, rel=0.05)


def test_reverse_ess_sees_a_lost_mode():
    """Two ordered states: a flow that makes fields of positive sign only, and whose own ESS does not tell."""
    theory = lfq.Phi4((2, 2), beta=0.9, lam=0.5)
    phi = lfq.ClusterHMC(theory, n_steps=6).sample(4000, 1, n_warmup=100, seed=11).phi
    flow = one_sided_flow()
    prior = lfq.Gaussian((2, 2))
    one, half = (
        lfq.reverse_ess(flow, prior, theory, x) for x in (phi, phi * np.sign(phi.mean(axis=(1, 2)))[:, None, None])
    )
    own = lfq.Reweighting(theory, flow).sample(4000, seed=12).ess
    assert one < 0.1 * half and one < 0.1 * own


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda f: lfq.IndependenceMetropolis("phi4", f), TypeError, "theory"),
        (lambda f: lfq.IndependenceMetropolis(SMALL, "flow"), TypeError, "flow"),
        (lambda f: lfq.IndependenceMetropolis(lfq.Phi4((4, 5), 0.5, 0.5), f), ValueError, "odd"),
        (lambda f: lfq.IndependenceMetropolis(SMALL, f, dtype="int8"), ValueError, "dtype"),
        (lambda f: lfq.IndependenceMetropolis(SMALL, f).start(3, 0, phi=np.ones((2, 4, 4))), ValueError, "phi"),
        (lambda f: lfq.IndependenceMetropolis(SMALL, f, lfq.Gaussian((4, 6))), ValueError, "prior"),
        (lambda f: lfq.Annealing(SMALL, prior="gaussian"), TypeError, "prior"),
        (lambda f: lfq.Reweighting(SMALL, f, prior="gaussian"), TypeError, "prior"),
        (lambda f: lfq.Reweighting(SMALL, f, prior=lfq.Gaussian((4, 6))), ValueError, "prior"),
        (lambda f: lfq.Reweighting(SMALL, f).sample(1), ValueError, "n_samples"),
        (lambda f: lfq.Annealing(SMALL, n_temperatures=0), ValueError, "n_temperatures"),
        (lambda f: lfq.Annealing(SMALL, resample=1.5), ValueError, "resample"),
        (lambda f: lfq.Annealing(SMALL, tau=-1.0), ValueError, "tau"),
        (lambda f: lfq.Annealing(SMALL, resample=0.5, population=64).sample(100), ValueError, "multiple"),
        (lambda f: lfq.Annealing(SMALL, f, tau=1e80).sample(64), lfq.NotFiniteError, "."),
        (lambda f: lfq.reverse_ess(f, lfq.Gaussian((4, 4)), SMALL, np.ones((3, 4, 6))), ValueError, "phi"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(lfq.AffineFlow())
