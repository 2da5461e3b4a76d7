// phi^4 loops over the sites of one group, and the momentum refresh.
#pragma once
#include "cpu/group.hpp"
#include "lfq/phi4.hpp"

LFQ_NAMESPACE_BEGIN

// Fewer sites fit a core's cache with one chain a lane.
constexpr int64_t smallest_split = 4096;

// Whether HMC spreads one chain over the lanes: see group. With a flow lanes are always chains.
template <class T>
bool splits(const lfq_phi4& theory) {
  constexpr int W = simd<T>::width;
  const lattice lat(theory.ndim, theory.extent);
  return lat.ndim >= 2 && lat.extent[0] % W == 0 && lat.extent[0] / W >= 2 && lat.volume / W % 4 == 0 &&
         lat.volume >= smallest_split;
}

// Copies of the first and last slice along the first axis, as their neighbours see them.
template <class T>
struct halo {
  simd<T>* below = nullptr;  // of slabs only: under slice 0, the last slice of the slab before
  simd<T>* above = nullptr;  // over the last slice: slice 0 (of the slab after)
  // Of two-dimensional lattices: see steps_in_pairs.
  static constexpr int max_pairs = 3;
  simd<T>* between = nullptr;  // the row after each pass's first one as it was between its two steps
  simd<T>* seam = nullptr;     // four rows on either side of row 0, phi and momenta
  void plan(arena& mem, const lfq_phi4& theory, bool split) {
    const lattice lat(theory.ndim, theory.extent);
    if (split) below = mem.take<simd<T>>(lat.volume / lat.extent[0]);
    above = mem.take<simd<T>>(lat.volume / lat.extent[0]);
    if (lat.ndim != 2) return;
    between = mem.take<simd<T>>(max_pairs * int64_t(lat.length));
    seam = mem.take<simd<T>>(8 * int64_t(lat.length));
  }
};

// A kick and the drift after it, phi + d pi. UNIT: d = 1, the momenta being in units of the step.
template <class T>
struct phi4_step {
  phi4_kick<T> kick;
  T d;
  template <bool UNIT>
  LFQ_HD simd<T> drift(simd<T> phi, simd<T> p) const { return UNIT ? phi + p : fma(simd<T>(d), p, phi); }
};

template <class T, int D>
struct phi4_group {
  using V = simd<T>;
  bool split;
  lattice whole;  // the chain's lattice
  lattice lat;    // a lane's part of it
  double beta, lam;
  phi4_site<T> site;
  halo<T> edge;
  rotation<T> before, after;  // what a slab's first slice sees below it, and its last one above

  phi4_group(const lfq_phi4& theory, bool split_lanes, const halo<T>& h)
      : split(split_lanes), whole(D, theory.extent), lat(whole), beta(theory.beta), lam(theory.lam), site(beta, lam),
        edge(h), before(split ? -1 : 0), after(split ? 1 : 0) {
    if (!split) return;
    int32_t extent[LFQ_MAX_DIM];
    for (int i = 0; i < D; ++i) extent[i] = whole.extent[i];
    extent[0] /= V::width;
    lat = lattice(D, extent);
  }

  // Before a pass over phi: what the outermost slices of each slab see across its edges.
  void exchange(const V* phi) const {
    if (!split) return;
    const int64_t n = lat.volume / lat.extent[0];
    for (int64_t i = 0; i < n; ++i) edge.below[i] = before(phi[lat.volume - n + i]);
    for (int64_t i = 0; i < n; ++i) edge.above[i] = after(phi[i]);
  }

  // The rows next to row r along the leading axes.
  LFQ_HD void neighbours(const V* phi, int64_t r, const V* above, const V** up, const V** down) const {
    if constexpr (D > 1) {
      const int n = lat.length;
      const V* self = phi + r * n;
      int c[LFQ_MAX_DIM];
      lat.coordinates(r, c);
      int64_t stride = n;
      for (int i = D - 2; i >= 0; --i) {
        up[i] = self + (c[i] + 1 < lat.extent[i] ? stride : stride * (1 - lat.extent[i]));
        down[i] = self + (c[i] > 0 ? -stride : stride * (lat.extent[i] - 1));
        stride *= lat.extent[i];
      }
      const int64_t in_slice = r * n - c[0] * (lat.volume / lat.extent[0]);
      if (split && c[0] == 0) down[0] = edge.below + in_slice;
      if (above && c[0] + 1 == lat.extent[0]) up[0] = above + in_slice;
    }
  }

