// One affine block of the paper's network, fused with the action behind it: the gradient of
//   S(f(x)) - log|det df/dx|
// for f = two half-updates with 3 x 3 convolutions and no hidden layer, then a rescale, in two dimensions.
#pragma once
#include "cpu/flow_kernels.hpp"
#include "cpu/phi4_kernels.hpp"

LFQ_NAMESPACE_BEGIN

// The first half-update moves the sites of parity p (called even here), the second the others (odd). Four
// stages of half the sites each:
//   A even: net on the odd x; y, and what the way back needs, for later
//   B odd:  net on the even y; y, the action's gradient, back through the half-update at once
//   C even: what the four neighbours pulled back by their nets add up to, back through the half-update
//   D odd:  the same sum; not where the gradient of the weights is all that is asked for
// A stage's row needs its neighbours from the stage before, so the stages run down the lattice a row behind
// one another and what passes between them stays in cache: each keeps its last rows only. Row k + i is the i-th of
// stage k; it meets the lattice's end with the rows it began with, which stay.
// phi = F y is never formed for its own sake: F goes into the couplings of the action.
//
// Where AVX-512 runs in halves (Zen 4), a store costs as much as two multiply-adds and a load next to nothing: so sites
// gather from their neighbours, and little is kept.
enum class block_output { gradient, weights, both, step };  // by the input; by the weights; a kick and a drift

template <class T, block_output OUT, scale_kind S, int N>
struct fused_block {
  static_assert(S == scale_kind::neg_abs || S == scale_kind::exp, "y = x slope + h[1]");
  using V = simd<T>;
  static constexpr bool WEIGHTS = OUT == block_output::weights || OUT == block_output::both;
  static constexpr bool INPUT = OUT != block_output::weights, STEP = OUT == block_output::step;
  static constexpr const T* parameters = nullptr;  // the kinds that are fused have none
  enum { up, left, right, down };

