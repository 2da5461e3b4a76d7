// One affine block of the paper's network, fused with the action behind it: the gradient of
//   S(f(x)) - log|det df/dx|
// for f = two half-updates with 3 x 3 convolutions and no hidden layer, then a rescale, in two dimensions.
#pragma once
#include "cpu/flow_kernels.hpp"
#include "cpu/phi4_kernels.hpp"

LFQ_NAMESPACE_BEGIN

// The first half-update moves the sites of parity p (called even here), the second the others (odd). Four
// stages of half the sites each:
//   A even: net on the odd x; y, and s, t, e for later
//   B odd:  net on the even y; y, the action's gradient, back through the half-update at once; for each of the
//           four neighbours what it will add up
//   C even: the sum of those, back through the half-update; again a part for each neighbour
//   D odd:  the sum of those
// A stage's row needs its neighbours from the stage before, so the stages run down the lattice a row behind
// one another and what passes between them stays in cache. Row k + i is the i-th of stage k; it meets the
// lattice's end with the rows it began with long done.
// phi = F y is never formed for its own sake: F goes into the couplings of the action.
enum class block_output { gradient, weights, step };  // g; g and that of the weights; a kick and a drift by g

template <class T, block_output OUT, scale_kind S, int N>
struct fused_block {
  using V = simd<T>;
  static constexpr bool WEIGHTS = OUT == block_output::weights, STEP = OUT == block_output::step;
  static constexpr int stride = N + 2;
  static constexpr const T* parameters = nullptr;  // the kinds that are fused have none
  enum { up, left, right, down };

