// Flows whose couplings have no hidden layers, on lattices whose extents are powers of two: one block walks a chain
// through all layers, with the fields in shared memory.
//
// A lattice lies there sublattice by sublattice, each in C order: site s n + j is the j-th of the n sites of sublattice
// s. Threads in turn then work on sites in turn, a latent's noise lies as the field that takes it, and where a tap leads
// is an addition without carries from one coordinate to the next: two instructions in any dimension, with numbers that
// are laid out once a call.
#pragma once
#include "cuda/flow.cuh"

LFQ_NAMESPACE_BEGIN

constexpr int max_sublattices = 1 << LFQ_MAX_DIM;

// From the sites of one sublattice to those of another, and by what to multiply there for each output of the net.
template <class T, int N>
struct alignas(16) flow_link {
  unsigned add, flip;  // in bytes of a field
  T weight[N];
};
template <class T>
LFQ_HD int64_t link_bytes(int outputs) {
  return (2 * int64_t(sizeof(unsigned)) + outputs * int64_t(sizeof(T)) + 15) & ~int64_t(15);
}

// A layer, or the action behind the last one.
struct direct_layer {
  int kind, scale, outputs, ndim;  // kind -1: the action
  int n, log_n;                    // sites of a sublattice
  unsigned low;                    // in bytes of a field: the bits of all coordinates but for the highest of each
  unsigned axis[LFQ_MAX_DIM];      // the bits of each coordinate in j, from the last axis to the first
  int first_bit[LFQ_MAX_DIM];
  int n_active, n_frozen;
  int active[max_sublattices], frozen[max_sublattices];  // the active ones set by set
  int first[max_sublattices], n_links[max_sublattices];
  int set_size, bias, parameters;  // of weights: from one set to the next, 0 with one alone; places in it, bias -1 without
  int64_t weight_offset;
};

LFQ_HD bool is_direct(const lfq_layer& l) {
  for (int i = 0; i < l.ndim; ++i)
    if (l.extent[i] < 2 || (l.extent[i] & (l.extent[i] - 1))) return false;
  return l.kind != LFQ_LAYER_COUPLING || l.n_hidden == 0;
}
// Of a coupling, from active sites to frozen ones and back; of the action.
LFQ_HD int64_t links_of(const lfq_layer& l) {
  if (l.kind != LFQ_LAYER_COUPLING) return 0;
  const unsigned active = active_of(l), frozen = frozen_of(l);
  int64_t n = 0;
  for (int tap = 0; tap < taps_of(l); ++tap) {
    const unsigned flip = unsigned(flip_of_tap(l.ndim, l.kernel_size, tap));
    for (unsigned s = 0; s < 1u << l.ndim; ++s) n += (active >> s & 1) && (frozen >> (s ^ flip) & 1);
  }
  return 2 * n;
}
LFQ_HD int64_t action_links(int ndim) { return int64_t(2 * ndim) << ndim; }
// Numbers that a forward pass keeps for each active site; `all`: those that gradients of weights need too.
LFQ_HD constexpr int kept_of(int scale, int outputs, bool all) { return scale == LFQ_SCALE_SITE && !all ? 1 : outputs + 2; }
// Fields that the backward pass of a coupling needs besides the gradient.
LFQ_HD constexpr int cotangents_of(int scale, int outputs) { return scale == LFQ_SCALE_SITE ? outputs - 1 : outputs; }

