#include "cuda/flow_launch.hpp"

LFQ_CUDA_FUNCTIONS(float, f32)
