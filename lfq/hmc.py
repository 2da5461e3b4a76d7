"""Hybrid Monte Carlo of a theory, or of its pullback through a flow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from . import _core
from ._kernels import check_count, check_seed, check_threads, fields, real_dtype
from .actions import Phi4, PulledBack
from .observables import OBSERVABLES

__all__ = ["HMC", "INTEGRATORS", "Block", "Integrator", "Run", "State"]


@dataclass(frozen=True)
class Integrator:
    """A symmetric splitting of Hamiltonian dynamics: kick[0] drift[0] kick[1] ... kick[-1].

    Attributes
    ----------
    name : str
    kick : tuple of float
        Fractions of the step by which the force changes the momenta; sum to one.
    drift : tuple of float
        Fractions by which the momenta move the field; one fewer, sum to one.
    order : int
        dH at the end of a trajectory of fixed length goes as step_size ** order.
    """

    name: str
    kick: tuple[float, ...]
    drift: tuple[float, ...]
    order: int

    @property
    def n_stages(self) -> int:
        return len(self.drift)


def _omf2() -> Integrator:
    # hep-lat/0505020 eq. (18): the second-order minimum-norm parameter.
    lam = 0.1931833275037836
    return Integrator("omf2", (lam, 1 - 2 * lam, lam), (0.5, 0.5), 2)


def _omf4() -> Integrator:
    # Omelyan, Mryglod, Folk, Comput. Phys. Commun. 151 (2003) 272, eq. (71): 5 forces, velocity version.
    r1, r2, r3, r4 = 0.08398315262876693, 0.2539785108410595, 0.6822365335719091, -0.03230286765269967
    k, d = 0.5 - r1 - r3, 1 - 2 * (r2 + r4)
    return Integrator("omf4", (r1, r3, k, k, r3, r1), (r2, r4, d, r4, r2), 4)


INTEGRATORS = {i.name: i for i in (Integrator("leapfrog", (0.5, 0.5), (1.0,), 2), _omf2(), _omf4())}
"""The integrators known by name; any `Integrator` can be given instead."""


@dataclass(frozen=True)
class State:
    """Where a set of chains stands: enough to continue to the last bit.

    Attributes
    ----------
    latent : ndarray, shape (n_chains, *shape)
        Fields, or latents of a pulled-back theory.
    trajectory : int
        Number of the next trajectory.
    seed : int
    first_chain : int
        Global number of the first chain; chain i draws from the stream (seed, first_chain + i).
    """

    latent: np.ndarray
    trajectory: int
    seed: int
    first_chain: int = 0

    @property
    def n_chains(self) -> int:
        return len(self.latent)


@dataclass(frozen=True)
class Block:
    """Consecutive samples of all chains.

    Attributes
    ----------
    observables : dict of str to ndarray, shape (n_samples, n_chains)
        Those of `lfq.observables.OBSERVABLES`.
    dh : ndarray, shape (n_samples * thin, n_chains)
        Energy change of every trajectory.
    accepted : ndarray of bool, shape of dh
    seconds : float
        Wall time of the block.
    state : State
        After the block.
    phi : ndarray, shape (n_chains, *shape)
        The fields after the block.
    """

    observables: dict[str, np.ndarray]
    dh: np.ndarray
    accepted: np.ndarray
    seconds: float
    state: State
    phi: np.ndarray


@dataclass(frozen=True)
class HMC:
    """Hybrid Monte Carlo with many chains side by side.

    Parameters
    ----------
    theory : Phi4 or PulledBack
        What to sample; for a pulled-back theory this is flow-HMC.
    tau : float
        Trajectory length; momenta have unit mass.
    n_steps : int
        Integrator steps per trajectory.
    integrator : {"leapfrog", "omf2", "omf4"} or Integrator
    dtype : {"float64", "float32"}
        Of fields and momenta. Energies are summed in double in both.
    n_threads : int, optional
        All by default. Results do not depend on it.
    """

    theory: Phi4 | PulledBack
    tau: float = 1.0
    n_steps: int = 10
    integrator: str | Integrator = "leapfrog"
    dtype: str = "float64"
    n_threads: int | None = None

    def __post_init__(self):
        if not isinstance(self.theory, (Phi4, PulledBack)):
            raise TypeError(f"theory: must be a Phi4 or its pullback, got {type(self.theory).__name__}")
        if not (isinstance(self.tau, (int, float)) and math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau: must be positive, got {self.tau!r}")
        check_count(self.n_steps, "n_steps", 1, 10**6)
        check_threads(self.n_threads)
        real_dtype(self.dtype)
        if isinstance(self.integrator, str):
            if self.integrator not in INTEGRATORS:
                raise ValueError(f"integrator: must be one of {', '.join(INTEGRATORS)}, got {self.integrator!r}")
            object.__setattr__(self, "integrator", INTEGRATORS[self.integrator])
        elif not isinstance(self.integrator, Integrator):
            raise TypeError(f"integrator: must be a name or an Integrator, got {self.integrator!r}")
        if (
            not 1 <= self.integrator.n_stages <= _core.MAX_STAGES
            or len(self.integrator.kick) != len(self.integrator.drift) + 1
        ):
            raise ValueError("integrator: needs 1 to 8 drifts and one kick more")

    @property
    def step_size(self) -> float:
        return self.tau / self.n_steps

    @property
    def force_evaluations_per_trajectory(self) -> int:
        """The pulled-back force at a trajectory's start is kept from the last one; the plain one is not."""
        return self.n_steps * self.integrator.n_stages + (not isinstance(self.theory, PulledBack))

    # ---- dynamics --------------------------------------------------------------------------
    def _settings(self, n_samples=0, thin=1, seed=0, first_chain=0, trajectory=0) -> np.ndarray:
        h = np.zeros(1, dtype=_core.hmc_dtype)
        i = self.integrator
        h["integrator"]["n_stages"] = i.n_stages
        h["integrator"]["kick"][0, : len(i.kick)] = i.kick
        h["integrator"]["drift"][0, : len(i.drift)] = i.drift
        h["step_size"], h["n_steps"], h["thin"], h["n_samples"] = (
            self.step_size,
            self.n_steps,
            thin,
            n_samples,
        )
        h["seed"], h["first_chain"], h["first_trajectory"] = seed, first_chain, trajectory
        return h

    def evolve(self, latent, momenta, backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Integrate one trajectory: no momentum refresh, no accept step.

        Parameters
        ----------
        latent, momenta : array_like, shape (..., *shape)
        backward : bool
            Integrate back in time, with negative step size.

        Returns
        -------
        latent, momenta : ndarray
            New arrays.
        """
        latent, _ = fields(latent, self.theory.shape, "latent")
        momenta, _ = fields(momenta, self.theory.shape, "momenta")
        if momenta.shape != latent.shape:
            raise ValueError(f"momenta: shape {momenta.shape} differs from the latent's, {latent.shape}")
        latent, momenta = latent.copy(), momenta.astype(latent.dtype, copy=True)
        h = self._settings()
        if backward:
            h["step_size"] *= -1
        layers, weights = self.theory._program()
        _core.evolve(
            layers,
            weights,
            self.theory._physical._record(),
            h,
            latent,
            momenta,
            check_threads(self.n_threads),
        )
        return latent, momenta

    def start(self, n_chains: int, seed: int, phi=None, first_chain: int = 0) -> State:
        """Chains at their beginning.

        Parameters
        ----------
        n_chains : int
        seed : int
        phi : array_like, shape (n_chains, *shape), optional
            Fields to start from. By default normals of standard deviation 1/2: in the tail of wider ones
            a coarse step is unstable, and such a chain would never move. For a pulled-back theory, the
            same after 20 fine trajectories of plain HMC, since a flow may be steep far from the fields
            it was trained on.
        first_chain : int
            Global number of the first chain.
        """
        n_chains = check_count(n_chains, "n_chains", 1, 2**31)
        seed = check_seed(seed)
        first_chain = check_count(first_chain, "first_chain", 0, 2**32 - n_chains)
        pulled_back = isinstance(self.theory, PulledBack)
        if phi is None and pulled_back:
            plain = replace(self, theory=self.theory.theory, tau=1.3, n_steps=26, integrator="leapfrog")
            rough = plain.advance(plain.start(n_chains, seed, first_chain=first_chain), 1, 20)
            return State(self.theory.latent(rough.phi, self.n_threads), rough.state.trajectory, seed, first_chain)
        if phi is None:
            latent = np.empty((n_chains, *self.theory.shape), dtype=self.dtype)
            _core.normal(seed, _core.PURPOSES["start"], 0, first_chain, n_chains, latent, check_threads(self.n_threads))
            latent *= 0.5
        else:
            phi, leading = fields(phi, self.theory.shape, "phi")
            if leading != (n_chains,):
                raise ValueError(f"phi: shape {phi.shape} is not {n_chains} fields of shape {self.theory.shape}")
            if not np.isfinite(phi).all():
                raise _core.NotFiniteError(f"phi: chain {int(np.argwhere(~np.isfinite(phi))[0][0])} holds NaN or Inf")
            phi = phi.astype(self.dtype)
            latent = self.theory.latent(phi, self.n_threads) if pulled_back else phi
        return State(latent, 0, seed, first_chain)

    def advance(self, state: State, n_samples: int, thin: int = 1, measure: bool = True) -> Block:
        """`n_samples` samples, `thin` trajectories apart, of every chain in one call.

        Without `measure` the block's observables are empty.

        Raises
        ------
        NotFiniteError
            dH became NaN or Inf: names chain and trajectory. `state` is as it was.
        """
        n_samples = check_count(n_samples, "n_samples")
        thin = check_count(thin, "thin", 1, 2**31 - 1)
        latent, leading = fields(state.latent, self.theory.shape, "latent")
        latent = latent.astype(self.dtype, copy=True).reshape(-1, *self.theory.shape)
        n = len(latent)
        phi = np.empty_like(latent)
        dh = np.empty((n_samples * thin, n))
        accepted = np.empty((n_samples * thin, n), dtype=np.uint8)
        values = np.empty((n_samples if measure else 0, n, len(OBSERVABLES)))
        physical = self.theory._physical
        settings = self._settings(n_samples, thin, state.seed, state.first_chain, state.trajectory)
        layers, weights = self.theory._program()
        begin = time.perf_counter()
        _core.hmc(
            layers, weights, physical._record(), settings, latent, phi, dh, accepted, physical._smear(), values,
            check_threads(self.n_threads),
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        return Block(
            observables={name: np.ascontiguousarray(values[..., i]) for i, name in enumerate(OBSERVABLES)},
            dh=dh,
            accepted=accepted.view(bool),
            seconds=seconds,
            state=replace(state, latent=latent, trajectory=state.trajectory + n_samples * thin),
            phi=phi,
        )

    def blocks(self, state: State, n_samples: int, thin: int = 1, block_size: int | None = None) -> Iterator[Block]:
        """Advance in blocks of `block_size` samples; by default of about a fifth of a second.

        The chain does not depend on the block size, and each block's state restarts it exactly.
        """
        done, size = 0, block_size or 1
        n_samples = check_count(n_samples, "n_samples")
        while done < n_samples:
            block = self.advance(state, min(size, n_samples - done), thin)
            state, done = block.state, done + min(size, n_samples - done)
            if block_size is None:
                size = max(1, min(4 * size, int(size * 0.2 / max(block.seconds, 1e-6))))
            yield block

    def time_trajectory(self, state: State, seconds: float = 0.3) -> float:
        """Wall seconds per trajectory of one chain, all of `state`'s side by side, nothing measured.

        The median of five repeats that together take about `seconds`.
        """
        n, times = 1, []
        while len(times) < 5:
            used = self.advance(state, 1, n, measure=False).seconds
            if used < seconds / 10 and n < 10**6:
                n *= 2
            else:
                times.append(used / (n * state.n_chains))
        return float(np.median(times))

    # ---- runs ------------------------------------------------------------------------------
    def tune(self, acceptance: float = 0.9, n_chains: int = 64, seed: int = 0, n_warmup: int = 100) -> HMC:
        """The same HMC with the fewest steps per trajectory that reach an acceptance.

        Measures the acceptance in pilot trajectories from a thermalised state; counts as reached within
        0.01 of the target.

        Parameters
        ----------
        acceptance : float
            In (0, 1).
        n_chains, n_warmup : int
            Pilot chains and their thermalisation in trajectories.

        Returns
        -------
        HMC
        """
        if not 0 < acceptance < 1:
            raise ValueError(f"acceptance: must lie between 0 and 1, got {acceptance}")
        n_pilot = max(8, 3000 // check_count(n_chains, "n_chains", 1))
        n, state = self.n_steps, self.start(n_chains, seed)
        while True:
            try:
                warm = replace(self, n_steps=n).advance(state, 1, check_count(n_warmup, "n_warmup", 1))
                if warm.accepted[n_warmup // 2 :].mean() > 0.5:
                    break
            except _core.NotFiniteError:
                pass
            if n > 10**5:
                raise RuntimeError(f"tune: no acceptance above one half with {n} steps for tau = {self.tau}")
            n *= 2
        state, measured = warm.state, {}

        def rate(n_steps: int) -> float:
            if n_steps not in measured:
                try:
                    block = replace(self, n_steps=n_steps).advance(state, 1, n_pilot)
                    measured[n_steps] = float(block.accepted.mean())
                except _core.NotFiniteError:
                    measured[n_steps] = 0.0
            return measured[n_steps]

        goal, low = acceptance - 0.01, 0
        while rate(n) < goal:
            low, n = n, 2 * n
        while n - low > 1:
            middle = (low + n) // 2
            low, n = (low, middle) if rate(middle) >= goal else (middle, n)
        return replace(self, n_steps=n)

    def sample(
        self,
        n_chains: int,
        n_samples: int,
        n_warmup: int = 0,
        seed: int = 0,
        thin: int = 1,
        start: State | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Run:
        """Run the chains.

        Parameters
        ----------
        n_chains, n_samples : int
            Chains side by side, samples of each.
        n_warmup : int
            Trajectories dropped first.
        seed : int
        thin : int
            Trajectories per sample.
        start : State, optional
            Where to continue from, instead of `n_chains` new chains of `seed`.
        progress : bool or callable
            True for a line on stderr, or called as progress(done, n_samples).

        Returns
        -------
        Run
        """
        n_warmup = check_count(n_warmup, "n_warmup")
        check_count(n_samples, "n_samples", 1)
        state = self.start(n_chains, seed) if start is None else start
        report = _progress_line if progress is True else progress or None
        for block in self.blocks(state, n_warmup):
            state = block.state
        blocks, done = [], 0
        for block in self.blocks(state, n_samples, thin):
            blocks.append(block)
            done += len(block.observables["M"])
            if report:
                report(done, n_samples)
        return Run.from_blocks(self.theory, self, blocks)


def _progress_line(done: int, total: int) -> None:
    import sys

    print(f"\r{done}/{total} samples", end="\n" if done == total else "", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """Samples of many chains.

    Attributes
    ----------
    theory : Phi4 or PulledBack
    hmc : HMC
    observables : dict of str to ndarray, shape (n_samples, n_chains)
        Those of `lfq.observables.OBSERVABLES`, and abs_M, M2, chi = V M^2 and the action density S/V.
    dh, accepted : ndarray, shape (n_trajectories, n_chains)
    seconds : float
        Wall time of the samples.
    state : State
        After the last sample.
    phi : ndarray, shape (n_chains, *shape)
        The last fields.
    """

    theory: Phi4 | PulledBack
    hmc: HMC
    observables: dict[str, np.ndarray]
    dh: np.ndarray
    accepted: np.ndarray
    seconds: float
    state: State
    phi: np.ndarray

    @classmethod
    def from_blocks(cls, theory: Phi4 | PulledBack, hmc: HMC, blocks: Iterable[Block]) -> Run:
        """Join consecutive blocks."""
        blocks = list(blocks)
        if not blocks:
            raise ValueError("blocks: a run needs at least one")
        found = {name: np.concatenate([b.observables[name] for b in blocks]) for name in OBSERVABLES}
        physical = theory._physical
        found["abs_M"] = np.abs(found["M"])
        found["M2"] = found["M"] ** 2
        found["chi"] = physical.volume * found["M2"]
        found["action_density"] = (
            -physical.beta * physical.ndim * found["nn"]
            + (1 - 2 * physical.lam) * found["phi2"]
            + physical.lam * found["phi4"]
        )
        return cls(
            theory, hmc, found,
            dh=np.concatenate([b.dh for b in blocks]),
            accepted=np.concatenate([b.accepted for b in blocks]),
            seconds=sum(b.seconds for b in blocks),
            state=blocks[-1].state,
            phi=blocks[-1].phi,
        )  # fmt: skip

    @cached_property
    def seconds_per_trajectory(self) -> float:
        """Of one chain, all side by side, measurements not included: `HMC.time_trajectory`, when first asked."""
        return self.hmc.time_trajectory(self.state)

    @property
    def n_chains(self) -> int:
        return self.dh.shape[1]

    @property
    def n_samples(self) -> int:
        return len(self.observables["M"])

    @property
    def thin(self) -> int:
        return len(self.dh) // self.n_samples

    @property
    def acceptance(self) -> float:
        return float(self.accepted.mean())

    @property
    def force_evaluations_per_trajectory(self) -> int:
        return self.hmc.force_evaluations_per_trajectory

    def exp_minus_dh(self) -> tuple[float, float]:
        """Mean of exp(-dH) over all trajectories and its error; 1 for a correct algorithm in equilibrium.

        The error is that of the chains' means (of consecutive quarters where there are few chains).
        """
        weights = np.exp(-self.dh)
        parts = np.concatenate([part.mean(axis=0) for part in np.array_split(weights, min(4, len(weights)))])
        error = parts.std(ddof=1) / math.sqrt(parts.size) if parts.size > 1 else math.nan
        return float(weights.mean()), float(error)

    def summary(self) -> str:
        """A table of means, errors, autocorrelation times and effective samples."""
        from .analysis import summarize

        lines = [
            f"{self.n_chains} chains of {self.n_samples} samples, acceptance {self.acceptance:.3f}, "
            f"{self.seconds:.2f} s",
            f"{'observable':<16} {'value':>13} {'error':>10} {'tau_int':>9} {'+-':>7} {'N_eff':>10} {'N_eff/s':>10}",
        ]
        for name, e in summarize(self).items():
            lines.append(
                f"{name:<16} {e.value:13.6g} {e.error:10.2g} {e.tau_int:9.3g} {e.tau_int_error:7.2g} "
                f"{e.n_effective:10.0f} {e.n_effective / self.seconds:10.3g}"
            )
        return "\n".join(lines)
