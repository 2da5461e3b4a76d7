// Cotangents pulled back through the inverse of a flow, layer by layer from z to x, with the kernels of flows of one
// layer. Where y = f(x) with Jacobian J, the cotangent v of y solves J^T v = r for the cotangent r of x; J is triangular
// in active and frozen sites (in noise and coarse field), so two products with J^T solve it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "capi/internal.hpp"
#include "lfq/layers.hpp"

namespace lfq_internal {

template <class T>
class inverse_vjp {
 public:
  inverse_vjp(const lfq_flow& f, int64_t n_chains, int n_threads) : flow_(f), n_(n_chains), threads_(n_threads) {
    for (int i = 0; i < f.n_layers; ++i) {
      lfq_layer copy;
      kernel_bytes_ = std::max(kernel_bytes_, table<T>().flow_workspace(alone(i, copy), n_, threads_));
    }
  }
  size_t bytes() const { return 5 * field_bytes() + 2 * chain_bytes() + kernel_bytes_ + 64; }

  // z and dz: where to differentiate and the cotangent there; dlog_det: that of log|det dz/dx|.
  int run(const T* z, const T* dz, const double* dlog_det, T* dx, double* dweights, lfq_failure* bad, void* ws) {
    char* p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(ws) + 63) & ~uintptr_t(63));
    const auto take = [&](size_t size) {
      char* piece = p;
      p += size;
      return piece;
    };
    T* const all_y = reinterpret_cast<T*>(take(field_bytes()));
    T* const y = reinterpret_cast<T*>(take(field_bytes()));
    T* const v = reinterpret_cast<T*>(take(field_bytes()));
    T* const seed = reinterpret_cast<T*>(take(field_bytes()));
    T* const image = reinterpret_cast<T*>(take(field_bytes()));
    double* const lambda = reinterpret_cast<double*>(take(chain_bytes()));
    double* const zero = reinterpret_cast<double*>(take(chain_bytes()));
    const auto& k = table<T>();
    const int64_t whole = flow_.volume;
    std::copy(z, z + n_ * whole, all_y);
    std::copy(dz, dz + n_ * whole, dx);
    for (int64_t c = 0; c < n_; ++c) lambda[c] = -dlog_det[c];
    for (int i = 0; i < flow_.n_layers; ++i) {
      lfq_layer copy;
      const lfq_flow one = alone(i, copy);
      const int64_t volume = one.volume;
      double* const dw = dweights && one.n_weights > 0 ? dweights + flow_.layers[i].weight_offset : nullptr;
      move(all_y, whole, y, volume, volume);
      move(dx, whole, v, volume, volume);
      std::fill(zero, zero + n_, 0.0);
      const auto active = [&](int sublattice) { return lfq::active_of(copy) >> sublattice & 1; };
      const auto product = [&](const double* dlog, double* weights) {
        return k.vjp(one, n_, y, seed, dlog, image, weights, bad, p, threads_);
      };
      if (copy.kind == LFQ_LAYER_COUPLING) {
        if (copy.scale == LFQ_SCALE_SITE) {
          // Only here does the log-det depend on the active sites themselves.
          std::fill(seed, seed + n_ * volume, T(0));
          if (const int e = product(lambda, nullptr)) return e;
          over(copy, [&](int64_t at, int64_t, int sublattice, int) {
            if (active(sublattice)) v[at] += image[at];
          });
        }
        over(copy, [&](int64_t at, int64_t, int sublattice, int) { seed[at] = T(active(sublattice) ? 1 : 0); });
        if (const int e = product(zero, nullptr)) return e;
        over(copy, [&](int64_t at, int64_t, int sublattice, int) {
          if (active(sublattice)) v[at] /= image[at];
          seed[at] = active(sublattice) ? -v[at] : T(0);
        });
        if (const int e = product(lambda, dw)) return e;
        over(copy, [&](int64_t at, int64_t, int sublattice, int) {
          if (!active(sublattice)) v[at] += image[at];
        });
      } else if (copy.kind == LFQ_LAYER_RESCALE) {
        const T factor = T(std::exp(one.weights[0]));
        for (int64_t at = 0; at < n_ * volume; ++at) v[at] /= factor;
      } else {
        const bool noise_only = copy.kind == LFQ_LAYER_INTERLEAVE;
        std::copy(v, v + n_ * volume, image);
        over(copy, [&](int64_t at, int64_t latent, int, int n_odd) {
          const bool noise = n_odd > 0 && !noise_only;
          v[at] = image[latent] / (noise ? T(std::exp(one.weights[2 * n_odd])) : T(1));
          seed[at] = noise ? -v[at] : T(0);
        });
        if (!noise_only) {
          if (const int e = product(zero, nullptr)) return e;
          const T scale = T(std::exp(one.weights[0]));
          over(copy, [&](int64_t at, int64_t latent, int, int n_odd) {
            if (n_odd == 0) v[at] = (v[at] + image[latent]) / scale;
          });
        }
      }
      if (dw && copy.kind != LFQ_LAYER_COUPLING) {
        for (int64_t at = 0; at < n_ * volume; ++at) seed[at] = -v[at];
        if (const int e = product(lambda, dw)) return e;
      }
      move(v, volume, dx, whole, volume);
      move(all_y, whole, y, volume, volume);
      if (const int e = k.forward(one, n_, y, image, zero, bad, p, threads_)) return e;
      move(image, volume, all_y, whole, volume);
    }
    return LFQ_OK;
  }

 private:
  size_t field_bytes() const { return (size_t(n_ * flow_.volume) * sizeof(T) + 63) & ~size_t(63); }
  size_t chain_bytes() const { return (size_t(n_) * sizeof(double) + 63) & ~size_t(63); }

  // The flow of layer i alone; `copy` must outlive it.
  lfq_flow alone(int i, lfq_layer& copy) const {
    copy = flow_.layers[i];
    const double* const weights = flow_.weights + copy.weight_offset;
    copy.weight_offset = 0;
    return {lfq::sites_of(copy), lfq::weights_of(copy), 1, 0, &copy, weights};
  }
  // The first `count` entries of each chain.
  void move(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count) const {
    for (int64_t c = 0; c < n_; ++c) std::copy(from + c * from_stride, from + c * from_stride + count, to + c * to_stride);
  }
  // f(place, place of the latent entry that a layer that enlarges the lattice puts there, sublattice, odd coordinates)
  template <class F>
  void over(const lfq_layer& l, F&& f) const {
    const int64_t volume = lfq::sites_of(l), coarse = volume >> l.ndim;
    for (int64_t site = 0; site < volume; ++site) {
      int64_t rest = site, half = 0, stride = 1;
      int bits = 0, n_odd = 0;
      for (int mu = l.ndim - 1; mu >= 0; --mu) {
        const int x = int(rest % l.extent[mu]);
        rest /= l.extent[mu];
        half += (x / 2) * stride;
        stride *= l.extent[mu] / 2;
        bits |= (x & 1) << (l.ndim - 1 - mu);
        n_odd += x & 1;
      }
      for (int64_t c = 0; c < n_; ++c) f(c * volume + site, c * volume + bits * coarse + half, bits, n_odd);
    }
  }

  const lfq_flow& flow_;
  int64_t n_;
  int threads_;
  size_t kernel_bytes_ = 64;
};

}  // namespace lfq_internal
