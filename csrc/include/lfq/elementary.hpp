// exp, tanh, log and sin/cos of a fraction of a turn, written once for scalars, SIMD vectors and GPU
// threads, so that a number does not depend on where it was computed. Accuracy: at most 3 ulp on the
// ranges stated (tanh_pair: 4). The coefficients are those of the Taylor series, whose remainder on the reduced range
// is below half an ulp at the orders taken.
#pragma once
#include "lfq/real.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
struct exp_constants;
template <>
struct exp_constants<double> {
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_hi = 0x1.62e42fefa0000p-1, ln2_lo = 0x1.cf79abc9e3b3ap-40;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa = 52;
  static constexpr double tanh_saturates = 44.0;
};
template <>
struct exp_constants<float> {
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr float ln2_hi = 0x1.62e400p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p23f;
  static constexpr int mantissa = 23;
  static constexpr float tanh_saturates = 20.0f;
};

// x = n ln2 + r; returns exp(r) - 1 and 2^n.
template <class R>
LFQ_HD R exp_reduced(R x, R& power) {
  using T = typename real_traits<R>::scalar;
  using C = exp_constants<T>;
  const R shifted = fma(x, R(C::log2e), R(C::round));
  const R n = shifted - R(C::round);
  const R r = fma(n, R(-C::ln2_lo), fma(n, R(-C::ln2_hi), x));
  power = from_bits<R>((to_bits(shifted) << C::mantissa) + to_bits(R(T(1))));
  R p;
  if constexpr (sizeof(T) == 8) {
    p = R(T(1.0 / 6227020800.0));
    p = fma(p, r, R(T(1.0 / 479001600.0)));
    p = fma(p, r, R(T(1.0 / 39916800.0)));
    p = fma(p, r, R(T(1.0 / 3628800.0)));
    p = fma(p, r, R(T(1.0 / 362880.0)));
    p = fma(p, r, R(T(1.0 / 40320.0)));
    p = fma(p, r, R(T(1.0 / 5040.0)));
  } else {
    p = R(T(1.0 / 5040.0));
  }
  p = fma(p, r, R(T(1.0 / 720.0)));
  p = fma(p, r, R(T(1.0 / 120.0)));
  p = fma(p, r, R(T(1.0 / 24.0)));
  p = fma(p, r, R(T(1.0 / 6.0)));
  p = fma(p, r, R(T(0.5)));
  return fma(p, r * r, r);
}

// |x| <= 708 (double), 87 (float); not checked.
template <class R>
LFQ_HD R exp(R x) {
  R power;
  const R p = exp_reduced(x, power);
  return fma(power, p, power);
}

// exp(2 |x|) - 1, for |x| up to where tanh is 1 to rounding.
template <class R>
LFQ_HD R expm1_twice_abs(R x) {
  using T = typename real_traits<R>::scalar;
  using C = exp_constants<T>;
  R a = abs(x) + abs(x);
  a = select(a > R(C::tanh_saturates), R(C::tanh_saturates), a);
  R power;
  const R p = exp_reduced(a, power);
  return fma(power, p, power - R(T(1)));
}

// NaN stays NaN.
template <class R>
LFQ_HD R tanh(R x) {
  using T = typename real_traits<R>::scalar;
  const R e = expm1_twice_abs(x);
  return with_sign(e / (e + R(T(2))), x);
}

// The tanh of two numbers for one division.
template <class R>
LFQ_HD void tanh_pair(R x, R y, R& tanh_x, R& tanh_y) {
  using T = typename real_traits<R>::scalar;
  const R ex = expm1_twice_abs(x), ey = expm1_twice_abs(y);
  const R dx = ex + R(T(2)), dy = ey + R(T(2));
  const R inverse = R(T(1)) / (dx * dy);
  tanh_x = with_sign(ex * dy * inverse, x);
  tanh_y = with_sign(ey * dx * inverse, y);
}

