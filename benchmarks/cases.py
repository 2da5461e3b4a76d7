"""The benchmarked work: inputs, calls, how much each call does, and what it costs at least.

Used by benchmarks.py (ASV) and report.py alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

import lfq
from lfq import _core

from . import costs

PAPER = {"kernel_size": 3}
DEEP = {
    "kernel_size": 3, "n_blocks": 8, "hidden": (8, 8), "activation": "leaky_relu", "bias": True,
    "scale": "exp(s)", "rescale": False,
}  # fmt: skip
N_STEPS = 10
COUPLINGS = {2: (0.634, 0.5), 3: (0.35, 0.5)}  # (beta, lam), both in the symmetric phase


def theory(shape) -> lfq.Phi4:
    return lfq.Phi4(shape, *COUPLINGS[len(shape)])


@cache
def _thermal(shape, n: int) -> np.ndarray:
    hmc = lfq.HMC(theory(shape), tau=1.0, n_steps=N_STEPS, dtype="float32")
    return hmc.advance(hmc.start(n, seed=1), 1, 20).phi


def thermal_fields(shape, n: int, dtype) -> np.ndarray:
    """n fields after 20 trajectories from a random start, a new array."""
    return _thermal(tuple(shape), n).astype(dtype)


def group_bytes(entries: float, shape, dtype, split: bool) -> float:
    """Size of `entries` fields of a group: a chain in each lane, or a slab of one chain where lfq splits."""
    vector = {"x86-64-v4": 64, "x86-64-v3": 32}.get(_core.isa(), 16)
    lanes, volume = vector // np.dtype(dtype).itemsize, math.prod(shape)
    split = split and len(shape) > 1 and volume >= 4096 and shape[0] % lanes == 0 and shape[0] // lanes >= 2
    return entries * volume / (lanes if split else 1) * vector


@dataclass(frozen=True)
class Work:
    """A call, the units of work it does, and its costs per unit.

    Attributes
    ----------
    call : callable
    amount : float
        Site-updates or sites.
    phases : list of costs.Cost
        For one unit.
    group_bytes : float
        Of the work area that a group's inner loops run over.
    array_bytes : float
        Size of the caller's arrays.
    """

    call: Callable[[], object]
    amount: float
    phases: list
    group_bytes: float
    array_bytes: float


@dataclass(frozen=True)
class Kernel:
    """One benchmarked kernel.

    Attributes
    ----------
    title, unit : str
    lattices : dict
        Label to (shape, number of chains).
    build : callable
        (shape, n, dtype, n_threads) to Work.
    """

    title: str
    unit: str
    lattices: dict[str, tuple[tuple[int, ...], int]]
    build: Callable[..., Work]


# ---- phi^4 -----------------------------------------------------------------------------------
def _action(shape, n, dtype, n_threads):
    phi, out, record = thermal_fields(shape, n, dtype), np.empty(n), theory(shape)._record()
    single = phi.itemsize == 4
    return Work(
        lambda: _core.phi4_action(record, phi, out, n_threads),
        phi.size,
        [costs.load(single), costs.action(len(shape), single)],
        group_bytes(1, shape, dtype, True),
        phi.nbytes,
    )


def _force(shape, n, dtype, n_threads):
    phi, record = thermal_fields(shape, n, dtype), theory(shape)._record()
    out, single = np.empty_like(phi), phi.itemsize == 4
    return Work(
        lambda: _core.phi4_force(record, phi, out, n_threads),
        phi.size,
        [costs.load(single), costs.force(len(shape)), costs.store(single)],
        group_bytes(2, shape, dtype, True),
        2 * phi.nbytes,
    )


def _observables(shape, n, dtype, n_threads):
    phi, t = thermal_fields(shape, n, dtype), theory(shape)
    record, smear, out = t._record(), t._smear(), np.empty((n, _core.N_OBSERVABLES))
    return Work(
        lambda: _core.phi4_observables(record, phi, smear, out, n_threads),
        phi.size,
        costs.observables(shape, phi.itemsize == 4),
        group_bytes(3, shape, dtype, True),
        phi.nbytes,
    )


def _normals(shape, n, dtype, n_threads):
    out = np.empty((n, math.prod(shape)), dtype=dtype)
    return Work(
        lambda: _core.normal(1, _core.PURPOSES["momenta"], 0, 0, n, out, n_threads),
        out.size,
        [costs.normal(out.itemsize == 4) + costs.Cost(array=1)],
        0,
        out.nbytes,
    )


def _leapfrog(shape, n, dtype, n_threads):
    # Many small steps forth, so that packing the arrays does not count; energy is conserved throughout.
    n_steps = 400 if math.prod(shape) < 10**4 else 50
    phi = thermal_fields(shape, n, dtype)
    pi = np.random.default_rng(1).standard_normal(phi.shape).astype(dtype)
    hmc = lfq.HMC(theory(shape), tau=n_steps * 0.05, n_steps=n_steps)
    settings, record, weights = hmc._settings(), hmc.theory._record(), np.empty(0)
    single = phi.itemsize == 4
    packing = [(2 / n_steps) * phase for phase in (costs.load(single), costs.store(single))]
    return Work(
        lambda: _core.evolve(None, weights, record, settings, phi, pi, n_threads),
        phi.size * n_steps,
        [costs.kick_drift(len(shape)), *packing],
        group_bytes(2, shape, dtype, True),
        2 * phi.nbytes,
    )


def _advance(hmc, fields: np.ndarray, n_trajectories: int):
    """Trajectories by a sampler's `advance` without observables; each call starts where the last one ended."""
    state = hmc.start(len(fields), seed=1, phi=fields)

    def call():
        nonlocal state
        state = hmc.advance(state, 1, n_trajectories, measure=False).state

    return call