  struct net {
    V w[N][4], bias[N];
    void fill(const layer_plan<T>& l, int q) {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = V(l.class_weight(q)[N * l.win.taps[1][i] + c]);
        bias[c] = V(l.class_bias(q, c));
      }
    }
    template <class R>
    LFQ_HD void operator()(const R (&tap)[4], R (&u)[N]) const {
      for (int c = 0; c < N; ++c) {
        u[c] = R(bias[c]);
        for (int i = 0; i < 4; ++i) u[c] = fma(R(w[c][i]), tap[i], u[c]);
      }
    }
  };
  struct net_gradient {
    V w[N][4], bias[N];
    void clear() {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = V(T(0));
        bias[c] = V(T(0));
      }
    }
    template <class R>
    LFQ_HD void add(const R (&tap)[4], const R (&du)[N]) {
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) w[c][i] = span<R>::dot(du[c], tap[i], w[c][i]);
        bias[c] = span<R>::sum(du[c], bias[c]);
      }
    }
    void store(const layer_plan<T>& l, int q, lane_mask<T> keep, lane_sum<T>* sums) const {
      lane_sum<T>*dw = sums + l.weight_at[0] + q * l.class_size, *db = sums + l.bias_at[0] + q * l.class_size;
      for (int c = 0; c < N; ++c) {
        for (int i = 0; i < 4; ++i) dw[l.win.taps[1][i] * N + c].add(masked<T>(keep, w[c][i]));
        if (l.bias[0]) db[c].add(masked<T>(keep, bias[c]));
      }
    }
  };
  // One of the two half-updates. Its weights differ from row to row where sublattices have their own.
  struct half_update {
    const layer_plan<T>& layer;
    net nets[2];
    net_gradient grads[2];
    half_update(const layer_plan<T>& l) : layer(l) {
      for (int q = 0; q < l.n_classes; ++q) {
        nets[q].fill(l, q);
        if constexpr (WEIGHTS) grads[q].clear();
      }
    }
    int set(int row) const { return row & (layer.n_classes - 1); }
    int column(int row) const { return (row & 1) ^ layer.spec.parity; }  // of the row's first site
  };
  // What the action of sites adds up to.
  struct powers {
    V y2 = V(T(0)), y4 = V(T(0)), hopping = V(T(0));
    template <class R>
    LFQ_HD void add(R phi2) {
      y2 = span<R>::sum(phi2, y2);
      y4 = span<R>::dot(phi2, phi2, y4);
    }
  };

  half_update first, second;
  const V* x;     // the block's input
  V* g;           // its gradient
  V *rows_a, *rows_b, *rows_c;  // see `rows`
  V* phi;         // the field, when wanted
  phi4_site<T> site;
  T factor;
  V dlog_det;
  int n, half, n_rows, chunk, n_slots;
  lane_sum<T> action, log_det;
  V phi4_sum;     // of y^4
  V *moved = nullptr, *momenta = nullptr;  // STEP: the input and its momenta, changed in place
  V kick = V(T(0)), drift = V(T(0));

  fused_block(const flow_plan<T>& plan, const flow_work<T>& work, const phi4_site<T>& theory, const V* input, V dld,
              V* field)
      : first(plan.layers[plan.fused_at]),
        second(plan.layers[plan.fused_at + 1]),
        x(input),
        g(work.g),
        rows_a(work.cache + first.layer.cache_at),
        rows_b(work.cache + second.layer.cache_at),
        rows_c(work.du),
        phi(field),
        factor(plan.fused_at + 2 < plan.n_layers ? plan.layers[plan.fused_at + 2].factor : T(1)),
        dlog_det(dld),
        n(first.layer.lat.length),
        half(n / 2),
        n_rows(int(first.layer.lat.n_rows)),
        chunk(n < 64 ? 64 / n : 1),
        n_slots(chunk + 8),
        phi4_sum(T(0)) {
    const T f2 = factor * factor;
    site.beta = theory.beta * f2;
    site.quadratic = theory.quadratic * f2;
    site.lam = theory.lam * f2 * f2;
  }

  // Calls f(real, k) for the sites k of a row and a parity, two at a time.
  template <class F>
  LFQ_HD void sites(int begin, int end, F&& f) const {
    int k = begin;
    for (; k + 1 < end; k += 2) f(twin<T>(), k);
    if (k < end) f(simd<T>(), k);
  }
  template <class F>
  LFQ_HD void sites(F&& f) const {
    sites(0, half, f);
  }
  // The same where f adds up energies: single-precision sums go to double, by settle(), every 8 to 23 sites.
  template <bool ENERGY, class F, class Settle>
  LFQ_HD void summed_sites(int& terms, F&& f, Settle&& settle) const {
    if constexpr (!ENERGY || sizeof(T) == 8) return sites(f);
    for (int begin = 0, end; begin < half; begin = end) {
      end = half - begin < 16 ? half : begin + 16;
      sites(begin, end, f);
      terms += end - begin;
      if (terms < 8) continue;
      terms = 0;
      settle();
    }
  }
  LFQ_HD int below(int r) const { return r + 1 < n_rows ? r + 1 : 0; }
  LFQ_HD int above(int r) const { return r > 0 ? r - 1 : n_rows - 1; }
  LFQ_HD int wrapped(int k) const { return k < 0 ? k + half : k < half ? k : k - half; }

  // `entries` numbers of the sites of a row and a parity, one number of all sites after another. The first four rows
  // stay until the end, the others make room for those chunk + 4 further down.
  LFQ_HD V* row(V* rows, int entries, int r) const {
    const int slot = r < n_slots ? r : 4 + (r - 4) % (n_slots - 4);
    return rows + int64_t(slot) * entries * half;
  }
  // A: h[0]; h[1], or dy/dx where the input's gradient takes it; y. B: the net's cotangents and y. C: cotangents.
  LFQ_HD V* row_a(int r) const { return row(rows_a, 3, r); }
  LFQ_HD V* row_b(int r) const { return row(rows_b, N + 1, r); }
  LFQ_HD V* row_c(int r) const { return row(rows_c, N, r); }
  // The three rows around a site, of numbers that only sites of the other parity have, STRIDE apart.
  template <int STRIDE>
  struct surroundings {
    const V *above, *own, *below;
    surroundings shifted(int64_t by) const { return {above + by, own + by, below + by}; }
  };
  // Site k among those of its parity in a row that begin at `column`, or k and k + 1, and its neighbours among the others.
  struct place {
    int k, left, between, right;
  };
  template <class R>
  LFQ_HD place place_of(int column, int k) const {
    const int begin = k + column - 1;
    return {k, wrapped(begin), begin + 1, wrapped(begin + span<R>::sites)};
  }
  template <class F>
  LFQ_HD surroundings<1> around(int r, F&& row_of) const {
    return {row_of(above(r)), row_of(r), row_of(below(r))};
  }
  LFQ_HD surroundings<1> around_in_y(int r) const {
    return around(r, [&](int row) LFQ_LAMBDA_INLINE { return row_a(row) + 2 * half; });
  }
  LFQ_HD surroundings<2> around_in_field(int r, int column) const {
    return {x + int64_t(above(r)) * n + column, x + int64_t(r) * n + (1 - column), x + int64_t(below(r)) * n + column};
  }
  template <class R, int STRIDE>
  LFQ_HD void neighbours(const surroundings<STRIDE>& from, const place& p, R (&tap)[4]) const {
    tap[up] = span<R>::at(from.above + STRIDE * p.k, STRIDE);
    tap[down] = span<R>::at(from.below + STRIDE * p.k, STRIDE);
    const V left_one = from.own[STRIDE * p.left], right_one = from.own[STRIDE * p.right];
    if constexpr (span<R>::sites == 2) {
      const V between = from.own[STRIDE * p.between];
      tap[left] = {left_one, between};
      tap[right] = {between, right_one};
    } else {
      tap[left] = left_one;
      tap[right] = right_one;
    }
  }
  // What a row's sites take from the cotangents of their neighbours: one is the lower tap of its upper neighbour.
  struct pull {
    V w[N][4];
    pull(const half_update& of, int r) {
      const net &own = of.nets[of.set(r)], &other = of.nets[of.set(r + 1)];
      for (int c = 0; c < N; ++c) {
        w[c][up] = other.w[c][down], w[c][down] = other.w[c][up];
        w[c][left] = own.w[c][right], w[c][right] = own.w[c][left];
      }
    }
  };
  // `start` and all that.
  template <class R>
  LFQ_HD R gathered(const pull& by, const surroundings<1>& cotangents, const place& p, R start) const {
    R beside(T(0));
    for (int c = 0; c < N; ++c) {
      R tap[4];
      neighbours(cotangents.shifted(int64_t(c) * half), p, tap);
      start = fma(R(by.w[c][up]), tap[up], start);
      start = fma(R(by.w[c][down]), tap[down], start);
      beside = c == 0 ? R(by.w[c][left]) * tap[left] : fma(R(by.w[c][left]), tap[left], beside);
      beside = fma(R(by.w[c][right]), tap[right], beside);
    }
    return start + beside;
  }

  LFQ_HD void settle(powers& p) {
    action.add(fma(V(site.lam), p.y4, fma(V(site.quadratic), p.y2, -p.hopping)));
    phi4_sum += p.y4;
    p = powers();
  }
  LFQ_HD void settle(V& log_slopes) {
    log_det.add(log_slopes);
    log_slopes = V(T(0));
  }

  // The activations of rows to the first two numbers of out(row). Apart from what follows, which waits for them: chains
  // of dependent operations half as long fit a core's window twice. For the same reason four tanh go side by side.
  template <class From, class Out>
  LFQ_HD void activate(const half_update& h, int begin, int end, From&& from, Out&& out) const {
    for (int i = begin; i < end; ++i) {
      const int r = i % n_rows, column = h.column(r);
      const net& row_net = h.nets[h.set(r)];
      const auto inputs = from(r);
      V* activations = out(r);
      const auto outputs = [&](int at, auto& u) LFQ_LAMBDA_INLINE {
        using R = std::decay_t<decltype(u[0])>;
        R tap[4];
        neighbours(inputs, place_of<R>(column, at), tap);
        row_net(tap, u);
      };
      int k = 0;
      for (; k + 3 < half; k += 4) {
        twin<T> u[N], v[N];
        outputs(k, u);
        outputs(k + 2, v);
        for (int c = 0; c < N; ++c) {
          const side_by_side<twin<T>> h = tanh(side_by_side<twin<T>>(u[c], v[c]));
          span<twin<T>>::put(activations + c * half + k, 1, h.a);
          span<twin<T>>::put(activations + c * half + k + 2, 1, h.b);
        }
      }
      sites(k, half, [&](auto real, int at) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        R u[N];
        outputs(at, u);
        for (int c = 0; c < N; ++c) span<R>::put(activations + c * half + at, 1, tanh(u[c]));
      });
    }
  }
  template <class R>
  LFQ_HD coupled_site<R, N> couple_activated(const V* activations, int k, const V* before) const {
    coupled_site<R, N> a;
    for (int c = 0; c < N; ++c) a.h[c] = span<R>::at(activations + c * half + k, 1);
    affine_site<S>(span<R>::at(before + 2 * k, 2), parameters, a);
    return a;
  }

  template <bool ENERGY>
  void stage_a(int begin, int end) {
    activate(first, begin, end, [&](int r) LFQ_LAMBDA_INLINE { return around_in_field(r, first.column(r)); },
             [&](int r) LFQ_LAMBDA_INLINE { return row_a(r); });
    V logs(T(0));
    int terms = 0;
    for (int i = begin; i < end; ++i) {
      const int r = i % n_rows, column = first.column(r);
      V* out = row_a(r);
      const auto one = [&](auto real, int k) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        const coupled_site<R, N> a = couple_activated<R>(out, k, x + int64_t(r) * n + column);
        if constexpr (INPUT) span<R>::put(out + half + k, 1, a.slope);
        span<R>::put(out + 2 * half + k, 1, a.y);
        if constexpr (ENERGY) logs = span<R>::sum(log_slope<S>(a, parameters), logs);
      };
      summed_sites<ENERGY>(terms, one, [&]() LFQ_LAMBDA_INLINE { settle(logs); });
    }
    if constexpr (ENERGY) settle(logs);
  }
  template <bool ENERGY>
  void stage_b(int begin, int end) {
    activate(second, begin, end, [&](int r) LFQ_LAMBDA_INLINE { return around_in_y(r); },
             [&](int r) LFQ_LAMBDA_INLINE { return row_b(r); });
    V logs(T(0));
    powers sums;
    int terms = 0;
    for (int i = begin; i < end; ++i) {
      const int r = i % n_rows, column = second.column(r);
      const surroundings<1> from = around_in_y(r);
      const int64_t at = int64_t(r) * n + column;
      V* out = row_b(r);
      const auto one = [&](auto real, int k) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        R tap[4], cotangent[N];
        neighbours(from, place_of<R>(column, k), tap);
        const coupled_site<R, N> a = couple_activated<R>(out, k, x + at);
        const R phi2 = a.y * a.y, hopping = R(site.beta) * ((tap[up] + tap[down]) + (tap[left] + tap[right]));
        const R dx = affine_backward<S>(a.h, a.slope, a.y - a.h[1], site.gradient(a.y, phi2, hopping), R(dlog_det),
                                        cotangent);
        for (int c = 0; c < N; ++c) span<R>::put(out + c * half + k, 1, cotangent[c]);
        span<R>::put(out + N * half + k, 1, a.y);
        if constexpr (INPUT) span<R>::put(g + at + 2 * k, 2, dx);
        if constexpr (ENERGY) {
          sums.add(phi2);
          sums.hopping = span<R>::dot(a.y, hopping, sums.hopping);
          logs = span<R>::sum(log_slope<S>(a, parameters), logs);
          if (phi) span<R>::put(phi + at + 2 * k, 2, R(factor) * a.y);
        }
      };
      summed_sites<ENERGY>(terms, one, [&]() LFQ_LAMBDA_INLINE { settle(sums), settle(logs); });
    }
    if constexpr (ENERGY) settle(sums), settle(logs);
  }
  // The weights' gradients of rows with their nets' inputs from(row) and cotangents du(row). Apart from the stages, so
  // that all sums stay in registers.
  template <class From, class Du>
  void add_weights(half_update& h, int begin, int end, From&& from, Du&& du) const {
    for (int q = 0; q < h.layer.n_classes; ++q) {
      net_gradient sum = h.grads[q];
      for (int i = begin; i < end; ++i) {
        const int r = i % n_rows, column = h.column(r);
        if (h.set(r) != q) continue;
        const auto inputs = from(r);
        const V* cotangents = du(r);
        sites([&](auto real, int k) LFQ_LAMBDA_INLINE {
          using R = decltype(real);
          R tap[4], cotangent[N];
          neighbours(inputs, place_of<R>(column, k), tap);
          for (int c = 0; c < N; ++c) cotangent[c] = span<R>::at(cotangents + c * half + k, 1);
          sum.add(tap, cotangent);
        });
      }
      h.grads[q] = sum;
    }
  }
  template <bool ENERGY>
  void stage_c(int begin, int end) {
    powers sums;
    int terms = 0;
    for (int i = begin; i < end; ++i) {
      const int r = i % n_rows, column = first.column(r);
      const surroundings<1> from = around(r, [&](int row) LFQ_LAMBDA_INLINE { return row_b(row); });
      const pull by(second, r);
      const int64_t at = int64_t(r) * n + column;
      const V* kept = row_a(r);
      V* out = row_c(r);
      const auto one = [&](auto real, int k) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        const place p = place_of<R>(column, k);
        R tap[4], cotangent[N], slope(T(0)), moved_x;
        R h[2] = {span<R>::at(kept + k, 1), span<R>::at(kept + half + k, 1)};
        const R y = span<R>::at(kept + 2 * half + k, 1), phi2 = y * y;
        if constexpr (INPUT) {
          slope = h[1];
          moved_x = span<R>::at(x + at + 2 * k, 2) * slope;
          h[1] = y - moved_x;
        } else {
          moved_x = y - h[1];
        }
        neighbours(from.shifted(int64_t(N) * half), p, tap);
        const R hopping = R(site.beta) * ((tap[up] + tap[down]) + (tap[left] + tap[right]));
        const R dy = gathered(by, from, p, site.gradient(y, phi2, hopping));
        const R dx = affine_backward<S>(h, slope, moved_x, dy, R(dlog_det), cotangent);
        if constexpr (INPUT) finish(at + 2 * k, dx);
        for (int c = 0; c < N; ++c) span<R>::put(out + c * half + k, 1, cotangent[c]);
        if constexpr (ENERGY) {
          sums.add(phi2);
          if (phi) span<R>::put(phi + at + 2 * k, 2, R(factor) * y);
        }
      };
      summed_sites<ENERGY>(terms, one, [&]() LFQ_LAMBDA_INLINE { settle(sums); });
    }
    if constexpr (ENERGY) settle(sums);
  }
  void stage_d(int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int r = i % n_rows, column = second.column(r);
      const surroundings<1> from = around(r, [&](int row) LFQ_LAMBDA_INLINE { return row_c(row); });
      const pull by(first, r);
      const int64_t at = int64_t(r) * n + column;
      sites([&](auto real, int k) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        finish(at + 2 * k, gathered(by, from, place_of<R>(column, k), span<R>::at(g + at + 2 * k, 2)));
      });
    }
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

  // Rows of a stage at a time: enough sites for sums and constants to stay in registers a while, few enough for the
  // first-level cache.
  template <bool ENERGY>
  void run() {
    static_assert(ENERGY || !WEIGHTS, "the rescale's gradient takes the action");
    constexpr int last = INPUT ? 3 : 2;
    int done[4] = {0, 1, 2, 3};
    const auto advance = [&](int k, auto&& rows) LFQ_LAMBDA_INLINE {
      const int end = n_rows + k;
      int until = k == 0 ? done[0] + chunk : done[k - 1] == end - 1 ? end : done[k - 1] - 1;
      if (until > end) until = end;
      if (until <= done[k]) return;
      rows(done[k], until);
      done[k] = until;
    };
    while (done[last] < n_rows + last) {
      advance(0, [&](int begin, int end) LFQ_LAMBDA_INLINE { stage_a<ENERGY>(begin, end); });
      advance(1, [&](int begin, int end) LFQ_LAMBDA_INLINE {
        stage_b<ENERGY>(begin, end);
        if constexpr (WEIGHTS)
          add_weights(second, begin, end, [&](int r) LFQ_LAMBDA_INLINE { return around_in_y(r); },
                      [&](int r) LFQ_LAMBDA_INLINE { return row_b(r); });
      });
      advance(2, [&](int begin, int end) LFQ_LAMBDA_INLINE {
        stage_c<ENERGY>(begin, end);
        if constexpr (WEIGHTS)
          add_weights(first, begin, end, [&](int r) LFQ_LAMBDA_INLINE { return around_in_field(r, first.column(r)); },
                      [&](int r) LFQ_LAMBDA_INLINE { return row_c(r); });
      });
      if constexpr (INPUT) advance(3, [&](int begin, int end) LFQ_LAMBDA_INLINE { stage_d(begin, end); });
    }
  }

  void store_weights(const flow_plan<T>& plan, lane_mask<T> keep, lane_sum<T>* sums) const {
    for (const half_update* h : {&first, &second})
      for (int q = 0; q < h->layer.n_classes; ++q) h->grads[q].store(h->layer, q, keep, sums);
    if (plan.fused_at + 2 == plan.n_layers) return;
    // sum of y dS/dy = 2 S + 2 lam sum of y^4
    const V twice_action = V(T(2)) * action.rounded();
    const V grad_scale = fma(V(T(2) * site.lam), phi4_sum, twice_action);
    sums[plan.layers[plan.fused_at + 2].spec.weight_offset].add(
        masked<T>(keep, fma(dlog_det, V(T(first.layer.lat.volume)), grad_scale)));
  }
};

// For the lanes in `keep`, the gradient of S(f(z)) + dlog_det log|det df/dz| with respect to z, in flow.work.gz, and
// WEIGHTS with respect to the weights, added to flow.work.weight_sums (and then, if the flow is no more than the block,
// not with respect to z); ENERGY also the action, log|det| without the flow's constant, and the field f(z) in `field`
// unless that is null.
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
        const auto pass = [&](auto out) {
          fused_block<T, block_output(decltype(out)::value), scale_kind(decltype(kind)::value), decltype(n)::value> block(
              plan, flow.work, theory.site, x, dlog_det, field);
          block.template run<ENERGY>();
          if constexpr (WEIGHTS) block.store_weights(plan, keep, flow.work.weight_sums);
          if constexpr (ENERGY) {
            action.total.add(1.0, block.action);
            log_det.total.add(1.0, block.log_det);
          }
        };
        if constexpr (!WEIGHTS)
          pass(constant<int(block_output::gradient)>());
        else if (before > 0)
          pass(constant<int(block_output::both)>());
        else
          pass(constant<int(block_output::weights)>());
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
