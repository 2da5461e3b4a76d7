#include "bindings.hpp"

namespace lfq_python {

// The caller's own action, as the bytes of its record, and a flow before it, if any.
template <class Action>
struct custom_arguments {
  const Action* action;
  int64_t volume = 1;
  lfq_flow flow{};
  const lfq_flow* through = nullptr;
  custom_arguments(const py::object& layers, const array<double>& weights, const array<uint8_t>& record) {
    check_size(record.size(), sizeof(Action), "action");
    action = reinterpret_cast<const Action*>(record.data());
    for (int i = 0; i < action->ndim && i < LFQ_MAX_DIM; ++i) volume *= action->extent[i];
    if (layers.is_none()) return;
    flow = flow_of(volume, layers.cast<array<lfq_layer>>(), weights);
    through = &flow;
  }
};

template <class T, class Action>
struct custom_api {
  size_t (*size)(const lfq_flow*, const Action*, int64_t, int32_t);
  int (*force)(const lfq_flow*, const Action*, int64_t, const T*, double*, T*, void*, size_t, int32_t);
  int (*evolve)(const lfq_flow*, const Action*, const lfq_hmc*, int64_t, T*, T*, void*, size_t, int32_t);
  int (*hmc)(const lfq_flow*, const Action*, const lfq_hmc*, int64_t, T*, T*, double*, uint8_t*, const double*, double*,
             lfq_failure*, void*, size_t, int32_t);
  int (*loss)(const lfq_flow*, const Action*, int64_t, const T*, double*, double*, double*, void*, size_t, int32_t);

  void bind(py::module_& m) const {
    const custom_api f = *this;
    m.def(
        "custom_force",
        [f](const py::object& layers, const array<double>& weights, const array<uint8_t>& record, const array<T>& z,
            array<double> action, array<T> force, int32_t n_threads) {
          const custom_arguments<Action> c(layers, weights, record);
          const int64_t n = chains_of(z.size(), c.volume, "z");
          check_size(action.size(), n, "action");
          check_size(force.size(), z.size(), "force");
          const T* p = z.data();
          double* s = out(action, "action");
          T* q = out(force, "force");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(c.through, c.action, n, n_threads));
            code = f.force(c.through, c.action, n, p, s, q, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("record"), py::arg("z").noconvert(), py::arg("action").noconvert(),
        py::arg("force").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "custom_evolve",
        [f](const py::object& layers, const array<double>& weights, const array<uint8_t>& record,
            const array<lfq_hmc>& settings, array<T> z, array<T> momenta, int32_t n_threads) {
          const custom_arguments<Action> c(layers, weights, record);
          check_size(settings.size(), 1, "hmc");
          const int64_t n = chains_of(z.size(), c.volume, "z");
          check_size(momenta.size(), z.size(), "momenta");
          T *pz = out(z, "z"), *pp = out(momenta, "momenta");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(c.through, c.action, n, n_threads));
            code = f.evolve(c.through, c.action, settings.data(), n, pz, pp, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("record"), py::arg("hmc"), py::arg("z").noconvert(),
        py::arg("momenta").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "custom_hmc",
        [f](const py::object& layers, const array<double>& weights, const array<uint8_t>& record,
            const array<lfq_hmc>& settings, array<T> z, array<T> phi, array<double> dh, array<uint8_t> accepted,
            const array<double>& smear, array<double> observables, int32_t n_threads) {
          const custom_arguments<Action> c(layers, weights, record);
          check_size(settings.size(), 1, "hmc");
          const lfq_hmc* h = settings.data();
          const int64_t n = chains_of(z.size(), c.volume, "z");
          lfq_phi4 lattice_only{};
          lattice_only.ndim = c.action->ndim;
          for (int i = 0; i < LFQ_MAX_DIM; ++i) lattice_only.extent[i] = c.action->extent[i];
          check_measured(&lattice_only, h, n, smear, dh, accepted, observables);
          if (phi.size() > 0) check_size(phi.size(), z.size(), "phi");
          T *pz = out(z, "z"), *pp = phi.size() > 0 ? out(phi, "phi") : nullptr;
          double *pd = out(dh, "dh"), *po = observables.size() > 0 ? out(observables, "observables") : nullptr;
          uint8_t* pa = out(accepted, "accepted");
          const double* ps = smear.data();
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(c.through, c.action, n, n_threads));
            code = f.hmc(c.through, c.action, h, n, pz, pp, pd, pa, ps, po, nullptr, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("record"), py::arg("hmc"), py::arg("z").noconvert(),
        py::arg("phi").noconvert(), py::arg("dh").noconvert(), py::arg("accepted").noconvert(), py::arg("smear"),
        py::arg("observables").noconvert(), py::arg("n_threads") = 0);
    m.def(
        "custom_loss",
        [f](const array<lfq_layer>& layers, const array<double>& weights, const array<uint8_t>& record, const array<T>& z,
            array<double> action, array<double> log_det, array<double> dweights, int32_t n_threads) {
          const custom_arguments<Action> c(layers, weights, record);
          const int64_t n = chains_of(z.size(), c.volume, "z");
          check_size(action.size(), n, "action");
          check_size(log_det.size(), n, "log_det");
          check_size(dweights.size(), weights.size(), "dweights");
          const T* p = z.data();
          double *s = out(action, "action"), *d = out(log_det, "log_det"), *dw = out(dweights, "dweights");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(c.through, c.action, n, n_threads));
            code = f.loss(c.through, c.action, n, p, s, d, dw, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("layers"), py::arg("weights"), py::arg("record"), py::arg("z").noconvert(), py::arg("action").noconvert(),
        py::arg("log_det").noconvert(), py::arg("dweights").noconvert(), py::arg("n_threads") = 0);
  }
};

void bind_custom(py::module_& m) {
  custom_api<float, lfq_custom_f32>{lfq_custom_workspace_f32, lfq_custom_force_f32, lfq_custom_evolve_f32,
                                    lfq_custom_hmc_f32, lfq_custom_loss_f32}
      .bind(m);
  custom_api<double, lfq_custom_f64>{lfq_custom_workspace_f64, lfq_custom_force_f64, lfq_custom_evolve_f64,
                                     lfq_custom_hmc_f64, lfq_custom_loss_f64}
      .bind(m);
}

}  // namespace lfq_python
