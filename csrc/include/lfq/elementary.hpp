// exp, tanh, log and sin/cos of a fraction of a turn, written once for scalars, SIMD vectors and GPU
// threads, so that a number does not depend on where it was computed. Accuracy: at most 5 ulp on the
// ranges stated. Polynomials are minimax approximations (Remez), without tables, since a
// look-up costs an AVX2 machine more than the terms it would save.
#pragma once
#include "lfq/real.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
struct exp_constants;
template <>
struct exp_constants<double> {
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_hi = 0x1.62e42fefa0000p-1, ln2_lo = 0x1.cf79abc9e3b3ap-40;
  static constexpr double half_ln2 = 0x1.62e42fefa39efp-2;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa = 52;
  static constexpr double tanh_saturates = 22.0;
};
template <>
struct exp_constants<float> {
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr float ln2_hi = 0x1.62e400p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float half_ln2 = 0x1.62e430p-2f;
  static constexpr float round = 0x1.8p23f;
  static constexpr int mantissa = 23;
  static constexpr float tanh_saturates = 10.0f;
};

// c0 z^n + c1 z^(n-1) + ...
template <class R>
LFQ_HD R horner(R, R p) {
  return p;
}
template <class R, class C, class... Rest>
LFQ_HD R horner(R z, R p, C c, Rest... rest) {
  using T = typename real_traits<R>::scalar;
  return horner(z, fma(p, z, R(T(c))), rest...);
}

// 2^n for the integer n that was rounded into the low bits of `shifted` = n + exp_constants::round.
template <class R>
LFQ_HD R power_of_two(R shifted) {
  using T = typename real_traits<R>::scalar;
  return from_bits<R>((to_bits(shifted) << exp_constants<T>::mantissa) + to_bits(R(T(1))));
}

// x 2^n for the same n, where neither comes near the ends of their range; a zero may become tiny. CPUs have more units
// for integer additions than for multiplications.
template <class R>
LFQ_HD R times_power_of_two(R x, R shifted) {
#if defined(__CUDA_ARCH__)
  return x * power_of_two(shifted);
#else
  using T = typename real_traits<R>::scalar;
  return from_bits<R>(to_bits(x) + (to_bits(shifted) << exp_constants<T>::mantissa));
#endif
}
// x 2^n + y
template <class R>
LFQ_HD R add_times_power_of_two(R x, R shifted, R y) {
#if defined(__CUDA_ARCH__)
  return fma(x, power_of_two(shifted), y);
#else
  return times_power_of_two(x, shifted) + y;
#endif
}

// |x| <= 708 (double), 87 (float); not checked.
template <class R>
LFQ_HD R exp(R x) {
  using T = typename real_traits<R>::scalar;
  using C = exp_constants<T>;
  const R shifted = fma(x, R(C::log2e), R(C::round));
  const R n = shifted - R(C::round);
  const R r = fma(n, R(-C::ln2_lo), fma(n, R(-C::ln2_hi), x));
  // exp(r) = 1 + r + r^2 q(r) for |r| <= ln2 / 2
  R q;
  if constexpr (sizeof(T) == 8)
    q = horner(r, R(T(0x1.af8575da2581bp-26)), 0x1.28b03ec863185p-22, 0x1.71dddfd6ea79fp-19, 0x1.a019969e90f1fp-16,
               0x1.a01a01badd6edp-13, 0x1.6c16c185a3776p-10, 0x1.111111110d647p-7, 0x1.5555555550041p-5,
               0x1.5555555555561p-3, 0.5);
  else
    q = horner(r, R(T(0x1.6db413fb08e70p-10)), 0x1.123b45e450390p-7, 0x1.55545e023e89ap-5, 0x1.55548f007faa6p-3, 0.5);
  const R power = power_of_two(shifted);
  return fma(power, fma(q, r * r, r), power);
}

// exp(-s) for s in [0, 1]: one polynomial, no reduction; 1 at 0.
template <class R>
LFQ_HD R exp_minus(R s) {
  using T = typename real_traits<R>::scalar;
  if constexpr (sizeof(T) == 8)
    return horner(s, R(T(-0x1.0462ef3062651p-26)), 0x1.0e00b5835cad3p-22, -0x1.6d1ff10911706p-19,
                  0x1.9f8a2a977ecefp-16, -0x1.a00ea35ca08dep-13, 0x1.6c16271dbb945p-10, -0x1.11110baaba7acp-7,
                  0x1.555555180f726p-5, -0x1.55555553be43ep-3, 0x1.fffffffff55efp-2, -0x1.ffffffffffe71p-1, 1.0);
  else
    return horner(s, R(T(0x1.b94dd77d60f1dp-11)), -0x1.f448368e5aee1p-8, 0x1.51877c07ebc55p-5, -0x1.55013605896edp-3,
                  0x1.fff927fb06640p-2, -0x1.ffffcf3ff120ap-1, 1.0);
}

