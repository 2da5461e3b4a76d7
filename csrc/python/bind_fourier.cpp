#include "bindings.hpp"

namespace lfq_python {

template <class T>
struct fourier_api {
  size_t (*size)(const lfq_phi4*, int64_t, int32_t);
  int (*evolve)(const lfq_phi4*, const lfq_hmc*, double, int64_t, T*, T*, void*, size_t, int32_t);
  int (*hmc)(const lfq_phi4*, const lfq_hmc*, double, int64_t, T*, double*, uint8_t*, const double*, double*, lfq_failure*,
             void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const fourier_api f = *this;
    m.def(
        "fourier_evolve",
        [f](const array<lfq_phi4>& theory, const array<lfq_hmc>& settings, double mass, array<T> phi, array<T> momenta,
            int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          check_size(settings.size(), 1, "hmc");
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_size(momenta.size(), phi.size(), "momenta");
          T *p = out(phi, "phi"), *q = out(momenta, "momenta");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.evolve(t, settings.data(), mass, n, p, q, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("hmc"), py::arg("mass"), py::arg("phi").noconvert(), py::arg("momenta").noconvert(),
        py::arg("n_threads") = 0);
    m.def(
        "fourier_hmc",
        [f](const array<lfq_phi4>& theory, const array<lfq_hmc>& settings, double mass, array<T> phi, array<double> dh,
            array<uint8_t> accepted, const array<double>& smear, array<double> observables, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          check_size(settings.size(), 1, "hmc");
          const lfq_hmc* h = settings.data();
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_measured(t, h, n, smear, dh, accepted, observables);
          T* p = out(phi, "phi");
          double *d = out(dh, "dh"), *o = observables.size() > 0 ? out(observables, "observables") : nullptr;
          uint8_t* a = out(accepted, "accepted");
          const double* s = smear.data();
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.hmc(t, h, mass, n, p, d, a, s, o, nullptr, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("hmc"), py::arg("mass"), py::arg("phi").noconvert(), py::arg("dh").noconvert(),
        py::arg("accepted").noconvert(), py::arg("smear"), py::arg("observables").noconvert(), py::arg("n_threads") = 0);
  }
};

void bind_fourier(py::module_& m) {
  fourier_api<float>{lfq_fourier_workspace_f32, lfq_fourier_evolve_f32, lfq_fourier_hmc_f32}.bind(m);
  fourier_api<double>{lfq_fourier_workspace_f64, lfq_fourier_evolve_f64, lfq_fourier_hmc_f64}.bind(m);
}

}  // namespace lfq_python
