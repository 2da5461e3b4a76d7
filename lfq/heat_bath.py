"""The local heat bath, alone or with embedded clusters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import _core
from ._kernels import check_count, check_threads, real_dtype
from .actions import Phi4, check_theory
from .hmc import EmbeddedClusters, KernelSampler

__all__ = ["HeatBath"]


@dataclass(frozen=True)
class HeatBath(EmbeddedClusters, KernelSampler):
    """Checkerboard sweeps that draw each site from its density given its neighbours, and cluster updates.

    The density exp(-(1 - 2 lam) x^2 - lam x^4 + beta x h), h the sum of the neighbours, is a Gaussian times
    exp(-lam (x^2 - c)^2), for any c, and so sampled by rejection. A sweep tries twice at each site; where both fail
    the site stays, and since whether they fail depends on h alone, the density is left as it is. At lam = 0.5 more
    than 80% of the sites change in a sweep; towards the Ising limit a fraction that falls as lam^(-1/2).

    Parameters
    ----------
    theory : Phi4
    n_sweeps : int
        Of a trajectory.
    cluster : {"swendsen-wang", "wolff"}, optional
        Cluster updates after the sweeps (see `ClusterHMC`); none by default.
    n_updates : int
        Sweeps of clusters, or single ones, after each trajectory.
    dtype : {"float64", "float32"}
    n_threads : int, optional

    Notes
    -----
    Nothing is rejected as a whole: dh is zero, and ``run.acceptance`` is the fraction of sites that a sweep changes. In
    force evaluations a sweep counts as one; clusters count as in `ClusterHMC`. A site draws from its own Philox
    block, so a chain does not depend on batch, threads or the order of sites within a parity.
    """

    theory: Phi4
    n_sweeps: int = 1
    cluster: str | None = None
    n_updates: int = 1
    dtype: str = "float64"
    n_threads: int | None = None

    _accepted = np.float64

    def __post_init__(self):
        check_theory(self.theory)
        check_count(self.n_sweeps, "n_sweeps", 1, 2**32 // self.theory.volume)
        if self.cluster is not None:
            self._check_clusters()
        real_dtype(self.dtype)
        check_threads(self.n_threads)

    @property
    def _flips(self) -> bool:
        return self.cluster is not None

    @property
    def force_evaluations_per_trajectory(self) -> float:
        """One for each sweep, of either kind; of Wolff clusters only a run knows the size."""
        return self.n_sweeps + (self.cluster == "swendsen-wang") * self.n_updates

    def _settings(self, n_samples=0, thin=1, seed=0, first_chain=0, trajectory=0) -> np.ndarray:
        h = np.zeros(1, dtype=_core.heat_bath_dtype)
        h["n_sweeps"], h["thin"], h["n_samples"] = self.n_sweeps, thin, n_samples
        h["seed"], h["first_chain"], h["first_trajectory"] = seed, first_chain, trajectory
        return h

    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        changed = np.empty(dh.shape, dtype=np.int64)
        _core.heat_bath(
            self.theory._record(), settings, None if self.cluster is None else self._record(), latent, changed,
            np.empty_like(changed) if flipped is None else flipped, self.theory._smear(), values,
            check_threads(self.n_threads),
        )  # fmt: skip
        dh[:] = 0.0
        np.divide(changed, self.n_sweeps * self.theory.volume, out=accepted)

    def tune_cost(
        self, acceptance=0.8, n_chains=64, seed=0, n_warmup=100, max_trajectories=1000, clock="seconds"
    ) -> HeatBath:
        """The same heat bath with the sweeps between cluster updates, and Wolff clusters, of least cost.

        Sweeps are doubled from one on until the cost rises. Of Wolff clusters, as many as flip V sites a trajectory
        are tried first, then half of them, a quarter, ... Without clusters there is nothing to choose.

        Parameters
        ----------
        acceptance : float
            Not used.
        n_chains, seed, n_warmup, max_trajectories, clock
            See `HMC.tune_cost`.
        """
        if self.cluster is None:
            return self
        best = replace(self, n_sweeps=1)
        state = best.advance(best.start(n_chains, seed), 1, n_warmup, measure=False).state
        if self.cluster == "wolff":
            best = best._covering(state)
        more = (replace(best, n_sweeps=n) for n in (2, 4, 8, 16))
        best = best._cheapest(more, state, clock, max_trajectories)
        return best._cheapest(best._fewer(), state, clock, max_trajectories) if self.cluster == "wolff" else best
