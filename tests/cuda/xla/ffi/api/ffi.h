// Stands in for XLA's header where there is no GPU: that one, but with the stream and the scratch that XLA's CPU platform
// does not give to a handler.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include_next "xla/ffi/api/ffi.h"

namespace emulated {

struct release {
  void operator()(void* p) const { std::free(p); }
};

// The null stream.
template <class T>
struct null_stream {};

// Like XLA's it takes memory back when the handler returns. XLA may run several handlers at once, the emulator of
// kernels cannot: the lock lives as long as this does.
class scratch_allocator {
 public:
  std::optional<void*> Allocate(size_t size, size_t alignment = 1) {
    const size_t padded = (size + alignment - 1) / alignment * alignment;
    space_.emplace_back(std::aligned_alloc(alignment, padded));
    std::memset(space_.back().get(), 0xA5, padded);
    return space_.back().get();
  }

 private:
  inline static std::mutex one_at_a_time_;
  std::unique_lock<std::mutex> lock_{one_at_a_time_};
  std::vector<std::unique_ptr<void, release>> space_;
};

}  // namespace emulated

template <class T>
struct xla::ffi::CtxDecoding<emulated::null_stream<T>> {
  using Type = T;
  static std::optional<T> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) { return nullptr; }
};
template <>
struct xla::ffi::CtxDecoding<emulated::scratch_allocator> {
  using Type = emulated::scratch_allocator;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) { return Type(); }
};

#define PlatformStream emulated_PlatformStream
#define ScratchAllocator emulated_ScratchAllocator
namespace xla::ffi {
template <class T>
using PlatformStream = ::emulated::null_stream<T>;
using ScratchAllocator = ::emulated::scratch_allocator;
}  // namespace xla::ffi
