// A coupling at one active site: y from its value x and the outputs u of its net, which sees the frozen sites only.
// With h_c = tanh(u_c), t = sum_c a_c h_c and e = exp(sum_c b_c h_c^2), odd and even in h and smooth:
//   neg_abs  y = x exp(-|h_0|) + h_1
//   exp      y = x exp(h_0) + h_1
//   even     y = x e + t
//   site     y = a v + b tanh(c v), v = x e + t + the last output; a, b, c > 0
// Backward needs some numbers of each site besides x and y:
//   affine kinds: h, dy/dx;  site: h of the features, tanh(c v), dy/dv and, where there are features, e
#pragma once
#include "lfq/elementary.hpp"

LFQ_NAMESPACE_BEGIN

enum class scale_kind { neg_abs = 0, exp = 1, even = 2, site = 3 };

template <scale_kind S, int N>
constexpr int n_features = S == scale_kind::site ? N - 1 : N;
template <scale_kind S, int N>
constexpr int n_kept = S == scale_kind::site && N > 1 ? N + 2 : N + 1;

template <class R, int KEPT>
struct coupled_site {
  R y, kept[KEPT];
};

// t and log e. `parameters` begin with a_c and b_c where there are such.
template <scale_kind S, int N, class R>
LFQ_HD void affine_from(const R* h, const typename real_traits<R>::scalar* parameters, R& t, R& log_e) {
  constexpr int F = n_features<S, N>;
  if constexpr (S == scale_kind::even || S == scale_kind::site) {
    t = R(parameters[0]) * h[0];
    log_e = R(parameters[F]) * (h[0] * h[0]);
    for (int c = 1; c < F; ++c) {
      t = fma(R(parameters[c]), h[c], t);
      log_e = fma(R(parameters[F + c]), h[c] * h[c], log_e);
    }
  } else {
    t = h[1];
    log_e = S == scale_kind::neg_abs ? -abs(h[0]) : h[0];
  }
}

// The site map: `parameters` a, b, c, 1 / a.
template <class R>
LFQ_HD R site_slope(R th, const typename real_traits<R>::scalar* p) {
  return fma(R(p[1] * p[2]), fma(-th, th, R(typename real_traits<R>::scalar(1))), R(p[0]));
}

template <scale_kind S, class R, int N>
LFQ_HD coupled_site<R, n_kept<S, N>> couple_site(R x, const R (&u)[N], const typename real_traits<R>::scalar* parameters) {
  constexpr int F = n_features<S, N>;
  coupled_site<R, n_kept<S, N>> r;
  R e, t, log_e;
  for (int c = 0; c < F; ++c) r.kept[c] = tanh(u[c]);
  if constexpr (F > 0) {
    affine_from<S, N>(r.kept, parameters, t, log_e);
    e = S == scale_kind::neg_abs ? exp_minus(abs(r.kept[0])) : exp(log_e);
  }
  if constexpr (S == scale_kind::site) {
    const auto* p = parameters + 2 * F;
    const R v = F > 0 ? fma(x, e, t) + u[F] : x + u[F];
    r.kept[F] = tanh(R(p[2]) * v);
    r.kept[F + 1] = site_slope(r.kept[F], p);
    if constexpr (F > 0) r.kept[F + 2] = e;
    r.y = fma(R(p[0]), v, R(p[1]) * r.kept[F]);
  } else {
    r.kept[N] = e;
    r.y = fma(x, e, t);
  }
  return r;
}

template <scale_kind S, int N, class R>
LFQ_HD R log_slope(const R* kept, const typename real_traits<R>::scalar* parameters) {
  constexpr int F = n_features<S, N>;
  R t, log_e;
  if constexpr (F > 0) affine_from<S, N>(kept, parameters, t, log_e);
  if constexpr (S != scale_kind::site) return log_e;
  const R log_dv = log(kept[F + 1]);
  if constexpr (F == 0) return log_dv;
  return log_dv + log_e;
}

