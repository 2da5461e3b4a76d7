// The kernels of one instruction set and one type, as the dispatcher sees them. Arguments are those of
// lfq.h after its checks; n_threads >= 1. Return values are lfq_status.
#pragma once
#include "lfq/lfq.h"

namespace lfq_internal {

template <class T>
struct custom_type;
template <>
struct custom_type<float> { using type = lfq_custom_f32; };
template <>
struct custom_type<double> { using type = lfq_custom_f64; };
template <class T>
using custom_action = typename custom_type<T>::type;

template <class T>
struct kernels {
  int (*normal)(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains,
                int64_t n, T* out, int n_threads);
  size_t (*phi4_workspace)(const lfq_phi4&, int64_t n_chains, int n_threads);
  int (*action)(const lfq_phi4&, int64_t n_chains, const T* phi, double* s, lfq_failure*, void* ws, int n_threads);
  int (*force)(const lfq_phi4&, int64_t n_chains, const T* phi, T* f, lfq_failure*, void* ws, int n_threads);
  int (*observables)(const lfq_phi4&, int64_t n_chains, const T* phi, const double* smear, double* obs,
                     lfq_failure*, void* ws, int n_threads);
  size_t (*flow_workspace)(const lfq_flow&, int64_t n_chains, int n_threads);
  int (*forward)(const lfq_flow&, int64_t n_chains, const T* z, T* x, double* log_det, lfq_failure*, void* ws,
                 int n_threads);
  int (*inverse)(const lfq_flow&, int64_t n_chains, const T* x, T* z, double* log_det, lfq_failure*, void* ws,
                 int n_threads);
  int (*vjp)(const lfq_flow&, int64_t n_chains, const T* z, const T* dx, const double* dlog_det, T* dz,
             double* dweights, lfq_failure*, void* ws, int n_threads);
  int (*loss)(const lfq_flow&, const lfq_phi4&, int64_t n_chains, const T* z, double* action, double* log_det,
              double* dweights, lfq_failure*, void* ws, int n_threads);
  int (*pullback)(const lfq_flow&, const lfq_phi4&, int64_t n_chains, const T* z, double* action, T* force,
                  lfq_failure*, void* ws, int n_threads);
  size_t (*hmc_workspace)(const lfq_flow*, const lfq_phi4&, int64_t n_chains, int n_threads);
  int (*evolve)(const lfq_flow*, const lfq_phi4&, const lfq_hmc&, int64_t n_chains, T* z, T* momenta,
                lfq_failure*, void* ws, int n_threads);
  int (*hmc)(const lfq_flow*, const lfq_phi4&, const lfq_hmc&, int64_t n_chains, T* z, T* phi, double* dh,
             uint8_t* accepted, const double* smear, double* observables, lfq_failure*, void* ws, int n_threads);
  size_t (*fourier_workspace)(const lfq_phi4&, int64_t n_chains, int n_threads);
  int (*fourier_evolve)(const lfq_phi4&, const lfq_hmc&, double mass, int64_t n_chains, T* phi, T* momenta,
                        lfq_failure*, void* ws, int n_threads);
  int (*fourier_hmc)(const lfq_phi4&, const lfq_hmc&, double mass, int64_t n_chains, T* phi, double* dh,
                     uint8_t* accepted, const double* smear, double* observables, lfq_failure*, void* ws,
                     int n_threads);
  size_t (*cluster_workspace)(const lfq_phi4&, int64_t n_chains, int n_threads);
  int (*cluster)(const lfq_phi4&, const lfq_cluster&, uint64_t seed, uint64_t first_chain, uint64_t trajectory,
                 int64_t n_chains, T* phi, int64_t* flipped, lfq_failure*, void* ws, int n_threads);
  size_t (*heat_bath_workspace)(const lfq_phi4&, int64_t n_chains, int n_threads);
  int (*heat_bath)(const lfq_phi4&, const lfq_heat_bath&, int64_t n_chains, T* phi, int64_t* changed,
                   const double* smear, double* observables, lfq_failure*, void* ws, int n_threads);
  size_t (*custom_workspace)(const lfq_flow*, const custom_action<T>&, int64_t n_chains, int n_threads);
  int (*custom_force)(const lfq_flow*, const custom_action<T>&, int64_t n_chains, const T* z, double* action, T* force,
                      lfq_failure*, void* ws, int n_threads);
  int (*custom_evolve)(const lfq_flow*, const custom_action<T>&, const lfq_hmc&, int64_t n_chains, T* z, T* momenta,
                       lfq_failure*, void* ws, int n_threads);
  int (*custom_hmc)(const lfq_flow*, const custom_action<T>&, const lfq_hmc&, int64_t n_chains, T* z, T* phi, double* dh,
                    uint8_t* accepted, const double* smear, double* observables, lfq_failure*, void* ws, int n_threads);
  int (*custom_loss)(const lfq_flow&, const custom_action<T>&, int64_t n_chains, const T* z, double* action,
                     double* log_det, double* dweights, lfq_failure*, void* ws, int n_threads);
};

struct isa {
  const char* name;
  bool (*supported)();
  const kernels<float>* f32;
  const kernels<double>* f64;
};

}  // namespace lfq_internal
