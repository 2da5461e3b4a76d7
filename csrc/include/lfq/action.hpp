// action.hpp: an action of your own, written as a functor, for lfq's HMC and flows.
//
// site_action takes the terms of one site and loops over the lattice:
//   struct my_site {
//     double action(double phi, double forward) const;    // given the sum over the forward neighbours phi_{x+mu}
//     double force(double phi, double neighbours) const;  // -dS/dphi, given the sum over all 2 D neighbours
//   };
// field_action takes anything else: f(n_chains, phi, action, force), where action is null when nobody asks for it.
#pragma once
#include <utility>

#include "lfq/lattice.hpp"
#include "lfq/lfq.hpp"

namespace lfq {

template <class T, class F>
class field_action {
 public:
  field_action(const std::vector<int32_t>& extent, F f) : lattice_(checked(extent)), function_(std::move(f)) {
    record_.ndim = lattice_.ndim;
    for (int i = 0; i < lattice_.ndim; ++i) record_.extent[i] = lattice_.extent[i];
    record_.evaluate = evaluate;
  }
  // For lfq.h and lfq::hmc; valid while this object stays where it is.
  const custom_record<T>& get() {
    record_.context = this;
    return record_;
  }

 private:
  static lattice checked(const std::vector<int32_t>& extent) {
    const theory valid(extent, 0.0, 0.0);
    return lattice(valid.get()->ndim, valid.get()->extent);
  }
  static int32_t evaluate(void* context, int32_t want_action, int64_t n_chains, const T* phi, double* action, T* force) {
    auto& self = *static_cast<field_action*>(context);
    try {
      if constexpr (std::is_invocable_v<F&, const lattice&, int64_t, const T*, double*, T*>)
        self.function_(self.lattice_, n_chains, phi, want_action ? action : nullptr, force);
      else
        self.function_(n_chains, phi, want_action ? action : nullptr, force);
    } catch (...) {
      return 1;
    }
    return 0;
  }
  lattice lattice_;
  F function_;
  custom_record<T> record_{};
};

// Loops over the sites of (n_chains, *extent) fields; the sum of the action runs in double, in a fixed order.
template <class T, class Site>
class site_loop {
 public:
  explicit site_loop(Site s) : site_(std::move(s)) {}
  void operator()(const lattice& lat, int64_t n_chains, const T* phi, double* action, T* force) const {
    for (int64_t i = 0; i < n_chains; ++i) {
      const T* p = phi + i * lat.volume;
      T* f = force + i * lat.volume;
      switch (lat.ndim) {
        case 1: chain<1>(lat, p, action ? action + i : nullptr, f); break;
        case 2: chain<2>(lat, p, action ? action + i : nullptr, f); break;
        case 3: chain<3>(lat, p, action ? action + i : nullptr, f); break;
        default: chain<4>(lat, p, action ? action + i : nullptr, f);
      }
    }
  }

 private:
  static constexpr int width = 8;
  template <int D>
  void chain(const lattice& lat, const T* phi, double* action, T* force) const {
    if (action)
      rows<D, true>(lat, phi, action, force);
    else
      rows<D, false>(lat, phi, action, force);
  }
  template <int D, bool ACTION>
  void rows(const lattice& lat, const T* phi, double* action, T* force) const {
    double sums[width] = {};
    const int n = lat.length;
    for (int64_t r = 0; r < lat.n_rows; ++r) {
      int c[LFQ_MAX_DIM];
      lat.coordinates(r, c);
      const T *row = phi + r * n, *up[LFQ_MAX_DIM], *down[LFQ_MAX_DIM];
      T* out = force + r * n;
      for (int mu = 0; mu + 1 < D; ++mu) {
        ++c[mu];
        up[mu] = phi + lat.row_start(c);
        c[mu] -= 2;
        down[mu] = phi + lat.row_start(c);
        ++c[mu];
      }
      const auto at = [&](int x, int left, int right, int lane) {
        T forward = row[right], backward = row[left];
        for (int mu = 0; mu + 1 < D; ++mu) {
          forward += up[mu][x];
          backward += down[mu][x];
        }
        if constexpr (ACTION) sums[lane] += double(site_.action(row[x], forward));
        out[x] = T(site_.force(row[x], forward + backward));
      };
      int x = 1;
      at(0, n - 1, n > 1 ? 1 : 0, 0);
      for (; x + width < n; x += width)
        for (int j = 0; j < width; ++j) at(x + j, x + j - 1, x + j + 1, j);
      for (; x < n; ++x) at(x, x - 1, x + 1 < n ? x + 1 : 0, x % width);
    }
    if constexpr (ACTION) {
      *action = 0;
      for (double s : sums) *action += s;
    }
  }
  Site site_;
};

template <class T, class Site>
field_action<T, site_loop<T, Site>> site_action(const std::vector<int32_t>& extent, Site site) {
  return {extent, site_loop<T, Site>(std::move(site))};
}

}  // namespace lfq
