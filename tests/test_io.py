"""Files: what is written comes back, and what is damaged is refused in one clear error."""

import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lfq import io
from lfq.io import FileFormatError, load_tensors, save_tensors
from lfq.observables import OBSERVABLES

TENSORS = {
    "weights": np.linspace(-1, 1, 7),
    "half": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array([[-(2**62)], [3]]),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 4)),
}
METADATA = {"format": "test", "name": "φ⁴"}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    return path


def test_round_trip(saved):
    tensors, metadata = load_tensors(saved)
    assert metadata == METADATA and list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].flags.writeable
        np.testing.assert_array_equal(tensors[name], tensor)


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "x"
    save_tensors(path, {"a": np.array([1.0, -2.0])}, {"k": "v"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
    }
    assert data[8 + length :] == struct.pack("<2d", 1.0, -2.0)


def test_other_layouts_and_byte_orders_are_written_as_little_endian(tmp_path):
    tensor = np.arange(12.0).reshape(3, 4)
    for variant in (tensor.astype(">f8"), np.asfortranarray(tensor), np.repeat(tensor, 2, axis=1)[:, ::2]):
        save_tensors(tmp_path / "x", {"a": variant}, {})
        np.testing.assert_array_equal(load_tensors(tmp_path / "x")[0]["a"], tensor)


@pytest.mark.parametrize("bad", [np.zeros(2, np.int32), np.zeros(2, complex), np.array(["a"])])
def test_other_types_are_not_written(tmp_path, bad):
    with pytest.raises(TypeError, match="bad"):
        save_tensors(tmp_path / "x", {"bad": bad}, {})
    with pytest.raises(TypeError, match="metadata"):
        save_tensors(tmp_path / "x", {}, {"k": 1})
    with pytest.raises(TypeError, match="name"):
        save_tensors(tmp_path / "x", {"__metadata__": np.zeros(2)}, {})
    assert not any(tmp_path.iterdir())


def test_saving_replaces_the_file_at_once_or_not_at_all(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="space"):
        save_tensors(saved, {"a": np.zeros(3)}, {})
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_files_are_as_readable_as_others(saved):
    other = saved.parent / "other"
    other.write_text("")
    assert saved.stat().st_mode == other.stat().st_mode


def test_truncation_at_every_byte_is_refused(saved):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="file.safetensors"):
            load_tensors(saved)


def test_appended_bytes_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(FileFormatError, match="belong to no tensor"):
        load_tensors(saved)


def test_flipped_bytes_never_do_worse_than_be_refused(saved):
    data = saved.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        saved.write_bytes(damaged)
        try:
            tensors, metadata = load_tensors(saved)
        except FileFormatError as error:
            assert str(saved) in str(error)
            refused += 1
        else:
            # A flip within the data, a name or the metadata is not a matter of format.
            assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert refused > 1000


def with_header(path, header, data=b"\0" * 16):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(**changes):
    return {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": 1, "a": 2}', "twice"),
        ({"__metadata__": [1]}, "__metadata__"),
        ({"__metadata__": {"k": 1}}, "__metadata__"),
        ({"a": 1}, "exactly"),
        ({"a": {"dtype": "F64", "shape": [2]}}, "exactly"),
        ({"a": entry(extra=1)}, "exactly"),
        ({"a": entry(dtype="BF16")}, "dtype"),
        ({"a": entry(dtype=["F64"])}, "dtype"),
        ({"a": entry(shape=2)}, "shape"),
        ({"a": entry(shape=[-2])}, "shape"),
        ({"a": entry(shape=[2.0])}, "shape"),
        ({"a": entry(shape=[True, 2])}, "shape"),
        ({"a": entry(shape=[1] * 33)}, "shape"),
        ({"a": entry(shape=[3])}, "needs 24 bytes"),
        ({"a": entry(shape=[2**62, 2**62])}, "needs"),
        ({"a": entry(data_offsets=[0])}, "data_offsets"),
        ({"a": entry(data_offsets=[-8, 8])}, "data_offsets"),
        ({"a": entry(data_offsets=[16, 0])}, "needs 16 bytes"),
        ({"a": entry(data_offsets=[8, 24])}, "ends at byte 24 of 16"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"a": entry(shape=[1], data_offsets=[8, 16])}, "gap"),
        ({"a": entry(shape=[1], data_offsets=[0, 8])}, "8 bytes of data belong to no tensor"),
        ({}, "16 bytes of data belong to no tensor"),
    ],
)
def test_malformed_headers(tmp_path, header, message):
    path = with_header(tmp_path / "x", header)
    with pytest.raises(FileFormatError, match=message) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_a_zero_sized_tensor_far_beyond_the_data(tmp_path):
    with pytest.raises(FileFormatError, match="ends at byte"):
        load_tensors(with_header(tmp_path / "x", {"a": entry(shape=[0], data_offsets=[99, 99])}, b""))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, (1 << 20) + 1])
