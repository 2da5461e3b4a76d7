// XLA FFI handlers around lfq.h, compiled by lfq/jax.py on first use against the headers that jaxlib ships.
#include <algorithm>
#include <cstring>
#include <vector>

#include "lfq/lfq.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Bytes = ffi::Span<const uint8_t>;
using Out = ffi::Result<ffi::AnyBuffer>;

template <class T>
struct api;
#define LFQ_API_OF(T, S)                                               \
  template <>                                                          \
  struct api<T> {                                                      \
    static constexpr auto phi4_workspace = lfq_phi4_workspace_##S;     \
    static constexpr auto action = lfq_phi4_action_##S;                \
    static constexpr auto force = lfq_phi4_force_##S;                  \
    static constexpr auto workspace = lfq_flow_workspace_##S;          \
    static constexpr auto forward = lfq_flow_forward_##S;              \
    static constexpr auto inverse = lfq_flow_inverse_##S;              \
    static constexpr auto vjp = lfq_flow_vjp_##S;                      \
    static constexpr auto inverse_vjp_workspace = lfq_flow_inverse_vjp_workspace_##S; \
    static constexpr auto inverse_vjp = lfq_flow_inverse_vjp_##S;      \
  };
LFQ_API_OF(float, f32)
LFQ_API_OF(double, f64)

ffi::Error outcome(int code) {
  return code == LFQ_OK ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, lfq_last_error());
}

template <class F>
ffi::Error by_type(const ffi::AnyBuffer& field, F&& f) {
  if (field.element_type() == ffi::F32) return f(float());
  if (field.element_type() == ffi::F64) return f(double());
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "lfq: fields must be float32 or float64");
}

lfq_phi4 theory_of(Bytes bytes) {
  lfq_phi4 theory;
  std::memcpy(&theory, bytes.begin(), sizeof(theory));
  return theory;
}
int64_t volume_of(int32_t ndim, const int32_t* extent) {
  int64_t v = 1;
  for (int i = 0; i < ndim; ++i) v *= extent[i];
  return v;
}

ffi::Error action(Bytes bytes, ffi::AnyBuffer phi, Out out) {
  return by_type(phi, [&](auto real) {
    using T = decltype(real);
    const lfq_phi4 theory = theory_of(bytes);
    const int64_t n = int64_t(phi.element_count()) / volume_of(theory.ndim, theory.extent);
    std::vector<char> ws(api<T>::phi4_workspace(&theory, n, 0));
    std::vector<double> s(size_t(n) + 1);
    const int code = api<T>::action(&theory, n, phi.typed_data<T>(), s.data(), ws.data(), ws.size(), 0);
    std::copy(s.begin(), s.begin() + n, out->typed_data<T>());
    return outcome(code);
  });
}
ffi::Error force(Bytes bytes, ffi::AnyBuffer phi, Out out) {
  return by_type(phi, [&](auto real) {
    using T = decltype(real);
    const lfq_phi4 theory = theory_of(bytes);
    const int64_t n = int64_t(phi.element_count()) / volume_of(theory.ndim, theory.extent);
    std::vector<char> ws(api<T>::phi4_workspace(&theory, n, 0));
    return outcome(api<T>::force(&theory, n, phi.typed_data<T>(), out->typed_data<T>(), ws.data(), ws.size(), 0));
  });
}

// vmap puts leading axes on weights and fields alike, of size 1 where an operand is not mapped. Each place along them is
// a call of its own, with weights of its own.
class batches {
 public:
  batches(const ffi::AnyBuffer& weights, const ffi::AnyBuffer& like) {
    for (size_t i = 0; i + 1 < weights.dimensions().size(); ++i) shape_.push_back(like.dimensions()[i]);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int64_t s : shape_) n *= s;
    return n;
  }
  // Entries of an operand in one place.
  int64_t size(const ffi::AnyBuffer& b) const {
    int64_t n = int64_t(b.element_count());
    for (size_t i = 0; i < shape_.size(); ++i) n /= std::max<int64_t>(b.dimensions()[i], 1);
    return n;
  }
  template <class T>
  T* at(int64_t place, ffi::AnyBuffer& b) const {
    int64_t offset = 0, stride = size(b);
    for (size_t i = shape_.size(); i-- > 0; place /= shape_[i]) {
      const int64_t extent = b.dimensions()[i];
      if (extent > 1) offset += place % shape_[i] * stride;
      stride *= extent;
    }
    return b.typed_data<T>() + offset;
  }

 private:
  std::vector<int64_t> shape_;
};

