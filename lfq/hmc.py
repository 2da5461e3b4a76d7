"""Hybrid Monte Carlo of a theory or of its pullback through a flow, plain, with clusters, or accelerated."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import Any

import numpy as np

from . import _core, _gpu
from ._kernels import backend, check_count, check_seed, check_threads, fields, is_finite, real_dtype
from .actions import Phi4, PulledBack, check_theory
from .custom import CustomAction
from .io import FileFormatError, check_parameters, load_checkpoint, save_checkpoint
from .observables import OBSERVABLES

__all__ = [
    "HMC",
    "INTEGRATORS",
    "Block",
    "ClusterHMC",
    "EmbeddedClusters",
    "FourierHMC",
    "Integrator",
    "KernelSampler",
    "Run",
    "Sampler",
    "State",
]


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
        Of a heat bath, whose dh is zero: of float, the fraction of sites that got new values.
    seconds : float
        Wall time of the block.
    state : State
        After the block.
    fields : ndarray, shape (n_chains, *shape), or None
        Those after the block, where the latents are not themselves the fields; see `phi`.
    flipped : ndarray of int64, shape of dh, or None
        Sites whose sign the cluster updates of a trajectory changed, each time counted.
    """

    observables: dict[str, np.ndarray]
    dh: np.ndarray
    accepted: np.ndarray
    seconds: float
    state: State
    fields: np.ndarray | None = None
    flipped: np.ndarray | None = None

    @cached_property
    def phi(self) -> np.ndarray:
        """The fields after the block, shape (n_chains, *shape)."""
        return self.state.latent.copy() if self.fields is None else self.fields


def restored_state(path, tensors: dict[str, np.ndarray], record: dict[str, Any], shape: tuple[int, ...]) -> State:
    """The state in a checkpoint, checked."""
    try:
        latent = tensors["latent"]
        numbers = {
            "trajectory": check_count(record["trajectory"], "trajectory", 0, 2**56 - 1),
            "seed": check_seed(record["seed"]),
            "first_chain": check_count(record["first_chain"], "first_chain", 0, 2**32 - max(len(latent), 1)),
        }
        if latent.dtype.kind != "f" or latent.ndim != len(shape) + 1 or latent.shape[1:] != shape:
            raise ValueError(f"latents of shape {latent.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not the state of chains on {shape}: {error}") from None
    return State(latent, **numbers)


