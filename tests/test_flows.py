"""Flows through the public API: symmetries, transfer between lattices, files, arrays of any kind, errors."""

import itertools
import json
import math
import re
import tracemalloc

import numpy as np
import pytest

import lfq
from lfq import _gpu
from lfq.io import FileFormatError, load_tensors, save_tensors

STRUCTURES = {
    "paper": dict(),
    "kernel 5, three blocks": dict(kernel_size=5, n_blocks=3),
    "kernel 9, bias": dict(kernel_size=9, bias=True),
    "exp(s), no rescale": dict(scale="exp(s)", rescale=False),
    "hidden 4": dict(hidden=(4,)),
    "hidden 3-2, leaky, bias": dict(
        hidden=(3, 2), activation="leaky_relu", bias=True, scale="exp(s)", n_blocks=2
    ),
    "even": dict(scale="even", features=4),
    "site": dict(scale="site", rescale=False, n_blocks=2),
    "site, sublattices": dict(scale="site", rescale=False, n_blocks=2, sublattices=True),
    "site, order": dict(scale="site", sublattices=True, order="e|c o|ce c|eo e|co"),
}


def make_flow(name="paper", ndim=2, size=0.2, seed=1):
    flow = lfq.AffineFlow(ndim=ndim, **STRUCTURES[name])
    flow.weights = size * np.random.default_rng(seed).normal(size=flow.n_weights)
    return flow


def make_kind(kind, ndim=2):
    return {
        "affine": lambda: make_flow("hidden 3-2, leaky, bias", ndim),
        "interleave": lambda: lfq.InterleaveMap(ndim),
        "upsample": lambda: lfq.UpsampleMap(
            1.3, np.linspace(0.3, 0.6, ndim), np.linspace(0.9, 0.5, ndim), ndim
        ),
        "compose": lambda: lfq.Compose(
            [
                make_flow("paper", ndim),
                lfq.Compose([lfq.UpsampleMap(0.8, 0.4, 0.7, ndim), make_flow("hidden 4", ndim)]),
            ]
        ),
        "multiscale": lambda: lfq.MultiscaleFlow(n_levels=2, n_blocks=2, ndim=ndim),
    }[kind]()


AFFINE = pytest.mark.parametrize("name", STRUCTURES)
KINDS = pytest.mark.parametrize("kind", ["affine", "interleave", "upsample", "compose", "multiscale"])


# ---- structure ------------------------------------------------------------------------------

LETTERS = np.array([["c", "o"], ["o", "e"]])


@pytest.mark.parametrize("order", ["e|c", "c|e", "o|ce", "c|eo", "e|co", "o|e", "ce|o"])
def test_an_order_says_which_sites_change_and_which_are_seen(order, rng):
    flow = lfq.AffineFlow(sublattices=True, scale="site", rescale=False, order=order)
    letters = np.tile(LETTERS, (3, 2))
    active, frozen = (np.isin(letters, list(part)) for part in order.split("|"))
    z = rng.normal(size=(6, 4))
    x, _ = flow.forward(z)
    np.testing.assert_array_equal(x != z, active)
    # A site that changes depends on itself, and on those around it that are seen.
    for site in np.ndindex(z.shape):
        dx = np.zeros(z.shape)
        dx[site] = 1.0
        near = np.abs(np.array(list(np.ndindex(z.shape))) - site)
        near = (np.minimum(near, [6, 4] - near).max(axis=1) <= 1).reshape(z.shape)
        wanted = active[site] & frozen & near
        wanted[site] = True
        np.testing.assert_array_equal(flow.vjp(z, dx, 0.0) != 0, wanted)


