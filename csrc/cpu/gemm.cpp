#include "gemm.h"

#include <atomic>
#include <string>
#include <type_traits>

#include "amx.h"
#include "gemm_kernels.h"
#include "vector.h"

namespace cwdpo {
namespace {

GemmBackend detect_backend() {
#if CWDPO_HAS_AVX512_GEMM
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return can_use_amx() ? GemmBackend::kAmx : GemmBackend::kAvx512Bf16;
  }
  if (avx512) return GemmBackend::kAvx512;
#endif
  return GemmBackend::kTorch;
}

constexpr int64_t kPanel = PackedB<float>::kPanel;

std::atomic<GemmBackend> limit = GemmBackend::kAmx;

void interleave(const float* row, const float*, uint32_t* out, int64_t n) { std::memcpy(out, row, n * sizeof(float)); }

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace

CWDPO_FOR_EACH_PROCESSOR void interleave(const Bf16* low, const Bf16* high, uint32_t* out, int64_t n) {
  if (high == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
  }
}

GemmBackend gemm_backend() {
  static const GemmBackend detected = detect_backend();
  return limit >= GemmBackend::kPlain ? limit.load() : std::min<GemmBackend>(detected, limit);
}

template <class E>
PackedB<E>::PackedB(int64_t max_depth, int64_t n_columns)
    : columns(n_columns),
      panels_(empty({panels(n_columns) * steps(max_depth) * kPanel}, ScalarType::Int)) {}

template <class E>
void PackedB<E>::pack(const E* rows, int64_t depth, bool once) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(panels_);
  const auto pack_step = [&](int64_t k) {
    const int64_t row = kTermsPerStep<E> * k;
    const E* low = rows + row * columns;
    const E* high = row + 1 < depth ? low + columns : nullptr;
    for (int64_t start = 0; start < columns; start += kPanel) {
      const int64_t count = row < depth ? std::min(kPanel, columns - start) : 0;
      uint32_t* panel = out + start * steps() + k * kPanel;
      interleave(low + start, high == nullptr ? nullptr : high + start, panel, count);
      std::fill(panel + count, panel + kPanel, 0);
    }
  };
  const int64_t entries = kTermsPerStep<E> * columns;
  once ? for_rows_once(steps(), entries, pack_step) : for_rows(steps(), entries, pack_step);
}

template <class E>
void PackedB<E>::pack_transposed(const E* rows, int64_t depth) {
  depth_ = depth;
  uint32_t* out = data<uint32_t>(panels_);
  for_rows_once(panels(columns) * kPanel, depth, [&](int64_t n) {
    uint32_t* column = out + n / kPanel * kPanel * steps() + n % kPanel;
    for (int64_t k = 0; k < steps(); ++k) {
      uint32_t step = 0;
      const int64_t terms = std::clamp<int64_t>(depth - kTermsPerStep<E> * k, 0, kTermsPerStep<E>);
      if (n < columns) std::memcpy(&step, rows + n * depth + kTermsPerStep<E> * k, terms * sizeof(E));
      column[k * kPanel] = step;
    }
  });
}

template <class E>
void multiply(const Matrix<float>& out, const OperandA<E>& a, const PackedB<E>& b, bool accumulate) {
  const GemmBackend backend = gemm_backend();
  if constexpr (std::is_same_v<E, Bf16>) {
    const bool plain = backend == GemmBackend::kPlainTiles;
    if (plain || backend == GemmBackend::kAmx) return multiply_by_tiles(out, a, b, accumulate, plain);
  }
  const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows, n_panels = panels(b.columns);
  const bool plain = backend >= GemmBackend::kPlain;
  for_rows(blocks * n_panels, kBlockRows * kPanel * std::max<int64_t>(a.depth / 32, 1), [&](int64_t i) {
    const int64_t row = i / n_panels * kBlockRows, panel = i % n_panels;
    const int64_t rows = std::min(kBlockRows, a.rows - row), columns = std::min(kPanel, b.columns - panel * kPanel);
    micro_kernel<E>(rows, columns, plain)(
        {a.start + row * a.row_stride, a.row_stride, a.step_stride, a.depth, b.panel(panel),
         out.row(row) + panel * kPanel, out.row_stride, rows, columns, accumulate});
  });
}

template class PackedB<float>;
template class PackedB<Bf16>;
template void multiply(const Matrix<float>&, const OperandA<float>&, const PackedB<float>&, bool);
template void multiply(const Matrix<float>&, const OperandA<Bf16>&, const PackedB<Bf16>&, bool);

}  // namespace cwdpo

// For tests that compare instruction sets: limits all later products to the GemmBackend with index `most`; from
// kPlain on it forces that one. Returns the index of the backend that is now in use.
extern "C" __attribute__((visibility("default"))) int cwdpo_limit_gemm(int most) {
  cwdpo::limit = static_cast<cwdpo::GemmBackend>(most);
  return static_cast<int>(cwdpo::gemm_backend());
}

// Read by cwdpo_kernels/ops/library.py: the instructions in use for products of "float32" or "bfloat16" operands, or
// for "loops" over tiles; and why those of this processor that would help are "not used".
extern "C" __attribute__((visibility("default"))) const char* cwdpo_instructions(const char* what) {
  const std::string name = what;
  if (name == "float32") return cwdpo::has_gemm<float>() ? "own, AVX-512" : "torch.mm";
  if (name == "bfloat16" && cwdpo::gemm_backend() == cwdpo::GemmBackend::kAmx) return "own, AMX";
  if (name == "bfloat16") return cwdpo::has_gemm<cwdpo::Bf16>() ? "own, AVX512-BF16" : "torch.mm in float32";
  if (name == "not used") {
    const bool refused = cwdpo::processor_has_amx() && !cwdpo::can_use_amx();
    return refused ? "AMX: not known to the compiler, not permitted by the system, or wrong in a test" : "";
  }
  return cwdpo::loop_instructions();
}
