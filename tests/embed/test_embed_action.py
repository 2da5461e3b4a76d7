"""Actions of the user's own: through Python, Numba and C++, sampled, seen through flows, trained for."""

import ctypes
import functools

import numba
import numpy as np
import pytest

import lfq
from lfq import embedding, reference

from .conftest import run, tool


@functools.cache
def phi4_sites(shape, beta, lam):
    """The built-in action once more, as a user would write it."""
    return lfq.CustomAction.from_sites(
        shape,
        lambda p, forward: p * (p * (lam * p * p + (1 - 2 * lam)) - beta * forward),
        lambda p, neighbours: beta * neighbours - 2 * (1 - 2 * lam) * p - 4 * lam * p * p * p,
    )


SHAPES = [(8,), (6, 4), (4, 2, 6), (2, 4, 2, 3), (1, 5), (2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_force_are_those_of_the_reference(shape, dtype, rng, isa):
    theory, own = lfq.Phi4(shape, 0.3, 0.4), phi4_sites(shape, 0.3, 0.4)
    for n in (1, 3, 17, 70):
        phi = rng.normal(size=(n, *shape)).astype(dtype)
        tolerance = 1e-12 if dtype == np.float64 else 1e-4
        wanted = reference.phi4_action(phi.astype(float), 0.3, 0.4, len(shape))
        np.testing.assert_allclose(own.action(phi), wanted, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(own.force(phi), theory.force(phi), rtol=tolerance, atol=tolerance)
        assert own.force(phi).dtype == dtype


FLOWS = {
    "none": None,
    "paper": lfq.AffineFlow(seed=1),
    "deep": lfq.AffineFlow(n_blocks=2, hidden=(3,), bias=True, scale="exp(s)", seed=2),
    "ladder": lfq.Compose([lfq.UpsampleMap(1.2, (0.3, 0.5), 0.8), lfq.AffineFlow(seed=3)]),
    "multiscale": lfq.MultiscaleFlow(2, n_blocks=1, seed=4),
}


@pytest.mark.parametrize("name", FLOWS)
def test_chains_are_those_of_the_built_in_action_until_rounding_grows(name, isa):
    """The same random numbers and integrator: fields agree to rounding, amplified over few trajectories."""
    theory, own, flow = lfq.Phi4((4, 6), 0.5, 0.3), phi4_sites((4, 6), 0.5, 0.3), FLOWS[name]
    if name in ("ladder", "multiscale"):
        theory, own = lfq.Phi4((4, 8), 0.5, 0.3), phi4_sites((4, 8), 0.5, 0.3)
    theories = [t if flow is None else t.pullback(flow) for t in (theory, own)]
    built_in, custom = (lfq.HMC(t, n_steps=20, length_spread=0.3) for t in theories)
    state = built_in.start(19, seed=4, phi=np.random.default_rng(6).normal(size=(19, *theory.shape)) / 2)
    a, b = built_in.advance(state, 2, thin=2), custom.advance(state, 2, thin=2)
    np.testing.assert_array_equal(a.accepted, b.accepted)
    assert 0.3 < a.accepted.mean()
    np.testing.assert_allclose(a.phi, b.phi, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(a.dh, b.dh, rtol=1e-6, atol=1e-8)
    for key in a.observables:
        np.testing.assert_allclose(a.observables[key], b.observables[key], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(theories[0].action(state.latent), theories[1].action(state.latent), rtol=1e-12)
    np.testing.assert_allclose(theories[0].force(state.latent), theories[1].force(state.latent), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("flow", [None, FLOWS["paper"]], ids=["plain", "flow"])
def test_results_do_not_depend_on_threads_or_batch(flow):
    own = phi4_sites((4, 6), 0.5, 0.3)
    theory = own if flow is None else own.pullback(flow)
    one, many = lfq.HMC(theory, n_threads=1), lfq.HMC(theory, n_threads=3)
    state = one.start(21, seed=2, phi=np.zeros((21, 4, 6)))
    whole = one.advance(state, 5)
    np.testing.assert_array_equal(whole.phi, many.advance(state, 5).phi)
    part = lfq.State(state.latent[13:16], 0, 2, 13)
    np.testing.assert_array_equal(whole.phi[13:16], one.advance(part, 5).phi)


def test_a_trajectory_can_be_run_backwards(dtype, rng):
    hmc = lfq.HMC(phi4_sites((4, 6), 0.5, 0.3), dtype=str(dtype))
    phi, momenta = (rng.normal(size=(3, 4, 6)).astype(dtype) for _ in range(2))
    there = hmc.evolve(phi, momenta)
    back = hmc.evolve(*there, backward=True)
    tolerance = 1e-13 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(back[0], phi, rtol=0, atol=20 * tolerance)
    assert abs(there[0] - phi).max() > 0.1


def sine_gordon(shape, coupling, context=None):
    """S = sum_x sum_mu (phi_{x+mu} - phi_x)^2 / 2 + 0.5 phi^2 - g cos(phi), with g in the context."""
    n0, n1 = shape

    @numba.cfunc(lfq.evaluate_signature("float64"))
    def evaluate(context, want_action, n, phi_pointer, action_pointer, force_pointer):
        phi = numba.carray(phi_pointer, (n, n0, n1))
        action, force = numba.carray(action_pointer, (n,)), numba.carray(force_pointer, (n, n0, n1))
        g = numba.carray(context, 1, dtype=np.float64)[0]
        for c in range(n):
            total = 0.0
            for i in range(n0):
                for j in range(n1):
                    p, up, right = phi[c, i, j], phi[c, (i + 1) % n0, j], phi[c, i, (j + 1) % n1]
                    down, left = phi[c, i - 1, j], phi[c, i, j - 1]
                    total += 0.5 * ((up - p) ** 2 + (right - p) ** 2 + p * p) - g * np.cos(p)
                    force[c, i, j] = up + down + left + right - 5 * p - g * np.sin(p)
            action[c] = total
        return 0

    return lfq.CustomAction(shape, evaluate, np.array([coupling]))


def test_the_force_of_a_cfunc_is_checked_by_differences(rng):
    own = sine_gordon((4, 4), 0.7)
    phi, direction = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 4))
    difference = (own.action(phi + 1e-5 * direction) - own.action(phi - 1e-5 * direction)) / 2e-5
    # step 1e-5: truncation 1e-10, rounding 1e-15 / 1e-5
    np.testing.assert_allclose(difference, -(own.force(phi) * direction).sum((1, 2)), rtol=1e-8)


def test_hmc_samples_another_theory():
    """g = 0 is a free field of known propagator: <phi^2> to five sigma. g = 0.7 obeys the Schwinger-Dyson
    equation <phi_x dS/dphi_x> = 1."""
    own = sine_gordon((4, 4), 0.0)
    hmc = lfq.HMC(own, tau=1.5, n_steps=12, length_spread=0.3)
    result = hmc.sample(32, 400, n_warmup=50, seed=5)
    p2 = 4 * np.sin(np.pi * np.arange(4) / 4) ** 2
    exact = (1 / (p2[:, None] + p2 + 1)).mean()
    means = result.observables["phi2"].mean(0)
    assert abs(means.mean() - exact) < 5 * means.std(ddof=1) / np.sqrt(32)
    assert "action_density" not in result.observables and "phi2" in result.summary()

    own.context[0] = 0.7  # seen by the compiled function
    state, products = result.state, []
    for _ in range(200):
        block = hmc.advance(state, 1, 2, measure=False)
        state = block.state
        products.append(-(block.phi * own.force(block.phi)).mean((1, 2)))
    means = np.mean(products, axis=0)
    assert abs(means.mean() - 1) < 5 * means.std(ddof=1) / np.sqrt(32)


def test_a_flow_is_trained_for_it_as_for_the_built_in_action():
    theory, own = lfq.Phi4((4, 4), 0.5, 0.3), phi4_sites((4, 4), 0.5, 0.3)
    arguments = dict(prior=lfq.Gaussian((4, 4)), n_steps=40, batch_size=37, seed=3, n_evaluation=200)
    for flow in (lfq.AffineFlow(seed=1), FLOWS["deep"]):
        a, b = (lfq.train(flow, target=target, **arguments) for target in (theory, own))
        np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=1e-8)
        np.testing.assert_allclose(a.flow.weights, b.flow.weights, rtol=1e-6, atol=1e-8)
        assert b.history["loss"][-1] < b.history["loss"][0]
        assert b.target is own


# ---- errors ---------------------------------------------------------------------------------


def stopping(code):
    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64], *[ctypes.c_void_p] * 3)
    def evaluate(context, want_action, n, phi, action, force):
        return code

    return evaluate


def test_an_action_can_ask_to_stop():
    own = lfq.CustomAction((4, 4), {"float64": stopping(42)})
    with pytest.raises(RuntimeError, match="evaluate returned 42"):
        own.action(np.zeros((3, 4, 4)))
    hmc = lfq.HMC(own)
    state = hmc.start(3, seed=1)
    with pytest.raises(RuntimeError, match="42"):
        hmc.advance(state, 2)


def test_a_python_function_is_an_action_too():
    """By ctypes, with the interpreter's lock taken for each call."""
    theory = lfq.Phi4((4, 4), 0.5, 0.3)

    @ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, *[ctypes.POINTER(ctypes.c_double)] * 3
    )
    def evaluate(context, want_action, n, phi, action, force):
        phi = np.ctypeslib.as_array(phi, (n, 4, 4))
        np.ctypeslib.as_array(action, (n,))[:] = theory.action(phi)
        np.ctypeslib.as_array(force, (n, 4, 4))[:] = theory.force(phi)
        return 0

    own = lfq.CustomAction((4, 4), {"float64": evaluate})
    phi = np.random.default_rng(1).normal(size=(20, 4, 4))
    np.testing.assert_array_equal(own.action(phi), theory.action(phi))
    state = lfq.HMC(theory).start(20, seed=1)
    a, b = (lfq.HMC(t, n_threads=2).advance(state, 2).phi for t in (theory, own))
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_nan_is_an_error_with_its_chain(rng):
    own = lfq.CustomAction.from_sites((4, 4), lambda p, f: p * p / (p - p), lambda p, n: p - n)
    with pytest.raises(lfq.NotFiniteError, match="chain 0"):
        lfq.HMC(own).advance(lfq.HMC(own).start(2, seed=1), 1)
    with pytest.raises(lfq.NotFiniteError, match="chain 1"):
        own.action(np.where(np.arange(2)[:, None, None] == 1, np.nan, np.ones((2, 4, 4))))


