// Included by one file for each type, so that the kernels are compiled side by side.
#pragma once
#include "cuda/resident_flow.hpp"

namespace lfq_cuda {

template <class T, int R>
int launch_resident_rows(resident_task task, const flow_residence& r, int64_t blocks, const lfq::resident_flow_arguments<T>& a, void* stream) {
  const auto with = [&](auto kernel) { return launch("flow", kernel, blocks, r.threads, r.shared, stream, a); };
  switch (task) {
    case resident_task::forward: return with(lfq::resident_flow_kernel<T, R, resident_task::forward>);
    case resident_task::inverse: return with(lfq::resident_flow_kernel<T, R, resident_task::inverse>);
    case resident_task::gradient: return with(lfq::resident_flow_kernel<T, R, resident_task::gradient>);
    case resident_task::weight_gradient: return with(lfq::resident_flow_kernel<T, R, resident_task::weight_gradient>);
    case resident_task::hmc: return with(lfq::resident_flow_kernel<T, R, resident_task::hmc>);
  }
  return LFQ_OK;
}
template <class T>
int launch_resident_flow(resident_task task, const flow_residence& r, int64_t blocks, const lfq::resident_flow_arguments<T>& a, void* stream) {
  if constexpr (sizeof(T) == 8)
    if (r.rows == 4) return launch_resident_rows<T, 4>(task, r, blocks, a, stream);
  return launch_resident_rows<T, 2>(task, r, blocks, a, stream);
}

}  // namespace lfq_cuda
