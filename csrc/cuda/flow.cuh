// Flows on the GPU: one block walks a chain through all layers. Sites are dealt out to threads anew in each loop, with
// a barrier between loops. The kernels at the end know two ways of doing so: flow_block for every flow, and direct_block
// (direct_flow.cuh).
#pragma once
#include <type_traits>

#include "cuda/hmc.cuh"
#include "lfq/coupling.hpp"

LFQ_NAMESPACE_BEGIN

// What is called once a layer: inlined into every kernel it would make ptxas work for minutes.
#define LFQ_CALLED __device__ __noinline__

// Output channels that a thread sums at a time.
constexpr int channel_block = 8;

// What a forward pass keeps of a layer for the backward one.
LFQ_HD int64_t cache_of(const lfq_layer& l) {
  if (l.kind == LFQ_LAYER_COUPLING) return (outputs_of(l) + 2) * (sites_of(l) / 2);
  return resizes(l) ? sites_of(l) >> l.ndim : 0;
}

// A flow with its weights in the type of the loops: those of couplings as they are, but for the logarithms at the end of
// each set of a site map; of a rescale its factor; of an upsampling its scale, then coefficient and width for each number of odd
// coordinates.
template <class T>
struct flow_program {
  int n_layers, first_volume;
  int64_t volume, n_weights;
  const lfq_layer* layers;
  const T* weights;
  const double* log_det;  // of the layers whose log-det does not depend on the field

  // What direct_block reads.
  const char* records;   // null: flow_block
  int64_t record_stride;
  bool enlarges_first;   // the first layer resizes
  bool keeps_all;        // a forward pass keeps what gradients of weights need
  bool keeps_field;      // a backward pass does not write to the field
};

// One block.
template <class T>
__global__ void prepare_kernel(int n_layers, const lfq_layer* layers, int64_t n_weights, const double* raw, T* weights, double* log_det) {
  for (int64_t i = threadIdx.x; i < n_weights; i += blockDim.x) weights[i] = T(raw[i]);
  __syncthreads();
  double sum[1] = {0};
  for (int n = threadIdx.x; n < n_layers; n += blockDim.x) {
    const lfq_layer& l = layers[n];
    const double* w = raw + l.weight_offset;
    T* out = weights + l.weight_offset;
    if (l.kind == LFQ_LAYER_COUPLING)
      for (int64_t set = 0; set < sets_of(l); ++set)
        for (int64_t at = set * set_size_of(l) + net_weights_of(l), i = at; i < at + parameters_of(l); ++i)
          out[i] = T(parameter_of(l, w[i]));
    if (l.kind == LFQ_LAYER_RESCALE) {
      out[0] = T(::exp(w[0]));
      sum[0] += double(sites_of(l)) * w[0];
    }
    if (l.kind == LFQ_LAYER_UPSAMPLE) {
      const upsampling u(l, w, sum[0]);
      out[0] = T(u.scale);
      for (int c = 1; c <= l.ndim; ++c) {
        out[2 * c - 1] = T(u.coefficient[c]);
        out[2 * c] = T(u.width[c]);
      }
    }
  }
  block_sum(sum);
  if (threadIdx.x == 0) *log_det = sum[0];
}

// ---- geometry ------------------------------------------------------------------------------
template <class F>
LFQ_DEVICE void each_of(int64_t n, F&& f) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
}

// Coordinates from the last axis to the first. Loops over axes run to LFQ_MAX_DIM and are unrolled, so that coordinates
// stay in registers.
struct place {
  int c[LFQ_MAX_DIM] = {};
  int parity = 0;
  // On a lattice of these extents, shifted.
  LFQ_DEVICE place(const int32_t* extent, int ndim, int site, int shift = 0) {
#pragma unroll
    for (int axis = 0; axis < LFQ_MAX_DIM; ++axis)
      if (axis < ndim) {
        const int n = extent[ndim - 1 - axis] >> shift;
        c[axis] = site % n;
        site /= n;
        parity ^= c[axis] & 1;
      }
  }
};
LFQ_DEVICE int wrapped(int x, int n) {
#pragma unroll 1
  while (x < 0) x += n;
#pragma unroll 1
  while (x >= n) x -= n;
  return x;
}
// The i-th site of one parity; the last extent is even, so each has one in every pair of a row.
LFQ_DEVICE place place_of_parity(const lfq_layer& l, int parity, int i, int& site) {
  place p(l.extent, l.ndim, 2 * i);
  const int odd = p.parity ^ parity;
  p.c[0] += odd;
  p.parity = parity;
  site = 2 * i + odd;
  return p;
}
LFQ_DEVICE int site_of_parity(const lfq_layer& l, int parity, int i) {
  int site;
  place_of_parity(l, parity, i, site);
  return site;
}

LFQ_DEVICE int sublattice_of(const lfq_layer& l, const place& at) {
  int sublattice = 0;
#pragma unroll
  for (int axis = 0; axis < LFQ_MAX_DIM; ++axis)
    if (axis < l.ndim) sublattice |= (at.c[axis] & 1) << axis;
  return sublattice;
}
// How many sites a coupling changes.
LFQ_DEVICE int active_sites(const lfq_layer& l) {
  return int(l.active ? count_bits(unsigned(l.active)) * (sites_of(l) >> l.ndim) : sites_of(l) / 2);
}
// The i-th site that a coupling changes with one of its several sets: they are a lattice of half the extents.
LFQ_DEVICE place place_of_set(const lfq_layer& l, int set, int i, int& site) {
  place p(l.extent, l.ndim, i, 1);
  p.parity = l.parity;
  const int sublattice = sublattice_of_set(l, set);
  int stride = 1;
  site = 0;
#pragma unroll
  for (int axis = 0; axis < LFQ_MAX_DIM; ++axis)
    if (axis < l.ndim) {
      p.c[axis] = 2 * p.c[axis] + (sublattice >> axis & 1);
      site += p.c[axis] * stride;
      stride *= l.extent[l.ndim - 1 - axis];
    }
  return p;
}

// The i-th of the sites that a coupling changes, and its set of weights.
LFQ_DEVICE place active_place(const lfq_layer& l, int i, int& site, int& set) {
  if (l.active) {
    const int each = int(sites_of(l) >> l.ndim);
    set = i / each;
    return place_of_set(l, set, i % each, site);
  }
  const place at = place_of_parity(l, l.parity, i, site);
  set = set_of_sublattice(l, sublattice_of(l, at));
  return at;
}

