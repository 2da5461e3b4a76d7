"""lfq.reference against published vectors, explicit loops, SciPy, finite differences and exact results."""

import cmath
import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from lfq import reference
from lfq.reference import Coupling, Interleave, Rescale, Upsample

N_SIGMA = 4
STEP = 1e-6  # of central differences: truncation STEP^2 / 6, rounding epsilon / STEP times the function

SHAPES = [(6,), (4, 6), (2, 4, 2)]
NETS = [((), "tanh"), ((3,), "tanh"), ((3,), "leaky_relu"), ((3, 2), "tanh"), ((3, 2), "leaky_relu")]
COUPLINGS = [
    # The sum alternates parity without tying it to any one of the other choices.
    Coupling(shape, (kernel_size // 2 + len(hidden) + bias + len(scale)) % 2, kernel_size, *net, bias, scale)
    for shape, kernel_size, net, bias, scale in itertools.product(
        SHAPES, (3, 5), NETS, (False, True), ("exp(-|s|)", "exp(s)")
    )
    for hidden in [net[0]]
] + [
    Coupling((4,), 0, 9, (2,)),
    Coupling((2, 2), 1, 7),
    Coupling((2, 4, 2, 2), 1, 3),
    Coupling((2, 2, 2, 4), 0, 3, (2,), "leaky_relu", True, "exp(s)"),
    *[Coupling((4, 6), n % 3 % 2, 3, scale="even", features=n) for n in (1, 2, 4, 8)],
    Coupling((4,), 1, 5, (3,), bias=True, scale="even", features=2),
    *[Coupling(shape, 1, 3, scale="site") for shape in SHAPES],
    Coupling((4, 6), 0, 5, (3, 2), "leaky_relu", True, "site"),
    *[Coupling(shape, len(shape) % 2, 3, scale="site", sublattices=True) for shape in SHAPES],
    Coupling((4, 6), 1, 5, bias=True, sublattices=True),
    Coupling((2, 4, 2), 0, 3, scale="even", features=2, sublattices=True),
    # the other even sites given the coarse ones, the coarse ones given all others, half of the odd ones given some even
    Coupling((4, 6), 0, 3, scale="site", sublattices=True, changed=0b1000, seen=0b0001),
    Coupling((6, 4), 0, 3, scale="site", sublattices=True, changed=0b0001, seen=0b1110),
    Coupling((4, 6), 1, 5, bias=True, sublattices=True, changed=0b0100, seen=0b1001),
    Coupling((2, 4, 2), 0, 3, scale="site", sublattices=True, changed=0b01101000, seen=0b00000001),
]
OTHERS = [layer(shape) for layer in (Rescale, Interleave, Upsample) for shape in [*SHAPES, (2, 2, 4, 2)]]


def block(shape, **options):
    return [Coupling(shape, 0, 3, **options), Coupling(shape, 1, 3, **options), Rescale(shape)]


FLOWS = {
    "1D-two-upsamplings": [*block((2,)), Upsample((4,)), *block((4,)), Upsample((8,)), *block((8,))],
    "1D-interleave-then-upsample": [Interleave((4,)), *block((4,)), Upsample((8,)), *block((8,))],
    "2D-one-volume": block((4, 4)) + block((4, 4), hidden=(3, 2), scale="exp(s)"),
    "2D-interleave": [*block((2, 4)), Interleave((4, 8)), *block((4, 8), bias=True)],
    "2D-upsample": [*block((2, 4)), Upsample((4, 8)), *block((4, 8), hidden=(2,), activation="leaky_relu")],
    "2D-site": [*block((2, 2), scale="site"), Upsample((4, 4)), *block((4, 4), scale="even", features=2)],
    "3D-upsample": [*block((2, 2, 2)), Upsample((4, 4, 4)), *block((4, 4, 4))],
}


def name(layer):
    return "-".join([type(layer).__name__, *[str(value).replace(" ", "") for value in vars(layer).values()]])


def random_weights(layers, rng):
    """Normal weights for layers one after the other, with the pre-activations of couplings of order 1."""
    weights = []
    for layer in layers:
        scale = layer.kernel_size ** (-len(layer.shape) / 2) if isinstance(layer, Coupling) else 0.5
        weights.append(scale * rng.normal(size=layer.n_weights))
    return np.concatenate(weights)


def direction(rng, shape):
    """A random vector of unit length."""
    v = rng.normal(size=shape)
    return v / np.linalg.norm(v) if v.size else v


def derivative(f, step=STEP):
    return (f(step) - f(-step)) / (2 * step)


def within(values, exact, n_sigma=N_SIGMA):
    """Whether the mean of independent values agrees with the exact one."""
    return abs(np.mean(values) - exact) < n_sigma * np.std(values, ddof=1) / math.sqrt(len(values))


every_layer = pytest.mark.parametrize("layer", COUPLINGS + OTHERS, ids=name)
every_coupling = pytest.mark.parametrize("layer", COUPLINGS, ids=name)
every_flow = pytest.mark.parametrize("layers", FLOWS.values(), ids=FLOWS)


# ---- random numbers ------------------------------------------------------------------------

# Random123, kat_vectors, "philox4x32 10": counter, key, output
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    out = reference.philox4x32(words(counter), words(key))
    assert out.dtype == np.uint32
    assert out.tolist() == words(expected)


def test_philox_acts_on_leading_axes():
    counters, keys, expected = (np.array([words(row[i]) for row in KNOWN_ANSWERS]) for i in range(3))
    out = reference.philox4x32(np.stack([counters, counters[::-1]]), np.stack([keys, keys[::-1]]))
    np.testing.assert_array_equal(out, np.stack([expected, expected[::-1]]))


def box_muller(a, b, dtype):
    """Two normals from two words, with 50 digits until the last rounding."""
    with mpmath.workdps(50):
        if dtype == np.float64:
            u = (mpmath.mpf(a * 2**8 + (b >> 24)) + 0.5) / 2**40
        else:
            u = mpmath.mpf(float(np.float32((a + 0.5) / 2**32)))
        radius = mpmath.sqrt(-2 * mpmath.log(u))
        angle = 2 * mpmath.pi * (b & 0xFFFFFF) / 2**24
        return [float(radius * mpmath.cos(angle)), float(radius * mpmath.sin(angle))]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_normals_from_known_answer(dtype):
    x = words(KNOWN_ANSWERS[0][2])
    out = reference.normals(0, 0, 0, [0], 4, dtype)
    assert out.dtype == dtype
    expected = box_muller(x[0], x[1], dtype) + box_muller(x[2], x[3], dtype)
    np.testing.assert_allclose(out, [expected], rtol=8 * np.finfo(dtype).eps)


SEED = 0xA4093822_299F31D0
TRAJECTORY = 0xABCDEF_12345678


def test_normals_counter_layout():
    purpose, chains = 200, [5, 2**32 - 1]
    out = reference.normals(SEED, purpose, TRAJECTORY, chains, 10)
    assert out.shape == (2, 10)
    for i, chain in enumerate(chains):
        expected = []
        for number in range(3):
            counter = [number, 0x12345678, chain, 0xABCDEF + (purpose << 24)]
            x = reference.philox4x32(counter, [0x299F31D0, 0xA4093822]).tolist()
            expected += box_muller(x[0], x[1], np.float64) + box_muller(x[2], x[3], np.float64)
        np.testing.assert_allclose(out[i], expected[:10], rtol=1e-14)


def test_accept_uniform_counter_layout():
    chains = [5, 2**32 - 1]
    expected = []
    for chain in chains:
        counter = [0, 0x12345678, chain, 0xABCDEF + (1 << 24)]
        x = reference.philox4x32(counter, [0x299F31D0, 0xA4093822]).tolist()
        expected.append(((x[0] << 21 | x[1] >> 11) + 0.5) * 2.0**-53)
    np.testing.assert_array_equal(reference.accept_uniform(SEED, TRAJECTORY, chains), expected)


def test_normals_single_and_double_start_together():
    double = reference.normals(3, 2, 0, range(10), 10000).reshape(-1, 2)
    single = reference.normals(3, 2, 0, range(10), 10000, np.float32).reshape(-1, 2).astype(np.float64)
    r2, r2_single = (double**2).sum(axis=1), (single**2).sum(axis=1)
    # r^2 = -2 ln u moves by 2 du / u: u loses 8 bits (2^-33) and is rounded (half an ulp); then r is rounded.
    bound = 2 * (2.0**-33 * np.exp(r2 / 2) + 2.0**-25) + 4 * 2.0**-24 * r2
    assert np.all(np.abs(r2 - r2_single) <= bound)
    turn = np.abs(np.arctan2(double[:, 1], double[:, 0]) - np.arctan2(single[:, 1], single[:, 0]))
    assert np.all(np.minimum(turn, 2 * np.pi - turn) < 4 * 2.0**-24)


def test_normals_single_rounds_u():
    """The smallest of many radii has u next to 1, where the rounding of u shows."""
    out = reference.normals(3, 2, 0, range(10), 10000, np.float32).reshape(10, 5000, 2)
    chain, pair = divmod(int(np.argmin((out**2).sum(axis=2))), 5000)
    x = reference.philox4x32([pair // 2, 0, chain, 2 << 24], [3, 0]).tolist()
    a, b = x[:2] if pair % 2 == 0 else x[2:]
    np.testing.assert_allclose(out[chain, pair], box_muller(a, b, np.float32), rtol=8 * 2.0**-23)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_normals_distribution(dtype):
    x = reference.normals(7, 3, 11, range(100), 4000, dtype).astype(np.float64).ravel()
    for power in range(1, 7):
        moment = scipy.stats.norm.moment(power)
        sigma = math.sqrt((scipy.stats.norm.moment(2 * power) - moment**2) / x.size)
        assert abs(np.mean(x**power) - moment) < N_SIGMA * sigma, power
    # |x| < 7.6 is where u = 2^-41 ends
    assert np.abs(x).max() < 7.6
    assert scipy.stats.kstest(x, "norm").pvalue > 2 * scipy.stats.norm.sf(N_SIGMA)


def test_accept_uniform_distribution():
    u = np.concatenate([reference.accept_uniform(5, trajectory, range(2000)) for trajectory in range(50)])
    assert scipy.stats.kstest(u, "uniform").pvalue > 2 * scipy.stats.norm.sf(N_SIGMA)
    assert abs(np.corrcoef(u[:-2000], u[2000:])[0, 1]) < N_SIGMA / math.sqrt(u.size)


def test_normals_streams_are_uncorrelated():
    shape = range(100), 4000
    x = reference.normals(7, 3, 11, *shape)
    others = {
        "chain": reference.normals(7, 3, 11, range(1, 101), 4000),
        "trajectory": reference.normals(7, 3, 12, *shape),
        "purpose": reference.normals(7, 4, 11, *shape),
        "seed": reference.normals(8, 3, 11, *shape),
        "next entry": np.roll(x, -1, 1),
        "next pair": np.roll(x, -2, 1),
        "next block": np.roll(x, -4, 1),
    }
    for label, y in others.items():
        # <(x y)^2> = 1 and, for squares, <(x^2 - 1)^2>^2 = 4
        assert abs(np.mean(x * y)) < N_SIGMA / math.sqrt(x.size), label
        assert abs(np.mean((x**2 - 1) * (y**2 - 1))) < N_SIGMA * 2 / math.sqrt(x.size), label


# ---- phi^4 ---------------------------------------------------------------------------------

LATTICES = [(1,), (2,), (5,), (4, 6), (2, 3), (2, 3, 4), (2, 3, 2, 4)]
every_lattice = pytest.mark.parametrize("shape", LATTICES)


def forward_neighbours(site, shape):
    for mu in range(len(shape)):
        yield tuple((site[nu] + (nu == mu)) % shape[nu] for nu in range(len(shape)))


@every_lattice
def test_action_against_loops(shape):
    beta, lam = 0.6, 0.3
    phi = np.random.default_rng(1).normal(size=(2, 3, *shape))
    action = reference.phi4_action(phi, beta, lam, len(shape))
    assert action.shape == (2, 3)
    for i in np.ndindex(2, 3):
        expected = 0.0
        for site in np.ndindex(shape):
            p = phi[i][site]
            expected += (1 - 2 * lam) * p**2 + lam * p**4
            for neighbour in forward_neighbours(site, shape):
                expected -= beta * p * phi[i][neighbour]
        assert action[i] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@every_lattice
def test_action_in_other_conventions(shape):
    """The same action written with kappa, and with a mass and finite differences of rescaled fields."""
    beta, lam, ndim = 0.6, 0.3, len(shape)
    phi = np.random.default_rng(2).normal(size=shape)
    action = reference.phi4_action(phi, beta, lam, ndim)

    def gradient_squared(field):
        return sum(
            (field[neighbour] - field[site]) ** 2
            for site in np.ndindex(shape)
            for neighbour in forward_neighbours(site, shape)
        )

    kappa = beta / 2
    hopping = sum(phi[x] * phi[y] for x in np.ndindex(shape) for y in forward_neighbours(x, shape))
    in_kappa = -2 * kappa * hopping + ((1 - 2 * lam) * phi**2 + lam * phi**4).sum()
    assert action == pytest.approx(in_kappa, rel=1e-12, abs=1e-12)

    m2, g = 2 * (1 - 2 * lam) / beta - 2 * ndim, lam / beta**2
    half = math.sqrt(beta) * phi
    with_half = gradient_squared(half) / 2 + (m2 / 2 * half**2 + g * half**4).sum()
    assert action == pytest.approx(with_half, rel=1e-12, abs=1e-12)

    full = half / math.sqrt(2)
    without_half = gradient_squared(full) + (m2 * full**2 + 4 * g * full**4).sum()
    assert action == pytest.approx(without_half, rel=1e-12, abs=1e-12)


@every_lattice
def test_force_is_minus_the_gradient_of_the_action(shape):
    beta, lam, ndim = 0.6, 0.3, len(shape)
    rng = np.random.default_rng(3)
    phi = rng.normal(size=(4, *shape))
    force = reference.phi4_force(phi, beta, lam, ndim)
    for _ in range(3):
        v = direction(rng, phi.shape)
        slope = derivative(lambda h, v=v: reference.phi4_action(phi + h * v, beta, lam, ndim))
        expected = -(force * v).reshape(4, -1).sum(axis=1)
        np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-7)


def observables_by_loops(phi):
    shape, volume, ndim = phi.shape, phi.size, phi.ndim
    sites = list(np.ndindex(shape))
    nn = sum(phi[x] * phi[y] for x in sites for y in forward_neighbours(x, shape)) / (volume * ndim)

    def wave(k, x):
        return cmath.exp(2j * math.pi * sum(k[mu] * x[mu] / shape[mu] for mu in range(ndim)))

    phi_p = {k: sum(wave(k, x).conjugate() * phi[x] for x in sites) for k in sites}
    p2 = {k: sum(4 * math.sin(math.pi * k[mu] / shape[mu]) ** 2 for mu in range(ndim)) for k in sites}
    phi_t = [sum(math.exp(-p2[k]) * phi_p[k] * wave(k, x) for k in sites) / volume for x in sites]
    g_min = 0.0
    for mu in range(ndim):
        amplitude = sum(cmath.exp(2j * math.pi * x[mu] / shape[mu]) * phi[x] for x in sites)
        g_min += abs(amplitude) ** 2 / volume / ndim
    moments = [sum(phi[x] ** n for x in sites) / volume for n in (1, 2, 4)]
    return [*moments, nn, sum(abs(value) ** 2 for value in phi_t) / volume, g_min]


@every_lattice
def test_observables_against_loops(shape):
    phi = np.random.default_rng(4).normal(size=(2, 1, *shape))
    out = reference.observables(phi, len(shape))
    assert out.shape == (2, 1, 6)
    for i in np.ndindex(2, 1):
        np.testing.assert_allclose(out[i], observables_by_loops(phi[i]), rtol=1e-11, atol=1e-12)


# ---- layers --------------------------------------------------------------------------------


def correlate_by_scipy(field, kernel):
    return scipy.ndimage.correlate(field, kernel, mode="wrap")


def sublattice_of(site):
    return int("".join(str(i % 2) for i in site), 2)


def among(sublattice, bits, parity):
    return bits >> sublattice & 1 if bits else bin(sublattice).count("1") % 2 == parity


def coupling_by_scipy(layer, z, weights):
    """The forward pass on one field, from scipy.ndimage and a loop over sites."""
    if not layer.sublattices:
        return sites_by_scipy(layer, z, weights, lambda site: True)
    x, log_det = z.copy(), 0.0
    active = [s for s in range(2 ** len(layer.shape)) if among(s, layer.changed, layer.parity)]
    for sublattice, part in zip(active, np.split(weights, len(active)), strict=True):
        moved, share = sites_by_scipy(layer, z, part, lambda site, number=sublattice: sublattice_of(site) == number)
        x += moved - z
        log_det += share
    return x, log_det


def sites_by_scipy(layer, z, weights, moves):
    """The same of the active sites for which `moves` is true."""
    ndim, weights = len(layer.shape), list(weights)
    taps = (layer.kernel_size,) * ndim

    def take(n):
        taken, weights[:n] = weights[:n], []
        return taken

    maps = [z.copy()]
    for site in np.ndindex(layer.shape):
        if not among(sublattice_of(site), layer.seen, 1 - layer.parity):
            maps[0][site] = 0.0
    last = layer.features or 2
    for i, channels in enumerate([*layer.hidden, last]):
        u = []
        for _ in range(channels):
            kernels = [np.reshape(take(math.prod(taps)), taps) for _ in maps]
            u.append(sum(map(correlate_by_scipy, maps, kernels)))
        for channel, bias in enumerate(take(channels) if layer.bias else []):
            u[channel] += bias
        if i == len(layer.hidden) and layer.scale == "site":
            maps = u
        elif i == len(layer.hidden) or layer.activation == "tanh":
            maps = [np.tanh(value) for value in u]
        else:
            maps = [np.maximum(value, 0.01 * value) for value in u]
    first, second = take(layer.features), take(layer.features)
    a, b, c = map(math.exp, take(3)) if layer.scale == "site" else (0, 0, 0)
    assert not weights
    x, log_det = z.copy(), 0.0
    for site in filter(moves, np.ndindex(layer.shape)):
        if not among(sublattice_of(site), layer.changed, layer.parity):
            continue
        h = [value[site] for value in maps]
        if layer.scale == "site":
            v = z[site] + h[0]
            x[site] = a * v + b * math.tanh(c * v) + h[1]
            log_det += math.log(a + b * c * (1 - math.tanh(c * v) ** 2))
            continue
        if layer.scale == "even":
            q = sum(w * value**2 for w, value in zip(second, h, strict=True))
            t = sum(w * value for w, value in zip(first, h, strict=True))
        else:
            q, t = -abs(h[0]) if layer.scale == "exp(-|s|)" else h[0], h[1]
        x[site] = z[site] * math.exp(q) + t
        log_det += q
    return x, log_det


@every_coupling
def test_coupling_against_scipy(layer):
    rng = np.random.default_rng(5)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, *layer.shape))
    x, log_det = layer.forward(z, weights)
    for i in range(2):
        expected, expected_log_det = coupling_by_scipy(layer, z[i], weights)
        np.testing.assert_allclose(x[i], expected, rtol=0, atol=1e-13)
        assert log_det[i] == pytest.approx(expected_log_det, abs=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("kernel_size", [3, 5, 9])
def test_correlate_against_scipy(shape, kernel_size):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, 2, *shape))
    kernel = rng.normal(size=(4, 3, *[kernel_size] * len(shape)))
    out = reference.correlate(x, kernel)
    for c, n in np.ndindex(4, 2):
        expected = sum(correlate_by_scipy(x[i, n], kernel[c, i]) for i in range(3))
        np.testing.assert_allclose(out[c, n], expected, rtol=0, atol=1e-10)


