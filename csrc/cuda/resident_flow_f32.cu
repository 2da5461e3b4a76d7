#include "cuda/resident_flow_launch.hpp"

template int lfq_cuda::launch_resident_flow<float>(lfq_cuda::resident_task, const lfq_cuda::flow_residence&, int64_t,
                                               const lfq::resident_flow_arguments<float>&, void*);