// Which taps of a window: those an even offset away, odd, or all; and of these, unless 0, only those on some sublattices.
enum tap_set { even_taps = 0, odd_taps = 1, all_taps = 2 };
struct tap_choice {
  int set;
  unsigned sublattices;
  LFQ_DEVICE tap_choice(int s, unsigned on = 0) : set(s), sublattices(on) {}
};
// Those by which a net without hidden layers joins active sites and frozen ones; `others` are the frozen sublattices for
// an active site, the active ones for a frozen one.
LFQ_DEVICE tap_choice direct_taps(const lfq_layer& l, unsigned others) {
  return l.active ? tap_choice(all_taps, others) : tap_choice(odd_taps);
}

// Calls f(tap, site + its offset, what turns the sublattice of the one into that of the other by exclusive or).
template <class F>
LFQ_DEVICE void each_tap(const lfq_layer& l, const place& at, const tap_choice& choice, F&& f) {
  const int k = l.kernel_size, radius = k / 2, last = l.ndim - 1, set = choice.set;
  const int sublattice = choice.sublattices ? sublattice_of(l, at) : 0;
  // The nearest neighbours, all that the papers' nets see.
  if (k == 3 && l.ndim == 2 && set == odd_taps) {
    const int height = l.extent[0], width = l.extent[1], y = at.c[1], x = at.c[0], row = y * width;
    f(1, (y > 0 ? row : height * width) - width + x, 2);
    f(3, row + (x > 0 ? x : width) - 1, 1);
    f(5, row + (x + 1 < width ? x + 1 : 0), 1);
    f(7, (y + 1 < height ? row + width : 0) + x, 2);
    return;
  }
  int n_rows = 1;
  for (int i = 0; i < last; ++i) n_rows *= k;
#pragma unroll 1
  for (int j = 0; j < n_rows; ++j) {
    int rest = j, row = 0, stride = l.extent[last], offset = radius, flip = 0;
#pragma unroll
    for (int axis = 1; axis < LFQ_MAX_DIM; ++axis)
      if (axis <= last) {
        const int o = rest % k - radius, n = l.extent[last - axis];
        rest /= k;
        offset += o;
        flip |= (o & 1) << axis;
        row += wrapped(at.c[axis] + o, n) * stride;
        stride *= n;
      }
    const int begin = set == all_taps ? 0 : (set ^ offset) & 1;
#pragma unroll 1
    for (int d = begin; d < k; d += set == all_taps ? 1 : 2) {
      const int over = flip | ((d - radius) & 1);
      if (choice.sublattices && !(choice.sublattices >> (sublattice ^ over) & 1)) continue;
      f(j * k + d, row + wrapped(at.c[0] + d - radius, l.extent[last]), over);
    }
  }
}
// The site a tap leads to.
LFQ_DEVICE int through_tap(const lfq_layer& l, const place& at, int tap) {
  const int k = l.kernel_size, radius = k / 2;
  int site = 0, stride = 1;
#pragma unroll
  for (int axis = 0; axis < LFQ_MAX_DIM; ++axis)
    if (axis < l.ndim) {
      const int n = l.extent[l.ndim - 1 - axis];
      site += wrapped(at.c[axis] + tap % k - radius, n) * stride;
      tap /= k;
      stride *= n;
    }
  return site;
}

// Sums over the forward neighbours and over all of them.
template <class T>
LFQ_DEVICE void neighbours(const lfq_phi4& t, const T* phi, int site, T& forward, T& all) {
  T ahead = T(0), behind = T(0);
  int rest = site, stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const int n = t.extent[i], c = rest % n;
    rest /= n;
    ahead += phi[site + (c + 1 < n ? stride : stride * (1 - n))];
    behind += phi[site + (c > 0 ? -stride : stride * (n - 1))];
    stride *= n;
  }
  forward = ahead;
  all = ahead + behind;
}

// ---- a block's buffers -----------------------------------------------------------------------
enum buffer_name { buffer_x, buffer_g, buffer_du, buffer_z, buffer_p, buffer_spare_x, buffer_spare_g, buffer_gz, buffer_cache,
                   buffer_hidden, buffer_du2, buffer_phi, buffer_old_g, buffer_records, n_buffers };

// Where each buffer lies: in shared memory, or in the block's slot of the workspace.
struct buffer_plan {
  bool shared[n_buffers];
  int64_t offset[n_buffers];
  size_t shared_bytes;  // asked for at launch
  int64_t slot_bytes;
  int threads, n_slots;
  char* slots;
  double* dweights;  // [slot][n_weights]

  template <class T>
  LFQ_DEVICE T* get(buffer_name b) const {
    return reinterpret_cast<T*>((shared[b] ? lfq_shared : slots + blockIdx.x * slot_bytes) + offset[b]);
  }
};

// Adds an upsampling's dL/dweights from sums of d/dscale, then d/dmean and d/dwidth for each number of odd coordinates.
template <class T>
LFQ_DEVICE void add_upsampling_terms(int ndim, double factor, const T* coefficient, const double* sum, double dlog_det, double n_coarse,
                                     double* dw) {
  double scale = sum[0], binomial = 1;
  for (int k = 1; k <= ndim; ++k) {
    binomial *= double(ndim - k + 1) / k;
    scale += double(coefficient[k]) * sum[2 * k - 1];
    dw[2 * k - 1] += factor / (1 << k) * sum[2 * k - 1];
    dw[2 * k] += dlog_det * n_coarse * binomial + sum[2 * k];
  }
  dw[0] += dlog_det * n_coarse + scale;
}

template <class T>
struct flow_block {
  // Two blocks share a multiprocessor: 128 registers a thread. Without being told, ptxas takes all 255 for whatever has a
  // backward pass.
  static constexpr int most_threads = 256, least_blocks = 2;

  const flow_program<T>& flow;
  T *x, *spare_x, *g, *spare_g, *gz, *cache, *hidden, *du, *du2;
  double* dweights;  // null when not wanted

