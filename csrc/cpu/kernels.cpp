// The kernel table of one instruction set and one type. Compiled once for each, with LFQ_ISA, LFQ_REAL and
// LFQ_REAL_NAME (double and f64, say) set by CMake.
#include "cpu/cluster_kernels.hpp"
#include "cpu/custom_kernels.hpp"
#include "cpu/fourier_kernels.hpp"
#include "cpu/heat_bath_kernels.hpp"
#include "cpu/hmc_kernels.hpp"
#include "cpu/table.hpp"

using lfq_internal::for_tasks;

LFQ_NAMESPACE_BEGIN

template <class T>
struct cpu_kernels {
  using V = simd<T>;

  static int status(const failures& f, lfq_failure* out) {
    if (out) *out = f.first;
    return f.any() ? LFQ_ERR_NOT_FINITE : LFQ_OK;
  }
  static int used_threads(int64_t n_tasks, int n_threads) {
    return n_tasks < n_threads ? (n_tasks > 0 ? int(n_tasks) : 1) : n_threads;
  }
  // Loads a group; false, with the failure reported, when a value is NaN or Inf.
  static bool load(const group<T>& g, const T* src, int64_t n, V* dst, failures& failed) {
    int64_t site = -1;
    const int lane = load_group(g, src, n, dst, &site);
    if (lane >= 0)
      failed.report(g.chain(lane), site + (g.slabs ? lane * g.sites(n, true) : 0), double(dst[site][lane]));
    return lane < 0;
  }
  static void store_lanes(const group<T>& g, const lane_sum<T>& s, double constant, double* out) {
    double total[V::width];
    g.totals(s, total);
    for (int l = 0; l < g.n_valid; ++l) out[g.first + l] = total[l] + constant;
  }

  static int normal(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains,
                    int64_t n, T* out, int n_threads) {
    auto body = [&](int64_t task, int) {
      const group<T> g(task, n_chains);
      constexpr int W = V::width;
      V tile[W];
      normals<T>(stream{seed, trajectory, uint32_t(purpose)}, first_chain, g, n, [&](int64_t i, V v) {
        tile[i % W] = v;
        const int64_t filled = i % W + 1;
        if (filled < W && i + 1 < n) return;
        transpose(tile);
        for (int l = 0; l < g.n_valid; ++l) memcpy(out + (g.first + l) * n + i + 1 - filled, &tile[l], filled * sizeof(T));
      });
    };
    for_tasks(group<T>::count(n_chains), n_threads, body);
    return LFQ_OK;
  }

  // ---- phi^4 -----------------------------------------------------------------------------
  struct field_work {
    V* field[3];
    halo<T> edge;
    void plan(arena& mem, const lfq_phi4& theory) {
      const bool split = splits<T>(theory);
      for (auto& f : field) f = mem.take<V>(group<T>::sites(lattice(theory.ndim, theory.extent).volume, split));
      edge.plan(mem, theory, split);
    }
  };
  // Per-thread work areas laid out one after another.
  template <class W, class F>
  static W thread_work(void* ws, size_t shared, int thread, F&& plan) {
    arena count;
    W w;
    plan(w, count);
    arena mem(ws);
    mem.used = shared + size_t(thread) * count.used;
    plan(w, mem);
    return w;
  }

