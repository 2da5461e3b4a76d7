"""Files: tensors in the safetensors format, checkpoints, and the HDF5 file that a run streams into.

A safetensors file is 8 bytes of little-endian header length, a JSON header, and raw little-endian
data. Nothing in it is executable, and reading it needs no more than JSON. Those written here carry a
checksum of everything in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._optional import load
from .observables import OBSERVABLES

__all__ = [
    "FileFormatError",
    "ParameterError",
    "RecoveryWarning",
    "RunFile",
    "check_parameters",
    "checksum",
    "load_checkpoint",
    "load_tensors",
    "remove_checkpoint",
    "save_checkpoint",
    "save_tensors",
    "write_atomically",
]

MAX_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 34
"""Largest safetensors file that is read. Reading one takes three times its size in memory, and no more."""

PIECE_BYTES = 1 << 22
"""Of a run file, read at a time."""

_DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileFormatError(ValueError):
    """A file is not what its reader expects; the message names the file and what is wrong."""


class ParameterError(ValueError):
    """A checkpoint was written with other parameters; the message names them."""


class RecoveryWarning(UserWarning):
    """A file was damaged, and an older one, or none, is used instead; the message says what is lost."""


def _sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Any]:
    """Open a binary file that appears at `path` complete, or not at all.

    Yields
    ------
    file object
        A temporary file in the same directory, which replaces `path` on success.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; the result is as readable as any other new file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, 0o666 & ~umask)
            os.replace(file.name, path)
            _sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """BLAKE2b of names, types, shapes, little-endian data and metadata."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        kind = tensor.dtype.newbyteorder("<")
        digest.update(json.dumps([name, _NAMES[kind], list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor, kind).data)
    digest.update(json.dumps(sorted(metadata.items())).encode())
    return digest.hexdigest()


def save_tensors(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write arrays to a safetensors file, atomically, with a checksum in its metadata.

    Parameters
    ----------
    path : path-like
    tensors : dict of str to ndarray
        float64, float32 or int64.
    metadata : dict of str to str

    Raises
    ------
    TypeError
        Another dtype, or metadata that are not strings.
    OSError
        The file cannot be written.
    """
    header: dict[str, Any] = {}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError("save_tensors: metadata must map str to str")
    chunks, offset = [], 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise TypeError(f"save_tensors: {name!r} cannot name a tensor")
        tensor = np.asarray(tensor)
        dtype = tensor.dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise TypeError(f"save_tensors: {name} is {tensor.dtype}, not float64, float32 or int64")
        data = tensor.astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    header["__metadata__"] = metadata | {"checksum": checksum(arrays, metadata)}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"save_tensors: the header of {len(encoded)} bytes is above {MAX_HEADER_BYTES}")
    with write_atomically(path) as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for chunk in chunks:
            file.write(chunk)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file, trusting nothing in it.

    Returns
    -------
    tensors : dict of str to ndarray
        Writable, native byte order.
    metadata : dict of str to str
        Without the checksum. A file that other programs wrote needs none.

    Raises
    ------
    FileFormatError
        Anything but a well-formed file of finite float64, float32 and int64 tensors whose data fill
        the file without gaps and fit the checksum; one of more than `MAX_FILE_BYTES`.
    OSError
        The file cannot be read.
    """
    path = Path(path)

    def fail(what: str) -> FileFormatError:
        return FileFormatError(f"{path}: not a valid safetensors file: {what}")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise fail(f"{size} bytes are above the limit of {MAX_FILE_BYTES}")
        prefix = file.read(8)
        if len(prefix) < 8:
            raise fail(f"{len(prefix)} bytes are too few for a header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise fail(f"a header of {length} bytes is above the limit of {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise fail(f"the header ends at byte {8 + length} of {size}")
        encoded, data = file.read(length), file.read()
    try:
        header = json.loads(encoded.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise fail(f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise fail("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise fail("__metadata__ does not map strings to strings")

    tensors, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fail(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise fail(f"tensor {name!r} has dtype {entry['dtype']!r}, not one of {', '.join(_DTYPES)}")
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
            raise fail(f"tensor {name!r} has shape {shape!r}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise fail(f"tensor {name!r} has data_offsets {offsets!r}")
        begin, end = offsets
        n_entries = 1
        for extent in shape:
            n_entries *= extent
        n_bytes = n_entries * dtype.itemsize
        if end - begin != n_bytes:
            raise fail(f"tensor {name!r} of shape {shape} needs {n_bytes} bytes, not {end - begin}")
        if end > len(data):
            raise fail(f"tensor {name!r} ends at byte {end} of {len(data)} bytes of data")
        tensor = np.frombuffer(data, dtype=dtype, count=n_entries, offset=begin if n_entries else 0)
        tensor = tensor.reshape(shape).astype(dtype.newbyteorder("="))
        if dtype.kind == "f" and not np.isfinite(tensor).all():
            raise fail(f"tensor {name!r} holds NaN or infinity")
        tensors[name] = tensor
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another" if begin < position else "leaves a gap before it"
            raise fail(f"tensor {name!r} {what}")
        position = end
    if position != len(data):
        raise fail(f"{len(data) - position} bytes of data belong to no tensor")
    stored = metadata.pop("checksum", None)
    if stored is not None and stored != checksum(tensors, metadata):
        raise fail("the checksum differs: the file is damaged")
    return tensors, metadata


# ---- checkpoints ----------------------------------------------------------------------------


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save_checkpoint(path: str | os.PathLike, tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write a checkpoint, keeping the one before it beside it as ``NAME.previous``.

    Whenever the process or the machine stops, at least one complete checkpoint is there.

    Parameters
    ----------
    path : path-like
    tensors : dict of str to ndarray
    record : dict
        JSON-able.
    """
    path = Path(path)
    if path.exists():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_previous(path))
        os.link(path, _previous(path))
    save_tensors(path, tensors, {"lfq_checkpoint": json.dumps(record)})