  LFQ_DEVICE flow_block(const flow_program<T>& f, const buffer_plan& plan, bool weights)
      : flow(f),
        x(plan.get<T>(buffer_x)),
        spare_x(plan.get<T>(buffer_spare_x)),
        g(plan.get<T>(buffer_g)),
        spare_g(plan.get<T>(buffer_spare_g)),
        gz(plan.get<T>(buffer_gz)),
        cache(plan.get<T>(buffer_cache)),
        hidden(plan.get<T>(buffer_hidden)),
        du(plan.get<T>(buffer_du)),
        du2(plan.get<T>(buffer_du2)),
        dweights(weights ? plan.dweights + blockIdx.x * f.n_weights : nullptr) {}

  LFQ_DEVICE static void swap(T*& a, T*& b) {
    T* const t = a;
    a = b;
    b = t;
  }

  // ---- the nets: hidden activations are [channel][site] --------------------------------------
  struct convolution {
    int n_in, n_out, taps;
    const T *weight, *bias;   // [out][in][tap]; bias null without
    int64_t weight_at;        // in the flow's weight vector
    int set_size;             // from one set to the next in it; 0 with one alone
  };
  LFQ_DEVICE convolution convolution_of(const lfq_layer& l, int number) const {
    const convolution_layout layout = lfq::convolution_of(l, number);
    convolution c;
    c.n_in = layout.n_in;
    c.n_out = layout.n_out;
    c.taps = taps_of(l);
    c.weight_at = l.weight_offset + layout.weight;
    c.weight = flow.weights + c.weight_at;
    c.bias = l.bias ? flow.weights + l.weight_offset + layout.bias : nullptr;
    c.set_size = l.sublattices ? int(set_size_of(l)) : 0;
    return c;
  }

  // The outputs first .. first + N - 1 of a convolution at a site.
  template <int N>
  LFQ_DEVICE void convolve(const lfq_layer& l, const convolution& c, const place& at, const tap_choice& which, const T* in, int volume, int set,
                           int first, T (&sum)[N]) const {
    const T* const weight = c.weight + set * c.set_size;
    for (int n = 0; n < N; ++n) sum[n] = c.bias && first + n < c.n_out ? c.bias[set * c.set_size + first + n] : T(0);
    each_tap(l, at, which, [&](int tap, int site, int) {
      for (int i = 0; i < c.n_in; ++i) {
        const T v = in[int64_t(i) * volume + site];
        for (int n = 0; n < N; ++n)
          if (first + n < c.n_out) sum[n] = fma(weight[(int64_t(first + n) * c.n_in + i) * c.taps + tap], v, sum[n]);
      }
    });
  }

  // Runs the hidden layers on the frozen sites of the field; returns what the last convolution reads.
  LFQ_CALLED const T* run_hidden(const lfq_layer& l, const T* field) const {
    const int volume = int(sites_of(l));
    const activation_kind act = activation_kind(l.activation);
    const T* in = field;
    T* h = hidden;
    for (int number = 0; number < l.n_hidden; ++number) {
      const convolution c = convolution_of(l, number);
      const int blocks = int(ceil_div(c.n_out, channel_block));
      each_of(int64_t(blocks) * volume, [&](int64_t item) {
        const int site = int(item % volume), first = int(item / volume) * channel_block;
        const place at(l.extent, l.ndim, site);
        T u[channel_block];
        // The first layer sees frozen sites only: an odd offset away from active sites.
        convolve(l, c, at, number > 0 ? all_taps : at.parity == l.parity ? odd_taps : even_taps, in, volume, 0, first,
                 u);
        for (int n = 0; n < channel_block && first + n < c.n_out; ++n) h[int64_t(first + n) * volume + site] = activate(act, u[n]);
      });
      __syncthreads();
      in = h;
      h += int64_t(c.n_out) * volume;
    }
    return in;
  }

  // Calls f(number of the pair of sites in a row that it is one of, site, set of weights, outputs) for the active sites.
  template <int N, class F>
  LFQ_DEVICE void net(const lfq_layer& l, const T* field, F&& f) const {
    const T* in = run_hidden(l, field);
    const convolution c = convolution_of(l, l.n_hidden);
    const int volume = int(sites_of(l));
    const tap_choice which = l.n_hidden > 0 ? tap_choice(all_taps) : direct_taps(l, frozen_of(l));
    each_of(active_sites(l), [&](int64_t i) {
      int site, set;
      const place at = active_place(l, int(i), site, set);
      T u[N];
      convolve(l, c, at, which, in, volume, set, 0, u);
      f(int64_t(site / 2), site, set, u);
    });
  }

  // ---- couplings -----------------------------------------------------------------------------
  // Calls f(number of outputs); the net is compiled for each, the couplings of one number are told apart at each site.
  template <class F>
  LFQ_DEVICE static void with_outputs(const lfq_layer& l, F&& f) {
    switch (outputs_of(l)) {
      case 1: return f(std::integral_constant<int, 1>());
      case 2: return f(std::integral_constant<int, 2>());
      case 4: return f(std::integral_constant<int, 4>());
      default: return f(std::integral_constant<int, 8>());
    }
  }
  template <int N, class F>
  LFQ_DEVICE static void with_scale(int scale, F&& f) {
    if constexpr (N == 2) {
      if (scale == LFQ_SCALE_SITE) return f(std::integral_constant<scale_kind, scale_kind::site>());
      if (scale == LFQ_SCALE_NEG_ABS) return f(std::integral_constant<scale_kind, scale_kind::neg_abs>());
      if (scale == LFQ_SCALE_EXP) return f(std::integral_constant<scale_kind, scale_kind::exp>());
    }
    f(std::integral_constant<scale_kind, scale_kind::even>());
  }
  // Of a set of weights, as couple_site takes them: in registers where they are few, else from where they lie.
  template <int N>
  struct parameters {
    const T* first;  // of the first set
    int n, set_size;
    std::conditional_t<N == 2, T[4], const T*> p;

    LFQ_DEVICE parameters(const flow_program<T>& flow, const lfq_layer& l)
        : first(flow.weights + l.weight_offset + net_weights_of(l)), n(parameters_of(l)), set_size(int(set_size_of(l))), p() {
      load(0);
    }
    LFQ_DEVICE void load(int set) {
      const T* const w = first + set * set_size;
      if constexpr (N == 2) {
        for (int i = 0; i < 4; ++i)
          if (i < n) p[i] = w[i];
        if (n == 3) p[3] = T(1) / p[0];  // a site map
      } else {
        p = w;
      }
    }
  };

