"""One rule for arrays, and threads of Python side by side."""

import functools
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lfq
from lfq import _core

THEORY = lfq.Phi4((4, 6), 0.5, 0.3)
FLOW = lfq.AffineFlow(seed=1)


class OnlyDLPack:
    """An array of another library: nothing but the DLPack protocol."""

    def __init__(self, array, device=(1, 0)):
        self._array, self._device = array, device

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._device


class OnlyArray:
    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


class OnGpu:
    __cuda_array_interface__ = {"shape": (4, 6), "typestr": "<f8", "data": (0, False), "version": 3}
    shape, ndim = (4, 6), 2


FUNCTIONS = {
    "action": lambda phi: THEORY.action(phi),
    "force": lambda phi: THEORY.force(phi),
    "measure": lambda phi: THEORY.measure(phi)["nn"],
    "forward": lambda phi: FLOW.forward(phi)[0],
    "inverse": lambda phi: FLOW.inverse(phi)[0],
    "vjp": lambda phi: FLOW.vjp(phi, phi, 1.0),
    "pulled back": lambda phi: THEORY.pullback(FLOW).force(phi),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@EACH
def test_whatever_holds_real_numbers_is_copied_once(name):
    function = FUNCTIONS[name]
    whole = np.random.default_rng(1).integers(-2, 3, size=(3, 8, 12)).astype(np.float64)
    view = whole[:, ::2, ::2]
    wanted = function(np.ascontiguousarray(view))
    variants = {
        "strided": view,
        "Fortran": np.asfortranarray(view),
        "reversed": np.ascontiguousarray(view[:, ::-1])[:, ::-1],
        "big-endian": view.astype(">f8"),
        "integers": view.astype(np.int16),
        "half": view.astype(np.float16),
        "read-only": np.lib.stride_tricks.as_strided(view, writeable=False),
        "list": view.tolist(),
        "__array__": OnlyArray(view),
        "DLPack": OnlyDLPack(view),
    }
    for kind, variant in variants.items():
        kept = np.array(view)
        found = function(variant)
        np.testing.assert_array_equal(found, wanted, err_msg=kind)
        assert found.dtype == np.float64 and isinstance(found, np.ndarray)
        np.testing.assert_array_equal(view, kept)
    single = view.astype(np.float32)
    np.testing.assert_array_equal(function(OnlyDLPack(single)), function(np.ascontiguousarray(single)))


@EACH
def test_other_arrays_are_errors_that_name_the_argument(name):
    phi = np.ones((4, 6))
    for wrong, error, match in [
        (phi.astype(complex), TypeError, "complex128"),
        (phi.astype(bool), TypeError, "bool"),
        (phi.astype(object), TypeError, "object"),
        (OnGpu(), TypeError, "GPU"),
    ]:
        with pytest.raises(error, match=match):
            FUNCTIONS[name](wrong)
    if name in ("action", "force", "measure"):
        with pytest.raises(TypeError, match=r"phi: .*memory.*\(7, 0\)"):
            FUNCTIONS[name](OnlyDLPack(phi, device=(7, 0)))
        with pytest.raises(TypeError, match="phi: a GPU array was given"):
            FUNCTIONS[name](OnlyDLPack(phi, device=(2, 0)))


@pytest.mark.parametrize("package, maker", [("torch", "from_numpy"), ("jax.numpy", "asarray")])
def test_tensors_of_torch_and_jax_are_arrays(package, maker):
    phi = np.random.default_rng(2).normal(size=(3, 4, 6)).astype(np.float32)  # what JAX takes without being asked
    tensor = getattr(pytest.importorskip(package), maker)(phi)
    np.testing.assert_array_equal(THEORY.action(tensor), THEORY.action(phi))
    force = THEORY.force(tensor)
    assert isinstance(force, np.ndarray) and force.dtype == np.float32


# ---- threads ----------------------------------------------------------------------------------


def sample(seed):
    hmc = lfq.HMC(lfq.Phi4((16, 16), 0.6, 0.5), n_steps=10, n_threads=2)
    block = hmc.advance(hmc.start(24, seed), 30)
    flow_hmc = lfq.HMC(lfq.Phi4((8, 8), 0.6, 0.5).pullback(FLOW), n_threads=2)
    return block.phi, block.dh, flow_hmc.advance(flow_hmc.start(24, seed), 10).phi


def test_two_threads_sample_what_each_samples_alone():
    alone = [sample(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for one, other in zip(alone, pool.map(sample, (1, 2)), strict=True):
                for a, b in zip(one, other, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_errors_of_two_threads_do_not_mix():
    def fail(site):
        phi = np.zeros((4, 6))
        phi.flat[site] = np.nan
        for _ in range(200):
            with pytest.raises(lfq.NotFiniteError, match=f"site {site}$"):
                THEORY.action(phi)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fail, (3, 17)))


def test_threads_that_compile_an_action_at_once_share_it():
    """The function that one of them runs is not thrown away by the other."""
    own = lfq.CustomAction.from_sites((4, 6), lambda p, f: p * (p - 0.4 * f), lambda p, n: 0.4 * n - 2 * p)
    both_are_there, compiled, compile_one = threading.Barrier(2), [], own._compile

    def compile_and_wait(dtype):
        both_are_there.wait(60)
        function = compile_one(dtype)
        compiled.append(function)
        both_are_there.wait(60)
        return function

    own._compile = compile_and_wait
    with ThreadPoolExecutor(2) as pool:
        used = {record["evaluate"].item() for record in pool.map(own._record, ("float64", "float64"))}
    assert len(compiled) == 2 and used == {own._functions[np.dtype("float64")].address}


LARGE = lfq.Phi4((64, 64), 0.6, 0.5)
FIELDS = np.random.default_rng(3).normal(size=(48, 64, 64)) / 2
MANY = np.tile(FIELDS, (8, 1, 1))
PROGRAM = FLOW.program((64, 64)), FLOW.weights
OWN = lfq.CustomAction.from_sites((64, 64), lambda p, f: p * (p - 0.4 * f), lambda p, n: 0.4 * n - 2 * p)
SAMPLERS = {
    "heat bath": lfq.HeatBath(LARGE, n_threads=1),
    "custom": lfq.HMC(OWN, n_steps=10, n_threads=1),
    "hmc": lfq.HMC(LARGE, n_steps=30, n_threads=1),
    "flow-hmc": lfq.HMC(LARGE.pullback(FLOW), n_steps=2, n_threads=1),
    "cluster": lfq.ClusterHMC(LARGE, n_steps=1, n_threads=1),
    "fourier": lfq.FourierHMC(LARGE, n_steps=1, n_threads=1),
}
LONG_CALLS = {
    "forward": lambda: FLOW.forward(FIELDS, n_threads=1),
    "inverse": lambda: FLOW.inverse(FIELDS, n_threads=1),
    "vjp": lambda: FLOW.vjp(FIELDS, FIELDS, 1.0, weights=True, n_threads=1),
    "inverse_vjp": lambda: FLOW.inverse_vjp(FIELDS, FIELDS, 1.0, n_threads=1),
    "pullback": lambda: LARGE.pullback(FLOW).force(FIELDS, n_threads=1),
    "measure": lambda: LARGE.measure(FIELDS, n_threads=1),
    "action": lambda: LARGE.action(MANY, n_threads=1),
    "force": lambda: LARGE.force(MANY, n_threads=1),
    "evolve": lambda: SAMPLERS["hmc"].evolve(FIELDS, FIELDS),
    "fourier evolve": lambda: SAMPLERS["fourier"].evolve(FIELDS, FIELDS),
    "custom force": lambda: OWN.force(MANY, n_threads=1),
    "custom evolve": lambda: SAMPLERS["custom"].evolve(FIELDS, FIELDS),
    "cluster update": lambda: SAMPLERS["cluster"].update(FIELDS, seed=1),
    "normal": lambda: _core.normal(1, _core.PURPOSES["user"], 0, 0, len(MANY), np.empty_like(MANY), 1),
    "loss": lambda: _core.flow_loss(
        LARGE.volume, *PROGRAM, LARGE._record(), FIELDS, np.empty(48), np.empty(48), np.empty(FLOW.n_weights), 1
    ),
    "custom loss": lambda: _core.custom_loss(
        *PROGRAM, OWN._record("float64").view(np.uint8), FIELDS, np.empty(48), np.empty(48), np.empty(FLOW.n_weights), 1
    ),
    **{name: functools.partial(s.advance, lfq.State(FIELDS, 0, 1), 1) for name, s in SAMPLERS.items()},
}


def test_no_kernel_is_left_out(monkeypatch):
    """Among the calls above is every function of the module that takes a number of threads."""
    kernels = {name for name in dir(_core) if "n_threads" in (getattr(_core, name).__doc__ or "")}
    called = set()

    def record(name, kernel, *arguments):
        called.add(name)
        return kernel(*arguments)

    for name in kernels:
        monkeypatch.setattr(_core, name, functools.partial(record, name, getattr(_core, name)))
    for call in LONG_CALLS.values():
        call()
    assert len(kernels) > 20 and called == kernels


@pytest.mark.parametrize("name", LONG_CALLS)
def test_kernels_release_the_lock(name):
    """Another thread of Python runs in the middle of the call. With the lock held it never would; a busy machine may
    give it no processor, so it has a hundred tries."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("there is no lock")
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for _ in range(100):
            begin = time.perf_counter()
            LONG_CALLS[name]()
            length = time.perf_counter() - begin
            if any(begin + 0.3 * length < t < begin + 0.7 * length for t in ticks):
                return
            ticks.clear()
        pytest.fail("the lock was held")
    finally:
        stop.set()
        ticker.join()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python")
def test_free_threaded_python_stays_so():
    assert not sys._is_gil_enabled()
