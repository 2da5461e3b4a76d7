// A flow on one group: forward, inverse, and the hand-written backward pass.
#pragma once
#include "cpu/convolution.hpp"
#include "cpu/table.hpp"
#include "lfq/coupling.hpp"

LFQ_NAMESPACE_BEGIN

constexpr int max_convolutions = LFQ_MAX_HIDDEN + 1;
constexpr int max_taps = 6561;  // 9^4

// A tap of a direct stencil: its number, which of the k^(D-1) rows around a site it is in, its offset along the row, and
// the weights of all outputs.
template <class T>
struct direct_tap {
  int32_t number, row, dx;
  const T* weight;
};

template <class T>
struct layer_plan {
  lfq_layer spec;
  lattice lat;
  // coupling
  window win;
  int n_convolutions;
  int channels[max_convolutions + 1];
  int64_t weight_at[max_convolutions], bias_at[max_convolutions];  // in the flow's weight vector
  T* weight[max_convolutions];      // [tap][in][out]
  T* transposed[max_convolutions];  // [opposite tap][out][in]: the convolution that goes backward
  T* bias[max_convolutions];        // null without biases
  int n_classes;        // sets of weights; of a net without hidden layers one behind the other in weight, transposed, bias
  int64_t class_taps;   // of the first convolution in each
  int64_t class_size;   // of a set in the flow's weight vector
  unsigned active, frozen;  // sublattices that change, and that the net sees, a bit each
  const direct_tap<T>* taps[1 << LFQ_MAX_DIM];  // from active sublattices to frozen ones, and from frozen to active ones
  int n_taps[1 << LFQ_MAX_DIM];
  int direct_taps;  // the number of taps of the active sublattices, or 0 where they differ
  T parameters[1 << (LFQ_MAX_DIM - 1)][2 * LFQ_MAX_FEATURES];
  int64_t parameters_at;
  int64_t cache_at;
  // rescale and upsample
  lattice coarse;
  T factor, coefficient[LFQ_MAX_DIM + 1], width[LFQ_MAX_DIM + 1];

  int outputs() const { return channels[n_convolutions]; }
  int set_of(int sublattice) const { return set_of_sublattice(spec, sublattice); }
  // The sublattice of a row's active sites, or -1 where it has none: they are of one parity.
  int active_sublattice(int64_t row) const {
    const int s = win.sublattice[row];
    return active >> s & 1 ? s : active >> (s + 1) & 1 ? s + 1 : -1;
  }
  const T* class_weight(int q) const { return weight[0] + q * class_taps; }
  const T* class_transposed(int q) const { return transposed[0] + q * class_taps; }
  T class_bias(int q, int output) const { return bias[0] ? bias[0][q * outputs() + output] : T(0); }
  int64_t cache_size() const {
    if (spec.kind == LFQ_LAYER_COUPLING)
      return ((outputs() > 2 ? outputs() : 2) + 2) * (lat.volume / 2) + (n_convolutions > 1 ? lat.volume : 0);
    return resizes(spec) ? coarse.volume : 0;
  }
};

// What all threads share: weights in the type and order of the loops, and where things lie.
template <class T>
struct flow_plan {
  int n_layers = 0;
  layer_plan<T>* layers = nullptr;
  int64_t volume = 0, first_volume = 0, n_weights = 0;
  int64_t cache_size = 0, hidden_size = 0, channel_size = 0, cotangent_size = 0;
  double log_det_constant = 0;
  bool resizing = false;
  int fused_at = -1;  // where the last layers are a block that block_kernels.hpp fuses with the action

  void plan(arena& mem, const lfq_flow& flow) {
    n_layers = flow.n_layers;
    volume = first_volume = flow.volume;
    n_weights = flow.n_weights;
    layers = mem.take<layer_plan<T>>(n_layers);
    for (int i = 0; i < n_layers; ++i) {
      layer_plan<T> l;
      l.spec = flow.layers[i];
      l.lat = lattice(l.spec.ndim, l.spec.extent);
      const double* w = flow.weights + l.spec.weight_offset;
      const bool fill = mem.base != nullptr;
      if (l.spec.kind == LFQ_LAYER_COUPLING) plan_coupling(mem, l, w, fill);
      if (l.spec.kind == LFQ_LAYER_RESCALE && fill) {
        l.factor = T(::exp(w[0]));
        log_det_constant += double(l.lat.volume) * w[0];
      }
      if (resizes(l.spec)) {
        l.coarse = l.lat.halved();
        if (fill) {
          const upsampling u(l.spec, w, log_det_constant);
          l.factor = T(u.scale);
          for (int c = 1; c <= l.lat.ndim; ++c) {
            l.coefficient[c] = T(u.coefficient[c]);
            l.width[c] = T(u.width[c]);
          }
        }
        if (!resizing) first_volume = l.coarse.volume;
        resizing = true;
      }
      l.cache_at = cache_size;
      cache_size += l.cache_size();
      if (mem.base) layers[i] = l;
    }
    fused_at = block_at_end(flow);
  }

  static int block_at_end(const lfq_flow& flow) {
    const int rescales = flow.n_layers > 0 && flow.layers[flow.n_layers - 1].kind == LFQ_LAYER_RESCALE;
    const int at = flow.n_layers - 2 - rescales;
    if (at < 0) return -1;
    const lfq_layer &a = flow.layers[at], &b = flow.layers[at + 1];
    const auto plain = [](const lfq_layer& l) {
      return l.kind == LFQ_LAYER_COUPLING && l.ndim == 2 && l.kernel_size == 3 && l.n_hidden == 0 && !l.active;
    };
    const bool pair = a.parity != b.parity && a.scale == b.scale && a.bias == b.bias && a.sublattices == b.sublattices;
    const bool fused = a.scale == LFQ_SCALE_NEG_ABS || a.scale == LFQ_SCALE_EXP;
    return plain(a) && plain(b) && pair && fused ? at : -1;
  }

