"""lfq's kernels as JAX functions: differentiable, under jit and vmap, on the CPU.

`import lfq.jax` needs JAX and, once, a C++ compiler: XLA calls foreign code through a header-only C++ interface that
jaxlib ships, so the handlers in ``jax_ffi.cc`` are compiled on first import against the JAX that is installed, and
kept in ``$XDG_CACHE_HOME/lfq`` (``~/.cache/lfq``). ``CXX`` names the compiler.

Everything has the dtype of the fields, actions and log-determinants too; float64 needs ``jax_enable_x64``.
Derivatives are of first order and in reverse mode. NaN or Inf in a field is an error.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from . import embedding
from ._version import __version__
from .actions import Phi4
from .flows import Flow

__all__ = ["action", "force", "forward", "inverse"]

_SOURCE = Path(__file__).with_name("jax_ffi.cc")
_TARGETS = ("action", "force", "forward", "inverse", "vjp", "inverse_vjp")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise ImportError("lfq.jax compiles its XLA handlers on first import and found no C++ compiler; set CXX")


def _build() -> tuple[list[str], Path]:
    """How the handlers are compiled, and the file that holds what this makes of these sources."""
    includes = [f"-isystem{jax.ffi.include_dir()}", f"-I{embedding.include_dir()}"]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", *includes, str(_SOURCE), *embedding.OPTIONS["--libs"]().split()]
    header = embedding.include_dir() / "lfq" / "lfq.h"
    made_of = [_SOURCE.read_text(), header.read_text(), jax.__version__, jaxlib.__version__, __version__, *options]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfq"
    return options, cache / f"jax-{key}.so"


def _handlers() -> Path:
    """The compiled handlers, for this JAX and this liblfq."""
    options, library = _build()
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            made = Path(directory) / library.name
            done = subprocess.run([_compiler(), *options, "-o", str(made)], capture_output=True, text=True)
            if done.returncode != 0:
                raise ImportError(f"lfq.jax: its XLA handlers do not compile:\n{done.stderr[-2000:]}")
            os.replace(made, library)
    return library


_library = ctypes.CDLL(str(_handlers()))
for _name in _TARGETS:
    jax.ffi.register_ffi_target(
        f"lfq_{_name}", jax.ffi.pycapsule(getattr(_library, f"lfq_jax_{_name}")), platform="cpu"
    )


def _call(name: str, results, *operands, **attributes):
    call = jax.ffi.ffi_call(f"lfq_{name}", results, vmap_method="expand_dims")
    return call(*operands, **{key: np.frombuffer(value, dtype=np.uint8) for key, value in attributes.items()})


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
    return _call("force", jax.ShapeDtypeStruct(phi.shape, phi.dtype), phi, theory=theory._record().tobytes())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _action(theory, phi):
    result = jax.ShapeDtypeStruct(phi.shape[: phi.ndim - theory.ndim], phi.dtype)
    return _call("action", result, phi, theory=theory._record().tobytes())


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
    results = (
        jax.ShapeDtypeStruct(array.shape, array.dtype),
        jax.ShapeDtypeStruct(array.shape[: array.ndim - ndim], array.dtype),
    )
    return _call(name, results, array, weights, layers=layers)


def _map_forward(name, layers, ndim, array, weights):
    image, log_det = _map(name, layers, ndim, array, weights)
    # Cotangents of either map are pulled back at the latent.
    return (image, log_det), (array if name == "forward" else image, weights)


def _map_backward(name, layers, ndim, saved, cotangents):
    z, weights = saved
    results = jax.ShapeDtypeStruct(z.shape, z.dtype), jax.ShapeDtypeStruct(weights.shape, weights.dtype)
    kernel = "vjp" if name == "forward" else "inverse_vjp"
    return tuple(_call(kernel, results, z, weights, *cotangents, layers=layers))


_map.defvjp(_map_forward, _map_backward)
