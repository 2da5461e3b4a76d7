"""liblfq_cuda, bound with ctypes: device pointers travel as integers. Knows nothing of CuPy."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from . import _core

__all__ = ["FLOW_RECORD", "TRAINING_RECORD", "Library", "library", "library_path"]

FLOW_RECORD = np.dtype(
    [
        ("volume", "i8"),
        ("n_weights", "i8"),
        ("n_layers", "i4"),
        ("reserved", "i4"),
        ("layers", "u8"),
        ("weights", "u8"),
    ]
)
"""lfq_flow, with addresses of layers and weights; for lfq_cuda.h those of the weights on the device."""

TRAINING_RECORD = np.dtype(
    [(name, "i8") for name in ("n", "n_noise", "n_weights")]
    + [("copies", "i4"), ("reserved", "i4")]
    + [
        (name, "u8")
        for name in (
            "coarse_action", "target_action", "log_det", "gradient", "weights", "first_moment", "second_moment",
            "log_w", "history", "failed_step",
        )
    ]
    + [("step", "i8"), ("total_steps", "i8"), ("learning_rate", "f8")]
)  # fmt: skip
"""lfq_cuda_training."""

_INT, _LONG, _ULONG, _SIZE, _POINTER = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
_PLACE = (_POINTER, _SIZE, _POINTER)  # workspace, its bytes, stream
_FLOW = (_POINTER, _POINTER)  # flow, its layers on the device

# Of lfq_cuda.h, for both types of field.
_SIGNATURES = {
    "normal": (_ULONG, _INT, _ULONG, _ULONG, _LONG, _LONG, _POINTER, _POINTER),
    "phi4_action": (_POINTER, _LONG, *2 * (_POINTER,), *_PLACE),
    "phi4_force": (_POINTER, _LONG, *3 * (_POINTER,)),
    "phi4_observables": (_POINTER, _LONG, *3 * (_POINTER,), *_PLACE),
    "resident": (_POINTER,),
    "evolve": (*2 * (_POINTER,), _LONG, *2 * (_POINTER,), *_PLACE),
    "hmc": (*2 * (_POINTER,), _INT, _LONG, *5 * (_POINTER,), *_PLACE),
    "flow_forward": (*_FLOW, _LONG, *3 * (_POINTER,), *_PLACE),
    "flow_inverse": (*_FLOW, _LONG, *3 * (_POINTER,), *_PLACE),
    "flow_vjp": (*_FLOW, _LONG, *5 * (_POINTER,), *_PLACE),
    "flow_loss": (*_FLOW, _POINTER, _LONG, *4 * (_POINTER,), *_PLACE),
    "pullback_force": (*_FLOW, _POINTER, _LONG, *3 * (_POINTER,), *_PLACE),
    "flow_evolve": (*_FLOW, *2 * (_POINTER,), _LONG, *2 * (_POINTER,), *_PLACE),
    "flow_hmc": (*_FLOW, *2 * (_POINTER,), _LONG, *6 * (_POINTER,), *_PLACE),
    "train_step": 3 * (_POINTER,),
}
_WORKSPACES = {name: (_POINTER, _LONG) for name in ("phi4", "hmc", "flow")}
_SUFFIX = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}
_ARGUMENT, _NOT_FINITE = -1, -3


def _pointer(argument):
    """Records are NumPy arrays on the host; everything else is a number already."""
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


class Library:
    """The functions of lfq_cuda.h.

    Parameters
    ----------
    path : path-like
        The shared library.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            for suffix in _SUFFIX.values():
                self._function(f"{name}_{suffix}", arguments, ctypes.c_int)
        for name, arguments in _WORKSPACES.items():
            for suffix in _SUFFIX.values():
                self._function(f"{name}_workspace_{suffix}", arguments, _SIZE)
        for name in ("version", "architectures", "last_error"):
            self._function(name, (), ctypes.c_char_p)
        self._function("device_count", (), _INT)

    def _function(self, name: str, arguments, result) -> None:
        function = getattr(self._library, f"lfq_cuda_{name}")
        function.argtypes, function.restype = arguments, result

    def _get(self, name: str):
        return getattr(self._library, f"lfq_cuda_{name}")

    @property
    def architectures(self) -> str:
        return self._get("architectures")().decode()

    def device_count(self) -> tuple[int, str]:
        """Devices that the driver shows, and why there are none."""
        count = self._get("device_count")()
        return count, "" if count else self._get("last_error")().decode()

    def call(self, name: str, dtype, *arguments) -> int:
        """Call a function of one type of field; returns its value where that is not an error."""
        code = self._get(f"{name}_{_SUFFIX[np.dtype(dtype)]}")(*map(_pointer, arguments))
        if code >= 0:
            return code
        text = self._get("last_error")().decode()
        if code == _ARGUMENT:
            raise ValueError(text)
        raise (_core.NotFiniteError if code == _NOT_FINITE else RuntimeError)(text)

    def workspace_bytes(self, name: str, dtype, *arguments) -> int:
        """Bytes of scratch for a function at these sizes."""
        return self._get(f"{name}_workspace_{_SUFFIX[np.dtype(dtype)]}")(*map(_pointer, arguments))


def library_path() -> Path | None:
    """Where the library of this installation is; None where it was built without CUDA."""
    path = Path(__file__).parent / "liblfq_cuda.so"
    return path if path.exists() else None


@cache
def library() -> Library:
    """The library of this installation."""
    path = library_path()
    if path is None:
        raise RuntimeError("this build of lfq has no CUDA kernels (no nvcc was found when it was built)")
    return Library(path)
