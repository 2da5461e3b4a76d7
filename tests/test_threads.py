"""Every threaded kernel, called from several Python threads at once, gives the bits of one thread alone.

Small enough for ThreadSanitizer: tests/sanitize.sh thread runs this file.
"""

import dataclasses
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

import lfq

THEORY = lfq.Phi4((4, 4), beta=0.5, lam=0.5)
SPLIT = lfq.Phi4((64, 64), beta=0.5, lam=0.5)
FLOW = lfq.AffineFlow(3, 1, hidden=(2,), seed=1)
FIELDS = np.random.default_rng(1).normal(size=(70, 4, 4))


def advance(sampler, n_chains=70):
    def call(n_threads):
        threaded = dataclasses.replace(sampler, n_threads=n_threads)
        block = threaded.advance(threaded.start(n_chains, 1), 2)
        return block.state.latent, block.dh, block.observables["phi2"]

    return call


def train(n_threads):
    prior = lfq.Interleave(lfq.Phi4((2, 2), beta=0.4, lam=0.5), n_warmup=2, n_between=1)
    fit = lfq.train(lfq.AffineFlow(), prior, THEORY, 3, 70, n_threads=n_threads, n_evaluation=70)
    return fit.flow.weights, fit.history["loss"]


CALLS = {
    "action": lambda n: (THEORY.action(FIELDS, n),),
    "force": lambda n: (THEORY.force(FIELDS, n),),
    "forward": lambda n: FLOW.forward(FIELDS, n),
    "inverse": lambda n: FLOW.inverse(FIELDS, n),
    "vjp": lambda n: FLOW.vjp(FIELDS, FIELDS, 1.0, weights=True, n_threads=n),
    "pulled-back force": lambda n: (THEORY.pullback(FLOW).force(FIELDS, n),),
    "hmc": advance(lfq.HMC(THEORY, n_steps=2)),
    "hmc float32": advance(lfq.HMC(THEORY, n_steps=2, dtype="float32")),
    "split chains": advance(lfq.HMC(SPLIT, n_steps=2), 3),
    "flow-hmc": advance(lfq.HMC(THEORY.pullback(lfq.AffineFlow()), n_steps=2)),
    "swendsen-wang": advance(lfq.ClusterHMC(THEORY, n_steps=2)),
    "wolff": advance(lfq.ClusterHMC(THEORY, n_steps=2, cluster="wolff")),
    "fourier": advance(lfq.FourierHMC(THEORY, n_steps=2)),
    "heat bath": advance(lfq.HeatBath(THEORY, cluster="swendsen-wang")),
    "training": train,
}


@pytest.mark.parametrize("name", CALLS)
def test_threads_within_threads(name):
    alone = CALLS[name](1)
    with ThreadPoolExecutor(3) as pool:
        for together in pool.map(CALLS[name], (4, 3, 4, 2)):
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_everything_at_once():
    """Threads that start together and share samplers, flows and the pool of workers."""
    alone = {name: call(2) for name, call in CALLS.items()}
    names = 2 * list(CALLS)
    start = Barrier(len(names))

    def call(name):
        start.wait()
        return CALLS[name](2)

    with ThreadPoolExecutor(len(names)) as pool:
        for name, together in zip(names, pool.map(call, names), strict=True):
            for one, other in zip(alone[name], together, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)


# The first use of everything, training with its compilation too, by four threads at once; then by one.
WITHOUT_THE_LOCK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import numpy as np
import lfq
assert not sys._is_gil_enabled(), "import lfq"

theory, coarse = lfq.Phi4((4, 4), beta=0.5, lam=0.5), lfq.Phi4((2, 2), beta=0.4, lam=0.5)
start = Barrier(4)

def work(seed):
    fit = lfq.train(lfq.AffineFlow(seed=seed), lfq.Interleave(coarse), theory, 20, 32, seed=seed, n_evaluation=32)
    run = lfq.HMC(theory.pullback(fit.flow), n_steps=3).sample(n_chains=5, n_samples=20, n_warmup=5, seed=seed)
    return fit.flow.weights, run.phi, run.dh

def together(seed):
    start.wait()
    return work(seed)

with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(together, range(4)))
for seed, results in enumerate(found):
    for one, other in zip(work(seed), results, strict=True):
        np.testing.assert_array_equal(one, other)
assert not sys._is_gil_enabled(), "lfq.train"
"""


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a lock")
def test_free_threaded_python_stays_without_its_lock():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", WITHOUT_THE_LOCK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