  // What `couple` keeps for backward: h of every output, the slope, and the field before.
  LFQ_CALLED void couple(const lfq_layer& l, T* keep, double* log_det) const {
    const int64_t half = sites_of(l) / 2;
    const int scale = l.scale;
    const bool several = l.sublattices;
    T* const x = this->x;
    double sum = 0;
    with_outputs(l, [&](auto n) {
      constexpr int N = decltype(n)::value;
      parameters<N> by(flow, l);
      net<N>(l, x, [&](int64_t i, int site, int set, const T(&u)[N]) {
        if (several) by.load(set);
        with_scale<N>(scale, [&](auto kind) {
          constexpr scale_kind S = decltype(kind)::value;
          const T before = x[site];
          const coupled_site<T, N> a = couple_site<S>(before, u, by.p);
          if (keep) {
            for (int c = 0; c < N; ++c) keep[c * half + i] = a.h[c];
            keep[N * half + i] = a.slope;
            keep[(N + 1) * half + i] = before;
          }
          x[site] = a.y;
          if (log_det) sum += double(log_slope<S>(a, by.p));
        });
      });
    });
    if (log_det) *log_det += sum;
  }
  LFQ_CALLED void uncouple(const lfq_layer& l, double& log_det) const {
    const int scale = l.scale;
    const bool several = l.sublattices;
    T* const x = this->x;
    double sum = 0;
    with_outputs(l, [&](auto n) {
      constexpr int N = decltype(n)::value;
      parameters<N> by(flow, l);
      net<N>(l, x, [&](int64_t, int site, int set, const T(&u)[N]) {
        if (several) by.load(set);
        with_scale<N>(scale, [&](auto kind) {
          T log_dy;
          x[site] = uncouple_site<decltype(kind)::value>(x[site], u, by.p, log_dy);
          sum -= double(log_dy);
        });
      });
    });
    log_det += sum;
  }

  // Adds sum over sites of dout[out][site] in[in][site + tap] to the gradient: a warp for each tap, input
  // channel and set of weights.
  LFQ_CALLED void weight_gradient(const lfq_layer& l, const convolution& c, int number, const T* in, const T* dout) const {
    const int volume = int(sites_of(l)), lane = threadIdx.x % warp_size, n_warps = blockDim.x / warp_size;
    const bool first = number == 0, last = number == l.n_hidden;
    const int n_sets = sets_of(l), changed = active_sites(l) / n_sets;
    const int64_t items = int64_t(c.taps) * c.n_in * n_sets;
    for (int64_t item = threadIdx.x / warp_size; item < items; item += n_warps) {
      const int tap = int(item % c.taps), i = int(item / c.taps % c.n_in), set = int(item / c.taps / c.n_in);
      const int flip = flip_of_tap(l.ndim, l.kernel_size, tap);
      const bool odd = count_bits(flip) & 1;
      // Taps of a first layer that do not meet frozen sites.
      if (first && last && !(l.active ? l.frozen >> (sublattice_of_set(l, set) ^ flip) & 1 : odd)) continue;
      for (int begin = 0; begin < c.n_out; begin += channel_block) {
        T sum[channel_block] = {};
        const auto add = [&](int site, const place& at) {
          const T v = in[int64_t(i) * volume + through_tap(l, at, tap)];
          for (int n = 0; n < channel_block; ++n)
            if (begin + n < c.n_out) sum[n] = fma(v, dout[int64_t(begin + n) * volume + site], sum[n]);
        };
        if (first || last) {
          // The last layer has outputs on active sites only; the first sees frozen ones.
          const int parity = last ? l.parity : odd ? l.parity : l.parity ^ 1;
          for (int j = lane; j < changed; j += warp_size) {
            int site;
            const place at = l.sublattices ? place_of_set(l, set, j, site) : place_of_parity(l, parity, j, site);
            add(site, at);
          }
        } else {
          for (int site = lane; site < volume; site += warp_size) add(site, place(l.extent, l.ndim, site));
        }
        store_sums(sum, begin, c.n_out, c.weight_at + set * c.set_size + int64_t(i) * c.taps + tap, int64_t(c.n_in) * c.taps);
      }
    }
    if (!c.bias) return;
    const int blocks = int(ceil_div(c.n_out, channel_block));
    for (int item = int(threadIdx.x) / warp_size; item < blocks * n_sets; item += n_warps) {
      const int begin = item % blocks * channel_block, set = item / blocks;
      T sum[channel_block] = {};
      for (int j = lane; j < (last ? changed : volume); j += warp_size) {
        int site = j;
        if (l.sublattices)
          place_of_set(l, set, j, site);
        else if (last)
          site = site_of_parity(l, l.parity, j);
        for (int n = 0; n < channel_block; ++n)
          if (begin + n < c.n_out) sum[n] += dout[int64_t(begin + n) * volume + site];
      }
      store_sums(sum, begin, c.n_out, c.weight_at + set * c.set_size + int64_t(c.n_in) * c.n_out * c.taps, 1);
    }
  }
  // Adds the warp's sums to the weights at first + (begin + n) stride.
  LFQ_DEVICE void store_sums(const T (&sum)[channel_block], int begin, int n_out, int64_t first, int64_t stride) const {
    double total[channel_block];
    for (int n = 0; n < channel_block; ++n) total[n] = double(sum[n]);
    warp_sum(total);
    if (threadIdx.x % warp_size == 0)
      for (int n = 0; n < channel_block && begin + n < n_out; ++n) dweights[first + (begin + n) * stride] += total[n];
  }