// Natural logarithm of a positive normal number.
template <class R>
LFQ_HD R log(R x) {
  using T = typename real_traits<R>::scalar;
  using B = typename real_traits<R>::bits;
  using U = typename real_traits<T>::bits;
  using C = exp_constants<T>;
  // Shift the exponent so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const U root = to_bits(T(0.70710678118654752440));
  const B offset = to_bits(x) - (B{} + root);
  // Arithmetic shift of a two's-complement number, spelled for unsigned lanes.
  constexpr U bias = U(1) << (8 * sizeof(T) - 1);
  const B e = ((offset ^ (B{} + bias)) >> C::mantissa) - (B{} + (bias >> C::mantissa));
  const R m = from_bits<R>(to_bits(x) - (e << C::mantissa));
  const R n = from_bits<R>(e + to_bits(R(C::round))) - R(C::round);
  const R f = m - R(T(1));
  const R s = f / (f + R(T(2)));
  const R z = s * s;
  R q;
  if constexpr (sizeof(T) == 8) {
    q = R(T(2.0 / 21.0));
    q = fma(q, z, R(T(2.0 / 19.0)));
    q = fma(q, z, R(T(2.0 / 17.0)));
    q = fma(q, z, R(T(2.0 / 15.0)));
    q = fma(q, z, R(T(2.0 / 13.0)));
    q = fma(q, z, R(T(2.0 / 11.0)));
    q = fma(q, z, R(T(2.0 / 9.0)));
  } else {
    q = R(T(2.0 / 9.0));
  }
  q = fma(q, z, R(T(2.0 / 7.0)));
  q = fma(q, z, R(T(2.0 / 5.0)));
  q = fma(q, z, R(T(2.0 / 3.0)));
  // log(1 + f) = 2 s + s z q, with the leading part f - s (f - z q) kept exact in f.
  const R tail = s * (f - z * q);
  return fma(n, R(C::ln2_hi), f - fma(n, R(-C::ln2_lo), tail));
}

// cos and sin of 2 pi k / 2^24 for k in [0, 2^24), given as lanes of an unsigned integer.
template <class R>
LFQ_HD void cos_sin_turn24(typename real_traits<R>::bits k, R& c, R& s) {
  using T = typename real_traits<R>::scalar;
  using B = typename real_traits<R>::bits;
  using U = typename real_traits<T>::bits;
  using C = exp_constants<T>;
  // k = quadrant 2^22 + rest, rest in [-2^21, 2^21)
  const B quadrant = (k + (B{} + U(1u << 21))) >> 22;
  const B low = (k + (B{} + U(1u << 21))) & (B{} + U((1u << 22) - 1));
  // low < 2^22 fits the mantissa: integer to real by the exponent trick.
  const R rest = (from_bits<R>(low | to_bits(R(T(C::round) / T(1.5)))) - R(T(C::round) / T(1.5))) - R(T(1u << 21));
  const R a = rest * R(T(6.283185307179586476925287 / 16777216.0));
  const R z = a * a;
  R ps, pc;
  if constexpr (sizeof(T) == 8) {
    ps = R(T(-1.0 / 1307674368000.0));
    ps = fma(ps, z, R(T(1.0 / 6227020800.0)));
    ps = fma(ps, z, R(T(-1.0 / 39916800.0)));
    ps = fma(ps, z, R(T(1.0 / 362880.0)));
    pc = R(T(1.0 / 20922789888000.0));
    pc = fma(pc, z, R(T(-1.0 / 87178291200.0)));
    pc = fma(pc, z, R(T(1.0 / 479001600.0)));
    pc = fma(pc, z, R(T(-1.0 / 3628800.0)));
  } else {
    ps = R(T(1.0 / 362880.0));
    pc = R(T(-1.0 / 3628800.0));
  }
  ps = fma(ps, z, R(T(-1.0 / 5040.0)));
  ps = fma(ps, z, R(T(1.0 / 120.0)));
  ps = fma(ps, z, R(T(-1.0 / 6.0)));
  pc = fma(pc, z, R(T(1.0 / 40320.0)));
  pc = fma(pc, z, R(T(-1.0 / 720.0)));
  pc = fma(pc, z, R(T(1.0 / 24.0)));
  pc = fma(pc, z, R(T(-0.5)));
  const R sine = fma(ps, a * z, a);
  const R cosine = fma(pc, z, R(T(1)));
  // Odd quadrants swap sine and cosine; the signs follow from the quadrant's two bits.
  const auto odd = (quadrant & (B{} + U(1))) == (B{} + U(1));
  constexpr int top = 8 * sizeof(T) - 2;
  const B sin_sign = (quadrant << top) & sign_mask<R>();
  const B cos_sign = ((quadrant + (B{} + U(1))) << top) & sign_mask<R>();
  s = from_bits<R>(to_bits(select(odd, cosine, sine)) ^ sin_sign);
  c = from_bits<R>(to_bits(select(odd, sine, cosine)) ^ cos_sign);
}

LFQ_NAMESPACE_END
