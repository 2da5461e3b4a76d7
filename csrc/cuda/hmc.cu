// lfq_cuda.h: hybrid Monte Carlo of phi^4.
#include <utility>

#include "cuda/resident.cuh"
#include "cuda/theory.hpp"
#include "cuda/tiled.cuh"

namespace lfq_cuda {
namespace {

// How a chain fits one block: the kernel, its threads and shared memory; no kernel where it does not.
template <class T>
struct residence {
  void (*kernel)(lfq::resident_arguments<T>, T*) = nullptr;
  int threads = 0;
  size_t shared = 0;

  // With `fields` copies of the field in shared memory.
  template <class P, int THREADS, int BLOCKS = 1>
  bool takes(const lfq_phi4& t, int64_t n_threads, int fields) {
    if (n_threads > THREADS) return false;
    threads = lfq::whole_warps(n_threads);
    shared = lfq::sum_scratch(threads, lfq::moments<LFQ_MAX_DIM>::size) + fields * size_t(volume_of(t)) * sizeof(T);
    if (shared > shared_limit() || !lfq::can_measure(t, volume_of(t), threads, lfq::segment_sites<T>)) return false;
    kernel = lfq::resident_kernel<T, P, THREADS, BLOCKS>;
    return true;
  }
};

template <int D, int R, int THREADS, class T>
bool fits_strips(const lfq_phi4& t, residence<T>& r) {
  return r.template takes<lfq::strip_phi4<T, D, R>, THREADS>(t, lfq::strip<D, R>::per_chain(t), 1);
}
template <int D, int R, int LEAST, class T>
bool fits_tiles(const lfq_phi4& t, residence<T>& r) {
  using potential = lfq::tile_phi4<T, D, R>;
  const int64_t tiles = lfq::tile<D, R>::per_chain(t);
  if (tiles < LEAST) return false;
  // Three blocks a multiprocessor leave a thread 80 registers, which hold what a step needs.
  if constexpr (sizeof(T) == 8)
    return r.template takes<potential, 512>(t, tiles, 2);
  else if constexpr (R == 4)
    return r.template takes<potential, 256, 3>(t, tiles, 2) || r.template takes<potential, 1024>(t, tiles, 2);
  else
    return r.template takes<potential, 256, 3>(t, tiles, 2);
}

template <class T>
residence<T> find_residence(const lfq_phi4& t) {
  residence<T> r;
  with_dimension(t.ndim, [&](auto dimension) {
    constexpr int D = decltype(dimension)::value;
    // Small lattices take small shares, so as to fill more of a block.
    if constexpr (D > 1)
      if (fits_tiles<D, 4, 64>(t, r) || fits_tiles<D, 2, 32>(t, r) || fits_tiles<D, 1, 1>(t, r)) return 0;
    if constexpr (D == 2) {
      if (fits_strips<D, 4, 256>(t, r) || fits_strips<D, 16, 512>(t, r)) return 0;
      if constexpr (sizeof(T) == 4) fits_strips<D, 16, 1024>(t, r);
    } else {
      fits_strips<D, 4, 1024>(t, r);
    }
    return 0;
  });
  return r;
}

// Whether two steps are done at once. A band has two outermost lanes.
template <class T>
bool goes_twice(const lfq_phi4& t) {
  if (t.ndim != 2 || width_of<T>(t) == 1) return false;
  const lfq::bands b(t, width_of<T>(t), 1);
  return b.length / width_of<T>(t) - (b.per_row - 1) * b.lanes >= 2;
}

// Whether the first step draws the momenta; where two steps are one pass, that saves nothing.
bool draws_on_the_way(const lfq_phi4& t) { return t.ndim > 2 && t.extent[t.ndim - 1] % 4 == 0; }

template <class T>
struct hmc_work {
  int n_parts, momenta_parts;
  T *field[2], *p, *p_next;
  double *k0, *e1, *s0;
  uint8_t* moves;
  measure_work<T> measured;
  hmc_work(pieces& mem, const lfq_phi4& t, int64_t n_chains)
      : n_parts(shares(t, width_of<T>(t)).n_parts),
        momenta_parts(draws_on_the_way(t) ? shares(t, 4).n_parts : lfq::parts_of(lfq::ceil_div(volume_of(t), 4))),
        field{mem.take<T>(n_chains * volume_of(t)), mem.take<T>(n_chains * volume_of(t))},
        p(mem.take<T>(n_chains * volume_of(t))),
        k0(mem.take<double>(n_chains * momenta_parts)),
        e1(mem.take<double>(n_chains * n_parts * 2)),
        s0(mem.take<double>(n_chains)),
        moves(mem.take<uint8_t>(n_chains)),
        measured(mem, t, n_chains) {
    // Measurements and momenta are not needed at a time.
    p_next = measured.field[0];
    if (measured.n_parts == 0 && goes_twice<T>(t)) p_next = mem.take<T>(n_chains * volume_of(t));
  }
};

template <class T>
size_t workspace(const lfq_phi4* t, int64_t n_chains) {
  if (check_theory(t, n_chains)) return 0;
  pieces mem(nullptr);
  hmc_work<T>(mem, *t, n_chains);
  return mem.used;
}

template <class T>
int resident(const lfq_phi4* t) {
  if (int e = check_theory(t, 0)) return e;
  return find_residence<T>(*t).kernel != nullptr;
}

template <class T>
int kick_drift(const lfq_phi4& t, double k, double d, int64_t n, const T* from, T* to, T* p, void* stream) {
  const int width = aligned(from, to, p) ? width_of<T>(t) : 1;
  const shares own(t, width);
  return with_width<T>(t, width, [&](auto dimension, auto at_once) {
    return launch("kick and drift", lfq::kick_drift_kernel<T, decltype(dimension)::value, decltype(at_once)::value>, n * own.n_parts,
                  own.threads, 0, stream, t, lfq::phi4_kick<T>(t.beta, t.lam, k), T(d), volume_of(t), own.n_parts, from, to, p);
  });
}
template <class T>
int kick_drift_twice(const lfq_phi4& t, const double (&k)[2], const double (&d)[2], int64_t n, const T* from, const T* p, T* to,
                     T* p_to, void* stream) {
  constexpr int W = 16 / int(sizeof(T));
  // Long bands compute fewer sites twice; there should be some for each of a GPU's schedulers.
  int rows = 16;
  while (rows > 4 && n * lfq::bands(t, W, rows).count() < 2048) rows /= 2;
  const lfq::bands b(t, W, rows);
  const int n_parts = int(lfq::ceil_div(b.count(), lfq::block_size / lfq::warp_size));
  return launch("kick and drift", lfq::kick_drift_twice_kernel<T, W>, n * n_parts, lfq::block_size, 0, stream, b,
                lfq::phi4_kick<T>(t.beta, t.lam, k[0]), T(d[0]), lfq::phi4_kick<T>(t.beta, t.lam, k[1]), T(d[1]), int(volume_of(t)),
                n_parts, from, p, to, p_to);
}

// New momenta: their streams, and the sums of their squares to the parts of w.k0.
struct fresh_momenta {
  lfq::stream rng;
  uint64_t first_chain;
  double unit;
};
template <class T>
int refresh(const lfq_phi4& t, const fresh_momenta& momenta, int64_t n, const hmc_work<T>& w, void* stream) {
  return with_alignment(volume_of(t), w.p, [&](auto a) {
    return launch("momenta", lfq::refresh_kernel<T, decltype(a)::value>, n * w.momenta_parts, lfq::block_size,
                  lfq::sum_scratch(lfq::block_size, 1), stream, momenta.rng, momenta.first_chain, momenta.unit, volume_of(t),
                  w.momenta_parts, w.p, w.k0);
  });
}
template <class T>
int refresh_kick_drift(const lfq_phi4& t, const fresh_momenta& momenta, double k, double d, int64_t n, const T* from, T* to,
                       const hmc_work<T>& w, void* stream) {
  const shares own(t, 4);
  return with_dimension(t.ndim, [&](auto dimension) {
    constexpr int D = decltype(dimension)::value;
    if constexpr (D > 2)
      return with_alignment(volume_of(t), from, [&](auto a) {
        return launch("momenta, kick and drift", lfq::refresh_kick_drift_kernel<T, D, decltype(a)::value>, n * own.n_parts, own.threads,
                      lfq::sum_scratch(own.threads, 1), stream, t, momenta.rng, momenta.first_chain, T(momenta.unit),
                      lfq::phi4_kick<T>(t.beta, t.lam, k), T(d), volume_of(t), own.n_parts, from, to, w.p, w.k0);
      });
    return int(LFQ_OK);
  });
}

// Where the fields are that a trajectory leaves, and its last kick.
template <class T>
struct trajectory_end {
  const T *phi, *p;
  double kick;
};
// A trajectory from `from` through the buffers of w in turn, momenta from w.p on, drawn there before if any are given,
// up to the last kick.
template <class T>
int drift_through(const lfq_phi4& t, const lfq::schedule& steps, int n_steps, const fresh_momenta* fresh, int64_t n,
                  const T* from, const hmc_work<T>& w, trajectory_end<T>& end, void* stream) {
  int buffer = 0, waiting = 0;
  bool draws = fresh && draws_on_the_way(t);
  int code = fresh && !draws ? refresh(t, *fresh, n, w, stream) : int(LFQ_OK);
  const bool twice = goes_twice<T>(t) && aligned(from, w.p, w.p_next);
  T *p = w.p, *p_next = w.p_next;
  double k[2], d[2];
  const auto moved = [&](int error) {
    code = error;
    from = w.field[buffer];
    buffer ^= 1;
    waiting = 0;
  };
  const int last = lfq::integrate(steps, n_steps, [&](int kick, int drift) {
    if (code) return;
    k[waiting] = steps.kick[kick];
    d[waiting++] = steps.drift[drift];
    if (draws) {
      draws = false;
      return moved(refresh_kick_drift(t, *fresh, k[0], d[0], n, from, w.field[buffer], w, stream));
    }
    if (!twice) return moved(kick_drift(t, k[0], d[0], n, from, w.field[buffer], p, stream));
    if (waiting < 2) return;
    moved(kick_drift_twice(t, k, d, n, from, p, w.field[buffer], p_next, stream));
    std::swap(p, p_next);
  });
  if (!code && waiting) moved(kick_drift(t, k[0], d[0], n, from, w.field[buffer], p, stream));
  end.phi = from;
  end.p = p;
  end.kick = steps.kick[last];
  return code;
}
// The last kick, into p_end, or to the parts of the action and the momenta squared.
template <class T>
int kick_last(const lfq_phi4& t, const trajectory_end<T>& end, int64_t n, T* p_end, double* partial, void* stream) {
  const int width = partial || aligned(end.phi, end.p, p_end) ? width_of<T>(t) : 1;
  const shares own(t, width);
  return with_width<T>(t, width, [&](auto dimension, auto at_once) {
    return launch("last kick", lfq::last_kick_kernel<T, decltype(dimension)::value, decltype(at_once)::value>, n * own.n_parts,
                  own.threads, lfq::sum_scratch(own.threads, 2), stream, t, lfq::phi4_kick<T>(t.beta, t.lam, end.kick),
                  lfq::phi4_site<T>(t.beta, t.lam), volume_of(t), own.n_parts, end.phi, end.p, p_end, partial);
  });
}

template <class T>
int tiled(const lfq_phi4& t, const lfq_hmc& h, int64_t n, T* phi, double* dh, uint8_t* accepted, const lfq::smearing& s,
          double* observables, const hmc_work<T>& w, void* stream) {
  const int64_t volume = volume_of(t);
  const double unit = lfq::momentum_unit(h);
  const lfq::schedule steps(h, unit);
  const size_t scratch = lfq::sum_scratch(lfq::block_size, 2);
  if (int e = actions(t, n, phi, w.e1, w.s0, stream)) return e;
  int64_t at = 0;
  for (int64_t sample = 0; sample < h.n_samples; ++sample) {
    for (int i = 0; i < h.thin; ++i, ++at) {
      const uint64_t number = h.first_trajectory + uint64_t(at);
      const fresh_momenta fresh{{h.seed, number, LFQ_PURPOSE_MOMENTA}, h.first_chain, unit};
      trajectory_end<T> end;
      if (int e = drift_through<T>(t, steps, lfq::drawn_steps(h, number), &fresh, n, phi, w, end, stream)) return e;
      if (int e = kick_last<T>(t, end, n, nullptr, w.e1, stream)) return e;
      if (int e = launch("accept step", lfq::decide_kernel, n, lfq::block_size, scratch, stream, h, number, w.momenta_parts, w.k0,
                         w.n_parts, w.e1, w.s0, dh + at * n, accepted ? accepted + at * n : nullptr, w.moves))
        return e;
      if (int e = with_alignment(volume, phi, [&](auto a) {
            constexpr int W = decltype(a)::value ? 16 / int(sizeof(T)) : 1;
            const int n_parts = int(lfq::ceil_div(volume, W * lfq::settle_vectors * lfq::block_size));
            return launch("accept step", lfq::settle_kernel<T, W>, n * n_parts, lfq::block_size, 0, stream, volume, n_parts, w.moves,
                          end.phi, phi);
          }))
        return e;
    }
    if (observables)
      if (int e = measure(t, n, phi, s, w.measured, observables + sample * n * LFQ_N_OBSERVABLES, stream)) return e;
  }
  return LFQ_OK;
}

template <class T>
int arguments(const lfq_phi4* t, const lfq_hmc* h, int64_t n, const void* phi, const void* other) {
  if (int e = check_theory(t, n)) return e;
  if (int e = lfq_hmc_check(h, n)) return fail_check(e);
  if (n > 0 && (!phi || !other)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return LFQ_OK;
}

template <class T>
int hmc(const lfq_phi4* t, const lfq_hmc* h, int32_t path, int64_t n, T* phi, double* dh, uint8_t* accepted, const double* smear,
        double* observables, void* ws, size_t bytes, void* stream) {
  if (int e = arguments<T>(t, h, n, phi, h && h->n_samples > 0 ? static_cast<const void*>(dh) : phi)) return e;
  lfq::hmc_arguments a{*t, *h, lfq::schedule(*h, lfq::momentum_unit(*h)), {}, volume_of(*t), n, dh, accepted, observables};
  if (observables)
    if (int e = smearing_of(*t, smear, a.smear, least_factor<T>)) return e;
  if (path < LFQ_CUDA_AUTO || path > LFQ_CUDA_TILED) return fail(LFQ_ERR_ARGUMENT, "path: unknown value %d", int(path));
  if (h->n_samples == 0) return LFQ_OK;
  const residence<T> r = path == LFQ_CUDA_TILED ? residence<T>() : find_residence<T>(*t);
  if (path == LFQ_CUDA_RESIDENT && !r.kernel) return fail(LFQ_ERR_ARGUMENT, "path: a chain of this theory does not fit one block");
  if (r.kernel) return launch("HMC", r.kernel, n, r.threads, r.shared, stream, lfq::resident_arguments<T>(a), phi);
  if (int e = check_workspace(ws, bytes, workspace<T>(t, n))) return e;
  pieces mem(ws);
  return tiled(*t, *h, n, phi, dh, accepted, a.smear, observables, hmc_work<T>(mem, *t, n), stream);
}

template <class T>
int evolve(const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* phi, T* momenta, void* ws, size_t bytes, void* stream) {
  if (int e = arguments<T>(t, h, n, phi, momenta)) return e;
  if (int e = check_workspace(ws, bytes, workspace<T>(t, n))) return e;
  pieces mem(ws);
  hmc_work<T> w(mem, *t, n);
  w.p = momenta;
  trajectory_end<T> end;
  if (int e = drift_through<T>(*t, lfq::schedule(*h, 1.0), h->n_steps, nullptr, n, phi, w, end, stream)) return e;
  if (int e = kick_last<T>(*t, end, n, momenta, nullptr, stream)) return e;
  return launch("evolve", lfq::copy_kernel<T>, lfq::ceil_div(n * volume_of(*t), lfq::block_size), lfq::block_size, 0, stream,
                n * volume_of(*t), end.phi, phi);
}

}  // namespace
}  // namespace lfq_cuda

using namespace lfq_cuda;

#define LFQ_CUDA_FUNCTIONS(T, F)                                                                                               \
  int lfq_cuda_resident_##F(const lfq_phi4* t) { return resident<T>(t); }                                                      \
  size_t lfq_cuda_hmc_workspace_##F(const lfq_phi4* t, int64_t n) { return workspace<T>(t, n); }                               \
  int lfq_cuda_evolve_##F(const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* phi, T* momenta, void* ws, size_t bytes,          \
                          void* stream) {                                                                                      \
    return evolve(t, h, n, phi, momenta, ws, bytes, stream);                                                                   \
  }                                                                                                                            \
  int lfq_cuda_hmc_##F(const lfq_phi4* t, const lfq_hmc* h, int32_t path, int64_t n, T* phi, double* dh, uint8_t* accepted,    \
                       const double* smear, double* observables, void* ws, size_t bytes, void* stream) {                       \
    return hmc(t, h, path, n, phi, dh, accepted, smear, observables, ws, bytes, stream);                                       \
  }
LFQ_CUDA_FUNCTIONS(float, f32)
LFQ_CUDA_FUNCTIONS(double, f64)
