#include "head.h"

#include "../check.h"

namespace cwdpo {
namespace {

constexpr int64_t kMinTile = 128;    // rows or columns of the smallest tile
constexpr int64_t kMaxRows = 1024;
constexpr int64_t kMinShardRows = 64;
constexpr int64_t kMinExtraRows = 512;     // of shards beyond one for each thread, which pack the weight once more
constexpr int64_t kMinExtraColumns = 512;  // of the average one
constexpr int64_t kTileBytes = 1 << 20;       // of one thread's tile, at most
constexpr int64_t kWorkspaceBytes = 8 << 20;  // of all threads
constexpr int64_t kMinShardedWork = 1 << 22;  // multiply-adds

// The default workspace: 8 MiB, or 1 MiB for each thread.
int64_t default_workspace() {
  return std::max<int64_t>(kWorkspaceBytes, int64_t{torch::stable::get_num_threads()} << 20);
}

bool uses_float_gemm(const HeadArguments& head) {
  return head.weight.scalar_type() != ScalarType::Double && has_gemm<float>();
}

}  // namespace

bool uses_bf16_gemm(const HeadArguments& head) {
  return head.weight.scalar_type() == ScalarType::BFloat16 && has_gemm<Bf16>();
}

void check_head(const char* op, const HeadArguments& head, const Tensor& labels) {
  expect_dims(op, "hidden", head.hidden, 2);
  expect_float(op, "hidden", head.hidden);
  expect_at_least(op, "D", head.hidden.size(1), 1);
  expect_dims(op, "weight", head.weight, 2);
  expect_size(op, "weight", head.weight, 1, head.hidden.size(1));
  expect_dtype(op, "weight", head.weight, head.hidden.scalar_type());
  expect_index(op, "labels", labels);
  expect_vector(op, "labels", labels, head.hidden.size(0));
  if (head.bias) {
    expect_vector(op, "bias", *head.bias, head.weight.size(0));
    expect_dtype(op, "bias", *head.bias, head.hidden.scalar_type());
  }
  expect_at_least(op, "workspace_bytes", head.workspace_bytes, 0);
  with_compute_type(head.hidden.scalar_type(), [&](auto type) {
    using Limits = std::numeric_limits<decltype(type)>;
    if (!head.softcap) return;
    const bool ok = *head.softcap >= Limits::min() && *head.softcap <= Limits::max();
    std::ostringstream range;
    range << "between " << Limits::min() << " and " << Limits::max();
    expect(ok, op, "softcap", "value", range.str(), *head.softcap);
  });
}

LabelledRows labelled_rows(
    const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab, bool partial) {
  const Tensor as_int64 = contiguous_as<int64_t>(labels);
  const int64_t* values = data<int64_t>(as_int64);
  LabelledRows labelled;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    if (values[i] == ignore_index) continue;
    expect(partial || (values[i] >= 0 && values[i] < vocab), op, "labels", "values below", vocab, values[i]);
    labelled.tokens.push_back(i);
    labelled.labels.push_back(values[i]);
  }
  return labelled;
}

namespace {

// Splits a pass into `per_thread` shards for each thread: over the vocabulary while `room` bytes hold the partial sums
// [N, D] of all parts but the first, and over the tokens beyond that. The weight's gradient sums over tokens, so its pass
// is not split over them. Returns as many shards as that allows.
TilePlan split(
    const HeadArguments& head, int64_t n_rows, size_t item_size, Pass pass, int64_t threads, int64_t per_thread,
    int64_t room) {
  const int64_t dim = head.weight.size(1), vocab = head.weight.size(0), sums_bytes = n_rows * dim * item_size;
  const bool sums_over_tokens = pass == Pass::kHiddenWeight || pass == Pass::kExponentials;
  const int64_t wanted = threads * per_thread;
  const int64_t most_columns =  // at least `wanted` on average, so that the smallest of them is not empty
      per_thread == 1 ? (vocab + kMinTile - 1) / kMinTile : vocab / std::max(kMinExtraColumns, wanted);
  const int64_t most = pass == Pass::kSums ? wanted : std::min(wanted, 1 + room / sums_bytes);
  const int64_t most_rows = sums_over_tokens ? 1 : n_rows / (per_thread == 1 ? kMinShardRows : kMinExtraRows);
  TilePlan plan{};
  for (int64_t columns = std::min(most, most_columns); columns >= 1; --columns) {
    const int64_t rows = std::clamp<int64_t>(most_rows, 1, wanted / columns);
    if (rows * columns > plan.shards()) plan.row_shards = rows, plan.column_shards = columns;
  }
  plan.workers = std::min(threads, plan.shards());
  return plan;
}

// Splits a pass into several shards for each thread if possible. If less than three quarters of the threads would have
// one, the result is one shard.
TilePlan split(const HeadArguments& head, int64_t n_rows, size_t item_size, Pass pass, int64_t threads, int64_t room) {
  if (threads == 1 || n_rows * head.weight.numel() < kMinShardedWork) return {};
  for (const int64_t per_thread : {4, 2}) {
    const TilePlan plan = split(head, n_rows, item_size, pass, threads, per_thread, room);
    if (plan.shards() == threads * per_thread) return plan;
  }
  const TilePlan plan = split(head, n_rows, item_size, pass, threads, 1, room);
  return 4 * plan.shards() < 3 * threads ? TilePlan{} : plan;
}

}  // namespace

