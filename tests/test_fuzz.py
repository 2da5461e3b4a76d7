"""Untrusted input: whatever a file or a configuration holds, the answer is a result or one clear error.

Nothing is executed, nothing is written outside the run's directory, and memory stays within a few times the
size of the file. The corpus of files is made here, by lfq; mutations are flipped bits, edits of bytes, cuts, and
exchanged or repeated pieces, and, since a checksum would stop most of them, edits below a checksum made anew.
"""

import contextlib
import json
import os
import struct
import tracemalloc
import warnings

import numpy as np
import pytest

import lfq
from lfq import config, experiment, io

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

THEORY = lfq.Phi4((4, 4), beta=0.5, lam=0.5)
HMC = lfq.HMC(THEORY)
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


# ---- files ----------------------------------------------------------------------------------

INTERESTING = [b"\0", b"\xff", b"-1", b"1e999", b"null", b"[", b"{", b'"', b"\\u0000", b"\x7f" * 8, b"9" * 30, b"NaN"]
DATA = ["weights", "latent", "moments", "F64", "F32", "I64", "shape", "kind", "compose", "affine", "__metadata__"]


def mutate(data, rng, others):
    """A damaged copy of some bytes."""
    data = bytearray(data)
    for _ in range(1 + rng.geometric(0.5)):
        kind, at = rng.integers(7), int(rng.integers(max(len(data), 1)))
        piece = INTERESTING[rng.integers(len(INTERESTING))]
        if kind == 0 and data:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at : at + len(piece)] = piece
        elif kind == 2:
            data[at:at] = piece
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            other = others[rng.integers(len(others))]
            begin = int(rng.integers(len(other)))
            data[at : at + 50] = other[begin : begin + 50]
        else:
            data[at:at] = DATA[rng.integers(len(DATA))].encode()
    return bytes(data)


