#include "bindings.hpp"

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Bindings to liblfq. Private: the public names are in the lfq package.";
  lfq_python::bind_library(m);
  lfq_python::bind_phi4(m);
  lfq_python::bind_flow(m);
  lfq_python::bind_hmc(m);
  lfq_python::bind_fourier(m);
  lfq_python::bind_cluster(m);
  lfq_python::bind_heat_bath(m);
  lfq_python::bind_custom(m);
}
