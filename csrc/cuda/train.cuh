// The end of a training step: the gradient summed over blocks, log-weights of the batch, what they say, and Adam.
#pragma once
#include "cuda/device.cuh"

LFQ_NAMESPACE_BEGIN

template <class T>
struct train_arguments {
  int64_t n, n_noise, n_weights;
  int copies;                                  // coarse fields of a latent
  const T* noise;                              // (n, n_noise)
  const double *coarse_action, *target_action, *log_det, *gradient;
  double *weights, *first_moment, *second_moment, *log_w;
  double* history;                             // (4, total_steps): loss, ess, std of log w, learning rate
  int64_t* failed_step;                        // -1 until a loss or a gradient is NaN or Inf; nothing moves after that
  int64_t step, total_steps;
  double learning_rate;
};

// Sums over slots, a fixed share of them a thread. As many weights a block as fill a sector of memory.
constexpr int weights_of_block = 4;
static __global__ void weights_kernel(int n_slots, int64_t n_weights, double factor, const double* partial, double* dweights) {
  double* const sums = reinterpret_cast<double*>(lfq_shared);
  const int64_t i = blockIdx.x * int64_t(weights_of_block) + threadIdx.x % weights_of_block;
  double sum = 0;
  if (i < n_weights) {
#pragma unroll 4
    for (int s = threadIdx.x / weights_of_block; s < n_slots; s += blockDim.x / weights_of_block) sum += partial[s * n_weights + i];
  }
  sums[threadIdx.x] = sum;
  for (unsigned left = blockDim.x / 2; left >= weights_of_block; left /= 2) {
    __syncthreads();
    if (threadIdx.x < left) sums[threadIdx.x] += sums[threadIdx.x + left];
  }
  if (threadIdx.x < weights_of_block && i < n_weights) dweights[i] = sums[threadIdx.x] * factor;
}

// One warp a latent.
template <class T>
__global__ void log_weights_kernel(train_arguments<T> a) {
  if (*a.failed_step >= 0) return;
  const int lane = threadIdx.x % warp_size;
  const int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / warp_size;
  if (i >= a.n) return;
  double sum[1] = {0};
  for (int64_t j = lane; j < a.n_noise; j += warp_size) {
    const double v = double(a.noise[i * a.n_noise + j]);
    sum[0] -= 0.5 * v * v;
  }
  for (int64_t j = lane; j < a.copies; j += warp_size) sum[0] -= a.coarse_action[i * a.copies + j];
  warp_sum(sum);
  // log sqrt(2 pi)
  if (lane == 0) a.log_w[i] = a.log_det[i] - a.target_action[i] - (sum[0] - 0.91893853320467274178 * double(a.n_noise));
}

// One block.
template <class T>
__global__ void train_step_kernel(train_arguments<T> a) {
  if (*a.failed_step >= 0) return;
  __syncthreads();
  const int lane = threadIdx.x % warp_size, n_warps = blockDim.x / warp_size;
  // sum of log w; zero unless something is not finite
  double total[2] = {0, 0};
  double largest = -HUGE_VAL;
  for (int64_t i = threadIdx.x; i < a.n; i += blockDim.x) {
    const double w = a.log_w[i];
    total[0] += w;
    total[1] += w * 0.0;
    largest = w > largest ? w : largest;
  }
  for (int64_t i = threadIdx.x; i < a.n_weights; i += blockDim.x) total[1] += a.gradient[i] * 0.0;
  block_sum(total);
  if (!(total[1] == 0.0)) {
    if (threadIdx.x == 0) *a.failed_step = a.step;
    return;
  }
  double* scratch = reinterpret_cast<double*>(lfq_shared);
  for (int mask = warp_size / 2; mask > 0; mask /= 2) largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
  if (lane == 0) scratch[threadIdx.x / warp_size] = largest;
  __syncthreads();
  for (int w = 0; w < n_warps; ++w) largest = fmax(largest, scratch[w]);
  __syncthreads();
  const double mean = total[0] / double(a.n);
  // w, w^2, (log w - mean)^2
  double sums[3] = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < a.n; i += blockDim.x) {
    const double w = ::exp(a.log_w[i] - largest), d = a.log_w[i] - mean;
    sums[0] += w;
    sums[1] += w * w;
    sums[2] += d * d;
  }
  block_sum(sums);
  const double rate = 0.5 * a.learning_rate * (1 + ::cos(3.14159265358979323846 * double(a.step) / double(a.total_steps)));
  if (threadIdx.x == 0) {
    const double values[4] = {-mean, sums[0] * sums[0] / (double(a.n) * sums[1]), ::sqrt(sums[2] / double(a.n)), rate};
    for (int k = 0; k < 4; ++k) a.history[k * a.total_steps + a.step] = values[k];
  }
  // Adam (arXiv:1412.6980) with its default moments.
  const double correction1 = 1 - ::pow(0.9, double(a.step + 1)), correction2 = 1 - ::pow(0.999, double(a.step + 1));
  for (int64_t i = threadIdx.x; i < a.n_weights; i += blockDim.x) {
    const double g = a.gradient[i], m = 0.9 * a.first_moment[i] + 0.1 * g, v = 0.999 * a.second_moment[i] + 0.001 * g * g;
    a.first_moment[i] = m;
    a.second_moment[i] = v;
    a.weights[i] -= rate * (m / correction1) / (::sqrt(v / correction2) + 1e-8);
  }
}

LFQ_NAMESPACE_END