  struct net {
    V w[N][4], bias[N];
    net(const layer_plan<T>& l, int q) {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = V(l.class_weight(q)[N * l.win.taps[1][i] + c]);
        bias[c] = V(l.class_bias(q, c));
      }
    }
    template <class R>
    LFQ_HD void operator()(const R* tap, R (&u)[N]) const {
      for (int c = 0; c < N; ++c) {
        u[c] = R(bias[c]);
        for (int i = 0; i < 4; ++i) u[c] = fma(R(w[c][i]), tap[i], u[c]);
      }
    }
    // What a site with these cotangents adds to the gradient of its neighbour i, besides `more`.
    template <class R>
    LFQ_HD R part(int i, const R (&du)[N], R more) const {
      for (int c = 0; c < N; ++c) more = fma(R(w[c][i]), du[c], more);
      return more;
    }
  };
  struct net_gradient {
    V w[N][4], bias[N];
    bool has_bias;
    net_gradient(const layer_plan<T>& l) : has_bias(l.bias[0]) {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = V(T(0));
        bias[c] = V(T(0));
      }
    }
    template <class R>
    LFQ_HD void add(const R* tap, const R (&du)[N]) {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = span<R>::dot(du[c], tap[i], w[c][i]);
        if (has_bias) bias[c] = span<R>::sum(du[c], bias[c]);
      }
    }
    void store(const layer_plan<T>& l, int q, lane_mask<T> keep, V* dweights) const {
      V *dw = dweights + l.weight_at[0] + q * l.class_size, *db = dweights + l.bias_at[0] + q * l.class_size;
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) dw[N * l.win.taps[1][i] + c] += masked<T>(keep, w[c][i]);
        if (l.bias[0]) db[c] += masked<T>(keep, bias[c]);
      }
    }
  };

  const layer_plan<T>&first, &second;
  const V* x;        // the block's input
  V* g;              // its gradient
  V* kept;                // for each site of the first parity: h, slope and y
  V *parts_b, *parts_c;   // four numbers for each site of a parity
  V* du;                  // N
  V* phi;            // the field, when wanted
  phi4_site<T> site;
  T factor;
  V dlog_det;
  net net_a[2], net_b[2];  // of even rows and of odd ones
  int n, n_rows;
  site_sum<T> action, log_det;
  net_gradient grad_a[2], grad_b[2];
  V phi4_sum;              // of y^4
  V *moved = nullptr, *momenta = nullptr;  // STEP: the input and its momenta, changed in place
  V kick = V(T(0)), drift = V(T(0));

  fused_block(const flow_plan<T>& plan, const flow_work<T>& work, const phi4_site<T>& theory, const V* input, V dld,
              V* field)
      : first(plan.layers[plan.fused_at]),
        second(plan.layers[plan.fused_at + 1]),
        x(input),
        g(work.g),
        kept(work.cache + first.cache_at),
        parts_b(work.cache + second.cache_at),
        parts_c(work.dchannel[0]),
        du(work.du),
        phi(field),
        factor(plan.fused_at + 2 < plan.n_layers ? plan.layers[plan.fused_at + 2].factor : T(1)),
        dlog_det(dld),
        net_a{net(first, 0), net(first, first.n_classes - 1)},
        net_b{net(second, 0), net(second, second.n_classes - 1)},
        n(first.lat.length),
        n_rows(int(first.lat.n_rows)),
        grad_a{net_gradient(first), net_gradient(first)},
        grad_b{net_gradient(second), net_gradient(second)},
        phi4_sum(T(0)) {
    const T f2 = factor * factor;
    site.beta = theory.beta * f2;
    site.quadratic = theory.quadratic * f2;
    site.lam = theory.lam * f2 * f2;
  }

  // Calls f(real, site, column) for the sites of a parity in a row, two at a time.
  template <class F>
  LFQ_HD void sites(int r, int parity, F&& f) const {
    every_other_site<T>((r & 1) ^ parity, n, [&](auto real, int c) LFQ_LAMBDA_INLINE { f(real, int64_t(r) * n + c, c); });
  }
  LFQ_HD V kept_y(int row, int k) const { return kept[stride * ((int64_t(row) * n + k) >> 1) + N + 1]; }
  LFQ_HD int below(int r) const { return r + 1 < n_rows ? r + 1 : 0; }
  LFQ_HD int above(int r) const { return r > 0 ? r - 1 : n_rows - 1; }
  LFQ_HD int column(int k) const { return k < 0 ? k + n : k < n ? k : k - n; }
  // The four neighbours of a site: at(row, column) reads one.
  template <class R, class F>
  LFQ_HD void neighbours(int r, int c, R (&tap)[4], F&& at) const {
    if constexpr (span<R>::sites == 2) {
      const V between = at(r, c + 1);
      tap[up] = {at(above(r), c), at(above(r), c + 2)};
      tap[left] = {at(r, column(c - 1)), between};
      tap[right] = {between, at(r, column(c + 3))};
      tap[down] = {at(below(r), c), at(below(r), c + 2)};
    } else {
      tap[up] = at(above(r), c);
      tap[left] = at(r, column(c - 1));
      tap[right] = at(r, column(c + 1));
      tap[down] = at(below(r), c);
    }
  }
  // The sum of what the neighbours have for a site: a neighbour's part for its upper neighbour comes from below.
  template <class R>
  LFQ_HD R received(int r, int c, const V* parts, R start) const {
    const auto slot = [&](int row, int k) LFQ_LAMBDA_INLINE { return parts + 4 * ((int64_t(row) * n + k) >> 1); };
    const auto from = [&](int row, int k, int i) LFQ_LAMBDA_INLINE {
      if constexpr (span<R>::sites == 2)
        return R(slot(row, column(k))[i], slot(row, column(k + 2))[i]);
      else
        return slot(row, column(k))[i];
    };
    return start + ((from(above(r), c, down) + from(below(r), c, up)) + (from(r, c - 1, right) + from(r, c + 1, left)));
  }

  template <bool ENERGY>
  void stage_a(int r) {
    const net& row_net = net_a[r & 1];
    sites(r, first.spec.parity, [&](auto real, int64_t s, int c) LFQ_LAMBDA_INLINE {
      using R = decltype(real);
      R tap[4], u[N];
      neighbours(r, c, tap, [&](int row, int k) LFQ_LAMBDA_INLINE { return x[int64_t(row) * n + k]; });
      row_net(tap, u);
      const coupled_site<R, N> a = couple_site<S>(span<R>::at(x + s, 2), u, parameters);
      V* k = kept + stride * (s >> 1);
      for (int i = 0; i < N; ++i) span<R>::put(k + i, stride, a.h[i]);
      span<R>::put(k + N, stride, a.slope);
      span<R>::put(k + N + 1, stride, a.y);
      if constexpr (ENERGY) {
        int64_t i = s >> 1;
        span<R>::each(log_slope<S>(a, parameters), [&](V v) LFQ_LAMBDA_INLINE { log_det.add(i++, v); });
      }
    });
  }
  template <bool ENERGY>
  void stage_b(int r) {
    const net& row_net = net_b[r & 1];
    sites(r, second.spec.parity, [&](auto real, int64_t s, int c) LFQ_LAMBDA_INLINE {
      using R = decltype(real);
      R tap[4], u[N], cotangent[N];
      neighbours(r, c, tap, [&](int row, int k) LFQ_LAMBDA_INLINE { return kept_y(row, k); });
      row_net(tap, u);
      const R before = span<R>::at(x + s, 2);
      const coupled_site<R, N> a = couple_site<S>(before, u, parameters);
      const R around = (tap[up] + tap[down]) + (tap[left] + tap[right]);
      const R dy = -site.force(a.y, around);
      span<R>::put(g + s, 2, couple_site_backward<S>(a.h, parameters, a.slope, before, dy, R(dlog_det), cotangent));
      const R hopping = -(R(site.beta) * a.y);
      for (int i = 0; i < 4; ++i) span<R>::put(parts_b + 4 * (s >> 1) + i, 4, row_net.part(i, cotangent, hopping));
      if constexpr (WEIGHTS) {
        for (int i = 0; i < N; ++i) span<R>::put(du + N * (s >> 1) + i, N, cotangent[i]);
        phi4_sum = span<R>::dot(a.y * a.y, a.y * a.y, phi4_sum);
      }
      if constexpr (ENERGY) {
        int64_t i = s >> 1;
        span<R>::each(site.action(a.y, around), [&](V v) LFQ_LAMBDA_INLINE { action.add(i++, v); });
        i = s >> 1;
        span<R>::each(log_slope<S>(a, parameters), [&](V v) LFQ_LAMBDA_INLINE { log_det.add(i++, v); });
        if (phi) span<R>::put(phi + s, 2, R(factor) * a.y);
      }
    });
  }
  template <bool ENERGY>
  void stage_c(int r) {
    const net& row_net = net_a[r & 1];
    sites(r, first.spec.parity, [&](auto real, int64_t s, int c) LFQ_LAMBDA_INLINE {
      using R = decltype(real);
      const V* k = kept + stride * (s >> 1);
      R h[N], cotangent[N];
      for (int i = 0; i < N; ++i) h[i] = span<R>::at(k + i, stride);
      const R slope = span<R>::at(k + N, stride), y = span<R>::at(k + N + 1, stride), before = span<R>::at(x + s, 2);
      const R dy = received(r, c, parts_b, -site.force_alone(y));
      finish(s, couple_site_backward<S>(h, parameters, slope, before, dy, R(dlog_det), cotangent));
      for (int i = 0; i < 4; ++i) span<R>::put(parts_c + 4 * (s >> 1) + i, 4, row_net.part(i, cotangent, R(T(0))));
      if constexpr (WEIGHTS) {
        for (int i = 0; i < N; ++i) span<R>::put(du + N * (s >> 1) + i, N, cotangent[i]);
        phi4_sum = span<R>::dot(y * y, y * y, phi4_sum);
      }
      if constexpr (ENERGY) {
        int64_t i = s >> 1;
        span<R>::each(site.action_alone(y), [&](V v) LFQ_LAMBDA_INLINE { action.add(i++, v); });
        if (phi) span<R>::put(phi + s, 2, R(factor) * y);
      }
    });
  }
  // The weights' gradients of rows, apart from their stage so that they stay in registers.
  template <class F>
  void add_weights(int begin, int end, int parity, net_gradient (&grad)[2], F&& at) const {
    for (int q = 0; q < 2; ++q) {
      net_gradient sum = grad[q];
      for (int row = begin + ((begin ^ q) & 1); row < end; row += 2) {
        const int r = row % n_rows;
        sites(r, parity, [&](auto real, int64_t s, int c) LFQ_LAMBDA_INLINE {
          using R = decltype(real);
          R tap[4];
          neighbours(r, c, tap, at);
          R cotangent[N];
          for (int i = 0; i < N; ++i) cotangent[i] = span<R>::at(du + N * (s >> 1) + i, N);
          sum.add(tap, cotangent);
        });
      }
      grad[q] = sum;
    }
  }
  void stage_d(int r) {
    sites(r, second.spec.parity, [&](auto real, int64_t s, int c) LFQ_LAMBDA_INLINE {
      using R = decltype(real);
      finish(s, received(r, c, parts_c, span<R>::at(g + s, 2)));
    });
  }
  // With the gradient of a site of the input. A step may change the input at once: stages A and B are past it.
  template <class R>
  LFQ_HD void finish(int64_t s, R gradient) {
    if constexpr (STEP) {
      const R p = fma(R(kick), gradient, span<R>::at(momenta + s, 2));
      span<R>::put(momenta + s, 2, p);
      span<R>::put(moved + s, 2, fma(R(drift), p, span<R>::at(moved + s, 2)));
    } else {
      span<R>::put(g + s, 2, gradient);
    }
  }

  // Rows of a stage at a time: enough sites for the weight gradients to stay in registers a while.
  template <bool ENERGY>
  void run() {
    const int chunk = n < 128 ? 128 / n : 1;
    int done[4] = {0, 1, 2, 3};
    const auto advance = [&](int k, auto&& row) LFQ_LAMBDA_INLINE {
      const int end = n_rows + k;
      int until = k == 0 ? done[0] + chunk : done[k - 1] == end - 1 ? end : done[k - 1] - 1;
      if (until > end) until = end;
      for (; done[k] < until; ++done[k]) row(done[k] % n_rows);
    };
    while (done[3] < n_rows + 3) {
      advance(0, [&](int r) LFQ_LAMBDA_INLINE { stage_a<ENERGY>(r); });
      int row = done[1];
      advance(1, [&](int r) LFQ_LAMBDA_INLINE { stage_b<ENERGY>(r); });
      if constexpr (WEIGHTS) {
        add_weights(row, done[1], second.spec.parity, grad_b,
                    [&](int r, int k) LFQ_LAMBDA_INLINE { return kept_y(r, k); });
      }
      row = done[2];
      advance(2, [&](int r) LFQ_LAMBDA_INLINE { stage_c<ENERGY>(r); });
      if constexpr (WEIGHTS) {
        add_weights(row, done[2], first.spec.parity, grad_a,
                    [&](int r, int k) LFQ_LAMBDA_INLINE { return x[int64_t(r) * n + k]; });
      }
      advance(3, [&](int r) LFQ_LAMBDA_INLINE { stage_d(r); });
    }
  }

  void store_weights(const flow_plan<T>& plan, lane_mask<T> keep, V* dweights) {
    for (int q = 0; q < 2; ++q) {
      const int a = q & (first.n_classes - 1), b = q & (second.n_classes - 1);
      grad_a[q].store(first, a, keep, dweights);
      grad_b[q].store(second, b, keep, dweights);
    }
    if (plan.fused_at + 2 == plan.n_layers) return;
    // sum of y dS/dy = 2 S + 2 lam sum of y^4
    V twice_action;
    for (int l = 0; l < V::width; ++l) twice_action.set(l, T(2 * action.sum()[l]));
    const V grad_scale = fma(V(T(2) * site.lam), phi4_sum, twice_action);
    dweights[plan.layers[plan.fused_at + 2].spec.weight_offset] +=
        masked<T>(keep, fma(dlog_det, V(T(first.lat.volume)), grad_scale));
  }
};

