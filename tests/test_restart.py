"""Exact restarts, and runs that are told to stop or run out of room: nothing is lost, nothing silently wrong."""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from killer import survive

import lfq
from lfq import io

THEORY = lfq.Phi4((6, 6), beta=0.55, lam=0.5)


def trained_flow():
    flow = lfq.AffineFlow(3, 2, seed=4)
    flow.weights = flow.weights * 1.5
    return flow


SAMPLERS = {
    "hmc": lfq.HMC(THEORY, n_steps=5),
    "hmc float32": lfq.HMC(THEORY, n_steps=5, dtype="float32", length_spread=0.3),
    "flow-hmc": lfq.HMC(THEORY.pullback(trained_flow()), n_steps=6),
    "swendsen-wang": lfq.ClusterHMC(THEORY, n_steps=5),
    "wolff": lfq.ClusterHMC(THEORY, n_steps=5, cluster="wolff", n_updates=3),
    "fourier": lfq.FourierHMC(THEORY, n_steps=5),
    "independence": lfq.IndependenceMetropolis(THEORY, trained_flow()),
}


# ---- samplers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_ten_runs_of_100_trajectories_are_one_of_1000(name, tmp_path):
    """Through files, with other threads and other numbers of chains a call from one run to the next."""
    sampler, n_chains, path = SAMPLERS[name], 12, tmp_path / "state"
    begin = sampler.start(n_chains, seed=7)
    whole = sampler.advance(begin, 1000)
    sampler.save(begin, path)
    parts = []
    for run in range(10):
        state = dataclasses.replace(sampler, n_threads=1 + run % 3).load(path)
        calls = np.array_split(np.arange(n_chains), (1, 3, 2)[run % 3])
        blocks = []
        for chains in calls:
            some = dataclasses.replace(state, latent=state.latent[chains], first_chain=int(chains[0]))
            blocks.append(dataclasses.replace(sampler, n_threads=1 + run % 2).advance(some, 100))
        latent = np.concatenate([block.state.latent for block in blocks])
        parts.append({key: np.concatenate([b.observables[key] for b in blocks], axis=1) for key in whole.observables})
        parts[-1]["dh"] = np.concatenate([block.dh for block in blocks], axis=1)
        state = dataclasses.replace(blocks[0].state, latent=latent, first_chain=0)
        sampler.save(state, path)
    assert state.trajectory == whole.state.trajectory == begin.trajectory + 1000
    np.testing.assert_array_equal(state.latent, whole.state.latent)
    for key, series in (whole.observables | {"dh": whole.dh}).items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), series)


def killed_chain(name, threads, size=7):
    """400 trajectories in blocks, with a checkpoint after each."""
    sampler = dataclasses.replace(SAMPLERS[name], n_threads=threads)
    state = sampler.start(6, seed=5)
    end = state.trajectory + 400
    with contextlib.suppress(FileNotFoundError):
        state = sampler.load("state")
    while state.trajectory < end:
        state = sampler.advance(state, min(size, end - state.trajectory), measure=False).state
        sampler.save(state, "state")
    return state


@pytest.mark.parametrize("name", ["hmc", "flow-hmc", "swendsen-wang"])
def test_chains_killed_at_random_end_in_the_same_bits(name, tmp_path, n_kills):
    survive(lambda attempt: called("killed_chain", name, 1 + attempt % 3, 1 + attempt % 5), n_kills, 0.12)
    sampler = SAMPLERS[name]
    whole = sampler.advance(sampler.start(6, seed=5), 400, measure=False).state
    np.testing.assert_array_equal(killed_chain(name, 2).latent, whole.latent)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("hmc", {"theory": dataclasses.replace(THEORY, beta=0.56)}, "beta was 0.55 and is 0.56"),
        ("hmc", {"theory": dataclasses.replace(THEORY, lam=0.4)}, "lam was 0.5 and is 0.4"),
        ("hmc", {"theory": dataclasses.replace(THEORY, shape=(6, 8))}, r"shape was \[6, 6\] and is \[6, 8\]"),
        ("hmc", {"tau": 1.5}, "tau was 1.0 and is 1.5"),
        ("hmc", {"n_steps": 6}, "n_steps was 5 and is 6"),
        ("hmc", {"integrator": "omf2"}, "integrator.name was 'leapfrog' and is 'omf2'"),
        ("hmc", {"dtype": "float32"}, "dtype was 'float64' and is 'float32'"),
        ("hmc", {"length_spread": 0.2}, "length_spread"),
        ("flow-hmc", {"theory": THEORY.pullback(lfq.AffineFlow(3, 2, seed=4))}, "flow.weights"),
        ("flow-hmc", {"theory": THEORY}, "flow.kernel_size was 3 and is None"),
        ("wolff", {"n_updates": 2}, "n_updates was 3 and is 2"),
        ("wolff", {"cluster": "swendsen-wang"}, "cluster was 'wolff'"),
        ("fourier", {"mass": 1.0}, "mass was 2.0 and is 1.0"),
    ],
)
def test_another_parameter_is_refused_and_named(name, change, named, tmp_path):
    sampler = SAMPLERS[name]
    sampler.save(sampler.start(2, seed=1), tmp_path / "state")
    with pytest.raises(io.ParameterError, match=named):
        dataclasses.replace(sampler, **change).load(tmp_path / "state")