def interleave_by_loops(layer, z, weights):
    coarse = [n // 2 for n in layer.shape]
    copies = z.reshape(-1, *coarse)
    x = np.empty(layer.shape)
    for site in np.ndindex(layer.shape):
        a = int("".join(str(n % 2) for n in site), 2)
        x[site] = copies[(a, *[n // 2 for n in site])]
    return x


def upsample_by_loops(layer, z, weights):
    coarse = [n // 2 for n in layer.shape]
    blocks = z.reshape(-1, *coarse)
    x = np.empty(layer.shape)
    for site in np.ndindex(layer.shape):
        bits = [n % 2 for n in site]
        a, c = int("".join(map(str, bits)), 2), sum(bits)
        mean = 0.0
        for shift in itertools.product(*[range(bit + 1) for bit in bits]):
            near = [(n // 2 + e) % m for n, e, m in zip(site, shift, coarse, strict=True)]
            mean += math.exp(weights[0]) * blocks[(0, *near)] / 2**c
        noise = blocks[(a, *[n // 2 for n in site])]
        x[site] = mean if c == 0 else weights[2 * c - 1] * mean + math.exp(weights[2 * c]) * noise
    return x


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 2, 4, 6)], ids=str)
@pytest.mark.parametrize("kind", [Interleave, Upsample])
def test_enlarging_layers_against_loops(kind, shape):
    layer, rng = kind(shape), np.random.default_rng(7)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, math.prod(shape)))
    x, _ = layer.forward(z, weights)
    by_loops = interleave_by_loops if kind is Interleave else upsample_by_loops
    for i in range(2):
        np.testing.assert_allclose(x[i], by_loops(layer, z[i], weights), rtol=0, atol=1e-13)


def test_interleave_is_an_upsampling():
    z = np.random.default_rng(8).normal(size=(2, 24))
    x, log_det = Upsample((4, 6)).forward(z, np.zeros(5))
    np.testing.assert_array_equal(x, Interleave((4, 6)).forward(z, np.zeros(0))[0])
    np.testing.assert_array_equal(log_det, 0)


def test_rescale():
    x, log_det = Rescale((2, 3)).forward(np.ones((4, 2, 3)), [math.log(3)])
    np.testing.assert_allclose(x, 3, rtol=1e-15)
    np.testing.assert_allclose(log_det, 6 * math.log(3), rtol=1e-15)


@every_layer
def test_layer_vjp_against_finite_differences(layer):
    rng = np.random.default_rng(9)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, *layer.input_shape))
    dx, dlog_det = rng.normal(size=(2, *layer.shape)), rng.normal(size=2)
    dz, dweights = layer.vjp(z, weights, dx, dlog_det)
    assert dz.shape == z.shape
    assert dweights.shape == (layer.n_weights,)

    def function(z, weights):
        x, log_det = layer.forward(z, weights)
        return (dx * x).sum() + (dlog_det * log_det).sum()

    for _ in range(3):
        v, w = direction(rng, z.shape), direction(rng, weights.shape)
        slope = derivative(lambda h, v=v: function(z + h * v, weights))
        assert slope == pytest.approx((dz * v).sum(), abs=1e-7)
        slope = derivative(lambda h, w=w: function(z, weights + h * w))
        assert slope == pytest.approx(dweights @ w, abs=1e-7)


@every_layer
def test_layer_jacobian_and_log_det(layer):
    rng = np.random.default_rng(10)
    weights, z = random_weights([layer], rng), rng.normal(size=(1, *layer.input_shape))
    volume = z.size
    unit = np.eye(volume)
    _, log_det = layer.forward(z, weights)
    rows, _ = layer.vjp(
        np.repeat(z, volume, axis=0), weights, unit.reshape(volume, *layer.shape), np.zeros(volume)
    )
    by_vjp = rows.reshape(volume, volume)
    by_differences = derivative(
        lambda h: layer.forward(z + h * unit.reshape(volume, *layer.input_shape), weights)[0]
    ).reshape(volume, volume)
    np.testing.assert_allclose(by_vjp, by_differences.T, rtol=0, atol=1e-8)
    assert log_det == pytest.approx(np.linalg.slogdet(by_vjp)[1], abs=1e-11)
    assert log_det == pytest.approx(np.linalg.slogdet(by_differences)[1], abs=1e-6)


@every_layer
def test_layer_round_trip(layer):
    rng = np.random.default_rng(11)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, 3, *layer.input_shape))
    x, log_det = layer.forward(z, weights)
    back, inverse_log_det = layer.inverse(x, weights)
    assert x.shape == (2, 3, *layer.shape)
    assert log_det.shape == (2, 3)
    np.testing.assert_allclose(back, z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=1e-12)


@every_layer
def test_layer_acts_on_leading_axes(layer):
    rng = np.random.default_rng(12)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, 2, *layer.input_shape))
    dx, dlog_det = rng.normal(size=(2, 2, *layer.shape)), rng.normal(size=(2, 2))
    x, log_det = layer.forward(z, weights)
    dz, dweights = layer.vjp(z, weights, dx, dlog_det)
    total = np.zeros(layer.n_weights)
    for i in np.ndindex(2, 2):
        one, one_log_det = layer.forward(z[i], weights)
        done, done_weights = layer.vjp(z[i], weights, dx[i], dlog_det[i])
        np.testing.assert_allclose(x[i], one, rtol=0, atol=1e-13)
        assert log_det[i] == pytest.approx(one_log_det, abs=1e-13)
        np.testing.assert_allclose(dz[i], done, rtol=0, atol=1e-12)
        total += done_weights
    np.testing.assert_allclose(dweights, total, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", COUPLINGS + OTHERS, ids=name)
def test_layer_is_odd_where_it_should_be(layer):
    """f(-z) = -f(z), log-det even: not with biases, leaky ReLU or exp(s)."""
    rng = np.random.default_rng(13)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, *layer.input_shape))
    x, log_det = layer.forward(z, weights)
    mirrored, mirrored_log_det = layer.forward(-z, weights)
    odd = not isinstance(layer, Coupling) or (
        layer.scale != "exp(s)" and not layer.bias and (not layer.hidden or layer.activation == "tanh")
    )
    asymmetry = np.abs(mirrored + x).max(), np.abs(mirrored_log_det - log_det).max()
    if odd:
        assert max(asymmetry) < 1e-13
    else:
        assert min(asymmetry) > 1e-3


