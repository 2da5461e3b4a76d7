"""The public API on a GPU, or on what stands in for one (see emulated.py).

LFQ_REQUIRE_GPU=1 turns the skip without a GPU into a failure.
"""

import importlib.util
import os
import sys

import emulated
import numpy as np
import pytest

import lfq
from lfq import _cuda, _gpu


@pytest.fixture(params=["gpu", "emulated"])
def cp(request, monkeypatch, tmp_path_factory):
    """CuPy."""
    if request.param == "emulated":
        if emulated.GXX is None:
            pytest.skip("no g++")
        return emulated.install(monkeypatch, tmp_path_factory)
    return request.getfixturevalue("gpu")


@pytest.fixture
def gpu(request):
    """CuPy, on a GPU alone."""
    reason = _gpu.missing()
    if reason is not None:
        if os.environ.get("LFQ_REQUIRE_GPU") == "1":
            pytest.fail(f"LFQ_REQUIRE_GPU=1, but {reason}")
        pytest.skip(reason)
    return pytest.importorskip("cupy")


def close(found, expected, dtype, scale=10.0):
    assert _gpu.is_gpu_array(found)
    np.testing.assert_allclose(
        _gpu.to_host(found), expected, rtol=0, atol=scale * (2e-4 if dtype == np.float32 else 1e-11)
    )


@pytest.fixture
def theory():
    return lfq.Phi4((8, 6), beta=0.5, lam=0.4)


def test_info_names_the_gpu(cp):
    found = lfq.info()
    assert found["cuda_built"] and found["cuda_architectures"] and found["gpu"] and found["gpu_missing"] is None


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_theory(cp, theory, dtype, rng, leading):
    phi = rng.normal(size=(*leading, 8, 6)).astype(dtype)
    device = cp.asarray(phi)
    close(theory.action(device), theory.action(phi), dtype)
    force = theory.force(device)
    assert force.dtype == dtype
    close(force, theory.force(phi), dtype)
    for name, values in theory.measure(device).items():
        close(values, theory.measure(phi)[name], dtype)
    # Views that are not contiguous, and inputs that are left alone.
    close(theory.action(device[..., ::-1, :]), theory.action(phi[..., ::-1, :]), dtype)
    np.testing.assert_array_equal(_gpu.to_host(device), phi)
    assert theory.action(cp.asarray(np.ones((8, 6), dtype=np.int64))).dtype == np.float64


MAPS = {
    "affine": lambda: lfq.AffineFlow(hidden=(3,), n_blocks=2, seed=3),
    "even": lambda: lfq.AffineFlow(scale="even", features=4, seed=3),
    "site": lambda: lfq.AffineFlow(scale="site", rescale=False, n_blocks=2, seed=3),
    "sublattices": lambda: lfq.AffineFlow(scale="site", n_blocks=2, seed=3, sublattices=True),
}


@pytest.mark.parametrize("name", MAPS)
def test_flow(cp, theory, dtype, rng, name):
    flow = MAPS[name]()
    z, dx = rng.normal(size=(2, 5, 8, 6)).astype(dtype)
    device = cp.asarray(z)
    for found, expected in zip(flow.forward(device), flow.forward(z), strict=True):
        close(found, expected, dtype)
    for found, expected in zip(flow.inverse(device), flow.inverse(z), strict=True):
        close(found, expected, dtype, 100)
    for found, expected in zip(
        flow.vjp(device, cp.asarray(dx), 0.5, weights=True), flow.vjp(z, dx, 0.5, weights=True), strict=True
    ):
        close(found, expected, dtype, 100)
    pulled_back = theory.pullback(flow)
    close(pulled_back.action(device), pulled_back.action(z), dtype, 100)
    close(pulled_back.force(device), pulled_back.force(z), dtype, 100)


@pytest.mark.parametrize("pull_back", [False, True], ids=["hmc", "flow-hmc"])
def test_hmc(cp, theory, dtype, pull_back):
    theory = theory.pullback(lfq.AffineFlow(seed=1)) if pull_back else theory
    settings = {"tau": 1.0, "n_steps": 6, "dtype": str(dtype)}
    cpu, gpu = lfq.HMC(theory, **settings), lfq.HMC(theory, device="cuda", **settings)
    expected, found = cpu.start(4, seed=5), gpu.start(4, seed=5)
    assert _gpu.is_gpu_array(found.latent)
    close(found.latent, expected.latent, dtype, 1000)
    # From the same fields on; the array chooses too.
    state = lfq.State(cp.asarray(expected.latent), expected.trajectory, 5)
    expected = cpu.advance(expected, 3, 2)
    for hmc in (cpu, gpu):
        block = hmc.advance(state, 3, 2)
        np.testing.assert_array_equal(block.accepted, expected.accepted)
        close(block.phi, expected.phi, dtype, 100)
        close(block.state.latent, expected.state.latent, dtype, 100)
        assert type(block.dh) is np.ndarray
        for name, values in expected.observables.items():
            np.testing.assert_allclose(
                block.observables[name], values, rtol=0, atol=2e-2 if dtype == np.float32 else 1e-9
            )
    run = gpu.sample(3, 4, n_warmup=2, seed=1)
    assert run.observables["M"].shape == (4, 3)
    momenta = np.ones((4, 8, 6), dtype=dtype)
    for got, wanted in zip(
        gpu.evolve(state.latent, momenta), cpu.evolve(_gpu.to_host(state.latent), momenta), strict=True
    ):
        close(got, wanted, dtype, 100)


