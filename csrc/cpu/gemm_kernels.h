// The innermost loops of gemm.h: blocks of the result that stay in registers, and rounding to bfloat16.
#pragma once

#include <cstdint>

#include "gemm.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define CWDPO_HAS_PRODUCTS 1
#else
#define CWDPO_HAS_PRODUCTS 0
#endif

namespace cwdpo {

constexpr int64_t kBlock = 6;  // rows of a block: 6 x 4 sums, 4 operands and a step fill the 32 registers of AVX-512

// A block of the result: up to 6 rows by up to 64 columns.
struct Block {
  const char* left;
  int64_t row_stride, step_stride, depth;
  const uint32_t* right;
  float* out;
  int64_t out_stride, columns;
  bool accumulate;
};

using MultiplyBlock = void (*)(const Block&);

// The function for blocks of E of that size; only where `multiplies<E>()`.
template <class E>
MultiplyBlock block_function(int64_t rows, int64_t columns);

// n floats rounded to bfloat16; of two rows, side by side (high: null for zeros).
void round_row(const float* x, Bf16* out, int64_t n);
void round_pair(const float* low, const float* high, uint32_t* out, int64_t n);

}  // namespace cwdpo
