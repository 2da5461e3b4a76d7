"""The one place that knows which arrays the kernels take and where they run.

Arrays are C-ordered, float32 or float64, lattice axes last, in the machine's memory, or on a GPU where a function has
CUDA kernels. Whatever else holds real numbers (other dtypes and byte orders, views that are not contiguous, nested
lists, objects with ``__array__`` or ``__dlpack__``) is copied, once, at the border: as float64 unless it is float32.
Complex numbers, bools and objects are a TypeError. Inputs are never written to; results are new arrays, NumPy's or,
of inputs on a GPU, CuPy's.
"""

from __future__ import annotations

import importlib.util
import math
import operator
import os

import numpy as np

from . import _core, _cuda, _gpu

__all__ = [
    "backend", "check_count", "check_finite", "check_seed", "check_shape", "check_threads", "fields", "info",
    "is_finite", "real_array", "real_dtype",
]  # fmt: skip


_CPU_DEVICES = (1, 3)  # of DLPack: kDLCPU, kDLCUDAHost


def backend(array):
    """The kernels for an array of `fields`, and what makes another like it: empty(shape, dtype)."""
    return (_gpu, _gpu.empty) if _gpu.is_gpu_array(array) else (_core, np.empty)


def real_array(array, name: str, gpu: bool = False) -> np.ndarray:
    """The array as NumPy's, float32 or float64, C-contiguous: itself, or a copy where it is not that already.

    With `gpu` an array that lives on a GPU stays there, as CuPy's.

    Raises
    ------
    TypeError
        The entries are not real numbers, or the array lives on a GPU that lfq cannot use.
    """
    if _gpu.is_gpu_array(array):
        reason = _gpu.missing() if gpu else "this runs on the CPU only"
        if reason is not None:
            raise TypeError(f"{name}: a GPU array was given, but {reason}")
        array = _gpu.asarray(array, name)
    else:
        if hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
            kind, number = array.__dlpack_device__()
            if kind not in _CPU_DEVICES:
                raise TypeError(f"{name}: must be in the machine's memory, got DLPack device ({int(kind)}, {number})")
            array = np.from_dlpack(array)
        array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: entries must be real numbers, got dtype {array.dtype}")
    dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
    return array.astype(dtype, order="C", copy=False)


def fields(array, shape: tuple[int, ...], name: str, gpu: bool = False) -> tuple[np.ndarray, tuple[int, ...]]:
    """Check a batch of fields at the border.

    Parameters
    ----------
    array : array_like, shape (..., *shape)
    shape : tuple of int
        The lattice.
    name : str
        The argument's name, for errors.
    gpu : bool
        Whether the caller has kernels for arrays on a GPU.

    Returns
    -------
    array : ndarray, float32 or float64, C-contiguous
        Of CuPy where the argument lives on a GPU.
    leading : tuple of int
        The axes before the lattice.

    Raises
    ------
    ValueError
        The last axes are not the lattice.
    TypeError
        See `real_array`.
    """
    array = real_array(array, name, gpu)
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
        ``cuda_architectures`` (the kernels were compiled for), ``cupy`` (version or None), ``gpu`` (names of those
        seen, or None), ``gpu_missing`` (what keeps lfq from using one, or None), ``library``.
    """
    cupy_version = gpu = architectures = None
    if _cuda.library_path() is not None:
        try:
            architectures = _cuda.library().architectures
        except OSError as error:
            architectures = str(error)
    if importlib.util.find_spec("cupy") is not None:
        import cupy

        cupy_version = cupy.__version__
        if cupy.is_available():
            count = cupy.cuda.runtime.getDeviceCount()
            gpu = ", ".join(cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count))
    return {
        "version": _core.version(),
        "isa": _core.isa(),
        "isas": tuple(_core.isas().split(",")),
        "threads": _core.max_threads(),
        "cuda_built": _cuda.library_path() is not None,
        "cuda_architectures": architectures,
        "cupy": cupy_version,
        "gpu": gpu,
        "gpu_missing": _gpu.missing(),
        "library": os.path.dirname(_core.__file__),
    }