def _hmc(shape, n, dtype, n_threads):
    n_trajectories = 10 if math.prod(shape) < 10**4 else 2
    phi = thermal_fields(shape, n, dtype)
    hmc = lfq.HMC(theory(shape), n_steps=N_STEPS, dtype=dtype, n_threads=n_threads)
    single, ndim = phi.itemsize == 4, len(shape)
    ends = [(1 / N_STEPS) * phase for phase in costs.trajectory_ends(ndim, single)]
    packing = [
        (1 / (N_STEPS * n_trajectories)) * phase for phase in (costs.load(single), costs.store(single))
    ]
    return Work(
        _advance(hmc, phi, n_trajectories),
        phi.size * N_STEPS * n_trajectories,
        [costs.kick_drift(ndim), *ends, *packing],
        group_bytes(2, shape, dtype, True),
        phi.nbytes,
    )


def _hmc_measured(shape, n, dtype, n_threads):
    """As `lfq.HMC.advance` runs it with a sample after every trajectory."""
    hmc = lfq.HMC(theory(shape), n_steps=N_STEPS, dtype=dtype, n_threads=n_threads)
    state = hmc.start(n, seed=1, phi=thermal_fields(shape, n, dtype))
    n_samples = 10 if math.prod(shape) < 10**4 else 2
    single, ndim = np.dtype(dtype).itemsize == 4, len(shape)
    ends = [*costs.trajectory_ends(ndim, single), *costs.without_arrays(costs.observables(shape, single))[1:]]
    return Work(
        lambda: hmc.advance(state, n_samples),
        state.latent.size * N_STEPS * n_samples,
        [costs.kick_drift(ndim), *[(1 / N_STEPS) * phase for phase in ends]],
        group_bytes(3, shape, dtype, True),
        state.latent.nbytes,
    )


# ---- samplers --------------------------------------------------------------------------------
def _clusters(cluster: str):
    """Cluster updates of near-critical fields; each call starts where the last one ended."""

    def build(shape, n, dtype, n_threads):
        sampler = lfq.ClusterHMC(theory(shape), cluster=cluster)
        phi, flipped = thermal_fields(shape, n, dtype), np.empty(n, dtype=np.int64)
        record, settings, trajectory = sampler.theory._record(), sampler._record(), 0

        def call():
            nonlocal trajectory
            _core.cluster_update(record, settings, 1, 0, trajectory, phi, flipped, n_threads)
            trajectory += 1

        sites = phi.size
        if cluster == "wolff":
            sites = 0
            for _ in range(20):
                call()
                sites += flipped.sum() / 20
        phases = costs.clusters(len(shape), cluster == "wolff")
        return Work(call, sites, phases, group_bytes(0, shape, dtype, False) + 13 * math.prod(shape), phi.nbytes)

    return build


