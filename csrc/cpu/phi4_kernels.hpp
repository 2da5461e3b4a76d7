// phi^4 loops over the sites of one group, and the momentum refresh.
#pragma once
#include "cpu/group.hpp"
#include "lfq/phi4.hpp"

LFQ_NAMESPACE_BEGIN

// Fewer sites fit a core's cache with one chain a lane.
constexpr int64_t smallest_split = 4096;

// Whether HMC spreads one chain over the lanes: see group. With a flow lanes are always chains.
template <class T>
bool splits(const lfq_phi4& theory) {
  constexpr int W = simd<T>::width;
  const lattice lat(theory.ndim, theory.extent);
  return lat.ndim >= 2 && lat.extent[0] % W == 0 && lat.extent[0] / W >= 2 && lat.volume / W % 4 == 0 &&
         lat.volume >= smallest_split;
}

// The first and last slice of the slabs, as their neighbours see them.
template <class T>
struct halo {
  simd<T>* below = nullptr;  // under slice 0: the last slice of the slab before
  simd<T>* above = nullptr;  // over the last slice: slice 0 of the slab after
  void plan(arena& mem, const lfq_phi4& theory, bool split) {
    if (!split) return;
    const lattice lat(theory.ndim, theory.extent);
    below = mem.take<simd<T>>(lat.volume / lat.extent[0]);
    above = mem.take<simd<T>>(lat.volume / lat.extent[0]);
  }
};

template <class T, int D>
struct phi4_group {
  using V = simd<T>;
  bool split;
  lattice whole;  // the chain's lattice
  lattice lat;    // a lane's part of it
  phi4_site<T> site;
  halo<T> edge;

  phi4_group(const lfq_phi4& theory, bool split_lanes, const halo<T>& h)
      : split(split_lanes), whole(D, theory.extent), lat(whole), site(theory.beta, theory.lam), edge(h) {
    if (!split) return;
    int32_t extent[LFQ_MAX_DIM];
    for (int i = 0; i < D; ++i) extent[i] = whole.extent[i];
    extent[0] /= V::width;
    lat = lattice(D, extent);
  }

  // Before a pass over phi: what the outermost slices of each slab see across its edges.
  void exchange(const V* phi) const {
    if (!split) return;
    const rotation<T> before(-1), after(1);
    const int64_t n = lat.volume / lat.extent[0];
    for (int64_t i = 0; i < n; ++i) edge.below[i] = before(phi[lat.volume - n + i]);
    for (int64_t i = 0; i < n; ++i) edge.above[i] = after(phi[i]);
  }

  // Calls f(index, phi, sum over forward neighbours, sum over all neighbours) along a row.
  template <class F>
  LFQ_HD void row(const V* phi, int64_t r, F&& f) const {
    const int n = lat.length;
    const V* self = phi + r * n;
    const V* up[D > 1 ? D - 1 : 1];
    const V* down[D > 1 ? D - 1 : 1];
    if constexpr (D > 1) {
      int c[LFQ_MAX_DIM];
      lat.coordinates(r, c);
      int64_t stride = n;
      for (int i = D - 2; i >= 0; --i) {
        up[i] = self + (c[i] + 1 < lat.extent[i] ? stride : stride * (1 - lat.extent[i]));
        down[i] = self + (c[i] > 0 ? -stride : stride * (lat.extent[i] - 1));
        stride *= lat.extent[i];
      }
      if (split) {
        const int64_t in_slice = r * n % (lat.volume / lat.extent[0]);
        if (c[0] == 0) down[0] = edge.below + in_slice;
        if (c[0] + 1 == lat.extent[0]) up[0] = edge.above + in_slice;
      }
    }
    V left = self[n - 1], here = self[0];
    const auto visit = [&](int x, V right) LFQ_LAMBDA_INLINE {
      V forward = right;
      for (int i = 0; i < D - 1; ++i) forward += up[i][x];
      V all = forward + left;
      for (int i = 0; i < D - 1; ++i) all += down[i][x];
      f(r * n + x, here, forward, all);
      left = here;
      here = right;
    };
    for (int x = 0; x + 1 < n; ++x) visit(x, self[x + 1]);
    visit(n - 1, self[0]);
  }

