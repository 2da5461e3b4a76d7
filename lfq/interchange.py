"""Runs and configurations in the formats of other programs: xarray, ArviZ, pyerrors, .npy and HDF5.

A sample is numbered by the trajectories of its chain when it was taken, warm-up included, and a chain by its global
number, so that runs that continue each other fit together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._kernels import check_finite
from ._optional import load
from .io import FileFormatError, write_atomically

if TYPE_CHECKING:
    from .hmc import Run

__all__ = ["load_fields", "save_fields", "to_arviz", "to_pyerrors", "to_xarray"]


def _numbers(run: Run) -> tuple[range, range]:
    """Chains, and trajectories done at each sample."""
    end = run.state.trajectory
    begin = end - len(run.dh)
    chains = range(run.state.first_chain, run.state.first_chain + run.n_chains)
    return chains, range(begin + run.thin, end + 1, run.thin)


def _attributes(theory) -> dict:
    return {name: getattr(theory, name) for name in ("beta", "lam") if hasattr(theory, name)}


def to_xarray(run: Run):
    """A run as an xarray Dataset.

    Returns
    -------
    xarray.Dataset
        Observables over (chain, draw), dh and accepted over (chain, trajectory). Coordinates: chain, its
        global number; draw and trajectory, the trajectories of the chain done by then, warm-up included.

    Raises
    ------
    ImportError
        xarray is not installed.
    """
    xarray = load("xarray", "to_xarray", "interchange")
    chains, draws = _numbers(run)
    end = run.state.trajectory
    data = {name: (("chain", "draw"), np.ascontiguousarray(series.T)) for name, series in run.observables.items()}
    data["dh"] = ("chain", "trajectory"), np.ascontiguousarray(run.dh.T)
    data["accepted"] = ("chain", "trajectory"), np.ascontiguousarray(run.accepted.T)
    coordinates = {
        "chain": np.array(chains),
        "draw": np.array(draws),
        "trajectory": np.arange(end - len(run.dh) + 1, end + 1),
    }
    attributes = {
        "created_by": "lfq",
        "shape": list(run.theory.shape),
        "seed": str(run.state.seed),  # 64 bits, without a sign
        "thin": run.thin,
        **_attributes(run.theory._physical),
    }
    return xarray.Dataset(data, coordinates, attributes)


def to_arviz(run: Run):
    """A run as ArviZ keeps it, with the groups ``posterior`` and ``sample_stats``.

    Observables are the variables of ``posterior``. ``sample_stats`` holds dh of the last trajectory before each draw
    and ``acceptance_rate``, the share of accepted ones since the draw before.

    Returns
    -------
    arviz.InferenceData, or xarray.DataTree from ArviZ 1.0 on

    Raises
    ------
    ImportError
        ArviZ is not installed.
    """
    arviz = load("arviz", "to_arviz", "interchange")
    xarray = load("xarray", "to_arviz", "interchange")
    whole = to_xarray(run)
    posterior = whole[list(run.observables)].drop_vars("trajectory", errors="ignore")
    by_draw = (run.n_samples, run.thin, run.n_chains)
    statistics = xarray.Dataset(
        {
            "dh": (("chain", "draw"), run.dh.reshape(by_draw)[:, -1].T),
            "acceptance_rate": (("chain", "draw"), run.accepted.reshape(by_draw).mean(axis=1).T),
        },
        {"chain": whole["chain"], "draw": whole["draw"]},
    )
    groups = {"posterior": posterior, "sample_stats": statistics}
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(**groups)
    return xarray.DataTree.from_dict(groups)


def to_pyerrors(run: Run, ensemble: str = "lfq") -> dict:
    """The observables of a run for pyerrors.

    Parameters
    ----------
    run : Run
    ensemble : str
        Its name, without "|". Chain i is the replica ``ensemble|r<i>``, i its global number.

    Returns
    -------
    dict of str to pyerrors.Obs
        With trajectory numbers as configuration numbers.

    Raises
    ------
    ImportError
        pyerrors is not installed.
    """
    pyerrors = load("pyerrors", "to_pyerrors")
    if not isinstance(ensemble, str) or not ensemble or "|" in ensemble:
        raise ValueError(f'ensemble: must be a name without "|", got {ensemble!r}')
    chains, draws = _numbers(run)
    names = [f"{ensemble}|r{chain}" for chain in chains]
    return {
        name: pyerrors.Obs(
            [np.ascontiguousarray(series[:, i]) for i in range(run.n_chains)], names, idl=[draws] * run.n_chains
        )
        for name, series in run.observables.items()
    }


def save_fields(path: str | os.PathLike, phi, theory=None, **attributes: int | float | str) -> None:
    """Write configurations to a .npy or HDF5 file, atomically.

    Parameters
    ----------
    path : path-like
        Ends in ``.npy``, or in ``.h5`` or ``.hdf5``.
    phi : array_like, shape (..., *shape)
        float32 or float64, finite.
    theory : Phi4, optional
        HDF5 keeps its ``beta`` and ``lam`` as attributes.
    **attributes
        Of the HDF5 file: ``seed``, ``trajectory``, whatever helps.

    Notes
    -----
    The HDF5 file holds one dataset, ``phi``, with the attributes on it.
    """
    path, phi = Path(path), np.asarray(phi, order="C")
    if phi.dtype not in (np.float32, np.float64):
        raise TypeError(f"phi: must be float32 or float64, got {phi.dtype}")
    if theory is not None and phi.shape[max(phi.ndim - theory.ndim, 0) :] != theory.shape:
        raise ValueError(f"phi: shape {phi.shape} does not end in the lattice {theory.shape}")
    check_finite(phi, "phi")
    if path.suffix == ".npy":
        if attributes:
            raise ValueError(f"path: a .npy file keeps no attributes such as {', '.join(attributes)}; use .h5")
        with write_atomically(path) as file:
            np.save(file, phi, allow_pickle=False)
        return
    h5py = _h5py(path)
    with write_atomically(path) as temporary, h5py.File(temporary.name, "w") as file:
        dataset = file.create_dataset("phi", data=phi)
        for name, value in {**_attributes(theory), **attributes}.items():
            dataset.attrs[name] = value


def load_fields(path: str | os.PathLike) -> tuple[np.ndarray, dict]:
    """Read what `save_fields` or another program wrote.

    Returns
    -------
    phi : ndarray, float32 or float64
    attributes : dict
        Of an HDF5 file; empty for .npy.

    Raises
    ------
    FileFormatError
        Not such a file, or not finite real numbers; nothing in it is ever executed.
    OSError
        It cannot be read.
    """
    path = Path(path)
    attributes: dict = {}
    if path.suffix == ".npy":
        try:
            phi = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise FileFormatError(f"{path}: not a .npy file of numbers ({error})") from None
    else:
        h5py = _h5py(path)
        with open(path, "rb"):
            pass  # a missing file is an OSError that says so
        try:
            with h5py.File(path, "r") as file:
                phi, attributes = file["phi"][...], dict(file["phi"].attrs)
        except (OSError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path}: not an HDF5 file with a dataset phi ({error})") from None
    if not isinstance(phi, np.ndarray) or phi.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise FileFormatError(f"{path}: not an array of float32 or float64")
    phi = phi.astype(phi.dtype.newbyteorder("="), order="C", copy=False)
    if not np.isfinite(phi).all():
        raise FileFormatError(f"{path}: holds NaN or infinity")
    return phi, attributes


def _h5py(path: Path):
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"path: must end in .npy, .h5 or .hdf5, got {path.name!r}")
    return load("h5py", "an HDF5 file")
