"""Files: what is written comes back, and what is damaged is refused in one clear error."""

import json
import os
import struct
import subprocess
import sys
import warnings
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
    header = json.loads(data[8 : 8 + length])
    assert len(header["__metadata__"].pop("checksum")) == 32
    assert header == {
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
            # Flips that cancel, and those in the name of the checksum itself.
            assert damaged == data or set(metadata) - set(METADATA)
            assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert refused > 2800


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


# ---- checkpoints --------------------------------------------------------------------------------


def checkpoint(path, number):
    io.save_checkpoint(path, {"latent": np.full((2, 3), float(number))}, {"number": number})


def newest(path):
    return io.load_checkpoint(path)[0][1]["number"]


@pytest.fixture
def two_checkpoints(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint(path, 1)
    checkpoint(path, 2)
    return path


def test_the_checkpoint_before_is_kept(two_checkpoints):
    assert [record["number"] for _, record in io.load_checkpoint(two_checkpoints)] == [2, 1]
    checkpoint(two_checkpoints, 3)
    (tensors, record), (_, before) = io.load_checkpoint(two_checkpoints)
    assert (record["number"], before["number"]) == (3, 2)
    np.testing.assert_array_equal(tensors["latent"], np.full((2, 3), 3.0))
    assert len(list(two_checkpoints.parent.iterdir())) == 2


def test_without_a_checkpoint(tmp_path):
    assert io.load_checkpoint(tmp_path / "absent") == []


def test_a_checkpoint_truncated_at_any_byte(two_checkpoints):
    data = two_checkpoints.read_bytes()
    for length in range(len(data)):
        two_checkpoints.write_bytes(data[:length])
        with pytest.warns(io.RecoveryWarning, match="using the other checkpoint"):
            assert newest(two_checkpoints) == 1


def test_a_checkpoint_with_any_bit_flipped(two_checkpoints):
    data = two_checkpoints.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        two_checkpoints.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = newest(two_checkpoints)
        # The checksum covers all but its own name; padding and white space of the header say nothing.
        if found == 2:
            tensors, record = io.load_checkpoint(two_checkpoints)[0]
            assert record == {"number": 2} and (tensors["latent"] == 2).all()
        else:
            assert found == 1 and [warning.category for warning in said] == [io.RecoveryWarning]


def test_two_damaged_checkpoints_are_an_error(two_checkpoints):
    for file in two_checkpoints.parent.iterdir():
        file.write_bytes(b"12345678" * 9)
    with pytest.raises(FileFormatError, match=two_checkpoints.name):
        io.load_checkpoint(two_checkpoints)


@pytest.mark.parametrize("call", ["link", "replace", "fsync", "unlink"])
def test_whatever_call_fails_a_checkpoint_is_left(two_checkpoints, monkeypatch, call):
    real = getattr(os, call)

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="space"):
        checkpoint(two_checkpoints, 3)
    monkeypatch.setattr(os, call, real)
    assert newest(two_checkpoints) == 2


def test_a_checkpoint_reaches_the_disk_before_its_name(two_checkpoints, monkeypatch):
    """What no killed process can show: the content is synced before the renaming, and the directory after it."""
    calls = []

    def traced(name, real):
        def call(*arguments, **keywords):
            of = "directory" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}") else ""
            calls.append(f"{name} {of}".strip())
            return real(*arguments, **keywords)

        return call

    for name in ("unlink", "link", "fsync", "replace"):
        monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
    checkpoint(two_checkpoints, 3)
    assert calls == ["unlink", "link", "fsync", "replace", "fsync directory"]


def test_changed_parameters_are_named():
    stored = {"beta": 0.5, "shape": [8, 8], "flow": {"bias": True}, "gone": 1}
    io.check_parameters("x", stored, {**stored, "shape": (8, 8)})
    with pytest.raises(io.ParameterError, match="x: .*beta was 0.5 and is 0.6; flow.bias was True and is False"):
        io.check_parameters("x", stored, {**stored, "beta": 0.6, "flow": {"bias": False}})
    with pytest.raises(io.ParameterError, match="gone was 1 and is None"):
        io.check_parameters("x", stored, {key: value for key, value in stored.items() if key != "gone"})


# ---- run files ----------------------------------------------------------------------------------


def block(begin, end, n_chains=3):
    """What a sampler would yield for samples begin..end, different for every sample."""
    label = np.arange(begin, end)[:, None] + np.arange(n_chains) / 10
    return SimpleNamespace(
        observables={name: label + 1000 * i for i, name in enumerate(OBSERVABLES)},
        dh=-label,
        accepted=label.astype(int) % 2 == 0,
    )


ATTRIBUTES = {"config": "text", "seed": 7}


def run_file(path, **keywords):
    pytest.importorskip("h5py")
    arguments = {"samplers": ["hmc", "other"], "n_samples": 10, "n_chains": 3, "attributes": ATTRIBUTES}
    return io.RunFile(path, **arguments | keywords)


