/* lfq.h: the C interface of liblfq. C99 and C++.
 *
 * Conventions that hold for every function:
 *  - Fields are C-ordered arrays (n_chains, *extent); latents are (n_chains, volume).
 *  - Buffers belong to the caller. Nothing here allocates memory that outlives a call or that
 *    grows with the problem: functions that need scratch take (workspace, workspace_bytes),
 *    and their *_workspace twin returns how many bytes that is for the same sizes. Workspaces
 *    need no alignment and carry nothing from one call to the next.
 *  - Suffix _f32 or _f64 is the type of fields and forces. Actions, log-determinants, energies,
 *    observables, weights and their gradients are double in both.
 *  - n_threads <= 0 means all the threads lfq_max_threads() reports. Results do not depend on it.
 *  - The return value is LFQ_OK or a negative code of lfq_status; lfq_last_error() explains it (per thread). Every
 *    argument is checked before any kernel runs: a null pointer, a size or a parameter out of range is
 *    LFQ_ERR_ARGUMENT, a workspace too small LFQ_ERR_WORKSPACE, a NaN or Inf in an input LFQ_ERR_NOT_FINITE.
 *    Size functions return 0 where the call itself would return LFQ_ERR_ARGUMENT.
 *  - Outputs must not overlap inputs. Calls from several threads at once are independent of each other.
 *  - Everything is in lattice units: the lattice spacing and the masses of momenta are 1.
 *  - The action is S = sum_x [-beta sum_mu phi_x phi_{x+mu} + (1 - 2 lam) phi_x^2 + lam phi_x^4].
 */
#ifndef LFQ_H
#define LFQ_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LFQ_API __declspec(dllexport)
#else
#define LFQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LFQ_ABI_VERSION 5
#define LFQ_MAX_DIM 4
#define LFQ_MAX_HIDDEN 4
#define LFQ_MAX_CHANNELS 64
#define LFQ_MAX_FEATURES 8
#define LFQ_MAX_STAGES 8
#define LFQ_N_OBSERVABLES 6

enum lfq_status {
  LFQ_OK = 0,
  LFQ_ERR_ARGUMENT = -1,   /* a size, pointer or parameter is out of range */
  LFQ_ERR_WORKSPACE = -2,  /* workspace smaller than the *_workspace function asks for */
  LFQ_ERR_NOT_FINITE = -3, /* NaN or Inf in a field, a weight or dH; see lfq_failure */
  LFQ_ERR_CALLBACK = -4,   /* the caller's own action asked to stop */
  LFQ_ERR_CUDA = -5        /* of lfq_cuda.h: a call of the CUDA runtime failed */
};

/* Random-number purposes: the last word of every Philox counter. One registry, so that no two
 * uses of one (seed, chain, trajectory) can meet. Values are part of the format of saved runs. */
enum lfq_purpose {
  LFQ_PURPOSE_MOMENTA = 0,
  LFQ_PURPOSE_ACCEPT = 1,
  LFQ_PURPOSE_START = 2,
  LFQ_PURPOSE_LATENT = 3,
  LFQ_PURPOSE_WEIGHTS = 4,
  LFQ_PURPOSE_LENGTH = 5,  /* of a trajectory; of chain 0 for all chains */
  LFQ_PURPOSE_BOND = 6,
  LFQ_PURPOSE_CLUSTER = 7, /* which clusters flip, where one starts */
  LFQ_PURPOSE_PROPOSAL = 8, /* latents of samplers: apart from those that a flow was trained on */
  LFQ_PURPOSE_RESAMPLE = 9, /* which of a population's fields survive */
  LFQ_PURPOSE_HEAT_BATH = 10, /* proposals of a site, and the uniforms that accept them */
  LFQ_PURPOSE_USER = 128 /* 128..255 are free for callers */
};

