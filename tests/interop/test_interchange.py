"""Runs and configurations in the formats of other programs."""

import warnings

import numpy as np
import pytest

import lfq
from lfq.io import FileFormatError

THEORY = lfq.Phi4((4, 4), 0.5, 0.5)


@pytest.fixture(scope="module")
def run():
    """Samples 3 trajectories apart, of chains 5, 6, ... after a warm-up of 7 trajectories."""
    hmc = lfq.HMC(THEORY, n_steps=4)
    warm = hmc.advance(hmc.start(6, seed=2**63 + 1, first_chain=5), 7, measure=False).state
    return hmc.sample(6, 40, thin=3, start=warm)


def test_xarray_numbers_chains_and_trajectories(run):
    pytest.importorskip("xarray")
    data = run.to_xarray()
    assert data.sizes == {"chain": 6, "draw": 40, "trajectory": 120}
    np.testing.assert_array_equal(data["chain"], range(5, 11))
    np.testing.assert_array_equal(data["draw"], range(10, 128, 3))  # 7 + 3, 7 + 6, ...
    np.testing.assert_array_equal(data["trajectory"], range(8, 128))
    for name, series in run.observables.items():
        np.testing.assert_array_equal(data[name].transpose("draw", "chain"), series)
    np.testing.assert_array_equal(data["dh"].sel(chain=6, trajectory=8), run.dh[0, 1])
    np.testing.assert_array_equal(data["accepted"].sum("trajectory"), run.accepted.sum(0))
    assert (data.attrs["beta"], data.attrs["seed"], data.attrs["thin"]) == (0.5, str(2**63 + 1), 3)


def test_a_sample_lies_at_the_trajectory_that_made_it(run):
    """The field after trajectory 10 of chain 5, made again, is draw 10."""
    pytest.importorskip("xarray")
    hmc = run.sampler
    block = hmc.advance(hmc.start(6, seed=2**63 + 1, first_chain=5), 1, 10)
    found = run.to_xarray()["phi2"].sel(draw=10)
    np.testing.assert_array_equal(found, block.observables["phi2"][0])


def test_continued_runs_follow_each_other(run):
    pytest.importorskip("xarray")
    later = run.sampler.sample(6, 10, thin=3, start=run.state).to_xarray()
    np.testing.assert_array_equal(later["draw"], range(130, 158, 3))


def test_arviz_sees_the_effective_sample_size(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
        groups = run.to_arviz()
        posterior, statistics = groups["posterior"], groups["sample_stats"]
        if hasattr(posterior, "to_dataset"):
            posterior, statistics = posterior.to_dataset(), statistics.to_dataset()
        ess = float(arviz.ess(groups, var_names=["phi2"])["phi2"])
    assert set(posterior.data_vars) == set(run.observables)
    np.testing.assert_array_equal(statistics["dh"].transpose("draw", "chain"), run.dh[2::3])
    np.testing.assert_allclose(statistics["acceptance_rate"].mean(), run.acceptance)
    assert 10 < ess < 10 * 240


def test_pyerrors_replica_and_configurations(run):
    pytest.importorskip("pyerrors")
    found = run.to_pyerrors("L4")
    assert set(found) == set(run.observables)
    observable = found["phi2"]
    assert sorted(observable.names) == sorted(f"L4|r{i}" for i in range(5, 11))
    for i in range(6):
        replica = f"L4|r{5 + i}"
        assert list(observable.idl[replica]) == list(range(10, 128, 3))
        np.testing.assert_allclose(
            observable.deltas[replica] + observable.r_values[replica], run.observables["phi2"][:, i], rtol=1e-13
        )
    np.testing.assert_allclose(observable.value, run.observables["phi2"].mean(), rtol=1e-13)
    with pytest.raises(ValueError, match="ensemble"):
        run.to_pyerrors("a|b")


@pytest.mark.parametrize("name", ["x.npy", "x.h5"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_configurations_come_back(tmp_path, run, name, dtype):
    if name.endswith("h5"):
        pytest.importorskip("h5py")
    phi = run.phi.astype(dtype)
    lfq.save_fields(tmp_path / name, phi, THEORY)
    found, attributes = lfq.load_fields(tmp_path / name)
    assert found.dtype == phi.dtype
    np.testing.assert_array_equal(found, phi)
    assert attributes == ({} if name == "x.npy" else {"beta": 0.5, "lam": 0.5})


def test_other_programs_read_the_files(tmp_path, run):
    h5py = pytest.importorskip("h5py")
    lfq.save_fields(tmp_path / "x.npy", run.phi)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), run.phi)
    lfq.save_fields(tmp_path / "x.h5", run.phi, THEORY, trajectory=127, stream="a")
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["phi"], run.phi)
        assert dict(file["phi"].attrs) == {"beta": 0.5, "lam": 0.5, "trajectory": 127, "stream": "a"}


def test_what_is_no_configuration_is_refused(tmp_path):
    pytest.importorskip("h5py")
    with pytest.raises(TypeError, match="phi"):
        lfq.save_fields(tmp_path / "x.npy", np.zeros((4, 4), dtype=complex))
    with pytest.raises(ValueError, match="does not end in the lattice"):
        lfq.save_fields(tmp_path / "x.npy", np.zeros((4, 5)), THEORY)
    with pytest.raises(lfq.NotFiniteError, match="phi"):
        lfq.save_fields(tmp_path / "x.h5", np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="npy, .h5"):
        lfq.save_fields(tmp_path / "x.txt", np.zeros((4, 4)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        lfq.load_fields(tmp_path / "none.h5")
    for name in ("x.npy", "x.h5"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(FileFormatError, match=name):
            lfq.load_fields(tmp_path / name)
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="object"):
        lfq.load_fields(tmp_path / "object.npy")
    np.save(tmp_path / "nan.npy", np.array([np.inf]))
    with pytest.raises(FileFormatError, match="infinity"):
        lfq.load_fields(tmp_path / "nan.npy")
