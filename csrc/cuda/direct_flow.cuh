// Flows whose couplings have no hidden layers, on lattices whose extents are powers of two: one block walks a chain
// through all layers, with the fields in shared memory.
//
// A lattice lies there sublattice by sublattice, each in C order: site s n + j is the j-th of the n sites of sublattice
// s. Threads in turn then work on sites in turn, a latent's noise lies as the field that takes it, and where a tap leads
// is an addition without carries from one coordinate to the next: two instructions in any dimension, with numbers that
// are laid out once a call. Each layer has a record of these and of its weights, which is copied to shared memory while
// the layer before it is at work.
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
LFQ_HD int link_bytes(int outputs) {
  return (2 * int(sizeof(unsigned)) + outputs * int(sizeof(T)) + 15) & ~15;
}

// The head of the record of a layer, or of the action behind the last one. Behind it lie numbers: of a coupling for each
// set of weights its biases, if any, and its parameters, else those of flow_program; then, for each sublattice, its links.
struct alignas(16) direct_layer {
  int kind, scale, outputs, ndim;  // kind -1: the action
  int bytes;                       // of the record
  int n, log_n;                    // sites of a sublattice
  unsigned low;                    // in bytes of a field: the bits of all coordinates but for the highest of each
  unsigned axis[LFQ_MAX_DIM];      // the bits of each coordinate in j, from the last axis to the first
  int first_bit[LFQ_MAX_DIM];
  int n_active, n_frozen;
  int biases, numbers, links;      // numbers of a set that are biases, and all of them; the byte where links begin
  int set_size, parameters;        // in the flow's weights: from one set to the next, 0 with one alone; those behind the net's
  bool reads_c_order;              // a resizing that comes first
  int64_t weight_offset;
  uint8_t active[max_sublattices], frozen[max_sublattices];  // the active ones set by set
  uint16_t first[max_sublattices], n_links[max_sublattices];
};