class Sampler(ABC):
    """What all samplers of chains share: `start` and `advance` make a sampler, the rest follows.

    A trajectory is one step of a chain, whatever the sampler: that which `thin`, tau_int and costs count.
    """

    theory: Phi4 | PulledBack

    @abstractmethod
    def start(self, n_chains: int, seed: int) -> State:
        """Chains at their beginning."""

    @abstractmethod
    def advance(self, state: State, n_samples: int, thin: int = 1, measure: bool = True) -> Block:
        """`n_samples` samples, `thin` trajectories apart, of every chain in one call."""

    @property
    @abstractmethod
    def force_evaluations_per_trajectory(self) -> float:
        """Work of a trajectory in units of the theory's force."""

    def _forces(self, flipped) -> float:
        """The same for a run, with what only that knows."""
        return self.force_evaluations_per_trajectory

    @property
    def parameters(self) -> dict[str, Any]:
        """All that decides what a state becomes, as plain data; the number of threads and the device do not."""
        found = {"sampler": type(self).__name__, **self.theory._physical.describe()}
        if isinstance(self.theory, PulledBack):
            found["flow"] = self.theory.flow.describe()
        for entry in dataclass_fields(self):
            value = getattr(self, entry.name)
            if entry.name == "dtype":
                found["dtype"] = str(real_dtype(value))
            elif entry.name not in ("theory", "n_threads", "device"):
                if hasattr(value, "describe"):
                    found[entry.name] = value.describe()
                else:
                    found[entry.name] = asdict(value) if is_dataclass(value) else value
        return found

    def save(self, state: State, path) -> None:
        """Write a state to a checkpoint, from which `load` continues to the last bit; keeps the one before.

        Parameters
        ----------
        state : State
        path : path-like
        """
        numbers = {"trajectory": state.trajectory, "seed": state.seed, "first_chain": state.first_chain}
        latent = _gpu.to_host(state.latent) if _gpu.is_gpu_array(state.latent) else state.latent
        save_checkpoint(path, {"latent": latent}, numbers | {"parameters": self.parameters})

    def load(self, path) -> State:
        """Read a state that `save` wrote; of a damaged checkpoint the one before.

        Raises
        ------
        ParameterError
            It was written with other parameters: names them.
        FileFormatError
            Both are damaged, or not of a sampler.
        FileNotFoundError
        """
        for tensors, record in load_checkpoint(path):
            check_parameters(path, record.get("parameters"), self.parameters)
            return restored_state(path, tensors, record, self.theory.shape)
        raise FileNotFoundError(f"{path}: no checkpoint")

    def blocks(self, state: State, n_samples: int, thin: int = 1, block_size: int | None = None) -> Iterator[Block]:
        """Advance in blocks of `block_size` samples; by default of about a fifth of a second.

        The chain does not depend on the block size, and each block's state restarts it exactly. A NotFiniteError
        has the last good one as its attribute ``state``.
        """
        done, size = 0, block_size or 1
        n_samples = check_count(n_samples, "n_samples")
        while done < n_samples:
            try:
                block = self.advance(state, min(size, n_samples - done), thin)
            except _core.NotFiniteError as error:
                error.state = state
                raise
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

    def tune_cost(self, acceptance: float = 0.8, n_chains: int = 64, seed: int = 0) -> Sampler:
        """The same sampler with the settings of least cost per independent sample: itself, where there are none.

        Parameters
        ----------
        acceptance : float
            Aim of samplers that have a step size.
        n_chains, seed : int
            Of pilot runs.
        """
        return self

    def _pilot_cost(self, state: State, price, hopeless: float, max_trajectories: int) -> tuple[float, State]:
        """The price of an independent sample, and the state after the pilot; stops early once `hopeless`.

        Infinite where the pilot diverges, or is too short to see tau_int: such short trajectories would only
        look cheap.
        """
        from .analysis import SLOW_OBSERVABLES, integrated_time

        begin, parts, done = state, [], 0
        while True:
            try:
                block = self.advance(state, min(max(50, done), max_trajectories - done))
            except _core.NotFiniteError:
                return math.inf, begin
            state, done = block.state, done + len(block.dh)
            parts.append(block)
            run = Run.from_blocks(self.theory, self, parts)
            tau_int = max(integrated_time(run.observables[name]) for name in SLOW_OBSERVABLES)
            cost = 2 * tau_int * price(run.force_evaluations_per_trajectory)
            if done >= max_trajectories or done >= 40 * tau_int or (done >= 100 and cost > 2 * hopeless):
                return cost if done >= 15 * tau_int else math.inf, state

    def _cheapest(self, others: Iterable[Sampler], state: State, clock: str, max_trajectories: int) -> Sampler:
        """The cheapest in pilot runs of this sampler and then of the others, until one costs more than the best."""
        best, least = self, math.inf
        for sampler in (self, *others):
            seconds = sampler.time_trajectory(state, 0.05) if clock == "seconds" else None
            price = float if seconds is None else lambda _, s=seconds: s
            cost, state = sampler._pilot_cost(state, price, least, max_trajectories)
            if cost >= least:
                break
            best, least = sampler, cost
        return best

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

        Warns
        -----
        RunWarning
            What `lfq.health.concerns` finds.
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
        from .health import RunWarning, concerns

        run = Run.from_blocks(self.theory, self, blocks)
        for concern in concerns(run):
            warnings.warn(concern, RunWarning, stacklevel=2)
        return run


