// XLA FFI handlers around lfq.h, or with LFQ_JAX_CUDA around lfq_cuda.h, compiled by lfq/jax.py on first use against the
// headers that jaxlib ships. Operands and results are the same on both platforms: fields of either type, all else double.
#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#ifdef LFQ_JAX_CUDA
#include "lfq/lfq_cuda.h"
#define LFQ_FUNCTION(name) lfq_cuda_##name
#else
#include "lfq/lfq.h"
#define LFQ_FUNCTION(name) lfq_##name
#endif

namespace ffi = xla::ffi;

namespace {

using Bytes = ffi::Span<const uint8_t>;
using Out = ffi::Result<ffi::AnyBuffer>;

// What the two libraries do not have in common: an inverse has no derivatives on GPUs, a force no scratch.
template <class T>
struct own_api;
#ifdef LFQ_JAX_CUDA
#define LFQ_OWN_API(T, S)                                                                               \
  template <>                                                                                           \
  struct own_api<T> {                                                                                   \
    static constexpr auto inverse_vjp_workspace = lfq_cuda_flow_workspace_##S;                          \
    static constexpr decltype(&lfq_cuda_flow_vjp_##S) inverse_vjp = nullptr;                            \
    static int force(const lfq_phi4* theory, int64_t n, const T* phi, T* out, void*, size_t, void* s) { \
      return lfq_cuda_phi4_force_##S(theory, n, phi, out, s);                                           \
    }                                                                                                   \
  };
#else
#define LFQ_OWN_API(T, S)                                                              \
  template <>                                                                          \
  struct own_api<T> {                                                                  \
    static constexpr auto inverse_vjp_workspace = lfq_flow_inverse_vjp_workspace_##S;  \
    static constexpr auto inverse_vjp = lfq_flow_inverse_vjp_##S;                      \
    static constexpr auto force = lfq_phi4_force_##S;                                  \
  };
#endif
template <class T>
struct api;
#define LFQ_API_OF(T, S)                                                     \
  LFQ_OWN_API(T, S)                                                          \
  template <>                                                                \
  struct api<T> : own_api<T> {                                               \
    static constexpr auto phi4_workspace = LFQ_FUNCTION(phi4_workspace_##S); \
    static constexpr auto action = LFQ_FUNCTION(phi4_action_##S);            \
    static constexpr auto workspace = LFQ_FUNCTION(flow_workspace_##S);      \
    static constexpr auto forward = LFQ_FUNCTION(flow_forward_##S);          \
    static constexpr auto inverse = LFQ_FUNCTION(flow_inverse_##S);          \
    static constexpr auto vjp = LFQ_FUNCTION(flow_vjp_##S);                  \
  };
LFQ_API_OF(float, f32)
LFQ_API_OF(double, f64)

int64_t volume_of(int32_t ndim, const int32_t* extent) {
  int64_t v = 1;
  for (int i = 0; i < ndim; ++i) v *= extent[i];
  return v;
}

struct program {
  std::vector<lfq_layer> layers;
  const lfq_layer* at_kernels;  // the same layers, in the memory that kernels read
  lfq_flow flow;
  program(Bytes bytes, const ffi::AnyBuffer& operand, const double* weights, int64_t n_weights)
      : layers(bytes.size() / sizeof(lfq_layer)), at_kernels(static_cast<const lfq_layer*>(operand.untyped_data())) {
    std::memcpy(layers.data(), bytes.begin(), bytes.size());
    const lfq_layer& last = layers.back();
    flow = {volume_of(last.ndim, last.extent), n_weights, int32_t(layers.size()), 0, layers.data(), weights};
  }
};

// Where the kernels of one handler run, and their scratch.
#ifdef LFQ_JAX_CUDA
class place {
 public:
  place(void* stream, ffi::ScratchAllocator allocator) : stream_(stream), allocator_(std::move(allocator)) {}
  // XLA reuses scratch in the order of its stream: the handler may return before the kernels that use it ran.
  template <class F, class R>
  bool reserve(F workspace, const R& record, int64_t n) {
    bytes_ = workspace(&record, n);
    const std::optional<void*> found = allocator_.Allocate(bytes_, 16);
    space_ = found.value_or(nullptr);
    return found.has_value();
  }
  template <class F, class... A>
  int call(F f, A... arguments) {
    return f(arguments..., space_, bytes_, stream_);
  }
  template <class F, class... A>
  int call(F f, const program& p, A... arguments) {
    return call(f, &p.flow, p.at_kernels, arguments...);
  }

 private:
  void* stream_;
  ffi::ScratchAllocator allocator_;
  void* space_ = nullptr;
  size_t bytes_ = 0;
};
#else
class place {
 public:
  template <class F, class R>
  bool reserve(F workspace, const R& record, int64_t n) {
    space_.resize(workspace(&record, n, 0));
    return true;
  }
  template <class F, class... A>
  int call(F f, A... arguments) {
    return f(arguments..., space_.data(), space_.size(), 0);
  }
  template <class F, class... A>
  int call(F f, const program& p, A... arguments) {
    return call(f, &p.flow, arguments...);
  }

 private:
  std::vector<char> space_;
};
#endif

}  // namespace

template <>
struct xla::ffi::CtxDecoding<place> {
  using Type = place;
  static std::optional<Type> Decode([[maybe_unused]] const XLA_FFI_Api* api,
                                    [[maybe_unused]] XLA_FFI_ExecutionContext* context,
                                    [[maybe_unused]] DiagnosticEngine& diagnostic) {
#ifdef LFQ_JAX_CUDA
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, diagnostic);
    auto allocator = CtxDecoding<ScratchAllocator>::Decode(api, context, diagnostic);
    if (!stream || !allocator) return std::nullopt;
    return place(*stream, std::move(*allocator));
#else
    return place();
#endif
  }
};

namespace {

ffi::Error outcome(int code) {
  if (code == LFQ_OK) return ffi::Error::Success();
  return ffi::Error(code == LFQ_ERR_ARGUMENT || code == LFQ_ERR_NOT_FINITE ? ffi::ErrorCode::kInvalidArgument
                                                                           : ffi::ErrorCode::kInternal,
                    LFQ_FUNCTION(last_error)());
}
ffi::Error no_room() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lfq: no memory for a workspace"); }

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

ffi::Error action(place where, Bytes bytes, ffi::AnyBuffer phi, Out out) {
  return by_type(phi, [&](auto real) {
    using T = decltype(real);
    const lfq_phi4 theory = theory_of(bytes);
    const int64_t n = int64_t(out->element_count());
    if (!where.reserve(api<T>::phi4_workspace, theory, n)) return no_room();
    return outcome(where.call(api<T>::action, &theory, n, phi.typed_data<T>(), out->typed_data<double>()));
  });
}
ffi::Error force(place where, Bytes bytes, ffi::AnyBuffer phi, Out out) {
  return by_type(phi, [&](auto real) {
    using T = decltype(real);
    const lfq_phi4 theory = theory_of(bytes);
    const int64_t n = int64_t(phi.element_count()) / volume_of(theory.ndim, theory.extent);
    if (!where.reserve(api<T>::phi4_workspace, theory, n)) return no_room();
    return outcome(where.call(api<T>::force, &theory, n, phi.typed_data<T>(), out->typed_data<T>()));
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
  T* at(int64_t index, ffi::AnyBuffer& b) const {
    int64_t offset = 0, stride = size(b);
    for (size_t i = shape_.size(); i-- > 0; index /= shape_[i]) {
      const int64_t extent = b.dimensions()[i];
      if (extent > 1) offset += index % shape_[i] * stride;
      stride *= extent;
    }
    return b.typed_data<T>() + offset;
  }

 private:
  std::vector<int64_t> shape_;
};

template <bool INVERSE>
ffi::Error map(place where, Bytes layers, ffi::AnyBuffer in, ffi::AnyBuffer weights, ffi::AnyBuffer operand, Out out,
               Out log_det) {
  return by_type(in, [&](auto real) {
    using T = decltype(real);
    const batches each(weights, *out);
    program p(layers, operand, each.at<double>(0, weights), each.size(weights));
    const int64_t n = each.size(*out) / p.flow.volume;
    if (!where.reserve(api<T>::workspace, p.flow, n)) return no_room();
    for (int64_t i = 0; i < each.count(); ++i) {
      p.flow.weights = each.at<double>(i, weights);
      const int code = where.call(INVERSE ? api<T>::inverse : api<T>::forward, p, n, each.at<T>(i, in),
                                  each.at<T>(i, *out), each.at<double>(i, *log_det));
      if (code != LFQ_OK) return outcome(code);
    }
    return ffi::Error::Success();
  });
}

template <bool INVERSE>
ffi::Error vjp(place where, Bytes layers, ffi::AnyBuffer z, ffi::AnyBuffer weights, ffi::AnyBuffer cotangent,
               ffi::AnyBuffer dlog_det, ffi::AnyBuffer operand, Out pulled, Out dweights) {
  return by_type(z, [&](auto real) {
    using T = decltype(real);
    const batches each(weights, *pulled);
    program p(layers, operand, each.at<double>(0, weights), each.size(weights));
    const int64_t n = each.size(*pulled) / p.flow.volume;
    const auto f = INVERSE ? api<T>::inverse_vjp : api<T>::vjp;
    if (!f) return ffi::Error(ffi::ErrorCode::kUnimplemented, "lfq: derivatives of an inverse run on the CPU only");
    if (!where.reserve(INVERSE ? api<T>::inverse_vjp_workspace : api<T>::workspace, p.flow, n)) return no_room();
    for (int64_t i = 0; i < each.count(); ++i) {
      p.flow.weights = each.at<double>(i, weights);
      const int code =
          where.call(f, p, n, each.at<T>(i, z), each.at<T>(i, cotangent), each.at<double>(i, dlog_det),
                     each.at<T>(i, *pulled), each.at<double>(i, *dweights));
      if (code != LFQ_OK) return outcome(code);
    }
    return ffi::Error::Success();
  });
}

}  // namespace

#define LFQ_BIND ffi::Ffi::Bind().Ctx<place>()
#define LFQ_THEORY_BINDING LFQ_BIND.Attr<Bytes>("record").Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_action, action, LFQ_THEORY_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_force, force, LFQ_THEORY_BINDING);
#define LFQ_MAP_BINDING                                                                                       \
  LFQ_BIND.Attr<Bytes>("record").Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()            \
      .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
#define LFQ_VJP_BINDING                                                                                       \
  LFQ_BIND.Attr<Bytes>("record").Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()            \
      .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_forward, map<false>, LFQ_MAP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_inverse, map<true>, LFQ_MAP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_vjp, vjp<false>, LFQ_VJP_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(lfq_jax_inverse_vjp, vjp<true>, LFQ_VJP_BINDING);
