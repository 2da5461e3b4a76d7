// HMC with Fourier acceleration (Batrouni et al., Phys. Rev. D 32 (1985) 2736): mode p moves with the mass
// (p^2 + m^2) / (4 D + m^2), p^2 = 4 sum sin^2(p_mu / 2), so that slow modes are light ones. The transform is a
// discrete Hartley transform along each axis: real, its own inverse, and as good as Fourier's for masses
// that are even in every p_mu.
#pragma once
#include "cpu/hmc_kernels.hpp"

LFQ_NAMESPACE_BEGIN

// Tables of one theory, shared by all threads of a call.
template <class T>
struct fourier_plan {
  lattice lat;
  T* inverse_mass;  // of each mode, in the order of sites
  struct axis {
    int n, base;        // extent = base 2^k, base odd
    T* dense;           // cas(2 pi j k / base), base x base
    T *cosine, *sine;   // of 2 pi k / n, k < n / 2
    int32_t* order;     // input place of each entry of the first stage
  } axes[LFQ_MAX_DIM];

  void plan(arena& mem, const lfq_phi4& theory) {
    lat = lattice(theory.ndim, theory.extent);
    inverse_mass = mem.take<T>(lat.volume);
    for (int mu = 0; mu < lat.ndim; ++mu) {
      axis& a = axes[mu];
      a.n = a.base = lat.extent[mu];
      while (a.base % 2 == 0) a.base /= 2;
      a.dense = mem.take<T>(int64_t(a.base) * a.base);
      a.cosine = mem.take<T>(a.n);
      a.sine = mem.take<T>(a.n);
      a.order = mem.take<int32_t>(a.n);
    }
  }
  void fill(double mass) {
    constexpr double two_pi = 6.283185307179586476925287;
    for (int mu = 0; mu < lat.ndim; ++mu) {
      axis& a = axes[mu];
      for (int j = 0; j < a.base; ++j)
        for (int k = 0; k < a.base; ++k) {
          const double angle = two_pi * double(int64_t(j) * k % a.base) / a.base;
          a.dense[j * a.base + k] = T((::cos(angle) + ::sin(angle)) / ::sqrt(double(a.n)));
        }
      for (int k = 0; k < a.n; ++k) {
        a.cosine[k] = T(::cos(two_pi * k / a.n));
        a.sine[k] = T(::sin(two_pi * k / a.n));
      }
      // Even entries first, recursively: the input of group g is g's bits reversed, in steps of n / base.
      const int groups = a.n / a.base;
      for (int g = 0; g < groups; ++g) {
        int reversed = 0;
        for (int bit = 1, mirror = groups / 2; bit < groups; bit *= 2, mirror /= 2)
          if (g & bit) reversed += mirror;
        for (int j = 0; j < a.base; ++j) a.order[g * a.base + j] = reversed + j * groups;
      }
    }
    for (int64_t i = 0; i < lat.volume; ++i) {
      double p2 = 0;
      int64_t rest = i;
      for (int mu = lat.ndim - 1; mu >= 0; --mu) {
        const double s = ::sin(0.5 * two_pi * double(rest % lat.extent[mu]) / lat.extent[mu]);
        p2 += 4 * s * s;
        rest /= lat.extent[mu];
      }
      inverse_mass[i] = T((4 * lat.ndim + mass * mass) / (p2 + mass * mass));
    }
  }
};

template <class T>
struct fourier_work {
  static constexpr int width = 4;  // lines transformed side by side
  hmc_work<T> hmc;
  simd<T>* lines;
  void plan(arena& mem, const lfq_phi4& theory) {
    hmc.plan(mem, theory, false, nullptr);
    int longest = 1;
    for (int mu = 0; mu < theory.ndim; ++mu) longest = theory.extent[mu] > longest ? theory.extent[mu] : longest;
    lines = mem.take<simd<T>>(int64_t(longest) * width);
  }
};

