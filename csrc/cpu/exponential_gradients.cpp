// The only work of size N x V: exponentials that forward did not keep, and two products,
//
//   grad_hidden = factor * (u W + ratio W_y)             ratio = grad_target / factor
//   grad_weight = u^T (factor * H) + scatter_y(grad_target * H)
//
// u and W are used as they are stored. factor * H is rounded to bfloat16. For competitors with a large part of a
// token's gradient that error is added back in float32, so that they are rounded once (as u) before the result is. The
// label's part, often half of the gradient, is not rounded before the result is.

#include "exponential_gradients.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include "bf16.h"
#include "convert.h"
#include "gemm_kernels.h"
#include "strips.h"

namespace cwdpo {
namespace {

constexpr float kLarge = 1.0f / 16;  // of the sum of a token's exponentials
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPartColumns = 96;  // vocabulary entries whose logits or weight gradients are computed at a time

// The rows that have a gradient, and the operands that all threads share.
struct Rows {
  Rows(const HeadArguments& arguments, const LogitGrads<float>& grads)
      : head(arguments, grads.rows, Pass::kExponentials),
        anchor(grads.max_logits),
        factor(grads.exp_factor),
        grad_target(grads.grad_target) {
    for (int64_t i = 0; i < head.rows; ++i) {
      const float large = factor[i] == 0.0f ? kInfinity : -grad_target[i] / factor[i] * kLarge;  // sum_exp * kLarge
      large_from.push_back(0);
      round_row(&large, &large_from.back(), 1);
    }
    if (head.cap == 0.0f) return;
    const std::vector<float> target = head.target_logits();
    for (int64_t i = 0; i < head.rows; ++i) grad_target[i] *= head.slope(target[i]);
  }
  void pack_scaled_hidden();

  const TiledHead<float> head;
  const std::vector<float>&anchor, &factor;
  std::vector<float> grad_target;
  std::vector<Bf16> large_from;  // the least u of a competitor whose rounding errors are added back
  std::vector<std::unique_ptr<PackedB<Bf16>>> scaled_hidden;  // factor * H as the operand B, by blocks of rows
};

void Rows::pack_scaled_hidden() {
  const int64_t dim = head.dim;
  const Tensor scaled = empty({head.rows, dim}, ScalarType::BFloat16);
  for_rows_once(head.rows, dim, [&](int64_t i) {
    std::vector<float> products(dim);
    scaled_row(products.data(), head.bf16_row(i), dim, factor[i]);
    round_row(products.data(), data<Bf16>(scaled) + i * dim, dim);
  });
  for_spans({0, head.rows}, head.plan.rows, [&](Span block) {
    scaled_hidden.push_back(std::make_unique<PackedB<Bf16>>(block.size, dim));
    scaled_hidden.back()->pack(data<Bf16>(scaled) + block.start * dim, block.size, /*once=*/true);
  });
}

// The buffers of one thread.
class Worker {
 public:
  // `source`: the place of each row among the kept ones; null if that is the row.
  Worker(
      const Rows& rows, const HeadArguments& arguments, const KeptExponentials& kept, const int64_t* source,
      const HeadGrads& out)
      : rows_(rows),
        head_(rows.head),
        kept_(kept),
        source_(source),
        tiles_(head_),
        weight_(arguments.weight, ScalarType::BFloat16, head_.plan.columns),
        packed_weight_(head_.plan.columns, head_.dim),
        pairs_(head_.plan.columns, head_.plan.rows),
        exponentials_(empty({head_.plan.columns, head_.rows}, ScalarType::BFloat16)) {
    const auto& [grad_hidden, grad_weight, grad_bias] = out;
    if (grad_bias.numel() > 0) grad_bias_.emplace(grad_bias);
    if (grad_weight.numel() > 0) {
      grad_weight_.emplace(grad_weight);
      weight_sums_ = empty<float>({kPartColumns, head_.dim});
    }
  }

  // Writes the gradients of a shard's part of the weight and the bias, and u W + ratio W_y [R, D] to `hidden_sums`, if
  // that is given.
  void run(const Shard& shard, const Tensor* hidden_sums) {
    shard.for_tiles([&](Span columns) {
      const Matrix<Bf16> u = exponentials(columns);
      if (hidden_sums) add_to_hidden(matrix<float>(*hidden_sums), u, columns, columns.start > shard.columns.start);
      for_spans(columns, kPartColumns, [&](Span part) {
        const Matrix<Bf16> u_part = u.row_block(part.start - columns.start, part.size);
        if (grad_bias_) write_bias(u_part, part);
        if (grad_weight_) write_weight(u_part, part);  // may overwrite u_part
      });
    });
  }

 private:
  // u [B, R] of a tile
  Matrix<Bf16> exponentials(Span columns) {
    const bool are_kept = kept_.has(columns);
    if (are_kept && source_ == nullptr) return kept_.tile(columns);
    const Matrix<Bf16> u{data<Bf16>(exponentials_), columns.size, head_.rows, head_.rows};
    if (!are_kept) {
      for_spans(columns, kPartColumns, [&](Span part) {
        compute(u.row_block(part.start - columns.start, part.size), part);
      });
      return u;
    }
    const Matrix<Bf16> kept = kept_.tile(columns);
    for_rows(columns.size, head_.rows, [&](int64_t v) {
      for (int64_t n = 0; n < head_.rows; ++n) u.row(v)[n] = kept.row(v)[source_[n]];
    });
    return u;
  }

