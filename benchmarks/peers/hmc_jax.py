"""HMC of phi^4 in two dimensions as a careful user would write it in JAX.

One compiled program for many trajectories, on (group, L, L) arrays: the chains are worked through in groups
(`lax.map`) of the size that was fastest. Momenta are `jax.random.normal` of the default generator: on a CPU
faster than XLA's own bits ("rbg") and than Box-Muller on either.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def action(phi, beta, lam):
    """S of fields (..., L, L)."""
    forward = jnp.roll(phi, -1, -1) + jnp.roll(phi, -1, -2)
    x2 = phi * phi
    return jnp.sum(x2 * (1 - 2 * lam + lam * x2) - beta * phi * forward, axis=(-1, -2))


def force(phi, beta, lam):
    around = (jnp.roll(phi, -1, -1) + jnp.roll(phi, 1, -1)) + (jnp.roll(phi, -1, -2) + jnp.roll(phi, 1, -2))
    return beta * around - 2 * phi * (1 - 2 * lam + 2 * lam * (phi * phi))


def leapfrog_of(force, phi, p, eps, n_steps):
    """n_steps steps with neighbouring half-kicks merged."""

    def step(_, state):
        phi, p = state
        phi = phi + eps * p
        return phi, p + eps * force(phi)

    p = p + (eps / 2) * force(phi)
    phi, p = lax.fori_loop(0, n_steps - 1, step, (phi, p))
    phi = phi + eps * p
    return phi, p + (eps / 2) * force(phi)


def groups(function, group, *arrays):
    """`function` of `group` chains at a time."""
    n = arrays[0].shape[0]
    if group >= n:
        return function(*arrays)
    parts = [a.reshape(n // group, group, *a.shape[1:]) for a in arrays]
    out = lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), out)


def hmc_of(action, force, phi, seed, eps, n_steps, n_trajectories, group):
    """Full trajectories of all chains: fields, and how many of each chain's were accepted."""

    def work(phi, number):
        key = jax.random.fold_in(jax.random.key(seed), number[0])

        def trajectory(i, state):
            phi, s_old, accepted = state
            momenta, uniform = jax.random.split(jax.random.fold_in(key, i))
            p = jax.random.normal(momenta, phi.shape, phi.dtype)
            new, q = leapfrog_of(force, phi, p, eps, n_steps)
            s_new = action(new)
            dh = s_new - s_old + jnp.sum(q * q, (1, 2)) / 2 - jnp.sum(p * p, (1, 2)) / 2
            accept = jax.random.uniform(uniform, dh.shape, phi.dtype) < jnp.exp(-dh)
            phi = jnp.where(accept[:, None, None], new, phi)
            return phi, jnp.where(accept, s_new, s_old), accepted + accept

        start = phi, action(phi), jnp.zeros(len(phi), int)
        phi, _, accepted = lax.fori_loop(0, n_trajectories, trajectory, start)
        return phi, accepted

    return groups(work, group, phi, jnp.arange(len(phi)))


@partial(jax.jit, static_argnames=("n_steps", "group"))
def evolve(phi, p, beta, lam, eps, n_steps, group):
    """Trajectories without randomness."""
    return groups(lambda x, q: leapfrog_of(lambda x: force(x, beta, lam), x, q, eps, n_steps), group, phi, p)


@partial(jax.jit, static_argnames=("n_steps", "n_trajectories", "group"))
def hmc(phi, seed, beta, lam, eps, n_steps, n_trajectories, group):
    return hmc_of(
        lambda x: action(x, beta, lam), lambda x: force(x, beta, lam), phi, seed, eps, n_steps, n_trajectories, group
    )