class KernelSampler(Sampler):
    """Chains that one call of a kernel takes through many trajectories: what is left to say is `_run`."""

    dtype: str
    n_threads: int | None
    _accepted = np.uint8
    _flips = False
    _devices = ("cpu",)
    device = "cpu"

    def _fields(self, array, name: str):
        array, leading = fields(array, self.theory.shape, name, gpu="cuda" in self._devices)
        return (_gpu.asarray(array, name) if self.device == "cuda" else array), leading

    @abstractmethod
    def _settings(self, n_samples=0, thin=1, seed=0, first_chain=0, trajectory=0) -> np.ndarray:
        """The kernel's record."""

    @abstractmethod
    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        """The trajectories of `settings`, from and to `latent`; phi, empty without a flow, receives the fields."""

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
            plain = HMC(
                self.theory.theory, tau=1.3, n_steps=26, dtype=self.dtype, n_threads=self.n_threads, device=self.device
            )
            rough = plain.advance(plain.start(n_chains, seed, first_chain=first_chain), 1, 20)
            return State(self.theory.latent(rough.phi, self.n_threads), rough.state.trajectory, seed, first_chain)
        if phi is None:
            kernels, empty = (_gpu, _gpu.empty) if self.device == "cuda" else (_core, np.empty)
            latent = empty((n_chains, *self.theory.shape), self.dtype)
            purpose, threads = _core.PURPOSES["start"], check_threads(self.n_threads)
            kernels.normal(seed, purpose, 0, first_chain, n_chains, latent, threads)
            latent *= 0.5
        else:
            phi, leading = self._fields(phi, "phi")
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
        latent, leading = self._fields(state.latent, "latent")
        latent = latent.astype(self.dtype, copy=True).reshape(-1, *self.theory.shape)
        n = len(latent)
        pulled_back = isinstance(self.theory, PulledBack)
        phi = backend(latent)[1](latent.shape if pulled_back else (0, *self.theory.shape), latent.dtype)
        dh = np.empty((n_samples * thin, n))
        accepted = np.empty((n_samples * thin, n), dtype=self._accepted)
        flipped = np.empty((n_samples * thin, n), dtype=np.int64) if self._flips else None
        values = np.empty((n_samples if measure else 0, n, len(OBSERVABLES)))
        settings = self._settings(n_samples, thin, state.seed, state.first_chain, state.trajectory)
        begin = time.perf_counter()
        self._run(settings, latent, phi, dh, accepted, flipped, values)
        seconds = time.perf_counter() - begin
        return Block(
            observables={name: np.ascontiguousarray(values[..., i]) for i, name in enumerate(OBSERVABLES)},
            dh=dh,
            accepted=accepted.view(bool) if accepted.dtype == np.uint8 else accepted,
            seconds=seconds,
            state=replace(state, latent=latent, trajectory=state.trajectory + n_samples * thin),
            fields=phi if pulled_back else None,
            flipped=flipped,
        )


