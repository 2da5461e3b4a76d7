"""CUDA programs: built with nvcc against the installed package, and run, without a GPU under the emulator."""

import ctypes
import subprocess

import emulated
import numpy as np
import pytest

import lfq
from lfq import _cuda

from .conftest import ROOT, run, tool

THEORY = lfq.Phi4((16, 16), 0.634, 0.5)
HMC = lfq.HMC(THEORY, tau=1.0, n_steps=10)
EXAMPLE = ROOT / "examples" / "embed_cuda" / "main.cu"


@pytest.fixture
def nvcc():
    """The compiler, where lfq was built with it too."""
    if _cuda.library_path() is None:
        pytest.skip("built without CUDA")
    return tool("nvcc")


@pytest.fixture
def emulator(tmp_path_factory, tmp_path):
    """Compiles a CUDA program for the host; returns the executable."""
    if emulated.GXX is None:
        pytest.skip("no g++")

    def build(source):
        emulated.program(source, tmp_path / "emulated", tmp_path_factory)
        return tmp_path / "emulated"

    return build


def has_gpu():
    return _cuda.library().device_count()[0] > 0


def refuses_without_a_gpu(status, *command):
    """One line that says why, and nothing else."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1 and "CUDA" in done.stderr, done.stderr


def example_on_the_cpu(flow, samples, thin, warmup):
    """(acceptance, <phi^2>, its error) of both runs of the example."""
    through = lfq.HMC(THEORY.pullback(flow), tau=1.0, n_steps=10)
    state, results = HMC.start(16, seed=1), []
    for hmc in (HMC, through):
        if warmup:
            state = hmc.advance(state, 1, warmup, measure=False).state
        block = hmc.advance(state, samples, thin)
        of_chain = block.observables["phi2"].mean(axis=0)
        results.append((block.accepted.mean(), of_chain.mean(), of_chain.std(ddof=1) / 4))
        state = lfq.State(flow.inverse(block.phi)[0], 0, 2)
    return results


def results_of(output):
    lines = [line.split() for line in output.splitlines()]
    assert [name for name, *_ in lines] == ["hmc", "flow-hmc"]
    return [tuple(map(float, values)) for _, *values in lines]


def follows_the_cpu(example, flow_file):
    """Few trajectories: the same chains until rounding grows."""
    found = results_of(run(example, flow_file, 3, 2, 4))
    expected = example_on_the_cpu(lfq.load_flow(flow_file), 3, 2, 4)
    assert 0 < expected[1][0] < 1
    for (acceptance, phi2, error), wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(acceptance, wanted[0], atol=1e-6)  # six digits are printed
        np.testing.assert_allclose(phi2, wanted[1], rtol=1e-9)
        np.testing.assert_allclose(error, wanted[2], rtol=0.01)  # three are


def guide_follows_the_cpu(program):
    state = HMC.start(64, seed=1)
    block = HMC.advance(lfq.State(2 * state.latent, 0, 1), 5)
    np.testing.assert_allclose(np.array(run(program, 5).split(), float), THEORY.action(block.phi), rtol=1e-9)


def test_an_error_of_the_runtime_has_a_code_of_its_own(nvcc):
    if has_gpu():
        pytest.skip("there is a GPU")
    header = (ROOT / "csrc" / "include" / "lfq" / "lfq.h").read_text()
    function = ctypes.CDLL(str(_cuda.library_path())).lfq_cuda_normal_f64
    function.argtypes = _cuda.library()._get("normal_f64").argtypes
    code = function(1, 0, 0, 0, 1, 4, np.empty(4).ctypes.data, None)
    assert f"LFQ_ERR_CUDA = {code} " in header


def test_example(nvcc, cmake_built, flow_file):
    example = cmake_built("embed_cuda")
    if not has_gpu():
        return refuses_without_a_gpu(3, example, flow_file)
    follows_the_cpu(example, flow_file)
    # The whole run: <phi^2> within five sigma of the CPU's, acceptance of 32000 trajectories within more than that.
    expected = example_on_the_cpu(lfq.load_flow(flow_file), 200, 10, 100)
    for (acceptance, phi2, error), wanted in zip(results_of(run(example, flow_file)), expected, strict=True):
        assert abs(acceptance - wanted[0]) < 0.03
        assert abs(phi2 - wanted[1]) < 5 * np.hypot(error, wanted[2])


def test_the_program_of_the_guide(nvcc, compiled):
    program = compiled("cuda", nvcc, "-std=c++17", suffix=".cu", libraries="--cuda-libs")
    if not has_gpu():
        return refuses_without_a_gpu(1, program)
    guide_follows_the_cpu(program)


def test_example_emulated(emulator, flow_file, tmp_path):
    example = emulator(EXAMPLE)
    follows_the_cpu(example, flow_file)
    for arguments, status, message in [
        ([], 2, "usage"),
        ([flow_file, 0, 1, 1], 2, "usage"),
        ([tmp_path / "none"], 1, "none: not an lfq flow on this lattice: No such file"),
    ]:
        done = subprocess.run([str(word) for word in (example, *arguments)], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "")
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_the_program_of_the_guide_emulated(emulator, programs, tmp_path):
    (tmp_path / "program.cu").write_text(programs["cuda"])
    guide_follows_the_cpu(emulator(tmp_path / "program.cu"))
