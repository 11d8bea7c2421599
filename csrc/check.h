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

// A vector of `size` entries.
inline void expect_vector(const char* op, const char* argument, const torch::stable::Tensor& tensor, int64_t size) {
  expect_dims(op, argument, tensor, 1);
  expect_size(op, argument, tensor, 0, size);
}

inline void expect_dtype(
    const char* op, const char* argument, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  expect(tensor.scalar_type() == dtype, op, argument, "dtype", toString(dtype), toString(tensor.scalar_type()));
}

inline void expect_float(const char* op, const char* argument, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  const bool ok = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                  dtype == ScalarType::Double;
  expect(ok, op, argument, "dtype", "Float, BFloat16, Half or Double", toString(dtype));
}

inline void expect_index(const char* op, const char* argument, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  expect(dtype == ScalarType::Long || dtype == ScalarType::Int, op, argument, "dtype", "Long or Int", toString(dtype));
}

inline void expect_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  expect(value >= least, op, argument, "value at least", least, value);
}

}  // namespace cwdpo
