// phi^4 on the GPU: strips of sites, and kernels whose fields lie in device memory.
#pragma once
#include "cuda/device.cuh"
#include "lfq/phi4.hpp"

LFQ_NAMESPACE_BEGIN

constexpr int block_size = 256;

// A thread's share of a chain: up to R sites along the first axis at one place of the other axes.
template <int D, int R>
struct strip {
  int slice;   // sites of a slice of the first axis
  int extent;  // of the first axis
  int place;   // within a slice
  int first, count;
  bool full;   // of R sites
  int up[D > 1 ? D - 1 : 1], down[D > 1 ? D - 1 : 1];  // the neighbours' places within a slice

  static LFQ_HD int64_t per_chain(const lfq_phi4& t) {
    int64_t slice = 1;
    for (int i = 1; i < D; ++i) slice *= t.extent[i];
    return slice * ceil_div(t.extent[0], R);
  }

  LFQ_DEVICE strip(const lfq_phi4& t, int64_t index) : slice(1), extent(t.extent[0]) {
    for (int i = 1; i < D; ++i) slice *= t.extent[i];
    place = int(index % slice);
    first = int(index / slice) * R;
    count = extent - first;
    count = count < 0 ? 0 : count > R ? R : count;
    // Not count == R: ptxas 13.0 makes of that a predicate of the minimum that holds for shorter strips too.
    full = (first + R - 1) * slice + place < extent * slice;
    int rest = place, stride = 1;
    for (int i = D - 1; i >= 1; --i) {
      const int n = t.extent[i], c = rest % n;
      rest /= n;
      up[i - 1] = place + (c + 1 < n ? stride : stride * (1 - n));
      down[i - 1] = place + (c > 0 ? -stride : stride * (n - 1));
      stride *= n;
    }
  }

  LFQ_DEVICE int site(int k) const { return (first + k) * slice + place; }

  // Calls f(k, site).
  template <class F>
  LFQ_DEVICE void each(F&& f) const {
    if (full)
      each_row<true>(f);
    else
      each_row<false>(f);
  }

  // Calls f(k, site, phi, sum over forward neighbours, sum over all neighbours); own(k, site) is phi at site k.
  template <class T, class Own, class F>
  LFQ_DEVICE void visit(const T* phi, Own&& own, F&& f) const {
    if (full)
      visit_rows<true>(phi, own, f);
    else if (count > 0)
      visit_rows<false>(phi, own, f);
  }
  // The same with all of phi read from memory, where comparisons do not matter.
  template <class T, class F>
  LFQ_DEVICE void visit(const T* phi, F&& f) const {
    if (count > 0) visit_rows<false>(phi, [&](int, int site) { return phi[site]; }, f);
  }

 private:
  // FULL strips need no comparisons.
  template <bool FULL, class F>
  LFQ_DEVICE void each_row(F&& f) const {
    int i = first * slice + place;
    forget(i);
#pragma unroll
    for (int k = 0; k < R; ++k, i += slice)
      if (FULL || k < count) f(k, i);
  }
  template <bool FULL, class T, class Own, class F>
  LFQ_DEVICE void visit_rows(const T* phi, Own&& own, F&& f) const {
    int row = first * slice;
    forget(row);
    T below = phi[(first > 0 ? row - slice : (extent - 1) * slice) + place];
    T here = own(0, row + place);
#pragma unroll
    for (int k = 0; k < R; ++k)
      if (FULL || k < count) {
        const int next = row + slice;
        T above;
        if (k + 1 < R && (FULL || k + 1 < count))
          above = own(k + 1, next + place);
        else
          above = phi[(first + k + 1 < extent ? next : 0) + place];
        T forward = above;
        for (int i = 0; i < D - 1; ++i) forward += phi[row + up[i]];
        T all = forward + below;
        for (int i = 0; i < D - 1; ++i) all += phi[row + down[i]];
        f(k, row + place, here, forward, all);
        below = here;
        here = above;
        row = next;
      }
  }
};

