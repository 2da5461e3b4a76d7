"""Errors and autocorrelation times of Markov chains, by the Gamma method of hep-lat/0306017.

Convention throughout: tau_int = 1/2 + sum_{t >= 1} rho(t), in units of samples, so that N samples are
worth N / (2 tau_int) independent ones. (emcee and ArviZ report 2 tau_int under the same name.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._optional import load
from .observables import second_moment_length

__all__ = [
    "MIN_SAMPLES",
    "SLOW_OBSERVABLES",
    "Cost",
    "Estimate",
    "autocorrelation",
    "cost_per_independent_sample",
    "derived",
    "estimate",
    "fit_exponent",
    "integrated_time",
    "summarize",
]

MIN_SAMPLES = 8
"""Fewest samples per chain from which an autocorrelation time is estimated."""

SLOW_OBSERVABLES = ("M2", "phi2", "phi2_smeared")
"""Observables among which the slowest sets the cost of an independent sample."""


@dataclass(frozen=True)
class Estimate:
    """An expectation value from Markov chains.

    Attributes
    ----------
    value, error : float
        Mean and its standard error, autocorrelations included.
    tau_int, tau_int_error : float
        Integrated autocorrelation time in samples, 1/2 for independent ones. Not below 1/2: for
        anticorrelated samples the error is an upper bound.
    n_samples : int
        Samples of all chains together.
    n_effective : float
        n_samples / (2 tau_int).
    """

    value: float
    error: float
    tau_int: float
    tau_int_error: float
    n_samples: int

    @property
    def n_effective(self) -> float:
        return self.n_samples / (2 * self.tau_int)

    def __str__(self) -> str:
        return with_error(self.value, self.error)


@dataclass(frozen=True)
class Cost:
    """What an independent sample costs: 2 tau_int of the slowest observable times one trajectory.

    Attributes
    ----------
    observable : str
        The slowest of `SLOW_OBSERVABLES`.
    seconds : float
        Wall seconds with all chains running side by side.
    force_evaluations : float
    relative_error : float
        That of tau_int.
    """

    observable: str
    seconds: float
    force_evaluations: float
    relative_error: float


def with_error(value: float, error: float, digits: int = 2) -> str:
    """Value with its error in brackets: 0.7134(12). `digits` digits of the error are kept."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return "undefined"
    if error <= 0:
        return f"{value:.6g}"
    decimals = digits - 1 - math.floor(math.log10(error))
    if round(error * 10**decimals) >= 10**digits:
        decimals -= 1
    if decimals <= 0:
        return f"{round(value, decimals):.0f}({round(error, decimals):.0f})"
    shown = f"{error:.{decimals}f}" if error >= 1 else str(round(error * 10**decimals))
    return f"{value:.{decimals}f}({shown})"


