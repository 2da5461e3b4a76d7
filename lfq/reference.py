"""The definition of every kernel of lfq in plain NumPy, slow and readable.

Fields are arrays ``(..., *lattice)`` and everything is float64. The action is

    S = sum_x [-beta sum_mu phi_x phi_{x+mu} + (1 - 2 lam) phi_x^2 + lam phi_x^4].

Philox4x32-10 is the generator of Salmon et al., SC 2011; the flows are those of arXiv:2302.08408
and arXiv:2310.03381.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

PURPOSE_MOMENTA = 0
PURPOSE_ACCEPT = 1
PURPOSE_LENGTH = 5
PURPOSE_BOND = 6
PURPOSE_CLUSTER = 7
PURPOSE_PROPOSAL = 8
PURPOSE_HEAT_BATH = 10


def _axes(ndim):
    """The trailing `ndim` axes, those of the lattice."""
    return tuple(range(-ndim, 0))


# ---- random numbers ------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10.

    Parameters
    ----------
    counter : (..., 4) array of 32-bit words
    key : (..., 2) array of 32-bit words

    Returns
    -------
    (..., 4) uint32 array
    """
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    key0, key1 = np.moveaxis(np.asarray(key, dtype=np.uint64), -1, 0)
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0 = x0 * np.uint64(0xD2511F53)
        product1 = x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (product1 >> word) ^ x1 ^ key0, product1 & low
        x2, x3 = (product0 >> word) ^ x3 ^ key1, product0 & low
        key0 = (key0 + np.uint64(0x9E3779B9)) & low
        key1 = (key1 + np.uint64(0xBB67AE85)) & low
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)


def _blocks(seed, purpose, trajectory, chains, n_blocks):
    """The first blocks of the streams of `chains`: (n_chains, n_blocks, 4) words held in uint64."""
    chains = np.asarray(chains, dtype=np.uint64)
    counter = np.zeros((len(chains), n_blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(n_blocks)
    counter[..., 1] = trajectory & 0xFFFFFFFF
    counter[..., 2] = chains[:, np.newaxis]
    counter[..., 3] = (trajectory >> 32) | (purpose << 24)
    return philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32]).astype(np.uint64)


