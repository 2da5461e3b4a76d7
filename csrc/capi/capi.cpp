// lfq.h: argument checks, then the kernels of the chosen instruction set.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <mutex>

#include "capi/internal.hpp"
#include "capi/inverse_vjp.hpp"
#include "lfq/layers.hpp"
#include "lfq/philox.hpp"

using namespace lfq_internal;

namespace {

thread_local char last_error[256] = "";

int fail(int code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof(last_error), format, args);
  va_end(args);
  return code;
}

// Sizes beyond this overflow 32-bit block counters or memory long before they make sense.
constexpr int64_t max_volume = int64_t(1) << 32;

int64_t volume_of(int32_t ndim, const int32_t* extent) {
  int64_t v = 1;
  for (int i = 0; i < ndim; ++i) v *= extent[i];
  return v;
}

int check_lattice(const char* what, int32_t ndim, const int32_t* extent) {
  if (ndim < 1 || ndim > LFQ_MAX_DIM) return fail(LFQ_ERR_ARGUMENT, "%s: ndim is %d, must be 1 to 4", what, int(ndim));
  int64_t v = 1;
  for (int i = 0; i < ndim; ++i) {
    if (extent[i] < 1) return fail(LFQ_ERR_ARGUMENT, "%s: extent[%d] is %d, must be positive", what, i, int(extent[i]));
    v *= extent[i];
    if (v > max_volume) return fail(LFQ_ERR_ARGUMENT, "%s: more than 2^32 sites", what);
  }
  return LFQ_OK;
}

int check_theory(const lfq_phi4* t) {
  if (!t) return fail(LFQ_ERR_ARGUMENT, "theory is null");
  if (int e = check_lattice("theory", t->ndim, t->extent)) return e;
  if (!std::isfinite(t->beta)) return fail(LFQ_ERR_ARGUMENT, "theory: beta is not finite");
  if (!std::isfinite(t->lam)) return fail(LFQ_ERR_ARGUMENT, "theory: lam is not finite");
  if (t->lam < 0) return fail(LFQ_ERR_ARGUMENT, "theory: lam = %g is negative: the action is unbounded below", t->lam);
  return LFQ_OK;
}

int check_chains(int64_t n_chains) {
  if (n_chains < 0) return fail(LFQ_ERR_ARGUMENT, "n_chains is %lld, must not be negative", (long long)n_chains);
  return LFQ_OK;
}

int check_layer(int index, const lfq_layer& l) {
  char what[32];
  std::snprintf(what, sizeof(what), "layer %d", index);
  if (int e = check_lattice(what, l.ndim, l.extent)) return e;
  if (l.kind < LFQ_LAYER_COUPLING || l.kind > LFQ_LAYER_UPSAMPLE)
    return fail(LFQ_ERR_ARGUMENT, "%s: unknown kind %d", what, int(l.kind));
  if (l.kind != LFQ_LAYER_RESCALE)
    for (int i = 0; i < l.ndim; ++i)
      if (l.extent[i] % 2)
        return fail(LFQ_ERR_ARGUMENT, "%s: extent[%d] = %d is odd; the checkerboard needs even extents", what, i,
                    int(l.extent[i]));
  if (l.kind != LFQ_LAYER_COUPLING) return LFQ_OK;
  if (l.parity != 0 && l.parity != 1) return fail(LFQ_ERR_ARGUMENT, "%s: parity is %d, must be 0 or 1", what, int(l.parity));
  if (l.kernel_size < 3 || l.kernel_size > 9 || l.kernel_size % 2 == 0)
    return fail(LFQ_ERR_ARGUMENT, "%s: kernel_size is %d, must be 3, 5, 7 or 9", what, int(l.kernel_size));
  if (l.n_hidden < 0 || l.n_hidden > LFQ_MAX_HIDDEN)
    return fail(LFQ_ERR_ARGUMENT, "%s: %d hidden layers, must be 0 to %d", what, int(l.n_hidden), LFQ_MAX_HIDDEN);
  for (int i = 0; i < l.n_hidden; ++i)
    if (l.hidden[i] < 1 || l.hidden[i] > LFQ_MAX_CHANNELS)
      return fail(LFQ_ERR_ARGUMENT, "%s: hidden[%d] is %d channels, must be 1 to %d", what, i, int(l.hidden[i]),
                  LFQ_MAX_CHANNELS);
  if (l.activation != LFQ_TANH && l.activation != LFQ_LEAKY_RELU)
    return fail(LFQ_ERR_ARGUMENT, "%s: unknown activation %d", what, int(l.activation));
  if (l.scale < LFQ_SCALE_NEG_ABS || l.scale > LFQ_SCALE_SITE)
    return fail(LFQ_ERR_ARGUMENT, "%s: unknown scale %d", what, int(l.scale));
  const int n = l.n_features;
  if (l.scale == LFQ_SCALE_EVEN ? n != 1 && n != 2 && n != 4 && n != LFQ_MAX_FEATURES : n != 0)
    return fail(LFQ_ERR_ARGUMENT, "%s: n_features is %d, must be %s", what, n,
                l.scale == LFQ_SCALE_EVEN ? "1, 2, 4 or 8" : "0 with this scale");
  if (l.sublattices != 0 && (l.sublattices != 1 || l.n_hidden > 0))
    return fail(LFQ_ERR_ARGUMENT, "%s: sublattices is %d, must be 0 or 1, and 0 with hidden layers", what,
                int(l.sublattices));
  if (l.active || l.frozen) {
    if (!l.sublattices) return fail(LFQ_ERR_ARGUMENT, "%s: active and frozen go with sublattices", what);
    const int64_t all = (int64_t(1) << (1 << l.ndim)) - 1;
    const unsigned same = lfq::sublattices_of_parity(l.ndim, l.parity);
    if (l.active < 1 || l.active > all || (unsigned(l.active) & ~same))
      return fail(LFQ_ERR_ARGUMENT, "%s: active is %d, must be some of the sublattices of parity %d, the bits %u", what,
                  int(l.active), int(l.parity), same);
    if (l.frozen < 1 || l.frozen > all || (l.frozen & l.active))
      return fail(LFQ_ERR_ARGUMENT, "%s: frozen is %d, must be some of the %d sublattices that are not active", what,
                  int(l.frozen), 1 << l.ndim);
  }
  if (l.bias != 0 && l.bias != 1) return fail(LFQ_ERR_ARGUMENT, "%s: bias is %d, must be 0 or 1", what, int(l.bias));
  return LFQ_OK;
}