// The orthonormal Hartley transform along every axis, in place.
template <class T>
void hartley(const fourier_plan<T>& f, simd<T>* field, simd<T>* lines) {
  using V = simd<T>;
  int64_t inner = f.lat.volume;
  for (int mu = 0; mu < f.lat.ndim; ++mu) {
    const auto& a = f.axes[mu];
    const int n = a.n;
    const int64_t outer = f.lat.volume / inner;
    inner /= n;
    const auto transform = [&](V* line, auto side) LFQ_LAMBDA_INLINE {
      constexpr int B = decltype(side)::value;
      for (int g = 0; g < n; g += a.base)
        for (int k = 0; k < a.base; ++k) {
          V sum[B];
          for (int b = 0; b < B; ++b) sum[b] = V(T(0));
          for (int j = 0; j < a.base; ++j) {
            const V c(a.dense[j * a.base + k]);
            const V* p = line + a.order[g + j] * inner;
            for (int b = 0; b < B; ++b) sum[b] = fma(c, p[b], sum[b]);
          }
          for (int b = 0; b < B; ++b) lines[(g + k) * B + b] = sum[b];
        }
      // Transforms of length m of the even (E) and odd (O) entries make one of length 2 m.
      for (int m = a.base; m < n; m *= 2) {
        const int turn = n / (2 * m);
        for (int g = 0; g < n; g += 2 * m) {
          V *e = lines + g * B, *o = e + m * B;
          for (int k = 0; k <= m / 2; ++k) {
            const int l = k == 0 ? 0 : m - k;
            const V c(a.cosine[k * turn]), s(a.sine[k * turn]);
            for (int b = 0; b < B; ++b) {
              const V ek = e[k * B + b], el = e[l * B + b], ok = o[k * B + b], ol = o[l * B + b];
              const V u = fma(c, ok, s * ol), v = fma(s, ok, -(c * ol));
              e[k * B + b] = ek + u;
              o[k * B + b] = ek - u;
              if (k == l) continue;
              e[l * B + b] = el + v;
              o[l * B + b] = el - v;
            }
          }
        }
      }
      for (int k = 0; k < n; ++k)
        for (int b = 0; b < B; ++b) line[k * inner + b] = lines[k * B + b];
    };
    constexpr int width = fourier_work<T>::width;
    for (int64_t o = 0; o < outer; ++o) {
      V* block = field + o * n * inner;
      int64_t i = 0;
      for (; i + width <= inner; i += width) transform(block + i, constant<width>());
      for (; i < inner; ++i) transform(block + i, constant<1>());
    }
  }
}

// Momenta are normals eta of the modes (in the integrator's unit) at the ends of a trajectory; inside it work.pi holds the
// velocities K^(-1/2) eta in position space.
template <class T, int D>
struct fourier_potential {
  using V = simd<T>;
  phi4_group<T, D> theory;
  hmc_work<T>& w;
  const fourier_plan<T>& f;
  V* lines;
  bool modes = true;  // w.pi holds eta

  fourier_potential(const lfq_phi4& t, fourier_work<T>& work, const fourier_plan<T>& plan)
      : theory(t, false, work.hmc.edge), w(work.hmc), f(plan), lines(work.lines) {}

  const V* field() const { return w.z; }
  void start(double, lane_sum<T>& s) {
    site_sum<T> action;
    theory.gradient(w.z, w.scratch[0], action);
    s.add(1.0, action.sum());
  }
  void save() {
    for (int64_t i = 0; i < theory.lat.volume; ++i) w.z_old[i] = w.z[i];
    modes = true;
  }
  void settle(lane_mask<T> accept) {
    for (int64_t i = 0; i < theory.lat.volume; ++i) w.z[i] = blend<T>(accept, w.z[i], w.z_old[i]);
  }
  void kick_drift(double k, double d) {
    V* force = w.scratch[0];
    const int64_t n = theory.lat.volume;
    theory.force(w.z, force);
    hartley(f, force, lines);
    const V vk = V(T(k)), vd = V(T(d));
    if (modes) {
      for (int64_t i = 0; i < n; ++i) {
        const V a(f.inverse_mass[i]);
        force[i] = fma(vk * a, force[i], sqrt(a) * w.pi[i]);
      }
      hartley(f, force, lines);
      for (int64_t i = 0; i < n; ++i) w.pi[i] = force[i];
    } else {
      for (int64_t i = 0; i < n; ++i) force[i] = vk * V(f.inverse_mass[i]) * force[i];
      hartley(f, force, lines);
      for (int64_t i = 0; i < n; ++i) w.pi[i] += force[i];
    }
    modes = false;
    for (int64_t i = 0; i < n; ++i) w.z[i] = fma(vd, w.pi[i], w.z[i]);
  }
  void last_kick(double k, lane_sum<T>& s, site_sum<T>& p2) {
    V* gradient = w.scratch[0];
    site_sum<T> action;
    theory.gradient(w.z, gradient, action);
    s.add(1.0, action.sum());
    hartley(f, gradient, lines);
    hartley(f, w.pi, lines);
    const V vk = V(T(-k));
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      const V root = sqrt(V(f.inverse_mass[i]));
      const V eta = fma(vk * root, gradient[i], w.pi[i] / root);
      w.pi[i] = eta;
      p2.add_product(i, eta, eta);
    }
    modes = true;
  }
};

LFQ_NAMESPACE_END
