#include "packed_head.h"

#include <type_traits>

namespace cwdpo {

template <class E>
PackedHidden<E>::PackedHidden(
    const Tensor& hidden, const std::vector<int64_t>& labels, int64_t block_rows, bool needs_weight)
    : hidden_(hidden), labels_(labels), block_rows_(block_rows) {
  const int64_t dim = hidden.size(1);
  for_spans({0, hidden.size(0)}, block_rows, [&](Span block) {
    transposed_.push_back(std::make_unique<PackedB<E>>(dim, block.size));
    transposed_.back()->pack_transposed(row(block.start), dim);
    if (!needs_weight) return;
    plain_.push_back(std::make_unique<PackedB<E>>(block.size, dim));
    plain_.back()->pack(row(block.start), block.size, /*once=*/true);
  });
}

template <class E>
PackedHead<E>::PackedHead(const PackedHidden<E>& hidden, const Tensor& weight, TilePlan plan, bool needs_gradients)
    : hidden_(hidden), weight_(weight, kElementType<E>, plan.columns), dim_(weight.size(1)) {
  if (!needs_gradients) return;
  packed_weight_.emplace(plan.columns, dim_);
  if constexpr (std::is_same_v<E, Bf16>) rounded_tile_.emplace(plan.columns, plan.rows);
}

template <class E>
OperandA<E> PackedHead<E>::as_operand(const Matrix<float>& tile, bool transposed) {
  if constexpr (std::is_same_v<E, Bf16>) {
    return transposed ? rounded_tile_->round_transposed(tile) : rounded_tile_->round(tile);
  } else {
    return operand_a(transposed ? tile.transposed() : tile);
  }
}

template <class E>
template <class F>
void PackedHead<E>::for_label_errors(const Matrix<float>& tile, Span columns, Span block, const F& add) const {
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t label = hidden_.label(block.start + n);
    if (columns.contains(label)) add(block.start + n, label, bf16_rounding_error(tile.row(label - columns.start)[n]));
  }
}

template <class E>
void PackedHead<E>::logits(const Matrix<float>& tile, Span columns, Span block) {
  multiply(tile, operand_a<E>(weight_.rows(columns), columns.size, dim_), hidden_.transposed(block), false);
}

template <class E>
void PackedHead<E>::add_to_hidden(
    const Matrix<float>& sums, const Matrix<float>& tile, Span columns, Span block, bool accumulate) {
  const E* weight = weight_.rows(columns);
  if (packed_start_ != columns.start) packed_weight_->pack(weight, columns.size);
  packed_start_ = columns.start;
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
  multiply(sums, as_operand(tile, /*transposed=*/false), hidden_.plain(block), accumulate);
  if constexpr (std::is_same_v<E, Bf16>) {
    for_label_errors(tile, columns, block, [&](int64_t row, int64_t label, float error) {
      add_scaled_row(sums.row(label - columns.start), hidden_.row(row), dim_, error);
    });
  }
}

template class PackedHidden<float>;
template class PackedHidden<Bf16>;
template class PackedHead<float>;
template class PackedHead<Bf16>;

}  // namespace cwdpo