// tanh |x| = numerator / denominator, both positive. With 2 |x| = k ln2 + 2 q and h = q coth q,
// exp(2 q) = (h + q) / (h - q), so that no digits cancel near zero; h is even in q and needs few terms.
template <class R>
LFQ_HD void tanh_ratio(R x, R& numerator, R& denominator) {
  using T = typename real_traits<R>::scalar;
  using C = exp_constants<T>;
  const R a = minimum(R(C::tanh_saturates), abs(x));
  const R shifted = fma(a, R(T(2) * C::log2e), R(C::round));
  const R n = shifted - R(C::round);
  // ln2 in one piece: its error reaches tanh damped by exp(-2 |x|).
  const R q = fma(n, R(-C::half_ln2), a);
  const R z = q * q;
  R h;
  if constexpr (sizeof(T) == 8)
    h = horner(z, R(T(0x1.6376bdfe984f9p-16)), -0x1.bbd41caa7a31cp-13, 0x1.1566aaf275522p-9, -0x1.6c16c16bebdc8p-6,
               0x1.555555555553ep-2, 1.0);
  else
    h = horner(z, R(T(-0x1.6aa4e9f2e4126p-6)), 0x1.55551e6d5d645p-2, 1.0);
  const R below = h - q;
  numerator = fma(power_of_two(shifted) - R(T(1)), below, times_power_of_two(q + q, shifted));
  denominator = add_times_power_of_two(h + q, shifted, below);
}

// NaN stays NaN.
template <class R>
LFQ_HD R tanh(R x) {
  R n, d;
  tanh_ratio(x, n, d);
  return with_sign(quotient(n, d), x);
}

// Natural logarithm of x 2^-shift, for a positive normal number x.
template <class R>
LFQ_HD R log(R x, int shift = 0) {
  using T = typename real_traits<R>::scalar;
  using B = typename real_traits<R>::bits;
  using U = typename real_traits<T>::bits;
  using C = exp_constants<T>;
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): counted from the mantissa of sqrt(1/2), the exponent field of
  // `offset` is n plus that of sqrt(1/2).
  constexpr int M = C::mantissa;
  constexpr U mantissa = (U(1) << M) - 1, bias = (U(1) << (8 * sizeof(T) - 2 - M)) - 2;
  const U root = to_bits(T(0.70710678118654752440));
  const B offset = to_bits(x) - (B{} + (root & mantissa));
  const R m = from_bits<R>((offset & (B{} + mantissa)) + (B{} + root));
  const T one = T(C::round / T(1.5));  // in units of its last place
  const R n = from_bits<R>((offset >> M) | to_bits(R(one))) - R(one + T(bias) + T(shift));
  const R f = m - R(T(1));
  const R s = quotient(f, f + R(T(2)));
  const R z = s * s;
  R q;
  if constexpr (sizeof(T) == 8)
    q = horner(z, R(T(0x1.5878587d45d01p-3)), 0x1.732c147bc0927p-3, 0x1.c722789535adep-3, 0x1.24924176dea66p-2,
               0x1.999999a294b01p-2, 0x1.5555555553960p-1);
  else
    q = horner(z, R(T(0x1.31e2f206db540p-2)), 0x1.995eb9fa256d6p-2, 0x1.55557a25cd6c0p-1);
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
  const R rest = from_bits<R>(low | to_bits(R(T(C::round) / T(1.5)))) - R(T(C::round) / T(1.5) + T(1u << 21));
  const R a = rest * R(T(6.283185307179586476925287 / 16777216.0));
  const R z = a * a;
  R ps, pc;
  if constexpr (sizeof(T) == 8) {
    ps = horner(z, R(T(0x1.5d932f3f7d286p-33)), -0x1.ae5e66d4cad17p-26, 0x1.71de3578744a9p-19, -0x1.a01a019c126b0p-13,
                0x1.111111110f881p-7, -0x1.5555555555549p-3);
    pc = horner(z, R(T(0x1.1b95fdc0fd2d8p-29)), -0x1.27df6c03c9206p-22, 0x1.a019f88413443p-16, -0x1.6c16c1648a917p-10,
                0x1.555555554f952p-5, -0x1.fffffffffffa3p-2);
  } else {
    ps = horner(z, R(T(-0x1.994eb30d726e7p-13)), 0x1.1107605104d02p-7, -0x1.55554599578ffp-3);
    pc = horner(z, R(T(-0x1.647571c5e2bdbp-10)), 0x1.553f94d9df873p-5, -0x1.ffffb96388226p-2);
  }
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
