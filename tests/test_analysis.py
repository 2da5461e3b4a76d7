"""Errors, autocorrelation times and observables against series and fields whose answers are known."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lfq import analysis, observables

pytest.importorskip("pyerrors")


def autoregressive(n_samples, n_chains, rho, seed):
    """Stationary AR(1) of unit variance: rho(t) = rho^t, tau_int = (1 + rho) / (1 - rho) / 2."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n_samples, n_chains))
    series = np.empty_like(noise)
    series[0] = noise[0]
    for t in range(1, n_samples):
        series[t] = rho * series[t - 1] + math.sqrt(1 - rho**2) * noise[t]
    return series


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.97])
def test_tau_int_of_an_autoregressive_series(rho):
    exact = (1 + rho) / (1 - rho) / 2
    found = analysis.estimate(autoregressive(20000, 8, rho, seed=1))
    assert abs(found.tau_int - exact) < 4 * found.tau_int_error + 0.02 * exact
    assert found.tau_int == pytest.approx(exact, rel=0.1)
    assert found.error == pytest.approx(math.sqrt(2 * exact / 160000), rel=0.06)
    assert found.n_samples == 160000
    assert found.n_effective == pytest.approx(160000 / (2 * found.tau_int))


def test_many_short_chains_do_not_shorten_tau_int():
    # Fluctuations about each chain's own mean would give about 7.2 here.
    found = analysis.estimate(autoregressive(300, 400, 0.9, seed=2))
    assert found.tau_int == pytest.approx(9.5, rel=0.07)


def test_errors_cover_the_truth_as_often_as_they_should():
    pulls = []
    for seed in range(200):
        found = analysis.estimate(3 + autoregressive(300, 16, 0.8, seed))
        pulls.append((found.value - 3) / found.error)
    within = np.mean(np.abs(pulls) < 1)
    assert abs(within - 0.683) < 0.1
    assert np.std(pulls) == pytest.approx(1, abs=0.15)


def test_one_chain_may_be_one_dimensional():
    series = autoregressive(500, 1, 0.5, seed=3)
    assert analysis.estimate(series[:, 0]) == analysis.estimate(series)


def test_the_order_of_replicas_does_not_matter():
    series = autoregressive(200, 5, 0.5, seed=4)
    one, other = analysis.estimate(series), analysis.estimate(series[:, ::-1])
    assert one.tau_int == pytest.approx(other.tau_int, rel=1e-12)
    assert one.error == pytest.approx(other.error, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_constant_series_has_no_error(value):
    found = analysis.estimate(np.full((50, 7), value))
    assert (found.value, found.error, found.tau_int, found.tau_int_error) == (value, 0, 0.5, 0)
    assert found.n_effective == 350


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((analysis.MIN_SAMPLES - 1, 64)), "at least 8 samples"),
        (np.zeros((0, 3)), "at least 8 samples"),
        (np.zeros((20, 0)), "shape"),
        (np.zeros((20, 2, 2)), "shape"),
        (np.full((20, 2), np.nan), "NaN"),
        (np.full((20, 2), np.inf), "NaN"),
    ],
)
def test_series_that_cannot_be_analysed(samples, message):
    with pytest.raises(ValueError, match=message):
        analysis.estimate(samples)


def test_the_shortest_series_that_is_accepted():
    found = analysis.estimate(np.random.default_rng(5).normal(size=(analysis.MIN_SAMPLES, 2)))
    assert found.error > 0 and found.tau_int >= 0.5


def test_derived_is_the_linear_propagation_of_error():
    rng = np.random.default_rng(6)
    x = 2 + 0.1 * rng.normal(size=(4000, 4))
    y = 5 + 0.3 * (x - 2) + 0.2 * rng.normal(size=x.shape)
    found = analysis.derived(lambda a, b: a / b**2, x, y)
    linear = (x - x.mean()) / y.mean() ** 2 - 2 * x.mean() * (y - y.mean()) / y.mean() ** 3
    expected = analysis.estimate(linear)
    assert found.value == pytest.approx(x.mean() / y.mean() ** 2, rel=1e-12)
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    assert found.tau_int == pytest.approx(expected.tau_int, rel=1e-9)


def test_derived_of_one_series_is_its_estimate():
    series = autoregressive(1000, 3, 0.7, seed=7)
    assert analysis.derived(lambda a: 1.0 * a, series).error == pytest.approx(analysis.estimate(series).error)


def test_derived_where_the_function_is_undefined():
    series = autoregressive(100, 3, 0.0, seed=8)
    assert math.isnan(analysis.derived(lambda a: (a - 10) ** 0.5, series).value)


