"""lfq's kernels as PyTorch operators with autograd, on the CPU: `torch.ops.lfq.*`.

`import lfq.torch` needs PyTorch. Fields are float32 or float64 tensors (..., *lattice); weights, actions and
log-determinants are float64. Derivatives are of first order and in reverse mode. NaN or Inf in a field is an error.
"""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import torch
from torch import Tensor

from . import _core
from .actions import Phi4
from .flows import Flow, _from_dict

__all__ = ["FlowModule", "action", "force", "forward", "inverse"]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@functools.lru_cache(maxsize=256)
def _layers(structure: str, shape: tuple[int, ...]) -> np.ndarray:
    return _from_dict(json.loads(structure)).program(shape)


def _leading(tensor: Tensor, ndim: int):
    return tensor.shape[: tensor.dim() - ndim]


# ---- the action -------------------------------------------------------------------------------


@torch.library.custom_op("lfq::action", mutates_args=(), device_types="cpu")
def _action(phi: Tensor, shape: list[int], beta: float, lam: float) -> Tensor:
    out = torch.empty(_leading(phi, len(shape)), dtype=torch.float64)
    _core.phi4_action(Phi4(tuple(shape), beta, lam)._record(), _array(phi), out.numpy(), 0)
    return out


@torch.library.custom_op("lfq::force", mutates_args=(), device_types="cpu")
def _force(phi: Tensor, shape: list[int], beta: float, lam: float) -> Tensor:
    out = torch.empty(phi.shape, dtype=phi.dtype)
    _core.phi4_force(Phi4(tuple(shape), beta, lam)._record(), _array(phi), out.numpy(), 0)
    return out


@_action.register_fake
def _(phi, shape, beta, lam):
    return phi.new_empty(_leading(phi, len(shape)), dtype=torch.float64)


@_force.register_fake
def _(phi, shape, beta, lam):
    return torch.empty(phi.shape, dtype=phi.dtype, device=phi.device)


def _action_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.theory = inputs[1:]


def _action_backward(ctx, cotangent):
    (phi,) = ctx.saved_tensors
    scale = cotangent.reshape(*cotangent.shape, *[1] * len(ctx.theory[0])).to(phi.dtype)
    return -scale * _force(phi, *ctx.theory), None, None, None


_action.register_autograd(_action_backward, setup_context=_action_context)


# ---- flows ------------------------------------------------------------------------------------


def _define(name: str, map_kernel, vjp_kernel):
    """Operators lfq::flow_<name> and lfq::flow_<name>_vjp; either is differentiated at the latent."""

    @torch.library.custom_op(f"lfq::flow_{name}", mutates_args=(), device_types="cpu")
    def flow_map(field: Tensor, weights: Tensor, structure: str, ndim: int) -> tuple[Tensor, Tensor]:
        shape = tuple(field.shape[field.dim() - ndim :])
        image = torch.empty(field.shape, dtype=field.dtype)
        log_det = torch.empty(_leading(field, ndim), dtype=torch.float64)
        map_kernel(
            math.prod(shape), _layers(structure, shape), _array(weights), _array(field), image.numpy(),
            log_det.numpy(), 0,
        )  # fmt: skip
        return image, log_det

    @flow_map.register_fake
    def _(field, weights, structure, ndim):
        image = torch.empty(field.shape, dtype=field.dtype, device=field.device)
        return image, field.new_empty(_leading(field, ndim), dtype=torch.float64)

    @torch.library.custom_op(f"lfq::flow_{name}_vjp", mutates_args=(), device_types="cpu")
    def flow_vjp(
        z: Tensor, weights: Tensor, cotangent: Tensor, dlog_det: Tensor, structure: str, ndim: int
    ) -> tuple[Tensor, Tensor]:
        shape = tuple(z.shape[z.dim() - ndim :])
        pulled, dweights = torch.empty(z.shape, dtype=z.dtype), torch.empty(weights.shape, dtype=torch.float64)
        vjp_kernel(
            math.prod(shape), _layers(structure, shape), _array(weights), _array(z), _array(cotangent),
            _array(dlog_det), pulled.numpy(), dweights.numpy(), 0,
        )  # fmt: skip
        return pulled, dweights

    @flow_vjp.register_fake
    def _(z, weights, cotangent, dlog_det, structure, ndim):
        pulled = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        return pulled, torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)

    def setup_context(ctx, inputs, output):
        field, weights, ctx.structure, ctx.ndim = inputs
        ctx.save_for_backward(field if name == "forward" else output[0], weights)

    def backward(ctx, cotangent, dlog_det):
        return *flow_vjp(*ctx.saved_tensors, cotangent, dlog_det, ctx.structure, ctx.ndim), None, None

    flow_map.register_autograd(backward, setup_context=setup_context)
    return flow_map


_forward = _define("forward", _core.flow_forward, _core.flow_vjp)
_inverse = _define("inverse", _core.flow_inverse, _core.flow_inverse_vjp)


# ---- what users call --------------------------------------------------------------------------


def _checked(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: must be float32 or float64, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name}: must be on the CPU, got {tensor.device}")
    if tuple(tensor.shape[max(tensor.dim() - len(shape), 0) :]) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not end in the lattice {shape}")
    return tensor


def action(theory: Phi4, phi: Tensor) -> Tensor:
    """S of fields phi (..., *theory.shape), float64 of shape (...); its gradient is -force."""
    return _action(_checked(phi, theory.shape, "phi"), list(theory.shape), theory.beta, theory.lam)


def force(theory: Phi4, phi: Tensor) -> Tensor:
    """-dS/dphi, like phi; not differentiable itself."""
    return _force(_checked(phi, theory.shape, "phi").detach(), list(theory.shape), theory.beta, theory.lam)


def _apply(operator, flow: Flow, field: Tensor, weights: Tensor | None, name: str):
    if _checked(field, (), name).dim() < flow.ndim:
        raise ValueError(f"{name}: shape {tuple(field.shape)} has fewer than the {flow.ndim} axes of the lattice")
    flow.program(tuple(field.shape[field.dim() - flow.ndim :]))
    weights = torch.from_numpy(flow.weights) if weights is None else weights
    if weights.dtype != torch.float64 or weights.shape != (flow.n_weights,):
        raise ValueError(
            f"weights: must be float64 of shape ({flow.n_weights},), got {weights.dtype} of {tuple(weights.shape)}"
        )
    return operator(field, weights, json.dumps(flow.to_dict()), flow.ndim)


def forward(flow: Flow, z: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x = f(z) and log|det df/dz|, differentiable in z and weights.

    Parameters
    ----------
    flow : Flow
        Its structure, and its weights unless others are given.
    z : Tensor, shape (..., *lattice)
    weights : Tensor of float64, shape (n_weights,), optional

    Returns
    -------
    x : Tensor, shape and dtype of z
    log_det : Tensor of float64, shape (...)
    """
    return _apply(_forward, flow, z, weights, "z")


def inverse(flow: Flow, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z = f^-1(x) and log|det dz/dx|; otherwise as `forward`."""
    return _apply(_inverse, flow, x, weights, "x")


class FlowModule(torch.nn.Module):
    """A flow whose weights are a parameter.

    Parameters
    ----------
    flow : Flow
        Not changed; `flow` on this module is a copy with the current weights.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self._flow = flow.copy()
        self.weights = torch.nn.Parameter(torch.from_numpy(flow.weights))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return forward(self._flow, z, self.weights)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return inverse(self._flow, x, self.weights)

    @property
    def flow(self) -> Flow:
        flow = self._flow.copy()
        flow.weights = self.weights.detach().numpy()
        return flow
