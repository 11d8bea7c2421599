// logits_logprob and its backward on the CPU: the algebra of linear_logprob, applied to logits that already exist.
// Bytes moved: forward reads the logits once; backward reads them once and writes the gradient once. Half-precision
// logits are converted block by block in a float32 buffer.

#include <string>

#include "../check.h"
#include "../ops.h"
#include "head.h"
#include "logit_grads.h"
#include "online_softmax.h"

namespace cwdpo {
namespace {

constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kChunk = 8192;  // logits that stay in the L1 cache between two passes

// Calls f(start, size) for the one or two ranges of [0, n) that leave out `label`, which may lie outside.
template <class F>
void without_label(int64_t n, int64_t label, const F& f) {
  if (label < 0 || label >= n) return f(int64_t{0}, n);
  if (label > 0) f(int64_t{0}, label);
  if (label + 1 < n) f(label + 1, n - label - 1);
}

void check_logits(const char* op, const Tensor& logits, const Tensor& labels) {
  expect_dims(op, "logits", logits, 2);
  expect_float(op, "logits", logits);
  expect_at_least(op, "V", logits.size(1), 1);
  expect_index(op, "labels", labels);
  expect_vector(op, "labels", labels, logits.size(0));
}

// No two entries of `logits`, which are overwritten, share memory. Sufficient: rows or columns do not overlap.
void check_separate_entries(const char* op, const Tensor& logits) {
  const bool by_rows = logits.size(0) <= 1 || (logits.size(1) > 1 && logits.stride(0) > logits.stride(1));
  const int64_t inner = by_rows ? 1 : 0, outer = 1 - inner;
  const auto step = [&](int64_t dim) { return logits.size(dim) > 1 ? logits.stride(dim) : int64_t{0}; };
  const bool ok = (logits.size(inner) <= 1 || step(inner) >= 1) &&
                  (logits.size(outer) <= 1 || step(outer) > step(inner) * (logits.size(inner) - 1));
  const std::string rows = std::to_string(logits.stride(0)), columns = std::to_string(logits.stride(1));
  const std::string strides = "strides [" + rows + ", " + columns + "]";
  expect(logits.numel() == 0 || ok, op, "logits", "layout", "without entries that share memory", strides);
}

// Calls f(i, z, out) for every i, on all threads. z is row rows[i] of `logits`, converted to T if necessary. `out`
// takes the results of that row, which go to row rows[i] of `results`, if given. z and out may be the same memory.
template <class T, class F>
void for_logit_rows(
    const Tensor& logits, const std::vector<int64_t>& rows, const std::optional<Tensor>& results, const F& f) {
  const int64_t vocab = logits.size(1), count = rows.size();
  const bool in_place = logits.scalar_type() == dtype_of<T>() && logits.stride(1) == 1 &&
                        (!results || results->stride(1) == 1);
  if (in_place) {
    const Matrix<T> source = matrix<T>(logits), target = matrix<T>(results ? *results : logits);
    return for_rows(count, vocab, [&](int64_t i) { f(i, source.row(rows[i]), target.row(rows[i])); });
  }
  const int64_t block_rows = std::max<int64_t>(kBlockBytes / (vocab * static_cast<int64_t>(sizeof(T))), 1);
  const Tensor buffer = empty<T>({std::min(block_rows, count), vocab});
  const Matrix<T> block = matrix<T>(buffer);
  for_spans({0, count}, block_rows, [&](Span span) {
    for (int64_t i = 0; i < span.size; ++i) {
      Tensor row = slice_rows(buffer, i, 1);
      torch::stable::copy_(row, slice_rows(logits, rows[span.start + i], 1));
    }
    for_rows(span.size, vocab, [&](int64_t i) { f(span.start + i, block.row(i), block.row(i)); });
    for (int64_t i = 0; results && i < span.size; ++i) {
      Tensor row = slice_rows(*results, rows[span.start + i], 1);
      torch::stable::copy_(row, slice_rows(buffer, i, 1));
    }
  });
}

template <class T>
LogitsLogprob forward(const Tensor& logits, const LabelledRows& labelled, int64_t tokens) {
  LogitsLogprob out{
      zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>()), zeros({tokens}, dtype_of<T>())};
  auto& [logp, max_logit, sum_exp] = out;
  const int64_t vocab = logits.size(1);
  for_logit_rows<T>(logits, labelled.tokens, std::nullopt, [&](int64_t i, const T* z, T*) {
    OnlineSoftmax<T> softmax;
    without_label(vocab, labelled.labels[i], [&](int64_t start, int64_t n) {
      for_spans({0, n}, kChunk, [&](Span chunk) { softmax.add(z + start + chunk.start, chunk.size); });
    });
    const int64_t token = labelled.tokens[i];
    data<T>(max_logit)[token] = softmax.max_logit;
    data<T>(sum_exp)[token] = softmax.sum_exp;
    data<T>(logp)[token] = logp_of(z[labelled.labels[i]], softmax);
  });
  return out;
}

// Writes the gradient of the logits (logit_grads.h) to `out`; rows without a gradient become 0.
template <class T>
void write_gradient(
    const Tensor& grad_logp, const Tensor& logits, const LabelledRows& labelled, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, const Tensor& out) {
  const LogitGrads<T> grads(labelled, grad_logp, logp, max_logit, sum_exp, /*scale=*/1.0);
  const int64_t vocab = logits.size(1);
  for_logit_rows<T>(logits, grads.rows.tokens, out, [&](int64_t i, const T* z, T* grad) {
    exp_row(z, grad, vocab, grads.max_logits[i], grads.exp_factor[i]);
    grad[grads.rows.labels[i]] = grads.grad_target[i];  // replaces exp(z_y - max_logit), which may overflow
  });
  int64_t next = 0;
  for (int64_t token = 0; token < logits.size(0); ++token) {
    if (next < grads.rows.size() && grads.rows.tokens[next] == token) {
      ++next;
      continue;
    }
    Tensor row = slice_rows(out, token, 1);
    torch::stable::zero_(row);
  }
}

void check_and_write_gradient(
    const char* op, const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, int64_t ignore_index, const Tensor& out) {
  check_logits(op, logits, labels);
  check_per_token(op, labels, grad_logp, logp, max_logit, sum_exp);
  const LabelledRows labelled = labelled_rows(op, labels, ignore_index, logits.size(1));
  with_compute_type(logits.scalar_type(), [&](auto type) {
    write_gradient<decltype(type)>(grad_logp, logits, labelled, logp, max_logit, sum_exp, out);
  });
}

}  // namespace

LogitsLogprob logits_logprob(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool /*reuse_logits*/) {
  check_logits("logits_logprob", logits, labels);
  const LabelledRows labelled = labelled_rows("logits_logprob", labels, ignore_index, logits.size(1));
  return with_compute_type(logits.scalar_type(), [&](auto type) {
    return forward<decltype(type)>(logits, labelled, labels.numel());
  });
}

void logits_logprob_backward_(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, int64_t ignore_index) {
  check_logits("logits_logprob_backward_", logits, labels);
  check_separate_entries("logits_logprob_backward_", logits);
  check_and_write_gradient(
      "logits_logprob_backward_", grad_logp, logits, labels, logp, max_logit, sum_exp, ignore_index, logits);
}

Tensor logits_logprob_backward(
    const Tensor& grad_logp, const Tensor& logits, const Tensor& labels, const Tensor& logp,
    const Tensor& max_logit, const Tensor& sum_exp, int64_t ignore_index) {
  const Tensor out = torch::stable::empty_like(logits);
  check_and_write_gradient(
      "logits_logprob_backward", grad_logp, logits, labels, logp, max_logit, sum_exp, ignore_index, out);
  return out;
}

}  // namespace cwdpo