  static size_t phi4_workspace(const lfq_phi4& theory, int64_t n_chains, int n_threads) {
    arena mem;
    field_work w;
    w.plan(mem, theory);
    return mem.bytes() + mem.used * size_t(used_threads(group<T>::count(n_chains, splits<T>(theory)), n_threads) - 1);
  }
  // body(theory, group, work) for every group whose field loads.
  template <class F>
  static int over_fields(const lfq_phi4& theory, int64_t n_chains, const T* phi, lfq_failure* failure, void* ws,
                         int n_threads, F&& body) {
    failures failed;
    const bool split = splits<T>(theory);
    with_dimension(theory.ndim, [&](auto d) {
      auto task = [&](int64_t index, int thread) {
        const auto w = thread_work<field_work>(ws, 0, thread, [&](field_work& f, arena& mem) { f.plan(mem, theory); });
        const phi4_group<T, decltype(d)::value> kernel(theory, split, w.edge);
        const group<T> g(index, n_chains, split);
        if (load(g, phi, kernel.whole.volume, w.field[0], failed)) body(kernel, g, w);
      };
      for_tasks(group<T>::count(n_chains, split), n_threads, task);
    });
    return status(failed, failure);
  }
  static int action(const lfq_phi4& theory, int64_t n_chains, const T* phi, double* s, lfq_failure* failure, void* ws,
                    int n_threads) {
    return over_fields(theory, n_chains, phi, failure, ws, n_threads, [&](const auto& k, const group<T>& g, const field_work& w) {
      site_sum<T> sum;
      k.action(w.field[0], sum);
      store_lanes(g, sum.sum(), 0.0, s);
    });
  }
  static int force(const lfq_phi4& theory, int64_t n_chains, const T* phi, T* f, lfq_failure* failure, void* ws,
                   int n_threads) {
    return over_fields(theory, n_chains, phi, failure, ws, n_threads, [&](const auto& k, const group<T>& g, const field_work& w) {
      k.force(w.field[0], w.field[1]);
      store_group(g, w.field[1], k.whole.volume, f);
    });
  }
  static int observables(const lfq_phi4& theory, int64_t n_chains, const T* phi, const double* smear, double* obs,
                         lfq_failure* failure, void* ws, int n_threads) {
    return over_fields(theory, n_chains, phi, failure, ws, n_threads, [&](const auto& k, const group<T>& g, const field_work& w) {
      measure(k, w.field[0], smear, w.field[1], w.field[2], g, obs);
    });
  }

  // ---- flows -----------------------------------------------------------------------------
  // Groups of one slot sum their weight gradient in order; the number of slots does not depend on threads.
  static constexpr int64_t max_slots = 32;
  static int64_t slots(int64_t n_groups) { return n_groups < max_slots ? n_groups : max_slots; }

  struct call_work {
    V *z, *dz;
    flow_work<T> flow;
    void plan(arena& mem, const flow_plan<T>& f) {
      z = mem.take<V>(f.volume);
      dz = mem.take<V>(f.volume);
      flow.plan(mem, f, true, true);
    }
  };
  struct shared_work {
    flow_plan<T> flow;
    double* gradient;  // [slot][weight]
    size_t bytes;
    shared_work(void* ws, const lfq_flow& f, int64_t n_chains) {
      arena mem(ws);
      flow.plan(mem, f);
      gradient = mem.take<double>(slots(group<T>::count(n_chains)) * f.n_weights);
      bytes = mem.used;
    }
    template <class W = call_work>
    W thread(void* ws, int thread) const {
      return thread_work<W>(ws, bytes, thread, [&](W& w, arena& mem) { w.plan(mem, flow); });
    }
  };
  static size_t flow_workspace(const lfq_flow& f, int64_t n_chains, int n_threads) {
    const shared_work shared(nullptr, f, n_chains);
    arena mem;
    call_work w;
    w.plan(mem, shared.flow);
    return shared.bytes + mem.used * size_t(used_threads(group<T>::count(n_chains), n_threads)) + 64;
  }