def test_the_checkerboard_is_an_order(rng):
    z = rng.normal(size=(2, 6, 4))
    for own in (False, True):
        plain, ordered = (lfq.AffineFlow(sublattices=own, **extra) for extra in ({}, {"order": " ce|o  o|ce "}))
        np.testing.assert_array_equal(plain.program((6, 4)), ordered.program((6, 4)))
        np.testing.assert_array_equal(plain.forward(z)[0], ordered.forward(z)[0])
        assert plain.to_dict() == ordered.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ""}, "must be a string of couplings"),
        ({"order": None}, "must be a string of couplings"),
        ({"order": "ce|o oce"}, "'oce' is not like"),
        ({"order": "c|c"}, "'c|c' is not like"),
        ({"order": "c|"}, "'c|' is not like"),
        ({"order": "c|x"}, "'c|x' is not like"),
        ({"order": "o|e|c"}, "'o|e|c' is not like"),
        ({"order": "co|e"}, "'co|e' changes odd sites together with even ones"),
        ({"order": "e|c", "ndim": 1}, "'e|c' needs sites that a lattice of 1 dimension"),
        ({"order": "e|c", "sublattices": False}, "'e|c' goes with sublattices=True"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape("order: " + message)):
        lfq.AffineFlow(**{"sublattices": True} | options)


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
def test_number_of_weights(kernel_size):
    k2 = kernel_size**2
    assert lfq.AffineFlow(kernel_size=kernel_size).n_weights == 4 * k2 + 1
    assert lfq.AffineFlow(kernel_size=kernel_size, n_blocks=3).n_weights == 3 * (4 * k2 + 1)
    assert lfq.AffineFlow(kernel_size=kernel_size, rescale=False, bias=True).n_weights == 4 * k2 + 4
    hidden = lfq.AffineFlow(kernel_size=kernel_size, hidden=(8, 5), bias=True)
    assert hidden.n_weights == 2 * (k2 * (8 + 8 * 5 + 5 * 2) + 8 + 5 + 2) + 1
    assert lfq.AffineFlow(kernel_size=kernel_size, ndim=3).n_weights == 4 * kernel_size**3 + 1


def test_the_papers_flow_has_37_weights():
    assert lfq.AffineFlow().n_weights == lfq.AffineFlow().weights.size == 37


def test_initial_weights_follow_the_seed():
    first = lfq.AffineFlow(seed=3).weights
    np.testing.assert_array_equal(lfq.AffineFlow(seed=3).weights, first)
    assert (lfq.AffineFlow(seed=4).weights[:-1] != first[:-1]).all()
    assert first[-1] == 0 and first.dtype == np.float64


def test_zero_weights_are_the_identity(rng):
    flow = lfq.AffineFlow(n_blocks=2)
    flow.weights = np.zeros(flow.n_weights)
    z = rng.normal(size=(3, 6, 8))
    x, log_det = flow.forward(z)
    np.testing.assert_array_equal(x, z)
    np.testing.assert_array_equal(log_det, 0)


def test_interleave_by_slices(rng):
    z = rng.normal(size=(3, 4, 6))
    x, log_det = lfq.InterleaveMap().forward(z)
    copies = z.reshape(3, 4, 2, 3)
    for copy, (a, b) in enumerate(itertools.product((0, 1), repeat=2)):
        np.testing.assert_array_equal(x[:, a::2, b::2], copies[:, copy])
    np.testing.assert_array_equal(log_det, 0)


def test_weights_are_copies():
    flow = make_flow()
    given = np.arange(37.0)
    flow.weights = given
    given[0] = 5
    flow.weights[1] = 7
    np.testing.assert_array_equal(flow.weights, np.arange(37.0))


@KINDS
def test_copies_are_independent(kind):
    flow = make_kind(kind)
    weights, twin = flow.weights, flow.copy()
    assert type(twin) is type(flow) and twin is not flow and twin.to_dict() == flow.to_dict()
    np.testing.assert_array_equal(twin.weights, weights)
    twin.weights = weights + 1
    np.testing.assert_array_equal(flow.weights, weights)
    np.testing.assert_array_equal(twin.weights, weights + 1)


def test_upsample_parameters():
    flow = lfq.UpsampleMap(scale=1.5, width=(0.2, 0.4), interpolation=0.8)
    assert flow.n_weights == 5 and flow.scale == pytest.approx(1.5)
    np.testing.assert_allclose(flow.width, [0.2, 0.4])
    np.testing.assert_allclose(flow.interpolation, 0.8)


