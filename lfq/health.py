"""Signs that a run is not to be trusted, each with what to change."""

from __future__ import annotations

import math

import numpy as np

from . import _core
from .hmc import HMC, Run, State

__all__ = ["RunWarning", "concerns", "irreversibility"]

MAX_SIGMA = 5.0
"""Deviation of <exp(-dH)> from one, in standard errors, that is still believed."""

FEWEST_TRAJECTORIES = 1000
"""Of all chains together, before a run is judged."""

N_REVERSED = 4
"""Chains that are integrated there and back."""


class RunWarning(UserWarning):
    """A run finished, but something in it should be changed."""


def irreversibility(hmc: HMC, state: State) -> float:
    """Distance from where they began at which trajectories end that go forward and back.

    Parameters
    ----------
    hmc : HMC
    state : State
        The first chains are tried, with momenta that no chain uses.

    Returns
    -------
    float
        The largest difference in any entry, in units of the root mean square of the latent. Infinite where
        the integrator diverges.
    """
    latent = np.asarray(state.latent[:N_REVERSED], dtype=hmc.dtype)
    momenta = np.empty_like(latent)
    _core.normal(state.seed, _core.PURPOSES["user"], state.trajectory, state.first_chain, len(latent), momenta, 1)
    try:
        end, _ = hmc.evolve(*hmc.evolve(latent, momenta), backward=True)
    except _core.NotFiniteError:
        return math.inf
    return float(np.abs(end - latent).max() / max(np.sqrt(np.mean(latent**2)), np.finfo(latent.dtype).tiny))


def concerns(run: Run) -> list[str]:
    """What is wrong with a run, one sentence each; nothing of runs below `FEWEST_TRAJECTORIES`.

    Chains that never moved, or never stayed; <exp(-dH)> away from one by more than `MAX_SIGMA`; a trajectory
    that goes forward and back and loses more than half of its digits.
    """
    found = []
    if run.dh.size < FEWEST_TRAJECTORIES:
        return found
    stuck = np.flatnonzero(~run.accepted.any(axis=0)) if len(run.accepted) >= 100 else []
    if len(stuck):
        which = ", ".join(map(str, stuck[:5])) + (", ..." if len(stuck) > 5 else "")
        found.append(
            f"acceptance 0: {len(stuck)} of {run.n_chains} chains never moved ({which}): more n_steps, or a start "
            "nearer to equilibrium"
        )
    if not isinstance(run.sampler, HMC):
        return found
    if run.accepted.all():
        found.append("acceptance 1: every trajectory was accepted: fewer n_steps cost less")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, error = run.exp_minus_dh()
    if error > 0 and not abs(mean - 1) <= MAX_SIGMA * error:
        found.append(
            f"<exp(-dH)> = {mean:.4g} +- {error:.2g} is {abs(mean - 1) / error:.1f} sigma from 1: more n_warmup; if "
            "that does not help, the samples are not of this theory"
        )
    limit = math.sqrt(np.finfo(run.sampler.dtype).eps)
    distance = irreversibility(run.sampler, run.state)
    if distance > limit:
        found.append(
            f"a trajectory forward and back ends {distance:.2g} from its start, above {limit:.2g}: smaller tau or more "
            "n_steps" + (", or float64" if np.dtype(run.sampler.dtype) == np.float32 else "")
        )
    return found
