"""The functions of lfq.h inside Numba functions, bound by name so that compiled code can be cached.

Every function of the C interface is here under its own name and with its own arguments, for Python and for `njit` code
alike (also parallel, nogil, cached)::

    status = native.lfq_phi4_action_f64(theory, n, phi, action, workspace, workspace.size, n_threads)

Where C takes a pointer, give a C-contiguous array of that type, None for null, or an address. Structures are arrays
too: `theory_record`, `flow_record`, `hmc_record`. Numba finds this module by the entry point ``numba_extensions``, and
with it `lfq.Phi4` as an argument of `njit` functions: `theory.action(phi)`, `theory.force(phi)`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin, lower_constant
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import (
    NativeValue,
    intrinsic,
    make_attribute_wrapper,
    models,
    overload,
    overload_attribute,
    overload_method,
    register_model,
    typeof_impl,
    unbox,
)

from ._cuda import FLOW_RECORD
from .actions import Phi4

# What each letter of a signature stands for. Pointers: v to a structure, r to the type of fields, others by name.
_NUMBERS = {
    "i": (types.int32, ctypes.c_int32),
    "l": (types.int64, ctypes.c_int64),
    "u": (types.uint64, ctypes.c_uint64),
    "x": (types.float64, ctypes.c_double),
    "z": (types.uintp, ctypes.c_size_t),
}
_POINTERS = {"v": None, "d": types.float64, "b": types.uint8, "k": types.int64, "w": types.uint32}

# The functions that have a twin for each type of field, as result:arguments.
_TYPED = {
    "normal": "i:uiuullri",
    "phi4_workspace": "z:vli",
    "phi4_action": "i:vlrdvzi",
    "phi4_force": "i:vlrrvzi",
    "phi4_observables": "i:vlrddvzi",
    "flow_workspace": "z:vli",
    "flow_forward": "i:vlrrdvzi",
    "flow_inverse": "i:vlrrdvzi",
    "flow_vjp": "i:vlrrdrdvzi",
    "flow_inverse_vjp_workspace": "z:vli",
    "flow_inverse_vjp": "i:vlrrdrdvzi",
    "flow_loss": "i:vvlrdddvzi",
    "pullback_force": "i:vvlrdrvzi",
    "hmc_workspace": "z:vvli",
    "evolve": "i:vvvlrrvzi",
    "hmc": "i:vvvlrrdbddvvzi",
    "fourier_workspace": "z:vli",
    "fourier_evolve": "i:vvxlrrvzi",
    "fourier_hmc": "i:vvxlrdbddvvzi",
    "cluster_workspace": "z:vli",
    "cluster_update": "i:vvuuulrkvzi",
    "cluster_hmc_workspace": "z:vli",
    "cluster_hmc": "i:vvvlrdbkddvvzi",
    "heat_bath_workspace": "z:vli",
    "heat_bath": "i:vvvlrkkddvvzi",
    "custom_workspace": "z:vvli",
    "custom_force": "i:vvlrdrvzi",
    "custom_evolve": "i:vvvlrrvzi",
    "custom_hmc": "i:vvvlrrdbddvvzi",
    "custom_loss": "i:vvlrdddvzi",
}
_UNTYPED = {
    "abi_version": "i:",
    "max_threads": "i:",
    "uniform": "i:uiululd",
    "layer_n_weights": "l:v",
    "flow_check": "i:v",
    "flow_check_layers": "i:v",
    "phi4_check": "i:v",
    "hmc_check": "i:vl",
}

SIGNATURES = {
    f"lfq_{name}_{suffix}": (spec, real)
    for name, spec in _TYPED.items()
    for suffix, real in (("f32", types.float32), ("f64", types.float64))
} | {f"lfq_{name}": (spec, None) for name, spec in _UNTYPED.items()}

_path = next(Path(__file__).parent.glob("liblfq.*"))
binding.load_library_permanently(str(_path))
_library = ctypes.CDLL(str(_path))
_library.lfq_last_error.restype = ctypes.c_char_p

__all__ = [
    "SIGNATURES", "action", "advance", "custom_loss", "flow_record", "hmc_record", "last_error", "loss", "normal",
    "theory_record", "workspace", *SIGNATURES,
]  # fmt: skip


def last_error() -> str:
    """What the last kernel that failed on this thread complained about."""
    return _library.lfq_last_error().decode()


def _bind(name: str, spec: str, real) -> None:
    """Defines the function `name` of lfq.h for Python and for Numba."""
    result, arguments = spec.split(":")
    targets = [real if letter == "r" else _POINTERS.get(letter) for letter in arguments]
    foreign = getattr(_library, name)
    foreign.restype = _NUMBERS[result][1]
    foreign.argtypes = [_NUMBERS[a][1] if a in _NUMBERS else ctypes.c_void_p for a in arguments]

    def wrong(position, given):
        wanted = "C-contiguous" if targets[position] is None else f"C-contiguous {targets[position]}"
        return TypeError(f"{name}: argument {position + 1} must be a {wanted} array, None or an address, got {given}")

    def function(*values):
        if len(values) != len(arguments):
            raise TypeError(f"{name}: takes {len(arguments)} arguments, got {len(values)}")
        converted = []
        for position, (letter, value) in enumerate(zip(arguments, values, strict=True)):
            if letter not in _NUMBERS and isinstance(value, np.ndarray):
                target = targets[position]
                if not value.flags.c_contiguous or (target and value.dtype.name != target.name):
                    raise wrong(position, f"{value.dtype} {value.flags.c_contiguous=}")
                value = value.ctypes.data
            converted.append(value)
        return foreign(*converted)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{name} of lfq.h."
    globals()[name] = function

    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if kws or len(args) != len(arguments):
                raise TypeError(f"{name}: takes {len(arguments)} arguments, got {len(args)}")
            accepted = []
            for position, (letter, given) in enumerate(zip(arguments, args, strict=True)):
                if letter in _NUMBERS:
                    accepted.append(_NUMBERS[letter][0])
                    continue
                target = targets[position]
                if isinstance(given, types.Array):
                    fits = given.layout == "C" and (target is None or given.dtype == target)
                elif isinstance(given, types.Optional):
                    fits = False
                else:
                    fits = isinstance(given, (types.Integer, types.IntegerLiteral, types.NoneType))
                if not fits:
                    raise wrong(position, given)
                accepted.append(types.intp if isinstance(given, types.IntegerLiteral) else given)
            return signature(_NUMBERS[result][0], *accepted)

    @lower_builtin(function, types.VarArg(types.Any))
    def lower(context, builder, sig, args):
        pointer = ir.IntType(8).as_pointer()
        values = []
        for letter, kind, value in zip(arguments, sig.args, args, strict=True):
            if letter in _NUMBERS:
                values.append(value)
            elif isinstance(kind, types.Array):
                values.append(builder.bitcast(context.make_array(kind)(context, builder, value).data, pointer))
            elif isinstance(kind, types.NoneType):
                values.append(ir.Constant(pointer, None))
            else:
                values.append(builder.inttoptr(context.cast(builder, value, kind, types.intp), pointer))
        kind = ir.FunctionType(context.get_value_type(sig.return_type), [value.type for value in values])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


for _name, _signature in SIGNATURES.items():
    _bind(_name, *_signature)


# ---- structures -----------------------------------------------------------------------------


def theory_record(theory: Phi4) -> np.ndarray:
    """The lfq_phi4 of a theory."""
    return theory._record()


def hmc_record(hmc, n_samples: int, thin=1, seed=0, first_chain=0, trajectory=0) -> np.ndarray:
    """The lfq_hmc of an `lfq.HMC`, for a call that starts at a trajectory."""
    return hmc._settings(n_samples, thin, seed, first_chain, trajectory)


def flow_record(flow, shape) -> np.ndarray:
    """The lfq_flow of a flow for fields of a shape.

    Returns
    -------
    ndarray of uint8
        The structure, and behind it its layers and a copy of its weights: it points into itself, so it must be
        used where it is and not copied.
    """
    layers, weights = flow.program(shape), flow.weights
    record = np.zeros(FLOW_RECORD.itemsize + layers.nbytes + weights.nbytes, dtype=np.uint8)
    begin, end = FLOW_RECORD.itemsize, FLOW_RECORD.itemsize + layers.nbytes
    head = record[:begin].view(FLOW_RECORD)
    head["volume"], head["n_weights"], head["n_layers"] = int(np.prod(shape)), weights.size, layers.size
    head["layers"], head["weights"] = record.ctypes.data + begin, record.ctypes.data + end
    record[begin:end], record[end:] = layers.view(np.uint8), weights.view(np.uint8)
    return record


def workspace(name: str, dtype, *arguments) -> np.ndarray:
    """Scratch for a kernel, by its lfq_*_workspace function.

    Parameters
    ----------
    name : str
        "phi4", "flow", "hmc", "custom", ...
    dtype : float32 or float64
    *arguments
        Of the function.
    """
    suffix = "f32" if np.dtype(dtype).itemsize == 4 else "f64"
    return np.empty(globals()[f"lfq_{name}_workspace_{suffix}"](*arguments), dtype=np.uint8)


# ---- for either type of field ----------------------------------------------------------------


def _kernel(name: str, array):
    """The kernel for the type of an array argument."""
    suffix = {types.float32: "f32", types.float64: "f64"}.get(getattr(array, "dtype", None))
    return None if suffix is None else globals()[f"lfq_{name}_{suffix}"]


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


def custom_loss(flow, action, latents, values, log_det, gradient, space, n_threads):
    """lfq_custom_loss at latents (n_chains, volume); returns its status."""
    raise NotImplementedError("for njit code")


@overload(advance)
def _advance(theory, settings, fields, space, n_threads):
    kernel = _kernel("hmc", fields)

    def call(theory, settings, fields, space, n_threads):
        return kernel(
            None, theory, settings, len(fields), fields, None, None, None, None, None, None,
            space, space.size, n_threads,
        )  # fmt: skip

    return kernel and call


@overload(normal)
def _normal(seed, purpose, trajectory, values, n_threads):
    kernel = _kernel("normal", values)

    def call(seed, purpose, trajectory, values, n_threads):
        return kernel(seed, purpose, trajectory, 0, values.shape[0], values.shape[1], values, n_threads)

    return kernel and call


@overload(action)
def _action(theory, fields, values, space, n_threads):
    kernel = _kernel("phi4_action", fields)

    def call(theory, fields, values, space, n_threads):
        return kernel(theory, len(fields), fields, values, space, space.size, n_threads)

    return kernel and call


def _overload_loss(function, name):
    @overload(function)
    def _loss(flow, theory, latents, values, log_det, gradient, space, n_threads):
        kernel = _kernel(name, latents)

        def call(flow, theory, latents, values, log_det, gradient, space, n_threads):
            return kernel(
                flow, theory, len(latents), latents, values, log_det, gradient, space, space.size, n_threads
            )  # fmt: skip

        return kernel and call


_overload_loss(loss, "flow_loss")
_overload_loss(custom_loss, "custom_loss")


# ---- Phi4 as an argument ----------------------------------------------------------------------


class Phi4Type(types.Type):
    """`lfq.Phi4` on a lattice of `ndim` axes."""

    def __init__(self, ndim: int):
        self.ndim = ndim
        super().__init__(name=f"lfq.Phi4({ndim}d)")

    @property
    def members(self):
        return [("shape", types.UniTuple(types.int64, self.ndim)), ("beta", types.float64), ("lam", types.float64)]


@typeof_impl.register(Phi4)
def _typeof_phi4(value, context):
    return Phi4Type(value.ndim)


@register_model(Phi4Type)
class _Phi4Model(models.StructModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.members)


for _field in ("shape", "beta", "lam"):
    make_attribute_wrapper(Phi4Type, _field, _field)


@unbox(Phi4Type)
def _unbox_phi4(kind, value, c):
    theory = cgutils.create_struct_proxy(kind)(c.context, c.builder)
    failed = cgutils.alloca_once_value(c.builder, cgutils.false_bit)
    for name, member in kind.members:
        attribute = c.pyapi.object_getattr_string(value, name)
        native_value = c.unbox(member, attribute)
        c.pyapi.decref(attribute)
        setattr(theory, name, native_value.value)
        c.builder.store(c.builder.or_(c.builder.load(failed), native_value.is_error), failed)
    return NativeValue(theory._getvalue(), is_error=c.builder.load(failed))


@lower_constant(Phi4Type)
def _constant_phi4(context, builder, kind, value):
    theory = cgutils.create_struct_proxy(kind)(context, builder)
    theory.shape = context.get_constant_generic(builder, types.UniTuple(types.int64, kind.ndim), value.shape)
    theory.beta = context.get_constant(types.float64, value.beta)
    theory.lam = context.get_constant(types.float64, value.lam)
    return theory._getvalue()


@overload_attribute(Phi4Type, "volume")
def _phi4_volume(theory):
    def volume(theory):
        product = 1
        for extent in theory.shape:
            product *= extent
        return product

    return volume


@njit(cache=True)
def _phi4_record(shape, beta, lam):
    """An lfq_phi4 as words of 8 bytes."""
    record = np.zeros(5, dtype=np.int64)
    words = record.view(np.int32)
    words[0] = len(shape)
    for i, extent in enumerate(shape):
        words[1 + i] = extent
    couplings = record.view(np.float64)
    couplings[3], couplings[4] = beta, lam
    return record


@intrinsic
def _leading(typingctx, shape, fixed):
    """The axes of a field before those of the lattice."""
    n = shape.count - fixed.count
    if n < 0:
        return None
    result = types.UniTuple(types.intp, n)

    def codegen(context, builder, sig, args):
        values = [builder.extract_value(args[0], i) for i in range(n)]
        return context.make_tuple(builder, sig.return_type, values)

    return result(shape, fixed), codegen


@njit(cache=True)
def _check_lattice(shape, lattice):
    for i in range(len(lattice)):
        if shape[len(shape) - len(lattice) + i] != lattice[i]:
            raise ValueError("phi: its shape does not end in the lattice")


def _phi4_method(name: str, kernel_name: str, like_field: bool):
    @overload_method(Phi4Type, name)
    def method(theory, phi, n_threads=1):
        if not (isinstance(phi, types.Array) and phi.layout == "C" and phi.ndim >= theory.ndim):
            return None
        kernel, size = _kernel(kernel_name, phi), _kernel("phi4_workspace", phi)

        def call(theory, phi, n_threads=1):
            _check_lattice(phi.shape, theory.shape)
            if like_field:
                out = np.empty_like(phi)
            else:
                out = np.empty(_leading(phi.shape, theory.shape), dtype=np.float64)
            record, n = _phi4_record(theory.shape, theory.beta, theory.lam), phi.size // theory.volume
            space = np.empty(size(record, n, n_threads), dtype=np.uint8)
            if kernel(record, n, phi, out, space, space.size, n_threads) != 0:
                raise ValueError("phi: holds NaN or Inf")
            return out

        return kernel and call


_phi4_method("action", "phi4_action", like_field=False)
_phi4_method("force", "phi4_force", like_field=True)


def _init() -> None:
    """What Numba calls before it compiles; importing this module does everything."""
