// lfq.hpp: C++17 over lfq.h. Errors become exceptions, workspaces are kept from call to call, everything else is the
// caller's. Fields are C-ordered arrays (n_chains, *extent) of float or double. Link with lfq::lfq.
//
// An object may be used by one thread at a time; kernels themselves run on n_threads threads (0: all).
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lfq/lfq.h"

namespace lfq {

// What a call of lfq.h complained about; status is one of lfq_status.
class error : public std::runtime_error {
 public:
  const int status;
  error(int code, const std::string& what) : std::runtime_error(what), status(code) {}
};
inline void check(int status) {
  if (status != LFQ_OK) throw error(status, lfq_last_error());
}

// Whether the loaded library speaks the language of the header this was compiled with.
inline bool compatible() { return lfq_abi_version() == LFQ_ABI_VERSION; }

namespace detail {

template <class T, class F32, class F64>
constexpr auto of_type(F32 f32, F64 f64) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "fields are float or double");
  if constexpr (std::is_same_v<T, float>)
    return f32;
  else
    return f64;
}
#define LFQ_OF(T, name) ::lfq::detail::of_type<T>(lfq_##name##_f32, lfq_##name##_f64)

class workspace {
 public:
  void* of(size_t bytes) {
    // The size functions return 0 for bad arguments, which the call itself then explains.
    if (bytes > data_.size()) data_.resize(bytes);
    return data_.data();
  }
  size_t size() const { return data_.size(); }

 private:
  std::vector<char> data_;
};

}  // namespace detail

// S = sum_x [-beta sum_mu phi_x phi_{x+mu} + (1 - 2 lam) phi_x^2 + lam phi_x^4] on a periodic lattice.
class theory {
 public:
  theory(const std::vector<int32_t>& extent, double beta, double lam) {
    if (extent.empty() || extent.size() > LFQ_MAX_DIM) throw error(LFQ_ERR_ARGUMENT, "theory: extent must have 1 to 4 entries");
    record_.ndim = int32_t(extent.size());
    for (size_t i = 0; i < extent.size(); ++i) record_.extent[i] = extent[i];
    record_.beta = beta;
    record_.lam = lam;
    check(lfq_phi4_workspace_f64(&record_, 0, 1) ? LFQ_OK : LFQ_ERR_ARGUMENT);
  }
  const lfq_phi4* get() const { return &record_; }
  std::vector<int32_t> extent() const { return {record_.extent, record_.extent + record_.ndim}; }
  int64_t volume() const {
    int64_t v = 1;
    for (int i = 0; i < record_.ndim; ++i) v *= record_.extent[i];
    return v;
  }
  // action: n_chains doubles
  template <class T>
  void action(int64_t n_chains, const T* phi, double* action, int n_threads = 0) {
    void* ws = room<T>(n_chains, n_threads);
    check(LFQ_OF(T, phi4_action)(&record_, n_chains, phi, action, ws, space_.size(), n_threads));
  }
  // force = -dS/dphi, like phi
  template <class T>
  void force(int64_t n_chains, const T* phi, T* force, int n_threads = 0) {
    void* ws = room<T>(n_chains, n_threads);
    check(LFQ_OF(T, phi4_force)(&record_, n_chains, phi, force, ws, space_.size(), n_threads));
  }
  // observables: (n_chains, LFQ_N_OBSERVABLES)
  template <class T>
  void observables(int64_t n_chains, const T* phi, double* observables, int n_threads = 0) {
    void* ws = room<T>(n_chains, n_threads);
    const std::vector<double> kernel = smear();
    check(LFQ_OF(T, phi4_observables)(&record_, n_chains, phi, kernel.data(), observables, ws, space_.size(), n_threads));
  }
  // The heat kernel of flow time t for each axis, as lfq_phi4_observables wants it.
  std::vector<double> smear(double t = 1.0) const {
    constexpr double two_pi = 6.283185307179586476925287;
    std::vector<double> kernel;
    for (int32_t n : extent())
      for (int x = 0; x < n; ++x) {
        double sum = 0;
        for (int k = 0; k < n; ++k) {
          const double s = std::sin(0.5 * two_pi * k / n);
          sum += std::exp(-4 * s * s * t) * std::cos(two_pi * (int64_t(k) * x % n) / n);
        }
        kernel.push_back(sum / n);
      }
    return kernel;
  }

