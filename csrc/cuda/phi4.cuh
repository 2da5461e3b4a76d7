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

// W sites in a row, which a thread reads and writes at once, 16 bytes with an instruction.
template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) lanes {
  T v[W];
};
template <class T, int W>
LFQ_DEVICE void store(T* to, const lanes<T, W>& x) {
  *reinterpret_cast<lanes<T, W>*>(to) = x;
}
template <int W, bool ALIGNED = true, class T>
LFQ_DEVICE lanes<T, W> load(const T* from) {
  lanes<T, W> x;
  if constexpr (ALIGNED)
    x = *reinterpret_cast<const lanes<T, W>*>(from);
  else
    for (int w = 0; w < W; ++w) x.v[w] = from[w];
  return x;
}
// In the type of the field: a conversion to double costs as much as eight additions.
template <class T, int W>
LFQ_DEVICE T sum_of(const lanes<T, W>& x) {
  T sum = x.v[0];
  for (int w = 1; w < W; ++w) sum += x.v[w];
  return sum;
}

// Nothing to read ahead of the sites.
struct nothing_early {
  LFQ_DEVICE int operator()(int) const { return 0; }
};

// A thread's share of a chain that lies in memory as a whole: up to R slices along the first axis, W sites along the
// last one in each; with W > 1 these are other axes. ALIGNED: whether W sites can be read at once.
template <class T, int D, int W, int R, bool ALIGNED = true>
struct patch {
  static_assert(W == 1 || D > 1, "the first axis is not the last one");

  int slice;  // sites of a slice
  int place;  // of the first site within a slice
  int first, count;
  int last, end;    // where the last slice of the lattice begins, and the one behind these
  int right, left;  // along the last axis, of the W sites
  int up[D > 2 ? D - 2 : 1], down[D > 2 ? D - 2 : 1];

  LFQ_DEVICE patch(const lfq_phi4& t, unsigned index) : slice(1), right(0), left(0) {
    for (int i = 1; i < D; ++i) slice *= t.extent[i];
    const unsigned per_slice = unsigned(slice) / W, number = index / per_slice;
    place = int(index - number * per_slice) * W;
    const int extent = t.extent[0];
    first = int(number) * R;
    count = extent - first;
    end = count <= R ? 0 : (first + R) * slice;
    count = count < 0 ? 0 : count > R ? R : count;
    last = (extent - 1) * slice;
    if constexpr (D > 1) {
      const int n = t.extent[D - 1];
      int rest = place / n, stride = n;
      const int c = place - rest * n;
      right = place + (c + W < n ? W : W - n);
      left = place + (c > 0 ? -1 : n - 1);
      for (int i = D - 2; i >= 1; --i) {
        const int m = t.extent[i], next = rest / m, x = rest - next * m;
        rest = next;
        up[i - 1] = place + (x + 1 < m ? stride : stride * (1 - m));
        down[i - 1] = place + (x > 0 ? -stride : stride * (m - 1));
        stride *= m;
      }
    }
  }

  // Calls f(site, phi, sums over forward neighbours, sums over all neighbours, early(site)) for the W sites from `site`
  // on; without ALL the second sums are the first ones. What comes from far is read a slice before it is used.
  template <bool ALL, class E, class F>
  LFQ_DEVICE void visit(const T* __restrict__ phi, E&& early, F&& f) const {
    if (count == 0) return;
    int row = first * slice;
    V below, here = at(phi + row + place), above = at(phi + (count > 1 ? row + slice : end) + place);
    if (ALL) below = at(phi + (first > 0 ? row - slice : last) + place);
    auto ready = early(row + place);
#pragma unroll 2
    for (int k = 0; k < count; ++k) {
      V far = above;
      auto soon = ready;
      if (k + 1 < count) {
        far = at(phi + (k + 2 < count ? row + 2 * slice : end) + place);
        soon = early(row + slice + place);
      }
      V forward = above;
      if constexpr (D > 1) {
        for (int w = 0; w + 1 < W; ++w) forward.v[w] += here.v[w + 1];
        forward.v[W - 1] += phi[row + right];
        for (int i = 0; i < D - 2; ++i) add(forward, at(phi + row + up[i]));
      }
      V all = forward;
      if constexpr (ALL) {
        add(all, below);
        if constexpr (D > 1) {
          all.v[0] += phi[row + left];
          for (int w = 1; w < W; ++w) all.v[w] += here.v[w - 1];
          for (int i = 0; i < D - 2; ++i) add(all, at(phi + row + down[i]));
        }
      }
      f(row + place, here, forward, all, ready);
      below = here;
      here = above;
      above = far;
      ready = soon;
      row += slice;
    }
  }