struct program {
  std::vector<lfq_layer> layers;
  std::vector<double> weights;
  lfq_flow flow;
  explicit program(Bytes bytes) : layers(bytes.size() / sizeof(lfq_layer)) {
    std::memcpy(layers.data(), bytes.begin(), bytes.size());
    const lfq_layer& last = layers.back();
    flow = {volume_of(last.ndim, last.extent), 0, int32_t(layers.size()), 0, layers.data(), nullptr};
  }
  template <class T>
  void set(const T* w, int64_t n) {
    weights.assign(w, w + n);
    flow.weights = weights.data();
    flow.n_weights = n;
  }
};

template <bool INVERSE>
ffi::Error map(Bytes layers, ffi::AnyBuffer in, ffi::AnyBuffer weights, Out out, Out log_det) {
  return by_type(in, [&](auto real) {
    using T = decltype(real);
    program p(layers);
    const batches each(weights, *out);
    std::vector<char> ws;
    std::vector<double> ld;
    for (int64_t place = 0; place < each.count(); ++place) {
      p.set(each.at<T>(place, weights), each.size(weights));
      const int64_t n = each.size(*out) / p.flow.volume;
      ws.resize(api<T>::workspace(&p.flow, n, 0));
      ld.resize(size_t(n) + 1);
      const auto f = INVERSE ? api<T>::inverse : api<T>::forward;
      const int code = f(&p.flow, n, each.at<T>(place, in), each.at<T>(place, *out), ld.data(), ws.data(), ws.size(), 0);
      if (code != LFQ_OK) return outcome(code);
      std::copy(ld.begin(), ld.begin() + n, each.at<T>(place, *log_det));
    }
    return ffi::Error::Success();
  });
}

template <bool INVERSE>
ffi::Error vjp(Bytes layers, ffi::AnyBuffer z, ffi::AnyBuffer weights, ffi::AnyBuffer cotangent, ffi::AnyBuffer dlog_det,
               Out pulled, Out dweights) {
  return by_type(z, [&](auto real) {
    using T = decltype(real);
    program p(layers);
    const batches each(weights, *pulled);
    std::vector<char> ws;
    std::vector<double> dld, dw(size_t(each.size(weights)) + 1);
    for (int64_t place = 0; place < each.count(); ++place) {
      p.set(each.at<T>(place, weights), each.size(weights));
      const int64_t n = each.size(*pulled) / p.flow.volume;
      ws.resize((INVERSE ? api<T>::inverse_vjp_workspace : api<T>::workspace)(&p.flow, n, 0));
      const T* from = each.at<T>(place, dlog_det);
      dld.assign(from, from + n);
      dld.push_back(0);
      const auto f = INVERSE ? api<T>::inverse_vjp : api<T>::vjp;
      const int code = f(&p.flow, n, each.at<T>(place, z), each.at<T>(place, cotangent), dld.data(),
                         each.at<T>(place, *pulled), dw.data(), ws.data(), ws.size(), 0);
      if (code != LFQ_OK) return outcome(code);
      std::copy(dw.begin(), dw.begin() + p.flow.n_weights, each.at<T>(place, *dweights));
    }
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_action, action,
                              ffi::Ffi::Bind().Attr<Bytes>("theory").Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_force, force,
                              ffi::Ffi::Bind().Attr<Bytes>("theory").Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
#define LFQ_MAP_BINDING                                                                                     \
  ffi::Ffi::Bind().Attr<Bytes>("layers").Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>() \
      .Ret<ffi::AnyBuffer>()
#define LFQ_VJP_BINDING                                                                                      \
  ffi::Ffi::Bind().Attr<Bytes>("layers").Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>() \
      .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_forward, map<false>, LFQ_MAP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_inverse, map<true>, LFQ_MAP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_vjp, vjp<false>, LFQ_VJP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_inverse_vjp, vjp<true>, LFQ_VJP_BINDING);
