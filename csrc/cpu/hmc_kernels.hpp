// Hybrid Monte Carlo on one group. One driver, two potentials: phi^4 itself, and phi^4 seen through a flow.
#pragma once
#include "cpu/block_kernels.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
using lane_mask_bits = typename real_traits<T>::bits;

template <class T>
LFQ_HD simd<T> blend(lane_mask<T> m, simd<T> a, simd<T> b) {
  return from_bits<simd<T>>((to_bits(a) & m) | (to_bits(b) & ~m));
}

// The buffers of a chain group. z_old is the state a rejected trajectory returns to.
template <class T>
struct hmc_work {
  using V = simd<T>;
  V *z, *pi, *z_old;
  V *phi, *phi_old, *g_old;  // with a flow only
  V* scratch[2];
  flow_work<T> flow;
  halo<T> edge;

  void plan(arena& mem, const lfq_phi4& theory, bool split, const flow_plan<T>* f) {
    const int64_t volume = group<T>::sites(lattice(theory.ndim, theory.extent).volume, split);
    edge.plan(mem, theory, split);
    z = mem.take<V>(volume);
    pi = mem.take<V>(volume);
    z_old = mem.take<V>(volume);
    scratch[0] = mem.take<V>(volume);
    scratch[1] = mem.take<V>(volume);
    phi = phi_old = g_old = nullptr;
    if (!f) return;
    phi = mem.take<V>(volume);
    phi_old = mem.take<V>(volume);
    g_old = mem.take<V>(volume);
    flow.plan(mem, *f, true, false);
  }
};

template <class T, int D>
struct phi4_potential {
  using V = simd<T>;
  phi4_group<T, D> theory;
  hmc_work<T>& w;

  const V* field() const { return w.z; }
  bool moved = true;  // since the trajectory began, whose first drift goes from w.z_old to w.z
  int n_waiting = 0;
  phi4_step<T> waiting[2 * halo<T>::max_pairs] = {};

  // The action as `last_kick` with the same k sums it: a run in pieces then has the bits of a whole one.
  void start(double k, lane_sum<T>& s) {
    site_sum<T> unused;
    for (int64_t i = 0; i < theory.lat.volume; ++i) w.pi[i] = V(T(0));
    last_kick(k, s, unused);
  }
  void save() {
    V* const swap = w.z;
    w.z = w.z_old;
    w.z_old = swap;
    moved = false;
  }
  void settle(lane_mask<T> accept) {
    for (int64_t i = 0; i < theory.lat.volume; ++i) w.z[i] = blend<T>(accept, w.z[i], w.z_old[i]);
  }
  phi4_kick<T> kick(double k) const { return phi4_kick<T>(theory.beta, theory.lam, k); }
  // Steps wait until there are as many as go at once.
  void kick_drift(double k, double d) {
    waiting[n_waiting++] = {kick(k), T(d)};
    if (n_waiting >= 2 * theory.pairs_at_once()) run_waiting();
  }
  void run_waiting() {
    bool unit = true;
    for (int i = 0; i < n_waiting; ++i) unit = unit && waiting[i].d == T(1);
    if (unit)
      run_waiting<true>();
    else
      run_waiting<false>();
    n_waiting = 0;
  }
  template <bool UNIT>
  void run_waiting() {
    const int n_pairs = theory.pairs_at_once() > 0 ? n_waiting / 2 : 0;
    if constexpr (D == 2)
      if (n_pairs > 0) {
        theory.template steps_in_pairs<UNIT>(moved ? w.z : w.z_old, w.z, w.pi, waiting, n_pairs);
        moved = true;
      }
    for (int i = 2 * n_pairs; i < n_waiting; ++i) {
      if (moved)
        theory.template kick_drift<UNIT, true>(w.z, w.z, w.pi, waiting[i]);
      else
        theory.template kick_drift<UNIT, false>(w.z_old, w.z, w.pi, waiting[i]);
      moved = true;
    }
  }
  void last_kick(double k, lane_sum<T>& s, site_sum<T>& p2) {
    run_waiting();
    theory.kick_energy(w.z, w.pi, kick(k), k, s, p2);
  }
};

// S~(z) = S(f(z)) - log|det df/dz|
template <class T, int D>
struct pulled_back_potential {
  using V = simd<T>;
  phi4_group<T, D> theory;
  hmc_work<T>& w;
  flow_group<T> flow;
  bool gradient_known = false;  // work.flow.gz holds dS~/dz at w.z