enum lfq_layer_kind {
  LFQ_LAYER_COUPLING = 0,  /* one half-update of the checkerboard */
  LFQ_LAYER_RESCALE = 1,   /* y = exp(a) x */
  LFQ_LAYER_INTERLEAVE = 2,/* 2^ndim copies of the coarse lattice onto the sublattices */
  LFQ_LAYER_UPSAMPLE = 3   /* one coarse field + noise -> fine field */
};
enum lfq_cluster_kind { LFQ_CLUSTER_SWENDSEN_WANG = 0, LFQ_CLUSTER_WOLFF = 1 };
enum lfq_activation { LFQ_TANH = 0, LFQ_LEAKY_RELU = 1 };
/* What a coupling makes of h = tanh(outputs of its net): y = x e + t. */
enum lfq_scale {
  LFQ_SCALE_NEG_ABS = 0,  /* (s, t) = h, e = exp(-|s|) */
  LFQ_SCALE_EXP = 1,      /* (s, t) = h, e = exp(s) */
  LFQ_SCALE_EVEN = 2,     /* t = sum_c a_c h_c, e = exp(sum_c b_c h_c^2); the layer's weights end in a, b */
  LFQ_SCALE_SITE = 3      /* not affine: y = a v + b tanh(c v) + w, v = x + u, (u, w) the net's outputs;
                           * the layer's weights end in log a, log b, log c */
};

typedef struct lfq_phi4 {
  int32_t ndim;                 /* 1..4 */
  int32_t extent[LFQ_MAX_DIM];
  double beta, lam;
} lfq_phi4;

/* One layer of a flow. `extent` is the lattice the layer writes. */
typedef struct lfq_layer {
  int32_t kind;
  int32_t ndim;
  int32_t extent[LFQ_MAX_DIM];
  int32_t parity;               /* coupling: parity (sum of coordinates mod 2) of the sites it changes */
  int32_t kernel_size;          /* coupling: odd, 3..9 */
  int32_t n_hidden;             /* coupling: number of hidden layers of the net, 0..LFQ_MAX_HIDDEN */
  int32_t hidden[LFQ_MAX_HIDDEN];
  int32_t activation;           /* of the hidden layers */
  int32_t bias;                 /* 0 or 1 */
  int32_t scale;
  int32_t n_features;           /* LFQ_SCALE_EVEN: outputs of the net, 1, 2, 4 or 8; else 0 */
  int32_t sublattices;          /* coupling, without hidden layers: 1 if each of the sublattices that it changes has weights
                                 * of its own, one set after the other; else 0. The 2^ndim sublattices are numbered by the
                                 * parities of all coordinates as binary digits, the last coordinate's the lowest. */
  int32_t active, frozen;       /* coupling, with sublattices: those that it changes, all of `parity`, and those others that
                                 * its nets see, a bit each; both 0: all of `parity`, all of the other parity */
  int64_t weight_offset;        /* where this layer's weights begin in the flow's weight vector */
} lfq_layer;

/* A flow is a list of layers on a flat latent of `volume` entries. The first layer reads the
 * leading entries as a field; layers that enlarge the lattice consume the following ones. */
typedef struct lfq_flow {
  int64_t volume;               /* entries of the latent = sites of the final lattice */
  int64_t n_weights;
  int32_t n_layers;
  int32_t reserved;
  const lfq_layer* layers;
  const double* weights;
} lfq_flow;

/* A symmetric splitting: kick[0] drift[0] kick[1] ... drift[n_stages-1] kick[n_stages], in units
 * of the step size. Leapfrog is n_stages = 1, kick = {1/2, 1/2}, drift = {1}. */
typedef struct lfq_integrator {
  int32_t n_stages;
  int32_t reserved;
  double kick[LFQ_MAX_STAGES + 1];
  double drift[LFQ_MAX_STAGES];
} lfq_integrator;

typedef struct lfq_hmc {
  lfq_integrator integrator;
  double step_size;
  int32_t n_steps;              /* integrator steps per trajectory, >= 1 */
  int32_t thin;                 /* trajectories per sample, >= 1 */
  int64_t n_samples;            /* >= 0 */
  uint64_t seed;
  uint64_t first_chain;         /* global number of the first chain, < 2^32 */
  uint64_t first_trajectory;    /* number of the next trajectory, < 2^56 */
  int32_t n_steps_spread;       /* 0 <= spread < n_steps: each trajectory takes n_steps - spread .. n_steps + spread
                                 * steps, all equally likely, the same for all chains */
  int32_t reserved;
} lfq_hmc;

