#include "bindings.hpp"

namespace lfq_python {

template <class T>
struct heat_bath_api {
  size_t (*size)(const lfq_phi4*, int64_t, int32_t);
  int (*run)(const lfq_phi4*, const lfq_heat_bath*, const lfq_cluster*, int64_t, T*, int64_t*, int64_t*, const double*,
             double*, lfq_failure*, void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const heat_bath_api f = *this;
    m.def(
        "heat_bath",
        [f](const array<lfq_phi4>& theory, const array<lfq_heat_bath>& settings, const py::object& cluster, array<T> phi,
            array<int64_t> changed, array<int64_t> flipped, const array<double>& smear, array<double> observables,
            int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          check_size(settings.size(), 1, "heat_bath");
          const lfq_heat_bath* h = settings.data();
          const array<lfq_cluster> clusters = cluster.is_none() ? array<lfq_cluster>(0) : cluster.cast<array<lfq_cluster>>();
          if (!cluster.is_none()) check_size(clusters.size(), 1, "cluster");
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi"), outputs = n * h->n_samples * h->thin;
          check_size(changed.size(), outputs, "changed");
          check_size(flipped.size(), outputs, "flipped");
          check_observables(t, n * h->n_samples, smear, observables);
          T* p = out(phi, "phi");
          int64_t *k = out(changed, "changed"), *l = out(flipped, "flipped");
          double* o = observables.size() > 0 ? out(observables, "observables") : nullptr;
          const lfq_cluster* c = cluster.is_none() ? nullptr : clusters.data();
          const double* s = smear.data();
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.run(t, h, c, n, p, k, l, s, o, nullptr, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("heat_bath"), py::arg("cluster"), py::arg("phi").noconvert(),
        py::arg("changed").noconvert(), py::arg("flipped").noconvert(), py::arg("smear"), py::arg("observables").noconvert(),
        py::arg("n_threads") = 0);
  }
};

void bind_heat_bath(py::module_& m) {
  heat_bath_api<float>{lfq_heat_bath_workspace_f32, lfq_heat_bath_f32}.bind(m);
  heat_bath_api<double>{lfq_heat_bath_workspace_f64, lfq_heat_bath_f64}.bind(m);
}

}  // namespace lfq_python
