// What a layer of a flow consists of, in numbers: sites, taps, channels, weights and where they lie. Records are taken to
// be valid (lfq_flow_check_layers).
#pragma once
#include <cmath>

#include "lfq/config.hpp"
#include "lfq/lfq.h"

LFQ_NAMESPACE_BEGIN

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
// Whether a tap of a window, numbered in C order, is an odd number of steps away.
LFQ_HD bool tap_is_odd(int ndim, int kernel_size, int tap) {
  int steps = 0;
  for (int i = 0; i < ndim; ++i) {
    steps += tap % kernel_size - kernel_size / 2;
    tap /= kernel_size;
  }
  return steps & 1;
}
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

// How many sets of weights there are, and the size of one: the net's, then the parameters.
LFQ_HD int sets_of(const lfq_layer& l) { return l.sublattices ? 1 << (l.ndim - 1) : 1; }
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
