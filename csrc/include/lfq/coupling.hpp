// The affine coupling at one active site, forward, inverse and backward.
// y = x e(s) + t with (s, t) = tanh(u_s, u_t) from the frozen sites, and e(s) = exp(-|s|) or exp(s).
#pragma once
#include "lfq/elementary.hpp"

LFQ_NAMESPACE_BEGIN

enum class scale_kind { neg_abs = 0, exp = 1 };

template <class R>
struct affine_site {
  R s, t, e;  // what backward needs besides x
};

template <scale_kind S, class R>
LFQ_HD affine_site<R> affine_parameters(R u_s, R u_t) {
  affine_site<R> a;
  a.s = tanh(u_s);
  a.t = tanh(u_t);
  a.e = S == scale_kind::neg_abs ? exp_minus(abs(a.s)) : exp(a.s);
  return a;
}

template <scale_kind S, class R>
LFQ_HD R affine_log_det(R s) {
  return S == scale_kind::neg_abs ? -abs(s) : s;
}

// From scaled = x e, dL/dy and dL/dlog_det: dL/du_s and dL/du_t; dL/dx is dy e.
template <scale_kind S, class R>
LFQ_HD void affine_backward(const affine_site<R>& a, R scaled, R dy, R dlog_det, R& du_s, R& du_t) {
  using T = typename real_traits<R>::scalar;
  R ds = fma(dy, scaled, dlog_det);
  if constexpr (S == scale_kind::neg_abs) ds = -times_sign(ds, a.s);  // d|s|/ds, taken as 0 at s = 0
  du_s = ds * fma(-a.s, a.s, R(T(1)));
  du_t = dy * fma(-a.t, a.t, R(T(1)));
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