  pulled_back_potential(const lfq_phi4& t, hmc_work<T>& work, const flow_plan<T>& plan)
      : theory(t, false, work.edge), w(work), flow{plan, work.flow} {}

  // dS~/dz into work.flow.gz. At the ends of trajectories also the field, and S~ without the flow's
  // constant log-det.
  void gradient(const V* z) {
    site_sum<T> unused;
    target_gradient<false, false>(theory, flow, z, V(T(-1)), lane_mask<T>{}, unused, unused, static_cast<V*>(nullptr));
  }
  void gradient(const V* z, lane_sum<T>& s) {
    site_sum<T> action, log_det;
    target_gradient<false, true>(theory, flow, z, V(T(-1)), lane_mask<T>{}, action, log_det, w.phi);
    s.add(1.0, action.sum());
    s.add(-1.0, log_det.sum());
  }

  const V* field() const { return w.phi; }
  void start(double, lane_sum<T>& s) {
    gradient(w.z, s);
    gradient_known = true;
  }
  void save() {
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.z_old[i] = w.z[i];
      w.phi_old[i] = w.phi[i];
      w.g_old[i] = flow.work.gz[i];
    }
  }
  void settle(lane_mask<T> accept) {
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.z[i] = blend<T>(accept, w.z[i], w.z_old[i]);
      w.phi[i] = blend<T>(accept, w.phi[i], w.phi_old[i]);
      flow.work.gz[i] = blend<T>(accept, flow.work.gz[i], w.g_old[i]);
    }
  }
  void kick_drift(double k, double d) {
    if (!gradient_known && flow.plan.fused_at == 0) return step_through_block(theory, flow, w.z, w.pi, T(-k), T(d));
    if (!gradient_known) gradient(w.z);
    gradient_known = false;
    const V vk = V(T(-k)), vd = V(T(d));
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.pi[i] = fma(vk, flow.work.gz[i], w.pi[i]);
      w.z[i] = fma(vd, w.pi[i], w.z[i]);
    }
  }
  void last_kick(double k, lane_sum<T>& s, site_sum<T>& p2) {
    gradient(w.z, s);
    gradient_known = true;
    const V vk = V(T(-k));
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      const V m = fma(vk, flow.work.gz[i], w.pi[i]);
      w.pi[i] = m;
      p2.add_product(i, m, m);
    }
  }
};

// Momenta are kept in units of 1 / unit, the longest drift of the integrator, so that a leapfrog's drift is
// a mere addition.
inline double momentum_unit(const lfq_hmc& h) {
  double longest = h.integrator.drift[0];
  for (int i = 1; i < h.integrator.n_stages; ++i)
    if (::fabs(h.integrator.drift[i]) > ::fabs(longest)) longest = h.integrator.drift[i];
  return longest * h.step_size;
}

// One trajectory of the splitting: adjacent kicks merged, the action and the momenta squared taken with the last.
template <class T, class P>
void trajectory(P& potential, const lfq_hmc& h, lane_sum<T>& s, site_sum<T>& p2) {
  const lfq_integrator& in = h.integrator;
  const double unit = momentum_unit(h);
  double kick = in.kick[0];
  for (int step = 0; step < h.n_steps; ++step) {
    for (int stage = 0; stage < in.n_stages; ++stage) {
      potential.kick_drift(kick * h.step_size * unit, in.drift[stage] * h.step_size / unit);
      kick = in.kick[stage + 1];
    }
    if (step + 1 < h.n_steps) kick += in.kick[0];
  }
  potential.last_kick(kick * h.step_size * unit, s, p2);
}