@every_coupling
def test_coupling_leaves_frozen_sites(layer):
    rng = np.random.default_rng(14)
    z = rng.normal(size=(2, *layer.shape))
    x, _ = layer.forward(z, random_weights([layer], rng))
    for site in np.ndindex(layer.shape):
        moved = np.any(x[(..., *site)] != z[(..., *site)])
        assert moved == among(sublattice_of(site), layer.changed, layer.parity)


@pytest.mark.parametrize("layer", [layer for layer in COUPLINGS if not layer.hidden], ids=name)
def test_taps_that_meet_zeros_have_no_gradient(layer):
    rng = np.random.default_rng(15)
    weights, z = random_weights([layer], rng), rng.normal(size=(2, *layer.shape))
    _, dweights = layer.vjp(z, weights, rng.normal(size=z.shape), rng.normal(size=2))
    ndim = len(layer.shape)
    dkernel = dweights[: math.prod(layer.kernel_shapes[0])].reshape(-1, *[layer.kernel_size] * ndim)
    # of the first set of weights
    here = next(s for s in range(2**ndim) if among(s, layer.changed, layer.parity))
    for tap in np.ndindex(dkernel.shape[1:]):
        there = here ^ sublattice_of(i - layer.kernel_size // 2 for i in tap)
        assert np.all((dkernel[(..., *tap)] != 0) == among(there, layer.seen, 1 - layer.parity))


def test_scale_has_slope_zero_where_s_is_zero():
    """With zero weights s = 0 everywhere: its channel has a gradient with exp(s), none with exp(-|s|)."""
    rng = np.random.default_rng(16)
    z, dx, dlog_det = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 4)), rng.normal(size=2)
    for scale, zero in [("exp(-|s|)", True), ("exp(s)", False)]:
        dz, dweights = Coupling((4, 4), 0, 3, scale=scale).vjp(z, np.zeros(18), dx, dlog_det)
        np.testing.assert_array_equal(dz, dx)
        assert np.all(dweights[:9] == 0) == zero
        assert np.any(dweights[9:] != 0)


