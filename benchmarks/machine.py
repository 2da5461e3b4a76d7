"""What one core of this machine can do at most: arithmetic and bandwidth, measured with Numba.

A bound is the best of several samples, unlike everything else here, which is a median.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
from numba import njit

from .timing import throughput

_FAST = {"fastmath": {"contract"}, "error_model": "numpy"}


@njit(**_FAST)
def _eight(v, a, b):
    v = v * a + b
    v = v * a + b
    v = v * a + b
    v = v * a + b
    v = v * a + b
    v = v * a + b
    v = v * a + b
    return v * a + b


@njit(**_FAST)
def _multiply_add(x, y, z, w, a, b, n):
    """32 fused multiply-adds for each of n * x.size indices, in chains of 8."""
    for _ in range(n):
        for j in range(x.size):
            x[j], y[j], z[j], w[j] = (
                _eight(x[j], a, b),
                _eight(y[j], a, b),
                _eight(z[j], a, b),
                _eight(w[j], a, b),
            )


@njit(**_FAST)
def _eight_and_eight(v, a, b):
    w = v
    for _ in range(4):
        v = v * a + b
        w = w + a
        v = v * a + b
        w = w + b
    return v + w


@njit(**_FAST)
def _multiply_add_and_add(x, y, z, w, a, b, n):
    """32 fused multiply-adds and 36 additions for each of n * x.size indices."""
    for _ in range(n):
        for j in range(x.size):
            x[j], y[j] = _eight_and_eight(x[j], a, b), _eight_and_eight(y[j], a, b)
            z[j], w[j] = _eight_and_eight(z[j], a, b), _eight_and_eight(w[j], a, b)


@njit(error_model="numpy")
def _divide(x, a, n):
    for _ in range(n):
        for j in range(x.size):
            x[j] = a / x[j]


@njit(error_model="numpy")
def _square_root(x, n):
    for _ in range(n):
        for j in range(x.size):
            x[j] = np.sqrt(x[j])


@njit(**_FAST)
def _copy_and_back(x, y, a, n):
    """2 n copies, of a form that no compiler turns into memcpy."""
    for _ in range(n):
        for j in range(x.size):
            y[j] = a * x[j]
        for j in range(x.size):
            x[j] = a * y[j]


@njit(**_FAST)
def _kick_drift(phi, pi, k, d, n):
    """n leapfrog steps without their stencil: they move the same bytes."""
    for _ in range(n):
        for j in range(phi.size):
            p = pi[j] + k * phi[j]
            pi[j] = p
            phi[j] = phi[j] + d * p


def aligned(n: int, dtype) -> np.ndarray:
    """n ones, on a 64-byte border."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(n + 64 // item, dtype=dtype)
    start = (-raw.ctypes.data % 64) // item
    raw[:] = 1
    return raw[start : start + n]


def arithmetic(dtype) -> dict[str, float]:
    """Element operations per second of one core.

    Returns
    -------
    dict
        ``fma``: fused multiply-adds; ``issue``: all operations, with additions beside the multiply-adds;
        ``divide``, ``sqrt``.
    """
    t = np.dtype(dtype).type
    four, a, b, n = [aligned(256, dtype) for _ in range(4)], t(0.5), t(0.25), 300
    x = aligned(1024, dtype)
    per_call = 256 * n
    return {
        "fma": throughput(lambda: _multiply_add(*four, a, b, n), 32 * per_call).best,
        "issue": throughput(lambda: _multiply_add_and_add(*four, a, b, n), 68 * per_call).best,
        "divide": throughput(lambda: _divide(x, t(3), n), 1024 * n).best,
        "sqrt": throughput(lambda: _square_root(x, n), 1024 * n).best,
    }


def caches() -> dict[str, int]:
    """Bytes of the data caches of the first processor; {} where the system does not tell."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            found["L" + (index / "level").read_text().strip()] = int(size.rstrip("KM")) * (
                1 << (20 if "M" in size else 10)
            )
    return found or {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


def bandwidth(dtype="float64") -> dict[str, dict[str, float]]:
    """Bytes read plus bytes written per second of one core, by level of the memory hierarchy.

    Returns
    -------
    dict
        For ``L1``, ``L2``, ``L3``, ``DRAM``: ``copy``, and ``update``, the kick and drift without stencil
        (two arrays read and written in place). L1, L2 and L3 with two thirds of the cache, but L3 with
        8 MiB at most.
    """
    t, found = np.dtype(dtype).type, {}
    for level, size in [*caches().items(), ("DRAM", 512 << 20)]:
        size = size if level == "DRAM" else min(2 * size // 3, 8 << 20)
        entries = size // 2 // np.dtype(dtype).itemsize
        x, y = aligned(entries, dtype), aligned(entries, dtype)
        n = max(1, (1 << 20) // size)
        found[level] = {
            "copy": max(
                throughput(lambda x=x, y=y: np.copyto(y, x), 2 * x.nbytes, repeats=5).best,
                throughput(
                    lambda x=x, y=y, n=n: _copy_and_back(x, y, t(1), n), 4 * n * x.nbytes, repeats=5
                ).best,
            ),
            "update": throughput(
                lambda x=x, y=y, n=n: _kick_drift(x, y, t(1e-9), t(-1e-9), n), 4 * n * x.nbytes, repeats=5
            ).best,
        }
    return found


def model_name() -> str:
    """The processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure() -> dict:
    """All bounds of one core."""
    return {
        "arithmetic": {name: arithmetic(name) for name in ("float64", "float32")},
        "bandwidth": bandwidth(),
        "caches": caches(),
    }
