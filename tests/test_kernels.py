"""Every kernel against lfq/reference.py: every instruction set, both dtypes, forward and backward.

Tolerances: rounding of n operations on numbers of size s is taken as 40 eps s sqrt(n); a wrong term is
orders of magnitude above that.
"""

import numpy as np
import pytest

import lfq
from lfq import _core, reference

SHAPES = [(8,), (6, 10), (16, 16), (4, 6, 8), (4, 2, 6, 4)]
# Lattices whose chains are spread over the lanes, slab by slab (on some instruction sets).
SPLIT = [(64, 64), (32, 8, 16), (24, 16, 16), (48, 8, 16), (32, 4, 6, 8)]

FLOWS = {
    "paper": dict(kernel_size=3, n_blocks=1),
    "three blocks, exp(s)": dict(kernel_size=3, n_blocks=3, scale="exp(s)"),
    "wide kernel": dict(kernel_size=5, n_blocks=1),
    "kernel 9 with bias": dict(kernel_size=9, n_blocks=1, bias=True),
    "hidden 8-8": dict(
        kernel_size=3, n_blocks=2, hidden=(8, 8), activation="leaky_relu", bias=True, scale="exp(s)"
    ),
    "hidden 5": dict(kernel_size=3, n_blocks=1, hidden=(5,)),
    "hidden 3-11-2, kernel 5": dict(
        kernel_size=5, n_blocks=1, hidden=(3, 11, 2), activation="leaky_relu", rescale=False
    ),
    **{f"even {n}": dict(kernel_size=3, n_blocks=2, scale="even", features=n) for n in (1, 2, 4, 8)},
    "even 4, hidden, kernel 5": dict(
        kernel_size=5, n_blocks=1, hidden=(3,), bias=True, scale="even", features=4
    ),
    "site": dict(kernel_size=3, n_blocks=2, scale="site", rescale=False),
    "site, sublattices": dict(kernel_size=3, n_blocks=2, scale="site", rescale=False, sublattices=True),
    "even 2, bias, sublattices, kernel 5": dict(
        kernel_size=5, n_blocks=1, bias=True, scale="even", features=2, sublattices=True
    ),
    "sublattices": dict(kernel_size=3, n_blocks=1, sublattices=True),
    "order": dict(kernel_size=3, n_blocks=2, scale="site", sublattices=True, order="e|c c|e e|c o|ce c|eo e|co o|ce"),
    "bias, kernel 5, order": dict(kernel_size=5, n_blocks=1, bias=True, sublattices=True, order="c|eo o|c e|o"),
    "site, rescale, hidden, kernel 5": dict(kernel_size=5, n_blocks=1, hidden=(3,), bias=True, scale="site"),
}


def reference_layers(flow, shape):
    """The reference's layers for a flow."""
    if isinstance(flow, lfq.Compose):
        return [layer for part in flow.flows for layer in reference_layers(part, shape)]
    if isinstance(flow, lfq.InterleaveMap):
        return [reference.Interleave(shape)]
    if isinstance(flow, lfq.UpsampleMap):
        return [reference.Upsample(shape)]
    layers, couplings = [], flow.program(shape)
    couplings = couplings[couplings["kind"] == _core.LAYERS["coupling"]]
    for block in np.split(couplings, flow.n_blocks):
        for record in block:
            layers.append(
                reference.Coupling(
                    shape,
                    int(record["parity"]),
                    flow.kernel_size,
                    hidden=flow.hidden,
                    activation=flow.activation,
                    bias=flow.bias,
                    scale=flow.scale,
                    features=flow.features or 0,
                    sublattices=flow.sublattices,
                    changed=int(record["active"]),
                    seen=int(record["frozen"]),
                )  # fmt: skip
            )
        if flow.rescale:
            layers.append(reference.Rescale(shape))
    return layers


def make_flow(name, ndim, rng, size=0.25):
    flow = lfq.AffineFlow(ndim=ndim, **FLOWS[name])
    flow.weights = rng.normal(size=flow.n_weights) * size
    return flow


def close(actual, wanted, dtype, n=1, scale=None):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    scale = max(1.0, np.abs(wanted).max()) if scale is None else scale
    tolerance = 40 * np.finfo(dtype).eps * scale * np.sqrt(n)
    worst = np.abs(actual - wanted).max()
    assert worst <= tolerance, f"differs by {worst:.3g}, rounding allows {tolerance:.3g}"


