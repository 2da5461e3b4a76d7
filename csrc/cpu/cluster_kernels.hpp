// Embedded Ising clusters of one chain (Brower and Tamayo, Phys. Rev. Lett. 62 (1989) 1087): over the signs
// of the field at fixed magnitudes. The bond from x to x + mu is active with probability
// 1 - exp(-2 beta phi_x phi_{x+mu}), never where that is negative; it decides by word mu of its own Philox
// block, so that a Wolff cluster is a component of the bonds that a Swendsen-Wang sweep would activate.
#pragma once
#include "cpu/group.hpp"
#include "lfq/phi4.hpp"

LFQ_NAMESPACE_BEGIN

// Whether a bond with exponent a = -2 beta phi phi' is active, given its word as a real.
template <class R>
LFQ_HD auto bond_active(R a, R word) {
  a = select(a > R(0.0), R(0.0), a);
  a = select(a < R(-700.0), R(-700.0), a);
  return (word + R(0.5)) * R(0x1p-32) > exp(a);
}

struct cluster_work {
  double* field;     // Swendsen-Wang: magnitudes and signs, whatever the chain's type; padded by a vector
  uint64_t* bonds;   // for each axis mu and row, a bit for the bond from each site x to x + mu
  uint8_t* inside;   // Wolff: whether the site is in the cluster
  uint32_t* parent;  // Swendsen-Wang: a site of the same cluster, not above this one. Wolff: the cluster's sites
  uint32_t* flips;   // one bit for each site

  static int64_t row_words(const lattice& lat) { return (lat.length + 63) / 64; }
  void plan(arena& mem, const lfq_phi4& theory) {
    constexpr int pad = simd<double>::width;
    const lattice lat(theory.ndim, theory.extent);
    const int64_t volume = lat.volume;
    field = mem.take<double>(volume + pad);
    bonds = mem.take<uint64_t>(lat.ndim * lat.n_rows * row_words(lat));
    inside = mem.take<uint8_t>(volume);
    parent = mem.take<uint32_t>(volume);
    flips = mem.take<uint32_t>((volume + 127) / 128 * 4);
  }
};

template <class T, int D>
struct cluster_chain {
  using V = simd<double>;
  using B = V::bits_t;
  lattice lat;
  double coupling;  // -2 beta
  cluster_work w;
  uint64_t seed, trajectory;
  uint32_t chain;

  cluster_chain(const lfq_phi4& theory, const cluster_work& work, uint64_t s, uint64_t t, uint64_t c)
      : lat(D, theory.extent), coupling(-2.0 * theory.beta), w(work), seed(s), trajectory(t), chain(uint32_t(c)) {}

  template <class W>
  LFQ_HD void words(uint32_t purpose, W block, W (&x)[4]) const {
    const stream rng{seed, trajectory, purpose};
    x[0] = block;
    x[1] = W{} + rng.word1();
    x[2] = W{} + chain;
    x[3] = W{} + rng.word3();
    philox4x32(x[0], x[1], x[2], x[3], uint32_t(seed), uint32_t(seed >> 32));
  }

  static LFQ_HD bool finite(double x) { return x - x == 0.0; }

  // The field in double; returns the place of the first NaN or Inf, or -1.
  int64_t load_field(const T* phi) const {
    for (int64_t i = 0; i < lat.volume; ++i) {
      w.field[i] = double(phi[i]);
      if (!finite(w.field[i])) return i;
    }
    for (int i = 0; i < V::width; ++i) w.field[lat.volume + i] = 0.0;
    return -1;
  }

  static LFQ_HD V load(const double* p) {
    typename V::native v;
    memcpy(&v, p, sizeof(v));
    return v;
  }

  LFQ_HD uint64_t* bond_row(int mu, int64_t row) const {
    return w.bonds + (mu * lat.n_rows + row) * cluster_work::row_words(lat);
  }

  // Lanes of ones and zeros to bits, lane 0 lowest.
  static LFQ_HD uint64_t to_mask(B lanes) {
    typedef uint8_t bytes __attribute__((vector_size(V::width)));
    const bytes narrow = __builtin_convertvector(lanes, bytes);
    uint64_t packed = 0;
    memcpy(&packed, &narrow, sizeof(narrow));
    return packed * 0x0102040810204080u >> 56;
  }