def test_derived_wants_series_of_one_shape():
    with pytest.raises(ValueError, match="unequal"):
        analysis.derived(lambda a, b: a + b, np.zeros((10, 2)), np.zeros((10, 3)))


def fake_run(shape=(4, 4), n_samples=400, n_chains=6, seed=9, thin=1):
    rng = np.random.default_rng(seed)
    m = autoregressive(n_samples, n_chains, 0.6, seed)
    series = {"M": m, "abs_M": np.abs(m), "M2": m**2, "chi": math.prod(shape) * m**2}
    for name in ("phi2", "phi2_smeared", "phi4", "nn", "action_density"):
        series[name] = 1 + rng.normal(size=m.shape)
    series["G_pmin"] = 5 + 0.1 * rng.normal(size=m.shape)
    return SimpleNamespace(
        observables=series,
        theory=SimpleNamespace(shape=shape, volume=math.prod(shape)),
        thin=thin,
        seconds_per_trajectory=1e-3,
        force_evaluations_per_trajectory=11,
    )


def test_derived_observables_are_the_formulas():
    run = fake_run()
    table = analysis.summarize(run)
    m = run.observables["M"]
    second, fourth, first = np.mean(m**2), np.mean(m**4), np.mean(np.abs(m))
    assert table["chi"].value == pytest.approx(16 * second)
    assert table["chi_connected"].value == pytest.approx(16 * (second - first**2))
    assert table["binder"].value == pytest.approx(1 - fourth / (3 * second**2))
    assert table["U4"].value == pytest.approx(fourth / second**2)
    xi2 = (16 * second / run.observables["G_pmin"].mean() - 1) / (4 * math.sin(math.pi / 4) ** 2)
    assert table["xi"].value == pytest.approx(math.sqrt(xi2))
    assert table["binder"].error == pytest.approx(table["U4"].error / 3)
    assert all(entry.error > 0 for entry in table.values())


def test_no_correlation_length_on_unequal_extents():
    assert "xi" not in analysis.summarize(fake_run(shape=(4, 8)))


def test_an_undefined_correlation_length_is_nan():
    run = fake_run()
    run.observables["G_pmin"] = run.observables["G_pmin"] * 100
    assert math.isnan(analysis.summarize(run)["xi"].value)


@pytest.mark.parametrize("thin", [1, 3])
def test_cost_is_two_tau_int_trajectories_of_the_slowest(thin):
    run = fake_run(thin=thin)
    run.observables["phi2"] = autoregressive(400, 6, 0.9, seed=10)
    table = analysis.summarize(run)
    cost = analysis.cost_per_independent_sample(run, table)
    assert cost.observable == "phi2"
    assert cost.seconds == pytest.approx(2 * thin * table["phi2"].tau_int * 1e-3)
    assert cost.force_evaluations == pytest.approx(2 * thin * table["phi2"].tau_int * 11)


def test_autocorrelation_is_its_definition():
    series = autoregressive(60, 3, 0.7, seed=11)
    rho, error = analysis.autocorrelation(series, 20)
    fluctuations = series - series.mean()
    gamma = [np.mean(fluctuations[: 60 - t] * fluctuations[t:]) for t in range(21)]
    np.testing.assert_allclose(rho, np.array(gamma) / gamma[0], atol=1e-13)
    assert rho[0] == 1 and error[0] == pytest.approx(0, abs=1e-15) and (error[1:] > 0).all()


def test_autocorrelation_errors_have_the_right_size():
    true = 0.8 ** np.arange(30)
    pulls = []
    for seed in range(60):
        rho, error = analysis.autocorrelation(autoregressive(400, 32, 0.8, seed), 29)
        pulls.append((rho - true)[1:] / error[1:])
    assert np.std(pulls) == pytest.approx(1, abs=0.2)


def test_autocorrelation_of_a_constant_and_of_too_large_a_lag():
    rho, error = analysis.autocorrelation(np.ones((10, 2)), 3)
    np.testing.assert_array_equal(rho, [1, 0, 0, 0])
    np.testing.assert_array_equal(error, 0)
    with pytest.raises(ValueError, match="max_lag"):
        analysis.autocorrelation(np.ones((10, 2)), 10)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.713364, 0.00012, "0.71336(12)"),
        (27.86, 1.31, "27.9(1.3)"),
        (27.86, 0.0996, "27.86(10)"),
        (1234.5, 99.6, "1230(100)"),
        (1234.5, 31.0, "1234(31)"),
        (-0.5, 9.96, "0(10)"),
        (2.0, 0.0, "2"),
        (math.nan, 1.0, "undefined"),
    ],
)
def test_with_error(value, error, text):
    shown = analysis.with_error(value, error)
    assert shown.replace("-0(", "0(") == text


