// HMC of phi^4 with a chain in the registers and the shared memory of one block.
#pragma once
#include "cuda/hmc.cuh"
#include "cuda/observables.cuh"

LFQ_NAMESPACE_BEGIN

template <class T>
struct resident_arguments {
  hmc_arguments hmc;
  phi4_site<T> site;
  phi4_kick<T> kick[LFQ_MAX_STAGES + 2];  // of the schedule
  T drift[LFQ_MAX_STAGES];
  explicit resident_arguments(const hmc_arguments& a) : hmc(a), site(a.theory.beta, a.theory.lam) {
    for (int i = 0; i < LFQ_MAX_STAGES + 2; ++i) kick[i] = phi4_kick<T>(a.theory.beta, a.theory.lam, a.steps.kick[i]);
    for (int i = 0; i < LFQ_MAX_STAGES; ++i) drift[i] = T(a.steps.drift[i]);
  }
};

// A chain of any extents whose field lies in shared memory and, with the momenta, in registers. z is the last accepted
// field.
template <class T, int D, int R>
struct strip_phi4 {
  const resident_arguments<T>& a;
  const strip<D, R> own;
  T* z;
  T* phi;
  T x[R], p[R];

  LFQ_DEVICE strip_phi4(const resident_arguments<T>& arguments, T* field, T* shared)
      : a(arguments), own(arguments.hmc.theory, threadIdx.x), z(field), phi(shared) {}

  LFQ_DEVICE void publish() {
    own.each([&](int k, int i) { phi[i] = x[k]; });
    __syncthreads();
  }
  LFQ_DEVICE void load() {
    own.each([&](int k, int i) { x[k] = z[i]; });
    publish();
  }
  LFQ_DEVICE double start() {
    load();
    double s = 0;
    own.visit(phi, [&](int k, int) { return x[k]; }, [&](int, int, T v, T forward, T) { s += double(a.site.action(v, forward)); });
    return s;
  }
  // A block of the stream makes four sites of a row, which other threads own: it comes through phi.
  LFQ_DEVICE double refresh(const stream& rng, uint32_t chain, double unit) {
    const int volume = int(a.hmc.volume);
    __syncthreads();
    for (int b = threadIdx.x; 4 * b < volume; b += blockDim.x) {
      T n[4];
      normal_block<T>(rng, uint32_t(b), chain, n);
      for (int j = 0; j < 4; ++j)
        if (4 * b + j < volume) phi[4 * b + j] = n[j] * T(unit);
    }
    __syncthreads();
    double p2 = 0;
    own.each([&](int k, int i) {
      p[k] = phi[i];
      p2 += double(p[k]) * double(p[k]);
    });
    __syncthreads();
    publish();
    return p2;
  }
  LFQ_DEVICE void kick_drift(int k, int d) {
    const phi4_kick<T> kick = a.kick[k];
    own.visit(phi, [&](int j, int) { return x[j]; }, [&](int j, int, T v, T, T all) { p[j] = kick(p[j], v, all); });
    __syncthreads();
    const T step = a.drift[d];
    own.each([&](int j, int) { x[j] = fma(step, p[j], x[j]); });
    publish();
  }
  LFQ_DEVICE void last_kick(int k, double& s, double& p2) {
    const phi4_kick<T> kick = a.kick[k];
    own.visit(phi, [&](int j, int) { return x[j]; }, [&](int j, int, T v, T forward, T all) {
      const double m = double(kick(p[j], v, all));
      s += double(a.site.action(v, forward));
      p2 += m * m;
    });
  }
  LFQ_DEVICE void settle(bool accept) {
    if (accept)
      own.each([&](int k, int i) { z[i] = x[k]; });
    else
      load();
  }
  LFQ_DEVICE void measure(double* out) {
    measure_shared<T, D>(a.hmc.theory, a.hmc.smear, phi, out);
    load();
  }
};

// In device memory, which need not be aligned.
template <class T>
LFQ_DEVICE bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
template <class T>
LFQ_DEVICE void store_sites(T* p, const lanes<T, 4>& q) {
  for (int i = 0; i < 4; ++i) p[i] = q.v[i];
}
// Summed in pairs: fewer conversions to double, and no more rounding than a site's own.
template <class T>
LFQ_DEVICE double squares(const lanes<T, 4>& q) {
  return double(fma(q.v[0], q.v[0], q.v[1] * q.v[1]) + fma(q.v[2], q.v[2], q.v[3] * q.v[3]));
}