def test_compositions_are_applied_in_order(rng):
    first, second = make_flow("paper", seed=1), make_flow("hidden 4", seed=2)
    flow, z = lfq.Compose([first, second]), rng.normal(size=(3, 6, 8))
    y, log_det_1 = first.forward(z)
    x, log_det_2 = second.forward(y)
    found, log_det = flow.forward(z)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-14)
    np.testing.assert_allclose(log_det, log_det_1 + log_det_2, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(flow.weights, np.concatenate([first.weights, second.weights]))


# ---- symmetries -----------------------------------------------------------------------------


def symmetric(flow, z):
    x, log_det = flow.forward(z)
    mirrored, mirrored_log_det = flow.forward(-z)
    same_field = np.abs(mirrored + x).max() < 1e-13
    return same_field, np.abs(mirrored_log_det - log_det).max() < 1e-12


@pytest.mark.parametrize("hidden", [(), (4,), (3, 5)], ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_odd_nets_commute_with_the_sign(hidden, ndim, rng):
    flow = lfq.AffineFlow(hidden=hidden, n_blocks=2, ndim=ndim)
    flow.weights = 0.2 * rng.normal(size=flow.n_weights)
    assert symmetric(flow, rng.normal(size=(3, *(6, 4, 4)[:ndim]))) == (True, True)


@pytest.mark.parametrize(
    "structure",
    [
        dict(bias=True),
        dict(scale="exp(s)"),
        dict(hidden=(4,), activation="leaky_relu"),
        dict(hidden=(4,), bias=True),
    ],
    ids=str,
)
def test_bias_exp_and_leaky_relu_break_the_sign_symmetry(structure, rng):
    flow = lfq.AffineFlow(**structure)
    flow.weights = 0.3 * rng.normal(size=flow.n_weights)
    assert symmetric(flow, rng.normal(size=(3, 6, 4))) == (False, False)


@AFFINE
def test_shifts_that_keep_the_checkerboard(name, rng):
    """Shifts by an even number of steps commute with the flow; a single step swaps the sublattices.

    Where all four have weights of their own, so do the shifts by two steps that leave every one in its place.
    """
    flow, z = make_flow(name), rng.normal(size=(3, 8, 6))
    x, log_det = flow.forward(z)
    for shift in [(2, 0), (0, 2), (1, 1), (3, -1)]:
        if flow.sublattices and shift[0] % 2:
            found, _ = flow.forward(np.roll(z, shift, axis=(1, 2)))
            assert np.abs(found - np.roll(x, shift, axis=(1, 2))).max() > 1e-3
            continue
        found, found_log_det = flow.forward(np.roll(z, shift, axis=(1, 2)))
        np.testing.assert_allclose(found, np.roll(x, shift, axis=(1, 2)), rtol=0, atol=1e-13)
        np.testing.assert_allclose(found_log_det, log_det, rtol=0, atol=1e-11)
    found, _ = flow.forward(np.roll(z, 1, axis=1))
    assert np.abs(found - np.roll(x, 1, axis=1)).max() > 1e-3


@AFFINE
def test_weights_transfer_between_lattices(name, rng):
    """A periodic tiling of the input gives the tiling of the output, and of every derivative."""
    flow, z = make_flow(name), rng.normal(size=(3, 8, 8))
    dx, dlog_det = rng.normal(size=z.shape), rng.normal(size=3)
    tile = (1, 2, 2)
    x, log_det = flow.forward(z)
    found, found_log_det = flow.forward(np.tile(z, tile))
    np.testing.assert_allclose(found, np.tile(x, tile), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found_log_det, 4 * log_det, rtol=1e-12)
    dz = flow.vjp(np.tile(z, tile), np.tile(dx, tile), dlog_det)
    np.testing.assert_allclose(dz, np.tile(flow.vjp(z, dx, dlog_det), tile), rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("shape", [(8,), (8, 12), (4, 8, 4)], ids=str)
def test_inverse_undoes_forward(kind, shape, dtype, rng):
    flow = make_kind(kind, len(shape))
    if kind != "interleave":
        flow.weights = 0.5 * flow.weights
    z = rng.normal(size=(5, *shape)).astype(dtype)
    x, log_det = flow.forward(z)
    back, inverse_log_det = flow.inverse(x)
    assert x.dtype == back.dtype == dtype and log_det.dtype == inverse_log_det.dtype == np.float64
    assert np.abs(x - z).max() > 0.1
    np.testing.assert_allclose(back, z, rtol=0, atol=5000 * np.finfo(dtype).eps)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=2e4 * np.finfo(dtype).eps)


# ---- derivatives ----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shape", [(8,), (4, 8), (4, 4, 4)], ids=str)
def test_vjp_is_the_derivative_of_forward(kind, shape, rng):
    """Central differences of <dx, x> + <dlog_det, log_det> along random directions of z and weights."""
    flow = make_kind(kind, len(shape))
    z, dx, dlog_det = rng.normal(size=(2, *shape)), rng.normal(size=(2, *shape)), rng.normal(size=2)
    weights = flow.weights

    def scalar(z, weights):
        flow.weights = weights
        x, log_det = flow.forward(z)
        return (dx * x).sum() + (dlog_det * log_det).sum()

    dz, dweights = flow.vjp(z, dx, dlog_det, weights=True)
    assert dz.shape == z.shape and dweights.shape == weights.shape
    h = 1e-6
    for _ in range(3):
        v, w = rng.normal(size=z.shape), rng.normal(size=weights.shape)
        along_z = (scalar(z + h * v, weights) - scalar(z - h * v, weights)) / (2 * h)
        assert (dz * v).sum() == pytest.approx(along_z, abs=1e-6 * (1 + abs(along_z)))
        along_w = (scalar(z, weights + h * w) - scalar(z, weights - h * w)) / (2 * h)
        assert (dweights * w).sum() == pytest.approx(along_w, abs=1e-6 * (1 + abs(along_w)))
    flow.weights = weights
    np.testing.assert_array_equal(flow.vjp(z, dx, dlog_det), dz)


@KINDS
@pytest.mark.parametrize("shape", [(8,), (4, 8), (4, 4, 4)], ids=str)
def test_inverse_vjp_is_the_derivative_of_inverse(kind, shape, rng):
    """Central differences along random directions of x and weights."""
    flow = make_kind(kind, len(shape))
    x, cotangent, dlog_det = rng.normal(size=(2, *shape)), rng.normal(size=(2, *shape)), rng.normal(size=2)
    weights = flow.weights

    def scalar(x, weights):
        flow.weights = weights
        z, log_det = flow.inverse(x)
        return (cotangent * z).sum() + (dlog_det * log_det).sum()

    dx, dweights = flow.inverse_vjp(flow.inverse(x)[0], cotangent, dlog_det, weights=True)
    h = 1e-6
    for _ in range(3):
        v, w = rng.normal(size=x.shape), rng.normal(size=weights.shape)
        along_x = (scalar(x + h * v, weights) - scalar(x - h * v, weights)) / (2 * h)
        assert (dx * v).sum() == pytest.approx(along_x, abs=1e-6 * (1 + abs(along_x)))
        along_w = (scalar(x, weights + h * w) - scalar(x, weights - h * w)) / (2 * h)
        assert (dweights * w).sum() == pytest.approx(along_w, abs=1e-6 * (1 + abs(along_w)))
    flow.weights = weights
    np.testing.assert_array_equal(flow.inverse_vjp(flow.inverse(x)[0], cotangent, dlog_det, n_threads=1), dx)


def test_vjp_broadcasts_its_cotangents(rng):
    flow, z = make_flow(), rng.normal(size=(3, 4, 4))
    wanted = flow.vjp(z, np.full(z.shape, 0.5), np.full(3, -1.0))
    np.testing.assert_array_equal(flow.vjp(z, 0.5, -1), wanted)
    many = flow.vjp(z, 0, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(many[2], 3 * flow.vjp(z, 0, 1)[2], rtol=1e-12)


# ---- arrays ---------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 1, 4), (0,)], ids=str)
def test_leading_axes(kind, leading, dtype, rng):
    flow = make_kind(kind)
    z = rng.normal(size=(*leading, 8, 4)).astype(dtype)
    dx, dlog_det = rng.normal(size=z.shape).astype(dtype), rng.normal(size=leading)
    (x, log_det), (back, inverse) = flow.forward(z), flow.inverse(z)
    dz, dweights = flow.vjp(z, dx, dlog_det, weights=True)
    for array in (x, back, dz):
        assert array.shape == z.shape and array.dtype == dtype
    assert log_det.shape == inverse.shape == leading and dweights.shape == (flow.n_weights,)
    if not leading:
        assert np.isfinite(log_det)
    for index in np.ndindex(*leading):
        one, one_log_det = flow.forward(z[index])
        np.testing.assert_array_equal(one, x[index])
        assert one_log_det == log_det[index]
        np.testing.assert_array_equal(flow.inverse(z[index])[0], back[index])
        np.testing.assert_array_equal(flow.vjp(z[index], dx[index], dlog_det[index]), dz[index])


@KINDS
def test_layouts_and_dtypes_of_the_input(kind, rng):
    flow = make_kind(kind)
    whole = rng.integers(-3, 4, size=(3, 8, 16)).astype(np.float64)
    strided = whole[:, :, ::2]
    wanted = flow.forward(strided.copy())
    variants = [
        strided,
        np.asfortranarray(strided),
        np.flip(np.flip(strided, 2).copy(), 2),
        strided.transpose(1, 2, 0).copy().transpose(2, 0, 1),
        strided.astype(np.int64),
        strided.astype(np.int8),
        strided.astype(np.float16),
        strided.astype(">f8"),
        strided.astype(np.longdouble),
        strided.tolist(),
    ]
    for variant in variants:
        x, log_det = flow.forward(variant)
        assert x.dtype == np.float64 and x.flags.c_contiguous
        np.testing.assert_array_equal(x, wanted[0])
        np.testing.assert_array_equal(log_det, wanted[1])
    single = flow.forward(strided.astype(np.float32))[0]
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, wanted[0], rtol=0, atol=2e-5)


@KINDS
def test_inputs_are_never_written_to(kind, dtype, rng):
    """Not even where they are exactly what the kernels take; read-only arrays will do."""
    flow = make_kind(kind)
    z, dx = (rng.normal(size=(5, 4, 8)).astype(dtype) for _ in range(2))
    dlog_det = rng.normal(size=5)
    arrays = (z, dx, dlog_det)
    kept = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    x, _ = flow.forward(z)
    back, _ = flow.inverse(z)
    dz, _ = flow.vjp(z, dx, dlog_det, weights=True)
    for array, before in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, before)
    assert not any(np.shares_memory(out, array) for out in (x, back, dz) for array in arrays)


def test_threads_do_not_change_a_bit(rng, dtype):
    flow = make_flow("hidden 4")
    z, dx = (rng.normal(size=(70, 8, 8)).astype(dtype) for _ in range(2))
    results = [
        (
            *flow.forward(z, n_threads=n),
            *flow.inverse(z, n_threads=n),
            *flow.vjp(z, dx, 1.0, weights=True, n_threads=n),
        )
        for n in (1, 2, 3)
    ]
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, wanted)


