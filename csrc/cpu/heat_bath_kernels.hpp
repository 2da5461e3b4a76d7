// Checkerboard sweeps of the local heat bath over one group: all sites of even coordinate sum, then the others. Sites
// of one parity are visited in order, so that on odd extents, where two of them can be neighbours, a sweep
// is a sequence of single updates all the same.
#pragma once
#include "cpu/hmc_kernels.hpp"
#include "lfq/heat_bath.hpp"

LFQ_NAMESPACE_BEGIN

// Slabs of even depth: each begins with the parity of the whole lattice.
template <class T>
bool splits_checkerboard(const lfq_phi4& theory) {
  return splits<T>(theory) && theory.extent[0] / simd<T>::width % 2 == 0;
}

template <class T>
struct heat_bath_work {
  simd<T>*phi, *scratch[2];
  halo<T> edge;
  void plan(arena& mem, const lfq_phi4& theory) {
    const bool split = splits_checkerboard<T>(theory);
    const int64_t sites = group<T>::sites(lattice(theory.ndim, theory.extent).volume, split);
    phi = mem.take<simd<T>>(sites);
    for (auto& s : scratch) s = mem.take<simd<T>>(sites);
    edge.plan(mem, theory, split);
  }
};

template <class T, int D>
struct heat_bath_group {
  using V = simd<T>;
  using B = typename V::bits_t;
  phi4_group<T, D> theory;
  heat_bath_site<T> site;

  static int single_axes(const lattice& lat) {
    int n = 0;
    for (int i = 0; i < D; ++i) n += lat.extent[i] == 1;
    return n;
  }
  heat_bath_group(const lfq_phi4& t, bool split, const halo<T>& edge)
      : theory(t, split, edge), site(t.beta, t.lam, single_axes(theory.whole)) {}

  // One sweep; site x draws from block first_block + x. Adds the number of sites that changed.
  void sweep(V* phi, const lane_blocks<T>& random, uint64_t first_block, lane_sum<T>& changed) const {
    const lattice& lat = theory.lat;
    const int n = lat.length;
    constexpr int batch = 8;
    alignas(64) B word[4 * batch];
    for (int parity = 0; parity < 2; ++parity) {
      theory.exchange(phi);
      for (int64_t r = 0; r < lat.n_rows; ++r) {
        V* self = phi + r * n;
        const V *up[D > 1 ? D - 1 : 1], *down[D > 1 ? D - 1 : 1];
        theory.neighbours(phi, r, theory.split ? theory.edge.above : nullptr, up, down);
        const auto sum = [&](int x) LFQ_LAMBDA_INLINE {
          V all = self[x + 1 < n ? x + 1 : 0] + self[x > 0 ? x - 1 : n - 1];
          for (int i = 0; i < D - 1; ++i) all += up[i][x] + down[i][x];
          return all;
        };
        V row_changed(T(0)), c;
        for (int x0 = (lat.row_parity(r) + parity) & 1; x0 < n; x0 += 2 * batch) {
          const int count = n - x0 < 2 * batch ? (n - x0 + 1) / 2 : batch;
          random(first_block + uint64_t(r * n + x0), 2, count, word);
          int k = 0;
          // Two at once, unless they are neighbours round a row of three.
          for (; n > 3 && k + 1 < count; k += 2) {
            const int x = x0 + 2 * k;
            twin_bits<B> w[4];
            for (int i = 0; i < 4; ++i) w[i] = {word[4 * k + i], word[4 * k + 4 + i]};
            twin<T> two;
            span<twin<T>>::put(self + x, 2, site(span<twin<T>>::at(self + x, 2), twin<T>(sum(x), sum(x + 2)), w, two));
            row_changed += two.a + two.b;
          }
          for (; k < count; ++k) {
            const int x = x0 + 2 * k;
            const B w[4] = {word[4 * k], word[4 * k + 1], word[4 * k + 2], word[4 * k + 3]};
            self[x] = site(self[x], sum(x), w, c);
            row_changed += c;
          }
        }
        changed.add(row_changed);
      }
    }
  }
};

struct heat_bath_output {
  int64_t* changed;
  const double* smear;
  double* observables;
  int64_t n_chains;
};

// All trajectories of one group, from and to w.phi.
template <class T, int D>
void run_heat_bath(const heat_bath_group<T, D>& kernel, const heat_bath_work<T>& w, const lfq_heat_bath& h, const group<T>& g,
                   const heat_bath_output& out) {
  const auto& theory = kernel.theory;
  int64_t n = 0;
  for (int64_t sample = 0; sample < h.n_samples; ++sample) {
    for (int t = 0; t < h.thin; ++t, ++n) {
      const stream rng{h.seed, h.first_trajectory + uint64_t(n), LFQ_PURPOSE_HEAT_BATH};
      const lane_blocks<T> random(rng, h.first_chain, g, theory.lat.volume);
      lane_sum<T> changed;
      for (int k = 0; k < h.n_sweeps; ++k) kernel.sweep(w.phi, random, uint64_t(k) * uint64_t(theory.whole.volume), changed);
      double total[simd<T>::width];
      g.totals(changed, total);
      for (int l = 0; out.changed && l < g.n_valid; ++l) out.changed[n * out.n_chains + g.first + l] = int64_t(total[l]);
    }
    if (out.observables)
      measure(theory, w.phi, out.smear, w.scratch[0], w.scratch[1], g, out.observables + sample * out.n_chains * LFQ_N_OBSERVABLES);
  }
}

LFQ_NAMESPACE_END
