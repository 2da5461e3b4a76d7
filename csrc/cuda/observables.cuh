// Observables of phi^4 fields on the GPU: of a chain in the shared memory of a block, and of chains in device memory.
#pragma once
#include "cuda/phi4.cuh"

LFQ_NAMESPACE_BEGIN

// Sums of phi, phi^2, phi^4, phi times its forward neighbours, then cos and sin of each axis's smallest momentum, and
// the squares of the smeared field.
template <int D>
struct moments {
  static constexpr int size = 5 + 2 * D;
};

LFQ_DEVICE void sincos_of(int x, int n, double& sine, double& cosine) { sincospi(2.0 * x / n, &sine, &cosine); }
LFQ_DEVICE void sincos_of(int x, int n, float& sine, float& cosine) { sincospif(2.0f * float(x) / float(n), &sine, &cosine); }

// cos and sin of 2 pi x / n for x, x + 1, ...
template <class T>
struct rotation {
  T cosine, sine, step_cosine, step_sine;
  LFQ_DEVICE rotation(int x, int n) {
    sincos_of(x, n, sine, cosine);
    sincos_of(1, n, step_sine, step_cosine);
  }
  LFQ_DEVICE void next() {
    const T c = fma(cosine, step_cosine, -(sine * step_sine));
    sine = fma(sine, step_cosine, cosine * step_sine);
    cosine = c;
  }
};

// All but the last of the sums, of one patch, in the field's type up to the end.
template <class T, int D, int W, int R, bool ALIGNED, int N>
LFQ_DEVICE void add_moments(const lfq_phi4& t, unsigned index, const T* phi, double (&sum)[N]) {
  const patch<T, D, W, R, ALIGNED> own(t, index);
  if (own.count == 0) return;
  rotation<T> along(own.first, t.extent[0]);
  T column[W], squares = T(0), fourth = T(0), links = T(0), cosine = T(0), sine = T(0);
  for (T& v : column) v = T(0);
  own.template visit<false>(phi, nothing_early(), [&](int, auto& x, auto& forward, auto&, int) {
    for (int w = 0; w < W; ++w) {
      const T p = x.v[w], p2 = p * p;
      column[w] += p;
      squares += p2;
      fourth = fma(p2, p2, fourth);
      links = fma(p, forward.v[w], links);
    }
    const T row = sum_of(x);
    cosine = fma(row, along.cosine, cosine);
    sine = fma(row, along.sine, sine);
    along.next();
  });
  T total = column[0];
  for (int w = 1; w < W; ++w) total += column[w];
  sum[0] += double(total);
  sum[1] += double(squares);
  sum[2] += double(fourth);
  sum[3] += double(links);
  sum[4] += double(cosine);
  sum[5] += double(sine);
  int rest = own.place;
#pragma unroll
  for (int i = D - 1; i >= 1; --i) {
    const int n = t.extent[i], x = rest % n;
    rest /= n;
    if (W > 1 && i == D - 1) {
      rotation<T> within(x, n);
      cosine = sine = T(0);
      for (int w = 0; w < W; ++w, within.next()) {
        cosine = fma(column[w], within.cosine, cosine);
        sine = fma(column[w], within.sine, sine);
      }
    } else {
      sincos_of(x, n, sine, cosine);
      cosine *= total;
      sine *= total;
    }
    sum[4 + 2 * i] += double(cosine);
    sum[5 + 2 * i] += double(sine);
  }
}

