#include "bindings.hpp"

namespace lfq_python {

static PyObject* not_finite_error = nullptr;

void raise(int code) {
  if (code == LFQ_OK) return;
  if (code == LFQ_ERR_ARGUMENT) throw py::value_error(lfq_last_error());
  PyErr_SetString(code == LFQ_ERR_NOT_FINITE ? not_finite_error : PyExc_RuntimeError, lfq_last_error());
  throw py::error_already_set();
}

template <class T>
static void bind_normal(py::module_& m, int (*normal)(uint64_t, int32_t, uint64_t, uint64_t, int64_t, int64_t, T*, int32_t)) {
  m.def(
      "normal",
      [normal](uint64_t seed, int32_t purpose, uint64_t trajectory, uint64_t first_chain, int64_t n_chains, array<T> values,
               int32_t n_threads) {
        T* p = out(values, "out");
        const int64_t n = n_chains > 0 ? values.size() / n_chains : 0;
        check_size(values.size(), n * n_chains, "out");
        int code;
        {
          py::gil_scoped_release nogil;
          code = normal(seed, purpose, trajectory, first_chain, n_chains, n, p, n_threads);
        }
        raise(code);
      },
      py::arg("seed"), py::arg("purpose"), py::arg("trajectory"), py::arg("first_chain"), py::arg("n_chains"),
      py::arg("out").noconvert(), py::arg("n_threads") = 0);
}

void bind_library(py::module_& m) {
  not_finite_error = PyErr_NewExceptionWithDoc(
      "lfq.NotFiniteError", "NaN or Inf in a field, a weight or dH.",
      py::make_tuple(py::handle(PyExc_ValueError), py::handle(PyExc_ArithmeticError)).ptr(), nullptr);
  m.attr("NotFiniteError") = py::handle(not_finite_error);

  m.def("version", &lfq_version);
  m.def("abi_version", &lfq_abi_version);
  m.def("isa", &lfq_isa);
  m.def("isas", &lfq_isas);
  m.def(
      "set_isa", [](const std::string& name) {
        if (lfq_set_isa(name.c_str()) != LFQ_OK)
          throw py::value_error("set_isa: this machine runs " + std::string(lfq_isas()) + ", not " + name);
      },
      py::arg("name"));
  m.def("max_threads", &lfq_max_threads);
  m.def(
      "philox4x32",
      [](const array<uint32_t>& counter, const array<uint32_t>& key) {
        check_size(counter.size(), 4, "counter");
        check_size(key.size(), 2, "key");
        array<uint32_t> r(4);
        lfq_philox4x32(counter.data(), key.data(), r.mutable_data());
        return r;
      },
      py::arg("counter"), py::arg("key"));
  bind_normal<float>(m, lfq_normal_f32);
  bind_normal<double>(m, lfq_normal_f64);
  m.def(
      "uniform",
      [](uint64_t seed, int32_t purpose, uint64_t first_trajectory, uint64_t first_chain, int64_t n_chains, array<double> values) {
        double* p = out(values, "out");
        const int64_t n = n_chains > 0 ? values.size() / n_chains : 0;
        check_size(values.size(), n * n_chains, "out");
        raise(lfq_uniform(seed, purpose, first_trajectory, n, first_chain, n_chains, p));
      },
      py::arg("seed"), py::arg("purpose"), py::arg("first_trajectory"), py::arg("first_chain"), py::arg("n_chains"),
      py::arg("out").noconvert());

  PYBIND11_NUMPY_DTYPE(lfq_phi4, ndim, extent, beta, lam);
  PYBIND11_NUMPY_DTYPE(lfq_layer, kind, ndim, extent, parity, kernel_size, n_hidden, hidden, activation, bias, scale,
                       n_features, sublattices, active, frozen, weight_offset);
  PYBIND11_NUMPY_DTYPE(lfq_integrator, n_stages, reserved, kick, drift);
  PYBIND11_NUMPY_DTYPE(lfq_hmc, integrator, step_size, n_steps, thin, n_samples, seed, first_chain, first_trajectory,
                       n_steps_spread, reserved);
  PYBIND11_NUMPY_DTYPE(lfq_cluster, kind, n_updates);
  PYBIND11_NUMPY_DTYPE(lfq_heat_bath, n_sweeps, thin, n_samples, seed, first_chain, first_trajectory);
  m.attr("theory_dtype") = py::dtype::of<lfq_phi4>();
  m.attr("layer_dtype") = py::dtype::of<lfq_layer>();
  m.attr("hmc_dtype") = py::dtype::of<lfq_hmc>();
  m.attr("cluster_dtype") = py::dtype::of<lfq_cluster>();
  m.attr("heat_bath_dtype") = py::dtype::of<lfq_heat_bath>();
  m.attr("N_OBSERVABLES") = LFQ_N_OBSERVABLES;
  m.attr("MAX_HIDDEN") = LFQ_MAX_HIDDEN;
  m.attr("MAX_CHANNELS") = LFQ_MAX_CHANNELS;
  m.attr("MAX_STAGES") = LFQ_MAX_STAGES;
  m.attr("PURPOSES") = py::dict(py::arg("momenta") = int(LFQ_PURPOSE_MOMENTA), py::arg("accept") = int(LFQ_PURPOSE_ACCEPT),
                                py::arg("start") = int(LFQ_PURPOSE_START), py::arg("latent") = int(LFQ_PURPOSE_LATENT),
                                py::arg("weights") = int(LFQ_PURPOSE_WEIGHTS), py::arg("length") = int(LFQ_PURPOSE_LENGTH),
                                py::arg("bond") = int(LFQ_PURPOSE_BOND), py::arg("cluster") = int(LFQ_PURPOSE_CLUSTER),
                                py::arg("proposal") = int(LFQ_PURPOSE_PROPOSAL),
                                py::arg("resample") = int(LFQ_PURPOSE_RESAMPLE),
                                py::arg("heat_bath") = int(LFQ_PURPOSE_HEAT_BATH),
                                py::arg("user") = int(LFQ_PURPOSE_USER));
  m.attr("CLUSTERS") = py::dict(py::arg("swendsen-wang") = int(LFQ_CLUSTER_SWENDSEN_WANG),
                                py::arg("wolff") = int(LFQ_CLUSTER_WOLFF));
  m.attr("LAYERS") = py::dict(py::arg("coupling") = int(LFQ_LAYER_COUPLING), py::arg("rescale") = int(LFQ_LAYER_RESCALE),
                              py::arg("interleave") = int(LFQ_LAYER_INTERLEAVE), py::arg("upsample") = int(LFQ_LAYER_UPSAMPLE));
}

}  // namespace lfq_python
