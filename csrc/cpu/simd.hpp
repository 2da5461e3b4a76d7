// One native vector of T, with the operations of lfq/real.hpp. Lanes are chains.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <utility>

#include "lfq/philox.hpp"

LFQ_NAMESPACE_BEGIN

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int simd_registers = 32;
#else
constexpr int simd_registers = 16;
#endif
#if defined(__AVX512F__)
constexpr int simd_bytes = 64;
#elif defined(__AVX2__)
constexpr int simd_bytes = 32;
#else
constexpr int simd_bytes = 16;
#endif

template <class T>
struct native_vector;
template <>
struct native_vector<double> {
  typedef double real __attribute__((vector_size(simd_bytes)));
  typedef uint64_t bits __attribute__((vector_size(simd_bytes)));
};
template <>
struct native_vector<float> {
  typedef float real __attribute__((vector_size(simd_bytes)));
  typedef uint32_t bits __attribute__((vector_size(simd_bytes)));
  typedef float half __attribute__((vector_size(simd_bytes / 2)));
};

template <class T>
struct simd {
  static constexpr int width = simd_bytes / int(sizeof(T));
  using scalar = T;
  using native = typename native_vector<T>::real;
  using bits_t = typename native_vector<T>::bits;
  native v;
  simd() = default;
  LFQ_HD simd(native x) : v(x) {}
  // x - 0 is x for every x, so this is a plain broadcast; 0 + x would have to turn -0 into +0.
  LFQ_HD explicit simd(T x) : v(x - native{}) {}
  LFQ_HD T operator[](int lane) const { return v[lane]; }
  LFQ_HD void set(int lane, T x) { v[lane] = x; }
  LFQ_HD simd& operator+=(simd o) { v += o.v; return *this; }
  LFQ_HD simd& operator-=(simd o) { v -= o.v; return *this; }
  friend LFQ_HD simd operator+(simd a, simd b) { return a.v + b.v; }
  friend LFQ_HD simd operator-(simd a, simd b) { return a.v - b.v; }
  friend LFQ_HD simd operator*(simd a, simd b) { return a.v * b.v; }
  friend LFQ_HD simd operator/(simd a, simd b) { return a.v / b.v; }
  friend LFQ_HD simd operator-(simd a) { return -a.v; }
  friend LFQ_HD auto operator>(simd a, simd b) { return a.v > b.v; }
  friend LFQ_HD auto operator<(simd a, simd b) { return a.v < b.v; }
  friend LFQ_HD bits_t to_bits(simd a) { return (bits_t)a.v; }
  template <class M>
  friend LFQ_HD simd select(M m, simd a, simd b) { return m ? a.v : b.v; }
};

template <class T>
struct real_traits<simd<T>> {
  using scalar = T;
  using bits = typename simd<T>::bits_t;
  static LFQ_HD simd<T> from_bits(bits b) { return (typename simd<T>::native)b; }
};

// Lane l of the result is lane FROM[l] of a and b one after the other.
template <class T, int... FROM>
LFQ_HD simd<T> shuffle(simd<T> a, simd<T> b) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a.v, b.v, typename simd<T>::bits_t{typename real_traits<T>::bits(FROM)...});
#else
  return __builtin_shufflevector(a.v, b.v, FROM...);
#endif
}

// Lane l of the result is lane (l + shift) mod W.
template <class T>
struct rotation {
  typename simd<T>::bits_t from;
  rotation() = default;
  explicit rotation(int shift) {
    constexpr int W = simd<T>::width;
    for (int l = 0; l < W; ++l) from[l] = typename real_traits<T>::bits(((l + shift) % W + W) % W);
  }
  LFQ_HD simd<T> operator()(simd<T> a) const {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(a.v, from);
#else
    simd<T> r;
    for (int l = 0; l < simd<T>::width; ++l) r.v[l] = a.v[from[l]];
    return r;
#endif
  }
};

