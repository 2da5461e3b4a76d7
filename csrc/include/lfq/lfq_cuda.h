/* lfq_cuda.h: the C interface of liblfq_cuda, the kernels of lfq.h for NVIDIA GPUs. C99 and C++.
 *
 * Conventions that differ from lfq.h:
 *  - Fields, actions, log-determinants, momenta, weights, workspaces are pointers to device memory (workspaces
 *    aligned to 16 bytes); records (theory, settings, layers) and `smear` are read on the host before the call returns.
 *  - Work is queued on `stream` (a cudaStream_t) of the current device. No call waits for it.
 *  - NaN and Inf are not looked for: they end up in the results.
 *  - The return value is LFQ_OK or a negative code of lfq_status; lfq_cuda_last_error() explains it (per thread).
 */
#ifndef LFQ_CUDA_H
#define LFQ_CUDA_H

#include "lfq/lfq.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How fields are kept during HMC without a flow. */
enum lfq_cuda_path {
  LFQ_CUDA_AUTO = 0,     /* resident where it fits */
  LFQ_CUDA_RESIDENT = 1, /* a chain in one block's registers and shared memory */
  LFQ_CUDA_TILED = 2     /* in device memory, a pass for one step or two */
};

/* ---- library --------------------------------------------------------------------------- */
LFQ_API const char* lfq_cuda_version(void);
LFQ_API const char* lfq_cuda_architectures(void); /* it was compiled for, e.g. "90-real;90-virtual" */
LFQ_API const char* lfq_cuda_last_error(void);
/* Devices found; 0 and an error text where there is no driver. */
LFQ_API int32_t lfq_cuda_device_count(void);

/* ---- random numbers, as lfq_normal ------------------------------------------------------ */
LFQ_API int lfq_cuda_normal_f32(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain,
                                int64_t n_chains, int64_t n_per_chain, float* out, void* stream);
LFQ_API int lfq_cuda_normal_f64(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain,
                                int64_t n_chains, int64_t n_per_chain, double* out, void* stream);

/* ---- phi^4, as lfq_phi4_* ---------------------------------------------------------------- */
LFQ_API size_t lfq_cuda_phi4_workspace_f32(const lfq_phi4* theory, int64_t n_chains);
LFQ_API size_t lfq_cuda_phi4_workspace_f64(const lfq_phi4* theory, int64_t n_chains);
LFQ_API int lfq_cuda_phi4_action_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi, double* action,
                                     void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_phi4_action_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi, double* action,
                                     void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_phi4_force_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi, float* force,
                                    void* stream);
LFQ_API int lfq_cuda_phi4_force_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi, double* force,
                                    void* stream);
LFQ_API int lfq_cuda_phi4_observables_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi,
                                          const double* smear, double* observables, void* workspace,
                                          size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_phi4_observables_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi,
                                          const double* smear, double* observables, void* workspace,
                                          size_t workspace_bytes, void* stream);

