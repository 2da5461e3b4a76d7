// lfq_cuda.h: the library itself, random numbers, action, force and observables.
#include <cstdarg>
#include <cstdio>

#include "cuda/theory.hpp"

namespace lfq_cuda {

static thread_local char last_error[256] = "";

int fail(int code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof(last_error), format, args);
  va_end(args);
  return code;
}
int fail_check(int code) { return fail(code, "%s", lfq_last_error()); }
int check_cuda(cudaError_t e, const char* what) {
  return e == cudaSuccess ? LFQ_OK : fail(LFQ_ERR_CUDA, "%s: CUDA says: %s", what, cudaGetErrorString(e));
}
int check_workspace(const void* ws, size_t bytes, size_t need) {
  if (need > 0 && (!ws || bytes < need))
    return fail(LFQ_ERR_WORKSPACE, "workspace: %zu bytes given, %zu needed", ws ? bytes : 0, need);
  return LFQ_OK;
}
size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return size_t(bytes);
}

int smearing_of(const lfq_phi4& t, const double* smear, lfq::smearing& s, double least) {
  if (!smear) return fail(LFQ_ERR_ARGUMENT, "smear is null");
  s = {};
  for (int axis = 0; axis < t.ndim; smear += t.extent[axis++]) {
    const int n = t.extent[axis];
    for (int d = 0; d <= n / 2; ++d) {
      if (d > 0 && !(smear[d] > least)) continue;
      if (d > lfq::max_reach)
        return fail(LFQ_ERR_ARGUMENT, "smear: reaches farther than %d sites along axis %d", lfq::max_reach, axis);
      s.reach[axis] = d;
    }
    for (int d = 0; d <= s.reach[axis]; ++d) {
      s.factor[axis][d] = d > 0 && 2 * d == n ? 0.5 * smear[d] : smear[d];
      s.rounded[axis][d] = float(s.factor[axis][d]);
    }
  }
  return LFQ_OK;
}

namespace {

template <class T>
int normal(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains, int64_t n, T* out, void* stream) {
  if (n_chains < 0) return fail(LFQ_ERR_ARGUMENT, "n_chains is %lld, must not be negative", (long long)n_chains);
  if (purpose < 0 || purpose > 255) return fail(LFQ_ERR_ARGUMENT, "purpose is %d, must be 0 to 255", int(purpose));
  if (n < 0 || n > int64_t(1) << 32) return fail(LFQ_ERR_ARGUMENT, "n_per_chain is out of range");
  if (!out && n_chains * n > 0) return fail(LFQ_ERR_ARGUMENT, "out is null");
  if (first_chain + uint64_t(n_chains) > uint64_t(1) << 32)
    return fail(LFQ_ERR_ARGUMENT, "first_chain: chains are numbered below 2^32");
  const int n_parts = lfq::parts_of(lfq::ceil_div(n, 4));
  return with_alignment(n, out, [&](auto a) {
    return launch("normals", lfq::normal_kernel<T, decltype(a)::value>, n_chains * n_parts, lfq::block_size, 0, stream,
                  lfq::stream{seed, trajectory, uint32_t(purpose)}, first_chain, n, n_parts, out);
  });
}

// Where the parts of the actions go.
template <class T>
double* parts_of_actions(pieces& mem, const lfq_phi4& t, int64_t n_chains) {
  return mem.take<double>(n_chains * shares(t, width_of<T>(t)).n_parts);
}

template <class T>
size_t workspace(const lfq_phi4* t, int64_t n_chains) {
  if (check_theory(t, n_chains)) return 0;
  pieces a(nullptr), m(nullptr);
  parts_of_actions<T>(a, *t, n_chains);
  measure_work<T>(m, *t, n_chains);
  return a.used > m.used ? a.used : m.used;
}

template <class T>
int action(const lfq_phi4* t, int64_t n, const T* phi, double* s, void* ws, size_t bytes, void* stream) {
  if (int e = check_theory(t, n)) return e;
  if (n > 0 && (!phi || !s)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  if (int e = check_workspace(ws, bytes, workspace<T>(t, n))) return e;
  pieces mem(ws);
  return actions(*t, n, phi, parts_of_actions<T>(mem, *t, n), s, stream);
}
template <class T>
int force(const lfq_phi4* t, int64_t n, const T* phi, T* out, void* stream) {
  if (int e = check_theory(t, n)) return e;
  if (n > 0 && (!phi || !out)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  const int width = aligned(phi, out) ? width_of<T>(*t) : 1;
  const shares own(*t, width);
  return with_width<T>(*t, width, [&](auto d, auto w) {
    return launch("force", lfq::force_kernel<T, decltype(d)::value, decltype(w)::value>, n * own.n_parts, own.threads, 0, stream, *t,
                  lfq::phi4_site<T>(t->beta, t->lam), volume_of(*t), own.n_parts, phi, out);
  });
}
template <class T>
int observables(const lfq_phi4* t, int64_t n, const T* phi, const double* smear, double* out, void* ws, size_t bytes, void* stream) {
  if (int e = check_theory(t, n)) return e;
  if (n > 0 && (!phi || !out)) return fail(LFQ_ERR_ARGUMENT, "a field or an output is null");
  if (int e = check_workspace(ws, bytes, workspace<T>(t, n))) return e;
  lfq::smearing s;
  if (int e = smearing_of(*t, smear, s, least_factor<T>)) return e;
  pieces mem(ws);
  return measure(*t, n, phi, s, measure_work<T>(mem, *t, n), out, stream);
}

}  // namespace
}  // namespace lfq_cuda

using namespace lfq_cuda;

const char* lfq_cuda_version(void) { return LFQ_VERSION; }
const char* lfq_cuda_architectures(void) { return LFQ_CUDA_ARCHITECTURES; }
const char* lfq_cuda_last_error(void) { return last_error; }
int32_t lfq_cuda_device_count(void) {
  int n = 0;
  return check_cuda(cudaGetDeviceCount(&n), "device count") ? 0 : n;
}

#define LFQ_CUDA_FUNCTIONS(T, F)                                                                                              \
  int lfq_cuda_normal_##F(uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains,        \
                          int64_t n, T* out, void* stream) {                                                                  \
    return normal(seed, purpose, trajectory, first_chain, n_chains, n, out, stream);                                          \
  }                                                                                                                           \
  size_t lfq_cuda_phi4_workspace_##F(const lfq_phi4* t, int64_t n) { return workspace<T>(t, n); }                             \
  int lfq_cuda_phi4_action_##F(const lfq_phi4* t, int64_t n, const T* phi, double* s, void* ws, size_t bytes, void* stream) { \
    return action(t, n, phi, s, ws, bytes, stream);                                                                           \
  }                                                                                                                           \
  int lfq_cuda_phi4_force_##F(const lfq_phi4* t, int64_t n, const T* phi, T* out, void* stream) {                             \
    return force(t, n, phi, out, stream);                                                                                     \
  }                                                                                                                           \
  int lfq_cuda_phi4_observables_##F(const lfq_phi4* t, int64_t n, const T* phi, const double* smear, double* out, void* ws,   \
                                    size_t bytes, void* stream) {                                                             \
    return observables(t, n, phi, smear, out, ws, bytes, stream);                                                             \
  }
LFQ_CUDA_FUNCTIONS(float, f32)
LFQ_CUDA_FUNCTIONS(double, f64)
