// Binds the C++ implementations to the schemas that cwdpo_kernels/ops defined in Python, for CPU tensors.
// Only PyTorch's stable ABI is used: one shared object serves every Python, and torch from 2.11 on.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(cwdpo, CPU, m) {
  m.impl("linear_logprob", TORCH_BOX(&cwdpo::linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&cwdpo::linear_logprob_backward));
  m.impl("linear_logprob_backward_", TORCH_BOX(&cwdpo::linear_logprob_backward_));
  m.impl("logits_logprob", TORCH_BOX(&cwdpo::logits_logprob));
  m.impl("logits_logprob_backward", TORCH_BOX(&cwdpo::logits_logprob_backward));
  m.impl("logits_logprob_backward_", TORCH_BOX(&cwdpo::logits_logprob_backward_));
  m.impl("token_stats", TORCH_BOX(&cwdpo::token_stats));
  m.impl("cwdpo_loss", TORCH_BOX(&cwdpo::cwdpo_loss));
}