  // Restores x to the layer's input and turns g from dL/dy into dL/dx.
  LFQ_CALLED void couple_backward(const lfq_layer& l, const T* kept, T dlog_det) const {
    const int volume = int(sites_of(l)), scale = l.scale;
    const bool several = l.sublattices;
    const int64_t half = volume / 2;
    T *dout = du, *din = du2, *const x = this->x, *const g = this->g;
    with_outputs(l, [&](auto n) {
      constexpr int N = decltype(n)::value;
      // One set after the other where their parameters' gradients are wanted.
      const bool apart = dweights && several;
      const int n_loops = apart ? sets_of(l) : 1;
      parameters<N> by(flow, l);
      for (int loop = 0; loop < n_loops; ++loop) {
        if (apart) by.load(loop);
        double terms[2 * N + (N == 1)] = {};
        each_of(active_sites(l) / n_loops, [&](int64_t j) {
          int site, set;
          if (apart)
            place_of_set(l, loop, int(j), site);
          else
            active_place(l, int(j), site, set);
          if (several && !apart) by.load(set);
          const int64_t i = site / 2;
          const T slope = kept[N * half + i], before = kept[(N + 1) * half + i], dy = g[site];
          T h[N], du[N];
          for (int c = 0; c < N; ++c) h[c] = kept[c * half + i];
          with_scale<N>(scale, [&](auto kind) {
            constexpr scale_kind S = decltype(kind)::value;
            if (dweights)
              parameter_terms<S>(h, by.p, slope, before, x[site], dy, dlog_det,
                                 [&](int c, T a, T b) { terms[c] += double(a * b); });
            g[site] = couple_site_backward<S>(h, by.p, slope, before, dy, dlog_det, du);
          });
          for (int c = 0; c < N; ++c) dout[int64_t(c) * volume + site] = du[c];
          x[site] = before;
        });
        if (!dweights || by.n == 0) continue;
        block_sum(terms);
        if (threadIdx.x != 0) continue;
        double* dw = dweights + (by.first - flow.weights) + loop * by.set_size;
        for (int c = 0; c < 2 * N + (N == 1); ++c)
          if (c < by.n) dw[c] += terms[c];
      }
    });
    __syncthreads();
    const T* h = run_hidden(l, x);
    for (int number = l.n_hidden; number >= 0; --number) {
      const convolution c = convolution_of(l, number);
      const T* in = number > 0 ? h : x;
      if (dweights) weight_gradient(l, c, number, in, dout);
      const activation_kind act = activation_kind(l.activation);
      each_of(int64_t(c.n_in) * volume, [&](int64_t item) {
        const int site = int(item % volume), i = int(item / volume);
        const place at(l.extent, l.ndim, site);
        const int sublattice = sublattice_of(l, at);
        if (number == 0 && (l.active ? !(l.frozen >> sublattice & 1) : at.parity == l.parity)) return;
        T sum = number > 0 ? T(0) : g[site];
        const tap_choice which = number < l.n_hidden        ? tap_choice(all_taps)
                                 : at.parity == l.parity && l.n_hidden > 0 ? tap_choice(even_taps)
                                                                           : direct_taps(l, active_of(l));
        each_tap(l, at, which, [&](int tap, int from, int flip) {
          const T* w = c.weight + (c.set_size ? set_of_sublattice(l, sublattice ^ flip) * c.set_size : 0) + int64_t(i) * c.taps + (c.taps - 1 - tap);
          for (int o = 0; o < c.n_out; ++o)
            sum = fma(w[int64_t(o) * c.n_in * c.taps], dout[int64_t(o) * volume + from], sum);
        });
        if (number > 0)
          din[item] = sum * activation_slope(act, in[item]);
        else
          g[site] = sum;
      });
      __syncthreads();
      swap(dout, din);
      if (number > 1) h -= int64_t(l.hidden[number - 2]) * volume;
    }
  }

  // ---- coarse to fine --------------------------------------------------------------------------
  // Sublattice and coarse coordinates of a fine site; near(j) is the j-th of its 2^odd nearest coarse sites.
  struct fine_site {
    const lfq_layer& l;
    place at;
    int sublattice, odd;
    LFQ_DEVICE fine_site(const lfq_layer& layer, int site) : l(layer), at(layer.extent, layer.ndim, site), sublattice(0), odd(0) {
#pragma unroll
      for (int axis = 0; axis < LFQ_MAX_DIM; ++axis) {
        sublattice |= (at.c[axis] & 1) << axis;
        odd += at.c[axis] & 1;
      }
    }
    LFQ_DEVICE int near(int j) const {
      int site = 0;
#pragma unroll
      for (int axis = LFQ_MAX_DIM - 1; axis >= 0; --axis)
        if (axis < l.ndim) {
          const int n = l.extent[l.ndim - 1 - axis] / 2;
          int c = at.c[axis] / 2;
          if (at.c[axis] & 1) {
            c += j & 1;
            j >>= 1;
          }
          site = site * n + (c < n ? c : 0);
        }
      return site;
    }
    template <class F>
    LFQ_DEVICE T sum(F&& coarse) const {
      T s = T(0);
      for (int j = 0; j < 1 << odd; ++j) s += coarse(near(j));
      return s;
    }
  };
  LFQ_DEVICE T scale_of(const lfq_layer& l) const { return l.kind == LFQ_LAYER_UPSAMPLE ? flow.weights[l.weight_offset] : T(1); }
  LFQ_DEVICE T coefficient(const lfq_layer& l, int odd) const {
    return l.kind == LFQ_LAYER_UPSAMPLE ? flow.weights[l.weight_offset + 2 * odd - 1] : T(0);
  }
  LFQ_DEVICE T width(const lfq_layer& l, int odd) const {
    return l.kind == LFQ_LAYER_UPSAMPLE ? flow.weights[l.weight_offset + 2 * odd] : T(1);
  }