LFQ_HD bool is_direct(const lfq_layer& l) {
  for (int i = 0; i < l.ndim; ++i)
    if (l.extent[i] < 2 || (l.extent[i] & (l.extent[i] - 1))) return false;
  return l.kind != LFQ_LAYER_COUPLING || l.n_hidden == 0;
}
// Of a coupling, from active sites to frozen ones and back.
LFQ_HD int64_t count_links(const lfq_layer& l) {
  const unsigned active = active_of(l), frozen = frozen_of(l);
  int64_t n = 0;
  for (int tap = 0; tap < taps_of(l); ++tap) {
    const unsigned flip = unsigned(flip_of_tap(l.ndim, l.kernel_size, tap));
    for (unsigned s = 0; s < 1u << l.ndim; ++s) n += (active >> s & 1) && (frozen >> (s ^ flip) & 1);
  }
  return 2 * n;
}
template <class T>
LFQ_HD int64_t number_bytes(int64_t n) {
  return (n * int64_t(sizeof(T)) + 15) & ~int64_t(15);
}
template <class T>
LFQ_HD int64_t record_bytes(const lfq_layer& l) {
  if (l.kind != LFQ_LAYER_COUPLING) return sizeof(direct_layer) + number_bytes<T>(weights_of(l));
  const int outputs = outputs_of(l), numbers = parameters_of(l) + (l.bias ? outputs : 0);
  return sizeof(direct_layer) + number_bytes<T>(sets_of(l) * numbers) + count_links(l) * link_bytes<T>(outputs);
}
template <class T>
LFQ_HD int64_t action_record_bytes(int ndim) {
  return sizeof(direct_layer) + (int64_t(2 * ndim) << ndim) * link_bytes<T>(1);
}
// Numbers that a forward pass keeps of a coupling; `all`: those that gradients of weights need too.
LFQ_HD int64_t kept_of(int scale, int outputs, int64_t active_sites, bool all) {
  return ((scale == LFQ_SCALE_SITE && !all ? 1 : outputs + 2) * active_sites + 3) & ~int64_t(3);
}
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
__global__ void prepare_direct_kernel(int n_layers, const lfq_layer* layers, const T* weights, char* records, int64_t stride) {
  const bool action = int(blockIdx.x) == n_layers;
  const lfq_layer& l = layers[action ? n_layers - 1 : blockIdx.x];
  const bool coupling = !action && l.kind == LFQ_LAYER_COUPLING;
  char* const record = records + blockIdx.x * stride;
  direct_layer& d = *reinterpret_cast<direct_layer*>(record);
  const int s = threadIdx.x, n_sublattices = 1 << l.ndim;
  if (s < n_sublattices) {
    int n = 0;
    each_link(l, action, s, [&](int, int, bool) { ++n; });
    d.n_links[s] = uint16_t(n);
  }
  __syncthreads();
  if (s == 0) {
    d.kind = action ? -1 : l.kind;
    d.bytes = int(action ? action_record_bytes<T>(l.ndim) : record_bytes<T>(l));
    d.ndim = l.ndim;
    d.n = int(sites_of(l) >> l.ndim);
    d.low = 0;
    d.reads_c_order = blockIdx.x == 0;
    d.weight_offset = l.weight_offset;
    int bits = 0;
    for (int axis = 0; axis < l.ndim; ++axis) {
      const int half = l.extent[l.ndim - 1 - axis] / 2;
      d.first_bit[axis] = bits;
      d.axis[axis] = unsigned(half - 1) << bits;
      d.low |= (unsigned(half - 1) >> 1 << bits) * unsigned(sizeof(T));
      while (1 << (bits - d.first_bit[axis]) < half) ++bits;
    }
    d.log_n = bits;
    d.n_active = d.n_frozen = 0;
    d.outputs = 1;
    int sets = 1;
    d.biases = 0;
    d.numbers = action ? 0 : int(weights_of(l));
    if (coupling) {
      const unsigned active = active_of(l), frozen = frozen_of(l);
      sets = sets_of(l);
      for (int set = 0; l.sublattices && set < sets; ++set) d.active[d.n_active++] = uint8_t(sublattice_of_set(l, set));
      for (int i = 0; i < n_sublattices; ++i) {
        if (!l.sublattices && (active >> i & 1)) d.active[d.n_active++] = uint8_t(i);
        if (frozen >> i & 1) d.frozen[d.n_frozen++] = uint8_t(i);
      }
      d.scale = l.scale;
      d.outputs = outputs_of(l);
      d.set_size = l.sublattices ? int(set_size_of(l)) : 0;
      d.parameters = int(net_weights_of(l));
      d.biases = l.bias ? d.outputs : 0;
      d.numbers = d.biases + parameters_of(l);
    }
    d.links = int(sizeof(direct_layer) + number_bytes<T>(sets * d.numbers));
    T* const numbers = reinterpret_cast<T*>(record + sizeof(direct_layer));
    for (int set = 0; set < sets; ++set)
      for (int i = 0; i < d.numbers; ++i)
        numbers[set * d.numbers + i] = weights[l.weight_offset + (coupling ? set * int64_t(set_size_of(l)) + d.parameters - d.biases : 0) + i];
    int from = 0;
    for (int i = 0; i < n_sublattices; ++i) {
      d.first[i] = uint16_t(from);
      from += d.n_links[i];
    }
  }
  __syncthreads();
  if (s >= n_sublattices) return;
  const int k = action ? 3 : l.kernel_size, outputs = d.outputs;
  const int size = link_bytes<T>(outputs);
  char* to = record + d.links + d.first[s] * size;
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

// ---- shared memory: addresses are 32 bits wide -----------------------------------------------------
#if defined(__CUDA_ARCH__)
LFQ_DEVICE unsigned shared_begin() { return unsigned(__cvta_generic_to_shared(lfq_shared)); }
template <class T>
LFQ_DEVICE T& shared_at(unsigned address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}
// 16 bytes, which have arrived after copied() and a barrier.
LFQ_DEVICE void copy_to_shared(unsigned to, const char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
LFQ_DEVICE void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
LFQ_DEVICE unsigned shared_begin() { return 1024; }
template <class T>
LFQ_DEVICE T& shared_at(unsigned address) {
  return *reinterpret_cast<T*>(lfq_shared + (address - 1024));
}
LFQ_DEVICE void copy_to_shared(unsigned to, const char* from) { memcpy(&shared_at<char>(to), from, 16); }
LFQ_DEVICE void copied() {}
#endif

// K numbers of a thread that lie side by side.
template <class T, int K>
struct alignas(K * sizeof(T) < 16 ? K * sizeof(T) : 16) side_by_side {
  T v[K];
};

// ---- sites ---------------------------------------------------------------------------------------
// K sites of a sublattice, as many apart as there are threads, so that what is loaded for one is used for K. A field
// begins at a multiple of its size: where a site lies in it goes into the address by exclusive or.
template <class T, int K>
struct site_group {
  unsigned inside, outside, low;  // of the first site: the address's bits in `low`, all others

  LFQ_DEVICE site_group(const direct_layer& l, unsigned field, int s, int j) : low(l.low) {
    const unsigned site = ((unsigned(s) << l.log_n) | unsigned(j)) * unsigned(sizeof(T));
    inside = site & low;
    outside = (site ^ inside) | field;
  }
  LFQ_DEVICE unsigned address(int k) const { return (inside | outside) + unsigned(k) * blockDim.x * unsigned(sizeof(T)); }
  // Calls f(link, addresses that it leads to).
  template <int N, class F>
  LFQ_DEVICE void each_link(unsigned links, int n, F&& f) const {
    unsigned in[K], out[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned at = address(k);
      in[k] = at & low;
      out[k] = at ^ in[k];
    }
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      const flow_link<T, N> link = shared_at<flow_link<T, N>>(links + unsigned(i) * unsigned(sizeof(flow_link<T, N>)));
      unsigned to[K];
#pragma unroll
      for (int k = 0; k < K; ++k) to[k] = (in[k] + link.add) ^ out[k] ^ link.flip;
      f(link, to);
    }
  }
};
// All of them before the first is used.
template <class T, int K>
LFQ_DEVICE void read(const unsigned (&from)[K], unsigned step, T (&v)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = shared_at<T>(from[k] + step);
}
// Deals a sublattice's sites out to threads: calls f(j, where K numbers of the thread are kept, constant K) for groups.
template <int MOST, class F>
LFQ_DEVICE void each_group_of(int n, int thread, F&& f) {
  const int threads = blockDim.x;
  if (MOST >= 4 && n >= 4 * threads)
    for (int j = 0; j < n; j += 4 * threads) f(j + thread, j + 4 * thread, std::integral_constant<int, MOST >= 4 ? 4 : 1>());
  else if (MOST >= 2 && n >= 2 * threads)
    f(thread, 2 * thread, std::integral_constant<int, MOST >= 2 ? 2 : 1>());
  else
    for (int j = thread; j < n; j += threads) f(j, j, std::integral_constant<int, 1>());
}
// The same for a list of sublattices, with the number in the list before the rest. Where a sublattice has fewer sites than
// there are threads, these take several at once.
template <int MOST, class F>
LFQ_DEVICE void each_group(const direct_layer& l, int count, F&& f) {
  const int n = l.n, at_once = int(blockDim.x) >> l.log_n;
  for (int i = int(threadIdx.x) >> l.log_n; i < count; i += at_once > 0 ? at_once : 1)
    each_group_of<MOST>(n, int(threadIdx.x) & (n - 1), [&](int j, int kept, auto k) { f(i, j, kept, k); });
}
// Groups of couplings with many outputs would take too many registers.
LFQ_HD constexpr int most_sites(int outputs) { return outputs <= 2 ? 4 : 1; }

LFQ_DEVICE unsigned numbers_at(unsigned record) { return record + unsigned(sizeof(direct_layer)); }
template <class T>
LFQ_DEVICE unsigned numbers_of_set(unsigned record, const direct_layer& l, int set) {
  return numbers_at(record) + unsigned((l.set_size > 0 ? set : 0) * l.numbers) * unsigned(sizeof(T));
}
template <class T, int N>
LFQ_DEVICE unsigned links_at(unsigned record, const direct_layer& l, int s) {
  return record + unsigned(l.links) + l.first[s] * unsigned(sizeof(flow_link<T, N>));
}

// Of a set of weights, as couple_site takes them.
template <class T, scale_kind S, int N>
struct direct_parameters {
  static constexpr int n = n_parameters(int(S), N);
  T p[n > 4 ? n : 4];
  LFQ_DEVICE direct_parameters(unsigned numbers, bool inverse) : p() {
    for (int i = 0; i < n; ++i) p[i] = shared_at<T>(numbers + unsigned(i) * unsigned(sizeof(T)));
    if (S == scale_kind::site && inverse) p[3] = T(1) / p[0];
  }
};

// What a pass through the layers goes by. It lies in memory, for what is called to load what it needs: registers that the
// caller held would be lost to the loops over sites.
template <class T>
struct direct_pass {
  unsigned x, g, du;     // addresses of fields
  unsigned record;       // of the layer's record
  bool all;              // kept is what gradients of weights need
  bool keep, logs;       // of a forward pass: whether to keep, whether log-dets are wanted
  T dlog_det;
  T* kept;               // of the layer
  const T* z;            // latents
  double* log_det;       // a thread's share
  double* dweights;      // of the flow; null when not wanted
  const lfq_layer* layer;
};

template <class T, scale_kind S, int N>
LFQ_CALLED void direct_couple(const direct_pass<T>& pass) {
  const unsigned record = pass.record, x = pass.x;
  T* const kept = pass.keep ? pass.kept : nullptr;
  const bool all = pass.all, logs = pass.logs;
  const direct_layer& l = shared_at<direct_layer>(record);
  T log_sum = T(0);
  const int stride = l.n_active << l.log_n, log_n = l.log_n;
  each_group<most_sites(N)>(l, l.n_active, [&](int set, int j, int kept_at, auto count) {
    constexpr int K = decltype(count)::value;
    const int s = l.active[set];
    const unsigned numbers = numbers_of_set<T>(record, l, set);
    const site_group<T, K> group(l, x, s, j);
    T u[K][N];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      const T bias = l.biases > 0 ? shared_at<T>(numbers + unsigned(c) * unsigned(sizeof(T))) : T(0);
      for (int k = 0; k < K; ++k) u[k][c] = bias;
    }
    group.template each_link<N>(links_at<T, N>(record, l, s), l.n_links[s], [&](const flow_link<T, N>& link, const unsigned (&to)[K]) {
      T v[K];
      read(to, 0, v);
#pragma unroll
      for (int k = 0; k < K; ++k)
        for (int c = 0; c < N; ++c) u[k][c] = fma(link.weight[c], v[k], u[k][c]);
    });
    const direct_parameters<T, S, N> by(numbers + unsigned(l.biases) * unsigned(sizeof(T)), false);
    side_by_side<T, K> h[N], slope, before;
#pragma unroll
    for (int k = 0; k < K; ++k) before.v[k] = shared_at<T>(group.address(k));
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const coupled_site<T, N> a = couple_site<S>(before.v[k], u[k], by.p);
      shared_at<T>(group.address(k)) = a.y;
      for (int c = 0; c < N; ++c) h[c].v[k] = a.h[c];
      slope.v[k] = a.slope;
    }
    // Apart, so that no branch keeps the sites above from being worked on together.
    if (logs)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        coupled_site<T, N> a;
        a.slope = slope.v[k];
        for (int c = 0; c < N; ++c) a.h[c] = h[c].v[k];
        log_sum += log_slope<S>(a, by.p);
      }
    if (!kept) return;
    T* const keep = kept + ((set << log_n) + kept_at);
    const auto put = [&](int c, const side_by_side<T, K>& values) { *reinterpret_cast<side_by_side<T, K>*>(keep + c * stride) = values; };
    put(0, h[0]);
    if (S == scale_kind::site && !all) return;
    for (int c = 1; c < N; ++c) put(c, h[c]);
    put(N, slope);
    put(N + 1, before);
  });
  if (logs) *pass.log_det += double(log_sum);
}

