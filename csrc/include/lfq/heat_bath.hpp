// Local heat bath of phi^4: one site given its neighbours, whose density is exp(-a x^2 - lam x^4 + b x) with
// b = beta times their sum. For any c that is a Gaussian, exp(-alpha x^2 + b x) with alpha = a + 2 lam c, times
// exp(-lam (x^2 - c)^2) <= 1, times a constant: the Gaussian proposes, the factor accepts. The best c is the Gaussian's
// own <x^2>, where alpha is the positive root of alpha^3 - a alpha^2 - lam alpha - lam b^2 / 2.
#pragma once
#include "lfq/philox.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
struct heat_bath_site {
  T beta, a, lam, self;
  T least2;   // alpha^2 at b = 0
  T inverse;  // 1 / (2 lam)
  bool weak;  // c from <x^2>: alpha - a, which is lam times it, loses its digits
  int steps;  // of Newton's method

  // n_single: axes along which a site is its own neighbour; their hopping terms are quadratic.
  heat_bath_site(double b, double l, int n_single) : beta(T(b)), lam(T(l)), self(T(2 * n_single)), weak(l < 0.25), steps(1) {
    const double quadratic = 1.0 - 2.0 * l - b * n_single, root = ::sqrt(quadratic * quadratic + 4.0 * l);
    const double least = quadratic > 0 ? 0.5 * (root + quadratic) : 2.0 * l / (root - quadratic);
    a = T(quadratic);
    least2 = T(least * least);
    inverse = T(weak ? 0.0 : 0.5 / l);
    // The first guess of alpha, good to some 10%, is too large by up to about lam^(1/3), and a step halves that. What
    // is left costs acceptance alone: less than 1%.
    for (double x = 8.0; x < l; x *= 8.0) ++steps;
  }

  // The site's new value after two proposals, each accepted or not: where neither is it stays, and since the
  // probability of that does not depend on its value, the density is left as it is. word: a Philox block.
  template <class R>
  LFQ_HD R operator()(R x, R neighbours, const typename real_traits<R>::bits (&word)[4], R& changed) const {
    const R b = R(beta) * fma(R(-self), x, neighbours), b2 = b * b;
    const R s3 = R(T(0.5) * lam) * b2;
    const R s = exp(log(s3 + R(T(1e-30))) * R(T(1.0 / 3.0)));
    R alpha = sqrt(fma(s, s, R(least2)));
    for (int i = 0; i < steps; ++i) {
      const R top = fma(alpha * alpha, alpha + alpha - R(a), s3);
      alpha = top / fma(alpha, fma(R(T(3)), alpha, R(T(-2) * a)), R(-lam));
    }
    R c;
    if (weak) {
      c = fma(R(T(0.5)), b2, alpha) / (R(T(2)) * alpha * alpha);
      alpha = fma(R(T(2) * lam), c, R(a));
    } else {
      c = (alpha - R(a)) * R(inverse);
    }
    const R variance = R(T(0.5)) / alpha, mean = b * variance, width = sqrt(variance);
    R y[2];
    box_muller(word[0], word[1], y[0], y[1]);
    R result = x;
    changed = R(T(0));
    for (int i = 1; i >= 0; --i) {
      y[i] = fma(width, y[i], mean);
      const R off = fma(y[i], y[i], -c);
      // exp(-80) is below every uniform
      const R exponent = minimum(R(T(80)), R(lam) * off * off);
      const auto accept = word_plus_half<R>(word[2 + i]) * R(T(0x1p-32)) < exp(-exponent);
      result = select(accept, y[i], result);
      changed = select(accept, R(T(1)), changed);
    }
    return result;
  }
};

LFQ_NAMESPACE_END
