"""Exact checks of the physics on the parameters of a configuration: `lfq selftest`.

Every check compares with something known exactly, not with another path through the same code: finite
differences, a dense Jacobian, identities of the ensemble, solvable limits.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import lfq

from . import _core, analysis
from .config import Config
from .experiment import initial_flow, make_hmc, make_sampler, stage_seed, target_theory
from .hmc import Sampler
from .observables import virial

__all__ = ["Check", "checks"]

MAX_DEVIATION = 5.0
"""Largest deviation in standard errors that a statistical check lets pass."""

MAX_VOLUME = 1024
"""Larger lattices are cut down, or the checks would take minutes."""

MAX_FLOW_WORK = 20000
"""Sites times weights of a flow above which the lattice of its chains is cut down further."""

N_CHAINS, N_SAMPLES = 64, 300


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    name : str
    value : float
        Never negative; zero would be perfect. NaN fails.
    limit : float
        Largest value that passes.
    unit : str
        What `value` counts.
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name:<58} {self.value:9.2g} {self.unit} (limit {self.limit:g})"


def _relative(name: str, found, expected, limit: float) -> Check:
    found, expected = np.asarray(found), np.asarray(expected)
    value = np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(float).tiny)
    return Check(name, float(value), limit, "relative error")


def _deviation(name: str, value: float, error: float, exact: float) -> Check:
    return Check(name, abs(value - exact) / error if error > 0 else math.inf, MAX_DEVIATION, "standard errors")


def _slope(function, x: np.ndarray, direction: np.ndarray, step: float) -> np.ndarray:
    """Directional derivative by central differences, fourth order in the step."""
    near = function(x + step * direction) - function(x - step * direction)
    far = function(x + 2 * step * direction) - function(x - 2 * step * direction)
    return (8 * near - far) / (12 * step)


def _slopes_agree(name: str, found: np.ndarray, slopes: np.ndarray) -> Check:
    # |s| and the leaky ReLU have kinks, and differences across one are off: the median forgives a few.
    error = np.median(np.abs(found - slopes)) / np.abs(slopes).max()
    return Check(name, float(error), 1e-6, "relative error")


def _check_force(name: str, theory, phi: np.ndarray, direction: np.ndarray) -> Check:
    lattice = tuple(range(1, phi.ndim))
    slopes = _slope(theory.action, phi, direction, 1e-5)
    return _slopes_agree(name, -(theory.force(phi) * direction).sum(lattice), slopes)


def _check_jacobian(flow: lfq.AffineFlow, rng: np.random.Generator) -> Check:
    """Log-determinants against dense Jacobians on a small lattice."""
    shape = (2,) * (flow.ndim - 2) + (4,) * min(flow.ndim, 2)
    points = rng.normal(size=(9, *shape))
    units = np.eye(math.prod(shape)).reshape(-1, *shape)
    _, log_det = flow.forward(points)
    dense = []
    for z in points:
        columns = _slope(lambda x: flow.forward(x)[0], z + 0 * units, units, 1e-6)
        dense.append(np.linalg.slogdet(columns.reshape(len(units), -1))[1])
    return _slopes_agree("log-determinant = dense Jacobian, small lattice", log_det, np.array(dense))


def _check_weight_gradient(flow: lfq.AffineFlow, theory: lfq.Phi4, z: np.ndarray, rng) -> Check:
    """Gradient of the training loss along random directions of the weights."""
    weights = flow.weights

    def loss(values: np.ndarray) -> float:
        shifted = flow.copy()
        shifted.weights = values
        x, log_det = shifted.forward(z)
        return (theory.action(x) - log_det).mean()

    x, _ = flow.forward(z)
    _, gradient = flow.vjp(z, -theory.force(x) / len(z), np.full(len(z), -1 / len(z)), weights=True)
    directions = rng.normal(size=(9, weights.size)) / math.sqrt(weights.size)
    slopes = np.array([_slope(loss, weights, direction, 1e-5) for direction in directions])
    return _slopes_agree("gradient of the loss = finite differences", directions @ gradient, slopes)


def _free_variance(theory: lfq.Phi4) -> tuple[float, float]:
    """<phi^2> and V <M^2> of the theory with lam = 0: G(p) = 1 / (2 - 2 beta sum_mu cos p_mu)."""
    momenta = np.meshgrid(*(2 * np.pi * np.arange(extent) / extent for extent in theory.shape))
    propagator = 1 / (2 - 2 * theory.beta * sum(np.cos(p) for p in momenta))
    return float(propagator.mean()), float(propagator.flat[0])


def _one_site(lam: float) -> tuple[float, float]:
    """<phi^2> and <phi^4> of independent sites (beta = 0), by quadrature."""
    # The integrand falls below the rounding of its maximum within this range for every lam >= 0.
    x = np.linspace(-9, 9, 20001)
    potential = (1 - 2 * lam) * x**2 + lam * x**4
    weight = np.exp(potential.min() - potential)
    return float((weight * x**2).sum() / weight.sum()), float((weight * x**4).sum() / weight.sum())


def _free_log_z(theory: lfq.Phi4) -> float:
    momenta = np.meshgrid(*(2 * np.pi * np.arange(extent) / extent for extent in theory.shape))
    kernel = 1 - theory.beta * sum(np.cos(p) for p in momenta)
    return float(0.5 * np.log(np.pi / kernel).sum())


def _check_log_z(flow: lfq.AffineFlow, seed: int) -> Check:
    """<w> = Z for any flow: the free theory on a small lattice, from normals of some width.

    So wide that the flow's fields are wider than the theory's: such weights are bounded, and their error can be told.
    """
    shape = (2,) * flow.ndim if flow.ndim > 1 else (4,)
    theory, prior = lfq.Phi4(shape, beta=0.4 / flow.ndim, lam=0.0), lfq.Gaussian(shape)
    normal, width = prior.sample(40000, seed), 1.0
    x, log_det = flow.forward(normal)
    while x.std() < 1.2 and width < 100:
        width *= 1.2
        x, log_det = flow.forward(width * normal)
    log_w = log_det - theory.action(x) - prior.log_prob(normal) + theory.volume * math.log(width)
    w = np.exp(log_w - log_w.max())
    error = w.std() / math.sqrt(w.size) / w.mean()
    return _deviation(
        "<w> = Z of the free theory, small lattice",
        math.log(w.mean()) + log_w.max(),
        error,
        _free_log_z(theory),
    )


def _different(*pairs) -> float:
    """How many numbers differ in any bit."""
    return float(sum(np.count_nonzero(np.asarray(a) != np.asarray(b)) for a, b in pairs))


def _check_restart(name: str, sampler: Sampler, seed: int) -> Check:
    """Forty trajectories at once, and four times ten through checkpoints with other numbers of threads."""
    state = sampler.start(16, seed)
    whole, energies = sampler.advance(state, 40), []
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2, 3, None):
            sampler.save(state, Path(folder) / "state")
            part = replace(sampler, n_threads=threads)
            block = part.advance(part.load(Path(folder) / "state"), 10)
            state = block.state
            energies.append(block.dh)
    value = _different((state.latent, whole.state.latent), (np.concatenate(energies), whole.dh))
    return Check(f"{name}: restarts give the bits of one run", value, 0, "numbers differ")


def _check_training_restart(flow: lfq.AffineFlow, theory: lfq.Phi4, dtype: str, seed: int) -> Check:
    """Twenty steps at once, and interrupted as soon as a step is done."""
    prior = lfq.Lattice(replace(theory, beta=0.9 * theory.beta), n_between=2, n_warmup=10)
    settings = {"n_steps": 20, "batch_size": 16, "seed": seed, "dtype": dtype, "n_evaluation": 32}
    whole = lfq.train(flow, prior, theory, **settings)

    def stop(step: int, *_) -> None:
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training"
        try:
            lfq.train(flow, prior, theory, checkpoint=path, progress=stop, n_threads=1, **settings)
        except KeyboardInterrupt:
            pass
        again = lfq.train(flow, prior, theory, checkpoint=path, **settings)
    value = _different((whole.flow.weights, again.flow.weights), (whole.history["loss"], again.history["loss"]))
    return Check("training: a restart gives the bits of one run", value, 0, "numbers differ")


def _check_streams(config: Config) -> Check:
    """Blocks of the run's random numbers that occur twice, over its stages, chains and first trajectories."""
    stages = ["hmc", *(prior.name for prior in config.prior)]
    seeds = [stage_seed(config.run.seed, f"sample {stage}") for stage in stages]
    purposes = (_core.PURPOSES["momenta"], _core.PURPOSES["start"], _core.PURPOSES["latent"])
    out = np.empty((len(seeds), len(purposes), 16, N_CHAINS, 4))
    for i, seed in enumerate(seeds):
        for j, purpose in enumerate(purposes):
            for trajectory in range(16):
                _core.normal(seed, purpose, trajectory, 0, N_CHAINS, out[i, j, trajectory], 1)
    blocks = out.reshape(-1, 4)
    repeats = len(blocks) - len(np.unique(blocks, axis=0))
    return Check("random numbers: no block occurs twice", float(repeats), 0, "repeats")