@dataclass(frozen=True)
class HMC(KernelSampler):
    """Hybrid Monte Carlo with many chains side by side.

    Parameters
    ----------
    theory : Phi4, CustomAction or PulledBack
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
    length_spread : float
        In [0, 1): each trajectory takes n_steps (1 - spread) .. n_steps (1 + spread) steps of size
        tau / n_steps, all equally likely and equal for all chains. Keeps modes whose period fits tau from
        standing still (Mackenzie, Phys. Lett. B 226 (1989) 369).
    device : {"cpu", "cuda"}
        Where chains start. With "cuda" they live on the current GPU, and latents and fields are CuPy arrays;
        observables, dh and accepted are NumPy arrays all the same. Chains whose latents are on a GPU stay there.
    """

    theory: Phi4 | PulledBack
    tau: float = 1.0
    n_steps: int = 10
    integrator: str | Integrator = "leapfrog"
    dtype: str = "float64"
    n_threads: int | None = None
    length_spread: float = 0.0
    device: str = field(default="cpu", kw_only=True)

    @property
    def _devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if isinstance(self.theory._physical, Phi4) else ("cpu",)

    def __post_init__(self):
        if not isinstance(self.theory, (Phi4, CustomAction, PulledBack)):
            raise TypeError(f"theory: must be a Phi4, a CustomAction or a pullback, got {type(self.theory).__name__}")
        if not (is_finite(self.tau) and self.tau > 0):
            raise ValueError(f"tau: must be positive, got {self.tau!r}")
        check_count(self.n_steps, "n_steps", 1, 10**6)
        check_threads(self.n_threads)
        real_dtype(self.dtype)
        if not (isinstance(self.length_spread, (int, float)) and 0 <= self.length_spread < 1):
            raise ValueError(f"length_spread: must be at least 0 and below 1, got {self.length_spread!r}")
        if self.device not in self._devices:
            raise ValueError(f"device: must be one of {', '.join(self._devices)}, got {self.device!r}")
        if self.device == "cuda":
            _gpu.require('device "cuda"')
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
    def n_steps_spread(self) -> int:
        """Most steps by which a trajectory is longer or shorter than n_steps."""
        return min(round(self.length_spread * self.n_steps), self.n_steps - 1)

    @property
    def force_evaluations_per_trajectory(self) -> float:
        """The force at a trajectory's start is kept from the last one, but for that of a plain Phi4."""
        return self.n_steps * self.integrator.n_stages + isinstance(self.theory, Phi4)

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
        h["n_steps_spread"] = self.n_steps_spread
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
        latent, _ = self._fields(latent, "latent")
        momenta, _ = self._fields(momenta, "momenta")
        if type(momenta) is not type(latent):
            raise TypeError("momenta: one of latent and momenta lies on a GPU, the other does not")
        if momenta.shape != latent.shape:
            raise ValueError(f"momenta: shape {momenta.shape} differs from the latent's, {latent.shape}")
        latent, momenta = latent.copy(), momenta.astype(latent.dtype, copy=True)
        h = self._settings()
        if backward:
            h["step_size"] *= -1
        self._evolve(h, latent, momenta)
        return latent, momenta

    def _evolve(self, settings, latent, momenta):
        self.theory._physical._evolve(
            *self.theory._program(), settings, latent, momenta, check_threads(self.n_threads)
        )  # fmt: skip

    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        self.theory._physical._hmc(
            *self.theory._program(), settings, latent, phi, dh, accepted, values, check_threads(self.n_threads)
        )  # fmt: skip

    # ---- runs ------------------------------------------------------------------------------
    def tune(
        self,
        acceptance: float = 0.9,
        n_chains: int = 64,
        seed: int = 0,
        n_warmup: int = 100,
        start: State | None = None,
    ) -> HMC:
        """The same HMC with the fewest steps per trajectory that reach an acceptance.

        Measures the acceptance in pilot trajectories from a thermalised state; counts as reached within
        0.01 of the target.

        Parameters
        ----------
        acceptance : float
            In (0, 1).
        n_chains, n_warmup : int
            Pilot chains and their thermalisation in trajectories.
        start : State, optional
            Where to start the thermalisation, instead of `n_chains` new chains of `seed`.

        Returns
        -------
        HMC
        """
        if not 0 < acceptance < 1:
            raise ValueError(f"acceptance: must lie between 0 and 1, got {acceptance}")
        n_pilot = max(8, 3000 // check_count(n_chains, "n_chains", 1))
        n, state = self.n_steps, self.start(n_chains, seed) if start is None else start
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

    def tune_cost(
        self,
        acceptance: float = 0.8,
        n_chains: int = 64,
        seed: int = 0,
        n_warmup: int = 100,
        longest: float = 32.0,
        max_trajectories: int = 1000,
        clock: str = "seconds",
    ) -> HMC:
        """The same HMC with the trajectory length of least cost per independent sample.

        Lengths go up from `tau` in steps of a factor sqrt(2), and down where that does not pay, each with the fewest
        integrator steps that reach `acceptance`, until the cost has risen well above the least one, or three lengths in
        a row were no better. The cost is 2 tau_int of the slowest of `lfq.analysis.SLOW_OBSERVABLES`, from pilot runs,
        times the seconds of a trajectory, which grow linearly with the force evaluations and are measured for two
        lengths, or times its force evaluations. Then a larger and a smaller step are tried.

        Parameters
        ----------
        acceptance : float
            In (0, 1). For a second-order integrator cost is flat around 0.6 to 0.9.
        n_chains, n_warmup : int
            Pilot chains, and their thermalisation in trajectories.
        seed : int
        longest : float
            Longest trajectory tried.
        max_trajectories : int
            Of each pilot run, at most.
        clock : {"seconds", "forces"}
            What a trajectory costs. Seconds depend on the machine and its load; the choice by force evaluations is
            the same everywhere.

        Returns
        -------
        HMC
        """
        return self._least_cost(acceptance, n_chains, seed, n_warmup, longest, max_trajectories, clock)[0]

    def _least_cost(
        self,
        acceptance=0.8,
        n_chains=64,
        seed=0,
        n_warmup=100,
        longest=32.0,
        max_trajectories=1000,
        clock="seconds",
    ) -> tuple[HMC, float]:
        """`tune_cost`, and the cost that was found."""
        if not longest >= self.tau:
            raise ValueError(f"longest: must be at least tau = {self.tau}, got {longest}")
        check_count(max_trajectories, "max_trajectories", 100)
        if clock not in ("seconds", "forces"):
            raise ValueError(f'clock: must be "seconds" or "forces", got {clock!r}')
        tuned = self.tune(acceptance, n_chains, seed, n_warmup)
        state = tuned.advance(tuned.start(n_chains, seed), 1, n_warmup, measure=False).state
        price = self._seconds_model(state) if clock == "seconds" else float
        best, least = None, math.inf
        upwards = range(1 + math.floor(2 * math.log2(longest / self.tau)))
        for numbers in (upwards, range(-1, -11, -1)):
            if best is not None and best.tau != self.tau:
                break
            current, worse = tuned, 0
            for number in numbers:
                tau = self.tau * math.sqrt(2) ** number
                guess = max(1, round(current.n_steps * tau / current.tau))
                current = replace(current, tau=tau, n_steps=guess).tune(acceptance, n_chains, seed, 20, start=state)
                cost, state = current._pilot_cost(state, price, 1.3 * least, max_trajectories)
                if cost < least:
                    best, least, worse = current, cost, 0
                    continue
                worse += 1
                if cost > 1.5 * least or number < 0 or (worse == 3 and least < math.inf):
                    break
            best = best or current
        for factor in (0.8, 1.25):
            other = replace(best, n_steps=max(1, round(best.n_steps * factor)))
            cost, state = other._pilot_cost(state, price, least, max_trajectories)
            if cost < least:
                best, least = other, cost
        return best, least

    def _seconds_model(self, state: State) -> Callable[[float], float]:
        """Seconds of a trajectory of one chain as a function of its force evaluations."""
        few, many = (replace(self, n_steps=n, tau=n * 0.01, length_spread=0.0) for n in (2, 12))
        forces = [s.force_evaluations_per_trajectory for s in (few, many)]
        times = [s.time_trajectory(state, 0.05) for s in (few, many)]
        slope = max(times[1] - times[0], 0.1 * times[0]) / (forces[1] - forces[0])
        return lambda n: max(times[0] + slope * (n - forces[0]), 0.0)


class EmbeddedClusters:
    """The cluster updates after each trajectory of a sampler: `cluster` and `n_updates`."""

    theory: Phi4
    cluster: str | None
    n_updates: int
    n_threads: int | None

    def _check_clusters(self) -> None:
        check_theory(self.theory)
        if self.cluster not in _core.CLUSTERS:
            raise ValueError(f"cluster: must be one of {', '.join(_core.CLUSTERS)}, got {self.cluster!r}")
        check_count(self.n_updates, "n_updates", 0, 2**32 // self.theory.volume)

    def _record(self) -> np.ndarray:
        record = np.zeros(1, dtype=_core.cluster_dtype)
        record["kind"], record["n_updates"] = _core.CLUSTERS[self.cluster], self.n_updates
        return record

    def _forces(self, flipped) -> float:
        wolff = flipped.mean() / self.theory.volume if self.cluster == "wolff" else 0.0
        return self.force_evaluations_per_trajectory + float(wolff)

    def _covering(self, state: State):
        """The same with as many Wolff clusters as flip, on average, as many sites as there are."""
        block = replace(self, n_updates=1).advance(state, 1, 50, measure=False)
        most = min(10**4, 2**32 // self.theory.volume)
        return replace(self, n_updates=min(most, max(1, round(self.theory.volume / block.flipped.mean()))))

    def _fewer(self):
        """The same with half the clusters, a quarter, ..."""
        n = self.n_updates
        while n > 1:
            n //= 2
            yield replace(self, n_updates=n)


@dataclass(frozen=True)
class ClusterHMC(EmbeddedClusters, HMC):
    """HMC and embedded cluster updates in turn (Brower and Tamayo, Phys. Rev. Lett. 62 (1989) 1087).

    A trajectory of HMC moves magnitudes and signs; the cluster updates after it move the signs at fixed
    magnitudes, where they are an Ising model with couplings beta abs(phi_x phi_y). Each part leaves the
    distribution of the theory invariant, so both together do.

    Parameters
    ----------
    cluster : {"swendsen-wang", "wolff"}
        Every cluster flips with probability 1/2, or the cluster of a random site does.
    n_updates : int
        Sweeps, or single clusters, after each trajectory.

    Notes
    -----
    Other parameters are those of `HMC`. ``run.flipped`` tells how many sites the clusters changed. In force
    evaluations a Swendsen-Wang sweep counts as one, since both touch every bond once, and Wolff clusters as the
    fraction of the lattice that they flip; in seconds a sweep is worth some tens of forces.
    """

    cluster: str = "swendsen-wang"
    n_updates: int = 1

    _flips = True
    _devices = ("cpu",)

    def __post_init__(self):
        self._check_clusters()
        super().__post_init__()

    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        _core.cluster_hmc(
            self.theory._record(), settings, self._record(), latent, dh, accepted, flipped,
            self.theory._smear(), values, check_threads(self.n_threads),
        )  # fmt: skip

    @property
    def force_evaluations_per_trajectory(self) -> float:
        """Those of HMC, and one for each Swendsen-Wang sweep; of Wolff clusters only a run knows the size."""
        return super().force_evaluations_per_trajectory + (self.cluster == "swendsen-wang") * self.n_updates

    def tune_cost(self, **keywords) -> ClusterHMC:
        """As `HMC.tune_cost`; Wolff clusters are chosen too.

        As many as flip V sites a trajectory while the length is tuned; then half of them, a quarter, ..., until the
        cost rises.
        """
        if self.cluster != "wolff":
            return super().tune_cost(**keywords)
        n_chains, seed = keywords.get("n_chains", 64), keywords.get("seed", 0)
        hmc = self.tune(keywords.get("acceptance", 0.8), n_chains, seed)
        state = hmc.advance(hmc.start(n_chains, seed), 1, keywords.get("n_warmup", 100), measure=False).state
        best = super(ClusterHMC, hmc._covering(state)).tune_cost(**keywords)
        clock, longest = keywords.get("clock", "seconds"), keywords.get("max_trajectories", 1000)
        return best._cheapest(best._fewer(), state, clock, longest)

    def update(self, phi, seed: int, trajectory: int = 0, first_chain: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The cluster updates of one trajectory alone.

        Parameters
        ----------
        phi : array_like, shape (n_chains, *shape)
        seed, trajectory, first_chain : int
            Of the random numbers.

        Returns
        -------
        phi : ndarray
            A new array.
        flipped : ndarray of int64, shape (n_chains,)
        """
        phi, leading = fields(phi, self.theory.shape, "phi")
        if len(leading) != 1:
            raise ValueError(f"phi: shape {phi.shape} is not (n_chains, *{self.theory.shape})")
        phi, flipped = phi.copy(), np.empty(leading, dtype=np.int64)
        first_chain = check_count(first_chain, "first_chain", 0, 2**32 - len(phi))
        _core.cluster_update(
            self.theory._record(), self._record(), check_seed(seed), first_chain,
            check_count(trajectory, "trajectory", 0, 2**56 - 1), phi, flipped, check_threads(self.n_threads),
        )  # fmt: skip
        return phi, flipped


@dataclass(frozen=True)
class FourierHMC(HMC):
    """HMC with Fourier acceleration (Batrouni et al., Phys. Rev. D 32 (1985) 2736).

    The mode of momentum p moves with the mass (p^2 + m^2) / (4 D + m^2), p^2 = 4 sum sin^2(p_mu / 2): slow modes
    are light ones. A large m is plain HMC. In the free theory m^2 = 2 / beta - 2 D makes all frequencies
    equal; where interactions push back a long mode harder than its propagator tells, as at lam = 0.5, an m near the
    renormalised mass is unstable, and `tune_cost` finds a larger one.

    Parameters
    ----------
    mass : float
        m, positive, in lattice units.

    Notes
    -----
    Other parameters are those of `HMC`; momenta of `evolve` are unit normals, one for each mode of the Hartley
    transform along the axes.
    """

    mass: float = 2.0

    _devices = ("cpu",)

    def __post_init__(self):
        check_theory(self.theory)
        super().__post_init__()
        if not (is_finite(self.mass) and self.mass > 0):
            raise ValueError(f"mass: must be positive, got {self.mass!r}")

    def _evolve(self, settings, latent, momenta):
        _core.fourier_evolve(self.theory._record(), settings, self.mass, latent, momenta, check_threads(self.n_threads))

    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        _core.fourier_hmc(
            self.theory._record(), settings, self.mass, latent, dh, accepted, self.theory._smear(), values,
            check_threads(self.n_threads),
        )  # fmt: skip

    def tune_cost(self, masses: Iterable[float] = (4.0, 2.0, 1.0, 0.5), **keywords) -> FourierHMC:
        """As `HMC.tune_cost`, over masses too: from the largest down, until the cost rises.

        The lighter the modes, the shorter the best trajectory: each mass but the first starts from half the length
        that was best before. Pilot runs have at most 400 trajectories unless said.
        """
        best, least = None, math.inf
        for mass in sorted(masses, reverse=True):
            begin = self if best is None else replace(best, tau=best.tau / 2, n_steps=max(1, best.n_steps // 2))
            tuned, cost = replace(begin, mass=mass)._least_cost(**{"max_trajectories": 400, **keywords})
            if best is None or cost < least:
                best, least = tuned, cost
            elif cost > 1.2 * least:
                break
        if best is None:
            raise ValueError("masses: must hold at least one")
        return best


def _progress_line(done: int, total: int) -> None:
    import sys

    print(f"\r{done}/{total} samples", end="\n" if done == total else "", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """Samples of many chains.

    Attributes
    ----------
    theory : Phi4 or PulledBack
    sampler : Sampler
    observables : dict of str to ndarray, shape (n_samples, n_chains)
        Those of `lfq.observables.OBSERVABLES`, and abs_M, M2, chi = V M^2 and, of a Phi4, the action density S/V.
    dh, accepted : ndarray, shape (n_trajectories, n_chains)
    seconds : float
        Wall time of the samples.
    state : State
        After the last sample.
    phi : ndarray, shape (n_chains, *shape)
        The last fields.
    flipped : ndarray of int64, shape of dh, or None
        See `Block`.
    kept : int
        Of a run too long for memory, every `kept`-th sample is here, with its trajectory's dh and accept decision.
    """

    theory: Phi4 | PulledBack
    sampler: Sampler
    observables: dict[str, np.ndarray]
    dh: np.ndarray
    accepted: np.ndarray
    seconds: float
    state: State
    phi: np.ndarray
    flipped: np.ndarray | None = None
    kept: int = 1

    @classmethod
    def from_blocks(cls, theory: Phi4 | PulledBack, sampler: Sampler, blocks: Iterable[Block]) -> Run:
        """Join consecutive blocks."""
        blocks = list(blocks)
        if not blocks:
            raise ValueError("blocks: a run needs at least one")
        found = {name: np.concatenate([b.observables[name] for b in blocks]) for name in OBSERVABLES}
        physical = theory._physical
        found["abs_M"] = np.abs(found["M"])
        found["M2"] = found["M"] ** 2
        found["chi"] = physical.volume * found["M2"]
        density = physical._density(found)
        if density is not None:
            found["action_density"] = density
        return cls(
            theory, sampler, found,
            dh=np.concatenate([b.dh for b in blocks]),
            accepted=np.concatenate([b.accepted for b in blocks]),
            seconds=sum(b.seconds for b in blocks),
            state=blocks[-1].state,
            phi=blocks[-1].phi,
            flipped=None if blocks[0].flipped is None else np.concatenate([b.flipped for b in blocks]),
        )  # fmt: skip

    @cached_property
    def seconds_per_trajectory(self) -> float:
        """Of one chain, all side by side, measurements not included: `Sampler.time_trajectory`, when first asked."""
        return self.sampler.time_trajectory(self.state)

    @property
    def n_chains(self) -> int:
        return self.dh.shape[1]

    @property
    def n_samples(self) -> int:
        return len(self.observables["M"])

    @property
    def thin(self) -> int:
        """Trajectories from one sample to the next."""
        return len(self.dh) // self.n_samples * self.kept

    @property
    def acceptance(self) -> float:
        return float(self.accepted.mean())

    @property
    def force_evaluations_per_trajectory(self) -> float:
        return self.sampler._forces(self.flipped)

    def exp_minus_dh(self) -> tuple[float, float]:
        """Mean of exp(-dH) over all trajectories and its error; 1 for a correct algorithm in equilibrium.

        The error is that of the chains' means (of consecutive quarters where there are few chains).
        """
        weights = np.exp(-self.dh)
        parts = np.concatenate([part.mean(axis=0) for part in np.array_split(weights, min(4, len(weights)))])
        error = parts.std(ddof=1) / math.sqrt(parts.size) if parts.size > 1 else math.nan
        return float(weights.mean()), float(error)

    def to_xarray(self):
        """An xarray Dataset over chain, draw and trajectory: see `lfq.interchange.to_xarray`."""
        from .interchange import to_xarray

        return to_xarray(self)

    def to_arviz(self):
        """The groups posterior and sample_stats for ArviZ: see `lfq.interchange.to_arviz`."""
        from .interchange import to_arviz

        return to_arviz(self)

    def to_pyerrors(self, ensemble: str = "lfq") -> dict:
        """A pyerrors Obs for each observable, a replica for each chain: see `lfq.interchange.to_pyerrors`."""
        from .interchange import to_pyerrors

        return to_pyerrors(self, ensemble)

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
