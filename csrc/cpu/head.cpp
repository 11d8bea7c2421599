#include "head.h"

#include "../check.h"

namespace cwdpo {
namespace {

constexpr int64_t kMinTile = 128;
constexpr int64_t kMaxRows = 1024;
constexpr int64_t kWorkspaceBytes = 2 << 20;

bool uses_bf16_gemm(const HeadArguments& head) {
  return head.weight.scalar_type() == ScalarType::BFloat16 && has_gemm<Bf16>();
}

bool uses_float_gemm(const HeadArguments& head) {
  return head.weight.scalar_type() != ScalarType::Double && has_gemm<float>();
}

}  // namespace

void check_head(const char* op, const HeadArguments& head, const Tensor& labels) {
  expect_dims(op, "hidden", head.hidden, 2);
  expect_float(op, "hidden", head.hidden);
  expect_at_least(op, "D", head.hidden.size(1), 1);
  expect_dims(op, "weight", head.weight, 2);
  expect_size(op, "weight", head.weight, 1, head.hidden.size(1));
  expect_dtype(op, "weight", head.weight, head.hidden.scalar_type());
  expect_index(op, "labels", labels);
  expect_vector(op, "labels", labels, head.hidden.size(0));
  if (head.bias) {
    expect_vector(op, "bias", *head.bias, head.weight.size(0));
    expect_dtype(op, "bias", *head.bias, head.hidden.scalar_type());
  }
  expect_at_least(op, "workspace_bytes", head.workspace_bytes, 0);
  with_compute_type(head.hidden.scalar_type(), [&](auto type) {
    using Limits = std::numeric_limits<decltype(type)>;
    if (!head.softcap) return;
    const bool ok = *head.softcap >= Limits::min() && *head.softcap <= Limits::max();
    std::ostringstream range;
    range << "between " << Limits::min() << " and " << Limits::max();
    expect(ok, op, "softcap", "value", range.str(), *head.softcap);
  });
}

LabelledRows labelled_rows(const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab) {
  const Tensor as_int64 = contiguous_as<int64_t>(labels);
  const int64_t* values = data<int64_t>(as_int64);
  LabelledRows labelled;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    if (values[i] == ignore_index) continue;
    expect(values[i] >= 0 && values[i] < vocab, op, "labels", "values below", vocab, values[i]);
    labelled.tokens.push_back(i);
    labelled.labels.push_back(values[i]);
  }
  return labelled;
}

TilePlan plan_tiles(const HeadArguments& head, int64_t n_rows, size_t item_size) {
  const int64_t bytes = head.workspace_bytes == 0 ? kWorkspaceBytes : head.workspace_bytes;
  const int64_t entries = std::max<int64_t>(bytes / item_size, kMinTile * kMinTile);
  const int64_t rows = std::clamp<int64_t>(std::min(n_rows, entries / kMinTile), 1, kMaxRows);
  // Each column also needs `extra` entries: its row of the weight converted to float and packed, or, with the bfloat16
  // GEMM, that row packed and the column itself rounded.
  const int64_t dim = head.weight.size(1), converted = head.weight.element_size() == item_size ? 0 : dim;
  const int64_t extra = uses_bf16_gemm(head) ? (rows + dim) / 2 : converted + (uses_float_gemm(head) ? dim : 0);
  const int64_t columns = std::max<int64_t>(entries / (rows + extra) / kMinTile, 1) * kMinTile;
  return {rows, std::clamp<int64_t>(head.weight.size(0), 1, columns)};
}