def test_leaky_relu_has_the_small_slope_at_zero():
    assert reference.activate("leaky_relu", np.array([-2.0, 0.0, 3.0])).tolist() == [-0.02, 0.0, 3.0]
    assert reference.activation_slope("leaky_relu", np.array([-0.02, 0.0, 3.0])).tolist() == [0.01, 0.01, 1.0]


def test_numbers_of_weights():
    assert sum(layer.n_weights for layer in block((8, 8))) == 37
    assert Coupling((8, 8), 0, 3, (8, 8), "leaky_relu", True, "exp(s)").n_weights == 810
    assert [Upsample((2,) * ndim).n_weights for ndim in (1, 2, 3, 4)] == [3, 5, 7, 9]


# ---- flows ---------------------------------------------------------------------------------


def flow_case(layers, seed, n=2):
    rng = np.random.default_rng(seed)
    return rng, random_weights(layers, rng), rng.normal(size=(n, math.prod(layers[-1].shape)))


def test_flow_order_of_layers_weights_and_latent():
    layers = FLOWS["1D-two-upsamplings"]
    _, weights, z = flow_case(layers, 17)
    pieces = np.split(weights, np.cumsum([layer.n_weights for layer in layers])[:-1])
    first, second, third = ([0, 1, 2], [4, 5, 6], [8, 9, 10])
    phi, total = z[:, :2], 0.0
    for steps, upsampling, noise in [(first, 3, z[:, 2:4]), (second, 7, z[:, 4:]), (third, None, None)]:
        for i in steps:
            phi, log_det = layers[i].forward(phi, pieces[i])
            total = total + log_det
        if upsampling is not None:
            phi, log_det = layers[upsampling].forward(np.hstack([phi, noise]), pieces[upsampling])
            total = total + log_det
    x, log_det = reference.flow_forward(layers, weights, z)
    np.testing.assert_allclose(x, phi, rtol=0, atol=1e-13)
    np.testing.assert_allclose(log_det, total, rtol=0, atol=1e-13)


