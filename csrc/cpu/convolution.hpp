// Circular k^D convolutions on one group, lanes = chains, [site][channel] within a group.
#pragma once
#include "cpu/group.hpp"

LFQ_NAMESPACE_BEGIN

// The geometry of a k^D window. A tap is an offset (rows[tap], dx[tap]) in C order, so that the
// opposite offset of tap i is tap n_taps - 1 - i.
struct window {
  lattice lat;
  int radius, n_taps, n_rows;
  int32_t* row_of;     // [n_taps] which of the k^(D-1) neighbouring rows
  int32_t* dx;         // [n_taps] offset along the row, plus the radius
  int32_t* taps[3];    // tap numbers with an even offset (taken by sites of the same parity), odd, all
  int n[3];
  int32_t* wrap;       // [length + 2 radius]: wrap[x + radius + offset] = (x + offset) mod length
  int64_t* starts;     // [row][k^(D-1)] first sites of the rows around each row
  int32_t* sublattice; // [row] of its first site; that of the second is one more

  void plan(arena& mem, const lattice& l, int k) {
    lat = l;
    radius = k / 2;
    n_rows = 1;
    for (int i = 0; i < l.ndim - 1; ++i) n_rows *= k;
    n_taps = n_rows * k;
    row_of = mem.take<int32_t>(n_taps);
    dx = mem.take<int32_t>(n_taps);
    for (auto& t : taps) t = mem.take<int32_t>(n_taps);
    wrap = mem.take<int32_t>(l.length + 2 * radius);
    starts = mem.take<int64_t>(l.n_rows * n_rows);
    sublattice = mem.take<int32_t>(l.n_rows);
    n[0] = n[1] = n[2] = 0;
    for (int tap = 0; tap < n_taps; ++tap) {
      const int odd = tap_is_odd(l.ndim, k, tap);
      if (mem.base) {
        row_of[tap] = tap / k;
        dx[tap] = tap % k;
        taps[odd][n[odd]] = tap;
        taps[2][n[2]] = tap;
      }
      ++n[odd];
      ++n[2];
    }
    if (!mem.base) return;
    for (int x = 0; x < l.length + 2 * radius; ++x) wrap[x] = ((x - radius) % l.length + l.length) % l.length;
    for (int64_t r = 0; r < l.n_rows; ++r) {
      find_rows(r, starts + r * n_rows);
      sublattice[r] = l.row_sublattice(r);
    }
  }
  int opposite(int tap) const { return n_taps - 1 - tap; }

  const int64_t* rows(int64_t r) const { return starts + r * n_rows; }

 private:
  void find_rows(int64_t r, int64_t* start) const {
    int c[LFQ_MAX_DIM], d[LFQ_MAX_DIM];
    lat.coordinates(r, c);
    const int k = 2 * radius + 1;
    for (int j = 0; j < n_rows; ++j) {
      int rest = j;
      for (int i = lat.ndim - 2; i >= 0; --i) {
        d[i] = c[i] + rest % k - radius;
        rest /= k;
      }
      start[j] = lat.row_start(d);
    }
  }
};

// Output channels held in registers at a time, for up to three sites: 24 accumulators of 32 registers, or 12 of 16.
constexpr int channel_block = simd_bytes == 64 ? 8 : 4;

// Accumulators for NX sites (2 apart in a row) and CO output channels.
template <class T, int CO, int NX>
LFQ_HD void convolve_block(const window& w, const int64_t* rows, int x, const int32_t* taps, int n_taps,
                           const simd<T>* in, int n_in, const T* weight, int n_out, simd<T> (&acc)[NX][CO]) {
  for (int i = 0; i < n_taps; ++i) {
    const int tap = taps[i];
    const T* wt = weight + int64_t(tap) * n_in * n_out;
    const simd<T>* p[NX];
    for (int k = 0; k < NX; ++k) p[k] = in + (rows[w.row_of[tap]] + w.wrap[x + 2 * k + w.dx[tap]]) * n_in;
    for (int ci = 0; ci < n_in; ++ci, wt += n_out) {
      simd<T> v[NX];
      for (int k = 0; k < NX; ++k) v[k] = p[k][ci];
      for (int c = 0; c < CO; ++c) {
        const simd<T> wc(wt[c]);
        for (int k = 0; k < NX; ++k) acc[k][c] = fma(wc, v[k], acc[k][c]);
      }
    }
  }
}