def _heat_bath(shape, n, dtype, n_threads):
    """Sweeps without observables; each call starts where the last one ended."""
    n_sweeps = 10 if math.prod(shape) < 10**4 else 2
    phi = thermal_fields(shape, n, dtype)
    single = phi.itemsize == 4
    packing = [(1 / n_sweeps) * phase for phase in (costs.load(single), costs.store(single))]
    return Work(
        _advance(lfq.HeatBath(theory(shape), dtype=dtype, n_threads=n_threads), phi, n_sweeps),
        phi.size * n_sweeps,
        [*costs.heat_bath(len(shape), single), *packing],
        group_bytes(1, shape, dtype, True),
        phi.nbytes,
    )


def _fourier(shape, n, dtype, n_threads):
    n_trajectories = 2
    hmc = lfq.FourierHMC(theory(shape), n_steps=N_STEPS, dtype=dtype, n_threads=n_threads)
    phi = thermal_fields(shape, n, dtype)
    single, ndim = phi.itemsize == 4, len(shape)
    ends = [(1 / N_STEPS) * phase for phase in costs.trajectory_ends(ndim, single)]
    return Work(
        _advance(hmc, phi, n_trajectories),
        phi.size * N_STEPS * n_trajectories,
        [costs.force(ndim), *costs.hartley(shape), *costs.hartley(shape), costs.Cost(fma=3, group=6), *ends],
        group_bytes(4, shape, dtype, False),
        phi.nbytes,
    )


def _annealing(shape, n, dtype, n_threads):
    n_temperatures = 5
    sampler = lfq.Annealing(
        theory(shape), n_temperatures=n_temperatures, n_steps=N_STEPS, dtype=dtype, n_threads=n_threads
    )
    single, ndim = np.dtype(dtype).itemsize == 4, len(shape)
    ends = [(1 / N_STEPS) * phase for phase in costs.trajectory_ends(ndim, single)]
    return Work(
        lambda: sampler.sample(n, seed=1),
        n * math.prod(shape) * N_STEPS * n_temperatures,
        [costs.kick_drift(ndim), *ends],
        group_bytes(2, shape, dtype, True),
        n * math.prod(shape) * np.dtype(dtype).itemsize,
    )


# ---- flows -----------------------------------------------------------------------------------
def _flow_inputs(structure, shape, n, dtype):
    flow = lfq.AffineFlow(**structure)
    return flow, flow.program(shape), flow.weights, thermal_fields(shape, n, dtype)


def _coupling_forward(shape, n, dtype, n_threads):
    flow, layers, weights, z = _flow_inputs(PAPER, shape, n, dtype)
    x, log_det, volume, single = np.empty_like(z), np.empty(n), math.prod(shape), z.itemsize == 4
    return Work(
        lambda: _core.flow_forward(volume, layers, weights, z, x, log_det, n_threads),
        z.size,
        [costs.load(single), *costs.flow_forward(flow, single, False), costs.store(single)],
        group_bytes(2, shape, dtype, False),
        2 * z.nbytes,
    )


def _coupling_vjp(shape, n, dtype, n_threads):
    flow, layers, weights, z = _flow_inputs(PAPER, shape, n, dtype)
    rng = np.random.default_rng(1)
    dx, dlog_det = rng.standard_normal(z.shape).astype(dtype), rng.standard_normal(n)
    dz, dweights, volume = np.empty_like(z), np.empty(weights.size), math.prod(shape)
    single = z.itemsize == 4
    gradient = costs.flow_forward(flow, single, True) + costs.block_backward(flow, True) * flow.n_blocks
    return Work(
        lambda: _core.flow_vjp(volume, layers, weights, z, dx, dlog_det, dz, dweights, n_threads),
        z.size,
        [costs.load(single), costs.load(single), *gradient, costs.store(single)],
        group_bytes(costs.flow_entries(flow), shape, dtype, False),
        3 * z.nbytes,
    )


def _sampling(shape, n, dtype, n_threads):
    flow, layers, weights, z = _flow_inputs(PAPER, shape, n, dtype)
    x, log_det, volume = np.empty_like(z), np.empty(n), math.prod(shape)

    def call():
        _core.normal(1, _core.PURPOSES["latent"], 0, 0, n, z, n_threads)
        _core.flow_forward(volume, layers, weights, z, x, log_det, n_threads)

    single = z.itemsize == 4
    forward = [costs.load(single), *costs.flow_forward(flow, single, False), costs.store(single)]
    return Work(
        call,
        z.size,
        [costs.normal(single) + costs.Cost(array=1), *forward],
        group_bytes(2, shape, dtype, False),
        2 * z.nbytes,
    )


