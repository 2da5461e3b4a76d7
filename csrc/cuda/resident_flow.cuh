// The papers' flow, a coupling of each sublattice without hidden layers and perhaps a rescale, with a chain in the registers
// of one block: latent, field, gradient, momenta, and what backward needs. The nets see nearest neighbours only, so
// that tiles exchange no more than their edges.
#pragma once
#include "cuda/flow.cuh"
#include "cuda/resident.cuh"

LFQ_NAMESPACE_BEGIN

// Where the weights lie; -1 where there are none.
struct resident_layers {
  int64_t net[2], bias[2], rescale;
};

// What a net multiplies the neighbours by, for both outputs. The site below is the one before along the first axis.
template <class T>
struct __align__(16) near_net {
  T below[2], left[2], right[2], above[2], bias[2];
};

template <class T, int R>
struct resident_flow {
  static_assert(R % 2 == 0, "a row's parity is known to the compiler");
  const tile<2, R> own;
  const near_net<T>* const nets;
  const T factor;
  T *from, *to;
  // The latent; the field before the rescale; the gradient by what was last undone.
  lanes<T, 4> z[R], x[R], g[R];
  // Of a row's two sites that a coupling changes, h and the slope; in backward, h gives way to dL/du.
  T h[2][R][2][2], slope[2][R][2];

  LFQ_DEVICE resident_flow(const lfq_phi4& lattice, const near_net<T>* n, T rescale, T* shared)
      : own(lattice), nets(n), factor(rescale), from(shared), to(shared + int64_t(lattice.extent[0]) * lattice.extent[1]) {}

  // Coupling S changes sites whose coordinates' sum is even for S = 0, odd for 1: the first of a row's two, and the other
  // sublattice's.
  static LFQ_DEVICE constexpr int first(int S, int r) { return (r + S) & 1; }

  LFQ_DEVICE void swap_rows() {
    T* const t = from;
    from = to;
    to = t;
    __syncthreads();
  }
  LFQ_DEVICE void publish(const lanes<T, 4> (&rows)[R]) {
    lfq::store(to + own.block, rows[0]);
    lfq::store(to + own.block + (R - 1) * own.slice, rows[R - 1]);
    swap_rows();
  }