 private:
  template <class T>
  void* room(int64_t n_chains, int n_threads) {
    return space_.of(LFQ_OF(T, phi4_workspace)(&record_, n_chains, n_threads));
  }
  lfq_phi4 record_{};
  detail::workspace space_;
};

// A list of layers and their weights. flow_file.hpp reads one from a file.
class flow {
 public:
  flow(std::vector<lfq_layer> layers, std::vector<double> weights, int64_t volume)
      : layers_(std::move(layers)), weights_(std::move(weights)), volume_(volume) {
    const lfq_flow f = get();
    check(lfq_flow_check(&f));
  }
  // Valid while this object lives and is not changed.
  lfq_flow get() const {
    return {volume_, int64_t(weights_.size()), int32_t(layers_.size()), 0, layers_.data(), weights_.data()};
  }
  int64_t volume() const { return volume_; }
  const std::vector<lfq_layer>& layers() const { return layers_; }
  const std::vector<double>& weights() const { return weights_; }

  // x = f(z) with log_det[i] = log|det df/dz|
  template <class T>
  void forward(int64_t n_chains, const T* z, T* x, double* log_det, int n_threads = 0) {
    const lfq_flow f = get();
    void* ws = space_.of(LFQ_OF(T, flow_workspace)(&f, n_chains, n_threads));
    check(LFQ_OF(T, flow_forward)(&f, n_chains, z, x, log_det, ws, space_.size(), n_threads));
  }
  // z = f^-1(x) with log_det[i] = log|det df^-1/dx|
  template <class T>
  void inverse(int64_t n_chains, const T* x, T* z, double* log_det, int n_threads = 0) {
    const lfq_flow f = get();
    void* ws = space_.of(LFQ_OF(T, flow_workspace)(&f, n_chains, n_threads));
    check(LFQ_OF(T, flow_inverse)(&f, n_chains, x, z, log_det, ws, space_.size(), n_threads));
  }
  // From dL/dx and dL/dlog_det at f(z): dz = dL/dz, and dL/dweights summed over chains unless null
  template <class T>
  void vjp(int64_t n_chains, const T* z, const T* dx, const double* dlog_det, T* dz, double* dweights = nullptr,
           int n_threads = 0) {
    const lfq_flow f = get();
    void* ws = space_.of(LFQ_OF(T, flow_workspace)(&f, n_chains, n_threads));
    check(LFQ_OF(T, flow_vjp)(&f, n_chains, z, dx, dlog_det, dz, dweights, ws, space_.size(), n_threads));
  }

 private:
  std::vector<lfq_layer> layers_;
  std::vector<double> weights_;
  int64_t volume_;
  detail::workspace space_;
};

struct hmc_settings {
  double tau = 1.0;             // length of a trajectory
  int32_t n_steps = 10;
  int32_t n_steps_spread = 0;
  int n_threads = 0;
  lfq_integrator integrator = {1, 0, {0.5, 0.5}, {1.0}};  // leapfrog
};

// A caller's own action: see action.hpp.
template <class T>
using custom_record = std::conditional_t<std::is_same_v<T, float>, lfq_custom_f32, lfq_custom_f64>;

// Chains of hybrid Monte Carlo: of a theory, of one seen through a flow, or of the caller's own action. The same seed
// gives the chains of lfq.HMC in Python.
template <class T>
class hmc {
 public:
  hmc(const theory& t, const hmc_settings& settings, const flow* f = nullptr)
      : theory_(t), flow_(f), settings_(settings) {}
  // `action` and what its context points to must outlive this object.
  hmc(const custom_record<T>& action, const hmc_settings& settings, const flow* f = nullptr)
      : theory_({action.extent, action.extent + action.ndim}, 0.0, 0.0), action_(action), custom_(true), flow_(f), settings_(settings) {}