  void action(const V* phi, lane_sum<T>& s) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t, V p, V forward, V) LFQ_LAMBDA_INLINE { s.add(site.action(p, forward)); });
  }
  void force(const V* phi, V* f) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V, V all) LFQ_LAMBDA_INLINE { f[i] = site.force(p, all); });
  }
  // g = dS/dphi
  void gradient(const V* phi, V* g) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V, V all) LFQ_LAMBDA_INLINE { g[i] = -site.force(p, all); });
  }
  // and the action, in one pass
  void gradient(const V* phi, V* g, lane_sum<T>& s) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V forward, V all) LFQ_LAMBDA_INLINE {
        g[i] = -site.force(p, all);
        s.add(site.action(p, forward));
      });
  }
  // pi += k F(phi), then phi += d pi, a slice of the first axis behind: a slice may move once the kicks
  // of both its neighbours have seen it.
  void kick_drift(V* phi, V* pi, T k, T d) const {
    exchange(phi);
    const V vk(k), vd(d);
    const int slices = D > 1 ? lat.extent[0] : 1;
    const int64_t rows = lat.n_rows / slices, sites = rows * lat.length;
    const auto kick = [&](int s) LFQ_LAMBDA_INLINE {
      for (int64_t r = s * rows; r < (s + 1) * rows; ++r)
        row(phi, r, [&](int64_t i, V p, V, V all) LFQ_LAMBDA_INLINE { pi[i] = fma(vk, site.force(p, all), pi[i]); });
    };
    const auto drift = [&](int s) LFQ_LAMBDA_INLINE {
      for (int64_t i = s * sites; i < (s + 1) * sites; ++i) phi[i] = fma(vd, pi[i], phi[i]);
    };
    for (int s = 0; s < slices; ++s) {
      kick(s);
      if (s >= 2) drift(s - 1);
    }
    if (slices >= 2) drift(slices - 1);
    drift(0);
  }
  void kick_energy(const V* phi, V* pi, T k, lane_sum<T>& s, lane_sum<T>& kinetic) const {
    exchange(phi);
    const V vk(k), half(T(0.5));
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V forward, V all) LFQ_LAMBDA_INLINE {
        const V m = fma(vk, site.force(p, all), pi[i]);
        pi[i] = m;
        s.add(site.action(p, forward));
        kinetic.add(half * m * m);
      });
  }
};

// Calls f(constant<D>) for the run-time number of dimensions.
template <class F>
LFQ_HD void with_dimension(int ndim, F&& f) {
  switch (ndim) {
    case 1: return f(constant<1>());
    case 2: return f(constant<2>());
    case 3: return f(constant<3>());
    default: return f(constant<4>());
  }
}

// Normals for the n sites of each lane; sink(i, value). Lane l draws from chain g.chain(l)'s stream, from
// the block where its part of the field begins.
template <class T, class F>
LFQ_HD void normals(const stream& rng, uint64_t first_chain, const group<T>& g, int64_t n, F&& sink) {
  using V = simd<T>;
  using B = typename V::bits_t;
  using U = typename real_traits<T>::bits;
  B chains, first_block;
  for (int l = 0; l < V::width; ++l) {
    chains[l] = U(uint32_t(first_chain + uint64_t(g.chain(l))));
    first_block[l] = g.slabs ? U(l * (n / 4)) : U(0);
  }
  const B low = B{} + U(0xffffffffu);
  for (int64_t b = 0; b < (n + 3) / 4; ++b) {
    B x0 = first_block + U(uint32_t(b)), x1 = B{} + U(rng.word1()), x2 = chains, x3 = B{} + U(rng.word3());
    philox4x32(x0, x1, x2, x3, uint32_t(rng.seed), uint32_t(rng.seed >> 32));
    V z[4];
    box_muller(x0 & low, x1 & low, z[0], z[1]);
    box_muller(x2 & low, x3 & low, z[2], z[3]);
    const int m = int(n - 4 * b < 4 ? n - 4 * b : 4);
    for (int j = 0; j < m; ++j) sink(4 * b + j, z[j]);
  }
}

LFQ_NAMESPACE_END