// ---- once a call: a block for each layer, and one for the action -----------------------------------
// Calls f(tap, sublattice of the set of weights, whether it is there that the tap begins) for the links of a sublattice.
template <class F>
LFQ_DEVICE void each_link(const lfq_layer& l, bool action, int s, F&& f) {
  if (action) {
    int centre = 0, stride = 1;
    for (int axis = 0; axis < l.ndim; ++axis, stride *= 3) centre += stride;
    // First the forward neighbours.
    for (int sign = 1; sign >= -1; sign -= 2) {
      stride = 1;
      for (int axis = 0; axis < l.ndim; ++axis, stride *= 3) f(centre + sign * stride, s, true);
    }
    return;
  }
  if (l.kind != LFQ_LAYER_COUPLING) return;
  const unsigned active = active_of(l), frozen = frozen_of(l);
  const bool begins = active >> s & 1;
  if (!begins && !(frozen >> s & 1)) return;
  for (int tap = 0; tap < taps_of(l); ++tap) {
    const int other = s ^ flip_of_tap(l.ndim, l.kernel_size, tap);
    if ((begins ? frozen : active) >> other & 1) f(tap, begins ? s : other, begins);
  }
}
template <class T>
__global__ void prepare_direct_kernel(int n_layers, const lfq_layer* layers, const T* weights, direct_layer* prepared, char* links,
                                      int64_t stride) {
  const bool action = int(blockIdx.x) == n_layers;
  const lfq_layer& l = layers[action ? n_layers - 1 : blockIdx.x];
  direct_layer& d = prepared[blockIdx.x];
  const int s = threadIdx.x, n_sublattices = 1 << l.ndim;
  if (s < n_sublattices) {
    int n = 0;
    each_link(l, action, s, [&](int, int, bool) { ++n; });
    d.n_links[s] = n;
  }
  __syncthreads();
  if (s == 0) {
    d.kind = action ? -1 : l.kind;
    d.ndim = l.ndim;
    d.n = int(sites_of(l) >> l.ndim);
    d.low = 0;
    int bits = 0;
    for (int axis = 0; axis < l.ndim; ++axis) {
      const int half = l.extent[l.ndim - 1 - axis] / 2, first = bits;
      while (1 << (bits - first) < half) ++bits;
      d.axis[axis] = unsigned(half - 1) << first;
      d.first_bit[axis] = first;
      d.low |= unsigned((half - 1) >> 1 << first) * unsigned(sizeof(T));
    }
    d.log_n = bits;
    d.n_active = d.n_frozen = 0;
    if (d.kind == LFQ_LAYER_COUPLING) {
      const unsigned active = active_of(l), frozen = frozen_of(l);
      const int n_sets = l.sublattices ? sets_of(l) : 0;
      for (int set = 0; set < n_sets; ++set) d.active[d.n_active++] = sublattice_of_set(l, set);
      for (int i = 0; i < n_sublattices; ++i) {
        if (n_sets == 0 && (active >> i & 1)) d.active[d.n_active++] = i;
        if (frozen >> i & 1) d.frozen[d.n_frozen++] = i;
      }
      d.scale = l.scale;
      d.outputs = outputs_of(l);
      d.set_size = l.sublattices ? int(set_size_of(l)) : 0;
      d.parameters = int(net_weights_of(l));
      d.bias = l.bias ? int(convolution_of(l, 0).bias) : -1;
    }
    d.weight_offset = l.weight_offset;
    int from = 0;
    for (int i = 0; i < n_sublattices; ++i) {
      d.first[i] = from;
      from += d.n_links[i];
    }
  }
  __syncthreads();
  if (s >= n_sublattices) return;
  const int k = action ? 3 : l.kernel_size, outputs = action ? 1 : d.outputs;
  const int64_t size = link_bytes<T>(outputs);
  char* to = links + blockIdx.x * stride + d.first[s] * size;
  each_link(l, action, s, [&](int tap, int owner, bool begins) {
    unsigned displacement = 0, other = 0;
    for (int axis = 0, rest = tap; axis < l.ndim; ++axis) {
      const int offset = rest % k - k / 2, half = l.extent[l.ndim - 1 - axis] / 2;
      const int c = (s >> axis & 1) + (begins ? offset : -offset);
      rest /= k;
      other |= unsigned(c & 1) << axis;
      displacement |= unsigned((c >> 1) & (half - 1)) << d.first_bit[axis];
    }
    displacement *= unsigned(sizeof(T));
    unsigned* const way = reinterpret_cast<unsigned*>(to);
    way[0] = displacement & d.low;
    way[1] = (displacement & ~d.low) | (unsigned(s) ^ other) * unsigned(d.n) * unsigned(sizeof(T));
    T* const w = reinterpret_cast<T*>(way + 2);
    for (int o = 0; o < outputs; ++o)
      w[o] = action ? T(1) : weights[l.weight_offset + (l.sublattices ? set_of_sublattice(l, owner) : 0) * int64_t(d.set_size) + o * taps_of(l) + tap];
    to += size;
  });
}

// ---- sites ---------------------------------------------------------------------------------------
template <class T>
LFQ_DEVICE T& shared_at(unsigned byte) {
  return *reinterpret_cast<T*>(lfq_shared + byte);
}
// Where the field x lies: a constant, so that no instruction is spent on adding it. Before it lies the scratch of sums.
constexpr unsigned direct_x = 2048;

// K sites of a sublattice, a block of threads apart, so that what is loaded for one is used for K.
template <class T, int K>
struct site_group {
  unsigned site[K], inside[K], outside[K];  // bytes of a field