  // y from the coarse field and the noise in the latent z.
  LFQ_CALLED void upsample(const lfq_layer& l, const T* coarse, const T* z, T* y) const {
    const int n_coarse = int(sites_of(l) >> l.ndim);
    each_of(sites_of(l), [&](int64_t site) {
      const fine_site s(l, int(site));
      if (s.odd == 0) {
        y[site] = scale_of(l) * coarse[s.near(0)];
        return;
      }
      const T sum = s.sum([&](int c) { return coarse[c]; });
      y[site] = fma(coefficient(l, s.odd), sum, width(l, s.odd) * z[int64_t(s.sublattice) * n_coarse + s.near(0)]);
    });
  }
  LFQ_CALLED void downsample(const lfq_layer& l, const T* y, T* coarse, T* z) const {
    const int n_coarse = int(sites_of(l) >> l.ndim);
    each_of(sites_of(l), [&](int64_t site) {
      const fine_site s(l, int(site));
      if (s.odd == 0) coarse[s.near(0)] = y[site] / scale_of(l);
    });
    __syncthreads();
    each_of(sites_of(l), [&](int64_t site) {
      const fine_site s(l, int(site));
      if (s.odd == 0) return;
      const T sum = s.sum([&](int c) { return coarse[c]; });
      z[int64_t(s.sublattice) * n_coarse + s.near(0)] = (y[site] - coefficient(l, s.odd) * sum) / width(l, s.odd);
    });
  }
  // From g = dL/dy: dL/dx of the coarse field to gc, of the noise to gz.
  LFQ_CALLED void upsample_backward(const lfq_layer& l, const T* coarse, const T* z, T* gc, T dlog_det) const {
    const int n_coarse = int(sites_of(l) >> l.ndim), D = l.ndim;
    // d/dscale, then for each number of odd coordinates d/dmean and d/dwidth
    double sum[2 * LFQ_MAX_DIM + 1] = {};
    each_of(sites_of(l), [&](int64_t site) {
      const fine_site s(l, int(site));
      const T gy = g[site];
      if (s.odd == 0) {
        sum[0] += double(gy * (scale_of(l) * coarse[s.near(0)]));
        return;
      }
      const int64_t noise = int64_t(s.sublattice) * n_coarse + s.near(0);
      gz[noise] = width(l, s.odd) * gy;
      if (!dweights) return;
      sum[2 * s.odd - 1] += double(gy * s.sum([&](int c) { return coarse[c]; }));
      sum[2 * s.odd] += double(gy * (width(l, s.odd) * z[noise]));
    });
    // A coarse site gathers from the fine sites that it is near to: at 2 c, and where a coordinate is odd at 2 c +- 1.
    each_of(n_coarse, [&](int64_t c) {
      const place at(l.extent, D, int(c), 1);
      T total = T(0);
      for (int sub = 0; sub < 1 << D; ++sub) {
        int odd = 0;
        for (int i = 0; i < D; ++i) odd += sub >> i & 1;
        T part = T(0);
        for (int j = 0; j < 1 << odd; ++j) {
          int site = 0, rest = j;
#pragma unroll
          for (int axis = LFQ_MAX_DIM - 1; axis >= 0; --axis)
            if (axis < D) {
              const int n = l.extent[D - 1 - axis];
              int f = 2 * at.c[axis];
              if (sub >> axis & 1) {
                f += rest & 1 ? -1 : 1;
                rest >>= 1;
              }
              site = site * n + (f < 0 ? f + n : f);
            }
          part += g[site];
        }
        total = fma(odd == 0 ? scale_of(l) : coefficient(l, odd), part, total);
      }
      gc[c] = total;
    });
    if (!dweights || l.kind == LFQ_LAYER_INTERLEAVE) {
      __syncthreads();
      return;
    }
    block_sum(sum);
    if (threadIdx.x != 0) return;
    T factors[LFQ_MAX_DIM + 1] = {};
    for (int k = 1; k <= D; ++k) factors[k] = coefficient(l, k);
    add_upsampling_terms(D, double(scale_of(l)), factors, sum, double(dlog_det), double(n_coarse), dweights + l.weight_offset);
  }

  // ---- the flow ----------------------------------------------------------------------------------
  // x = f(z); `keep` what backward needs. log_det null when not wanted: the thread's share of what depends on the field.
  LFQ_CALLED void forward(const T* z, bool keep, double* log_det) {
    each_of(flow.first_volume, [&](int64_t i) { x[i] = z[i]; });
    __syncthreads();
    T* kept = cache;
    for (int n = 0; n < flow.n_layers; ++n) {
      const lfq_layer& l = flow.layers[n];
      if (l.kind == LFQ_LAYER_COUPLING) {
        couple(l, keep ? kept : nullptr, log_det);
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = flow.weights[l.weight_offset];
        each_of(sites_of(l), [&](int64_t i) { x[i] = x[i] * factor; });
      } else {
        if (keep) each_of(sites_of(l) >> l.ndim, [&](int64_t i) { kept[i] = x[i]; });
        upsample(l, x, z, spare_x);
        swap(x, spare_x);
      }
      __syncthreads();
      kept += cache_of(l);
    }
  }
  // From the field in x to the latent z.
  LFQ_CALLED void inverse(T* z, double& log_det) {
    for (int n = flow.n_layers - 1; n >= 0; --n) {
      const lfq_layer& l = flow.layers[n];
      if (l.kind == LFQ_LAYER_COUPLING) {
        uncouple(l, log_det);
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = flow.weights[l.weight_offset];
        each_of(sites_of(l), [&](int64_t i) { x[i] = x[i] / factor; });
      } else {
        downsample(l, x, spare_x, z);
        swap(x, spare_x);
      }
      __syncthreads();
    }
    each_of(flow.first_volume, [&](int64_t i) { z[i] = x[i]; });
  }
  // After forward with keep, and with dL/dx in g: dL/dz in gz. x is overwritten.
  LFQ_CALLED void backward(const T* z, T dlog_det) {
    int64_t at = 0;
    for (int n = 0; n < flow.n_layers; ++n) at += cache_of(flow.layers[n]);
    for (int n = flow.n_layers - 1; n >= 0; --n) {
      const lfq_layer& l = flow.layers[n];
      at -= cache_of(l);
      if (l.kind == LFQ_LAYER_COUPLING) {
        couple_backward(l, cache + at, dlog_det);
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = flow.weights[l.weight_offset], inverse = T(1) / factor;
        double sum[1] = {0};
        each_of(sites_of(l), [&](int64_t i) {
          sum[0] += double(g[i] * x[i]);
          g[i] = g[i] * factor;
          x[i] = x[i] * inverse;
        });
        if (dweights) {
          block_sum(sum);
          if (threadIdx.x == 0) dweights[l.weight_offset] += double(dlog_det) * sites_of(l) + sum[0];
        } else {
          __syncthreads();
        }
      } else {
        each_of(sites_of(l) >> l.ndim, [&](int64_t i) { x[i] = cache[at + i]; });
        __syncthreads();
        upsample_backward(l, x, z, spare_g, dlog_det);
        swap(g, spare_g);
        __syncthreads();
      }
    }
    each_of(flow.first_volume, [&](int64_t i) { gz[i] = g[i]; });
    __syncthreads();
  }

