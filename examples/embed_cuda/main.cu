// A simulation on a GPU with its own loop, memory, stream and measurement. It calls lfq's HMC, then HMC through a trained
// flow that it loads from a file:   embed_cuda FLOW.safetensors [SAMPLES THIN WARMUP]
// For each it prints the acceptance, <phi^2> and its error. Exit codes: 1 an error, 2 bad arguments, 3 no GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <lfq/flow_file.hpp>
#include <lfq/lfq_cuda.h>

namespace {

constexpr int n_chains = 16;
const std::vector<int32_t> extent = {16, 16};

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}
void check_lfq(int status) {
  if (status != LFQ_OK) throw lfq::error(status, lfq_cuda_last_error());
}

struct own_stream {
  cudaStream_t id = nullptr;
  own_stream() { check(cudaStreamCreate(&id)); }
  own_stream(const own_stream&) = delete;
  ~own_stream() { cudaStreamDestroy(id); }
};

// Memory of the device.
template <class T>
class device {
 public:
  explicit device(size_t n) : n_(n) { check(cudaMalloc(&data_, n * sizeof(T))); }
  device(const std::vector<T>& host, cudaStream_t stream) : device(host.size()) {
    check(cudaMemcpyAsync(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice, stream));
  }
  device(const device&) = delete;
  ~device() { cudaFree(data_); }
  T* get() const { return data_; }
  size_t size() const { return n_; }
  // Waits for the stream.
  std::vector<T> to_host(cudaStream_t stream) const {
    std::vector<T> host(n_);
    check(cudaMemcpyAsync(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

// A measurement of this program's own: the mean over sites of phi^2, a warp for each chain.
__global__ void mean_square(int n_sites, const double* phi, double* mean) {
  const double* const field = phi + size_t(blockIdx.x) * n_sites;
  double sum = 0;
  for (int i = threadIdx.x; i < n_sites; i += 32) sum += field[i] * field[i];
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x == 0) mean[blockIdx.x] = sum / n_sites;
}

struct plan {
  int samples = 200, thin = 10, warmup = 100;  // trajectories from one sample to the next, and before the first
};

// The loop: lfq moves the chains, the kernel above looks at them. Nothing waits for the device before the end.
template <class Advance>
void simulate(const char* name, const plan& p, int n_sites, uint64_t seed, const double* phi, cudaStream_t stream, Advance&& advance) {
  lfq_hmc hmc{};
  hmc.integrator = {1, 0, {0.5, 0.5}, {1.0}};  // leapfrog
  hmc.step_size = 0.1;
  hmc.n_steps = 10;
  hmc.n_samples = 1;
  hmc.seed = seed;
  device<double> dh(size_t(n_chains) * std::max(p.thin, p.warmup)), mean(size_t(n_chains) * p.samples);
  device<uint8_t> accepted(size_t(n_chains) * p.samples * p.thin);
  if (p.warmup > 0) {
    hmc.thin = p.warmup;
    advance(hmc, dh.get(), nullptr);
    hmc.first_trajectory += p.warmup;
  }
  hmc.thin = p.thin;
  cudaLaunchConfig_t launch{};
  launch.gridDim = n_chains;
  launch.blockDim = 32;
  launch.stream = stream;
  for (int i = 0; i < p.samples; ++i) {
    advance(hmc, dh.get(), accepted.get() + size_t(n_chains) * p.thin * i);
    hmc.first_trajectory += p.thin;
    check(cudaLaunchKernelEx(&launch, mean_square, n_sites, phi, mean.get() + size_t(n_chains) * i));
  }

  double yes = 0;
  for (const uint8_t a : accepted.to_host(stream)) yes += a;
  std::vector<double> of_chain(n_chains);
  const std::vector<double> means = mean.to_host(stream);
  for (size_t i = 0; i < means.size(); ++i) of_chain[i % n_chains] += means[i] / p.samples;
  double sum = 0, squares = 0;  // chains are independent, whatever the autocorrelation within one
  for (const double m : of_chain) sum += m;
  for (const double m : of_chain) squares += (m - sum / n_chains) * (m - sum / n_chains);
  std::printf("%s %.6f %.17g %.3g\n", name, yes / double(accepted.size()), sum / n_chains,
              std::sqrt(squares / (n_chains * (n_chains - 1))));
}

void run(const char* flow_file, const plan& p) {
  const lfq::theory theory(extent, 0.634, 0.5);
  const lfq::flow flow = lfq::load_flow(flow_file, extent);
  const int n_sites = int(theory.volume());
  const own_stream stream;

  // Normals of standard deviation 1/2, as lfq.HMC starts: lfq has the same random numbers on both sides.
  std::vector<double> start(size_t(n_chains) * n_sites);
  lfq::check(lfq_normal_f64(1, LFQ_PURPOSE_START, 0, 0, n_chains, n_sites, start.data(), 0));
  for (double& x : start) x *= 0.5;
  const device<double> phi(start, stream.id);
  const device<char> space(lfq_cuda_hmc_workspace_f64(theory.get(), n_chains));
  simulate("hmc", p, n_sites, 1, phi.get(), stream.id, [&](const lfq_hmc& hmc, double* dh, uint8_t* accepted) {
    check_lfq(lfq_cuda_hmc_f64(theory.get(), &hmc, LFQ_CUDA_AUTO, n_chains, phi.get(), dh, accepted, nullptr, nullptr,
                               space.get(), space.size(), stream.id));
  });

  // The kernels want a flow's layers on both sides, its weights on the device.
  const device<lfq_layer> layers(flow.layers(), stream.id);
  const device<double> weights(flow.weights(), stream.id);
  lfq_flow on_device = flow.get();
  on_device.weights = weights.get();
  const device<double> latent(start.size()), log_det(n_chains);
  const device<char> flow_space(lfq_cuda_flow_workspace_f64(&on_device, n_chains));
  // A flow may be steep far from the fields it was trained on, so the latents are those of thermal fields.
  check_lfq(lfq_cuda_flow_inverse_f64(&on_device, layers.get(), n_chains, phi.get(), latent.get(), log_det.get(),
                                      flow_space.get(), flow_space.size(), stream.id));
  simulate("flow-hmc", p, n_sites, 2, phi.get(), stream.id, [&](const lfq_hmc& hmc, double* dh, uint8_t* accepted) {
    check_lfq(lfq_cuda_flow_hmc_f64(&on_device, layers.get(), theory.get(), &hmc, n_chains, latent.get(), phi.get(), dh,
                                    accepted, nullptr, nullptr, flow_space.get(), flow_space.size(), stream.id));
  });
}

}  // namespace

int main(int argc, char** argv) try {
  plan p;
  if (argc == 5) p = {std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4])};
  if ((argc != 2 && argc != 5) || p.samples < 1 || p.thin < 1 || p.warmup < 0) {
    std::fprintf(stderr, "usage: embed_cuda FLOW.safetensors [SAMPLES THIN WARMUP]\n");
    return 2;
  }
  if (lfq_cuda_device_count() == 0) {
    std::fprintf(stderr, "embed_cuda: no GPU: %s\n", lfq_cuda_last_error());
    return 3;
  }
  run(argv[1], p);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "embed_cuda: %s\n", error.what());
  return 1;
}