// The observables of lfq.h for each valid lane; scratch: two fields.
template <class T, int D>
void measure(const phi4_group<T, D>& theory, const simd<T>* phi, const double* smear, simd<T>* a, simd<T>* b,
             const group<T>& g, double* out) {
  using V = simd<T>;
  const lattice& lat = theory.lat;
  lane_sum<T> m, phi2, phi4, nn, smeared;
  theory.exchange(phi);
  for (int64_t r = 0; r < lat.n_rows; ++r)
    theory.row(phi, r, [&](int64_t, V p, V forward, V) LFQ_LAMBDA_INLINE {
      const V p2 = p * p;
      m.add(p);
      phi2.add(p2);
      phi4.add(p2 * p2);
      nn.add(p * forward);
    });

  // Heat-kernel smearing: a circulant convolution along each axis; entries below rounding (of an FFT) are skipped.
  const V* in = phi;
  V *target = a, *other = b;
  int64_t inner = lat.volume;
  const double* kernel = smear;
  rotation<T> turns[V::width];
  for (int l = 0; theory.split && l < V::width; ++l) turns[l] = rotation<T>(l);
  for (int axis = 0; axis < D; ++axis) {
    const int n = lat.extent[axis], n_whole = theory.whole.extent[axis];
    const int64_t outer = lat.volume / inner;
    inner /= n;
    // The kernel is even: sites at distance d on both sides share a factor.
    int reach = 0;
    for (int d = 1; d <= n_whole / 2; ++d)
      if (kernel[d] > 1e-16) reach = d;
    const auto factor = [&](int d) { return V(T(d > 0 && 2 * d == n_whole ? 0.5 * kernel[d] : kernel[d])); };
    for (int x = 0; x < n; ++x)
      for (int64_t o = 0; o < outer; ++o) {
        const V* line = in + o * n * inner;
        V* t = target + (o * n + x) * inner;
        constexpr int block = 4;
        int64_t i = 0;
        const auto convolve_line = [&](auto count) LFQ_LAMBDA_INLINE {
          constexpr int B = decltype(count)::value;
          V acc[B];
          for (int k = 0; k < B; ++k) acc[k] = factor(0) * line[x * inner + i + k];
          for (int d = 1; d <= reach; ++d) {
            int ahead = x + d, behind = x - d, lanes_ahead = 0, lanes_behind = 0;
            for (; ahead >= n; ahead -= n) ++lanes_ahead;
            for (; behind < 0; behind += n) --lanes_behind;
            const V f = factor(d), *p = line + ahead * inner + i, *q = line + behind * inner + i;
            if (theory.split && axis == 0 && (lanes_ahead | lanes_behind)) {
              const rotation<T>&up = turns[lanes_ahead & (V::width - 1)], &down = turns[lanes_behind & (V::width - 1)];
              for (int k = 0; k < B; ++k) acc[k] = fma(f, up(p[k]) + down(q[k]), acc[k]);
            } else {
              for (int k = 0; k < B; ++k) acc[k] = fma(f, p[k] + q[k], acc[k]);
            }
          }
          for (int k = 0; k < B; ++k) t[i + k] = acc[k];
          i += B;
        };
        while (i + block <= inner) convolve_line(constant<block>());
        while (i < inner) convolve_line(constant<1>());
      }
    kernel += n_whole;
    in = target;
    V* swap = target;
    target = other;
    other = swap;
  }
  for (int64_t i = 0; i < lat.volume; ++i) smeared.add(in[i] * in[i]);

  // |sum_x exp(2 pi i x_mu / L) phi_x|^2 from the sums over hyperplanes.
  double power[V::width] = {};
  inner = lat.volume;
  for (int axis = 0; axis < D; ++axis) {
    const int n = lat.extent[axis], n_whole = theory.whole.extent[axis];
    const int64_t outer = lat.volume / inner;
    inner /= n;
    lane_sum<T> re, im;
    for (int x = 0; x < n; ++x) {
      V plane(T(0)), cosine, sine;
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; ++i) plane += phi[(o * n + x) * inner + i];
      const auto phase = [&](int place, double& c, double& s) {
        const double angle = 6.283185307179586476925287 * place / n_whole;
        c = ::cos(angle);
        s = ::sin(angle);
      };
      double c, s;
      phase(x, c, s);
      cosine = V(T(c));
      sine = V(T(s));
      for (int l = 1; theory.split && axis == 0 && l < V::width; ++l) {
        phase(l * n + x, c, s);
        cosine.set(l, T(c));
        sine.set(l, T(s));
      }
      re.add(plane * cosine);
      im.add(plane * sine);
    }
    double r[V::width], i[V::width];
    g.totals(re, r);
    g.totals(im, i);
    for (int l = 0; l < V::width; ++l) power[l] += r[l] * r[l] + i[l] * i[l];
  }

  const double v = 1.0 / double(theory.whole.volume);
  const lane_sum<T>* sums[] = {&m, &phi2, &phi4, &nn, &smeared};
  for (int k = 0; k < 5; ++k) {
    double total[V::width];
    g.totals(*sums[k], total);
    for (int l = 0; l < g.n_valid; ++l)
      out[(g.first + l) * LFQ_N_OBSERVABLES + k] = total[l] * v / (k == 3 ? D : 1);
  }
  for (int l = 0; l < g.n_valid; ++l) out[(g.first + l) * LFQ_N_OBSERVABLES + 5] = power[l] * v / D;
}

