// Macros shared by the header-only physics.
#pragma once

#if defined(__CUDACC__)
#define LFQ_HD __host__ __device__ __forceinline__
#elif defined(LFQ_PLAIN_INLINE)  // unoptimized builds then compile three times as fast
#define LFQ_HD inline
#else
#define LFQ_HD inline __attribute__((always_inline))
#endif

// Each instruction set gets its own inline namespace. Without it the linker would merge the identical
// template symbols of all of them and an AVX2 machine would run AVX-512 code.
#ifndef LFQ_ISA
#define LFQ_ISA generic
#endif
#define LFQ_NAMESPACE_BEGIN namespace lfq { inline namespace LFQ_ISA {
#define LFQ_NAMESPACE_END } }
#ifdef LFQ_PLAIN_INLINE
#define LFQ_LAMBDA_INLINE
#else
#define LFQ_LAMBDA_INLINE __attribute__((always_inline))
#endif
