"""HMC and flow-HMC: the dynamics, exact results, published-style values, and bits that must not change.

Statistical tests run many independent chains from fixed seeds; an error is the standard deviation of
the chains' means over the square root of their number. Each says how many sigma it allows.
"""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad

import lfq
from lfq import _core
from lfq.observables import OBSERVABLES, second_moment_length

# Periodic L x L, lam = 0.5, made by an independent code: HMC and embedded Swendsen-Wang updates in double
# precision. (value, one standard error). U4 = <M^4> / <M^2>^2; xi is the second-moment length.
INDEPENDENT = {
    8: {
        "beta": 0.576,
        "phi2": (0.6363605, 5.4e-5),
        "phi4": (0.8002626, 1.1e-4),
        "abs_M": (0.2633325, 1.2e-4),
        "chi": (6.506331, 5.2e-3),
        "nn": (0.2606352, 7.6e-5),
        "action_density": (0.09987957, 5.2e-5),
        "U4": (2.38005, 1.1e-3),
        "xi": (1.988434, 1.3e-3),
    },
    16: {
        "beta": 0.634,
        "phi2": (0.713364, 5.3e-5),
        "phi4": (0.9584534, 1.1e-4),
        "abs_M": (0.2438335, 1.5e-4),
        "chi": (22.0782, 2.4e-2),
        "nn": (0.3615569, 7.8e-5),
        "action_density": (0.0207726, 5.4e-5),
        "U4": (2.302077, 1.4e-3),
        "xi": (3.981486, 3.4e-3),
    },
    32: {
        "beta": 0.661,
        "phi2": (0.7744358, 4.7e-5),
        "phi4": (1.087687, 9.6e-5),
        "abs_M": (0.2251977, 1.8e-4),
        "chi": (74.96559, 0.11),
        "nn": (0.4445287, 7e-5),
        "action_density": (-0.04382337, 4.9e-5),
        "U4": (2.266007, 1.7e-3),
        "xi": (7.879122, 8.7e-3),
    },
}


def independent_theory(extent):
    return lfq.Phi4((extent, extent), beta=INDEPENDENT[extent]["beta"], lam=0.5)


def physical(theory):
    return getattr(theory, "theory", theory)


def chain_means(observables, theory):
    """Of the measured observables and those that follow from them."""
    o, theory = dict(observables), physical(theory)
    o["abs_M"], o["M2"], o["M4"] = np.abs(o["M"]), o["M"] ** 2, o["M"] ** 4
    o["chi"] = theory.volume * o["M2"]
    hopping = theory.beta * theory.ndim * o["nn"]
    o["action_density"] = (1 - 2 * theory.lam) * o["phi2"] + theory.lam * o["phi4"] - hopping
    return {name: values.mean(axis=0) for name, values in o.items()}


def estimates(observables, extent):
    """(value, error) of all entries of INDEPENDENT; ratios by the jackknife over chains."""
    means = chain_means(observables, independent_theory(extent))
    simple = ("phi2", "phi4", "abs_M", "chi", "nn", "action_density")
    found = {name: mean_and_error(means[name]) for name in simple}
    n = len(means["chi"])
    for name, ratio in {
        "U4": lambda m: m["M4"] / m["M2"] ** 2,
        "xi": lambda m: second_moment_length(m["chi"], m["G_pmin"], extent),
    }.items():
        without = ratio({key: (value.sum() - value) / (n - 1) for key, value in means.items()})
        whole = ratio({key: value.mean() for key, value in means.items()})
        found[name] = float(whole), float(np.sqrt((n - 1) * without.var()))
    return found


def mean_and_error(chain_means):
    return float(chain_means.mean()), float(chain_means.std(ddof=1) / math.sqrt(len(chain_means)))


def deviations(run, extent):
    """(ours - independent) / combined error of every quantity."""
    found = estimates(run.observables, extent)
    return {
        name: (value - INDEPENDENT[extent][name][0]) / math.hypot(error, INDEPENDENT[extent][name][1])
        for name, (value, error) in found.items()
    }


def worst(values):
    return max(abs(value) for value in values.values())


def assert_mean(chain_means, wanted, sigma=4.0):
    value, error = mean_and_error(np.asarray(chain_means))
    assert abs(value - wanted) < sigma * error, f"{value} +- {error}, must be {wanted}"


def make_flow(ndim=2, size=0.15, seed=3, **structure):
    """A flow far from the identity and from any use: moderate random weights."""
    flow = lfq.AffineFlow(ndim=ndim, **structure)
    flow.weights = size * np.random.default_rng(seed).normal(size=flow.n_weights)
    return flow


def make_theory(kind, shape=(8, 8), beta=0.576, lam=0.5):
    extent = {"large": 64, "larger": 256}
    theory = lfq.Phi4((extent[kind],) * 2 if kind in extent else shape, beta=beta, lam=lam)
    flows = {"flow": "exp(-|s|)", "smooth flow": "exp(s)", "site flow": "site"}
    return theory.pullback(make_flow(len(shape), scale=flows[kind])) if kind in flows else theory


