"""Affine couplings with hidden layers as a user would write them in PyTorch: conv2d, autograd.

The weight layout is that of `lfq.AffineFlow` without rescale: couplings of alternating parity, each with
W[out][in][k][k] and bias[out] for every layer of its net.
"""

import numpy as np
import torch
from torch.nn import functional


class Flow:
    def __init__(self, weights, n_couplings=16, channels=(1, 8, 8, 2), kernel=3, extent=16, dtype="float64"):
        real = getattr(torch, dtype)
        self.pad, self.parameters, at = kernel // 2, [], 0
        for _ in range(n_couplings):
            net = []
            for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
                for shape in ((c_out, c_in, kernel, kernel), (c_out,)):
                    size = int(np.prod(shape))
                    part = torch.tensor(weights[at : at + size].reshape(shape), dtype=real)
                    net.append(part.requires_grad_())
                    at += size
            self.parameters.append(net)
        if at != len(weights):
            raise ValueError(f"weights: {len(weights)} given, the flow has {at}")
        sites = np.indices((extent, extent)).sum(axis=0) % 2
        self.active = [torch.tensor((sites == parity).astype(dtype)) for parity in (0, 1)]

    def forward(self, z):
        """x and log_det of latents (n, L, L)."""
        z, log_det, pad = z[:, None], 0.0, (self.pad,) * 4
        for i, net in enumerate(self.parameters):
            active = self.active[i % 2]
            h = z * (1 - active)
            for layer in range(0, len(net), 2):
                h = functional.conv2d(functional.pad(h, pad, mode="circular"), net[layer], net[layer + 1])
                h = torch.tanh(h) if layer + 2 == len(net) else functional.leaky_relu(h, 0.01)
            s, t = h[:, :1] * active, h[:, 1:] * active
            z = z * torch.exp(s) + t
            log_det = log_det + s.sum(dim=(1, 2, 3))
        return z[:, 0], log_det

    def loss_gradient(self, z, beta, lam):
        """Mean of S(f(z)) - log_det, and its gradient as the list of parameters' gradients."""
        x, log_det = self.forward(z)
        x2 = x * x
        around = torch.roll(x, -1, 1) + torch.roll(x, -1, 2)
        action = (x2 * (1 - 2 * lam + lam * x2) - beta * x * around).sum(dim=(1, 2))
        loss = (action - log_det).mean()
        return loss, torch.autograd.grad(loss, [p for net in self.parameters for p in net])