int check_layers(const lfq_flow* f) {
  if (!f) return fail(LFQ_ERR_ARGUMENT, "flow is null");
  if (f->volume < 1 || f->volume > max_volume) return fail(LFQ_ERR_ARGUMENT, "flow: volume is out of range");
  if (f->n_layers < 0 || f->n_layers > 65536) return fail(LFQ_ERR_ARGUMENT, "flow: n_layers is out of range");
  if (f->n_layers > 0 && !f->layers) return fail(LFQ_ERR_ARGUMENT, "flow: layers is null");
  int64_t weights = 0, volume = -1;
  for (int i = 0; i < f->n_layers; ++i) {
    const lfq_layer& l = f->layers[i];
    if (int e = check_layer(i, l)) return e;
    const int64_t v = lfq::sites_of(l), reads = lfq::resizes(l) ? v >> l.ndim : v;
    if (volume >= 0 && reads != volume)
      return fail(LFQ_ERR_ARGUMENT, "layer %d reads %lld sites, but layer %d writes %lld", i, (long long)reads, i - 1,
                  (long long)volume);
    volume = v;
    if (l.weight_offset != weights)
      return fail(LFQ_ERR_ARGUMENT, "layer %d: weight_offset is %lld, must be %lld", i, (long long)l.weight_offset,
                  (long long)weights);
    weights += lfq::weights_of(l);
  }
  if (volume >= 0 && volume != f->volume)
    return fail(LFQ_ERR_ARGUMENT, "flow: the last layer writes %lld sites, volume is %lld", (long long)volume,
                (long long)f->volume);
  if (weights != f->n_weights)
    return fail(LFQ_ERR_ARGUMENT, "flow: n_weights is %lld, the layers take %lld", (long long)f->n_weights, (long long)weights);
  if (weights > 0 && !f->weights) return fail(LFQ_ERR_ARGUMENT, "flow: weights is null");
  return LFQ_OK;
}

int check_flow(const lfq_flow* f) {
  if (int e = check_layers(f)) return e;
  for (int64_t i = 0; i < f->n_weights; ++i)
    if (!std::isfinite(f->weights[i]))
      return fail(LFQ_ERR_NOT_FINITE, "weights: entry %lld is %g", (long long)i, f->weights[i]);
  return LFQ_OK;
}

int check_flow_on(const lfq_flow* f, const lfq_phi4* t) {
  if (int e = check_theory(t)) return e;
  if (!f) return LFQ_OK;
  if (int e = check_flow(f)) return e;
  if (f->volume != volume_of(t->ndim, t->extent))
    return fail(LFQ_ERR_ARGUMENT, "flow: makes fields of %lld sites, the theory has %lld", (long long)f->volume,
                (long long)volume_of(t->ndim, t->extent));
  return LFQ_OK;
}

int check_workspace(const void* ws, size_t bytes, size_t need) {
  if (!ws || bytes < need) return fail(LFQ_ERR_WORKSPACE, "workspace: %zu bytes given, %zu needed", ws ? bytes : 0, need);
  return LFQ_OK;
}

int check_samples(int64_t n_samples, int32_t thin, uint64_t first_chain, uint64_t first_trajectory, int64_t n_chains) {
  if (thin < 1) return fail(LFQ_ERR_ARGUMENT, "thin is %d, must be positive", int(thin));
  if (n_samples < 0) return fail(LFQ_ERR_ARGUMENT, "n_samples is %lld, must not be negative", (long long)n_samples);
  if (first_chain + uint64_t(n_chains) > (uint64_t(1) << 32)) return fail(LFQ_ERR_ARGUMENT, "first_chain: chains are numbered below 2^32");
  if (first_trajectory >> 56) return fail(LFQ_ERR_ARGUMENT, "first_trajectory: trajectories are numbered below 2^56");
  return LFQ_OK;
}

int check_hmc(const lfq_hmc* h, int64_t n_chains) {
  if (!h) return fail(LFQ_ERR_ARGUMENT, "hmc is null");
  if (h->integrator.n_stages < 1 || h->integrator.n_stages > LFQ_MAX_STAGES)
    return fail(LFQ_ERR_ARGUMENT, "integrator: n_stages is %d, must be 1 to %d", int(h->integrator.n_stages), LFQ_MAX_STAGES);
  if (!std::isfinite(h->step_size) || h->step_size == 0)
    return fail(LFQ_ERR_ARGUMENT, "step_size is %g, must be finite and not zero", h->step_size);
  bool moves = false;
  for (int i = 0; i < h->integrator.n_stages; ++i) moves = moves || h->integrator.drift[i] != 0;
  if (!moves) return fail(LFQ_ERR_ARGUMENT, "integrator: every drift is 0");
  if (h->n_steps < 1) return fail(LFQ_ERR_ARGUMENT, "n_steps is %d, must be positive", int(h->n_steps));
  if (int e = check_samples(h->n_samples, h->thin, h->first_chain, h->first_trajectory, n_chains)) return e;
  if (h->n_steps_spread < 0 || h->n_steps_spread >= h->n_steps)
    return fail(LFQ_ERR_ARGUMENT, "n_steps_spread is %d, must be 0 to n_steps - 1", int(h->n_steps_spread));
  return LFQ_OK;
}

int check_cluster(const lfq_cluster* c, const lfq_phi4* t) {
  if (!c) return fail(LFQ_ERR_ARGUMENT, "cluster is null");
  if (c->kind != LFQ_CLUSTER_SWENDSEN_WANG && c->kind != LFQ_CLUSTER_WOLFF)
    return fail(LFQ_ERR_ARGUMENT, "cluster: unknown kind %d", int(c->kind));
  if (c->n_updates < 0 || c->n_updates * volume_of(t->ndim, t->extent) > max_volume)
    return fail(LFQ_ERR_ARGUMENT, "cluster: n_updates is %d, must be 0 to 2^32 / volume", int(c->n_updates));
  return LFQ_OK;
}