  // A vector of sites at a time along rows; lanes beyond a row's end are dropped.
  void activate(uint32_t first_block) const {
    const int n = lat.length;
    const V scale(coupling), two52(0x1p52);
    B lane;
    for (int l = 0; l < V::width; ++l) lane[l] = uint64_t(l);
    for (int64_t r = 0; r < lat.n_rows; ++r) {
      int c[LFQ_MAX_DIM] = {};
      lat.coordinates(r, c);
      const double* self = w.field + r * n;
      const double* up[D > 1 ? D - 1 : 1];
      for (int mu = 0; mu < D - 1; ++mu) {
        ++c[mu];
        up[mu] = w.field + lat.row_start(c);
        --c[mu];
      }
      for (int mu = 0; mu < D; ++mu)
        for (int64_t i = 0; i < cluster_work::row_words(lat); ++i) bond_row(mu, r)[i] = 0;
      for (int x = 0; x < n; x += V::width) {
        B word[4];
        words(LFQ_PURPOSE_BOND, B(lane + uint64_t(first_block + uint32_t(r * n + x))), word);
        const V here = load(self + x);
        const uint64_t sites = n - x < V::width ? (uint64_t(1) << (n - x)) - 1 : ~uint64_t(0);
        for (int mu = 0; mu < D; ++mu) {
          V next = load(mu < D - 1 ? up[mu] + x : self + x + 1);
          if (mu == D - 1 && n - x <= V::width) next.set(n - 1 - x, self[0]);
          const B low = (word[mu] & (B{} + uint64_t(0xffffffffu))) | to_bits(two52);
          const auto active = bond_active(scale * (here * next), from_bits<V>(low) - two52);
          bond_row(mu, r)[x / 64] |= (to_mask(B(active) & (B{} + uint64_t(1))) & sites) << (x % 64);
        }
      }
    }
  }

  // Rem's union: climbs from both ends at once, splicing the paths, and stops where they meet.
  LFQ_HD void join(uint32_t a, uint32_t b) const {
    uint32_t* p = w.parent;
    while (p[a] != p[b]) {
      if (p[a] < p[b]) {
        const uint32_t c = a;
        a = b;
        b = c;
      }
      const uint32_t above = p[a];
      p[a] = p[b];
      if (a == above) return;
      a = above;
    }
  }

  // Every cluster, named by its first site, flips with probability 1/2. Returns the number of sites flipped.
  int64_t swendsen_wang(uint32_t update, T* phi) const {
    const int n = lat.length;
    activate(update * uint32_t(lat.volume));
    const int64_t row_words = cluster_work::row_words(lat);
    // Runs of active bonds along the rows need no search: each names its first site.
    for (int64_t r = 0; r < lat.n_rows; ++r) {
      const uint64_t* along = bond_row(D - 1, r);
      uint32_t run = uint32_t(r * n);
      w.parent[run] = run;
      for (int x = 1; x < n; ++x) {
        const uint32_t site = uint32_t(r * n + x);
        run = along[(x - 1) / 64] >> ((x - 1) % 64) & 1 ? run : site;
        w.parent[site] = run;
      }
    }
    for (int64_t r = 0; r < lat.n_rows; ++r) {
      int c[LFQ_MAX_DIM] = {};
      lat.coordinates(r, c);
      const uint64_t* along = bond_row(D - 1, r);
      if (along[(n - 1) / 64] >> ((n - 1) % 64) & 1) join(uint32_t(r * n), uint32_t(r * n + n - 1));
      for (int mu = 0; mu < D - 1; ++mu) {
        ++c[mu];
        const int64_t next = lat.row_start(c);
        --c[mu];
        const uint64_t *across = bond_row(mu, r), *along_next = bond_row(D - 1, next / n);
        uint64_t before = 0;
        for (int64_t i = 0; i < row_words; ++i) {
          // A bond whose left neighbour joins the same two runs adds nothing.
          const uint64_t square = across[i] & along[i] & along_next[i];
          uint64_t left = across[i] & ~(square << 1 | before);
          before = square >> 63;
          for (; left; left &= left - 1) {
            const int x = int(64 * i) + __builtin_ctzll(left);
            join(uint32_t(r * n + x), uint32_t(next + x));
          }
        }
      }
    }
    const uint32_t blocks = uint32_t((lat.volume + 127) / 128);
    for (uint32_t b = 0; b < blocks; ++b) {
      uint32_t word[4];
      words(LFQ_PURPOSE_CLUSTER, update * blocks + b, word);
      for (int j = 0; j < 4; ++j) w.flips[4 * b + uint32_t(j)] = word[j];
    }
    int64_t flipped = 0;
    for (int64_t x = 0; x < lat.volume; ++x) {
      // Parents come first, and are roots by now.
      const uint32_t name = w.parent[x] = w.parent[w.parent[x]];
      const bool flip = w.flips[name / 32] >> (name % 32) & 1;
      flipped += flip;
      phi[x] = flip ? -phi[x] : phi[x];
    }
    return flipped;
  }

