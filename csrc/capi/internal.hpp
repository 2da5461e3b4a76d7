// Shared by the files of liblfq that are compiled once.
#pragma once
#include "cpu/parallel.hpp"
#include "cpu/table.hpp"

namespace lfq_internal {

int max_threads();

// The instruction set in use: the best the machine runs, or the one LFQ_ISA or lfq_set_isa names.
const isa& current_isa();

template <class T>
const kernels<T>& table();
template <>
inline const kernels<float>& table<float>() { return *current_isa().f32; }
template <>
inline const kernels<double>& table<double>() { return *current_isa().f64; }

}  // namespace lfq_internal
