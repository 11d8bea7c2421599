// linear_logprob and its backward on the CPU. The algorithm is that of cwdpo_kernels/portable/linear_logprob.py. All
// passes over a tile of logits (transform, maximum, exponential, sum, gradient) run while it is in cache, and kept
// tiles are read and written in place.
//
// Bytes moved: the weight once in forward and once in backward, its gradient once, kept tiles twice. Everything else is
// N x D or stays in cache. Legend: head.h.

#include <utility>

#include "../check.h"
#include "../ops.h"
#include "convert.h"
#include "head.h"
#include "kept.h"
#include "logit_grads.h"
#include "sweep.h"

namespace cwdpo {
namespace {

constexpr int64_t kDirectionRows = 1024;  // whose label's weight rows are gathered at a time

// Turns sum_exp_weight into the direction scale * (slope_y W_y - sum_exp_weight / sum_exp), in place.
template <class T>
void to_direction(const TiledHead<T>& head, const std::vector<T>& target, const SweepResult<T>& result) {
  const Matrix<T> direction = matrix<T>(result.sum_exp_weight);
  for_spans({0, head.rows}, kDirectionRows, [&](Span block) {
    const Tensor label_weight = head.target_weight(block);
    for_rows(block.size, head.dim, [&](int64_t i) {
      const int64_t row = block.start + i;
      // With V = 1, sum_exp is 0. The lower bound avoids 0 / 0; backward multiplies the direction by 1 - p_y = 0.
      const T sum_exp = std::max(result.softmax[row].sum_exp, std::numeric_limits<T>::min());
      scale_row(direction.row(row), head.dim, T(1) / sum_exp);
      subtract_from_row(
          direction.row(row), data<T>(label_weight) + i * head.dim, head.dim, head.slope(target[row]), head.scale);
    });
  });
}

// A value of kept_bytes (cwdpo_kernels/ops/linear_logprob.py): as without a value, but unused bytes are not zeroed.
constexpr int64_t kUninitialized = -1;

// The dtype of a direction: that of the inputs, but float32 for float16, where the direction may overflow although the
// gradient, direction * (1 - p_y), does not.
ScalarType direction_dtype(ScalarType dtype) { return dtype == ScalarType::Half ? ScalarType::Float : dtype; }

template <class T>
LinearLogprob forward(
    const HeadArguments& arguments, const Tensor& labels, const LabelledRows& labelled, bool with_direction,
    std::optional<int64_t> kept_bytes) {
  const int64_t tokens = labels.numel();
  const bool opaque = kept_bytes && *kept_bytes >= 0;
  LinearLogprob out{
      zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()),
      zeros({with_direction ? tokens : 0, arguments.hidden.size(1)}, direction_dtype(arguments.hidden.scalar_type())),
      opaque ? empty({*kept_bytes}, ScalarType::Byte) : torch::stable::empty_like(arguments.weight)};
  auto& [logp, max_logit, sum_exp, direction, kept] = out;

  const KeptLogits<T> kept_logits(kept, labelled.size(), arguments.weight.size(0));
  // kUninitialized: the caller is autograd, which overwrites all of the weight's gradient. Zeroing is wasted work.
  if (kept_bytes != kUninitialized) kept_logits.zero_unused();
  if (labelled.size() == 0) return out;

  const TiledHead<T> head(arguments, labelled, with_direction ? Pass::kHidden : Pass::kSums);
  const std::vector<T> target = head.target_logits();
  const SweepResult<T> result =
      with_direction ? sweep(head, Sweep::kExponentials) : sweep(head, Sweep::kSumExp, &kept_logits);
  for (int64_t i = 0; i < labelled.size(); ++i) {
    const int64_t token = labelled.tokens[i];
    data<T>(max_logit)[token] = result.softmax[i].max_logit;
    data<T>(sum_exp)[token] = result.softmax[i].sum_exp;
    data<T>(logp)[token] = logp_of(target[i], result.softmax[i]);
  }
  if (with_direction) {
    to_direction(head, target, result);
    scatter_rows(direction, labelled.tokens, result.sum_exp_weight);
  }
  return out;
}

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
  for_rows(columns.size, block.size, [&](int64_t v) {
    const T* z = logits.row(v);
    T* out = grad.row(v);
    if (source != nullptr) {
      for (int64_t n = 0; n < block.size; ++n) out[n] = z[column(n)];
      z = out;
    }
    exp_across_tokens(z, out, block.size, max_logit, factor, head.cap);
  });
  for (const auto& [entry, value] : at_labels) *entry = value;  // replaces exp(z_y - max_logit), which may overflow
}

