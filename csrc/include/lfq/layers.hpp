// What a layer of a flow consists of, in numbers: sites, taps, channels, weights and where they lie. Records are taken to
// be valid (lfq_flow_check_layers).
#pragma once
#include <cmath>

#include "lfq/config.hpp"
#include "lfq/lfq.h"

LFQ_NAMESPACE_BEGIN

LFQ_HD int count_bits(unsigned bits) {
  int n = 0;
  for (; bits; bits &= bits - 1) ++n;
  return n;
}

// Of the lattice that the layer writes.
LFQ_HD int64_t sites_of(const lfq_layer& l) {
  int64_t v = 1;
  for (int i = 0; i < l.ndim; ++i) v *= l.extent[i];
  return v;
}
// Whether a layer makes a fine lattice of a coarse one, of sites_of(l) >> ndim sites.
LFQ_HD bool resizes(const lfq_layer& l) { return l.kind == LFQ_LAYER_INTERLEAVE || l.kind == LFQ_LAYER_UPSAMPLE; }

// ---- couplings -------------------------------------------------------------------------------
LFQ_HD int taps_of(const lfq_layer& l) {
  int n = 1;
  for (int i = 0; i < l.ndim; ++i) n *= l.kernel_size;
  return n;
}
// What turns a site's sublattice by exclusive or into that of a tap of its window; taps are numbered in C order.
LFQ_HD int flip_of_tap(int ndim, int kernel_size, int tap) {
  int flip = 0;
  for (int i = 0; i < ndim; ++i) {
    flip |= ((tap % kernel_size - kernel_size / 2) & 1) << i;
    tap /= kernel_size;
  }
  return flip;
}
// Whether a tap is an odd number of steps away.
LFQ_HD bool tap_is_odd(int ndim, int kernel_size, int tap) { return count_bits(flip_of_tap(ndim, kernel_size, tap)) & 1; }
// Of the net.
LFQ_HD int outputs_of(const lfq_layer& l) { return l.scale == LFQ_SCALE_EVEN ? l.n_features : 2; }
// Of the coupling itself: the weights behind those of its net.
LFQ_HD constexpr int n_parameters(int scale, int outputs) {
  return scale == LFQ_SCALE_SITE ? 3 : scale == LFQ_SCALE_EVEN ? 2 * outputs : 0;
}
LFQ_HD int parameters_of(const lfq_layer& l) { return n_parameters(l.scale, outputs_of(l)); }
// A parameter from its weight.
LFQ_HD double parameter_of(const lfq_layer& l, double weight) { return l.scale == LFQ_SCALE_SITE ? ::exp(weight) : weight; }

// Convolution number 0 .. n_hidden of the net, and places in a set of the layer's weights: `weight` of [out][in][tap],
// `bias` of the biases behind them, if the net has any, `end` of what follows.
struct convolution_layout {
  int n_in, n_out;
  int64_t weight, bias, end;
};
LFQ_HD convolution_layout convolution_of(const lfq_layer& l, int number) {
  convolution_layout c{1, 1, 0, 0, 0};
  for (int i = 0; i <= number; ++i) {
    c.n_in = c.n_out;
    c.n_out = i < l.n_hidden ? l.hidden[i] : outputs_of(l);
    c.weight = c.end;
    c.bias = c.weight + int64_t(c.n_in) * c.n_out * taps_of(l);
    c.end = c.bias + (l.bias ? c.n_out : 0);
  }
  return c;
}

// The 2^ndim sublattices are numbered by the parities of all coordinates as binary digits, the last coordinate's the
// lowest. Those with an even or odd number of odd coordinates, a bit each.
LFQ_HD unsigned sublattices_of_parity(int ndim, int parity) {
  unsigned found = 0;
  for (int s = 0; s < 1 << ndim; ++s) found |= unsigned(count_bits(unsigned(s)) % 2 == parity) << s;
  return found;
}
// The sublattices that change, and those that the net sees.
LFQ_HD unsigned active_of(const lfq_layer& l) {
  return l.active ? unsigned(l.active) : sublattices_of_parity(l.ndim, l.parity);
}
LFQ_HD unsigned frozen_of(const lfq_layer& l) {
  return l.frozen ? unsigned(l.frozen) : sublattices_of_parity(l.ndim, l.parity ^ 1);
}

// How many sets of weights there are, and the size of one: the net's, then the parameters.
LFQ_HD int sets_of(const lfq_layer& l) { return l.sublattices ? count_bits(active_of(l)) : 1; }
LFQ_HD int set_of_sublattice(const lfq_layer& l, int sublattice) {
  if (!l.sublattices) return 0;
  return l.active ? count_bits(unsigned(l.active) & ((1u << sublattice) - 1)) : sublattice >> 1;
}
LFQ_HD int sublattice_of_set(const lfq_layer& l, int set) {
  if (!l.active) return 2 * set + ((count_bits(unsigned(set)) & 1) ^ l.parity);
  unsigned left = unsigned(l.active);
  for (; set > 0; --set) left &= left - 1;
  return count_bits((left & (0u - left)) - 1);
}
LFQ_HD int64_t net_weights_of(const lfq_layer& l) { return convolution_of(l, l.n_hidden).end; }
LFQ_HD int64_t set_size_of(const lfq_layer& l) { return net_weights_of(l) + parameters_of(l); }

// ---- all layers ------------------------------------------------------------------------------
LFQ_HD int64_t weights_of(const lfq_layer& l) {
  switch (l.kind) {
    case LFQ_LAYER_COUPLING: return sets_of(l) * set_size_of(l);
    case LFQ_LAYER_RESCALE: return 1;
    case LFQ_LAYER_UPSAMPLE: return 1 + 2 * l.ndim;
    default: return 0;
  }
}

// A layer that resizes, from its weights w (none of an interleave). With c > 0 odd coordinates a fine site is
// coefficient[c] times the sum over the nearest coarse sites, and width[c] times the noise; with none, scale times the
// coarse site.
struct upsampling {
  double scale = 1, coefficient[LFQ_MAX_DIM + 1] = {}, width[LFQ_MAX_DIM + 1];

  // Adds to the log-det.
  LFQ_HD upsampling(const lfq_layer& l, const double* w, double& log_det) {
    for (double& each : width) each = 1;
    if (l.kind == LFQ_LAYER_INTERLEAVE) return;
    const double coarse = double(sites_of(l) >> l.ndim);
    scale = ::exp(w[0]);
    log_det += coarse * w[0];
    double binomial = 1;
    for (int c = 1; c <= l.ndim; ++c) {
      binomial *= double(l.ndim - c + 1) / c;
      coefficient[c] = scale * w[2 * c - 1] / double(1 << c);
      width[c] = ::exp(w[2 * c]);
      log_det += coarse * binomial * w[2 * c];
    }
  }
};

LFQ_NAMESPACE_END
