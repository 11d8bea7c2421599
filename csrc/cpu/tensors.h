// Raw views of tensors, torch's matrix products on them, and the few tensor operations that the ops need. Everything
// goes through the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace cwdpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  else return ScalarType::Bool;
}

// Calls f(T{}), where T is the compute type of `dtype`: double for float64, float for everything else.
template <class F>
auto with_compute_type(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

inline torch::stable::Device cpu() { return {torch::headeronly::DeviceType::CPU}; }

// Throws an error that names the size if there is not enough memory.
inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  try {
    return torch::stable::empty(sizes, dtype, std::nullopt, cpu());
  } catch (const std::exception&) {
    std::ostringstream message;
    message << "out of memory: expected room for a tensor of shape [";
    for (size_t i = 0; i < sizes.size(); ++i) message << (i == 0 ? "" : ", ") << sizes[i];
    message << "] and dtype " << toString(dtype) << ", got none";
    throw std::runtime_error(message.str());
  }
}

template <class T>
Tensor empty(std::vector<int64_t> sizes) {
  return empty(std::move(sizes), dtype_of<T>());
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Zeros the memory of a tensor without gaps between its numbers.
inline void zero(const Tensor& tensor) {
  constexpr int64_t kFloats = 4096, kBytes = kFloats * sizeof(float);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  char* start = data<char>(tensor);
  for_rows_once((bytes + kBytes - 1) / kBytes, kFloats, [&](int64_t i) {
    std::memset(start + i * kBytes, 0, std::min(kBytes, bytes - i * kBytes));
  });
}

inline Tensor zeros(std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor out = empty(std::move(sizes), dtype);
  zero(out);
  return out;
}

// Returns the tensor itself if it is already contiguous and of that dtype.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

template <class T>
Tensor contiguous_as(const Tensor& tensor) {
  return contiguous_as(tensor, dtype_of<T>());
}

// A view of rows [start, start + size). (A Tensor is a handle, so passing it by value shares the memory.)
inline Tensor slice_rows(Tensor tensor, int64_t start, int64_t size) {
  return torch::stable::narrow(tensor, 0, start, size);
}

// A strided view; it does not own its memory.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  T* row(int64_t i) const { return data + i * row_stride; }
  Matrix row_block(int64_t start, int64_t count) const {
    return {row(start), count, columns, row_stride, column_stride};
  }
  Matrix column_block(int64_t start, int64_t count) const {
    return {data + start * column_stride, rows, count, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Tensor tensor() const {
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, cpu(), dtype_of<T>());
  }
};

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {data<T>(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// out = a @ b, or out += a @ b. Calls the CPU kernel directly, so an autocast region of the caller does not round the
// operands.
template <class T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool accumulate) {
  const Tensor out_tensor = out.tensor(), a_tensor = a.tensor(), b_tensor = b.tensor();
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out_tensor.get(), out_tensor.get(), a_tensor.get(), b_tensor.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_tensor.get(), a_tensor.get(), b_tensor.get()));
  }
}

}  // namespace cwdpo
