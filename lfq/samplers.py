"""Samplers whose fields come with weights, or are proposed by a flow: independence Metropolis, reweighting, and
annealed importance sampling."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from . import _core
from ._kernels import check_count, check_seed, check_threads, fields, real_dtype
from .actions import Phi4, PulledBack, check_theory
from .flows import Compose, Flow
from .hmc import HMC, Block, Sampler, State
from .observables import OBSERVABLES
from .priors import Gaussian, Prior, check_prior

__all__ = ["Annealing", "IndependenceMetropolis", "Reweighting", "Weighted", "WeightedSampler", "reverse_ess"]

_ENTRIES_AT_ONCE = 2**22
"""Sites of the fields that are in memory together."""


def _half_square(z: np.ndarray) -> np.ndarray:
    """z^2 / 2 summed over the sites of each field, in double."""
    flat = z.reshape(len(z), -1).astype(np.float64)
    return 0.5 * np.einsum("ij,ij->i", flat, flat)


def _check_flow(flow, theory: Phi4) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"flow: must be a Flow, got {type(flow).__name__}")
    flow.program(theory.shape)


class _OfFlow:
    """What samplers of a flow's fields share: `theory`, `flow`, `prior`, `dtype` and `n_threads`, checked."""

    def __post_init__(self):
        _check_flow(self.flow, check_theory(self.theory))
        if self.prior is None:
            object.__setattr__(self, "prior", Gaussian(self.theory.shape))
        check_prior(self.prior, self.theory.shape)
        real_dtype(self.dtype)
        check_threads(self.n_threads)

    def _weighed(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_r = self.prior.log_prob(z, self.n_threads)
        return log_weights(self.flow, self.theory, z, log_r, self.n_threads)


def log_weights(flow: Flow, theory: Phi4, z: np.ndarray, log_r: np.ndarray, n_threads=None):
    """The fields f(z) and log w = -S(f(z)) - log r(z) + log|det df/dz|.

    Parameters
    ----------
    flow : Flow
    theory : Phi4
    z : ndarray, shape (n, *shape)
    log_r : ndarray, shape (n,)

    Returns
    -------
    phi : ndarray, shape of z
    log_w : ndarray of float64, shape (n,)
    """
    phi, log_det = flow.forward(z, n_threads)
    return phi, log_det - theory.action(phi, n_threads) - log_r


def reverse_ess(flow: Flow, prior: Prior, theory: Phi4, phi, n_threads: int | None = None) -> float:
    """Effective sample size per sample of a flow, estimated from fields of the *theory*.

    1 / (<w> <1/w>) over phi ~ exp(-S), w = exp(-S) / q, q the density of the flow's fields. Unlike the ESS of
    the flow's own fields it falls to zero where the flow never goes: it sees a mode that has collapsed.

    Parameters
    ----------
    flow : Flow
    prior : Prior
        Of the flow's latents; its normalisation does not matter.
    theory : Phi4
    phi : array_like, shape (n, *shape)
        Samples of the theory, from HMC with clusters, say.

    Returns
    -------
    float
        In (0, 1], from below by the worst-covered sample.
    """
    phi, _ = fields(phi, theory.shape, "phi")
    z, inverse_log_det = flow.inverse(phi, n_threads)
    log_w = -theory.action(phi, n_threads) - prior.log_prob(z, n_threads) - inverse_log_det
    log_w = log_w - log_w.max()
    return float(math.exp(-_log_mean(log_w) - _log_mean(-log_w)))


def _log_mean(log_w: np.ndarray) -> float:
    largest = log_w.max()
    return float(largest + math.log(np.exp(log_w - largest).mean()))


@dataclass(frozen=True)
class IndependenceMetropolis(_OfFlow, Sampler):
    """Metropolis with a flow's fields as proposals, each independent of the last (arXiv:1904.12072 sec. II).

    A field f(z), z drawn from the prior, is accepted with probability min(1, w / w_old), w = exp(-S(f(z))) |det J| /
    r(z). Exact whatever the flow; a field of large weight stays for long, which is how a poor flow shows.

    Parameters
    ----------
    theory : Phi4
    flow : Flow
    prior : Prior, optional
        Of the latents; unit normals by default. The coarse fields of a lattice prior move on from those of the current
        field by its `n_between` trajectories of HMC, whose reversibility makes the same acceptance exact; the
        proposals are as independent as that makes them.
    dtype : {"float64", "float32"}
    n_threads : int, optional

    Notes
    -----
    A trajectory is one proposal. `State.latent` is z of the current field. Proposals have random numbers of their
    own, never those that trained the flow. ``dh`` of a run is log w_old - log w. A proposal counts as one force
    evaluation, and those of a prior's chains by their share of the lattice.
    """

    theory: Phi4
    flow: Flow
    prior: Prior | None = None
    dtype: str = "float64"
    n_threads: int | None = None

    @property
    def force_evaluations_per_trajectory(self) -> float:
        return 1.0 + self.prior.base.forces(self.prior.base.n_between)

    def start(self, n_chains: int, seed: int, phi=None, first_chain: int = 0) -> State:
        """Chains at their beginning: the first fields of the flow, or `phi` (see `HMC.start`)."""
        n_chains = check_count(n_chains, "n_chains", 1, 2**31)
        first_chain = check_count(first_chain, "first_chain", 0, 2**32 - n_chains)
        if phi is None:
            base, seed = self.prior.base, check_seed(seed)
            latent = base.fresh(n_chains, seed, self.dtype, self.n_threads, first_chain, purpose="start")
            z = self.prior.from_base(latent, self.n_threads)
        else:
            phi, leading = fields(phi, self.theory.shape, "phi")
            if leading != (n_chains,):
                raise ValueError(f"phi: shape {phi.shape} is not {n_chains} fields of shape {self.theory.shape}")
            z = self.flow.inverse(phi.astype(self.dtype), self.n_threads)[0]
        return State(z, 0, check_seed(seed), first_chain)

    def _proposals(self, z: np.ndarray, state: State, first: int, n: int) -> np.ndarray:
        """Proposals `first` .. `first` + n - 1 of this call, (n * n_chains, *shape); those of lattices depend on z."""
        latent = self.prior.to_base(z, self.n_threads)
        parts = [
            self.prior.base.moved(latent, state.seed, state.trajectory + first + i, self.n_threads, state.first_chain)
            for i in range(n)
        ]
        return self.prior.from_base(np.concatenate(parts), self.n_threads)

    def advance(self, state: State, n_samples: int, thin: int = 1, measure: bool = True) -> Block:
        """`n_samples` samples, `thin` proposals apart, of every chain.

        Raises
        ------
        NotFiniteError
            A weight became NaN or Inf: names chain and trajectory.
        """
        n_steps = check_count(n_samples, "n_samples") * check_count(thin, "thin", 1, 2**31 - 1)
        z, _ = fields(state.latent, self.theory.shape, "latent")
        z = z.astype(self.dtype, copy=True)
        n = len(z)
        begin = time.perf_counter()
        phi, log_w = self._weighed(z)
        values = self._measured(phi, measure)
        uniforms = np.empty((n_steps, n))
        _core.uniform(state.seed, _core.PURPOSES["accept"], state.trajectory, state.first_chain, n, uniforms)
        dh, accepted = np.empty((n_steps, n)), np.empty((n_steps, n), dtype=bool)
        found = np.empty((n_samples if measure else 0, n, len(OBSERVABLES)))
        at_once = max(1, _ENTRIES_AT_ONCE // max(z.size, 1)) if self.prior.base.theory is None else 1
        for first in range(0, n_steps, at_once):
            steps = range(first, min(first + at_once, n_steps))
            new_z = self._proposals(z, state, first, len(steps))
            new_phi, new_log_w = self._weighed(new_z)
            new_values = self._measured(new_phi, measure).reshape(len(steps), n, -1)
            new_z, new_phi = (x.reshape(len(steps), n, *self.theory.shape) for x in (new_z, new_phi))
            new_log_w = new_log_w.reshape(len(steps), n)
            for i, step in enumerate(steps):
                dh[step] = log_w - new_log_w[i]
                if not np.isfinite(dh[step]).all():
                    chain = int(np.argmin(np.isfinite(dh[step])))
                    raise _core.NotFiniteError(
                        f"log w is {new_log_w[i, chain]} in chain {state.first_chain + chain} "
                        f"(trajectory {state.trajectory + step})"
                    )
                yes = accepted[step] = uniforms[step] < np.exp(np.minimum(-dh[step], 0.0))
                z[yes], phi[yes], log_w[yes] = new_z[i, yes], new_phi[i, yes], new_log_w[i, yes]
                values[yes] = new_values[i, yes]
                if measure and (step + 1) % thin == 0:
                    found[step // thin] = values
        return Block(
            observables={name: np.ascontiguousarray(found[..., i]) for i, name in enumerate(OBSERVABLES)},
            dh=dh,
            accepted=accepted,
            seconds=time.perf_counter() - begin,
            state=replace(state, latent=z, trajectory=state.trajectory + n_steps),
            fields=phi,
        )

    def _measured(self, phi, measure: bool) -> np.ndarray:
        if not measure:
            return np.empty((len(phi), 0))
        found = self.theory.measure(phi, self.n_threads)
        return np.stack([found[name] for name in OBSERVABLES], axis=-1)


# ---- weighted samples -----------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    """Fields with importance weights.

    Attributes
    ----------
    theory : Phi4
    phi : ndarray, shape (n_samples, *shape)
    log_w : ndarray, shape (n_samples,)
        The mean of exp(log_w) is Z = integral exp(-S), or Z over that of a prior that is not normalised.
    observables : dict of str to ndarray, shape (n_samples,)
        As those of a `Run`.
    population : ndarray of int, shape (n_samples,)
        Samples of different populations are independent; errors are those between populations.
    seconds : float
    force_evaluations : float
        Of all samples together.
    """

    theory: Phi4
    phi: np.ndarray
    log_w: np.ndarray
    observables: dict[str, np.ndarray]
    population: np.ndarray
    seconds: float
    force_evaluations: float

    @property
    def n_samples(self) -> int:
        return len(self.log_w)

    @property
    def ess(self) -> float:
        """Effective sample size per sample, (sum w)^2 / (N sum w^2), with w summed over populations first."""
        w = self._sums(np.ones(self.n_samples))
        return float(w.sum() ** 2 / (len(w) * (w**2).sum()))

    @property
    def n_effective(self) -> float:
        """Independent samples these are worth: (sum w)^2 / sum w^2, or, where that is less, the variance of phi^2 over
        the squared error of its mean between populations, whose particles may share ancestors."""
        value, error = self.mean("phi2")
        w = self._weights()
        variance = (w * (self.observables["phi2"] - value) ** 2).sum() / w.sum()
        by_weights = w.sum() ** 2 / (w**2).sum()
        return float(min(by_weights, variance / error**2) if error > 0 else by_weights)

    @property
    def tail_index(self) -> float:
        """k of the tail P(w > x) ~ x^(-1/k) of the populations' weights: infinite variance from 1/2, mean from 1.

        Hill's estimator (Ann. Statist. 3 (1975) 1163) of the 3 sqrt(N) largest, as many as arXiv:1507.02646 takes.
        """
        w = np.sort(self._sums(np.ones(self.n_samples)))
        largest = w[-1 - math.ceil(3 * math.sqrt(len(w))) :] if len(w) > 25 else w
        with np.errstate(divide="ignore"):
            return float(np.log(largest[1:] / largest[0]).mean())

    @property
    def log_z(self) -> float:
        return _log_mean(self.log_w)

    @property
    def log_z_error(self) -> float:
        """std(w) / (<w> sqrt(N)) over populations; too small where few weights dominate."""
        w = self._sums(np.ones(self.n_samples))
        return float(w.std(ddof=1) / (w.mean() * math.sqrt(len(w)))) if len(w) > 1 else math.nan

    def mean(self, name: str) -> tuple[float, float]:
        """The reweighted mean of an observable, and its error: (sum w O) / (sum w), linearised."""
        w, o = self._weights(), self.observables[name]
        value = float((w * o).sum() / w.sum())
        parts = self._sums(o - value)
        n = len(parts)
        return value, float(math.sqrt((parts**2).sum() * n / max(n - 1, 1)) / w.sum())

    def _weights(self) -> np.ndarray:
        return np.exp(self.log_w - self.log_w.max())

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Of w values over each population."""
        return np.bincount(self.population, weights=self._weights() * values)


class WeightedSampler(ABC):
    """A sampler that makes independent fields with weights."""

    theory: Phi4

    @abstractmethod
    def sample(self, n_samples: int, seed: int = 0) -> Weighted:
        """Draw `n_samples` fields."""


def _with_observables(theory, phi, log_w, population, seconds, forces, n_threads) -> Weighted:
    o = theory.measure(phi, n_threads)
    o["abs_M"], o["M2"] = np.abs(o["M"]), o["M"] ** 2
    o["chi"] = theory.volume * o["M2"]
    hopping = theory.beta * theory.ndim * o["nn"]
    o["action_density"] = (1 - 2 * theory.lam) * o["phi2"] + theory.lam * o["phi4"] - hopping
    return Weighted(theory, phi, log_w, o, population, seconds, forces)


def _check_log_w(log_w: np.ndarray, step: int) -> None:
    if not np.isfinite(log_w).all():
        chain = int(np.argmin(np.isfinite(log_w)))
        raise _core.NotFiniteError(f"log w is {log_w[chain]} in sample {chain}, step {step}")


@dataclass(frozen=True)
class Reweighting(_OfFlow, WeightedSampler):
    """A flow's fields with their importance weights exp(-S) / q (arXiv:2101.08176 sec. IV).

    Parameters
    ----------
    theory : Phi4
    flow : Flow
    prior : Prior, optional
        Of the latents: unit normals by default, and then log_z is log Z. A lattice prior's own Z is not known,
        and log_z is relative to it.
    dtype : {"float64", "float32"}
    n_threads : int, optional
    """

    theory: Phi4
    flow: Flow
    prior: Prior | None = None
    dtype: str = "float64"
    n_threads: int | None = None

    def sample(self, n_samples: int, seed: int = 0) -> Weighted:
        """Draw `n_samples` independent fields; see `Weighted`."""
        n_samples, seed = check_count(n_samples, "n_samples", 2), check_seed(seed)
        begin, phi, log_w, done = time.perf_counter(), [], [], 0
        at_once = max(1, _ENTRIES_AT_ONCE // self.theory.volume)
        while done < n_samples:
            n = min(at_once, n_samples - done)
            latent = self.prior.base.fresh(n, seed, self.dtype, self.n_threads, done)
            x, w = self._weighed(self.prior.from_base(latent, self.n_threads))
            phi.append(x)
            log_w.append(w)
            done += n
        log_w = np.concatenate(log_w)
        _check_log_w(log_w, 0)
        seconds = time.perf_counter() - begin
        population, forces = np.arange(n_samples), n_samples * (1 + self.prior.base.forces(self.prior.base.n_warmup))
        return _with_observables(self.theory, np.concatenate(phi), log_w, population, seconds, forces, self.n_threads)


@dataclass(frozen=True)
class Annealing(WeightedSampler):
    """Annealed importance sampling, and with resampling a sequential Monte Carlo sampler.

    Latents start as unit normals, or as those of another prior, of density exp(-S_0), and follow S_t(z) = (1 - t)
    S_0(z) + t S~(z) from t = 0 to 1, S~ the action or its pullback through a flow. At each step t_{k+1} the weight
    takes up the work, log w -= (t_{k+1} - t_k) (S~(z) - S_0(z)) (Jarzynski, cond-mat/9610209; Neal, physics/9803008),
    and HMC at t_{k+1} relaxes z; the mean of w is Z over that of S_0, exactly, however fast. With `resample` the
    particles of a population are redrawn by their weights whenever the population's ESS falls below that fraction
    (Del Moral, Doucet, Jasra, J. R. Stat. Soc. B 68 (2006) 411).

    Parameters
    ----------
    theory : Phi4
    flow : Flow, optional
        Start from its fields instead of its latents. Its forces are evaluated step by step.
    prior : Prior, optional
        Of the latents: unit normals by default, and then log_z is log Z. The Z of a lattice prior's own fields is not
        known, and log_z is relative to it.
    n_temperatures : int
        Steps of t, of equal size.
    tau : float
    n_steps : int
        Of the leapfrog trajectories between the steps.
    n_trajectories : int
        At each temperature.
    resample : float
        In [0, 1]; 0 is annealed importance sampling.
    population : int
        Particles that are resampled together; populations stay independent.
    dtype : {"float64", "float32"}
    n_threads : int, optional

    Notes
    -----
    From unit normals without a flow, S_t is a phi^4 action in the field z / s, s^2 = 2 / (a + sqrt(a^2 + 8 t lam)),
    a = (1 - t) / 2 + t (1 - 2 lam): beta_t = t beta s^2 and lam_t = t lam s^4; `HMC` of that theory makes the moves.
    """

    theory: Phi4
    flow: Flow | None = None
    prior: Prior | None = None
    n_temperatures: int = 20
    tau: float = 1.0
    n_steps: int = 8
    n_trajectories: int = 1
    resample: float = 0.0
    population: int = 64
    dtype: str = "float64"
    n_threads: int | None = None

    def __post_init__(self):
        check_theory(self.theory)
        if self.flow is not None:
            _check_flow(self.flow, self.theory)
        if self.prior is None:
            object.__setattr__(self, "prior", Gaussian(self.theory.shape))
        check_prior(self.prior, self.theory.shape)
        for name in ("n_temperatures", "n_steps", "n_trajectories"):
            check_count(getattr(self, name), name, 1, 10**6)
        check_count(self.population, "population", 2, 2**31)
        if not (isinstance(self.resample, (int, float)) and 0 <= self.resample <= 1):
            raise ValueError(f"resample: must lie in [0, 1], got {self.resample!r}")
        # HMC's own checks of tau, dtype and threads.
        self._hmc(1.0)

    def _hmc(self, t: float) -> HMC:
        return HMC(self._theory_at(t)[0], self.tau, self.n_steps, dtype=self.dtype, n_threads=self.n_threads)

    def _theory_at(self, t: float) -> tuple[Phi4, float]:
        """The theory of z / s that S_t is, and s."""
        beta, lam = self.theory.beta, self.theory.lam
        a = 0.5 * (1 - t) + t * (1 - 2 * lam)
        s2 = 2 / (a + math.sqrt(a * a + 8 * t * lam))
        return Phi4(self.theory.shape, beta=t * beta * s2, lam=t * lam * s2 * s2), math.sqrt(s2)

    def sample(self, n_samples: int, seed: int = 0) -> Weighted:
        """Anneal `n_samples` particles; see `Weighted`.

        Raises
        ------
        NotFiniteError
            A weight or dH became NaN or Inf; names particle and step.
        """
        n, seed = check_count(n_samples, "n_samples", 2, 2**31), check_seed(seed)
        if self.resample and n % self.population:
            raise ValueError(f"n_samples: must be a multiple of the population, {self.population}, got {n}")
        begin, base = time.perf_counter(), self.prior.base
        z = base.fresh(n, seed, self.dtype, self.n_threads).reshape(n, *self.theory.shape)
        log_w, step = np.zeros(n), 1 / self.n_temperatures
        population = np.arange(n) // self.population if self.resample else np.arange(n)
        # Latents of the base: a prior's map is one more layer.
        maps = [flow for flow in (self.prior.map, self.flow) if flow is not None]
        target = self.theory.pullback(Compose(maps)) if maps else self.theory
        plain = base.theory is None and not maps
        for k in range(self.n_temperatures):
            t, number = (k + 1) * step, k * self.n_trajectories
            log_w -= step * (target.action(z, self.n_threads) + base.log_prob(z.reshape(n, -1), self.n_threads))
            _check_log_w(log_w, k)
            if self.resample:
                z, log_w = self._resampled(z, log_w, seed, k)
            if plain:
                theory, s = self._theory_at(t)
                hmc = self._hmc(t)
                z = s * hmc.advance(State(z / s, number, seed), 1, self.n_trajectories, measure=False).phi
            else:
                for i in range(self.n_trajectories):
                    z = self._trajectory(target, z, t, seed, number + i)
        phi = target.field(z, self.n_threads) if maps else z
        forces = n * (base.forces(base.n_warmup) + self.n_temperatures * (self.n_trajectories * (self.n_steps + 1) + 1))
        return _with_observables(
            self.theory, phi, log_w, population, time.perf_counter() - begin, forces, self.n_threads
        )

    def _resampled(self, z, log_w, seed: int, step: int):
        """Systematic resampling of each population whose ESS is below the threshold; weights become their mean."""
        uniforms = np.empty((1, len(z) // self.population))
        _core.uniform(seed, _core.PURPOSES["resample"], step, 0, uniforms.size, uniforms)
        z, log_w = z.copy(), log_w.copy()
        for i, uniform in enumerate(uniforms[0]):
            members = slice(i * self.population, (i + 1) * self.population)
            w = np.exp(log_w[members] - log_w[members].max())
            if w.sum() ** 2 >= self.resample * self.population * (w**2).sum():
                continue
            places = (np.arange(self.population) + uniform) / self.population
            chosen = np.searchsorted(np.cumsum(w) / w.sum(), places).clip(max=self.population - 1)
            z[members] = z[members][chosen]
            log_w[members] = _log_mean(log_w[members])
        return z, log_w

    def _trajectory(self, target: Phi4 | PulledBack, z, t: float, seed: int, number: int):
        """One leapfrog trajectory of S_t, with its accept step."""

        def potential(z):
            action, force = target._evaluate(z, self.n_threads)
            start, pull = self.prior.base.potential(z.reshape(len(z), -1), self.n_threads)
            return (1 - t) * start + t * action, (1 - t) * pull.reshape(z.shape) + t * force

        p = np.empty_like(z)
        _core.normal(seed, _core.PURPOSES["momenta"], number, 0, len(z), p, check_threads(self.n_threads))
        size = z.dtype.type(self.tau / self.n_steps)
        action, force = potential(z)
        energy, x = action + _half_square(p), z
        for _ in range(self.n_steps):
            p = p + size / 2 * force
            x = x + size * p
            action, force = potential(x)
            p = p + size / 2 * force
        dh = action + _half_square(p) - energy
        _check_log_w(dh, number)
        uniforms = np.empty((1, len(z)))
        _core.uniform(seed, _core.PURPOSES["accept"], number, 0, len(z), uniforms)
        accept = uniforms[0] < np.exp(np.minimum(-dh, 0.0))
        return np.where(accept.reshape(-1, *[1] * self.theory.ndim), x, z)