  // Calls f(r, j, column, u) for the sites that coupling S changes, with the outputs of its net; f may change x there.
  template <int S, class F>
  LFQ_DEVICE void net(F&& f) {
    publish(x);
    const near_net<T> w = nets[S];
    lanes<T, 4> below = lfq::load<4>(from + own.below);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const lanes<T, 4> above = r + 1 < R ? x[r + 1 < R ? r + 1 : r] : lfq::load<4>(from + own.above);
      const int odd = first(S, r);
      const T beyond = __shfl_sync(0xffffffffu, odd ? x[r].v[0] : x[r].v[3], odd ? own.right : own.left);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 2 * j + odd;
        const T left = c > 0 ? x[r].v[c > 0 ? c - 1 : 0] : beyond, right = c < 3 ? x[r].v[c < 3 ? c + 1 : 3] : beyond;
        T u[2];
#pragma unroll
        for (int o = 0; o < 2; ++o)
          u[o] = fma(w.above[o], above.v[c], fma(w.right[o], right, fma(w.left[o], left, fma(w.below[o], below.v[c], w.bias[o]))));
        f(r, j, c, u);
      }
      below = x[r];
    }
  }
  template <int S>
  LFQ_DEVICE void couple() {
    net<S>([&](int r, int j, int c, const T(&u)[2]) {
      const coupled_site<T, 2> a = couple_site<scale_kind::neg_abs>(x[r].v[c], u, nullptr);
      h[S][r][j][0] = a.h[0];
      h[S][r][j][1] = a.h[1];
      slope[S][r][j] = a.slope;
      x[r].v[c] = a.y;
    });
  }
  LFQ_DEVICE void forward() {
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = z[r];
    couple<0>();
    couple<1>();
  }
  // After forward: the thread's share of the log-det, but for the rescale's.
  LFQ_DEVICE double log_det() const {
    double sum = 0;
    coupled_site<T, 2> a;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        T row = T(0);
        for (int j = 0; j < 2; ++j) {
          a.h[0] = h[s][r][j][0];
          row += log_slope<scale_kind::neg_abs>(a, nullptr);
        }
        sum += double(row);
      }
    return sum;
  }
  template <int S>
  LFQ_DEVICE void uncouple(double& log_det) {
    net<S>([&](int r, int, int c, const T(&u)[2]) {
      T log_dy;
      x[r].v[c] = uncouple_site<scale_kind::neg_abs>(x[r].v[c], u, nullptr, log_dy);
      log_det -= double(log_dy);
    });
  }

  // dS/dx of the rescaled field into g; the thread's share of S where it is wanted.
  LFQ_DEVICE double action_gradient(const phi4_site<T>& site, bool wanted) {
    publish(x);
    double s = 0;
    lanes<T, 4> below = lfq::load<4>(from + own.below);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const lanes<T, 4> above = r + 1 < R ? x[r + 1 < R ? r + 1 : r] : lfq::load<4>(from + own.above);
      const T left = __shfl_sync(0xffffffffu, x[r].v[3], own.left), right = __shfl_sync(0xffffffffu, x[r].v[0], own.right);
      T row = T(0);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const T ahead = above.v[c] + (c < 3 ? x[r].v[c < 3 ? c + 1 : 3] : right);
        const T behind = below.v[c] + (c > 0 ? x[r].v[c > 0 ? c - 1 : 0] : left);
        const T phi = factor * x[r].v[c];
        g[r].v[c] = factor * site.gradient(phi, phi * phi, site.beta * (factor * (ahead + behind)));
        if (wanted) row += site.action(phi, factor * ahead);
      }
      if (wanted) s += double(row);
      below = x[r];
    }
    return s;
  }

  // Undoes coupling S in g. WEIGHTS: adds its share of dL/dweights to `sum`, in the order of near_net.
  template <int S, bool WEIGHTS>
  LFQ_DEVICE void couple_backward(T dlog_det, T (&sum)[10]) {
    const near_net<T> w = nets[S];
    lanes<T, 4> edge[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 2 * j + first(S, r);
        const T of[2] = {h[S][r][j][0], h[S][r][j][1]};
        T du[2];
        g[r].v[c] = couple_site_backward<scale_kind::neg_abs>(of, nullptr, slope[S][r][j], z[r].v[c], g[r].v[c], dlog_det, du);
        for (int o = 0; o < 2; ++o) {
          edge[r].v[2 * j + o] = h[S][r][j][o] = du[o];
          if (WEIGHTS) sum[8 + o] += du[o];
        }
      }
    publish(edge);
    lanes<T, 4> below = lfq::load<4>(from + own.below);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const lanes<T, 4> above = r + 1 < R ? edge[r + 1 < R ? r + 1 : r] : lfq::load<4>(from + own.above);
      const int odd = first(S, r);
      T beyond[2];
      for (int o = 0; o < 2; ++o)
        beyond[o] = __shfl_sync(0xffffffffu, h[S][r][odd ? 1 : 0][o], odd ? own.left : own.right);
      // A frozen site gathers from those that see it: from the one above, where it was the site below.
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 2 * j + 1 - odd;
        const T value = S == 0 ? z[r].v[c] : x[r].v[c];
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const T left = odd == 0 ? h[S][r][j][o] : j > 0 ? h[S][r][0][o] : beyond[o];
          const T right = odd == 1 ? h[S][r][j][o] : j < 1 ? h[S][r][1][o] : beyond[o];
          const T over = above.v[2 * j + o], under = below.v[2 * j + o];
          g[r].v[c] = fma(w.below[o], over, fma(w.above[o], under, fma(w.left[o], right, fma(w.right[o], left, g[r].v[c]))));
          if (WEIGHTS) {
            sum[o] = fma(value, over, sum[o]);
            sum[2 + o] = fma(value, right, sum[2 + o]);
            sum[4 + o] = fma(value, left, sum[4 + o]);
            sum[6 + o] = fma(value, under, sum[6 + o]);
          }
        }
      }
      below = edge[r];
    }
  }

  // ---- between registers and device memory ------------------------------------------------------
  template <class F>
  LFQ_DEVICE void rows_of(T* field, F&& f) const {
#pragma unroll
    for (int r = 0; r < R; ++r) f(r, field + own.block + r * own.slice);
  }
  LFQ_DEVICE void load(const T* field, lanes<T, 4> (&rows)[R]) const {
    const bool whole = aligned(field);
    rows_of(const_cast<T*>(field), [&](int r, const T* row) { rows[r] = whole ? lfq::load<4>(row) : lfq::load<4, false>(row); });
  }
  LFQ_DEVICE void store(T* field, const lanes<T, 4> (&rows)[R], T scale = T(1)) const {
    const bool whole = aligned(field);
    rows_of(field, [&](int r, T* row) {
      lanes<T, 4> q = rows[r];
      for (int c = 0; c < 4; ++c) q.v[c] *= scale;
      if (whole)
        lfq::store(row, q);
      else
        store_sites(row, q);
    });
  }
};

