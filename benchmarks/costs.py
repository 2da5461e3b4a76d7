"""What each kernel must do, counted in its source: operations and bytes for one site.

Operations are vector instructions; dividing by lanes is done by the rates they are compared with, which
count lanes. ``fma`` holds what runs on the multipliers (multiply, fused multiply-add, integer multiply),
``add`` floating-point additions and subtractions, ``other`` logic, integer additions, shifts, compares,
blends and conversions. Constants are free, loads and stores are counted as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lfq import _core
from lfq.observables import heat_kernel


@dataclass(frozen=True)
class Cost:
    """Operations and entries moved for one site.

    Attributes
    ----------
    fma, add, other, divide, sqrt : float
        Vector instructions.
    group : float
        Field entries read or written in the group's work area.
    array : float
        Entries read or written in the caller's arrays.
    """

    fma: float = 0
    add: float = 0
    other: float = 0
    divide: float = 0
    sqrt: float = 0
    group: float = 0
    array: float = 0

    def __add__(self, more: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_values(self), _values(more), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * a for a in _values(self)))

    __rmul__ = __mul__


def _values(cost: Cost):
    return tuple(getattr(cost, name) for name in cost.__dataclass_fields__)


def seconds(phases: list[Cost], item: int, arithmetic: dict, group_bandwidth: float, array_bandwidth: float):
    """The least time for one site, phase after phase, and what binds the longest one.

    Within a phase everything overlaps: the slowest resource counts.
    """
    total, longest, by = 0.0, 0.0, ""
    for p in phases:
        times = {
            "multipliers": p.fma / arithmetic["fma"],
            "issue": (p.fma + p.add + p.other) / arithmetic["issue"],
            "divider": p.divide / arithmetic["divide"] + p.sqrt / arithmetic["sqrt"],
            "cache": item * p.group / group_bandwidth,
            "memory": item * p.array / array_bandwidth,
        }
        name = max(times, key=times.get)
        total += times[name]
        if times[name] > longest:
            longest, by = times[name], name
    return total, by


# ---- elementary functions (csrc/include/lfq/elementary.hpp) ------------------------------------
def lane_sum(single: bool) -> Cost:
    """A term of a sum in double: float32 converts both halves of the vector."""
    return Cost(add=2, other=3) if single else Cost(add=1)


def site_sum(single: bool) -> Cost:
    """The same where float32 terms go to double eight at a time."""
    return Cost(add=1) + 0.125 * lane_sum(True) if single else lane_sum(False)


def exp(single: bool) -> Cost:
    # 3 to reduce, the polynomial's 9 (4) steps, r^2, and two last steps
    return Cost(fma=10 if single else 15, add=1, other=2)


def exp_minus(single: bool) -> Cost:
    return Cost(fma=6 if single else 11)


def tanh(single: bool) -> Cost:
    # 2 to reduce, q^2, the polynomial's 5 (2) steps, 1 for the numerator: powers of two are integer additions
    return Cost(fma=6 if single else 9, add=6, other=7, divide=1)


def log(single: bool) -> Cost:
    return Cost(fma=7 if single else 10, add=5, other=5, divide=1)


def cos_sin(single: bool) -> Cost:
    return Cost(fma=9 if single else 15, add=1, other=12)


def word(single: bool) -> Cost:
    """A random word as a real."""
    return Cost(fma=1, add=3, other=5) if single else Cost(add=1, other=3)


def box_muller(single: bool) -> Cost:
    """Two normals from two words."""
    return word(single) + log(single) + Cost(fma=2, add=1, other=1, sqrt=1) + cos_sin(single)


def philox(single: bool) -> Cost:
    # 10 rounds of two 32 x 32 -> 64 bit products on 64-bit lanes, two of them the same for all blocks; a
    # float32 block is two such, for the even and the odd lanes
    return Cost(fma=36, other=80) if single else Cost(fma=18, other=42)


def normal(single: bool) -> Cost:
    """One normal: half a Box-Muller pair and a quarter of a Philox block."""
    return 0.5 * box_muller(single) + 0.25 * philox(single)


# ---- phi^4 (csrc/cpu/phi4_kernels.hpp) --------------------------------------------------------
def load(single: bool) -> Cost:
    """Array to group, checked for NaN; a transposition takes log2(lanes) shuffles."""
    return Cost(fma=1, other=4 if single else 3, group=1, array=1)


def store(single: bool) -> Cost:
    return Cost(other=4 if single else 3, group=1, array=1)


def action(ndim: int, single: bool) -> Cost:
    return Cost(fma=5, add=2 * ndim - 1, group=1) + site_sum(single)


def force(ndim: int) -> Cost:
    return Cost(fma=4, add=2 * ndim - 1, group=2)


def gradient_and_action(ndim: int, single: bool) -> Cost:
    return force(ndim) + Cost(fma=4) + site_sum(single)


def kick_drift(ndim: int) -> Cost:
    """Momenta in units of the step: a drift is an addition. In two dimensions fields travel once for two steps."""
    return Cost(fma=4, add=2 * ndim, group=2 if ndim == 2 else 4)


def refresh(single: bool) -> Cost:
    return normal(single) + Cost(fma=2, group=1) + 0.125 * (lane_sum(True) if single else Cost())


def trajectory_ends(ndim: int, single: bool) -> list[Cost]:
    """Refresh, last half-kick with both energies, and settle."""
    last = force(ndim) + Cost(fma=3, add=1, group=1) + 0.375 * (lane_sum(True) if single else Cost())
    return [refresh(single), last, Cost(other=1, group=3)]


def observables(shape, single: bool) -> list[Cost]:
    ndim = len(shape)
    reach = [int((heat_kernel(extent) > 1e-16).sum()) // 2 for extent in shape]
    first = Cost(fma=3, add=ndim - 1, group=1) + 4 * lane_sum(single)
    smear = [Cost(fma=1 + n, add=n, group=2) for n in reach]
    return [
        load(single),
        first,
        *smear,
        Cost(fma=1, group=1) + lane_sum(single),
        *[Cost(add=1, group=1)] * ndim,
    ]


def heat_bath(ndim: int, single: bool) -> list[Cost]:
    """A site of a sweep (csrc/include/lfq/heat_bath.hpp): its block, the Gaussian by a step of Newton's, two tries."""
    guess = log(single) + exp(single) + Cost(fma=7, add=2 * ndim - 1, sqrt=1)
    newton = Cost(fma=5, add=2, divide=1)
    gaussian = Cost(fma=2, add=1, divide=1, sqrt=1)
    tries = 2 * (Cost(fma=6, other=3) + word(single) + exp(single))
    return [philox(single) + box_muller(single) + guess + newton + gaussian + tries + Cost(add=1, group=3)]