def test_bad_arguments_are_named():
    @numba.cfunc("float64(float64)")
    def other(x):
        return x

    for arguments, error, match in [
        (((4, 4), other), TypeError, "evaluate_signature"),
        (((4, 4), []), ValueError, "evaluate"),
        (((4, 4), {"int32": 0}), ValueError, "float32 or float64"),
        (((4, 4), {"float64": "x"}), TypeError, "evaluate"),
        (((4, 0), {"float64": 1}), ValueError, "shape"),
        (((4, 4), {"float64": 1}, [1.0]), TypeError, "context"),
    ]:
        with pytest.raises(error, match=match):
            lfq.CustomAction(*arguments)
    own = lfq.CustomAction((4, 4), {"float64": 1})
    with pytest.raises(TypeError, match="float32"):
        own.action(np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="evaluate is null"):
        lfq.CustomAction((4, 4), {"float64": 0}).action(np.zeros((4, 4)))
    for sampler in (lfq.ClusterHMC, lfq.FourierHMC):
        with pytest.raises(TypeError, match="Phi4"):
            sampler(own)


# ---- C++ ------------------------------------------------------------------------------------

FUNCTOR = """
#include <cstdio>
#include <lfq/action.hpp>
#include <lfq/phi4.hpp>
int main(int argc, char** argv) {
  std::vector<int32_t> extent;
  for (int i = 1; i < argc; ++i) extent.push_back(std::atoi(argv[i]));
  lfq::theory theory(extent, 0.3, 0.4);
  auto own = lfq::site_action<double>(extent, lfq::phi4_site<double>(0.3, 0.4));
  const lfq_custom_f64 action = own.get();
  const int64_t n = 11;
  std::vector<double> phi(n * theory.volume()), s(n), t(n), f(phi.size()), g(phi.size());
  for (size_t i = 0; i < phi.size(); ++i) phi[i] = double(7 * i % 23) / 16 - 0.7;
  theory.action(n, phi.data(), s.data());
  theory.force(n, phi.data(), f.data());
  std::vector<char> ws(lfq_custom_workspace_f64(nullptr, &action, n, 0));
  lfq::check(lfq_custom_force_f64(nullptr, &action, n, phi.data(), t.data(), g.data(), ws.data(), ws.size(), 0));
  double worst = 0;
  for (int i = 0; i < n; ++i) worst = std::max(worst, std::abs(s[i] - t[i]) / (1 + std::abs(s[i])));
  for (size_t i = 0; i < f.size(); ++i) worst = std::max(worst, std::abs(f[i] - g[i]));
  auto throws = lfq::field_action<double, void (*)(int64_t, const double*, double*, double*)>(
      extent, [](int64_t, const double*, double*, double*) { throw 1; });
  lfq::hmc<double> hmc(throws.get(), {});
  hmc.start(2, 1);
  int caught = 0;
  try {
    hmc.advance(1);
  } catch (const lfq::error& e) {
    caught = e.status;
  }
  std::printf("%.3g %d\\n", worst, caught);
}
"""