 private:
  using V = lanes<T, W>;
  static LFQ_DEVICE V at(const T* phi) { return load<W, ALIGNED>(phi); }
  static LFQ_DEVICE void add(V& sum, const V& x) {
    for (int w = 0; w < W; ++w) sum.v[w] += x.v[w];
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

// The normals of block b of a chain's stream, as far as the chain goes; ALIGNED: whether all four can be stored at once.
template <class T, bool ALIGNED>
LFQ_DEVICE void store_block(const T (&v)[4], int64_t b, int64_t n, T* out) {
  if constexpr (ALIGNED) {
    constexpr int W = 16 / sizeof(T);
    for (int j = 0; j < 4; j += W) {
      lanes<T, W> x;
      for (int w = 0; w < W; ++w) x.v[w] = v[j + w];
      store(out + 4 * b + j, x);
    }
  } else {
    for (int j = 0; j < 4; ++j)
      if (4 * b + j < n) out[4 * b + j] = v[j];
  }
}

template <class T, bool ALIGNED>
__global__ void normal_kernel(stream rng, uint64_t first_chain, int64_t n, int n_parts, T* out) {
  const part at(n_parts);
  const int64_t b = at.thread();
  if (4 * b >= n) return;
  T v[4];
  normal_block<T>(rng, uint32_t(b), uint32_t(first_chain + uint64_t(at.chain)), v);
  store_block<T, ALIGNED>(v, b, n, out + at.chain * n);
}

constexpr int strip_rows = 8;

template <class T, int D, int W, bool ALIGNED>
__global__ void __launch_bounds__(block_size)
    action_kernel(lfq_phi4 theory, phi4_site<T> site, int64_t volume, int n_parts, const T* __restrict__ phi, double* partial) {
  const part at(n_parts);
  double s[1] = {0};
  const patch<T, D, W, strip_rows, ALIGNED> own(theory, unsigned(at.thread()));
  own.template visit<false>(phi + at.chain * volume, nothing_early(), [&](int, auto& x, auto& forward, auto&, int) {
    lanes<T, W> terms;
    for (int w = 0; w < W; ++w) terms.v[w] = site.action(x.v[w], forward.v[w]);
    s[0] += double(sum_of(terms));
  });
  store_part(s, partial, at, n_parts);
}

template <class T, int D, int W>
__global__ void __launch_bounds__(block_size)
    force_kernel(lfq_phi4 theory, phi4_site<T> site, int64_t volume, int n_parts, const T* __restrict__ phi,
                 T* __restrict__ force) {
  const part at(n_parts);
  T* f = force + at.chain * volume;
  const patch<T, D, W, strip_rows> own(theory, unsigned(at.thread()));
  own.template visit<true>(phi + at.chain * volume, nothing_early(), [&](int i, auto& x, auto&, auto& all, int) {
    lanes<T, W> y;
    for (int w = 0; w < W; ++w) y.v[w] = site.force(x.v[w], all.v[w]);
    store(f + i, y);
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
  float rounded[LFQ_MAX_DIM][max_reach + 1];  // the factors

  LFQ_HD double of(double, int axis, int d) const { return factor[axis][d]; }
  LFQ_HD float of(float, int axis, int d) const { return rounded[axis][d]; }
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

LFQ_NAMESPACE_END
