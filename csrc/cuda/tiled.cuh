// HMC of phi^4 with fields in device memory: a pass over them for each step.
#pragma once
#include "cuda/hmc.cuh"

LFQ_NAMESPACE_BEGIN

template <class T>
__global__ void refresh_kernel(stream rng, uint64_t first_chain, double unit, int64_t volume, int n_parts, T* p, double* partial) {
  const part at(n_parts);
  const int64_t b = at.thread();
  double p2[1] = {0};
  if (4 * b < volume) {
    T n[4];
    normal_block<T>(rng, uint32_t(b), uint32_t(first_chain + uint64_t(at.chain)), n);
    for (int j = 0; j < 4; ++j)
      if (4 * b + j < volume) {
        const T m = n[j] * T(unit);
        p[at.chain * volume + 4 * b + j] = m;
        p2[0] += double(m) * double(m);
      }
  }
  store_part(p2, partial, at, n_parts);
}
// p += k F(from), to = from + d p.
template <class T, int D>
__global__ void kick_drift_kernel(lfq_phi4 theory, double k, double d, int64_t volume, int n_parts, const T* from, T* to, T* p) {
  const part at(n_parts);
  const phi4_kick<T> kick(theory.beta, theory.lam, k);
  const int64_t chain = at.chain * volume;
  const T step(d);
  strip<D, strip_rows>(theory, at.thread()).visit(from + chain, [&](int, int i, T x, T, T all) {
    const T m = kick(p[chain + i], x, all);
    p[chain + i] = m;
    to[chain + i] = fma(step, m, x);
  });
}
// The last kick, with the action and the momenta squared.
template <class T, int D>
__global__ void last_kick_kernel(lfq_phi4 theory, double k, int64_t volume, int n_parts, const T* phi, T* p, double* partial) {
  const part at(n_parts);
  const phi4_kick<T> kick(theory.beta, theory.lam, k);
  const phi4_site<T> site(theory.beta, theory.lam);
  const int64_t chain = at.chain * volume;
  double e[2] = {0, 0};
  strip<D, strip_rows>(theory, at.thread()).visit(phi + chain, [&](int, int i, T x, T forward, T all) {
    const T m = kick(p[chain + i], x, all);
    p[chain + i] = m;
    e[0] += double(site.action(x, forward));
    e[1] += double(m) * double(m);
  });
  store_part(e, partial, at, n_parts);
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
template <class T>
__global__ void settle_kernel(int64_t volume, int n_parts, const uint8_t* moves, const T* moved, T* phi) {
  const part at(n_parts);
  if (!moves[at.chain]) return;
  const int64_t end = volume < 4 * (at.number + 1) * int64_t(blockDim.x) ? volume : 4 * (at.number + 1) * int64_t(blockDim.x);
  for (int64_t i = 4 * at.number * int64_t(blockDim.x) + threadIdx.x; i < end; i += blockDim.x)
    phi[at.chain * volume + i] = moved[at.chain * volume + i];
}

LFQ_NAMESPACE_END
