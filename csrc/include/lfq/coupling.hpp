// A coupling at one active site: y from its value x and the outputs u of its net, which sees the frozen sites only.
// With h = tanh(u):
//   neg_abs  (s, t) = h, y = x exp(-|s|) + t
//   exp      (s, t) = h, y = x exp(s) + t
//   even     y = x e + t, t = sum_c a_c h_c, e = exp(sum_c b_c h_c^2): odd and even in h, both smooth
//   site     y = a v + b tanh(c v) + w of v = x + u, with (u, w) the net's outputs and a, b, c > 0
// Backward needs h (of `site` tanh(c v) and w) and the slope dy/dx besides x and y.
#pragma once
#include "lfq/elementary.hpp"
#include "lfq/layers.hpp"

LFQ_NAMESPACE_BEGIN

enum class scale_kind { neg_abs = LFQ_SCALE_NEG_ABS, exp = LFQ_SCALE_EXP, even = LFQ_SCALE_EVEN, site = LFQ_SCALE_SITE };

template <class R, int N>
struct coupled_site {
  R y, slope, h[N];
};

// (t, log e) of the affine kinds from h; a_c and b_c are in `parameters`, all a first.
template <scale_kind S, class R, int N>
LFQ_HD void affine_from(const R (&h)[N], const typename real_traits<R>::scalar* parameters, R& t, R& log_e) {
  if constexpr (S == scale_kind::even) {
    t = R(parameters[0]) * h[0];
    log_e = R(parameters[N]) * (h[0] * h[0]);
    for (int c = 1; c < N; ++c) {
      t = fma(R(parameters[c]), h[c], t);
      log_e = fma(R(parameters[N + c]), h[c] * h[c], log_e);
    }
  } else {
    t = h[1];
    log_e = S == scale_kind::neg_abs ? -abs(h[0]) : h[0];
  }
}

// The slope of a v + b tanh(c v), with p = a, b, c, from tanh(c v).
template <class R>
LFQ_HD R site_slope(R th, const typename real_traits<R>::scalar* p) {
  return fma(R(p[1] * p[2]), fma(-th, th, R(typename real_traits<R>::scalar(1))), R(p[0]));
}

// Slope and y of the affine kinds from h.
template <scale_kind S, class R, int N>
LFQ_HD void affine_site(R x, const typename real_traits<R>::scalar* parameters, coupled_site<R, N>& r) {
  R t, log_e;
  affine_from<S>(r.h, parameters, t, log_e);
  r.slope = S == scale_kind::neg_abs ? exp_minus(abs(r.h[0])) : exp(log_e);
  r.y = fma(x, r.slope, t);
}

// `parameters` of `site`: a, b, c, 1 / a.
template <scale_kind S, class R, int N>
LFQ_HD coupled_site<R, N> couple_site(R x, const R (&u)[N], const typename real_traits<R>::scalar* parameters) {
  coupled_site<R, N> r;
  if constexpr (S == scale_kind::site) {
    const R v = x + u[0];
    r.h[0] = tanh(R(parameters[2]) * v);
    r.slope = site_slope(r.h[0], parameters);
    r.h[1] = u[1];
    r.y = fma(R(parameters[0]), v, fma(R(parameters[1]), r.h[0], u[1]));
  } else {
    for (int c = 0; c < N; ++c) r.h[c] = tanh(u[c]);
    affine_site<S>(x, parameters, r);
  }
  return r;
}

template <scale_kind S, class R, int N>
LFQ_HD R log_slope(const coupled_site<R, N>& a, const typename real_traits<R>::scalar* parameters) {
  if constexpr (S == scale_kind::site) return log(a.slope);
  R t, log_e;
  affine_from<S>(a.h, parameters, t, log_e);
  return log_e;
}

