// HMC of an action that the caller wrote, plain or seen through a flow: a fourth potential for run_hmc. Its
// callback takes and gives whole fields, so a group is laid out chain by chain around each call.
#pragma once
#include "cpu/hmc_kernels.hpp"
#include "cpu/table.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
using custom_action = lfq_internal::custom_action<T>;

// The first callback that asked to stop, over all threads of a call.
struct stop_flag {
  int code = 0;
  void raise(int c) {
    int none = 0;
    __atomic_compare_exchange_n(&code, &none, c, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
  bool up() const { return __atomic_load_n(&code, __ATOMIC_RELAXED) != 0; }
};

// What the callback reads and writes, of one group.
template <class T>
struct custom_buffers {
  T *phi, *force;
  double* action;
  void plan(arena& mem, int64_t volume) {
    phi = mem.take<T>(volume * simd<T>::width);
    force = mem.take<T>(volume * simd<T>::width);
    action = mem.take<double>(simd<T>::width);
  }
  // The action's gradient at x into g; S of each lane when wanted. Where a callback stopped, S is NaN.
  void gradient(const custom_action<T>& call, stop_flag& stop, group<T> g, int64_t volume, const simd<T>* x, simd<T>* out,
                lane_sum<T>* s) const {
    constexpr int W = simd<T>::width;
    g.first = 0;
    store_group(g, x, volume, phi);
    if (!stop.up())
      if (const int code = call.evaluate(call.context, s != nullptr, g.n_valid, phi, action, force)) stop.raise(code);
    if (stop.up()) {
      memset(force, 0, size_t(volume) * W * sizeof(T));
      for (int l = 0; l < W; ++l) action[l] = __builtin_nan("");
    }
    int64_t site;
    load_group(g, force, volume, out, &site);
    for (int64_t i = 0; i < volume; ++i) out[i] = -out[i];
    if (s) *s = lanes_of(g, action);
  }
  static lane_sum<T> lanes_of(const group<T>& g, const double* value) {
    lane_sum<T> s;
    constexpr int half = simd<double>::width;
    for (int l = 0; l < simd<T>::width; ++l) {
      const double v = value[l < g.n_valid ? l : 0];
      if constexpr (sizeof(T) == 8)
        s.a.set(l, v);
      else
        s.a[l / half].set(l % half, v);
    }
    return s;
  }
};

template <class T>
struct custom_work {
  hmc_work<T> hmc;
  simd<T> *gradient, *gradient_old;  // without a flow only: hmc.flow.gz and hmc.g_old otherwise
  custom_buffers<T> buffers;
  void plan(arena& mem, const lfq_phi4& lattice_only, const flow_plan<T>* f) {
    const int64_t volume = lattice(lattice_only.ndim, lattice_only.extent).volume;
    hmc.plan(mem, lattice_only, false, f);
    gradient = f ? hmc.flow.gz : mem.take<simd<T>>(volume);
    gradient_old = f ? hmc.g_old : mem.take<simd<T>>(volume);
    buffers.plan(mem, volume);
  }
};

template <class T, int D>
struct custom_potential {
  using V = simd<T>;
  phi4_group<T, D> theory;  // for its lattice
  hmc_work<T>& w;
  const custom_work<T>& work;
  const flow_plan<T>* plan;  // null without a flow
  const custom_action<T>& call;
  stop_flag& stop;
  const group<T>& g;
  bool gradient_known = false;

  custom_potential(const lfq_phi4& lattice_only, custom_work<T>& c, const flow_plan<T>* f, const custom_action<T>& action,
                   stop_flag& flag, const group<T>& chains)
      : theory(lattice_only, false, c.hmc.edge), w(c.hmc), work(c), plan(f), call(action), stop(flag), g(chains) {}

  const V* field() const { return plan ? w.phi : w.z; }

  // dS~/dz into work.gradient; with s also S~ without the flow's constant log-det, and the field.
  void gradient(lane_sum<T>* s) {
    const int64_t volume = theory.lat.volume;
    if (!plan) return work.buffers.gradient(call, stop, g, volume, w.z, work.gradient, s);
    const flow_group<T> flow{*plan, w.flow};
    site_sum<T> log_det;
    V* x = flow.template forward<memory::latents>(w.z, log_det, plan->n_layers);
    work.buffers.gradient(call, stop, g, volume, x, w.flow.g, s);
    if (s) {
      for (int64_t i = 0; i < volume; ++i) w.phi[i] = x[i];
      s->add(-1.0, log_det.sum());
    }
    flow.template backward<false>(w.z, x, V(T(-1)), plan->n_layers);
  }
  void start(double, lane_sum<T>& s) {
    gradient(&s);
    gradient_known = true;
  }
  void save() {
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.z_old[i] = w.z[i];
      work.gradient_old[i] = work.gradient[i];
      if (plan) w.phi_old[i] = w.phi[i];
    }
  }
  void settle(lane_mask<T> accept) {
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.z[i] = blend<T>(accept, w.z[i], w.z_old[i]);
      work.gradient[i] = blend<T>(accept, work.gradient[i], work.gradient_old[i]);
      if (plan) w.phi[i] = blend<T>(accept, w.phi[i], w.phi_old[i]);
    }
  }
  void kick_drift(double k, double d) {
    if (!gradient_known) gradient(nullptr);
    gradient_known = false;
    const V vk = V(T(-k)), vd = V(T(d));
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      w.pi[i] = fma(vk, work.gradient[i], w.pi[i]);
      w.z[i] = fma(vd, w.pi[i], w.z[i]);
    }
  }
  void last_kick(double k, lane_sum<T>& s, site_sum<T>& p2) {
    lane_sum<T> action;
    gradient(&action);
    s.add(1.0, action);
    gradient_known = true;
    const V vk = V(T(-k));
    for (int64_t i = 0; i < theory.lat.volume; ++i) {
      const V m = fma(vk, work.gradient[i], w.pi[i]);
      w.pi[i] = m;
      p2.add_product(i, m, m);
    }
  }
};

LFQ_NAMESPACE_END