  // Calls f(index, phi, sum over forward neighbours, sum over all neighbours) along a row. A row of the last
  // slice sees the first one in `above`, when given; after(x) follows the site x.
  template <class F>
  LFQ_HD void row(const V* phi, int64_t r, F&& f) const {
    row(phi, r, f, split ? edge.above : nullptr, [](int) LFQ_LAMBDA_INLINE {});
  }
  template <class F, class G>
  LFQ_HD void row(const V* phi, int64_t r, F&& f, const V* above, G&& after) const {
    const int n = lat.length;
    const V* self = phi + r * n;
    const V* up[D > 1 ? D - 1 : 1];
    const V* down[D > 1 ? D - 1 : 1];
    neighbours(phi, r, above, up, down);
    V left = self[n - 1], here = self[0];
    const auto visit = [&](int x, V right) LFQ_LAMBDA_INLINE {
      // all in the order of two_slices, which other slabs of the same lattice may go through
      V forward = right, all = left + right;
      for (int i = 0; i < D - 1; ++i) {
        forward += up[i][x];
        all += down[i][x] + up[i][x];
      }
      f(r * n + x, here, forward, all);
      after(x);
      left = here;
      here = right;
    };
    for (int x = 0; x + 1 < n; ++x) visit(x, self[x + 1]);
    visit(n - 1, self[0]);
  }