  LFQ_DEVICE site_group(const direct_layer& l, int s, int j) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      site[k] = (unsigned(s) * unsigned(l.n) + unsigned(j + k * int(blockDim.x))) * unsigned(sizeof(T));
      inside[k] = site[k] & l.low;
      outside[k] = site[k] ^ inside[k];
    }
  }
  // Calls f(link, k, byte that it leads to).
  template <int N, class F>
  LFQ_DEVICE void each_link(const flow_link<T, N>* links, int n, F&& f) const {
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      const flow_link<T, N> link = links[i];
#pragma unroll
      for (int k = 0; k < K; ++k) f(link, k, (inside[k] + link.add) ^ outside[k] ^ link.flip);
    }
  }
};
template <class T, int N>
LFQ_DEVICE const flow_link<T, N>* links_of(const char* links, const direct_layer& l, int s) {
  return reinterpret_cast<const flow_link<T, N>*>(links) + l.first[s];
}
// Deals the sites of several sublattices out to threads: calls f(number in the list, first j, constant K) for groups of K
// sites. Where a sublattice has fewer sites than there are threads, these take several at once.
template <int MOST, class F>
LFQ_DEVICE void each_group(const direct_layer& l, int count, F&& f) {
  const int n = l.n, threads = blockDim.x, at_once = threads >> l.log_n, each = n / threads;
  for (int i = int(threadIdx.x) >> l.log_n; i < count; i += at_once > 0 ? at_once : 1) {
    const int first = int(threadIdx.x) & (n - 1);
    if (MOST >= 4 && each >= 4)
      for (int j = first; j < n; j += 4 * threads) f(i, j, std::integral_constant<int, MOST >= 4 ? 4 : 1>());
    else if (MOST >= 2 && each >= 2)
      for (int j = first; j < n; j += 2 * threads) f(i, j, std::integral_constant<int, MOST >= 2 ? 2 : 1>());
    else
      for (int j = first; j < n; j += threads) f(i, j, std::integral_constant<int, 1>());
  }
}
// Groups of couplings with many outputs would take too many registers.
LFQ_HD constexpr int most_sites(int outputs) { return outputs <= 2 ? 4 : 1; }

// Of a set of weights, as couple_site takes them.
template <class T, scale_kind S, int N>
struct direct_parameters {
  std::conditional_t<N == 2, T[4], const T*> p;
  LFQ_DEVICE direct_parameters(const T* w, bool inverse) : p() {
    if constexpr (N == 2) {
      for (int i = 0; i < n_parameters(int(S), N); ++i) p[i] = w[i];
      if (S == scale_kind::site && inverse) p[3] = T(1) / p[0];
    } else {
      p = w;
    }
  }
};

// Keeps what backward needs unless kept is null; `logs`: returns the thread's share of the log-det.
template <class T, scale_kind S, int N>
LFQ_CALLED T direct_couple(const direct_layer& l, const char* links, const T* weights, T* kept, bool all, bool logs) {
  T log_sum = T(0);
  const int stride = l.n_active * l.n;
  each_group<most_sites(N)>(l, l.n_active, [&](int set, int j, auto count) {
    constexpr int K = decltype(count)::value;
    const int s = l.active[set];
    const T* const w = weights + set * l.set_size;
    const direct_parameters<T, S, N> by(w + l.parameters, false);
    const site_group<T, K> group(l, s, j);
    T u[K][N];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      const T bias = l.bias >= 0 ? w[l.bias + c] : T(0);
      for (int k = 0; k < K; ++k) u[k][c] = bias;
    }
    group.each_link(links_of<T, N>(links, l, s), l.n_links[s], [&](const flow_link<T, N>& link, int k, unsigned to) {
      const T v = shared_at<T>(direct_x + to);
      for (int c = 0; c < N; ++c) u[k][c] = fma(link.weight[c], v, u[k][c]);
    });
#pragma unroll
    for (int k = 0; k < K; ++k) {
      T& field = shared_at<T>(direct_x + group.site[k]);
      const T before = field;
      const coupled_site<T, N> a = couple_site<S>(before, u[k], by.p);
      field = a.y;
      if (logs) log_sum += log_slope<S>(a, by.p);
      if (!kept) continue;
      T* const keep = kept + (set * l.n + j + k * int(blockDim.x));
      keep[0] = a.h[0];
      if (S == scale_kind::site && !all) continue;
      for (int c = 1; c < N; ++c) keep[c * stride] = a.h[c];
      keep[N * stride] = a.slope;
      keep[(N + 1) * stride] = before;
    }
  });
  return log_sum;
}