# ---- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [*STRUCTURES, "interleave", "upsample", "compose"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_file_round_trip(flow, ndim, tmp_path, rng):
    if "order" in flow and ndim == 1:
        pytest.skip("a chain has no even sites but those of the coarser one")
    flow = make_flow(flow, ndim) if flow in STRUCTURES else make_kind(flow, ndim)
    path = tmp_path / "a flow.safetensors"
    flow.save(path)
    found = lfq.load_flow(path)
    assert type(found) is type(flow) and found.to_dict() == flow.to_dict() and found.ndim == ndim
    np.testing.assert_array_equal(found.weights, flow.weights)
    z = rng.normal(size=(2, *(8, 8, 4)[:ndim]))
    np.testing.assert_array_equal(found.forward(z)[0], flow.forward(z)[0])
    assert lfq.load_flow(str(path)).to_dict() == flow.to_dict()


def test_the_file_holds_weights_and_json(tmp_path):
    flow, path = make_flow("hidden 3-2, leaky, bias"), tmp_path / "flow"
    flow.save(path)
    tensors, metadata = load_tensors(path)
    assert list(tensors) == ["weights"] and tensors["weights"].dtype == np.float64
    np.testing.assert_array_equal(tensors["weights"], flow.weights)
    assert json.loads(metadata["lfq_flow"]) == {
        "kind": "affine", "kernel_size": 3, "n_blocks": 2, "hidden": [3, 2], "activation": "leaky_relu",
        "bias": True, "scale": "exp(s)", "rescale": True, "ndim": 2,
    }  # fmt: skip


