#include "bindings.hpp"

namespace lfq_python {

template <class T>
struct cluster_api {
  size_t (*size)(const lfq_phi4*, int64_t, int32_t);
  int (*update)(const lfq_phi4*, const lfq_cluster*, uint64_t, uint64_t, uint64_t, int64_t, T*, int64_t*, void*, size_t,
                int32_t);
  size_t (*hmc_size)(const lfq_phi4*, int64_t, int32_t);
  int (*hmc)(const lfq_phi4*, const lfq_hmc*, const lfq_cluster*, int64_t, T*, double*, uint8_t*, int64_t*, const double*,
             double*, lfq_failure*, void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const cluster_api f = *this;
    m.def(
        "cluster_update",
        [f](const array<lfq_phi4>& theory, const array<lfq_cluster>& cluster, uint64_t seed, uint64_t first_chain,
            uint64_t trajectory, array<T> phi, array<int64_t> flipped, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          check_size(cluster.size(), 1, "cluster");
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_size(flipped.size(), n, "flipped");
          T* p = out(phi, "phi");
          int64_t* k = out(flipped, "flipped");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(t, n, n_threads));
            code = f.update(t, cluster.data(), seed, first_chain, trajectory, n, p, k, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("cluster"), py::arg("seed"), py::arg("first_chain"), py::arg("trajectory"),
        py::arg("phi").noconvert(), py::arg("flipped").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "cluster_hmc",
        [f](const array<lfq_phi4>& theory, const array<lfq_hmc>& settings, const array<lfq_cluster>& cluster, array<T> phi,
            array<double> dh, array<uint8_t> accepted, array<int64_t> flipped, const array<double>& smear,
            array<double> observables, int32_t n_threads) {
          const lfq_phi4* t = theory_of(theory);
          check_size(settings.size(), 1, "hmc");
          check_size(cluster.size(), 1, "cluster");
          const lfq_hmc* h = settings.data();
          const int64_t n = chains_of(phi.size(), volume_of(t), "phi");
          check_measured(t, h, n, smear, dh, accepted, observables);
          check_size(flipped.size(), n * h->n_samples * h->thin, "flipped");
          T* p = out(phi, "phi");
          double *d = out(dh, "dh"), *o = observables.size() > 0 ? out(observables, "observables") : nullptr;
          uint8_t* a = out(accepted, "accepted");
          int64_t* k = out(flipped, "flipped");
          const double* s = smear.data();
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.hmc_size(t, n, n_threads));
            code = f.hmc(t, h, cluster.data(), n, p, d, a, k, s, o, nullptr, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("theory"), py::arg("hmc"), py::arg("cluster"), py::arg("phi").noconvert(), py::arg("dh").noconvert(),
        py::arg("accepted").noconvert(), py::arg("flipped").noconvert(), py::arg("smear"), py::arg("observables").noconvert(),
        py::arg("n_threads") = 0);
  }
};

void bind_cluster(py::module_& m) {
  cluster_api<float>{lfq_cluster_workspace_f32, lfq_cluster_update_f32, lfq_cluster_hmc_workspace_f32, lfq_cluster_hmc_f32}
      .bind(m);
  cluster_api<double>{lfq_cluster_workspace_f64, lfq_cluster_update_f64, lfq_cluster_hmc_workspace_f64, lfq_cluster_hmc_f64}
      .bind(m);
}

}  // namespace lfq_python
