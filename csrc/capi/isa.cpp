// Which build of the kernels runs on this machine.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "capi/internal.hpp"

namespace lfq_internal {

#define LFQ_DECLARE(tag)                              \
  extern const kernels<float>* const table_isa_##tag##_f32; \
  extern const kernels<double>* const table_isa_##tag##_f64;

#if defined(__x86_64__)
LFQ_DECLARE(v2)
LFQ_DECLARE(v3)
LFQ_DECLARE(v4)
namespace {
[[maybe_unused]] bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
[[maybe_unused]] bool has_v3() {
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// Those that were built (LFQ_ISAS of CMake), best first.
const isa& isa_at(int i) {
  static const isa all[] = {
#if defined(LFQ_HAVE_v4)
      {"x86-64-v4", has_v4, table_isa_v4_f32, table_isa_v4_f64},
#endif
#if defined(LFQ_HAVE_v3)
      {"x86-64-v3", has_v3, table_isa_v3_f32, table_isa_v3_f64},
#endif
#if defined(LFQ_HAVE_v2)
      {"x86-64-v2", has_v2, table_isa_v2_f32, table_isa_v2_f64},
#endif
  };
  return all[i];
}
constexpr int n_isas = 0
#if defined(LFQ_HAVE_v4)
                       + 1
#endif
#if defined(LFQ_HAVE_v3)
                       + 1
#endif
#if defined(LFQ_HAVE_v2)
                       + 1
#endif
    ;
}  // namespace
#else
LFQ_DECLARE(generic)
namespace {
bool always() { return true; }
constexpr int n_isas = 1;
const isa& isa_at(int) {
  static const isa one = {"generic", always, table_isa_generic_f32, table_isa_generic_f64};
  return one;
}
}  // namespace
#endif

namespace {
const isa* find(const char* name) {
  for (int i = 0; i < n_isas; ++i)
    if (std::strcmp(isa_at(i).name, name) == 0 && isa_at(i).supported()) return &isa_at(i);
  return nullptr;
}

std::atomic<const isa*> chosen{nullptr};
}  // namespace

const isa& current_isa() {
  const isa* i = chosen.load(std::memory_order_acquire);
  if (i) return *i;
  if (const char* e = std::getenv("LFQ_ISA"))
    if (*e) {
      i = find(e);
      if (!i) std::fprintf(stderr, "lfq: LFQ_ISA=%s: this machine runs %s; using the first\n", e, lfq_isas());
    }
  for (int k = 0; !i && k < n_isas; ++k)
    if (isa_at(k).supported()) i = &isa_at(k);
  if (!i) {
    std::fprintf(stderr, "lfq: this processor lacks the x86-64-v2 instruction set\n");
    std::abort();
  }
  chosen.store(i, std::memory_order_release);
  return *i;
}

}  // namespace lfq_internal

extern "C" {

const char* lfq_isa(void) { return lfq_internal::current_isa().name; }

const char* lfq_isas(void) {
  static char names[96];
  static const bool filled = [] {
    for (int i = 0; i < lfq_internal::n_isas; ++i)
      if (lfq_internal::isa_at(i).supported()) {
        if (*names) std::strcat(names, ",");
        std::strcat(names, lfq_internal::isa_at(i).name);
      }
    return true;
  }();
  (void)filled;
  return names;
}

int lfq_set_isa(const char* name) {
  const lfq_internal::isa* i = name ? lfq_internal::find(name) : nullptr;
  if (!i) return LFQ_ERR_ARGUMENT;
  lfq_internal::chosen.store(i, std::memory_order_release);
  return LFQ_OK;
}

}  // extern "C"