// Writes the gradient of a tile's logits to `tile`, from kept logits or from the product. Kept logits are of all
// `n_labelled` rows. If some of those have no gradient, gathers those that do.
template <class T>
void write_logit_gradients(
    TileWorker<T>& worker, const TiledHead<T>& head, const LogitGrads<T>& grads, const KeptLogits<T>& kept,
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

template <class T>
void backward(
    const HeadArguments& arguments, const LabelledRows& labelled, const LogitGrads<T>& grads, const Tensor& kept,
    const LinearLogprobGrads& out) {
  const auto& [grad_hidden, grad_weight, grad_bias] = out;
  const bool needs_hidden = grad_hidden.numel() > 0, needs_weight = grad_weight.numel() > 0,
             needs_bias = grad_bias.numel() > 0;
  const TiledHead<T> head(arguments, grads.rows, Pass::kHiddenWeight);
  const KeptLogits<T> kept_logits(kept, labelled.size(), head.vocab);
  // Every block of rows reads its part of the kept logits, so their memory must not be overwritten by the first block.
  const bool separate = kept.dim() == 2 && head.plan.rows < head.rows;
  std::vector<Tensor> hidden_parts;
  for (int64_t i = 0; needs_hidden && i < head.plan.column_shards; ++i) {
    hidden_parts.push_back(empty<T>({head.rows, head.dim}));
  }
  for_shards(head, [&](TileWorker<T>& worker) {
    std::optional<TileSums<T>> weight_sums, bias_sums;
    if (needs_weight) weight_sums.emplace(grad_weight, head.plan.columns, separate);
    if (needs_bias) bias_sums.emplace(grad_bias, head.plan.columns, false);
    worker.for_tiles([&](Span columns) {
      worker.for_blocks([&](Span block) {
        const Matrix<T> tile = worker.buffer(block, columns);
        write_logit_gradients(worker, head, grads, kept_logits, labelled.size(), columns, block, tile);
        if (needs_hidden) {
          const Matrix<T> sums = matrix<T>(hidden_parts[worker.column_shard]).row_block(block.start, block.size);
          worker.add_to_hidden(sums, tile, columns, block, columns.start > worker.columns.start);
        }
        if (needs_weight) worker.add_to_weight(weight_sums->rows(columns), tile, columns, block, block.start > 0);
        if (needs_bias) add_bias_gradient(bias_sums->rows(columns), tile, block);
      });
      if (needs_weight) weight_sums->store(columns);
      if (needs_bias) bias_sums->store(columns);
    });
  });
  if (!needs_hidden) return;
  for_rows(head.rows, head.dim, [&](int64_t row) {
    for (size_t i = 1; i < hidden_parts.size(); ++i) {
      add_rows(matrix<T>(hidden_parts[0]).row(row), matrix<T>(hidden_parts[i]).row(row), head.dim, T(1), T(1));
    }
  });
  scatter_rows(grad_hidden, grads.rows.tokens, hidden_parts[0]);
}

// Allocates the gradients of hidden and bias; a gradient that is not needed is an empty tensor.
LinearLogprobGrads allocate_gradients(
    const HeadArguments& arguments, bool needs_hidden, bool needs_bias, const Tensor& grad_weight) {
  const auto like = [](bool needed, const Tensor& x) {
    return needed ? torch::stable::empty_like(x) : empty({0}, x.scalar_type());
  };
  return {
      like(needs_hidden, arguments.hidden), grad_weight,
      like(needs_bias, arguments.bias ? *arguments.bias : arguments.weight)};
}

void write_gradients(
    const char* op, const HeadArguments& arguments, const Tensor& grad_logp, const Tensor& labels, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept, int64_t ignore_index,
    const LinearLogprobGrads& out) {
  check_per_token(op, labels, grad_logp, logp, max_logit, sum_exp);
  // Kept tiles are read as numbers of the compute type, from the end of that memory.
  expect(kept.is_contiguous(), op, "kept", "layout", "contiguous", "strided");
  const auto address = reinterpret_cast<uintptr_t>(kept.data_ptr());
  expect(address % sizeof(double) == 0, op, "kept", "address", "aligned to 8 bytes", address);
  auto [grad_hidden, grad_weight, grad_bias] = out;
  const LabelledRows labelled = labelled_rows(op, labels, ignore_index, arguments.weight.size(0));
  torch::stable::zero_(grad_hidden);
  with_compute_type(arguments.hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const LogitGrads<T> grads(labelled, grad_logp, logp, max_logit, sum_exp, arguments.scale);
    if (grads.rows.size() == 0) {
      torch::stable::zero_(grad_weight);
      torch::stable::zero_(grad_bias);
    } else {  // backward writes every tile of the weight's gradient, so it need not be zeroed first
      backward<T>(arguments, labelled, grads, kept, out);
    }
  });
}

}  // namespace

LinearLogprob linear_logprob(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, double scale,
    std::optional<double> softcap, int64_t ignore_index, bool with_direction, bool /*sparse_grad*/,
    int64_t workspace_bytes, std::optional<int64_t> kept_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("linear_logprob", arguments, labels);
  if (kept_bytes) expect_at_least("linear_logprob", "kept_bytes", *kept_bytes, kUninitialized);
  const LabelledRows labelled = labelled_rows("linear_logprob", labels, ignore_index, weight.size(0));
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(arguments, labels, labelled, with_direction, kept_bytes);
  });
}

LinearLogprobGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  check_head("linear_logprob_backward", arguments, labels);
  const LinearLogprobGrads out = allocate_gradients(
      arguments, needs_hidden, needs_bias,
      needs_weight ? torch::stable::empty_like(weight) : empty({0}, weight.scalar_type()));
  write_gradients(
      "linear_logprob_backward", arguments, grad_logp, labels, logp, max_logit, sum_exp, kept, ignore_index, out);
  return out;
}

HiddenAndBias linear_logprob_backward_(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& max_logit, const Tensor& sum_exp, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_bias,
    bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const char* op = "linear_logprob_backward_";
  check_head(op, arguments, labels);
  expect_dims(op, "kept", kept, 2);
  expect_size(op, "kept", kept, 0, weight.size(0));
  expect_size(op, "kept", kept, 1, weight.size(1));
  expect_dtype(op, "kept", kept, weight.scalar_type());
  expect(kept.is_contiguous(), op, "kept", "layout", "contiguous", "strided");
  const LinearLogprobGrads out = allocate_gradients(arguments, needs_hidden, needs_bias, kept);
  write_gradients(op, arguments, grad_logp, labels, logp, max_logit, sum_exp, kept, ignore_index, out);
  return {std::get<0>(out), std::get<2>(out)};
}

}  // namespace cwdpo