def test_another_sampler_is_refused(tmp_path):
    SAMPLERS["hmc"].save(SAMPLERS["hmc"].start(2, seed=1), tmp_path / "state")
    with pytest.raises(io.ParameterError, match="sampler was 'HMC' and is 'FourierHMC'"):
        SAMPLERS["fourier"].load(tmp_path / "state")


def test_the_state_before_a_damaged_one_is_used(tmp_path):
    hmc, path = SAMPLERS["hmc"], tmp_path / "state"
    state = hmc.start(2, seed=1)
    hmc.save(state, path)
    hmc.save(hmc.advance(state, 5).state, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(io.RecoveryWarning, match="using the other checkpoint"):
        assert hmc.load(path).trajectory == 0
    with pytest.raises(FileNotFoundError):
        hmc.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "record", [{}, {"trajectory": -1}, {"seed": "x"}, {"first_chain": 2**32}, {"trajectory": 1e3}, {"seed": None}]
)
def test_states_that_cannot_be(record, tmp_path):
    hmc = SAMPLERS["hmc"]
    good = {"trajectory": 0, "seed": 1, "first_chain": 0}
    for latent in (np.zeros((2, 6, 6)), np.zeros((2, 6, 7)), np.zeros((2, 6, 6), np.int64)):
        numbers = good | record if record else {}
        io.save_checkpoint(tmp_path / "x", {"latent": latent}, numbers | {"parameters": hmc.parameters})
        with pytest.raises(io.FileFormatError, match="not the state of chains"):
            hmc.load(tmp_path / "x")


# ---- training -------------------------------------------------------------------------------

COARSE = lfq.Phi4((4, 4), beta=0.4, lam=0.5)
FINE = lfq.Phi4((8, 8), beta=0.55, lam=0.5)
CHAIN = {"n_between": 3, "n_warmup": 20}
PRIORS = {
    "gaussian": lfq.Gaussian((8, 8)),
    "lattice": lfq.Lattice(dataclasses.replace(FINE, beta=0.5), **CHAIN),
    "interleave": lfq.Interleave(COARSE, **CHAIN),
    "upsample": lfq.Upsample(COARSE, **CHAIN),
}


class Stop:
    """Raises KeyboardInterrupt at the first report at or behind each of some steps."""

    def __init__(self, steps):
        self.steps = list(steps)

    def __call__(self, step, *_):
        if self.steps and step >= self.steps[0]:
            self.steps = [s for s in self.steps if s > step]
            raise KeyboardInterrupt


def train(prior="interleave", target=FINE, **changes):
    arguments = {"n_steps": 200, "batch_size": 24, "seed": 3, "n_evaluation": 48} | changes
    return lfq.train(lfq.AffineFlow(3, 1), PRIORS[prior], target, **arguments)


def assert_same_fit(one, other):
    np.testing.assert_array_equal(one.flow.weights, other.flow.weights)
    assert (one.ess, one.acceptance, one.std_log_w) == (other.ess, other.acceptance, other.std_log_w)
    for name in set(one.history) - {"seconds"}:
        np.testing.assert_array_equal(one.history[name], other.history[name])
    if one.prior.map is not None:
        np.testing.assert_array_equal(one.prior.map.weights, other.prior.map.weights)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("prior", PRIORS)
