"""Flows: invertible maps between latents and fields, composed of layers with hand-written gradients."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from . import _core, _gpu
from ._kernels import backend, check_count, check_finite, check_seed, check_shape, check_threads, fields, real_array
from .io import FileFormatError, checksum, load_tensors, save_tensors

__all__ = ["AffineFlow", "Compose", "Flow", "InterleaveMap", "MultiscaleFlow", "UpsampleMap", "load_flow"]

MAX_WEIGHTS = 1 << 26
"""Most weights of a flow: half a GiB of them."""

CHECKERBOARD = "ce|o o|ce"
COARSE_TO_FINE = "e|c c|e e|c o|ce c|eo e|co o|ce"
"""The order of couplings in which `MultiscaleFlow` fills a level by default."""

_ACTIVATIONS = {"tanh": 0, "leaky_relu": 1}
_SITE_MAP = np.log([0.5, 0.5, 1.0])
"""log a, log b, log c of a site map to begin with: the identity up to third order, half of it bent."""
_NOISE, _INTERPOLATION = 0.8, 0.3
"""Width of the noise at the new sites of a level, and factor of the mean of the nearest coarse sites, to begin with."""
_SCALES = {"exp(-|s|)": 0, "exp(s)": 1, "even": 2, "site": 3}


def _choice(value, table: dict[str, int], name: str) -> str:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, table))}, got {value!r}")
    return value


def _broadcast(array, shape: tuple[int, ...], dtype, name: str, like) -> np.ndarray:
    """A cotangent in full, where `like` lives."""
    array, _ = fields(array, (), name, gpu=True)
    if _gpu.is_gpu_array(like):
        array = _gpu.asarray(array, name)
    elif _gpu.is_gpu_array(array):
        raise TypeError(f"{name}: lies on a GPU, the latents do not")
    try:
        return np.broadcast_to(array, shape).astype(dtype, order="C")
    except ValueError:
        raise ValueError(f"{name}: shape {array.shape} does not fit {shape}") from None


def _sublattices(letters: str, ndim: int) -> int:
    """The sublattices that letters of an order stand for, as bits."""

    def letter(sublattice: int) -> str:
        n_odd = sublattice.bit_count()
        return "eo"[n_odd % 2] if n_odd else "c"

    return sum(1 << s for s in range(2**ndim) if letter(s) in letters)


def _couplings(order, ndim: int) -> list[tuple[int, int, int]]:
    """(parity, active, frozen) of each coupling of an order; sublattices as bits."""
    if not isinstance(order, str) or not order.split():
        raise ValueError(f"order: must be a string of couplings like {CHECKERBOARD!r}, got {order!r}")
    found = []
    for word in order.split():
        active, bar, frozen = word.partition("|")
        letters = active + frozen
        if not (active and bar and frozen) or set(letters) - set("ceo") or len(set(letters)) < len(letters):
            raise ValueError(f"order: {word!r} is not like 'o|ce', of the letters c, e and o, each at most once")
        if "o" in active and active != "o":
            raise ValueError(f"order: {word!r} changes odd sites together with even ones")
        bits = _sublattices(active, ndim), _sublattices(frozen, ndim)
        if 0 in bits:
            raise ValueError(f"order: {word!r} needs sites that a lattice of {ndim} dimension(s) does not have")
        found.append((int(active == "o"), *bits))
    return found


class Flow(ABC):
    """An invertible map x = f(z) with a known log-determinant.

    Latents z and fields x are arrays (..., *lattice). Weights do not depend on the lattice: a flow runs
    at any size its layers allow. A flow that enlarges lattices reads z as one flat vector, the coarsest
    field first.

    Attributes
    ----------
    ndim : int
        Dimensions of the lattice.
    n_weights : int
    """

    ndim: int

    @property
    @abstractmethod
    def weights(self) -> np.ndarray:
        """All weights, one float64 vector (a copy; assign to change)."""

    @property
    def n_weights(self) -> int:
        return self.weights.size

    @abstractmethod
    def program(self, shape: tuple[int, ...]) -> np.ndarray:
        """The layers for fields of this shape, as records for the kernels.

        Raises
        ------
        ValueError
            The flow has no form at this shape (an odd extent, the wrong number of axes).
        """

    @abstractmethod
    def to_dict(self) -> dict:
        """The structure of the flow without its weights, JSON-able."""

    def _even_shape(self, shape, why: str) -> tuple[int, ...]:
        shape = check_shape(shape)
        if len(shape) != self.ndim:
            raise ValueError(f"shape: {shape} has {len(shape)} axes, the flow was made for {self.ndim}")
        if any(extent % 2 for extent in shape):
            raise ValueError(f"shape: {shape} has an odd extent; {why}")
        return shape

    def _check_weights(self, weights) -> np.ndarray:
        try:
            weights = np.array(weights, dtype=np.float64)
        except OverflowError:
            raise ValueError("weights: an integer beyond the range of doubles") from None
        if weights.shape != (self.n_weights,):
            raise ValueError(f"weights: shape {weights.shape}, must be ({self.n_weights},)")
        return check_finite(weights, "weights")

    def _arguments(self, array, name: str, gpu: bool = True):
        array = real_array(array, name, gpu)
        if array.ndim < self.ndim:
            raise ValueError(f"{name}: shape {array.shape} has fewer than the {self.ndim} axes of the lattice")
        shape = tuple(array.shape[array.ndim - self.ndim :])
        array, leading = fields(array, shape, name, gpu)
        return array, leading, self.program(shape), math.prod(shape)

    def forward(self, z, n_threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Map latents to fields.

        Parameters
        ----------
        z : array_like, shape (..., *lattice)
            On a GPU or not: results lie where z does.

        Returns
        -------
        x : ndarray, shape and dtype of z
        log_det : ndarray of float64, shape (...)
            log|det df/dz|.

        Raises
        ------
        ValueError
            The lattice does not fit the layers.
        NotFiniteError
            z or a weight is NaN or Inf. On a GPU these end up in the results instead.
        """
        z, leading, layers, volume = self._arguments(z, "z")
        kernels, empty = backend(z)
        x, log_det = empty(z.shape, z.dtype), empty(leading)
        kernels.flow_forward(volume, layers, self.weights, z, x, log_det, check_threads(n_threads))
        return x, log_det

    def inverse(self, x, n_threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Map fields to latents; log_det is that of the inverse map, log|det dz/dx|. Otherwise as `forward`."""
        x, leading, layers, volume = self._arguments(x, "x")
        kernels, empty = backend(x)
        z, log_det = empty(x.shape, x.dtype), empty(leading)
        kernels.flow_inverse(volume, layers, self.weights, x, z, log_det, check_threads(n_threads))
        return z, log_det

    def vjp(self, z, dx, dlog_det, weights: bool = False, n_threads: int | None = None):
        """Pull cotangents back through the flow.

        Parameters
        ----------
        z : array_like, shape (..., *lattice)
            Where to differentiate.
        dx : array_like, shape of z
            dL/dx for a scalar function L of (x, log_det); broadcast.
        dlog_det : array_like, shape (...)
            dL/dlog_det; broadcast.
        weights : bool
            Whether to return dL/dweights too.

        Returns
        -------
        dz : ndarray, shape and dtype of z
        dweights : ndarray of float64, shape (n_weights,)
            Summed over the leading axes. Only with `weights`.
        """
        return self._vjp("flow_vjp", z, dx, dlog_det, "dx", weights, n_threads)

    def inverse_vjp(self, z, dz, dlog_det, weights: bool = False, n_threads: int | None = None):
        """Pull cotangents back through the inverse.

        Parameters
        ----------
        z : array_like, shape (..., *lattice)
            f^-1 of the field at which to differentiate.
        dz : array_like, shape of z
            dL/dz for a scalar function L of (z, log_det) = `inverse` (x); broadcast.
        dlog_det : array_like, shape (...)
            dL/dlog_det; broadcast.
        weights : bool
            Whether to return dL/dweights too.

        Returns
        -------
        dx : ndarray, shape and dtype of z
        dweights : ndarray of float64, shape (n_weights,)
            Summed over the leading axes. Only with `weights`.
        """
        return self._vjp("flow_inverse_vjp", z, dz, dlog_det, "dz", weights, n_threads)

    def _vjp(self, kernel: str, z, cotangent, dlog_det, name: str, weights: bool, n_threads):
        z, leading, layers, volume = self._arguments(z, "z", gpu=hasattr(_gpu, kernel))
        kernels, empty = backend(z)
        cotangent = _broadcast(cotangent, z.shape, z.dtype, name, z)
        dlog_det = _broadcast(dlog_det, leading, np.float64, "dlog_det", z)
        if kernels is _core:
            check_finite(dlog_det, "dlog_det")
        pulled = empty(z.shape, z.dtype)
        dweights = empty(self.n_weights) if weights else None
        getattr(kernels, kernel)(
            volume, layers, self.weights, z, cotangent, dlog_det, pulled, dweights, check_threads(n_threads)
        )
        return (pulled, dweights) if weights else pulled

    def copy(self) -> Flow:
        """An independent copy."""
        twin = _from_dict(self.to_dict())
        twin.weights = self.weights
        return twin

    def describe(self) -> dict:
        """The structure and a checksum of the weights: what tells this flow from another."""
        return self.to_dict() | {"weights": checksum({"weights": self.weights}, {})}

    def save(self, path) -> None:
        """Write the flow to a safetensors file.

        The file holds one float64 tensor ``weights`` and, in its metadata, ``lfq_flow``: the JSON of
        `to_dict`. It is written to a temporary file and renamed.
        """
        save_tensors(path, {"weights": self.weights}, {"lfq_flow": json.dumps(self.to_dict())})


class AffineFlow(Flow):
    """Checkerboard couplings (arXiv:2302.08408 sec. 3, arXiv:2310.03381).

    Each block updates the even sites given the odd ones, then the odd sites given the updated even ones,
    then rescales the field. (s, t) come from a convolutional net of the frozen sites, each half-update its own.

    Parameters
    ----------
    kernel_size : int
        3, 5, 7 or 9.
    n_blocks : int
    hidden : sequence of int
        Channels of the hidden layers of each net, at most 4 layers; none in the papers.
    activation : {"tanh", "leaky_relu"}
        Of the hidden layers. The last layer always ends in tanh.
    bias : bool
        Biases break the symmetry phi -> -phi.
    scale : {"exp(-|s|)", "exp(s)", "even", "site"}
        How a site changes. The first two: y = x exp(-\\|s\\|) + t or x exp(s) + t with (s, t) = tanh of the net's
        outputs. "even": from h_c = tanh of `features` outputs, y = x exp(sum_c b_c h_c^2) + sum_c a_c h_c with trained
        a and b. "site" is not affine: y = a v + b tanh(c v) + w, v = x + u, with (u, w) the net's outputs (no tanh) and
        trained a, b and c; the conditional density of a site given its neighbours, exp(-V(phi) + beta h phi), is close
        to a Gaussian shifted by a multiple of h, seen through such a function, and shifted again. All but "exp(s)",
        with odd activations and no bias, have f(-z) = -f(z). The force through "exp(-|s|)" jumps where s changes sign,
        the others are smooth.
    features : int
        1, 2, 4 or 8, with scale "even" only.
    sublattices : bool
        Whether each of the 2^(ndim-1) sublattices that a half-update changes, told apart by which coordinates are even,
        has a net and a site map of its own, as suits fields which come from a coarser lattice. Without hidden layers.
    order : str
        The couplings of a block, one behind the other, each "sites it changes|sites its nets see": c stands for the
        sites with even coordinates only, those of the lattice twice as coarse, e for the other even ones, o for the odd
        ones. Any but the checkerboard's goes with `sublattices`.
    rescale : bool
        Whether a block ends in y = exp(a) x.
    seed : int
        Of the initial weights: normal of standard deviation 1/sqrt(fan-in), a tenth of that in the last
        layer of a net that has hidden ones, a third where it has none.
    ndim : int
        Dimensions of the lattice, 1 to 4.

    Examples
    --------
    >>> flow = AffineFlow(kernel_size=3, n_blocks=1)
    >>> flow.n_weights
    37
    """

    def __init__(
        self, kernel_size=3, n_blocks=1, hidden=(), activation="tanh", bias=False, scale="exp(-|s|)",
        rescale=True, seed=0, ndim=2, features=None, sublattices=False, order=CHECKERBOARD,
    ):  # fmt: skip
        self.kernel_size = check_count(kernel_size, "kernel_size", 3, 9)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: must be odd, got {self.kernel_size}")
        self.n_blocks = check_count(n_blocks, "n_blocks", 1, 10000)
        if not isinstance(hidden, Iterable):
            raise TypeError(f"hidden: must be a sequence of channel counts, got {hidden!r}")
        self.hidden = tuple(check_count(c, "hidden", 1, _core.MAX_CHANNELS) for c in hidden)
        if len(self.hidden) > _core.MAX_HIDDEN:
            raise ValueError(f"hidden: at most {_core.MAX_HIDDEN} layers, got {len(self.hidden)}")
        self.activation = _choice(activation, _ACTIVATIONS, "activation")
        self.bias = bool(bias)
        self.scale = _choice(scale, _SCALES, "scale")
        if (features is not None) != (scale == "even"):
            raise ValueError(f'features: goes with scale "even", and that with features; got {features!r}')
        self.features = features
        if features is not None and check_count(features, "features", 1, 8) not in (1, 2, 4, 8):
            raise ValueError(f"features: must be 1, 2, 4 or 8, got {features}")
        self.sublattices = bool(sublattices)
        if self.sublattices and self.hidden:
            raise ValueError(f"sublattices: goes without hidden layers, got hidden={self.hidden}")
        self.rescale = bool(rescale)
        self.ndim = check_count(ndim, "ndim", 1, 4)
        self._block = _couplings(order, self.ndim)
        self.order = " ".join(order.split())
        if self.order != CHECKERBOARD and not self.sublattices:
            raise ValueError(f"order: {self.order!r} goes with sublattices=True")
        self._n_weights = int(_core.layer_n_weights(self.program((2,) * self.ndim)).sum())
        if self._n_weights > MAX_WEIGHTS:
            raise ValueError(f"AffineFlow: {self._n_weights} weights, at most {MAX_WEIGHTS}")
        # Drawn when first asked for: a structure from a file must not allocate before its weights were counted.
        self._seed, self._weights = check_seed(seed), None

    def _net_shapes(self) -> list[tuple[int, int]]:
        channels = (1, *self.hidden, self.features or 2)
        return list(zip(channels[:-1], channels[1:], strict=True))

    def _initial_weights(self, seed: int) -> np.ndarray:
        taps = self.kernel_size**self.ndim
        last = 0.1 if self.hidden else 1 / 3
        net = [
            part
            for n, (c_in, c_out) in enumerate(self._net_shapes())
            for part in (
                np.full(taps * c_in * c_out, (last if n == len(self.hidden) else 1) / np.sqrt(taps * c_in)),
                np.zeros(c_out * self.bias),
            )
        ]
        n = self.features or 0
        net += [np.full(n, 0.1), np.zeros(n)]
        means = np.zeros(sum(part.size for part in net))
        if self.scale == "site":
            net.append(np.zeros(3))
            means = np.concatenate([means, _SITE_MAP])
        # One net for each coupling, or for each sublattice that it changes.
        n = sum(active.bit_count() for _, active, _ in self._block) if self.sublattices else len(self._block)
        rescale = np.zeros(int(self.rescale))
        widths = np.tile(np.concatenate([*net * n, rescale]), self.n_blocks)
        means = np.tile(np.concatenate([np.tile(means, n), rescale]), self.n_blocks)
        normals = np.empty((1, widths.size))
        _core.normal(seed, _core.PURPOSES["weights"], 0, 0, 1, normals, 1)
        return means + widths * normals[0]

    @property
    def weights(self) -> np.ndarray:
        if self._weights is None:
            self._weights = self._initial_weights(self._seed)
        return self._weights.copy()

    @weights.setter
    def weights(self, values):
        self._weights = self._check_weights(values)

    @property
    def n_weights(self) -> int:
        return self._n_weights

    def program(self, shape) -> np.ndarray:
        shape = self._even_shape(shape, "the checkerboard needs even ones")
        block = np.zeros(len(self._block) + self.rescale, dtype=_core.layer_dtype)
        block["kind"] = _core.LAYERS["coupling"]
        for layer, (parity, active, frozen) in zip(block, self._block, strict=False):
            layer["parity"] = parity
            if active | frozen != 2 ** 2**self.ndim - 1 or active.bit_count() != frozen.bit_count():
                layer["active"], layer["frozen"] = active, frozen  # else all sites of a parity, and of the other
        if self.rescale:
            block["kind"][-1] = _core.LAYERS["rescale"]
        layers = np.tile(block, self.n_blocks)
        layers["ndim"] = self.ndim
        layers["extent"][:, : self.ndim] = shape
        couplings = layers["kind"] == _core.LAYERS["coupling"]
        layers["kernel_size"] = np.where(couplings, self.kernel_size, 0)
        layers["n_hidden"] = np.where(couplings, len(self.hidden), 0)
        for i, channels in enumerate(self.hidden):
            layers["hidden"][couplings, i] = channels
        layers["activation"] = np.where(couplings, _ACTIVATIONS[self.activation], 0)
        layers["bias"] = np.where(couplings, self.bias, 0)
        layers["scale"] = np.where(couplings, _SCALES[self.scale], 0)
        layers["n_features"] = np.where(couplings, self.features or 0, 0)
        layers["sublattices"] = np.where(couplings, self.sublattices, 0)
        layers["weight_offset"] = _offsets(layers)
        return layers

    def to_dict(self) -> dict:
        order = None if self.order == CHECKERBOARD else self.order
        options = {"features": self.features, "sublattices": self.sublattices, "order": order}
        return {
            "kind": "affine",
            "kernel_size": self.kernel_size,
            "n_blocks": self.n_blocks,
            "hidden": list(self.hidden),
            "activation": self.activation,
            "bias": self.bias,
            "scale": self.scale,
            "rescale": self.rescale,
            "ndim": self.ndim,
        } | {name: value for name, value in options.items() if value}

    @classmethod
    def from_dict(cls, structure: dict) -> AffineFlow:
        """A flow of this structure with its initial weights."""
        return cls(**{key: value for key, value in structure.items() if key != "kind"})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k != "kind")
        return f"AffineFlow({arguments})"


def _offsets(layers: np.ndarray) -> np.ndarray:
    sizes = _core.layer_n_weights(layers)
    return np.cumsum(sizes) - sizes


class _InterpolatingFlow(AffineFlow):
    """Site maps whose initial weights do what an `UpsampleMap` of a level's settings would do before them."""

    def _initial_weights(self, seed: int) -> np.ndarray:
        weights = super()._initial_weights(seed)
        filled = [s for _, active, _ in self._block for s in range(2**self.ndim) if active >> s & 1]
        taps = self.kernel_size**self.ndim
        sets = weights[: weights.size // self.n_blocks].reshape(len(filled), -1)
        for n, (sublattice, own) in enumerate(zip(filled, sets, strict=True)):
            if sublattice in (0, *filled[:n]):
                continue
            odd = [sublattice >> (self.ndim - 1 - axis) & 1 for axis in range(self.ndim)]
            steps = [(-1, 1) if is_odd else (0,) for is_odd in odd]
            nearest = np.zeros((self.kernel_size,) * self.ndim)
            nearest[np.ix_(*(self.kernel_size // 2 + np.array(step) for step in steps))] = 1
            own[:taps] += _INTERPOLATION / nearest.sum() * nearest.ravel()
            own[:taps] /= _NOISE
            own[[-3, -1]] += math.log(_NOISE)
        return weights


class _Enlarging(Flow):
    _kind: str

    def program(self, shape) -> np.ndarray:
        shape = self._even_shape(shape, "it cannot be halved")
        layer = np.zeros(1, dtype=_core.layer_dtype)
        layer["kind"] = _core.LAYERS[self._kind]
        layer["ndim"] = self.ndim
        layer["extent"][0, : self.ndim] = shape
        return layer

    def to_dict(self) -> dict:
        return {"kind": self._kind, "ndim": self.ndim}


class InterleaveMap(_Enlarging):
    """2^D copies of a coarse field, laid on the sublattices of the fine one: no weights, unit Jacobian."""

    _kind = "interleave"

    def __init__(self, ndim: int = 2):
        self.ndim = check_count(ndim, "ndim", 1, 4)

    @property
    def weights(self) -> np.ndarray:
        return np.empty(0)

    @weights.setter
    def weights(self, values):
        self._check_weights(values)


class UpsampleMap(_Enlarging):
    """A coarse field on the even sites; elsewhere the interpolation of its neighbours plus noise.

    Parameters
    ----------
    scale : float
        Of the coarse field, positive.
    width : float or sequence of ndim floats
        Standard deviation of the noise at sites with 1, ..., ndim odd coordinates, positive.
    interpolation : float or sequence of ndim floats
        Factor of the mean of the nearest coarse sites, likewise.
    """

    _kind = "upsample"

    def __init__(self, scale: float = 1.0, width=0.1, interpolation=1.0, ndim: int = 2):
        self.ndim = check_count(ndim, "ndim", 1, 4)
        scales = self._per_class(scale, "scale", 1)
        widths = self._per_class(width, "width", self.ndim)
        means = self._per_class(interpolation, "interpolation", self.ndim)
        for name, values in (("scale", scales), ("width", widths)):
            if not (values > 0).all():
                raise ValueError(f"{name}: must be positive, got {values}")
        self._weights = np.empty(1 + 2 * self.ndim)
        self._weights[0] = np.log(scales[0])
        self._weights[1::2], self._weights[2::2] = means, np.log(widths)

    @property
    def weights(self) -> np.ndarray:
        return self._weights.copy()

    @weights.setter
    def weights(self, values):
        self._weights = self._check_weights(values)

    @property
    def n_weights(self) -> int:
        return self._weights.size

    @staticmethod
    def _per_class(value, name: str, n: int) -> np.ndarray:
        try:
            values = np.array(np.broadcast_to(np.asarray(value, dtype=np.float64), (n,)))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}: must be a number{f' or {n} of them' if n > 1 else ''}, got {value!r}") from None
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: must be finite, got {value!r}")
        return values

    @property
    def scale(self) -> float:
        return float(np.exp(self._weights[0]))

    @property
    def interpolation(self) -> np.ndarray:
        return self._weights[1::2].copy()

    @property
    def width(self) -> np.ndarray:
        return np.exp(self._weights[2::2])


class Compose(Flow):
    """Flows one after another, the first acting on the latent first.

    Parameters
    ----------
    flows : sequence of Flow
        Of equal `ndim`. Each works on the lattice the one after it reads.
    """

    def __init__(self, flows):
        self.flows = tuple(flows)
        if not self.flows:
            raise ValueError("flows: must hold at least one flow")
        if not all(isinstance(flow, Flow) for flow in self.flows):
            raise TypeError("flows: must all be flows")
        self.ndim = self.flows[0].ndim
        if any(flow.ndim != self.ndim for flow in self.flows):
            raise ValueError("flows: differ in ndim")

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([flow.weights for flow in self.flows])

    @weights.setter
    def weights(self, values):
        values = self._check_weights(values)
        for flow in self.flows:
            flow.weights, values = values[: flow.n_weights], values[flow.n_weights :]

    @property
    def n_weights(self) -> int:
        return sum(flow.n_weights for flow in self.flows)

    def program(self, shape) -> np.ndarray:
        shape, parts = check_shape(shape), []
        for flow in reversed(self.flows):
            parts.append(flow.program(shape))
            for layer in parts[-1]:
                if layer["kind"] in (_core.LAYERS["interleave"], _core.LAYERS["upsample"]):
                    shape = tuple(extent // 2 for extent in shape)
        layers = np.concatenate(parts[::-1])
        layers["weight_offset"] = _offsets(layers)
        return layers

    def to_dict(self) -> dict:
        return {"kind": "compose", "flows": [flow.to_dict() for flow in self.flows]}


class MultiscaleFlow(Compose):
    """A field made from noise at every scale, from a lattice of a few sites to the finest.

    The coarsest field, best a single site, is noise. Each level puts the field so far on the even sites of a lattice
    twice as fine, noise of its own elsewhere (`UpsampleMap`), and sends all of it through blocks of that level. All
    noise is of unit width, and HMC moves that of all levels at once: a long mode of the field is an ordinary direction
    of the latents, unlike where coarse fields serve as a prior only (arXiv:2310.03381). HMC in the latents of a
    hierarchical map goes back to arXiv:1802.02840.

    Parameters
    ----------
    n_levels : int
        How often the lattice is made twice as fine: fields of extents L begin as noise on L / 2^n_levels.
    n_blocks : int
        Of each level.
    scale, kernel_size, hidden, features, sublattices, order
        Of the couplings, see `AffineFlow`; sublattices by default where there are no hidden layers. With them, from two
        dimensions on, the order is by default "e|c c|e e|c o|ce c|eo e|co o|ce": the other even sites given the coarse
        ones, these given those, and again those; then the odd ones, both kinds of even ones given all the rest, and the
        odd ones once more. Else it is the checkerboard's.
    seed : int
        Of the initial weights.
    ndim : int
        Dimensions of the lattice.
    interpolate : bool
        Whether a level interpolates the coarse field before its blocks (`UpsampleMap`) or lays bare noise beside it
        (`InterleaveMap`). By default it interpolates, except with site maps in the default order: the first coupling of
        each new site sees its nearest coarse ones and has an interpolation of its own.

    Examples
    --------
    >>> MultiscaleFlow(n_levels=3).program((8, 8))["extent"][0, :2].tolist()
    [2, 2]
    """

    def __init__(
        self, n_levels, n_blocks=1, scale="site", kernel_size=3, hidden=(), features=None, seed=0, ndim=2,
        sublattices=None, order=None, interpolate=None,
    ):  # fmt: skip
        self.n_levels = check_count(n_levels, "n_levels", 1, 16)
        own = not hidden if sublattices is None else bool(sublattices)
        if order is None:
            order = COARSE_TO_FINE if own and ndim != 1 else CHECKERBOARD
        if interpolate is None:
            interpolate = scale != "site" or not own or order != COARSE_TO_FINE
        self.interpolate = bool(interpolate)
        self._blocks = dict(
            n_blocks=n_blocks, scale=scale, kernel_size=kernel_size, hidden=list(hidden), features=features, ndim=ndim,
            sublattices=own, order=order,
        )  # fmt: skip
        seed, parts = check_seed(seed), []
        for level in range(self.n_levels):
            if self.interpolate:
                parts.append(UpsampleMap(scale=1.0, width=_NOISE, interpolation=_INTERPOLATION, ndim=ndim))
            else:
                parts.append(InterleaveMap(ndim))
            blocks = _InterpolatingFlow if not self.interpolate and scale == "site" and own else AffineFlow
            # A site map has a scale of its own.
            parts.append(blocks(**self._blocks, rescale=scale != "site", seed=(seed + level) % 2**64))
        super().__init__(parts)

    def refined(self) -> MultiscaleFlow:
        """A flow of one more level, whose weights are those of the finest one here."""
        finer = MultiscaleFlow(self.n_levels + 1, **self._blocks, interpolate=self.interpolate)
        finer.weights = np.concatenate([self.weights, *(flow.weights for flow in self.flows[-2:])])
        return finer

    def to_dict(self) -> dict:
        return {"kind": "multiscale", "n_levels": self.n_levels} | self._blocks | {"interpolate": self.interpolate}

    def __repr__(self) -> str:
        return f"MultiscaleFlow({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if k != 'kind')})"


def _from_dict(structure, depth: int = 0) -> Flow:
    if not isinstance(structure, dict) or depth > 8:
        raise ValueError("the flow's structure is not a table")
    arguments = {key: value for key, value in structure.items() if key != "kind"}
    kind = structure.get("kind")
    if kind == "compose":
        if set(arguments) != {"flows"} or not isinstance(arguments["flows"], list):
            raise ValueError("a composition holds a list of flows")
        return Compose([_from_dict(part, depth + 1) for part in arguments["flows"]])
    makers = {"affine": AffineFlow, "interleave": InterleaveMap, "multiscale": MultiscaleFlow, "upsample": UpsampleMap}
    if kind not in makers:
        raise ValueError(f"unknown kind of flow {kind!r}")
    if kind == "multiscale":
        # Of files that do not know them.
        arguments.setdefault("order", CHECKERBOARD)
        arguments.setdefault("interpolate", True)
    return makers[kind](**arguments)


def load_flow(path) -> Flow:
    """Read a flow written by `Flow.save`.

    Raises
    ------
    FileFormatError
        The file is not a flow, or is damaged; nothing in it is ever executed.
    OSError
        It cannot be read.
    """
    tensors, metadata = load_tensors(path)
    if set(tensors) != {"weights"} or "lfq_flow" not in metadata:
        raise FileFormatError(f"{path}: not an lfq flow")
    try:
        flow = _from_dict(json.loads(metadata["lfq_flow"]))
        flow.weights = tensors["weights"]
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        raise FileFormatError(f"{path}: not an lfq flow: {error}") from None
    return flow