def resealed(data, rng, others):
    """A well-formed file with a right checksum around a damaged header or damaged text: what a forger makes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    target = ["header", *header["__metadata__"], *(name for name in header if name != "__metadata__")]
    name = target[rng.integers(len(target))]
    if name in header["__metadata__"]:
        text = header["__metadata__"][name].encode()
        header["__metadata__"][name] = mutate(text, rng, others).decode("latin-1")
    elif name in header and rng.random() < 0.5:
        header[name]["shape"] = [int(x) for x in rng.integers(0, 9, rng.integers(0, 4))]
    body = mutate(data[8 + length :], rng, others) if name in header else data[8 + length :]
    tensors = {}
    for key in header:
        with contextlib.suppress(ValueError, KeyError):
            begin, end = header[key]["data_offsets"]
            kind = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}[header[key]["dtype"]]
            tensors[key] = np.frombuffer(body[begin:end], kind).reshape(header[key]["shape"])
    header["__metadata__"].pop("checksum", None)
    header["__metadata__"]["checksum"] = io.checksum(tensors, header["__metadata__"])
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Small files of every kind that lfq reads, with how it reads them."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = {}

    def add(name, write, read):
        write(folder / name)
        paths[name] = (folder / name).read_bytes(), read

    flows = {
        "affine": lfq.AffineFlow(3, 1),
        "hidden": lfq.AffineFlow(3, 1, hidden=(2,), bias=True, scale="exp(s)", activation="leaky_relu"),
        "compose": lfq.Compose([lfq.UpsampleMap(), lfq.AffineFlow(3, 1)]),
    }
    for name, flow in flows.items():
        add(f"flow-{name}", flow.save, lfq.load_flow)
    add("state", lambda path: HMC.save(HMC.start(2, 1), path), HMC.load)

    arguments = {"n_steps": 2, "batch_size": 4, "n_evaluation": 4}

    def train(path):
        return lfq.train(lfq.AffineFlow(), lfq.Lattice(THEORY), THEORY, checkpoint=path, **arguments)

    add("training", train, train)

    def record(path):
        fit = train(folder / "for-record")
        history = {key: np.asarray(value) for key, value in fit.history.items()}
        fields = {"prior": np.zeros((4, 4))}
        experiment.Training("x", THEORY, fit.flow, 0.5, 0.5, 1.0, 1.0, history, fields).save(path)

    add("record", record, lambda path: experiment.Training.load(path, "x", flows["affine"]))
    return paths


ALLOWED = (io.FileFormatError, io.ParameterError, lfq.NotFiniteError)


def fuzz_files(corpus, n, seed, tmp_path):
    """Read n damaged files; returns how many were refused."""
    rng = np.random.default_rng(seed)
    names, path, refused = list(corpus), tmp_path / "file", 0
    others = [data for data, _ in corpus.values()]
    before = set(os.listdir(tmp_path))
    for _ in range(n):
        data, read = corpus[names[rng.integers(len(names))]]
        damaged = (resealed if rng.random() < 0.5 else mutate)(data, rng, others)
        path.write_bytes(damaged)
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except ALLOWED as error:
            assert str(path) in str(error) or isinstance(error, lfq.NotFiniteError)
            refused += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A file of some kB: the JSON parser, the loop over steps and the error's text need more than its data.
        assert peak < (8 << 20) + 20 * len(damaged), (peak, damaged)
        io.remove_checkpoint(path)
    assert set(os.listdir(tmp_path)) == before
    return refused


def test_damaged_files(corpus, tmp_path):
    assert fuzz_files(corpus, 1500, 1, tmp_path) > 700


@pytest.mark.validate
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_hundred_thousand_damaged_files(corpus, tmp_path, seed):
    assert fuzz_files(corpus, 10000, seed, tmp_path) > 5000


def test_the_corpus_itself_is_read(corpus, tmp_path):
    for name, (data, read) in corpus.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) is not None


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A small finished run, and its files."""
    for package in ("h5py", "matplotlib", "pyerrors"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("run") / "out"
    text = (
        "[target]\nshape = [4, 4]\nbeta = 0.5\nlam = 0.5\n[sampling]\nn_chains = 2\nn_samples = 20\nn_warmup = 5\n"
        "block_size = 8\n"
    )
    experiment.run_experiment(config.parse_config(text), out)
    names = ["run.h5", *(f"checkpoints/{name}.safetensors" for name in ("run", "hmc"))]
    return out, {name: (out / name).read_bytes() for name in names}


class Done(Exception):
    """Raised where figures would be drawn."""


def stop_before_figures(stage, *_):
    if stage == "figures and report":
        raise Done


def fuzz_runs(run_directory, n, seed):
    """Resume n damaged runs: each ends in the samples of the whole one, or is refused."""
    out, files = run_directory
    rng = np.random.default_rng(seed)
    pristine = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole, refused = files["run.h5"], 0
    for _ in range(n):
        for name, data in files.items():
            if rng.random() < 0.5:
                (out / name).write_bytes(mutate(data, rng, list(files.values())))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                experiment.run_experiment(None, out, resume=True, progress=stop_before_figures)
        except Done:
            assert (out / "run.h5").read_bytes() == whole
        except (io.FileFormatError, experiment.ExperimentError) as error:
            assert "in use" not in str(error)
            refused += 1
        for path in set(out.rglob("*")) - set(pristine):
            assert path.is_dir() or path.name.endswith(".previous"), path
        for path, data in pristine.items():
            path.write_bytes(data)
    return refused


def test_damaged_runs(run_directory):
    assert fuzz_runs(run_directory, 25, 1) < 15


@pytest.mark.validate
def test_a_thousand_damaged_runs(run_directory):
    assert fuzz_runs(run_directory, 1000, 2) < 600


# ---- configurations -------------------------------------------------------------------------

WORDS = ["run", "target", "flow", "training", "prior_chains", "prior", "sampling", "ladder", "sampler", "comparison"]
KEYS = [key for section in WORDS for key in config._SECTIONS.get(section, config.PriorConfig).__dataclass_fields__]
scalars = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=20),
    st.sampled_from([10**400, -(10**30), 2**63, 0.5, "../../escape", "/etc/passwd", "a/b", "..", ".", "", "gaussian"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
tables = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), values, max_size=6)
documents = st.dictionaries(
    st.sampled_from(WORDS) | st.text(max_size=5), tables | st.lists(tables, max_size=3) | scalars, max_size=6
)


def toml_text(value):
    """TOML of anything JSON-like, as far as TOML can say it."""

    def inline(item):
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(inline, item)) + "]"
        if isinstance(item, float) and not np.isfinite(item):
            return "nan" if item != item else ("inf" if item > 0 else "-inf")
        return json.dumps(item) if not isinstance(item, int) or isinstance(item, bool) else str(item)

    return "\n".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items())


def parsed(text):
    """The configuration, or None where it is refused."""
    try:
        return config.parse_config(text)
    except config.ConfigError as error:
        assert str(error).startswith("config: ")
        return None


@SLOW
@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_an_error(text):
    parsed(text)


@SLOW
@given(documents)
def test_any_tables_are_a_configuration_or_an_error(document):
    parsed(toml_text(document))