  // The cluster of a random site flips. Returns its size, or -1 - x where it meets a NaN or Inf at site x. Only the
  // cluster and its neighbours are read.
  int64_t wolff(uint32_t update, T* phi) const {
    uint32_t word[4];
    words(LFQ_PURPOSE_CLUSTER, update, word);
    const uint64_t random = uint64_t(word[0]) << 32 | word[1];
    const uint32_t start = uint32_t((unsigned __int128)(random)*uint64_t(lat.volume) >> 64);
    const uint32_t first_block = update * uint32_t(lat.volume);
    uint8_t* inside = w.inside;
    if (!finite(double(phi[start]))) return -1 - int64_t(start);
    int64_t stride[D], size = 1, done = 0, bad = -1;
    stride[D - 1] = 1;
    for (int mu = D - 2; mu >= 0; --mu) stride[mu] = stride[mu + 1] * lat.extent[mu + 1];
    w.parent[0] = start;
    inside[start] = 1;
    for (; done < size; ++done) {
      const int64_t x = w.parent[done];
      int64_t ahead[D], behind[D];
      for (int mu = 0; mu < D; ++mu) {
        const int64_t c = x / stride[mu] % lat.extent[mu], around = stride[mu] * (lat.extent[mu] - 1);
        ahead[mu] = c + 1 < lat.extent[mu] ? x + stride[mu] : x - around;
        behind[mu] = c > 0 ? x - stride[mu] : x + around;
      }
      // Word mu of this site's block decides forward bonds, of a neighbour's the bond back to it.
      uint32_t forward[4], backward[D];
      constexpr int vectors = (D + V::width) / V::width;
      for (int v = 0; v < vectors; ++v) {
        B block = {}, words64[4];
        for (int l = 0; l < V::width; ++l) {
          const int k = v * V::width + l;
          block[l] = first_block + uint32_t(k == 0 || k > D ? x : behind[k - 1]);
        }
        words(LFQ_PURPOSE_BOND, block, words64);
        for (int l = 0; l < V::width; ++l) {
          const int k = v * V::width + l;
          if (k == 0)
            for (int mu = 0; mu < D; ++mu) forward[mu] = uint32_t(words64[mu][l]);
          else if (k <= D)
            backward[k - 1] = uint32_t(words64[k - 1][l]);
        }
      }
      const double here = double(phi[x]);
      const auto visit = [&](int64_t y, uint32_t random_word) LFQ_LAMBDA_INLINE {
        if (inside[y]) return;
        const double there = double(phi[y]);
        if (!finite(there)) bad = y;
        if (!bond_active(coupling * (here * there), double(random_word))) return;
        inside[y] = 1;
        w.parent[size++] = uint32_t(y);
      };
      for (int mu = 0; mu < D; ++mu) {
        visit(ahead[mu], forward[mu]);
        visit(behind[mu], backward[mu]);
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t x = w.parent[i];
      phi[x] = -phi[x];
      inside[x] = 0;
    }
    return bad < 0 ? size : -1 - bad;
  }

  // All updates of one trajectory; returns the place of a NaN or Inf, or -1.
  int64_t run(const lfq_cluster& cluster, T* phi, int64_t* flipped) const {
    if (cluster.kind == LFQ_CLUSTER_WOLFF)
      for (int64_t i = 0; i < lat.volume; ++i) w.inside[i] = 0;
    for (int32_t update = 0; update < cluster.n_updates; ++update) {
      if (cluster.kind == LFQ_CLUSTER_WOLFF) {
        const int64_t size = wolff(uint32_t(update), phi);
        if (size < 0) return -1 - size;
        *flipped += size;
        continue;
      }
      const int64_t bad = load_field(phi);
      if (bad >= 0) return bad;
      *flipped += swendsen_wang(uint32_t(update), phi);
    }
    return -1;
  }
};

LFQ_NAMESPACE_END
