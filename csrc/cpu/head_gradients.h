// Gradients of a head's hidden states, weight and bias from those of its logits, in one pass over the vocabulary.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "../ops.h"
#include "convert.h"
#include "head.h"
#include "kept.h"
#include "logit_grads.h"
#include "strips.h"

namespace cwdpo {

// Writes the gradient of a tile of logits [B, R] to `grad`, which may be `logits` itself. If `source` is given, row r
// is in column source[r] of `logits`.
template <class T>
void write_tile_gradient(
    const TiledHead<T>& head, const LogitGrads<T>& grads, Span columns, Span block, const Matrix<T>& logits,
    const Matrix<T>& grad, const int64_t* source) {
  const auto column = [&](int64_t n) { return source == nullptr ? n : source[block.start + n]; };
  std::vector<std::pair<T*, T>> at_labels;
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t row = block.start + n, label = grads.rows.labels[row];
    if (!columns.contains(label)) continue;
    const T target = logits.row(label - columns.start)[column(n)];
    at_labels.emplace_back(grad.row(label - columns.start) + n, grads.grad_target[row] * head.slope(target));
  }
  const T *max_logit = grads.max_logits.data() + block.start, *factor = grads.exp_factor.data() + block.start;
  const T* log_factor = grads.log_factor.empty() ? nullptr : grads.log_factor.data() + block.start;
  for_rows(columns.size, block.size, [&](int64_t v) {
    const T* z = logits.row(v);
    T* out = grad.row(v);
    if (source != nullptr) {
      for (int64_t n = 0; n < block.size; ++n) out[n] = z[column(n)];
      z = out;
    }
    exp_across_tokens(z, out, block.size, max_logit, factor, log_factor, head.cap);
  });
  for (const auto& [entry, value] : at_labels) *entry = value;  // replaces exp(z_y - max_logit), which may overflow
}

// Writes the gradient of a tile's logits to `tile`, from kept logits or from the product. Kept logits are of all
// `n_labelled` rows. If some of those have no gradient, gathers those that do.
template <class T>
void write_logit_gradients(
    TileWorker<T>& worker, const TiledHead<T>& head, const LogitGrads<T>& grads, const KeptTiles<T>& kept,
    int64_t n_labelled, Span columns, Span block, const Matrix<T>& tile) {
  if (!kept.has(columns)) {
    worker.logits(tile, columns, block);
    head.transform(tile, columns);
    return write_tile_gradient(head, grads, columns, block, tile, tile, nullptr);
  }
  const Matrix<T> all_logits = kept.tile(columns);
  if (head.rows < n_labelled) {
    return write_tile_gradient(head, grads, columns, block, all_logits, tile, grads.index_among_labelled.data());
  }
  write_tile_gradient(head, grads, columns, block, all_logits.column_block(block.start, block.size), tile, nullptr);
}

// sums [B, 1] (+)= the sum over the tokens of a block; the first block starts the sums.
template <class T>
void add_bias_gradient(const Matrix<T>& sums, const Matrix<T>& tile, Span block) {
  for_rows(tile.rows, block.size, [&](int64_t v) {
    const T sum = sum_of_row(tile.row(v), block.size);
    *sums.row(v) = block.start == 0 ? sum : *sums.row(v) + sum;
  });
}

// The gradient of one tile's weight or bias rows: summed in the output itself if that has the compute type and
// contiguous rows, else in a buffer that store() rounds to the output.
template <class T>
class TileSums {
 public:
  // `separate`: never sum in the output.
  TileSums(const Tensor& out, int64_t max_rows, bool separate) : out_(out) {
    separate_ = separate || out.scalar_type() != dtype_of<T>() || (out.dim() == 2 && out.stride(1) != 1);
    if (separate_) buffer_ = empty<T>({max_rows, out_.columns});
  }
  Matrix<T> rows(Span span) const {
    if (separate_) return {data<T>(*buffer_), span.size, out_.columns, out_.columns};
    return {reinterpret_cast<T*>(out_.entry(span.start, 0)), span.size, out_.columns, out_.row_stride};
  }
  void store(Span span) const {
    if (separate_) store_rows(data<T>(*buffer_), out_, span);
  }

