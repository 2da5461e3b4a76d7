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
    kick_drift_kernel(lfq_phi4 theory, phi4_kick<T> kick, T step, int64_t volume, int n_parts, const T* __restrict__ from,
                      T* __restrict__ to, T* __restrict__ p) {
  const part at(n_parts);
  const int64_t chain = at.chain * volume;
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
// The same with new momenta, a block of normals for four sites of a row: their arithmetic and the fields' traffic go on
// at a time. ALIGNED is about `from`.
template <class T, int D, bool ALIGNED>
__global__ void __launch_bounds__(block_size)
    refresh_kick_drift_kernel(lfq_phi4 theory, stream rng, uint64_t first_chain, T unit, phi4_kick<T> kick, T step, int64_t volume,
                              int n_parts, const T* __restrict__ from, T* __restrict__ to, T* __restrict__ p, double* partial) {
  const part at(n_parts);
  const int64_t chain = at.chain * volume;
  double p2[1] = {0};
  const patch<T, D, 4, strip_rows, ALIGNED> own(theory, unsigned(at.thread()));
  own.template visit<true>(from + chain, nothing_early(), [&](int i, auto& x, auto&, auto& all, int) {
    T n[4];
    normal_block<T>(rng, uint32_t(i) / 4, uint32_t(first_chain + uint64_t(at.chain)), n);
    lanes<T, 4> m, y, squares;
    for (int w = 0; w < 4; ++w) {
      n[w] *= unit;
      squares.v[w] = n[w] * n[w];
      m.v[w] = kick(n[w], x.v[w], all.v[w]);
      y.v[w] = fma(step, m.v[w], x.v[w]);
    }
    p2[0] += double(sum_of(squares));
    store(p + chain + i, m);
    store(to + chain + i, y);
  });
  store_part(p2, partial, at, n_parts);
}
// Two steps of kick and drift at once, on a plane: a warp goes along the first axis with a band of up to 32 vectors of
// a row. What it needs of the sites next to its band after the first step, its outermost lanes compute too. Sites have
// the same bits as after two passes.
struct bands {
  int extent, length;         // rows, and sites of a row
  int per_row, lanes, n_rows; // bands side by side, vectors of one (the last one may have fewer), rows of one
  LFQ_HD bands(const lfq_phi4& t, int width, int rows) : extent(t.extent[0]), length(t.extent[1]), n_rows(rows) {
    const int vectors = length / width;
    per_row = int(ceil_div(vectors, warp_size));
    lanes = int(ceil_div(vectors, per_row));
  }
  LFQ_HD int64_t count() const { return per_row * ceil_div(extent, n_rows); }
};
template <class T, int W>
__global__ void __launch_bounds__(block_size)
    kick_drift_twice_kernel(bands b, phi4_kick<T> first, T step1, phi4_kick<T> second, T step2, int volume, int n_parts,
                            const T* __restrict__ from, const T* __restrict__ p, T* __restrict__ to, T* __restrict__ p_to) {
  using V = lanes<T, W>;
  const part at(n_parts);
  const int band = at.number * (block_size / warp_size) + int(threadIdx.x) / warp_size, strip = band / b.per_row;
  const int begin = strip * b.n_rows, count = b.extent - begin < b.n_rows ? b.extent - begin : b.n_rows;
  if (count <= 0) return;
  const int v0 = (band - strip * b.per_row) * b.lanes, rest = b.length / W - v0, mine = rest < b.lanes ? rest : b.lanes;
  // Lanes beyond the band do what its last one does, and store nothing.
  int lane = int(threadIdx.x) % warp_size;
  const bool own = lane < mine;
  if (!own) lane = mine - 1;
  const bool low = lane == 0, high = lane == mine - 1, outermost = low || high;
  const int column = (v0 + lane) * W;
  // One and two sites beyond the band.
  const auto beyond = [&](int x) { return low ? (x > 0 ? x : b.length) - 1 : x + 1 < b.length ? x + 1 : 0; };
  const int edge = beyond(low ? column : column + W - 1), outer = beyond(edge);
  const int64_t chain = at.chain * volume;
  const T *const phi = from + chain, *const momenta = p + chain;
  T *const phi_to = to + chain, *const p_end = p_to + chain;

  const auto after = [&](int row) { return row + b.length == volume ? 0 : row + b.length; };
  const auto before = [&](int row) { return (row == 0 ? volume : row) - b.length; };
  const auto value = [&](const T* field, int row, int x) { return outermost ? field[row + x] : T(0); };
  // Rows as the first step meets them, from the one before the band on.
  int out = begin * b.length, row = before(out), next = out;
  V below = load<W>(phi + before(row) + column), here = load<W>(phi + row + column), above = load<W>(phi + next + column);
  T edge_below = value(phi, before(row), edge), edge_here = value(phi, row, edge), edge_above = value(phi, next, edge);
  V p_here = load<W>(momenta + row + column);
  T edge_p = value(momenta, row, edge), outer_here = value(phi, row, outer);
  // Rows as the second step meets them.
  V moved_below = here, moved = here, p_moved = p_here;
  T edge_moved = T(0);

  // In the order of patch::visit.
  const auto around = [&](const V& up, const V& x, const V& down, T side) {
    const T left = __shfl_up_sync(0xffffffffu, x.v[W - 1], 1), right = __shfl_down_sync(0xffffffffu, x.v[0], 1);
    V all;
    for (int w = 0; w < W; ++w) {
      all.v[w] = up.v[w] + (w + 1 < W ? x.v[w + 1 < W ? w + 1 : w] : high ? side : right);
      all.v[w] += down.v[w];
      all.v[w] += w > 0 ? x.v[w > 0 ? w - 1 : w] : low ? side : left;
    }
    return all;
  };
#pragma unroll 1
  for (int i = 0; i < count + 2; ++i) {
    V far = above, p_soon = p_here;
    T edge_far = edge_above, edge_p_soon = edge_p, outer_soon = outer_here;
    const int then = after(next);
    if (i < count + 1) {
      far = load<W>(phi + then + column);
      p_soon = load<W>(momenta + next + column);
      edge_far = value(phi, then, edge);
      edge_p_soon = value(momenta, next, edge);
      outer_soon = value(phi, next, outer);
    }
    const V all = around(above, here, below, edge_here);
    V m, x;
    for (int w = 0; w < W; ++w) {
      m.v[w] = first(p_here.v[w], here.v[w], all.v[w]);
      x.v[w] = fma(step1, m.v[w], here.v[w]);
    }
    const T edge_right = low ? here.v[0] : outer_here, edge_left = low ? outer_here : here.v[W - 1];
    const T edge_m = first(edge_p, edge_here, ((edge_above + edge_right) + edge_below) + edge_left);
    const T edge_x = fma(step1, edge_m, edge_here);
    if (i >= 2) {
      const V sides = around(x, moved, moved_below, edge_moved);
      V m2, x2;
      for (int w = 0; w < W; ++w) {
        m2.v[w] = second(p_moved.v[w], moved.v[w], sides.v[w]);
        x2.v[w] = fma(step2, m2.v[w], moved.v[w]);
      }
      if (own) {
        store(p_end + out + column, m2);
        store(phi_to + out + column, x2);
      }
      out += b.length;
    }
    moved_below = moved;
    moved = x;
    p_moved = m;
    edge_moved = edge_x;
    below = here;
    here = above;
    above = far;
    p_here = p_soon;
    edge_below = edge_here;
    edge_here = edge_above;
    edge_above = edge_far;
    edge_p = edge_p_soon;
    outer_here = outer_soon;
    next = then;
  }
}
// The last kick: into p_end, unless that is null, and to the action and the momenta squared, unless partial is.
template <class T, int D, int W>
__global__ void __launch_bounds__(block_size)
    last_kick_kernel(lfq_phi4 theory, phi4_kick<T> kick, phi4_site<T> site, int64_t volume, int n_parts,
                     const T* __restrict__ phi, const T* p, T* p_end, double* partial) {
  const part at(n_parts);
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
