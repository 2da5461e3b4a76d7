"""Priors: where the latents of a flow come from while it is trained (arXiv:2310.03381 sec. 3).

A prior is a *base* density that does not change, of independent coarse lattices and unit Gaussians, and
a *map* that puts them on the target's lattice and may have weights. Samples z live on the target's
lattice; log_prob(z) is known up to the normalisation of the lattice theories.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from . import _core
from ._kernels import check_count, check_finite, check_seed, check_shape, check_threads, fields, real_dtype
from .actions import Phi4, check_theory
from .flows import Flow, InterleaveMap, UpsampleMap
from .hmc import HMC, State

__all__ = ["Base", "Gaussian", "Interleave", "Lattice", "Prior", "Upsample", "check_prior"]


def _apart(seed: int) -> int:
    """Another seed, for chains beside those of `seed` itself."""
    return seed ^ (2**64 - 1)


class Base:
    """Latents made of `n_copies` independent fields of a lattice theory, then `n_noise` unit normals.

    Coarse fields come from HMC chains run side by side, one per field, `n_between` trajectories apart,
    so that the fields of one batch are independent.

    Parameters
    ----------
    theory : Phi4 or None
    n_copies, n_noise : int
    n_between, n_warmup : int
        Trajectories between batches, and before the first.
    tau, n_steps
        Of HMC with leapfrog.
    """

    def __init__(self, theory, n_copies, n_noise, n_between=20, tau=1.0, n_steps=10, n_warmup=200):
        self.theory = theory
        self.n_copies = n_copies if theory is not None else 0
        self.n_noise = n_noise
        self.n_between = check_count(n_between, "n_between", 1, 10**6)
        self.n_warmup = check_count(n_warmup, "n_warmup", 0, 10**9)
        self.tau, self.n_steps = tau, n_steps
        if theory is not None:
            self.hmc()

    def hmc(self, dtype="float64", n_threads=None, device="cpu") -> HMC:
        return HMC(
            self.theory, tau=self.tau, n_steps=self.n_steps, dtype=str(np.dtype(dtype)), n_threads=n_threads,
            device=device,
        )  # fmt: skip

    @property
    def volume(self) -> int:
        coarse = self.theory.volume if self.theory is not None else 0
        return self.n_copies * coarse + self.n_noise

    def start(self, n: int, seed: int, dtype, n_threads=None, first: int = 0, device="cpu") -> State | None:
        """Thermalised chains for batches of `n` latents, of which the first has the number `first`."""
        if self.theory is None:
            return None
        hmc = self.hmc(dtype, n_threads, device)
        state = hmc.start(n * self.n_copies, seed, first_chain=first * self.n_copies)
        for block in hmc.blocks(state, self.n_warmup):
            state = block.state
        return state

    def noise(self, n: int, seed: int, step: int, dtype, n_threads=None, purpose="latent", first=0) -> np.ndarray:
        out = np.empty((n, self.n_noise), dtype=dtype)
        _core.normal(seed, _core.PURPOSES[purpose], step, first, n, out, check_threads(n_threads))
        return out

    def fresh(self, n: int, seed: int, dtype, n_threads=None, first: int = 0, purpose="proposal") -> np.ndarray:
        """As `sample`, with random numbers apart from those that flows are trained on with the same seed."""
        noise = self.noise(n, seed, 0, dtype, n_threads, purpose, first)
        state = self.start(n, _apart(seed), dtype, n_threads, first)
        return noise if state is None else np.concatenate([state.latent.reshape(n, -1), noise], axis=1)

    def moved(self, latent: np.ndarray, seed: int, number: int, n_threads=None, first: int = 0) -> np.ndarray:
        """The same coarse fields `n_between` trajectories on, and new noise: the `number`-th such step.

        A move from u to v is as likely as one from v to u if both have the base's density: HMC is reversible.
        """
        n, split = len(latent), latent.shape[1] - self.n_noise
        noise = self.noise(n, seed, number, latent.dtype, n_threads, "proposal", first)
        if self.theory is None:
            return noise
        coarse = np.ascontiguousarray(latent[:, :split]).reshape(-1, *self.theory.shape)
        start = State(coarse, self.n_warmup + number * self.n_between, _apart(seed), first * self.n_copies)
        block = self.hmc(latent.dtype, n_threads).advance(start, 1, self.n_between, measure=False)
        return np.concatenate([block.phi.reshape(n, -1), noise], axis=1)

    def forces(self, n_trajectories: int) -> float:
        """Force evaluations of so many trajectories of the coarse chains, in units of a lattice of `volume` sites."""
        if self.theory is None:
            return 0.0
        return n_trajectories * (self.n_steps + 1) * self.n_copies * self.theory.volume / self.volume

    def potential(self, latent: np.ndarray, n_threads=None) -> tuple[np.ndarray, np.ndarray]:
        """-log_prob of latents (n, volume) without the Gaussians' normalisation, and its negative gradient."""
        split, force = latent.shape[1] - self.n_noise, -latent
        energy = 0.5 * np.einsum("ij,ij->i", latent[:, split:], latent[:, split:], dtype=np.float64)
        if self.theory is not None:
            coarse = np.ascontiguousarray(latent[:, :split]).reshape(-1, self.n_copies, *self.theory.shape)
            energy += self.theory.action(coarse, n_threads).sum(axis=1)
            force[:, :split] = self.theory.force(coarse, n_threads).reshape(len(latent), split)
        return energy, force

    def sample(self, n: int, seed: int, dtype, n_threads=None) -> np.ndarray:
        """n independent latents, shape (n, volume)."""
        noise = self.noise(n, seed, 0, dtype, n_threads)
        if self.theory is None:
            return noise
        state = self.start(n, seed, dtype, n_threads)
        return np.concatenate([state.latent.reshape(n, -1), noise], axis=1)

    def log_prob(self, latent: np.ndarray, n_threads=None) -> np.ndarray:
        """Log-density of latents (n, volume), the lattice theories' up to a constant."""
        split = latent.shape[1] - self.n_noise
        noise = latent[:, split:].astype(np.float64)
        log_prob = -0.5 * np.einsum("ij,ij->i", noise, noise) - 0.5 * math.log(2 * math.pi) * self.n_noise
        if self.theory is not None:
            coarse = latent[:, :split].reshape(-1, self.n_copies, *self.theory.shape)
            log_prob -= self.theory.action(coarse, n_threads).sum(axis=1)
        return log_prob