@pytest.fixture(scope="module")
def functor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("functor")
    (directory / "functor.cpp").write_text(FUNCTOR)
    flags = [embedding.OPTIONS[option]() for option in ("--includes", "--libs")]
    run(tool("c++", "g++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", directory / "functor.cpp",
        *" ".join(flags).split(), "-o", directory / "functor")  # fmt: skip
    return directory / "functor"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cpp_functor_is_the_built_in_action(functor, shape):
    worst, caught = run(functor, *shape).split()
    assert float(worst) < 1e-12 and int(caught) == -4


def test_the_program_of_the_guide(compiled):
    """Quartic double well in C++ against the same action from Numba, to the last bit of few trajectories' rounding."""
    program = compiled("action_cpp", tool("c++", "g++"), "-std=c++17", "-O2", suffix=".cpp")
    phi2, accepted = map(float, run(program).split())
    own = lfq.CustomAction.from_sites(
        (16, 16),
        lambda p, forward: 0.1 * p**6 + 0.9 * p * p - 0.5 * p * forward,
        lambda p, neighbours: 0.5 * neighbours - 0.6 * p**5 - 1.8 * p,
    )
    hmc = lfq.HMC(own, tau=1.0, n_steps=10)
    block = hmc.advance(hmc.start(16, seed=1), 200)
    error = block.observables["phi2"][50:].mean(0).std(ddof=1) / 4
    assert abs(phi2 - block.observables["phi2"][50:].mean()) < 5 * np.sqrt(2) * error
    assert abs(accepted - block.accepted.mean()) < 0.05


def test_the_python_program_of_the_guide(programs):
    scope = {}
    exec(programs["action_python"], scope)
    assert scope["run"].n_samples == 1000 and 0.8 < scope["run"].acceptance <= 1
    assert scope["flow_run"].acceptance > 0.3