@every_flow
def test_flow_round_trip(layers):
    _, weights, z = flow_case(layers, 18)
    kept = z.copy()
    x, log_det = reference.flow_forward(layers, weights, z)
    back, inverse_log_det = reference.flow_inverse(layers, weights, x)
    assert x.shape == (2, *layers[-1].shape)
    np.testing.assert_allclose(back, z, rtol=0, atol=1e-11)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(z, kept)


@every_flow
def test_flow_log_det_against_dense_jacobian(layers):
    _, weights, z = flow_case(layers, 19, n=1)
    volume = z.shape[1]
    unit = np.eye(volume)
    _, log_det = reference.flow_forward(layers, weights, z)
    by_vjp, _ = reference.flow_vjp(
        layers,
        weights,
        np.repeat(z, volume, axis=0),
        unit.reshape(volume, *layers[-1].shape),
        np.zeros(volume),
    )
    by_differences = derivative(lambda h: reference.flow_forward(layers, weights, z + h * unit)[0])
    by_differences = by_differences.reshape(volume, volume)
    np.testing.assert_allclose(by_vjp, by_differences.T, rtol=0, atol=1e-7)
    assert log_det == pytest.approx(np.linalg.slogdet(by_vjp)[1], abs=1e-10)
    assert log_det == pytest.approx(np.linalg.slogdet(by_differences)[1], abs=1e-6)


