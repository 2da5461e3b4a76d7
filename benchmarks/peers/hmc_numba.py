"""HMC of phi^4 in two dimensions as a careful user would write it in Numba: a few chains at a time, in cache.

Fields are (groups, L, L, chains of a group): the chains of a group lie next to each other, so that rows are
long and their ends cheap on small lattices too. Kick and drift are one pass over the rows: row i is kicked,
then row i - 1, whose old values nobody needs any more, drifts. Indices are unsigned, so that Numba adds no
wrap-around and LLVM vectorises, and rows are offsets, not slices, which cost more than a row of 64 sites.
Sums are kept per column (a vector) instead of in one number, which vectorises without fast-math. Momenta
come from a vectorised Box-Muller (`normals`): NumPy's Generator needs longer for them than the ten steps.
"""

import math

import numba
import numpy as np

njit = numba.njit(error_model="numpy")


@njit
def _word(key, i):
    """Splitmix64: the i-th 64-bit word of the stream `key`."""
    x = key + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Taylor series of sin(pi/2 x) and cos(pi/2 x) for |x| <= 1/2, and of log((1 + y)/(1 - y)) / y in y^2, |y| <= 0.172.
_SIN64 = tuple((-1) ** k * (math.pi / 2) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(8))
_COS64 = tuple((-1) ** k * (math.pi / 2) ** (2 * k) / math.factorial(2 * k) for k in range(9))
_LOG64 = tuple(2 / (2 * k + 1) for k in range(10))
_SIN32 = tuple(np.float32(c) for c in _SIN64[:5])
_COS32 = tuple(np.float32(c) for c in _COS64[:5])
_LOG32 = tuple(np.float32(c) for c in _LOG64[:5])
_BLOCK = 256


def _make_normals(real):
    double = real is np.float64
    integer = np.int64 if double else np.int32
    bits = 52 if double else 23
    bias = 1023 if double else 127
    low = integer((1 << bits) - 1)
    half = integer((bias - 1) << bits)
    sqrt_half = real(math.sqrt(0.5))
    zero, one, two, ln2 = real(0), real(1), real(2), real(math.log(2))
    point_five, minus_two = real(0.5), real(-2)
    u_unit, u_shift = (real(2.0**-40), np.uint64(24)) if double else (real(2.0**-32), np.uint64(32))
    angle_unit = real(2.0**-22)
    if double:
        s0, s1, s2, s3, s4, s5, s6, s7 = _SIN64
        c0, c1, c2, c3, c4, c5, c6, c7, c8 = _COS64
        l0, l1, l2, l3, l4, l5, l6, l7, l8, l9 = _LOG64

        @njit
        def sine(x, y):
            return x * (s0 + y * (s1 + y * (s2 + y * (s3 + y * (s4 + y * (s5 + y * (s6 + y * s7)))))))

        @njit
        def cosine(y):
            return c0 + y * (c1 + y * (c2 + y * (c3 + y * (c4 + y * (c5 + y * (c6 + y * (c7 + y * c8)))))))

        @njit
        def logarithm(f, y):
            t = l5 + y * (l6 + y * (l7 + y * (l8 + y * l9)))
            return f * (l0 + y * (l1 + y * (l2 + y * (l3 + y * (l4 + y * t)))))
    else:
        s0, s1, s2, s3, s4 = _SIN32
        c0, c1, c2, c3, c4 = _COS32
        l0, l1, l2, l3, l4 = _LOG32

        @njit
        def sine(x, y):
            return x * (s0 + y * (s1 + y * (s2 + y * (s3 + y * s4))))

        @njit
        def cosine(y):
            return c0 + y * (c1 + y * (c2 + y * (c3 + y * c4)))

        @njit
        def logarithm(f, y):
            return f * (l0 + y * (l1 + y * (l2 + y * (l3 + y * l4))))

    @njit
    def normals(key, out):
        """Fill the vector `out` (of even length) with unit normals."""
        word = np.empty(_BLOCK, np.uint64)
        u = np.empty(_BLOCK, real)
        u_bits = u.view(integer)
        exponent = np.empty(_BLOCK, real)
        n_pairs = out.size // 2
        for begin in range(0, n_pairs, _BLOCK):
            n = min(_BLOCK, n_pairs - begin)
            first, second = out[begin : begin + n], out[n_pairs + begin : n_pairs + begin + n]
            for i in range(n):
                word[i] = _word(key, begin + i)
            for i in range(n):
                u[i] = (real(np.int64(word[i] >> u_shift)) + point_five) * u_unit
            for i in range(n):  # u = m 2^e with m in [1/2, 1)
                b = u_bits[i]
                exponent[i] = real((b >> bits) - (bias - 1))
                u_bits[i] = (b & low) | half
            for i in range(n):
                m, e = u[i], exponent[i]
                small = m < sqrt_half
                m, e = (m * two if small else m), (e - one if small else e)
                f = (m - one) / (m + one)
                radius = np.sqrt(max(minus_two * (e * ln2 + logarithm(f, f * f)), zero))
                turn = np.int32(word[i] & np.uint64(0xFFFFFF))  # quarter turns: the top 2 of 24 bits
                quarter = (turn + np.int32(1 << 21)) >> np.int32(22)
                x = real(np.int32(turn - (quarter << np.int32(22)))) * angle_unit
                y = x * x
                a, b2 = sine(x, y), cosine(y)
                swap = (quarter & 1) != 0
                c, s = (a if swap else b2), (b2 if swap else a)
                c = -c if ((quarter + 1) & 2) != 0 else c
                s = -s if (quarter & 2) != 0 else s
                first[i] = radius * c
                second[i] = radius * s

    return normals


