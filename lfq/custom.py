"""Actions of your own: any lattice action, compiled by Numba or another compiler, sampled by lfq's HMC."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numba
import numpy as np
from numba import types

from . import _core
from ._kernels import check_shape, check_threads, fields, real_dtype
from .actions import Phi4, PulledBack

__all__ = ["CustomAction", "evaluate_signature"]

_RECORD = np.dtype(
    [("ndim", "i4"), ("extent", "i4", 4), ("reserved", "i4"), ("evaluate", "u8"), ("context", "u8")], align=True
)


def evaluate_signature(dtype="float64"):
    """What `numba.cfunc` needs to compile an action for `CustomAction`.

    Parameters
    ----------
    dtype : {"float64", "float32"}
        Of the fields.

    Returns
    -------
    numba signature
        int32(context: void*, want_action: int32, n: int64, phi: real*, action: double*, force: real*).
    """
    real = types.float64 if real_dtype(dtype) == np.float64 else types.float32
    pointer = types.CPointer(real)
    return types.int32(types.voidptr, types.int32, types.int64, pointer, types.CPointer(types.float64), pointer)


class CustomAction:
    """A lattice action given by a compiled function.

    `HMC` samples it, `pullback` takes it through a flow, and `train` takes it as a target, like a `Phi4`.

    Parameters
    ----------
    shape : tuple of int
        Extents, 1 to 4 of them.
    evaluate : numba CFunc, sequence of CFunc, or dict of dtype name to ctypes function or address
        evaluate(context, want_action, n, phi, action, force) gets n fields (n, *shape), at most 64, and writes
        force = -dS/dphi, and action, n doubles, which nobody reads where want_action is 0. It returns 0, or
        anything else to stop. lfq calls it from several threads at once, without the interpreter's lock; what
        it makes of a field must depend on nothing else. CFuncs have the signature `evaluate_signature`; give one
        for each dtype that is to be sampled.
    context : ndarray, optional
        Parameters for evaluate, passed on as a pointer; kept alive and seen when changed in place.

    See Also
    --------
    CustomAction.from_sites : when the action is a sum over sites and nearest neighbours.
    """

    def __init__(self, shape, evaluate, context: np.ndarray | None = None):
        self.shape = check_shape(shape)
        if context is not None and not (isinstance(context, np.ndarray) and context.flags.c_contiguous):
            raise TypeError("context: must be a C-contiguous array")
        self.context = context
        self._compile = None
        self._functions: dict[np.dtype, object] = {}
        if isinstance(evaluate, Mapping):
            for name, function in evaluate.items():
                self._functions[real_dtype(name, "evaluate")] = function
        else:
            for function in evaluate if isinstance(evaluate, Sequence) else (evaluate,):
                self._functions[self._dtype_of(function)] = function
        if not self._functions:
            raise ValueError("evaluate: must hold at least one function")
        self._addresses = {dtype: self._address(function) for dtype, function in self._functions.items()}

    def describe(self) -> dict:
        """What can be told of it in a checkpoint: not which functions it calls."""
        context = None if self.context is None else hashlib.blake2b(self.context.data, digest_size=16).hexdigest()
        return {"shape": self.shape, "action": "custom", "context": context}

    @staticmethod
    def _dtype_of(function) -> np.dtype:
        arguments = getattr(getattr(function, "_sig", None), "args", None)
        for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
            if arguments == evaluate_signature(dtype).args:
                return dtype
        raise TypeError(
            f"evaluate: must be a numba.cfunc with the signature evaluate_signature(dtype), got {function!r}"
        )

    @staticmethod
    def _address(function) -> int:
        if isinstance(function, int):
            return function
        if hasattr(function, "address"):
            return function.address
        if isinstance(function, ctypes._CFuncPtr):
            return ctypes.cast(function, ctypes.c_void_p).value
        raise TypeError(f"evaluate: must be a compiled function or its address, got {function!r}")

    @classmethod
    def from_sites(
        cls, shape, action: Callable[[float, float], float], force: Callable[[float, float], float]
    ) -> CustomAction:
        """The action S = sum_x action(phi_x, sum over mu of phi_{x+mu}).

        Parameters
        ----------
        shape : tuple of int
        action : callable (phi, forward) -> float
            The terms of one site, given the sum over its forward neighbours. Compiled by Numba.
        force : callable (phi, neighbours) -> float
            -dS/dphi at a site, given the sum over all its neighbours. Compiled by Numba.

        Examples
        --------
        >>> free = CustomAction.from_sites((8, 8), lambda p, f: p * (p - 0.4 * f), lambda p, n: 0.4 * n - 2 * p)
        """
        self = cls.__new__(cls)
        self.shape, self.context = check_shape(shape), None
        self._functions, self._addresses = {}, {}
        site_action, site_force = (
            # Division by zero makes an Inf, which HMC reports, and not an exception, which nobody would see.
            f if hasattr(f, "py_func") else numba.njit(f, error_model="numpy")
            for f in (action, force)
        )
        self._compile = lambda dtype: _site_loop(self.shape, site_action, site_force, dtype)
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def action(self, phi, n_threads: int | None = None) -> np.ndarray:
        """Action of each configuration (see `Phi4.action`)."""
        return self._evaluate(phi, n_threads)[0]

    def force(self, phi, n_threads: int | None = None) -> np.ndarray:
        """-dS/dphi, of the shape and dtype of phi."""
        return self._evaluate(phi, n_threads)[1]

    def measure(self, phi, n_threads: int | None = None) -> dict[str, np.ndarray]:
        """The observables of `lfq.observables.OBSERVABLES`, which know no action."""
        return self._lattice.measure(phi, n_threads)

    def pullback(self, flow) -> PulledBack:
        """The action in the input space of `flow`; HMC of it is flow-HMC."""
        return PulledBack(self, flow)

    def _evaluate(self, phi, n_threads):
        phi, leading = fields(phi, self.shape, "phi")
        action, force = np.empty(leading), np.empty_like(phi)
        self._pullback(None, np.empty(0), phi, action, force, check_threads(n_threads))
        return action, force

    def _record(self, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        if dtype not in self._addresses:
            if self._compile is None:
                known = ", ".join(str(known) for known in self._addresses)
                raise TypeError(f"evaluate: compiled for {known}, not for {dtype} fields")
            # Of several threads that compile at once the first one's function stays, also while another runs it.
            function = self._functions.setdefault(dtype, self._compile(dtype))
            self._addresses[dtype] = self._address(function)
        record = np.zeros(1, dtype=_RECORD)
        record["ndim"], record["evaluate"] = self.ndim, self._addresses[dtype]
        record["extent"][0, : self.ndim] = self.shape
        record["context"] = 0 if self.context is None else self.context.ctypes.data
        return record

    @property
    def _lattice(self) -> Phi4:
        return Phi4(self.shape, 0.0, 0.0)

    def _smear(self) -> np.ndarray:
        return self._lattice._smear()

    @property
    def _physical(self) -> CustomAction:
        return self

    def _program(self):
        return None, np.empty(0)

    def _density(self, observables) -> None:
        return None

    def _pullback(self, layers, weights, z, action, force, n_threads):
        _core.custom_force(layers, weights, self._record(z.dtype).view(np.uint8), z, action, force, n_threads)

    def _evolve(self, layers, weights, settings, z, momenta, n_threads):
        _core.custom_evolve(layers, weights, self._record(z.dtype).view(np.uint8), settings, z, momenta, n_threads)

    def _hmc(self, layers, weights, settings, z, phi, dh, accepted, values, n_threads):
        _core.custom_hmc(
            layers, weights, self._record(z.dtype).view(np.uint8), settings, z, phi, dh, accepted, self._smear(),
            values, n_threads,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"CustomAction(shape={self.shape})"


def _site_loop(shape, action, force, dtype):
    """The loop over the sites of up to four axes around a site's action and force."""
    ndim = len(shape)
    n0, n1, n2, n3 = (1,) * (4 - ndim) + shape

    @numba.cfunc(evaluate_signature(dtype), error_model="numpy")
    def evaluate(context, want_action, n, phi_pointer, action_pointer, force_pointer):
        fields = numba.carray(phi_pointer, (n, n0, n1, n2, n3))
        forces = numba.carray(force_pointer, (n, n0, n1, n2, n3))
        actions = numba.carray(action_pointer, (n,))
        for chain in range(n):
            phi, out = fields[chain], forces[chain]
            total = 0.0
            for i in range(n0):
                for j in range(n1):
                    for k in range(n2):
                        row, to = phi[i, j, k], out[i, j, k]
                        up2, down2 = phi[i, j, (k + 1) % n2], phi[i, j, k - 1]
                        up1, down1 = phi[i, (j + 1) % n1, k], phi[i, j - 1, k]
                        up0, down0 = phi[(i + 1) % n0, j, k], phi[i - 1, j, k]
                        for x in range(n3):
                            forward = row[x + 1 if x + 1 < n3 else 0]
                            backward = row[x - 1 if x > 0 else n3 - 1]
                            if ndim > 1:
                                forward, backward = forward + up2[x], backward + down2[x]
                            if ndim > 2:
                                forward, backward = forward + up1[x], backward + down1[x]
                            if ndim > 3:
                                forward, backward = forward + up0[x], backward + down0[x]
                            to[x] = force(row[x], forward + backward)
                            if want_action != 0:
                                total += action(row[x], forward)
            actions[chain] = total
        return 0

    return evaluate