class Prior(ABC):
    """What all priors share.

    Attributes
    ----------
    shape : tuple of int
        Lattice of the samples.
    base : Base
    """

    shape: tuple[int, ...]
    base: Base

    def describe(self) -> dict:
        """All that decides what its samples become, as plain data."""
        found = {"prior": type(self).__name__}
        if self.base.theory is not None:
            found |= {f"prior {key}": value for key, value in self.base.theory.describe().items()}
            chains = ("n_between", "tau", "n_steps", "n_warmup")
            found |= {f"prior chains {key}": getattr(self.base, key) for key in chains}
        return found | ({} if self.map is None else {"prior map": self.map.describe()})

    @property
    @abstractmethod
    def map(self) -> Flow | None:
        """From the base's latents to the lattice of the samples; None for the identity."""

    def from_base(self, latent: np.ndarray, n_threads: int | None = None) -> np.ndarray:
        """Samples (n, *shape) from the base's latents (n, volume)."""
        z = latent.reshape(-1, *self.shape)
        return z if self.map is None else self.map.forward(z, n_threads)[0]

    def to_base(self, z: np.ndarray, n_threads: int | None = None) -> np.ndarray:
        """The inverse of `from_base`."""
        return (z if self.map is None else self.map.inverse(z, n_threads)[0]).reshape(len(z), -1)

    def with_map_weights(self, weights: np.ndarray) -> Prior:
        """This prior with other weights of its map: itself where the map has none."""
        return self

    def sample(self, n: int, seed: int, dtype="float64", n_threads: int | None = None) -> np.ndarray:
        """Draw independent samples.

        Parameters
        ----------
        n : int
        seed : int
        dtype : {"float64", "float32"}

        Returns
        -------
        ndarray, shape (n, *shape)
        """
        n, seed = check_count(n, "n", 1), check_seed(seed)
        return self.from_base(self.base.sample(n, seed, real_dtype(dtype), n_threads), n_threads)

    def log_prob(self, z, n_threads: int | None = None) -> np.ndarray:
        """log r(z), shape (...), up to the log-partition functions of the coarse lattices.

        Parameters
        ----------
        z : array_like, shape (..., *shape)
        """
        z, leading = fields(z, self.shape, "z")
        check_finite(z, "z")
        log_det = np.zeros(leading)
        if self.map is not None:
            z, log_det = self.map.inverse(z, n_threads)
        return self.base.log_prob(z.reshape(-1, math.prod(self.shape)), n_threads).reshape(leading) + log_det