// Which part of which chain a block works on.
struct part {
  int64_t chain;
  int number;
  LFQ_DEVICE explicit part(int n_parts) : chain(blockIdx.x / n_parts), number(int(blockIdx.x % n_parts)) {}
  LFQ_DEVICE int64_t thread() const { return int64_t(number) * blockDim.x + threadIdx.x; }
};
inline int parts_of(int64_t threads) { return int(ceil_div(threads, block_size)); }

template <int N>
LFQ_DEVICE void store_part(double (&sum)[N], double* partial, const part& at, int n_parts) {
  block_sum(sum);
  if (threadIdx.x == 0)
    for (int n = 0; n < N; ++n) partial[(at.chain * n_parts + at.number) * N + n] = sum[n];
}
// Of a chain, over the block's threads; every thread receives the sums.
template <int N>
LFQ_DEVICE void sum_parts(const double* partial, int64_t chain, int n_parts, double (&sum)[N]) {
  for (int n = 0; n < N; ++n) sum[n] = 0;
  for (int p = threadIdx.x; p < n_parts; p += blockDim.x)
    for (int n = 0; n < N; ++n) sum[n] += partial[(chain * n_parts + p) * N + n];
  block_sum(sum);
}

template <class T>
__global__ void normal_kernel(stream rng, uint64_t first_chain, int64_t n, int n_parts, T* out) {
  const part at(n_parts);
  const int64_t b = at.thread();
  if (4 * b >= n) return;
  T v[4];
  normal_block<T>(rng, uint32_t(b), uint32_t(first_chain + uint64_t(at.chain)), v);
  for (int j = 0; j < 4; ++j)
    if (4 * b + j < n) out[at.chain * n + 4 * b + j] = v[j];
}

constexpr int strip_rows = 8;

template <class T, int D>
__global__ void action_kernel(lfq_phi4 theory, int64_t volume, int n_parts, const T* phi, double* partial) {
  const part at(n_parts);
  const phi4_site<T> site(theory.beta, theory.lam);
  double s[1] = {0};
  strip<D, strip_rows>(theory, at.thread()).visit(phi + at.chain * volume, [&](int, int, T p, T forward, T) {
    s[0] += double(site.action(p, forward));
  });
  store_part(s, partial, at, n_parts);
}

template <class T, int D>
__global__ void force_kernel(lfq_phi4 theory, int64_t volume, int n_parts, const T* phi, T* force) {
  const part at(n_parts);
  const phi4_site<T> site(theory.beta, theory.lam);
  T* f = force + at.chain * volume;
  strip<D, strip_rows>(theory, at.thread()).visit(phi + at.chain * volume, [&](int, int i, T p, T, T all) {
    f[i] = site.force(p, all);
  });
}

// Sums over the parts, one block a chain.
template <int N>
__global__ void finish_kernel(int n_parts, const double* partial, double* out) {
  double s[N];
  sum_parts(partial, blockIdx.x, n_parts, s);
  if (threadIdx.x == 0)
    for (int n = 0; n < N; ++n) out[int64_t(blockIdx.x) * N + n] = s[n];
}

// ---- observables ---------------------------------------------------------------------------
constexpr int max_reach = 31;

// The even kernel of the smearing along each axis, cut where it falls below rounding; at the antipode halved, since
// that is met from both sides.
struct smearing {
  int reach[LFQ_MAX_DIM];
  double factor[LFQ_MAX_DIM][max_reach + 1];
};

