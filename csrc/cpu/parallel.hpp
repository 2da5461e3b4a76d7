// What the kernels ask of the thread pool; compiled once, in csrc/capi/threads.cpp.
#pragma once
#include <cstdint>

namespace lfq_internal {
using task_fn = void (*)(void* context, int64_t task, int thread);
// Runs fn for task = 0 .. n_tasks - 1 on at most n_threads threads, the caller among them.
void parallel(int64_t n_tasks, int n_threads, task_fn fn, void* context);

// Calls f(task, thread) in parallel. Static, so that no weak symbol leaves a per-ISA file.
template <class F>
static void for_tasks(int64_t n_tasks, int n_threads, F& f) {
  parallel(n_tasks, n_threads, [](void* c, int64_t task, int thread) { (*static_cast<F*>(c))(task, thread); }, &f);
}
}  // namespace lfq_internal
