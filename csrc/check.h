// Argument checks of the ops, with the error format of cwdpo_kernels/validation.py. The public Python functions check
// their arguments first. These checks stop direct calls of the ops from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace cwdpo {

// Unless `ok`, throws "OP: expected ARGUMENT to have PROPERTY EXPECTED, got ACTUAL" (a RuntimeError in Python).
template <class Expected, class Actual>
void expect(
    bool ok, const char* op, const char* argument, const char* property, const Expected& expected,
    const Actual& actual) {
  if (ok) return;
  std::ostringstream message;
  message << op << ": expected " << argument << " to have " << property << " " << expected << ", got " << actual;
  throw std::runtime_error(message.str());
}

inline void expect_dims(const char* op, const char* argument, const torch::stable::Tensor& tensor, int64_t dims) {
  expect(tensor.dim() == dims, op, argument, "dimensions", dims, tensor.dim());
}

inline void expect_size(
    const char* op, const char* argument, const torch::stable::Tensor& tensor, int64_t dim, int64_t size) {
  const std::string property = "size of dimension " + std::to_string(dim);
  expect(tensor.size(dim) == size, op, argument, property.c_str(), size, tensor.size(dim));
}

inline void expect_dtype(
    const char* op, const char* argument, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  expect(tensor.scalar_type() == dtype, op, argument, "dtype", toString(dtype), toString(tensor.scalar_type()));
}

}  // namespace cwdpo