def thermal(theory, n_chains, seed, n_trajectories=100):
    """A thermalised state, by plain HMC in fine steps: coarse ones cannot leave the tails of a start."""
    plain = lfq.HMC(physical(theory), tau=1.3, n_steps=26)
    block = plain.advance(plain.start(n_chains, seed), 1, n_trajectories)
    return replace(lfq.HMC(theory).start(n_chains, seed, phi=block.phi), trajectory=n_trajectories)


def sample(hmc, n_chains, n_samples, seed, thin=1, n_warmup=50):
    """The run of a thermalised state, as one block."""
    state = hmc.advance(thermal(hmc.theory, n_chains, seed), 1, n_warmup).state
    return hmc.advance(state, n_samples, thin)


KINDS = pytest.mark.parametrize("kind", ["plain", "flow"])
# Kernels lay out large lattices in another way: where bits or rounding matter they are a case of their own.
CASES = pytest.mark.parametrize("kind", ["plain", "flow", "large"])
# exp(-|s|) has a kink: at s = 0 the force jumps, and rounding decides to which side. In float32 that happens.
SMOOTH_CASES = pytest.mark.parametrize("kind", ["plain", "smooth flow", "large"])
INTEGRATORS = pytest.mark.parametrize("integrator", sorted(lfq.INTEGRATORS))


def begin(hmc, n_chains, seed, first_chain=0):
    """Chains at their beginning; on a large lattice later, where some trajectories are rejected."""
    state = hmc.start(n_chains, seed, first_chain=first_chain)
    return replace(hmc, n_steps=30).advance(state, 1, 30).state if hmc.theory.volume == 64 * 64 else state


def n_steps_of(kind):
    return 12 if kind == "large" else 4


def assert_same_blocks(found, wanted):
    """The same bits in everything but the wall time."""
    np.testing.assert_array_equal(found.state.latent, wanted.state.latent)
    np.testing.assert_array_equal(found.phi, wanted.phi)
    np.testing.assert_array_equal(found.dh, wanted.dh)
    np.testing.assert_array_equal(found.accepted, wanted.accepted)
    for name in OBSERVABLES:
        np.testing.assert_array_equal(found.observables[name], wanted.observables[name])
    if wanted.flipped is not None:
        np.testing.assert_array_equal(found.flipped, wanted.flipped)


# ---- dynamics -------------------------------------------------------------------------------


@INTEGRATORS
def test_reversibility_with_kinks(integrator, rng):
    """float64, where no s comes near enough to 0."""
    check_reversibility("flow", integrator, "backward", np.dtype(float), rng)


@SMOOTH_CASES
@INTEGRATORS
@pytest.mark.parametrize("way", ["backward", "negated momenta"])
def test_reversibility(kind, integrator, way, dtype, rng):
    check_reversibility(kind, integrator, way, dtype, rng)


@INTEGRATORS
def test_reversibility_beyond_the_second_level_cache(integrator, dtype, rng):
    check_reversibility("larger", integrator, "negated momenta", dtype, rng)


def check_reversibility(kind, integrator, way, dtype, rng):
    hmc = lfq.HMC(make_theory(kind), tau=1.0, n_steps=10, integrator=integrator, dtype=str(dtype))
    shape = (5, *hmc.theory.shape)
    z, momenta = ((scale * rng.normal(size=shape)).astype(dtype) for scale in (0.7, 1))
    there = hmc.evolve(z, momenta)
    assert all(part.dtype == dtype for part in there)
    assert np.abs(there[0] - z).max() > 1
    if way == "backward":
        back = hmc.evolve(*there, backward=True)
    else:
        back = hmc.evolve(there[0], -there[1])
        back = back[0], -back[1]
    tolerance = 2000 * np.finfo(dtype).eps
    assert np.abs(back[0] - z).max() < tolerance
    assert np.abs(back[1] - momenta).max() < tolerance


@KINDS
@INTEGRATORS
def test_order_of_the_energy_error(kind, integrator, rng):
    """Slope of log rms(dH) in log(step size) at fixed length, to 0.15.

    The flow ends in a site map: exp(-|s|) has a kink, so its force jumps and no integrator has an order.
    """
    theory = independent_theory(8)
    if kind == "flow":
        affine = make_flow(scale="even", features=2, size=0.1)
        theory = theory.pullback(lfq.Compose([affine, make_flow(scale="site", size=0.1)]))
    z, momenta = thermal(theory, 32, 10, 50).latent, rng.normal(size=(32, 8, 8))

    def energy(z, momenta):
        return theory.action(z) + 0.5 * (momenta**2).sum(axis=(1, 2))

    steps, errors = np.array([16, 32, 64]), []
    for n in steps:
        there = lfq.HMC(theory, n_steps=n, integrator=integrator).evolve(z, momenta)
        errors.append(np.sqrt(((energy(*there) - energy(z, momenta)) ** 2).mean()))
    assert errors[-1] > 1e-10  # well above rounding
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - lfq.INTEGRATORS[integrator].order) < 0.15


@pytest.mark.parametrize("integrator", sorted(lfq.INTEGRATORS))
def test_integrators_are_consistent_and_symmetric(integrator):
    scheme = lfq.INTEGRATORS[integrator]
    for fractions in (scheme.kick, scheme.drift):
        assert sum(fractions) == pytest.approx(1, abs=1e-14)
        assert fractions == pytest.approx(fractions[::-1], abs=1e-15)


