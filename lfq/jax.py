"""lfq's kernels as JAX functions: differentiable, under jit and vmap, on the CPU and on NVIDIA GPUs.

`import lfq.jax` needs JAX and, once, a C++ compiler: XLA calls foreign code through a header-only C++ interface that
jaxlib ships, so the handlers in ``jax_ffi.cc`` are compiled on first import against the JAX that is installed, and
kept in ``$XDG_CACHE_HOME/lfq`` (``~/.cache/lfq``). ``CXX`` names the compiler. Where lfq was built with CUDA and JAX
has its plugin for CUDA, a second set of handlers queues lfq's CUDA kernels on XLA's stream.

Everything has the dtype of the fields, actions and log-determinants too; float64 needs ``jax_enable_x64``.
Derivatives are of first order and in reverse mode; those of `inverse` run on the CPU only. NaN or Inf in a field is an
error on the CPU; on a GPU it is passed on to the results.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from . import _cuda, embedding
from ._version import __version__
from .actions import Phi4
from .flows import Flow

try:
    from jax import enable_x64
except ImportError:
    from jax.experimental import enable_x64  # where older versions of JAX have it

__all__ = ["action", "force", "forward", "inverse"]

_SOURCE = Path(__file__).with_name("jax_ffi.cc")
# Operands and results of each handler: fields, arrays that are double whatever the fields are, the layers of a flow.
_TARGETS = {
    "action": ("f", "d"),
    "force": ("f", "f"),
    "forward": ("fdl", "fd"),
    "inverse": ("fdl", "fd"),
    "vjp": ("fdfdl", "fd"),
    "inverse_vjp": ("fdfdl", "fd"),
}


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise ImportError("lfq.jax compiles its XLA handlers on first import and found no C++ compiler; set CXX")


def _build(cuda: bool = False) -> tuple[list[str], Path]:
    """How the handlers are compiled, and the file that holds what this makes of these sources."""
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-isystem{jax.ffi.include_dir()}"]
    options += [f"-I{embedding.include_dir()}", str(_SOURCE), *embedding.OPTIONS["--libs"]().split()]
    name, headers = "jax", ["lfq.h"]
    if cuda:
        name, headers = "jax-cuda", ["lfq.h", "lfq_cuda.h"]
        options += ["-DLFQ_JAX_CUDA", "-llfq_cuda"]
    sources = [_SOURCE, *(embedding.include_dir() / "lfq" / header for header in headers)]
    made_of = [*(source.read_text() for source in sources), jax.__version__, jaxlib.__version__, __version__, *options]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfq"
    return options, cache / f"{name}-{key}.so"


def _handlers(options: list[str], library: Path) -> Path:
    """The compiled handlers, for this JAX and this liblfq."""
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            made = Path(directory) / library.name
            done = subprocess.run([_compiler(), *options, "-o", str(made)], capture_output=True, text=True)
            if done.returncode != 0:
                raise ImportError(f"lfq.jax: its XLA handlers do not compile:\n{done.stderr[-2000:]}")
            os.replace(made, library)
    return library


def _jax_has_cuda() -> bool:
    """Whether JAX would find a plugin for CUDA, where it looks for plugins."""
    found = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    namespace = importlib.util.find_spec("jax_plugins")
    if namespace is not None:
        found += [module.name for module in pkgutil.iter_modules(namespace.submodule_search_locations)]
    return any("cuda" in name for name in found)


def _register(library: Path, platform: str, prefix: str) -> None:
    """The handlers of a library as targets of XLA."""
    handlers = ctypes.CDLL(str(library))
    for name in _TARGETS:
        target = jax.ffi.pycapsule(getattr(handlers, f"lfq_jax_{name}"))
        jax.ffi.register_ffi_target(f"{prefix}{name}", target, platform=platform)


_prefix = "lfq_"
_register(_handlers(*_build()), "cpu", _prefix)
if _cuda.library_path() is not None and _jax_has_cuda():
    _register(_handlers(*_build(cuda=True)), "CUDA", _prefix)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(name: str, record: bytes, shapes: tuple[tuple[int, ...], ...], *operands):
    """A kernel; everything that is not a field is converted to float64 and back in here.

    A jit of its own, so that no float64 array is seen outside where JAX has float64 switched off.
    """
    takes, gives = _TARGETS[name]
    dtype, record = operands[0].dtype, np.frombuffer(record, dtype=np.uint8)
    if operands[0].size == 0:
        return tuple(jnp.zeros(shape, dtype) for shape in shapes)
    with enable_x64(True):
        given = [x.astype(np.float64) if kind == "d" else x for kind, x in zip(takes, operands, strict=False)]
        if "l" in takes:
            # A GPU wants layers on both sides: as an attribute on the host's, as an operand on the device's.
            given.append(record)
        results = [
            jax.ShapeDtypeStruct(shape, np.float64 if kind == "d" else dtype)
            for kind, shape in zip(gives, shapes, strict=True)
        ]
        call = jax.ffi.ffi_call(f"{_prefix}{name}", results, vmap_method="expand_dims")
        return tuple(x.astype(dtype) for x in call(*given, record=record))


def _field(array, shape: tuple[int, ...], name: str):
    array = jnp.asarray(array)
    if array.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name}: must be float32 or float64, got {array.dtype}")
    if array.shape[max(array.ndim - len(shape), 0) :] != shape:
        raise ValueError(f"{name}: shape {array.shape} does not end in the lattice {shape}")
    return array


def action(theory: Phi4, phi):
    """S of fields, with the gradient -force.

    Parameters
    ----------
    theory : Phi4
    phi : array, shape (..., *theory.shape)

    Returns
    -------
    array, shape (...)
    """
    return _action(theory, _field(phi, theory.shape, "phi"))


def force(theory: Phi4, phi):
    """-dS/dphi, like phi; not differentiable itself."""
    phi = _field(phi, theory.shape, "phi")
    return _call("force", theory._record().tobytes(), (phi.shape,), phi)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _action(theory, phi):
    return _call("action", theory._record().tobytes(), (phi.shape[: phi.ndim - theory.ndim],), phi)[0]


def _action_forward(theory, phi):
    return _action(theory, phi), phi


def _action_backward(theory, phi, cotangent):
    return (-force(theory, phi) * jnp.expand_dims(cotangent, range(-theory.ndim, 0)),)


_action.defvjp(_action_forward, _action_backward)


def forward(flow: Flow, z, weights=None):
    """x = f(z) and log|det df/dz|, differentiable in z and weights.

    Parameters
    ----------
    flow : Flow
        Its structure, and its weights unless others are given.
    z : array, shape (..., *lattice)
    weights : array, shape (n_weights,), optional

    Returns
    -------
    x : array, shape of z
    log_det : array, shape (...)
    """
    return _map("forward", *_arguments(flow, z, weights, "z"))


def inverse(flow: Flow, x, weights=None):
    """z = f^-1(x) and log|det dz/dx|; otherwise as `forward`."""
    return _map("inverse", *_arguments(flow, x, weights, "x"))


def _arguments(flow, array, weights, name):
    array = jnp.asarray(array)
    if array.ndim < flow.ndim:
        raise ValueError(f"{name}: shape {array.shape} has fewer than the {flow.ndim} axes of the lattice")
    array = _field(array, array.shape[array.ndim - flow.ndim :], name)
    weights = jnp.asarray(flow.weights if weights is None else weights, array.dtype)
    if weights.shape != (flow.n_weights,):
        raise ValueError(f"weights: shape {weights.shape}, must be ({flow.n_weights},)")
    layers = flow.program(array.shape[array.ndim - flow.ndim :]).tobytes()
    return layers, flow.ndim, array, weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map(name, layers, ndim, array, weights):
    return _call(name, layers, (array.shape, array.shape[: array.ndim - ndim]), array, weights)


def _map_forward(name, layers, ndim, array, weights):
    image, log_det = _map(name, layers, ndim, array, weights)
    # Cotangents of either map are pulled back at the latent.
    return (image, log_det), (array if name == "forward" else image, weights)


def _map_backward(name, layers, ndim, saved, cotangents):
    z, weights = saved
    kernel = "vjp" if name == "forward" else "inverse_vjp"
    return _call(kernel, layers, (z.shape, weights.shape), z, weights, *cotangents)


_map.defvjp(_map_forward, _map_backward)
