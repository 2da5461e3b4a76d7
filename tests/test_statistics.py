"""Streams of random numbers, samplers against exact integrals, and error bars that cover as often as they say."""

import ctypes.util
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import lfq
from lfq import _core, analysis, embedding, reference

# ---- streams --------------------------------------------------------------------------------

SEEDS = (0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
TRAJECTORIES = (0, 1, 2, 3, 255, 2**32 - 1, 2**32, 2**40, 2**56 - 1)
CHAINS = (0, 4, 8, 2**16, 2**31, 2**32 - 4)


def first_block(seed, purpose, trajectory, chain, n_chains):
    """The four normals of the first block of each stream: two words of 40 and 24 bits each."""
    out = np.empty((n_chains, 4))
    _core.normal(seed, purpose, trajectory, chain, n_chains, out, 1)
    return out


def collisions(blocks):
    """Rows that occur before."""
    rows = np.ascontiguousarray(blocks).view(np.dtype((np.void, blocks.dtype.itemsize * blocks.shape[1])))
    return len(rows) - len(np.unique(rows))


def test_no_two_streams_meet():
    """Every seed, purpose, trajectory and chain from a list of awkward ones, four chains each."""
    blocks = [
        first_block(seed, purpose, trajectory, chain, 4)
        for seed in SEEDS
        for purpose in sorted(set(_core.PURPOSES.values()))
        for trajectory in TRAJECTORIES
        for chain in CHAINS
    ]
    assert len(blocks) > 5000
    assert collisions(np.concatenate(blocks)) == 0


def test_no_two_blocks_of_many_streams_meet():
    """2^20 blocks: 1024 chains, 16 trajectories, 64 blocks of each."""
    blocks = []
    for trajectory in range(16):
        out = np.empty((1024, 256))
        _core.normal(7, _core.PURPOSES["momenta"], trajectory, 0, 1024, out, 0)
        blocks.append(out.reshape(-1, 4))
    assert collisions(np.concatenate(blocks)) == 0


def test_a_collision_would_be_seen():
    blocks = np.concatenate([first_block(1, 0, t, 0, 4) for t in (0, 1, 2, 1)])
    assert collisions(blocks) == 4


def test_streams_are_uncorrelated():
    """Products of normals of neighbouring seeds, purposes, trajectories and chains average to zero."""
    n = 1 << 14
    streams = [(seed, purpose, trajectory) for seed in (1, 2) for purpose in (0, 2, 3) for trajectory in (5, 6)]
    out = np.empty((len(streams), 4, n))
    for row, (seed, purpose, trajectory) in zip(out, streams, strict=True):
        _core.normal(seed, purpose, trajectory, 10, 4, row, 1)
    flat = out.reshape(-1, n)
    for x in (flat, flat**2 - 1, np.roll(flat, 1, axis=1) * flat):
        correlation = x @ x.T / n / np.sqrt(np.outer((x**2).mean(1), (x**2).mean(1)))
        np.fill_diagonal(correlation, 0)
        # 1128 pairs: 5.5 sigma is one in 20000.
        assert np.abs(correlation).max() < 5.5 / np.sqrt(n)


def words(n, n_chains=64):
    """Raw words of chains in turn: block b of every chain, then the next, over the trajectories of one run."""
    counter = np.zeros((n // (4 * n_chains), n_chains, 4), dtype=np.uint32)
    blocks = np.arange(counter.shape[0])
    counter[..., 0], counter[..., 1] = (blocks % 16)[:, None], (blocks // 16)[:, None]
    counter[..., 2] = np.arange(n_chains)
    return reference.philox4x32(counter, np.array([7, 0], dtype=np.uint32)).ravel()


@pytest.mark.validate
def test_dieharder_on_interleaved_streams(tmp_path):
    """Tests of dieharder that 2^26 words are enough for."""
    program = shutil.which("dieharder")
    if program is None:
        pytest.skip("dieharder is not installed")
    words(1 << 26).astype("<u4").tofile(tmp_path / "words")
    for number in ("0", "1", "2", "3", "8", "10", "15", "100", "101", "102"):
        command = [program, "-g", "201", "-f", "words", "-d", number]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=3600)
        assert "FAILED" not in result.stdout, result.stdout


@pytest.fixture(scope="module")
def smallcrush(tmp_path_factory):
    """Runs SmallCrush of TestU01 on interleaved streams; returns its p-values by name."""
    compiler = shutil.which("cc")
    if compiler is None or ctypes.util.find_library("testu01") is None:
        pytest.skip("needs a C compiler and TestU01")
    program = tmp_path_factory.mktemp("smallcrush") / "smallcrush"
    flags = ["-std=c99", "-O2", f"-I{embedding.include_dir()}", embedding.library()]
    libraries = ["-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm", f"-Wl,-rpath,{embedding.library().parent}"]
    source = Path(__file__).with_name("smallcrush.c")
    subprocess.run([compiler, source, *flags, *libraries, "-o", program], check=True)

    def p_values(order):
        result = subprocess.run([program, order], capture_output=True, text=True, check=True, timeout=3600)
        found = re.findall(r"^p = (\S+): (.*)$", result.stdout, flags=re.MULTILINE)
        assert len(found) == 15, result.stdout
        return {name: float(p) for p, name in found}

    return p_values


@pytest.mark.validate
@pytest.mark.parametrize("order", ["words", "reversed"])
def test_smallcrush_on_interleaved_streams(smallcrush, order):
    """A p-value below 1e-6 or above 1 - 1e-6 comes once in 30 000 runs of 15 tests."""
    found = smallcrush(order)
    assert all(1e-6 < p < 1 - 1e-6 for p in found.values()), found


@pytest.mark.validate
def test_smallcrush_sees_streams_that_repeat(smallcrush):
    assert min(smallcrush("repeated").values()) < 1e-10


def test_words_are_uniform_byte_by_byte():
    """Chi-square of the bytes of interleaved streams, of pairs of neighbours, and of the bits of differences."""
    found = words(1 << 20)
    octets = found.view(np.uint8).reshape(-1, 4)
    for column in octets.T:
        counts = np.bincount(column, minlength=256)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    pairs = np.bincount(octets[:-1, 0].astype(np.int64) * 256 + octets[1:, 0], minlength=65536)
    chi2 = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    assert abs(chi2 - 65535) < 5 * np.sqrt(2 * 65535)
    changed = np.unpackbits((found[1:] ^ found[:-1]).view(np.uint8)).mean()
    assert abs(changed - 0.5) < 5 * 0.5 / np.sqrt(32 * found.size)


# ---- exact integrals ------------------------------------------------------------------------


def exact(theory, n=45, largest=3.6):
    """<phi^2>, <phi^4>, <M^2> and the neighbours' product by quadrature over all fields of 2 to 4 sites.

    The trapezoidal rule for analytic functions that vanish at the ends: exact to rounding well before n = 45.
    """
    axis = np.linspace(-largest, largest, n)
    sites = theory.volume
    grid = np.meshgrid(*[axis] * sites, indexing="ij", sparse=True)
    at = dict(zip(np.ndindex(theory.shape), grid, strict=True))
    action = sum((1 - 2 * theory.lam) * x**2 + theory.lam * x**4 for x in grid)
    neighbours = 0.0
    for place, x in at.items():
        for mu, extent in enumerate(theory.shape):
            other = tuple((c + (axis_ == mu)) % extent if axis_ == mu else c for axis_, c in enumerate(place))
            neighbours = neighbours + x * at[other]
    weight = np.exp(theory.beta * neighbours - action)
    z = weight.sum()
    return {
        "phi2": (weight * sum(x**2 for x in grid)).sum() / z / sites,
        "phi4": (weight * sum(x**4 for x in grid)).sum() / z / sites,
        "M2": (weight * sum(grid) ** 2).sum() / z / sites**2,
        "nn": (weight * neighbours).sum() / z / sites / theory.ndim,
    }


SMALL = [
    lfq.Phi4((2,), beta=0.3, lam=0.5),
    lfq.Phi4((4,), beta=0.7, lam=0.5),
    lfq.Phi4((2, 2), beta=0.4, lam=0.3),
]
EXACT = {theory: exact(theory) for theory in SMALL}


def flow_of(theory):
    return lfq.AffineFlow(3, 1, seed=5, ndim=theory.ndim)


MAKERS = {
    "hmc": lambda t: lfq.HMC(t, tau=1.2, n_steps=5, length_spread=0.4),
    "hmc float32": lambda t: lfq.HMC(t, tau=1.2, n_steps=5, dtype="float32"),
    "omf4": lambda t: lfq.HMC(t, tau=1.2, n_steps=2, integrator="omf4"),
    "flow-hmc": lambda t: lfq.HMC(t.pullback(flow_of(t)), tau=1.2, n_steps=8),
    "swendsen-wang": lambda t: lfq.ClusterHMC(t, tau=1.2, n_steps=5),
    "wolff": lambda t: lfq.ClusterHMC(t, tau=1.2, n_steps=5, cluster="wolff", n_updates=2),
    "fourier": lambda t: lfq.FourierHMC(t, tau=1.2, n_steps=5),
    "independence": lambda t: lfq.IndependenceMetropolis(t, flow_of(t)),
}


def deviations(sampler, expected, n_samples=2000, seed=11):
    """(mean - exact) / error of every observable, the error from the scatter of 256 independent chains."""
    run = sampler.sample(256, n_samples, n_warmup=50, seed=seed)
    found = {}
    for name, value in expected.items():
        means = run.observables[name].mean(axis=0)
        found[name] = (means.mean() - value) / (means.std(ddof=1) / np.sqrt(means.size))
    return found


@pytest.mark.filterwarnings("ignore::lfq.health.RunWarning")
@pytest.mark.parametrize("theory", SMALL, ids=lambda t: "x".join(map(str, t.shape)))
@pytest.mark.parametrize("name", MAKERS)
def test_samplers_reproduce_exact_integrals(name, theory):
    found = deviations(MAKERS[name](theory), EXACT[theory])
    assert max(map(abs, found.values())) < 5, found


@pytest.mark.parametrize("name", ["hmc", "flow-hmc", "swendsen-wang", "fourier"])
def test_a_coupling_off_by_one_percent_is_seen(name):
    theory = SMALL[1]
    found = deviations(MAKERS[name](dataclasses.replace(theory, beta=1.01 * theory.beta)), EXACT[theory], 8000)
    assert max(map(abs, found.values())) > 5


def test_the_quadrature_has_converged():
    for theory in SMALL:
        finer = exact(theory, n=55 if theory.volume == 4 else 91, largest=4.0)
        for name, value in EXACT[theory].items():
            assert abs(finer[name] - value) < 1e-10 * abs(value)


# ---- error bars -----------------------------------------------------------------------------


def coverage(estimates, truth):
    """Fraction of estimates within one of their errors of the truth."""
    return np.mean([abs(e.value - truth) < e.error for e in estimates])


def autoregressive(rng, rho, shape):
    noise = rng.normal(size=shape) * np.sqrt(1 - rho**2)
    series = np.empty(shape)
    series[0] = rng.normal(size=shape[1:])
    for t in range(1, shape[0]):
        series[t] = rho * series[t - 1] + noise[t]
    return series


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_errors_of_autoregressive_series_cover(rho, rng):
    series = autoregressive(rng, rho, (2000, 300))
    found = coverage([analysis.estimate(chain) for chain in series.T], 0.0)
    # 68.3% at 4 standard deviations of a binomial of 300; errors of finite series are a few percent short.
    assert abs(found - 0.683) < 4 * 0.0269 + 0.01


def test_errors_of_real_chains_cover():
    """256 runs of one chain each on a lattice whose expectation values are known, correlated over many steps."""
    theory = SMALL[1]
    run = lfq.HMC(theory, tau=0.35, n_steps=2).sample(256, 2000, n_warmup=200, seed=3)
    for name in ("phi2", "M2", "nn"):
        chains = run.observables[name].T
        estimates = [analysis.estimate(chain) for chain in chains]
        assert np.mean([e.tau_int for e in estimates]) > 2
        assert abs(coverage(estimates, EXACT[theory][name]) - 0.683) < 4 * 0.0291 + 0.01
        naive = [
            dataclasses.replace(e, error=c.std() / np.sqrt(c.size)) for e, c in zip(estimates, chains, strict=True)
        ]
        assert coverage(naive, EXACT[theory][name]) < 0.683 - 4 * 0.0291