  static int forward(const lfq_flow& f, int64_t n_chains, const T* z, T* x, double* log_det, lfq_failure* failure,
                     void* ws, int n_threads) {
    failures failed;
    const shared_work shared(ws, f, n_chains);
    auto task = [&](int64_t index, int thread) {
      const call_work w = shared.thread(ws, thread);
      const group<T> g(index, n_chains);
      if (!load(g, z, f.volume, w.z, failed)) return;
      site_sum<T> sum;
      const V* y = flow_group<T>{shared.flow, w.flow}.template forward<memory::none>(w.z, sum, shared.flow.n_layers);
      store_group(g, y, f.volume, x);
      store_lanes(g, sum.sum(), shared.flow.log_det_constant, log_det);
    };
    for_tasks(group<T>::count(n_chains), n_threads, task);
    return status(failed, failure);
  }
  static int inverse(const lfq_flow& f, int64_t n_chains, const T* x, T* z, double* log_det, lfq_failure* failure,
                     void* ws, int n_threads) {
    failures failed;
    const shared_work shared(ws, f, n_chains);
    auto task = [&](int64_t index, int thread) {
      const call_work w = shared.thread(ws, thread);
      const group<T> g(index, n_chains);
      if (!load(g, x, f.volume, w.flow.x, failed)) return;
      site_sum<T> sum;
      flow_group<T>{shared.flow, w.flow}.inverse(w.z, sum);
      store_group(g, w.z, f.volume, z);
      store_lanes(g, sum.sum(), -shared.flow.log_det_constant, log_det);
    };
    for_tasks(group<T>::count(n_chains), n_threads, task);
    return status(failed, failure);
  }
  static void sum_slots(const shared_work& shared, int64_t n_groups, double factor, double* dweights) {
    const int64_t n = shared.flow.n_weights;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t s = 0; s < slots(n_groups); ++s) sum += shared.gradient[s * n + i];
      dweights[i] = sum * factor;
    }
  }
  // body(group, work, flow) for every group, slot by slot, with the weight gradient gathered when wanted.
  template <class W = call_work, class F>
  static void over_slots(const shared_work& shared, int64_t n_chains, void* ws, int n_threads, bool weights, F&& body) {
    const int64_t n_groups = group<T>::count(n_chains), n_slots = slots(n_groups), n = shared.flow.n_weights;
    auto task = [&](int64_t slot, int thread) {
      const W w = shared.template thread<W>(ws, thread);
      const flow_group<T> flow{shared.flow, w.flow};
      double* gradient = shared.gradient + slot * n;
      for (int64_t i = 0; i < n; ++i) gradient[i] = 0;
      if (weights) flow.clear_weight_sums();
      for (int64_t index = slot * n_groups / n_slots; index < (slot + 1) * n_groups / n_slots; ++index) {
        if (!body(group<T>(index, n_chains), w, flow)) return;
      }
      if (weights) flow.store_weight_sums(gradient);
    };
    for_tasks(n_slots, n_threads, task);
  }
  static int vjp(const lfq_flow& f, int64_t n_chains, const T* z, const T* dx, const double* dlog_det, T* dz,
                 double* dweights, lfq_failure* failure, void* ws, int n_threads) {
    failures failed;
    const shared_work shared(ws, f, n_chains);
    over_slots(shared, n_chains, ws, n_threads, dweights != nullptr,
               [&](const group<T>& g, const call_work& w, const flow_group<T>& flow) {
                 if (!load(g, z, f.volume, w.z, failed)) return false;
                 site_sum<T> sum;
                 const int n = shared.flow.n_layers;
                 V* x = dweights ? flow.template forward<memory::weights>(w.z, sum, n)
                                 : flow.template forward<memory::latents>(w.z, sum, n);
                 if (!load(g, dx, f.volume, w.flow.g, failed)) return false;
                 V gl(T(0));
                 for (int l = 0; l < g.n_valid; ++l) gl.set(l, T(dlog_det[g.first + l]));
                 if (dweights) {
                   const lane_mask<T> keep = chains_of(g);
                   for (int64_t i = 0; i < f.volume; ++i) w.flow.g[i] = masked<T>(keep, w.flow.g[i]);
                   flow.template backward<true>(w.z, x, gl, n);
                 } else {
                   flow.template backward<false>(w.z, x, gl, n);
                 }
                 store_group(g, w.flow.gz, f.volume, dz);
                 return true;
               });
    if (dweights) sum_slots(shared, group<T>::count(n_chains), 1.0, dweights);
    return status(failed, failure);
  }
  // Lanes that are not chains must not enter sums over chains.
  static lane_mask<T> chains_of(const group<T>& g) {
    lane_mask<T> keep = {};
    for (int l = 0; l < g.n_valid; ++l) keep[l] = ~lane_mask_bits<T>(0);
    return keep;
  }
  static int loss(const lfq_flow& f, const lfq_phi4& theory, int64_t n_chains, const T* z, double* action,
                  double* log_det, double* dweights, lfq_failure* failure, void* ws, int n_threads) {
    failures failed;
    const shared_work shared(ws, f, n_chains);
    with_dimension(theory.ndim, [&](auto d) {
      const phi4_group<T, decltype(d)::value> kernel(theory, false, halo<T>());
      over_slots(shared, n_chains, ws, n_threads, true,
                 [&](const group<T>& g, const call_work& w, const flow_group<T>& flow) {
                   if (!load(g, z, f.volume, w.z, failed)) return false;
                   V gl(T(0));
                   for (int l = 0; l < g.n_valid; ++l) gl.set(l, T(-1));
                   site_sum<T> s, ld;
                   target_gradient<true, true>(kernel, flow, w.z, gl, chains_of(g), s, ld, static_cast<V*>(nullptr));
                   store_lanes(g, s.sum(), 0.0, action);
                   store_lanes(g, ld.sum(), shared.flow.log_det_constant, log_det);
                   return true;
                 });
    });
    sum_slots(shared, group<T>::count(n_chains), 1.0 / double(n_chains), dweights);
    return status(failed, failure);
  }

  // ---- HMC -------------------------------------------------------------------------------
  struct hmc_shared {
    flow_plan<T> flow;
    size_t bytes = 0;
    hmc_shared(void* ws, const lfq_flow* f) {
      arena mem(ws);
      if (f) flow.plan(mem, *f);
      bytes = mem.used;
    }
  };
  static size_t hmc_workspace(const lfq_flow* f, const lfq_phi4& theory, int64_t n_chains, int n_threads) {
    const hmc_shared shared(nullptr, f);
    arena mem;
    hmc_work<T> w;
    const bool split = !f && splits<T>(theory);
    w.plan(mem, theory, split, f ? &shared.flow : nullptr);
    return shared.bytes + mem.used * size_t(used_threads(group<T>::count(n_chains, split), n_threads)) + 64;
  }
  // body(potential, group) for every group whose z loads.
  template <class F>
  static int over_potentials(const lfq_flow* f, const lfq_phi4& theory, int64_t n_chains, const T* z,
                             lfq_failure* failure, void* ws, int n_threads, F&& body) {
    failures failed;
    const hmc_shared shared(ws, f);
    const bool split = !f && splits<T>(theory);
    with_dimension(theory.ndim, [&](auto d) {
      constexpr int D = decltype(d)::value;
      auto task = [&](int64_t index, int thread) {
        auto w = thread_work<hmc_work<T>>(ws, shared.bytes, thread, [&](hmc_work<T>& h, arena& mem) {
          h.plan(mem, theory, split, f ? &shared.flow : nullptr);
        });
        const group<T> g(index, n_chains, split);
        if (!load(g, z, lattice(D, theory.extent).volume, w.z, failed)) return;
        if (f) {
          pulled_back_potential<T, D> p(theory, w, shared.flow);
          body(p, g, shared, failed);
        } else {
          phi4_potential<T, D> p{phi4_group<T, D>(theory, split, w.edge), w};
          body(p, g, shared, failed);
        }
      };
      for_tasks(group<T>::count(n_chains, split), n_threads, task);
    });
    return status(failed, failure);
  }
  static int pullback(const lfq_flow& f, const lfq_phi4& theory, int64_t n_chains, const T* z, double* action, T* force,
                      lfq_failure* failure, void* ws, int n_threads) {
    failures failed;
    const shared_work shared(ws, f, n_chains);
    with_dimension(theory.ndim, [&](auto d) {
      const phi4_group<T, decltype(d)::value> kernel(theory, false, halo<T>());
      auto task = [&](int64_t index, int thread) {
        const call_work w = shared.thread(ws, thread);
        const group<T> g(index, n_chains);
        if (!load(g, z, f.volume, w.z, failed)) return;
        const flow_group<T> flow{shared.flow, w.flow};
        site_sum<T> s, ld;
        target_gradient<false, true>(kernel, flow, w.z, V(T(-1)), lane_mask<T>{}, s, ld, static_cast<V*>(nullptr));
        s.total.add(-1.0, ld.sum());
        store_lanes(g, s.sum(), -shared.flow.log_det_constant, action);
        for (int64_t i = 0; i < f.volume; ++i) w.flow.gz[i] = -w.flow.gz[i];
        store_group(g, w.flow.gz, f.volume, force);
      };
      for_tasks(group<T>::count(n_chains), n_threads, task);
    });
    return status(failed, failure);
  }
  template <class P>
  static void evolve_group(P& p, const lfq_hmc& h, const group<T>& g, T* z, T* momenta, failures& failed) {
    const int64_t volume = p.theory.whole.volume, sites = p.theory.lat.volume;
    if (!load(g, momenta, volume, p.w.pi, failed)) return;
    const V unit(T(momentum_unit(h)));
    for (int64_t i = 0; i < sites; ++i) p.w.pi[i] = p.w.pi[i] * unit;
    lane_sum<T> s;
    site_sum<T> p2;
    trajectory<T>(p, h, s, p2);
    for (int64_t i = 0; i < sites; ++i) p.w.pi[i] = p.w.pi[i] / unit;
    store_group(g, p.w.z, volume, z);
    store_group(g, p.w.pi, volume, momenta);
  }
  // phi, where wanted: the field of z, which is a latent
  template <class P>
  static void hmc_group(P& p, const lfq_hmc& h, const group<T>& g, const hmc_output& out, T* z, T* phi,
                        failures& failed) {
    const int64_t volume = p.theory.whole.volume;
    const bool good = run_hmc<T>(p, h, g, out, failed);
    store_group(g, p.w.z, volume, z);
    if (phi && good) store_group(g, p.field(), volume, phi);
  }
  static int evolve(const lfq_flow* f, const lfq_phi4& theory, const lfq_hmc& h, int64_t n_chains, T* z, T* momenta,
                    lfq_failure* failure, void* ws, int n_threads) {
    return over_potentials(f, theory, n_chains, z, failure, ws, n_threads,
                           [&](auto& p, const group<T>& g, const hmc_shared&, failures& failed) {
                             evolve_group(p, h, g, z, momenta, failed);
                           });
  }
  static int hmc(const lfq_flow* f, const lfq_phi4& theory, const lfq_hmc& h, int64_t n_chains, T* z, T* phi,
                 double* dh, uint8_t* accepted, const double* smear, double* obs, lfq_failure* failure, void* ws,
                 int n_threads) {
    const hmc_output out = {dh, accepted, smear, obs, n_chains};
    return over_potentials(f, theory, n_chains, z, failure, ws, n_threads,
                           [&](auto& p, const group<T>& g, const hmc_shared&, failures& failed) {
                             hmc_group(p, h, g, out, z, phi, failed);
                           });
  }

  // ---- Fourier acceleration ----------------------------------------------------------------
  static size_t fourier_workspace(const lfq_phi4& theory, int64_t n_chains, int n_threads) {
    arena shared, each;
    fourier_plan<T> plan;
    plan.plan(shared, theory);
    fourier_work<T> w;
    w.plan(each, theory);
    return shared.bytes() + each.used * size_t(used_threads(group<T>::count(n_chains), n_threads));
  }
  // body(potential, group, failures) for every group whose fields load.
  template <class F>
  static int over_modes(const lfq_phi4& theory, double mass, int64_t n_chains, const T* phi, lfq_failure* failure,
                        void* ws, int n_threads, F&& body) {
    failures failed;
    fourier_plan<T> plan;
    arena shared(ws);
    plan.plan(shared, theory);
    plan.fill(mass);
    with_dimension(theory.ndim, [&](auto d) {
      constexpr int D = decltype(d)::value;
      auto task = [&](int64_t index, int thread) {
        auto w = thread_work<fourier_work<T>>(ws, shared.used, thread,
                                              [&](fourier_work<T>& f, arena& mem) { f.plan(mem, theory); });
        const group<T> g(index, n_chains);
        if (!load(g, phi, plan.lat.volume, w.hmc.z, failed)) return;
        fourier_potential<T, D> p(theory, w, plan);
        body(p, g, failed);
      };
      for_tasks(group<T>::count(n_chains), n_threads, task);
    });
    return status(failed, failure);
  }
  static int fourier_evolve(const lfq_phi4& theory, const lfq_hmc& h, double mass, int64_t n_chains, T* phi, T* momenta,
                            lfq_failure* failure, void* ws, int n_threads) {
    return over_modes(theory, mass, n_chains, phi, failure, ws, n_threads,
                      [&](auto& p, const group<T>& g, failures& failed) {
                        evolve_group(p, h, g, phi, momenta, failed);
                      });
  }
  static int fourier_hmc(const lfq_phi4& theory, const lfq_hmc& h, double mass, int64_t n_chains, T* phi, double* dh,
                         uint8_t* accepted, const double* smear, double* obs, lfq_failure* failure, void* ws,
                         int n_threads) {
    const hmc_output out = {dh, accepted, smear, obs, n_chains};
    return over_modes(theory, mass, n_chains, phi, failure, ws, n_threads,
                      [&](auto& p, const group<T>& g, failures& failed) {
                        hmc_group(p, h, g, out, phi, nullptr, failed);
                      });
  }

  // ---- embedded clusters --------------------------------------------------------------------
  static size_t cluster_workspace(const lfq_phi4& theory, int64_t n_chains, int n_threads) {
    arena mem;
    cluster_work w;
    w.plan(mem, theory);
    return mem.used * size_t(used_threads(n_chains, n_threads)) + 64;
  }
  static int cluster(const lfq_phi4& theory, const lfq_cluster& c, uint64_t seed, uint64_t first_chain,
                     uint64_t trajectory, int64_t n_chains, T* phi, int64_t* flipped, lfq_failure* failure, void* ws,
                     int n_threads) {
    failures failed;
    with_dimension(theory.ndim, [&](auto d) {
      auto task = [&](int64_t chain, int thread) {
        const auto w = thread_work<cluster_work>(ws, 0, thread, [&](cluster_work& f, arena& mem) { f.plan(mem, theory); });
        const cluster_chain<T, decltype(d)::value> kernel(theory, w, seed, trajectory, first_chain + uint64_t(chain));
        T* field = phi + chain * kernel.lat.volume;
        int64_t n = 0;
        const int64_t bad = kernel.run(c, field, &n);
        if (bad >= 0) failed.report(chain, bad, double(field[bad]));
        if (flipped) flipped[chain] = n;
      };
      for_tasks(n_chains, n_threads, task);
    });
    return status(failed, failure);
  }

  // ---- local heat bath ----------------------------------------------------------------------
  static size_t heat_bath_workspace(const lfq_phi4& theory, int64_t n_chains, int n_threads) {
    arena mem;
    heat_bath_work<T> w;
    w.plan(mem, theory);
    return mem.used * size_t(used_threads(group<T>::count(n_chains, splits_checkerboard<T>(theory)), n_threads)) + 64;
  }
  static int heat_bath(const lfq_phi4& theory, const lfq_heat_bath& h, int64_t n_chains, T* phi, int64_t* changed,
                       const double* smear, double* obs, lfq_failure* failure, void* ws, int n_threads) {
    failures failed;
    const bool split = splits_checkerboard<T>(theory);
    const heat_bath_output out = {changed, smear, obs, n_chains};
    with_dimension(theory.ndim, [&](auto d) {
      auto task = [&](int64_t index, int thread) {
        const auto w = thread_work<heat_bath_work<T>>(ws, 0, thread,
                                                      [&](heat_bath_work<T>& f, arena& mem) { f.plan(mem, theory); });
        const heat_bath_group<T, decltype(d)::value> kernel(theory, split, w.edge);
        const group<T> g(index, n_chains, split);
        if (!load(g, phi, kernel.theory.whole.volume, w.phi, failed)) return;
        run_heat_bath(kernel, w, h, g, out);
        store_group(g, w.phi, kernel.theory.whole.volume, phi);
      };
      for_tasks(group<T>::count(n_chains, split), n_threads, task);
    });
    return status(failed, failure);
  }
  // ---- actions of the caller ---------------------------------------------------------------
  static lfq_phi4 lattice_of(const custom_action<T>& a) {
    lfq_phi4 t = {};
    t.ndim = a.ndim;
    for (int i = 0; i < a.ndim; ++i) t.extent[i] = a.extent[i];
    return t;
  }
  static int status(const failures& f, const stop_flag& stop, lfq_failure* out) {
    if (!stop.up()) return status(f, out);
    if (out) *out = {f.first.chain, f.first.step, double(stop.code)};
    return LFQ_ERR_CALLBACK;
  }
  struct custom_loss_work : call_work {
    custom_buffers<T> buffers;
    void plan(arena& mem, const flow_plan<T>& f) {
      call_work::plan(mem, f);
      buffers.plan(mem, f.volume);
    }
  };
  // Enough for HMC and, with a flow, for the loss.
  static size_t custom_workspace(const lfq_flow* f, const custom_action<T>& action, int64_t n_chains, int n_threads) {
    const size_t n = size_t(used_threads(group<T>::count(n_chains), n_threads));
    const hmc_shared shared(nullptr, f);
    arena mem;
    custom_work<T> w;
    w.plan(mem, lattice_of(action), f ? &shared.flow : nullptr);
    const size_t hmc = shared.bytes + mem.used * n + 64;
    if (!f) return hmc;
    const shared_work slots(nullptr, *f, n_chains);
    arena each;
    custom_loss_work l;
    l.plan(each, slots.flow);
    const size_t loss = slots.bytes + each.used * n + 64;
    return loss > hmc ? loss : hmc;
  }
  // body(potential, group, shared, failures) for every group whose z loads.
  template <class F>
  static int over_custom(const lfq_flow* f, const custom_action<T>& action, int64_t n_chains, const T* z,
                         lfq_failure* failure, void* ws, int n_threads, F&& body) {
    failures failed;
    stop_flag stop;
    const lfq_phi4 lattice_only = lattice_of(action);
    const hmc_shared shared(ws, f);
    const flow_plan<T>* plan = f ? &shared.flow : nullptr;
    with_dimension(action.ndim, [&](auto d) {
      constexpr int D = decltype(d)::value;
      auto task = [&](int64_t index, int thread) {
        auto w = thread_work<custom_work<T>>(ws, shared.bytes, thread,
                                             [&](custom_work<T>& c, arena& mem) { c.plan(mem, lattice_only, plan); });
        const group<T> g(index, n_chains);
        if (!load(g, z, lattice(D, action.extent).volume, w.hmc.z, failed)) return;
        custom_potential<T, D> p(lattice_only, w, plan, action, stop, g);
        body(p, g, shared, failed);
      };
      for_tasks(group<T>::count(n_chains), n_threads, task);
    });
    return status(failed, stop, failure);
  }
  static int custom_force(const lfq_flow* f, const custom_action<T>& action, int64_t n_chains, const T* z, double* s,
                          T* force, lfq_failure* failure, void* ws, int n_threads) {
    return over_custom(f, action, n_chains, z, failure, ws, n_threads,
                       [&](auto& p, const group<T>& g, const hmc_shared& shared, failures&) {
                         lane_sum<T> sum;
                         p.gradient(&sum);
                         store_lanes(g, sum, f ? -shared.flow.log_det_constant : 0.0, s);
                         const int64_t volume = p.theory.lat.volume;
                         for (int64_t i = 0; i < volume; ++i) p.work.gradient[i] = -p.work.gradient[i];
                         store_group(g, p.work.gradient, volume, force);
                       });
  }
  static int custom_evolve(const lfq_flow* f, const custom_action<T>& action, const lfq_hmc& h, int64_t n_chains, T* z,
                           T* momenta, lfq_failure* failure, void* ws, int n_threads) {
    return over_custom(f, action, n_chains, z, failure, ws, n_threads,
                       [&](auto& p, const group<T>& g, const hmc_shared&, failures& failed) {
                         evolve_group(p, h, g, z, momenta, failed);
                       });
  }
  static int custom_hmc(const lfq_flow* f, const custom_action<T>& action, const lfq_hmc& h, int64_t n_chains, T* z, T* phi,
                        double* dh, uint8_t* accepted, const double* smear, double* obs, lfq_failure* failure, void* ws,
                        int n_threads) {
    const hmc_output out = {dh, accepted, smear, obs, n_chains};
    return over_custom(f, action, n_chains, z, failure, ws, n_threads,
                       [&](auto& p, const group<T>& g, const hmc_shared&, failures& failed) {
                         hmc_group(p, h, g, out, z, phi, failed);
                       });
  }
  static int custom_loss(const lfq_flow& f, const custom_action<T>& action, int64_t n_chains, const T* z, double* s,
                         double* log_det, double* dweights, lfq_failure* failure, void* ws, int n_threads) {
    failures failed;
    stop_flag stop;
    const shared_work shared(ws, f, n_chains);
    over_slots<custom_loss_work>(shared, n_chains, ws, n_threads, true,
                                 [&](const group<T>& g, const custom_loss_work& w, const flow_group<T>& flow) {
      if (!load(g, z, f.volume, w.z, failed)) return false;
      site_sum<T> ld;
      lane_sum<T> sum;
      V* x = flow.template forward<memory::weights>(w.z, ld, shared.flow.n_layers);
      w.buffers.gradient(action, stop, g, f.volume, x, w.flow.g, &sum);
      const lane_mask<T> keep = chains_of(g);
      for (int64_t i = 0; i < f.volume; ++i) w.flow.g[i] = masked<T>(keep, w.flow.g[i]);
      flow.template backward<true>(w.z, x, masked<T>(keep, V(T(-1))), shared.flow.n_layers);
      store_lanes(g, sum, 0.0, s);
      store_lanes(g, ld.sum(), shared.flow.log_det_constant, log_det);
      return true;
    });
    sum_slots(shared, group<T>::count(n_chains), 1.0 / double(n_chains), dweights);
    return status(failed, stop, failure);
  }

  static const lfq_internal::kernels<T> table;
};

template <class T>
const lfq_internal::kernels<T> cpu_kernels<T>::table = {
    normal,  phi4_workspace, action, force,    observables,   flow_workspace, forward,
    inverse, vjp,            loss,   pullback, hmc_workspace, evolve,         hmc,
    fourier_workspace, fourier_evolve, fourier_hmc, cluster_workspace, cluster, heat_bath_workspace, heat_bath,
    custom_workspace, custom_force, custom_evolve, custom_hmc, custom_loss};

LFQ_NAMESPACE_END

// table_<isa>_<type>, found by csrc/capi/isa.cpp.
#define LFQ_PASTE(isa, type) table_##isa##_##type
#define LFQ_TABLE(isa, type) LFQ_PASTE(isa, type)

namespace lfq_internal {
extern const kernels<LFQ_REAL>* const LFQ_TABLE(LFQ_ISA, LFQ_REAL_NAME);
const kernels<LFQ_REAL>* const LFQ_TABLE(LFQ_ISA, LFQ_REAL_NAME) = &lfq::LFQ_ISA::cpu_kernels<LFQ_REAL>::table;
}  // namespace lfq_internal
