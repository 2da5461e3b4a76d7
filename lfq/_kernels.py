"""The one place that knows which arrays the kernels take and where they run.

Arrays are C-ordered, float32 or float64, lattice axes last, in the machine's memory. Whatever else holds real numbers
(other dtypes and byte orders, views that are not contiguous, nested lists, objects with ``__array__`` or
``__dlpack__``) is copied, once, at the border: as float64 unless it is float32. Complex numbers, bools and objects are
a TypeError, and so is memory of a GPU. Inputs are never written to; results are new arrays of NumPy.
"""

from __future__ import annotations

import importlib.util
import math
import operator
import os

import numpy as np

from . import _core

__all__ = [
    "check_count", "check_finite", "check_seed", "check_shape", "check_threads", "fields", "info", "is_finite",
    "real_array", "real_dtype",
]  # fmt: skip


_CPU_DEVICES = (1, 3)  # of DLPack: kDLCPU, kDLCUDAHost


def _from_gpu(array) -> bool:
    return hasattr(array, "__cuda_array_interface__")


def _missing_for_gpu() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed, and this build of lfq has no CUDA kernels"
    return "this build of lfq has no CUDA kernels"


def real_array(array, name: str) -> np.ndarray:
    """The array as NumPy's, float32 or float64, C-contiguous: itself, or a copy where it is not that already.

    Raises
    ------
    TypeError
        The entries are not real numbers, or the array lives on a GPU that lfq cannot use.
    """
    if _from_gpu(array):
        raise TypeError(f"{name}: a GPU array was given, but {_missing_for_gpu()}")
    if hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
        kind, number = array.__dlpack_device__()
        if kind not in _CPU_DEVICES:
            raise TypeError(f"{name}: must be in the machine's memory, got DLPack device ({int(kind)}, {number})")
        array = np.from_dlpack(array)
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: entries must be real numbers, got dtype {array.dtype}")
    return np.asarray(array, dtype=array.dtype if array.dtype in (np.float32, np.float64) else np.float64, order="C")


def fields(array, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Check a batch of fields at the border.

    Parameters
    ----------
    array : array_like, shape (..., *shape)
    shape : tuple of int
        The lattice.
    name : str
        The argument's name, for errors.

    Returns
    -------
    array : ndarray, float32 or float64, C-contiguous
    leading : tuple of int
        The axes before the lattice.

    Raises
    ------
    ValueError
        The last axes are not the lattice.
    TypeError
        See `real_array`.
    """
    array = real_array(array, name)
    if array.shape[max(array.ndim - len(shape), 0) :] != tuple(shape):
        raise ValueError(f"{name}: shape {array.shape} does not end in the lattice {tuple(shape)}")
    return array, array.shape[: array.ndim - len(shape)]


def check_finite(array: np.ndarray, name: str) -> np.ndarray:
    """The array, or a NotFiniteError with the place of its first NaN or Inf."""
    if not np.isfinite(array).all():
        where = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise _core.NotFiniteError(f"{name}: entry {where[0] if len(where) == 1 else where} is {array[where]}")
    return array


def real_dtype(dtype, name: str = "dtype") -> np.dtype:
    """float32 or float64, or a ValueError."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"{name}: must be float32 or float64, got {dtype!r}")
    return found


def check_shape(shape) -> tuple[int, ...]:
    """A lattice shape as a tuple of positive ints, or a ValueError."""
    try:
        checked = tuple(operator.index(extent) for extent in shape)
    except TypeError:
        raise ValueError(f"shape: must be a tuple of integers, got {shape!r}") from None
    if not 1 <= len(checked) <= 4:
        raise ValueError(f"shape: {checked} has {len(checked)} axes, must have 1 to 4")
    if min(checked) < 1:
        raise ValueError(f"shape: {checked} has an extent that is not positive")
    if math.prod(checked) >= 2**32:
        raise ValueError(f"shape: {checked} has 2^32 sites or more")
    return checked


def check_count(value, name: str, least: int = 0, most: int = 2**62) -> int:
    """An integer in [least, most], or an error naming it."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an integer, got {value!r}") from None
    if not least <= count <= most:
        raise ValueError(
            f"{name}: must be at least {least}, got {count}"
            if count < least
            else f"{name}: must be at most {most}, got {count}"
        )
    return count


def is_finite(value) -> bool:
    """Whether this is a finite number; an integer beyond the range of doubles is not."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def check_seed(seed) -> int:
    """A seed in [0, 2^64)."""
    return check_count(seed, "seed", 0, 2**64 - 1)


def check_threads(n_threads) -> int:
    """The number of threads for a kernel: 0 stands for all."""
    return 0 if n_threads is None else check_count(n_threads, "n_threads", 0, 1024)


def info() -> dict[str, object]:
    """What this installation of lfq can use.

    Returns
    -------
    dict
        ``version``, ``isa`` (in use), ``isas`` (available, best first), ``threads``, ``cuda_built``,
        ``cupy`` (version or None), ``gpu`` (its name, or None where none is seen), ``library``.
    """
    cupy_version = gpu = None
    if importlib.util.find_spec("cupy") is not None:
        import cupy

        cupy_version = cupy.__version__
        if cupy.is_available():
            gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {
        "version": _core.version(),
        "isa": _core.isa(),
        "isas": tuple(_core.isas().split(",")),
        "threads": _core.max_threads(),
        "cuda_built": False,
        "cupy": cupy_version,
        "gpu": gpu,
        "library": os.path.dirname(_core.__file__),
    }