  void plan_coupling(arena& mem, layer_plan<T>& l, const double* w, bool fill) {
    const lfq_layer& s = l.spec;
    l.win.plan(mem, l.lat, s.kernel_size);
    l.n_convolutions = s.n_hidden + 1;
    l.channels[0] = 1;
    const int outputs = outputs_of(s);
    int64_t hidden = 0, widest = outputs > 2 ? outputs : 2;
    for (int c = 0; c < s.n_hidden; ++c) {
      l.channels[c + 1] = s.hidden[c];
      hidden += s.hidden[c];
      if (s.hidden[c] > widest) widest = s.hidden[c];
    }
    l.channels[s.n_hidden + 1] = outputs;
    if (outputs * (l.lat.volume / 2) > cotangent_size) cotangent_size = outputs * (l.lat.volume / 2);
    if (hidden * l.lat.volume > hidden_size) hidden_size = hidden * l.lat.volume;
    if (widest * l.lat.volume > channel_size) channel_size = widest * l.lat.volume;
    l.n_classes = sets_of(s);
    l.class_size = set_size_of(s);
    const int taps = l.win.n_taps;
    for (int c = 0; c < l.n_convolutions; ++c) {
      const int ni = l.channels[c], no = l.channels[c + 1];
      const int64_t n = int64_t(taps) * ni * no;
      if (c == 0) l.class_taps = n;
      l.weight[c] = mem.take<T>(n * l.n_classes);
      l.transposed[c] = mem.take<T>(n * l.n_classes);
      l.bias[c] = s.bias ? mem.take<T>(int64_t(no) * l.n_classes) : nullptr;
      const convolution_layout layout = convolution_of(s, c);
      l.weight_at[c] = s.weight_offset + layout.weight;
      l.bias_at[c] = s.weight_offset + layout.bias;
      for (int q = 0; fill && q < l.n_classes; ++q) {
        const double* from = w + q * l.class_size + layout.weight;
        for (int co = 0; co < no; ++co)
          for (int ci = 0; ci < ni; ++ci)
            for (int tap = 0; tap < taps; ++tap) {
              const T v = T(from[(int64_t(co) * ni + ci) * taps + tap]);
              l.weight[c][q * n + (int64_t(tap) * ni + ci) * no + co] = v;
              l.transposed[c][q * n + (int64_t(l.win.opposite(tap)) * no + co) * ni + ci] = v;
            }
        if (s.bias)
          for (int co = 0; co < no; ++co) l.bias[c][q * no + co] = T(from[n + co]);
      }
    }
    plan_sublattices(mem, l);
    const int64_t behind_net = net_weights_of(s);
    l.parameters_at = s.weight_offset + behind_net;
    for (int q = 0; fill && q < l.n_classes; ++q) {
      const double* from = w + q * l.class_size + behind_net;
      for (int i = 0; i < parameters_of(s); ++i) l.parameters[q][i] = T(parameter_of(s, from[i]));
      if (s.scale == LFQ_SCALE_SITE) l.parameters[q][3] = T(1) / l.parameters[q][0];
    }
  }

  void plan_sublattices(arena& mem, layer_plan<T>& l) {
    l.active = active_of(l.spec);
    l.frozen = frozen_of(l.spec);
    l.direct_taps = -1;
    for (int s = 0; s < 1 << l.lat.ndim; ++s) {
      direct_tap<T>* list = mem.take<direct_tap<T>>(l.win.n_taps);
      l.taps[s] = list;
      l.n_taps[s] = 0;
      if (!mem.base) continue;
      const bool active = l.active >> s & 1;
      const unsigned others = active ? l.frozen : l.frozen >> s & 1 ? l.active : 0;
      for (int tap = 0; tap < l.win.n_taps; ++tap) {
        const int other = s ^ flip_of_tap(l.lat.ndim, l.spec.kernel_size, tap);
        if (!(others >> other & 1)) continue;
        const T* weights = active ? l.class_weight(l.set_of(s)) : l.class_transposed(l.set_of(other));
        list[l.n_taps[s]++] = {tap, l.win.row_of[tap], l.win.dx[tap] - l.win.radius, weights + l.outputs() * tap};
      }
      if (active) l.direct_taps = l.direct_taps < 0 || l.direct_taps == l.n_taps[s] ? l.n_taps[s] : 0;
    }
  }
};

// One thread's scratch for a flow.
template <class T>
struct flow_work {
  using V = simd<T>;
  V *x, *spare_x, *g, *spare_g, *gz, *cache, *hidden, *dchannel[2], *du, *dweights;
  lane_sum<T>* weight_sums;  // of the groups of a slot

  void plan(arena& mem, const flow_plan<T>& f, bool backward, bool weights) {
    x = mem.take<V>(f.volume);
    spare_x = f.resizing ? mem.take<V>(f.volume) : nullptr;
    hidden = mem.take<V>(f.hidden_size);
    dchannel[0] = mem.take<V>(f.channel_size);
    if (!backward) return;
    g = mem.take<V>(f.volume);
    spare_g = f.resizing ? mem.take<V>(f.volume) : nullptr;
    gz = f.resizing ? mem.take<V>(f.volume) : g;
    cache = mem.take<V>(f.cache_size);
    dchannel[1] = mem.take<V>(f.channel_size);
    du = mem.take<V>(f.cotangent_size);
    dweights = weights ? mem.take<V>(f.n_weights) : nullptr;
    weight_sums = weights ? mem.take<lane_sum<T>>(f.n_weights) : nullptr;
  }
};

