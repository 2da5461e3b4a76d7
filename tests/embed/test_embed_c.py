"""C, C++ and Fortran programs give Python's numbers to the last bit."""

import json
import subprocess

import numpy as np
import pytest

import lfq
from lfq import embedding
from lfq.io import save_tensors

from .conftest import GUIDE, run, tool

THEORY = lfq.Phi4((16, 16), 0.634, 0.5)


def numbers(text):
    return np.array([float(word) for word in text.split()])


def actions_of_200_trajectories():
    hmc = lfq.HMC(THEORY, tau=1.0, n_steps=10)
    return THEORY.action(hmc.advance(hmc.start(16, seed=1), 200, measure=False).phi)


def test_c(compiled):
    program = compiled("c", tool("cc"), "-std=c99", "-O2", suffix=".c")
    np.testing.assert_array_equal(numbers(run(program)), actions_of_200_trajectories())


def test_cpp(compiled, flow_file):
    program = compiled("cpp", tool("c++", "g++"), "-std=c++17", "-O2", suffix=".cpp")
    flow = lfq.load_flow(flow_file)
    hmc = lfq.HMC(THEORY.pullback(flow), tau=1.0, n_steps=10)
    z = lfq.HMC(THEORY).start(8, seed=1).latent
    block = hmc.advance(lfq.State(z, 0, 1), 100, measure=True)
    found = numbers(run(program, flow_file))
    # the kernel of the smearing is summed in another order, so only observables before it agree to the bit
    np.testing.assert_array_equal(found[:-1], [block.accepted.mean(), block.observables["phi2"][-1, 0]])
    np.testing.assert_allclose(found[-1], block.observables["phi2_smeared"][-1, 0], rtol=1e-13)


def test_example_cpp(cmake_built, flow_file):
    """The example's own measurement on the fields of the same two runs."""
    lines = run(cmake_built("embed_cpp"), flow_file).splitlines()
    flow = lfq.load_flow(flow_file)

    def simulate(hmc, state):
        state = hmc.advance(state, 1, 100, measure=False).state
        values = []
        for _ in range(20):
            block = hmc.advance(state, 1, 10, measure=False)
            state = block.state
            values.append((block.phi * np.roll(block.phi, (-1, -1), (1, 2))).mean((1, 2)))
        return np.mean(values), block.phi

    hmc = lfq.HMC(THEORY, tau=1.0, n_steps=10)
    plain, phi = simulate(hmc, hmc.start(16, seed=1))
    through = lfq.HMC(THEORY.pullback(flow), tau=1.0, n_steps=10)
    seen, _ = simulate(through, lfq.State(flow.inverse(phi)[0], 0, 2))
    for line, name, wanted in zip(lines, ("hmc", "flow-hmc"), (plain, seen), strict=True):
        label, value, *_ = line.split()
        assert label == name
        np.testing.assert_allclose(float(value), wanted, rtol=1e-13)  # sums in another order


def test_example_fortran(cmake_built):
    tool("gfortran")
    np.testing.assert_array_equal(numbers(run(cmake_built("embed_fortran"))), actions_of_200_trajectories())


def test_fortran(compiled):
    module = embedding.include_dir() / "lfq" / "lfq.f90"
    program = compiled("fortran", tool("gfortran"), sources=[module], suffix=".f90")
    phi = ((7 * np.arange(1, 3 * 32 + 1) % 11 - 5) / 8).reshape(3, 8, 4)
    theory = lfq.Phi4((8, 4), 0.5, 0.3)
    np.testing.assert_array_equal(numbers(run(program)), [*theory.action(phi), theory.force(phi)[0, 0, 0]])