# ---- clusters and modes (csrc/cpu/cluster_kernels.hpp, fourier_kernels.hpp) --------------------
def clusters(ndim: int, wolff: bool) -> list[Cost]:
    """Activating the bonds of a site, in double for both types: a Philox block, and a comparison for each bond.

    The search for components is scalar, branches on data, and is in no bound. A Wolff cluster asks each of
    its sites for all 2 ndim bonds, and for the blocks of ndim neighbours.
    """
    block = Cost(fma=20, other=40)
    bond = exp(False) + Cost(fma=2, add=3, other=7)
    blocks, bonds = (1 + ndim, 2 * ndim) if wolff else (1, ndim)
    return [blocks * block + bonds * bond + Cost(array=2)]


def hartley(shape) -> list[Cost]:
    """The transform along every axis: a stage for each factor 2 of the extent, then the odd factor densely."""
    phases = []
    for extent in shape:
        odd = extent
        while odd % 2 == 0:
            odd //= 2
        stages = (extent // odd).bit_length() - 1
        phases.append(Cost(fma=odd + stages, add=stages, other=stages / 4, group=2))
    return phases


# ---- flows (csrc/cpu/flow_kernels.hpp), 2-d, one block: each site once active, once frozen ----------
def taps(kernel_size: int, ndim: int = 2) -> tuple[int, int]:
    """Taps of a window at even and at odd offsets."""
    total = kernel_size**ndim
    return (total + 1) // 2, total // 2


def affine_forward(flow, single: bool, sums: bool) -> Cost:
    scale = exp_minus(single) + Cost(other=1) if flow.scale == "exp(-|s|)" else exp(single)
    return 2 * tanh(single) + scale + Cost(fma=1) + (site_sum(single) if sums else Cost())


def affine_backward(flow) -> Cost:
    return Cost(fma=7, other=5 * (flow.scale == "exp(-|s|)"))


def fused_block(flow, single: bool, weights: bool, sums: bool) -> list[Cost]:
    """The stages of csrc/cpu/block_kernels.hpp, each over half of the sites; with weights no gradient by the input."""
    settle = 0.125 * lane_sum(True) if single else Cost()  # eight float32 terms go to double at a time
    # Activations go out and in again.
    net = Cost(fma=8, group=4) + affine_forward(flow, single, False) + (Cost(add=1) + settle if sums else Cost())
    back = affine_backward(flow) + Cost(fma=-1 - weights, add=1, group=2)  # x dy/dx = y - t; dx
    own = Cost(fma=8, add=2, group=3) if weights else Cost()
    energy = Cost(fma=1, add=1) + settle if sums else Cost()  # y^4, y^2
    stages = [
        net + Cost(group=3),
        net + Cost(fma=4, add=3, group=3) + back + own + energy + Cost(fma=1 if sums else 0),
        Cost(fma=12, add=4, group=6) + back + own + energy,
    ]
    if not weights:
        stages[0] += Cost(group=1)
        stages[1] += Cost(group=1)
        stages[2] += Cost(fma=1, group=2)
        stages.append(Cost(fma=8, add=1, group=4))
    return [0.5 * stage for stage in stages]


def block_forward(flow, single: bool, cache: bool, sums: bool) -> list[Cost]:
    even, odd = taps(flow.kernel_size)
    rescale = [Cost(fma=1, group=2)] * flow.rescale
    # Each coupling reads every site, writes and caches (4 entries) the active half.
    move = Cost(group=3 + (4 if cache else 0))
    affine = affine_forward(flow, single, sums) + move
    if not flow.hidden:
        return [Cost(fma=2 * odd) + affine, *rescale]
    last = Cost(fma=flow.hidden[-1] * 2 * (even + odd), group=2 * flow.hidden[-1] + 2)
    return [2 * _hidden(flow), last + affine, *rescale]


def block_backward(flow, weights: bool) -> list[Cost]:
    even, odd = taps(flow.kernel_size)
    rescale = [Cost(fma=2 + weights, group=4)] * flow.rescale
    if not flow.hidden:
        # Couplings: cache, x, g, du in the first sweep; du, g in the second.
        first = affine_backward(flow) + Cost(fma=2 * odd * weights, add=2 * weights, group=2 * 5)
        return [first, Cost(fma=2 * odd, group=2 * 2), *rescale]
    net = [2 * _hidden(flow), 2 * _hidden_backward(flow, weights)]
    return [affine_backward(flow) + Cost(group=2 * 4.5), *net, *rescale]


def _layers(flow) -> list[tuple[int, int]]:
    channels = (1, *flow.hidden, 2)
    return list(zip(channels[:-1], channels[1:], strict=True))


def _hidden(flow) -> Cost:
    """The hidden layers of one net, for one site of the lattice."""
    even, odd = taps(flow.kernel_size)
    total, slope = Cost(), Cost(fma=1, other=2)
    for n, (c_in, c_out) in enumerate(_layers(flow)[:-1]):
        window = (even + odd) / 2 if n == 0 else even + odd
        reads = 1 if n == 0 else 2 * c_in  # even and odd sites in turn, each over all rows
        total += Cost(fma=window * c_in * c_out, group=reads + c_out) + c_out * slope
    return total


def _hidden_backward(flow, weights: bool) -> Cost:
    even, odd = taps(flow.kernel_size)
    total, layers = Cost(), _layers(flow)
    for n, (c_in, c_out) in enumerate(layers):
        first, last = n == 0, n == len(layers) - 1
        # Outputs of the last layer exist on half the sites, inputs of the first too.
        window = (even + odd) / 2 if first or last else even + odd
        if weights:
            total += Cost(fma=window * c_in * c_out, add=c_out / (1 + last), group=2 * c_in + c_out)
        total += Cost(fma=window * c_in * c_out, group=2 * c_out + c_in)
        total += Cost(add=0.5) if first else Cost(fma=c_in, other=2 * c_in, group=c_in)
    return total


def flow_forward(flow, single: bool, cache: bool, sums: bool = True) -> list[Cost]:
    return [Cost(group=2), *block_forward(flow, single, cache, sums) * flow.n_blocks]


def flow_gradient(flow, single: bool, weights: bool, sums: bool) -> list[Cost]:
    """f(z), dS/dphi, and back; `sums` are the log-determinant and the action."""
    if flow.n_blocks == 1 and flow.kernel_size == 3 and not flow.hidden:
        return fused_block(flow, single, weights, sums)
    return [
        *flow_forward(flow, single, True, sums),
        gradient_and_action(2, single) if sums else force(2),
        *block_backward(flow, weights) * flow.n_blocks,
    ]


def multiscale_step(layers, single: bool) -> list[Cost]:
    """A step of flow-HMC through the layers of a multiscale flow of site couplings, in two dimensions."""
    forward, backward = [], []
    volume = float(np.prod(layers[-1]["extent"][:2]))
    for layer in layers:
        share = float(np.prod(layer["extent"][:2])) / volume
        if layer["kind"] == _core.LAYERS["upsample"]:
            # Of four sites one is a multiple of a coarse one; the others are sums of 2, 2 and 4, and noise.
            forward.append(share * Cost(fma=1.75, add=2, group=2))
            backward.append(share * Cost(fma=1.75, add=2, group=2.5))
            continue
        if layer["kind"] == _core.LAYERS["interleave"]:
            forward.append(share * Cost(group=2))
            backward.append(share * Cost(group=2))
            continue
        active, frozen = (_bits(layer, name).bit_count() / 4 for name in ("active", "frozen"))
        net = Cost(fma=2 * _taps_between(layer))
        site = tanh(single) + net + Cost(fma=2, add=2, group=3)
        forward.append(share * (active * site + frozen * Cost(group=1)))
        pulled = Cost(fma=7, add=1, divide=1, group=5)  # the slope and its derivative; h, g, and two cotangents
        backward += [share * active * pulled, share * (active * (net + Cost(group=2)) + frozen * Cost(group=2))]
    return [Cost(group=2), *forward, force(2), *backward[::-1], Cost(fma=2, group=5)]


def _bits(layer, name: str) -> int:
    """The sublattices that a coupling changes, or sees."""
    of_parity = (0b1001, 0b0110)
    return int(layer[name]) or of_parity[int(layer["parity"]) ^ (name == "frozen")]


def _taps_between(layer) -> float:
    """Taps of an active site's window that lie on frozen sites, on average."""
    window = range(-(layer["kernel_size"] // 2), layer["kernel_size"] // 2 + 1)
    active = [s for s in range(4) if _bits(layer, "active") >> s & 1]
    seen = [
        _bits(layer, "frozen") >> (s ^ (2 * (dy % 2) + dx % 2)) & 1 for s in active for dy in window for dx in window
    ]
    return sum(seen) / len(active)


def total(phases: list[Cost]) -> Cost:
    return sum(phases, Cost())


def flow_entries(flow, fused: float = 0) -> float:
    """Entries per site of the work area of a gradient: x, z, g, du, the cache, and the net's channels.

    `fused`: those of a lone block that is fused with the action and keeps a few rows of all else.
    """
    if fused and flow.n_blocks == 1 and flow.kernel_size == 3 and not flow.hidden:
        return fused
    hidden = sum(flow.hidden) + 2 * max((2, *flow.hidden)) if flow.hidden else 0
    return 4 + 4 * flow.n_blocks + hidden


def without_arrays(phases: list[Cost]) -> list[Cost]:
    return [replace(p, array=0) for p in phases]


def as_table_row(phases: list[Cost]) -> dict[str, float]:
    t = total(phases)
    return {name: round(float(np.round(getattr(t, name), 2)), 2) for name in t.__dataclass_fields__}