/* Cluster updates of the signs of the field. */
typedef struct lfq_cluster {
  int32_t kind;                 /* of lfq_cluster_kind */
  int32_t n_updates;            /* sweeps, or single clusters, after each trajectory; n_updates * volume <= 2^32 */
} lfq_cluster;

/* Checkerboard sweeps of the local heat bath. */
typedef struct lfq_heat_bath {
  int32_t n_sweeps;             /* of a trajectory, >= 0; n_sweeps * volume <= 2^32 */
  int32_t thin;                 /* trajectories per sample, >= 1 */
  int64_t n_samples;            /* >= 0 */
  uint64_t seed;
  uint64_t first_chain;         /* as in lfq_hmc */
  uint64_t first_trajectory;
} lfq_heat_bath;
/* An action of the caller's own, on fields of ndim axes. evaluate is given n_chains fields (n_chains, *extent), at most
 * 64, and writes force = -dS/dphi of the same layout, and action[i] = S(phi_i); when want_action is 0 nobody reads
 * action. It returns 0, or anything else to stop the call with LFQ_ERR_CALLBACK. It is called from several threads at
 * once unless n_threads is 1, must not throw, and what it makes of a field must depend on nothing else. */
typedef int32_t (*lfq_evaluate_f32)(void* context, int32_t want_action, int64_t n_chains, const float* phi,
                                    double* action, float* force);
typedef int32_t (*lfq_evaluate_f64)(void* context, int32_t want_action, int64_t n_chains, const double* phi,
                                    double* action, double* force);
typedef struct lfq_custom_f32 {
  int32_t ndim;                 /* 1..4 */
  int32_t extent[LFQ_MAX_DIM];
  int32_t reserved;
  lfq_evaluate_f32 evaluate;
  void* context;                /* passed on to evaluate */
} lfq_custom_f32;
typedef struct lfq_custom_f64 {
  int32_t ndim;
  int32_t extent[LFQ_MAX_DIM];
  int32_t reserved;
  lfq_evaluate_f64 evaluate;
  void* context;
} lfq_custom_f64;

/* Where a NaN or Inf was found; -1 where it does not apply. */
typedef struct lfq_failure {
  int64_t chain;                /* within the call */
  int64_t step;                 /* trajectory (hmc) or flat index (fields, weights) */
  double value;
} lfq_failure;

/* ---- library --------------------------------------------------------------------------- */
/* Version of the package, "major.minor.patch"; lives as long as the library, as do all strings here. */
LFQ_API const char* lfq_version(void);
/* The LFQ_ABI_VERSION the library was built with. Equal numbers mean equal records and functions. */
LFQ_API int32_t lfq_abi_version(void);
/* What the last call that failed on this thread complained about; "" before the first. */
LFQ_API const char* lfq_last_error(void);
/* What a status means in general: one phrase, also for numbers that are none. */
LFQ_API const char* lfq_status_message(int status);
/* The instruction set in use, e.g. "x86-64-v4". */
LFQ_API const char* lfq_isa(void);
/* Those this machine can run, best first, comma separated. */
LFQ_API const char* lfq_isas(void);
/* Use another of them from now on, not while other threads are inside lfq. LFQ_ERR_ARGUMENT for one not in lfq_isas,
 * without a message. */
LFQ_API int lfq_set_isa(const char* name);
/* The environment's LFQ_NUM_THREADS, or the processors that this process may use. */
LFQ_API int32_t lfq_max_threads(void);

/* ---- random numbers -------------------------------------------------------------------- */
/* One block of Philox4x32-10 (Salmon et al., SC 2011). lfq's streams have key = seed (low word first) and counter =
 * (block, trajectory low, chain, trajectory high | purpose << 24). Pointers are not checked. */
LFQ_API void lfq_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
/* Unit normals, out (n_chains, n_per_chain): row i of chain first_chain + i; block j / 4 of its stream makes entries
 * 4 (j / 4) .. + 3. purpose: 0..255, of lfq_purpose or LFQ_PURPOSE_USER and above; n_per_chain <= 2^32; chains are
 * numbered below 2^32. */
