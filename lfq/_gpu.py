"""The functions of `lfq._core` for CuPy arrays: the same names and arguments, on CuPy's current stream.

Nothing here waits for the device, except `hmc`, which brings its measurements back.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache

import numpy as np

from . import _core, _cuda

__all__ = [
    "asarray",
    "empty",
    "evolve",
    "flow_forward",
    "flow_inverse",
    "flow_loss",
    "flow_vjp",
    "hmc",
    "is_gpu_array",
    "missing",
    "normal",
    "on_device",
    "phi4_action",
    "phi4_force",
    "phi4_observables",
    "pullback_force",
    "require",
    "to_host",
]

_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_gpu_array(array) -> bool:
    """Whether an object offers device memory, by __cuda_array_interface__ or DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    try:
        return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _CUDA_DEVICES
    except BufferError:
        # JAX says so of arrays spread over several devices, which NumPy can read.
        return False


def missing() -> str | None:
    """What keeps this machine from running lfq on a GPU; None when nothing does."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'lfq[cuda]')"
    try:
        _cuda.library()
    except (RuntimeError, OSError) as error:
        return str(error)
    import cupy

    return None if cupy.is_available() else "no GPU is visible"


def require(what: str) -> None:
    """A RuntimeError that names what is missing for `what`."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"{what}: {reason}")


def asarray(array, name: str):
    """A CuPy array of the same memory where that is possible; NumPy arrays are copied to the current GPU."""
    import cupy

    if not is_gpu_array(array):
        array = np.asarray(array)
        return _or_memory_error(array.nbytes, name, lambda: cupy.asarray(array))
    array = cupy.asarray(array) if hasattr(array, "__cuda_array_interface__") else cupy.from_dlpack(array)
    current = cupy.cuda.runtime.getDevice()
    if array.device.id != current:
        raise ValueError(
            f"{name}: lies on GPU {array.device.id}, the current one is {current}: "
            f"use cupy.cuda.Device({array.device.id})"
        )
    return array


def _or_memory_error(n_bytes: int, what: str, make):
    """make(), or a MemoryError that names how many bytes were asked for."""
    import cupy

    try:
        return make()
    except cupy.cuda.memory.OutOfMemoryError:
        raise MemoryError(f"{what}: the GPU has no room for {n_bytes} bytes") from None


def _allocate(n_bytes: int, what: str):
    """Bytes of CuPy's pool."""
    import cupy

    return _or_memory_error(n_bytes, what, lambda: cupy.empty(n_bytes, dtype=np.uint8))


def empty(shape, dtype=np.float64):
    """An array on the current GPU."""
    shape = (shape,) if np.isscalar(shape) else tuple(shape)
    return _allocate(math.prod(shape) * np.dtype(dtype).itemsize, "arrays").view(dtype).reshape(shape)


def to_host(array, out: np.ndarray | None = None) -> np.ndarray:
    """The array as NumPy's; waits for the device."""
    import cupy

    return cupy.asnumpy(array, out=out)


def _address(array):
    return None if array is None else array.data.ptr


def _stream() -> int:
    import cupy

    return cupy.cuda.get_current_stream().ptr


def call(name: str, dtype, *arguments, workspace=None) -> None:
    """A kernel on the current stream; `workspace` names the function for its scratch, and that one's arguments."""
    library = _cuda.library()
    space = None
    if workspace is not None:
        space = _allocate(library.workspace_bytes(workspace[0], dtype, *workspace[1:]), name)
        arguments += (space.data.ptr, space.nbytes)
    library.call(name, dtype, *arguments, _stream())


@lru_cache(maxsize=128)
def _uploaded(data: bytes, device: int, stream: int):
    # A copy for each stream: CuPy gives the memory of one that is forgotten to the stream that allocated it.
    import cupy

    return cupy.asarray(np.frombuffer(data or bytes(1), dtype=np.uint8))


def on_device(array: np.ndarray):
    """The bytes of a small array in device memory, copied there once for all calls with equal contents."""
    import cupy

    return _uploaded(array.tobytes(), cupy.cuda.runtime.getDevice(), _stream())


def _volume(theory: np.ndarray) -> int:
    return math.prod(theory["extent"][0, : theory["ndim"][0]].tolist())


def flow_record(volume: int, layers: np.ndarray, weights) -> tuple[np.ndarray, int, tuple]:
    """lfq_flow, the address of its layers on the device, and what must live as long."""
    if not is_gpu_array(weights):
        weights = on_device(weights)
    device_layers = on_device(layers)
    record = np.zeros(1, dtype=_cuda.FLOW_RECORD)
    record["volume"], record["n_weights"], record["n_layers"] = volume, weights.nbytes // 8, layers.size
    record["layers"], record["weights"] = layers.ctypes.data, weights.data.ptr
    return record, device_layers.data.ptr, (weights, device_layers, layers)