def test_saving_replaces_a_file_and_needs_its_directory(tmp_path):
    path = tmp_path / "flow"
    make_flow(seed=1).save(path)
    make_flow(seed=2).save(path)
    np.testing.assert_array_equal(lfq.load_flow(path).weights, make_flow(seed=2).weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["flow"]
    with pytest.raises(OSError):
        make_flow().save(tmp_path / "missing" / "flow")
    with pytest.raises(OSError):
        lfq.load_flow(tmp_path / "missing")


@pytest.mark.parametrize("length", [0, 5, 8, 100, -8, -1])
def test_truncated_files(length, tmp_path):
    path = tmp_path / "flow"
    make_flow().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:length])
    with pytest.raises(FileFormatError, match="flow"):
        lfq.load_flow(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a flow at all",
        bytes(range(256)) * 4,
        b"\x80\x04\x95" + bytes(40),
        b"PK\x03\x04" + bytes(60),
    ],
)
def test_files_that_are_something_else(content, tmp_path):
    path = tmp_path / "thing"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="thing"):
        lfq.load_flow(path)


PAPER = lfq.AffineFlow().to_dict()


def deep(levels):
    structure = PAPER
    for _ in range(levels):
        structure = {"kind": "compose", "flows": [structure]}
    return structure


@pytest.mark.parametrize(
    "structure, n_weights",
    [
        (PAPER, 36),
        (PAPER, 38),
        ({**PAPER, "kind": "spline"}, 37),
        ({key: value for key, value in PAPER.items() if key != "kind"}, 37),
        ({**PAPER, "kernel_size": 4}, 37),
        ({**PAPER, "kernel_size": "3"}, 37),
        ({**PAPER, "ndim": 0}, 37),
        ({**PAPER, "hidden": 3}, 37),
        ({**PAPER, "hidden": [[3]]}, 37),
        ({**PAPER, "activation": "relu"}, 37),
        ({**PAPER, "activation": []}, 37),
        ({**PAPER, "command": "rm"}, 37),
        ({"kind": "interleave", "ndim": 2}, 1),
        ({"kind": "upsample", "ndim": 2}, 4),
        ({"kind": "upsample", "ndim": 2, "width": -1}, 5),
        ({"kind": "compose"}, 37),
        ({"kind": "compose", "flows": []}, 0),
        ({"kind": "compose", "flows": "affine"}, 37),
        ({"kind": "compose", "flows": [3]}, 37),
        ({"kind": "compose", "flows": [PAPER], "more": 1}, 37),
        ({"kind": "compose", "flows": [PAPER, {**PAPER, "ndim": 3}]}, 37 + 109),
        (deep(40), 37),
        ([PAPER], 37),
        ("affine", 37),
        (None, 37),
    ],
)
def test_files_of_flows_that_do_not_exist(structure, n_weights, tmp_path):
    path = tmp_path / "odd"
    save_tensors(path, {"weights": np.zeros(n_weights)}, {"lfq_flow": json.dumps(structure)})
    with pytest.raises(FileFormatError, match="odd"):
        lfq.load_flow(path)