// The taps of a direct stencil around one row; NT = 0 leaves their number to run time.
template <class T, int NT>
struct row_taps {
  static constexpr int capacity = NT ? NT : max_taps;
  int run_time_n;
  const simd<T>* field[capacity];  // the row of a tap
  const simd<T>* tap[capacity];    // of the site 0, if it did not leave the row
  const int32_t* wrap[capacity];
  LFQ_HD int n() const { return NT ? NT : run_time_n; }
  LFQ_HD row_taps(const layer_plan<T>& l, int sublattice, const simd<T>* x, int64_t r) {
    const int64_t* rows = l.win.rows(r);
    const direct_tap<T>* from = l.taps[sublattice];
    run_time_n = l.n_taps[sublattice];
    for (int i = 0; i < n(); ++i) {
      field[i] = x + rows[from[i].row];
      tap[i] = field[i] + from[i].dx;
      wrap[i] = l.win.wrap + (from[i].dx + l.win.radius);
    }
  }
  // Tap i of the site x in the row, and of the site x + 2 where R stands for two; INSIDE: it does not leave the row.
  template <class R, bool INSIDE>
  LFQ_HD R at(int i, int64_t x) const {
    if constexpr (INSIDE)
      return span<R>::at(tap[i] + x, 2);
    else if constexpr (span<R>::sites == 2)
      return {field[i][wrap[i][x]], field[i][wrap[i][x + 2]]};
    else
      return field[i][wrap[i][x]];
  }
};

// The same of N numbers for each site of one parity.
template <class T, int NT, int N>
struct row_cotangents {
  static constexpr int capacity = NT ? NT : max_taps;
  int run_time_n;
  const simd<T>* row[capacity];
  const simd<T>* tap[capacity];
  const int32_t* wrap[capacity];
  LFQ_HD int n() const { return NT ? NT : run_time_n; }
  LFQ_HD row_cotangents(const layer_plan<T>& l, int sublattice, const simd<T>* du, int64_t r) {
    const int64_t* rows = l.win.rows(r);
    const direct_tap<T>* from = l.taps[sublattice];
    run_time_n = l.n_taps[sublattice];
    for (int i = 0; i < n(); ++i) {
      row[i] = du + N * (rows[from[i].row] >> 1);
      tap[i] = row[i] + N * (((sublattice & 1) + from[i].dx) >> 1);
      wrap[i] = l.win.wrap + (from[i].dx + l.win.radius);
    }
  }
  template <class R, bool INSIDE>
  LFQ_HD R at(int i, int64_t x, int c) const {
    const auto place = [&](int64_t k) LFQ_LAMBDA_INLINE { return row[i] + N * (wrap[i][k] >> 1) + c; };
    if constexpr (INSIDE)
      return span<R>::at(tap[i] + N * (x >> 1) + c, N);
    else if constexpr (span<R>::sites == 2)
      return {*place(x), *place(x + 2)};
    else
      return *place(x);
  }
};

// Calls f(real, x) for the sites x = x0, x0 + 2, ... of a row, where a twin stands for two of them.
template <class T, class F>
LFQ_HD void every_other_site(int x0, int length, F&& f) {
  int64_t x = x0;
  for (; x + 2 < length; x += 4) f(twin<T>(), x);
  if (x < length) f(simd<T>(), x);
}

// The same, f(real, inside, x) with whether windows of a radius around the sites stay in the row; those that do first, so
// that the others, at both ends, are one piece of code.
template <class T, class F>
LFQ_HD void every_other_window(int x0, int length, int radius, F&& f) {
  constexpr constant<true> inside;
  constexpr constant<false> wrapped;
  int64_t begin = x0;
  while (begin < radius) begin += 4;
  int64_t end = begin;
  for (; end + 2 + radius < length; end += 4) f(twin<T>(), inside, end);
  const auto past = [&](int64_t site) LFQ_LAMBDA_INLINE { return site == begin ? end : site; };
  int64_t x = past(x0);
  for (; x + 2 < length; x = past(x + 4)) f(twin<T>(), wrapped, x);
  if (x < length) f(simd<T>(), wrapped, x);
}

template <class F>
LFQ_HD void with_taps(int n, F&& f) {
  if (n == 4) return f(constant<4>());
  if (n == 8) return f(constant<8>());
  f(constant<0>());
}

// Calls f with what a coupling makes of its net's outputs, and their number.
template <class F>
LFQ_HD void with_fused_scale(const lfq_layer& l, F&& f) {
  if (l.scale == LFQ_SCALE_NEG_ABS) return f(constant<int(scale_kind::neg_abs)>(), constant<2>());
  f(constant<int(scale_kind::exp)>(), constant<2>());
}
template <class F>
LFQ_HD void with_scale(const lfq_layer& l, F&& f) {
  constexpr constant<int(scale_kind::even)> even;
  if (l.scale == LFQ_SCALE_SITE) return f(constant<int(scale_kind::site)>(), constant<2>());
  if (l.scale != LFQ_SCALE_EVEN) return with_fused_scale(l, f);
  if (l.n_features == 1) return f(even, constant<1>());
  if (l.n_features == 2) return f(even, constant<2>());
  if (l.n_features == 4) return f(even, constant<4>());
  f(even, constant<8>());
}

// The gradient of the weights behind a coupling's net.
template <class T, scale_kind S, int N>
struct parameter_gradient {
  static constexpr int n = n_parameters(int(S), N);
  simd<T> sum[n ? n : 1];
  parameter_gradient() {
    for (auto& s : sum) s = simd<T>(T(0));
  }
  template <class R>
  LFQ_HD void add(const T* parameters, const R (&h)[N], R slope, R x, R y, R dy, R dlog_det) {
    parameter_terms<S>(h, parameters, slope, x, y, dy, dlog_det,
                       [&](int i, R a, R b) LFQ_LAMBDA_INLINE { sum[i] = span<R>::dot(a, b, sum[i]); });
  }
  void store(const layer_plan<T>& l, int q, simd<T>* dweights) const {
    for (int i = 0; i < n; ++i) dweights[l.parameters_at + q * l.class_size + i] += sum[i];
  }
};

// What a forward pass keeps for the backward pass to come: nothing, enough for the gradient by the latents, or for that
// by the weights too, which needs the inputs of all layers.
enum class memory { none, latents, weights };