TilePlan plan_tiles(const HeadArguments& head, int64_t n_rows, size_t item_size, Pass pass) {
  const int64_t bytes = head.workspace_bytes == 0 ? default_workspace() : head.workspace_bytes;
  const int64_t threads = torch::stable::get_num_threads(), least = kMinTile * kMinTile * item_size;
  int64_t tile_bytes = std::clamp(bytes / (4 * threads), least, std::max(least, kTileBytes));
  TilePlan plan = split(head, n_rows, item_size, pass, threads, std::max<int64_t>(bytes - threads * tile_bytes, 0));
  if (plan.shards() == 1) tile_bytes = std::clamp(bytes, least, std::max(least, 2 * kTileBytes));

  const int64_t entries = tile_bytes / item_size, shard_rows = (n_rows + plan.row_shards - 1) / plan.row_shards;
  const int64_t most_rows = std::clamp<int64_t>(entries / kMinTile, 1, kMaxRows);
  const int64_t blocks = std::max<int64_t>((shard_rows + most_rows - 1) / most_rows, 1);
  plan.rows = std::max<int64_t>((shard_rows + blocks - 1) / blocks, 1);
  // Each column also needs `extra` entries: its row of the weight converted to float and packed, or, with the bfloat16
  // GEMM, that row packed and the column itself rounded; and the gradient of its weight row, before that is rounded.
  const int64_t dim = head.weight.size(1), converted = head.weight.element_size() == item_size ? 0 : dim;
  const int64_t operands = uses_bf16_gemm(head) ? (plan.rows + dim) / 2 : converted + (uses_float_gemm(head) ? dim : 0);
  const int64_t extra = operands + (pass == Pass::kHiddenWeight ? converted : 0);
  // From kept exponentials a column needs two copies of itself and its row of the weight, all in bfloat16.
  const int64_t column_entries = pass == Pass::kExponentials ? plan.rows + dim / 2 : plan.rows + extra;
  const int64_t columns = std::max<int64_t>(entries / column_entries / kMinTile, 1) * kMinTile;
  plan.columns = std::clamp<int64_t>(plan.shard_columns(0, head.weight.size(0)).size, 1, columns);
  return plan;
}

template <class T>
TiledHead<T>::TiledHead(const HeadArguments& arguments, const LabelledRows& labelled, Pass the_pass)
    : pass(the_pass),
      plan(plan_tiles(arguments, labelled.size(), sizeof(T), the_pass)),
      rows(labelled.size()),
      vocab(arguments.weight.size(0)),
      dim(arguments.weight.size(1)),
      scale(static_cast<T>(arguments.scale)),
      cap(static_cast<T>(arguments.softcap.value_or(0))),
      labelled_(labelled),
      weight_(arguments.weight) {
  const bool all = rows == arguments.hidden.size(0), needs_weight = pass == Pass::kHiddenWeight;
  const ScalarType type = uses_bf16_gemm(arguments) ? ScalarType::BFloat16 : dtype_of<T>();
  const bool in_place = all && arguments.hidden.scalar_type() == type && arguments.hidden.is_contiguous();
  hidden_ = in_place ? arguments.hidden : gather_rows(arguments.hidden, labelled.tokens, type);
  if (arguments.bias) bias_tensor_ = contiguous_as<T>(*arguments.bias);
  bias_ = bias_tensor_ ? data<T>(*bias_tensor_) : nullptr;
  if (uses_bf16_gemm(arguments)) {
    packed_bf16_ = std::make_unique<PackedHidden<Bf16>>(hidden_, labelled.labels, plan.rows, needs_weight);
  } else if (uses_float_gemm(arguments)) {
    packed_floats_ = std::make_unique<PackedHidden<float>>(hidden_, labelled.labels, plan.rows, needs_weight);
  }
}

