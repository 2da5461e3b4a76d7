"""The kernels of liblfq for Numba, bound by name so that compiled code can be cached."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from llvmlite import binding
from numba import types

__all__ = ["KERNELS"]

_INT, _LONG, _ULONG, _POINTER, _SIZE = types.int32, types.int64, types.uint64, types.intp, types.uintp

# Of lfq.h; pointers travel as integers (`array.ctypes.data`).
_SIGNATURES = {
    "lfq_normal": (_ULONG, _INT, _ULONG, _ULONG, _LONG, _LONG, _POINTER, _INT),
    "lfq_phi4_action": (_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _SIZE, _INT),
    "lfq_flow_loss": (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _INT),
    "lfq_hmc": (
        _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
        _POINTER, _SIZE, _INT,
    ),
}  # fmt: skip


class _Kernels(dict):
    """Numba external functions by name."""

    def __init__(self):
        path = next(Path(__file__).parent.glob("liblfq.*"))
        binding.load_library_permanently(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.lfq_last_error.restype = ctypes.c_char_p
        for name, arguments in _SIGNATURES.items():
            for suffix in ("f32", "f64"):
                symbol = f"{name}_{suffix}"
                self[symbol] = types.ExternalFunction(symbol, _INT(*arguments))

    def last_error(self) -> str:
        return self._library.lfq_last_error().decode()

    def sizes(self, suffix, flow, theory, coarse, n, n_coarse, n_threads) -> tuple[int, int, int]:
        """Workspace bytes of lfq_hmc, lfq_phi4_action (both on the coarse theory) and lfq_flow_loss."""

        def ask(name, *arguments):
            function = getattr(self._library, f"{name}_{suffix}")
            function.restype = ctypes.c_size_t
            converted = [
                ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments
            ]
            return function(*converted)

        count, threads = ctypes.c_int64, ctypes.c_int32(n_threads)
        return (
            ask("lfq_hmc_workspace", None, coarse, count(n_coarse), threads),
            ask("lfq_phi4_workspace", coarse, count(n_coarse), threads),
            ask("lfq_flow_workspace", flow, count(n), threads),
        )


KERNELS = _Kernels()
