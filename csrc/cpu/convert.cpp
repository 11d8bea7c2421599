#include "convert.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "parallel.h"
#include "vector.h"

namespace cwdpo {
namespace {

template <class From, class To>
CWDPO_INLINE void convert(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = static_cast<To>(from[i * from_stride]);
  }
}

#define CWDPO_DEFINE(From, To)                                                                                   \
  CWDPO_FOR_EACH_PROCESSOR void convert_line(                                                                    \
      const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n) {                             \
    convert(from, from_stride, to, to_stride, n);                                                                \
  }

CWDPO_DEFINE(float, float)
CWDPO_DEFINE(double, double)
CWDPO_DEFINE(uint16_t, uint16_t)
CWDPO_DEFINE(c10::Half, float)
CWDPO_DEFINE(c10::BFloat16, float)
CWDPO_DEFINE(float, c10::Half)
CWDPO_DEFINE(float, c10::BFloat16)

// Calls f(E*) with the type of the stored numbers, of those that are computed in type T.
template <class T, class F>
void with_stored_type(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == ScalarType::Half) return f(static_cast<c10::Half*>(nullptr));
    if (dtype == ScalarType::BFloat16) return f(static_cast<c10::BFloat16*>(nullptr));
  }
  f(static_cast<T*>(nullptr));
}

// Calls f(row, column, stride, stride in a contiguous matrix, count) for every line of numbers: each row, or each
// column where that is the one with adjacent numbers.
template <class F>
void for_lines(const RawMatrix& matrix, Span rows, const F& f) {
  if (matrix.column_stride <= matrix.row_stride || rows.size == 1) {
    for (int64_t i = 0; i < rows.size; ++i) f(i, int64_t{0}, matrix.column_stride, int64_t{1}, matrix.columns);
  } else {
    for (int64_t j = 0; j < matrix.columns; ++j) f(int64_t{0}, j, matrix.row_stride, matrix.columns, rows.size);
  }
}

}  // namespace

template <class T>
void load_rows(const RawMatrix& from, Span rows, T* out) {
  with_stored_type<T>(from.dtype, [&]<class E>(E*) {
    for_lines(from, rows, [&](int64_t i, int64_t j, int64_t stride, int64_t out_stride, int64_t n) {
      const E* line = reinterpret_cast<const E*>(from.entry(rows.start + i, j));
      convert_line(line, stride, out + i * from.columns + j, out_stride, n);
    });
  });
}

template <class T>
void store_rows(const T* values, const RawMatrix& to, Span rows) {
  with_stored_type<T>(to.dtype, [&]<class E>(E*) {
    for_lines(to, rows, [&](int64_t i, int64_t j, int64_t stride, int64_t value_stride, int64_t n) {
      E* line = reinterpret_cast<E*>(to.entry(rows.start + i, j));
      convert_line(values + i * to.columns + j, value_stride, line, stride, n);
    });
  });
}

Tensor gather_rows(const Tensor& from, const std::vector<int64_t>& rows, ScalarType type) {
  const RawMatrix matrix(from);
  const auto gathered = [&](auto number) {
    using T = decltype(number);
    const Tensor out = empty({static_cast<int64_t>(rows.size()), matrix.columns}, type);
    for_rows_once(rows.size(), matrix.columns, [&](int64_t i) {
      load_rows(matrix, {rows[i], 1}, data<T>(out) + i * matrix.columns);
    });
    return out;
  };
  if (type == ScalarType::BFloat16) return gathered(uint16_t{});
  return with_compute_type(type, gathered);
}

template void load_rows(const RawMatrix&, Span, float*);
template void load_rows(const RawMatrix&, Span, double*);
template void load_rows(const RawMatrix&, Span, uint16_t*);
template void store_rows(const float*, const RawMatrix&, Span);
template void store_rows(const double*, const RawMatrix&, Span);

}  // namespace cwdpo