// x from y, and in `log_dy` the log of the slope there.
template <scale_kind S, class R, int N>
LFQ_HD R uncouple_site(R y, const R (&u)[N], const typename real_traits<R>::scalar* parameters, R& log_dy) {
  using T = typename real_traits<R>::scalar;
  if constexpr (S == scale_kind::site) {
    // The map is odd and concave to the right of zero, so that Newton's method started on the side of zero, at
    // y / largest slope, never oversteps.
    const T a = parameters[0], b = parameters[1], c = parameters[2];
    y = y - u[1];
    R v = y * R(T(1) / fma(b, c, a)), slope;
    for (int i = 0; i < 40; ++i) {
      const R th = tanh(R(c) * v);
      slope = site_slope(th, parameters);
      v = v + quotient(y - fma(R(a), v, R(b) * th), slope);
    }
    log_dy = log(slope);
    return v - u[0];
  } else {
    const coupled_site<R, N> r = couple_site<S>(R(T(0)), u, parameters);
    log_dy = log_slope<S>(r, parameters);
    return quotient(y - r.y, r.slope);
  }
}

// dL/dx and du = dL/du of neg_abs and exp, from dL/dy, dL/dlog_det and x dy/dx.
template <scale_kind S, class R, int N>
LFQ_HD R affine_backward(const R (&h)[N], R slope, R moved_x, R dy, R dlog_det, R (&du)[N]) {
  using T = typename real_traits<R>::scalar;
  const R ds = fma(dy, moved_x, dlog_det);
  // d|s|/ds is taken as 0 at s = 0
  const R dh = S == scale_kind::neg_abs ? -times_sign(ds, h[0]) : ds;
  du[0] = dh * fma(-h[0], h[0], R(T(1)));
  du[1] = dy * fma(-h[1], h[1], R(T(1)));
  return dy * slope;
}

// From dL/dy and dL/dlog_det: du = dL/du, and dL/dx.
template <scale_kind S, class R, int N>
LFQ_HD R couple_site_backward(const R (&h)[N], const typename real_traits<R>::scalar* parameters, R slope, R x, R dy,
                              R dlog_det, R (&du)[N]) {
  using T = typename real_traits<R>::scalar;
  if constexpr (S == scale_kind::site) {
    // dslope/dv = -2 c h (slope - a)
    const R bend = quotient(R(T(-2) * parameters[2]) * h[0] * (slope - R(parameters[0])), slope);
    du[0] = fma(dy, slope, dlog_det * bend);
    du[1] = dy;
    return du[0];
  } else if constexpr (S == scale_kind::even) {
    const R ds = fma(dy, x * slope, dlog_det);
    for (int c = 0; c < N; ++c)
      du[c] = fma(R(parameters[c]), dy, R(T(2) * parameters[N + c]) * (h[c] * ds)) * fma(-h[c], h[c], R(T(1)));
    return dy * slope;
  } else {
    return affine_backward<S>(h, slope, x * slope, dy, dlog_det, du);
  }
}

// A site's terms of dL/dweights: of `even` a and b, of `site` log a, log b and log c.
template <scale_kind S, class R, int N, class Add>
LFQ_HD void parameter_terms(const R (&h)[N], const typename real_traits<R>::scalar* parameters, R slope, R x, R y, R dy,
                            R dlog_det, Add&& add) {
  using T = typename real_traits<R>::scalar;
  if constexpr (S == scale_kind::even) {
    const R ds = fma(dy, x * slope, dlog_det);
    for (int c = 0; c < N; ++c) {
      add(c, dy, h[c]);
      add(N + c, ds, h[c] * h[c]);
    }
  } else if constexpr (S == scale_kind::site) {
    const R a(parameters[0]), bent = slope - a, bh = R(parameters[1]) * h[0], av = (y - h[1]) - bh, v = av * R(parameters[3]);
    const R share = quotient(dlog_det, slope);
    add(0, R(T(1)), fma(dy, av, share * a));
    add(1, R(T(1)), fma(dy, bh, share * bent));
    add(2, bent, fma(dy, v, share * fma(R(T(-2) * parameters[2]) * v, h[0], R(T(1)))));
  }
}

enum class activation_kind { tanh = LFQ_TANH, leaky_relu = LFQ_LEAKY_RELU };

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
