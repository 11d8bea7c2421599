#include "bf16_head.h"

namespace cwdpo {

Bf16Head::Bf16Head(
    const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan)
    : hidden_(hidden), weight_(weight), labels_(labels), plan_(plan), dim_(weight.size(1)) {
  const int64_t blocks = (hidden.size(0) + plan.rows - 1) / plan.rows;
  hidden_columns_.resize(blocks);
  hidden_rows_.resize(blocks);
}

const Bf16* Bf16Head::weight_rows(Span columns) {
  if (weight_start_ != columns.start) {
    weight_tile_ = torch::stable::contiguous(slice_rows(weight_, columns.start, columns.size));
    weight_start_ = columns.start;
  }
  return data<Bf16>(weight_tile_);
}

void Bf16Head::logits(const Matrix<float>& tile, Span columns, Span block) {
  std::optional<Bf16Right>& right = hidden_columns_[block.start / plan_.rows];
  if (!right) right.emplace(dim_, block.size).pack_transposed(hidden_row(block.start), dim_);
  multiply(tile, left_factor(weight_rows(columns), columns.size, dim_), *right, /*accumulate=*/false);
}

// add(row, label, lost) for the tile's labels.
template <class F>
void Bf16Head::for_lost_at_labels(const Matrix<float>& tile, Span columns, Span block, const F& add) const {
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t label = labels_[block.start + n];
    if (columns.contains(label)) add(block.start + n, label, lost_to_bf16(tile.row(label - columns.start)[n]));
  }
}

void Bf16Head::add_to_hidden(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  const Bf16* weight = weight_rows(columns);
  if (packed_start_ != columns.start) {
    if (!weight_right_) weight_right_.emplace(plan_.columns, dim_);
    weight_right_->pack(weight, columns.size);
    packed_start_ = columns.start;
  }
  if (!rounded_) rounded_.emplace(plan_.columns, plan_.rows);
  multiply(sums, rounded_->transposed(tile), *weight_right_, accumulate);
  for_lost_at_labels(tile, columns, block, [&](int64_t row, int64_t label, float lost) {
    add_scaled_row(sums.row(row - block.start), weight + (label - columns.start) * dim_, dim_, lost);
  });
}

void Bf16Head::add_to_weight(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  std::optional<Bf16Right>& right = hidden_rows_[block.start / plan_.rows];
  if (!right) right.emplace(block.size, dim_).pack(hidden_row(block.start), block.size);
  if (!rounded_) rounded_.emplace(plan_.columns, plan_.rows);
  multiply(sums, rounded_->rows(tile), *right, accumulate);
  for_lost_at_labels(tile, columns, block, [&](int64_t row, int64_t label, float lost) {
    add_scaled_row(sums.row(label - columns.start), hidden_row(row), dim_, lost);
  });
}

}  // namespace cwdpo