// A thread's share of a lattice whose rows are 4, 8, ..., 128 sites long: in R successive rows along the first axis, the
// same four sites. Threads beyond the last tile repeat what others do.
template <int D, int R>
struct tile {
  int block;         // the first four sites
  int slice;         // sites of a slice of the first axis
  int above, below;  // first of the four sites next to the tile along the first axis
  int up[D > 2 ? D - 2 : 1], down[D > 2 ? D - 2 : 1];  // the way to the neighbours along the axes between first and last
  int left, right;   // the lanes of the neighbours along the last axis
  bool counts;

  // How many tiles a lattice is; none where it cannot be cut into such.
  static LFQ_HD int64_t per_chain(const lfq_phi4& t) {
    const int row = t.extent[D - 1];
    if (row < 4 || row > 4 * warp_size || (row & (row - 1)) || t.extent[0] % R) return 0;
    int64_t volume = 1;
    for (int i = 0; i < D; ++i) volume *= t.extent[i];
    return volume / (4 * R);
  }

  LFQ_DEVICE explicit tile(const lfq_phi4& t) : slice(1) {
    for (int i = 1; i < D; ++i) slice *= t.extent[i];
    const int columns = slice / 4, rows = t.extent[0] / R, lanes = t.extent[D - 1] / 4;
    const int index = int(threadIdx.x) % (columns * rows), row = index / columns, column = index % columns;
    counts = int(threadIdx.x) < columns * rows;
    block = row * R * slice + 4 * column;
    above = (row + 1 < rows ? row + 1 : 0) * R * slice + 4 * column;
    below = ((row > 0 ? row : rows) * R - 1) * slice + 4 * column;
    int rest = column / lanes, stride = t.extent[D - 1];
    for (int i = D - 2; i >= 1; --i) {
      const int n = t.extent[i], c = rest % n;
      rest /= n;
      up[i - 1] = c + 1 < n ? stride : stride * (1 - n);
      down[i - 1] = c > 0 ? -stride : stride * (n - 1);
      stride *= n;
    }
    const int lane = threadIdx.x % warp_size, first = lane & ~(lanes - 1);
    left = first | ((lane - 1) & (lanes - 1));
    right = first | ((lane + 1) & (lanes - 1));
  }
};

// Momenta in units of 1 / unit; returns the thread's share of their squares. A block of the stream makes the four sites
// of a row.
template <class T, int D, int R>
LFQ_DEVICE double fill_momenta(const tile<D, R>& own, const stream& rng, uint32_t chain, T unit, lanes<T, 4> (&p)[R]) {
  double p2 = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    normal_block<T>(rng, uint32_t(own.block + r * own.slice) / 4, chain, p[r].v);
    for (int i = 0; i < 4; ++i) p[r].v[i] *= unit;
    p2 += squares(p[r]);
  }
  return own.counts ? p2 : 0.0;
}

// A chain whose field and momenta are in registers. Shared memory holds the field twice, the rows that other threads
// need: those of the step before, and those that this step writes. z is the last accepted field.
template <class T, int D, int R>
struct tile_phi4 {
  const resident_arguments<T>& a;
  const tile<D, R> own;
  T* const z;
  T *from, *to;
  lanes<T, 4> x[R], p[R];

  LFQ_DEVICE tile_phi4(const resident_arguments<T>& arguments, T* field, T* shared)
      : a(arguments), own(arguments.hmc.theory), z(field), from(shared), to(shared + arguments.hmc.volume) {}

