// HMC of phi^4 with a chain in the registers and the shared memory of one block.
#pragma once
#include "cuda/hmc.cuh"
#include "cuda/observables.cuh"

LFQ_NAMESPACE_BEGIN

// A chain whose field lies in shared memory and, with the momenta, in registers. z is the last accepted field.
template <class T, int D, int R>
struct resident_phi4 {
  const hmc_arguments& a;
  const strip<D, R> own;
  const phi4_site<T> site;
  T* z;
  T* phi;
  T x[R], p[R];

  LFQ_DEVICE resident_phi4(const hmc_arguments& arguments, T* field, T* shared)
      : a(arguments), own(arguments.theory, threadIdx.x), site(arguments.theory.beta, arguments.theory.lam), z(field), phi(shared) {}

  LFQ_DEVICE void publish() {
    own.each([&](int k, int i) { phi[i] = x[k]; });
    __syncthreads();
  }
  LFQ_DEVICE void load() {
    own.each([&](int k, int i) { x[k] = z[i]; });
    publish();
  }
  LFQ_DEVICE double start() {
    load();
    double s = 0;
    own.visit(phi, [&](int k, int) { return x[k]; }, [&](int, int, T v, T forward, T) { s += double(site.action(v, forward)); });
    return s;
  }
  // A block of the stream makes four sites of a row, which other threads own: it comes through phi.
  LFQ_DEVICE double refresh(const stream& rng, uint32_t chain, double unit) {
    const int volume = int(a.volume);
    __syncthreads();
    for (int b = threadIdx.x; 4 * b < volume; b += blockDim.x) {
      T n[4];
      normal_block<T>(rng, uint32_t(b), chain, n);
      for (int j = 0; j < 4; ++j)
        if (4 * b + j < volume) phi[4 * b + j] = n[j] * T(unit);
    }
    __syncthreads();
    double p2 = 0;
    own.each([&](int k, int i) {
      p[k] = phi[i];
      p2 += double(p[k]) * double(p[k]);
    });
    __syncthreads();
    publish();
    return p2;
  }
  LFQ_DEVICE void kick_drift(double k, double d) {
    const phi4_kick<T> kick(a.theory.beta, a.theory.lam, k);
    own.visit(phi, [&](int j, int) { return x[j]; }, [&](int j, int, T v, T, T all) { p[j] = kick(p[j], v, all); });
    __syncthreads();
    const T step(d);
    own.each([&](int j, int) { x[j] = fma(step, p[j], x[j]); });
    publish();
  }
  LFQ_DEVICE void last_kick(double k, double& s, double& p2) {
    const phi4_kick<T> kick(a.theory.beta, a.theory.lam, k);
    own.visit(phi, [&](int j, int) { return x[j]; }, [&](int j, int, T v, T forward, T all) {
      const double m = double(kick(p[j], v, all));
      s += double(site.action(v, forward));
      p2 += m * m;
    });
  }
  LFQ_DEVICE void settle(bool accept) {
    if (accept)
      own.each([&](int k, int i) { z[i] = x[k]; });
    else
      load();
  }
  LFQ_DEVICE void measure(double* out) {
    measure_shared<T, D>(a.theory, a.smear, phi, out);
    load();
  }
};

// THREADS: the most there may be, so that field and momenta of R sites stay in registers.
template <class T, int D, int R, int THREADS>
__global__ void __launch_bounds__(THREADS) resident_kernel(const __grid_constant__ hmc_arguments a, T* phi) {
  T* shared = reinterpret_cast<T*>(lfq_shared + sum_scratch(blockDim.x, moments<D>::size));
  resident_phi4<T, D, R> potential(a, phi + blockIdx.x * a.volume, shared);
  run_chain(potential, a, blockIdx.x);
}

LFQ_NAMESPACE_END