def test_omf2_is_the_minimum_norm_one():
    """Its parameter in closed form (hep-lat/0505020), and dH below a fifth of leapfrog's at the same step."""
    root = (2 * math.sqrt(326) + 36) ** (1 / 3)
    assert lfq.INTEGRATORS["omf2"].kick[0] == pytest.approx(0.5 - root / 12 + 1 / (6 * root), rel=1e-14)
    theory = independent_theory(8)
    state, rms = thermal(theory, 64, 12), {}
    for name in ("leapfrog", "omf2"):
        rms[name] = lfq.HMC(theory, n_steps=16, integrator=name).advance(state, 10).dh.std()
    assert rms["omf2"] < 0.2 * rms["leapfrog"]


@SMOOTH_CASES
@INTEGRATORS
def test_two_half_trajectories_make_a_whole(kind, integrator, dtype, rng):
    whole = lfq.HMC(make_theory(kind), tau=1.2, n_steps=8, integrator=integrator, dtype=str(dtype))
    half = replace(whole, tau=0.6, n_steps=4)
    shape = (5, *whole.theory.shape)
    z, momenta = ((scale * rng.normal(size=shape)).astype(dtype) for scale in (0.7, 1))
    for found, wanted in zip(half.evolve(*half.evolve(z, momenta)), whole.evolve(z, momenta), strict=True):
        assert np.abs(found - wanted).max() < 2000 * np.finfo(dtype).eps


@KINDS
def test_evolve_leaves_its_arguments_alone_and_takes_any_leading_axes(kind, rng):
    hmc = lfq.HMC(make_theory(kind), n_steps=3)
    z, momenta = rng.normal(size=(2, 3, 8, 8)), rng.normal(size=(2, 3, 8, 8))
    kept = z.copy(), momenta.copy()
    found = hmc.evolve(z, momenta)
    np.testing.assert_array_equal(z, kept[0])
    np.testing.assert_array_equal(momenta, kept[1])
    single = hmc.evolve(z[1, 2], momenta[1, 2])
    for many, one in zip(found, single, strict=True):
        assert many.shape == z.shape and one.shape == (8, 8)
        np.testing.assert_array_equal(many[1, 2], one)


@KINDS
@INTEGRATORS
def test_exp_minus_dh_averages_to_one(kind, integrator):
    """4 sigma, at steps so coarse that <dH> is far from zero."""
    steps = {"leapfrog": 4, "omf2": 2, "omf4": 1}[integrator] + (kind == "flow")
    dh = sample(lfq.HMC(make_theory(kind), n_steps=steps, integrator=integrator), 256, 400, seed=11).dh
    value, error = mean_and_error(np.exp(-dh).mean(axis=0))
    assert error < 0.02 and dh.mean() > 5 * error
    assert abs(value - 1) < 4 * error


# ---- exact results --------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shape", [(10,), (8, 6), (4, 6, 4)], ids=str)
def test_free_propagator(kind, shape):
    """4 sigma."""
    n_chains = 64 if kind == "flow" and len(shape) > 2 else 256
    check_free_propagator(make_theory(kind, shape, 0.6 / len(shape), 0.0), 8, n_chains, 500)


def test_free_propagator_of_a_large_lattice():
    """Kernels lay these out in another way; 4 sigma."""
    check_free_propagator(lfq.Phi4((64, 64), 0.4, 0.0), 12, 32, 100)


def check_free_propagator(theory, n_steps, n_chains, n_samples):
    """lam = 0: G(p) = 1 / (beta p^2 + 2 - 2 D beta) for p = 0 and p_min, <phi^2> its mean."""
    shape, ndim, beta = theory.shape, theory.ndim, physical(theory).beta
    run = sample(lfq.HMC(theory, tau=1.3, n_steps=n_steps), n_chains, n_samples, seed=5)

    def propagator(*momenta):
        return 1 / (beta * sum(4 * math.sin(p / 2) ** 2 for p in momenta) + 2 - 2 * ndim * beta)

    means = chain_means(run.observables, theory)
    assert_mean(means["chi"], propagator(0.0))
    assert_mean(means["G_pmin"], np.mean([propagator(2 * math.pi / extent) for extent in shape]))
    modes = [[2 * math.pi * k / extent for k in range(extent)] for extent in shape]
    phi2 = np.mean([propagator(*p) for p in itertools.product(*modes)])
    assert mean_and_error(means["phi2"])[1] < 5e-3 * phi2
    assert_mean(means["phi2"], phi2)


@KINDS
@pytest.mark.parametrize("lam", [0.1, 0.5, 2.0])
def test_independent_sites(kind, lam):
    """beta = 0: every site is a one-dimensional integral; 4 sigma."""
    run = sample(lfq.HMC(make_theory(kind, (6, 4), 0.0, lam), n_steps=10), 256, 500, seed=6)

    def weighted(x, power):
        return x**power * math.exp(-(1 - 2 * lam) * x**2 - lam * x**4)

    def moment(power):
        return quad(weighted, -12, 12, args=(power,), epsabs=1e-12)[0]

    means = chain_means(run.observables, lfq.Phi4((6, 4), 0.0, lam))
    phi2 = moment(2) / moment(0)
    assert_mean(means["phi2"], phi2)
    assert_mean(means["phi4"], moment(4) / moment(0))
    assert_mean(means["chi"], phi2)
    assert_mean(means["nn"], 0)
    assert_mean(means["M"], 0)