def normals(seed, purpose, trajectory, chains, n_per_chain, dtype=np.float64):
    """Unit normals by Box-Muller; block b of a stream makes its entries 4 b .. 4 b + 3.

    A pair of words (a, b) makes r cos(angle), r sin(angle) with r = sqrt(-2 ln u),
    u = (a 2^8 + (b >> 24) + 1/2) 2^-40 (float32: u = (a + 1/2) 2^-32) and
    angle = 2 pi (b & 0xffffff) 2^-24.

    Parameters
    ----------
    seed : int
        64 bits.
    purpose : int
        8 bits; the registry is enum lfq_purpose.
    trajectory : int
        56 bits.
    chains : (n_chains,) array of int
        Global chain numbers, 32 bits.
    n_per_chain : int
    dtype : float64 or float32

    Returns
    -------
    (n_chains, n_per_chain) array of `dtype`
    """
    words = _blocks(seed, purpose, trajectory, chains, -(-n_per_chain // 4))
    pairs = _box_muller(words[..., 0::2], words[..., 1::2], dtype)
    return pairs.reshape(len(words), -1)[:, :n_per_chain].astype(dtype)


def _box_muller(a, b, dtype):
    """Two normals of each pair of words, on a new last axis."""
    if np.dtype(dtype) == np.float64:
        u = ((a << np.uint64(8) | b >> np.uint64(24)) + 0.5) * 2.0**-40
    else:
        # Rounded as a float32 must be: near u = 1 this decides the radius.
        u = ((a + 0.5) * 2.0**-32).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(u))
    angle = 2.0 * np.pi * (b & np.uint64(0xFFFFFF)) * 2.0**-24
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def accept_uniform(seed, trajectory, chains):
    """The uniform ((x0 << 21 | x1 >> 11) + 1/2) 2^-53 of the accept step, (n_chains,) float64."""
    x0, x1, _, _ = _blocks(seed, PURPOSE_ACCEPT, trajectory, chains, 1)[:, 0].T
    return ((x0 << np.uint64(21) | x1 >> np.uint64(11)) + 0.5) * 2.0**-53


# ---- phi^4 ---------------------------------------------------------------------------------


def phi4_action(phi, beta, lam, ndim):
    """S = sum_x [-beta sum_mu phi_x phi_{x+mu} + (1 - 2 lam) phi_x^2 + lam phi_x^4].

    Parameters
    ----------
    phi : (..., *lattice) array
    beta, lam : float
    ndim : int
        Number of lattice axes.

    Returns
    -------
    (...) array
    """
    forward = sum(np.roll(phi, -1, axis) for axis in _axes(ndim))
    site = -beta * phi * forward + (1 - 2 * lam) * phi**2 + lam * phi**4
    return site.sum(axis=_axes(ndim))


def phi4_force(phi, beta, lam, ndim):
    """F_x = -dS/dphi_x = beta sum_{+-mu} phi_{x+mu} - 2 phi_x (1 - 2 lam + 2 lam phi_x^2).

    Parameters
    ----------
    phi : (..., *lattice) array
    beta, lam : float
    ndim : int

    Returns
    -------
    (..., *lattice) array
    """
    neighbours = sum(np.roll(phi, -1, axis) + np.roll(phi, 1, axis) for axis in _axes(ndim))
    return beta * neighbours - 2 * phi * (1 - 2 * lam + 2 * lam * phi**2)


def observables(phi, ndim):
    """Observables of every field, in the order of lfq.h.

    M = mean phi; mean phi^2; mean phi^4; nn = mean over sites and directions of phi_x phi_{x+mu};
    mean phi_t^2 with phi_t(p) = exp(-p^2 t) phi(p), p^2 = 4 sum_mu sin^2(p_mu / 2), t = 1;
    G(p_min) = |sum_x exp(i p x) phi_x|^2 / V with p = 2 pi / extent along one axis, averaged over axes.

    Parameters
    ----------
    phi : (..., *lattice) array
    ndim : int

    Returns
    -------
    (..., 6) array
    """
    axes = _axes(ndim)
    extent = phi.shape[-ndim:]
    nn = sum(phi * np.roll(phi, -1, axis) for axis in axes) / ndim
    momentum = np.meshgrid(*[2 * np.pi * np.fft.fftfreq(n) for n in extent], indexing="ij")
    p2 = sum(4 * np.sin(p / 2) ** 2 for p in momentum)
    phi_p = np.fft.fftn(phi, axes=axes)
    smeared = np.fft.ifftn(np.exp(-p2) * phi_p, axes=axes).real
    power = np.abs(phi_p) ** 2 / math.prod(extent)
    unit = np.eye(ndim, dtype=int)
    g_min = sum(power[(..., *(unit[mu] % extent))] for mu in range(ndim)) / ndim
    means = [field.mean(axis=axes) for field in (phi, phi**2, phi**4, nn, smeared**2)]
    return np.stack([*means, g_min], axis=-1)


# ---- layers of a flow ----------------------------------------------------------------------
#
# Every layer has `shape` (the lattice it writes), `input_shape`, `n_weights` and
#   forward(z, weights) -> x, log|det dx/dz|
#   inverse(x, weights) -> z, log|det dz/dx|
#   vjp(z, weights, dx, dlog_det) -> dz, dweights
# for z (..., *input_shape), x (..., *shape), log-determinants (...), weights (n_weights,), where vjp
# takes dL/dx and dL/dlog_det to dL/dz and dL/dweights, the latter summed over the leading axes.


def _taps(kernel):
    """Index and offset from the centre of every tap of a kernel (c_out, c_in, k, ..., k)."""
    radius = kernel.shape[-1] // 2
    for tap in np.ndindex(kernel.shape[2:]):
        yield tap, np.array(tap) - radius


def correlate(x, kernel):
    """Circular cross-correlation out[c, r] = sum_{i, o} kernel[c, i, o] x[i, r + o].

    Parameters
    ----------
    x : (c_in, ..., *lattice) array
    kernel : (c_out, c_in, k, ..., k) array
        k is odd, o runs from -(k - 1)/2 to (k - 1)/2 and r + o is taken modulo the extents.

    Returns
    -------
    (c_out, ..., *lattice) array
    """
    axes = _axes(kernel.ndim - 2)
    return sum(
        np.tensordot(kernel[(..., *tap)], np.roll(x, -offset, axes), axes=1) for tap, offset in _taps(kernel)
    )


def correlate_vjp(x, kernel, dout):
    """Backward pass of `correlate`.

    dx[i, r] = sum_{c, o} kernel[c, i, o] dout[c, r - o] and
    dkernel[c, i, o] = sum_r dout[c, r] x[i, r + o], r over the leading axes too.

    Parameters
    ----------
    x : (c_in, ..., *lattice) array
    kernel : (c_out, c_in, k, ..., k) array
    dout : (c_out, ..., *lattice) array

    Returns
    -------
    dx : (c_in, ..., *lattice) array
    dkernel : (c_out, c_in, k, ..., k) array
    """
    axes = _axes(kernel.ndim - 2)
    rest = range(1, x.ndim)
    dx = np.zeros(x.shape)
    dkernel = np.zeros(kernel.shape)
    for tap, offset in _taps(kernel):
        dx += np.tensordot(kernel[(..., *tap)].T, np.roll(dout, offset, axes), axes=1)
        dkernel[(..., *tap)] = np.tensordot(dout, np.roll(x, -offset, axes), axes=(rest, rest))
    return dx, dkernel


def activate(kind, u):
    """tanh(u), u ("none"), or leaky ReLU: u where u > 0, else 0.01 u."""
    return np.tanh(u) if kind == "tanh" else u if kind == "none" else np.where(u > 0, u, 0.01 * u)


def activation_slope(kind, value):
    """The derivative of `activate` in terms of its value."""
    return 1 - value**2 if kind == "tanh" else np.where((value > 0) | (kind == "none"), 1.0, 0.01)


@dataclass(frozen=True)
class Coupling:
    """One half-update of the checkerboard.

    Active sites, sum(coordinates) % 2 == parity, change from z to x given u, the output of a convolutional net that
    sees the field with all but the frozen sites, those of the other parity, set to zero; other sites stay. Affine
    kinds: x = z e^q + t and log-det sum q over the active sites, where with h = tanh(u) q = -|h_0| or q = h_0 and
    t = h_1, or (even) q = sum_c b_c h_c^2 and t = sum_c a_c h_c. The derivative of |h_0| at 0 is 0. Kind "site":
    x = a v + b tanh(c v) + u_1 of v = z + u_0.

    Weights, in order of the net's layers: kernel[out][in][k]..[k], then bias[out] if any. Behind them a and b of
    "even", or log a, log b and log c of "site". With `sublattices` such a set for each sublattice of active sites; the
    2^ndim sublattices are numbered by the parities of all coordinates as binary digits, the last one's the lowest.

    Parameters
    ----------
    shape : tuple of int
        Even extents.
    parity : int
    kernel_size : int
        Odd.
    hidden : tuple of int
        Channels of the hidden layers; the last layer has 2 channels, or `features`.
    activation : "tanh" or "leaky_relu"
        Of the hidden layers.
    bias : bool
    scale : "exp(-|s|)", "exp(s)", "even" or "site"
    features : int
        Of "even".
    sublattices : bool
    changed, seen : int
        With `sublattices`: those of the active sites, all of `parity`, and those of the sites that the net sees, a bit
        each; 0 for all of `parity`, and for all of the other parity.
    """

    shape: tuple
    parity: int
    kernel_size: int
    hidden: tuple = ()
    activation: str = "tanh"
    bias: bool = False
    scale: str = "exp(-|s|)"
    features: int = 0
    sublattices: bool = False
    changed: int = 0
    seen: int = 0

    @property
    def input_shape(self):
        return self.shape

    @property
    def kernel_shapes(self):
        """(c_out, c_in, k, ..., k) of every layer of the net."""
        channels = (1, *self.hidden, self.features or 2)
        taps = (self.kernel_size,) * len(self.shape)
        return [(c_out, c_in, *taps) for c_in, c_out in itertools.pairwise(channels)]

    @property
    def _set_size(self):
        parameters = 3 if self.scale == "site" else 2 * self.features
        return sum(math.prod(shape) + self.bias * shape[0] for shape in self.kernel_shapes) + parameters

    @property
    def n_weights(self):
        return self._set_size * (len(np.unique(self._numbers[self.active])) if self.sublattices else 1)

    def _sets(self, weights):
        """(active sites, weights) of every set of weights."""
        if not self.sublattices:
            return [(self.active, weights)]
        numbers = np.unique(self._numbers[self.active])
        parts = weights.reshape(-1, self._set_size)
        return [(self._numbers == number, part) for number, part in zip(numbers, parts, strict=True)]

    @property
    def _numbers(self):
        """The sublattice of every site."""
        number = np.zeros(self.shape, dtype=int)
        for coordinate in np.indices(self.shape):
            number = 2 * number + coordinate % 2
        return number

    def _among(self, sublattices, parity):
        if not sublattices:
            return np.indices(self.shape).sum(axis=0) % 2 == parity
        return sublattices >> self._numbers & 1 == 1

    @property
    def active(self):
        """(*shape) bool array."""
        return self._among(self.changed, self.parity)

    @property
    def frozen(self):
        """The sites that the net sees, likewise."""
        return self._among(self.seen, 1 - self.parity)

    def _net_layers(self, weights):
        """(activation, kernel, bias) of every layer of the net."""
        activations = [self.activation] * len(self.hidden) + ["none" if self.scale == "site" else "tanh"]
        layers, begin = [], 0
        for activation, shape in zip(activations, self.kernel_shapes, strict=True):
            middle = begin + math.prod(shape)
            end = middle + self.bias * shape[0]
            bias = weights[middle:end] if self.bias else np.zeros(shape[0])
            layers.append((activation, weights[begin:middle].reshape(shape), bias))
            begin = end
        return layers

    def _net(self, z, weights):
        """The net's input, the values of its hidden layers, and h, each (channels, ..., *shape)."""
        values = [np.where(self.frozen, z, 0.0)[np.newaxis]]
        for activation, kernel, bias in self._net_layers(weights):
            u = correlate(values[-1], kernel) + bias.reshape(-1, *[1] * z.ndim)
            values.append(activate(activation, u))
        return values

    def _net_vjp(self, values, weights, doutput):
        """From dL/dh to dL/dz through the net, and dL/dweights of the net."""
        dvalue, dweights = doutput, []
        for i, (activation, kernel, _) in reversed(list(enumerate(self._net_layers(weights)))):
            du = dvalue * activation_slope(activation, values[i + 1])
            dvalue, dkernel = correlate_vjp(values[i], kernel, du)
            dbias = du.reshape(len(du), -1).sum(axis=1)
            dweights = [dkernel.ravel(), *([dbias] if self.bias else []), *dweights]
        return np.where(self.frozen, dvalue[0], 0.0), np.concatenate(dweights)

    def _affine(self, h, weights):
        """q and t from h."""
        if self.scale == "even":
            a, b = weights[-2 * self.features :].reshape(2, -1)
            return np.tensordot(b, h**2, 1), np.tensordot(a, h, 1)
        return -np.abs(h[0]) if self.scale == "exp(-|s|)" else h[0], h[1]

    def _affine_vjp(self, h, weights, dq, dt):
        """dL/dh, and dL/d(a, b)."""
        if self.scale == "even":
            a, b = weights[-2 * self.features :].reshape(2, -1, *[1] * dq.ndim)
            sites = tuple(range(1, h.ndim))
            dparameters = [(dt * h).sum(axis=sites), (dq * h**2).sum(axis=sites)]
            return a * dt + 2 * b * h * dq, np.concatenate(dparameters)
        return np.stack([dq * (-np.sign(h[0]) if self.scale == "exp(-|s|)" else 1), dt]), np.empty(0)

    def _map(self, z, h, weights):
        """x and log dx/dz at every site, as if all were active."""
        if self.scale == "site":
            a, b, c = np.exp(weights[-3:])
            v = z + h[0]
            return a * v + b * np.tanh(c * v) + h[1], np.log(a + b * c / np.cosh(c * v) ** 2)
        q, t = self._affine(h, weights)
        return z * np.exp(q) + t, q

    def _map_vjp(self, z, h, weights, dx, dlog_det):
        """dL/dz, dL/dh and dL/dparameters from those of x and of each site's log dx/dz."""
        if self.scale == "site":
            a, b, c = np.exp(weights[-3:])
            v = z + h[0]
            th, sech2 = np.tanh(c * v), 1 / np.cosh(c * v) ** 2
            slope = a + b * c * sech2
            dslope = dlog_det / slope
            dv = dx * slope - dslope * 2 * b * c**2 * th * sech2
            dparameters = [
                (a * (dx * v + dslope)).sum(),
                (b * (dx * th + dslope * c * sech2)).sum(),
                (c * b * sech2 * (dx * v + dslope * (1 - 2 * c * v * th))).sum(),
            ]
            return dv, np.stack([dv, dx]), np.array(dparameters)
        q, _ = self._affine(h, weights)
        dh, dparameters = self._affine_vjp(h, weights, dx * z * np.exp(q) + dlog_det, dx)
        return dx * np.exp(q), dh, dparameters

    def forward(self, z, weights):
        x, log_det = z, 0.0
        for active, part in self._sets(weights):
            moved, q = self._map(z, self._net(z, part)[-1], part)
            x = np.where(active, moved, x)
            log_det = log_det + np.where(active, q, 0.0).sum(axis=_axes(len(self.shape)))
        return x, log_det

    def inverse(self, x, weights):
        z = x
        for active, part in self._sets(weights):
            z = np.where(active, self._unmap(x, self._net(x, part)[-1], part), z)
        return z, -self.forward(z, weights)[1]

    def _unmap(self, x, h, weights):
        """z at every site, as if all were active."""
        if self.scale == "site":
            # Bisection: the map is monotone, and no less steep than a.
            a, b, c = np.exp(weights[-3:])
            bent = x - h[1]
            low, high = (bent - b) / a, (bent + b) / a
            for _ in range(200):
                v = (low + high) / 2
                above = a * v + b * np.tanh(c * v) > bent
                low, high = np.where(above, low, v), np.where(above, v, high)
            return v - h[0]
        q, t = self._affine(h, weights)
        return (x - t) * np.exp(-q)

    def vjp(self, z, weights, dx, dlog_det):
        dz, dweights = np.where(self.active, 0.0, dx), []
        dlog_det = np.expand_dims(dlog_det, _axes(len(self.shape)))
        for active, part in self._sets(weights):
            values = self._net(z, part)
            moved, dh, dparameters = self._map_vjp(
                z, values[-1], part, np.where(active, dx, 0.0), np.where(active, dlog_det, 0.0)
            )
            dz_net, dnet = self._net_vjp(values, part, dh)
            dz = dz + np.where(active, moved, 0.0) + dz_net
            dweights += [dnet, dparameters]
        return dz, np.concatenate(dweights)


@dataclass(frozen=True)
class Rescale:
    """x = e^a z, log-det V a. One weight, a.

    Parameters
    ----------
    shape : tuple of int
    """

    shape: tuple
    n_weights = 1

    @property
    def input_shape(self):
        return self.shape

    def forward(self, z, weights):
        (a,) = weights
        return np.exp(a) * z, np.full(z.shape[: -len(self.shape)], math.prod(self.shape) * a)

    def inverse(self, x, weights):
        return self.forward(x, np.negative(weights))

    def vjp(self, z, weights, dx, dlog_det):
        (a,) = weights
        da = (dx * np.exp(a) * z).sum() + math.prod(self.shape) * np.sum(dlog_det)
        return np.exp(a) * dx, np.array([da])


def _sublattices(shape):
    """Offset bits (the most significant is the first axis) and index of sublattices 0 .. 2^ndim - 1."""
    for bits in np.ndindex(*[2] * len(shape)):
        yield bits, (..., *[slice(bit, None, 2) for bit in bits])


@dataclass(frozen=True)
class Interleave:
    """2^D copies of the coarse field, copy a on sublattice a: phi(2 i + bits of a) = z_a(i).

    The input is flat, copy after copy; the log-determinant is 0 and there are no weights.

    Parameters
    ----------
    shape : tuple of int
        Even extents, those of the fine lattice.
    """

    shape: tuple
    n_weights = 0

    @property
    def input_shape(self):
        return (math.prod(self.shape),)

    def forward(self, z, weights):
        copies = z.reshape(*z.shape[:-1], 2 ** len(self.shape), *[n // 2 for n in self.shape])
        x = np.empty((*z.shape[:-1], *self.shape))
        for a, (_, sublattice) in enumerate(_sublattices(self.shape)):
            x[sublattice] = copies[(..., a, *[slice(None)] * len(self.shape))]
        return x, np.zeros(z.shape[:-1])

    def inverse(self, x, weights):
        lead = x.shape[: -len(self.shape)]
        copies = [x[sublattice].reshape(*lead, -1) for _, sublattice in _sublattices(self.shape)]
        return np.concatenate(copies, axis=-1), np.zeros(lead)

    def vjp(self, z, weights, dx, dlog_det):
        # A permutation: its transpose is its inverse.
        return self.inverse(dx, weights)[0], np.zeros(0)


@dataclass(frozen=True)
class Upsample:
    """One coarse field z_c on sublattice 0, noise around its interpolation on the others.

    phi(2 i) = e^{w_0} z_c(i); on sublattice a with c odd coordinates phi = g_c mean + e^{h_c} noise_a, mean =
    the average of e^{w_0} z_c over the 2^c nearest coarse sites (i and i + 1 for each odd coordinate).
    log-det = V_c w_0 + sum_c n_c h_c, n_c = V_c binomial(D, c), V_c the coarse volume.

    The input is flat: z_c, then noise_a for a = 1 .. 2^D - 1. Weights: w_0, then (g_c, h_c) for c = 1 .. D.

    Parameters
    ----------
    shape : tuple of int
        Even extents, those of the fine lattice.
    """

    shape: tuple

    @property
    def n_weights(self):
        return 1 + 2 * len(self.shape)

    @property
    def input_shape(self):
        return (math.prod(self.shape),)

    def _interpolate(self, coarse, bits):
        for axis, bit in zip(_axes(len(bits)), bits, strict=True):
            if bit:
                coarse = (coarse + np.roll(coarse, -1, axis)) / 2
        return coarse

    def _interpolate_transposed(self, dmean, bits):
        for axis, bit in zip(_axes(len(bits)), bits, strict=True):
            if bit:
                dmean = (dmean + np.roll(dmean, 1, axis)) / 2
        return dmean

    def _log_det(self, weights):
        ndim = len(self.shape)
        h = weights[2::2]
        per_coarse_site = weights[0] + sum(math.comb(ndim, c) * h[c - 1] for c in range(1, ndim + 1))
        return math.prod(self.shape) // 2**ndim * per_coarse_site

    def forward(self, z, weights):
        w_0, g, h = weights[0], weights[1::2], weights[2::2]
        # Interleaved, so that sublattice a holds block a of the latent.
        latent, _ = Interleave(self.shape).forward(z, [])
        x = np.empty(latent.shape)
        for bits, sublattice in _sublattices(self.shape):
            c = sum(bits)
            if c == 0:
                coarse = x[sublattice] = np.exp(w_0) * latent[sublattice]
            else:
                mean = self._interpolate(coarse, bits)
                x[sublattice] = g[c - 1] * mean + np.exp(h[c - 1]) * latent[sublattice]
        return x, np.full(z.shape[:-1], self._log_det(weights))

    def inverse(self, x, weights):
        w_0, g, h = weights[0], weights[1::2], weights[2::2]
        latent = np.empty(x.shape)
        for bits, sublattice in _sublattices(self.shape):
            c = sum(bits)
            if c == 0:
                coarse = x[sublattice]
                latent[sublattice] = np.exp(-w_0) * coarse
            else:
                mean = self._interpolate(coarse, bits)
                latent[sublattice] = np.exp(-h[c - 1]) * (x[sublattice] - g[c - 1] * mean)
        z, zero = Interleave(self.shape).inverse(latent, [])
        return z, zero - self._log_det(weights)

    def vjp(self, z, weights, dx, dlog_det):
        w_0, g, h = weights[0], weights[1::2], weights[2::2]
        ndim = len(self.shape)
        n_coarse = math.prod(self.shape) // 2**ndim
        latent, _ = Interleave(self.shape).forward(z, [])
        dlatent = np.empty(latent.shape)
        even = (..., *[slice(0, None, 2)] * ndim)
        coarse = np.exp(w_0) * latent[even]
        dcoarse = dx[even]
        dg = np.zeros(ndim)
        dh = np.array([n_coarse * math.comb(ndim, c) * np.sum(dlog_det) for c in range(1, ndim + 1)])
        for bits, sublattice in _sublattices(self.shape):
            c = sum(bits)
            if c > 0:
                dphi = dx[sublattice]
                dg[c - 1] += (dphi * self._interpolate(coarse, bits)).sum()
                dh[c - 1] += (dphi * np.exp(h[c - 1]) * latent[sublattice]).sum()
                dcoarse = dcoarse + g[c - 1] * self._interpolate_transposed(dphi, bits)
                dlatent[sublattice] = np.exp(h[c - 1]) * dphi
        dlatent[even] = np.exp(w_0) * dcoarse
        dw_0 = (dcoarse * coarse).sum() + n_coarse * np.sum(dlog_det)
        dweights = np.concatenate([[dw_0], np.stack([dg, dh], axis=1).ravel()])
        return Interleave(self.shape).inverse(dlatent, [])[0], dweights


# ---- flows ---------------------------------------------------------------------------------
#
# A flow is a list of layers on flat latents (n, volume), `volume` that of the last layer's lattice.
# A layer works on the leading entries; those behind wait for a layer that enlarges the lattice.


def _split_weights(layers, weights):
    ends = np.cumsum([layer.n_weights for layer in layers])
    return np.split(np.asarray(weights, dtype=np.float64), ends[:-1])


def _leading(latent, shape):
    return latent[:, : math.prod(shape)].reshape(len(latent), *shape)


def _with_leading(latent, values):
    values = values.reshape(len(latent), -1)
    return np.concatenate([values, latent[:, values.shape[1] :]], axis=1)


def flow_forward(layers, weights, z):
    """x = f(z) and log|det df/dz|.

    Parameters
    ----------
    layers : sequence of layers
        At least one.
    weights : (n_weights,) array
        The weights of all layers, in order of layers.
    z : (n, volume) array

    Returns
    -------
    x : (n, *shape) array
    log_det : (n,) array
    """
    latent, log_det = z, np.zeros(len(z))
    for layer, w in zip(layers, _split_weights(layers, weights), strict=True):
        values, term = layer.forward(_leading(latent, layer.input_shape), w)
        latent = _with_leading(latent, values)
        log_det = log_det + term
    return latent.reshape(len(z), *layers[-1].shape), log_det


def flow_inverse(layers, weights, x):
    """z = f^-1(x) and log|det df^-1/dx|.

    Parameters
    ----------
    layers, weights : see `flow_forward`
    x : (n, *shape) array

    Returns
    -------
    z : (n, volume) array
    log_det : (n,) array
    """
    latent, log_det = x.reshape(len(x), -1), np.zeros(len(x))
    for layer, w in reversed(list(zip(layers, _split_weights(layers, weights), strict=True))):
        values, term = layer.inverse(_leading(latent, layer.shape), w)
        latent = _with_leading(latent, values)
        log_det = log_det + term
    return latent, log_det


def flow_vjp(layers, weights, z, dx, dlog_det):
    """Backward pass of `flow_forward`.

    Parameters
    ----------
    layers, weights, z : see `flow_forward`
    dx : (n, *shape) array
        dL/dx at x = f(z).
    dlog_det : (n,) array
        dL/dlog_det.

    Returns
    -------
    dz : (n, volume) array
    dweights : (n_weights,) array
        Summed over the n latents.
    """
    split = _split_weights(layers, weights)
    latents = [z]
    for layer, w in zip(layers, split, strict=True):
        values, _ = layer.forward(_leading(latents[-1], layer.input_shape), w)
        latents.append(_with_leading(latents[-1], values))
    dlatent, dweights = dx.reshape(len(z), -1), []
    for layer, w, latent in reversed(list(zip(layers, split, latents[:-1], strict=True))):
        dvalues = _leading(dlatent, layer.shape)
        dvalues, dw = layer.vjp(_leading(latent, layer.input_shape), w, dvalues, dlog_det)
        dlatent = _with_leading(dlatent, dvalues)
        dweights = [dw, *dweights]
    return dlatent, np.concatenate(dweights)


def flow_inverse_vjp(layers, weights, z, dz, dlog_det):
    """Cotangents of x = f(z) and of the weights, given those of (z, log|det dz/dx|) = f^-1(x).

    With J = df/dz: J^T dx = dz - dlog_det d(log|det J|)/dz, solved with a dense J^T of each latent.

    Parameters
    ----------
    layers, weights, z : see `flow_forward`
    dz : (n, volume) array
    dlog_det : (n,) array

    Returns
    -------
    dx : (n, volume) array
    dweights : (n_weights,) array
        Summed over the n latents.
    """
    n, volume = z.shape
    zero = np.zeros(n)
    pushed = flow_vjp(layers, weights, z, np.zeros_like(z), -dlog_det)[0]
    columns = [flow_vjp(layers, weights, z, np.tile(unit, (n, 1)), zero)[0] for unit in np.eye(volume)]
    dx = np.linalg.solve(np.stack(columns, axis=2), (dz + pushed)[..., None])[..., 0]
    return dx, flow_vjp(layers, weights, z, -dx, -dlog_det)[1]


def pullback(layers, weights, z, beta, lam):
    """The pulled-back theory S~(z) = S(f(z)) - log|det df/dz| and its force -dS~/dz.

    Parameters
    ----------
    layers, weights, z : see `flow_forward`
    beta, lam : float

    Returns
    -------
    action : (n,) array
    force : (n, volume) array
    """
    ndim = len(layers[-1].shape)
    x, log_det = flow_forward(layers, weights, z)
    force, _ = flow_vjp(layers, weights, z, phi4_force(x, beta, lam, ndim), np.ones(len(z)))
    return phi4_action(x, beta, lam, ndim) - log_det, force


def loss(layers, weights, z, beta, lam):
    """The training step: S(f(z)), log|det df/dz| and d/dweights of mean [S(f(z)) - log|det df/dz|].

    Parameters
    ----------
    layers, weights, z : see `flow_forward`
    beta, lam : float

    Returns
    -------
    action : (n,) array
    log_det : (n,) array
    dweights : (n_weights,) array
    """
    ndim = len(layers[-1].shape)
    x, log_det = flow_forward(layers, weights, z)
    dx = -phi4_force(x, beta, lam, ndim) / len(z)
    _, dweights = flow_vjp(layers, weights, z, dx, np.full(len(z), -1 / len(z)))
    return phi4_action(x, beta, lam, ndim), log_det, dweights


# ---- hybrid Monte Carlo --------------------------------------------------------------------


def evolve(force, z, momenta, kick, drift, step_size, n_steps):
    """Integrate Hamilton's equations with the splitting kick[0] drift[0] kick[1] ... kick[n].

    Parameters
    ----------
    force : callable
        z -> -dS/dz, of the shape of z.
    z, momenta : arrays of one shape
    kick : (n_stages + 1,) sequence
        In units of the step size, as is `drift`. Leapfrog is kick = (1/2, 1/2), drift = (1,).
    drift : (n_stages,) sequence
    step_size : float
    n_steps : int

    Returns
    -------
    z, momenta : arrays
    """
    for _ in range(n_steps):
        for k, d in zip(kick[:-1], drift, strict=True):
            momenta = momenta + k * step_size * force(z)
            z = z + d * step_size * momenta
        momenta = momenta + kick[-1] * step_size * force(z)
    return z, momenta


def drawn_steps(n_steps, spread, seed, trajectory):
    """Steps of a trajectory, uniform in n_steps - spread .. n_steps + spread and equal for all chains.

    floor(x0 (2 spread + 1) 2^-32) - spread more than n_steps, x0 the first word of the stream of chain 0.
    """
    x0 = int(_blocks(seed, PURPOSE_LENGTH, trajectory, [0], 1)[0, 0, 0])
    return n_steps - spread + (x0 * (2 * spread + 1) >> 32)


def hmc(
    z,
    beta,
    lam,
    kick,
    drift,
    step_size,
    n_steps,
    n_trajectories,
    seed,
    layers=(),
    weights=(),
    first_chain=0,
    first_trajectory=0,
    spread=0,
):
    """Hybrid Monte Carlo of independent chains, H = 1/2 sum momenta^2 + S.

    A trajectory is accepted where accept_uniform < exp(-dH). Chain i draws from the streams of chain
    first_chain + i, trajectory j from those of first_trajectory + j.

    Parameters
    ----------
    z : (n_chains, *shape) array, or (n_chains, volume) with layers
        Where the chains start.
    beta, lam : float
    kick, drift, step_size, n_steps : see `evolve`
    n_trajectories : int
    seed : int
    layers, weights : see `flow_forward`
        Without layers S is the action of the field z, with layers that of the pulled-back theory.
    first_chain, first_trajectory : int
    spread : int
        See `drawn_steps`.

    Returns
    -------
    z : (n_trajectories, *z.shape) array
        After each trajectory.
    dh : (n_trajectories, n_chains) array
        H at the end minus H at the start of each trajectory, accepted or not.
    accepted : (n_trajectories, n_chains) bool array
    """

    def action(z):
        return pullback(layers, weights, z, beta, lam)[0] if layers else phi4_action(z, beta, lam, z.ndim - 1)

    def force(z):
        return pullback(layers, weights, z, beta, lam)[1] if layers else phi4_force(z, beta, lam, z.ndim - 1)

    def energy(z, momenta):
        return action(z) + (momenta**2).reshape(len(z), -1).sum(axis=1) / 2

    z = np.array(z, dtype=np.float64)
    chains = first_chain + np.arange(len(z))
    volume = math.prod(z.shape[1:])
    history = np.empty((n_trajectories, *z.shape))
    dh = np.empty((n_trajectories, len(z)))
    accepted = np.empty((n_trajectories, len(z)), dtype=bool)
    for i in range(n_trajectories):
        trajectory = first_trajectory + i
        momenta = normals(seed, PURPOSE_MOMENTA, trajectory, chains, volume).reshape(z.shape)
        n = drawn_steps(n_steps, spread, seed, trajectory) if spread else n_steps
        new_z, new_momenta = evolve(force, z, momenta, kick, drift, step_size, n)
        dh[i] = energy(new_z, new_momenta) - energy(z, momenta)
        with np.errstate(over="ignore"):
            accepted[i] = accept_uniform(seed, trajectory, chains) < np.exp(-dh[i])
        z[accepted[i]] = new_z[accepted[i]]
        history[i] = z
    return history, dh, accepted


def hartley(x, ndim):
    """The orthonormal Hartley transform along each of the last `ndim` axes: its own inverse.

    x[k] = n^(-1/2) sum_j cas(2 pi j k / n) x[j] for every axis of extent n, cas = cos + sin.
    """
    for axis in _axes(ndim):
        modes = np.fft.fft(x, axis=axis, norm="ortho")
        x = modes.real - modes.imag
    return x


def fourier_inverse_mass(shape, mass):
    """(4 D + m^2) / (p^2 + m^2), p^2 = 4 sum_mu sin^2(p_mu / 2), of every mode: (*shape) array."""
    momenta = np.meshgrid(*[2 * np.pi * np.arange(n) / n for n in shape], indexing="ij")
    p2 = sum(4 * np.sin(p / 2) ** 2 for p in momenta)
    return (4 * len(shape) + mass**2) / (p2 + mass**2)


def fourier_evolve(phi, momenta, beta, lam, mass, kick, drift, step_size, n_steps):
    """Integrate H = S + 1/2 sum over modes of momenta^2, whose velocity field is the Hartley transform of
    inverse_mass^(1/2) momenta.

    Parameters
    ----------
    phi : (n_chains, *shape) array
    momenta : (n_chains, *shape) array
        Of the modes, with unit variance.
    beta, lam, mass : float
    kick, drift, step_size, n_steps : see `evolve`

    Returns
    -------
    phi, momenta : arrays
    """
    ndim = phi.ndim - 1
    root = np.sqrt(fourier_inverse_mass(phi.shape[1:], mass))
    modes, momenta = evolve(
        lambda q: root * hartley(phi4_force(hartley(root * q, ndim), beta, lam, ndim), ndim),
        hartley(phi, ndim) / root, momenta, kick, drift, step_size, n_steps,
    )  # fmt: skip
    return hartley(root * modes, ndim), momenta


# ---- embedded clusters ---------------------------------------------------------------------


def _cluster_names(phi, beta, words):
    """The first site of every site's cluster, (volume,) int: components of the active bonds of one chain.

    Parameters
    ----------
    phi : (*shape) array
    beta : float
    words : (volume, 4) uint64 array
        Word mu of a site decides its bond to x + mu.
    """
    shape, volume = phi.shape, phi.size
    sites = np.arange(volume).reshape(shape)
    names = sites.ravel().copy()
    bonds = []
    for mu in range(phi.ndim):
        exponent = (-2 * beta) * (phi * np.roll(phi, -1, mu))
        uniform = (words[:, mu].reshape(shape) + 0.5) * 2.0**-32
        active = uniform > np.exp(np.clip(exponent, -700, 0))
        bonds.append((sites[active], np.roll(sites, -1, mu)[active]))
    here, there = (np.concatenate(ends) for ends in zip(*bonds, strict=True))
    while True:
        least = np.minimum(names[here], names[there])
        new = names.copy()
        np.minimum.at(new, here, least)
        np.minimum.at(new, there, least)
        if (new == names).all():
            return names
        names = new


def cluster_update(phi, beta, kind, n_updates, seed, trajectory, first_chain=0):
    """Cluster updates of the signs (Brower and Tamayo, Phys. Rev. Lett. 62 (1989) 1087).

    The bond from x to x + mu is active where word mu of block x of the bond stream, as (word + 1/2) 2^-32,
    is above exp(-2 beta phi_x phi_{x+mu}). Swendsen-Wang flips every cluster whose bit is set: bit s % 32 of word
    s / 32 of the cluster stream, s its first site. Wolff flips the cluster of site floor(x V 2^-64),
    x = word 0 2^32 + word 1 of the cluster stream. Update k takes blocks from k V on of the bonds; of the
    cluster stream from k ceil(V / 128) on (Wolff: block k).

    Parameters
    ----------
    phi : (n_chains, *shape) array
    beta : float
    kind : "swendsen-wang" or "wolff"
    n_updates, seed, trajectory, first_chain : int

    Returns
    -------
    phi : (n_chains, *shape) array
    flipped : (n_chains,) array of int
        Sites that changed sign, each time counted.
    """
    phi, volume = np.array(phi), math.prod(phi.shape[1:])
    flipped = np.zeros(len(phi), dtype=int)
    blocks = -(-volume // 128)
    for i in range(len(phi)):
        chain = [first_chain + i]
        bonds = _blocks(seed, PURPOSE_BOND, trajectory, chain, n_updates * volume)[0]
        choices = _blocks(seed, PURPOSE_CLUSTER, trajectory, chain, n_updates * blocks)[0]
        for k in range(n_updates):
            words = bonds[k * volume : (k + 1) * volume]
            names = _cluster_names(phi[i].astype(np.float64), beta, words)
            if kind == "wolff":
                start = (int(choices[k, 0]) << 32 | int(choices[k, 1])) * volume >> 64
                flip = names == names[start]
            else:
                bits = choices[k * blocks : (k + 1) * blocks].ravel()
                flip = (bits[names // 32] >> (names % 32).astype(np.uint64)) & np.uint64(1) == 1
            phi[i] = np.where(flip.reshape(phi.shape[1:]), -phi[i], phi[i])
            flipped[i] += flip.sum()
    return phi, flipped


# ---- local heat bath -----------------------------------------------------------------------


def heat_bath_proposal(a, lam, b):
    """The Gaussian that proposes for the density exp(-a x^2 - lam x^4 + b x).

    exp(-lam (x^2 - c)^2) of its samples, accepted with that probability, have the density, for any c with
    alpha = a + 2 lam c > 0. The best c is the Gaussian's own <x^2> = 1 / (2 alpha) + b^2 / (4 alpha^2): alpha is the
    positive root of alpha^3 - a alpha^2 - lam alpha - lam b^2 / 2, here nearly, by Newton's method.

    Parameters
    ----------
    a, lam : float
    b : array

    Returns
    -------
    alpha, c : arrays of the shape of b
        The Gaussian has mean b / (2 alpha) and variance 1 / (2 alpha).
    """
    root = math.sqrt(a * a + 4 * lam)
    least = (root + a) / 2 if a > 0 else 2 * lam / (root - a)  # alpha at b = 0, without cancellation
    s3 = lam * b**2 / 2
    alpha = np.sqrt(least**2 + np.cbrt(s3) ** 2)
    steps = 1 + sum(8.0 ** (k + 1) < lam for k in range(200))  # the first guess is up to lam^(1/3) too large
    for _ in range(steps):
        alpha = (alpha**2 * (2 * alpha - a) + s3) / (alpha * (3 * alpha - 2 * a) - lam)
    if lam < 0.25:
        c = 1 / (2 * alpha) + b**2 / (4 * alpha**2)
        return a + 2 * lam * c, c
    return alpha, (alpha - a) / (2 * lam)


def heat_bath(phi, beta, lam, n_sweeps, seed, trajectory, first_chain=0, dtype=np.float64):
    """Sweeps of the local heat bath: even sites in order, then odd ones.

    Site x of sweep k draws from block k V + x of its stream. Words 0 and 1 make two normals n_i as in `normals`,
    words 2 and 3 two uniforms u_i = (word + 1/2) 2^-32. The new value is the first mean + n_i sigma of the proposal
    with u_i < exp(-lam (x^2 - c)^2), or the old one where both fail: whether they do depends on the neighbours
    alone, so the density given these is left as it is.

    Parameters
    ----------
    phi : (n_chains, *shape) array
    beta, lam : float
    n_sweeps, seed, trajectory, first_chain : int
    dtype : float64 or float32
        Of the normals.

    Returns
    -------
    phi : (n_chains, *shape) array
    changed : (n_chains,) array of int
        Sites with a new value, each time counted.
    """
    phi = np.array(phi, dtype=np.float64)
    shape, volume = phi.shape[1:], math.prod(phi.shape[1:])
    words = _blocks(seed, PURPOSE_HEAT_BATH, trajectory, first_chain + np.arange(len(phi)), n_sweeps * volume)
    normal = _box_muller(words[..., 0], words[..., 1], dtype)
    uniform = (words[..., 2:] + 0.5) * 2.0**-32
    # Along an axis of one site that site is its own neighbour: a quadratic term.
    axes = [mu for mu in range(len(shape)) if shape[mu] > 1]
    a = 1 - 2 * lam - beta * (len(shape) - len(axes))
    changed = np.zeros(len(phi), dtype=int)
    sites = list(np.ndindex(shape))
    for k, parity, (x, site) in itertools.product(range(n_sweeps), range(2), enumerate(sites)):
        if sum(site) % 2 != parity:
            continue
        neighbours = np.zeros(len(phi))
        for mu, step in itertools.product(axes, (1, -1)):
            there = list(site)
            there[mu] = (there[mu] + step) % shape[mu]
            neighbours += phi[(slice(None), *there)]
        b = beta * neighbours
        alpha, c = heat_bath_proposal(a, lam, b)
        new = b[:, None] / (2 * alpha[:, None]) + normal[:, k * volume + x] * np.sqrt(0.5 / alpha[:, None])
        accept = uniform[:, k * volume + x] < np.exp(-lam * (new**2 - c[:, None]) ** 2)
        value = np.where(accept[:, 0], new[:, 0], new[:, 1])
        changed += accept.any(axis=1)
        here = (slice(None), *site)
        phi[here] = np.where(accept.any(axis=1), value, phi[here])
    return phi, changed
