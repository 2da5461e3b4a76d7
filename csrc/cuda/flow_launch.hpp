// lfq_cuda.h: flows, HMC through them, and the training step. Included by one file for each type, so that they are
// compiled side by side.
#pragma once
#include <algorithm>

#include "cuda/direct_flow.cuh"
#include "cuda/resident_flow.hpp"
#include "cuda/theory.hpp"
#include "cuda/train.cuh"

namespace lfq_cuda {
namespace {

using lfq::n_buffers;

// Two blocks are to share a multiprocessor.
constexpr size_t most_shared = 100 * 1024;
constexpr int most_slots = 1024;
// Blocks that share the chains of a gradient by the weights of a resident flow.
constexpr int most_resident_slots = 2048;
constexpr int most_direct_slots = 4224;  // one warp on each of as many as an H200 holds
constexpr int64_t most_slot_bytes = int64_t(2) << 30;
// Most that a block adds up at a time: for observables, or of the parameters of a coupling.
constexpr int n_sums = 2 * LFQ_MAX_FEATURES > 4 + 2 * LFQ_MAX_DIM ? 2 * LFQ_MAX_FEATURES : 4 + 2 * LFQ_MAX_DIM;

enum class work { forward, gradient, hmc };

int check_flow(const lfq_flow* f, const lfq_layer* device_layers, int64_t n_chains) {
  if (int e = lfq_flow_check_layers(f)) return fail_check(e);
  if (f->volume > most_sites) return fail(LFQ_ERR_ARGUMENT, "flow: a GPU takes up to 2^31 - 4096 sites");
  if (f->n_layers > 0 && !device_layers) return fail(LFQ_ERR_ARGUMENT, "flow: the layers in device memory are null");
  if (n_chains < 0) return fail(LFQ_ERR_ARGUMENT, "n_chains is %lld, must not be negative", (long long)n_chains);
  return LFQ_OK;
}
int check_flow_on(const lfq_flow* f, const lfq_layer* device_layers, const lfq_phi4* t, int64_t n_chains) {
  if (int e = check_theory(t, n_chains)) return e;
  if (int e = check_flow(f, device_layers, n_chains)) return e;
  if (f->volume != volume_of(*t))
    return fail(LFQ_ERR_ARGUMENT, "flow: makes fields of %lld sites, the theory has %lld", (long long)f->volume, (long long)volume_of(*t));
  return LFQ_OK;
}

// Chains take slots in turn. Their number depends on sizes alone, and so does the order of sums over them.
inline void share_out_slots(lfq::buffer_plan& p, int64_t most, int64_t n_chains) {
  p.slot_bytes = (p.slot_bytes + 255) & ~int64_t(255);
  if (p.slot_bytes > 0) most = std::max<int64_t>(1, std::min(most, most_slot_bytes / p.slot_bytes));
  // All of them get as many chains, or one less.
  const int64_t rounds = std::max<int64_t>(1, lfq::ceil_div(n_chains, most));
  p.n_slots = int(lfq::ceil_div(n_chains, rounds));
}

// Which layers a flow has, in numbers of buffers; the sizes of all of them.
template <class T>
lfq::buffer_plan plan_buffers(const lfq_flow& f, work what, int64_t n_chains) {
  int64_t cache = 0, hidden = 0, channels = 0, widest = 0;
  bool resizing = false, nets = false;
  for (int n = 0; n < f.n_layers; ++n) {
    const lfq_layer& l = f.layers[n];
    const int64_t volume = lfq::sites_of(l);
    cache += lfq::cache_of(l);
    resizing = resizing || lfq::resizes(l);
    if (l.kind != LFQ_LAYER_COUPLING) continue;
    int64_t sum = 0, most = lfq::outputs_of(l);
    for (int i = 0; i < l.n_hidden; ++i) {
      sum += l.hidden[i];
      most = l.hidden[i] > most ? l.hidden[i] : most;
    }
    nets = nets || l.n_hidden > 0;
    hidden = sum * volume > hidden ? sum * volume : hidden;
    channels = most * volume > channels ? most * volume : channels;
    widest = volume > widest ? volume : widest;
  }
  const bool backward = what != work::forward, hmc = what == work::hmc;
  int64_t size[n_buffers] = {};
  size[lfq::buffer_x] = f.volume;
  size[lfq::buffer_spare_x] = resizing ? f.volume : 0;
  size[lfq::buffer_hidden] = hidden;
  size[lfq::buffer_g] = backward ? f.volume : 0;
  size[lfq::buffer_spare_g] = backward && resizing ? f.volume : 0;
  size[lfq::buffer_gz] = backward && resizing ? f.volume : 0;
  size[lfq::buffer_cache] = backward ? cache : 0;
  size[lfq::buffer_du] = backward ? channels : 0;
  size[lfq::buffer_du2] = backward && nets ? channels : 0;
  size[lfq::buffer_z] = size[lfq::buffer_p] = size[lfq::buffer_phi] = size[lfq::buffer_old_g] = hmc ? f.volume : 0;

  lfq::buffer_plan p{};
  p.threads = lfq::whole_warps(std::clamp<int64_t>(f.volume / 2, 1, lfq::flow_block<T>::most_threads));
  const size_t limit = shared_limit() < most_shared ? shared_limit() : most_shared;
  p.shared_bytes = lfq::sum_scratch(p.threads, n_sums);
  for (int b = 0; b < n_buffers; ++b) {
    const size_t bytes = (size_t(size[b]) * sizeof(T) + 15) & ~size_t(15);
    // The last accepted field and its gradient are touched once a trajectory.
    p.shared[b] = b != lfq::buffer_phi && b != lfq::buffer_old_g && p.shared_bytes + bytes <= limit;
    if (p.shared[b]) {
      p.offset[b] = int64_t(p.shared_bytes);
      p.shared_bytes += bytes;
    } else {
      p.offset[b] = p.slot_bytes;
      p.slot_bytes += int64_t(bytes);
    }
  }
  if (!resizing) {
    p.shared[lfq::buffer_gz] = p.shared[lfq::buffer_g];
    p.offset[lfq::buffer_gz] = p.offset[lfq::buffer_g];
  }
  share_out_slots(p, most_slots, n_chains);
  return p;
}

// Of direct_block's records of layers, the largest.
template <class T>
int64_t record_stride_of(const lfq_flow& f) {
  int64_t most = lfq::action_record_bytes<T>(f.layers[f.n_layers - 1].ndim);
  for (int n = 0; n < f.n_layers; ++n) most = std::max(most, lfq::record_bytes<T>(f.layers[n]));
  return most;
}
// Fields that a backward pass of direct_block writes besides the gradient.
inline int cotangents_of(const lfq_flow& f) {
  int most = 1;
  for (int n = 0; n < f.n_layers; ++n)
    if (f.layers[n].kind == LFQ_LAYER_COUPLING) most = std::max(most, lfq::cotangents_of(f.layers[n].scale, lfq::outputs_of(f.layers[n])));
  return most;
}
// HMC does not need the field again behind the forward pass.
inline bool keeps_field(const lfq_flow& f, work what) { return what != work::hmc || cotangents_of(f) > 1; }

// The same for direct_block; no slots where it does not fit or is not for this flow.
template <class T>
lfq::buffer_plan plan_direct(const lfq_flow& f, work what, int64_t n_chains) {
  lfq::buffer_plan p{};
  int64_t cache = 0;
  for (int n = 0; n < f.n_layers; ++n) {
    const lfq_layer& l = f.layers[n];
    if (!lfq::is_direct(l)) return p;
    if (l.kind == LFQ_LAYER_COUPLING)
      cache += lfq::kept_of(l.scale, lfq::outputs_of(l), lfq::count_bits(lfq::active_of(l)) * (lfq::sites_of(l) >> l.ndim),
                            what == work::gradient);
  }
  if (f.n_layers == 0) return p;
  const bool hmc = what == work::hmc;
  const int fields = 2 + (what != work::forward && keeps_field(f, what) ? cotangents_of(f) : 0);
  int64_t bytes[n_buffers] = {};
  // Each field begins at a multiple of its size.
  bytes[lfq::buffer_x] = (fields + 1) * f.volume * int64_t(sizeof(T));
  bytes[lfq::buffer_records] = 2 * record_stride_of<T>(f);
  if (what != work::forward) bytes[lfq::buffer_cache] = cache * int64_t(sizeof(T));
  for (int b : {lfq::buffer_z, lfq::buffer_p, lfq::buffer_phi, lfq::buffer_old_g}) bytes[b] = hmc ? f.volume * int64_t(sizeof(T)) : 0;

  // As many blocks as registers allow are to share a multiprocessor, each thread with a few sites of a sublattice.
  constexpr int most_threads = lfq::direct_block<T>::most_threads, in_all = most_threads * lfq::direct_block<T>::least_blocks;
  p.threads = lfq::warp_size;
  while (p.threads < most_threads && p.threads * 16 < f.volume) p.threads *= 2;
  const int64_t available = int64_t(shared_limit()), reserved = 1024;
  const int64_t limit = (available + reserved) / (in_all / p.threads) - reserved;
  int64_t shared = int64_t(lfq::sum_scratch(p.threads, n_sums));
  // x comes last.
  int64_t left = limit - shared - bytes[lfq::buffer_x] - bytes[lfq::buffer_records];
  for (int b : {lfq::buffer_records, lfq::buffer_z, lfq::buffer_p, lfq::buffer_cache, lfq::buffer_phi, lfq::buffer_old_g, lfq::buffer_x}) {
    const int64_t size = (bytes[b] + 15) & ~int64_t(15);
    const bool needed = b == lfq::buffer_x || b == lfq::buffer_records;
    // The last accepted field and its gradient are touched once a trajectory.
    p.shared[b] = needed || (b != lfq::buffer_phi && b != lfq::buffer_old_g && size <= left);
    int64_t& end = p.shared[b] ? shared : p.slot_bytes;
    p.offset[b] = end;
    end += size;
    if (p.shared[b] && !needed) left -= size;
  }
  if (shared > available) return lfq::buffer_plan{};
  p.shared_bytes = size_t(shared);
  share_out_slots(p, what == work::gradient ? most_slots : most_direct_slots, n_chains);
  return p;
}

// Which kernel a call takes: that of chains in registers, that of flows without hidden layers, or the one for all.
struct flow_route {
  flow_residence residence;
  bool direct = false;
};
// With `theory`, if any, whose lattice the last layer may write in another shape.
template <class T>
flow_route route_of(const lfq_flow& f, work what, int64_t n_chains, const lfq_phi4* theory) {
  flow_route r;
  if (theory && f.n_layers > 0) {
    const lfq_layer& last = f.layers[f.n_layers - 1];
    if (theory->ndim != last.ndim || !std::equal(last.extent, last.extent + last.ndim, theory->extent)) return r;
  }
  r.residence = find_flow_residence<T>(f);
  r.direct = !r.residence.rows && keeps_lattice(f) && plan_direct<T>(f, what, n_chains).n_slots > 0;
  return r;
}

// The workspace of a call.
template <class T>
struct flow_work {
  lfq::buffer_plan plan;
  T* weights;
  double *log_det, *dweights;
  char* records = nullptr;
  int64_t record_stride = 0;
  flow_work(pieces& mem, const lfq_flow& f, work what, int64_t n_chains, const flow_route& route) : plan{} {
    if (route.direct)
      plan = plan_direct<T>(f, what, n_chains);
    else if (route.residence.rows)
      plan.n_slots = int(n_chains < most_resident_slots ? n_chains : most_resident_slots);
    else  // one slot will do for a theory of another shape
      plan = plan_buffers<T>(f, what, find_flow_residence<T>(f).rows ? 1 : n_chains);
    weights = mem.take<T>(f.n_weights);
    log_det = mem.take<double>(1);
    dweights = what == work::gradient ? mem.take<double>(plan.n_slots * f.n_weights) : nullptr;
    plan.slots = mem.take<char>(plan.n_slots * plan.slot_bytes);
    if (!route.direct) return;
    record_stride = record_stride_of<T>(f);
    records = mem.take<char>((f.n_layers + 1) * record_stride);
  }
};

template <class T>
size_t bytes_of(const lfq_flow& f, work what, int64_t n, const flow_route& route) {
  pieces mem(nullptr);
  flow_work<T>(mem, f, what, n, route);
  return mem.used;
}
template <class T>
size_t workspace(const lfq_flow* f, int64_t n) {
  // The place of the device's layers does not matter here.
  if (check_flow(f, f ? f->layers : nullptr, n)) return 0;
  size_t most = 0;
  for (work what : {work::forward, work::gradient, work::hmc}) {
    most = std::max(most, bytes_of<T>(*f, what, n, flow_route()));
    most = std::max(most, bytes_of<T>(*f, what, n, route_of<T>(*f, what, n, nullptr)));
  }
  return most;
}

// Lays out the workspace and queues the conversion of weights. What the kernel is to do remains to be set.
template <class T>
int prepare(const lfq_flow& f, const lfq_layer* layers, work what, int64_t n, void* ws, size_t bytes, void* stream,
            const flow_route& route, lfq::flow_arguments<T>& a) {
  if (int e = check_workspace(ws, bytes, bytes_of<T>(f, what, n, route))) return e;
  pieces mem(ws);
  const flow_work<T> w(mem, f, what, n, route);
  int64_t first = f.volume;
  for (int i = f.n_layers - 1; i >= 0; --i)
    if (lfq::resizes(f.layers[i])) first = lfq::sites_of(f.layers[i]) >> f.layers[i].ndim;
  a.n_chains = n;
  const bool enlarges_first = f.n_layers > 0 && lfq::resizes(f.layers[0]);
  a.flow = {f.n_layers, int(first),   f.volume,        f.n_weights,    layers,                 w.weights,
            w.log_det,  w.records,    w.record_stride, enlarges_first, what == work::gradient, keeps_field(f, what)};
  a.plan = w.plan;
  a.plan.dweights = w.dweights;
  if (int e = launch("flow's weights", lfq::prepare_kernel<T>, 1, lfq::block_size, lfq::sum_scratch(lfq::block_size, 1), stream, f.n_layers,
                     layers, f.n_weights, f.weights, w.weights, w.log_det))
    return e;
  if (!route.direct) return LFQ_OK;
  return launch("flow's layers", lfq::prepare_direct_kernel<T>, f.n_layers + 1, lfq::warp_size, 0, stream, f.n_layers, layers, w.weights,
                w.records, w.record_stride);
}
template <class T>
int run(const char* what, const lfq_flow& f, const flow_route& route, const lfq::flow_arguments<T>& a, void* stream) {
  const flow_residence& r = route.residence;
  if (!r.rows) {
    if (a.task == lfq::flow_task::inverse)
      return launch(what, lfq::inverse_kernel<T>, a.plan.n_slots, a.plan.threads, a.plan.shared_bytes, stream, a.flow, a.plan,
                    a.n_chains, a.forward.z, a.forward.x, a.forward.log_det);
    const auto kernel = route.direct ? lfq::flow_kernel<T, lfq::direct_block> : lfq::flow_kernel<T, lfq::flow_block>;
    return launch(what, kernel, a.plan.n_slots, a.plan.threads, a.plan.shared_bytes, stream, a);
  }
  lfq::resident_flow_arguments<T> to{};
  to.lattice.ndim = 2;
  for (int i = 0; i < 2; ++i) to.lattice.extent[i] = f.layers[0].extent[i];
  to.layers = layers_of(f);
  to.n_chains = a.n_chains;
  to.n_weights = f.n_weights;
  to.weights = a.flow.weights;
  to.log_det = a.flow.log_det;
  to.dweights = a.plan.dweights;
  switch (a.task) {
    case lfq::flow_task::forward:
      to.forward = a.forward;
      return launch_resident_flow(resident_task::forward, r, a.n_chains, to, stream);
    case lfq::flow_task::inverse:
      to.forward = a.forward;
      return launch_resident_flow(resident_task::inverse, r, a.n_chains, to, stream);
    case lfq::flow_task::gradient:
      to.gradient = a.gradient;
      to.lattice.beta = a.gradient.theory.beta;
      to.lattice.lam = a.gradient.theory.lam;
      if (!to.dweights) return launch_resident_flow(resident_task::gradient, r, a.n_chains, to, stream);
      return launch_resident_flow(resident_task::weight_gradient, r, a.plan.n_slots, to, stream);
    case lfq::flow_task::hmc:
      to.hmc = a.hmc;
      return launch_resident_flow(resident_task::hmc, r, a.n_chains, to, stream);
  }
  return LFQ_OK;
}

template <class T>
int forward(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* z, T* x, double* log_det, void* ws, size_t bytes, void* stream) {
  if (int e = check_flow(f, layers, n)) return e;
  if (n > 0 && (!z || !x || !log_det)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  lfq::flow_arguments<T> a;
  const flow_route route = route_of<T>(*f, work::forward, n, nullptr);
  if (int e = prepare(*f, layers, work::forward, n, ws, bytes, stream, route, a)) return e;
  a.task = lfq::flow_task::forward;
  a.forward = {z, x, log_det};
  return run("flow forward", *f, route, a, stream);
}
template <class T>
int inverse(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* x, T* z, double* log_det, void* ws, size_t bytes, void* stream) {
  if (int e = check_flow(f, layers, n)) return e;
  if (n > 0 && (!z || !x || !log_det)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  lfq::flow_arguments<T> a;
  flow_route route = route_of<T>(*f, work::forward, n, nullptr);
  route.direct = false;
  if (int e = prepare(*f, layers, work::forward, n, ws, bytes, stream, route, a)) return e;
  a.task = lfq::flow_task::inverse;
  a.forward = {x, z, log_det};
  return run("flow inverse", *f, route, a, stream);
}

// dweights null when not wanted; factor: of the sum over chains.
template <class T>
int gradient(const lfq_flow& f, const lfq_layer* layers, int64_t n, const lfq::gradient_arguments<T>& of, double* dweights, double factor,
             void* ws, size_t bytes, void* stream) {
  lfq::flow_arguments<T> a;
  const flow_route route = route_of<T>(f, work::gradient, n, of.dx ? nullptr : &of.theory);
  if (int e = prepare(f, layers, work::gradient, n, ws, bytes, stream, route, a)) return e;
  a.task = lfq::flow_task::gradient;
  a.gradient = of;
  const double* partial = a.plan.dweights;
  if (!dweights) a.plan.dweights = nullptr;
  if (int e = run("flow backward", f, route, a, stream)) return e;
  if (!dweights) return LFQ_OK;
  return launch("weight gradient", lfq::weights_kernel, lfq::ceil_div(f.n_weights, lfq::weights_of_block), lfq::block_size,
                lfq::block_size * sizeof(double), stream, a.plan.n_slots, f.n_weights, factor, partial, dweights);
}

template <class T>
int vjp(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* z, const T* dx, const double* dlog_det, T* dz, double* dweights,
        void* ws, size_t bytes, void* stream) {
  if (int e = check_flow(f, layers, n)) return e;
  if (n > 0 && (!z || !dx || !dlog_det || !dz)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return gradient<T>(*f, layers, n, {z, dx, dlog_det, {}, dz, nullptr, nullptr}, dweights, 1.0, ws, bytes, stream);
}
template <class T>
int loss(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, int64_t n, const T* z, double* action, double* log_det,
         double* dweights, void* ws, size_t bytes, void* stream) {
  if (int e = check_flow_on(f, layers, t, n)) return e;
  if (n > 0 && (!z || !action || !log_det || !dweights)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return gradient<T>(*f, layers, n, {z, nullptr, nullptr, *t, nullptr, action, log_det}, dweights, 1.0 / double(n > 0 ? n : 1), ws, bytes,
                     stream);
}
template <class T>
int pullback(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, int64_t n, const T* z, double* action, T* force, void* ws,
             size_t bytes, void* stream) {
  if (int e = check_flow_on(f, layers, t, n)) return e;
  if (n > 0 && (!z || !action || !force)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return gradient<T>(*f, layers, n, {z, nullptr, nullptr, *t, force, action, nullptr}, nullptr, 1.0, ws, bytes, stream);
}

template <class T>
int hmc_arguments(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, const lfq_hmc* h, int64_t n, const T* z, const void* other) {
  if (int e = check_flow_on(f, layers, t, n)) return e;
  if (int e = lfq_hmc_check(h, n)) return fail_check(e);
  if (n > 0 && (!z || !other)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return LFQ_OK;
}
template <class T>
int evolve(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* momenta, void* ws,
           size_t bytes, void* stream) {
  if (int e = hmc_arguments(f, layers, t, h, n, z, momenta)) return e;
  lfq::flow_arguments<T> a;
  const flow_route route = route_of<T>(*f, work::hmc, n, t);
  if (int e = prepare(*f, layers, work::hmc, n, ws, bytes, stream, route, a)) return e;
  a.task = lfq::flow_task::hmc;
  a.hmc = {{*t, *h, lfq::schedule(*h, 1.0), {}, f->volume, n, nullptr, nullptr, nullptr}, z, nullptr, momenta};
  return run("flow-HMC", *f, route, a, stream);
}
template <class T>
int hmc(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* phi, double* dh,
        uint8_t* accepted, const double* smear, double* observables, void* ws, size_t bytes, void* stream) {
  if (int e = hmc_arguments(f, layers, t, h, n, z, phi)) return e;
  if (n > 0 && h->n_samples > 0 && !dh) return fail(LFQ_ERR_ARGUMENT, "dh is null");
  lfq::flow_arguments<T> a;
  a.task = lfq::flow_task::hmc;
  a.hmc = {{*t, *h, lfq::schedule(*h, lfq::momentum_unit(*h)), {}, f->volume, n, dh, accepted, observables}, z, phi, nullptr};
  if (observables)
    if (int e = smearing_of(*t, smear, a.hmc.hmc.smear, least_factor<T>)) return e;
  const flow_route route = route_of<T>(*f, work::hmc, n, t);
  if (int e = prepare(*f, layers, work::hmc, n, ws, bytes, stream, route, a)) return e;
  return run("flow-HMC", *f, route, a, stream);
}

template <class T>
int train_step(const lfq_cuda_training* t, const T* noise, void* stream) {
  if (!t) return fail(LFQ_ERR_ARGUMENT, "training is null");
  if (t->n < 1 || t->n_noise < 0 || t->n_weights < 0 || t->copies < 0) return fail(LFQ_ERR_ARGUMENT, "training: a size is out of range");
  if (!t->target_action || !t->log_det || !t->gradient || !t->weights || !t->first_moment || !t->second_moment || !t->log_w ||
      !t->history || !t->failed_step || (t->copies > 0 && !t->coarse_action) || (t->n_noise > 0 && !noise))
    return fail(LFQ_ERR_ARGUMENT, "training: an array is null");
  if (t->step < 0 || t->step >= t->total_steps) return fail(LFQ_ERR_ARGUMENT, "training: step is out of range");
  const lfq::train_arguments<T> a{t->n, t->n_noise, t->n_weights, t->copies, noise, t->coarse_action, t->target_action, t->log_det,
                                  t->gradient, t->weights, t->first_moment, t->second_moment, t->log_w, t->history, t->failed_step,
                                  t->step, t->total_steps, t->learning_rate};
  constexpr int threads = 1024;
  if (int e = launch("log-weights", lfq::log_weights_kernel<T>, lfq::ceil_div(t->n, lfq::block_size / lfq::warp_size), lfq::block_size, 0,
                     stream, a))
    return e;
  return launch("training step", lfq::train_step_kernel<T>, 1, threads, lfq::sum_scratch(threads, 3), stream, a);
}

}  // namespace
}  // namespace lfq_cuda

using namespace lfq_cuda;

#define LFQ_CUDA_FUNCTIONS(T, F)                                                                                                \
  size_t lfq_cuda_flow_workspace_##F(const lfq_flow* f, int64_t n) { return workspace<T>(f, n); }                               \
  int lfq_cuda_flow_forward_##F(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* z, T* x, double* log_det,       \
                                void* ws, size_t bytes, void* stream) {                                                         \
    return forward(f, layers, n, z, x, log_det, ws, bytes, stream);                                                             \
  }                                                                                                                             \
  int lfq_cuda_flow_inverse_##F(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* x, T* z, double* log_det,       \
                                void* ws, size_t bytes, void* stream) {                                                         \
    return inverse(f, layers, n, x, z, log_det, ws, bytes, stream);                                                             \
  }                                                                                                                             \
  int lfq_cuda_flow_vjp_##F(const lfq_flow* f, const lfq_layer* layers, int64_t n, const T* z, const T* dx,                     \
                            const double* dlog_det, T* dz, double* dweights, void* ws, size_t bytes, void* stream) {            \
    return vjp(f, layers, n, z, dx, dlog_det, dz, dweights, ws, bytes, stream);                                                 \
  }                                                                                                                             \
  int lfq_cuda_flow_loss_##F(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, int64_t n, const T* z,              \
                             double* action, double* log_det, double* dweights, void* ws, size_t bytes, void* stream) {         \
    return loss(f, layers, t, n, z, action, log_det, dweights, ws, bytes, stream);                                              \
  }                                                                                                                             \
  int lfq_cuda_pullback_force_##F(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, int64_t n, const T* z,         \
                                  double* action, T* force, void* ws, size_t bytes, void* stream) {                             \
    return pullback(f, layers, t, n, z, action, force, ws, bytes, stream);                                                      \
  }                                                                                                                             \
  int lfq_cuda_flow_evolve_##F(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, const lfq_hmc* h, int64_t n,      \
                               T* z, T* momenta, void* ws, size_t bytes, void* stream) {                                        \
    return evolve(f, layers, t, h, n, z, momenta, ws, bytes, stream);                                                           \
  }                                                                                                                             \
  int lfq_cuda_flow_hmc_##F(const lfq_flow* f, const lfq_layer* layers, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z,   \
                            T* phi, double* dh, uint8_t* accepted, const double* smear, double* observables, void* ws,          \
                            size_t bytes, void* stream) {                                                                       \
    return hmc(f, layers, t, h, n, z, phi, dh, accepted, smear, observables, ws, bytes, stream);                                \
  }                                                                                                                             \
  int lfq_cuda_train_step_##F(const lfq_cuda_training* t, const T* noise, void* stream) { return train_step(t, noise, stream); }