def _training(structure):
    def build(shape, n, dtype, n_threads):
        flow, layers, weights, z = _flow_inputs(structure, shape, n, dtype)
        action, log_det, dweights = np.empty(n), np.empty(n), np.empty(weights.size)
        volume, record, single = math.prod(shape), theory(shape)._record(), z.itemsize == 4
        return Work(
            lambda: _core.flow_loss(volume, layers, weights, record, z, action, log_det, dweights, n_threads),
            z.size,
            [costs.load(single), *costs.flow_gradient(flow, single, True, True)],
            group_bytes(costs.flow_entries(flow, fused=1), shape, dtype, False),  # z
            z.nbytes,
        )

    return build


def _train(shape, n, dtype, n_threads):
    """`lfq.train` as the main job calls it: the coarse chains move on by 20 trajectories in every step."""
    target = theory(shape)
    prior = lfq.Interleave(lfq.Phi4(tuple(extent // 2 for extent in shape), 0.576, 0.5), n_warmup=1)
    flow, n_steps = lfq.AffineFlow(**PAPER), 20
    single = np.dtype(dtype).itemsize == 4
    chain = [costs.kick_drift(2)] * N_STEPS + costs.trajectory_ends(2, single)
    hmc = [20 * phase for phase in chain]
    step = [costs.load(single), *costs.flow_gradient(flow, single, True, True)]
    return Work(
        lambda: lfq.train(flow, prior, target, n_steps, n, dtype=dtype, n_threads=n_threads, n_evaluation=n),
        n * math.prod(shape) * n_steps,
        [*hmc, *step],
        group_bytes(2, prior.coarse.shape, dtype, True),
        n * math.prod(shape) * np.dtype(dtype).itemsize,
    )


def _flow_hmc(shape, n, dtype, n_threads):
    n_trajectories = 2
    flow = lfq.AffineFlow(**PAPER)
    hmc = lfq.HMC(theory(shape).pullback(flow), n_steps=N_STEPS, dtype=dtype, n_threads=n_threads)
    phi = thermal_fields(shape, n, dtype)
    single = phi.itemsize == 4
    step = [*costs.flow_gradient(flow, single, False, False), costs.Cost(fma=2, group=3)]  # kick and drift inside
    first = (1 / (N_STEPS * n_trajectories)) * costs.total(costs.flow_gradient(flow, single, False, True))
    ends = [
        costs.refresh(single),
        costs.Cost(group=6),
        costs.Cost(fma=2, group=2),
        costs.Cost(other=3, group=9),
    ]
    return Work(
        _advance(hmc, phi, n_trajectories),
        phi.size * N_STEPS * n_trajectories,
        [*step, first, *[(1 / N_STEPS) * phase for phase in ends]],
        group_bytes(costs.flow_entries(flow, fused=2.5), shape, dtype, False),  # z, momenta and half of the gradient
        phi.nbytes,
    )


def _multiscale_hmc(shape, n, dtype, n_threads):
    """With the weights of an untrained flow: it runs equally fast with any."""
    n_trajectories = 2
    flow = lfq.MultiscaleFlow(shape[0].bit_length() - 1, seed=1)
    hmc = lfq.HMC(theory(shape).pullback(flow), tau=0.5, n_steps=N_STEPS, dtype=dtype, n_threads=n_threads)
    z = lfq.Gaussian(shape).sample(n, seed=1, dtype=dtype)
    single, layers = z.itemsize == 4, flow.program(shape)
    step = costs.multiscale_step(layers, single)
    ends = [costs.refresh(single), costs.Cost(group=6), costs.Cost(other=3, group=9)]
    return Work(
        _advance(hmc, flow.forward(z)[0], n_trajectories),
        z.size * N_STEPS * n_trajectories,
        [*step, *[(1 / N_STEPS) * phase for phase in ends]],
        group_bytes(9, shape, dtype, False),
        z.nbytes,
    )


def _independence(shape, n, dtype, n_threads):
    """Proposals, their weights and observables."""
    flow = lfq.AffineFlow(**PAPER)
    sampler = lfq.IndependenceMetropolis(theory(shape), flow, dtype=dtype, n_threads=n_threads)
    state, single = sampler.start(n, seed=1), np.dtype(dtype).itemsize == 4
    forward = [costs.load(single), *costs.flow_forward(flow, single, False), costs.store(single)]
    action = [costs.load(single), costs.action(len(shape), single)]
    return Work(
        lambda: sampler.advance(state, 1),
        2 * state.latent.size,  # the chain's own field is measured again at the start of a call
        [costs.normal(single) + costs.Cost(array=1), *forward, *action, *costs.observables(shape, single)],
        group_bytes(3, shape, dtype, False),
        3 * state.latent.nbytes,
    )


_L8, _L16, _L64, _L256 = (8, 8), (16, 16), (64, 64), (256, 256)
_FIELDS = {"16^2": (_L16, 1024), "64^2": (_L64, 64), "256^2": (_L256, 32), "32^3": ((32,) * 3, 32)}
_CHAINS = {
    "8^2": (_L8, 1024),
    "16^2": (_L16, 256),
    "64^2": (_L64, 64),
    "256^2": (_L256, 32),
    "32^3": ((32,) * 3, 32),
}
_FLOWS = {"16^2": (_L16, 512), "64^2": (_L64, 128)}

KERNELS = {
    "action": Kernel("action", "sites/s", _FIELDS, _action),
    "force": Kernel("force", "sites/s", _FIELDS, _force),
    "observables": Kernel("observables", "sites/s", _FIELDS, _observables),
    "normals": Kernel("momentum refresh (normals into an array)", "sites/s", _FIELDS, _normals),
    "leapfrog": Kernel("leapfrog steps alone", "site-updates/s", _CHAINS, _leapfrog),
    "hmc": Kernel("HMC trajectory, 10 steps", "site-updates/s", _CHAINS, _hmc),
    "hmc_measured": Kernel("the same, observables after each", "site-updates/s", _CHAINS, _hmc_measured),
    "heat_bath": Kernel("heat-bath sweep", "sites/s", _CHAINS, _heat_bath),
    "swendsen_wang": Kernel("Swendsen-Wang sweep", "sites/s", _CHAINS, _clusters("swendsen-wang")),
    "wolff": Kernel("Wolff cluster, sites flipped", "sites/s", _CHAINS, _clusters("wolff")),
    "fourier_hmc": Kernel("Fourier-accelerated HMC trajectory, 10 steps", "site-updates/s", _CHAINS, _fourier),
    "annealing": Kernel("annealing, 5 trajectories of 10 steps", "site-updates/s", _CHAINS, _annealing),
    "independence": Kernel("independence Metropolis, paper's net", "sites/s", _FLOWS, _independence),
    "forward": Kernel("flow forward, paper's net", "sites/s", _FLOWS, _coupling_forward),
    "vjp": Kernel("flow vjp with weights, paper's net", "sites/s", _FLOWS, _coupling_vjp),
    "sampling": Kernel("flow sampling, paper's net", "sites/s", _FLOWS, _sampling),
    "training": Kernel(
        "training step, paper's net", "sites/s", {"8^2": (_L8, 1024), **_FLOWS}, _training(PAPER)
    ),
    "training_deep": Kernel(
        "training step, 16 couplings, 8-8 channels", "sites/s", {"16^2": (_L16, 64)}, _training(DEEP)
    ),
    "train": Kernel("lfq.train, 20 coarse trajectories a step", "sites/s", {"16^2": (_L16, 500)}, _train),
    "flow_hmc": Kernel("flow-HMC trajectory, 10 steps, paper's net", "site-updates/s", _FLOWS, _flow_hmc),
    "multiscale_hmc": Kernel(
        "flow-HMC trajectory, 10 steps, multiscale flow", "site-updates/s", _FLOWS, _multiscale_hmc
    ),
}


def build(kernel: str, lattice: str, dtype: str, n_threads: int) -> Work:
    """The work of a kernel on one of its lattices; with many threads, of more chains."""
    shape, n = KERNELS[kernel].lattices[lattice]
    return KERNELS[kernel].build(shape, max(n, 16 * n_threads), dtype, n_threads)