int threads(int32_t n) { return n > 0 ? (n < 1024 ? n : 1024) : max_threads(); }

int not_finite(const char* what, int code, const lfq_failure& f) {
  if (code != LFQ_ERR_NOT_FINITE) return code;
  return fail(code, "%s: chain %lld has %g at site %lld", what, (long long)f.chain, f.value, (long long)f.step);
}

template <class T>
int normal(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains, int64_t n, T* out,
           int32_t n_threads) {
  if (int e = check_chains(n_chains)) return e;
  if (purpose < 0 || purpose > 255) return fail(LFQ_ERR_ARGUMENT, "purpose is %d, must be 0 to 255", int(purpose));
  if (n < 0 || n > max_volume) return fail(LFQ_ERR_ARGUMENT, "n_per_chain is out of range");
  if (!out && n_chains * n > 0) return fail(LFQ_ERR_ARGUMENT, "out is null");
  if (first_chain + uint64_t(n_chains) > (uint64_t(1) << 32)) return fail(LFQ_ERR_ARGUMENT, "first_chain: chains are numbered below 2^32");
  return table<T>().normal(seed, purpose, trajectory, first_chain, n_chains, n, out, threads(n_threads));
}

template <class T>
size_t phi4_workspace(const lfq_phi4* t, int64_t n_chains, int32_t n_threads) {
  return check_theory(t) || check_chains(n_chains) ? 0 : table<T>().phi4_workspace(*t, n_chains, threads(n_threads));
}

template <class T>
int phi4_arguments(const lfq_phi4* t, int64_t n_chains, const T* phi, const void* out, const void* ws, size_t bytes, int32_t n_threads) {
  if (int e = check_theory(t)) return e;
  if (int e = check_chains(n_chains)) return e;
  if (!phi || !out) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return check_workspace(ws, bytes, phi4_workspace<T>(t, n_chains, n_threads));
}

template <class T>
int action(const lfq_phi4* t, int64_t n, const T* phi, double* s, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = phi4_arguments(t, n, phi, s, ws, bytes, n_threads)) return e;
  lfq_failure f;
  return not_finite("phi", table<T>().action(*t, n, phi, s, &f, ws, threads(n_threads)), f);
}
template <class T>
int force(const lfq_phi4* t, int64_t n, const T* phi, T* out, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = phi4_arguments(t, n, phi, out, ws, bytes, n_threads)) return e;
  lfq_failure f;
  return not_finite("phi", table<T>().force(*t, n, phi, out, &f, ws, threads(n_threads)), f);
}
template <class T>
int observables(const lfq_phi4* t, int64_t n, const T* phi, const double* smear, double* out, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = phi4_arguments(t, n, phi, out, ws, bytes, n_threads)) return e;
  if (!smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  lfq_failure f;
  return not_finite("phi", table<T>().observables(*t, n, phi, smear, out, &f, ws, threads(n_threads)), f);
}