def _series(samples, what: str) -> np.ndarray:
    """Samples as float64 (n_samples, n_chains), checked."""
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise ValueError(f"{what}: expected samples of shape (n_samples, n_chains), got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(f"{what}: the samples contain NaN or infinity")
    return samples


def _observable(samples: np.ndarray):
    """pyerrors' Obs of chains as replicas of one ensemble."""
    pyerrors = load("pyerrors", "error analysis")
    n_samples, n_chains = samples.shape
    if n_samples < MIN_SAMPLES:
        raise ValueError(
            f"error analysis needs at least {MIN_SAMPLES} samples per chain, got {n_samples}: "
            "autocorrelations cannot be seen in fewer"
        )
    constant = np.ptp(samples) == 0
    mean = samples[0, 0] if constant else samples.mean()
    # Fluctuations about the mean of all chains: about each chain's own, which is what pyerrors does
    # by default, loses 2 tau_int / n_samples of the autocorrelation at every lag.
    fluctuations = np.ascontiguousarray((samples - mean).T)
    names = [f"run|{chain:06d}" for chain in range(n_chains)]
    obs = pyerrors.Obs(list(fluctuations), names, means=[mean] * n_chains)
    obs._value = mean
    return obs


def _gamma_method(obs, n_samples: int) -> Estimate:
    obs.gamma_method()
    (ensemble,) = obs.e_names
    return Estimate(
        value=float(obs.value),
        error=float(obs.dvalue),
        tau_int=float(obs.e_tauint[ensemble]),
        tau_int_error=float(obs.e_dtauint[ensemble]),
        n_samples=n_samples,
    )


def estimate(samples) -> Estimate:
    """Mean, error and autocorrelation time of a series, with the automatic window of the Gamma method.

    Parameters
    ----------
    samples : array_like, shape (n_samples, n_chains) or (n_samples,)
        Chains are replicas of one ensemble: one autocorrelation function is estimated from all.

    Returns
    -------
    Estimate
        A constant series has error 0 and tau_int 1/2.

    Raises
    ------
    ValueError
        Fewer than `MIN_SAMPLES` samples per chain, another number of axes, NaN or infinity.
    ImportError
        pyerrors is not installed.

    Notes
    -----
    U. Wolff, hep-lat/0306017, as implemented by pyerrors (arXiv:2209.14371).
    """
    samples = _series(samples, "estimate")
    return _gamma_method(_observable(samples), samples.size)


def derived(function: Callable, *samples) -> Estimate:
    """A function of expectation values, its error propagated linearly through all correlations.

    Parameters
    ----------
    function : callable
        Of as many numbers as there are series: arithmetic and powers.
    *samples : array_like, shape (n_samples, n_chains)
        Series measured on the same chains.

    Returns
    -------
    Estimate
        All NaN where the function is not defined at the means.

    Raises
    ------
    ValueError
        As `estimate`, or series of unequal shapes.
    """
    series = [_series(s, "derived") for s in samples]
    if len({s.shape for s in series}) != 1:
        raise ValueError(f"derived: series of unequal shapes {sorted({s.shape for s in series})}")
    with np.errstate(all="ignore"):
        value = function(*(s.mean() for s in series))
    if isinstance(value, complex) or not np.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, math.nan, series[0].size)
    observables = [_observable(s) for s in series]
    pyerrors = load("pyerrors", "error analysis")
    obs = pyerrors.derived_observable(lambda means: function(*means), observables)
    return _gamma_method(obs, series[0].size)