template <class T>
struct flow_group {
  using V = simd<T>;
  const flow_plan<T>& plan;
  flow_work<T> work;

  // ---- the nets --------------------------------------------------------------------------
  // Hidden activations of all sites, [site][channel] per layer, from the frozen sites of x.
  void run_hidden(const layer_plan<T>& l, const V* x) const {
    const activation_kind act = activation_kind(l.spec.activation);
    const int active = l.spec.parity;
    V* h = work.hidden;
    const V* in = x;
    for (int c = 0; c + 1 < l.n_convolutions; ++c) {
      const int ni = l.channels[c], no = l.channels[c + 1];
      const auto sink = [&](int64_t site, int ch, V u) { h[site * no + ch] = activate(act, u); };
      for (int parity = 0; parity < 2; ++parity) {
        // The first net layer sees frozen sites only: an even offset away from frozen sites, odd from active.
        const int taps = c > 0 ? 2 : (parity == active ? 1 : 0);
        convolve(l.win, parity, taps, in, ni, l.weight[c], no, l.bias[c], sink);
      }
      in = h;
      h += l.lat.volume * no;
    }
  }

  // The outputs of a net with hidden layers, [site][output], at the active sites.
  const V* hidden_outputs(const layer_plan<T>& l, const V* x) const {
    const int last = l.n_convolutions - 1;
    run_hidden(l, x);
    const V* in = work.hidden;
    for (int c = 1; c < last; ++c) in += l.lat.volume * l.channels[c];
    V* u = work.dchannel[0];
    const int n = l.outputs();
    convolve(l.win, l.spec.parity, 2, in, l.channels[last], l.weight[last], n, l.bias[last],
             [&](int64_t site, int ch, V v) { u[n * site + ch] = v; });
    return u;
  }

  // Calls f(first site, outputs, parameters) for the active sites, two at a time (see span) where a row has them.
  // ANY: with the number of taps left to run time, where speed is not worth further instances.
  template <int N, bool ANY = false, class F>
  void net(const layer_plan<T>& l, const V* x, F&& f) const {
    const int L = l.lat.length;
    if (l.n_convolutions > 1) {
      const V* u = hidden_outputs(l, x);
      for (int64_t r = 0; r < l.lat.n_rows; ++r)
        every_other_site<T>(l.lat.row_parity(r) ^ l.spec.parity, L, [&](auto real, int c) LFQ_LAMBDA_INLINE {
          using R = decltype(real);
          const int64_t site = r * L + c;
          R out[N];
          for (int i = 0; i < N; ++i) out[i] = span<R>::at(u + N * site + i, 2 * N);
          f(site, out, l.parameters[0]);
        });
      return;
    }
    const auto rows = [&](auto nt) {
      constexpr int NT = decltype(nt)::value;
      for (int64_t r = 0; r < l.lat.n_rows; ++r) {
        const int s = l.active_sublattice(r);
        if (s < 0) continue;
        const row_taps<T, NT> taps(l, s, x, r);
        const direct_tap<T>* const from = l.taps[s];
        const int q = l.set_of(s);
        V bias[N], kept[NT ? NT : 1][N];
        for (int i = 0; i < N; ++i) bias[i] = V(l.class_bias(q, i));
        for (int i = 0; i < NT; ++i)
          for (int k = 0; k < N; ++k) kept[i][k] = V(from[i].weight[k]);
        every_other_window<T>(s & 1, L, l.win.radius, [&](auto real, auto inside, int64_t c) LFQ_LAMBDA_INLINE {
          using R = decltype(real);
          R out[N];
          for (int k = 0; k < N; ++k) out[k] = R(bias[k]);
          for (int i = 0; i < taps.n(); ++i) {
            const R v = taps.template at<R, decltype(inside)::value>(i, c);
            for (int k = 0; k < N; ++k)
              out[k] = fma(NT ? R(kept[NT ? i : 0][k]) : R(from[i].weight[k]), v, out[k]);
          }
          f(r * L + c, out, l.parameters[q]);
        });
      }
    };
    if constexpr (ANY)
      rows(constant<0>());
    else
      with_taps(l.direct_taps, rows);
  }