// From g = dL/dy at the active sites: dL/dx of those to g, dL/du for every output. Site maps, where du[0] = dL/dx, leave
// the other one only.
template <class T, scale_kind S, int N>
LFQ_DEVICE void couple_back(const direct_layer& l, const T* weights, const T* kept, unsigned g, unsigned du, bool all, T dlog_det,
                            double* dweights) {
  constexpr bool of_site = S == scale_kind::site;
  const int n = l.n, stride = l.n_active * n;
  const unsigned field_bytes = unsigned(n << l.ndim) * unsigned(sizeof(T));
  const auto back = [&](int set, int j, bool terms_wanted, auto count, auto&& add) {
    constexpr int K = decltype(count)::value;
    const direct_parameters<T, S, N> by(weights + set * l.set_size + l.parameters, terms_wanted);
    const T* const keep = kept + (set * n + j);
    const unsigned site = (unsigned(l.active[set]) * unsigned(n) + unsigned(j)) * unsigned(sizeof(T));
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned step = unsigned(k) * blockDim.x, at = site + step * unsigned(sizeof(T));
      T h[N], out[N], slope, before = T(0);
      h[0] = keep[step];
      for (int c = 1; c < N; ++c) h[c] = of_site && !all ? T(0) : keep[unsigned(c * stride) + step];
      if constexpr (of_site)
        slope = site_slope(h[0], by.p);
      else
        slope = keep[unsigned(N * stride) + step];
      if (!of_site || all) before = keep[unsigned((N + 1) * stride) + step];
      T& gradient = shared_at<T>(g + at);
      const T dy = gradient;
      if (terms_wanted) {
        T& field = shared_at<T>(direct_x + at);
        parameter_terms<S>(h, by.p, slope, before, field, dy, dlog_det, add);
        field = before;
      }
      gradient = couple_site_backward<S>(h, by.p, slope, before, dy, dlog_det, out);
      for (int c = of_site; c < N; ++c) shared_at<T>(du + unsigned(c - of_site) * field_bytes + at) = out[c];
    }
  };
  if (!dweights) {
    each_group<most_sites(N)>(l, l.n_active, [&](int set, int j, auto count) { back(set, j, false, count, [](int, T, T) {}); });
    return;
  }
  constexpr int n_terms = n_parameters(int(S), N);
  // One set of weights after the other, and sublattices that share one together.
  double terms[n_terms > 0 ? n_terms : 1] = {};
  for (int set = 0; set < l.n_active; ++set) {
    for (int j = threadIdx.x; j < n; j += blockDim.x)
      back(set, j, true, std::integral_constant<int, 1>(), [&](int c, T a, T b) { terms[c] += double(a * b); });
    if (n_terms == 0 || (l.set_size == 0 && set + 1 < l.n_active)) continue;
    block_sum(terms);
    if (threadIdx.x == 0)
      for (int c = 0; c < n_terms; ++c) dweights[set * l.set_size + l.parameters + c] += terms[c];
    for (double& t : terms) t = 0;
  }
}
// Gathers dL/dx at the frozen sites.
template <class T, bool SITE, int N>
LFQ_DEVICE void gather_back(const direct_layer& l, const char* links, unsigned g, unsigned du) {
  const unsigned field = unsigned(l.n << l.ndim) * unsigned(sizeof(T));
  each_group<most_sites(N)>(l, l.n_frozen, [&](int i, int j, auto count) {
    constexpr int K = decltype(count)::value;
    const int s = l.frozen[i];
    const site_group<T, K> group(l, s, j);
    T sum[K];
#pragma unroll
    for (int k = 0; k < K; ++k) sum[k] = shared_at<T>(g + group.site[k]);
    group.each_link(links_of<T, N>(links, l, s), l.n_links[s], [&](const flow_link<T, N>& link, int k, unsigned to) {
      if constexpr (SITE) sum[k] = fma(link.weight[0], shared_at<T>(g + to), sum[k]);
      for (int c = SITE; c < N; ++c) sum[k] = fma(link.weight[c], shared_at<T>(du + unsigned(c - SITE) * field + to), sum[k]);
    });
#pragma unroll
    for (int k = 0; k < K; ++k) shared_at<T>(g + group.site[k]) = sum[k];
  });
}
// Adds the sums over sites of du times the field at each tap: a warp for each set of weights and tap.
template <class T, bool SITE, int N>
LFQ_DEVICE void weights_back(const direct_layer& l, const lfq_layer& layer, const char* links, unsigned g, unsigned du, double* dweights) {
  const unsigned field = unsigned(l.n << l.ndim) * unsigned(sizeof(T));
  const int lane = threadIdx.x % warp_size, n_warps = blockDim.x / warp_size, taps = taps_of(layer), n = l.n;
  const auto cotangent = [&](int c, unsigned site) { return SITE && c == 0 ? shared_at<T>(g + site) : shared_at<T>(du + unsigned(c - SITE) * field + site); };
  const unsigned frozen = frozen_of(layer);
  // An item more for the biases.
  const int items = taps + (l.bias >= 0);
  const int n_sets = l.set_size > 0 ? l.n_active : 1, together = l.n_active / n_sets;
  for (int item = threadIdx.x / warp_size; item < n_sets * items; item += n_warps) {
    const int set = item / items, tap = item % items;
    const bool bias = tap == taps;
    const int flip = bias ? 0 : flip_of_tap(l.ndim, layer.kernel_size, tap);
    double total[N] = {};
    bool any = bias;
    for (int k = set * together; k < (set + 1) * together; ++k) {
      const int s = l.active[k];
      if (!bias && !(frozen >> (s ^ flip) & 1)) continue;
      any = true;
      int number = 0;
      for (int t = 0; t < tap; ++t) number += frozen >> (s ^ flip_of_tap(l.ndim, layer.kernel_size, t)) & 1;
      const flow_link<T, N>* const from = links_of<T, N>(links, l, s);
      const unsigned add = bias ? 0 : from[number].add, turn = bias ? 0 : from[number].flip;
      T sum[N] = {};
      for (int j = lane; j < n; j += warp_size) {
        const unsigned site = (unsigned(s) * unsigned(n) + unsigned(j)) * unsigned(sizeof(T)), inside = site & l.low;
        const T v = bias ? T(1) : shared_at<T>(direct_x + ((inside + add) ^ (site ^ inside) ^ turn));
        for (int c = 0; c < N; ++c) sum[c] = fma(v, cotangent(c, site), sum[c]);
      }
      for (int c = 0; c < N; ++c) total[c] += double(sum[c]);
    }
    if (!any) continue;
    warp_sum(total);
    if (lane == 0)
      for (int c = 0; c < N; ++c) dweights[set * l.set_size + (bias ? l.bias + c : c * taps + tap)] += total[c];
  }
}
template <class T, scale_kind S, int N>
LFQ_CALLED void direct_couple_backward(const direct_layer& l, const lfq_layer& layer, const char* links, const T* weights, const T* kept,
                                       unsigned g, unsigned du, bool all, T dlog_det, double* dweights) {
  constexpr bool of_site = S == scale_kind::site;
  couple_back<T, S, N>(l, weights, kept, g, du, all, dlog_det, dweights);
  __syncthreads();
  if (dweights) weights_back<T, of_site, N>(l, layer, links, g, du, dweights);
  gather_back<T, of_site, N>(l, links, g, du);
}
// Calls f(kind, outputs) with types.
template <class F>
LFQ_DEVICE void with_coupling(const direct_layer& l, F&& f) {
  using site = std::integral_constant<scale_kind, scale_kind::site>;
  using neg_abs = std::integral_constant<scale_kind, scale_kind::neg_abs>;
  using exp = std::integral_constant<scale_kind, scale_kind::exp>;
  using even = std::integral_constant<scale_kind, scale_kind::even>;
  if (l.scale == LFQ_SCALE_SITE) return f(site(), std::integral_constant<int, 2>());
  if (l.scale == LFQ_SCALE_NEG_ABS) return f(neg_abs(), std::integral_constant<int, 2>());
  if (l.scale == LFQ_SCALE_EXP) return f(exp(), std::integral_constant<int, 2>());
  switch (l.outputs) {
    case 1: return f(even(), std::integral_constant<int, 1>());
    case 2: return f(even(), std::integral_constant<int, 2>());
    case 4: return f(even(), std::integral_constant<int, 4>());
    default: return f(even(), std::integral_constant<int, 8>());
  }
}