def test_a_missing_pyerrors_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyerrors", None)
    with pytest.raises(ImportError, match=r"pyerrors.*pip install 'lfq\[app\]'"):
        analysis.estimate(np.zeros((20, 2)))


def test_print_options_survive_pyerrors():
    # pyerrors sets a formatter for objects when it is imported.
    code = (
        "import numpy, lfq.analysis; before = numpy.get_printoptions();"
        "lfq.analysis.estimate(numpy.zeros((20, 2))); assert numpy.get_printoptions() == before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def naive_two_point(phi, axis):
    extents = phi.shape
    correlator = np.zeros(extents[axis])
    for site in itertools.product(*map(range, extents)):
        for other in itertools.product(*map(range, extents)):
            correlator[(other[axis] - site[axis]) % extents[axis]] += phi[site] * phi[other]
    return correlator / phi.size


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((4, 6), 0), ((4, 6), 1), ((2, 3, 4), 1)])
def test_two_point_against_loops_over_pairs(shape, axis):
    phi = np.random.default_rng(12).normal(size=(3, *shape))
    found = observables.two_point(phi, ndim=len(shape), axis=axis)
    assert found.shape == (3, shape[axis])
    for chain in range(3):
        np.testing.assert_allclose(found[chain], naive_two_point(phi[chain], axis), atol=1e-12)
    volume = math.prod(shape)
    np.testing.assert_allclose(found.sum(-1), volume * phi.reshape(3, -1).mean(1) ** 2, atol=1e-12)


@pytest.mark.parametrize("extent", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_heat_kernel_multiplies_every_mode(extent, t):
    kernel = observables.heat_kernel(extent, t)
    assert kernel.shape == (extent,) and kernel.dtype == np.float64
    momentum = 2 * np.pi * np.arange(extent) / extent
    np.testing.assert_allclose(np.fft.fft(kernel), np.exp(-4 * np.sin(momentum / 2) ** 2 * t), atol=1e-14)
    np.testing.assert_array_equal(kernel[1:], kernel[1:][::-1])


@pytest.mark.parametrize("arguments", [(0,), (4, -1.0), (4, math.nan)])
def test_heat_kernel_rejects(arguments):
    with pytest.raises(ValueError, match="heat_kernel"):
        observables.heat_kernel(*arguments)


@pytest.mark.parametrize("shape", [(6,), (4, 5), (4, 2, 3)])
def test_smear_against_explicit_convolutions(shape):
    phi = np.random.default_rng(13).normal(size=(2, *shape))
    expected = phi
    for axis, extent in enumerate(shape, 1):
        kernel = observables.heat_kernel(extent, 0.7)
        expected = sum(kernel[shift] * np.roll(expected, shift, axis) for shift in range(extent))
    np.testing.assert_allclose(observables.smear(phi, 0.7, ndim=len(shape)), expected, atol=1e-13)


def test_smear_solves_the_heat_equation():
    phi = np.random.default_rng(14).normal(size=(8, 8))
    laplacian = sum(np.roll(phi, 1, a) + np.roll(phi, -1, a) - 2 * phi for a in (0, 1))
    step = 1e-5
    change = (observables.smear(phi, step) - phi) / step
    np.testing.assert_allclose(change, laplacian, atol=1e-3)
    assert observables.smear(phi.astype(np.float32)).dtype == np.float32


def test_the_lattice_must_fit_the_array():
    for function in (observables.smear, observables.two_point):
        with pytest.raises(ValueError, match="3-dimensional"):
            function(np.zeros((4, 4)), ndim=3)
    with pytest.raises(ValueError, match="axis"):
        observables.two_point(np.zeros((4, 4)), axis=2)


def test_virial_is_phi_times_the_gradient_of_the_action():
    rng = np.random.default_rng(15)
    phi, beta, lam = rng.normal(size=(4, 6)), 0.4, 0.3
    neighbours = sum(np.roll(phi, s, a) for s in (1, -1) for a in (0, 1))
    gradient = -beta * neighbours + 2 * (1 - 2 * lam) * phi + 4 * lam * phi**3
    measured = {
        "nn": np.mean([phi * np.roll(phi, -1, a) for a in (0, 1)]),
        "phi2": np.mean(phi**2),
        "phi4": np.mean(phi**4),
    }
    theory = SimpleNamespace(ndim=2, beta=beta, lam=lam)
    assert observables.virial(theory, measured) == pytest.approx(np.mean(phi * gradient))