// Sites x, x + 1, .. x + R - 1 of a line whose n sites lie `stride` apart, smeared; CLOSED: the line is a circle.
template <bool CLOSED, int R, class T>
LFQ_DEVICE void smear_segment(const smearing& s, int axis, const T* line, int x, int n, int stride, T (&out)[R]) {
  // At distance d, site x + i for i >= d lies in ahead[i % R], and for i < R - d in behind[i % R].
  T ahead[R], behind[R];
  const int end = n * stride;
  int a = x * stride, b = a;
  const T own = s.of(T(), axis, 0);
#pragma unroll
  for (int k = 0; k < R; ++k) {
    ahead[k] = behind[k] = line[a];
    out[k] = own * ahead[k];
    a += stride;
    if (CLOSED && a == end) a = 0;
  }
  const int reach = s.reach[axis];
  for (int d = 0; d < reach; d += R) {
#pragma unroll
    for (int j = 0; j < R; ++j)
      if (d + j < reach) {
        b = (CLOSED && b == 0 ? end : b) - stride;
        ahead[j] = line[a];
        behind[R - 1 - j] = line[b];
        a += stride;
        if (CLOSED && a == end) a = 0;
        const T factor = s.of(T(), axis, d + j + 1);
#pragma unroll
        for (int k = 0; k < R; ++k) out[k] = fma(factor, ahead[(k + j + 1) % R] + behind[(k + R - 1 - j) % R], out[k]);
      }
  }
}
template <int R, class T>
LFQ_DEVICE double squares_of(const T (&x)[R], int count) {
  T sum = T(0);
#pragma unroll
  for (int k = 0; k < R; ++k)
    if (k < count) sum = fma(x[k], x[k], sum);
  return double(sum);
}

// ---- in shared memory ----------------------------------------------------------------------

// Smears along an axis, R sites a thread; all lines of up to R sites for each thread of the block. LAST: leaves the
// field and returns the thread's share of the squares instead.
template <bool LAST, int R, class T>
LFQ_DEVICE double smear_lines(const smearing& s, int axis, T* phi, int n, int stride, int volume) {
  const int segments = int(ceil_div(n, R)), n_lines = volume / n, at_once = int(blockDim.x) / segments;
  const int segment = int(threadIdx.x) / at_once, mine = int(threadIdx.x) - segment * at_once;
  const int count = n - segment * R;
  double squares = 0;
  for (int base = 0; base < n_lines; base += at_once) {
    const int line = base + mine;
    const bool active = count > 0 && mine + base < n_lines;
    const int outer = stride == n_lines ? 0 : line / stride;
    T* const begin = phi + outer * (n * stride) + (line - outer * stride);
    // Lines begin at different sites, so that a warp's threads meet different banks.
    int x = segment * R + (n % 2 == 0 ? outer % warp_size : 0);
    while (x >= n) x -= n;
    T out[R];
    if (active) smear_segment<true>(s, axis, begin, x, n, stride, out);
    if constexpr (LAST) {
      if (active) squares += squares_of(out, count);
    } else {
      __syncthreads();
      if (active) {
        int i = x * stride;
#pragma unroll
        for (int k = 0; k < R; ++k) {
          if (k < count) begin[i] = out[k];
          i = i + stride == n * stride ? 0 : i + stride;
        }
      }
      __syncthreads();
    }
  }
  return squares;
}

// Sites of a segment where a thread has more than a few of a chain; with twice as many a kernel needs 128 registers.
template <class T>
constexpr int segment_sites = sizeof(T) == 4 ? 8 : 4;
constexpr int few_sites = 4;

// Whether a block of so many threads can measure a chain in segments of R sites.
LFQ_HD bool can_measure(const lfq_phi4& t, int64_t volume, int threads, int R) {
  for (int i = 0; i < t.ndim; ++i)
    if (volume > int64_t(few_sites) * threads && t.extent[i] > R * threads) return false;
  return true;
}