// ---- coarse to fine ------------------------------------------------------------------------------
// Where site i in C order lies.
LFQ_DEVICE unsigned place_of(const direct_layer& l, unsigned i) {
  unsigned sublattice = 0, j = 0;
#pragma unroll
  for (int axis = 0; axis < LFQ_MAX_DIM; ++axis)
    if (axis < l.ndim) {
      // In C order each coordinate of a coarse site lies behind a parity bit of each axis so far.
      j |= (i >> (axis + 1)) & l.axis[axis];
      sublattice |= (i >> (l.first_bit[axis] + axis) & 1u) << axis;
    }
  return (sublattice << l.log_n) | j;
}
// j of the coarse sites one step on along some axes, or back.
template <int D>
LFQ_DEVICE void steps_of(const direct_layer& l, unsigned j, bool back, unsigned (&to)[1 << D]) {
  to[0] = j;
#pragma unroll
  for (int axis = 0; axis < D; ++axis) {
    const unsigned bits = l.axis[axis], one = back ? bits : bits & (0u - bits);
#pragma unroll
    for (int s = 0; s < 1 << axis; ++s) to[s | 1 << axis] = (to[s] & ~bits) | ((to[s] + one) & bits);
  }
}
// Of an interleave or an upsampling, for each number of odd coordinates.
template <class T, int D>
struct resizing {
  T scale, coefficient[D + 1], width[D + 1];
  LFQ_DEVICE resizing(const direct_layer& l, const T* w) {
    const bool upsamples = l.kind == LFQ_LAYER_UPSAMPLE;
    scale = upsamples ? w[0] : T(1);
    for (int c = 1; c <= D; ++c) {
      coefficient[c] = upsamples ? w[2 * c - 1] : T(0);
      width[c] = upsamples ? w[2 * c] : T(1);
    }
  }
};
LFQ_DEVICE constexpr int odd_axes(int s) { return (s & 1) + (s >> 1 & 1) + (s >> 2 & 1) + (s >> 3 & 1); }

