#include "packed_head.h"

#include <type_traits>

namespace cwdpo {

template <class E>
PackedHead<E>::PackedHead(
    const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan)
    : hidden_(hidden), weight_(weight), labels_(labels), plan_(plan), dim_(weight.size(1)) {
  const int64_t blocks = (hidden.size(0) + plan.rows - 1) / plan.rows;
  hidden_columns_.resize(blocks);
  hidden_rows_.resize(blocks);
  const bool as_it_lies = weight.scalar_type() == kElementType<E> && weight.is_contiguous();
  if (!as_it_lies) weight_buffer_ = empty({plan.columns, dim_}, kElementType<E>);
}

template <class E>
const E* PackedHead<E>::weight_rows(Span columns) {
  if (weight_start_ != columns.start) {
    const Tensor rows = slice_rows(weight_, columns.start, columns.size);
    if (weight_buffer_) {
      weight_tile_ = slice_rows(*weight_buffer_, 0, columns.size);
      torch::stable::copy_(weight_tile_, rows);
    } else {
      weight_tile_ = rows;
    }
    weight_start_ = columns.start;
  }
  return data<E>(weight_tile_);
}

template <class E>
LeftFactor<E> PackedHead<E>::left(const Matrix<float>& tile, bool transposed) {
  if constexpr (std::is_same_v<E, Bf16>) {
    if (!rounded_) rounded_.emplace(plan_.columns, plan_.rows);
    return transposed ? rounded_->transposed(tile) : rounded_->rows(tile);
  } else {
    return left_factor(transposed ? tile.transposed() : tile);
  }
}

// add(row, label, lost) for the tile's labels.
template <class E>
template <class F>
void PackedHead<E>::for_lost_at_labels(const Matrix<float>& tile, Span columns, Span block, const F& add) const {
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t label = labels_[block.start + n];
    if (columns.contains(label)) add(block.start + n, label, lost_to_bf16(tile.row(label - columns.start)[n]));
  }
}

template <class E>
void PackedHead<E>::logits(const Matrix<float>& tile, Span columns, Span block) {
  std::optional<RightFactor<E>>& right = hidden_columns_[block.start / plan_.rows];
  if (!right) right.emplace(dim_, block.size).pack_transposed(hidden_row(block.start), dim_);
  multiply(tile, left_factor<E>(weight_rows(columns), columns.size, dim_), *right, /*accumulate=*/false);
}

template <class E>
void PackedHead<E>::add_to_hidden(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  const E* weight = weight_rows(columns);
  if (packed_start_ != columns.start) {
    if (!weight_right_) weight_right_.emplace(plan_.columns, dim_);
    weight_right_->pack(weight, columns.size);
    packed_start_ = columns.start;
  }
  multiply(sums, left(tile, /*transposed=*/true), *weight_right_, accumulate);
  if constexpr (std::is_same_v<E, Bf16>) {
    for_lost_at_labels(tile, columns, block, [&](int64_t row, int64_t label, float lost) {
      add_scaled_row(sums.row(row - block.start), weight + (label - columns.start) * dim_, dim_, lost);
    });
  }
}

template <class E>
void PackedHead<E>::add_to_weight(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  std::optional<RightFactor<E>>& right = hidden_rows_[block.start / plan_.rows];
  if (!right) right.emplace(block.size, dim_).pack(hidden_row(block.start), block.size);
  multiply(sums, left(tile, /*transposed=*/false), *right, accumulate);
  if constexpr (std::is_same_v<E, Bf16>) {
    for_lost_at_labels(tile, columns, block, [&](int64_t row, int64_t label, float lost) {
      add_scaled_row(sums.row(label - columns.start), hidden_row(row), dim_, lost);
    });
  }
}

template class PackedHead<float>;
template class PackedHead<Bf16>;

}  // namespace cwdpo
