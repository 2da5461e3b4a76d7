// The operations that physics templates ask of "a real": a scalar here, a SIMD vector in cpu/simd.hpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lfq/config.hpp"

LFQ_NAMESPACE_BEGIN

// scalar: the arithmetic type; bits: the unsigned integers of the same width, lane by lane.
template <class R>
struct real_traits;
template <>
struct real_traits<double> {
  using scalar = double;
  using bits = uint64_t;
  static LFQ_HD double from_bits(uint64_t b) { double x; memcpy(&x, &b, 8); return x; }
};
template <>
struct real_traits<float> {
  using scalar = float;
  using bits = uint32_t;
  static LFQ_HD float from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
};
template <class R>
LFQ_HD R from_bits(typename real_traits<R>::bits b) {
  return real_traits<R>::from_bits(b);
}

// A compiler without a fused multiply-add instruction would call a slow library function instead.
LFQ_HD double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__ARM_FEATURE_FMA)
  return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}
LFQ_HD float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__ARM_FEATURE_FMA)
  return ::fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
LFQ_HD double sqrt(double x) { return ::sqrt(x); }
LFQ_HD float sqrt(float x) { return ::sqrtf(x); }
// The smaller of two numbers; NaN when the second is.
LFQ_HD double minimum(double limit, double x) { return limit < x ? limit : x; }
LFQ_HD float minimum(float limit, float x) { return limit < x ? limit : x; }
LFQ_HD uint64_t to_bits(double x) { uint64_t b; memcpy(&b, &x, 8); return b; }
LFQ_HD uint32_t to_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
LFQ_HD double select(bool m, double a, double b) { return m ? a : b; }
LFQ_HD float select(bool m, float a, float b) { return m ? a : b; }

// a / b where neither b nor the quotient comes near the ends of their range: on a GPU to one ulp, without a branch.
template <class R>
LFQ_HD R quotient(R a, R b) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
LFQ_HD float quotient(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  const float q = a * r;
  return ::fmaf(::fmaf(-b, q, a), r, q);
}
LFQ_HD double quotient(double a, double b) {
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(b));  // 20 bits
  r = ::fma(::fma(-b, r, 1.0), r, r);
  r = ::fma(::fma(-b, r, 1.0), r, r);
  const double q = a * r;
  return ::fma(::fma(-b, q, a), r, q);
}
#endif

template <class R>
LFQ_HD typename real_traits<R>::bits sign_mask() {
  using B = typename real_traits<R>::bits;
  return B{} + (typename real_traits<typename real_traits<R>::scalar>::bits(1)
                << (8 * sizeof(typename real_traits<R>::scalar) - 1));
}
template <class R>
LFQ_HD R abs(R x) {
  return from_bits<R>(to_bits(x) & ~sign_mask<R>());
}
// magnitude of m (taken as non-negative) with the sign of s
template <class R>
LFQ_HD R with_sign(R m, R s) {
  return from_bits<R>(to_bits(m) | (to_bits(s) & sign_mask<R>()));
}
// x sign(s), 0 where s is
template <class R>
LFQ_HD R times_sign(R x, R s) {
  using T = typename real_traits<R>::scalar;
  return select(abs(s) > R(T(0)), from_bits<R>(to_bits(x) ^ (to_bits(s) & sign_mask<R>())), R(T(0)));
}

LFQ_NAMESPACE_END