LFQ_API int lfq_normal_f32(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain,
                           int64_t n_chains, int64_t n_per_chain, float* out, int32_t n_threads);
LFQ_API int lfq_normal_f64(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain,
                           int64_t n_chains, int64_t n_per_chain, double* out, int32_t n_threads);

/* Uniforms in (0, 1), those of accept steps for LFQ_PURPOSE_ACCEPT: out (n_trajectories, n_chains), row t of
 * trajectory first_trajectory + t, column i of chain first_chain + i. */
LFQ_API int lfq_uniform(uint64_t seed, int32_t purpose, uint64_t first_trajectory, int64_t n_trajectories,
                        uint64_t first_chain, int64_t n_chains, double* out);

/* ---- phi^4 ------------------------------------------------------------------------------- */
/* Bytes of workspace for the three functions below, for at least n_chains fields on n_threads threads. */
LFQ_API size_t lfq_phi4_workspace_f32(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_phi4_workspace_f64(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
/* action (n_chains): S of each field of phi (n_chains, *extent). */
LFQ_API int lfq_phi4_action_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi,
                                double* action, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_phi4_action_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi,
                                double* action, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);
/* force = -dS/dphi, both (n_chains, *extent). */
LFQ_API int lfq_phi4_force_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi,
                               float* force, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_phi4_force_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi,
                               double* force, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);
/* observables (n_chains, LFQ_N_OBSERVABLES), row i: M = mean phi, phi2, phi4, nn (mean over sites and directions of
 * phi_x phi_{x+mu}), smeared phi2, G(p_min) = |sum_x exp(i p x) phi_x|^2 / V averaged over axes.
 * smear: for each axis in turn, extent[mu] entries, the circulant kernel convolved along it. */