// x from y, and in `log_dy` the log of the slope there.
template <scale_kind S, class R, int N>
LFQ_HD R uncouple_site(R y, const R (&u)[N], const typename real_traits<R>::scalar* parameters, R& log_dy) {
  using T = typename real_traits<R>::scalar;
  constexpr int F = n_features<S, N>;
  R v = y;
  if constexpr (S == scale_kind::site) {
    // The site map is odd and concave to the right of zero, so that Newton's method started on the side of zero, at
    // y / largest slope, never oversteps.
    const T* p = parameters + 2 * F;
    v = y * R(T(1) / (p[0] + p[1] * p[2]));
    for (int i = 0; i < 40; ++i) {
      const R th = tanh(R(p[2]) * v);
      v = v + (y - fma(R(p[0]), v, R(p[1]) * th)) / site_slope(th, p);
    }
  }
  // Forward from x = 0 gives t, and the slopes of the affine part.
  const coupled_site<R, n_kept<S, N>> r = couple_site<S>(R(T(0)), u, parameters);
  R t(T(0)), log_e(T(0));
  if constexpr (F > 0) affine_from<S, N>(r.kept, parameters, t, log_e);
  if constexpr (S == scale_kind::site) {
    const T* p = parameters + 2 * F;
    log_dy = log_e + log(site_slope(tanh(R(p[2]) * v), p));
    v = v - t - u[F];
    if constexpr (F > 0) v = v / r.kept[F + 2];
    return v;
  }
  log_dy = log_e;
  return (y - t) / r.kept[N];
}

// From dL/dy and dL/dlog_det: du = dL/du, and dL/dx; dv is dL/dv, of an affine kind dL/dy.
template <scale_kind S, class R, int N>
LFQ_HD R couple_site_backward(const R* kept, const typename real_traits<R>::scalar* parameters, R x, R dy, R dlog_det,
                              R (&du)[N], R& dv) {
  using T = typename real_traits<R>::scalar;
  constexpr int F = n_features<S, N>;
  R e;
  dv = dy;
  if constexpr (S == scale_kind::site) {
    // the slope's derivative is -2 c tanh(c v) (slope - a)
    const T* p = parameters + 2 * F;
    const R slope = kept[F + 1];
    dv = fma(dy, slope, dlog_det * (R(T(-2) * p[2]) * kept[F] * (slope - R(p[0])) / slope));
    du[F] = dv;
    if constexpr (F == 0) return dv;
    e = kept[F + 2 < n_kept<S, N> ? F + 2 : 0];
  } else {
    e = kept[N];
  }
  const R ds = fma(dv, x * e, dlog_det);
  if constexpr (S == scale_kind::even || S == scale_kind::site) {
    for (int c = 0; c < F; ++c)
      du[c] = fma(R(parameters[c]), dv, R(T(2) * parameters[F + c]) * (kept[c] * ds)) * fma(-kept[c], kept[c], R(T(1)));
  } else {
    // d|s|/ds is taken as 0 at s = 0
    const R dh = S == scale_kind::neg_abs ? -times_sign(ds, kept[0]) : ds;
    du[0] = dh * fma(-kept[0], kept[0], R(T(1)));
    du[1] = dv * fma(-kept[1], kept[1], R(T(1)));
  }
  return dv * e;
}

// A site's terms of dL/dweights: a_c and b_c, then log a, log b, log c.
template <scale_kind S, int N>
constexpr int n_parameters = S == scale_kind::site ? 2 * N + 1 : S == scale_kind::even ? 2 * N : 0;

template <scale_kind S, int N, class R, class Add>
LFQ_HD void parameter_terms(const R* kept, const typename real_traits<R>::scalar* parameters, R x, R y, R dy, R dv,
                            R dlog_det, Add&& add) {
  using T = typename real_traits<R>::scalar;
  constexpr int F = n_features<S, N>;
  if constexpr (n_parameters<S, N> > 0 && F > 0) {
    const R e = kept[n_kept<S, N> - 1], ds = fma(dv, x * e, dlog_det);
    for (int c = 0; c < F; ++c) {
      add(c, dv, kept[c]);
      add(F + c, ds, kept[c] * kept[c]);
    }
  }
  if constexpr (S == scale_kind::site) {
    const T* p = parameters + 2 * F;
    const R th = kept[F], slope = kept[F + 1];
    const R bent = slope - R(p[0]), bh = R(p[1]) * th, av = y - bh, v = av * R(p[3]);
    const R share = dlog_det / slope;
    add(2 * F, R(T(1)), fma(dy, av, share * R(p[0])));
    add(2 * F + 1, R(T(1)), fma(dy, bh, share * bent));
    add(2 * F + 2, bent, fma(dy, v, share * fma(R(T(-2) * p[2]) * v, th, R(T(1)))));
  }
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
