"""Training: against the same loop in NumPy, exact bounds and solutions, and bits that must not change.

Statistical tests use fixed seeds; each says how many sigma it allows.
"""

import math

import numpy as np
import pytest

import lfq
from lfq import _core
from lfq.train import effective_sample_size, independence_acceptance, train, train_ladder

TARGET = lfq.Phi4((4, 4), beta=0.5, lam=0.5)
# Where the paper's little net reaches a large ESS from every prior.
WEAK = lfq.Phi4((4, 4), beta=0.2, lam=0.2)
KINDS = pytest.mark.parametrize("kind", ["gaussian", "lattice", "interleave", "upsample"])


def make_prior(kind, target=TARGET, beta=0.4, **chain):
    chain = {"n_between": 3, "n_warmup": 150, "tau": 1.3, "n_steps": 13, **chain}
    coarse = lfq.Phi4(tuple(extent // 2 for extent in target.shape), beta=beta, lam=target.lam)
    return {
        "gaussian": lambda: lfq.Gaussian(target.shape),
        "lattice": lambda: lfq.Lattice(lfq.Phi4(target.shape, beta=beta, lam=target.lam), **chain),
        "interleave": lambda: lfq.Interleave(coarse, **chain),
        "upsample": lambda: lfq.Upsample(coarse, width=0.3, **chain),
    }[kind]()


def assert_same_fits(found, wanted):
    np.testing.assert_array_equal(found.flow.weights, wanted.flow.weights)
    for name in ("loss", "ess", "std_log_w", "learning_rate"):
        np.testing.assert_array_equal(found.history[name], wanted.history[name])
    assert (found.ess, found.acceptance, found.std_log_w) == (wanted.ess, wanted.acceptance, wanted.std_log_w)
    if found.prior.map is not None:
        np.testing.assert_array_equal(found.prior.map.weights, wanted.prior.map.weights)


def log_weights(fit, n, seed):
    """(fields, log w) of fresh samples, from the public pieces of a fit."""
    z = fit.prior.sample(n, seed)
    x, log_det = fit.flow.forward(z)
    return x, log_det - fit.target.action(x) - fit.prior.log_prob(z)


# ---- the loop -------------------------------------------------------------------------------


@KINDS
def test_training_is_adam_on_the_gradient_of_the_loss(kind):
    """Six steps of the same loop in Python: batches, losses, ESS, schedule and weights."""
    n, n_steps, rate, seed = 32, 6, 0.02, 11
    prior, flow = make_prior(kind), lfq.AffineFlow(seed=4)
    fit = train(flow, prior, TARGET, n_steps=n_steps, batch_size=n, learning_rate=rate, seed=seed)

    whole = lfq.Compose([prior.map.copy(), flow.copy()]) if prior.map is not None else flow.copy()
    base, state = prior.base, prior.base.start(n, seed, "float64")
    weights, first, second = whole.weights, 0.0, 0.0
    for step in range(n_steps):
        latent = base.noise(n, seed, step, np.float64)
        if state is not None:
            state = base.hmc().advance(state, 1, base.n_between).state
            latent = np.concatenate([state.latent.reshape(n, -1), latent], axis=1)
        action, log_det, gradient = np.empty(n), np.empty(n), np.empty(weights.size)
        program = whole.program(TARGET.shape)
        _core.flow_loss(TARGET.volume, program, weights, TARGET._record(), latent, action, log_det, gradient)
        log_w = log_det - action - base.log_prob(latent)
        w = np.exp(log_w - log_w.max())
        rate_now = rate * (1 + math.cos(math.pi * step / n_steps)) / 2
        wanted = -log_w.mean(), w.sum() ** 2 / (n * (w**2).sum()), log_w.std(), rate_now
        found = [fit.history[name][step] for name in ("loss", "ess", "std_log_w", "learning_rate")]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step_size = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        weights = weights - rate_now * step_size
    n_map = weights.size - flow.n_weights
    np.testing.assert_allclose(fit.flow.weights, weights[n_map:], rtol=0, atol=1e-10)
    if n_map:
        np.testing.assert_allclose(fit.prior.map.weights, weights[:n_map], rtol=0, atol=1e-10)
    assert np.abs(fit.flow.weights - flow.weights).max() > rate


@KINDS
def test_gradient_is_that_of_the_mean_loss_on_a_fixed_batch(kind, rng):
    """Central differences, along every weight."""
    prior = make_prior(kind)
    flow = lfq.AffineFlow(seed=5)
    whole = lfq.Compose([prior.map, flow]) if prior.map is not None else flow
    n = 16
    latent, program, weights = prior.base.sample(n, 6, np.float64), whole.program(TARGET.shape), whole.weights

    def loss(weights):
        action, log_det, gradient = np.empty(n), np.empty(n), np.empty(weights.size)
        _core.flow_loss(TARGET.volume, program, weights, TARGET._record(), latent, action, log_det, gradient)
        return (action - log_det).mean(), gradient

    gradient, h = loss(weights)[1], 1e-5
    steps = h * np.eye(weights.size)
    wanted = np.array([(loss(weights + step)[0] - loss(weights - step)[0]) / (2 * h) for step in steps])
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert (gradient != 0).sum() > 10


@KINDS
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_seed_alone_decides(kind, n_threads):
    settings = dict(n_steps=8, batch_size=40, n_evaluation=50)
    wanted = train(lfq.AffineFlow(), make_prior(kind), TARGET, seed=21, **settings)
    assert_same_fits(
        train(lfq.AffineFlow(), make_prior(kind), TARGET, seed=21, n_threads=n_threads, **settings), wanted
    )
    other = train(lfq.AffineFlow(), make_prior(kind), TARGET, seed=22, **settings)
    assert (other.history["loss"] != wanted.history["loss"]).all()


@KINDS
def test_float32_stays_close_to_float64(kind):
    settings = dict(n_steps=10, batch_size=64, seed=23)
    prior = make_prior(kind, n_warmup=2, n_between=1)
    double, single = (
        train(lfq.AffineFlow(), prior, TARGET, dtype=dtype, **settings) for dtype in ("float64", "float32")
    )
    np.testing.assert_allclose(single.history["loss"], double.history["loss"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(single.flow.weights, double.flow.weights, rtol=0, atol=1e-3)
    assert single.flow.weights.dtype == np.float64


def test_history_and_schedule():
    fit = train(
        lfq.AffineFlow(), make_prior("lattice"), TARGET, n_steps=37, batch_size=16, learning_rate=0.03
    )
    assert set(fit.history) == {"loss", "ess", "std_log_w", "learning_rate", "seconds"}
    assert all(values.shape == (37,) and np.isfinite(values).all() for values in fit.history.values())
    wanted = 0.03 * (1 + np.cos(np.pi * np.arange(37) / 37)) / 2
    np.testing.assert_allclose(fit.history["learning_rate"], wanted, rtol=1e-12)
    assert (fit.history["ess"] > 1 / 16 - 1e-12).all() and (fit.history["ess"] <= 1).all()
    assert (np.diff(fit.history["seconds"]) >= 0).all()
    assert fit.target == TARGET and isinstance(fit.flow, lfq.AffineFlow)


def test_arguments_are_not_changed():
    flow, prior = lfq.AffineFlow(seed=7), make_prior("upsample")
    weights, map_weights = flow.weights, prior.map.weights
    fit = train(flow, prior, TARGET, n_steps=20, batch_size=32)
    np.testing.assert_array_equal(flow.weights, weights)
    np.testing.assert_array_equal(prior.map.weights, map_weights)
    assert fit.flow is not flow and fit.prior is not prior


def test_composed_flows_train():
    """Every part of a composition moves; the fit returns the composition."""
    flow = lfq.Compose([lfq.AffineFlow(seed=1), lfq.AffineFlow(seed=2, hidden=(3,), bias=True)])
    fit = train(flow, make_prior("lattice"), TARGET, n_steps=5, batch_size=32)
    assert isinstance(fit.flow, lfq.Compose) and fit.flow.to_dict() == flow.to_dict()
    for before, after in zip(flow.flows, fit.flow.flows, strict=True):
        assert np.abs(after.weights - before.weights).max() > 0.01


def test_progress_is_reported(capsys):
    calls = []
    fit = train(
        lfq.AffineFlow(), make_prior("gaussian"), TARGET, n_steps=12, batch_size=16,
        progress=lambda *arguments: calls.append(arguments),
    )  # fmt: skip
    assert calls[-1] == (12, 12, fit.history["loss"][-1], fit.history["ess"][-1])
    train(lfq.AffineFlow(), make_prior("gaussian"), TARGET, n_steps=3, batch_size=16, progress=True)
    assert "step 3/3" in capsys.readouterr().err


# ---- what training reaches ------------------------------------------------------------------


@KINDS
def test_training_lowers_the_loss_and_raises_the_ess(kind):
    prior = make_prior(kind)
    fit = train(lfq.AffineFlow(), prior, TARGET, n_steps=250, batch_size=256, seed=31)
    untrained = train(lfq.AffineFlow(), prior, TARGET, n_steps=1, batch_size=256, seed=31, learning_rate=1e-9)
    loss = fit.history["loss"]
    noise = fit.history["std_log_w"][-20:].mean() / math.sqrt(20 * 256)
    assert loss[:20].mean() - loss[-20:].mean() > 20 * noise
    assert fit.history["ess"][-20:].mean() > 1.2 * fit.history["ess"][:20].mean()
    assert fit.std_log_w < 0.8 * untrained.std_log_w
    assert fit.acceptance > 1.3 * untrained.acceptance


def ring_log_z(extent, beta):
    """log Z of the free theory on a ring: eigenvalues 2 - 2 beta cos p of S's matrix."""
    eigenvalues = 2 - 2 * beta * np.cos(2 * np.pi * np.arange(extent) / extent)
    return 0.5 * extent * math.log(2 * math.pi) - 0.5 * np.log(eigenvalues).sum()


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_loss_is_bounded_by_the_exact_free_energy(beta):
    """lam = 0, Gaussian prior: loss >= -log Z in every step and at the end, 4 sigma, and it comes near."""
    target = lfq.Phi4((6,), beta=beta, lam=0.0)
    fit = train(lfq.AffineFlow(ndim=1), lfq.Gaussian((6,)), target, n_steps=400, batch_size=256, seed=32)
    bound = -ring_log_z(6, beta)
    loss, error = fit.history["loss"], fit.history["std_log_w"] / math.sqrt(256)
    assert (loss > bound - 4 * error).all()
    _, log_w = log_weights(fit, 20000, 33)
    assert -log_w.mean() > bound - 4 * log_w.std() / math.sqrt(log_w.size)
    assert -log_w.mean() < bound + 0.05 < loss[0] - 0.5
    # And <w> is Z, whatever the flow: 4 sigma.
    w = np.exp(log_w + bound)
    assert abs(w.mean() - 1) < 4 * w.std() / math.sqrt(w.size)


def test_an_exact_solution_is_found():
    """beta = lam = 0: a rescale by 1/sqrt(2) is the answer."""
    flow = lfq.AffineFlow(ndim=1)
    flow.weights = np.zeros(flow.n_weights)
    fit = train(
        flow, lfq.Gaussian((4,)), lfq.Phi4((4,), beta=0.0, lam=0.0), n_steps=400, batch_size=256, seed=34
    )
    assert fit.ess > 0.999 and fit.acceptance > 0.98 and fit.std_log_w < 0.03
    assert fit.flow.weights[-1] == pytest.approx(-0.5 * math.log(2), abs=0.01)
    assert np.abs(fit.flow.weights[:-1]).max() < 0.05


def test_upsample_trains_its_width_scale_and_interpolation():
    """From independent coarse sites to independent fine ones the answer is known."""
    free = [lfq.Phi4((extent,), beta=0.0, lam=0.0) for extent in (2, 4)]
    prior = lfq.Upsample(free[0], width=0.3, scale=1.5, interpolation=0.8, n_between=2, n_warmup=20)
    flow = lfq.AffineFlow(ndim=1, rescale=False)
    flow.weights = np.zeros(flow.n_weights)
    fit = train(flow, prior, free[1], n_steps=400, batch_size=256, learning_rate=0.03, seed=35)
    assert fit.ess > 0.995
    assert fit.prior.scale == pytest.approx(1, abs=0.02)
    assert fit.prior.width[0] == pytest.approx(math.sqrt(0.5), abs=0.02)
    # The net can undo the interpolation, so that it is not determined; but it is trained.
    assert abs(fit.prior.interpolation[0] - 0.8) > 0.1
    assert (prior.scale, prior.width[0], prior.interpolation[0]) == pytest.approx((1.5, 0.3, 0.8))


@KINDS
def test_figures_of_merit_are_those_of_fresh_samples(kind):
    """ESS, acceptance and std(log w) against samples of the returned prior through the returned flow."""
    fit = train(
        lfq.AffineFlow(), make_prior(kind, WEAK, beta=0.14), WEAK, n_steps=300, batch_size=256, seed=36,
        n_evaluation=20000,
    )  # fmt: skip
    _, log_w = log_weights(fit, 20000, 37)
    assert fit.std_log_w == pytest.approx(log_w.std(), rel=0.08)
    assert fit.acceptance == pytest.approx(independence_acceptance(log_w), abs=0.02)
    assert fit.ess == pytest.approx(effective_sample_size(log_w), rel=0.1)


def test_evaluation_goes_on_where_training_stopped():
    """The Gaussian's evaluation batches are numbered after the last training step."""
    fit = train(
        lfq.AffineFlow(), lfq.Gaussian((4, 4)), TARGET, n_steps=5, batch_size=30, seed=38, n_evaluation=70
    )
    base = lfq.Gaussian((4, 4)).base
    z = np.concatenate([base.noise(30, 38, step, np.float64) for step in (5, 6, 7)])[:70]
    x, log_det = fit.flow.forward(z.reshape(-1, 4, 4))
    log_w = log_det - TARGET.action(x) - base.log_prob(z)
    assert fit.std_log_w == pytest.approx(log_w.std(), rel=1e-12)
    assert fit.ess == pytest.approx(effective_sample_size(log_w), rel=1e-12)


@pytest.fixture(scope="module")
def from_hmc():
    """<phi^2>, <phi^4> and chi of WEAK and their errors."""
    run = lfq.HMC(WEAK, tau=1.3, n_steps=10).sample(256, 4000, n_warmup=100, seed=41)
    means = {name: run.observables[name].mean(axis=0) for name in ("phi2", "phi4", "chi")}
    return {name: (m.mean(), m.std(ddof=1) / math.sqrt(m.size)) for name, m in means.items()}


@KINDS
def test_reweighted_samples_agree_with_hmc(kind, from_hmc):
    """<phi^2>, <phi^4> and chi, 4 sigma; without the weights (but for the nearest prior) one is off."""
    fit = train(
        lfq.AffineFlow(), make_prior(kind, WEAK, beta=0.14), WEAK, n_steps=300, batch_size=256, seed=42
    )
    x, log_w = log_weights(fit, 30000, 43)
    assert effective_sample_size(log_w) > 0.4
    w = np.exp(log_w - log_w.max())
    measured = WEAK.measure(x)
    measured["chi"] = WEAK.volume * measured["M"] ** 2
    unweighted = []
    for name, (value, error) in from_hmc.items():
        mean = (w * measured[name]).sum() / w.sum()
        own = math.sqrt((w**2 * (measured[name] - mean) ** 2).sum()) / w.sum()
        assert own < 0.03 * value
        assert abs(mean - value) < 4 * math.hypot(own, error)
        own = measured[name].std() / math.sqrt(w.size)
        unweighted.append(abs(measured[name].mean() - value) / math.hypot(own, error))
    assert kind == "lattice" or max(unweighted) > 5


# ---- ladders --------------------------------------------------------------------------------


LADDER = [lfq.Phi4((extent, extent), beta=beta, lam=0.5) for extent, beta in ((2, 0.3), (4, 0.4), (8, 0.5))]


@pytest.mark.parametrize("kind", ["interleave", "upsample"])
def test_each_level_starts_from_the_weights_below(kind):
    settings = dict(n_steps=10, batch_size=32, n_evaluation=32)
    chain = dict(n_between=2, n_warmup=10)
    flow = lfq.AffineFlow(seed=8)
    fits = train_ladder(flow, LADDER, prior=kind, chain=chain, seed=51, **settings)
    assert [fit.target for fit in fits] == LADDER[1:]
    assert [fit.prior.shape for fit in fits] == [(4, 4), (8, 8)]
    maker = {"interleave": lfq.Interleave, "upsample": lfq.Upsample}[kind]
    start = flow
    for level, fit in enumerate(fits):
        prior = maker(LADDER[level], **chain)
        assert_same_fits(fit, train(start, prior, LADDER[level + 1], seed=51 + level, **settings))
        assert np.abs(fit.flow.weights - start.weights).max() > 0.01
        start = fit.flow


def test_a_ladder_that_hardly_moves_keeps_the_weights():
    flow = lfq.AffineFlow(seed=9)
    fits = train_ladder(flow, LADDER, n_steps=1, batch_size=8, learning_rate=1e-12, chain=dict(n_warmup=0))
    for fit in fits:
        np.testing.assert_allclose(fit.flow.weights, flow.weights, rtol=0, atol=3e-12)


def test_a_ladder_in_beta():
    theories = [lfq.Phi4((4, 4), beta=beta, lam=0.5) for beta in (0.3, 0.4, 0.5)]
    fits = train_ladder(lfq.AffineFlow(), theories, prior="lattice", n_steps=2, batch_size=8)
    assert all(isinstance(fit.prior, lfq.Lattice) for fit in fits)
    assert [fit.prior.theory for fit in fits] == theories[:-1]


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(prior="gaussian"), ValueError, "prior: .*interleave"),
        (dict(theories=LADDER[:1]), ValueError, "theories"),
        (dict(theories=[LADDER[0], "phi4"]), ValueError, "theories"),
        (dict(theories=[LADDER[0], LADDER[2]]), ValueError, "theories"),
        (dict(theories=[LADDER[0], LADDER[0]], prior="upsample"), ValueError, "theories"),
        (dict(prior="lattice"), ValueError, "theories"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(n_steps=0), ValueError, "n_steps"),
        (dict(chain=dict(n_between=0)), ValueError, "n_between"),
        (dict(flow=None), TypeError, "flow"),
    ],
)
def test_bad_ladders(arguments, error, match):
    with pytest.raises(error, match=match):
        train_ladder(**{"flow": lfq.AffineFlow(), "theories": LADDER, **arguments})


# ---- weights --------------------------------------------------------------------------------


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.zeros(10)) == 1
    assert effective_sample_size(np.log([1.0, 3.0])) == pytest.approx(16 / 20, rel=1e-14)
    assert effective_sample_size(np.array([0.0, -800.0, -800.0, -800.0])) == pytest.approx(0.25, rel=1e-14)
    log_w = np.log([0.5, 2.0, 7.0, 1.5])
    for shift in (0.0, 1e4, -1e4):
        assert effective_sample_size(log_w + shift) == pytest.approx(121 / (4 * 55.5), rel=1e-10)


