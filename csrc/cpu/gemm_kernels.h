// The inner loops of gemm.h: register-blocked micro-kernels, and rounding to bfloat16.
#pragma once

#include <bit>
#include <cstdint>

#include "gemm.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define CWDPO_HAS_AVX512_GEMM 1
#else
#define CWDPO_HAS_AVX512_GEMM 0
#endif

namespace cwdpo {

// 6 x 4 accumulators, 4 vectors of B and one step of A nearly fill the 32 registers of AVX-512.
constexpr int64_t kBlockRows = 6;

// A block of the output: up to 6 rows by up to 64 columns.
struct Block {
  const char* a;
  int64_t row_stride, step_stride, depth;
  const uint32_t* b;
  float* out;
  int64_t out_stride, rows, columns;
  bool accumulate;
};

using MicroKernel = void (*)(const Block&);

// The micro-kernel for blocks of that size; `plain`: in plain C++, else has_gemm<E>() is required.
template <class E>
MicroKernel micro_kernel(int64_t rows, int64_t columns, bool plain);

// The two numbers of a step of bfloat16.
inline float low_entry(uint32_t step) { return std::bit_cast<float>(step << 16); }
inline float high_entry(uint32_t step) { return std::bit_cast<float>(step & 0xffff0000u); }

// Round n floats to bfloat16. round_pair interleaves two rows; high = nullptr stands for a row of zeros.
void round_row(const float* x, Bf16* out, int64_t n);
void round_pair(const float* low, const float* high, uint32_t* out, int64_t n);

}  // namespace cwdpo