  void action(const V* phi, site_sum<T>& s) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V forward, V) LFQ_LAMBDA_INLINE { s.add(i, site.action(p, forward)); });
  }
  void force(const V* phi, V* f) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V, V all) LFQ_LAMBDA_INLINE { f[i] = site.force(p, all); });
  }
  // g = dS/dphi
  void gradient(const V* phi, V* g) const {
    exchange(phi);
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V, V all) LFQ_LAMBDA_INLINE { g[i] = site.gradient(p, p * p, V(site.beta) * all); });
  }
  // and the action, in one pass
  void gradient(const V* phi, V* g, site_sum<T>& s) const {
    exchange(phi);
    site_sum<T> sum = s;  // in registers: g could lie where s does
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V p, V forward, V all) LFQ_LAMBDA_INLINE {
        g[i] = site.gradient(p, p * p, V(site.beta) * all);
        sum.add(i, site.action(p, forward));
      });
    s = sum;
  }

  // p += k F(phi), then to = phi + d p, in one pass over the lattice. IN_PLACE: `to` is phi. A slice moves once
  // both its neighbours were kicked: while the next one is. The first slice moves long before the last is kicked,
  // which sees a copy of it.
  template <bool UNIT, bool IN_PLACE>
  void kick_drift(const V* phi, V* to, V* p, const phi4_step<T>& step) const {
    const phi4_kick<T>& kick = step.kick;
    const auto moved = [&](V x, V v) LFQ_LAMBDA_INLINE { return step.template drift<UNIT>(x, v); };
    if constexpr (D == 1) {
      row(phi, 0, [&](int64_t i, V x, V, V all) LFQ_LAMBDA_INLINE { p[i] = kick(p[i], x, all); });
      for (int64_t i = 0; i < lat.volume; ++i) to[i] = moved(phi[i], p[i]);
      return;
    } else {
      const int n = lat.length, slices = lat.extent[0];
      const int64_t rows = lat.n_rows / slices, slice = rows * n, last = lat.volume - slice;
      if (slices % 2 == 0 && (D == 2 || lat.extent[1] >= 2)) {
        two_slices<UNIT, true, IN_PLACE>(phi, to, phi + last, slices > 2 ? phi + 2 * slice : edge.above, p, step);
        for (int s = 2; s < slices; s += 2) {
          const int64_t at = s * slice;
          const V* above = s + 2 < slices ? phi + at + 2 * slice : edge.above;
          two_slices<UNIT, false, IN_PLACE>(phi + at, to + at, phi + at - slice, above, p + at, step);
        }
      } else {
        if (split)
          exchange(phi);
        else
          for (int64_t i = 0; i < slice; ++i) edge.above[i] = phi[i];
        for (int64_t r = 0; r < lat.n_rows; ++r) {
          const int64_t below = (r - rows) * n;
          row(phi, r, [&](int64_t i, V x, V, V all) LFQ_LAMBDA_INLINE { p[i] = kick(p[i], x, all); },
              edge.above, [&](int x) LFQ_LAMBDA_INLINE {
                if (r >= rows) to[below + x] = moved(phi[below + x], p[below + x]);
              });
        }
      }
      for (int64_t i = last; i < lat.volume; ++i) to[i] = moved(phi[i], p[i]);
    }
  }
  // Calls f(x, phi and phi1, what their neighbours along the row add up to) for every site of two rows, whose
  // sites value(x) and value1(x) tell.
  template <class A, class B, class F>
  LFQ_HD static void along_rows(int n, A&& value, B&& value1, F&& f) {
    V left = value(n - 1), left1 = value1(n - 1), here = value(0), here1 = value1(0);
    const V end = here, end1 = here1;
    const auto visit = [&](int x, V right, V right1) LFQ_LAMBDA_INLINE {
      f(x, here, here1, left + right, left1 + right1);
      left = here, left1 = here1;
      here = right, here1 = right1;
    };
    for (int x = 0; x + 1 < n; ++x) visit(x, value(x + 1), value1(x + 1));
    visit(n - 1, end, end1);
  }
  // Kicks two slices and moves the first of them and the one below: neighbours of a site come from registers where they
  // can. A row of the first slice moves once those around it in the slice are kicked: its first and last rows at the
  // end. FIRST: the slice below is the last one, moves when all is done, and sees the first one in edge.above.
  template <bool UNIT, bool FIRST, bool IN_PLACE>
  LFQ_HD void two_slices(const V* phi, V* target, const V* below, const V* above, V* p,
                         const phi4_step<T>& step) const {
    const int n = lat.length;
    const int64_t slice = lat.volume / lat.extent[0], last = D > 2 ? slice / lat.extent[1] : 0;
    // fewer pointers to hold
    V* const to = IN_PLACE ? const_cast<V*>(phi) : target;
    const auto move = [&](int64_t at) LFQ_LAMBDA_INLINE {
      for (int x = 0; x < n; ++x) to[at + x] = step.template drift<UNIT>(phi[at + x], p[at + x]);
    };
    for (int64_t at = 0; at < slice; at += n) {
      const V *phi0 = phi + at, *phi1 = phi0 + slice, *under = below + at, *over = above + at, *p_under = p + at - slice;
      V *p0 = p + at, *p1 = p0 + slice, *to0 = to + at, *copy = edge.above + at;
      V* const to_under = IN_PLACE ? const_cast<V*>(under) : to0 - slice;
      const V *up[D - 1], *down[D - 1];  // within the slice
      if constexpr (D > 2) neighbours(phi, at / n, nullptr, up, down);
      along_rows(
          n, [&](int x) LFQ_LAMBDA_INLINE { return phi0[x]; }, [&](int x) LFQ_LAMBDA_INLINE { return phi1[x]; },
          [&](int x, V here, V here1, V sides, V sides1) LFQ_LAMBDA_INLINE {
            const V lower = FIRST ? before(under[x]) : under[x];
            if constexpr (FIRST) copy[x] = after(here);  // before `over` is read: of two slices it is the copy
            V all = sides + (lower + here1), all1 = sides1 + (here + over[x]);
            for (int i = 1; i < D - 1; ++i) {
              all += up[i][x] + down[i][x];
              all1 += up[i][x + slice] + down[i][x + slice];
            }
            const V k = step.kick(p0[x], here, all);
            p1[x] = step.kick(p1[x], here1, all1);
            p0[x] = k;
            if constexpr (!FIRST) to_under[x] = step.template drift<UNIT>(lower, p_under[x]);
            if constexpr (D == 2) to0[x] = step.template drift<UNIT>(here, k);
          });
      if (D > 2 && at >= 2 * last) move(at - last);
    }
    for (int64_t at = 0; at < last; at += n) {
      move(at);
      move(slice - last + at);
    }
  }

  // How many pairs of steps `steps_in_pairs` should take in one sweep, 0 for kick_drift alone. A pair keeps more
  // numbers at hand than 16 registers hold, and then is worth it only where fields come from beyond the second-level
  // cache. More pairs than one save nothing but traffic with memory: where fields exceed a core's part of the last
  // cache.
  int pairs_at_once() const {
    constexpr int64_t second_level = int64_t(1) << 20, last_level = int64_t(1) << 23;
    const int rows = lat.extent[0];
    if (D != 2 || rows % 2 != 0 || rows < 4 || lat.length < 3) return 0;
    const int64_t bytes = 2 * lat.volume * int64_t(sizeof(V));
    if (bytes > last_level && rows >= 2 * halo<T>::max_pairs + 2) return halo<T>::max_pairs;
    return simd_registers >= 32 || bytes > second_level;
  }
  // Pairs of steps with the bits of single ones. Two kicks and drifts, a and b, are one pass over the rows: fields
  // travel once, and half the numbers between the steps never leave their registers. As step a kicks rows r and r + 1,
  // step b kicks rows r - 1 and r a column behind; what is below rests like this until its turn comes:
  //   row r - 1: kicked by a, not moved; row r - 2: moved by a, kicked by b, not moved; further rows are done.
  // The row where a pass began waits, kicked by a, until the row before it is there to kick it. Further passes run
  // right behind, while rows are in cache; each begins two rows above the one that waits for the pass before.
  template <bool UNIT>
  void steps_in_pairs(const V* from, V* phi, V* p, const phi4_step<T>* steps, int n_pairs) const {
    const int groups = lat.extent[0] / 2;
    constexpr int lag = 3;  // a pass is done with what lies six rows behind it, as the next one counts them
    for (int turn = 0; turn <= groups + lag * (n_pairs - 1); ++turn)
      for (int pass = 0; pass < n_pairs; ++pass) {
        const int item = turn - lag * pass;
        if (item < 0 || item > groups) continue;
        const V* source = pass > 0 ? phi : from;
        const phi4_step<T>&a = steps[2 * pass], &b = steps[2 * pass + 1];
        if (item == 0)
          begin_pair(source, p, 2 * pass, a.kick);
        else if (item < groups)
          continue_pair<UNIT>(source, phi, p, pass, item, a, b);
        else
          end_pair<UNIT>(source, phi, p, pass, a, b);
      }
  }
  template <bool UNIT>
  LFQ_HD void continue_pair(const V* from, V* to, V* p, int pass, int item, const phi4_step<T>& a,
                            const phi4_step<T>& b) const {
    const int n = lat.length, rows = lat.extent[0], r = 2 * (pass + item) % rows;
    const V* above = from + (r + 2 < rows ? r + 2 : 0) * int64_t(n);
    if (split && r + 2 == rows) {
      if (pass > 0)
        for (int x = 0; x < n; ++x) edge.above[x] = after(to[x]);
      above = edge.above;
    }
    V* between = edge.between + pass * int64_t(n);
    if (item == 1) return four_rows<UNIT, true>(from, to, p, above, r, between, a, b);
    if (r > 0) return four_rows<UNIT, false>(from, to, p, above, r, between, a, b);
    // Rows below row 0 lie at the end of the field, and in other lanes.
    const int64_t last = lat.volume - 2 * int64_t(n);
    V *seam = edge.seam, *p_seam = seam + 4 * int64_t(n);
    for (int x = 0; x < 2 * n; ++x) {
      seam[x] = before(to[last + x]), p_seam[x] = before(p[last + x]);
      seam[2 * n + x] = to[x], p_seam[2 * n + x] = p[x];
    }
    four_rows<UNIT, false>(seam, seam, p_seam, above, 2, between, a, b);
    for (int x = 0; x < 2 * n; ++x) {
      to[last + x] = after(seam[x]), p[last + x] = after(p_seam[x]);
      to[x] = seam[2 * n + x], p[x] = p_seam[2 * n + x];
    }
  }
  // Kicks rows r and r + 1.
  LFQ_HD void begin_pair(const V* from, V* p, int r, const phi4_kick<T>& kick) const {
    const int n = lat.length;
    const int64_t at = r * int64_t(n);
    const V *from0 = from + at, *from1 = from0 + n, *above = from1 + n;
    const V* below = r > 0 ? from0 - n : from + lat.volume - n;
    V *p0 = p + at, *p1 = p0 + n;
    const rotation<T> turn = r > 0 ? rotation<T>(0) : before;
    const bool keep = split && r == 0;
    along_rows(
        n, [&](int x) LFQ_LAMBDA_INLINE { return from0[x]; }, [&](int x) LFQ_LAMBDA_INLINE { return from1[x]; },
        [&](int x, V here, V here1, V sides, V sides1) LFQ_LAMBDA_INLINE {
          p0[x] = kick(p0[x], here, sides + (turn(below[x]) + here1));
          p1[x] = kick(p1[x], here1, sides1 + (here + above[x]));
          if (keep) edge.above[x] = after(here);
        });
  }
  // Step a of rows r and r + 1, step b of rows r - 1 and r. FIRST: row r - 2 is the one that waits.
  template <bool UNIT, bool FIRST>
  void four_rows(const V* from, V* to, V* p, const V* above, int r, V* between, const phi4_step<T>& a,
                 const phi4_step<T>& b) const {
    const int n = lat.length;
    const int64_t at = r * int64_t(n);
    const V *from0 = from + at, *from1 = from0 + n, *from_below = from0 - n, *from_below2 = from_below - n;
    V *to0 = to + at, *to_below = to0 - n, *to_below2 = to_below - n;
    V *p0 = p + at, *p1 = p0 + n, *p_below = p0 - n, *p_below2 = p_below - n;
    // A column between the steps: phi in rows r - 1, r and r + 1, and the momentum of row r.
    struct column {
      V below, here, above, momentum;
    };
    V left0 = from0[n - 1], left1 = from1[n - 1], here0 = from0[0], here1 = from1[0];
    const auto step_a = [&](int x, V right0, V right1) LFQ_LAMBDA_INLINE {
      const V under = from_below[x];
      const V k0 = a.kick(p0[x], here0, (left0 + right0) + (under + here1));
      const V k1 = a.kick(p1[x], here1, (left1 + right1) + (here0 + above[x]));
      p1[x] = k1;
      const column c = {a.template drift<UNIT>(under, p_below[x]), a.template drift<UNIT>(here0, k0),
                        a.template drift<UNIT>(here1, k1), k0};
      left0 = here0, left1 = here1;
      here0 = right0, here1 = right1;
      return c;
    };
    const auto step_b = [&](int x, const column& left, const column& c, const column& right) LFQ_LAMBDA_INLINE {
      const V under = FIRST ? a.template drift<UNIT>(from_below2[x], p_below2[x]) : to_below2[x];
      const V k_below = b.kick(p_below[x], c.below, (left.below + right.below) + (under + c.here));
      p0[x] = b.kick(c.momentum, c.here, (left.here + right.here) + (c.below + c.above));
      p_below[x] = k_below;
      if constexpr (FIRST)
        between[x] = c.below;
      else
        to_below2[x] = b.template drift<UNIT>(under, p_below2[x]);
      to_below[x] = b.template drift<UNIT>(c.below, k_below);
      to0[x] = c.here;
    };
    const V end0 = here0, end1 = here1;
    const column first = step_a(0, from0[1], from1[1]), second = step_a(1, from0[2], from1[2]);
    column left = first, here = second;
    for (int x = 2; x + 1 < n; ++x) {
      const column right = step_a(x, from0[x + 1], from1[x + 1]);
      step_b(x - 1, left, here, right);
      left = here, here = right;
    }
    const column last = step_a(n - 1, end0, end1);
    step_b(n - 2, left, here, last);
    step_b(n - 1, here, last, first);
    step_b(0, last, first, second);
  }
  // Step b of the row that waits and of the one below it.
  template <bool UNIT>
  LFQ_HD void end_pair(const V* from, V* to, V* p, int pass, const phi4_step<T>& a, const phi4_step<T>& b) const {
    const int n = lat.length;
    const int64_t at = 2 * pass * int64_t(n), below = (pass > 0 ? at : lat.volume) - n;
    const V *from0 = from + at, *from_below = from + below, *p_below2 = p + below - n;
    const V* between = edge.between + pass * int64_t(n);
    V *to0 = to + at, *to_below = to + below, *to_below2 = to_below - n, *p0 = p + at, *p_below = p + below;
    const rotation<T> up = pass > 0 ? rotation<T>(0) : before, down = pass > 0 ? rotation<T>(0) : after;
    along_rows(
        n, [&](int x) LFQ_LAMBDA_INLINE { return a.template drift<UNIT>(from0[x], p0[x]); },
        [&](int x) LFQ_LAMBDA_INLINE { return a.template drift<UNIT>(from_below[x], p_below[x]); },
        [&](int x, V here, V here_below, V sides, V sides_below) LFQ_LAMBDA_INLINE {
          const V under = to_below2[x];
          const V k = b.kick(p0[x], here, sides + (up(here_below) + between[x]));
          const V k_below = b.kick(p_below[x], here_below, sides_below + (under + down(here)));
          p0[x] = k;
          p_below[x] = k_below;
          to_below2[x] = b.template drift<UNIT>(under, p_below2[x]);
          to0[x] = b.template drift<UNIT>(here, k);
          to_below[x] = b.template drift<UNIT>(here_below, k_below);
        });
  }
  // The last kick, with the action after it and the square of the momenta. Since the sum of -phi F counts the
  // quadratic terms of S twice and the quartic one four times, S = sum of -phi F / 2 - lam phi^4.
  void kick_energy(const V* phi, V* p, const phi4_kick<T>& kick, double k, lane_sum<T>& s, site_sum<T>& p2) const {
    exchange(phi);
    site_sum<T> phi_force, phi4, sum_p2 = p2;  // in registers: momenta could lie where p2 does
    for (int64_t r = 0; r < lat.n_rows; ++r)
      row(phi, r, [&](int64_t i, V x, V, V all) LFQ_LAMBDA_INLINE {
        const V x2 = x * x, f = kick.force(x, x2, all), m = p[i] + f;
        p[i] = m;
        phi_force.add_product(i, x, f);
        phi4.add_product(i, x2, x2);
        sum_p2.add_product(i, m, m);
      });
    p2 = sum_p2;
    s.add(-0.5 / k, phi_force.sum());
    s.add(-lam, phi4.sum());
  }
};