// ---- HMC of the pulled-back theory ------------------------------------------------------------------
template <class T, int R>
struct resident_pulled_back {
  const hmc_arguments& a;
  const phi4_site<T> site;
  resident_flow<T, R> flow;
  lanes<T, 4> p[R];
  T* const latent;  // of the chain, the last accepted one
  bool gradient_known = false;

  LFQ_DEVICE resident_pulled_back(const hmc_arguments& arguments, const near_net<T>* nets, T factor, T* shared, T* chain)
      : a(arguments), site(arguments.theory.beta, arguments.theory.lam), flow(arguments.theory, nets, factor, shared), latent(chain) {
    flow.load(latent, flow.z);
  }

  // dS~/dz into flow.g; the thread's share of S~ but for its constant, where it is wanted.
  LFQ_DEVICE double gradient(bool wanted) {
    flow.forward();
    double s = flow.action_gradient(site, wanted);
    if (wanted) s -= flow.log_det();
    T none[10];
    flow.template couple_backward<1, false>(T(-1), none);
    flow.template couple_backward<0, false>(T(-1), none);
    gradient_known = true;
    return flow.own.counts ? s : 0.0;
  }
  LFQ_DEVICE double start() { return gradient(true); }
  LFQ_DEVICE double refresh(const stream& rng, uint32_t chain, double unit) {
    return fill_momenta(flow.own, rng, chain, T(unit), p);
  }
  LFQ_DEVICE void kick_drift(int kick, int drift) {
    if (!gradient_known) gradient(false);
    gradient_known = false;
    const T k(-a.steps.kick[kick]), d(a.steps.drift[drift]);
#pragma unroll
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 4; ++c) {
        p[r].v[c] = fma(k, flow.g[r].v[c], p[r].v[c]);
        flow.z[r].v[c] = fma(d, p[r].v[c], flow.z[r].v[c]);
      }
  }
  LFQ_DEVICE void last_kick(int kick, double& s, double& p2) {
    s = gradient(true);
    const T k(-a.steps.kick[kick]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < 4; ++c) p[r].v[c] = fma(k, flow.g[r].v[c], p[r].v[c]);
      p2 += squares(p[r]);
    }
    if (!flow.own.counts) p2 = 0;
  }
  LFQ_DEVICE void settle(bool accept) {
    if (accept) return flow.store(latent, flow.z);
    flow.load(latent, flow.z);
    gradient_known = false;
  }
  LFQ_DEVICE void measure(double* out) {
    flow.forward();
    T* const field = flow.from < flow.to ? flow.from : flow.to;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      lanes<T, 4> row = flow.x[r];
      for (int c = 0; c < 4; ++c) row.v[c] *= flow.factor;
      lfq::store(field + flow.own.block + r * flow.own.slice, row);
    }
    __syncthreads();
    measure_shared<T, 2>(a.theory, a.smear, field, out);
    __syncthreads();
  }
  // The field of the last accepted latent.
  LFQ_DEVICE void finish(T* field) {
    flow.load(latent, flow.z);
    flow.forward();
    flow.store(field, flow.x, flow.factor);
  }
  // A trajectory from the momenta that are given, which end it, without an accept step.
  LFQ_DEVICE void evolve(T* momenta) {
    flow.load(momenta, p);
    double s, p2 = 0;
    const int last = integrate(a.steps, a.settings.n_steps, [&](int kick, int drift) { kick_drift(kick, drift); });
    last_kick(last, s, p2);
    flow.store(latent, flow.z);
    flow.store(momenta, p);
  }
};