// For the lanes in `keep`, the gradient of S(f(z)) + dlog_det log|det df/dz| with respect to z, in flow.work.gz, and
// WEIGHTS with respect to the weights, added to flow.work.dweights; ENERGY also the action, log|det| without the flow's
// constant, and the field f(z) in `field` unless that is null.
template <bool WEIGHTS, bool ENERGY, class T, int D>
void target_gradient(const phi4_group<T, D>& theory, const flow_group<T>& flow, const simd<T>* z, simd<T> dlog_det,
                     lane_mask<T> keep, site_sum<T>& action, site_sum<T>& log_det, simd<T>* field) {
  using V = simd<T>;
  const flow_plan<T>& plan = flow.plan;
  constexpr memory kept = WEIGHTS ? memory::weights : memory::latents;
  const int64_t volume = theory.lat.volume;
  const auto drop_lanes = [&] {
    for (int64_t i = 0; i < volume; ++i) flow.work.g[i] = masked<T>(keep, flow.work.g[i]);
  };
  if constexpr (D == 2) {
    if (plan.fused_at >= 0) {
      const int before = plan.fused_at;
      const V* x = z;
      V* inner = nullptr;
      if (before > 0) x = inner = flow.template forward<kept, ENERGY>(z, log_det, before);
      with_fused_scale(plan.layers[before].spec, [&](auto kind, auto n) {
        constexpr block_output out = WEIGHTS ? block_output::weights : block_output::gradient;
        fused_block<T, out, scale_kind(decltype(kind)::value), decltype(n)::value> block(plan, flow.work, theory.site, x,
                                                                                        dlog_det, field);
        block.template run<ENERGY>();
        if constexpr (WEIGHTS) block.store_weights(plan, keep, flow.work.dweights);
        if constexpr (ENERGY) {
          action.total.add(1.0, block.action.sum());
          log_det.total.add(1.0, block.log_det.sum());
        }
      });
      if (before == 0) return;
      if constexpr (WEIGHTS) drop_lanes();
      flow.template backward<WEIGHTS>(z, inner, dlog_det, before);
      return;
    }
  }
  V* x = flow.template forward<kept, ENERGY>(z, log_det, plan.n_layers);
  if constexpr (ENERGY)
    theory.gradient(x, flow.work.g, action);
  else
    theory.gradient(x, flow.work.g);
  if (ENERGY && field)
    for (int64_t i = 0; i < volume; ++i) field[i] = x[i];
  if constexpr (WEIGHTS) drop_lanes();
  flow.template backward<WEIGHTS>(z, x, dlog_det, plan.n_layers);
}

// p += kick dS~/dz, then z += drift p, for S~ of a flow that is one fused block: in one go.
template <class T, int D>
void step_through_block(const phi4_group<T, D>& theory, const flow_group<T>& flow, simd<T>* z, simd<T>* p, T kick,
                        T drift) {
  with_fused_scale(flow.plan.layers[0].spec, [&](auto kind, auto n) {
    fused_block<T, block_output::step, scale_kind(decltype(kind)::value), decltype(n)::value> block(
        flow.plan, flow.work, theory.site, z, simd<T>(T(-1)), nullptr);
    block.moved = z, block.momenta = p;
    block.kick = simd<T>(kick), block.drift = simd<T>(drift);
    block.template run<false>();
  });
}

LFQ_NAMESPACE_END