@pytest.mark.parametrize("more", [{"n_blocks": 100, "hidden": [64] * 4, "kernel_size": 9}, {"n_blocks": 10000}])
def test_a_hostile_structure_allocates_nothing(more, tmp_path):
    path = tmp_path / "odd"
    structures = [PAPER | more, {"kind": "compose", "flows": [PAPER | more] * 500}]
    for structure in structures:
        save_tensors(path, {"weights": np.zeros(37)}, {"lfq_flow": json.dumps(structure)})
        tracemalloc.start()
        with pytest.raises(FileFormatError, match="odd"):
            lfq.load_flow(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()


def test_too_many_weights():
    with pytest.raises(ValueError, match="weights, at most"):
        lfq.AffineFlow(9, 100, [64] * 4)


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"weights": np.zeros(37)}, {}),
        ({"weights": np.zeros(37)}, {"flow": json.dumps(PAPER)}),
        ({"weights": np.zeros(37)}, {"lfq_flow": "{"}),
        ({"weights": np.zeros(37)}, {"lfq_flow": "[" * 10000}),
        ({"weights": np.zeros((37, 1))}, {"lfq_flow": json.dumps(PAPER)}),
        ({"weights": np.full(37, np.nan)}, {"lfq_flow": json.dumps(PAPER)}),
        ({"weights": np.zeros(37), "more": np.zeros(1)}, {"lfq_flow": json.dumps(PAPER)}),
        ({"bias": np.zeros(37)}, {"lfq_flow": json.dumps(PAPER)}),
        ({}, {"lfq_flow": json.dumps(PAPER)}),
    ],
)
def test_tensors_that_are_not_a_flow(tensors, metadata, tmp_path):
    path = tmp_path / "odd"
    save_tensors(path, tensors, metadata)
    with pytest.raises(FileFormatError, match="odd"):
        lfq.load_flow(path)


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(kernel_size=4), ValueError, "kernel_size: must be odd"),
        (dict(kernel_size=1), ValueError, "kernel_size"),
        (dict(kernel_size=11), ValueError, "kernel_size"),
        (dict(kernel_size=-3), ValueError, "kernel_size"),
        (dict(kernel_size=3.0), TypeError, "kernel_size"),
        (dict(n_blocks=0), ValueError, "n_blocks"),
        (dict(n_blocks=-1), ValueError, "n_blocks"),
        (dict(hidden=(0,)), ValueError, "hidden"),
        (dict(hidden=(65,)), ValueError, "hidden"),
        (dict(hidden=(2,) * 5), ValueError, "hidden"),
        (dict(hidden=(2.5,)), TypeError, "hidden"),
        (dict(activation="relu"), ValueError, "activation.*leaky_relu"),
        (dict(scale="exp"), ValueError, "scale"),
        (dict(ndim=0), ValueError, "ndim"),
        (dict(ndim=5), ValueError, "ndim"),
        (dict(seed=-1), ValueError, "seed"),
    ],
)
def test_bad_structures(arguments, error, match):
    with pytest.raises(error, match=match):
        lfq.AffineFlow(**arguments)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: lfq.InterleaveMap(0), ValueError, "ndim"),
        (lambda: lfq.UpsampleMap(scale=0), ValueError, "scale"),
        (lambda: lfq.UpsampleMap(scale=math.nan), ValueError, "scale"),
        (lambda: lfq.UpsampleMap(width=0), ValueError, "width"),
        (lambda: lfq.UpsampleMap(width=(0.1, -0.1)), ValueError, "width"),
        (lambda: lfq.UpsampleMap(interpolation=math.inf), ValueError, "interpolation"),
        (lambda: lfq.Compose([]), ValueError, "flows"),
        (lambda: lfq.Compose([lfq.AffineFlow(), 3]), TypeError, "flows"),
        (lambda: lfq.Compose([lfq.AffineFlow(), lfq.AffineFlow(ndim=3)]), ValueError, "flows.*ndim"),
    ],
)
def test_bad_maps_and_compositions(call, error, match):
    with pytest.raises(error, match=match):
        call()