def load_checkpoint(path: str | os.PathLike) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """The good checkpoints at a place, the newest first.

    Returns
    -------
    list of (tensors, record)
        Empty where none was ever written.

    Raises
    ------
    FileFormatError
        There are files, and all are damaged.

    Warns
    -----
    RecoveryWarning
        One of the two that are kept is damaged, and the other is used.
    """
    good, errors = [], []
    for candidate in (Path(path), _previous(Path(path))):
        try:
            good.append(_read_checkpoint(candidate))
        except FileNotFoundError:
            continue
        except FileFormatError as error:
            errors.append(error)
    if errors and not good:
        raise errors[0]
    if errors:
        warnings.warn(f"{errors[0]}; using the other checkpoint beside it", RecoveryWarning, stacklevel=2)
    return good


def _read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tensors, metadata = load_tensors(path)
    try:
        record = json.loads(metadata["lfq_checkpoint"])
    except (KeyError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise FileFormatError(f"{path}: not a checkpoint")
    return tensors, record


def remove_checkpoint(path: str | os.PathLike) -> None:
    """Delete a checkpoint and the one before it."""
    for file in (Path(path), _previous(Path(path))):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def check_parameters(path: str | os.PathLike, stored: Any, now: Mapping[str, Any]) -> None:
    """Refuse to continue with other parameters than those a checkpoint was written with.

    Raises
    ------
    ParameterError
        Names every parameter that differs, with both values.
    """
    stored, now = _flat(stored), _flat(json.loads(json.dumps(now)))
    changed = [
        f"{key} was {stored.get(key)!r} and is {now.get(key)!r}"
        for key in stored | now
        if stored.get(key) != now.get(key)
    ]
    if changed:
        raise ParameterError(f"{os.fspath(path)}: was started with other parameters: {'; '.join(changed)}")


# ---- run files ------------------------------------------------------------------------------


class RunFile:
    """The HDF5 file of a run: every chain's observables, energy changes and accept decisions.

    Every dataset gets its full size when the file is made, so a block of samples is raw data at a
    known place: it is written there by the operating system's calls, and no structure of the file
    changes while a run goes on. Any program can read the file at any time; samples count up to the
    sampler's ``n_complete``. To open a file again is to make a sparse twin and to compare: all that HDF5
    ever parses was just made by HDF5, whatever is in the file.

    Layout, for each sampler, under ``samplers/<name>``::

        observables/<name>   (n_samples, n_chains) float64
        dh                   (n_samples, n_chains) float64
        accepted             (n_samples, n_chains) uint8
        n_complete           (1,) int64

    The state of the chains is not here but in checkpoints, and so are checksums of the samples.

    Parameters
    ----------
    path : path-like
    samplers : list of str
        Names of the groups.
    n_samples, n_chains : int
    attributes : dict
        Attributes of the root: configuration, versions, seeds.
    create : bool
        Make the file, with all of its space on disk; it must not exist.
    mend : bool
        Restore a damaged structure. Only for a file that this version of HDF5 made.

    Raises
    ------
    FileFormatError
        The structure is not the one that these arguments make, and is not to be mended.
    OSError

    Warns
    -----
    RecoveryWarning
        The structure was damaged, and is mended.
    """

    FORMAT = "lfq-run-2"
    SERIES = (*(f"observables/{name}" for name in OBSERVABLES), "dh", "accepted")

    def __init__(
        self,
        path: str | os.PathLike,
        samplers: list[str],
        *,
        n_samples: int,
        n_chains: int,
        attributes: dict[str, str | int | float],
        create: bool = False,
        mend: bool = True,
    ):
        self.path, self.n_samples, self.n_chains = Path(path), n_samples, n_chains
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.") as twin:
            self._places = self._make(twin.name, samplers, attributes)
            size = os.stat(twin.name).st_size
            structure = [(begin, os.pread(twin.fileno(), end - begin, begin)) for begin, end in self._spans(size)]
        if create:
            with write_atomically(self.path) as file:
                # All of the space now: a disk that fills up later does not stop the run.
                os.posix_fallocate(file.fileno(), 0, size)
                for place, data in structure:
                    file.seek(place)
                    file.write(data)
        self._handle = os.open(self.path, os.O_RDWR)
        try:
            self._compare(structure, size, mend)
        except BaseException:
            os.close(self._handle)
            raise

    def _make(self, path: str, samplers: list[str], attributes) -> dict[str, tuple[int, int, int]]:
        """Write the structure, and return place, bytes of a row and number of rows of every dataset."""
        h5py = load("h5py", "a run file")
        space = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        space.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        space.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space.set_obj_track_times(False)
        places = {}

        def allocate(group, name: str, shape: tuple[int, ...], dtype) -> None:
            kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
            data = h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=space)
            row = np.dtype(dtype).itemsize * math.prod(shape[1:])
            places[f"{group.name.removeprefix('/samplers/')}/{name}"] = data.get_offset(), row, shape[0]

        with h5py.File(path, "w") as file:
            for key, value in attributes.items():
                file.attrs[key] = value
            file.attrs["format"] = self.FORMAT
            for name in samplers:
                group = file.create_group(f"samplers/{name}")
                observables = group.create_group("observables")
                for observable in OBSERVABLES:
                    allocate(observables, observable, (self.n_samples, self.n_chains), "<f8")
                allocate(group, "dh", (self.n_samples, self.n_chains), "<f8")
                allocate(group, "accepted", (self.n_samples, self.n_chains), "u1")
                allocate(group, "n_complete", (1,), "<i8")
        return places

    def _spans(self, size: int) -> list[tuple[int, int]]:
        """Where the file has no samples."""
        spans, position = [], 0
        for place, row, n_rows in sorted(self._places.values()):
            spans.append((position, place))
            position = place + row * n_rows
        return [*spans, (position, size)]

    def _compare(self, structure: list[tuple[int, bytes]], size: int, mend: bool) -> None:
        found = os.fstat(self._handle).st_size
        if found == size and all(self._pread(place, len(data)) == data for place, data in structure):
            return
        what = "its structure differs" if found == size else f"it has {found} bytes, not {size}"
        if not mend:
            raise FileFormatError(f"{self.path}: {what}: damaged, or made by another version of HDF5")
        warnings.warn(f"{self.path}: damaged: {what}; mended", RecoveryWarning, stacklevel=4)
        os.ftruncate(self._handle, size)
        for place, data in structure:
            self._pwrite(place, data)

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._handle)

    def _pwrite(self, place: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle, view, place)
            view, place = view[done:], place + done

    def _pread(self, place: int, size: int) -> bytes:
        return os.pread(self._handle, size, place).ljust(size, b"\0")

    def pieces(self, sampler: str, name: str, n_complete: int) -> Iterator[np.ndarray]:
        """The first samples of one of `SERIES`, some MiB at a time, each (n, n_chains)."""
        place, row, _ = self._places[f"{sampler}/{name}"]
        n = max(1, PIECE_BYTES // row)
        for begin in range(0, n_complete, n):
            data = self._pread(place + begin * row, row * (min(begin + n, n_complete) - begin))
            yield np.frombuffer(data, "u1" if name == "accepted" else "<f8").reshape(-1, self.n_chains)

    def write(self, sampler: str, begin: int, block, checksums: Mapping[str, int]) -> dict[str, int]:
        """Write a block of samples to its place. It counts once `commit` says so.

        Parameters
        ----------
        sampler : str
        begin : int
            Number of its first sample.
        block : lfq.Block
        checksums : dict of str to int
            Of all samples before.

        Returns
        -------
        dict of str to int
            Checksums with the block.
        """
        if begin + len(block.dh) > self.n_samples:
            raise ValueError(f"write: {sampler} has {self.n_samples} samples, and {begin + len(block.dh)} were given")
        checksums = dict(checksums)
        for name in self.SERIES:
            kind, _, observable = name.rpartition("/")
            series = block.observables[observable] if kind else getattr(block, observable)
            data = np.ascontiguousarray(series, "u1" if name == "accepted" else "<f8").tobytes()
            place, row, _ = self._places[f"{sampler}/{name}"]
            self._pwrite(place + begin * row, data)
            checksums[name] = zlib.crc32(data, checksums.get(name, 0))
        return checksums

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        os.fsync(self._handle)

    def announce(self, sampler: str, n_complete: int) -> None:
        """Tell readers how many samples are complete."""
        self._pwrite(self._places[f"{sampler}/n_complete"][0], struct.pack("<q", n_complete))

    def intact(self, sampler: str, n_complete: int, checksums: Any) -> bool:
        """Whether the first samples are those the checksums were made of."""
        if not (_is_count(n_complete) and n_complete <= self.n_samples and isinstance(checksums, dict)):
            return False
        for name in self.SERIES:
            found = 0
            for data in self.pieces(sampler, name, n_complete):
                found = zlib.crc32(data, found)
            if checksums.get(name, 0) != found:
                return False
        return True

    def samples(self, sampler: str, n_complete: int, every: int = 1) -> dict[str, Any]:
        """Every `every`-th of the first samples: ``observables`` (dict of arrays), ``dh`` and ``accepted``."""

        def series(name: str) -> np.ndarray:
            parts, begin = [], 0
            for piece in self.pieces(sampler, name, n_complete):
                parts.append(piece[-(begin + 1) % every :: every].copy())
                begin += len(piece)
            return np.concatenate(parts)

        return {
            "observables": {name: series(f"observables/{name}") for name in OBSERVABLES},
            "dh": series("dh"),
            "accepted": series("accepted").astype(bool),
        }
