// Registers the C++ implementations for CPU tensors. cwdpo_kernels/ops defines the schemas in Python.
// The library uses only PyTorch's stable ABI, so one file works with every Python and with torch 2.11 or newer.

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