@KINDS
@pytest.mark.parametrize("shape", [(12,), (8, 6), (4, 6, 4), (4, 2, 2, 2)], ids=str)
def test_virial_identity(kind, shape):
    """-beta <phi sum_nn phi> + 2 (1 - 2 lam) <phi^2> + 4 lam <phi^4> = 1, sum_nn over 2 D sites; 4 sigma."""
    beta, lam = 0.9 / len(shape), 0.3
    n_chains = 64 if kind == "flow" and len(shape) > 2 else 256
    run = sample(lfq.HMC(make_theory(kind, shape, beta, lam), n_steps=8), n_chains, 400, seed=7)
    o = run.observables
    virial = -beta * 2 * len(shape) * o["nn"] + 2 * (1 - 2 * lam) * o["phi2"] + 4 * lam * o["phi4"]
    means = virial.mean(axis=0)
    assert mean_and_error(means)[1] < 0.01
    assert_mean(means, 1)


# ---- agreement with an independent code -----------------------------------------------------


@pytest.fixture(scope="module")
def plain_8():
    return sample(lfq.HMC(independent_theory(8), n_steps=6), 256, 3000, seed=21)


def test_hmc_agrees_with_an_independent_code(plain_8):
    """L = 8; 3.5 sigma."""
    assert worst(deviations(plain_8, 8)) < 3.5


def test_float32_agrees_with_an_independent_code():
    """L = 8; 3.5 sigma."""
    hmc = lfq.HMC(independent_theory(8), n_steps=6, dtype="float32")
    assert worst(deviations(sample(hmc, 256, 3000, seed=22), 8)) < 3.5


@pytest.mark.parametrize("structure", ["paper", "hidden, bias, exp(s)", "upsampled"])
def test_flow_hmc_agrees_with_an_independent_code(structure):
    """Untrained flows, L = 8; 3.5 sigma."""
    flow = {
        "paper": lambda: make_flow(size=0.2),
        "hidden, bias, exp(s)": lambda: make_flow(hidden=(2,), bias=True, scale="exp(s)"),
        "upsampled": lambda: lfq.Compose([make_flow(), lfq.UpsampleMap(0.9, 0.7, 0.4), make_flow(seed=4)]),
    }[structure]()
    run = sample(lfq.HMC(independent_theory(8).pullback(flow), n_steps=10), 128, 1000, seed=23)
    assert 0.5 < run.accepted.mean() < 0.99
    assert worst(deviations(run, 8)) < 3.5


def test_agreement_detects_a_coupling_off_by_one_percent():
    hmc = lfq.HMC(lfq.Phi4((8, 8), beta=1.01 * 0.576, lam=0.5), n_steps=6)
    found = deviations(sample(hmc, 256, 3000, seed=21), 8)
    assert all(abs(found[name]) > 7 for name in ("phi2", "nn", "chi", "action_density", "xi"))


@pytest.mark.parametrize("log_det", [True, False], ids=["with log-det", "without"])
def test_agreement_detects_a_missing_log_det(log_det):
    """Flow-HMC written here with NumPy, right and then wrong: the check tells them apart."""
    theory, rng = independent_theory(8), np.random.default_rng(24)
    flow, n, steps = make_flow(size=0.2), 128, 6

    def potential(z):
        x, log_dets = flow.forward(z)
        force = flow.vjp(z, theory.force(x), np.full(n, float(log_det)))
        return theory.action(x) - log_det * log_dets, force

    z, samples = flow.inverse(thermal(theory, n, 25).latent)[0], []
    s, force = potential(z)
    for trajectory in range(250):
        p = rng.normal(size=z.shape)
        before = s + 0.5 * (p**2).sum(axis=(1, 2))
        z_new, force_new = z, force
        for _ in range(steps):
            p = p + 0.5 / steps * force_new
            z_new = z_new + 1 / steps * p
            s_new, force_new = potential(z_new)
            p = p + 0.5 / steps * force_new
        accept = rng.random(n) < np.exp(before - s_new - 0.5 * (p**2).sum(axis=(1, 2)))
        z = np.where(accept[:, None, None], z_new, z)
        force = np.where(accept[:, None, None], force_new, force)
        s = np.where(accept, s_new, s)
        if trajectory >= 50:
            samples.append(theory.measure(flow.forward(z)[0])["phi2"])
    value, error = mean_and_error(np.mean(samples, axis=0))
    deviation = abs(value - INDEPENDENT[8]["phi2"][0]) / error
    assert deviation < 3.5 if log_det else deviation > 10


def test_without_the_accept_step_the_result_is_biased():
    """At a large step phi2 is off by more than 5 sigma, while the same step with accept is within 3.5."""
    theory, n, rng = independent_theory(8), 256, np.random.default_rng(31)
    hmc, start = lfq.HMC(theory, n_steps=4), thermal(theory, n, 32)
    phi, samples = start.latent, []
    for trajectory in range(300):
        phi, _ = hmc.evolve(phi, rng.normal(size=phi.shape))
        if trajectory >= 50:
            samples.append(theory.measure(phi)["phi2"])
    value, error = mean_and_error(np.mean(samples, axis=0))
    wanted = INDEPENDENT[8]["phi2"][0]
    assert abs(value - wanted) > 5 * error
    with_accept = hmc.advance(start, 300)
    assert with_accept.accepted.mean() < 0.85
    assert_mean(with_accept.observables["phi2"].mean(axis=0), wanted, 3.5)