// Leaves a warp's sums behind those of the warps before; its share of the squares comes last.
template <int D, int W, int ROWS, class T>
LFQ_DEVICE void leave_moments(const lfq_phi4& t, int volume, const T* phi, double* scratch) {
  constexpr int N = moments<D>::size;
  double sum[N - 1] = {};
  const int n_patches = volume / (t.extent[0] * W) * int(ceil_div(t.extent[0], ROWS));
#pragma unroll 1
  for (int i = threadIdx.x; i < n_patches; i += blockDim.x) add_moments<T, D, W, ROWS, true>(t, unsigned(i), phi, sum);
  warp_sum(sum);
  if (threadIdx.x % warp_size == 0)
    for (int n = 0; n < N - 1; ++n) scratch[threadIdx.x / warp_size * N + n] = sum[n];
}
template <int D, int R, class T>
LFQ_DEVICE void leave_squares(const lfq_phi4& t, const smearing& s, int volume, T* phi, double* scratch) {
  int stride = volume;
#pragma unroll 1
  for (int axis = 0; axis < D - 1; ++axis) {
    stride /= t.extent[axis];
    smear_lines<false, R>(s, axis, phi, t.extent[axis], stride, volume);
  }
  double squares[1] = {smear_lines<true, R>(s, D - 1, phi, t.extent[D - 1], 1, volume)};
  warp_sum(squares);
  if (threadIdx.x % warp_size == 0) scratch[(threadIdx.x / warp_size + 1) * moments<D>::size - 1] = squares[0];
}

// Observables of the field at `field` in shared memory, which does not survive the smearing. The block's first bytes
// are scratch for moments<D>::size sums. A function of its own, so that it takes no registers from what calls it.
template <class T, int D, int R = segment_sites<T>>
__device__ __noinline__ void measure_shared(const lfq_phi4& t, const smearing& s, T* field, double* out) {
  constexpr int N = moments<D>::size, W = D > 1 ? 16 / int(sizeof(T)) : 1;
  double* const scratch = reinterpret_cast<double*>(lfq_shared);
  // Tells the compiler that the field is in shared memory.
  T* const phi = reinterpret_cast<T*>(lfq_shared + (reinterpret_cast<char*>(field) - lfq_shared));
  int volume = t.extent[0];
  for (int i = 1; i < D; ++i) volume *= t.extent[i];
  const bool few = volume <= few_sites * int(blockDim.x);
  if (few)
    leave_moments<D, 1, few_sites>(t, volume, phi, scratch);
  else if (t.extent[D - 1] % W == 0)
    leave_moments<D, W, 8>(t, volume, phi, scratch);
  else
    leave_moments<D, 1, 8>(t, volume, phi, scratch);
  __syncthreads();
  if (few)
    leave_squares<D, few_sites>(t, s, volume, phi, scratch);
  else
    leave_squares<D, R>(t, s, volume, phi, scratch);
  __syncthreads();
  if (threadIdx.x < N) {
    double sum = 0;
    for (int w = 0; w < int(blockDim.x) / warp_size; ++w) sum += scratch[w * N + threadIdx.x];
    scratch[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) store_observables(D, scratch, scratch[N - 1], double(volume), out);
}

constexpr int measure_threads = 512;  // the most

template <class T, int D>
__global__ void __launch_bounds__(measure_threads)
    measure_kernel(lfq_phi4 theory, const __grid_constant__ smearing s, int volume, const T* phi, double* out) {
  constexpr int W = 16 / int(sizeof(T));
  T* const field = reinterpret_cast<T*>(lfq_shared + sum_scratch(blockDim.x, moments<D>::size));
  const T* const chain = phi + int64_t(blockIdx.x) * volume;
  if (volume % W == 0 && reinterpret_cast<uintptr_t>(phi) % 16 == 0) {
#pragma unroll 4
    for (int i = W * threadIdx.x; i < volume; i += W * blockDim.x) store(field + i, load<W>(chain + i));
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < volume; i += blockDim.x) field[i] = chain[i];
  }
  __syncthreads();
  measure_shared<T, D, 2 * segment_sites<T>>(theory, s, field, out + int64_t(blockIdx.x) * LFQ_N_OBSERVABLES);
}

// ---- in device memory ----------------------------------------------------------------------

