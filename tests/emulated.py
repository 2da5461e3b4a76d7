"""A GPU for machines without one: liblfq_cuda compiled for the host, and as much of CuPy as lfq uses, on NumPy."""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np

import lfq
from lfq import _cuda, _gpu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SANITIZE = os.environ.get("LFQ_EMULATOR_SANITIZE")  # what -fsanitize= takes
GXX = shutil.which("g++")


def _flags() -> list[str]:
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-DLFQ_ISA=cuda",
        '-DLFQ_VERSION="emulated"', '-DLFQ_CUDA_ARCHITECTURES="emulated"',
        *(f"-I{ROOT / place}" for place in ("tests/cuda", "csrc/include", "csrc")),
    ]  # fmt: skip
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g1"]
    return flags


def _run(*command) -> None:
    done = subprocess.run([GXX, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def _liblfq() -> list[str]:
    package = Path(lfq.__file__).parent
    return [f"-L{package}", "-llfq", f"-Wl,-rpath,{package}"]


def _compile(directory: Path) -> None:
    flags = _flags()
    objects = [directory / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda p: _run(*flags, "-x", "c++", "-c", p[0], "-o", p[1]), zip(SOURCES, objects, strict=True)))
    sanitizers = [flag for flag in flags if "sanitize" in flag]
    _run("-shared", *sanitizers, *objects, "-o", directory / "liblfq_cuda_emulated.so", *_liblfq())


def program(source: Path, executable: Path, tmp_path_factory) -> None:
    """Compiles a CUDA program that uses lfq_cuda.h."""
    flags = [*_flags(), "-Wno-missing-field-initializers"]
    libraries = [library(tmp_path_factory).path, *_liblfq()]
    _run(*flags, "-x", "c++", source, "-x", "none", *libraries, "-o", executable)


def library(tmp_path_factory) -> _cuda.Library:
    """The functions of lfq_cuda.h, where device memory is the host's."""
    # Workers of one run share the library; the first to come compiles it.
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lfq-emulated"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = directory / "liblfq_cuda_emulated.so"
        if not path.exists():
            _compile(directory)
    return _cuda.Library(path)


class Array(np.ndarray):
    """Device memory."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self):
        return types.SimpleNamespace(id=0)

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__

    def __array_function__(self, function, kinds, arguments, keywords):
        # NumPy's functions of device arrays are CuPy's, and their results stay there.
        result = super().__array_function__(function, kinds, arguments, keywords)
        return result.view(Array) if type(result) is np.ndarray else result


class OutOfMemoryError(Exception):
    pass


memory_left = 2**34  # bytes that an allocation may ask for


def _empty(shape, dtype=np.float64):
    array = np.empty(shape, dtype)
    if array.nbytes > memory_left:
        raise OutOfMemoryError
    # What is there is not to be relied on.
    array.view(np.uint8)[...] = 0xA5
    return array.view(Array)


def _asarray(array):
    return np.asarray(array).view(Array)


def _asnumpy(array, out=None):
    assert isinstance(array, Array)
    out = np.empty(array.shape, array.dtype) if out is None else out
    np.copyto(out, array.view(np.ndarray))
    return out


def cupy() -> types.ModuleType:
    """A module to stand in for CuPy."""
    module = types.ModuleType("cupy")
    module.__version__ = "emulated"
    module.__spec__ = ModuleSpec("cupy", None)
    module.ndarray, module.empty, module.asarray, module.asnumpy = Array, _empty, _asarray, _asnumpy
    module.from_dlpack = lambda array: _asarray(array.held)
    module.is_available = lambda: True
    stream = types.SimpleNamespace(ptr=0, synchronize=lambda: None)
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0, getDeviceCount=lambda: 1, getDeviceProperties=lambda i: {"name": b"emulated"}
    )
    module.cuda = types.SimpleNamespace(
        get_current_stream=lambda: stream,
        runtime=runtime,
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    )
    return module


def install(monkeypatch, tmp_path_factory) -> types.ModuleType:
    """Makes lfq find this GPU; returns the module."""
    module, found = cupy(), library(tmp_path_factory)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(_cuda, "library", lambda: found)
    monkeypatch.setattr(_cuda, "library_path", lambda: found.path)
    # Arrays of this GPU, not of one that is there.
    monkeypatch.setattr(_gpu, "_uploaded", functools.lru_cache(_gpu._uploaded.__wrapped__))
    return module
