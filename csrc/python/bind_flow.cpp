#include "bindings.hpp"

namespace lfq_python {

template <class T>
struct flow_api {
  size_t (*size)(const lfq_flow*, int64_t, int32_t);
  int (*forward)(const lfq_flow*, int64_t, const T*, T*, double*, void*, size_t, int32_t);
  int (*inverse)(const lfq_flow*, int64_t, const T*, T*, double*, void*, size_t, int32_t);
  using vjp_function = int (*)(const lfq_flow*, int64_t, const T*, const T*, const double*, T*, double*, void*, size_t, int32_t);
  vjp_function vjp;
  int (*loss)(const lfq_flow*, const lfq_phi4*, int64_t, const T*, double*, double*, double*, void*, size_t, int32_t);
  int (*pullback)(const lfq_flow*, const lfq_phi4*, int64_t, const T*, double*, T*, void*, size_t, int32_t);
  size_t (*inverse_size)(const lfq_flow*, int64_t, int32_t);
  vjp_function inverse_vjp;

  // forward and inverse have one shape.
  static void bind_map(py::module_& m, const char* name, const flow_api& f,
                       int (*map)(const lfq_flow*, int64_t, const T*, T*, double*, void*, size_t, int32_t)) {
    m.def(
        name,
        [f, map](int64_t volume, const array<lfq_layer>& layers, const array<double>& weights, const array<T>& in,
                 array<T> image, array<double> log_det, int32_t n_threads) {
          const lfq_flow flow = flow_of(volume, layers, weights);
          const int64_t n = chains_of(in.size(), volume, "input");
          check_size(image.size(), in.size(), "output");
          check_size(log_det.size(), n, "log_det");
          const T* a = in.data();
          T* b = out(image, "output");
          double* d = out(log_det, "log_det");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(&flow, n, n_threads));
            code = map(&flow, n, a, b, d, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("volume"), py::arg("layers"), py::arg("weights"), py::arg("input").noconvert(),
        py::arg("output").noconvert(), py::arg("log_det").noconvert(), py::arg("n_threads") = 0);
  }

  // The cotangents of forward and of inverse have one shape too.
  static void bind_vjp(py::module_& m, const char* name, size_t (*size)(const lfq_flow*, int64_t, int32_t), vjp_function vjp) {
    m.def(
        name,
        [size, vjp](int64_t volume, const array<lfq_layer>& layers, const array<double>& weights, const array<T>& z,
            const array<T>& dx, const array<double>& dlog_det, array<T> dz, py::object dweights, int32_t n_threads) {
          const lfq_flow flow = flow_of(volume, layers, weights);
          const int64_t n = chains_of(z.size(), volume, "z");
          check_size(dx.size(), z.size(), "dx");
          check_size(dz.size(), z.size(), "dz");
          check_size(dlog_det.size(), n, "dlog_det");
          double* dw = nullptr;
          if (!dweights.is_none()) {
            auto a = dweights.cast<array<double>>();
            check_size(a.size(), weights.size(), "dweights");
            dw = out(a, "dweights");
          }
          const T *pz = z.data(), *px = dx.data();
          const double* pl = dlog_det.data();
          T* p = out(dz, "dz");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(size(&flow, n, n_threads));
            code = vjp(&flow, n, pz, px, pl, p, dw, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("volume"), py::arg("layers"), py::arg("weights"), py::arg("z").noconvert(), py::arg("dx").noconvert(),
        py::arg("dlog_det"), py::arg("dz").noconvert(), py::arg("dweights"), py::arg("n_threads") = 0);
  }

  void bind(py::module_& m) const {
    const flow_api f = *this;
    bind_map(m, "flow_forward", f, forward);
    bind_map(m, "flow_inverse", f, inverse);
    bind_vjp(m, "flow_vjp", size, vjp);
    bind_vjp(m, "flow_inverse_vjp", inverse_size, inverse_vjp);
    m.def(
        "flow_loss",
        [f](int64_t volume, const array<lfq_layer>& layers, const array<double>& weights, const array<lfq_phi4>& theory,
            const array<T>& z, array<double> action, array<double> log_det, array<double> dweights, int32_t n_threads) {
          const lfq_flow flow = flow_of(volume, layers, weights);
          const lfq_phi4* t = theory_of(theory);
          const int64_t n = chains_of(z.size(), volume, "z");
          check_size(action.size(), n, "action");
          check_size(log_det.size(), n, "log_det");
          check_size(dweights.size(), weights.size(), "dweights");
          const T* p = z.data();
          double *s = out(action, "action"), *d = out(log_det, "log_det"), *dw = out(dweights, "dweights");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(&flow, n, n_threads));
            code = f.loss(&flow, t, n, p, s, d, dw, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("volume"), py::arg("layers"), py::arg("weights"), py::arg("theory"), py::arg("z").noconvert(),
        py::arg("action").noconvert(), py::arg("log_det").noconvert(), py::arg("dweights").noconvert(),
        py::arg("n_threads") = 0);
    m.def(
        "pullback_force",
        [f](int64_t volume, const array<lfq_layer>& layers, const array<double>& weights, const array<lfq_phi4>& theory,
            const array<T>& z, array<double> action, array<T> force, int32_t n_threads) {
          const lfq_flow flow = flow_of(volume, layers, weights);
          const lfq_phi4* t = theory_of(theory);
          const int64_t n = chains_of(z.size(), volume, "z");
          check_size(action.size(), n, "action");
          check_size(force.size(), z.size(), "force");
          const T* p = z.data();
          double* s = out(action, "action");
          T* q = out(force, "force");
          int code;
          {
            py::gil_scoped_release nogil;
            workspace w(f.size(&flow, n, n_threads));
            code = f.pullback(&flow, t, n, p, s, q, w.data.get(), w.bytes, n_threads);
          }
          raise(code);
        },
        py::arg("volume"), py::arg("layers"), py::arg("weights"), py::arg("theory"), py::arg("z").noconvert(),
        py::arg("action").noconvert(), py::arg("force").noconvert(), py::arg("n_threads") = 0);
  }
};

void bind_flow(py::module_& m) {
  flow_api<float>{lfq_flow_workspace_f32, lfq_flow_forward_f32, lfq_flow_inverse_f32,
                  lfq_flow_vjp_f32,       lfq_flow_loss_f32,    lfq_pullback_force_f32,
                  lfq_flow_inverse_vjp_workspace_f32, lfq_flow_inverse_vjp_f32}
      .bind(m);
  flow_api<double>{lfq_flow_workspace_f64, lfq_flow_forward_f64, lfq_flow_inverse_f64,
                   lfq_flow_vjp_f64,       lfq_flow_loss_f64,    lfq_pullback_force_f64,
                  lfq_flow_inverse_vjp_workspace_f64, lfq_flow_inverse_vjp_f64}
      .bind(m);
  m.def(
      "layer_n_weights",
      [](const array<lfq_layer>& layers) {
        array<int64_t> n(layers.size());
        for (py::ssize_t i = 0; i < layers.size(); ++i) n.mutable_data()[i] = lfq_layer_n_weights(layers.data() + i);
        return n;
      },
      py::arg("layers"));
  m.def(
      "flow_check",
      [](int64_t volume, const array<lfq_layer>& layers, const array<double>& weights) {
        const lfq_flow flow = flow_of(volume, layers, weights);
        raise(lfq_flow_check(&flow));
      },
      py::arg("volume"), py::arg("layers"), py::arg("weights"));
}

}  // namespace lfq_python
