"""The kernels of liblfq inside Numba functions, bound by name so that compiled code can be cached.

The functions at the end can be called from `njit` code, for float32 and float64 fields alike; theories,
flows and settings are addresses of the records that `lfq._core` describes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from llvmlite import binding
from numba import types
from numba.extending import overload

__all__ = ["action", "advance", "last_error", "loss", "normal", "workspace"]

_INT, _LONG, _ULONG, _POINTER, _SIZE = types.int32, types.int64, types.uint64, types.intp, types.uintp

# Of lfq.h; pointers travel as integers.
_SIGNATURES = {
    "lfq_normal": (_ULONG, _INT, _ULONG, _ULONG, _LONG, _LONG, _POINTER, _INT),
    "lfq_phi4_action": (_POINTER, _LONG, *3 * (_POINTER,), _SIZE, _INT),
    "lfq_flow_loss": (*2 * (_POINTER,), _LONG, *5 * (_POINTER,), _SIZE, _INT),
    "lfq_hmc": (*3 * (_POINTER,), _LONG, *8 * (_POINTER,), _SIZE, _INT),
}

_path = next(Path(__file__).parent.glob("liblfq.*"))
binding.load_library_permanently(str(_path))
_library = ctypes.CDLL(str(_path))
_library.lfq_last_error.restype = ctypes.c_char_p


def _kernel(name: str, array) -> types.ExternalFunction | None:
    """The kernel for the type of an array argument."""
    suffix = {types.float32: "f32", types.float64: "f64"}.get(array.dtype)
    return None if suffix is None else types.ExternalFunction(f"{name}_{suffix}", _INT(*_SIGNATURES[name]))


def last_error() -> str:
    """What the last kernel that failed on this thread complained about."""
    return _library.lfq_last_error().decode()


def workspace(name: str, dtype, *arguments) -> np.ndarray:
    """Scratch for a kernel, by its lfq_*_workspace function.

    Parameters
    ----------
    name : str
        "phi4", "flow" or "hmc".
    dtype : float32 or float64
    *arguments
        Of the function: records (arrays), None for null, or ctypes numbers.
    """
    function = getattr(_library, f"lfq_{name}_workspace_{'f32' if np.dtype(dtype).itemsize == 4 else 'f64'}")
    function.restype = ctypes.c_size_t
    return np.empty(
        function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments)),
        dtype=np.uint8,
    )


def advance(theory, settings, fields, space, n_threads):
    """lfq_hmc on fields (n_chains, volume) in place, nothing measured; returns its status."""
    raise NotImplementedError("for njit code")


def normal(seed, purpose, trajectory, values, n_threads):
    """lfq_normal into values (n_chains, n_per_chain); returns its status."""
    raise NotImplementedError("for njit code")


def action(theory, fields, values, space, n_threads):
    """lfq_phi4_action of fields (n_chains, volume); returns its status."""
    raise NotImplementedError("for njit code")


def loss(flow, theory, latents, values, log_det, gradient, space, n_threads):
    """lfq_flow_loss at latents (n_chains, volume); returns its status."""
    raise NotImplementedError("for njit code")


@overload(advance)
def _advance(theory, settings, fields, space, n_threads):
    kernel = _kernel("lfq_hmc", fields)

    def call(theory, settings, fields, space, n_threads):
        return kernel(
            0, theory, settings, len(fields), fields.ctypes.data, 0, 0, 0, 0, 0, 0, space.ctypes.data, space.size,
            n_threads,
        )  # fmt: skip

    return kernel and call


@overload(normal)
def _normal(seed, purpose, trajectory, values, n_threads):
    kernel = _kernel("lfq_normal", values)

    def call(seed, purpose, trajectory, values, n_threads):
        return kernel(
            seed, purpose, trajectory, 0, values.shape[0], values.shape[1], values.ctypes.data, n_threads
        )  # fmt: skip

    return kernel and call


@overload(action)
def _action(theory, fields, values, space, n_threads):
    kernel = _kernel("lfq_phi4_action", fields)

    def call(theory, fields, values, space, n_threads):
        return kernel(
            theory, len(fields), fields.ctypes.data, values.ctypes.data, space.ctypes.data, space.size, n_threads
        )  # fmt: skip

    return kernel and call


@overload(loss)
def _loss(flow, theory, latents, values, log_det, gradient, space, n_threads):
    kernel = _kernel("lfq_flow_loss", latents)

    def call(flow, theory, latents, values, log_det, gradient, space, n_threads):
        return kernel(
            flow, theory, len(latents), latents.ctypes.data, values.ctypes.data, log_det.ctypes.data,
            gradient.ctypes.data, space.ctypes.data, space.size, n_threads,
        )  # fmt: skip

    return kernel and call