def _small(theory: lfq.Phi4, max_volume: float) -> lfq.Phi4:
    """The theory on its lattice with the longest extent halved until that is small enough."""
    shape = list(theory.shape)
    while math.prod(shape) > max_volume and max(shape) % 4 == 0:
        shape[shape.index(max(shape))] //= 2
    return replace(theory, shape=tuple(shape))


def checks(config: Config) -> Iterator[Check]:
    """Run the checks of a configuration's theory, flow and samplers, one after another.

    Parameters
    ----------
    config : Config
        Lattices of more than `MAX_VOLUME` sites are cut down. An odd extent leaves out the flow. Of ``[[sampler]]``,
        what makes chains without a flow is checked.

    Yields
    ------
    Check
        Where numbers are not finite, or no step size works, one that fails and says so takes the place of what is left
        of its kind.
    """
    theory = _small(target_theory(config), MAX_VOLUME)
    rng = np.random.default_rng(stage_seed(config.run.seed, "selftest"))
    phi, direction = rng.normal(size=(2, 8, *theory.shape))
    direction /= math.sqrt(theory.volume)
    yield _check_force("force = -dS/dphi, finite differences", theory, phi, direction)
    yield _check_streams(config)
    samplers = {"HMC": make_hmc(config, theory)}
    if all(extent % 2 == 0 for extent in theory.shape):
        flow = initial_flow(config)
        # Away from the identity, as a trained flow is.
        inputs = config.flow.kernel_size**theory.ndim * max(config.flow.hidden, default=1)
        flow.weights += rng.normal(size=flow.n_weights) * 0.3 / math.sqrt(inputs * config.flow.n_blocks)
        small = _small(theory, MAX_FLOW_WORK / flow.n_weights)
        samplers["flow-HMC"] = make_hmc(config, small.pullback(flow))
        yield from _finite("flow", _check_flow, config, flow, theory, small, phi, direction, rng)
    for sampler in config.sampler:
        if sampler.kind in ("swendsen-wang", "wolff", "fourier", "heat-bath"):
            samplers[sampler.name] = make_sampler(config, sampler, theory)
    for name, sampler in samplers.items():
        yield from _finite(name, _check_sampler, config, name, sampler, theory, rng)
    yield from _finite("solvable limits", _check_limits, config, theory)