@every_flow
def test_flow_vjp_against_finite_differences(layers):
    rng, weights, z = flow_case(layers, 20)
    dx, dlog_det = rng.normal(size=(2, *layers[-1].shape)), rng.normal(size=2)
    dz, dweights = reference.flow_vjp(layers, weights, z, dx, dlog_det)

    def function(z, weights):
        x, log_det = reference.flow_forward(layers, weights, z)
        return (dx * x).sum() + (dlog_det * log_det).sum()

    for _ in range(3):
        v, w = direction(rng, z.shape), direction(rng, weights.shape)
        slope = derivative(lambda h, v=v: function(z + h * v, weights))
        assert slope == pytest.approx((dz * v).sum(), abs=1e-7)
        slope = derivative(lambda h, w=w: function(z, weights + h * w))
        assert slope == pytest.approx(dweights @ w, abs=1e-7)


@every_flow
def test_pullback_and_loss(layers):
    beta, lam, ndim = 0.6, 0.3, len(layers[-1].shape)
    rng, weights, z = flow_case(layers, 21)
    action, force = reference.pullback(layers, weights, z, beta, lam)
    x, log_det = reference.flow_forward(layers, weights, z)
    np.testing.assert_allclose(action, reference.phi4_action(x, beta, lam, ndim) - log_det, rtol=1e-12)
    bare, loss_log_det, dweights = reference.loss(layers, weights, z, beta, lam)
    np.testing.assert_array_equal(bare, reference.phi4_action(x, beta, lam, ndim))
    np.testing.assert_array_equal(loss_log_det, log_det)

    def mean_loss(weights):
        x, log_det = reference.flow_forward(layers, weights, z)
        return np.mean(reference.phi4_action(x, beta, lam, ndim) - log_det)

    for _ in range(3):
        v, w = direction(rng, z.shape), direction(rng, weights.shape)
        slope = derivative(lambda h, v=v: reference.pullback(layers, weights, z + h * v, beta, lam)[0])
        # Relative to |S~|, whose rounding is what the difference divides by the step.
        tolerance = 1e-8 * (10 + np.abs(action).max() + np.linalg.norm(force) + np.linalg.norm(dweights))
        np.testing.assert_allclose(slope, -(force * v).sum(axis=1), rtol=0, atol=tolerance)
        slope = derivative(lambda h, w=w: mean_loss(weights + h * w))
        assert slope == pytest.approx(dweights @ w, abs=tolerance)