@KINDS
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_bad_fields(kind, method):
    flow, name = make_kind(kind), {"forward": "z", "inverse": "x"}[method]
    call = getattr(flow, method)
    with pytest.raises(ValueError, match=f"{name}: shape .* fewer than the 2 axes"):
        call(np.zeros(8))
    with pytest.raises(ValueError, match="odd"):
        call(np.zeros((8, 5)))
    with pytest.raises(ValueError, match="odd"):
        call(np.zeros((2, 7, 8)))
    for dtype in (complex, bool, object, "U1"):
        with pytest.raises(TypeError, match=f"{name}: "):
            call(np.zeros((8, 8), dtype))
    for value in (np.nan, np.inf, -np.inf):
        field = np.zeros((5, 8, 8))
        field[3, 2, 7] = value
        with pytest.raises(lfq.NotFiniteError, match=f"{name}: chain 3 .*site 23"):
            call(field)
    with pytest.raises(ValueError, match="n_threads"):
        call(np.zeros((8, 8)), n_threads=-1)


def test_a_coarse_lattice_inside_a_composition_must_be_even_too():
    """12 halves to 6 and 6 to 3: the inner checkerboard has no form there."""
    flow = lfq.Compose([make_flow(), lfq.UpsampleMap(), make_flow()])
    flow.forward(np.zeros((12, 12)))
    with pytest.raises(ValueError, match="odd"):
        flow.forward(np.zeros((12, 6)))