def test_a_header_length_beyond_reason(tmp_path, length):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FileFormatError, match="above the limit"):
        load_tensors(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    path = with_header(tmp_path / "x", {"a": entry()}, struct.pack("<2d", 1.0, value))
    with pytest.raises(FileFormatError, match="NaN or infinity"):
        load_tensors(path)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "absent")


def test_safetensors_itself_reads_and_writes_the_same(saved, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    theirs = safetensors.load_file(saved)
    assert set(theirs) == set(TENSORS)
    safetensors.save_file(theirs, tmp_path / "theirs", METADATA)
    tensors, metadata = load_tensors(tmp_path / "theirs")
    assert metadata == METADATA
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(theirs[name], tensor)
        np.testing.assert_array_equal(tensors[name], tensor)


# ---- run files ----------------------------------------------------------------------------------


def block(begin, end, n_chains=3, volume=4, seed=0):
    """What a sampler would yield for samples begin..end, different for every sample."""
    label = np.arange(begin, end)[:, None] + np.arange(n_chains) / 10
    latent = np.full((n_chains, 2, volume // 2), float(end))
    state = SimpleNamespace(latent=latent, trajectory=100 + end, seed=seed)
    return SimpleNamespace(
        observables={name: label + 1000 * i for i, name in enumerate(OBSERVABLES)},
        dh=-label,
        accepted=label.astype(int) % 2 == 0,
        seconds=0.5,
        state=state,
    )


@pytest.fixture
def run_file(tmp_path):
    pytest.importorskip("h5py")
    attributes = {"config": "text", "seed": 7}
    sizes = {"n_samples": 10, "n_chains": 3, "volume": 4}
    return io.RunFile.create(tmp_path / "run.h5", ["hmc", "other"], **sizes, attributes=attributes)


def test_run_file_keeps_what_is_appended(run_file):
    with run_file:
        assert run_file.attributes["config"] == "text" and run_file.attributes["seed"] == 7
        assert run_file.progress("hmc")["n_complete"] == -1
        run_file.record_tuning("hmc", 9)
        run_file.record_start("hmc", np.zeros((3, 2, 2)), 100, seed=2**63 - 1)
        run_file.append("hmc", block(0, 4))
        run_file.append("hmc", block(4, 5))
    with io.RunFile(run_file.path) as again:
        assert again.progress("hmc") == {
            "n_complete": 5,
            "n_blocks": 2,
            "trajectory": 105,
            "seed": 2**63 - 1,
            "n_steps": 9,
        }
        assert again.progress("other")["n_complete"] == -1
        np.testing.assert_array_equal(again.latent("hmc"), np.full((3, 4), 5.0))
        samples = again.samples("hmc")
        expected = block(0, 5)
        for name in OBSERVABLES:
            np.testing.assert_array_equal(samples["observables"][name], expected.observables[name])
        np.testing.assert_array_equal(samples["dh"], expected.dh)
        np.testing.assert_array_equal(samples["accepted"], expected.accepted)
        assert samples["accepted"].dtype == bool and samples["seconds"] == 1.0


def test_appending_moves_no_structure_of_the_run_file(run_file):
    size = run_file.path.stat().st_size
    with run_file:
        run_file.record_start("hmc", np.zeros((3, 2, 2)), 0, seed=1)
        run_file.append("hmc", block(0, 10))
    assert run_file.path.stat().st_size == size


KILLED = """
import os, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_io import block
from lfq.io import RunFile

file = RunFile(sys.argv[1])
file.record_start("hmc", np.zeros((3, 4)), 100, seed=1)
file.append("hmc", block(0, 4))
commit = file._commit
def die(*_, **__):
    file._flush()
    os.kill(os.getpid(), 9)
file._commit = die
file.append("hmc", block(4, 8))
"""


def test_a_process_killed_within_a_block_leaves_the_complete_ones(run_file):
    with run_file:
        pass
    command = [sys.executable, "-c", KILLED, str(run_file.path), os.path.dirname(__file__)]
    result = subprocess.run(command, timeout=120, check=False)
    assert result.returncode == -9
    with io.RunFile(run_file.path) as again:
        assert again.progress("hmc")["n_complete"] == 4
        np.testing.assert_array_equal(again.latent("hmc"), np.full((3, 4), 4.0))
        assert again.samples("hmc")["seconds"] == 0.5
        np.testing.assert_array_equal(again.samples("hmc")["dh"], block(0, 4).dh)
        again.append("hmc", block(4, 8))
        np.testing.assert_array_equal(again.samples("hmc")["dh"], block(0, 8).dh)


def test_files_that_are_not_runs(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "text").write_text("not HDF5")
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    for name in ("text", "other.h5", "absent"):
        with pytest.raises(FileFormatError, match=name):
            io.RunFile(tmp_path / name)


def test_a_run_file_in_use_is_refused(run_file):
    command = [sys.executable, "-c", f"from lfq.io import RunFile; RunFile({str(run_file.path)!r})"]
    with run_file:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "FileFormatError" in result.stderr and "in use by another process" in result.stderr