// Calls f(constant<D>) for the run-time number of dimensions.
template <class F>
LFQ_HD void with_dimension(int ndim, F&& f) {
  switch (ndim) {
    case 1: return f(constant<1>());
    case 2: return f(constant<2>());
    case 3: return f(constant<3>());
    default: return f(constant<4>());
  }
}

// Philox blocks of each lane, word by word: lane l draws from chain g.chain(l)'s stream, from the block where its
// part of the field begins. Two at a time: one long chain of operations would leave the processor waiting.
template <class T>
struct lane_blocks {
  using B = typename simd<T>::bits_t;
  // A twin is two blocks of double-precision lanes, or the even and the odd lanes of one single-precision block.
  using words = twin_bits<words64>;
  static constexpr int halves = simd<T>::width / simd<double>::width;
  words chains, first, word1, word3;
  uint32_t key0, key1;

  // blocks_per_lane: of a slab
  lane_blocks(const stream& rng, uint64_t first_chain, const group<T>& g, int64_t blocks_per_lane)
      : word1(words{} + uint64_t(rng.word1())),
        word3(words{} + uint64_t(rng.word3())),
        key0(uint32_t(rng.seed)),
        key1(uint32_t(rng.seed >> 32)) {
    for (int l = 0; l < simd<T>::width; ++l) {
      const uint64_t chain = uint32_t(first_chain + uint64_t(g.chain(l)));
      const uint64_t block = g.slabs ? uint64_t(l * blocks_per_lane) : 0;
      words64& c = halves == 2 && l % 2 ? chains.b : chains.a;
      words64& f = halves == 2 && l % 2 ? first.b : first.a;
      c[l / halves] = chain;
      f[l / halves] = block;
    }
    if (halves == 1) {
      chains.b = chains.a;
      first.b = first.a;
    }
  }
  // Blocks `block`, block + step, ...: word i of the k-th to word[4 k + i]. In double precision one more than an odd
  // count is written.
  LFQ_HD void operator()(uint64_t block, uint64_t step, int count, B* word) const {
    const words64 low = words64{} + uint64_t(0xffffffffu);
    for (int k = 0; k < count; k += 3 - halves) {
      words x[4] = {first + (block + uint64_t(k) * step), word1, chains, word3};
      if (halves == 1) x[0].b = x[0].b + step;
      philox4x32(x[0], x[1], x[2], x[3], key0, key1);
      for (int i = 0; i < 4; ++i) {
        if constexpr (halves == 1)
          word[4 * k + i] = x[i].a & low, word[4 * k + 4 + i] = x[i].b & low;
        else
          word[4 * k + i] = interleave(x[i].a, x[i].b);
      }
    }
  }
};