def test_bad_cotangents(rng):
    flow, z = make_flow(), rng.normal(size=(3, 4, 4))
    bad = z.copy()
    bad[1, 0, 2] = np.nan
    with pytest.raises(lfq.NotFiniteError, match="z or dx: chain 1 .*site 2"):
        flow.vjp(bad, z, 0)
    with pytest.raises(lfq.NotFiniteError, match="z or dx: chain 1 .*site 2"):
        flow.vjp(z, bad, 0)
    with pytest.raises(lfq.NotFiniteError, match="dlog_det"):
        flow.vjp(z, z, np.nan)
    for dx, dlog_det in [(np.zeros((2, 4, 4)), 0), (0, np.zeros(2)), (np.zeros((4, 3)), 0)]:
        with pytest.raises(ValueError):
            flow.vjp(z, dx, dlog_det)


@KINDS
def test_bad_weights(kind):
    flow = make_kind(kind)
    weights = flow.weights
    for shape in [(flow.n_weights + 1,), (1, flow.n_weights), ()]:
        with pytest.raises(ValueError, match="weights: shape"):
            flow.weights = np.zeros(shape)
    for value in (np.nan, np.inf):
        if flow.n_weights:
            bad = weights.copy()
            bad[-2:] = value
            with pytest.raises(lfq.NotFiniteError, match=f"weights: entry {flow.n_weights - 2} "):
                flow.weights = bad
    np.testing.assert_array_equal(flow.weights, weights)


class OnGpu:
    """What CuPy arrays look like from outside."""

    shape, ndim, dtype = (2, 4, 4), 3, np.dtype(np.float64)
    __cuda_array_interface__ = {"shape": shape, "typestr": "<f8", "data": (0, False), "version": 3}


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda flow: flow.forward(OnGpu()), "z"),
        (lambda flow: flow.inverse(OnGpu()), "x"),
        (lambda flow: flow.vjp(OnGpu(), 0, 0), "z"),
        (lambda flow: lfq.Phi4((4, 4), 0.5, 0.5).pullback(flow).action(OnGpu()), "z"),
        (lambda flow: lfq.Phi4((4, 4), 0.5, 0.5).pullback(flow).latent(OnGpu()), "x"),
        (lambda flow: lfq.HMC(lfq.Phi4((4, 4), 0.5, 0.5).pullback(flow)).start(2, 0, phi=OnGpu()), "phi"),
        (lambda flow: lfq.HMC(lfq.Phi4((4, 4), 0.5, 0.5).pullback(flow)).evolve(OnGpu(), 0), "latent"),
        (lambda flow: lfq.Upsample(lfq.Phi4((2, 2), 0.5, 0.5)).log_prob(OnGpu()), "z"),
    ],
)
def test_gpu_arrays_are_refused_in_one_sentence(call, name, monkeypatch):
    monkeypatch.setattr(_gpu, "missing", lambda: "no GPU is visible")
    reason = "(no GPU is visible|this runs on the CPU only)"
    with pytest.raises(TypeError, match=f"^{name}: a GPU array was given, but {reason}$"):
        call(lfq.AffineFlow())
