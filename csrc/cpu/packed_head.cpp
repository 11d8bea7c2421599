#include "packed_head.h"

#include <type_traits>

namespace cwdpo {

template <class E>
PackedHead<E>::PackedHead(
    const Tensor& hidden, const Tensor& weight, const std::vector<int64_t>& labels, TilePlan plan)
    : hidden_(hidden), weight_(weight), labels_(labels), plan_(plan), dim_(weight.size(1)) {
  const int64_t blocks = (hidden.size(0) + plan.rows - 1) / plan.rows;
  packed_hidden_t_.resize(blocks);
  packed_hidden_.resize(blocks);
  const bool usable = weight.scalar_type() == kElementType<E> && weight.is_contiguous();
  if (!usable) weight_buffer_ = empty({plan.columns, dim_}, kElementType<E>);
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
OperandA<E> PackedHead<E>::as_operand(const Matrix<float>& tile, bool transposed) {
  if constexpr (std::is_same_v<E, Bf16>) {
    if (!rounded_tile_) rounded_tile_.emplace(plan_.columns, plan_.rows);
    return transposed ? rounded_tile_->round_transposed(tile) : rounded_tile_->round(tile);
  } else {
    return operand_a(transposed ? tile.transposed() : tile);
  }
}

template <class E>
template <class F>
void PackedHead<E>::for_label_errors(const Matrix<float>& tile, Span columns, Span block, const F& add) const {
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t label = labels_[block.start + n];
    if (columns.contains(label)) add(block.start + n, label, bf16_rounding_error(tile.row(label - columns.start)[n]));
  }
}

template <class E>
void PackedHead<E>::logits(const Matrix<float>& tile, Span columns, Span block) {
  std::optional<PackedB<E>>& b = packed_hidden_t_[block.start / plan_.rows];
  if (!b) b.emplace(dim_, block.size).pack_transposed(hidden_row(block.start), dim_);
  multiply(tile, operand_a<E>(weight_rows(columns), columns.size, dim_), *b, /*accumulate=*/false);
}

template <class E>
void PackedHead<E>::add_to_hidden(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  const E* weight = weight_rows(columns);
  if (packed_start_ != columns.start) {
    if (!packed_weight_) packed_weight_.emplace(plan_.columns, dim_);
    packed_weight_->pack(weight, columns.size);
    packed_start_ = columns.start;
  }
  multiply(sums, as_operand(tile, /*transposed=*/true), *packed_weight_, accumulate);
  if constexpr (std::is_same_v<E, Bf16>) {
    for_label_errors(tile, columns, block, [&](int64_t row, int64_t label, float error) {
      add_scaled_row(sums.row(row - block.start), weight + (label - columns.start) * dim_, dim_, error);
    });
  }
}

template <class E>
void PackedHead<E>::add_to_weight(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  std::optional<PackedB<E>>& b = packed_hidden_[block.start / plan_.rows];
  if (!b) b.emplace(block.size, dim_).pack(hidden_row(block.start), block.size);
  multiply(sums, as_operand(tile, /*transposed=*/false), *b, accumulate);
  if constexpr (std::is_same_v<E, Bf16>) {
    for_label_errors(tile, columns, block, [&](int64_t row, int64_t label, float error) {
      add_scaled_row(sums.row(label - columns.start), hidden_row(row), dim_, error);
    });
  }
}

template class PackedHead<float>;
template class PackedHead<Bf16>;

}  // namespace cwdpo