// For every site of one parity: sink(site, channel, value) with value = bias + sum over taps and input
// channels of weight[tap][in][out] * in[site + tap][in].
template <class T, class Sink>
void convolve(const window& w, int parity, int tap_set, const simd<T>* in, int n_in, const T* weight, int n_out,
              const T* bias, Sink&& sink) {
  const int L = w.lat.length;
  const int32_t* taps = w.taps[tap_set];
  const int n_taps = w.n[tap_set];
  for (int64_t r = 0; r < w.lat.n_rows; ++r) {
    const int64_t* rows = w.rows(r);
    const int64_t base = r * L;
    const int x0 = w.lat.row_parity(r) ^ parity;
    const auto channels = [&](auto block, int co) {
      constexpr int CO = decltype(block)::value;
      const auto sites = [&](auto count, int x) {
        constexpr int NX = decltype(count)::value;
        simd<T> acc[NX][CO];
        for (int k = 0; k < NX; ++k)
          for (int c = 0; c < CO; ++c) acc[k][c] = simd<T>(bias ? bias[co + c] : T(0));
        convolve_block<T, CO, NX>(w, rows, x, taps, n_taps, in, n_in, weight + co, n_out, acc);
        for (int k = 0; k < NX; ++k)
          for (int c = 0; c < CO; ++c) sink(base + x + 2 * k, co + c, acc[k][c]);
      };
      int x = x0;
      for (; x + 4 < L; x += 6) sites(constant<3>(), x);
      if (x + 2 < L) sites(constant<2>(), x), x += 4;
      if (x < L) sites(constant<1>(), x);
    };
    int co = 0;
    if (channel_block == 8)
      for (; co + 8 <= n_out; co += 8) channels(constant<channel_block>(), co);
    for (; n_out - co >= 4; co += 4) channels(constant<4>(), co);
    if (n_out - co >= 2) channels(constant<2>(), co), co += 2;
    if (n_out - co >= 1) channels(constant<1>(), co);
  }
}

// grad[tap][in][out] += sum over sites of one parity of in[site + tap][in] * dout[site][out].
template <class T>
void convolve_weight_gradient(const window& w, int parity, int tap_set, const simd<T>* in, int n_in,
                              const simd<T>* dout, int n_out, simd<T>* grad) {
  const int L = w.lat.length;
  const int32_t* taps = w.taps[tap_set];
  const int n_taps = w.n[tap_set];
  for (int64_t r = 0; r < w.lat.n_rows; ++r) {
    const int64_t* rows = w.rows(r);
    const int x0 = w.lat.row_parity(r) ^ parity;
    const simd<T>* drow = dout + r * L * n_out;
    for (int i = 0; i < n_taps; ++i) {
      const int tap = taps[i];
      const simd<T>* irow = in + rows[w.row_of[tap]] * n_in;
      const int32_t* wrap = w.wrap + w.dx[tap];
      const auto block = [&](auto cin, auto cout, int ci, int co) {
        constexpr int CI = decltype(cin)::value, CO = decltype(cout)::value;
        simd<T>* g = grad + (int64_t(tap) * n_in + ci) * n_out + co;
        simd<T> acc[CI][CO];
        for (int a = 0; a < CI; ++a)
          for (int c = 0; c < CO; ++c) acc[a][c] = g[a * n_out + c];
        for (int x = x0; x < L; x += 2) {
          const simd<T>* p = irow + wrap[x] * int64_t(n_in) + ci;
          const simd<T>* d = drow + x * int64_t(n_out) + co;
          for (int a = 0; a < CI; ++a)
            for (int c = 0; c < CO; ++c) acc[a][c] = fma(p[a], d[c], acc[a][c]);
        }
        for (int a = 0; a < CI; ++a)
          for (int c = 0; c < CO; ++c) g[a * n_out + c] = acc[a][c];
      };
      const auto outputs = [&](auto cin, int ci) {
        int co = 0;
        if (channel_block == 8)
          for (; co + 8 <= n_out; co += 8) block(cin, constant<channel_block>(), ci, co);
        for (; n_out - co >= 4; co += 4) block(cin, constant<4>(), ci, co);
        if (n_out - co >= 2) block(cin, constant<2>(), ci, co), co += 2;
        if (n_out - co >= 1) block(cin, constant<1>(), ci, co);
      };
      int ci = 0;
      for (; ci + 2 <= n_in; ci += 2) outputs(constant<2>(), ci);
      if (ci < n_in) outputs(constant<1>(), ci);
    }
  }
}

LFQ_NAMESPACE_END