def test_a_diverging_chain_is_named(cp, theory):
    hmc = lfq.HMC(theory, tau=50.0, n_steps=2, device="cuda")
    state = hmc.start(3, seed=2)
    state.latent[1] *= 1e150
    before = _gpu.to_host(state.latent)
    with pytest.raises(lfq.NotFiniteError, match=r"in chain 1 \(trajectory \d+\)"):
        hmc.advance(state, 20)
    np.testing.assert_array_equal(_gpu.to_host(state.latent), before)


TRAININGS = {
    "interleave": (lfq.Interleave, lfq.AffineFlow),
    "upsample": (lfq.Upsample, lfq.AffineFlow),
    "multiscale": (lambda coarse: lfq.Gaussian((8, 8)), lambda seed: lfq.MultiscaleFlow(3, n_blocks=1, seed=seed)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training(cp, name):
    """Steps on the device are those of the CPU."""
    coarse, target = lfq.Phi4((4, 4), 0.5, 0.5), lfq.Phi4((8, 8), 0.55, 0.5)
    arguments = {"n_steps": 6, "batch_size": 8, "seed": 3, "n_evaluation": 16}
    make, make_flow = TRAININGS[name]
    prior = make(coarse)
    if hasattr(prior, "coarse"):
        prior = make(coarse, n_between=2, n_warmup=5)
    flow = make_flow(seed=2)
    expected = lfq.train(flow, prior, target, **arguments)
    found = lfq.train(flow, prior, target, device="cuda", **arguments)
    for name in ("loss", "ess", "std_log_w", "learning_rate"):
        np.testing.assert_allclose(found.history[name], expected.history[name], rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.flow.weights, expected.flow.weights, rtol=0, atol=1e-8)
    assert found.ess == pytest.approx(expected.ess, abs=1e-8)
    assert found.acceptance == expected.acceptance


def test_training_goes_on_from_a_checkpoint(cp, tmp_path):
    """On the device, with what was stored in the middle, to the same bits."""
    coarse, target = lfq.Phi4((4, 4), 0.5, 0.5), lfq.Phi4((8, 8), 0.55, 0.5)
    prior = lfq.Interleave(coarse, n_between=1, n_warmup=2)

    def fit(**more):
        return lfq.train(
            lfq.AffineFlow(seed=2), prior, target, 5, 2, seed=3, n_evaluation=2, device="cuda", **more
        )  # fmt: skip

    # The first report comes after one step; later ones after as many as a machine is fast.
    def interrupt(step, *_):
        raise KeyboardInterrupt

    expected, path = fit(), tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=path, progress=interrupt)
    steps = []
    found = fit(checkpoint=path, progress=lambda step, *_: steps.append(step))
    assert steps[0] > 1
    np.testing.assert_array_equal(found.flow.weights, expected.flow.weights)
    np.testing.assert_array_equal(found.history["loss"], expected.history["loss"])
    assert (found.ess, found.acceptance) == (expected.ess, expected.acceptance)


def test_chains_go_on_from_a_file(cp, theory, tmp_path):
    hmc = lfq.HMC(theory, device="cuda")
    state = hmc.advance(hmc.start(3, seed=4), 2).state
    hmc.save(state, tmp_path / "state")
    again = hmc.advance(hmc.load(tmp_path / "state"), 3)
    assert _gpu.is_gpu_array(again.phi)
    expected = hmc.advance(state, 3)
    np.testing.assert_array_equal(_gpu.to_host(again.phi), _gpu.to_host(expected.phi))
    # A machine without a GPU may go on too.
    np.testing.assert_array_equal(lfq.HMC(theory).load(tmp_path / "state").latent, _gpu.to_host(state.latent))


def test_training_that_fails_names_its_step(cp):
    target = lfq.Phi4((4, 4), 0.5, 0.5)
    with pytest.raises(lfq.NotFiniteError, match="training step [1-9].*NaN or Inf; try a smaller learning rate"):
        lfq.train(lfq.AffineFlow(), lfq.Gaussian((4, 4)), target, 20, 8, learning_rate=1e200, device="cuda")


def test_what_does_not_run_on_a_gpu_says_so(cp, theory):
    device = cp.asarray(np.zeros((2, 8, 6)))
    for sampler in (lfq.ClusterHMC, lfq.FourierHMC):
        with pytest.raises(ValueError, match="device: must be one of cpu"):
            sampler(theory, device="cuda")
        with pytest.raises(TypeError, match="latent: a GPU array was given, but this runs on the CPU only"):
            sampler(theory).advance(lfq.State(device, 0, 0), 1)
    with pytest.raises(TypeError, match="one of latent and momenta lies on a GPU"):
        lfq.HMC(theory).evolve(device, np.zeros((2, 8, 6)))
    flow = lfq.AffineFlow()
    with pytest.raises(TypeError, match="z: a GPU array was given, but this runs on the CPU only"):
        flow.inverse_vjp(device, 0, 0)
    with pytest.raises(TypeError, match="latent: a GPU array was given, but this runs on the CPU only"):
        lfq.HeatBath(theory).advance(lfq.State(device, 0, 0), 1)
    custom = lfq.CustomAction.from_sites((8, 6), lambda phi, forward: phi**2, lambda phi, around: -2 * phi)
    for action in (custom, custom.pullback(flow)):
        with pytest.raises(ValueError, match="device: must be one of cpu"):
            lfq.HMC(action, device="cuda")
        with pytest.raises(TypeError, match="a GPU array was given, but this runs on the CPU only"):
            action.action(device)
    with pytest.raises(ValueError, match="device: a CustomAction is trained for on the cpu only"):
        lfq.train(flow, lfq.Gaussian((8, 6)), custom, device="cuda")


def test_out_of_memory_names_the_bytes(monkeypatch, tmp_path_factory, theory):
    if emulated.GXX is None:
        pytest.skip("no g++")
    cp = emulated.install(monkeypatch, tmp_path_factory)
    phi = cp.asarray(np.zeros((4, 8, 6)))
    monkeypatch.setattr(emulated, "memory_left", 100)
    with pytest.raises(MemoryError, match="the GPU has no room for 1536 bytes"):
        theory.force(phi)


def test_work_goes_to_the_current_stream(gpu, theory):
    flow = lfq.AffineFlow(seed=1)
    samplers = [lfq.HMC(target, n_steps=5, device="cuda") for target in (theory, theory.pullback(flow))]
    expected = [hmc.advance(hmc.start(4, seed=3), 3) for hmc in samplers]
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        # What the others read is still to be written when they are queued.
        late = gpu.zeros((4, 8, 6))
        for _ in range(200):
            late += 0.01
        force, (image, _) = theory.force(late), flow.forward(late)
        found = [hmc.advance(hmc.start(4, seed=3), 3) for hmc in samplers]
    stream.synchronize()
    for block, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(_gpu.to_host(block.phi), _gpu.to_host(wanted.phi))
        np.testing.assert_array_equal(block.dh, wanted.dh)
    host = _gpu.to_host(late)
    close(force, theory.force(host), np.float64)
    close(image, flow.forward(host)[0], np.float64)


def test_memory_of_the_gpu_that_runs_out(gpu, theory):
    """An error with the bytes, after which everything goes on."""
    pool = gpu.cuda.MemoryPool()
    with gpu.cuda.using_allocator(pool.malloc):
        hmc = lfq.HMC(theory, device="cuda")
        state = hmc.start(2000, seed=2)
        before = _gpu.to_host(state.latent)
        pool.set_limit(size=pool.total_bytes())
        forces = []
        with pytest.raises(MemoryError, match=f"the GPU has no room for {before.nbytes} bytes"):
            while True:
                forces.append(theory.force(state.latent))
        np.testing.assert_array_equal(_gpu.to_host(state.latent), before)
        pool.set_limit(size=0)
        state = hmc.start(2000, seed=2)
        np.testing.assert_array_equal(_gpu.to_host(state.latent), before)


class OnlyDlpack:
    """An array of another library, known by DLPack alone."""

    def __init__(self, held):
        self.held, self.ndim, self.shape = held, held.ndim, held.shape

    def __dlpack_device__(self):
        return self.held.__dlpack_device__() if hasattr(self.held, "toDlpack") else (2, 0)

    def __dlpack__(self, **keywords):
        return self.held.__dlpack__(**keywords)


def test_dlpack(cp, theory, rng):
    phi = rng.normal(size=(2, 8, 6))
    held = OnlyDlpack(cp.asarray(phi))
    close(theory.action(held), theory.action(phi), np.float64)
    close(lfq.AffineFlow().forward(held)[0], lfq.AffineFlow().forward(phi)[0], np.float64)


# ---- without ---------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch, theory):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find_spec(name))
    with pytest.raises(RuntimeError, match='device "cuda": CuPy is not installed'):
        lfq.HMC(theory, device="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "cupy", emulated.cupy())
    monkeypatch.setattr(_cuda, "library_path", lambda: None)
    monkeypatch.setattr(_cuda, "library", _cuda.library.__wrapped__)  # not what it found before
    with pytest.raises(RuntimeError, match='device "cuda": this build of lfq has no CUDA kernels'):
        lfq.train(lfq.AffineFlow(), lfq.Gaussian((8, 6)), theory, device="cuda")
    assert not lfq.info()["cuda_built"]


def test_no_visible_gpu_is_named(monkeypatch, tmp_path_factory, theory):
    if emulated.GXX is None:
        pytest.skip("no g++")
    emulated.install(monkeypatch, tmp_path_factory).is_available = lambda: False
    with pytest.raises(RuntimeError, match="no GPU is visible"):
        lfq.HMC(theory, device="cuda")
