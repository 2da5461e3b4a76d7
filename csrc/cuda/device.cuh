// What all kernels share: sums over a block, launches, and pieces of a workspace.
#pragma once
#include <cuda_runtime.h>

#include "lfq/config.hpp"
#include "lfq/lfq_cuda.h"
#include "lfq/philox.hpp"

#define LFQ_DEVICE __device__ __forceinline__

// All shared memory is asked for at launch; its first bytes are the scratch of block_sum.
extern __shared__ __align__(16) char lfq_shared[];

LFQ_NAMESPACE_BEGIN

constexpr int warp_size = 32;

LFQ_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int whole_warps(int64_t threads) { return int(ceil_div(threads, warp_size)) * warp_size; }

// Shared memory that block_sum needs for n sums at a time.
LFQ_HD constexpr size_t sum_scratch(int threads, int n) { return (size_t(threads) / warp_size * n * sizeof(double) + 15) & ~size_t(15); }

// Makes the compiler compute what follows from i anew, where it would keep dozens of addresses in registers.
LFQ_DEVICE void forget(int& i) { asm volatile("" : "+r"(i)); }

template <int N>
LFQ_DEVICE void warp_sum(double (&v)[N]) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2)
    for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(0xffffffffu, v[n], mask);
}
// Every thread receives the sums over the block, in an order that depends on the block's size alone. Ends with a barrier.
template <int N>
LFQ_DEVICE void block_sum(double (&v)[N]) {
  double* scratch = reinterpret_cast<double*>(lfq_shared);
  const int warp = threadIdx.x / warp_size, n_warps = blockDim.x / warp_size;
  warp_sum(v);
  if (threadIdx.x % warp_size == 0)
    for (int n = 0; n < N; ++n) scratch[warp * N + n] = v[n];
  __syncthreads();
  for (int n = 0; n < N; ++n) v[n] = 0;
  for (int w = 0; w < n_warps; ++w)
    for (int n = 0; n < N; ++n) v[n] += scratch[w * N + n];
  __syncthreads();
}

// The four normals of a block of a chain's stream.
template <class T>
LFQ_DEVICE void normal_block(const stream& rng, uint32_t block, uint32_t chain, T (&n)[4]) {
  uint32_t x0 = block, x1 = rng.word1(), x2 = chain, x3 = rng.word3();
  philox4x32(x0, x1, x2, x3, uint32_t(rng.seed), uint32_t(rng.seed >> 32));
  box_muller<T>(x0, x1, n[0], n[1]);
  box_muller<T>(x2, x3, n[2], n[3]);
}
LFQ_HD double uniform(const stream& rng, uint32_t chain) {
  uint32_t x0 = 0, x1 = rng.word1(), x2 = chain, x3 = rng.word3();
  philox4x32(x0, x1, x2, x3, uint32_t(rng.seed), uint32_t(rng.seed >> 32));
  return uniform53(x0, x1);
}

LFQ_NAMESPACE_END

namespace lfq_cuda {

// Leaves a text for lfq_cuda_last_error and returns code.
int fail(int code, const char* format, ...);
// The same for a failed check of liblfq, whose text is passed on.
int fail_check(int code);
int check_cuda(cudaError_t e, const char* what);
int check_workspace(const void* ws, size_t bytes, size_t need);
// Shared memory that a block of the current device may ask for; 0 without a device.
size_t shared_limit();

template <class... P, class... A>
int launch(const char* what, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream, A... arguments) {
  if (blocks == 0) return LFQ_OK;
  if (blocks > 0x7fffffff) return fail(LFQ_ERR_ARGUMENT, "%s: the batch is too large for one call", what);
  if (shared > 48 * 1024)
    if (int e = check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what)) return e;
  cudaLaunchConfig_t c{};
  c.gridDim = dim3(unsigned(blocks));
  c.blockDim = dim3(unsigned(threads));
  c.dynamicSmemBytes = shared;
  c.stream = static_cast<cudaStream_t>(stream);
  return check_cuda(cudaLaunchKernelEx(&c, kernel, P(arguments)...), what);
}

// Pieces of a workspace; with a null base it only counts.
struct pieces {
  char* base;
  size_t used = 0;
  explicit pieces(void* p) : base(static_cast<char*>(p)) {}
  template <class U>
  U* take(int64_t n) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (size_t(n) * sizeof(U) + 255) & ~size_t(255);
    return p;
  }
};

}  // namespace lfq_cuda
