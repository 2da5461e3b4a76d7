"""Observables of a scalar field on a periodic lattice, in NumPy.

The six in `OBSERVABLES` are measured by the kernels while a chain runs; the functions here are for
fields already at hand.
"""

from __future__ import annotations

import numpy as np

__all__ = ["OBSERVABLES", "heat_kernel", "second_moment_length", "smear", "two_point", "virial"]

OBSERVABLES = ("M", "phi2", "phi4", "nn", "phi2_smeared", "G_pmin")
"""What the kernels measure, in the order of `lfq.h`.

``M`` is the mean of phi, ``phi2`` and ``phi4`` those of its powers, ``nn`` that of phi_x phi_{x+mu} over
sites and directions, ``phi2_smeared`` that of the squared field after the heat-kernel flow to t = 1, and
``G_pmin`` is |sum_x exp(i p x) phi_x|^2 / V at the smallest momentum, averaged over the axes.
"""


def _lattice_axes(phi: np.ndarray, ndim: int) -> tuple[np.ndarray, tuple[int, ...]]:
    phi = np.asarray(phi)
    if not 1 <= ndim <= phi.ndim:
        raise ValueError(f"a field with {phi.ndim} axes has no {ndim}-dimensional lattice in its last axes")
    return phi, tuple(range(phi.ndim - ndim, phi.ndim))


def heat_kernel(extent: int, t: float = 1.0) -> np.ndarray:
    """Circulant kernel of the heat flow on a ring.

    Convolving with it along an axis multiplies the mode of momentum p by exp(-4 sin^2(p / 2) t);
    doing so along every axis solves d phi / dt = lattice Laplacian of phi.

    Parameters
    ----------
    extent : int
        Sites of the ring.
    t : float
        Flow time in lattice units, not negative.

    Returns
    -------
    ndarray of float64, shape (extent,)
        Sums to one, and ``kernel[j] == kernel[-j]``.

    Raises
    ------
    ValueError
        `extent` < 1, or `t` negative or not finite.
    """
    if extent < 1:
        raise ValueError(f"heat_kernel: extent must be at least 1, got {extent}")
    if not (np.isfinite(t) and t >= 0):
        raise ValueError(f"heat_kernel: t must be finite and not negative, got {t}")
    momentum = 2 * np.pi * np.arange(extent // 2 + 1) / extent
    kernel = np.fft.irfft(np.exp(-4 * np.sin(momentum / 2) ** 2 * t), n=extent)
    return 0.5 * (kernel + np.roll(kernel[::-1], 1))


def smear(phi: np.ndarray, t: float = 1.0, ndim: int = 2) -> np.ndarray:
    """Field after the heat-kernel flow: phi_t(p) = exp(-p^2 t) phi(p), p^2 = 4 sum_mu sin^2(p_mu / 2).

    Parameters
    ----------
    phi : ndarray, shape (..., *shape)
    t : float
        Flow time in lattice units.
    ndim : int
        Dimensions of the lattice, the last axes of `phi`.

    Returns
    -------
    ndarray, shape and dtype of `phi`
    """
    phi, axes = _lattice_axes(phi, ndim)
    smeared = phi
    for axis in axes:
        extent = phi.shape[axis]
        factor = np.fft.rfft(heat_kernel(extent, t)).real
        factor = factor.reshape((-1,) + (1,) * (phi.ndim - 1 - axis))
        smeared = np.fft.irfft(np.fft.rfft(smeared, axis=axis) * factor, n=extent, axis=axis)
    return smeared.astype(phi.dtype, copy=False)


def two_point(phi: np.ndarray, ndim: int = 2, axis: int = 0) -> np.ndarray:
    """Zero-momentum two-point function C(t) = sum_y <phi(0, x) phi(t, x + y)>, averaged over the origin.

    The sum over y runs over the axes other than `axis`. The disconnected part is not subtracted, so
    that sum_t C(t) = V M^2.

    Parameters
    ----------
    phi : ndarray, shape (..., *shape)
    ndim : int
        Dimensions of the lattice, the last axes of `phi`.
    axis : int
        Which of the lattice axes is t, 0 .. ndim - 1.

    Returns
    -------
    ndarray, shape (..., shape[axis])
        One correlator per configuration: average over configurations for its expectation value.
    """
    phi, axes = _lattice_axes(phi, ndim)
    if not 0 <= axis < ndim:
        raise ValueError(f"two_point: axis must be in 0 .. {ndim - 1}, got {axis}")
    extent = phi.shape[axes[axis]]
    volume = np.prod([phi.shape[a] for a in axes])
    slices = phi.sum(axis=axes[:axis] + axes[axis + 1 :], dtype=np.float64)
    return np.fft.irfft(np.abs(np.fft.rfft(slices, axis=-1)) ** 2, n=extent, axis=-1) / volume


def second_moment_length(chi, g_pmin, extent: int):
    """Second-moment correlation length from G(0) = V <M^2> and G(p_min) on a lattice of equal extents.

    xi^2 = (G(0) / G(p_min) - 1) / (4 sin^2(pi / extent)).
    """
    return ((chi / g_pmin - 1) / (4 * np.sin(np.pi / extent) ** 2)) ** 0.5


def virial(theory, observables: dict) -> np.ndarray:
    """Phi times dS/dphi per site, whose expectation value is exactly 1 (integrate by parts).

    -beta <phi sum_nn phi> + 2 (1 - 2 lam) <phi^2> + 4 lam <phi^4>.

    Parameters
    ----------
    theory : lfq.Phi4
    observables : dict
        With entries ``nn``, ``phi2`` and ``phi4``.

    Returns
    -------
    ndarray, shape of the entries
    """
    return (
        -2 * theory.ndim * theory.beta * observables["nn"]
        + 2 * (1 - 2 * theory.lam) * observables["phi2"]
        + 4 * theory.lam * observables["phi4"]
    )
