// The gradients of a bfloat16 head from the exponentials that forward kept (kept_exponentials.h). Legend: head.h.
#pragma once

#include "../ops.h"
#include "kept_exponentials.h"
#include "logit_grads.h"

namespace cwdpo {

// Writes the gradients of the head. `kept` holds the exponentials; it may be the memory of the weight's gradient.
void exponential_gradients(
    const HeadArguments& arguments, const LabelledRows& labelled, const LogitGrads<float>& grads, const Tensor& kept,
    const HeadGrads& out);

}  // namespace cwdpo
