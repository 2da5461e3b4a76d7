// A group: the W chains that share the lanes of a vector, stored as [site][lane].
#pragma once
#include "cpu/parallel.hpp"
#include "cpu/simd.hpp"
#include "lfq/lattice.hpp"

LFQ_NAMESPACE_BEGIN

// A compile-time number as a function argument.
template <int N>
struct constant {
  static constexpr int value = N;
};

// Hands out 64-byte aligned pieces of a caller's buffer. With a null base it only counts, so the code
// that lays a workspace out is the code that tells its size.
struct arena {
  // Fields whose rows are multiples of 4 KiB would all start in one set of the first-level cache.
  static constexpr size_t stagger = 2304;
  char* base = nullptr;
  size_t used = 0;
  explicit arena(void* p = nullptr) {
    if (p) base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
  }
  template <class U>
  U* take(int64_t n) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += ((size_t(n) * sizeof(U) + 63) & ~size_t(63)) + stagger;
    return p;
  }
  size_t bytes() const { return used + 64; }
};

// How chains fill the lanes of a vector. Small lattices: lane l is chain first + l. Large ones: all lanes
// hold one chain, lane l the l-th slab along the first axis, so that a field is 1/W as large in cache and
// few chains suffice. The choice depends on the theory alone: results cannot depend on the batch.
template <class T>
struct group {
  static constexpr int width = simd<T>::width;
  bool slabs;
  int64_t first;  // first chain, within the call
  int n_valid;    // lanes that stand for a chain in outputs; other lanes repeat one and are dropped

  group(int64_t index, int64_t n_chains, bool split = false)
      : slabs(split),
        first(split ? index : index * width),
        n_valid(split ? 1 : int(n_chains - first < width ? n_chains - first : width)) {}

  static int64_t count(int64_t n_chains, bool split = false) {
    return split ? n_chains : (n_chains + width - 1) / width;
  }
  static int64_t sites(int64_t volume, bool split) { return split ? volume / width : volume; }
  int64_t chain(int lane) const { return first + (slabs || lane >= n_valid ? 0 : lane); }
  // Where a lane's first site lies in an array of fields.
  int64_t offset(int lane, int64_t volume) const {
    return chain(lane) * volume + (slabs ? lane * (volume / width) : 0);
  }
  int stored_lanes() const { return slabs ? width : n_valid; }
  // Per-lane sums to per-chain ones: every lane of a split chain receives the chain's.
  void totals(const lane_sum<T>& s, double* out) const {
    double all = 0;
    for (int l = 0; l < width; ++l) all += out[l] = s[l];
    if (slabs)
      for (int l = 0; l < width; ++l) out[l] = all;
  }
};

// Swaps lanes and vectors of a W x W tile: one power of two of the index at a time.
template <int STRIDE, class T, int... L>
LFQ_HD void swap_lanes(simd<T>& a, simd<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = simd<T>::width;
  const simd<T> first = shuffle<T, ((L & STRIDE) ? W + L - STRIDE : L)...>(a, b);
  b = shuffle<T, ((L & STRIDE) ? W + L : L + STRIDE)...>(a, b);
  a = first;
}
template <class T, int STRIDE = 1>
LFQ_HD void transpose(simd<T>* tile) {
  constexpr int W = simd<T>::width;
  if constexpr (STRIDE < W) {
    for (int i = 0; i < W; ++i)
      if (!(i & STRIDE)) swap_lanes<STRIDE>(tile[i], tile[i + STRIDE], std::make_integer_sequence<int, W>());
    transpose<T, 2 * STRIDE>(tile);
  }
}

// Returns the lane of the first NaN or Inf, or -1; site receives its place in the chain's field.
template <class T>
int load_group(const group<T>& g, const T* src, int64_t volume, simd<T>* dst, int64_t* site) {
  constexpr int W = simd<T>::width;
  const int64_t n = g.sites(volume, g.slabs), whole = n - n % W;
  const T* from[W];
  for (int l = 0; l < W; ++l) from[l] = src + g.offset(l, volume);
  // 0 * Inf and 0 * NaN are NaN; two sums, so that none waits for another
  simd<T> zeros(T(0)), more_zeros(T(0));
  for (int64_t s = 0; s < whole; s += W) {
    simd<T> tile[W];
    for (int l = 0; l < W; ++l) memcpy(&tile[l], from[l] + s, sizeof(tile[l]));
    for (int l = 0; l < W; l += 2) {
      zeros = fma(tile[l], simd<T>(T(0)), zeros);
      more_zeros = fma(tile[l + 1], simd<T>(T(0)), more_zeros);
    }
    transpose(tile);
    for (int l = 0; l < W; ++l) dst[s + l] = tile[l];
  }
  for (int64_t s = whole; s < n; ++s) {
    for (int l = 0; l < W; ++l) dst[s].set(l, from[l][s]);
    zeros = fma(dst[s], simd<T>(T(0)), zeros);
  }
  const simd<T> zero = zeros + more_zeros;
  bool finite = true;
  for (int l = 0; l < W; ++l) finite = finite && zero[l] == T(0);
  if (finite) return -1;
  for (int l = 0; l < g.stored_lanes(); ++l)
    for (int64_t s = 0; s < n; ++s)
      if (!(dst[s][l] * T(0) == T(0))) {
        *site = s;
        return l;
      }
  return -1;
}

template <class T>
void store_group(const group<T>& g, const simd<T>* src, int64_t volume, T* dst) {
  constexpr int W = simd<T>::width;
  const int64_t n = g.sites(volume, g.slabs), whole = n - n % W;
  const int lanes = g.stored_lanes();
  T* to[W];
  for (int l = 0; l < lanes; ++l) to[l] = dst + g.offset(l, volume);
  for (int64_t s = 0; s < whole; s += W) {
    simd<T> tile[W];
    for (int l = 0; l < W; ++l) tile[l] = src[s + l];
    transpose(tile);
    for (int l = 0; l < lanes; ++l) memcpy(to[l] + s, &tile[l], sizeof(tile[l]));
  }
  for (int64_t s = whole; s < n; ++s)
    for (int l = 0; l < lanes; ++l) to[l][s] = src[s][l];
}

// Collects the earliest failure over groups that run in parallel.
struct failures {
  lfq_failure first = {-1, -1, 0.0};
  int lock = 0;
  void report(int64_t chain, int64_t step, double value) {
    while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {
    }
    if (first.chain < 0 || chain < first.chain) first = {chain, step, value};
    __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
  }
  bool any() const { return first.chain >= 0; }
};

LFQ_NAMESPACE_END
