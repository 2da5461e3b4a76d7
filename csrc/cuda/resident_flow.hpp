// Host side of the papers' flow with a chain in one block.
#pragma once
#include "cuda/resident_flow.cuh"
#include "cuda/theory.hpp"

namespace lfq_cuda {

using lfq::resident_task;

// Rows of a thread's tile, and the threads and shared memory of a chain; no rows for flows and lattices that the kernel
// does not take.
struct flow_residence {
  int rows = 0, threads = 0;
  size_t shared = 0;
};

// Whether the lattices of all layers follow from the last one's: layers may also take the sites of the ones before in
// another shape, in order.
inline bool keeps_lattice(const lfq_flow& f) {
  int halved = 0;
  for (int i = f.n_layers - 1; i >= 0; --i) {
    const lfq_layer &l = f.layers[i], &last = f.layers[f.n_layers - 1];
    if (l.ndim != last.ndim) return false;
    for (int axis = 0; axis < l.ndim; ++axis)
      if (int64_t(l.extent[axis]) << halved != last.extent[axis]) return false;
    halved += lfq::resizes(l);
  }
  return true;
}

template <class T>
flow_residence find_flow_residence(const lfq_flow& f) {
  flow_residence r;
  if (!keeps_lattice(f)) return r;
  if (f.n_layers < 2 || f.n_layers > 3 || (f.n_layers == 3 && f.layers[2].kind != LFQ_LAYER_RESCALE)) return r;
  for (int i = 0; i < 2; ++i) {
    const lfq_layer& l = f.layers[i];
    if (l.kind != LFQ_LAYER_COUPLING || l.ndim != 2 || l.kernel_size != 3 || l.n_hidden != 0 || l.scale != LFQ_SCALE_NEG_ABS ||
        l.sublattices || l.active || l.parity != i || l.bias != f.layers[0].bias)
      return r;
  }
  lfq_phi4 lattice{};
  lattice.ndim = 2;
  for (int i = 0; i < 2; ++i) lattice.extent[i] = f.layers[0].extent[i];
  // In double, large tiles spill less and keep more operations in flight, once there are enough of them.
  const bool large = sizeof(T) == 8 && f.volume > 2048 && lfq::tile<2, 4>::per_chain(lattice) > 0;
  const int rows = large ? 4 : 2;
  const int64_t tiles = large ? lfq::tile<2, 4>::per_chain(lattice) : lfq::tile<2, 2>::per_chain(lattice);
  if (tiles == 0 || tiles > lfq::resident_flow_threads(rows)) return r;
  r.threads = lfq::whole_warps(tiles);
  r.shared = lfq::sum_scratch(r.threads, lfq::resident_flow_sums) + 2 * sizeof(lfq::near_net<T>) + 2 * size_t(f.volume) * sizeof(T);
  if (r.shared <= shared_limit() && lfq::can_measure(lattice, f.volume, r.threads, lfq::segment_sites<T>)) r.rows = rows;
  return r;
}

inline lfq::resident_layers layers_of(const lfq_flow& f) {
  lfq::resident_layers found;
  for (int i = 0; i < 2; ++i) {
    const lfq_layer& l = f.layers[i];
    const lfq::convolution_layout c = lfq::convolution_of(l, 0);
    found.net[i] = l.weight_offset + c.weight;
    found.bias[i] = l.bias ? l.weight_offset + c.bias : -1;
  }
  found.rescale = f.n_layers == 3 ? f.layers[2].weight_offset : -1;
  return found;
}

template <class T>
int launch_resident_flow(resident_task task, const flow_residence& r, int64_t blocks, const lfq::resident_flow_arguments<T>& a, void* stream);

}  // namespace lfq_cuda