def test_independence_acceptance_by_hand():
    assert independence_acceptance(np.full(50, 3.0)) == 1
    assert independence_acceptance(np.arange(50) * 1000.0) == 1
    assert independence_acceptance(-np.arange(50) * 1000.0) == 0
    assert independence_acceptance([0.0, -1000.0, 0.0, -1000.0]) == pytest.approx(1 / 3)
    assert independence_acceptance(np.array([5.0, 5.0]) + 1e5) == 1


def test_independence_acceptance_of_two_weights():
    """Weights 1 and r in equal parts: the chain sits on 1 with 1 / (1 + r) and rejects r with 1 - r."""
    r, n = 0.3, 100000
    log_w = np.where(np.random.default_rng(61).random(n) < 0.5, 0.0, math.log(r))
    wanted = 1 - 1 / (1 + r) * 0.5 * (1 - r)
    assert independence_acceptance(log_w, seed=62) == pytest.approx(wanted, abs=0.008)
    assert independence_acceptance(log_w, seed=62) != independence_acceptance(log_w, seed=63)


@pytest.mark.parametrize("log_w", [0.0, [], [1.0], np.zeros((2, 2))], ids=str)
def test_bad_weights(log_w):
    with pytest.raises(ValueError, match="log_w"):
        independence_acceptance(log_w)


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(flow="flow"), TypeError, "flow"),
        (dict(flow=lfq.AffineFlow(ndim=3)), ValueError, "axes"),
        (dict(prior="gaussian"), TypeError, "prior"),
        (dict(prior=lfq.Gaussian((4, 6))), ValueError, r"prior: .*\(4, 6\).*\(4, 4\)"),
        (dict(target="phi4"), TypeError, "target"),
        (dict(target=TARGET.pullback(lfq.AffineFlow())), TypeError, "target"),
        (dict(n_steps=0), ValueError, "n_steps"),
        (dict(n_steps=-5), ValueError, "n_steps"),
        (dict(n_steps=1.5), TypeError, "n_steps"),
        (dict(batch_size=1), ValueError, "batch_size"),
        (dict(batch_size=-1), ValueError, "batch_size"),
        (dict(learning_rate=0.0), ValueError, "learning_rate"),
        (dict(learning_rate=-0.1), ValueError, "learning_rate"),
        (dict(learning_rate=math.nan), ValueError, "learning_rate"),
        (dict(learning_rate="0.1"), ValueError, "learning_rate"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(dtype="float16"), ValueError, "dtype"),
        (dict(n_threads=-1), ValueError, "n_threads"),
        (dict(n_evaluation=1), ValueError, "n_evaluation"),
    ],
)
def test_bad_arguments(arguments, error, match):
    good = dict(flow=lfq.AffineFlow(), prior=lfq.Gaussian((4, 4)), target=TARGET, n_steps=1, batch_size=2)
    with pytest.raises(error, match=match):
        train(**{**good, **arguments})


def test_odd_lattices_are_refused_before_work():
    theory = lfq.Phi4((3, 5), beta=0.4, lam=0.5)
    with pytest.raises(ValueError, match="odd"):
        train(lfq.AffineFlow(), lfq.Gaussian((3, 5)), theory)


@KINDS
def test_divergence_names_the_step(kind):
    with pytest.raises(lfq.NotFiniteError, match=r"training step [1-9]\d*: .*learning rate"):
        train(lfq.AffineFlow(), make_prior(kind), TARGET, n_steps=10, batch_size=16, learning_rate=1e200)


def test_a_prior_whose_chains_diverge_says_so():
    prior = make_prior("lattice", tau=1e6)
    with pytest.raises(lfq.NotFiniteError, match="chain"):
        train(lfq.AffineFlow(), prior, TARGET, n_steps=2, batch_size=16)
