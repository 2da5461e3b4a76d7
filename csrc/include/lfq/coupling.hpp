// The affine coupling at one active site, forward, inverse and backward.
// y = x e + t with (e, t) made of h = tanh(u), u the net's outputs there, from the frozen sites:
//   neg_abs  (s, t) = h, e = exp(-|s|)
//   exp      (s, t) = h, e = exp(s)
//   even     t = sum_c a_c h_c, e = exp(sum_c b_c h_c^2): t odd and e even in h, both smooth
#pragma once
#include "lfq/elementary.hpp"

LFQ_NAMESPACE_BEGIN

enum class scale_kind { neg_abs = 0, exp = 1, even = 2 };

template <class R, int N>
struct affine_site {
  R h[N], t, e, log_e;
};

// `amplitude` holds a_c, then b_c; only `even` reads it.
template <scale_kind S, class R, int N>
LFQ_HD affine_site<R, N> affine_parameters(const R (&u)[N], const typename real_traits<R>::scalar* amplitude) {
  affine_site<R, N> a;
  for (int c = 0; c < N; ++c) a.h[c] = tanh(u[c]);
  if constexpr (S == scale_kind::even) {
    a.t = R(amplitude[0]) * a.h[0];
    a.log_e = R(amplitude[N]) * (a.h[0] * a.h[0]);
    for (int c = 1; c < N; ++c) {
      a.t = fma(R(amplitude[c]), a.h[c], a.t);
      a.log_e = fma(R(amplitude[N + c]), a.h[c] * a.h[c], a.log_e);
    }
    a.e = exp(a.log_e);
  } else {
    a.t = a.h[1];
    a.log_e = S == scale_kind::neg_abs ? -abs(a.h[0]) : a.h[0];
    a.e = S == scale_kind::neg_abs ? exp_minus(abs(a.h[0])) : exp(a.h[0]);
  }
  return a;
}

// From scaled = x e, dL/dy and dL/dlog_det: du = dL/du, and the returned dL/dlog e; dL/dx is dy e.
template <scale_kind S, class R, int N>
LFQ_HD R affine_backward(const R (&h)[N], const typename real_traits<R>::scalar* amplitude, R scaled, R dy, R dlog_det,
                         R (&du)[N]) {
  using T = typename real_traits<R>::scalar;
  const R ds = fma(dy, scaled, dlog_det);
  if constexpr (S == scale_kind::even) {
    for (int c = 0; c < N; ++c)
      du[c] = fma(R(amplitude[c]), dy, R(T(2) * amplitude[N + c]) * (h[c] * ds)) * fma(-h[c], h[c], R(T(1)));
  } else {
    // d|s|/ds is taken as 0 at s = 0
    const R dh = S == scale_kind::neg_abs ? -times_sign(ds, h[0]) : ds;
    du[0] = dh * fma(-h[0], h[0], R(T(1)));
    du[1] = dy * fma(-h[1], h[1], R(T(1)));
  }
  return ds;
}

enum class activation_kind { tanh = 0, leaky_relu = 1 };

template <class R>
LFQ_HD R activate(activation_kind k, R u) {
  using T = typename real_traits<R>::scalar;
  return k == activation_kind::tanh ? tanh(u) : select(u > R(T(0)), u, u * R(T(0.01)));
}
// The derivative in terms of the activated value h.
template <class R>
LFQ_HD R activation_slope(activation_kind k, R h) {
  using T = typename real_traits<R>::scalar;
  return k == activation_kind::tanh ? fma(-h, h, R(T(1))) : select(h > R(T(0)), R(T(1)), R(T(0.01)));
}

LFQ_NAMESPACE_END
