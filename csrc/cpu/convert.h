// Rows of a tensor of any floating-point dtype and layout, read and written without a call into torch: its dispatcher
// must not run on the threads of a parallel loop, where autograd's and inference mode's state are not those of the op.
#pragma once

#include <vector>

#include "tensors.h"
#include "tiles.h"

namespace cwdpo {

// The memory of a matrix. A vector [n] has n rows of one entry.
struct RawMatrix {
  explicit RawMatrix(const Tensor& tensor)
      : data(cwdpo::data<char>(tensor)),
        dtype(tensor.scalar_type()),
        item_size(tensor.element_size()),
        columns(tensor.dim() == 2 ? tensor.size(1) : 1),
        row_stride(tensor.stride(0)),
        column_stride(tensor.dim() == 2 ? tensor.stride(1) : 1) {}

  char* entry(int64_t row, int64_t column) const {
    return data + (row * row_stride + column * column_stride) * item_size;
  }

  char* data;
  ScalarType dtype;
  int64_t item_size, columns, row_stride, column_stride;
};

// out [rows, columns] = the rows, as contiguous numbers of type T (float, double, or the bits of a bfloat16).
template <class T>
void load_rows(const RawMatrix& from, Span rows, T* out);

// The rows with these indices, [n, columns], as contiguous numbers of type Float, Double, or, if they are that, BFloat16.
Tensor gather_rows(const Tensor& from, const std::vector<int64_t>& rows, ScalarType type);

// The reverse of load_rows, from float or double: every number is rounded once.
template <class T>
void store_rows(const T* values, const RawMatrix& to, Span rows);

}  // namespace cwdpo
