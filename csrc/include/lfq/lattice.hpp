// A periodic hypercubic lattice in C order: rows along the last axis, addressed by their first site.
#pragma once
#include "lfq/layers.hpp"

LFQ_NAMESPACE_BEGIN

struct lattice {
  int ndim;
  int extent[LFQ_MAX_DIM];
  int length;       // sites in a row
  int64_t n_rows;
  int64_t volume;

  lattice() = default;
  LFQ_HD lattice(int n, const int32_t* e) : ndim(n), length(e[n - 1]), n_rows(1) {
    for (int i = 0; i < LFQ_MAX_DIM; ++i) extent[i] = i < n ? e[i] : 1;
    for (int i = 0; i < n - 1; ++i) n_rows *= e[i];
    volume = n_rows * length;
  }
  // The coordinates of a row along the leading axes.
  LFQ_HD void coordinates(int64_t row, int* c) const {
    for (int i = ndim - 2; i >= 0; --i) {
      c[i] = int(row % extent[i]);
      row /= extent[i];
    }
  }
  LFQ_HD int row_parity(int64_t row) const {
    int c[LFQ_MAX_DIM], p = 0;
    coordinates(row, c);
    for (int i = 0; i < ndim - 1; ++i) p ^= c[i] & 1;
    return p;
  }
  // The sublattice of a row's first site; that of the second is one more.
  LFQ_HD int row_sublattice(int64_t row) const {
    int c[LFQ_MAX_DIM], s = 0;
    coordinates(row, c);
    for (int i = 0; i < ndim - 1; ++i) s = 2 * s | (c[i] & 1);
    return 2 * s;
  }
  // The first site of the row at coordinates c (leading axes), each taken modulo its extent.
  LFQ_HD int64_t row_start(const int* c) const {
    int64_t r = 0;
    for (int i = 0; i < ndim - 1; ++i) {
      int k = c[i] % extent[i];
      r = r * extent[i] + (k < 0 ? k + extent[i] : k);
    }
    return r * length;
  }
  LFQ_HD lattice halved() const {
    int32_t e[LFQ_MAX_DIM];
    for (int i = 0; i < LFQ_MAX_DIM; ++i) e[i] = extent[i] / 2;
    return lattice(ndim, e);
  }
};

LFQ_NAMESPACE_END
