// Hybrid Monte Carlo on the GPU: what all of its kernels share, and the driver of chains that live in one block.
#pragma once
#include "cuda/phi4.cuh"

LFQ_NAMESPACE_BEGIN

// Momenta are kept in units of 1 / unit, the longest drift, as on the CPU.
LFQ_HD double momentum_unit(const lfq_hmc& h) {
  double longest = h.integrator.drift[0];
  for (int i = 1; i < h.integrator.n_stages; ++i)
    if (::fabs(h.integrator.drift[i]) > ::fabs(longest)) longest = h.integrator.drift[i];
  return longest * h.step_size;
}

// Steps of a trajectory.
LFQ_HD int drawn_steps(const lfq_hmc& h, uint64_t number) {
  if (h.n_steps_spread == 0) return h.n_steps;
  const stream rng{h.seed, number, LFQ_PURPOSE_LENGTH};
  uint32_t x0 = 0, x1 = rng.word1(), x2 = 0, x3 = rng.word3();
  philox4x32(x0, x1, x2, x3, uint32_t(h.seed), uint32_t(h.seed >> 32));
  return h.n_steps - h.n_steps_spread + int32_t(uint64_t(x0) * (2 * uint64_t(h.n_steps_spread) + 1) >> 32);
}

// The kicks and drifts of trajectories, times the step size and in the units of the momenta. kick[0] begins a trajectory,
// kick[i] follows the i-th drift of a step; after the last one it is that of two adjacent steps, or kick[n_stages + 1],
// which ends the trajectory.
struct schedule {
  int n_stages;
  double kick[LFQ_MAX_STAGES + 2], drift[LFQ_MAX_STAGES];
  schedule() = default;
  schedule(const lfq_hmc& h, double unit) : n_stages(h.integrator.n_stages), kick{}, drift{} {
    const lfq_integrator& in = h.integrator;
    for (int i = 0; i < n_stages; ++i) {
      kick[i] = in.kick[i] * h.step_size * unit;
      drift[i] = in.drift[i] * h.step_size / unit;
    }
    kick[n_stages] = (in.kick[n_stages] + in.kick[0]) * h.step_size * unit;
    kick[n_stages + 1] = in.kick[n_stages] * h.step_size * unit;
  }
};

// Calls kick_drift(number of the kick, number of the drift) for a trajectory; returns the number of the last kick.
#pragma nv_exec_check_disable
template <class F>
LFQ_HD int integrate(const schedule& s, int n_steps, F&& kick_drift) {
  int kick = 0;
  for (int step = 0; step < n_steps; ++step)
    for (int stage = 0; stage < s.n_stages; ++stage) {
      kick_drift(kick, stage);
      kick = stage + 1;
    }
  return s.n_stages + 1;
}

LFQ_HD bool accepts(double dh, const lfq_hmc& h, uint64_t number, uint32_t chain) {
  return dh <= 0.0 || uniform(stream{h.seed, number, LFQ_PURPOSE_ACCEPT}, chain) < ::exp(-dh);
}

struct hmc_arguments {
  lfq_phi4 theory;
  lfq_hmc settings;
  schedule steps;
  smearing smear;
  int64_t volume, n_chains;
  double* dh;
  uint8_t* accepted;    // null when not wanted
  double* observables;  // likewise
};

// All trajectories of one chain, in one block. A potential has start() -> S; refresh(stream, chain, unit) -> sum of
// p^2; kick_drift(kick, drift) and last_kick(kick, S, sum of p^2), which take numbers of the schedule's; settle(accept);
// measure(out). Sums are a thread's share.
template <class P>
LFQ_DEVICE void run_chain(P& potential, const hmc_arguments& a, int64_t chain) {
  const lfq_hmc& h = a.settings;
  const uint32_t global_chain = uint32_t(h.first_chain + uint64_t(chain));
  const double unit = momentum_unit(h), half_mass = 0.5 / (unit * unit);
  double s0[1] = {potential.start()};
  block_sum(s0);
  int64_t n = 0;
  for (int64_t sample = 0; sample < h.n_samples; ++sample) {
    for (int t = 0; t < h.thin; ++t, ++n) {
      const uint64_t number = h.first_trajectory + uint64_t(n);
      // k0, s1, k1
      double e[3] = {potential.refresh(stream{h.seed, number, LFQ_PURPOSE_MOMENTA}, global_chain, unit), 0, 0};
      const int last = integrate(a.steps, drawn_steps(h, number), [&](int kick, int drift) { potential.kick_drift(kick, drift); });
      potential.last_kick(last, e[1], e[2]);
      block_sum(e);
      const double dh = (e[1] - s0[0]) + (e[2] - e[0]) * half_mass;
      const bool finite = dh - dh == 0.0, accept = finite && accepts(dh, h, number, global_chain);
      if (threadIdx.x == 0) {
        a.dh[n * a.n_chains + chain] = dh;
        if (a.accepted) a.accepted[n * a.n_chains + chain] = accept;
      }
      if (!finite) {
        for (++n; n < h.n_samples * h.thin; ++n)
          if (threadIdx.x == 0) {
            a.dh[n * a.n_chains + chain] = dh - dh;
            if (a.accepted) a.accepted[n * a.n_chains + chain] = 0;
          }
        for (int64_t left = sample; a.observables && left < h.n_samples; ++left)
          if (threadIdx.x < LFQ_N_OBSERVABLES) a.observables[(left * a.n_chains + chain) * LFQ_N_OBSERVABLES + threadIdx.x] = dh - dh;
        return;
      }
      if (accept) s0[0] = e[1];
      potential.settle(accept);
    }
    if (a.observables) potential.measure(a.observables + (sample * a.n_chains + chain) * LFQ_N_OBSERVABLES);
  }
}

LFQ_NAMESPACE_END