template <class T, int D, int W, bool ALIGNED>
__global__ void __launch_bounds__(block_size)
    moments_kernel(lfq_phi4 theory, int64_t volume, int n_parts, const T* __restrict__ phi, double* partial) {
  const part at(n_parts);
  double sum[moments<D>::size - 1] = {};
  add_moments<T, D, W, strip_rows, ALIGNED>(theory, unsigned(at.thread()), phi + at.chain * volume, sum);
  store_part(sum, partial, at, n_parts);
}

// Segments along an axis that is not the last one.
template <class T>
constexpr int axis_sites = sizeof(T) == 4 ? 16 : 8;
template <class T>
__global__ void __launch_bounds__(block_size)
    smear_axis_kernel(const __grid_constant__ smearing s, int axis, int n, int stride, int volume, int n_parts,
                      const T* __restrict__ phi, T* __restrict__ out) {
  constexpr int R = axis_sites<T>;
  const part at(n_parts);
  const unsigned segments = unsigned(ceil_div(n, R)), i = unsigned(at.thread());
  const unsigned rest = i / unsigned(stride), inner = i - rest * stride, outer = rest / segments;
  if (outer >= unsigned(volume / n / stride)) return;
  const int x = int(rest - outer * segments) * R;
  const int64_t line = at.chain * volume + int64_t(outer) * n * stride + inner;
  T y[R];
  smear_segment<true>(s, axis, phi + line, x, n, stride, y);
#pragma unroll
  for (int k = 0; k < R; ++k)
    if (x + k < n) out[line + (x + k) * stride] = y[k];
}

// The squares of what smearing along the last axis makes: a block takes pieces of some rows.
constexpr int piece_rows = warp_size, row_sites = 8, piece_sites = block_size / piece_rows * row_sites;
// Odd, so that a warp's threads meet different banks.
LFQ_HD constexpr int piece_pitch(int reach) { return piece_sites + 2 * reach + 1; }
template <class T>
__global__ void __launch_bounds__(block_size)
    smear_rows_kernel(const __grid_constant__ smearing s, int axis, int n, int volume, int n_parts, const T* __restrict__ phi,
                      double* partial) {
  T* const shared = reinterpret_cast<T*>(lfq_shared + sum_scratch(block_size, 1));
  const part at(n_parts);
  const int reach = s.reach[axis], pitch = piece_pitch(reach), n_pieces = int(ceil_div(n, piece_sites)), n_rows = volume / n;
  const int group = at.number / n_pieces, begin = (at.number - group * n_pieces) * piece_sites;
  const int first = group * piece_rows, sites = n - begin < piece_sites ? n - begin : piece_sites;
  const int rows = n_rows - first < piece_rows ? n_rows - first : piece_rows;
  const T* const chain = phi + at.chain * volume;
  for (int r = int(threadIdx.x) / warp_size; r < rows; r += block_size / warp_size)
    for (int j = int(threadIdx.x) % warp_size; j < sites + 2 * reach; j += warp_size) {
      const int x = begin - reach + j;
      shared[r * pitch + j] = chain[(first + r) * n + (x < 0 ? x + n : x < n ? x : x - n)];
    }
  __syncthreads();
  double squares[1] = {0};
  const int r = int(threadIdx.x) % piece_rows, x = int(threadIdx.x) / piece_rows * row_sites;
  if (r < rows && x < sites) {
    T y[row_sites];
    smear_segment<false>(s, axis, shared + r * pitch, reach + x, pitch, 1, y);
    squares[0] = squares_of(y, sites - x);
  }
  store_part(squares, partial, at, n_parts);
}

template <int D>
__global__ void observables_kernel(int n_parts, const double* partial, int n_smear_parts, const double* smear_partial,
                                   double volume, double* out) {
  double sum[moments<D>::size - 1], smeared2[1];
  sum_parts(partial, blockIdx.x, n_parts, sum);
  sum_parts(smear_partial, blockIdx.x, n_smear_parts, smeared2);
  if (threadIdx.x == 0) store_observables(D, sum, smeared2[0], volume, out + int64_t(blockIdx.x) * LFQ_N_OBSERVABLES);
}

LFQ_NAMESPACE_END