  // Row r of x is what the next step begins with.
  LFQ_DEVICE void publish(int r) {
    if (D > 2 || r == 0 || r == R - 1) lfq::store(to + own.block + r * own.slice, x[r]);
  }
  LFQ_DEVICE void published() {
    T* const t = from;
    from = to;
    to = t;
    __syncthreads();
  }
  // Calls f(r, i, phi, sum over forward neighbours, sum over all) for the sites, and done(r) when no other site of the
  // thread needs x[r] any more.
  template <class F, class G>
  LFQ_DEVICE void visit(F&& f, G&& done) {
    lanes<T, 4> below = lfq::load<4>(from + own.below);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const lanes<T, 4> here = x[r], above = r + 1 < R ? x[r + 1 < R ? r + 1 : r] : lfq::load<4>(from + own.above);
      const T left = __shfl_sync(0xffffffffu, here.v[3], own.left), right = __shfl_sync(0xffffffffu, here.v[0], own.right);
      lanes<T, 4> ahead = above, behind = below;
#pragma unroll
      for (int axis = 0; axis < D - 2; ++axis) {
        const T* row = from + own.block + r * own.slice;
        const lanes<T, 4> u = lfq::load<4>(row + own.up[axis]), d = lfq::load<4>(row + own.down[axis]);
        for (int i = 0; i < 4; ++i) ahead.v[i] += u.v[i], behind.v[i] += d.v[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T forward = ahead.v[i] + (i < 3 ? here.v[i < 3 ? i + 1 : i] : right);
        const T backward = behind.v[i] + (i > 0 ? here.v[i > 0 ? i - 1 : i] : left);
        f(r, i, here.v[i], forward, forward + backward);
      }
      done(r);
      below = here;
    }
  }

  LFQ_DEVICE void load() {
    const bool whole = aligned(z);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T* const row = z + own.block + r * own.slice;
      x[r] = whole ? lfq::load<4>(row) : lfq::load<4, false>(row);
      publish(r);
    }
    published();
  }
  LFQ_DEVICE double start() {
    load();
    double s = 0;
    T row = T(0);
    visit([&](int, int i, T v, T forward, T) { row = i > 0 ? row + a.site.action(v, forward) : a.site.action(v, forward); },
          [&](int) { s += double(row); });
    return own.counts ? s : 0.0;
  }
  LFQ_DEVICE double refresh(const stream& rng, uint32_t chain, double unit) {
    return fill_momenta(own, rng, chain, T(unit), p);
  }
  LFQ_DEVICE void kick_drift(int k, int d) {
    const phi4_kick<T> kick = a.kick[k];
    const T step = a.drift[d];
    visit([&](int r, int i, T v, T, T all) { p[r].v[i] = kick(p[r].v[i], v, all); },
          [&](int r) {
            for (int i = 0; i < 4; ++i) x[r].v[i] = fma(step, p[r].v[i], x[r].v[i]);
            publish(r);
          });
    published();
  }
  LFQ_DEVICE void last_kick(int k, double& s, double& p2) {
    const phi4_kick<T> kick = a.kick[k];
    T row = T(0);
    visit(
        [&](int r, int i, T v, T forward, T all) {
          p[r].v[i] = kick(p[r].v[i], v, all);
          row = i > 0 ? row + a.site.action(v, forward) : a.site.action(v, forward);
        },
        [&](int r) {
          s += double(row);
          p2 += squares(p[r]);
        });
    if (!own.counts) s = p2 = 0;
  }
  LFQ_DEVICE void settle(bool accept) {
    if (!accept) return load();
    const bool whole = aligned(z);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T* const row = z + own.block + r * own.slice;
      if (whole)
        lfq::store(row, x[r]);
      else
        store_sites(row, x[r]);
    }
  }
  LFQ_DEVICE void measure(double* out) {
    T* const phi = from < to ? from : to;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) lfq::store(phi + own.block + r * own.slice, x[r]);
    __syncthreads();
    measure_shared<T, D>(a.hmc.theory, a.hmc.smear, phi, out);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) publish(r);
    published();
  }
};

// THREADS: the most there may be, and BLOCKS of them on a multiprocessor, so that field and momenta of a thread's sites
// stay in registers.
template <class T, class P, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) resident_kernel(const __grid_constant__ resident_arguments<T> a, T* phi) {
  T* shared = reinterpret_cast<T*>(lfq_shared + sum_scratch(blockDim.x, moments<LFQ_MAX_DIM>::size));
  P potential(a, phi + blockIdx.x * a.hmc.volume, shared);
  run_chain(potential, a.hmc, blockIdx.x);
}

LFQ_NAMESPACE_END
