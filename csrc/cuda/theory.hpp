// Host side of the calls on phi^4: checks, and what depends on the number of dimensions.
#pragma once
#include "cuda/observables.cuh"

namespace lfq_cuda {

template <int N>
struct constant {
  static constexpr int value = N;
};
// Calls f(constant<D>) for the run-time number of dimensions.
template <class F>
int with_dimension(int ndim, F&& f) {
  switch (ndim) {
    case 1: return f(constant<1>());
    case 2: return f(constant<2>());
    case 3: return f(constant<3>());
    default: return f(constant<4>());
  }
}

inline int64_t volume_of(const lfq_phi4& t) {
  int64_t v = 1;
  for (int i = 0; i < t.ndim; ++i) v *= t.extent[i];
  return v;
}

// Sites that a thread takes at once: as many as 16 bytes hold, where rows are made of such.
template <class T>
int width_of(const lfq_phi4& t) {
  constexpr int most = 16 / int(sizeof(T));
  return t.ndim > 1 && t.extent[t.ndim - 1] % most == 0 ? most : 1;
}
template <class... P>
bool aligned(const P*... fields) {
  return (... && (reinterpret_cast<uintptr_t>(fields) % 16 == 0));
}
// Calls f(constant<D>, constant<W>) for the run-time numbers of dimensions and of sites at once.
template <class T, class F>
int with_width(const lfq_phi4& t, int width, F&& f) {
  return with_dimension(t.ndim, [&](auto dimension) {
    if constexpr (decltype(dimension)::value > 1)
      if (width > 1) return f(dimension, constant<16 / int(sizeof(T))>());
    return f(dimension, constant<1>());
  });
}
// Calls f(constant<whether fields of n numbers that lie one behind the other can be accessed four numbers at once>).
template <class T, class F>
int with_alignment(int64_t n, const T* fields, F&& f) {
  return n % 4 == 0 && aligned(fields) ? f(constant<true>()) : f(constant<false>());
}

// How many blocks of how many threads work on a chain.
struct shares {
  int n_parts, threads;
  explicit shares(int64_t count)
      : n_parts(int(lfq::ceil_div(count, lfq::block_size))),
        threads(n_parts > 1 ? lfq::block_size : lfq::whole_warps(count)) {}
  // Of patches of the given width.
  shares(const lfq_phi4& t, int width)
      : shares(volume_of(t) / t.extent[0] / width * lfq::ceil_div(t.extent[0], lfq::strip_rows)) {}
};

// Indices of sites have 32 bits, and threads beyond the last site and taps beyond a row count on.
constexpr int64_t most_sites = (int64_t(1) << 31) - 4096;

inline int check_theory(const lfq_phi4* t, int64_t n_chains) {
  if (int e = lfq_phi4_check(t)) return fail_check(e);
  if (volume_of(*t) > most_sites) return fail(LFQ_ERR_ARGUMENT, "theory: a GPU takes up to 2^31 - 4096 sites");
  if (n_chains < 0) return fail(LFQ_ERR_ARGUMENT, "n_chains is %lld, must not be negative", (long long)n_chains);
  return LFQ_OK;
}

// From the circulant kernels of lfq.h; what a field of the type of `least` would not see is left out.
int smearing_of(const lfq_phi4& t, const double* smear, lfq::smearing& s, double least = 1e-16);
// Far enough below the rounding of a field.
template <class T>
constexpr double least_factor = sizeof(T) == 4 ? 1e-8 : 1e-16;

// How a chain is measured in one block: its threads and shared memory; no threads where it does not fit.
template <class T>
struct measure_block {
  int threads = 0;
  size_t shared = 0;
  explicit measure_block(const lfq_phi4& t) {
    const int64_t volume = volume_of(t);
    constexpr int per_thread = lfq::strip_rows * 16 / int(sizeof(T));
    const int n = volume < per_thread * lfq::measure_threads ? lfq::whole_warps(lfq::ceil_div(volume, per_thread)) : lfq::measure_threads;
    if (!lfq::can_measure(t, volume, n, 2 * lfq::segment_sites<T>)) return;
    shared = lfq::sum_scratch(n, 5 + 2 * t.ndim) + size_t(volume) * sizeof(T);
    if (shared <= shared_limit()) threads = n;
  }
};

// What the observables of fields in device memory need.
template <class T>
struct measure_work {
  int n_parts = 0, n_smear_parts = 0;
  double *moments = nullptr, *squares = nullptr;
  T* field[2] = {};
  measure_work(pieces& mem, const lfq_phi4& t, int64_t n_chains) {
    if (measure_block<T>(t).threads > 0) return;
    const int64_t volume = volume_of(t), n = t.extent[t.ndim - 1];
    n_parts = shares(t, width_of<T>(t)).n_parts;
    n_smear_parts = int(lfq::ceil_div(volume / n, lfq::piece_rows) * lfq::ceil_div(n, lfq::piece_sites));
    moments = mem.take<double>(n_chains * n_parts * (4 + 2 * t.ndim));
    squares = mem.take<double>(n_chains * n_smear_parts);
    for (int i = 0; i < 2 && i < t.ndim - 1; ++i) field[i] = mem.take<T>(n_chains * volume);
  }
};

// Calls f(constant<D>, constant<W>, constant<whether the fields can be read W sites at a time>) for sums over fields,
// whose order must not depend on where these lie.
template <class T, class F>
int with_layout(const lfq_phi4& t, bool is_aligned, F&& f) {
  return with_width<T>(t, width_of<T>(t), [&](auto d, auto w) {
    if constexpr (decltype(w)::value > 1)
      if (!is_aligned) return f(d, w, constant<false>());
    return f(d, w, constant<true>());
  });
}

// The actions' parts to `partial`, as shares(t, width_of<T>(t)) has them.
template <class T>
int action_parts(const lfq_phi4& t, int64_t n_chains, const T* phi, double* partial, void* stream) {
  const shares own(t, width_of<T>(t));
  return with_layout<T>(t, aligned(phi), [&](auto d, auto w, auto a) {
    return launch("action", lfq::action_kernel<T, decltype(d)::value, decltype(w)::value, decltype(a)::value>, n_chains * own.n_parts,
                  own.threads, lfq::sum_scratch(own.threads, 1), stream, t, lfq::phi4_site<T>(t.beta, t.lam), volume_of(t), own.n_parts, phi,
                  partial);
  });
}
// The actions; `partial` takes n_chains * n_parts numbers, unless there is one part.
template <class T>
int actions(const lfq_phi4& t, int64_t n_chains, const T* phi, double* partial, double* s, void* stream) {
  const int n_parts = shares(t, width_of<T>(t)).n_parts;
  if (n_parts == 1) return action_parts(t, n_chains, phi, s, stream);
  if (int e = action_parts(t, n_chains, phi, partial, stream)) return e;
  return launch("action", lfq::finish_kernel<1>, n_chains, lfq::block_size, lfq::sum_scratch(lfq::block_size, 1), stream, n_parts,
                partial, s);
}

template <class T>
int measure(const lfq_phi4& t, int64_t n_chains, const T* phi, const lfq::smearing& s, const measure_work<T>& w, double* out,
            void* stream) {
  const int64_t volume = volume_of(t);
  const measure_block<T> block(t);
  return with_dimension(t.ndim, [&](auto dimension) {
    constexpr int D = decltype(dimension)::value;
    if (block.threads > 0)
      return launch("observables", lfq::measure_kernel<T, D>, n_chains, block.threads, block.shared, stream, t, s, int(volume), phi,
                    out);
    const shares own(t, width_of<T>(t));
    const size_t scratch = lfq::sum_scratch(lfq::block_size, lfq::moments<D>::size);
    if (int e = with_layout<T>(t, aligned(phi), [&](auto d, auto width, auto a) {
          return launch("observables", lfq::moments_kernel<T, decltype(d)::value, decltype(width)::value, decltype(a)::value>,
                        n_chains * own.n_parts, own.threads, scratch, stream, t, volume, own.n_parts, phi, w.moments);
        }))
      return e;
    const T* in = phi;
    int64_t stride = volume;
    for (int axis = 0; axis < D - 1; ++axis) {
      const int n = t.extent[axis];
      stride /= n;
      const int n_parts = int(lfq::ceil_div(volume / n * lfq::ceil_div(n, lfq::axis_sites<T>), lfq::block_size));
      if (int e = launch("smearing", lfq::smear_axis_kernel<T>, n_chains * n_parts, lfq::block_size, 0, stream, s, axis, n, int(stride),
                         int(volume), n_parts, in, w.field[axis % 2]))
        return e;
      in = w.field[axis % 2];
    }
    const size_t pieces = lfq::sum_scratch(lfq::block_size, 1) + size_t(lfq::piece_rows) * lfq::piece_pitch(s.reach[D - 1]) * sizeof(T);
    if (int e = launch("smearing", lfq::smear_rows_kernel<T>, n_chains * w.n_smear_parts, lfq::block_size, pieces, stream, s, D - 1,
                       t.extent[D - 1], int(volume), w.n_smear_parts, in, w.squares))
      return e;
    return launch("observables", lfq::observables_kernel<D>, n_chains, lfq::block_size, scratch, stream, w.n_parts, w.moments,
                  w.n_smear_parts, w.squares, double(volume), out);
  });
}

}  // namespace lfq_cuda