template <class T>
TileWorker<T>::TileWorker(const TiledHead<T>& head)
    : head_(head), buffer_(empty<T>({head.plan.columns * padded(head.plan.rows)})) {
  const bool needs_gradients = head.pass == Pass::kHidden || head.pass == Pass::kHiddenWeight;
  if (head.packed_bf16_) {
    bf16_.emplace(*head.packed_bf16_, head.weight_, head.plan, needs_gradients);
  } else if (head.packed_floats_) {
    floats_.emplace(*head.packed_floats_, head.weight_, head.plan, needs_gradients);
  } else if (head.weight_.scalar_type() != dtype_of<T>()) {
    weight_rows_.emplace(head.weight_, dtype_of<T>(), head.plan.columns);
  }
}

template <class T>
Matrix<T> TileWorker<T>::weight(Span tile_columns) {
  if (!weight_rows_) return matrix<T>(head_.weight_).row_block(tile_columns.start, tile_columns.size);
  return {const_cast<T*>(weight_rows_->rows(tile_columns)), tile_columns.size, head_.dim, head_.dim};
}

template <class T>
void TileWorker<T>::logits(const Matrix<T>& tile, Span tile_columns, Span block) {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->logits(tile, tile_columns, block);
    if (floats_) return floats_->logits(tile, tile_columns, block);
  }
  multiply(tile, weight(tile_columns), hidden(block).transposed(), /*accumulate=*/false);
}

template <class T>
void TileWorker<T>::add_to_hidden(
    const Matrix<T>& sums, const Matrix<T>& tile, Span tile_columns, Span block, bool accumulate) {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->add_to_hidden(sums, tile, tile_columns, block, accumulate);
    if (floats_) return floats_->add_to_hidden(sums, tile, tile_columns, block, accumulate);
  }
  multiply(sums, tile.transposed(), weight(tile_columns), accumulate);
}

template <class T>
void TileWorker<T>::add_to_weight(
    const Matrix<T>& sums, const Matrix<T>& tile, Span tile_columns, Span block, bool accumulate) {
  if constexpr (std::is_same_v<T, float>) {
    if (bf16_) return bf16_->add_to_weight(sums, tile, tile_columns, block, accumulate);
    if (floats_) return floats_->add_to_weight(sums, tile, tile_columns, block, accumulate);
  }
  multiply(sums, tile, hidden(block), accumulate);
}

template <class T>
std::vector<T> TiledHead<T>::target_logits() const {
  std::vector<T> logits(rows);
  const RawMatrix hidden(hidden_);
  for_rows_once(rows, dim, [&](int64_t row) {
    const int64_t label = labelled_.labels[row];
    if (!Span{0, vocab}.contains(label)) return;
    std::vector<T> hidden_row(dim);
    load_rows(hidden, {row, 1}, hidden_row.data());
    logits[row] = static_cast<T>(dot_row(hidden_row.data(), weight_row(label).data(), dim));
    transform_row(&logits[row], 1, bias(label), scale, cap);
  });
  return logits;
}

template class TiledHead<float>;
template class TiledHead<double>;
template class TileWorker<float>;
template class TileWorker<double>;

}  // namespace cwdpo

// Read by cwdpo_kernels/ops/library.py: the package reports the default workspace instead of repeating the number.
extern "C" __attribute__((visibility("default"))) int64_t cwdpo_workspace_bytes() { return cwdpo::default_workspace(); }

// For tests: how many parallel regions were opened since the library was loaded.
extern "C" __attribute__((visibility("default"))) int64_t cwdpo_parallel_regions() { return cwdpo::parallel_regions; }