def test_an_interrupted_training_ends_in_the_same_bits(prior, dtype, tmp_path):
    whole, path = train(prior, dtype=dtype), tmp_path / "training"
    stop, attempts = Stop([1, 20, 60, 100, 150]), 0
    while True:
        try:
            fit = train(prior, dtype=dtype, checkpoint=path, progress=stop, n_threads=1 + attempts % 3)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert attempts >= 2
    assert_same_fit(whole, fit)
    assert (np.diff(fit.history["seconds"]) > 0).all()
    # What is complete stays so.
    assert_same_fit(whole, train(prior, dtype=dtype, checkpoint=path))


def called(function, *arguments):
    """Code that calls a function of this file."""
    here = os.path.dirname(__file__)
    return f"import sys; sys.path.insert(0, {here!r}); import test_restart; test_restart.{function}{arguments}"


def killed_training():
    return train(checkpoint="training", checkpoint_seconds=0.0, n_steps=1000)


def test_a_training_killed_at_random_ends_in_the_same_bits(tmp_path, n_kills):
    survive(lambda _: called("killed_training"), n_kills, 0.3)
    assert_same_fit(train(n_steps=1000), killed_training())


def test_an_interrupted_ladder_ends_in_the_same_bits(tmp_path):
    theories = [dataclasses.replace(COARSE, shape=shape, beta=beta) for shape, beta in (((2, 2), 0.4), ((4, 4), 0.5))]
    theories.append(FINE)
    arguments = {"chain": CHAIN, "n_steps": 60, "batch_size": 16, "seed": 1}
    whole = lfq.train_ladder(lfq.AffineFlow(), theories, **arguments)
    # Called again behind the end of the first level: its last report is that of step 60.
    for stop in (Stop([10]), Stop([60])):
        with pytest.raises(KeyboardInterrupt):
            lfq.train_ladder(lfq.AffineFlow(), theories, checkpoint="ladder", progress=stop, **arguments)
    again = lfq.train_ladder(lfq.AffineFlow(), theories, checkpoint="ladder", **arguments)
    for one, other in zip(whole, again, strict=True):
        assert_same_fit(one, other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": dataclasses.replace(FINE, beta=0.56)}, "target beta was 0.55 and is 0.56"),
        ({"n_steps": 201}, "n_steps was 200 and is 201"),
        ({"batch_size": 25}, "batch_size"),
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"dtype": "float32"}, "dtype"),
        ({"prior": "upsample"}, "prior was 'Interleave' and is 'Upsample'"),
    ],
)
def test_a_training_with_another_parameter_is_refused(change, named, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint="training", progress=Stop([1]))
    before = (tmp_path / "training").read_bytes()
    with pytest.raises(io.ParameterError, match=named):
        train(**{"checkpoint": "training"} | change)
    assert (tmp_path / "training").read_bytes() == before


def test_a_training_that_diverges_keeps_its_last_good_state(tmp_path):
    with pytest.raises(lfq.NotFiniteError, match=r"training step \d+: .*; step \d+ is kept in training"):
        train(learning_rate=1e200, checkpoint="training", n_steps=50)
    (tensors, record), *_ = io.load_checkpoint("training")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values()) and record["step"] < 50


# ---- signals --------------------------------------------------------------------------------

LONG = """
[target]
shape = [16, 16]
beta = 0.576
lam = 0.5
[sampling]
n_chains = 8
n_samples = 200000
n_warmup = 20
block_size = 100000
[training]
n_steps = {n_steps}
batch_size = 32
[prior_chains]
n_between = 2
n_warmup = 20
[[prior]]
kind = "interleave"
beta = 0.5
"""


