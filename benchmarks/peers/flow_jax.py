"""The paper's network (kernel 3, no hidden layers, no bias) as a careful user would write it in JAX.

On a checkerboard the 3 x 3 kernel meets frozen sites only at the four nearest neighbours, so a coupling is
four rolls; `form="conv"` is the plain circular convolution of the masked field, which is slower. Weights are
the vector of `lfq.AffineFlow`: for each block W[2][1][3][3] of parity 0, of parity 1, and a.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hmc_jax import action, groups, hmc_of, leapfrog_of
from jax import lax

# The fastest of the forms of a coupling; of the loss also of the groups, for each L.
FORM = {"sample": "conv", "step": "conv"}
LOSS = {
    (64, "float64"): ("conv", 8), (64, "float32"): ("roll", 4),
    (8, "float64"): ("roll", 128), (8, "float32"): ("roll", 256),
}  # fmt: skip


def _coupling(z, w, parity, form):
    """One half-update of fields (..., L, L): y = x exp(-|s|) + t on the active sites."""
    active = jnp.asarray(np.indices(z.shape[-2:]).sum(0) % 2 == parity)
    if form == "conv":
        frozen = jnp.where(active, 0, z).reshape(-1, 1, *z.shape[-2:])
        frozen = jnp.pad(frozen, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
        net = lax.conv_general_dilated(frozen, w, (1, 1), "VALID").reshape(*z.shape[:-2], 2, *z.shape[-2:])
        s, t = jnp.tanh(net[..., 0, :, :]), jnp.tanh(net[..., 1, :, :])
    else:
        if form == "barrier":
            z = lax.optimization_barrier(z)
        around = (jnp.roll(z, 1, -2), jnp.roll(z, 1, -1), jnp.roll(z, -1, -1), jnp.roll(z, -1, -2))
        taps = w.reshape(2, 9)[:, 1::2]  # up, left, right, down
        s = jnp.tanh(sum(taps[0, i] * x for i, x in enumerate(around)))
        t = jnp.tanh(sum(taps[1, i] * x for i, x in enumerate(around)))
    q = jnp.where(active, -jnp.abs(s), 0)
    return jnp.where(active, z * jnp.exp(q) + t, z), q.sum((-1, -2))


def forward(z, weights, form="roll"):
    """x and log|det df/dz| of latents (..., L, L)."""
    log_det = jnp.zeros(z.shape[:-2], z.dtype)
    for block in weights.reshape(-1, 37):
        for parity in (0, 1):
            z, term = _coupling(z, block[18 * parity : 18 * parity + 18].reshape(2, 1, 3, 3), parity, form)
            log_det += term
        z, log_det = jnp.exp(block[36]) * z, log_det + z.shape[-1] * z.shape[-2] * block[36]
    return z, log_det


def pulled_back(z, weights, beta, lam, form="roll"):
    """S~(z) = S(f(z)) - log|det df/dz|."""
    x, log_det = forward(z, weights, form)
    return action(x, beta, lam) - log_det


def _force(weights, beta, lam, form):
    return jax.grad(lambda z: -jnp.sum(pulled_back(z, weights, beta, lam, form)))


@partial(jax.jit, static_argnames=("form", "group"))
def sample(z, weights, form, group):
    """Flow sampling: x and log_det."""
    return groups(lambda z: forward(z, weights, form), group, z)


@partial(jax.jit, static_argnames=("form", "group"))
def loss_gradient(z, weights, beta, lam, form, group):
    """Mean of S~ and its gradient; accumulated over groups of the batch, so that a group stays in cache."""

    def loss(weights, z):
        return jnp.sum(pulled_back(z, weights, beta, lam, form))

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(weights, part)), None

    parts = z.reshape(-1, min(group, len(z)), *z.shape[1:])
    total, _ = lax.scan(add, (jnp.zeros((), z.dtype), jnp.zeros_like(weights)), parts)
    return jax.tree.map(lambda v: v / len(z), total)


@partial(jax.jit, static_argnames=("n_steps", "form", "group"))
def evolve(z, p, weights, beta, lam, eps, n_steps, form, group):
    """Leapfrog steps of flow-HMC, forces by jax.grad of S~."""
    force = _force(weights, beta, lam, form)
    return groups(lambda z, p: leapfrog_of(force, z, p, eps, n_steps), group, z, p)


@partial(jax.jit, static_argnames=("n_steps", "n_trajectories", "form", "group"))
def hmc(z, seed, weights, beta, lam, eps, n_steps, n_trajectories, form, group):
    """Full flow-HMC trajectories."""
    return hmc_of(
        lambda z: pulled_back(z, weights, beta, lam, form), _force(weights, beta, lam, form),
        z, seed, eps, n_steps, n_trajectories, group,
    )  # fmt: skip