def field(rng, shape, dtype, n=11):
    """n chains: not a multiple of any vector width."""
    return rng.normal(size=(n, *shape)).astype(dtype)


# ---- random numbers -------------------------------------------------------------------------


def test_philox_known_answers():
    # The vectors published with Random123 (Salmon et al., SC 2011).
    for counter, key, wanted in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        found = _core.philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
        assert found.tolist() == wanted


def test_normals_match_the_reference(isa, dtype):
    seed, trajectory, n = 0x123456789ABCDEF0, (1 << 40) + 7, 37
    out = np.empty((19, n), dtype=dtype)
    _core.normal(seed, 3, trajectory, 5, 19, out)
    wanted = reference.normals(seed, 3, trajectory, np.arange(5, 24), n, dtype)
    close(out, wanted, dtype, scale=8)


# ---- phi^4 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + SPLIT, ids=str)
def test_action_force_and_observables(isa, dtype, shape, rng):
    theory = lfq.Phi4(shape, beta=0.31, lam=0.7)
    phi = field(rng, shape, dtype)
    exact = phi.astype(np.float64)
    action = reference.phi4_action(exact, 0.31, 0.7, len(shape))
    close(theory.action(phi), action, dtype)
    close(theory.force(phi), reference.phi4_force(exact, 0.31, 0.7, len(shape)), dtype)
    found, wanted = theory.measure(phi), reference.observables(exact, len(shape))
    for i, name in enumerate(lfq.observables.OBSERVABLES):
        close(found[name], wanted[..., i], dtype, n=10)


# ---- flows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (8, 6), (2, 2), (4, 6, 4)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_flow_forward_inverse_and_vjp(isa, dtype, name, shape, rng):
    if "order" in name and len(shape) == 1:
        pytest.skip("a chain has no even sites but those of the coarser one")
    flow = make_flow(name, len(shape), rng, 0.25 if len(shape) < 3 else 0.05)
    layers = reference_layers(flow, shape)
    check_flow(flow, layers, shape, dtype, rng)


def test_the_largest_window(isa, dtype, rng):
    """Nine sites wide in four dimensions, on all sublattices but one."""
    flow = lfq.AffineFlow(kernel_size=9, ndim=4, sublattices=True, order="c|eo", rescale=False)
    flow.weights = 0.01 * rng.normal(size=flow.n_weights)
    z, dx = (rng.normal(size=(1, 2, 2, 2, 2)).astype(dtype) for _ in range(2))
    dz, dweights = flow.vjp(z, dx, 0.5, weights=True)
    layers, flat = reference_layers(flow, z.shape[1:]), z.reshape(1, -1).astype(np.float64)
    wanted = reference.flow_vjp(layers, flow.weights, flat, dx.astype(np.float64), np.array([0.5]))
    close(flow.forward(z)[0], reference.flow_forward(layers, flow.weights, flat)[0], dtype, 6561)
    close(dz.reshape(1, -1), wanted[0], dtype, 6561)
    close(dweights, wanted[1], dtype, 6561)