  // ---- couplings -------------------------------------------------------------------------
  // What a coupling does at its active sites.
  template <scale_kind S, int N, memory M, bool LOG_DET>
  struct forward_site {
    V *x, *cache;
    site_sum<T>& log_det;
    int64_t n_before = 0;
    template <class R>
    LFQ_HD void operator()(int64_t site, const R (&u)[N], const T* parameters) {
      const R before = span<R>::at(x + site, 2);
      const coupled_site<R, N> a = couple_site<S>(before, u, parameters);
      if constexpr (M == memory::latents) {
        span<R>::put(cache + (site >> 1), 1, a.h[0]);
      } else if constexpr (M == memory::weights) {
        V* c = cache + (N + 2) * (site >> 1);
        for (int k = 0; k < N; ++k) span<R>::put(c + k, N + 2, a.h[k]);
        span<R>::put(c + N, N + 2, a.slope), span<R>::put(c + N + 1, N + 2, before);
      }
      span<R>::put(x + site, 2, a.y);
      if constexpr (LOG_DET)
        span<R>::each(log_slope<S>(a, parameters), [&](V v) LFQ_LAMBDA_INLINE { log_det.add(n_before++, v); });
    }
  };
  template <memory M, bool LOG_DET>
  void couple(const layer_plan<T>& l, V* x, site_sum<T>& log_det) const {
    V* cache = work.cache + (M != memory::none ? l.cache_at : 0);
    if (M != memory::none && l.n_convolutions > 1)
      for (int64_t i = 0; i < l.lat.volume; ++i) net_input(l)[i] = x[i];
    with_scale(l.spec, [&](auto kind, auto n) {
      constexpr scale_kind S = scale_kind(decltype(kind)::value);
      constexpr int N = decltype(n)::value;
      net<N>(l, x, forward_site<S, N, needed<S>(M), LOG_DET>{x, cache, log_det});
    });
  }
  // Only `site` needs less for the gradient by the latents alone.
  template <scale_kind S>
  static constexpr memory needed(memory wanted) {
    return wanted == memory::latents && S != scale_kind::site ? memory::weights : wanted;
  }
  void uncouple(const layer_plan<T>& l, V* x, site_sum<T>& log_det) const {
    with_scale(l.spec, [&](auto kind, auto n) {
      constexpr scale_kind S = scale_kind(decltype(kind)::value);
      constexpr int N = decltype(n)::value;
      int64_t n_before = 0;
      net<N, true>(l, x, [&](int64_t site, const auto& u, const T* parameters) LFQ_LAMBDA_INLINE {
        using R = std::decay_t<decltype(u[0])>;
        R log_dy;
        span<R>::put(x + site, 2, uncouple_site<S>(span<R>::at(x + site, 2), u, parameters, log_dy));
        span<R>::each(log_dy, [&](V v) LFQ_LAMBDA_INLINE { log_det.add(n_before++, -v); });
      });
    });
  }
  // The copy of the input of a layer with hidden ones, behind what its sites keep.
  V* net_input(const layer_plan<T>& l) const { return work.cache + l.cache_at + l.cache_size() - l.lat.volume; }
  // Turns g from dL/dy into dL/dx; WEIGHTS restores x to the layer's input, too.
  template <bool WEIGHTS>
  void couple_backward(const layer_plan<T>& l, V* x, V* g, V dlog_det) const {
    with_scale(l.spec, [&](auto kind, auto n) {
      constexpr scale_kind S = scale_kind(decltype(kind)::value);
      constexpr int N = decltype(n)::value;
      if (l.n_convolutions > 1)
        hidden_backward<WEIGHTS, S, N>(l, x, g, dlog_det);
      else
        with_taps(l.direct_taps, [&](auto nt) { direct_backward<WEIGHTS, S, N, decltype(nt)::value>(l, x, g, dlog_det); });
    });
  }

  template <bool WEIGHTS, scale_kind S, int N, class R>
  LFQ_HD void site_backward(const layer_plan<T>& l, const T* parameters, V* x, V* g, int64_t site, V dlog_det, R (&du)[N],
                            parameter_gradient<T, S, N>& grad) const {
    using P = span<R>;
    const R dy = P::at(g + site, 2);
    if constexpr (!WEIGHTS && S == scale_kind::site) {
      const R h[2] = {P::at(work.cache + l.cache_at + (site >> 1), 1)};
      P::put(g + site, 2, couple_site_backward<S>(h, parameters, site_slope(h[0], parameters), dy, dy, R(dlog_det), du));
      return;
    }
    const V* c = work.cache + l.cache_at + (N + 2) * (site >> 1);
    R h[N];
    for (int i = 0; i < N; ++i) h[i] = P::at(c + i, N + 2);
    const R slope = P::at(c + N, N + 2), before = P::at(c + N + 1, N + 2);
    P::put(g + site, 2, couple_site_backward<S>(h, parameters, slope, before, dy, R(dlog_det), du));
    if constexpr (!WEIGHTS) return;
    grad.add(parameters, h, slope, before, P::at(x + site, 2), dy, R(dlog_det));
    P::put(x + site, 2, before);
  }