// The four normals of a block, its two pairs side by side.
template <class T>
LFQ_HD void block_normals(const typename simd<T>::bits_t* word, simd<T> (&z)[4]) {
  using B = typename simd<T>::bits_t;
  twin<T> first, second;
  box_muller(twin_bits<B>{word[0], word[2]}, twin_bits<B>{word[1], word[3]}, first, second);
  z[0] = first.a, z[1] = second.a;
  z[2] = first.b, z[3] = second.b;
}

// Normals for the n sites of each lane; sink(i, value). Some blocks at a time, words first: two short loops keep
// the processor busy where one long chain of operations would leave it waiting.
template <class T, class F>
LFQ_HD void normals(const stream& rng, uint64_t first_chain, const group<T>& g, int64_t n, F&& sink) {
  using V = simd<T>;
  using B = typename V::bits_t;
  const lane_blocks<T> random(rng, first_chain, g, n / 4);
  constexpr int batch = 8;
  alignas(64) B word[4 * batch];
  for (int64_t b0 = 0; 4 * b0 < n; b0 += batch) {
    const int64_t left = n - 4 * b0;
    const int blocks = left < 4 * batch ? int(left + 3) / 4 : batch;
    random(uint64_t(b0), 1, blocks, word);
    const int whole = left < 4 * batch ? int(left / 4) : batch;
    for (int k = 0; k < whole; ++k) {
      V z[4];
      block_normals<T>(word + 4 * k, z);
      for (int j = 0; j < 4; ++j) sink(4 * (b0 + k) + j, z[j]);
    }
    for (int k = whole; k < blocks; ++k) {
      V z[4];
      block_normals<T>(word + 4 * k, z);
      for (int j = 0; 4 * k + j < left; ++j) sink(4 * (b0 + k) + j, z[j]);
    }
  }
}

// The uniform of each lane's chain that decides on acceptance.
template <class T>
void accept_uniforms(const stream& rng, uint64_t first_chain, const group<T>& g, double* out) {
  constexpr int W64 = simd<double>::width;
  for (int l0 = 0; l0 < simd<T>::width; l0 += W64) {
    words64 x0 = {}, x1 = words64{} + uint64_t(rng.word1()), x2, x3 = words64{} + uint64_t(rng.word3());
    for (int l = 0; l < W64; ++l) x2[l] = uint32_t(first_chain + uint64_t(g.chain(l0 + l)));
    philox4x32(x0, x1, x2, x3, uint32_t(rng.seed), uint32_t(rng.seed >> 32));
    for (int l = 0; l < W64; ++l) out[l0 + l] = uniform53(uint32_t(x0[l]), uint32_t(x1[l]));
  }
}

LFQ_NAMESPACE_END
