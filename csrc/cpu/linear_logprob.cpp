// linear_logprob and its backward on the CPU: the algorithm of cwdpo_kernels/portable/linear_logprob.py, with the
// passes over a tile of logits (transform, maximum, exponential, sum, gradient) made while it is in cache, and kept
// tiles read and written in place.
//
// Bytes that move from memory: the weight once forward and once backward, its gradient once, kept tiles twice;
// everything else is N x D or stays in cache. Legend: see head.h.

#include <utility>

#include "../check.h"
#include "../ops.h"
#include "head.h"
#include "sweep.h"
#include "upstream.h"

namespace cwdpo {
namespace {

// What one sweep over the vocabulary finds for the N live rows.
template <class T>
struct Forward {
  std::vector<Competitors<T>> others;
  Tensor pushed;  // sum exp(z_v - peak) W_v [N, D], or undefined without a direction
};

template <class T>
Forward<T> sweep(const TiledHead<T>& head, const KeptTiles<T>& kept, bool with_direction) {
  Forward<T> state{std::vector<Competitors<T>>(head.rows), Tensor()};
  if (with_direction) state.pushed = zeros({head.rows, head.dim}, dtype_of<T>());
  const Matrix<T> pushed = with_direction ? matrix<T>(state.pushed) : Matrix<T>{};

  for_spans(head.vocab, head.plan.columns, [&](Span columns) {
    for_spans(head.rows, head.plan.rows, [&](Span block) {
      const bool keep = kept.has(columns);
      const Matrix<T> tile = keep ? kept.tile(columns).beside(block.start, block.size) : head.buffer(block, columns);
      head.logits(tile, columns, block);
      const Sweep kind = with_direction ? Sweep::kExponentials : Sweep::kTotals;
      add_tile(head, tile, columns, block, kind, state.others, [&](int64_t row, T decay) {
        if (with_direction) scale_row(pushed.row(row), head.dim, decay);
      });
      if (with_direction) {
        head.add_to_hidden(pushed.block(block.start, block.size), tile, columns, block, /*accumulate=*/true);
      }
    });
  });
  return state;
}

// pushed <- scale * (slope_y W_y - pushed / total), in place.
template <class T>
void pull_to_label(const TiledHead<T>& head, const std::vector<T>& target, const Forward<T>& state) {
  const Matrix<T> pushed = matrix<T>(state.pushed);
  for_spans(head.rows, head.plan.rows, [&](Span block) {
    const Tensor own_weight = head.target_weight(block);
    for_rows(block.size, head.dim, [&](int64_t i) {
      const int64_t row = block.start + i;
      // No competitor at all (V = 1) leaves total = 0: 1 / tiny keeps 0 / 0 out, 1 - p_y = 0 does the rest.
      scale_row(pushed.row(row), head.dim, T(1) / std::max(state.others[row].total, std::numeric_limits<T>::min()));
      pull_row(pushed.row(row), data<T>(own_weight) + i * head.dim, head.dim, head.slope(target[row]), head.scale);
    });
  });
}

// The bytes of a row of the weight's gradient where `kept` is its memory; 0 where it is not.
int64_t gradient_row(const Tensor& kept) { return kept.dim() == 2 ? kept.size(1) * kept.element_size() : 0; }

template <class T>
LinearLogprob forward(
    const HeadArguments& arguments, const Tensor& labels, const LiveRows& live, bool with_direction,
    std::optional<int64_t> kept_bytes) {
  const int64_t tokens = labels.numel();
  LinearLogprob out{
      zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()),
      zeros({with_direction ? tokens : 0, arguments.hidden.size(1)}, arguments.hidden.scalar_type()),
      kept_bytes ? empty({*kept_bytes}, ScalarType::Byte) : torch::stable::empty_like(arguments.weight)};
  auto& [logp, peak, total, direction, kept] = out;

  const TilePlan plan = plan_tiles(arguments, live.size(), sizeof(T));
  const KeptTiles<T> kept_tiles(kept, plan, live.size(), arguments.weight.size(0), gradient_row(kept));
  // No byte of an output is left uninitialised, but those that backward writes: they are many.
  if (kept_bytes) kept_tiles.zero_the_rest();
  if (live.size() == 0) return out;