// One site of a line along an axis.
template <class T>
LFQ_DEVICE T smeared(const smearing& s, int axis, const T* line, int x, int n, int stride) {
  T sum = T(s.factor[axis][0]) * line[x * stride];
  for (int d = 1; d <= s.reach[axis]; ++d) {
    const int ahead = x + d < n ? x + d : x + d - n, behind = x - d < 0 ? x - d + n : x - d;
    sum = fma(T(s.factor[axis][d]), line[ahead * stride] + line[behind * stride], sum);
  }
  return sum;
}
// Site i of the field, smeared along the axis, whose sites lie `stride` apart.
template <class T>
LFQ_DEVICE T smeared_at(const smearing& s, int axis, const T* phi, int i, int n, int stride) {
  const int x = i / stride % n;
  return smeared(s, axis, phi + (i - x * stride), x, n, stride);
}

// Sums of phi, phi^2, phi^4, phi times its forward neighbours, then cos and sin of each axis's smallest momentum.
template <int D>
struct moments {
  static constexpr int size = 4 + 2 * D;
  double sum[size];
  double cosine[D], sine[D];  // of the strip's place along the axes after the first

  template <int R>
  LFQ_DEVICE moments(const lfq_phi4& t, const strip<D, R>& s) {
    for (double& v : sum) v = 0;
    int rest = s.place;
    for (int i = D - 1; i >= 1; --i) {
      sincospi(2.0 * (rest % t.extent[i]) / t.extent[i], &sine[i], &cosine[i]);
      rest /= t.extent[i];
    }
  }
  LFQ_DEVICE void add(double p, double forward, int row, int extent) {
    sum[0] += p;
    sum[1] += p * p;
    sum[2] += p * p * (p * p);
    sum[3] += p * forward;
    sincospi(2.0 * row / extent, &sine[0], &cosine[0]);
    for (int i = 0; i < D; ++i) {
      sum[4 + 2 * i] += p * cosine[i];
      sum[5 + 2 * i] += p * sine[i];
    }
  }
};
// The observables of lfq.h from sums over the whole lattice.
LFQ_DEVICE void store_observables(int ndim, const double* sum, double smeared2, double volume, double* out) {
  const double v = 1.0 / volume;
  double power = 0;
  for (int i = 4; i < 4 + 2 * ndim; ++i) power += sum[i] * sum[i];
  out[0] = sum[0] * v;
  out[1] = sum[1] * v;
  out[2] = sum[2] * v;
  out[3] = sum[3] * v / ndim;
  out[4] = smeared2 * v;
  out[5] = power * v / ndim;
}

template <class T, int D>
__global__ void moments_kernel(lfq_phi4 theory, int64_t volume, int n_parts, const T* phi, double* partial) {
  const part at(n_parts);
  const strip<D, strip_rows> s(theory, at.thread());
  moments<D> m(theory, s);
  s.visit(phi + at.chain * volume, [&](int k, int, T p, T forward, T) {
    m.add(double(p), double(forward), s.first + k, s.extent);
  });
  store_part(m.sum, partial, at, n_parts);
}
// Smears along one axis. The last one leaves the sum of squares instead of the field.
template <class T>
__global__ void smear_kernel(smearing s, int axis, int extent, int stride, int64_t volume, int n_parts, const T* phi,
                             T* out, double* partial) {
  const part at(n_parts);
  const int64_t i = at.thread();
  T v = T(0);
  if (i < volume) v = smeared_at(s, axis, phi + at.chain * volume, int(i), extent, stride);
  if (out) {
    if (i < volume) out[at.chain * volume + i] = v;
    return;
  }
  double sum[1] = {double(v) * double(v)};
  store_part(sum, partial, at, n_parts);
}
template <int D>
__global__ void observables_kernel(int n_parts, const double* partial, int n_smear_parts, const double* smear_partial,
                                   double volume, double* out) {
  double sum[moments<D>::size], smeared2[1];
  sum_parts(partial, blockIdx.x, n_parts, sum);
  sum_parts(smear_partial, blockIdx.x, n_smear_parts, smeared2);
  if (threadIdx.x == 0) store_observables(D, sum, smeared2[0], volume, out + int64_t(blockIdx.x) * LFQ_N_OBSERVABLES);
}

LFQ_NAMESPACE_END
