"""PyTorch operators: the same numbers as lfq, and gradients that PyTorch's own checks accept."""

import numpy as np
import pytest

import lfq

torch = pytest.importorskip("torch")
lfq_torch = pytest.importorskip("lfq.torch")

THEORY = lfq.Phi4((4, 4), 0.5, 0.3)
FLOWS = {
    "paper": lfq.AffineFlow(seed=1),
    "deep": lfq.AffineFlow(n_blocks=2, hidden=(3,), bias=True, scale="exp(s)", seed=2),
    "ladder": lfq.Compose([lfq.UpsampleMap(1.2, (0.3, 0.5), 0.8), lfq.AffineFlow(seed=3)]),
    "multiscale": lfq.MultiscaleFlow(2, n_blocks=1, seed=4),
}


@pytest.fixture
def phi():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 4))).requires_grad_()


def test_action_and_force_are_those_of_lfq(phi):
    action = lfq_torch.action(THEORY, phi)
    np.testing.assert_array_equal(action.detach(), THEORY.action(phi.detach().numpy()))
    (gradient,) = torch.autograd.grad(action.sum(), phi)
    np.testing.assert_array_equal(gradient, -THEORY.force(phi.detach().numpy()))
    np.testing.assert_array_equal(lfq_torch.force(THEORY, phi), -gradient)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_those_of_lfq(phi, name):
    flow = FLOWS[name]
    for torch_map, numpy_map in ((lfq_torch.forward, flow.forward), (lfq_torch.inverse, flow.inverse)):
        for found, wanted in zip(torch_map(flow, phi), numpy_map(phi.detach().numpy()), strict=True):
            np.testing.assert_array_equal(found.detach(), wanted)


def test_gradients_of_the_action(phi):
    assert torch.autograd.gradcheck(lambda p: lfq_torch.action(THEORY, p), phi)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_flows(phi, name, direction):
    flow = FLOWS[name]
    weights = torch.from_numpy(flow.weights).requires_grad_()
    apply = getattr(lfq_torch, direction)
    # along random directions where the weights are many
    assert torch.autograd.gradcheck(lambda p, w: apply(flow, p, w), (phi, weights), fast_mode=name != "paper")


def test_operators_are_well_formed(phi):
    import json

    flow = FLOWS["paper"]
    weights, structure = torch.from_numpy(flow.weights).requires_grad_(), json.dumps(flow.to_dict())
    ops, kept = torch.ops.lfq, phi.detach()
    for operator, arguments in [
        (ops.action.default, (phi, [4, 4], 0.5, 0.3)),
        (ops.force.default, (kept, [4, 4], 0.5, 0.3)),
        (ops.flow_forward.default, (phi, weights, structure, 2)),
        (ops.flow_inverse.default, (phi, weights, structure, 2)),
        (ops.flow_forward_vjp.default, (kept, weights.detach(), kept, kept[:, 0, 0].clone(), structure, 2)),
        (ops.flow_inverse_vjp.default, (kept, weights.detach(), kept, kept[:, 0, 0].clone(), structure, 2)),
    ]:
        torch.library.opcheck(operator, arguments)


def test_a_module_trains():
    """Reverse Kullback-Leibler steps lower the loss, and the trained flow is lfq's."""
    module = lfq_torch.FlowModule(FLOWS["paper"])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 4, 4)))
    losses = []
    for _ in range(30):
        x, log_det = module(z)
        loss = (lfq_torch.action(THEORY, x) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    x, log_det = module.flow.forward(z.numpy())
    assert (THEORY.action(x) - log_det).mean() < losses[-2]
    assert not np.array_equal(module.flow.weights, FLOWS["paper"].weights)


def test_views_and_single_precision(phi):
    wide = torch.zeros(3, 8, 8, dtype=torch.float64)
    wide[:, ::2, ::2] = phi.detach()
    view = wide[:, ::2, ::2]
    assert not view.is_contiguous()
    np.testing.assert_array_equal(lfq_torch.action(THEORY, view), lfq_torch.action(THEORY, phi).detach())
    single = phi.detach().float().requires_grad_()
    action = lfq_torch.action(THEORY, single)
    action.sum().backward()
    assert action.dtype == torch.float64 and single.grad.dtype == torch.float32
    np.testing.assert_array_equal(single.grad, -THEORY.force(single.detach().numpy()))


def test_bad_tensors_are_named(phi):
    for wrong, error, match in [
        (phi[:, :3], ValueError, "phi: .*lattice"),
        (phi.int(), TypeError, "phi: .*int32"),
        (np.zeros((4, 4)), TypeError, "phi: .*tensor"),
        (phi.detach() * float("nan"), lfq.NotFiniteError, "phi"),
    ]:
        with pytest.raises(error, match=match):
            lfq_torch.action(THEORY, wrong)
    with pytest.raises(ValueError, match="weights"):
        lfq_torch.forward(FLOWS["paper"], phi, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="odd"):
        lfq_torch.forward(FLOWS["paper"], phi[:, :3])