  const TiledHead<T> head(arguments, live, plan);
  const std::vector<T> target = head.target_logits();
  const Forward<T> state = sweep(head, kept_tiles, with_direction);
  for (int64_t i = 0; i < live.size(); ++i) {
    const int64_t token = live.positions[i];
    data<T>(peak)[token] = state.others[i].peak;
    data<T>(total)[token] = state.others[i].total;
    data<T>(logp)[token] = logp_of(target[i], state.others[i]);
  }
  if (with_direction) {
    pull_to_label(head, target, state);
    scatter_rows(direction, live.positions, state.pushed);
  }
  return out;
}

// The gradient of a tile's logits [B, R], into `grad`. `logits` may be `grad` itself; from[row], where it is given, is
// the column of `logits` that holds a row.
template <class T>
void write_gradient(
    const TiledHead<T>& head, const Upstream<T>& up, Span columns, Span block, const Matrix<T>& logits,
    const Matrix<T>& grad, const int64_t* from) {
  const auto column = [&](int64_t n) { return from == nullptr ? n : from[block.start + n]; };
  std::vector<std::pair<T*, T>> at_labels;
  for (int64_t n = 0; n < block.size; ++n) {
    const int64_t row = block.start + n, label = up.live.labels[row];
    if (!columns.contains(label)) continue;
    const T target = logits.row(label - columns.start)[column(n)];
    at_labels.emplace_back(grad.row(label - columns.start) + n, up.pull[row] * head.slope(target));
  }
  const T *peak = up.peak.data() + block.start, *push = up.push.data() + block.start;
  for_rows(columns.size, block.size, [&](int64_t v) {
    const T* z = logits.row(v);
    T* out = grad.row(v);
    if (from != nullptr) {
      for (int64_t n = 0; n < block.size; ++n) out[n] = z[column(n)];
      z = out;
    }
    exp_across(z, out, block.size, peak, push, head.inverse_cap());
  });
  for (const auto& [entry, value] : at_labels) *entry = value;  // over exp(c - peak), which may overflow
}

// The accumulator of one tile of a gradient: the output's own memory where that has the compute dtype and rows that lie
// in one piece, else a buffer.
template <class T>
struct Accumulator {
  Accumulator(const Tensor& out, Span rows)
      : slice(slice_rows(out, rows.start, rows.size)),
        in_place(out.scalar_type() == dtype_of<T>() && out.stride(out.dim() - 1) == 1),
        sums(in_place ? slice : empty<T>(std::vector<int64_t>(slice.sizes().begin(), slice.sizes().end()))) {}
  void store() {
    if (!in_place) torch::stable::copy_(slice, sums);
  }
  Tensor slice;
  bool in_place;
  Tensor sums;
};

template <class T>
void backward(
    const HeadArguments& arguments, const LiveRows& labelled, const Upstream<T>& up, const Tensor& kept,
    const LinearLogprobGrads& out) {
  const auto& [grad_hidden, grad_weight, grad_bias] = out;
  const bool needs_hidden = grad_hidden.numel() > 0, needs_weight = grad_weight.numel() > 0,
             needs_bias = grad_bias.numel() > 0;
  // Forward laid its kept tiles out for all labelled rows, in tiles planned for that many: plan the same.
  const TilePlan plan = plan_tiles(arguments, labelled.size(), sizeof(T));
  const TiledHead<T> head(arguments, up.live, plan);
  const KeptTiles<T> kept_tiles(kept, plan, labelled.size(), head.vocab, gradient_row(kept));
  const Tensor grad_hidden_live = needs_hidden ? empty<T>({head.rows, head.dim}) : Tensor();

  for_spans(head.vocab, plan.columns, [&](Span columns) {
    std::optional<Accumulator<T>> weight_sums, bias_sums;
    if (needs_weight) weight_sums.emplace(grad_weight, columns);
    if (needs_bias) {
      bias_sums.emplace(grad_bias, columns);
      torch::stable::zero_(bias_sums->sums);
    }
    for_spans(head.rows, plan.rows, [&](Span block) {
      const Matrix<T> grad = head.buffer(block, columns);
      if (kept_tiles.has(columns)) {
        // Rows without an upstream gradient were kept too: where there are some, rows are gathered.
        const Matrix<T> tile = kept_tiles.tile(columns);
        const bool all = head.rows == labelled.size();
        const Matrix<T> logits = all ? tile.beside(block.start, block.size) : tile;
        write_gradient(head, up, columns, block, logits, grad, all ? nullptr : up.among_labelled.data());
      } else {
        head.logits(grad, columns, block);
        head.transform(grad, columns);
        write_gradient(head, up, columns, block, grad, grad, nullptr);
      }
      if (needs_hidden) {
        const Matrix<T> sums = matrix<T>(grad_hidden_live).block(block.start, block.size);
        head.add_to_hidden(sums, grad, columns, block, columns.start > 0);
      }
      if (needs_weight) {
        head.add_to_weight(matrix<T>(weight_sums->sums), grad, columns, block, block.start > 0);
      }
      if (needs_bias) {
        T* sums = data<T>(bias_sums->sums);
        for_rows(columns.size, block.size, [&](int64_t v) { sums[v] += sum_of_row(grad.row(v), block.size); });
      }
    });
    if (needs_weight) weight_sums->store();
    if (needs_bias) bias_sums->store();
  });
  if (needs_hidden) scatter_rows(grad_hidden, up.live.positions, grad_hidden_live);
}

// Where the gradients go: empty where they are not needed.
LinearLogprobGrads gradients(
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
    const Tensor& peak, const Tensor& total, const Tensor& kept, int64_t ignore_index, const LinearLogprobGrads& out) {
  check_head(op, arguments, labels);
  check_per_token(op, labels, grad_logp, logp, peak, total);
  auto [grad_hidden, grad_weight, grad_bias] = out;
  const LiveRows labelled = labelled_rows(op, labels, ignore_index, arguments.weight.size(0));
  torch::stable::zero_(grad_hidden);
  with_compute_type(arguments.hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Upstream<T> up(labelled, grad_logp, logp, peak, total, arguments.scale);
    if (up.live.size() == 0) {
      torch::stable::zero_(grad_weight);
      torch::stable::zero_(grad_bias);
    } else {  // every tile of the weight's gradient is written: zeros first would be a second pass over memory
      backward<T>(arguments, labelled, up, kept, out);
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
  const LiveRows live = labelled_rows("linear_logprob", labels, ignore_index, weight.size(0));
  return with_compute_type(hidden.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(arguments, labels, live, with_direction, kept_bytes);
  });
}

LinearLogprobGrads linear_logprob_backward(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& peak, const Tensor& total, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const LinearLogprobGrads out = gradients(
      arguments, needs_hidden, needs_bias,
      needs_weight ? torch::stable::empty_like(weight) : empty({0}, weight.scalar_type()));
  write_gradients("linear_logprob_backward", arguments, grad_logp, labels, logp, peak, total, kept, ignore_index, out);
  return out;
}

HiddenAndBias linear_logprob_backward_(
    const Tensor& grad_logp, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Tensor& logp, const Tensor& peak, const Tensor& total, const Tensor& kept,
    double scale, std::optional<double> softcap, int64_t ignore_index, bool needs_hidden, bool needs_bias,
    bool /*sparse_grad*/, int64_t workspace_bytes) {
  const HeadArguments arguments{hidden, weight, bias, scale, softcap, workspace_bytes};
  const char* op = "linear_logprob_backward_";
  expect_dims(op, "kept", kept, 2);
  expect_size(op, "kept", kept, 0, weight.size(0));
  expect_size(op, "kept", kept, 1, weight.size(1));
  expect_dtype(op, "kept", kept, weight.scalar_type());
  expect(kept.is_contiguous(), op, "kept", "layout", "contiguous", "strided");
  const LinearLogprobGrads out = gradients(arguments, needs_hidden, needs_bias, kept);
  write_gradients(op, arguments, grad_logp, labels, logp, peak, total, kept, ignore_index, out);
  return {std::get<0>(out), std::get<2>(out)};
}

}  // namespace cwdpo