def check_prior(prior, shape: tuple[int, ...]) -> Prior:
    """The prior, or an error where it is none, or of another lattice."""
    if not isinstance(prior, Prior):
        raise TypeError(f"prior: must be a Prior, got {type(prior).__name__}")
    if prior.shape != shape:
        raise ValueError(f"prior: its lattice is {prior.shape}, the theory's is {shape}")
    return prior


class Gaussian(Prior):
    """Unit normals, normalised.

    Parameters
    ----------
    shape : tuple of int
    """

    map = None

    def __init__(self, shape):
        self.shape = check_shape(shape)
        self.base = Base(None, 0, math.prod(self.shape))


class Lattice(Prior):
    """Configurations of a theory on the target's own lattice, at a coupling where HMC is cheaper.

    Parameters
    ----------
    theory : Phi4
    **chain
        n_between, tau, n_steps, n_warmup of `Base`.
    """

    map = None

    def __init__(self, theory: Phi4, **chain):
        self.theory = check_theory(theory, "theory")
        self.shape = theory.shape
        self.base = Base(theory, 1, 0, **chain)


class Interleave(Prior):
    """2^D independent configurations of a coarse lattice, one on each sublattice of the fine one.

    phi(2 i + a, 2 j + b) = z_ab(i, j): the degrees of freedom match and the Jacobian is one.

    Parameters
    ----------
    coarse : Phi4
        The theory of half the extents.
    **chain
        n_between, tau, n_steps, n_warmup of `Base`.
    """

    def __init__(self, coarse: Phi4, **chain):
        self.coarse = check_theory(coarse, "coarse")
        self.shape = tuple(2 * extent for extent in coarse.shape)
        self.base = Base(coarse, 2**coarse.ndim, 0, **chain)
        self._map = InterleaveMap(coarse.ndim)

    @property
    def map(self) -> Flow:
        return self._map


class Upsample(Prior):
    """One coarse configuration on the even sites, Gaussians around its interpolation elsewhere.

    Parameters
    ----------
    coarse : Phi4
        The theory of half the extents.
    width, scale, interpolation
        See `UpsampleMap`; all are trained along with the flow.
    **chain
        n_between, tau, n_steps, n_warmup of `Base`.
    """

    def __init__(self, coarse: Phi4, width=0.1, scale=1.0, interpolation=1.0, **chain):
        self.coarse = check_theory(coarse, "coarse")
        self.shape = tuple(2 * extent for extent in coarse.shape)
        self._chain = chain
        self.base = Base(coarse, 1, (2**coarse.ndim - 1) * coarse.volume, **chain)
        self._map = UpsampleMap(scale, width, interpolation, coarse.ndim)

    @property
    def map(self) -> Flow:
        return self._map

    @property
    def width(self) -> np.ndarray:
        """Noise widths at sites with 1, ..., D odd coordinates."""
        return self._map.width

    @property
    def scale(self) -> float:
        """Factor of the coarse field."""
        return self._map.scale

    @property
    def interpolation(self) -> np.ndarray:
        """Factors of the interpolation at sites with 1, ..., D odd coordinates."""
        return self._map.interpolation

    def with_map_weights(self, weights: np.ndarray) -> Upsample:
        twin = Upsample(self.coarse, **self._chain)
        twin._map.weights = weights
        return twin
