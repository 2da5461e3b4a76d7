"""Lattice phi^4 and its pullback through a flow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import _core
from ._kernels import backend, check_shape, check_threads, fields
from .observables import OBSERVABLES, heat_kernel

if TYPE_CHECKING:
    from .custom import CustomAction
    from .flows import Flow

__all__ = ["Phi4", "PulledBack", "check_theory"]


def _finite(value, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: must be a number, got {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: must be finite, got {number}")
    return number


@dataclass(frozen=True)
class Phi4:
    r"""Lattice phi^4 theory on a periodic lattice.

    .. math:: S = \sum_x [-\beta \sum_\mu \phi_x \phi_{x+\mu} + (1 - 2\lambda) \phi_x^2 + \lambda \phi_x^4]

    Parameters
    ----------
    shape : tuple of int
        Extents, 1 to 4 of them.
    beta : float
        Hopping strength (twice the kappa of the kappa-lambda convention).
    lam : float
        Quartic coupling, not negative.

    Raises
    ------
    ValueError
        A shape or coupling out of range; lam < 0 makes the action unbounded below, and so does lam = 0
        with beta >= 1 / ndim.
    """

    shape: tuple[int, ...]
    beta: float
    lam: float

    def __post_init__(self):
        object.__setattr__(self, "shape", check_shape(self.shape))
        object.__setattr__(self, "beta", _finite(self.beta, "beta"))
        object.__setattr__(self, "lam", _finite(self.lam, "lam"))
        if self.lam < 0:
            raise ValueError(f"lam: must not be negative (the action is unbounded below), got {self.lam}")
        if self.lam == 0 and abs(self.beta) * self.ndim >= 1:
            raise ValueError(
                f"beta: the free theory (lam = 0) is bounded below only for |beta| < 1/{self.ndim}, got {self.beta}"
            )

    @classmethod
    def from_kappa(cls, shape, kappa: float, lam: float) -> Phi4:
        """The theory with action -2 kappa sum phi phi_mu + (1 - 2 lam) phi^2 + lam phi^4. Fields are the same."""
        return cls(shape, beta=2 * _finite(kappa, "kappa"), lam=lam)

    @classmethod
    def from_mass(cls, shape, m2: float, g: float, half: bool = True) -> Phi4:
        """The theory given by a bare mass.

        Parameters
        ----------
        shape : tuple of int
        m2, g : float
            Of S = sum_x [1/2 sum_mu (d_mu phi)^2 + m2/2 phi^2 + g phi^4] when `half`, else of
            S = sum_x [sum_mu (d_mu phi)^2 + m2 phi^2 + g phi^4].
        half : bool
            Whether kinetic and mass term carry a factor 1/2.

        Raises
        ------
        ValueError
            g < 0, or a free theory (g = 0) that is not stable.

        Notes
        -----
        lam = g beta^2 and m2 = 2 (1 - 2 lam) / beta - 2 D, solved for beta > 0. Fields differ by a factor:
        see `field_from_mass`.
        """
        shape = check_shape(shape)
        m2, g = _finite(m2, "m2"), _finite(g, "g")
        if g < 0:
            raise ValueError(f"g: must not be negative (the action is unbounded below), got {g}")
        if not half:
            g = g / 4
        linear = m2 + 2 * len(shape)
        if g == 0:
            if m2 <= 0:
                raise ValueError(f"m2: must be positive with g = 0 (the action is unbounded below), got {m2}")
            beta = 2 / linear
        else:
            # The positive root of 4 g beta^2 + linear beta - 2 = 0, in the form that does not cancel.
            root = math.sqrt(linear * linear + 32 * g)
            beta = 4 / (root + linear) if linear > 0 else (root - linear) / (8 * g)
        if beta == 0:
            raise ValueError(f"m2: {m2} is too large: beta underflows")
        return cls(shape, beta=beta, lam=g * beta * beta)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    @property
    def kappa(self) -> float:
        return self.beta / 2

    def mass_parameters(self, half: bool = True) -> tuple[float, float]:
        """(m2, g) of the mass convention; the inverse of `from_mass`."""
        if self.beta <= 0:
            raise ValueError(f"beta: the mass convention needs beta > 0, got {self.beta}")
        g = self.lam / self.beta**2
        return 2 * (1 - 2 * self.lam) / self.beta - 2 * self.ndim, g if half else 4 * g

    def _mass_factor(self, half: bool) -> float:
        if self.beta <= 0:
            raise ValueError(f"beta: the mass convention needs beta > 0, got {self.beta}")
        return math.sqrt(self.beta) if half else math.sqrt(self.beta / 2)

    def field_to_mass(self, phi, half: bool = True):
        """phi in the normalisation of the mass convention: sqrt(beta) phi, over sqrt(2) without the half."""
        return np.asarray(phi) * self._mass_factor(half)

    def field_from_mass(self, phi, half: bool = True):
        """The inverse of `field_to_mass`."""
        return np.asarray(phi) / self._mass_factor(half)

    def action(self, phi, n_threads: int | None = None) -> np.ndarray:
        """Action of each configuration.

        Parameters
        ----------
        phi : array_like, shape (..., *shape)
            On a GPU or not: results lie where phi does.

        Returns
        -------
        ndarray of float64, shape (...)

        Raises
        ------
        NotFiniteError
            phi holds NaN or Inf; names the configuration and site. On a GPU, where looking for them would wait for
            the device, they end up in the results instead.
        """
        phi, leading = fields(phi, self.shape, "phi", gpu=True)
        kernels, empty = backend(phi)
        action = empty(leading)
        kernels.phi4_action(self._record(), phi, action, check_threads(n_threads))
        return action

    def force(self, phi, n_threads: int | None = None) -> np.ndarray:
        """-dS/dphi, of the shape and dtype of phi (see `action` for arguments and errors)."""
        phi, _ = fields(phi, self.shape, "phi", gpu=True)
        kernels, empty = backend(phi)
        force = empty(phi.shape, phi.dtype)
        kernels.phi4_force(self._record(), phi, force, check_threads(n_threads))
        return force

    def measure(self, phi, n_threads: int | None = None) -> dict[str, np.ndarray]:
        """The observables of `lfq.observables.OBSERVABLES`, each an array of shape (...)."""
        phi, leading = fields(phi, self.shape, "phi", gpu=True)
        kernels, empty = backend(phi)
        values = empty((*leading, len(OBSERVABLES)))
        kernels.phi4_observables(self._record(), phi, self._smear(), values, check_threads(n_threads))
        return {name: values[..., i] for i, name in enumerate(OBSERVABLES)}

    def describe(self) -> dict:
        """Its parameters as plain data."""
        return asdict(self)

    def pullback(self, flow: Flow) -> PulledBack:
        """The theory in the input space of `flow`; HMC of it is flow-HMC."""
        return PulledBack(self, flow)

    def _record(self) -> np.ndarray:
        record = np.zeros(1, dtype=_core.theory_dtype)
        record["ndim"] = self.ndim
        record["extent"][0, : self.ndim] = self.shape
        record["beta"], record["lam"] = self.beta, self.lam
        return record

    def _smear(self) -> np.ndarray:
        return np.concatenate([heat_kernel(extent) for extent in self.shape])

    def _evaluate(self, phi, n_threads):
        return self.action(phi, n_threads), self.force(phi, n_threads)

    # What HMC asks of a theory: its own action, and the flow between latent and field, if any.
    @property
    def _physical(self) -> Phi4:
        return self

    def _program(self):
        return None, np.empty(0)

    def _density(self, observables):
        """S / V without a constant term."""
        kinetic = -self.beta * self.ndim * observables["nn"]
        return kinetic + (1 - 2 * self.lam) * observables["phi2"] + self.lam * observables["phi4"]

    # A theory seen through the flow (layers, weights), or itself where layers is None.
    def _pullback(self, layers, weights, z, action, force, n_threads):
        backend(z)[0].pullback_force(self.volume, layers, weights, self._record(), z, action, force, n_threads)

    def _evolve(self, layers, weights, settings, z, momenta, n_threads):
        backend(z)[0].evolve(layers, weights, self._record(), settings, z, momenta, n_threads)

    def _hmc(self, layers, weights, settings, z, phi, dh, accepted, values, n_threads):
        backend(z)[0].hmc(
            layers, weights, self._record(), settings, z, phi, dh, accepted, self._smear(), values, n_threads
        )  # fmt: skip


def check_theory(theory, name: str = "theory") -> Phi4:
    """The theory, or a TypeError where it is none, or a pullback."""
    if not isinstance(theory, Phi4):
        raise TypeError(f"{name}: must be a Phi4, got {type(theory).__name__}")
    return theory


@dataclass(frozen=True)
class PulledBack:
    """A theory seen through a flow: S~(z) = S(f(z)) - log|det df/dz|.

    Sampling z from exp(-S~) and forming phi = f(z) samples phi from exp(-S), whatever the flow
    (arXiv:0907.5491). Latents are arrays of the theory's shape; a flow that enlarges lattices reads
    them as one flat vector.

    Parameters
    ----------
    theory : Phi4 or CustomAction
    flow : Flow
    """

    theory: Phi4 | CustomAction
    flow: Flow

    def __post_init__(self):
        # Not imported above: flows know nothing of theories.
        from .flows import Flow

        if not isinstance(self.flow, Flow):
            raise TypeError(f"flow: must be a Flow, got {type(self.flow).__name__}")
        self.flow.program(self.theory.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.theory.shape

    @property
    def ndim(self) -> int:
        return self.theory.ndim

    @property
    def volume(self) -> int:
        return self.theory.volume

    def action(self, z, n_threads: int | None = None) -> np.ndarray:
        """S~ of each latent, shape (...)."""
        return self._evaluate(z, n_threads)[0]

    def force(self, z, n_threads: int | None = None) -> np.ndarray:
        """-dS~/dz, of the shape and dtype of z."""
        return self._evaluate(z, n_threads)[1]

    def field(self, z, n_threads: int | None = None) -> np.ndarray:
        """phi = f(z)."""
        return self.flow.forward(z, n_threads)[0]

    def latent(self, phi, n_threads: int | None = None) -> np.ndarray:
        """z = f^-1(phi)."""
        return self.flow.inverse(phi, n_threads)[0]

    def _evaluate(self, z, n_threads):
        # The actions of callers take arrays of the machine's memory.
        z, leading = fields(z, self.shape, "z", gpu=isinstance(self.theory, Phi4))
        _, empty = backend(z)
        action, force = empty(leading), empty(z.shape, z.dtype)
        self.theory._pullback(*self._program(), z, action, force, check_threads(n_threads))
        return action, force

    @property
    def _physical(self) -> Phi4 | CustomAction:
        return self.theory

    def _program(self):
        return self.flow.program(self.shape), self.flow.weights
