#include "gemm.h"

#include <atomic>

#include "gemm_kernels.h"
#include "vector.h"

namespace cwdpo {
namespace {

Products processor_products() {
#if CWDPO_HAS_PRODUCTS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Products::kAvx512Bf16;
  if (avx512) return Products::kAvx512;
#endif
  return Products::kTorch;
}

std::atomic<Products> allowed = Products::kAvx512Bf16;

constexpr int64_t kPanel = RightFactor<float>::kPanel;

// out[j] = low[j] and high[j] side by side, 0 from n on; high: null for zeros.
CWDPO_FOR_EACH_PROCESSOR void interleave(const Bf16* low, const Bf16* high, uint32_t* out, int64_t n) {
  if (high == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
  }
  for (int64_t j = n; j < kPanel; ++j) out[j] = 0;
}

void interleave(const float* row, const float*, uint32_t* out, int64_t n) {
  std::memcpy(out, row, n * sizeof(float));
  std::fill(out + n, out + kPanel, 0);
}

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace

Products products() {
  static const Products found = processor_products();
  return std::min<Products>(found, allowed);
}

template <class E>
RightFactor<E>::RightFactor(int64_t max_depth, int64_t n_columns)
    : columns(n_columns),
      panels_(empty({panels(n_columns) * ((max_depth + kTerms<E> - 1) / kTerms<E>) * kPanel}, ScalarType::Int)) {}

template <class E>
void RightFactor<E>::pack(const E* rows, int64_t depth) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(panels_);
  for_rows(steps(), kTerms<E> * columns, [&](int64_t k) {
    const E* low = rows + kTerms<E> * k * columns;
    const E* high = kTerms<E> * k + 1 < depth ? low + columns : nullptr;
    for (int64_t start = 0; start < columns; start += kPanel) {
      interleave(
          low + start, high == nullptr ? nullptr : high + start, out + start * steps() + k * kPanel,
          std::min(kPanel, columns - start));
    }
  });
}

template <class E>
void RightFactor<E>::pack_transposed(const E* rows, int64_t depth) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(panels_);
  for_rows(panels(columns) * kPanel, depth, [&](int64_t n) {
    uint32_t* column = out + n / kPanel * kPanel * steps() + n % kPanel;
    for (int64_t k = 0; k < steps(); ++k) {
      uint32_t step = 0;
      const size_t bytes = std::min(kTerms<E>, depth - kTerms<E> * k) * sizeof(E);
      if (n < columns) std::memcpy(&step, rows + n * depth + kTerms<E> * k, bytes);
      column[k * kPanel] = step;
    }
  });
}

template <class E>
void multiply(const Matrix<float>& out, const LeftFactor<E>& left, const RightFactor<E>& right, bool accumulate) {
  const int64_t blocks = (left.rows + kBlock - 1) / kBlock, n_panels = panels(right.columns);
  for_rows(blocks * n_panels, kBlock * kPanel * std::max<int64_t>(left.depth / 32, 1), [&](int64_t i) {
    const int64_t row = i / n_panels * kBlock, panel = i % n_panels;
    const int64_t rows = std::min(kBlock, left.rows - row), columns = std::min(kPanel, right.columns - panel * kPanel);
    block_function<E>(rows, columns)(
        {left.start + row * left.row_stride, left.row_stride, left.step_stride, left.depth, right.panel(panel),
         out.row(row) + panel * kPanel, out.row_stride, columns, accumulate});
  });
}

template class RightFactor<float>;
template class RightFactor<Bf16>;
template void multiply(const Matrix<float>&, const LeftFactor<float>&, const RightFactor<float>&, bool);
template void multiply(const Matrix<float>&, const LeftFactor<Bf16>&, const RightFactor<Bf16>&, bool);

}  // namespace cwdpo

// For tests and benchmarks, which compare a processor's instructions: from now on at most those of `most` are used
// (an index of Products); returns what is used.
extern "C" __attribute__((visibility("default"))) int cwdpo_limit_products(int most) {
  cwdpo::allowed = static_cast<cwdpo::Products>(most);
  return static_cast<int>(cwdpo::products());
}