// `below`: the layer that wrote the coarse field, null where it lies in C order.
template <class T, int D>
LFQ_CALLED void direct_upsample(const direct_layer& l, const direct_layer* below, const T* weights, const T* z, unsigned spare) {
  const resizing<T, D> by(l, weights + l.weight_offset);
  const int n = l.n;
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    unsigned near[1 << D];
    T sum[1 << D];
    steps_of<D>(l, unsigned(j), false, near);
#pragma unroll
    for (int s = 0; s < 1 << D; ++s) sum[s] = shared_at<T>(direct_x + (below ? place_of(*below, near[s]) : near[s]) * unsigned(sizeof(T)));
    shared_at<T>(spare + unsigned(j) * unsigned(sizeof(T))) = by.scale * sum[0];
#pragma unroll
    for (int axis = 0; axis < D; ++axis)
#pragma unroll
      for (int s = 0; s < 1 << D; ++s)
        if (s >> axis & 1) sum[s] += sum[s ^ 1 << axis];
#pragma unroll
    for (int s = 1; s < 1 << D; ++s) {
      const unsigned site = unsigned(s * n + j);
      // The coarse field lies before the noise's places.
      shared_at<T>(direct_x + site * unsigned(sizeof(T))) = fma(by.coefficient[odd_axes(s)], sum[s], by.width[odd_axes(s)] * z[site]);
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const unsigned byte = unsigned(j) * unsigned(sizeof(T));
    shared_at<T>(direct_x + byte) = shared_at<T>(spare + byte);
  }
}
// From g = dL/dy: that of the noise where the noise lies, that of the coarse field where this one lies. With dweights
// x, the layer's result, is turned into the coarse field too.
template <class T, int D>
LFQ_CALLED void direct_upsample_backward(const direct_layer& l, const direct_layer* below, const T* weights, const T* z, unsigned g,
                                         unsigned spare, T dlog_det, double* dweights) {
  const resizing<T, D> by(l, weights + l.weight_offset);
  const int n = l.n;
  const auto byte = [](unsigned site) { return site * unsigned(sizeof(T)); };
  const unsigned spare_x = spare + byte(unsigned(n));
  // d/dscale, then for each number of odd coordinates d/dmean and d/dwidth
  double sum[2 * D + 1] = {};
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    unsigned near[1 << D];
    steps_of<D>(l, unsigned(j), true, near);
    T total = by.scale * shared_at<T>(g + byte(unsigned(j)));
#pragma unroll
    for (int s = 1; s < 1 << D; ++s) {
      T part = T(0);
#pragma unroll
      for (int t = 0; t < 1 << D; ++t)
        if ((t & s) == t) part += shared_at<T>(g + byte(unsigned(s * n) + near[t]));
      total = fma(by.coefficient[odd_axes(s)], part, total);
    }
    shared_at<T>(spare + byte(unsigned(j))) = total;
    if (!dweights) continue;
    const T y = shared_at<T>(direct_x + byte(unsigned(j)));
    sum[0] += double(shared_at<T>(g + byte(unsigned(j))) * y);
    shared_at<T>(spare_x + byte(unsigned(j))) = y / by.scale;
    steps_of<D>(l, unsigned(j), false, near);
#pragma unroll
    for (int s = 1; s < 1 << D; ++s) {
      T coarse = T(0);
#pragma unroll
      for (int t = 0; t < 1 << D; ++t)
        if ((t & s) == t) coarse += shared_at<T>(direct_x + byte(near[t]));
      const T gy = shared_at<T>(g + byte(unsigned(s * n + j)));
      sum[2 * odd_axes(s) - 1] += double(gy * (coarse / by.scale));
      sum[2 * odd_axes(s)] += double(gy * (by.width[odd_axes(s)] * z[s * n + j]));
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const unsigned to = byte(below ? place_of(*below, unsigned(j)) : unsigned(j));
    shared_at<T>(g + to) = shared_at<T>(spare + byte(unsigned(j)));
    if (dweights) shared_at<T>(direct_x + to) = shared_at<T>(spare_x + byte(unsigned(j)));
#pragma unroll
    for (int s = 1; s < 1 << D; ++s) {
      T& there = shared_at<T>(g + byte(unsigned(s * n + j)));
      there = by.width[odd_axes(s)] * there;
    }
  }
  if (!dweights || l.kind == LFQ_LAYER_INTERLEAVE) return;
  block_sum(sum);
  if (threadIdx.x == 0)
    add_upsampling_terms(D, double(by.scale), by.coefficient, sum, double(dlog_det), double(n), dweights + l.weight_offset);
}

