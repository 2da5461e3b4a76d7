// HMC of phi^4 with fields in device memory: a pass over them for each step.
#pragma once
#include "cuda/hmc.cuh"

LFQ_NAMESPACE_BEGIN

template <class T, bool ALIGNED>
__global__ void refresh_kernel(stream rng, uint64_t first_chain, double unit, int64_t volume, int n_parts, T* p, double* partial) {
  const part at(n_parts);
  const int64_t b = at.thread();
  double p2[1] = {0};
  if (4 * b < volume) {
    T n[4];
    normal_block<T>(rng, uint32_t(b), uint32_t(first_chain + uint64_t(at.chain)), n);
    lanes<T, 4> squares;
    for (int j = 0; j < 4; ++j) {
      n[j] *= T(unit);
      squares.v[j] = ALIGNED || 4 * b + j < volume ? n[j] * n[j] : T(0);
    }
    store_block<T, ALIGNED>(n, b, volume, p + at.chain * volume);
    p2[0] = double(sum_of(squares));
  }
  store_part(p2, partial, at, n_parts);
}
// p += k F(from), to = from + d p.
template <class T, int D, int W>
__global__ void __launch_bounds__(block_size)
    kick_drift_kernel(lfq_phi4 theory, double k, double d, int64_t volume, int n_parts, const T* __restrict__ from,
                      T* __restrict__ to, T* __restrict__ p) {
  const part at(n_parts);
  const phi4_kick<T> kick(theory.beta, theory.lam, k);
  const int64_t chain = at.chain * volume;
  const T step(d);
  const patch<T, D, W, strip_rows> own(theory, unsigned(at.thread()));
  own.template visit<true>(
      from + chain, [&](int i) { return load<W>(p + chain + i); },
      [&](int i, auto& x, auto&, auto& all, auto& before) {
        lanes<T, W> m, y;
        for (int w = 0; w < W; ++w) {
          m.v[w] = kick(before.v[w], x.v[w], all.v[w]);
          y.v[w] = fma(step, m.v[w], x.v[w]);
        }
        store(p + chain + i, m);
        store(to + chain + i, y);
      });
}
// The last kick: into p_end, unless that is null, and to the action and the momenta squared, unless partial is.
template <class T, int D, int W>
__global__ void __launch_bounds__(block_size)
    last_kick_kernel(lfq_phi4 theory, double k, int64_t volume, int n_parts, const T* __restrict__ phi, const T* p, T* p_end,
                     double* partial) {
  const part at(n_parts);
  const phi4_kick<T> kick(theory.beta, theory.lam, k);
  const phi4_site<T> site(theory.beta, theory.lam);
  const int64_t chain = at.chain * volume;
  double e[2] = {0, 0};
  const patch<T, D, W, strip_rows> own(theory, unsigned(at.thread()));
  own.template visit<true>(
      phi + chain, [&](int i) { return load<W>(p + chain + i); },
      [&](int i, auto& x, auto& forward, auto& all, auto& before) {
        lanes<T, W> m, terms, squares;
        for (int w = 0; w < W; ++w) {
          m.v[w] = kick(before.v[w], x.v[w], all.v[w]);
          terms.v[w] = site.action(x.v[w], forward.v[w]);
          squares.v[w] = m.v[w] * m.v[w];
        }
        if (p_end) store(p_end + chain + i, m);
        e[0] += double(sum_of(terms));
        e[1] += double(sum_of(squares));
      });
  if (partial) store_part(e, partial, at, n_parts);
}
// One block a chain: dH and the accept step. A chain that failed has NaN for its action from then on.
static __global__ void decide_kernel(lfq_hmc h, uint64_t number, int refresh_parts, const double* k0, int n_parts,
                                     const double* e1, double* s0, double* dh_out, uint8_t* accepted, uint8_t* moves) {
  const int64_t chain = blockIdx.x;
  double before[1], after[2];
  sum_parts(k0, chain, refresh_parts, before);
  sum_parts(e1, chain, n_parts, after);
  if (threadIdx.x != 0) return;
  const double unit = momentum_unit(h);
  const double dh = (after[0] - s0[chain]) + (after[1] - before[0]) * (0.5 / (unit * unit));
  const bool finite = dh - dh == 0.0;
  const bool accept = finite && accepts(dh, h, number, uint32_t(h.first_chain + uint64_t(chain)));
  dh_out[chain] = dh;
  if (accepted) accepted[chain] = accept;
  moves[chain] = accept;
  if (accept) s0[chain] = after[0];
  if (!finite) s0[chain] = dh - dh;
}
template <class T>
__global__ void copy_kernel(int64_t n, const T* from, T* to) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) to[i] = from[i];
}
// The chains that move; W divides their volume.
constexpr int settle_vectors = 4;
template <class T, int W>
__global__ void settle_kernel(int64_t volume, int n_parts, const uint8_t* moves, const T* __restrict__ moved, T* __restrict__ phi) {
  constexpr int n = settle_vectors;
  const part at(n_parts);
  if (!moves[at.chain]) return;
  const int64_t chain = at.chain * volume, begin = int64_t(at.number) * n * W * blockDim.x + W * threadIdx.x;
  lanes<T, W> x[n];
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (begin + j * W * blockDim.x < volume) x[j] = load<W>(moved + chain + begin + j * W * blockDim.x);
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (begin + j * W * blockDim.x < volume) store(phi + chain + begin + j * W * blockDim.x, x[j]);
}

LFQ_NAMESPACE_END
