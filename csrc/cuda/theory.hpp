// Host side of the calls on phi^4: checks, and what depends on the number of dimensions.
#pragma once
#include "cuda/phi4.cuh"

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
inline int64_t strips_of(const lfq_phi4& t) { return volume_of(t) / t.extent[0] * lfq::ceil_div(t.extent[0], lfq::strip_rows); }

inline int check_theory(const lfq_phi4* t, int64_t n_chains) {
  if (int e = lfq_phi4_check(t)) return fail_check(e);
  if (volume_of(*t) > 0x7fffffff) return fail(LFQ_ERR_ARGUMENT, "theory: a GPU takes up to 2^31 - 1 sites");
  if (n_chains < 0) return fail(LFQ_ERR_ARGUMENT, "n_chains is %lld, must not be negative", (long long)n_chains);
  return LFQ_OK;
}

// From the circulant kernels of lfq.h.
int smearing_of(const lfq_phi4& t, const double* smear, lfq::smearing& s);

// What the observables of fields in device memory need.
template <class T>
struct measure_work {
  int n_parts, n_smear_parts;
  double *moments, *squares;
  T* field[2];
  measure_work(pieces& mem, const lfq_phi4& t, int64_t n_chains) {
    const int64_t volume = volume_of(t);
    n_parts = lfq::parts_of(strips_of(t));
    n_smear_parts = lfq::parts_of(volume);
    moments = mem.take<double>(n_chains * n_parts * (4 + 2 * t.ndim));
    squares = mem.take<double>(n_chains * n_smear_parts);
    for (T*& f : field) f = mem.take<T>(n_chains * volume);
  }
};

template <class T>
int measure(const lfq_phi4& t, int64_t n_chains, const T* phi, const lfq::smearing& s, const measure_work<T>& w, double* out,
            void* stream) {
  const int64_t volume = volume_of(t);
  return with_dimension(t.ndim, [&](auto dimension) {
    constexpr int D = decltype(dimension)::value;
    const size_t scratch = lfq::sum_scratch(lfq::block_size, lfq::moments<D>::size);
    if (int e = launch("observables", lfq::moments_kernel<T, D>, n_chains * w.n_parts, lfq::block_size, scratch, stream, t, volume,
                       w.n_parts, phi, w.moments))
      return e;
    const T* in = phi;
    int64_t stride = volume;
    for (int axis = 0; axis < D; ++axis) {
      stride /= t.extent[axis];
      T* target = axis + 1 < D ? w.field[axis % 2] : nullptr;
      if (int e = launch("smearing", lfq::smear_kernel<T>, n_chains * w.n_smear_parts, lfq::block_size, scratch, stream, s, axis,
                         t.extent[axis], int(stride), volume, w.n_smear_parts, in, target, w.squares))
        return e;
      in = target;
    }
    return launch("observables", lfq::observables_kernel<D>, n_chains, lfq::block_size, scratch, stream, w.n_parts, w.moments,
                  w.n_smear_parts, w.squares, double(volume), out);
  });
}

}  // namespace lfq_cuda