  // dS/dphi of the field in x into g; `energies`: returns the thread's share of the action.
  LFQ_CALLED double action_gradient(const lfq_phi4& theory, bool energies) const {
    const phi4_site<T> site(theory.beta, theory.lam);
    T *const x = this->x, *const g = this->g;
    double s = 0;
    each_of(flow.volume, [&](int64_t i) {
      T ahead, all;
      neighbours(theory, x, int(i), ahead, all);
      g[i] = site.gradient(x[i], x[i] * x[i], site.beta * all);
      if (energies) s += double(site.action(x[i], ahead));
    });
    __syncthreads();
    return s;
  }

  LFQ_DEVICE T& field_at(int64_t i) const { return x[i]; }
  LFQ_DEVICE T& field_gradient_at(int64_t i) const { return g[i]; }
  LFQ_DEVICE T& gradient_at(int64_t i) const { return gz[i]; }
  // Holds nothing between trajectories.
  LFQ_DEVICE T* scratch() const { return x; }
};

// ---- kernels: blocks take chains in turn --------------------------------------------------------
template <class F>
LFQ_DEVICE void each_chain(int64_t n_chains, F&& f) {
  for (int64_t chain = blockIdx.x; chain < n_chains; chain += gridDim.x) f(chain);
}

template <class T>
__global__ void __launch_bounds__(flow_block<T>::most_threads, flow_block<T>::least_blocks) inverse_kernel(const __grid_constant__ flow_program<T> flow,
    const __grid_constant__ buffer_plan plan, int64_t n_chains, const T* in, T* z, double* log_det) {
  each_chain(n_chains, [&](int64_t chain) {
    flow_block<T> block(flow, plan, false);
    double sum[1] = {0};
    each_of(flow.volume, [&](int64_t i) { block.x[i] = in[chain * flow.volume + i]; });
    __syncthreads();
    block.inverse(z + chain * flow.volume, sum[0]);
    block_sum(sum);
    if (threadIdx.x == 0) log_det[chain] = sum[0] - *flow.log_det;
  });
}

// ---- HMC of the pulled-back theory ------------------------------------------------------------------
// z and phi in device memory are the last accepted latent and its field; old_g is the gradient there.
template <class T, template <class> class Block>
struct pulled_back_block {
  const hmc_arguments& a;
  const flow_program<T>& program;
  const buffer_plan& plan;
  T *z, *phi;              // of the chain
  T *latent, *p, *new_phi, *old_g;
  bool gradient_known = false;

  LFQ_DEVICE pulled_back_block(const hmc_arguments& arguments, const flow_program<T>& f, const buffer_plan& buffers, T* chain_z, T* chain_phi)
      : a(arguments),
        program(f),
        plan(buffers),
        z(chain_z),
        phi(chain_phi),
        latent(buffers.get<T>(buffer_z)),
        p(buffers.get<T>(buffer_p)),
        new_phi(buffers.get<T>(buffer_phi)),
        old_g(buffers.get<T>(buffer_old_g)) {}

  LFQ_DEVICE Block<T> flow() const { return Block<T>(program, plan, false); }
  // dS~/dz to gradient_at; at the ends of trajectories also the field into new_phi and the threads' shares of S~ but for
  // its constant.
  LFQ_CALLED double gradient(bool ends) {
    Block<T> block = flow();
    double log_det = 0;
    __syncthreads();
    block.forward(latent, true, ends ? &log_det : nullptr);
    if (ends) each_of(a.volume, [&](int64_t i) { new_phi[i] = block.field_at(i); });
    const double s = block.action_gradient(a.theory, ends);
    block.backward(latent, T(-1));
    gradient_known = true;
    return s - log_det;
  }
  LFQ_DEVICE void keep() {
    const Block<T> block = flow();
    each_of(a.volume, [&](int64_t i) {
      z[i] = latent[i];
      phi[i] = new_phi[i];
      old_g[i] = block.gradient_at(i);
    });
  }
  LFQ_DEVICE double start() {
    each_of(a.volume, [&](int64_t i) { latent[i] = z[i]; });
    const double s = gradient(true);
    keep();
    return s;
  }
  LFQ_DEVICE double refresh(const stream& rng, uint32_t chain, double unit) {
    double p2 = 0;
    __syncthreads();
    each_of(ceil_div(a.volume, 4), [&](int64_t b) {
      T n[4];
      normal_block<T>(rng, uint32_t(b), chain, n);
      for (int j = 0; j < 4; ++j)
        if (4 * b + j < a.volume) {
          const T m = n[j] * T(unit);
          p[4 * b + j] = m;
          p2 += double(m) * double(m);
        }
    });
    __syncthreads();
    return p2;
  }
  LFQ_DEVICE void kick_drift(int kick, int drift) {
    if (!gradient_known) gradient(false);
    gradient_known = false;
    const Block<T> block = flow();
    const T vk(-a.steps.kick[kick]), vd(a.steps.drift[drift]);
    each_of(a.volume, [&](int64_t i) {
      p[i] = fma(vk, block.gradient_at(i), p[i]);
      latent[i] = fma(vd, p[i], latent[i]);
    });
  }
  LFQ_DEVICE void last_kick(int kick, double& s, double& p2) {
    s = gradient(true);
    const Block<T> block = flow();
    const T vk(-a.steps.kick[kick]);
    each_of(a.volume, [&](int64_t i) {
      const double m = double(fma(vk, block.gradient_at(i), p[i]));
      p[i] = T(m);
      p2 += m * m;
    });
  }
  LFQ_DEVICE void settle(bool accept) {
    if (accept) return keep();
    const Block<T> block = flow();
    each_of(a.volume, [&](int64_t i) {
      latent[i] = z[i];
      block.gradient_at(i) = old_g[i];
    });
  }
  // A trajectory from the momenta that are given, which end it, without an accept step.
  LFQ_DEVICE void evolve(T* momenta) {
    each_of(a.volume, [&](int64_t i) {
      latent[i] = z[i];
      p[i] = momenta[i];
    });
    double s, p2 = 0;
    const int last = integrate(a.steps, a.settings.n_steps, [&](int kick, int drift) { kick_drift(kick, drift); });
    last_kick(last, s, p2);
    each_of(a.volume, [&](int64_t i) {
      z[i] = latent[i];
      momenta[i] = p[i];
    });
  }
  LFQ_DEVICE void measure(double* out) {
    const lfq_phi4& t = a.theory;
    constexpr int n_sums = 4 + 2 * LFQ_MAX_DIM;
    double sum[n_sums] = {}, smeared2[1] = {0};
    __syncthreads();
    each_of(a.volume, [&](int64_t i) {
      T ahead, all;
      neighbours(t, phi, int(i), ahead, all);
      const double v = double(phi[i]), v2 = v * v;
      sum[0] += v;
      sum[1] += v2;
      sum[2] += v2 * v2;
      sum[3] += v * double(ahead);
      const place at(t.extent, t.ndim, int(i));
      for (int axis = 0; axis < t.ndim; ++axis) {
        double sine, cosine;
        sincospi(2.0 * at.c[t.ndim - 1 - axis] / t.extent[axis], &sine, &cosine);
        sum[4 + 2 * axis] += v * cosine;
        sum[5 + 2 * axis] += v * sine;
      }
    });
    block_sum(sum);
    T* const scratch = flow().scratch();
    const T* in = phi;
    int stride = int(a.volume);
    for (int axis = 0; axis < t.ndim; ++axis) {
      stride /= t.extent[axis];
      T* to = axis % 2 ? p : scratch;
      each_of(a.volume, [&](int64_t i) { to[i] = smeared_at<T>(a.smear, axis, in, int(i), t.extent[axis], stride); });
      __syncthreads();
      in = to;
    }
    each_of(a.volume, [&](int64_t i) { smeared2[0] += double(in[i]) * double(in[i]); });
    block_sum(smeared2);
    if (threadIdx.x == 0) store_observables(t.ndim, sum, smeared2[0], double(a.volume), out);
  }
};

