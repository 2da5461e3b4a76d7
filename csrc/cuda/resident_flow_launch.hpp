// Included by one file for each type, so that the kernels are compiled side by side.
#pragma once
#include "cuda/resident_flow.hpp"

namespace lfq_cuda {

template <class T>
int launch_resident_flow(resident_task task, const flow_residence& r, int64_t blocks, const lfq::resident_flow_arguments<T>& a, void* stream) {
  const auto with = [&](auto kernel) { return launch("flow", kernel, blocks, r.threads, r.shared, stream, a); };
  switch (task) {
    case resident_task::forward: return with(lfq::resident_flow_kernel<T, 2, resident_task::forward>);
    case resident_task::inverse: return with(lfq::resident_flow_kernel<T, 2, resident_task::inverse>);
    case resident_task::gradient: return with(lfq::resident_flow_kernel<T, 2, resident_task::gradient>);
    case resident_task::weight_gradient: return with(lfq::resident_flow_kernel<T, 2, resident_task::weight_gradient>);
    case resident_task::hmc: return with(lfq::resident_flow_kernel<T, 2, resident_task::hmc>);
  }
  return LFQ_OK;
}

}  // namespace lfq_cuda