@pytest.mark.validate
@pytest.mark.parametrize("extent", [8, 16, 32])
def test_hmc_agrees_with_an_independent_code_at_length(extent):
    """3.5 sigma."""
    length = {8: (6, 256, 10000, 1), 16: (8, 256, 8000, 2), 32: (11, 128, 3000, 4)}
    n_steps, n_chains, n_samples, thin = length[extent]
    hmc = lfq.HMC(independent_theory(extent), n_steps=n_steps)
    run = sample(hmc, n_chains, n_samples, seed=41, thin=thin, n_warmup=50 * extent)
    assert worst(deviations(run, extent)) < 3.5


@pytest.mark.validate
@pytest.mark.parametrize("prior", ["interleave", "upsample"])
def test_flow_hmc_with_a_trained_flow_agrees_with_an_independent_code(prior):
    """L = 16 through a flow trained from L = 8; 3.5 sigma."""
    target, coarse = independent_theory(16), independent_theory(8)
    maker = {"interleave": lfq.Interleave, "upsample": lfq.Upsample}[prior]
    fit = lfq.train(lfq.AffineFlow(), maker(coarse), target, n_steps=300, batch_size=256, seed=42)
    hmc = lfq.HMC(target.pullback(fit.flow), n_steps=10).tune(0.9, seed=43)
    run = sample(hmc, 128, 6000, seed=44, n_warmup=500)
    assert worst(deviations(run, 16)) < 3.5


# ---- bits -----------------------------------------------------------------------------------


@CASES
def test_threads_do_not_change_a_bit(kind, dtype):
    blocks = []
    for threads in (1, 2, 3):
        hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind), dtype=str(dtype), n_threads=threads)
        blocks.append(hmc.advance(begin(hmc, 37, seed=51), 12))
    assert 0 < blocks[0].accepted.mean() < 1
    for block in blocks[1:]:
        assert_same_blocks(block, blocks[0])


@CASES
def test_one_call_of_64_chains_is_eight_calls_of_8(kind, dtype):
    hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind), dtype=str(dtype))
    whole = hmc.advance(begin(hmc, 64, seed=52), 10)
    assert not np.array_equal(whole.phi[0], whole.phi[8])
    for first in range(0, 64, 8):
        part = hmc.advance(begin(hmc, 8, seed=52, first_chain=first), 10)
        chains = slice(first, first + 8)
        np.testing.assert_array_equal(part.state.latent, whole.state.latent[chains])
        np.testing.assert_array_equal(part.phi, whole.phi[chains])
        np.testing.assert_array_equal(part.dh, whole.dh[:, chains])
        np.testing.assert_array_equal(part.accepted, whole.accepted[:, chains])
        for name in OBSERVABLES:
            np.testing.assert_array_equal(part.observables[name], whole.observables[name][:, chains])


@KINDS
@pytest.mark.parametrize("block_size", [1, 5, 7, 30, 100, None])
def test_blocks_of_any_size_make_one_chain(kind, block_size, dtype):
    hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind), dtype=str(dtype))
    start = begin(hmc, 9, seed=53)
    whole = hmc.advance(start, 30)
    blocks = list(hmc.blocks(start, 30, block_size=block_size))
    if block_size:
        assert [len(block.dh) for block in blocks[:-1]] == [block_size] * ((30 - 1) // block_size)
    np.testing.assert_array_equal(blocks[-1].state.latent, whole.state.latent)
    np.testing.assert_array_equal(blocks[-1].phi, whole.phi)
    np.testing.assert_array_equal(np.concatenate([block.accepted for block in blocks]), whole.accepted)
    for name in OBSERVABLES:
        joined = np.concatenate([block.observables[name] for block in blocks])
        np.testing.assert_array_equal(joined, whole.observables[name])
    np.testing.assert_array_equal(np.concatenate([block.dh for block in blocks]), whole.dh)


@CASES
def test_resuming_from_a_state_in_pieces(kind):
    """A copy of a block's state, with its arrays written out and read back, continues the chain."""
    hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind))
    start = begin(hmc, 9, seed=54, first_chain=3)
    whole = hmc.advance(start, 20)
    state = hmc.advance(start, 8).state
    assert (state.trajectory, state.seed, state.first_chain) == (start.trajectory + 8, 54, 3)
    pieces = np.frombuffer(state.latent.tobytes()).reshape(state.latent.shape)
    resumed = hmc.advance(lfq.State(pieces, state.trajectory, 54, 3), 12)
    np.testing.assert_array_equal(resumed.state.latent, whole.state.latent)
    np.testing.assert_array_equal(resumed.observables["phi4"], whole.observables["phi4"][8:])
    assert resumed.state.trajectory == whole.state.trajectory
    elsewhere = hmc.advance(lfq.State(pieces, state.trajectory + 1, 54, 3), 12)
    assert not np.array_equal(elsewhere.state.latent, whole.state.latent)


