// A small simulation with its own loop and its own measurement. It calls lfq's HMC, then HMC through a trained flow that
// it loads from a file, and compares the two:   embed_cpp FLOW.safetensors
#include <cmath>
#include <cstdio>
#include <exception>
#include <lfq/flow_file.hpp>
#include <lfq/lfq.hpp>

namespace {

const std::vector<int32_t> extent = {16, 16};

struct average {
  double sum = 0, sum_of_squares = 0;
  int n = 0;
  void add(double x) {
    sum += x;
    sum_of_squares += x * x;
    ++n;
  }
  double mean() const { return sum / n; }
  double error() const { return std::sqrt((sum_of_squares / n - mean() * mean()) / (n - 1)); }
};

// The mean over sites and diagonals of phi_x phi_{x + (1, 1)}, which lfq does not measure.
double diagonal(const double* phi) {
  const int rows = extent[0], columns = extent[1];
  double sum = 0;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) sum += phi[i * columns + j] * phi[(i + 1) % rows * columns + (j + 1) % columns];
  return sum / (rows * columns);
}

void simulate(const char* name, lfq::hmc<double>& hmc, int64_t volume) {
  constexpr int n_chains = 16, n_blocks = 20, n_between = 10;
  hmc.advance(1, 100, false);  // thermalise
  std::vector<average> chain(n_chains);
  average accepted;
  for (int block = 0; block < n_blocks; ++block) {
    hmc.advance(1, n_between, false);
    for (uint8_t yes : hmc.accepted()) accepted.add(yes);
    for (int i = 0; i < n_chains; ++i) chain[i].add(diagonal(hmc.phi().data() + i * volume));
  }
  average all;  // chains are independent, whatever the autocorrelation within one
  for (const average& c : chain) all.add(c.mean());
  std::printf("%s %.17g %.3g %.3f\n", name, all.mean(), all.error(), accepted.mean());
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: embed_cpp FLOW.safetensors\n");
    return 2;
  }
  const lfq::theory theory(extent, 0.634, 0.5);
  lfq::flow flow = lfq::load_flow(argv[1], extent);

  lfq::hmc_settings settings;
  settings.n_steps = 10;
  lfq::hmc<double> plain(theory, settings);
  plain.start(16, 1);
  simulate("hmc", plain, theory.volume());

  lfq::hmc<double> through_flow(theory, settings, &flow);
  // A flow may be steep far from the fields it was trained on, so the latents are those of thermal fields.
  std::vector<double> latent(plain.phi().size()), log_det(16);
  flow.inverse(16, plain.phi().data(), latent.data(), log_det.data());
  through_flow.start(latent, 2);
  simulate("flow-hmc", through_flow, theory.volume());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "embed_cpp: %s\n", error.what());
  return 1;
}
