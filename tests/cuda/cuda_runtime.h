// Stands in for CUDA's cuda_runtime.h so that kernels run on the host: blocks one after another, the threads of a
// block as fibres that yield at barriers and warp shuffles. Catches barriers that some threads miss and, under ASan,
// accesses beyond the shared memory asked for. Races between threads are not seen.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)0)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // empty, since headers of libstdc++ use it inside attributes
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class state { ready, at_barrier, at_shuffle, done };

struct fibre {
  ucontext_t context;
  state now;
  int shuffles;
  uint64_t slot[2];  // what it offers to its warp, for odd and even shuffles
  std::unique_ptr<char[]> stack;
};

constexpr size_t stack_bytes = 64 * 1024, shared_bytes = 232448;

struct block {
  std::vector<fibre> threads;
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
};
inline block* running = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}
inline void switch_to(ucontext_t& from, ucontext_t& to, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* save = nullptr;
  __sanitizer_start_switch_fiber(&save, stack, size);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(save, nullptr, nullptr);
#else
  (void)stack, (void)size;
  swapcontext(&from, &to);
#endif
}
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

inline void yield(state s) {
  fibre& f = running->threads[running->current];
  f.now = s;
  switch_to(f.context, running->scheduler, scheduler_stack, scheduler_stack_size);
}
inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  running->body();
  yield(state::done);
}

// Lanes whose whole warp waits at a shuffle, or has ended, go on. Returns whether there were any.
inline bool release_warps(std::vector<fibre>& threads) {
  bool released = false;
  for (size_t begin = 0; begin < threads.size(); begin += 32) {
    const size_t end = std::min(threads.size(), begin + 32);
    bool waiting = false, all = true;
    for (size_t i = begin; i < end; ++i) {
      waiting = waiting || threads[i].now == state::at_shuffle;
      all = all && (threads[i].now == state::at_shuffle || threads[i].now == state::done);
    }
    if (!waiting || !all) continue;
    for (size_t i = begin; i < end; ++i) {
      if (threads[i].now == state::done) fail("a lane ended before its warp's shuffle");
      threads[i].now = state::ready;
    }
    released = true;
  }
  return released;
}

inline void run_block(block& b) {
  for (fibre& f : b.threads) {
    f.now = state::ready;
    f.shuffles = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    for (size_t i = 0; i < b.threads.size(); ++i)
      if (b.threads[i].now == state::ready) {
        threadIdx.x = b.current = unsigned(i);
        switch_to(b.scheduler, b.threads[i].context, b.threads[i].stack.get(), stack_bytes);
      }
    if (release_warps(b.threads)) continue;
    size_t waiting = 0, done = 0;
    for (const fibre& f : b.threads) {
      waiting += f.now == state::at_barrier;
      done += f.now == state::done;
    }
    if (done == b.threads.size()) return;
    if (waiting != b.threads.size()) fail("a barrier or a shuffle that not all threads reach");
    for (fibre& f : b.threads) f.now = state::ready;
  }
}

template <class T>
T shuffle(T value, unsigned lane) {
  block* b = running;
  fibre& f = b->threads[b->current];
  const int parity = f.shuffles++ & 1;
  std::memcpy(&f.slot[parity], &value, sizeof(T));
  const size_t source = (b->current & ~31u) + lane;
  yield(state::at_shuffle);
  if (lane > 31 || source >= b->threads.size()) return value;
  std::memcpy(&value, &b->threads[source].slot[parity], sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::yield(emulator::state::at_barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, (emulator::running->current & 31u) ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, unsigned(lane));
}
// A lane whose source would lie outside the warp keeps its own.
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulator::running->current & 31u;
  return emulator::shuffle(value, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulator::running->current & 31u;
  return emulator::shuffle(value, lane + delta > 31u ? lane : lane + delta);
}
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(3.14159265358979323846 * x);
  *c = std::cos(3.14159265358979323846 * x);
}

inline void sincospif(float x, float* s, float* c) {
  *s = float(std::sin(3.14159265358979323846 * x));
  *c = float(std::cos(3.14159265358979323846 * x));
}

// ---- the parts of the runtime that lfq calls, and the programs that embed it -----------------
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid configuration"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* n) { return *n = 0, cudaSuccess; }
// Device memory is the host's, and whatever is queued is done at once.
template <class T>
cudaError_t cudaMalloc(T** data, size_t bytes) {
  *data = static_cast<T*>(std::malloc(bytes));
  return *data || bytes == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = int(emulator::shared_bytes), cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int value) {
  return size_t(value) <= emulator::shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
__align__(16) inline char lfq_shared[emulator::shared_bytes];

// Launches until one fails, and all after it; a test sets it.
extern "C" {
inline __attribute__((visibility("default"))) int emulated_launches_left = 1 << 30;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  if (c->blockDim.x > 1024 || c->blockDim.x == 0 || c->gridDim.x == 0 || c->dynamicSmemBytes > emulator::shared_bytes)
    return cudaErrorInvalidConfiguration;
  if (emulated_launches_left-- <= 0) return emulated_launches_left = 0, cudaErrorInvalidConfiguration;
  emulator::block b;
  b.threads.resize(c->blockDim.x);
  for (auto& f : b.threads) f.stack.reset(new char[emulator::stack_bytes]);
  gridDim = c->gridDim;
  blockDim = c->blockDim;
  b.body = [&] { kernel(arguments...); };
  emulator::running = &b;
  // What lies there is not to be relied on.
  std::memset(lfq_shared, 0xa5, c->dynamicSmemBytes);
  ASAN_POISON_MEMORY_REGION(lfq_shared + c->dynamicSmemBytes, emulator::shared_bytes - c->dynamicSmemBytes);
  for (blockIdx.x = 0; blockIdx.x < c->gridDim.x; ++blockIdx.x) emulator::run_block(b);
  ASAN_UNPOISON_MEMORY_REGION(lfq_shared, emulator::shared_bytes);
  emulator::running = nullptr;
  return cudaSuccess;
}
