#include "bindings.hpp"

namespace lfq_python {

// A null layers array stands for no flow.
struct optional_flow {
  lfq_flow flow{};
  const lfq_flow* get = nullptr;
  optional_flow(int64_t volume, const py::object& layers, const array<double>& weights) {
    if (layers.is_none()) return;
    flow = flow_of(volume, layers.cast<array<lfq_layer>>(), weights);
    get = &flow;
  }
};

template <class T>
struct hmc_api {
  size_t (*size)(const lfq_flow*, const lfq_phi4*, int64_t, int32_t);
  int (*evolve)(const lfq_flow*, const lfq_phi4*, const lfq_hmc*, int64_t, T*, T*, void*, size_t, int32_t);
  int (*hmc)(const lfq_flow*, const lfq_phi4*, const lfq_hmc*, int64_t, T*, T*, double*, uint8_t*, const double*, double*,
             lfq_failure*, void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const hmc_api f = *this;
    m.def(
        "evolve",
        [f](const py::object& layers, const array<double>& weights, const array<lfq_phi4>& theory,
            const array<lfq_hmc>& settings, array<T> z, array<T> momenta, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          const optional_flow flow(volume_of(t), layers, weights);
          check_size(settings.size(), 1, "hmc");
          const int64_t n = chains_of(z.size(), volume_of(t), "z");
          check_size(momenta.size(), z.size(), "momenta");
          T *pz = out(z, "z"), *pp = out(momenta, "momenta");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(flow.get, t, n, n_threads));
            code = f.evolve(flow.get, t, settings.data(), n, pz, pp, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("theory"), py::arg("hmc"), py::arg("z").noconvert(),
        py::arg("momenta").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "hmc",
        [f](const py::object& layers, const array<double>& weights, const array<lfq_phi4>& theory,
            const array<lfq_hmc>& settings, array<T> z, array<T> phi, array<double> dh, array<uint8_t> accepted,
            const array<double>& smear, array<double> observables, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          const optional_flow flow(volume_of(t), layers, weights);
          check_size(settings.size(), 1, "hmc");
          const lfq_hmc* h = settings.data();
          const int64_t n = chains_of(z.size(), volume_of(t), "z"), trajectories = h->n_samples * h->thin;
          int64_t extents = 0;
          for (int i = 0; i < t->ndim && i < LFQ_MAX_DIM; ++i) extents += t->extent[i];
          if (phi.size() > 0) check_size(phi.size(), z.size(), "phi");
          check_size(smear.size(), extents, "smear");
          check_size(dh.size(), n * trajectories, "dh");
          check_size(accepted.size(), n * trajectories, "accepted");
          if (observables.size() > 0) check_size(observables.size(), n * h->n_samples * LFQ_N_OBSERVABLES, "observables");
          T *pz = out(z, "z"), *pp = phi.size() > 0 ? out(phi, "phi") : nullptr;
          double *pd = out(dh, "dh"), *po = observables.size() > 0 ? out(observables, "observables") : nullptr;
          uint8_t* pa = out(accepted, "accepted");
          const double* ps = smear.data();
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(flow.get, t, n, n_threads));
            code = f.hmc(flow.get, t, h, n, pz, pp, pd, pa, ps, po, nullptr, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("theory"), py::arg("hmc"), py::arg("z").noconvert(),
        py::arg("phi").noconvert(), py::arg("dh").noconvert(), py::arg("accepted").noconvert(), py::arg("smear"),
        py::arg("observables").noconvert(), py::arg("n_threads") = 0);
  }
};

void bind_hmc(py::module_& m) {
  hmc_api<float>{lfq_hmc_workspace_f32, lfq_evolve_f32, lfq_hmc_f32}.bind(m);
  hmc_api<double>{lfq_hmc_workspace_f64, lfq_evolve_f64, lfq_hmc_f64}.bind(m);
}

}  // namespace lfq_python