template <class T>
struct direct_block {
  // 64 registers a thread for float, 128 for double.
  static constexpr int most_threads = 512, least_blocks = sizeof(T) == 4 ? 2 : 1;

  const flow_program<T>& flow;
  unsigned g, du;  // bytes in shared memory
  T* cache;
  double* dweights;  // null when not wanted

  LFQ_DEVICE direct_block(const flow_program<T>& f, const buffer_plan& plan, bool weights)
      : flow(f),
        g(unsigned(plan.offset[buffer_g])),
        du(unsigned(plan.offset[buffer_du])),
        cache(plan.get<T>(buffer_cache)),
        dweights(weights ? plan.dweights + blockIdx.x * f.n_weights : nullptr) {}

  LFQ_DEVICE const direct_layer* below(int n) const { return n > 0 ? flow.direct + n - 1 : nullptr; }
  LFQ_DEVICE const char* links(int n) const { return flow.links + n * flow.links_stride; }
  // Where entry i of a latent lies: as it is, but for a first field that no layer enlarges.
  LFQ_DEVICE unsigned place_of_latent(int64_t i) const {
    return i < flow.first_volume && !flow.enlarges_first ? place_of(flow.direct[0], unsigned(i)) : unsigned(i);
  }
  LFQ_DEVICE T& field_at(int64_t i) const { return shared_at<T>(direct_x + place_of(flow.direct[flow.n_layers], unsigned(i)) * unsigned(sizeof(T))); }
  LFQ_DEVICE T& field_gradient_at(int64_t i) const { return shared_at<T>(g + place_of(flow.direct[flow.n_layers], unsigned(i)) * unsigned(sizeof(T))); }
  LFQ_DEVICE T& gradient_at(int64_t i) const { return shared_at<T>(g + place_of_latent(i) * unsigned(sizeof(T))); }
  // For smearing, when the field is not needed.
  LFQ_DEVICE T* scratch() const { return &shared_at<T>(direct_x); }