// From g = dL/dy at the active sites: dL/dx of those to g, dL/du for every output to du. Site maps, where dL/du[0] is
// dL/dx, leave the other one only.
template <class T, scale_kind S, int N>
LFQ_DEVICE void couple_back(const direct_pass<T>& at, double* dweights) {
  constexpr bool of_site = S == scale_kind::site;
  const T* const kept = at.kept;
  const bool all = at.all;
  const T dlog_det = at.dlog_det;
  const unsigned x = at.x, g = at.g, du = at.du, record = at.record;
  const direct_layer& l = shared_at<direct_layer>(record);
  const int stride = l.n_active << l.log_n, log_n = l.log_n;
  const unsigned field_bytes = g - x;
  const auto back = [&](int set, int j, int kept_at, bool terms_wanted, auto count, auto&& add) {
    constexpr int K = decltype(count)::value;
    const direct_parameters<T, S, N> by(numbers_of_set<T>(record, l, set) + unsigned(l.biases) * unsigned(sizeof(T)), terms_wanted);
    const T* const keep = kept + ((set << log_n) + kept_at);
    const auto get = [&](int c) { return *reinterpret_cast<const side_by_side<T, K>*>(keep + c * stride); };
    const unsigned site = ((unsigned(l.active[set]) << log_n) | unsigned(j)) * unsigned(sizeof(T));
    side_by_side<T, K> h[N] = {}, slope = {}, before = {};
    h[0] = get(0);
    if (!of_site || all) {
      for (int c = 1; c < N; ++c) h[c] = get(c);
      slope = get(N);
      before = get(N + 1);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned offset = site + unsigned(k) * blockDim.x * unsigned(sizeof(T));
      T own[N], out[N];
      for (int c = 0; c < N; ++c) own[c] = h[c].v[k];
      const T steep = of_site ? site_slope(own[0], by.p) : slope.v[k];
      T& gradient = shared_at<T>(g + offset);
      const T dy = gradient;
      if (terms_wanted) {
        T& field = shared_at<T>(x + offset);
        parameter_terms<S>(own, by.p, steep, before.v[k], field, dy, dlog_det, add);
        field = before.v[k];
      }
      gradient = couple_site_backward<S>(own, by.p, steep, before.v[k], dy, dlog_det, out);
      for (int c = of_site; c < N; ++c) shared_at<T>(du + unsigned(c - of_site) * field_bytes + offset) = out[c];
    }
  };
  if (!dweights) {
    each_group<most_sites(N)>(l, l.n_active, [&](int set, int j, int kept_at, auto count) { back(set, j, kept_at, false, count, [](int, T, T) {}); });
    return;
  }
  constexpr int n_terms = n_parameters(int(S), N);
  // One set of weights after the other, and sublattices that share one together.
  double terms[n_terms > 0 ? n_terms : 1] = {};
  for (int set = 0; set < l.n_active; ++set) {
    each_group_of<most_sites(N)>(l.n, threadIdx.x, [&](int j, int kept_at, auto count) {
      if (j < l.n) back(set, j, kept_at, true, count, [&](int c, T a, T b) { terms[c] += double(a * b); });
    });
    if (n_terms == 0 || (l.set_size == 0 && set + 1 < l.n_active)) continue;
    block_sum(terms);
    if (threadIdx.x == 0)
      for (int c = 0; c < n_terms; ++c) dweights[(l.set_size > 0 ? set : 0) * l.set_size + l.parameters + c] += terms[c];
    for (double& t : terms) t = 0;
  }
}
// Gathers dL/dx at the frozen sites.
template <class T, bool SITE, int N>
LFQ_DEVICE void gather_back(const direct_pass<T>& at) {
  const unsigned record = at.record, g = at.g;
  const direct_layer& l = shared_at<direct_layer>(record);
  // From a site's address in the first field that is read to those in the others.
  const unsigned field_bytes = g - at.x, to_du = at.du - g;
  each_group<most_sites(N)>(l, l.n_frozen, [&](int i, int j, int, auto count) {
    constexpr int K = decltype(count)::value;
    const int s = l.frozen[i];
    const site_group<T, K> group(l, g, s, j);
    T sum[K];
#pragma unroll
    for (int k = 0; k < K; ++k) sum[k] = shared_at<T>(group.address(k));
    group.template each_link<N>(links_at<T, N>(record, l, s), l.n_links[s], [&](const flow_link<T, N>& link, const unsigned (&to)[K]) {
      T v[N][K];
      if constexpr (SITE) read(to, 0, v[0]);
      for (int c = SITE; c < N; ++c) read(to, to_du + unsigned(c - SITE) * field_bytes, v[c]);
#pragma unroll
      for (int k = 0; k < K; ++k)
        for (int c = 0; c < N; ++c) sum[k] = fma(link.weight[c], v[c][k], sum[k]);
    });
#pragma unroll
    for (int k = 0; k < K; ++k) shared_at<T>(group.address(k)) = sum[k];
  });
}
// Adds the sums over sites of du times the field at each tap: a warp for each set of weights and tap.
template <class T, bool SITE, int N>
LFQ_DEVICE void weights_back(const direct_pass<T>& at, double* dweights) {
  const lfq_layer& layer = *at.layer;
  const direct_layer& l = shared_at<direct_layer>(at.record);
  const unsigned field_bytes = at.g - at.x;
  const int lane = threadIdx.x % warp_size, n_warps = blockDim.x / warp_size, taps = taps_of(layer), n = l.n;
  const unsigned frozen = frozen_of(layer);
  // An item more for the biases.
  const int items = taps + (l.biases > 0);
  const int n_sets = l.set_size > 0 ? l.n_active : 1, together = l.n_active / n_sets;
  for (int item = threadIdx.x / warp_size; item < n_sets * items; item += n_warps) {
    const int set = item / items, tap = item % items;
    const bool bias = tap == taps;
    const int flip = bias ? 0 : flip_of_tap(l.ndim, layer.kernel_size, tap);
    double total[N] = {};
    bool any = bias;
    for (int i = set * together; i < (set + 1) * together; ++i) {
      const int s = l.active[i];
      if (!bias && !(frozen >> (s ^ flip) & 1)) continue;
      any = true;
      int number = 0;
      for (int t = 0; t < tap && !bias; ++t) number += frozen >> (s ^ flip_of_tap(l.ndim, layer.kernel_size, t)) & 1;
      const flow_link<T, N>& link = shared_at<flow_link<T, N>>(links_at<T, N>(at.record, l, s) + unsigned(number) * unsigned(sizeof(flow_link<T, N>)));
      const unsigned add = link.add, turn = link.flip;
      T sum[N] = {};
      for (int j = lane; j < n; j += warp_size) {
        const unsigned site = ((unsigned(s) << l.log_n) | unsigned(j)) * unsigned(sizeof(T)), inside = site & l.low;
        const T v = bias ? T(1) : shared_at<T>(at.x + ((inside + add) ^ (site ^ inside) ^ turn));
        if constexpr (SITE) sum[0] = fma(v, shared_at<T>(at.g + site), sum[0]);
        for (int c = SITE; c < N; ++c) sum[c] = fma(v, shared_at<T>(at.du + unsigned(c - SITE) * field_bytes + site), sum[c]);
      }
      for (int c = 0; c < N; ++c) total[c] += double(sum[c]);
    }
    if (!any) continue;
    warp_sum(total);
    if (lane == 0)
      for (int c = 0; c < N; ++c) dweights[set * l.set_size + (bias ? l.parameters - l.biases + c : c * taps + tap)] += total[c];
  }
}
template <class T, scale_kind S, int N>
LFQ_CALLED void direct_couple_backward(const direct_pass<T>& at) {
  constexpr bool of_site = S == scale_kind::site;
  double* const dweights = at.dweights ? at.dweights + at.layer->weight_offset : nullptr;
  couple_back<T, S, N>(at, dweights);
  __syncthreads();
  if (dweights) weights_back<T, of_site, N>(at, dweights);
  gather_back<T, of_site, N>(at);
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
// The same on the lattice that a layer enlarges, where that has sublattices.
template <int D>
LFQ_DEVICE unsigned coarse_place_of(const direct_layer& l, unsigned i) {
  if (l.reads_c_order) return i;
  unsigned sublattice = 0, j = 0;
#pragma unroll
  for (int axis = 0; axis < D; ++axis) {
    const unsigned bits = l.axis[axis];
    j |= (i & (bits & (bits - 1))) >> (axis + 1);
    sublattice |= (i >> l.first_bit[axis] & 1u) << axis;
  }
  return (sublattice << (l.log_n - D)) | j;
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
  LFQ_DEVICE resizing(unsigned record, const direct_layer& l) {
    const bool upsamples = l.kind == LFQ_LAYER_UPSAMPLE;
    const auto number = [&](int i) { return shared_at<T>(numbers_at(record) + unsigned(i) * unsigned(sizeof(T))); };
    scale = upsamples ? number(0) : T(1);
    for (int c = 1; c <= D; ++c) {
      coefficient[c] = upsamples ? number(2 * c - 1) : T(0);
      width[c] = upsamples ? number(2 * c) : T(1);
    }
  }
};
LFQ_HD constexpr int odd_axes(int s) { return (s & 1) + (s >> 1 & 1) + (s >> 2 & 1) + (s >> 3 & 1); }

template <class T, int D>
LFQ_CALLED void direct_upsample(const direct_pass<T>& at) {
  const unsigned record = at.record, x = at.x, spare = at.g;
  const T* const z = at.z;
  const direct_layer& l = shared_at<direct_layer>(record);
  const resizing<T, D> by(record, l);
  const int n = l.n;
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    unsigned near[1 << D];
    T sum[1 << D];
    steps_of<D>(l, unsigned(j), false, near);
#pragma unroll
    for (int s = 0; s < 1 << D; ++s) sum[s] = shared_at<T>(x + coarse_place_of<D>(l, near[s]) * unsigned(sizeof(T)));
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
      shared_at<T>(x + site * unsigned(sizeof(T))) = fma(by.coefficient[odd_axes(s)], sum[s], by.width[odd_axes(s)] * z[site]);
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const unsigned byte = unsigned(j) * unsigned(sizeof(T));
    shared_at<T>(x + byte) = shared_at<T>(spare + byte);
  }
}
// From g = dL/dy: that of the noise where the noise lies, that of the coarse field where this one lies. With dweights
// x, the layer's result, is turned into the coarse field too.
template <class T, int D>
LFQ_CALLED void direct_upsample_backward(const direct_pass<T>& at) {
  const T* const z = at.z;
  const T dlog_det = at.dlog_det;
  double* const dweights = at.dweights;
  const direct_layer& l = shared_at<direct_layer>(at.record);
  const unsigned x = at.x, g = at.g, spare = at.du;
  const resizing<T, D> by(at.record, l);
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
    const T y = shared_at<T>(x + byte(unsigned(j)));
    sum[0] += double(shared_at<T>(g + byte(unsigned(j))) * y);
    shared_at<T>(spare_x + byte(unsigned(j))) = y / by.scale;
    steps_of<D>(l, unsigned(j), false, near);
#pragma unroll
    for (int s = 1; s < 1 << D; ++s) {
      T coarse = T(0);
#pragma unroll
      for (int t = 0; t < 1 << D; ++t)
        if ((t & s) == t) coarse += shared_at<T>(x + byte(near[t]));
      const T gy = shared_at<T>(g + byte(unsigned(s * n + j)));
      sum[2 * odd_axes(s) - 1] += double(gy * (coarse / by.scale));
      sum[2 * odd_axes(s)] += double(gy * (by.width[odd_axes(s)] * z[s * n + j]));
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const unsigned to = byte(coarse_place_of<D>(l, unsigned(j)));
    shared_at<T>(g + to) = shared_at<T>(spare + byte(unsigned(j)));
    if (dweights) shared_at<T>(x + to) = shared_at<T>(spare_x + byte(unsigned(j)));
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
  // 128 registers a thread.
  static constexpr int most_threads = 512, least_blocks = 1;

  const flow_program<T>& flow;
  unsigned records;  // the address of two records, those of even and odd layers
  T* cache;
  direct_pass<T> pass;

  LFQ_DEVICE direct_block(const flow_program<T>& f, const buffer_plan& plan, bool weights)
      : flow(f),
        records(shared_begin() + unsigned(plan.offset[buffer_records])),
        cache(plan.get<T>(buffer_cache)),
        pass() {
    const unsigned field = unsigned(f.volume) * unsigned(sizeof(T));
    pass.x = (shared_begin() + unsigned(plan.offset[buffer_x]) + field - 1) & ~(field - 1);
    pass.g = pass.x + field;
    pass.du = flow.keeps_field ? pass.g + field : pass.x;
    pass.all = flow.keeps_all;
    pass.dweights = weights ? plan.dweights + blockIdx.x * f.n_weights : nullptr;
  }

  LFQ_DEVICE const direct_layer& layer_of(int n) const { return *reinterpret_cast<const direct_layer*>(flow.records + n * flow.record_stride); }
  LFQ_DEVICE unsigned record_at(int n) const { return records + unsigned(n & 1) * unsigned(flow.record_stride); }
  LFQ_DEVICE void fetch(int n) const {
    const char* const from = flow.records + n * flow.record_stride;
    const int bytes = layer_of(n).bytes;
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) copy_to_shared(record_at(n) + unsigned(i), from + i);
  }
  LFQ_DEVICE int64_t kept_by(int n) const {
    const direct_layer& l = shared_at<direct_layer>(record_at(n));
    return kept_of(l.scale, l.outputs, l.n_active << l.log_n, flow.keeps_all);
  }
  // Where entry i of a latent lies: as it is, but for a first field that no layer enlarges.
  LFQ_DEVICE unsigned place_of_latent(int64_t i) const {
    return i < flow.first_volume && !flow.enlarges_first ? place_of(layer_of(0), unsigned(i)) : unsigned(i);
  }
  LFQ_DEVICE unsigned place_of_site(int64_t i) const { return place_of(layer_of(flow.n_layers), unsigned(i)); }
  LFQ_DEVICE T& field_at(int64_t i) const { return shared_at<T>(pass.x + place_of_site(i) * unsigned(sizeof(T))); }
  LFQ_DEVICE T& field_gradient_at(int64_t i) const { return shared_at<T>(pass.g + place_of_site(i) * unsigned(sizeof(T))); }
  LFQ_DEVICE T& gradient_at(int64_t i) const { return shared_at<T>(pass.g + place_of_latent(i) * unsigned(sizeof(T))); }
  // For smearing, when the field is not needed.
  LFQ_DEVICE T* scratch() const { return &shared_at<T>(pass.x); }

  // x = f(z); what backward needs is kept unless `keep` is false. log_det null when not wanted: the thread's share.
  LFQ_CALLED void forward(const T* z, bool keep, double* log_det) {
    pass.z = z;
    pass.kept = cache;
    pass.keep = keep;
    pass.logs = log_det != nullptr;
    pass.log_det = log_det;
    fetch(0);
    each_of(flow.first_volume, [&](int64_t i) { shared_at<T>(pass.x + place_of_latent(i) * unsigned(sizeof(T))) = z[i]; });
    copied();
    __syncthreads();
    for (int n = 0; n < flow.n_layers; ++n) {
      fetch(n + 1);
      pass.record = record_at(n);
      const direct_layer& l = shared_at<direct_layer>(pass.record);
      if (l.kind == LFQ_LAYER_COUPLING) {
        with_coupling(l, [&](auto kind, auto outputs) { direct_couple<T, decltype(kind)::value, decltype(outputs)::value>(pass); });
        pass.kept += kept_by(n);
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = shared_at<T>(numbers_at(pass.record));
        for (int i = threadIdx.x; i < l.n << l.ndim; i += blockDim.x) shared_at<T>(pass.x + unsigned(i) * unsigned(sizeof(T))) *= factor;
      } else {
        switch (l.ndim) {
          case 1: direct_upsample<T, 1>(pass); break;
          case 2: direct_upsample<T, 2>(pass); break;
          case 3: direct_upsample<T, 3>(pass); break;
          default: direct_upsample<T, 4>(pass);
        }
      }
      copied();
      __syncthreads();
    }
  }
  // After forward with keep, and with dL/dx in g: dL/dz to gradient_at. x is overwritten.
  LFQ_CALLED void backward(const T* z, T dlog_det) {
    pass.z = z;
    pass.dlog_det = dlog_det;
    // The last layer's record is still there.
    for (int n = flow.n_layers - 1; n >= 0; --n) {
      if (n > 0) fetch(n - 1);
      pass.record = record_at(n);
      pass.layer = flow.layers + n;
      const direct_layer& l = shared_at<direct_layer>(pass.record);
      if (l.kind == LFQ_LAYER_COUPLING) {
        pass.kept -= kept_by(n);
        with_coupling(l, [&](auto kind, auto outputs) { direct_couple_backward<T, decltype(kind)::value, decltype(outputs)::value>(pass); });
      } else if (l.kind == LFQ_LAYER_RESCALE) {
        const T factor = shared_at<T>(numbers_at(pass.record)), inverse = T(1) / factor;
        double sum[1] = {0};
        for (int i = threadIdx.x; i < l.n << l.ndim; i += blockDim.x) {
          T &field = shared_at<T>(pass.x + unsigned(i) * unsigned(sizeof(T))), &gradient = shared_at<T>(pass.g + unsigned(i) * unsigned(sizeof(T)));
          if (pass.dweights) {
            sum[0] += double(gradient * field);
            field *= inverse;
          }
          gradient *= factor;
        }
        if (pass.dweights) {
          block_sum(sum);
          if (threadIdx.x == 0) pass.dweights[l.weight_offset] += double(dlog_det) * (l.n << l.ndim) + sum[0];
        }
      } else {
        switch (l.ndim) {
          case 1: direct_upsample_backward<T, 1>(pass); break;
          case 2: direct_upsample_backward<T, 2>(pass); break;
          case 3: direct_upsample_backward<T, 3>(pass); break;
          default: direct_upsample_backward<T, 4>(pass);
        }
      }
      copied();
      __syncthreads();
    }
  }

  // dS/dphi of the field into g; `energies`: returns the thread's share of the action.
  LFQ_CALLED double action_gradient(const lfq_phi4& theory, bool energies) const {
    const unsigned record = record_at(flow.n_layers), x = pass.x, to_g = pass.g - pass.x;
    const direct_layer& l = shared_at<direct_layer>(record);
    const phi4_site<T> site_action(theory.beta, theory.lam);
    const int ndim = l.ndim;
    double s = 0;
    each_group<4>(l, 1 << ndim, [&](int sublattice, int j, int, auto count) {
      constexpr int K = decltype(count)::value;
      const site_group<T, K> group(l, x, sublattice, j);
      const unsigned ways = links_at<T, 1>(record, l, sublattice);
      T ahead[K] = {}, behind[K] = {};
      const auto add = [](const unsigned(&to)[K], T(&sum)[K]) {
        T v[K];
        read(to, 0, v);
#pragma unroll
        for (int k = 0; k < K; ++k) sum[k] += v[k];
      };
      group.template each_link<1>(ways, ndim, [&](const flow_link<T, 1>&, const unsigned (&to)[K]) { add(to, ahead); });
      group.template each_link<1>(ways + unsigned(ndim) * unsigned(sizeof(flow_link<T, 1>)), ndim,
                                  [&](const flow_link<T, 1>&, const unsigned (&to)[K]) { add(to, behind); });
      T part = T(0);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T phi = shared_at<T>(group.address(k));
        shared_at<T>(group.address(k) + to_g) = site_action.gradient(phi, phi * phi, site_action.beta * (ahead[k] + behind[k]));
        if (energies) part += site_action.action(phi, ahead[k]);
      }
      if (energies) s += double(part);
    });
    __syncthreads();
    return s;
  }
};

LFQ_NAMESPACE_END