# ---- as in lfq._core ---------------------------------------------------------------------------


def normal(seed, purpose, trajectory, first_chain, n_chains, out, n_threads=0):
    n = out.size // n_chains if n_chains else 0
    call("normal", out.dtype, seed, purpose, trajectory, first_chain, n_chains, n, _address(out))


def phi4_action(theory, phi, action, n_threads=0):
    n = phi.size // _volume(theory)
    call("phi4_action", phi.dtype, theory, n, _address(phi), _address(action), workspace=("phi4", theory, n))


def phi4_force(theory, phi, force, n_threads=0):
    call("phi4_force", phi.dtype, theory, phi.size // _volume(theory), _address(phi), _address(force))


def phi4_observables(theory, phi, smear, observables, n_threads=0):
    n = phi.size // _volume(theory)
    call(
        "phi4_observables",
        phi.dtype,
        theory,
        n,
        _address(phi),
        smear,
        _address(observables),
        workspace=("phi4", theory, n),
    )


def _of_flow(name, volume, layers, weights, z, *arrays, target=()):
    """A function of a flow, of a target if there is one, and of arrays that begin with latents or fields."""
    flow, device_layers, _alive = flow_record(volume, layers, weights)
    n = z.size // volume
    addresses = [_address(array) for array in (z, *arrays)]
    call(name, z.dtype, flow, device_layers, *target, n, *addresses, workspace=("flow", flow, n))


def flow_forward(volume, layers, weights, z, x, log_det, n_threads=0):
    _of_flow("flow_forward", volume, layers, weights, z, x, log_det)


def flow_inverse(volume, layers, weights, x, z, log_det, n_threads=0):
    _of_flow("flow_inverse", volume, layers, weights, x, z, log_det)


def flow_vjp(volume, layers, weights, z, dx, dlog_det, dz, dweights, n_threads=0):
    _of_flow("flow_vjp", volume, layers, weights, z, dx, dlog_det, dz, dweights)


def flow_loss(volume, layers, weights, theory, z, action, log_det, dweights, n_threads=0):
    _of_flow("flow_loss", volume, layers, weights, z, action, log_det, dweights, target=(theory,))


def pullback_force(volume, layers, weights, theory, z, action, force, n_threads=0):
    _of_flow("pullback_force", volume, layers, weights, z, action, force, target=(theory,))


def evolve(layers, weights, theory, settings, z, momenta, n_threads=0):
    volume = _volume(theory)
    n = z.size // volume
    if layers is None:
        call("evolve", z.dtype, theory, settings, n, _address(z), _address(momenta), workspace=("hmc", theory, n))
        return
    flow, device_layers, _alive = flow_record(volume, layers, weights)
    call(
        "flow_evolve",
        z.dtype,
        flow,
        device_layers,
        theory,
        settings,
        n,
        _address(z),
        _address(momenta),
        workspace=("flow", flow, n),
    )


def hmc(layers, weights, theory, settings, z, phi, dh, accepted, smear, observables, n_threads=0):
    """dh, accepted and observables are NumPy arrays; they are filled when this returns."""
    volume = _volume(theory)
    n = z.size // volume
    device_dh, device_accepted = empty(dh.shape), empty(accepted.shape, np.uint8)
    device_observables = empty(observables.shape) if observables.size else None
    outputs = (_address(device_dh), _address(device_accepted), smear, _address(device_observables))
    if layers is None:
        resident = _cuda.library().call("resident", z.dtype, theory)
        scratch = ("hmc", theory, 0 if resident else n)
        call("hmc", z.dtype, theory, settings, 0, n, _address(z), *outputs, workspace=scratch)
    else:
        flow, device_layers, _alive = flow_record(volume, layers, weights)
        call(
            "flow_hmc",
            z.dtype,
            flow,
            device_layers,
            theory,
            settings,
            n,
            _address(z),
            _address(phi),
            *outputs,
            workspace=("flow", flow, n),
        )
    to_host(device_dh, dh)
    to_host(device_accepted, accepted)
    if observables.size:
        to_host(device_observables, observables)
    if not np.isfinite(dh).all():
        trajectory, chain = min(np.argwhere(~np.isfinite(dh)).tolist(), key=lambda place: place[::-1])
        raise _core.NotFiniteError(
            f"dH or the field is {dh[trajectory, chain]} in chain {int(settings['first_chain'][0]) + chain} "
            f"(trajectory {int(settings['first_trajectory'][0]) + trajectory}): "
            f"the step size {settings['step_size'][0]} may be too large"
        )