  template <bool WEIGHTS, scale_kind S, int N, int NT>
  void direct_backward(const layer_plan<T>& l, V* x, V* g, V dlog_det) const {
    if constexpr (WEIGHTS) {
      for (int s = 0; s < 1 << l.lat.ndim; ++s)
        if (l.active >> s & 1) weights_backward<S, N, NT>(l, s, x, g, dlog_det);
    } else {
      for (int64_t r = 0; r < l.lat.n_rows; ++r) active_row<S, N>(l, r, g, dlog_det);
    }
    for (int64_t r = 0; r < l.lat.n_rows; ++r) frozen_row<N>(l, r, g);
  }
  // The active sites of a row: their own gradient, and the cotangents of their nets' outputs in work.du.
  template <scale_kind S, int N>
  void active_row(const layer_plan<T>& l, int64_t r, V* g, V dlog_det) const {
    const int s = l.active_sublattice(r);
    if (s < 0) return;
    const T* const parameters = l.parameters[l.set_of(s)];
    parameter_gradient<T, S, N> none;
    every_other_site<T>(s & 1, l.lat.length, [&](auto real, int64_t c) LFQ_LAMBDA_INLINE {
      const int64_t site = r * l.lat.length + c;
      decltype(real) u[N];
      site_backward<false>(l, parameters, nullptr, g, site, dlog_det, u, none);
      for (int k = 0; k < N; ++k) span<decltype(real)>::put(work.du + N * (site >> 1) + k, N, u[k]);
    });
  }
  template <int N>
  void frozen_row(const layer_plan<T>& l, int64_t r, V* g) const {
    const int first = l.win.sublattice[r];
    for (int s = first; s < first + 2; ++s)
      if (l.frozen >> s & 1)
        with_taps(l.n_taps[s], [&](auto nt) { collect<N, decltype(nt)::value>(l, s, r, work.du, g); });
  }
  // What the active sites around those of a frozen sublattice in a row add to their gradient.
  template <int N, int NT>
  static void collect(const layer_plan<T>& l, int sublattice, int64_t r, const V* du, V* g) {
    const row_cotangents<T, NT, N> taps(l, sublattice, du, r);
    const direct_tap<T>* const from = l.taps[sublattice];
    V kept[NT ? NT : 1][N];
    for (int i = 0; i < NT; ++i)
      for (int k = 0; k < N; ++k) kept[i][k] = V(from[i].weight[k]);
    V* const row = g + r * l.lat.length;
    every_other_window<T>(sublattice & 1, l.lat.length, l.win.radius, [&](auto real, auto inside, int64_t c) LFQ_LAMBDA_INLINE {
      using R = decltype(real);
      R sum = span<R>::at(row + c, 2);
      for (int i = 0; i < taps.n(); ++i)
        for (int k = 0; k < N; ++k)
          sum = fma(NT ? R(kept[NT ? i : 0][k]) : R(from[i].weight[k]), taps.template at<R, decltype(inside)::value>(i, c, k), sum);
      span<R>::put(row + c, 2, sum);
    });
  }
  // The sites of an active sublattice: as active_row, and the gradient of their weights.
  template <scale_kind S, int N, int NT>
  void weights_backward(const layer_plan<T>& l, int sublattice, V* x, V* g, V dlog_det) const {
    const int L = l.lat.length, q = l.set_of(sublattice);
    const direct_tap<T>* const from = l.taps[sublattice];
    V *du = work.du, *dw = work.dweights + l.weight_at[0] + q * l.class_size;
    V bias[N], acc[NT ? N * NT : 1];
    parameter_gradient<T, S, N> parameters;
    for (V& b : bias) b = V(T(0));
    for (V& a : acc) a = V(T(0));
    for (int64_t r = 0; r < l.lat.n_rows; ++r) {
      if (l.win.sublattice[r] != (sublattice & ~1)) continue;
      const row_taps<T, NT> taps(l, sublattice, x, r);
      every_other_window<T>(sublattice & 1, L, l.win.radius, [&](auto real, auto inside, int64_t c) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        using P = span<R>;
        const int64_t site = r * L + c;
        R u[N];
        site_backward<true>(l, l.parameters[q], x, g, site, dlog_det, u, parameters);
        for (int k = 0; k < N; ++k) {
          P::put(du + N * (site >> 1) + k, N, u[k]);
          bias[k] = P::sum(u[k], bias[k]);
        }
        for (int i = 0; i < taps.n(); ++i) {
          const R v = taps.template at<R, decltype(inside)::value>(i, c);
          V* a = NT ? acc + N * i : dw + N * from[i].number;
          for (int k = 0; k < N; ++k) a[k] = P::dot(u[k], v, a[k]);
        }
      });
    }
    for (int i = 0; i < NT; ++i)
      for (int k = 0; k < N; ++k) dw[N * from[i].number + k] += acc[N * i + k];
    if (l.bias[0])
      for (int k = 0; k < N; ++k) work.dweights[l.bias_at[0] + q * l.class_size + k] += bias[k];
    parameters.store(l, q, work.dweights);
  }

  template <bool WEIGHTS, scale_kind S, int N>
  void hidden_backward(const layer_plan<T>& l, V* x, V* g, V dlog_det) const {
    const int L = l.lat.length;
    parameter_gradient<T, S, N> parameters;
    for (int64_t r = 0; r < l.lat.n_rows; ++r)
      every_other_site<T>(l.lat.row_parity(r) ^ l.spec.parity, L, [&](auto real, int c) LFQ_LAMBDA_INLINE {
        using R = decltype(real);
        const int64_t site = r * L + c;
        R u[N];
        site_backward<WEIGHTS>(l, l.parameters[0], x, g, site, dlog_det, u, parameters);
        for (int k = 0; k < N; ++k) span<R>::put(work.dchannel[0] + N * site + k, 2 * N, u[k]);
      });
    if constexpr (WEIGHTS) parameters.store(l, 0, work.dweights);
    net_backward<WEIGHTS>(l, g);
  }
  // Back through a net with hidden layers, from the cotangents of its outputs in work.dchannel[0].
  template <bool WEIGHTS>
  void net_backward(const layer_plan<T>& l, V* g) const {
    const int active = l.spec.parity, last = l.n_convolutions - 1;
    const activation_kind act = activation_kind(l.spec.activation);
    V* dout = work.dchannel[0];
    const V* input = net_input(l);
    run_hidden(l, input);
    const V* h = work.hidden;
    for (int c = 1; c <= last; ++c) h += l.lat.volume * l.channels[c];
    for (int c = last; c >= 0; --c) {
      const int ni = l.channels[c], no = l.channels[c + 1];
      const V* in = input;
      if (c > 0) in = h -= l.lat.volume * ni;
      for (int parity = 0; parity < 2; ++parity) {
        // Outputs of the last layer exist on active sites only; inputs of the first on frozen sites only.
        if (WEIGHTS && (c < last || parity == active)) {
          const int taps = c > 0 ? 2 : (parity == active ? 1 : 0);
          convolve_weight_gradient(l.win, parity, taps, in, ni, dout, no, work.dweights + l.weight_at[c]);
          if (l.bias[c]) bias_gradient(l, parity, dout, no, work.dweights + l.bias_at[c]);
        }
        if (c == 0 && parity == active) continue;
        const int taps = c < last ? 2 : (parity == active ? 0 : 1);
        if (c == 0) {
          convolve<T>(l.win, parity, taps, dout, no, l.transposed[c], ni, nullptr,
                      [&](int64_t site, int, V v) { g[site] += v; });
        } else {
          V* din = dout == work.dchannel[0] ? work.dchannel[1] : work.dchannel[0];
          convolve<T>(l.win, parity, taps, dout, no, l.transposed[c], ni, nullptr, [&](int64_t site, int ch, V v) {
            din[site * ni + ch] = v * activation_slope(act, in[site * ni + ch]);
          });
        }
      }
      dout = dout == work.dchannel[0] ? work.dchannel[1] : work.dchannel[0];
    }
  }

  void bias_gradient(const layer_plan<T>& l, int parity, const V* dout, int n, V* grad) const {
    for (int64_t r = 0; r < l.lat.n_rows; ++r)
      for (int c = l.lat.row_parity(r) ^ parity; c < l.lat.length; c += 2)
        for (int ch = 0; ch < n; ++ch) grad[ch] += dout[(r * l.lat.length + c) * n + ch];
  }

  // ---- coarse to fine --------------------------------------------------------------------
  // Calls f(fine site, coarse site, sublattice, n_neighbours, coarse sites) over the fine lattice.
  template <class F>
  static void sublattices(const layer_plan<T>& l, F&& f) {
    const int D = l.lat.ndim, Lc = l.coarse.length;
    int c[LFQ_MAX_DIM], d[LFQ_MAX_DIM];
    int64_t rows[1 << (LFQ_MAX_DIM - 1)], near[1 << LFQ_MAX_DIM];
    for (int64_t r = 0; r < l.lat.n_rows; ++r) {
      l.lat.coordinates(r, c);
      int sub = 0, n_rows = 1;
      for (int i = 0; i < D - 1; ++i) {
        sub |= (c[i] & 1) << (D - 1 - i);
        n_rows <<= c[i] & 1;
      }
      for (int j = 0; j < n_rows; ++j) {
        int rest = j;
        for (int i = 0; i < D - 1; ++i) {
          d[i] = c[i] >> 1;
          if (c[i] & 1) {
            d[i] += rest & 1;
            rest >>= 1;
          }
        }
        rows[j] = l.coarse.row_start(d);
      }
      const auto row = [&](auto known) LFQ_LAMBDA_INLINE {
        const int n = decltype(known)::value ? decltype(known)::value : n_rows;
        for (int64_t x = 0; x < Lc; ++x) {
          for (int j = 0; j < n; ++j) near[j] = rows[j] + x;
          f(r * l.lat.length + 2 * x, rows[0] + x, sub, n, near);
          for (int j = 0; j < n; ++j) near[n + j] = rows[j] + (x + 1 < Lc ? x + 1 : 0);
          f(r * l.lat.length + 2 * x + 1, rows[0] + x, sub | 1, 2 * n, near);
        }
      };
      if (n_rows == 1)
        row(constant<1>());
      else if (n_rows == 2)
        row(constant<2>());
      else
        row(constant<0>());
    }
  }
  static int odd_axes(int sublattice) { return __builtin_popcount(unsigned(sublattice)); }

  void upsample(const layer_plan<T>& l, const V* x, const V* z, V* y) const {
    if (l.spec.kind == LFQ_LAYER_INTERLEAVE)
      return sublattices(l, [&](int64_t site, int64_t c, int sub, int, const int64_t*) LFQ_LAMBDA_INLINE {
        y[site] = sub ? z[sub * l.coarse.volume + c] : x[c];
      });
    sublattices(l, [&](int64_t site, int64_t c, int sub, int n, const int64_t* near) LFQ_LAMBDA_INLINE {
      if (sub == 0) {
        y[site] = V(l.factor) * x[c];
        return;
      }
      V sum(T(0));
      for (int i = 0; i < n; ++i) sum += x[near[i]];
      const int k = odd_axes(sub);
      y[site] = fma(V(l.coefficient[k]), sum, V(l.width[k]) * z[sub * l.coarse.volume + c]);
    });
  }
  void downsample(const layer_plan<T>& l, const V* y, V* x, V* z) const {
    sublattices(l, [&](int64_t site, int64_t c, int sub, int, const int64_t*) LFQ_LAMBDA_INLINE {
      if (sub == 0) x[c] = y[site] / V(l.factor);
    });
    sublattices(l, [&](int64_t site, int64_t c, int sub, int n, const int64_t* near) LFQ_LAMBDA_INLINE {
      if (sub == 0) return;
      V sum(T(0));
      for (int i = 0; i < n; ++i) sum += x[near[i]];
      const int k = odd_axes(sub);
      z[sub * l.coarse.volume + c] = (y[site] - V(l.coefficient[k]) * sum) / V(l.width[k]);
    });
  }
  // gc = dL/dx of the coarse field; the noise's part of dL/dz goes to gz.
  template <bool WEIGHTS>
  void upsample_backward(const layer_plan<T>& l, const V* x, const V* z, const V* g, V* gc, V* gz, V dlog_det) const {
    if (l.spec.kind == LFQ_LAYER_INTERLEAVE)
      return sublattices(l, [&](int64_t site, int64_t c, int sub, int, const int64_t*) LFQ_LAMBDA_INLINE {
        (sub ? gz[sub * l.coarse.volume + c] : gc[c]) = g[site];
      });
    const int D = l.lat.ndim;
    V dscale(T(0)), dmean[LFQ_MAX_DIM + 1], dwidth[LFQ_MAX_DIM + 1];
    for (int k = 0; k <= D; ++k) dmean[k] = dwidth[k] = V(T(0));
    for (int64_t i = 0; i < l.coarse.volume; ++i) gc[i] = V(T(0));
    sublattices(l, [&](int64_t site, int64_t c, int sub, int n, const int64_t* near) LFQ_LAMBDA_INLINE {
      const V gy = g[site];
      if (sub == 0) {
        gc[c] += V(l.factor) * gy;
        if (WEIGHTS) dscale = fma(gy, V(l.factor) * x[c], dscale);
        return;
      }
      const int k = odd_axes(sub);
      const int64_t noise = sub * l.coarse.volume + c;
      const V share = V(l.coefficient[k]) * gy;
      V sum(T(0));
      for (int i = 0; i < n; ++i) {
        gc[near[i]] += share;
        if (WEIGHTS) sum += x[near[i]];
      }
      gz[noise] = V(l.width[k]) * gy;
      if (WEIGHTS) {
        dmean[k] = fma(gy, sum, dmean[k]);
        dwidth[k] = fma(gy, V(l.width[k]) * z[noise], dwidth[k]);
      }
    });
    if constexpr (WEIGHTS) {
      V* dw = work.dweights + l.spec.weight_offset;
      const T volume = T(l.coarse.volume);
      T binomial = T(1);
      for (int k = 1; k <= D; ++k) {
        binomial *= T(D - k + 1) / T(k);
        dscale = fma(V(l.coefficient[k]), dmean[k], dscale);
        dw[2 * k - 1] += V(l.factor / T(1 << k)) * dmean[k];
        dw[2 * k] += fma(dlog_det, V(volume * binomial), dwidth[k]);
      }
      dw[0] += fma(dlog_det, V(volume), dscale);
    }
  }

  // ---- the flow --------------------------------------------------------------------------
  // The first n_layers of f(z); returned pointer is work.x or work.spare_x.
  template <memory M, bool LOG_DET = true>
  V* forward(const V* z, site_sum<T>& log_det, int n_layers) const {
    V *x = work.x, *spare = work.spare_x;
    for (int64_t i = 0; i < plan.first_volume; ++i) x[i] = z[i];
    for (int n = 0; n < n_layers; ++n) {
      const layer_plan<T>& l = plan.layers[n];
      switch (l.spec.kind) {
        case LFQ_LAYER_COUPLING:
          couple<M, LOG_DET>(l, x, log_det);
          break;
        case LFQ_LAYER_RESCALE:
          for (int64_t i = 0; i < l.lat.volume; ++i) x[i] = x[i] * V(l.factor);
          break;
        default:
          if (M == memory::weights)
            for (int64_t i = 0; i < l.coarse.volume; ++i) work.cache[l.cache_at + i] = x[i];
          upsample(l, x, z, spare);
          V* t = x;
          x = spare;
          spare = t;
      }
    }
    return x;
  }

  // z = f^-1(x); x is overwritten, and lies in work.x.
  void inverse(V* z, site_sum<T>& log_det) const {
    V *x = work.x, *spare = work.spare_x;
    for (int n = plan.n_layers - 1; n >= 0; --n) {
      const layer_plan<T>& l = plan.layers[n];
      switch (l.spec.kind) {
        case LFQ_LAYER_COUPLING:
          uncouple(l, x, log_det);
          break;
        case LFQ_LAYER_RESCALE:
          for (int64_t i = 0; i < l.lat.volume; ++i) x[i] = x[i] / V(l.factor);
          break;
        default:
          downsample(l, x, spare, z);
          V* t = x;
          x = spare;
          spare = t;
      }
    }
    for (int64_t i = 0; i < plan.first_volume; ++i) z[i] = x[i];
  }

  // After forward(z, , n_layers) returned x, and with dL/dx in work.g: dL/dz in work.gz. WEIGHTS overwrites x and adds
  // dL/dweights to work.weight_sums.
  template <bool WEIGHTS>
  void backward(const V* z, V* x, V dlog_det, int n_layers) const {
    V *g = work.g, *spare = work.spare_g;
    if constexpr (WEIGHTS) clear_weight_gradient();
    for (int n = n_layers - 1; n >= 0; --n) {
      const layer_plan<T>& l = plan.layers[n];
      switch (l.spec.kind) {
        case LFQ_LAYER_COUPLING:
          couple_backward<WEIGHTS>(l, x, g, dlog_det);
          break;
        case LFQ_LAYER_RESCALE: {
          const V f(l.factor), inverse(T(1) / l.factor);
          V sum(T(0));
          for (int64_t i = 0; i < l.lat.volume; ++i) {
            if (WEIGHTS) sum = fma(g[i], x[i], sum);
            g[i] = g[i] * f;
            if (WEIGHTS) x[i] = x[i] * inverse;
          }
          if (WEIGHTS) work.dweights[l.spec.weight_offset] += fma(dlog_det, V(T(l.lat.volume)), sum);
          break;
        }
        default:
          if (WEIGHTS)
            for (int64_t i = 0; i < l.coarse.volume; ++i) x[i] = work.cache[l.cache_at + i];
          upsample_backward<WEIGHTS>(l, x, z, g, spare, work.gz, dlog_det);
          V* t = g;
          g = spare;
          spare = t;
      }
    }
    if (work.gz != g)
      for (int64_t i = 0; i < plan.first_volume; ++i) work.gz[i] = g[i];
    if constexpr (WEIGHTS) sum_weight_gradient();
  }

  void clear_weight_sums() const {
    for (int64_t i = 0; i < plan.n_weights; ++i) work.weight_sums[i] = lane_sum<T>();
  }
  void clear_weight_gradient() const {
    for (int64_t i = 0; i < plan.n_weights; ++i) work.dweights[i] = V(T(0));
  }
  void sum_weight_gradient() const {
    for (int64_t i = 0; i < plan.n_weights; ++i) work.weight_sums[i].add(work.dweights[i]);
  }
  // The sum over lanes, in the order of the flow's weight vector.
  void store_weight_sums(double* grad) const {
    const auto lanes = [&](int64_t i) { return work.weight_sums[i].over_lanes(); };
    for (int n = 0; n < plan.n_layers; ++n) {
      const layer_plan<T>& l = plan.layers[n];
      if (l.spec.kind != LFQ_LAYER_COUPLING) {
        const int64_t m = weights_of(l.spec);
        for (int64_t i = l.spec.weight_offset; i < l.spec.weight_offset + m; ++i) grad[i] = lanes(i);
        continue;
      }
      for (int64_t at = 0; at < l.n_classes * l.class_size; at += l.class_size) {
        for (int c = 0; c < l.n_convolutions; ++c) {
          const int ni = l.channels[c], no = l.channels[c + 1], taps = l.win.n_taps;
          const int64_t first = l.weight_at[c] + at;
          for (int co = 0; co < no; ++co)
            for (int ci = 0; ci < ni; ++ci)
              for (int tap = 0; tap < taps; ++tap)
                grad[first + (int64_t(co) * ni + ci) * taps + tap] = lanes(first + (int64_t(tap) * ni + ci) * no + co);
          if (l.bias[c])
            for (int co = 0; co < no; ++co) grad[l.bias_at[c] + at + co] = lanes(l.bias_at[c] + at + co);
        }
        for (int i = 0; i < parameters_of(l.spec); ++i)
          grad[l.parameters_at + at + i] = lanes(l.parameters_at + at + i);
      }
    }
  }
};

LFQ_NAMESPACE_END
