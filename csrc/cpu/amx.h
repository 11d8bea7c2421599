// Products of bfloat16 with AMX, whose instructions multiply tiles of 16 rows by 32 terms by 16 columns in 16 cycles.
// These are 16 times as many multiply-adds as those of one AVX512-BF16 instruction per cycle. Sums are float32, in
// another order than there.
#pragma once

#include "gemm.h"

namespace cwdpo {

// Whether the processor has the instructions.
bool processor_has_amx();
// Whether this program can use them: the compiler knows them, the system permits it, and a small product is right. The
// first call asks the system for that permission, for all threads. Linux refuses it where a thread has a signal stack
// that is too small for the tiles, and later refuses to set up such a stack.
bool can_use_amx();

// out = a b, or out += a b. `plain`: the same loops with plain C++ in place of the instructions, which sums in another
// order; else can_use_amx() is required.
void multiply_by_tiles(
    const Matrix<float>& out, const OperandA<Bf16>& a, const PackedB<Bf16>& b, bool accumulate, bool plain);

}  // namespace cwdpo
