#include "bindings.hpp"

namespace lfq_python {

template <class T>
struct phi4_api {
  size_t (*size)(const lfq_phi4*, int64_t, int32_t);
  int (*action)(const lfq_phi4*, int64_t, const T*, double*, void*, size_t, int32_t);
  int (*force)(const lfq_phi4*, int64_t, const T*, T*, void*, size_t, int32_t);
  int (*observables)(const lfq_phi4*, int64_t, const T*, const double*, double*, void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const phi4_api f = *this;
    m.def(
        "phi4_action",
        [f](const array<lfq_phi4>& theory, const array<T>& phi, array<double> action, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_size(action.size(), n, "action");
          const T* p = phi.data();
          double* s = out(action, "action");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.action(t, n, p, s, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("phi").noconvert(), py::arg("action").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "phi4_force",
        [f](const array<lfq_phi4>& theory, const array<T>& phi, array<T> force, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_size(force.size(), phi.size(), "force");
          const T* p = phi.data();
          T* q = out(force, "force");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.force(t, n, p, q, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("phi").noconvert(), py::arg("force").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "phi4_observables",
        [f](const array<lfq_phi4>& theory, const array<T>& phi, const array<double>& smear, array<double> observables,
            int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          int64_t extents = 0;
          for (int i = 0; i < t->ndim && i < LFQ_MAX_DIM; ++i) extents += t->extent[i];
          check_size(smear.size(), extents, "smear");
          check_size(observables.size(), n * LFQ_N_OBSERVABLES, "observables");
          const T* p = phi.data();
          const double* k = smear.data();
          double* o = out(observables, "observables");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.observables(t, n, p, k, o, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("phi").noconvert(), py::arg("smear"), py::arg("observables").noconvert(),
        py::arg("n_threads") = 0);
  }
};

void bind_phi4(py::module_& m) {
  phi4_api<float>{lfq_phi4_workspace_f32, lfq_phi4_action_f32, lfq_phi4_force_f32, lfq_phi4_observables_f32}.bind(m);
  phi4_api<double>{lfq_phi4_workspace_f64, lfq_phi4_action_f64, lfq_phi4_force_f64, lfq_phi4_observables_f64}.bind(m);
}

}  // namespace lfq_python
