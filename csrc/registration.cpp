// Registers the C++ implementations for CPU tensors. cwdpo_kernels/ops defines the schemas in Python.
// The library uses only PyTorch's stable ABI, so one file works with every Python and with torch 2.11 or newer.

#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"

namespace {

using torch::stable::detail::StableLibrary;

void implement(StableLibrary& library) {
  library.impl("linear_logprob", TORCH_BOX(&cwdpo::linear_logprob));
  library.impl("linear_logprob_backward", TORCH_BOX(&cwdpo::linear_logprob_backward));
  library.impl("linear_logprob_backward_", TORCH_BOX(&cwdpo::linear_logprob_backward_));
  library.impl("logits_logprob", TORCH_BOX(&cwdpo::logits_logprob));
  library.impl("logits_logprob_backward", TORCH_BOX(&cwdpo::logits_logprob_backward));
  library.impl("logits_logprob_backward_", TORCH_BOX(&cwdpo::logits_logprob_backward_));
  library.impl("softmax_sums", TORCH_BOX(&cwdpo::softmax_sums));
  library.impl("softmax_sums_backward", TORCH_BOX(&cwdpo::softmax_sums_backward));
  library.impl("softmax_sums_backward_", TORCH_BOX(&cwdpo::softmax_sums_backward_));
  library.impl("cwdpo_loss", TORCH_BOX(&cwdpo::cwdpo_loss));
}

}  // namespace

// Registers the ops under `op_namespace`. cwdpo_kernels/ops/library.py calls it with the namespace of its copy of the
// package, so that one prebuilt library serves any copy, and several copies in one process do not clash.
extern "C" __attribute__((visibility("default"))) void cwdpo_register(const char* op_namespace) {
  // Both live until the process ends: the destructor of the registration would remove the kernels.
  const auto* name = new std::string(op_namespace);
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name->c_str(), "CPU", __FILE__, __LINE__);
  implement(*library);
}

#ifdef TORCH_EXTENSION_NAME
// kernel-builder imports the library as a Python module. It generates this header and the module's name.
#include "registration.h"
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#endif