def start_run(directory, n_steps=50, *arguments):
    (directory / "config.toml").write_text(LONG.format(n_steps=n_steps))
    command = [sys.executable, "-m", "lfq", "run", *(arguments or ["config.toml"]), "--out", "out"]
    return subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def sampled(directory):
    """Whether sampling has begun."""
    path = directory / "out" / "checkpoints" / "hmc.safetensors"
    return path.exists() and io.load_checkpoint(path)[0][1]["phase"] in ("warm up", "sample")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint(number, code, tmp_path):
    pytest.importorskip("h5py")
    process = start_run(tmp_path)
    wait_for(lambda: sampled(tmp_path), process)
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert f"lfq: {number.name}: finishing the trajectory" in said
    assert said.splitlines()[-1] == "lfq: interrupted; to continue: lfq run --resume --out out"
    (tensors, record), *_ = io.load_checkpoint(tmp_path / "out" / "checkpoints" / "hmc.safetensors")
    # Far from a full block: the checkpoint was written for the signal.
    assert record["phase"] == "sample" and 0 < record["done"] < 200000 and record["done"] != 100000
    assert tensors["latent"].shape == (8, 16, 16)
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_a_signal_ends_a_training_with_a_checkpoint(tmp_path):
    pytest.importorskip("h5py")
    process, path = start_run(tmp_path, 10**6), tmp_path / "out" / "checkpoints" / "train-interleave.safetensors"
    wait_for(path.exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert 0 < io.load_checkpoint(path)[0][1]["step"] < 10**6


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Inside one call of a kernel that would take minutes."""
    code = (
        "import os, signal, sys, threading, time\n"
        "import lfq\n"
        "from lfq import cli\n"
        "hmc = lfq.HMC(lfq.Phi4((64, 64), beta=0.6, lam=0.5), n_steps=1000)\n"
        "state = hmc.start(8, 1)\n"
        "def twice():\n"
        "    time.sleep(1); os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1); print('second', flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
        "with cli._signals() as signalled:\n"
        "    threading.Thread(target=twice, daemon=True).start()\n"
        "    hmc.advance(state, 10000)\n"
        "    print('not reached')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 143
    assert "finishing the trajectory" in result.stderr and result.stdout == "second\n"


# ---- room -----------------------------------------------------------------------------------


def limited(code, **limits):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, preexec_fn=limit, check=False
    )


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "config.toml").write_text(LONG.format(n_steps=50))
    code = "import sys; from lfq import cli; sys.exit(cli.main(['run', 'config.toml', '--out', 'out']))"
    result = limited(code, FSIZE=1 << 20)
    assert result.returncode == 2 and "lfq: error: cannot write to out" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path):
    """A file system of 256 KiB, where this process may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        hmc = lfq.HMC(lfq.Phi4((8, 8), beta=0.5, lam=0.5))
        state = hmc.start(60, seed=1)
        path = disk / "state"
        hmc.save(state, path)
        hmc.save(hmc.advance(state, 1).state, path)
        (disk / "filler").write_bytes(bytes((os.statvfs(disk).f_bavail - 4) * 4096))
        with pytest.raises(OSError, match="No space left"):
            hmc.save(hmc.start(200, seed=2), path)
        assert hmc.load(path).trajectory == 1
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "state", "state.previous"]
        (disk / "filler").unlink()
        hmc.save(hmc.advance(state, 2).state, path)
        assert hmc.load(path).trajectory == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_directory_is_said_before_any_work(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        (tmp_path / "config.toml").write_text(LONG.format(n_steps=50))
        command = [sys.executable, "-m", "lfq", "run", "config.toml", "--out", "disk/out"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
        assert result.returncode == 2 and "cannot write to disk/out: Read-only file system" in result.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


RESIDENT = """
import resource, sys
import lfq
from lfq import config, experiment
text = '''
[target]
shape = [2, 2]
beta = 0.5
lam = 0.5
[sampling]
n_chains = 2
n_samples = {}
n_warmup = 20
'''
def stop(stage, *_):
    if stage == "figures and report":
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        sys.exit()
experiment.run_experiment(config.parse_config(text.format(sys.argv[1])), sys.argv[1], progress=stop)
"""


def resident(n_samples):
    """Largest resident size in MiB of a run with so many samples."""
    command = [sys.executable, "-c", RESIDENT, str(n_samples)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True)
    return int(result.stdout) / 1024


@pytest.mark.parametrize("n_samples", [300_000, pytest.param(1_000_000, marks=pytest.mark.validate)])
def test_resident_size_does_not_grow_with_the_run(n_samples):
    pytest.importorskip("h5py")
    few, many = resident(1000), resident(n_samples)
    # All samples, once, are 2 * 65 bytes each.
    assert many < few + 20