#if defined(__AVX512F__)
LFQ_HD simd<double> fma(simd<double> a, simd<double> b, simd<double> c) {
  return (simd<double>::native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v);
}
LFQ_HD simd<float> fma(simd<float> a, simd<float> b, simd<float> c) {
  return (simd<float>::native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
LFQ_HD simd<double> minimum(simd<double> limit, simd<double> a) {
  return (simd<double>::native)_mm512_min_pd((__m512d)limit.v, (__m512d)a.v);
}
LFQ_HD simd<float> minimum(simd<float> limit, simd<float> a) {
  return (simd<float>::native)_mm512_min_ps((__m512)limit.v, (__m512)a.v);
}
LFQ_HD simd<double> sqrt(simd<double> a) { return (simd<double>::native)_mm512_sqrt_pd((__m512d)a.v); }
LFQ_HD simd<float> sqrt(simd<float> a) { return (simd<float>::native)_mm512_sqrt_ps((__m512)a.v); }
#elif defined(__AVX2__)
LFQ_HD simd<double> fma(simd<double> a, simd<double> b, simd<double> c) {
  return (simd<double>::native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v);
}
LFQ_HD simd<float> fma(simd<float> a, simd<float> b, simd<float> c) {
  return (simd<float>::native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
LFQ_HD simd<double> minimum(simd<double> limit, simd<double> a) {
  return (simd<double>::native)_mm256_min_pd((__m256d)limit.v, (__m256d)a.v);
}
LFQ_HD simd<float> minimum(simd<float> limit, simd<float> a) {
  return (simd<float>::native)_mm256_min_ps((__m256)limit.v, (__m256)a.v);
}
LFQ_HD simd<double> sqrt(simd<double> a) { return (simd<double>::native)_mm256_sqrt_pd((__m256d)a.v); }
LFQ_HD simd<float> sqrt(simd<float> a) { return (simd<float>::native)_mm256_sqrt_ps((__m256)a.v); }
#else
template <class T>
LFQ_HD simd<T> fma(simd<T> a, simd<T> b, simd<T> c) {
#if defined(__ARM_FEATURE_FMA)
  simd<T> r;
  for (int l = 0; l < simd<T>::width; ++l) r.v[l] = lfq::fma(a.v[l], b.v[l], c.v[l]);
  return r;
#else
  return a * b + c;
#endif
}
template <class T>
LFQ_HD simd<T> minimum(simd<T> limit, simd<T> a) {
  return select(limit < a, limit, a);
}
template <class T>
LFQ_HD simd<T> sqrt(simd<T> a) {
  simd<T> r;
  for (int l = 0; l < simd<T>::width; ++l) r.v[l] = lfq::sqrt(T(a.v[l]));
  return r;
}
#endif

// 64-bit lanes hold a word in their low half; Philox lets the high half fill with rubbish, which the
// 32 x 32 -> 64 bit multiply ignores. Mask the words after the last round.
using words64 = simd<double>::bits_t;
template <>
struct word_traits<words64> {
  static LFQ_HD words64 broadcast(uint32_t w) { return words64{} + uint64_t(w); }
  static LFQ_HD void multiply(words64 a, uint32_t m, words64& lo, words64& hi) {
#if defined(__AVX512F__)
    lo = (words64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    lo = (words64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    lo = (words64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
    lo = (a & (words64{} + uint64_t(0xffffffffu))) * (words64{} + uint64_t(m));
#endif
    hi = lo >> 32;
  }
};

// Words of the even and of the odd lanes, as the low halves of 64-bit lanes, to 32-bit lanes.
LFQ_HD simd<float>::bits_t interleave(words64 even, words64 odd) {
#if defined(__AVX512F__)
  return (simd<float>::bits_t)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#else
  return (simd<float>::bits_t)((even & (words64{} + uint64_t(0xffffffffu))) | (odd << 32));
#endif
}

// Two vectors that take every operation side by side. A chain of dependent operations leaves most of a
// core idle, and its window is too short to overlap whole sites; two chains instruction by instruction are not.
template <class B>
struct twin_bits {
  B a, b;
  friend LFQ_HD twin_bits operator+(twin_bits x, twin_bits y) { return {x.a + y.a, x.b + y.b}; }
  friend LFQ_HD twin_bits operator-(twin_bits x, twin_bits y) { return {x.a - y.a, x.b - y.b}; }
  friend LFQ_HD twin_bits operator&(twin_bits x, twin_bits y) { return {x.a & y.a, x.b & y.b}; }
  friend LFQ_HD twin_bits operator|(twin_bits x, twin_bits y) { return {x.a | y.a, x.b | y.b}; }
  friend LFQ_HD twin_bits operator^(twin_bits x, twin_bits y) { return {x.a ^ y.a, x.b ^ y.b}; }
  friend LFQ_HD twin_bits operator~(twin_bits x) { return {~x.a, ~x.b}; }
  friend LFQ_HD twin_bits operator<<(twin_bits x, int n) { return {x.a << n, x.b << n}; }
  friend LFQ_HD twin_bits operator>>(twin_bits x, int n) { return {x.a >> n, x.b >> n}; }
  template <class U>
  friend LFQ_HD twin_bits operator+(twin_bits x, U y) { return {x.a + y, x.b + y}; }
  friend LFQ_HD auto operator==(twin_bits x, twin_bits y) {
    return twin_bits<decltype(x.a == y.a)>{x.a == y.a, x.b == y.b};
  }
};

template <class V>
struct side_by_side {
  using T = typename real_traits<V>::scalar;
  using bits_t = twin_bits<typename V::bits_t>;
  V a, b;
  side_by_side() = default;
  LFQ_HD side_by_side(V x, V y) : a(x), b(y) {}
  LFQ_HD explicit side_by_side(T x) : a(x), b(x) {}
  LFQ_HD explicit side_by_side(V x) : a(x), b(x) {}
  friend LFQ_HD side_by_side operator+(side_by_side x, side_by_side y) { return {x.a + y.a, x.b + y.b}; }
  friend LFQ_HD side_by_side operator-(side_by_side x, side_by_side y) { return {x.a - y.a, x.b - y.b}; }
  friend LFQ_HD side_by_side operator*(side_by_side x, side_by_side y) { return {x.a * y.a, x.b * y.b}; }
  friend LFQ_HD side_by_side operator/(side_by_side x, side_by_side y) { return {x.a / y.a, x.b / y.b}; }
  friend LFQ_HD side_by_side operator-(side_by_side x) { return {-x.a, -x.b}; }
  friend LFQ_HD side_by_side fma(side_by_side x, side_by_side y, side_by_side z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
  friend LFQ_HD side_by_side sqrt(side_by_side x) { return {sqrt(x.a), sqrt(x.b)}; }
  friend LFQ_HD side_by_side minimum(side_by_side x, side_by_side y) { return {minimum(x.a, y.a), minimum(x.b, y.b)}; }
  friend LFQ_HD bits_t to_bits(side_by_side x) { return {to_bits(x.a), to_bits(x.b)}; }
  friend LFQ_HD auto operator>(side_by_side x, side_by_side y) { return twin_bits<decltype(x.a > y.a)>{x.a > y.a, x.b > y.b}; }
  friend LFQ_HD auto operator<(side_by_side x, side_by_side y) { return twin_bits<decltype(x.a < y.a)>{x.a < y.a, x.b < y.b}; }
  template <class M>
  friend LFQ_HD side_by_side select(twin_bits<M> m, side_by_side x, side_by_side y) { return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)}; }
};

template <class V>
struct real_traits<side_by_side<V>> {
  using scalar = typename real_traits<V>::scalar;
  using bits = typename side_by_side<V>::bits_t;
  static LFQ_HD side_by_side<V> from_bits(bits x) {
    return {real_traits<V>::from_bits(x.a), real_traits<V>::from_bits(x.b)};
  }
};
template <class T>
using twin = side_by_side<simd<T>>;

// The sites a real stands for: one, or two that are two apart, which is where a row's next site of the same
// parity lies. at<R>(p) reads them, put(p, v) writes them.
template <class R>
struct span;
template <class T>
struct span<simd<T>> {
  static constexpr int sites = 1;
  static LFQ_HD simd<T> at(const simd<T>* p, int) { return p[0]; }
  static LFQ_HD void put(simd<T>* p, int, simd<T> v) { p[0] = v; }
  static LFQ_HD simd<T> sum(simd<T> x, simd<T> start) { return start + x; }
  static LFQ_HD simd<T> dot(simd<T> x, simd<T> y, simd<T> start) { return fma(x, y, start); }
  template <class F>
  static LFQ_HD void each(simd<T> x, F&& f) { f(x); }
};
template <class T>
struct span<twin<T>> {
  static constexpr int sites = 2;
  static LFQ_HD twin<T> at(const simd<T>* p, int stride) { return {p[0], p[stride]}; }
  static LFQ_HD void put(simd<T>* p, int stride, twin<T> v) { p[0] = v.a, p[stride] = v.b; }
  static LFQ_HD simd<T> sum(twin<T> x, simd<T> start) { return start + x.a + x.b; }
  static LFQ_HD simd<T> dot(twin<T> x, twin<T> y, simd<T> start) { return fma(x.b, y.b, fma(x.a, y.a, start)); }
  template <class F>
  static LFQ_HD void each(twin<T> x, F&& f) { f(x.a), f(x.b); }
};

template <class B>
struct word_traits<twin_bits<B>> {
  static LFQ_HD twin_bits<B> broadcast(uint32_t w) {
    return {word_traits<B>::broadcast(w), word_traits<B>::broadcast(w)};
  }
  static LFQ_HD void multiply(twin_bits<B> x, uint32_t m, twin_bits<B>& lo, twin_bits<B>& hi) {
    word_traits<B>::multiply(x.a, m, lo.a, hi.a);
    word_traits<B>::multiply(x.b, m, lo.b, hi.b);
  }
};

template <class T>
LFQ_HD T sum_of_lanes(simd<T> x) {
  T part[simd<T>::width];
  for (int l = 0; l < simd<T>::width; ++l) part[l] = x[l];
  for (int n = simd<T>::width / 2; n > 0; n /= 2)
    for (int l = 0; l < n; ++l) part[l] += part[l + n];
  return part[0];
}

// Per-lane sums in double, whatever the type of the terms.
template <class T>
struct lane_sum;
template <>
struct lane_sum<double> {
  simd<double> a = simd<double>(0.0);
  LFQ_HD void add(simd<double> x) { a += x; }
  LFQ_HD void add(double factor, const lane_sum& o) { a += simd<double>(factor) * o.a; }
  LFQ_HD double operator[](int lane) const { return a[lane]; }
  LFQ_HD simd<double> rounded() const { return a; }
  LFQ_HD double over_lanes() const { return sum_of_lanes(a); }
};
template <>
struct lane_sum<float> {
  using half = native_vector<float>::half;
  simd<double> a[2] = {simd<double>(0.0), simd<double>(0.0)};
  LFQ_HD void add(simd<float> x) {
    half h[2];
    memcpy(h, &x.v, sizeof(h));
    for (int i = 0; i < 2; ++i) a[i] += simd<double>(__builtin_convertvector(h[i], simd<double>::native));
  }
  LFQ_HD void add(double factor, const lane_sum& o) {
    for (int i = 0; i < 2; ++i) a[i] += simd<double>(factor) * o.a[i];
  }
  LFQ_HD double operator[](int lane) const { return a[lane / simd<double>::width][lane % simd<double>::width]; }
  LFQ_HD double over_lanes() const { return sum_of_lanes(a[0] + a[1]); }
  LFQ_HD simd<float> rounded() const {
    half h[2];
    for (int i = 0; i < 2; ++i) h[i] = __builtin_convertvector(a[i].v, half);
    simd<float> x;
    memcpy(&x.v, h, sizeof(h));
    return x;
  }
};

template <class T>
using lane_mask = typename native_vector<T>::bits;
// v in the lanes of the mask, 0 in the others
template <class T>
LFQ_HD simd<T> masked(lane_mask<T> m, simd<T> v) {
  return from_bits<simd<T>>(to_bits(v) & m);
}

// The same for terms that come in order: single-precision ones go to double eight at a time.
template <class T>
struct site_sum {
  lane_sum<T> total;
  simd<T> part = simd<T>(T(0));
  LFQ_HD void add(int64_t number, simd<T> x) {
    if constexpr (sizeof(T) == 8) {
      total.add(x);
    } else {
      part += x;
      if ((number & 7) == 7) settle();
    }
  }
  LFQ_HD void add_product(int64_t number, simd<T> x, simd<T> y) {
    if constexpr (sizeof(T) == 8) {
      total.a = fma(x, y, total.a);
    } else {
      part = fma(x, y, part);
      if ((number & 7) == 7) settle();
    }
  }
  LFQ_HD void settle() {
    total.add(part);
    part = simd<T>(T(0));
  }
  LFQ_HD const lane_sum<T>& sum() {
    if constexpr (sizeof(T) == 4) settle();
    return total;
  }
};

LFQ_NAMESPACE_END
