// Philox4x32-10 counter-based random numbers (Salmon et al., SC 2011) and normals made from them.
#pragma once
#include "lfq/elementary.hpp"

LFQ_NAMESPACE_BEGIN

// What Philox asks of 32-bit words held in W: a scalar here, lanes of a vector in cpu/simd.hpp.
template <class W>
struct word_traits;
template <>
struct word_traits<uint32_t> {
  static LFQ_HD uint32_t broadcast(uint32_t w) { return w; }
  // lo, hi = the two words of the product
  static LFQ_HD void multiply(uint32_t a, uint32_t m, uint32_t& lo, uint32_t& hi) {
    const uint64_t p = uint64_t(a) * m;
    lo = uint32_t(p);
    hi = uint32_t(p >> 32);
  }
};

template <class W>
LFQ_HD void philox4x32(W& x0, W& x1, W& x2, W& x3, uint32_t key0, uint32_t key1) {
  using ops = word_traits<W>;
  for (int round = 0; round < 10; ++round) {
    W lo0, hi0, lo1, hi1;
    ops::multiply(x0, 0xD2511F53u, lo0, hi0);
    ops::multiply(x2, 0xCD9E8D57u, lo1, hi1);
    x0 = hi1 ^ x1 ^ ops::broadcast(key0);
    x1 = lo1;
    x2 = hi0 ^ x3 ^ ops::broadcast(key1);
    x3 = lo0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

struct stream {
  uint64_t seed;
  uint64_t trajectory;
  uint32_t purpose;
  LFQ_HD uint32_t word1() const { return uint32_t(trajectory); }
  LFQ_HD uint32_t word3() const { return (uint32_t(trajectory >> 32) & 0xffffffu) | (purpose << 24); }
};

// A word plus 1/2 as a real: exact in double, rounded in single precision.
template <class R>
LFQ_HD R word_plus_half(typename real_traits<R>::bits word) {
  using T = typename real_traits<R>::scalar;
  using B = typename real_traits<R>::bits;
  using U = typename real_traits<T>::bits;
  if constexpr (sizeof(T) == 8) {
    return from_bits<R>(word | to_bits(R(T(0x1p52)))) - R(T(0x1p52 - 0.5));
  } else {
    // 32 bits do not fit a float's mantissa: convert in two exact halves.
    const R hi = from_bits<R>((word >> 16) | to_bits(R(T(0x1p23f)))) - R(T(0x1p23f));
    const R lo = from_bits<R>((word & (B{} + U(0xffff))) | to_bits(R(T(0x1p23f)))) - R(T(0x1p23f));
    return fma(hi, R(T(0x1p16f)), lo + R(T(0.5f)));
  }
}

// Two normals from two random words; see ARCHITECTURE.md, "Random numbers".
template <class R>
LFQ_HD void box_muller(typename real_traits<R>::bits a, typename real_traits<R>::bits b, R& n0, R& n1) {
  using T = typename real_traits<R>::scalar;
  using B = typename real_traits<R>::bits;
  using U = typename real_traits<T>::bits;
  R log_u;
  if constexpr (sizeof(T) == 8) {
    log_u = log(word_plus_half<R>((a << 8) | (b >> 24)), 40);
  } else {
    log_u = log(word_plus_half<R>(a), 32);
  }
  const R r = sqrt(-(log_u + log_u));
  R c, s;
  cos_sin_turn24(b & (B{} + U(0xffffff)), c, s);
  n0 = r * c;
  n1 = r * s;
}

// A double in (0, 1] for accept steps.
LFQ_HD double uniform53(uint32_t a, uint32_t b) {
  return (double((uint64_t(a) << 21) | (b >> 11)) + 0.5) * 0x1p-53;
}

LFQ_NAMESPACE_END