def test_sample_continues_from_a_state():
    hmc = lfq.HMC(make_theory("plain"), n_steps=4)
    whole = hmc.sample(9, 30, n_warmup=5, seed=55)
    first = hmc.sample(9, 10, n_warmup=5, seed=55)
    second = hmc.sample(9, 20, start=first.state)
    np.testing.assert_array_equal(second.phi, whole.phi)
    np.testing.assert_array_equal(second.observables["M"], whole.observables["M"][10:])


@SMOOTH_CASES
def test_float32_starts_out_along_float64(kind):
    """The same random numbers: the fields of the first trajectory differ by rounding, dH by that of S."""
    theory, blocks = make_theory(kind), {}
    phi = None if kind == "plain" else thermal(physical(theory), 16, 56).latent
    for name in ("float64", "float32"):
        hmc = lfq.HMC(theory, n_steps=2 * n_steps_of(kind), dtype=name)
        state = hmc.start(16, seed=57, phi=phi)
        assert state.latent.dtype == name
        blocks[name] = hmc.advance(state, 1)
    np.testing.assert_allclose(blocks["float32"].dh, blocks["float64"].dh, rtol=0, atol=2e-6 * theory.volume)
    np.testing.assert_array_equal(blocks["float32"].accepted, blocks["float64"].accepted)
    np.testing.assert_allclose(blocks["float32"].phi, blocks["float64"].phi, rtol=0, atol=2e-5)


@CASES
def test_avx2_and_avx512_give_the_same_bits(kind, dtype):
    pair = ["x86-64-v3", "x86-64-v4"]
    if not set(pair) <= set(_core.isas().split(",")):
        pytest.skip("needs a machine with AVX2 and AVX-512")
    before, blocks = _core.isa(), []
    try:
        for name in pair:
            _core.set_isa(name)
            hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind), dtype=str(dtype))
            blocks.append(hmc.advance(begin(hmc, 21, seed=58), 6))
    finally:
        _core.set_isa(before)
    assert 0 < blocks[0].accepted.mean() < 1
    if kind == "large":  # lanes hold parts of a chain: sums, but not fields, depend on how many there are
        np.testing.assert_array_equal(blocks[0].phi, blocks[1].phi)
        np.testing.assert_array_equal(blocks[0].accepted, blocks[1].accepted)
        np.testing.assert_allclose(
            blocks[0].dh, blocks[1].dh, rtol=0, atol=1e-3 if dtype == np.float32 else 1e-9
        )
    else:
        assert_same_blocks(*blocks)