def autocorrelation(samples, max_lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised autocorrelation function rho(t), averaged over chains.

    Parameters
    ----------
    samples : array_like, shape (n_samples, n_chains) or (n_samples,)
    max_lag : int
        Largest lag, below n_samples.

    Returns
    -------
    rho : ndarray, shape (max_lag + 1,)
        rho[0] = 1. Fluctuations are about the mean of all chains. All zero after rho[0] for a
        constant series.
    error : ndarray, shape (max_lag + 1,)
        Standard error from the scatter between chains, zero for a single chain.
    """
    samples = _series(samples, "autocorrelation")
    n_samples, n_chains = samples.shape
    if not 0 <= max_lag < n_samples:
        raise ValueError(f"autocorrelation: max_lag must be in 0 .. {n_samples - 1}, got {max_lag}")
    if np.ptp(samples) == 0:
        return np.eye(1, max_lag + 1)[0], np.zeros(max_lag + 1)
    modes = np.fft.rfft(samples - samples.mean(), n=n_samples + max_lag, axis=0)
    gamma = np.fft.irfft(np.abs(modes) ** 2, n=n_samples + max_lag, axis=0)[: max_lag + 1]
    gamma /= np.arange(n_samples, n_samples - max_lag - 1, -1)[:, None]
    mean = gamma.mean(axis=1)
    rho = mean / mean[0]
    if n_chains == 1:
        return rho, np.zeros_like(rho)
    scatter = (gamma - rho[:, None] * gamma[0]) / mean[0]
    return rho, scatter.std(axis=1, ddof=1) / math.sqrt(n_chains)


def integrated_time(samples) -> float:
    """tau_int with the automatic window of hep-lat/0306017 sec. 3.3 (S = 1.5), in NumPy alone: for tuning.

    Parameters
    ----------
    samples : array_like, shape (n_samples, n_chains) or (n_samples,)

    Returns
    -------
    float
        Not below 1/2. A sum that finds no window, in a run too short, is the one over all lags.
    """
    samples = _series(samples, "integrated_time")
    n_samples = len(samples)
    rho, _ = autocorrelation(samples, n_samples // 2)
    tau = 0.5 + np.cumsum(rho[1:])
    window = np.arange(1, len(rho))
    with np.errstate(divide="ignore", invalid="ignore"):
        decay = np.where(tau > 0.5, 1.5 / np.log((2 * tau + 1) / (2 * tau - 1)), 1e-9)
        falling = np.exp(-window / decay) - decay / np.sqrt(window * n_samples) < 0
    if not falling.any():
        return float(max(tau.max(initial=0.5), 0.5))
    return float(max(tau[np.argmax(falling)], 0.5))


def fit_exponent(extents, costs, relative_errors) -> tuple[float, float]:
    """z of cost = c L^z, by least squares in the logarithms.

    Parameters
    ----------
    extents, costs, relative_errors : array_like, shape (n,)
        At least two.

    Returns
    -------
    z, error : float
        The error grows by sqrt(chi^2 / (n - 2)) where that is above one, as when the costs follow no power law.
    """
    x, y = np.log(np.asarray(extents, float)), np.log(np.asarray(costs, float))
    w = 1 / np.asarray(relative_errors, float) ** 2
    if not (x.ndim == 1 and x.shape == y.shape == w.shape and x.size >= 2 and np.ptp(x) > 0):
        raise ValueError("fit_exponent: needs at least two extents, and a cost and an error for each")
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    z, variance = (w * x * y).sum() / (w * x * x).sum(), 1 / (w * x * x).sum()
    chi2 = (w * (y - z * x) ** 2).sum() / max(x.size - 2, 1)
    return float(z), float(math.sqrt(variance * max(chi2 if x.size > 2 else 1.0, 1.0)))


def summarize(run) -> dict[str, Estimate]:
    """Every observable of method section 7 that a run measures, with errors.

    Parameters
    ----------
    run : lfq.Run

    Returns
    -------
    dict of str to Estimate
        ``M``, ``abs_M``, ``M2``, ``phi2``, ``phi2_smeared``, ``phi4``, ``nn``, ``action_density``
        (S / V without a constant term, of a Phi4 only), ``chi`` = V <M^2>, ``chi_connected`` = V (<M^2> - <|M|>^2),
        ``binder`` = 1 - <M^4> / (3 <M^2>^2), ``U4`` = <M^4> / <M^2>^2, ``G_pmin``, and, on a lattice of
        equal extents, the second-moment correlation length ``xi``.
    """
    series = run.observables
    volume = run.theory.volume
    m, m2, abs_m = series["M"], series["M2"], series["abs_M"]
    names = ("M", "abs_M", "M2", "phi2", "phi2_smeared", "phi4", "nn", "action_density", "chi", "G_pmin")
    table = {name: estimate(series[name]) for name in names if name in series}
    table["chi_connected"] = derived(lambda second, first: volume * (second - first**2), m2, abs_m)
    table["binder"] = derived(lambda fourth, second: 1 - fourth / (3 * second**2), m**4, m2)
    table["U4"] = derived(lambda fourth, second: fourth / second**2, m**4, m2)
    extents = set(run.theory.shape)
    if len(extents) == 1:
        (extent,) = extents
        propagators = series["chi"], series["G_pmin"]
        table["xi"] = derived(lambda zero, pmin: second_moment_length(zero, pmin, extent), *propagators)
    return table


def cost_per_independent_sample(run, table: dict[str, Estimate]) -> Cost:
    """Cost of an independent sample of the slowest observable: 2 tau_int times one trajectory.

    Parameters
    ----------
    run : lfq.Run
    table : dict of str to Estimate
        From `summarize`.
    """
    slowest = max(SLOW_OBSERVABLES, key=lambda name: table[name].tau_int)
    tau = table[slowest]
    trajectories = 2 * tau.tau_int * run.thin
    return Cost(
        observable=slowest,
        seconds=trajectories * run.seconds_per_trajectory,
        force_evaluations=trajectories * run.force_evaluations_per_trajectory,
        relative_error=tau.tau_int_error / tau.tau_int,
    )