READER = """
#include <cstdio>
#include <lfq/flow_file.hpp>
int main(int argc, char** argv) try {
  std::vector<int32_t> extent;
  for (int i = 2; i < argc; ++i) extent.push_back(std::atoi(argv[i]));
  lfq::flow flow = lfq::load_flow(argv[1], extent);
  std::vector<double> z(flow.volume()), x(z.size()), log_det(1);
  for (size_t i = 0; i < z.size(); ++i) z[i] = 0.25 * double(i % 7) - 0.5;
  flow.forward(1, z.data(), x.data(), log_det.data());
  std::printf("%.17g\\n", log_det[0]);
  for (double v : x) std::printf("%.17g\\n", v);
  return 0;
} catch (const lfq::file_error& e) {
  std::puts(e.what());
  return 3;
}
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reader")
    (directory / "reader.cpp").write_text(READER)
    flags = [embedding.OPTIONS[option]() for option in ("--includes", "--libs")]
    run(
        tool("c++", "g++"),
        "-std=c++17",
        "-O1",
        directory / "reader.cpp",
        *" ".join(flags).split(),
        "-o",
        directory / "reader",
    )
    return directory / "reader"


FLOWS = {
    "paper": lfq.AffineFlow(seed=1),
    "deep": lfq.AffineFlow(5, 2, hidden=(3, 2), activation="leaky_relu", bias=True, scale="exp(s)", rescale=False),
    "ladder": lfq.Compose([lfq.UpsampleMap(1.1, (0.2, 0.3), 0.9), lfq.Compose([lfq.AffineFlow(seed=2)])]),
    "interleaved": lfq.Compose([lfq.InterleaveMap(), lfq.AffineFlow(seed=4), lfq.InterleaveMap()]),
    "even": lfq.AffineFlow(hidden=(2,), scale="even", features=4, seed=5),
    "site": lfq.AffineFlow(scale="site", rescale=False, seed=6),
    "sublattices": lfq.AffineFlow(kernel_size=5, bias=True, scale="site", sublattices=True, seed=7),
    "order": lfq.AffineFlow(scale="site", sublattices=True, order="e|c c|eo o|ce", seed=11),
    "multiscale": lfq.MultiscaleFlow(3, n_blocks=2, seed=8),
    "interpolating": lfq.MultiscaleFlow(3, interpolate=True, seed=12),
    "multiscale of other couplings": lfq.MultiscaleFlow(
        2, n_blocks=1, scale="even", kernel_size=5, hidden=(3,), features=2, seed=9
    ),
    "multiscale of one net": lfq.MultiscaleFlow(2, n_blocks=1, scale="exp(s)", sublattices=False, seed=10),
}
DAMAGED = {
    "site, scale is 'four'": "unknown scale four",
    "site, scale is 'even'": "n_features is 0, must be 1, 2, 4 or 8",
    "site, features is 1": "n_features is 1, must be 0 with this scale",
    "even, features is 3": "n_features is 3, must be 1, 2, 4 or 8",
    "even, features is 1.5": "features must be an integer from 1 to 8",
    "even, sublattices is true": "sublattices is 1, must be 0 or 1, and 0 with hidden layers",
    "sublattices, sublattices is 1": "sublattices must be true or false",
    "sublattices, sublattices is false": "n_weights is 221, the layers take 111",
    "order, order is 'e-c'": "no order of couplings: e-c",
    "order, order is ' '": "an order without couplings",
    "order, order is 'oe|c'": "active is 14, must be some of the sublattices of parity 1",
    "order, order is 'e|e'": "frozen is 8, must be some of the 4 sublattices that are not active",
    "order, order is null": "order",
    "multiscale, n_levels is 0": "n_levels must be an integer from 1 to 16",
    "multiscale, n_levels is 4": "an extent of 1 cannot be halved",
    "multiscale, n_levels is 2": "n_weights is 1134, the layers take 756",
    "interpolating, interpolate is 0": "interpolate",
    "multiscale, n_blocks is 0": "n_blocks must be an integer from 1 to 10000",
    "multiscale, hidden is null": "hidden must be a list",
    "multiscale, scale is missing": '"scale" is missing',
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_cpp_reader_reads_every_flow(reader, tmp_path, name):
    flow = FLOWS[name]
    flow.save(tmp_path / "flow")
    z = 0.25 * (np.arange(64) % 7) - 0.5
    x, log_det = flow.forward(z.reshape(8, 8))
    found = numbers(run(reader, tmp_path / "flow", 8, 8))
    np.testing.assert_array_equal(found, [log_det, *x.ravel()])


def test_the_guide_names_all_that_is_in_a_structure():
    def words(structure):
        yield structure["kind"]
        yield from structure
        for part in structure.get("flows", ()):
            yield from words(part)

    found = {word for flow in FLOWS.values() for word in words(flow.to_dict())}
    guide = GUIDE.read_text()
    assert len(found) > 15 and [word for word in found if f'`"{word}"`' not in guide] == []


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_cpp_reader_names_what_is_wrong_with_a_structure(reader, tmp_path, damage):
    name, change = damage.split(", ")
    flow, (key, value) = FLOWS[name], change.split(" is ")
    structure = flow.to_dict() | ({} if value == "missing" else {key: json.loads(value.replace("'", '"'))})
    if value == "missing":
        del structure[key]
    save_tensors(tmp_path / "flow", {"weights": flow.weights}, {"lfq_flow": json.dumps(structure)})
    done = subprocess.run([reader, tmp_path / "flow", "8", "8"], capture_output=True, text=True)
    assert done.returncode == 3 and DAMAGED[damage] in done.stdout, done.stdout


def test_the_cpp_reader_refuses_damaged_files(reader, tmp_path):
    """Every file cut short, and every byte of the header and many of the data changed: one clear error, or a flow."""
    path = tmp_path / "flow"
    lfq.AffineFlow(seed=1).save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    def outcome(data, *extent):
        path.write_bytes(data)
        done = subprocess.run([reader, path, *map(str, extent or (8, 8))], capture_output=True, text=True)
        assert done.returncode in (0, 3), (done.returncode, done.stdout, done.stderr)
        if done.returncode == 3:
            assert str(path) in done.stdout and "not an lfq flow" in done.stdout
        return done

    assert outcome(whole).returncode == 0
    for cut in (0, 7, 8, 8 + length // 2, 8 + length, len(whole) - 8, len(whole) - 1):
        assert outcome(whole[:cut]).returncode == 3
    assert outcome(whole + b"\0" * 8).returncode == 3
    assert "odd" in outcome(whole, 8, 7).stdout
    assert "1 to 4" in outcome(whole, 2, 2, 2, 2, 2).stdout or "axes" in outcome(whole, 2, 2, 2, 2, 2).stdout
    assert "axes" in outcome(whole, 8).stdout
    assert outcome((1 << 40).to_bytes(8, "little") + whole[8:]).returncode == 3
    not_a_number = whole[:-8] + np.array([np.nan]).tobytes()
    assert "nan" in outcome(not_a_number).stdout
    for at in range(0, 8 + length, 7):
        outcome(whole[:at] + b'"' + whole[at + 1 :])
        outcome(whole[:at] + b"\0" + whole[at + 1 :])
    deep = b'{"__metadata__":' + b"[" * 1000 + b"}"
    assert "too deeply" in outcome(len(deep).to_bytes(8, "little") + deep).stdout


def test_the_cpp_reader_says_what_is_missing(reader, tmp_path):
    done = subprocess.run([reader, tmp_path / "none", "8", "8"], capture_output=True, text=True)
    assert done.returncode == 3 and "No such file" in done.stdout
