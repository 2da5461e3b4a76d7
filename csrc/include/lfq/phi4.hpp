// Lattice phi^4 in the beta-lambda convention:
//   S = sum_x [-beta sum_mu phi_x phi_{x+mu} + (1 - 2 lam) phi_x^2 + lam phi_x^4].
#pragma once
#include "lfq/real.hpp"

LFQ_NAMESPACE_BEGIN

template <class T>
struct phi4_site {
  T beta, quadratic, lam;
  phi4_site() = default;
  LFQ_HD phi4_site(double b, double l) : beta(T(b)), quadratic(T(1.0 - 2.0 * l)), lam(T(l)) {}

  // The terms of S that belong to a site, given the sum over its forward neighbours.
  template <class R>
  LFQ_HD R action(R phi, R forward) const {
    const R phi2 = phi * phi;
    return fma(phi2, fma(phi2, R(lam), R(quadratic)), -(R(beta) * phi * forward));
  }
  // -dS/dphi, given the sum over all neighbours.
  template <class R>
  LFQ_HD R force(R phi, R neighbours) const {
    return fma(-phi, slope(phi * phi), R(beta) * neighbours);
  }
  // dS/dphi, given phi^2 and beta times the sum over all neighbours.
  template <class R>
  LFQ_HD R gradient(R phi, R phi2, R hopping) const {
    return fma(phi, slope(phi2), -hopping);
  }
  // Of the terms of one site alone, divided by phi.
  template <class R>
  LFQ_HD R slope(R phi2) const {
    return fma(phi2, R(T(4) * lam), R(T(2) * quadratic));
  }
};

// momenta + k F(phi), with k folded into the couplings: four multiplications a site.
template <class T>
struct phi4_kick {
  T hopping, linear, cubic;
  phi4_kick() = default;
  LFQ_HD phi4_kick(double beta, double lam, double k)
      : hopping(T(k * beta)), linear(T(-2.0 * k * (1.0 - 2.0 * lam))), cubic(T(-4.0 * k * lam)) {}
  template <class R>
  LFQ_HD R operator()(R momentum, R phi, R neighbours) const {
    const R local = fma(phi * phi, R(cubic), R(linear));
    return fma(phi, local, fma(R(hopping), neighbours, momentum));
  }
  // k F(phi)
  template <class R>
  LFQ_HD R force(R phi, R phi2, R neighbours) const {
    return fma(phi, fma(phi2, R(cubic), R(linear)), R(hopping) * neighbours);
  }
};

LFQ_NAMESPACE_END
