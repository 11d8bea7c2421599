// Computes the logits of a linear head one cache-sized tile at a time, in float32 or float64.
//
// Legend: N labelled tokens (rows), R rows of a block, D hidden, V vocabulary, B vocabulary entries (columns) of a
// tile. A tile is stored [B, R], vocabulary first, because torch.mm computes W H^T 10 to 15 % faster than H W^T.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "convert.h"
#include "packed_head.h"
#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "tiles.h"

namespace cwdpo {

// The arguments that all ops on a head share.
struct HeadArguments {
  const Tensor& hidden;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  double scale;
  std::optional<double> softcap;
  int64_t workspace_bytes;
};

// Throws if the shapes or dtypes do not match. `op` is the name in the error message.
void check_head(const char* op, const HeadArguments& head, const Tensor& labels);

// The tokens that have a label, and their labels.
struct LabelledRows {
  std::vector<int64_t> tokens, labels;
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};
// All tokens whose label is not `ignore_index`. Throws if a label is outside [0, vocab), unless the head is a part of the
// vocabulary (`partial`): such a label belongs to another part.
LabelledRows labelled_rows(
    const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab, bool partial = false);

// What a pass keeps in memory beside tiles.
enum class Pass {
  kSums,           // nothing: only sums per token
  kHidden,         // sums [N, D] of weight rows: the gradient of hidden, or its direction
  kHiddenWeight,   // the same, and the gradient of a tile's weight rows
  kExponentials,   // the same as kHiddenWeight, where forward kept the tiles (exponential_gradients.h)
};

// Chooses the tiles of a pass and how it is split over threads. The tiles of all workers and the partial sums of all
// shards fit the workspace together. A pass that would need more room is one shard, whose tiles use all threads.
TilePlan plan_tiles(const HeadArguments& head, int64_t n_rows, size_t item_size, Pass pass);

// Whether the products of this head are of bfloat16 operands, on gemm.h.
bool uses_bf16_gemm(const HeadArguments& head);

// The labelled rows of hidden and the head. It does not change after construction, so all threads share it.
template <class T>
class TiledHead {
 public:
  // Keeps a reference to `labelled`.
  TiledHead(const HeadArguments& arguments, const LabelledRows& labelled, Pass pass);

  const Pass pass;
  const TilePlan plan;
  const int64_t rows, vocab, dim;
  const T scale, cap;  // cap = 0: no soft cap
  // d softcap(z) / dz at the capped logit; 1 without a cap, also for a logit of -inf.
  T slope(T logit) const { return cap == T(0) ? T(1) : T(1) - (logit / cap) * (logit / cap); }

  int64_t label(int64_t row) const { return labelled_.labels[row]; }
  // A labelled row of hidden, if uses_bf16_gemm().
  const Bf16* bf16_row(int64_t row) const { return packed_bf16_->row(row); }
  // The part of the vocabulary of a column shard.
  Span shard_columns(int64_t column_shard) const { return plan.shard_columns(column_shard, vocab); }
  // z <- softcap(scale * (z + bias)) for every entry of a tile.
  void transform(const Matrix<T>& tile, Span columns) const {
    if (bias_ == nullptr && scale == T(1) && cap == T(0)) return;
    for_rows(columns.size, tile.columns, [&](int64_t v) {
      transform_row(tile.row(v), tile.columns, bias(columns.start + v), scale, cap);
    });
  }
  // The weight row of a vocabulary entry.
  std::vector<T> weight_row(int64_t v) const {
    std::vector<T> out(dim);
    load_rows(RawMatrix(weight_), {v, 1}, out.data());
    return out;
  }
  // The logit of each token's label, [N]: one dot product per token. 0 for a label outside the vocabulary.
  std::vector<T> target_logits() const;

 private:
  template <class>
  friend class TileWorker;
  T bias(int64_t v) const { return bias_ == nullptr ? T(0) : bias_[v]; }

  const LabelledRows& labelled_;
  Tensor hidden_, weight_;
  std::optional<Tensor> bias_tensor_;
  std::unique_ptr<PackedHidden<float>> packed_floats_;  // for the processors that have products of that type
  std::unique_ptr<PackedHidden<Bf16>> packed_bf16_;
  const T* bias_;
};

// The buffers of one thread in a pass, and the products of its tiles, on PackedHead if the processor supports it, else
// on torch.mm.
template <class T>
class TileWorker {
 public:
  explicit TileWorker(const TiledHead<T>& head);

  Matrix<T> buffer(Span block, Span tile_columns) const {
    return {data<T>(buffer_), tile_columns.size, block.size, padded(block.size)};
  }
  // tile [B, R] = W H^T: the logits before `transform`
  void logits(const Matrix<T>& tile, Span tile_columns, Span block);
  // sums [R, D] (+)= tile^T W
  void add_to_hidden(const Matrix<T>& sums, const Matrix<T>& tile, Span tile_columns, Span block, bool accumulate);
  // sums [B, D] (+)= tile H
  void add_to_weight(const Matrix<T>& sums, const Matrix<T>& tile, Span tile_columns, Span block, bool accumulate);

 private:
  // Avoids rows a power of two apart: reading a column would then map to few cache sets.
  static int64_t padded(int64_t size) { return size + 16; }
  Matrix<T> hidden(Span block) const { return matrix<T>(head_.hidden_).row_block(block.start, block.size); }
  Matrix<T> weight(Span tile_columns);

  const TiledHead<T>& head_;
  Tensor buffer_;
  std::optional<WeightRows<T>> weight_rows_;
  std::optional<PackedHead<float>> floats_;
  std::optional<PackedHead<Bf16>> bf16_;
};

// Calls f(worker, shard) for every shard of a pass, in one parallel region. A worker takes the next shard when it is
// done with one, so what it has computed must not depend on which shards it took.
template <class T, class Worker, class F>
void run_shards(const TiledHead<T>& head, const std::vector<std::unique_ptr<Worker>>& workers, const F& f) {
  const int64_t shards = head.plan.shards();
  std::atomic<int64_t> next = 0;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < shards; i = next++) f(*workers[worker], head.plan.shard(i, head.rows, head.vocab));
    }
  };
  if (shards == 1) return run(0, 1);  // not a region, so that its tiles use all threads
  for_ranges(workers.size(), 1, run);
}

// The same with new workers, made by the calling thread, because their memory comes from torch.
template <class T, class F>
void for_shards(const TiledHead<T>& head, const F& f) {
  std::vector<std::unique_ptr<TileWorker<T>>> workers;
  for (int64_t i = 0; i < head.plan.workers; ++i) workers.push_back(std::make_unique<TileWorker<T>>(head));
  run_shards(head, workers, f);
}

}  // namespace cwdpo