@pytest.mark.parametrize("shape", [(24, 172), (24, 16, 16), (48, 8, 16), (16, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_fields_do_not_depend_on_how_many_slices_a_lane_has(shape, dtype, rng):
    """Even numbers of slices go in pairs, odd ones row by row."""
    pair = ["x86-64-v3", "x86-64-v4"]
    if not set(pair) <= set(_core.isas().split(",")):
        pytest.skip("needs a machine with AVX2 and AVX-512")
    hmc = lfq.HMC(lfq.Phi4(shape, beta=0.3, lam=0.5), tau=0.5, n_steps=5, dtype=np.dtype(dtype).name)
    start, before, found = rng.standard_normal((2, 3, *shape)).astype(dtype), _core.isa(), []
    try:
        for name in pair:
            _core.set_isa(name)
            found.append(hmc.evolve(*start))
    finally:
        _core.set_isa(before)
    for narrow, wide in zip(*found, strict=True):
        np.testing.assert_array_equal(narrow, wide)


# ---- samples and runs -----------------------------------------------------------------------


@CASES
def test_thin_keeps_every_third_trajectory(kind):
    hmc = lfq.HMC(make_theory(kind), n_steps=n_steps_of(kind))
    start = begin(hmc, 9, seed=61)
    every, third = hmc.advance(start, 12), hmc.advance(start, 4, thin=3)
    assert third.dh.shape == third.accepted.shape == (12, 9)
    np.testing.assert_array_equal(third.dh, every.dh)
    np.testing.assert_array_equal(third.phi, every.phi)
    assert third.state.trajectory == every.state.trajectory == start.trajectory + 12
    for name in OBSERVABLES:
        assert third.observables[name].shape == (4, 9)
        np.testing.assert_array_equal(third.observables[name], every.observables[name][2::3])
    run = hmc.sample(9, 4, thin=3, start=start)
    assert (run.thin, run.n_samples, run.n_chains) == (3, 4, 9)
    np.testing.assert_array_equal(run.phi, every.phi)


@KINDS
def test_run_arithmetic(kind):
    theory = make_theory(kind, (6, 8), 0.5, 0.7)
    physical = theory.theory if kind == "flow" else theory
    run = lfq.HMC(theory, n_steps=4).sample(11, 25, n_warmup=10, seed=62)
    o = run.observables
    np.testing.assert_allclose(o["chi"], 48 * o["M"] ** 2, rtol=1e-14)
    np.testing.assert_array_equal(o["abs_M"], np.abs(o["M"]))
    np.testing.assert_allclose(o["M2"], o["M"] ** 2, rtol=1e-14)
    np.testing.assert_allclose(o["action_density"][-1], physical.action(run.phi) / 48, rtol=1e-12)
    last = physical.measure(run.phi)
    for name in OBSERVABLES:
        np.testing.assert_allclose(o[name][-1], last[name], rtol=1e-12, atol=1e-14)
    assert run.acceptance == run.accepted.mean()
    assert run.force_evaluations_per_trajectory == (4 if kind == "flow" else 5)
    value, error = run.exp_minus_dh()
    quarters = np.concatenate([np.exp(-part).mean(axis=0) for part in np.array_split(run.dh, 4)])
    assert value == pytest.approx(np.exp(-run.dh).mean(), rel=1e-14)
    assert error == pytest.approx(quarters.std(ddof=1) / math.sqrt(44), rel=1e-12)
    assert run.seconds > 0 and run.seconds_per_trajectory > 0


@CASES
def test_accept_decisions_follow_dh(kind):
    """dH is that of the trajectory, and a rejected one leaves the chain where it was."""
    theory = make_theory(kind)
    hmc = lfq.HMC(theory, n_steps=n_steps_of(kind))
    state = thermal(theory, 64, 63, 50)
    block = hmc.advance(state, 1)
    momenta = np.empty_like(state.latent)
    _core.normal(63, _core.PURPOSES["momenta"], state.trajectory, 0, 64, momenta)
    z, p = hmc.evolve(state.latent, momenta)
    dh = theory.action(z) - theory.action(state.latent) + 0.5 * (p**2 - momenta**2).sum(axis=(1, 2))
    np.testing.assert_allclose(block.dh[0], dh, rtol=1e-12, atol=1e-10)
    accepted = block.accepted[0]
    assert accepted[dh <= 0].all() and not accepted[dh > 40].any() and 0 < accepted.mean() < 1
    np.testing.assert_array_equal(block.state.latent[~accepted], state.latent[~accepted])
    np.testing.assert_allclose(block.state.latent[accepted], z[accepted], rtol=0, atol=1e-12)


@KINDS
def test_advance_leaves_the_state_alone(kind):
    hmc = lfq.HMC(make_theory(kind), n_steps=4)
    state = hmc.start(5, seed=64)
    kept = state.latent.copy()
    first = hmc.advance(state, 3)
    np.testing.assert_array_equal(state.latent, kept)
    assert_same_blocks(hmc.advance(state, 3), first)
    assert hmc.advance(state, 0).state.trajectory == state.trajectory


@pytest.mark.parametrize("structure", ["paper", "hidden, bias", "interleaved", "upsampled"])
def test_start_from_fields_goes_through_the_flow(structure, dtype, rng):
    flow = {
        "paper": lambda: make_flow(),
        "hidden, bias": lambda: make_flow(hidden=(4,), bias=True, n_blocks=2),
        "interleaved": lambda: lfq.Compose([lfq.InterleaveMap(), make_flow()]),
        "upsampled": lambda: lfq.Compose([lfq.UpsampleMap(1.2, 0.4), make_flow()]),
    }[structure]()
    pulled = lfq.Phi4((8, 8), beta=0.576, lam=0.5).pullback(flow)
    phi = rng.normal(size=(7, 8, 8))
    hmc = lfq.HMC(pulled, dtype=str(dtype))
    state = hmc.start(7, seed=65, phi=phi, first_chain=2)
    assert (state.trajectory, state.first_chain, state.n_chains) == (0, 2, 7)
    assert state.latent.dtype == dtype and np.abs(state.latent - phi).max() > 0.1
    tolerance = 2000 * np.finfo(dtype).eps
    np.testing.assert_allclose(pulled.field(state.latent), phi, rtol=0, atol=tolerance)
    plain = lfq.HMC(pulled.theory, dtype=str(dtype)).start(7, seed=65, phi=phi)
    np.testing.assert_array_equal(plain.latent, phi.astype(dtype))


@KINDS
@pytest.mark.parametrize("acceptance", [0.7, 0.9])
def test_tuning_reaches_the_acceptance(kind, acceptance):
    """Within 0.03, with the fewest steps that do (to the noise of the pilot, 0.03)."""
    theory = make_theory(kind, (16, 16), 0.634) if kind == "plain" else make_theory(kind)
    hmc = lfq.HMC(theory, tau=3.0, n_steps=3).tune(acceptance, seed=71)
    assert (hmc.theory, hmc.tau, hmc.integrator) == (theory, 3.0, lfq.INTEGRATORS["leapfrog"])
    run = sample(hmc, 128, 200, seed=72)
    assert abs(run.accepted.mean() - acceptance) < 0.03
    coarser = replace(hmc, n_steps=hmc.n_steps - 1).advance(run.state, 200)
    assert coarser.accepted.mean() < acceptance - 0.01 + 0.03


def test_tuning_comes_back_from_a_step_that_diverges():
    hmc = lfq.HMC(independent_theory(8), tau=3.0, n_steps=1).tune(0.8, seed=73)
    assert 0.75 < sample(hmc, 128, 200, seed=74).accepted.mean() < 0.9


# ---- errors ---------------------------------------------------------------------------------


@CASES
def test_divergence_names_chain_and_trajectory_and_keeps_the_state(kind, dtype):
    theory = make_theory(kind)
    good = lfq.HMC(theory, n_steps=20, dtype=str(dtype))
    start = good.start(20, seed=81, first_chain=7)
    state, expected = good.advance(start, 3).state, good.advance(start, 6)
    kept = state.latent.copy()
    with pytest.raises(lfq.NotFiniteError) as error:
        replace(good, tau=1e6).advance(state, 5)
    chain, trajectory = map(int, re.search(r"chain (\d+) \(trajectory\D*(\d+)\)", str(error.value)).groups())
    assert (chain, trajectory) == (7, state.trajectory)
    np.testing.assert_array_equal(state.latent, kept)
    np.testing.assert_array_equal(good.advance(state, 3).state.latent, expected.state.latent)


def test_divergence_names_the_chain_that_diverged():
    """One chain far out, in the second group of any vector width: it alone is named."""
    theory = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
    hmc = lfq.HMC(theory, n_steps=4)
    phi = np.random.default_rng(82).normal(size=(24, 8, 8))
    phi[19] = 1e90
    with pytest.raises(lfq.NotFiniteError, match="chain 119 "):
        hmc.advance(hmc.start(24, seed=83, phi=phi, first_chain=100), 2)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(theory="phi4"), TypeError, "theory"),
        (dict(tau=0.0), ValueError, "tau"),
        (dict(tau=-1.0), ValueError, "tau"),
        (dict(tau=math.nan), ValueError, "tau"),
        (dict(tau="1"), ValueError, "tau"),
        (dict(n_steps=0), ValueError, "n_steps"),
        (dict(n_steps=2.5), TypeError, "n_steps"),
        (dict(integrator="omf3"), ValueError, "integrator.*leapfrog"),
        (dict(integrator=None), TypeError, "integrator"),
        (dict(integrator=lfq.Integrator("short", (1.0,), (1.0,), 1)), ValueError, "integrator"),
        (dict(dtype="float16"), ValueError, "dtype"),
        (dict(n_threads=-1), ValueError, "n_threads"),
    ],
)
def test_bad_settings(arguments, error, match):
    with pytest.raises(error, match=match):
        lfq.HMC(**{"theory": lfq.Phi4((4, 4), beta=0.5, lam=0.5), **arguments})


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda h: h.start(0, seed=0), ValueError, "n_chains"),
        (lambda h: h.start(4, seed=-1), ValueError, "seed"),
        (lambda h: h.start(4, seed=2**64), ValueError, "seed"),
        (lambda h: h.start(4, seed=0.5), TypeError, "seed"),
        (lambda h: h.start(4, seed=0, first_chain=2**32), ValueError, "first_chain"),
        (lambda h: h.start(4, seed=0, phi=np.zeros((3, 4, 4))), ValueError, "phi"),
        (lambda h: h.start(4, seed=0, phi=np.zeros((4, 4, 6))), ValueError, "phi"),
        (lambda h: h.start(4, seed=0, phi=np.zeros((4, 4, 4), complex)), TypeError, "phi"),
        (lambda h: h.start(4, seed=0, phi=np.full((4, 4, 4), np.nan)), lfq.NotFiniteError, "phi: chain 0"),
        (lambda h: h.advance(h.start(4, seed=0), -1), ValueError, "n_samples"),
        (lambda h: h.advance(h.start(4, seed=0), 1, thin=0), ValueError, "thin"),
        (lambda h: h.advance(lfq.State(np.zeros((4, 6, 6)), 0, 0), 1), ValueError, "latent"),
        (lambda h: h.advance(lfq.State(np.full((4, 4, 4), np.inf), 0, 0), 1), lfq.NotFiniteError, "chain 0"),
        (lambda h: h.evolve(np.zeros((2, 4, 4)), np.zeros((3, 4, 4))), ValueError, "momenta"),
        (lambda h: h.evolve(np.zeros((4, 5)), np.zeros((4, 5))), ValueError, "latent"),
        (lambda h: h.evolve(np.zeros((4, 4)), np.full((4, 4), np.nan)), lfq.NotFiniteError, "momenta"),
        (lambda h: h.sample(4, 0), ValueError, "n_samples"),
        (lambda h: h.sample(4, 10, n_warmup=-1), ValueError, "n_warmup"),
        (lambda h: h.tune(1.0), ValueError, "acceptance"),
        (lambda h: h.tune(0.9, n_chains=0), ValueError, "n_chains"),
        (lambda h: lfq.Run.from_blocks(h.theory, h, []), ValueError, "blocks"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(lfq.HMC(lfq.Phi4((4, 4), beta=0.5, lam=0.5)))


def test_a_flow_for_other_lattices_is_refused():
    with pytest.raises(ValueError, match="axes"):
        lfq.Phi4((4, 4, 4), beta=0.2, lam=0.5).pullback(lfq.AffineFlow(ndim=2))
    with pytest.raises(ValueError, match="odd"):
        lfq.Phi4((4, 5), beta=0.2, lam=0.5).pullback(lfq.AffineFlow(ndim=2))


def test_progress_is_reported(capsys):
    hmc, calls = lfq.HMC(lfq.Phi4((4, 4), beta=0.5, lam=0.5)), []
    hmc.sample(4, 10, seed=91, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10) and [done for done, _ in calls] == sorted({done for done, _ in calls})
    hmc.sample(4, 10, seed=91, progress=True)
    assert "10/10" in capsys.readouterr().err