# ---- hybrid Monte Carlo --------------------------------------------------------------------

LEAPFROG = (0.5, 0.5), (1.0,)
# Forest and Ruth, Physica D 43 (1990) 105
W1 = 1 / (2 - 2 ** (1 / 3))
W0 = 1 - 2 * W1
FOREST_RUTH = (W1 / 2, (W0 + W1) / 2, (W0 + W1) / 2, W1 / 2), (W1, W0, W1)
INTEGRATORS = {"leapfrog": (LEAPFROG, 2), "forest-ruth": (FOREST_RUTH, 4)}
# exp(s), as -|s| has kinks that spoil the order of an integrator
SMOOTH_FLOW = block((4, 4), scale="exp(s)")


def dynamics(pulled_back, rng):
    """Action and force of 2D phi^4 in z, a start, and momenta."""
    beta, lam = 0.6, 0.5
    momenta = rng.normal(size=(20, 16))
    if pulled_back:
        weights = random_weights(SMOOTH_FLOW, rng)
        action, force = (
            lambda z, i=i: reference.pullback(SMOOTH_FLOW, weights, z, beta, lam)[i] for i in range(2)
        )
        return action, force, 0.5 * rng.normal(size=(20, 16)), momenta
    return (
        lambda phi: reference.phi4_action(phi, beta, lam, 2),
        lambda phi: reference.phi4_force(phi, beta, lam, 2),
        0.5 * rng.normal(size=(20, 4, 4)),
        momenta.reshape(20, 4, 4),
    )


def kinetic(momenta):
    return (momenta**2).reshape(len(momenta), -1).sum(axis=1) / 2