@SLOW
@given(st.sampled_from(WORDS), st.sampled_from(KEYS), values)
def test_any_value_in_any_place(section, key, value):
    text = config.default_toml()
    base = config.parse_config(text).to_dict()
    content = base.setdefault(section, {})
    (content[0] if isinstance(content, list) and content else content if isinstance(content, dict) else {})[key] = value
    found = parsed(toml_text(base))
    if found is not None:
        assert config.parse_config(found.to_toml()) == found
        with contextlib.suppress(config.ConfigError):
            tracemalloc.start()
            try:
                experiment._check_buildable(found)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            # Weights of one flow at most, and what drawing them takes.
            assert peak < 8 * 8 * lfq.flows.MAX_WEIGHTS


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100000,
        "a = " + "9" * 100000,
        "[target]\nshape = [4, 4]\nlam = 0.5\nbeta = 1" + "0" * 400,
        "x = 1\n" * 100000,
        "a" * 300 + " = 1",
        "[target]\nshape = [4, 4]\nlam = 0.5\nbeta = 2020-13-45",
        "[target]\nbeta = '" + "x" * 200000 + "'",
        "\0",
    ],
)
def test_configurations_meant_to_break_the_reader(text, capsys):
    with pytest.raises(config.ConfigError) as caught:
        config.parse_config(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "a\\b", "a\0b", "a b", "x" * 65, "é", "a\n"])
@pytest.mark.parametrize("section", ["prior"])
def test_names_cannot_leave_the_directory(section, name):
    text = f'[target]\nshape = [4, 4]\nbeta = 0.5\nlam = 0.5\n[[prior]]\nkind = "gaussian"\nname = {json.dumps(name)}\n'
    with pytest.raises(config.ConfigError):
        config.parse_config(text)


def test_names_that_would_share_a_file_are_refused():
    text = '[target]\nshape = [4, 4]\nbeta = 0.5\nlam = 0.5\n[[prior]]\nkind = "gaussian"\nname = "ladder-4x4"\n'
    text += "[ladder]\nshapes = [[2, 2], [4, 4]]\nbetas = [0.4, 0.5]\n"
    with pytest.raises(config.ConfigError, match="a prior is named ladder-4x4"):
        config.parse_config(text)


def test_a_run_beyond_memory_is_refused_before_any_work():
    text = "[target]\nshape = [65536, 32768]\nbeta = 0.5\nlam = 0.5\n[sampling]\nn_chains = 1000000\n"
    with pytest.raises(config.ConfigError, match="GB of memory"):
        experiment._check_buildable(config.parse_config(text))


# ---- arguments ------------------------------------------------------------------------------

anything = st.one_of(
    st.none(),
    scalars,
    st.lists(scalars, max_size=3),
    st.builds(lambda shape, x: np.full(shape, x), st.lists(st.integers(0, 5), max_size=3), st.floats(width=32)),
)
CALLS = {
    "Phi4": lambda x: lfq.Phi4(x, beta=0.5, lam=0.5),
    "beta": lambda x: lfq.Phi4((4, 4), beta=x, lam=0.5),
    "action": THEORY.action,
    "force": THEORY.force,
    "forward": lfq.AffineFlow().forward,
    "inverse": lfq.AffineFlow().inverse,
    "weights": lambda x: setattr(lfq.AffineFlow(), "weights", x),
    "tau": lambda x: lfq.HMC(THEORY, tau=x),
    "n_steps": lambda x: lfq.HMC(THEORY, n_steps=x),
    "dtype": lambda x: lfq.HMC(THEORY, dtype=x),
    "integrator": lambda x: lfq.HMC(THEORY, integrator=x),
    "start": lambda x: HMC.start(2, 1, phi=x),
    "seed": lambda x: HMC.start(2, x),
    "evolve": lambda x: HMC.evolve(x, x),
    "hidden": lambda x: lfq.AffineFlow(hidden=x),
    "kernel_size": lambda x: lfq.AffineFlow(kernel_size=x),
    "width": lambda x: lfq.UpsampleMap(width=x),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_any_kind(name):
    @settings(SLOW, max_examples=60)
    @given(anything)
    def call(x):
        with contextlib.suppress(ValueError, TypeError, lfq.NotFiniteError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CALLS[name](x)

    call()


def test_no_file_is_ever_unpickled_or_evaluated(corpus, tmp_path, monkeypatch):
    """The ways by which Python executes what a file says are all closed while lfq reads."""
    import builtins
    import pickle

    def forbidden(*_, **__):
        raise AssertionError("executed")

    for owner, names in ((pickle, ("load", "loads", "Unpickler")), (builtins, ("eval", "exec"))):
        for name in names:
            monkeypatch.setattr(owner, name, forbidden)
    for name in ("flow-affine", "flow-compose", "state", "record"):
        data, read = corpus[name]
        (tmp_path / name).write_bytes(data)
        read(tmp_path / name)