template <class T>
TiledHead<T>::TiledHead(const HeadArguments& arguments, const LabelledRows& labelled, TilePlan tile_plan)
    : plan(tile_plan),
      rows(labelled.size()),
      vocab(arguments.weight.size(0)),
      dim(arguments.weight.size(1)),
      scale(static_cast<T>(arguments.scale)),
      cap(static_cast<T>(arguments.softcap.value_or(0))),
      labelled_(labelled),
      weight_tensor_(arguments.weight),
      buffer_(empty<T>({plan.columns * padded(std::min(plan.rows, rows))})) {
  const bool all = rows == arguments.hidden.size(0);
  hidden_tensor_ = all ? arguments.hidden : index_rows(arguments.hidden, labelled.tokens.data(), rows);
  if (arguments.bias) bias_tensor_ = contiguous_as<T>(*arguments.bias);
  bias_ = bias_tensor_ ? data<T>(*bias_tensor_) : nullptr;
  if (uses_bf16_gemm(arguments)) {
    hidden_tensor_ = torch::stable::contiguous(hidden_tensor_);
    bf16_ = std::make_unique<PackedHead<Bf16>>(hidden_tensor_, weight_tensor_, labelled_.labels, plan);
    return;
  }
  if (uses_float_gemm(arguments)) {
    hidden_tensor_ = contiguous_as<T>(hidden_tensor_);
    floats_ = std::make_unique<PackedHead<float>>(hidden_tensor_, weight_tensor_, labelled_.labels, plan);
    return;
  }
  if (hidden_tensor_.scalar_type() != dtype_of<T>()) hidden_tensor_ = contiguous_as<T>(hidden_tensor_);
  if (weight_tensor_.scalar_type() != dtype_of<T>()) weight_buffer_ = empty<T>({plan.columns, dim});
}

template <class T>
Matrix<T> TiledHead<T>::weight(Span columns) const {
  if (!weight_buffer_) return matrix<T>(weight_tensor_).row_block(columns.start, columns.size);
  Tensor tile = slice_rows(*weight_buffer_, 0, columns.size);
  if (converted_start_ != columns.start) {
    torch::stable::copy_(tile, slice_rows(weight_tensor_, columns.start, columns.size));
    converted_start_ = columns.start;
  }
  return matrix<T>(tile);
}

template <class T>
void TiledHead<T>::logits(const Matrix<T>& tile, Span columns, Span block) const {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->logits(tile, columns, block);
    if (floats_) return floats_->logits(tile, columns, block);
  }
  multiply(tile, weight(columns), hidden(block).transposed(), /*accumulate=*/false);
}

template <class T>
void TiledHead<T>::add_to_hidden(
    const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->add_to_hidden(sums, tile, columns, block, accumulate);
    if (floats_) return floats_->add_to_hidden(sums, tile, columns, block, accumulate);
  }
  multiply(sums, tile.transposed(), weight(columns), accumulate);
}

template <class T>
void TiledHead<T>::add_to_weight(
    const Matrix<T>& sums, const Matrix<T>& tile, Span columns, Span block, bool accumulate) const {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->add_to_weight(sums, tile, columns, block, accumulate);
    if (floats_) return floats_->add_to_weight(sums, tile, columns, block, accumulate);
  }
  multiply(sums, tile, hidden(block), accumulate);
}

template <class T>
std::vector<T> TiledHead<T>::target_logits() const {
  std::vector<T> logits(rows);
  for_spans(rows, plan.rows, [&](Span block) {
    const Tensor label_weight = target_weight(block);
    const Tensor hidden_rows = contiguous_as<T>(slice_rows(hidden_tensor_, block.start, block.size));
    for_rows(block.size, dim, [&](int64_t i) {
      const int64_t row = block.start + i;
      logits[row] = static_cast<T>(dot_row(data<T>(hidden_rows) + i * dim, data<T>(label_weight) + i * dim, dim));
      transform_row(&logits[row], 1, bias(labelled_.labels[row]), scale, cap);
    });
  });
  return logits;
}

template class TiledHead<float>;
template class TiledHead<double>;

}  // namespace cwdpo

// Read by cwdpo_kernels/ops/library.py: the package reports the default workspace instead of repeating the number.
extern "C" __attribute__((visibility("default"))) int64_t cwdpo_workspace_bytes() { return cwdpo::kWorkspaceBytes; }