@pytest.mark.parametrize("pulled_back", [False, True], ids=["plain", "pulled-back"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_evolve_order_of_the_energy_error(integrator, pulled_back):
    (kick, drift), order = INTEGRATORS[integrator]
    action, force, z, momenta = dynamics(pulled_back, np.random.default_rng(22))

    def energy_error(n_steps):
        new_z, new_momenta = reference.evolve(force, z, momenta, kick, drift, 0.5 / n_steps, n_steps)
        dh = action(new_z) + kinetic(new_momenta) - action(z) - kinetic(momenta)
        return math.sqrt(np.mean(dh**2))

    # The next term is smaller by step_size^2 times the fastest frequency squared, a few percent.
    assert math.log2(energy_error(20) / energy_error(40)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("pulled_back", [False, True], ids=["plain", "pulled-back"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_evolve_is_reversible(integrator, pulled_back):
    (kick, drift), _ = INTEGRATORS[integrator]
    _, force, z, momenta = dynamics(pulled_back, np.random.default_rng(23))
    new_z, new_momenta = reference.evolve(force, z, momenta, kick, drift, 0.1, 5)
    assert np.abs(new_z - z).max() > 0.1
    back, back_momenta = reference.evolve(force, new_z, -new_momenta, kick, drift, 0.1, 5)
    np.testing.assert_allclose(back, z, rtol=0, atol=1e-11)
    np.testing.assert_allclose(-back_momenta, momenta, rtol=0, atol=1e-11)


def test_evolve_of_an_oscillator():
    """Leapfrog of H = (p^2 + z^2) / 2 rotates by arccos(1 - eps^2 / 2) on an ellipse."""
    eps, n_steps = 0.3, 7
    z, p = reference.evolve(np.negative, np.array([1.0]), np.array([0.0]), *LEAPFROG, eps, n_steps)
    angle = n_steps * math.acos(1 - eps**2 / 2)
    np.testing.assert_allclose(z, math.cos(angle), rtol=1e-13)
    np.testing.assert_allclose(p, -math.sqrt(1 - eps**2 / 4) * math.sin(angle), rtol=1e-13)


@pytest.mark.parametrize("kick_and_drift", [LEAPFROG, FOREST_RUTH], ids=["leapfrog", "forest-ruth"])
def test_evolve_one_step_by_hand(kick_and_drift):
    kick, drift = kick_and_drift

    def force(z):
        return -(z**3) - z

    z, p, eps = 0.7, 0.4, 0.3
    out = reference.evolve(force, np.array([z]), np.array([p]), kick, drift, eps, 1)
    p += kick[0] * eps * force(z)
    for i in range(len(drift)):
        z += drift[i] * eps * p
        p += kick[i + 1] * eps * force(z)
    np.testing.assert_allclose(out, [[z], [p]], rtol=1e-14)


# The trajectory is half a period of no mode: z -> -z would never thermalize it.
FREE = dict(beta=0.4, lam=0.0, kick=LEAPFROG[0], drift=LEAPFROG[1], step_size=0.7, n_steps=2)
FREE_SHAPE = (4,)
FREE_LAYERS = block(FREE_SHAPE)
FREE_THEORIES = {"plain": (), "pulled-back": FREE_LAYERS}


def free_phi2():
    """<phi^2> = mean over p of 1 / (beta p^2 + 2 - 2 D beta), exact at lam = 0."""
    (n,), beta = FREE_SHAPE, FREE["beta"]
    p2 = [4 * math.sin(math.pi * k / n) ** 2 for k in range(n)]
    return np.mean([1 / (beta * q + 2 - 2 * beta) for q in p2])


def free_chain_means(layers, n_chains=1500, n_trajectories=40):
    """Averages over a chain's second half of phi^2, exp(-dH) and the acceptance, one per chain."""
    weights = 0.3 * random_weights(layers, np.random.default_rng(24)) if layers else ()
    start = np.zeros((n_chains, *FREE_SHAPE))
    z, dh, accepted = reference.hmc(
        start, **FREE, n_trajectories=n_trajectories, seed=SEED, layers=layers, weights=weights
    )
    half = n_trajectories // 2
    phi = [reference.flow_forward(layers, weights, sample)[0] if layers else sample for sample in z[half:]]
    return np.mean(np.square(phi), axis=(0, 2)), np.exp(-dh[half:]).mean(axis=0), accepted[half:].mean()


@pytest.mark.parametrize("layers", FREE_THEORIES.values(), ids=FREE_THEORIES)
def test_hmc_free_field(layers):
    phi2, exp_dh, acceptance = free_chain_means(layers)
    assert 0.5 < acceptance < 0.95
    assert within(phi2, free_phi2())
    assert within(exp_dh, 1)


@pytest.mark.parametrize("layers", FREE_THEORIES.values(), ids=FREE_THEORIES)
def test_hmc_without_accept_step_is_wrong(layers, monkeypatch):
    monkeypatch.setattr(reference, "accept_uniform", lambda *args: -1)
    phi2, _, acceptance = free_chain_means(layers)
    assert acceptance == 1
    assert not within(phi2, free_phi2(), n_sigma=5)


@pytest.mark.parametrize("layers", FREE_THEORIES.values(), ids=FREE_THEORIES)
def test_hmc_trajectory_by_trajectory(layers):
    """Momenta, dH and accept step of every trajectory, from the streams of its chain."""
    weights = 0.3 * random_weights(layers, np.random.default_rng(25)) if layers else ()
    z = np.random.default_rng(26).normal(size=(6, *FREE_SHAPE))
    kept, first = z.copy(), TRAJECTORY
    settings = dict(FREE, beta=0.7, lam=0.5, step_size=0.3)
    beta, lam = settings["beta"], settings["lam"]
    settings |= dict(seed=SEED, layers=layers, weights=weights, first_chain=9, first_trajectory=first)
    history, dh, accepted = reference.hmc(z, **settings, n_trajectories=5)
    np.testing.assert_array_equal(z, kept)
    assert 0 < accepted.mean() < 1

    def action_and_force(z):
        if layers:
            return reference.pullback(layers, weights, z, beta, lam)
        return reference.phi4_action(z, beta, lam, 1), reference.phi4_force(z, beta, lam, 1)

    def energy(z, momenta):
        return action_and_force(z)[0][0] + (momenta**2).sum() / 2

    def force(z):
        return action_and_force(z)[1]

    for i in range(5):
        for c in range(6):
            start = z[c : c + 1]
            momenta = reference.normals(SEED, 0, first + i, [9 + c], 4)
            end, end_momenta = reference.evolve(
                force, start, momenta, *LEAPFROG, settings["step_size"], settings["n_steps"]
            )
            change = energy(end, end_momenta) - energy(start, momenta)
            assert dh[i, c] == pytest.approx(change, abs=1e-12)
            (uniform,) = reference.accept_uniform(SEED, first + i, [9 + c])
            assert accepted[i, c] == (uniform < math.exp(-change))
            expected = end[0] if accepted[i, c] else start[0]
            np.testing.assert_allclose(history[i, c], expected, rtol=0, atol=1e-12)
        z = history[i]


def test_hmc_continues():
    z = np.random.default_rng(27).normal(size=(4, *FREE_SHAPE))
    whole, _, _ = reference.hmc(z, **FREE, n_trajectories=6, seed=1)
    first, _, _ = reference.hmc(z, **FREE, n_trajectories=2, seed=1)
    second, _, _ = reference.hmc(first[-1], **FREE, n_trajectories=4, seed=1, first_trajectory=2)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    last_two, _, _ = reference.hmc(z[2:], **FREE, n_trajectories=6, seed=1, first_chain=2)
    np.testing.assert_array_equal(last_two, whole[:, 2:])