def _finite(name: str, group: Callable[..., Iterator[Check]], *arguments) -> Iterator[Check]:
    try:
        yield from group(*arguments)
    except (lfq.NotFiniteError, RuntimeError) as error:
        yield Check(f"{name}: {error}", math.nan, 0, "")


def _check_flow(config: Config, flow, theory, small, phi, direction, rng) -> Iterator[Check]:
    yield _check_force("flow-HMC force = finite differences", theory.pullback(flow), phi, direction)
    x, log_det = flow.forward(phi)
    back, inverse_log_det = flow.inverse(x)
    yield _relative("f^-1(f(z)) = z", back, phi, 1e-11)
    yield _relative("log-determinants of f and f^-1 cancel", -inverse_log_det, log_det, 1e-11)
    yield _check_jacobian(flow, rng)
    yield _check_weight_gradient(flow, theory, phi[:2], rng)
    yield _check_log_z(flow, stage_seed(config.run.seed, "selftest log Z"))
    seed = stage_seed(config.run.seed, "selftest training")
    yield _check_training_restart(initial_flow(config), small, config.run.dtype, seed)


def _check_sampler(config: Config, name: str, sampler: Sampler, theory: lfq.Phi4, rng) -> Iterator[Check]:
    run = _sample(config, sampler, f"selftest {name}")
    sampler = run.sampler
    yield _check_restart(name, sampler, stage_seed(config.run.seed, f"selftest restart {name}"))
    if isinstance(sampler, lfq.HMC):
        begin = run.state.latent[:8].astype(np.float64)
        end = sampler.evolve(begin, rng.normal(size=begin.shape))
        yield _relative(f"{name}: trajectory there and back", sampler.evolve(*end, backward=True)[0], begin, 1e-9)
        yield _deviation(f"{name}: <exp(-dH)> = 1", *run.exp_minus_dh(), 1.0)
    one = analysis.estimate(virial(theory, run.observables))
    yield _deviation(f"{name}: virial <phi dS/dphi> per site = 1", one.value, one.error, 1.0)


def _check_limits(config: Config, theory: lfq.Phi4) -> Iterator[Check]:
    free = replace(theory, beta=min(abs(theory.beta), 0.6 / theory.ndim), lam=0.0)
    run = _sample(config, make_hmc(config, free), "selftest free")
    for name, exact in zip(("phi2", "chi"), _free_variance(free), strict=True):
        found = analysis.estimate(run.observables[name])
        yield _deviation(f"lam = 0: <{name}> of the free propagator", found.value, found.error, exact)

    run = _sample(config, make_hmc(config, replace(theory, beta=0.0)), "selftest one site")
    for name, exact in zip(("phi2", "phi4"), _one_site(theory.lam), strict=True):
        found = analysis.estimate(run.observables[name])
        yield _deviation(f"beta = 0: <{name}> of a single site", found.value, found.error, exact)


def _sample(config: Config, sampler: Sampler, name: str) -> lfq.Run:
    """A short run, tuned where there is a step size, in the precision of the configuration."""
    if isinstance(sampler, lfq.HMC):
        sampler = sampler.tune(config.sampling.acceptance, N_CHAINS, stage_seed(config.run.seed, name))
    return sampler.sample(N_CHAINS, N_SAMPLES, n_warmup=N_SAMPLES, seed=stage_seed(config.run.seed, f"{name} sample"))