normals_f64, normals_f32 = _make_normals(np.float64), _make_normals(np.float32)


def _make(real, normals):
    @njit
    def kick_sites(p, x, here, left, right, up, down, count, beta, a, b):
        for j in range(count):
            v = x[here + j]
            p[here + j] += beta * ((x[up + j] + x[down + j]) + (x[left + j] + x[right + j])) - v * (a + b * (v * v))

    @njit
    def kick_row(x, p, up, here, down, n, c, beta, a, b):
        m = n - c
        kick_sites(p, x, here, here + m, here + c, up, down, c, beta, a, b)
        kick_sites(p, x, here + c, here, here + c + c, up + c, down + c, m - c, beta, a, b)
        kick_sites(p, x, here + m, here + m - c, here, up + m, down + m, c, beta, a, b)

    @njit
    def drift_row(x, p, here, n, eps):
        for j in range(n):
            x[here + j] += eps * p[here + j]

    @njit
    def kick(phi, p, n, c, beta, lam, eps):
        k0, k1, k2 = real(eps * beta), real(eps * 2 * (1 - 2 * lam)), real(eps * 4 * lam)
        n, c, size = np.uint64(n), np.uint64(c), np.uint64(phi.size)
        for here in range(np.uint64(0), size, n):
            up, down = (here if here else size) - n, here + n if here + n < size else np.uint64(0)
            kick_row(phi, p, up, here, down, n, c, k0, k1, k2)

    @njit
    def kick_drift(phi, p, n, c, beta, lam, eps_kick, eps_drift):
        k0, k1, k2 = real(eps_kick * beta), real(eps_kick * 2 * (1 - 2 * lam)), real(eps_kick * 4 * lam)
        eps = real(eps_drift)
        n, c, size, zero = np.uint64(n), np.uint64(c), np.uint64(phi.size), np.uint64(0)
        kick_row(phi, p, size - n, zero, n, n, c, k0, k1, k2)
        for here in range(n, size, n):
            kick_row(phi, p, here - n, here, here + n if here + n < size else zero, n, c, k0, k1, k2)
            if here > n:
                drift_row(phi, p, here - n, n, eps)
        drift_row(phi, p, size - n, n, eps)
        drift_row(phi, p, zero, n, eps)

    @njit
    def integrate(phi, p, n, c, beta, lam, eps, n_steps):
        for step in range(n_steps):
            kick_drift(phi, p, n, c, beta, lam, eps / 2 if step == 0 else eps, eps)
        kick(phi, p, n, c, beta, lam, eps / 2)

    @njit
    def action_sites(total, x, t, here, right, down, count, beta, a, b):
        for j in range(count):
            v = x[here + j]
            total[t + j] += v * (v * (a + b * (v * v)) - beta * (x[right + j] + x[down + j]))

    @njit
    def add_columns(column, c, factor, out):
        out[:] = 0
        for j in range(column.size):
            out[j % c] += factor * column[j]

    @njit
    def action(phi, c, beta, lam, column, out):
        """S of each of the c chains of a group."""
        beta, a, b = real(beta), real(1 - 2 * lam), real(lam)
        column[:] = 0
        n, k, size, zero = np.uint64(column.size), np.uint64(c), np.uint64(phi.size), np.uint64(0)
        for here in range(zero, size, n):
            down = here + n if here + n < size else zero
            action_sites(column, phi, zero, here, here + k, down, n - k, beta, a, b)
            action_sites(column, phi, n - k, here + n - k, here, down + n - k, k, beta, a, b)
        add_columns(column, c, 1.0, out)

    @njit
    def kinetic(p, c, column, out):
        column[:] = 0
        n = np.uint64(column.size)
        for here in range(np.uint64(0), np.uint64(p.size), n):
            for j in range(n):
                column[j] += p[here + j] * p[here + j]
        add_columns(column, c, 0.5, out)

    @njit
    def actions(phi, beta, lam):
        groups, c, n = phi.shape[0], phi.shape[3], phi.shape[2] * phi.shape[3]
        out = np.empty((groups, c))
        for g in range(groups):
            action(phi[g].reshape(phi[g].size), c, beta, lam, np.empty(n, real), out[g])
        return out

    @njit
    def forces(phi, beta, lam):
        out = np.zeros_like(phi)
        c, n, size = phi.shape[3], phi.shape[2] * phi.shape[3], phi[0].size
        for g in range(len(phi)):
            kick(phi[g].reshape(size), out[g].reshape(size), n, c, beta, lam, 1.0)
        return out

    @njit
    def evolve(phi, p, beta, lam, eps, n_steps):
        """One trajectory of every chain without randomness, in place."""
        c, n, size = phi.shape[3], phi.shape[2] * phi.shape[3], phi[0].size
        for g in range(len(phi)):
            integrate(phi[g].reshape(size), p[g].reshape(size), n, c, beta, lam, eps, n_steps)

    @njit
    def hmc(phi, beta, lam, eps, n_steps, n_trajectories, seed):
        """Full trajectories of every chain, in place. Returns how many were accepted."""
        c, n, size = phi.shape[3], phi.shape[2] * phi.shape[3], phi[0].size
        p, old, column = np.empty(size, real), np.empty(size, real), np.empty(n, real)
        s_old, s_new, k_old, k_new = np.empty(c), np.empty(c), np.empty(c), np.empty(c)
        accepted = 0
        for g in range(len(phi)):
            x = phi[g].reshape(size)
            action(x, c, beta, lam, column, s_old)
            for t in range(n_trajectories):
                key = _word(_word(np.uint64(seed), t), g)
                normals(key, p)
                old[:] = x
                kinetic(p, c, column, k_old)
                integrate(x, p, n, c, beta, lam, eps, n_steps)
                action(x, c, beta, lam, column, s_new)
                kinetic(p, c, column, k_new)
                for k in range(c):
                    u = (np.float64(_word(~key, k) >> np.uint64(11)) + 0.5) * 2.0**-53
                    if u < math.exp(s_old[k] + k_old[k] - s_new[k] - k_new[k]):
                        s_old[k] = s_new[k]
                        accepted += 1
                    else:
                        x[k::c] = old[k::c]
        return accepted

    @njit
    def stream(phi, p, lam, eps, n_steps):
        """The bytes of `evolve` without the stencil: kick by the site's own force, drift, one pass a step."""
        a, b, e = real(eps * 2 * (1 - 2 * lam)), real(eps * 4 * lam), real(eps)
        size = phi[0].size
        for g in range(len(phi)):
            x, q = phi[g].reshape(size), p[g].reshape(size)
            for _ in range(n_steps):
                for j in range(size):
                    v = q[j] - x[j] * (a + b * (x[j] * x[j]))
                    q[j] = v
                    x[j] += e * v

    return {"actions": actions, "forces": forces, "evolve": evolve, "hmc": hmc, "stream": stream}


KERNELS = {"float64": _make(np.float64, normals_f64), "float32": _make(np.float32, normals_f32)}
GROUP = {  # chains of a group by type and L: the fastest of 8, 16, 32 at L = 16; 1, 2, 4, 8 at 64; 1, 2 at 256
    ("float64", 16): 16, ("float64", 64): 4, ("float64", 256): 2,
    ("float32", 16): 32, ("float32", 64): 8, ("float32", 256): 2,
}  # fmt: skip


def grouped(fields, c):
    """(chains, L, L) -> (groups, L, L, c)."""
    n, *shape = fields.shape
    return np.moveaxis(fields.reshape(n // c, c, *shape), 1, -1).copy()


def ungrouped(fields):
    return np.moveaxis(fields, -1, 1).reshape(-1, *fields.shape[1:3])
