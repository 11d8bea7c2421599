#include "kept_exponentials.h"

#include <cmath>

#include "bf16.h"
#include "gemm_kernels.h"

namespace cwdpo {

void KeptExponentials::store(const Matrix<float>& tile, Span columns, Span block) const {
  for_rows(columns.size, block.size, [&](int64_t v) {
    if (!has_line(columns.start + v)) return;
    round_row(tile.row(v), line(columns.start + v) + block.start, block.size);
  });
}

void KeptExponentials::rescale(Span columns, int64_t row, float factor) const {
  if (factor == 1.0f || columns.size == 0) return;
  const float power = factor == 0.0f ? 0.0f : std::exp2(std::round(std::log2(factor)));
  for (int64_t v = columns.start; v < columns.stop(); ++v) {
    if (!has_line(v)) continue;
    Bf16& entry = line(v)[row];
    const float scaled = widened(entry) * power;
    round_row(&scaled, &entry, 1);
  }
}

}  // namespace cwdpo