  // n_chains new chains, normals of standard deviation 1/2; with a flow these are latents.
  void start(int64_t n_chains, uint64_t seed) {
    if (n_chains < 0) throw error(LFQ_ERR_ARGUMENT, "n_chains must not be negative");
    z_.resize(size_t(n_chains * theory_.volume()));
    check(LFQ_OF(T, normal)(seed, LFQ_PURPOSE_START, 0, 0, n_chains, theory_.volume(), z_.data(), settings_.n_threads));
    for (T& x : z_) x *= T(0.5);
    begin(n_chains, seed, 0);
  }
  // Chains that continue from fields, or latents, (n_chains, *extent); `trajectory` is the number of their next one.
  void start(std::vector<T> z, uint64_t seed, uint64_t trajectory = 0) {
    if (z.size() % size_t(theory_.volume())) throw error(LFQ_ERR_ARGUMENT, "z is not a whole number of fields");
    z_ = std::move(z);
    begin(int64_t(z_.size()) / theory_.volume(), seed, trajectory);
  }

  // n_samples samples, thin trajectories apart, of every chain; measured unless told otherwise.
  void advance(int64_t n_samples, int32_t thin = 1, bool measure = true) {
    lfq_hmc h{};
    h.integrator = settings_.integrator;
    h.step_size = settings_.tau / settings_.n_steps;
    h.n_steps = settings_.n_steps;
    h.n_steps_spread = settings_.n_steps_spread;
    h.thin = thin;
    h.n_samples = n_samples;
    h.seed = seed_;
    h.first_trajectory = trajectory_;
    const size_t trajectories = size_t(n_samples > 0 && thin > 0 ? n_samples * thin : 0);
    dh_.resize(trajectories * size_t(n_chains_));
    accepted_.resize(dh_.size());
    observables_.resize(measure && n_samples > 0 ? size_t(n_samples * n_chains_) * LFQ_N_OBSERVABLES : 0);
    const std::vector<double> kernel = theory_.smear();
    double* const o = observables_.empty() ? nullptr : observables_.data();
    lfq_flow f{};
    if (flow_) f = flow_->get();
    const lfq_flow* const through = flow_ ? &f : nullptr;
    const int nt = settings_.n_threads;
    if (custom_) {
      void* ws = space_.of(LFQ_OF(T, custom_workspace)(through, &action_, n_chains_, nt));
      check(LFQ_OF(T, custom_hmc)(through, &action_, &h, n_chains_, z_.data(), phi_.data(), dh_.data(), accepted_.data(),
                                  kernel.data(), o, nullptr, ws, space_.size(), nt));
    } else {
      void* ws = space_.of(LFQ_OF(T, hmc_workspace)(through, theory_.get(), n_chains_, nt));
      check(LFQ_OF(T, hmc)(through, theory_.get(), &h, n_chains_, z_.data(), phi_.data(), dh_.data(), accepted_.data(),
                           kernel.data(), o, nullptr, ws, space_.size(), nt));
    }
    trajectory_ += trajectories;
  }

  int64_t n_chains() const { return n_chains_; }
  uint64_t trajectory() const { return trajectory_; }
  const std::vector<T>& latent() const { return z_; }                      // (n_chains, *extent): the field without a flow
  const std::vector<T>& phi() const { return phi_; }                       // the fields after the last advance
  const std::vector<double>& dh() const { return dh_; }                    // of the last advance: (n_samples * thin, n_chains)
  const std::vector<uint8_t>& accepted() const { return accepted_; }       // likewise
  const std::vector<double>& observables() const { return observables_; }  // (n_samples, n_chains, LFQ_N_OBSERVABLES)

 private:
  void begin(int64_t n_chains, uint64_t seed, uint64_t trajectory) {
    n_chains_ = n_chains;
    seed_ = seed;
    trajectory_ = trajectory;
    phi_ = z_;
  }
  theory theory_;
  custom_record<T> action_{};
  bool custom_ = false;
  const flow* flow_;
  hmc_settings settings_;
  int64_t n_chains_ = 0;
  uint64_t seed_ = 0, trajectory_ = 0;
  std::vector<T> z_, phi_;
  std::vector<double> dh_, observables_;
  std::vector<uint8_t> accepted_;
  detail::workspace space_;
};

}  // namespace lfq