@pytest.mark.parametrize("shape", [(8,), (8, 4), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", ["interleave", "upsample", "multiscale"])
def test_enlarging_flows(isa, dtype, kind, shape, rng):
    ndim = len(shape)
    maps = {
        "interleave": [lfq.InterleaveMap(ndim)],
        "upsample": [lfq.UpsampleMap(1.3, np.linspace(0.3, 0.6, ndim), np.linspace(0.9, 0.7, ndim), ndim)],
    }
    affine = make_flow("paper", ndim, rng, 0.1)
    flow = lfq.Compose([*maps.get(kind, []), affine])
    layers = reference_layers(flow, shape)
    if kind == "multiscale":
        coarse = tuple(extent // 2 for extent in shape)
        first, up = make_flow("hidden 5", ndim, rng, 0.1), maps["upsample"][0]
        flow = lfq.Compose([first, up, affine])
        layers = reference_layers(first, coarse) + reference_layers(lfq.Compose([up, affine]), shape)
    check_flow(flow, layers, shape, dtype, rng)


def check_flow(flow, layers, shape, dtype, rng):
    n, volume = 11, int(np.prod(shape))
    assert flow.n_weights == sum(layer.n_weights for layer in layers)
    z = field(rng, shape, dtype, n)
    flat = z.astype(np.float64).reshape(n, volume)
    x, log_det = flow.forward(z)
    wanted_x, wanted_log_det = reference.flow_forward(layers, flow.weights, flat)
    depth = 20 * len(layers)
    close(x, wanted_x, dtype, depth)
    close(log_det, wanted_log_det, dtype, depth * volume)

    back, inverse_log_det = flow.inverse(x)
    close(back, z, dtype, 100 * depth)
    close(inverse_log_det, -log_det, dtype, 100 * depth * volume)

    dx, dlog_det = rng.normal(size=z.shape).astype(dtype), rng.normal(size=n).astype(dtype).astype(np.float64)
    dz, dweights = flow.vjp(z, dx, dlog_det, weights=True)
    wanted_dz, wanted_dweights = reference.flow_vjp(
        layers, flow.weights, flat, dx.astype(np.float64), dlog_det
    )
    close(dz.reshape(n, volume), wanted_dz, dtype, 20 * depth)
    close(dweights, wanted_dweights, dtype, 20 * depth * n)
    np.testing.assert_array_equal(flow.vjp(z, dx, dlog_det), dz)

    if volume > 32:  # the reference solves dense systems
        return
    dx, dweights = flow.inverse_vjp(z, dz, dlog_det, weights=True)
    wanted_dx, wanted_dweights = reference.flow_inverse_vjp(
        layers, flow.weights, flat, dz.reshape(n, volume).astype(np.float64), dlog_det
    )
    close(dx.reshape(n, volume), wanted_dx, dtype, 200 * depth)
    close(dweights, wanted_dweights, dtype, 200 * depth * n)


@pytest.mark.parametrize("name", ["paper", "hidden 8-8"])
def test_pullback_and_loss(isa, dtype, name, rng):
    theory = lfq.Phi4((6, 8), beta=0.5, lam=0.5)
    flow = make_flow(name, 2, rng, 0.2)
    layers, z = reference_layers(flow, theory.shape), field(rng, theory.shape, dtype)
    flat = z.astype(np.float64).reshape(len(z), -1)
    pulled = theory.pullback(flow)
    action, force = reference.pullback(layers, flow.weights, flat, 0.5, 0.5)
    close(pulled.action(z), action, dtype, 2000)
    close(pulled.force(z).reshape(flat.shape), force, dtype, 400)

    found = [np.empty(len(z)), np.empty(len(z)), np.empty(flow.n_weights)]
    _core.flow_loss(theory.volume, flow.program(theory.shape), flow.weights, theory._record(), z, *found)
    for value, wanted in zip(found, reference.loss(layers, flow.weights, flat, 0.5, 0.5), strict=True):
        close(value, wanted, dtype, 4000)


# ---- dynamics -------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", lfq.INTEGRATORS)
@pytest.mark.parametrize("with_flow", [False, True], ids=["plain", "flow"])
def test_evolution_matches_the_reference(isa, dtype, integrator, with_flow, rng):
    check_evolution((6, 4), integrator, with_flow, dtype, rng)


@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_evolution_of_split_chains(isa, dtype, shape, rng):
    check_evolution(shape, "leapfrog", False, dtype, rng)


PLANE = [(4, 3), (66, 5), (7, 6), (256, 128)]
# Slices go in pairs where their number is even; a row of the first one moves a plane later than it is kicked.
DEEP = [(4, 1, 4), (2, 2, 3), (4, 3, 5), (6, 2, 4), (3, 4, 5), (16, 16, 16), (2, 3, 2, 4), (4, 5, 3, 2), (5, 2, 3, 4)]


@pytest.mark.parametrize("shape", PLANE + DEEP, ids=str)
@pytest.mark.parametrize("integrator", ["leapfrog", "omf2"])
def test_evolution_of_any_lattice(isa, dtype, shape, integrator, rng):
    check_evolution(shape, integrator, False, dtype, rng)


# Steps go in pairs, on large lattices several pairs at once; two columns or two rows are taken step by step.
@pytest.mark.parametrize(
    "shape", [(4, 4), (66, 6), (65, 4), (64, 64), (66, 1102), (64, 10240), (1024, 1200)], ids=str
)
@pytest.mark.parametrize("integrator, n_steps", [("leapfrog", 1), ("leapfrog", 10), ("leapfrog", 13), ("omf2", 3)])
def test_pairs_of_steps_have_the_bits_of_single_ones(isa, dtype, shape, integrator, n_steps, rng):
    """A lattice tiled with a field evolves as the field does on a lattice of its own."""
    for small in [(shape[0], 2), (2, shape[1])][: 2 - shape[0] % 2]:
        tiles = (1, shape[0] // small[0], shape[1] // small[1])
        start, found = [field(rng, small, dtype, 3) for _ in range(2)], []
        for extent, parts in ((small, start), (shape, [np.tile(part, tiles) for part in start])):
            theory = lfq.Phi4(extent, beta=0.6, lam=0.5)
            hmc = lfq.HMC(theory, tau=0.5, n_steps=n_steps, integrator=integrator, dtype=str(dtype))
            found.append(hmc.evolve(*parts))
        for single, paired in zip(*found, strict=True):
            np.testing.assert_array_equal(paired, np.tile(single, tiles))


def check_evolution(shape, integrator, with_flow, dtype, rng):
    ndim = len(shape)
    theory = lfq.Phi4(shape, beta=0.5, lam=0.5)
    flow = make_flow("paper", 2, rng, 0.2)
    scheme = lfq.INTEGRATORS[integrator]
    hmc = lfq.HMC(theory.pullback(flow) if with_flow else theory, tau=0.5, n_steps=3, integrator=integrator)
    z, momenta = field(rng, shape, dtype), field(rng, shape, dtype)

    def force(z):
        if not with_flow:
            return reference.phi4_force(z, 0.5, 0.5, ndim)
        flat = z.reshape(len(z), -1)
        return reference.pullback(reference_layers(flow, shape), flow.weights, flat, 0.5, 0.5)[1].reshape(
            z.shape
        )

    wanted = reference.evolve(
        force, z.astype(np.float64), momenta.astype(np.float64), scheme.kick, scheme.drift, hmc.step_size, 3
    )
    for found, exact in zip(hmc.evolve(z, momenta), wanted, strict=True):
        close(found, exact, dtype, 500)


@pytest.mark.parametrize("shape", [(8,), (4, 6), (4, 2, 4), (64, 64), (32, 8, 16)], ids=str)
@pytest.mark.parametrize("with_flow", [False, True], ids=["plain", "flow"])
def test_hmc_chain_matches_the_reference(isa, shape, with_flow, rng):
    """Ten trajectories of the same chains, accept decisions included, from another program."""
    theory, scheme = lfq.Phi4(shape, beta=0.3, lam=0.4), lfq.INTEGRATORS["leapfrog"]
    flow = make_flow("paper", len(shape), rng, 0.15)
    n_steps = 4 if theory.volume < 1000 else 12
    if with_flow and theory.volume > 1000:
        flow.weights = flow.weights / 5
    hmc = lfq.HMC(theory.pullback(flow) if with_flow else theory, tau=1.0, n_steps=n_steps)
    start = hmc.start(9, seed=77, first_chain=4)
    block = hmc.advance(start, 10)
    z = start.latent.reshape(9, -1) if with_flow else start.latent
    states, dh, accepted = reference.hmc(
        z, 0.3, 0.4, scheme.kick, scheme.drift, 1 / n_steps, n_steps, 10, seed=77, first_chain=4,
        first_trajectory=start.trajectory,
        layers=reference_layers(flow, shape) if with_flow else (), weights=flow.weights,
    )  # fmt: skip
    close(block.dh, dh, np.float64, 1e4, scale=10 + theory.volume)  # a difference of energies that large
    np.testing.assert_array_equal(block.accepted, accepted)
    assert accepted.any()
    assert theory.volume > 1000 or not accepted.all()
    close(block.state.latent.reshape(z.shape), states[-1], np.float64, 1e6)
    phi = theory.pullback(flow).field(block.state.latent) if with_flow else states[-1]
    close(block.phi, phi, np.float64, 1e6)