template <class T>
size_t flow_workspace(const lfq_flow* f, int64_t n_chains, int32_t n_threads) {
  return check_flow(f) || check_chains(n_chains) ? 0 : table<T>().flow_workspace(*f, n_chains, threads(n_threads));
}
template <class T>
int flow_arguments(const lfq_flow* f, int64_t n, const void* in, const void* out, const void* ws, size_t bytes, int32_t n_threads) {
  if (int e = check_flow(f)) return e;
  if (int e = check_chains(n)) return e;
  if (!in || !out) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return check_workspace(ws, bytes, table<T>().flow_workspace(*f, n, threads(n_threads)));
}
template <class T>
int forward(const lfq_flow* f, int64_t n, const T* z, T* x, double* ld, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = flow_arguments<T>(f, n, z, ld ? x : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return not_finite("z", table<T>().forward(*f, n, z, x, ld, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int inverse(const lfq_flow* f, int64_t n, const T* x, T* z, double* ld, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = flow_arguments<T>(f, n, x, ld ? z : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return not_finite("x", table<T>().inverse(*f, n, x, z, ld, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int vjp(const lfq_flow* f, int64_t n, const T* z, const T* dx, const double* dld, T* dz, double* dw, void* ws, size_t bytes,
        int32_t n_threads) {
  if (int e = flow_arguments<T>(f, n, z, dx && dld ? dz : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return not_finite("z or dx", table<T>().vjp(*f, n, z, dx, dld, dz, dw, &bad, ws, threads(n_threads)), bad);
}
template <class T>
size_t flow_inverse_vjp_workspace(const lfq_flow* f, int64_t n, int32_t n_threads) {
  return check_flow(f) || check_chains(n) ? 0 : inverse_vjp<T>(*f, n, threads(n_threads)).bytes();
}
template <class T>
int flow_inverse_vjp(const lfq_flow* f, int64_t n, const T* z, const T* dz, const double* dld, T* dx, double* dw, void* ws,
                     size_t bytes, int32_t n_threads) {
  if (int e = check_flow(f)) return e;
  if (int e = check_chains(n)) return e;
  if (!z || !dz || !dld || !dx) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  inverse_vjp<T> layers(*f, n, threads(n_threads));
  if (int e = check_workspace(ws, bytes, layers.bytes())) return e;
  lfq_failure bad;
  return not_finite("z or dz", layers.run(z, dz, dld, dx, dw, &bad, ws), bad);
}
template <class T>
int loss(const lfq_flow* f, const lfq_phi4* t, int64_t n, const T* z, double* s, double* ld, double* dw, void* ws, size_t bytes,
         int32_t n_threads) {
  if (int e = check_flow_on(f, t)) return e;
  if (int e = flow_arguments<T>(f, n, z, s && ld ? dw : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return not_finite("z", table<T>().loss(*f, *t, n, z, s, ld, dw, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int pullback(const lfq_flow* f, const lfq_phi4* t, int64_t n, const T* z, double* s, T* out, void* ws, size_t bytes,
             int32_t n_threads) {
  if (int e = check_flow_on(f, t)) return e;
  if (int e = flow_arguments<T>(f, n, z, s ? out : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return not_finite("z", table<T>().pullback(*f, *t, n, z, s, out, &bad, ws, threads(n_threads)), bad);
}

int diverged(int code, const lfq_hmc* h, const lfq_failure& bad, lfq_failure* failure) {
  if (failure) *failure = bad;
  if (code != LFQ_ERR_NOT_FINITE) return code;
  return fail(code, "dH or the field is %g in chain %lld (trajectory or site %lld): the step size %g may be too large",
              bad.value, (long long)(int64_t(h->first_chain) + bad.chain), (long long)bad.step, h->step_size);
}

template <class T>
size_t hmc_workspace(const lfq_flow* f, const lfq_phi4* t, int64_t n, int32_t n_threads) {
  return check_flow_on(f, t) || check_chains(n) ? 0 : table<T>().hmc_workspace(f, *t, n, threads(n_threads));
}
template <class T>
int hmc_arguments(const lfq_flow* f, const lfq_phi4* t, const lfq_hmc* h, int64_t n, const T* z, const void* ws, size_t bytes,
                  int32_t n_threads) {
  if (int e = check_flow_on(f, t)) return e;
  if (int e = check_chains(n)) return e;
  if (int e = check_hmc(h, n)) return e;
  if (!z) return fail(LFQ_ERR_ARGUMENT, "z is null");
  return check_workspace(ws, bytes, table<T>().hmc_workspace(f, *t, n, threads(n_threads)));
}
template <class T>
int evolve(const lfq_flow* f, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* pi, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = hmc_arguments(f, t, h, n, z, ws, bytes, n_threads)) return e;
  if (!pi) return fail(LFQ_ERR_ARGUMENT, "momenta is null");
  lfq_failure bad;
  return not_finite("z or momenta", table<T>().evolve(f, *t, *h, n, z, pi, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int hmc(const lfq_flow* f, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* phi, double* dh, uint8_t* accepted,
        const double* smear, double* obs, lfq_failure* failure, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = hmc_arguments(f, t, h, n, z, ws, bytes, n_threads)) return e;
  if (obs && !smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  lfq_failure bad;
  const int code = table<T>().hmc(f, *t, *h, n, z, phi, dh, accepted, smear, obs, &bad, ws, threads(n_threads));
  return diverged(code, h, bad, failure);
}

int check_mass(double mass) {
  if (!std::isfinite(mass) || mass <= 0) return fail(LFQ_ERR_ARGUMENT, "mass is %g, must be positive", mass);
  return LFQ_OK;
}
template <class T>
size_t fourier_workspace(const lfq_phi4* t, int64_t n, int32_t n_threads) {
  return check_theory(t) || check_chains(n) ? 0 : table<T>().fourier_workspace(*t, n, threads(n_threads));
}
template <class T>
int fourier_arguments(const lfq_phi4* t, const lfq_hmc* h, double mass, int64_t n, const T* phi, const void* ws,
                      size_t bytes, int32_t n_threads) {
  if (int e = check_theory(t)) return e;
  if (int e = check_chains(n)) return e;
  if (int e = check_hmc(h, n)) return e;
  if (int e = check_mass(mass)) return e;
  if (!phi) return fail(LFQ_ERR_ARGUMENT, "phi is null");
  return check_workspace(ws, bytes, fourier_workspace<T>(t, n, n_threads));
}
template <class T>
int fourier_evolve(const lfq_phi4* t, const lfq_hmc* h, double mass, int64_t n, T* phi, T* pi, void* ws, size_t bytes,
                   int32_t n_threads) {
  if (int e = fourier_arguments(t, h, mass, n, phi, ws, bytes, n_threads)) return e;
  if (!pi) return fail(LFQ_ERR_ARGUMENT, "momenta is null");
  lfq_failure bad;
  return not_finite("phi or momenta", table<T>().fourier_evolve(*t, *h, mass, n, phi, pi, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int fourier_hmc(const lfq_phi4* t, const lfq_hmc* h, double mass, int64_t n, T* phi, double* dh, uint8_t* accepted,
                const double* smear, double* obs, lfq_failure* failure, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = fourier_arguments(t, h, mass, n, phi, ws, bytes, n_threads)) return e;
  if (obs && !smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  lfq_failure bad;
  const int code = table<T>().fourier_hmc(*t, *h, mass, n, phi, dh, accepted, smear, obs, &bad, ws, threads(n_threads));
  return diverged(code, h, bad, failure);
}

template <class T>
size_t cluster_workspace(const lfq_phi4* t, int64_t n, int32_t n_threads) {
  return check_theory(t) || check_chains(n) ? 0 : table<T>().cluster_workspace(*t, n, threads(n_threads));
}
template <class T>
int cluster_update(const lfq_phi4* t, const lfq_cluster* c, uint64_t seed, uint64_t first_chain, uint64_t trajectory,
                   int64_t n, T* phi, int64_t* flipped, void* ws, size_t bytes, int32_t n_threads) {
  if (int e = check_theory(t)) return e;
  if (int e = check_chains(n)) return e;
  if (int e = check_cluster(c, t)) return e;
  if (!phi) return fail(LFQ_ERR_ARGUMENT, "phi is null");
  if (first_chain + uint64_t(n) > (uint64_t(1) << 32)) return fail(LFQ_ERR_ARGUMENT, "first_chain: chains are numbered below 2^32");
  if (trajectory >> 56) return fail(LFQ_ERR_ARGUMENT, "trajectory: trajectories are numbered below 2^56");
  if (int e = check_workspace(ws, bytes, cluster_workspace<T>(t, n, n_threads))) return e;
  lfq_failure bad;
  const int code = table<T>().cluster(*t, *c, seed, first_chain, trajectory, n, phi, flipped, &bad, ws, threads(n_threads));
  return not_finite("phi", code, bad);
}

// Clusters in turn with another update need a chain whole and not in lanes: a task takes these many chains
// through all of its trajectories while they are in cache.
constexpr int64_t chains_per_task = 16;

struct cluster_spaces {
  size_t other, cluster, observables;
  size_t total() const { return other + cluster + observables; }
};
template <class T>
cluster_spaces spaces_of(const lfq_phi4& t, size_t other) {
  const auto& k = table<T>();
  return {other, k.cluster_workspace(t, chains_per_task, 1), k.phi4_workspace(t, chains_per_task, 1)};
}
template <class T>
cluster_spaces hmc_spaces(const lfq_phi4& t) {
  return spaces_of<T>(t, table<T>().hmc_workspace(nullptr, t, chains_per_task, 1));
}
template <class T>
cluster_spaces heat_bath_spaces(const lfq_phi4& t) {
  return spaces_of<T>(t, table<T>().heat_bath_workspace(t, chains_per_task, 1));
}
int64_t cluster_tasks(int64_t n) { return (n + chains_per_task - 1) / chains_per_task; }
size_t cluster_bytes(const cluster_spaces& spaces, int64_t n, int32_t n_threads) {
  const int64_t tasks = cluster_tasks(n), most = threads(n_threads);
  return spaces.total() * size_t(tasks < most ? (tasks > 0 ? tasks : 1) : most);
}

// All trajectories of `settings` (lfq_hmc or lfq_heat_bath), with clusters after each. update(one, m, field, at, bad,
// space): the other update, of m chains whose outputs begin at `at`, by the settings of one trajectory.
template <class T, class S, class F>
int with_clusters(const lfq_phi4& t, const S& settings, const lfq_cluster& c, int64_t n, T* phi, int64_t* flipped,
                  const double* smear, double* obs, lfq_failure* failure, const cluster_spaces& spaces, void* ws,
                  int32_t n_threads, F&& update) {
  const auto& k = table<T>();
  const int64_t volume = volume_of(t.ndim, t.extent);
  std::mutex mutex;
  int worst = LFQ_OK;
  *failure = {-1, -1, 0.0};
  auto task = [&](int64_t index, int thread) {
    const int64_t first = index * chains_per_task;
    const int64_t m = n - first < chains_per_task ? n - first : chains_per_task;
    char* space = static_cast<char*>(ws) + size_t(thread) * spaces.total();
    T* field = phi + first * volume;
    S one = settings;
    one.first_chain += uint64_t(first);
    one.n_samples = one.thin = 1;
    lfq_failure bad;
    int code = LFQ_OK;
    int64_t done = 0;
    for (int64_t sample = 0; sample < settings.n_samples && code == LFQ_OK; ++sample) {
      for (int32_t i = 0; i < settings.thin && code == LFQ_OK; ++i, ++done) {
        const int64_t at = done * n + first;
        one.first_trajectory = settings.first_trajectory + uint64_t(done);
        code = update(one, m, field, at, &bad, space);
        if (code == LFQ_OK)
          code = k.cluster(t, c, settings.seed, one.first_chain, one.first_trajectory, m, field,
                           flipped ? flipped + at : nullptr, &bad, space + spaces.other, 1);
      }
      if (code == LFQ_OK && obs)
        code = k.observables(t, m, field, smear, obs + (sample * n + first) * LFQ_N_OBSERVABLES, &bad,
                             space + spaces.other + spaces.cluster, 1);
    }
    if (code == LFQ_OK) return;
    std::lock_guard<std::mutex> lock(mutex);
    if (worst == LFQ_OK || first + bad.chain < failure->chain) *failure = {first + bad.chain, bad.step, bad.value};
    worst = code;
  };
  for_tasks(cluster_tasks(n), threads(n_threads), task);
  return worst;
}

template <class T>
size_t cluster_hmc_workspace(const lfq_phi4* t, int64_t n, int32_t n_threads) {
  return check_theory(t) || check_chains(n) ? 0 : cluster_bytes(hmc_spaces<T>(*t), n, n_threads);
}
template <class T>
int cluster_hmc(const lfq_phi4* t, const lfq_hmc* h, const lfq_cluster* c, int64_t n, T* phi, double* dh,
                uint8_t* accepted, int64_t* flipped, const double* smear, double* obs, lfq_failure* failure, void* ws,
                size_t bytes, int32_t n_threads) {
  if (int e = check_theory(t)) return e;
  if (int e = check_chains(n)) return e;
  if (int e = check_hmc(h, n)) return e;
  if (int e = check_cluster(c, t)) return e;
  if (!phi) return fail(LFQ_ERR_ARGUMENT, "phi is null");
  if (obs && !smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  if (int e = check_workspace(ws, bytes, cluster_hmc_workspace<T>(t, n, n_threads))) return e;
  lfq_failure bad;
  const auto update = [&](const lfq_hmc& one, int64_t m, T* field, int64_t at, lfq_failure* f, void* space) {
    return table<T>().hmc(nullptr, *t, one, m, field, nullptr, dh ? dh + at : nullptr, accepted ? accepted + at : nullptr,
                          smear, nullptr, f, space, 1);
  };
  const int code = with_clusters<T>(*t, *h, *c, n, phi, flipped, smear, obs, &bad, hmc_spaces<T>(*t), ws, n_threads, update);
  return diverged(code, h, bad, failure);
}

int check_heat_bath(const lfq_heat_bath* h, const lfq_phi4* t, int64_t n_chains) {
  if (!h) return fail(LFQ_ERR_ARGUMENT, "heat_bath is null");
  if (h->n_sweeps < 0 || h->n_sweeps * volume_of(t->ndim, t->extent) > max_volume)
    return fail(LFQ_ERR_ARGUMENT, "n_sweeps is %d, must be 0 to 2^32 / volume", int(h->n_sweeps));
  return check_samples(h->n_samples, h->thin, h->first_chain, h->first_trajectory, n_chains);
}
template <class T>
size_t heat_bath_workspace(const lfq_phi4* t, int64_t n, int32_t n_threads) {
  if (check_theory(t) || check_chains(n)) return 0;
  const size_t alone = table<T>().heat_bath_workspace(*t, n, threads(n_threads));
  const size_t with = cluster_bytes(heat_bath_spaces<T>(*t), n, n_threads);
  return alone > with ? alone : with;
}
template <class T>
int heat_bath(const lfq_phi4* t, const lfq_heat_bath* h, const lfq_cluster* c, int64_t n, T* phi, int64_t* changed,
              int64_t* flipped, const double* smear, double* obs, lfq_failure* failure, void* ws, size_t bytes,
              int32_t n_threads) {
  if (int e = check_theory(t)) return e;
  if (int e = check_chains(n)) return e;
  if (int e = check_heat_bath(h, t, n)) return e;
  if (c)
    if (int e = check_cluster(c, t)) return e;
  if (!phi) return fail(LFQ_ERR_ARGUMENT, "phi is null");
  if (obs && !smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  if (int e = check_workspace(ws, bytes, heat_bath_workspace<T>(t, n, n_threads))) return e;
  const auto& k = table<T>();
  lfq_failure bad;
  int code;
  if (c) {
    const auto update = [&](const lfq_heat_bath& one, int64_t m, T* field, int64_t at, lfq_failure* f, void* space) {
      return k.heat_bath(*t, one, m, field, changed ? changed + at : nullptr, smear, nullptr, f, space, 1);
    };
    code = with_clusters<T>(*t, *h, *c, n, phi, flipped, smear, obs, &bad, heat_bath_spaces<T>(*t), ws, n_threads, update);
  } else {
    code = k.heat_bath(*t, *h, n, phi, changed, smear, obs, &bad, ws, threads(n_threads));
    for (int64_t i = 0; flipped && i < h->n_samples * h->thin * n; ++i) flipped[i] = 0;
  }
  if (failure) *failure = bad;
  return not_finite("phi", code, bad);
}

template <class T>
int check_custom(const lfq_flow* f, const custom_action<T>* a) {
  if (!a) return fail(LFQ_ERR_ARGUMENT, "action is null");
  if (int e = check_lattice("action", a->ndim, a->extent)) return e;
  if (!a->evaluate) return fail(LFQ_ERR_ARGUMENT, "action: evaluate is null");
  if (!f) return LFQ_OK;
  if (int e = check_flow(f)) return e;
  if (f->volume != volume_of(a->ndim, a->extent))
    return fail(LFQ_ERR_ARGUMENT, "flow: makes fields of %lld sites, the action has %lld", (long long)f->volume,
                (long long)volume_of(a->ndim, a->extent));
  return LFQ_OK;
}
template <class T>
size_t custom_workspace(const lfq_flow* f, const custom_action<T>* a, int64_t n, int32_t n_threads) {
  return check_custom<T>(f, a) || check_chains(n) ? 0 : table<T>().custom_workspace(f, *a, n, threads(n_threads));
}
template <class T>
int custom_arguments(const lfq_flow* f, const custom_action<T>* a, int64_t n, const T* z, const void* out, const void* ws,
                     size_t bytes, int32_t n_threads) {
  if (int e = check_custom<T>(f, a)) return e;
  if (int e = check_chains(n)) return e;
  if (!z || !out) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  return check_workspace(ws, bytes, table<T>().custom_workspace(f, *a, n, threads(n_threads)));
}
int stopped(int code, const lfq_failure& bad) {
  return code == LFQ_ERR_CALLBACK ? fail(code, "action: evaluate returned %d", int(bad.value)) : not_finite("z", code, bad);
}
template <class T>
int custom_force(const lfq_flow* f, const custom_action<T>* a, int64_t n, const T* z, double* s, T* force, void* ws,
                 size_t bytes, int32_t n_threads) {
  if (int e = custom_arguments<T>(f, a, n, z, s ? force : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return stopped(table<T>().custom_force(f, *a, n, z, s, force, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int custom_evolve(const lfq_flow* f, const custom_action<T>* a, const lfq_hmc* h, int64_t n, T* z, T* pi, void* ws,
                  size_t bytes, int32_t n_threads) {
  if (int e = custom_arguments<T>(f, a, n, z, pi, ws, bytes, n_threads)) return e;
  if (int e = check_hmc(h, n)) return e;
  lfq_failure bad;
  return stopped(table<T>().custom_evolve(f, *a, *h, n, z, pi, &bad, ws, threads(n_threads)), bad);
}
template <class T>
int custom_hmc(const lfq_flow* f, const custom_action<T>* a, const lfq_hmc* h, int64_t n, T* z, T* phi, double* dh,
               uint8_t* accepted, const double* smear, double* obs, lfq_failure* failure, void* ws, size_t bytes,
               int32_t n_threads) {
  if (int e = custom_arguments<T>(f, a, n, z, z, ws, bytes, n_threads)) return e;
  if (int e = check_hmc(h, n)) return e;
  if (obs && !smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  lfq_failure bad;
  const int code = table<T>().custom_hmc(f, *a, *h, n, z, phi, dh, accepted, smear, obs, &bad, ws, threads(n_threads));
  if (failure) *failure = bad;
  return code == LFQ_ERR_CALLBACK ? stopped(code, bad) : diverged(code, h, bad, failure);
}
template <class T>
int custom_loss(const lfq_flow* f, const custom_action<T>* a, int64_t n, const T* z, double* s, double* ld, double* dw,
                void* ws, size_t bytes, int32_t n_threads) {
  if (!f) return fail(LFQ_ERR_ARGUMENT, "flow is null");
  if (int e = custom_arguments<T>(f, a, n, z, s && ld ? dw : nullptr, ws, bytes, n_threads)) return e;
  lfq_failure bad;
  return stopped(table<T>().custom_loss(*f, *a, n, z, s, ld, dw, &bad, ws, threads(n_threads)), bad);
}

}  // namespace

extern "C" {

const char* lfq_version(void) { return LFQ_VERSION; }
int32_t lfq_abi_version(void) { return LFQ_ABI_VERSION; }
const char* lfq_last_error(void) { return last_error; }
const char* lfq_status_message(int status) {
  switch (status) {
    case LFQ_OK: return "success";
    case LFQ_ERR_ARGUMENT: return "an argument is out of range";
    case LFQ_ERR_WORKSPACE: return "the workspace is too small";
    case LFQ_ERR_NOT_FINITE: return "NaN or Inf in a field, a weight or dH";
    case LFQ_ERR_CALLBACK: return "the action asked to stop";
    case LFQ_ERR_CUDA: return "a call of the CUDA runtime failed";
  }
  return "unknown status";
}
int32_t lfq_max_threads(void) { return max_threads(); }

void lfq_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  for (int i = 0; i < 4; ++i) out[i] = counter[i];
  lfq::philox4x32(out[0], out[1], out[2], out[3], key[0], key[1]);
}

int64_t lfq_layer_n_weights(const lfq_layer* l) {
  if (!l || l->ndim < 1 || l->ndim > LFQ_MAX_DIM) return 0;
  if (l->kind == LFQ_LAYER_COUPLING && (l->n_hidden < 0 || l->n_hidden > LFQ_MAX_HIDDEN)) return 0;
  return lfq::weights_of(*l);
}
int lfq_flow_check(const lfq_flow* flow) { return check_flow(flow); }
int lfq_flow_check_layers(const lfq_flow* flow) { return check_layers(flow); }
int lfq_phi4_check(const lfq_phi4* theory) { return check_theory(theory); }
int lfq_hmc_check(const lfq_hmc* hmc, int64_t n_chains) {
  if (int e = check_chains(n_chains)) return e;
  return check_hmc(hmc, n_chains);
}

int lfq_uniform(uint64_t seed, int32_t purpose, uint64_t first_trajectory, int64_t n_trajectories, uint64_t first_chain,
                int64_t n_chains, double* out) {
  if (int e = check_chains(n_chains)) return e;
  if (purpose < 0 || purpose > 255) return fail(LFQ_ERR_ARGUMENT, "purpose is %d, must be 0 to 255", int(purpose));
  if (n_trajectories < 0) return fail(LFQ_ERR_ARGUMENT, "n_trajectories must not be negative");
  if (!out && n_trajectories * n_chains > 0) return fail(LFQ_ERR_ARGUMENT, "out is null");
  if (first_chain + uint64_t(n_chains) > (uint64_t(1) << 32)) return fail(LFQ_ERR_ARGUMENT, "first_chain: chains are numbered below 2^32");
  for (int64_t j = 0; j < n_trajectories; ++j) {
    const lfq::stream rng{seed, first_trajectory + uint64_t(j), uint32_t(purpose)};
    for (int64_t i = 0; i < n_chains; ++i) {
      uint32_t x0 = 0, x1 = rng.word1(), x2 = uint32_t(first_chain + uint64_t(i)), x3 = rng.word3();
      lfq::philox4x32(x0, x1, x2, x3, uint32_t(seed), uint32_t(seed >> 32));
      out[j * n_chains + i] = lfq::uniform53(x0, x1);
    }
  }
  return LFQ_OK;
}

#define LFQ_DEFINE(T, S)                                                                                              \
  int lfq_normal_##S(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains,     \
                     int64_t n, T* out, int32_t n_threads) {                                                          \
    return normal<T>(seed, purpose, trajectory, first_chain, n_chains, n, out, n_threads);                            \
  }                                                                                                                   \
  size_t lfq_phi4_workspace_##S(const lfq_phi4* t, int64_t n, int32_t nt) { return phi4_workspace<T>(t, n, nt); }     \
  int lfq_phi4_action_##S(const lfq_phi4* t, int64_t n, const T* phi, double* s, void* ws, size_t b, int32_t nt) {    \
    return action<T>(t, n, phi, s, ws, b, nt);                                                                        \
  }                                                                                                                   \
  int lfq_phi4_force_##S(const lfq_phi4* t, int64_t n, const T* phi, T* f, void* ws, size_t b, int32_t nt) {          \
    return force<T>(t, n, phi, f, ws, b, nt);                                                                         \
  }                                                                                                                   \
  int lfq_phi4_observables_##S(const lfq_phi4* t, int64_t n, const T* phi, const double* smear, double* o, void* ws,  \
                               size_t b, int32_t nt) {                                                                \
    return observables<T>(t, n, phi, smear, o, ws, b, nt);                                                            \
  }                                                                                                                   \
  size_t lfq_flow_workspace_##S(const lfq_flow* f, int64_t n, int32_t nt) { return flow_workspace<T>(f, n, nt); }     \
  int lfq_flow_forward_##S(const lfq_flow* f, int64_t n, const T* z, T* x, double* ld, void* ws, size_t b,            \
                           int32_t nt) {                                                                              \
    return forward<T>(f, n, z, x, ld, ws, b, nt);                                                                     \
  }                                                                                                                   \
  int lfq_flow_inverse_##S(const lfq_flow* f, int64_t n, const T* x, T* z, double* ld, void* ws, size_t b,            \
                           int32_t nt) {                                                                              \
    return inverse<T>(f, n, x, z, ld, ws, b, nt);                                                                     \
  }                                                                                                                   \
  int lfq_flow_vjp_##S(const lfq_flow* f, int64_t n, const T* z, const T* dx, const double* dld, T* dz, double* dw,   \
                       void* ws, size_t b, int32_t nt) {                                                              \
    return vjp<T>(f, n, z, dx, dld, dz, dw, ws, b, nt);                                                               \
  }                                                                                                                   \
  size_t lfq_flow_inverse_vjp_workspace_##S(const lfq_flow* f, int64_t n, int32_t nt) {                               \
    return flow_inverse_vjp_workspace<T>(f, n, nt);                                                                   \
  }                                                                                                                   \
  int lfq_flow_inverse_vjp_##S(const lfq_flow* f, int64_t n, const T* z, const T* dz, const double* dld, T* dx,       \
                               double* dw, void* ws, size_t b, int32_t nt) {                                          \
    return flow_inverse_vjp<T>(f, n, z, dz, dld, dx, dw, ws, b, nt);                                                  \
  }                                                                                                                   \
  int lfq_flow_loss_##S(const lfq_flow* f, const lfq_phi4* t, int64_t n, const T* z, double* s, double* ld,           \
                        double* dw, void* ws, size_t b, int32_t nt) {                                                 \
    return loss<T>(f, t, n, z, s, ld, dw, ws, b, nt);                                                                 \
  }                                                                                                                   \
  int lfq_pullback_force_##S(const lfq_flow* f, const lfq_phi4* t, int64_t n, const T* z, double* s, T* out,          \
                             void* ws, size_t b, int32_t nt) {                                                        \
    return pullback<T>(f, t, n, z, s, out, ws, b, nt);                                                                \
  }                                                                                                                   \
  size_t lfq_hmc_workspace_##S(const lfq_flow* f, const lfq_phi4* t, int64_t n, int32_t nt) {                         \
    return hmc_workspace<T>(f, t, n, nt);                                                                             \
  }                                                                                                                   \
  int lfq_evolve_##S(const lfq_flow* f, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* pi, void* ws,        \
                     size_t b, int32_t nt) {                                                                          \
    return evolve<T>(f, t, h, n, z, pi, ws, b, nt);                                                                   \
  }                                                                                                                   \
  int lfq_hmc_##S(const lfq_flow* f, const lfq_phi4* t, const lfq_hmc* h, int64_t n, T* z, T* phi, double* dh,        \
                  uint8_t* a, const double* smear, double* o, lfq_failure* bad, void* ws, size_t b, int32_t nt) {     \
    return hmc<T>(f, t, h, n, z, phi, dh, a, smear, o, bad, ws, b, nt);                                               \
  }                                                                                                                   \
  size_t lfq_fourier_workspace_##S(const lfq_phi4* t, int64_t n, int32_t nt) { return fourier_workspace<T>(t, n, nt); } \
  int lfq_fourier_evolve_##S(const lfq_phi4* t, const lfq_hmc* h, double mass, int64_t n, T* phi, T* pi, void* ws,    \
                             size_t b, int32_t nt) {                                                                  \
    return fourier_evolve<T>(t, h, mass, n, phi, pi, ws, b, nt);                                                      \
  }                                                                                                                   \
  int lfq_fourier_hmc_##S(const lfq_phi4* t, const lfq_hmc* h, double mass, int64_t n, T* phi, double* dh, uint8_t* a, \
                          const double* smear, double* o, lfq_failure* bad, void* ws, size_t b, int32_t nt) {         \
    return fourier_hmc<T>(t, h, mass, n, phi, dh, a, smear, o, bad, ws, b, nt);                                       \
  }                                                                                                                   \
  size_t lfq_cluster_workspace_##S(const lfq_phi4* t, int64_t n, int32_t nt) { return cluster_workspace<T>(t, n, nt); } \
  int lfq_cluster_update_##S(const lfq_phi4* t, const lfq_cluster* c, uint64_t seed, uint64_t first_chain,            \
                             uint64_t trajectory, int64_t n, T* phi, int64_t* flipped, void* ws, size_t b,            \
                             int32_t nt) {                                                                            \
    return cluster_update<T>(t, c, seed, first_chain, trajectory, n, phi, flipped, ws, b, nt);                        \
  }                                                                                                                   \
  size_t lfq_cluster_hmc_workspace_##S(const lfq_phi4* t, int64_t n, int32_t nt) {                                    \
    return cluster_hmc_workspace<T>(t, n, nt);                                                                        \
  }                                                                                                                   \
  int lfq_cluster_hmc_##S(const lfq_phi4* t, const lfq_hmc* h, const lfq_cluster* c, int64_t n, T* phi, double* dh,   \
                          uint8_t* a, int64_t* flipped, const double* smear, double* o, lfq_failure* bad, void* ws,   \
                          size_t b, int32_t nt) {                                                                     \
    return cluster_hmc<T>(t, h, c, n, phi, dh, a, flipped, smear, o, bad, ws, b, nt);                                 \
  }                                                                                                                   \
  size_t lfq_heat_bath_workspace_##S(const lfq_phi4* t, int64_t n, int32_t nt) {                                      \
    return heat_bath_workspace<T>(t, n, nt);                                                                          \
  }                                                                                                                   \
  int lfq_heat_bath_##S(const lfq_phi4* t, const lfq_heat_bath* h, const lfq_cluster* c, int64_t n, T* phi,           \
                        int64_t* changed, int64_t* flipped, const double* smear, double* o, lfq_failure* bad, void* ws, \
                        size_t b, int32_t nt) {                                                                       \
    return heat_bath<T>(t, h, c, n, phi, changed, flipped, smear, o, bad, ws, b, nt);                                 \
  }                                                                                                                   \
  size_t lfq_custom_workspace_##S(const lfq_flow* f, const lfq_custom_##S* a, int64_t n, int32_t nt) {                \
    return custom_workspace<T>(f, a, n, nt);                                                                          \
  }                                                                                                                   \
  int lfq_custom_force_##S(const lfq_flow* f, const lfq_custom_##S* a, int64_t n, const T* z, double* s, T* out,      \
                           void* ws, size_t b, int32_t nt) {                                                          \
    return custom_force<T>(f, a, n, z, s, out, ws, b, nt);                                                            \
  }                                                                                                                   \
  int lfq_custom_evolve_##S(const lfq_flow* f, const lfq_custom_##S* a, const lfq_hmc* h, int64_t n, T* z, T* pi,     \
                            void* ws, size_t b, int32_t nt) {                                                         \
    return custom_evolve<T>(f, a, h, n, z, pi, ws, b, nt);                                                            \
  }                                                                                                                   \
  int lfq_custom_hmc_##S(const lfq_flow* f, const lfq_custom_##S* a, const lfq_hmc* h, int64_t n, T* z, T* phi,       \
                         double* dh, uint8_t* acc, const double* smear, double* o, lfq_failure* bad, void* ws,        \
                         size_t b, int32_t nt) {                                                                      \
    return custom_hmc<T>(f, a, h, n, z, phi, dh, acc, smear, o, bad, ws, b, nt);                                      \
  }                                                                                                                   \
  int lfq_custom_loss_##S(const lfq_flow* f, const lfq_custom_##S* a, int64_t n, const T* z, double* s, double* ld,   \
                          double* dw, void* ws, size_t b, int32_t nt) {                                               \
    return custom_loss<T>(f, a, n, z, s, ld, dw, ws, b, nt);                                                          \
  }
LFQ_DEFINE(float, f32)
LFQ_DEFINE(double, f64)

}  // extern "C"
