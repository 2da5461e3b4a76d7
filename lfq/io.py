"""Files: tensors in the safetensors format, and the HDF5 file that a run streams into.

A safetensors file is 8 bytes of little-endian header length, a JSON header, and raw little-endian
data. Nothing in it is executable, and reading it needs no more than JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._optional import load
from .observables import OBSERVABLES

__all__ = ["FileFormatError", "RunFile", "load_tensors", "save_tensors", "write_atomically"]

MAX_HEADER_BYTES = 1 << 20

_DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileFormatError(ValueError):
    """A file is not what its reader expects; the message names the file and what is wrong."""


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
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def save_tensors(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write arrays to a safetensors file, atomically.

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
    if metadata:
        header["__metadata__"] = dict(metadata)
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

    Raises
    ------
    FileFormatError
        Anything but a well-formed file of finite float64, float32 and int64 tensors whose data fill
        the file without gaps.
    OSError
        The file cannot be read.
    """
    path = Path(path)

    def fail(what: str) -> FileFormatError:
        return FileFormatError(f"{path}: not a valid safetensors file: {what}")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
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
    return tensors, metadata


class RunFile:
    """The HDF5 file of a run: every chain's observables, and the state that continues them.

    Every dataset gets its full size when the file is made, so a block of samples is raw data at a
    known place and no structure of the file changes while it is open. A block counts once
    ``progress`` says so, which is written after the block and its state are on disk: whenever the
    process dies, the file is readable and ends at a complete block.

    Layout, for each sampler, under ``samplers/<name>``::

        observables/<name>   (n_samples, n_chains) float64
        dh                   (n_samples, n_chains) float64
        accepted             (n_samples, n_chains) uint8
        latent               (2, n_chains, volume) float64, states after even and odd numbers of blocks
        progress             (5,) int64: n_complete, n_blocks, trajectory, seed, n_steps
        seconds              (2,) float64, wall time of the blocks, stored like latent

    ``n_steps`` is 0 before tuning, ``n_complete`` is -1 before the warm-up is over.
    """

    FORMAT = "lfq-run-1"
    FIELDS = ("n_complete", "n_blocks", "trajectory", "seed", "n_steps")

    def __init__(self, path: str | os.PathLike):
        h5py = load("h5py", "a run file")
        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r+")
        except BlockingIOError:
            raise FileFormatError(f"{self.path}: in use by another process") from None
        except OSError as error:
            raise FileFormatError(f"{self.path}: not a readable HDF5 file ({error})") from None
        if self._file.attrs.get("format") != self.FORMAT:
            self._file.close()
            raise FileFormatError(f"{self.path}: not a run of lfq in format {self.FORMAT}")

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        samplers: list[str],
        *,
        n_samples: int,
        n_chains: int,
        volume: int,
        attributes: dict[str, str | int | float],
    ) -> RunFile:
        """Make the file, at its full size, and open it.

        Parameters
        ----------
        path : path-like
        samplers : list of str
            Names of the groups.
        n_samples, n_chains, volume : int
        attributes : dict
            Attributes of the root: configuration, versions, seeds.
        """
        h5py = load("h5py", "a run file")
        path = Path(path)
        space = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        space.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        space.set_obj_track_times(False)

        def allocate(group, name: str, shape: tuple[int, ...], dtype) -> None:
            kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
            h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=space)

        with write_atomically(path) as temporary:
            with h5py.File(temporary.name, "w") as file:
                for key, value in attributes.items():
                    file.attrs[key] = value
                for name in samplers:
                    group = file.create_group(f"samplers/{name}")
                    observables = group.create_group("observables")
                    for observable in OBSERVABLES:
                        allocate(observables, observable, (n_samples, n_chains), np.float64)
                    allocate(group, "dh", (n_samples, n_chains), np.float64)
                    allocate(group, "accepted", (n_samples, n_chains), np.uint8)
                    allocate(group, "latent", (2, n_chains, volume), np.float64)
                    allocate(group, "progress", (len(cls.FIELDS),), np.int64)
                    allocate(group, "seconds", (2,), np.float64)
                    group["progress"][0] = -1
                file.attrs["progress_fields"] = ", ".join(cls.FIELDS)
                file.attrs["format"] = cls.FORMAT
        return cls(path)

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root."""
        return dict(self._file.attrs)

    def _group(self, sampler: str):
        return self._file["samplers"][sampler]

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def progress(self, sampler: str) -> dict[str, int]:
        """How far a sampler has come: the entries of `FIELDS`."""
        return dict(zip(self.FIELDS, map(int, self._group(sampler)["progress"][...]), strict=True))

    def _commit(self, sampler: str, **changes: int) -> None:
        self._flush()
        progress = self.progress(sampler) | changes
        self._group(sampler)["progress"][...] = [progress[field] for field in self.FIELDS]
        self._flush()

    def record_tuning(self, sampler: str, n_steps: int) -> None:
        """Store the tuned number of integrator steps."""
        self._commit(sampler, n_steps=n_steps)

    def record_start(self, sampler: str, latent: np.ndarray, trajectory: int, seed: int) -> None:
        """Store the state after the warm-up, from which the first block starts."""
        group = self._group(sampler)
        group["latent"][0] = np.reshape(latent, group["latent"].shape[1:])
        self._commit(sampler, n_complete=0, trajectory=trajectory, seed=seed)

    def append(self, sampler: str, block) -> None:
        """Store a block of samples and the state after it.

        Parameters
        ----------
        sampler : str
        block : lfq.Block
        """
        group, progress = self._group(sampler), self.progress(sampler)
        n_blocks = progress["n_blocks"] + 1
        begin = progress["n_complete"]
        end = begin + len(block.dh)
        for name in OBSERVABLES:
            group["observables"][name][begin:end] = block.observables[name]
        group["dh"][begin:end] = block.dh
        group["accepted"][begin:end] = block.accepted
        group["latent"][n_blocks % 2] = np.reshape(block.state.latent, group["latent"].shape[1:])
        group["seconds"][n_blocks % 2] = group["seconds"][(n_blocks - 1) % 2] + block.seconds
        self._commit(sampler, n_complete=end, n_blocks=n_blocks, trajectory=block.state.trajectory)

    def latent(self, sampler: str) -> np.ndarray:
        """Latents (n_chains, volume) after the last complete block."""
        group = self._group(sampler)
        return group["latent"][self.progress(sampler)["n_blocks"] % 2]

    def samples(self, sampler: str) -> dict[str, Any]:
        """The complete blocks: ``observables`` (dict of arrays), ``dh``, ``accepted`` and ``seconds``."""
        group, progress = self._group(sampler), self.progress(sampler)
        end = max(progress["n_complete"], 0)
        return {
            "observables": {name: group["observables"][name][:end] for name in OBSERVABLES},
            "dh": group["dh"][:end],
            "accepted": group["accepted"][:end].astype(bool),
            "seconds": float(group["seconds"][progress["n_blocks"] % 2]),
        }
