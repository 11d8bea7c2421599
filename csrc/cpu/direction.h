// The direction of a frozen head's gradient, which forward computes: d logp / d hidden = (1 - p_y) * direction.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "sweep.h"

namespace cwdpo {

// The dtype of a direction: that of the inputs, but float32 for float16, where the direction may overflow although the
// gradient, direction * (1 - p_y), does not.
inline ScalarType direction_dtype(ScalarType dtype) { return dtype == ScalarType::Half ? ScalarType::Float : dtype; }

// A direction [N, D] of zeros; [0, D] if none is wanted.
inline Tensor direction_of_zeros(const Tensor& hidden, bool with_direction) {
  return zeros({with_direction ? hidden.size(0) : 0, hidden.size(1)}, direction_dtype(hidden.scalar_type()));
}

// Writes scale * (slope_y W_y - sum_exp_weight / sum_exp) of every labelled row to its token's row of `direction`, which
// holds zeros. It stays so where logp is NaN: an upstream gradient of 0 then gives 0, and any other NaN, because 1 - p_y
// is NaN. Uses sum_exp_weight as workspace.
template <class T>
void write_direction(
    const TiledHead<T>& head, const std::vector<int64_t>& tokens, const std::vector<T>& target,
    const SweepResult<T>& result, const Tensor& direction) {
  const Matrix<T> sums = matrix<T>(result.sum_exp_weight);
  const RawMatrix out(direction);
  for_rows_once(head.rows, head.dim, [&](int64_t row) {
    if (std::isnan(logp_of(target[row], result.softmax[row]))) return;
    // With V = 1, sum_exp is 0. The lower bound avoids 0 / 0; backward multiplies the direction by 1 - p_y = 0.
    const T sum_exp = std::max(result.softmax[row].sum_exp, std::numeric_limits<T>::min());
    scale_row(sums.row(row), head.dim, T(1) / sum_exp);
    const std::vector<T> label_weight = head.weight_row(head.label(row));
    subtract_from_row(sums.row(row), label_weight.data(), head.dim, head.slope(target[row]), head.scale);
    store_rows(sums.row(row), out, {tokens[row], 1});
  });
}

}  // namespace cwdpo
