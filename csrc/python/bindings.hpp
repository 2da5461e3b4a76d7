// What the bind_*.cpp files share: arrays to pointers, status codes to exceptions.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "lfq/lfq.h"

namespace py = pybind11;

namespace lfq_python {

template <class T>
using array = py::array_t<T, py::array::c_style>;

void raise(int code);  // throws for anything but LFQ_OK

template <class T>
T* out(array<T>& a, const char* name) {
  if (!a.writeable()) throw py::value_error(std::string(name) + ": the array is read-only");
  return a.mutable_data();
}

inline void check_size(py::ssize_t size, int64_t wanted, const char* name) {
  if (size != wanted)
    throw py::value_error(std::string(name) + ": has " + std::to_string(size) + " entries, must have " +
                          std::to_string(wanted));
}

inline const lfq_phi4* theory_of(const array<lfq_phi4>& a) {
  check_size(a.size(), 1, "theory");
  return a.data();
}
inline int64_t volume_of(const lfq_phi4* t) {
  int64_t v = 1;
  for (int i = 0; i < t->ndim && i < LFQ_MAX_DIM; ++i) v *= t->extent[i];
  return v > 0 ? v : 1;
}
inline int64_t chains_of(py::ssize_t size, int64_t volume, const char* name) {
  if (volume < 1 || size % volume)
    throw py::value_error(std::string(name) + ": " + std::to_string(size) + " entries are not a whole number of fields of " +
                          std::to_string(volume) + " sites");
  return size / volume;
}

// What n measured fields write and smear with.
inline void check_observables(const lfq_phi4* t, int64_t n, const array<double>& smear, const array<double>& observables) {
  int64_t extents = 0;
  for (int i = 0; i < t->ndim && i < LFQ_MAX_DIM; ++i) extents += t->extent[i];
  check_size(smear.size(), extents, "smear");
  if (observables.size() > 0) check_size(observables.size(), n * LFQ_N_OBSERVABLES, "observables");
}

// What a chain writes and smears with: sizes that follow from the settings.
inline void check_measured(const lfq_phi4* t, const lfq_hmc* h, int64_t n, const array<double>& smear, const array<double>& dh,
                           const array<uint8_t>& accepted, const array<double>& observables) {
  check_size(dh.size(), n * h->n_samples * h->thin, "dh");
  check_size(accepted.size(), n * h->n_samples * h->thin, "accepted");
  check_observables(t, n * h->n_samples, smear, observables);
}

// A flow over arrays that the caller keeps alive during the call.
inline lfq_flow flow_of(int64_t volume, const array<lfq_layer>& layers, const array<double>& weights) {
  return lfq_flow{volume, int64_t(weights.size()), int32_t(layers.size()), 0, layers.data(), weights.data()};
}

// Large ones ask for huge pages: kernels walk through many fields at a time, more than the TLB has small pages for.
struct workspace {
  struct release {
    void operator()(char* p) const { std::free(p); }
  };
  size_t bytes;
  std::unique_ptr<char[], release> data;
  explicit workspace(size_t n) : bytes(n) {
    constexpr size_t huge = size_t(1) << 21;
    const bool large = n >= 2 * huge;
    data.reset(static_cast<char*>(large ? std::aligned_alloc(huge, (n + huge - 1) / huge * huge) : std::malloc(n ? n : 1)));
    if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (large) ::madvise(data.get(), n, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
  }
};

void bind_library(py::module_& m);
void bind_phi4(py::module_& m);
void bind_flow(py::module_& m);
void bind_hmc(py::module_& m);
void bind_fourier(py::module_& m);
void bind_cluster(py::module_& m);
void bind_heat_bath(py::module_& m);
void bind_custom(py::module_& m);

}  // namespace lfq_python