// ---- everything that begins with x = f(z) --------------------------------------------------------
template <class T>
struct forward_arguments {
  const T* z;
  T* x;
  double* log_det;
};
template <class T, template <class> class Block>
LFQ_DEVICE void forward_chain(const flow_program<T>& flow, const buffer_plan& plan, const forward_arguments<T>& a, int64_t chain) {
  Block<T> block(flow, plan, false);
  const int64_t first = chain * flow.volume;
  double sum[1] = {0};
  block.forward(a.z + first, false, sum);
  each_of(flow.volume, [&](int64_t i) { a.x[first + i] = block.field_at(i); });
  block_sum(sum);
  if (threadIdx.x == 0) a.log_det[chain] = sum[0] + *flow.log_det;
}

// What a gradient is taken of: dL/dx and dL/dlog_det that are given, or S(f(z)) - log_det of the theory.
template <class T>
struct gradient_arguments {
  const T* z;
  const T* dx;               // null: of the theory
  const double* dlog_det;
  lfq_phi4 theory;
  T* dz;                     // null when not wanted; of the theory the force, - dL/dz
  double *action, *log_det;  // of the theory; log_det null: action is S(f(z)) - log_det
};
template <class T, template <class> class Block>
LFQ_DEVICE void gradient_chain(const flow_program<T>& flow, const buffer_plan& plan, const gradient_arguments<T>& a, int64_t chain) {
  Block<T> block(flow, plan, plan.dweights != nullptr);
  const int64_t first = chain * flow.volume;
  double e[2] = {0, 0};
  block.forward(a.z + first, true, a.dx ? nullptr : e + 1);
  if (a.dx) {
    each_of(flow.volume, [&](int64_t i) { block.field_gradient_at(i) = a.dx[first + i]; });
    __syncthreads();
  } else {
    e[0] = block.action_gradient(a.theory, true);
    block_sum(e);
    if (threadIdx.x == 0) {
      const double log_det = e[1] + *flow.log_det;
      a.action[chain] = a.log_det ? e[0] : e[0] - log_det;
      if (a.log_det) a.log_det[chain] = log_det;
    }
  }
  block.backward(a.z + first, T(a.dx ? a.dlog_det[chain] : -1.0));
  if (a.dz) each_of(flow.volume, [&](int64_t i) { a.dz[first + i] = a.dx ? block.gradient_at(i) : -block.gradient_at(i); });
  __syncthreads();
}

// Of evolve, momenta; of trajectories, the fields of the chains.
template <class T>
struct pulled_back_arguments {
  hmc_arguments hmc;
  T *z, *phi, *momenta;
};
template <class T, template <class> class Block>
LFQ_DEVICE void hmc_chain(const flow_program<T>& flow, const buffer_plan& plan, const pulled_back_arguments<T>& a, int64_t chain) {
  const int64_t first = chain * flow.volume;
  pulled_back_block<T, Block> potential(a.hmc, flow, plan, a.z + first, a.momenta ? nullptr : a.phi + first);
  if (a.momenta)
    potential.evolve(a.momenta + first);
  else
    run_chain(potential, a.hmc, chain);
  __syncthreads();
}

// One kernel for them all but inverse: ptxas compiles what a kernel calls anew for each.
enum class flow_task { forward, inverse, gradient, hmc };
template <class T>
struct flow_arguments {
  flow_task task;
  int64_t n_chains;
  flow_program<T> flow;
  buffer_plan plan;
  union {
    forward_arguments<T> forward;
    gradient_arguments<T> gradient;
    pulled_back_arguments<T> hmc;
  };
};
template <class T, template <class> class Block>
__global__ void __launch_bounds__(Block<T>::most_threads, Block<T>::least_blocks) flow_kernel(const __grid_constant__ flow_arguments<T> a) {
  const buffer_plan& plan = a.plan;
  if (plan.dweights) each_of(a.flow.n_weights, [&](int64_t i) { plan.dweights[blockIdx.x * a.flow.n_weights + i] = 0; });
  each_chain(a.n_chains, [&](int64_t chain) {
    switch (a.task) {
      case flow_task::forward: return forward_chain<T, Block>(a.flow, plan, a.forward, chain);
      case flow_task::inverse: return;
      case flow_task::gradient: return gradient_chain<T, Block>(a.flow, plan, a.gradient, chain);
      case flow_task::hmc: return hmc_chain<T, Block>(a.flow, plan, a.hmc, chain);
    }
  });
}

LFQ_NAMESPACE_END