@pytest.fixture
def written(tmp_path):
    """A file with five samples, and their checksums."""
    path = tmp_path / "run.h5"
    with run_file(path, create=True) as file:
        checksums = file.write("hmc", 0, block(0, 4), {})
        checksums = file.write("hmc", 4, block(4, 5), checksums)
        file.sync()
        file.announce("hmc", 5)
    return path, checksums


def test_run_file_keeps_what_is_written(written):
    path, checksums = written
    with run_file(path) as file:
        assert file.intact("hmc", 5, checksums) and file.intact("other", 0, {})
        assert not file.intact("hmc", 4, checksums)
        samples = file.samples("hmc", 5)
    expected = block(0, 5)
    for name in OBSERVABLES:
        np.testing.assert_array_equal(samples["observables"][name], expected.observables[name])
    np.testing.assert_array_equal(samples["dh"], expected.dh)
    np.testing.assert_array_equal(samples["accepted"], expected.accepted)
    assert samples["accepted"].dtype == bool
    assert list(path.parent.iterdir()) == [path]


def test_checksums_do_not_depend_on_the_blocks(written, tmp_path):
    with run_file(tmp_path / "other.h5", create=True) as file:
        assert file.write("hmc", 0, block(0, 5), {}) == written[1]


def test_hdf5_reads_the_file_while_it_is_written(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "run.h5"
    read = (
        "import h5py, sys\n"
        "with h5py.File(sys.argv[1]) as file:\n"
        "    group = file['samplers/hmc']\n"
        "    n = group['n_complete'][0]\n"
        "    print(n, group['dh'][:n].sum(), group['observables/M'].shape, file.attrs['config'])\n"
    )
    with run_file(path, create=True) as file:
        checksums = {}
        for begin in range(0, 10, 2):
            checksums = file.write("hmc", begin, block(begin, begin + 2), checksums)
            file.announce("hmc", begin + 2)
            with h5py.File(path) as reader:
                group = reader["samplers/hmc"]
                assert group["n_complete"][0] == begin + 2
                np.testing.assert_array_equal(group["dh"][: begin + 2], block(0, begin + 2).dh)
        command = [sys.executable, "-c", read, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == f"10 {block(0, 10).dh.sum()} (10, 3) text\n"


def test_writing_moves_no_structure_of_the_run_file(written):
    path, _ = written
    with run_file(path.parent / "fresh.h5", create=True):
        fresh = (path.parent / "fresh.h5").read_bytes()
    data = path.read_bytes()
    with run_file(path) as file:
        spans = file._spans(len(data))
    assert len(data) == len(fresh)
    assert all(data[begin:end] == fresh[begin:end] for begin, end in spans)


def test_the_space_of_a_run_file_is_taken_at_once(tmp_path):
    path = tmp_path / "run.h5"
    with run_file(path, n_samples=10000, create=True):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 2 * 10000 * 3 * 8 * 7


def test_a_run_file_with_any_bit_flipped(written):
    path, checksums = written
    data = path.read_bytes()
    with run_file(path) as file:
        spans = file._spans(len(data))
    rng = np.random.default_rng(1)
    structure = [byte for begin, end in spans for byte in range(begin, end)]
    for byte in [*rng.choice(structure, 40), *rng.integers(0, len(data), 40)]:
        damaged = bytearray(data)
        damaged[byte] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with run_file(path) as file:
                intact = file.intact("hmc", 5, checksums)
        in_structure = any(begin <= byte < end for begin, end in spans)
        assert [warning.category for warning in said] == in_structure * [io.RecoveryWarning]
        # What was mended is as it was; what cannot be mended is noticed, unless nobody has written there.
        differs = [i for i, (x, y) in enumerate(zip(data, path.read_bytes(), strict=True)) if x != y]
        assert differs == ([] if in_structure else [byte])
        with run_file(path) as file:
            found, expected = file.samples("hmc", 5), block(0, 5)
        changed = any((found[key] != getattr(expected, key)).any() for key in ("dh", "accepted"))
        assert intact or not in_structure
        assert not (intact and changed)


def test_a_truncated_run_file_is_mended_and_its_samples_refused(written):
    path, checksums = written
    data = path.read_bytes()
    for length in [0, 1, 100, *range(200, len(data), 1997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.warns(io.RecoveryWarning, match=f"it has {length} bytes, not {len(data)}; mended"):
            with run_file(path) as file:
                lost = not file.intact("hmc", 5, checksums)
        assert path.stat().st_size == len(data)
        assert lost or path.read_bytes()[: length] == data[:length]


def test_files_that_are_not_this_run(written):
    path, _ = written
    for change in ({"n_samples": 11}, {"n_chains": 4}, {"samplers": ["hmc"]}, {"attributes": {"config": "other"}}):
        with pytest.raises(FileFormatError, match="run.h5"), run_file(path, mend=False, **change):
            pass
    with pytest.raises(FileNotFoundError), run_file(path.parent / "absent"):
        pass