 private:
  RawMatrix out_;
  bool separate_;
  std::optional<Tensor> buffer_;
};

// Writes the gradients of the head from those of the logits. `kept`: the logits that forward kept.
template <class T>
void head_gradients(
    const HeadArguments& arguments, const LabelledRows& labelled, const LogitGrads<T>& grads, const Tensor& kept,
    const HeadGrads& out) {
  auto [grad_hidden, grad_weight, grad_bias] = out;
  const bool needs_hidden = grad_hidden.numel() > 0, needs_weight = grad_weight.numel() > 0,
             needs_bias = grad_bias.numel() > 0;
  if (!begin_gradients(grads, out)) return;
  const TiledHead<T> head(arguments, grads.rows, Pass::kHiddenWeight);
  const KeptTiles<T> kept_logits(kept, labelled.size(), head.vocab);
  // Every block of rows reads its part of the kept logits, so their memory must not be overwritten by the first block.
  const bool separate = kept.dim() == 2 && head.plan.rows < head.rows;
  std::vector<Tensor> hidden_parts;
  for (int64_t i = 0; needs_hidden && i < head.plan.column_shards; ++i) {
    hidden_parts.push_back(empty<T>({head.rows, head.dim}));
  }
  for_shards(head, [&](TileWorker<T>& worker, const Shard& shard) {
    std::optional<TileSums<T>> weight_sums, bias_sums;
    if (needs_weight) weight_sums.emplace(grad_weight, head.plan.columns, separate);
    if (needs_bias) bias_sums.emplace(grad_bias, head.plan.columns, false);
    shard.for_tiles([&](Span columns) {
      shard.for_blocks([&](Span block) {
        const Matrix<T> tile = worker.buffer(block, columns);
        write_logit_gradients(worker, head, grads, kept_logits, labelled.size(), columns, block, tile);
        if (needs_hidden) {
          const Matrix<T> sums = matrix<T>(hidden_parts[shard.column_shard]).row_block(block.start, block.size);
          worker.add_to_hidden(sums, tile, columns, block, columns.start > shard.columns.start);
        }
        if (needs_weight) worker.add_to_weight(weight_sums->rows(columns), tile, columns, block, block.start > 0);
        if (needs_bias) add_bias_gradient(bias_sums->rows(columns), tile, block);
      });
      if (needs_weight) weight_sums->store(columns);
      if (needs_bias) bias_sums->store(columns);
    });
  });
  if (needs_hidden) store_hidden_gradient<T>(grad_hidden, grads.rows, hidden_parts);
}

// Allocates the gradients of hidden and bias; a gradient that is not needed is an empty tensor.
inline HeadGrads allocate_gradients(
    const HeadArguments& arguments, bool needs_hidden, bool needs_bias, const Tensor& grad_weight) {
  const auto like = [](bool needed, const Tensor& x) {
    return needed ? torch::stable::empty_like(x) : empty({0}, x.scalar_type());
  };
  return {
      like(needs_hidden, arguments.hidden), grad_weight,
      like(needs_bias, arguments.bias ? *arguments.bias : arguments.weight)};
}

// Kept tiles are read as numbers of the compute type, from the end of that memory.
inline void check_kept(const char* op, const Tensor& kept) {
  expect(kept.is_contiguous(), op, "kept", "layout", "contiguous", "strided");
  const auto address = reinterpret_cast<uintptr_t>(kept.data_ptr());
  expect(address % sizeof(double) == 0, op, "kept", "address", "aligned to 8 bytes", address);
}

// `kept` is memory for the weight's gradient.
inline void check_kept_as_gradient(const char* op, const Tensor& kept, const Tensor& weight) {
  expect_dims(op, "kept", kept, 2);
  expect_size(op, "kept", kept, 0, weight.size(0));
  expect_size(op, "kept", kept, 1, weight.size(1));
  expect_dtype(op, "kept", kept, weight.scalar_type());
  expect(kept.is_contiguous(), op, "kept", "layout", "contiguous", "strided");
}

}  // namespace cwdpo