  // x = f(z); what backward needs is kept unless `keep` is false. log_det null when not wanted: the thread's share.
  LFQ_CALLED void forward(const T* z, bool keep, double* log_det) {
    const unsigned g = this->g;
    T* kept = cache;
    each_of(flow.first_volume, [&](int64_t i) { shared_at<T>(direct_x + place_of_latent(i) * unsigned(sizeof(T))) = z[i]; });
    __syncthreads();
    for (int n = 0; n < flow.n_layers; ++n) {
      const direct_layer& l = flow.direct[n];
      if (l.kind == LFQ_LAYER_COUPLING) {
        T sum = T(0);
        with_coupling(l, [&](auto kind, auto outputs) {
          sum = direct_couple<T, decltype(kind)::value, decltype(outputs)::value>(l, links(n), flow.weights + l.weight_offset,
                                                                                   keep ? kept : nullptr, flow.keeps_all, log_det != nullptr);
        });
        if (log_det) *log_det += double(sum);
        if (keep) kept += int64_t(kept_of(l.scale, l.outputs, flow.keeps_all)) * l.n_active * l.n;
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = flow.weights[l.weight_offset];
        each_of(l.n << l.ndim, [&](int64_t i) { (&shared_at<T>(direct_x))[i] *= factor; });
      } else {
        switch (l.ndim) {
          case 1: direct_upsample<T, 1>(l, below(n), flow.weights, z, g); break;
          case 2: direct_upsample<T, 2>(l, below(n), flow.weights, z, g); break;
          case 3: direct_upsample<T, 3>(l, below(n), flow.weights, z, g); break;
          default: direct_upsample<T, 4>(l, below(n), flow.weights, z, g);
        }
      }
      __syncthreads();
    }
    if (keep) cache_end = kept;
  }
  // After forward with keep, and with dL/dx in g: dL/dz to gradient_at. x is overwritten.
  LFQ_CALLED void backward(const T* z, T dlog_det) {
    const unsigned g = this->g, du = this->du;
    const T* kept = cache_end;
    double* const dweights = this->dweights;
    for (int n = flow.n_layers - 1; n >= 0; --n) {
      const direct_layer& l = flow.direct[n];
      if (l.kind == LFQ_LAYER_COUPLING) {
        kept -= int64_t(kept_of(l.scale, l.outputs, flow.keeps_all)) * l.n_active * l.n;
        with_coupling(l, [&](auto kind, auto outputs) {
          direct_couple_backward<T, decltype(kind)::value, decltype(outputs)::value>(
              l, flow.layers[n], links(n), flow.weights + l.weight_offset, kept, g, du, flow.keeps_all, dlog_det,
              dweights ? dweights + l.weight_offset : nullptr);
        });
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = flow.weights[l.weight_offset], inverse = T(1) / factor;
        double sum[1] = {0};
        T* const field = &shared_at<T>(direct_x);
        T* const gradient = &shared_at<T>(g);
        each_of(l.n << l.ndim, [&](int64_t i) {
          if (dweights) {
            sum[0] += double(gradient[i] * field[i]);
            field[i] *= inverse;
          }
          gradient[i] *= factor;
        });
        if (dweights) {
          block_sum(sum);
          if (threadIdx.x == 0) dweights[l.weight_offset] += double(dlog_det) * (l.n << l.ndim) + sum[0];
        }
      } else {
        switch (l.ndim) {
          case 1: direct_upsample_backward<T, 1>(l, below(n), flow.weights, z, g, du, dlog_det, dweights); break;
          case 2: direct_upsample_backward<T, 2>(l, below(n), flow.weights, z, g, du, dlog_det, dweights); break;
          case 3: direct_upsample_backward<T, 3>(l, below(n), flow.weights, z, g, du, dlog_det, dweights); break;
          default: direct_upsample_backward<T, 4>(l, below(n), flow.weights, z, g, du, dlog_det, dweights);
        }
      }
      __syncthreads();
    }
  }

  // dS/dphi of the field into g; `energies`: returns the thread's share of the action.
  LFQ_CALLED double action_gradient(const lfq_phi4& theory, bool energies) const {
    const direct_layer& l = flow.direct[flow.n_layers];
    const phi4_site<T> site_action(theory.beta, theory.lam);
    const unsigned g = this->g;
    const int ndim = l.ndim;
    double s = 0;
    each_group<4>(l, 1 << ndim, [&](int sublattice, int j, auto count) {
      constexpr int K = decltype(count)::value;
      const site_group<T, K> group(l, sublattice, j);
      const flow_link<T, 1>* const way = links_of<T, 1>(links(flow.n_layers), l, sublattice);
      T ahead[K] = {}, behind[K] = {};
      group.each_link(way, ndim, [&](const flow_link<T, 1>&, int k, unsigned to) { ahead[k] += shared_at<T>(direct_x + to); });
      group.each_link(way + ndim, ndim, [&](const flow_link<T, 1>&, int k, unsigned to) { behind[k] += shared_at<T>(direct_x + to); });
      T part = T(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T phi = shared_at<T>(direct_x + group.site[k]);
        shared_at<T>(g + group.site[k]) = -site_action.force(phi, ahead[k] + behind[k]);
        if (energies) part += site_action.action(phi, ahead[k]);
      }
      if (energies) s += double(part);
    });
    __syncthreads();
    return s;
  }

  T* cache_end;
};

LFQ_NAMESPACE_END
