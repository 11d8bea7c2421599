// Binds the C++ implementations to the schemas that cwdpo_kernels/ops defined in Python, for CPU tensors.
// Only PyTorch's stable ABI is used: one shared object serves every Python, and torch from 2.11 on.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(cwdpo, CPU, m) {
  m.impl("linear_logprob", TORCH_BOX(&cwdpo::linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&cwdpo::linear_logprob_backward));
}