// ---- the kernels ---------------------------------------------------------------------------------------
template <class T>
struct resident_flow_arguments {
  lfq_phi4 lattice;  // extents, and the theory where there is one
  resident_layers layers;
  int64_t n_chains, n_weights;
  const T* weights;
  const double* log_det;
  double* dweights;  // [block][n_weights]
  // Of which the task is one.
  forward_arguments<T> forward;  // of inverse, from x to z
  gradient_arguments<T> gradient;
  pulled_back_arguments<T> hmc;
};

// Blocks of this size hold a chain of 4096 sites, with 128 or 255 registers a thread.
constexpr int resident_flow_threads(int rows) { return 1024 / rows; }
// What a block adds up at most: for each weight, or of the observables.
constexpr int resident_flow_sums = 21;
// Chains whose gradients are added up in the type of the field before they go to double.
constexpr int chains_together = 8;

enum class resident_task { forward, inverse, gradient, weight_gradient, hmc };

template <class T, int R, resident_task TASK>
__global__ void __launch_bounds__(resident_flow_threads(R)) resident_flow_kernel(const __grid_constant__ resident_flow_arguments<T> a) {
  constexpr int n_sums = resident_flow_sums;
  char* const base = lfq_shared + sum_scratch(blockDim.x, n_sums);
  near_net<T>* const nets = reinterpret_cast<near_net<T>*>(base);
  T* const shared = reinterpret_cast<T*>(base + 2 * sizeof(near_net<T>));
  if (threadIdx.x < 2) {
    const T* const w = a.weights + a.layers.net[threadIdx.x];
    near_net<T>& n = nets[threadIdx.x];
    for (int o = 0; o < 2; ++o) {
      n.below[o] = w[9 * o + 1];
      n.left[o] = w[9 * o + 3];
      n.right[o] = w[9 * o + 5];
      n.above[o] = w[9 * o + 7];
      n.bias[o] = a.layers.bias[0] < 0 ? T(0) : a.weights[a.layers.bias[threadIdx.x] + o];
    }
  }
  __syncthreads();
  const T factor = a.layers.rescale < 0 ? T(1) : a.weights[a.layers.rescale];
  const int64_t volume = int64_t(a.lattice.extent[0]) * a.lattice.extent[1];

  if constexpr (TASK == resident_task::hmc) {
    const int64_t chain = blockIdx.x;
    resident_pulled_back<T, R> potential(a.hmc.hmc, nets, factor, shared, a.hmc.z + chain * volume);
    if (a.hmc.momenta) return potential.evolve(a.hmc.momenta + chain * volume);
    run_chain(potential, a.hmc.hmc, chain);
    __syncthreads();
    potential.finish(a.hmc.phi + chain * volume);
  } else {
    resident_flow<T, R> flow(a.lattice, nets, factor, shared);
    const phi4_site<T> site(a.lattice.beta, a.lattice.lam);
    double total[n_sums] = {};
    T sum[2][10] = {};
    int added = 0;
    for (int64_t chain = blockIdx.x; chain < a.n_chains; chain += gridDim.x) {
      const int64_t at = chain * volume;
      if constexpr (TASK == resident_task::forward || TASK == resident_task::inverse) {
        double log_det[1] = {0};
        if constexpr (TASK == resident_task::forward) {
          flow.load(a.forward.z + at, flow.z);
          flow.forward();
          flow.store(a.forward.x + at, flow.x, factor);
          log_det[0] = flow.log_det();
        } else {
          flow.load(a.forward.z + at, flow.x);
#pragma unroll
          for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) flow.x[r].v[c] = flow.x[r].v[c] / factor;
          flow.template uncouple<1>(log_det[0]);
          flow.template uncouple<0>(log_det[0]);
          flow.store(a.forward.x + at, flow.x);
        }
        if (!flow.own.counts) log_det[0] = 0;
        block_sum(log_det);
        if (threadIdx.x == 0) a.forward.log_det[chain] = log_det[0] + (TASK == resident_task::forward ? *a.log_det : -*a.log_det);
      } else {
        constexpr bool WEIGHTS = TASK == resident_task::weight_gradient;
        const gradient_arguments<T>& of = a.gradient;
        flow.load(of.z + at, flow.z);
        flow.forward();
        T dlog_det(-1);
        if (of.dx) {
          flow.load(of.dx + at, flow.g);
#pragma unroll
          for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) flow.g[r].v[c] *= factor;
          dlog_det = T(of.dlog_det[chain]);
        } else {
          double e[2] = {flow.action_gradient(site, true), flow.log_det()};
          if (!flow.own.counts) e[0] = e[1] = 0;
          block_sum(e);
          if (threadIdx.x == 0) {
            const double log_det = e[1] + *a.log_det;
            of.action[chain] = of.log_det ? e[0] : e[0] - log_det;
            if (of.log_det) of.log_det[chain] = log_det;
          }
        }
        if (WEIGHTS) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            T row = T(0);
            for (int c = 0; c < 4; ++c) row = fma(flow.g[r].v[c], flow.x[r].v[c], row);
            total[20] += double(row);
          }
          if (threadIdx.x == 0) total[20] += double(dlog_det) * double(volume);
        }
        flow.template couple_backward<1, WEIGHTS>(dlog_det, sum[1]);
        flow.template couple_backward<0, WEIGHTS>(dlog_det, sum[0]);
        if (of.dz) flow.store(of.dz + at, flow.g, of.dx ? T(1) : T(-1));
        if (WEIGHTS && (++added == chains_together || chain + gridDim.x >= a.n_chains)) {
          added = 0;
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int i = 0; i < 10; ++i) {
              total[10 * s + i] += double(sum[s][i]);
              sum[s][i] = T(0);
            }
        }
      }
    }
    if constexpr (TASK == resident_task::weight_gradient) {
      if (!flow.own.counts)
        for (double& t : total) t = 0;
      block_sum(total);
      double* const out = a.dweights + blockIdx.x * a.n_weights;
      each_of(a.n_weights, [&](int64_t i) { out[i] = 0; });
      __syncthreads();
      if (threadIdx.x == 0) {
        constexpr int taps[4] = {1, 3, 5, 7};
        for (int s = 0; s < 2; ++s) {
          for (int i = 0; i < 8; ++i) out[a.layers.net[s] + 9 * (i % 2) + taps[i / 2]] = total[10 * s + i];
          if (a.layers.bias[s] >= 0)
            for (int o = 0; o < 2; ++o) out[a.layers.bias[s] + o] = total[10 * s + 8 + o];
        }
        if (a.layers.rescale >= 0) out[a.layers.rescale] = total[20];
      }
    }
  }
}

LFQ_NAMESPACE_END