/* ---- hybrid Monte Carlo of phi^4, as lfq_evolve and lfq_hmc without a flow ---------------- */
/* Whether a chain fits one block of the current device: 1 or 0, or an error. */
LFQ_API int lfq_cuda_resident_f32(const lfq_phi4* theory);
LFQ_API int lfq_cuda_resident_f64(const lfq_phi4* theory);
LFQ_API size_t lfq_cuda_hmc_workspace_f32(const lfq_phi4* theory, int64_t n_chains);
LFQ_API size_t lfq_cuda_hmc_workspace_f64(const lfq_phi4* theory, int64_t n_chains);
LFQ_API int lfq_cuda_evolve_f32(const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains, float* phi, float* momenta,
                                void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_evolve_f64(const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains, double* phi,
                                double* momenta, void* workspace, size_t workspace_bytes, void* stream);
/* dh must not be null. A chain whose dH is NaN or Inf keeps its last good field; its later dh are NaN,
 * and its observables from then on NaN too or, tiled, those of that field. */
LFQ_API int lfq_cuda_hmc_f32(const lfq_phi4* theory, const lfq_hmc* hmc, int32_t path, int64_t n_chains, float* phi,
                             double* dh, uint8_t* accepted, const double* smear, double* observables,
                             void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_hmc_f64(const lfq_phi4* theory, const lfq_hmc* hmc, int32_t path, int64_t n_chains, double* phi,
                             double* dh, uint8_t* accepted, const double* smear, double* observables,
                             void* workspace, size_t workspace_bytes, void* stream);

/* ---- flows, as lfq_flow_* and lfq_pullback_force ------------------------------------------ */
/* flow->layers are on the host, device_layers a copy of them in device memory, flow->weights are in device memory. */
LFQ_API size_t lfq_cuda_flow_workspace_f32(const lfq_flow* flow, int64_t n_chains);
LFQ_API size_t lfq_cuda_flow_workspace_f64(const lfq_flow* flow, int64_t n_chains);
LFQ_API int lfq_cuda_flow_forward_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const float* z, float* x,
    double* log_det,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_forward_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const double* z, double* x,
    double* log_det,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_inverse_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const float* x, float* z,
    double* log_det,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_inverse_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const double* x, double* z,
    double* log_det,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_vjp_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const float* z, const float* dx,
    const double* dlog_det, float* dz, double* dweights,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_vjp_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, int64_t n_chains, const double* z, const double* dx,
    const double* dlog_det, double* dz, double* dweights,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_loss_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, int64_t n_chains,
    const float* z, double* action, double* log_det, double* dweights,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_loss_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, int64_t n_chains,
    const double* z, double* action, double* log_det, double* dweights,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_pullback_force_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, int64_t n_chains,
    const float* z, double* action, float* force,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_pullback_force_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, int64_t n_chains,
    const double* z, double* action, double* force,
    void* workspace, size_t workspace_bytes, void* stream);
/* As lfq_evolve and lfq_hmc with a flow. phi and dh must not be null; see lfq_cuda_hmc for chains that fail. */
LFQ_API int lfq_cuda_flow_evolve_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, const lfq_hmc* hmc,
    int64_t n_chains, float* z, float* momenta,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_evolve_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, const lfq_hmc* hmc,
    int64_t n_chains, double* z, double* momenta,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_hmc_f32(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, const lfq_hmc* hmc,
    int64_t n_chains, float* z, float* phi, double* dh, uint8_t* accepted, const double* smear, double* observables,
    void* workspace, size_t workspace_bytes, void* stream);
LFQ_API int lfq_cuda_flow_hmc_f64(
    const lfq_flow* flow, const lfq_layer* device_layers, const lfq_phi4* theory, const lfq_hmc* hmc,
    int64_t n_chains, double* z, double* phi, double* dh, uint8_t* accepted, const double* smear, double* observables,
    void* workspace, size_t workspace_bytes, void* stream);

/* ---- training ------------------------------------------------------------------------------ */
/* The end of a step: log-weights of n latents, each of `copies` coarse fields and n_noise unit normals, then Adam with a
 * cosine schedule. All pointers are to device memory. */
typedef struct lfq_cuda_training {
  int64_t n, n_noise, n_weights;
  int32_t copies;
  int32_t reserved;
  const double *coarse_action;  /* (n, copies) */
  const double *target_action, *log_det, *gradient; /* of lfq_cuda_flow_loss */
  double *weights, *first_moment, *second_moment;
  double *log_w;                /* (n) */
  double *history;              /* (4, total_steps): loss, ess, standard deviation of log w, learning rate */
  int64_t *failed_step;         /* -1; the first step whose loss or gradient is NaN or Inf, after which nothing moves */
  int64_t step, total_steps;
  double learning_rate;
} lfq_cuda_training;

LFQ_API int lfq_cuda_train_step_f32(const lfq_cuda_training* training, const float* noise, void* stream);
LFQ_API int lfq_cuda_train_step_f64(const lfq_cuda_training* training, const double* noise, void* stream);

#ifdef __cplusplus
}
#endif
#endif