  // Writes u [B, R] of entries that forward did not keep, in the same bits.
  void compute(const Matrix<Bf16>& u, Span part) {
    for_blocks([&](Span block) {
      const Matrix<float> tile = tiles_.buffer(block, part);
      tiles_.logits(tile, part, block);
      head_.transform(tile, part);
      for_rows((block.size + kStripTokens - 1) / kStripTokens, part.size * kStripTokens, [&](int64_t i) {
        const int64_t start = i * kStripTokens;
        const int64_t count = std::min(kStripTokens, block.size - start);
        const Strip<float> strip{tile.data + start, part.size, tile.row_stride, count};
        std::array<float, kStripTokens> sums;
        exp_strip(strip, rows_.anchor.data() + block.start + start, head_.cap, sums.data());
      });
      for_rows(part.size, block.size, [&](int64_t v) {
        round_row(tile.row(v), u.row(v) + block.start, block.size);
      });
    });
    for_labels(part, [&](int64_t row, int64_t v) { u.row(v)[row] = 0; });
  }

  void add_to_hidden(const Matrix<float>& sums, const Matrix<Bf16>& u, Span columns, bool accumulate) {
    const Bf16* weight = weight_.rows(columns);
    packed_weight_.pack(weight, columns.size);
    for_blocks([&](Span block) {
      const OperandA<Bf16> a = pairs_.transposed(u.column_block(block.start, block.size));
      multiply(sums.row_block(block.start, block.size), a, packed_weight_, accumulate);
    });
    for_labels(columns, [&](int64_t row, int64_t v) {
      const float factor = rows_.factor[row], ratio = factor == 0.0f ? 0.0f : rows_.grad_target[row] / factor;
      add_scaled_row(sums.row(row), weight + v * head_.dim, head_.dim, ratio);
    });
  }

  void write_weight(const Matrix<Bf16>& u, Span part) const {
    const Matrix<float> sums{data<float>(*weight_sums_), part.size, head_.dim, head_.dim};
    for_blocks([&](Span block) {
      OperandA<Bf16> a = operand_a<Bf16>(u.data + block.start, part.size, block.size);
      a.row_stride = u.row_stride * static_cast<int64_t>(sizeof(Bf16));
      multiply(sums, a, *rows_.scaled_hidden[block.start / head_.plan.rows], block.start > 0);
    });
    for_labels(part, [&](int64_t row, int64_t v) {
      add_scaled_row(sums.row(v), head_.bf16_row(row), head_.dim, rows_.grad_target[row]);
    });
    add_large_errors(sums, u);
    store_rows(sums.data, *grad_weight_, part);
  }

  void add_large_errors(const Matrix<float>& sums, const Matrix<Bf16>& u) const {
    for_rows(u.rows, head_.rows, [&](int64_t v) {
      const Bf16* row = u.row(v);
      if (!any_at_least(row, rows_.large_from.data(), head_.rows)) return;
      for (int64_t n = 0; n < head_.rows; ++n) {
        if (row[n] < rows_.large_from[n]) continue;
        add_rounding_errors(sums.row(v), head_.bf16_row(n), head_.dim, rows_.factor[n], widened(row[n]));
      }
    });
  }

  void write_bias(const Matrix<Bf16>& u, Span part) const {
    std::vector<float> sums(part.size);
    for (int64_t v = 0; v < part.size; ++v) sums[v] = dot_bf16(u.row(v), rows_.factor.data(), head_.rows);
    for_labels(part, [&](int64_t row, int64_t v) { sums[v] += rows_.grad_target[row]; });
    store_rows(sums.data(), *grad_bias_, part);
  }

  template <class F>
  void for_blocks(const F& f) const {
    for_spans({0, head_.rows}, head_.plan.rows, f);
  }

  // Calls f(row, label - columns.start) for every row whose label is in `columns`.
  template <class F>
  void for_labels(Span columns, const F& f) const {
    for (int64_t row = 0; row < head_.rows; ++row) {
      if (columns.contains(head_.label(row))) f(row, head_.label(row) - columns.start);
    }
  }

  const Rows& rows_;
  const TiledHead<float>& head_;
  const KeptExponentials& kept_;
  const int64_t* source_;
  TileWorker<float> tiles_;
  WeightRows<Bf16> weight_;
  PackedB<Bf16> packed_weight_;
  Bf16Tile pairs_;
  const Tensor exponentials_;
  std::optional<RawMatrix> grad_weight_, grad_bias_;
  std::optional<Tensor> weight_sums_;
};

}  // namespace

void exponential_gradients(
    const HeadArguments& arguments, const LabelledRows& labelled, const LogitGrads<float>& grads, const Tensor& kept,
    const HeadGrads& out) {
  auto [grad_hidden, grad_weight, grad_bias] = out;
  if (!begin_gradients(grads, out)) return;
  Rows rows(arguments, grads);
  if (grad_weight.numel() > 0) rows.pack_scaled_hidden();
  const KeptExponentials exponentials(kept, labelled.size(), rows.head.vocab);
  const int64_t* source = rows.head.rows == labelled.size() ? nullptr : grads.index_among_labelled.data();
  std::vector<std::unique_ptr<Worker>> workers;
  for (int64_t i = 0; i < rows.head.plan.workers; ++i) {
    workers.push_back(std::make_unique<Worker>(rows, arguments, exponentials, source, out));
  }
  std::vector<Tensor> hidden_parts;
  for (int64_t i = 0; grad_hidden.numel() > 0 && i < rows.head.plan.column_shards; ++i) {
    hidden_parts.push_back(empty<float>({rows.head.rows, rows.head.dim}));
  }
  run_shards(rows.head, workers, [&](Worker& worker, const Shard& shard) {
    worker.run(shard, hidden_parts.empty() ? nullptr : &hidden_parts[shard.column_shard]);
  });
  if (!hidden_parts.empty()) store_hidden_gradient<float>(grad_hidden, grads.rows, hidden_parts, &rows.factor);
}

}  // namespace cwdpo