// The settings of one trajectory, its number of steps drawn.
inline lfq_hmc drawn(const lfq_hmc& h, uint64_t number) {
  lfq_hmc one = h;
  if (h.n_steps_spread > 0) {
    const stream rng{h.seed, number, LFQ_PURPOSE_LENGTH};
    uint32_t x0 = 0, x1 = rng.word1(), x2 = 0, x3 = rng.word3();
    philox4x32(x0, x1, x2, x3, uint32_t(h.seed), uint32_t(h.seed >> 32));
    const uint64_t choices = 2 * uint64_t(h.n_steps_spread) + 1;
    one.n_steps += int32_t(uint64_t(x0) * choices >> 32) - h.n_steps_spread;
  }
  return one;
}

struct hmc_output {
  double* dh;
  uint8_t* accepted;
  const double* smear;
  double* observables;
  int64_t n_chains;
};

// Momenta in units of 1 / unit, and the sum of their squares.
template <class T>
site_sum<T> draw_momenta(const stream& rng, uint64_t first_chain, const group<T>& g, int64_t n, double unit, simd<T>* pi) {
  const simd<T> to_unit = simd<T>(T(unit));
  site_sum<T> sum;
  normals<T>(rng, first_chain, g, n, [&](int64_t i, simd<T> p) LFQ_LAMBDA_INLINE {
    p = p * to_unit;
    pi[i] = p;
    sum.add_product(i, p, p);
  });
  return sum;
}

// All trajectories of one group, from and to potential.w.z. False when dH became NaN or Inf: then w.z is
// the state before that trajectory.
template <class T, class P>
bool run_hmc(P& potential, const lfq_hmc& h, const group<T>& g, const hmc_output& out, failures& failed) {
  constexpr int W = simd<T>::width;
  auto& w = potential.w;
  const int64_t volume = potential.theory.lat.volume;
  int64_t n = 0;
  const double unit = momentum_unit(h), half_mass = 0.5 / (unit * unit);
  double s0[W];
  {
    lane_sum<T> s;
    potential.start(h.integrator.kick[h.integrator.n_stages] * h.step_size * unit, s);
    g.totals(s, s0);
  }
  for (int64_t sample = 0; sample < h.n_samples; ++sample) {
    for (int t = 0; t < h.thin; ++t, ++n) {
      const uint64_t number = h.first_trajectory + uint64_t(n);
      const stream rng{h.seed, number, LFQ_PURPOSE_MOMENTA};
      site_sum<T> sum_k0 = draw_momenta(rng, h.first_chain, g, volume, unit, w.pi), sum_k1;
      lane_sum<T> sum_s1;
      potential.save();
      trajectory<T>(potential, drawn(h, number), sum_s1, sum_k1);
      double k0[W], k1[W], s1[W], uniform[W];
      g.totals(sum_k0.sum(), k0);
      g.totals(sum_k1.sum(), k1);
      g.totals(sum_s1, s1);
      accept_uniforms(stream{h.seed, number, LFQ_PURPOSE_ACCEPT}, h.first_chain, g, uniform);
      lane_mask<T> accept = {};
      bool all = true;
      for (int l = 0; l < W; ++l) {
        const double dh = (s1[l] - s0[l]) + (k1[l] - k0[l]) * half_mass;
        if (!(dh - dh == 0.0)) {
          if (l >= g.n_valid) continue;
          failed.report(g.first + l, int64_t(number), dh);
          for (int64_t i = 0; i < volume; ++i) w.z[i] = w.z_old[i];
          return false;
        }
        const bool yes = dh <= 0.0 || uniform[l] < ::exp(-dh);
        accept[l] = yes ? ~lane_mask_bits<T>(0) : lane_mask_bits<T>(0);
        all = all && yes;
        if (yes) s0[l] = s1[l];
        if (l >= g.n_valid) continue;
        const int64_t at = n * out.n_chains + g.first + l;
        if (out.dh) out.dh[at] = dh;
        if (out.accepted) out.accepted[at] = yes;
      }
      if (!all) potential.settle(accept);
    }
    if (out.observables)
      measure(potential.theory, potential.field(), out.smear, w.scratch[0], w.scratch[1], g,
              out.observables + sample * out.n_chains * LFQ_N_OBSERVABLES);
  }
  return true;
}

LFQ_NAMESPACE_END