LFQ_API int lfq_phi4_observables_f32(const lfq_phi4* theory, int64_t n_chains, const float* phi,
                                     const double* smear, double* observables, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_phi4_observables_f64(const lfq_phi4* theory, int64_t n_chains, const double* phi,
                                     const double* smear, double* observables, void* workspace,
                               size_t workspace_bytes, int32_t n_threads);

/* ---- flows ------------------------------------------------------------------------------- */
/* Weights of a layer; 0 for a null or unknown one. */
LFQ_API int64_t lfq_layer_n_weights(const lfq_layer* layer);
/* Whether layers follow from each other, weight offsets and numbers add up, and weights are finite. */
LFQ_API int lfq_flow_check(const lfq_flow* flow);
/* The same without a look at the weights, which may lie elsewhere. */
LFQ_API int lfq_flow_check_layers(const lfq_flow* flow);
/* Whether dimensions, extents and couplings are in range; of hmc, numbers, seed and integrator for so many chains. */
LFQ_API int lfq_phi4_check(const lfq_phi4* theory);
LFQ_API int lfq_hmc_check(const lfq_hmc* hmc, int64_t n_chains);
/* Bytes of workspace for forward, inverse, vjp, loss and pullback_force. */
LFQ_API size_t lfq_flow_workspace_f32(const lfq_flow* flow, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_flow_workspace_f64(const lfq_flow* flow, int64_t n_chains, int32_t n_threads);
/* x = f(z), both (n_chains, volume); log_det (n_chains) = log|det df/dz|. */
LFQ_API int lfq_flow_forward_f32(const lfq_flow* flow, int64_t n_chains, const float* z, float* x,
                                 double* log_det, void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_flow_forward_f64(const lfq_flow* flow, int64_t n_chains, const double* z, double* x,
                                 double* log_det, void* workspace, size_t workspace_bytes, int32_t n_threads);
/* z = f^-1(x), both (n_chains, volume); log_det (n_chains) = log|det df^-1/dx|, minus that of f at z. */
LFQ_API int lfq_flow_inverse_f32(const lfq_flow* flow, int64_t n_chains, const float* x, float* z,
                                 double* log_det, void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_flow_inverse_f64(const lfq_flow* flow, int64_t n_chains, const double* x, double* z,
                                 double* log_det, void* workspace, size_t workspace_bytes, int32_t n_threads);
/* Given z, dx = dL/dx at x = f(z), both (n_chains, volume), and dlog_det = dL/dlog_det (n_chains): dz = dL/dz, like z,
 * and, unless null, dweights = dL/dweights summed over chains (n_weights doubles, overwritten). */
LFQ_API int lfq_flow_vjp_f32(const lfq_flow* flow, int64_t n_chains, const float* z, const float* dx,
                             const double* dlog_det, float* dz, double* dweights,
                             void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_flow_vjp_f64(const lfq_flow* flow, int64_t n_chains, const double* z, const double* dx,
                             const double* dlog_det, double* dz, double* dweights,
                             void* workspace, size_t workspace_bytes, int32_t n_threads);
/* The same for the inverse: given dL/dz and dL/dlog_det of (z, log_det) = f^-1(x), taken at z: dx = dL/dx and, unless
 * null, dweights. Takes two to four times as long as lfq_flow_vjp. */
LFQ_API size_t lfq_flow_inverse_vjp_workspace_f32(const lfq_flow* flow, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_flow_inverse_vjp_f32(const lfq_flow* flow, int64_t n_chains, const float* z, const float* dz,
                                     const double* dlog_det, float* dx, double* dweights,
                                     void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API size_t lfq_flow_inverse_vjp_workspace_f64(const lfq_flow* flow, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_flow_inverse_vjp_f64(const lfq_flow* flow, int64_t n_chains, const double* z, const double* dz,
                                     const double* dlog_det, double* dx, double* dweights,
                                     void* workspace, size_t workspace_bytes, int32_t n_threads);
/* The fused training step at z (n_chains, volume): action (n_chains) = S(f(z_i)), log_det (n_chains), and dweights =
 * d/dweights of mean_i [S(f(z_i)) - log_det_i] (n_weights doubles, overwritten). */
LFQ_API int lfq_flow_loss_f32(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains, const float* z,
                              double* action, double* log_det, double* dweights,
                              void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_flow_loss_f64(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains, const double* z,
                              double* action, double* log_det, double* dweights,
                              void* workspace, size_t workspace_bytes, int32_t n_threads);
/* The pulled-back theory: action (n_chains) = S~(z) = S(f(z)) - log|det df/dz|, and force = -dS~/dz, like z
 * (n_chains, volume). */
LFQ_API int lfq_pullback_force_f32(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains,
                                   const float* z, double* action, float* force,
                                   void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_pullback_force_f64(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains,
                                   const double* z, double* action, double* force,
                                   void* workspace, size_t workspace_bytes, int32_t n_threads);

/* ---- hybrid Monte Carlo ------------------------------------------------------------------ */
/* flow may be null: then z is the field itself. */
/* Bytes of workspace for lfq_evolve and lfq_hmc. */
LFQ_API size_t lfq_hmc_workspace_f32(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_hmc_workspace_f64(const lfq_flow* flow, const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
/* Integrates z and momenta, both (n_chains, *extent), in place for hmc->n_steps steps: no refresh, no accept step. A
 * negative step size goes back in time. */
LFQ_API int lfq_evolve_f32(const lfq_flow* flow, const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains,
                           float* z, float* momenta, void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_evolve_f64(const lfq_flow* flow, const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains,
                           double* z, double* momenta, void* workspace, size_t workspace_bytes, int32_t n_threads);
/* n_samples x thin trajectories of every chain, starting from and ending in z (n_chains, *extent).
 * dh, accepted: (n_samples * thin, n_chains); observables: (n_samples, n_chains, LFQ_N_OBSERVABLES),
 * each null when not wanted; phi: (n_chains, *extent), the final f(z), null when not wanted.
 * On LFQ_ERR_NOT_FINITE, failure names the earliest chain; every chain's z is that of its last good trajectory. */
LFQ_API int lfq_hmc_f32(const lfq_flow* flow, const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains,
                        float* z, float* phi, double* dh, uint8_t* accepted, const double* smear,
                        double* observables, lfq_failure* failure,
                        void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_hmc_f64(const lfq_flow* flow, const lfq_phi4* theory, const lfq_hmc* hmc, int64_t n_chains,
                        double* z, double* phi, double* dh, uint8_t* accepted, const double* smear,
                        double* observables, lfq_failure* failure,
                        void* workspace, size_t workspace_bytes, int32_t n_threads);

/* ---- HMC with Fourier acceleration ------------------------------------------------------- */
/* As lfq_evolve and lfq_hmc without a flow, where the mode of momentum p moves with the mass
 * (p^2 + mass^2) / (4 ndim + mass^2), p^2 = 4 sum sin^2(p_mu / 2); mass > 0. Momenta are unit normals, one
 * for each mode of the Hartley transform. */
/* Bytes of workspace for both. */
LFQ_API size_t lfq_fourier_workspace_f32(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_fourier_workspace_f64(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_fourier_evolve_f32(const lfq_phi4* theory, const lfq_hmc* hmc, double mass, int64_t n_chains,
                                   float* phi, float* momenta, void* workspace, size_t workspace_bytes,
                                   int32_t n_threads);
LFQ_API int lfq_fourier_evolve_f64(const lfq_phi4* theory, const lfq_hmc* hmc, double mass, int64_t n_chains,
                                   double* phi, double* momenta, void* workspace, size_t workspace_bytes,
                                   int32_t n_threads);
LFQ_API int lfq_fourier_hmc_f32(const lfq_phi4* theory, const lfq_hmc* hmc, double mass, int64_t n_chains,
                                float* phi, double* dh, uint8_t* accepted, const double* smear,
                                double* observables, lfq_failure* failure,
                                void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_fourier_hmc_f64(const lfq_phi4* theory, const lfq_hmc* hmc, double mass, int64_t n_chains,
                                double* phi, double* dh, uint8_t* accepted, const double* smear,
                                double* observables, lfq_failure* failure,
                                void* workspace, size_t workspace_bytes, int32_t n_threads);

/* ---- embedded clusters ------------------------------------------------------------------- */
/* cluster->n_updates cluster updates of every chain of phi (n_chains, *extent), in place, with the random numbers of
 * `trajectory`; flipped (n_chains): sites whose sign changed, over all updates, each time counted; null when not wanted. */
LFQ_API size_t lfq_cluster_workspace_f32(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_cluster_workspace_f64(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_cluster_update_f32(const lfq_phi4* theory, const lfq_cluster* cluster, uint64_t seed,
                                   uint64_t first_chain, uint64_t trajectory, int64_t n_chains, float* phi,
                                   int64_t* flipped, void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_cluster_update_f64(const lfq_phi4* theory, const lfq_cluster* cluster, uint64_t seed,
                                   uint64_t first_chain, uint64_t trajectory, int64_t n_chains, double* phi,
                                   int64_t* flipped, void* workspace, size_t workspace_bytes, int32_t n_threads);
/* As lfq_hmc without a flow, with the cluster updates after each trajectory.
 * flipped: (n_samples * thin, n_chains), null when not wanted. */
LFQ_API size_t lfq_cluster_hmc_workspace_f32(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_cluster_hmc_workspace_f64(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_cluster_hmc_f32(const lfq_phi4* theory, const lfq_hmc* hmc, const lfq_cluster* cluster,
                                int64_t n_chains, float* phi, double* dh, uint8_t* accepted, int64_t* flipped,
                                const double* smear, double* observables, lfq_failure* failure,
                                void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_cluster_hmc_f64(const lfq_phi4* theory, const lfq_hmc* hmc, const lfq_cluster* cluster,
                                int64_t n_chains, double* phi, double* dh, uint8_t* accepted, int64_t* flipped,
                                const double* smear, double* observables, lfq_failure* failure,
                                void* workspace, size_t workspace_bytes, int32_t n_threads);

/* ---- local heat bath --------------------------------------------------------------------- */
/* n_samples x thin trajectories of every chain, in place: sweeps over the even sites, then the odd ones, each drawn from
 * its density given its neighbours, exp(-(1 - 2 lam) x^2 - lam x^4 + beta x sum of neighbours), by two tries of a
 * rejection method (a site where both fail stays, which leaves the density as it is); then the updates of
 * `cluster`, null for none.
 * changed: (n_samples * thin, n_chains) sites with a new value, each time counted; flipped: as in lfq_cluster_hmc;
 * observables: as in lfq_hmc; each null when not wanted. */
LFQ_API size_t lfq_heat_bath_workspace_f32(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API size_t lfq_heat_bath_workspace_f64(const lfq_phi4* theory, int64_t n_chains, int32_t n_threads);
LFQ_API int lfq_heat_bath_f32(const lfq_phi4* theory, const lfq_heat_bath* heat_bath, const lfq_cluster* cluster,
                              int64_t n_chains, float* phi, int64_t* changed, int64_t* flipped, const double* smear,
                              double* observables, lfq_failure* failure, void* workspace, size_t workspace_bytes,
                              int32_t n_threads);
LFQ_API int lfq_heat_bath_f64(const lfq_phi4* theory, const lfq_heat_bath* heat_bath, const lfq_cluster* cluster,
                              int64_t n_chains, double* phi, int64_t* changed, int64_t* flipped, const double* smear,
                              double* observables, lfq_failure* failure, void* workspace, size_t workspace_bytes,
                              int32_t n_threads);
/* ---- actions of the caller ----------------------------------------------------------------- */
/* As lfq_pullback_force, lfq_evolve, lfq_hmc and lfq_flow_loss, for an action of the caller's own. flow may be null
 * but for the loss. Observables are those of lfq_phi4_observables, which ask for the field alone.
 * The workspace is enough for each of the four. */
LFQ_API size_t lfq_custom_workspace_f32(const lfq_flow* flow, const lfq_custom_f32* action, int64_t n_chains,
                                        int32_t n_threads);
LFQ_API int lfq_custom_force_f32(const lfq_flow* flow, const lfq_custom_f32* action, int64_t n_chains, const float* z,
                                 double* value, float* force, void* workspace, size_t workspace_bytes,
                                 int32_t n_threads);
LFQ_API int lfq_custom_evolve_f32(const lfq_flow* flow, const lfq_custom_f32* action, const lfq_hmc* hmc,
                                  int64_t n_chains, float* z, float* momenta, void* workspace,
                                  size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_custom_hmc_f32(const lfq_flow* flow, const lfq_custom_f32* action, const lfq_hmc* hmc,
                               int64_t n_chains, float* z, float* phi, double* dh, uint8_t* accepted,
                               const double* smear, double* observables, lfq_failure* failure,
                               void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_custom_loss_f32(const lfq_flow* flow, const lfq_custom_f32* action, int64_t n_chains, const float* z,
                                double* value, double* log_det, double* dweights, void* workspace,
                                size_t workspace_bytes, int32_t n_threads);
LFQ_API size_t lfq_custom_workspace_f64(const lfq_flow* flow, const lfq_custom_f64* action, int64_t n_chains,
                                        int32_t n_threads);
LFQ_API int lfq_custom_force_f64(const lfq_flow* flow, const lfq_custom_f64* action, int64_t n_chains, const double* z,
                                 double* value, double* force, void* workspace, size_t workspace_bytes,
                                 int32_t n_threads);
LFQ_API int lfq_custom_evolve_f64(const lfq_flow* flow, const lfq_custom_f64* action, const lfq_hmc* hmc,
                                  int64_t n_chains, double* z, double* momenta, void* workspace,
                                  size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_custom_hmc_f64(const lfq_flow* flow, const lfq_custom_f64* action, const lfq_hmc* hmc,
                               int64_t n_chains, double* z, double* phi, double* dh, uint8_t* accepted,
                               const double* smear, double* observables, lfq_failure* failure,
                               void* workspace, size_t workspace_bytes, int32_t n_threads);
LFQ_API int lfq_custom_loss_f64(const lfq_flow* flow, const lfq_custom_f64* action, int64_t n_chains, const double* z,
                                double* value, double* log_det, double* dweights, void* workspace,
                                size_t workspace_bytes, int32_t n_threads);

#ifdef __cplusplus
}
#endif
#endif
