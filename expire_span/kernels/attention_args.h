// The arguments of packed attention on a CPU, and the view that one head of one sample has of them.

#pragma once

#include "gemm.h"

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t TILE_SCORES = 1 << 15, MIN_TILE_KEYS = 64;  // scores and keys that are worked on at a time
constexpr int64_t MAX_TILE_QUERIES = 256;                     // likewise
constexpr int64_t MIN_THREAD_WORK = 1 << 19;                  // multiplications that are worth a thread

// The inputs of the attention, checked, and with all floating-point tensors in one dtype.
struct AttentionArgs {
  Tensor query;                 // (B, H, T, D), divided by sqrt(D)
  Tensor key;                   // (N, H, D)
  Tensor value;                 // (N, H, D)
  Tensor offsets;               // (parts, B + 1) int64
  Tensor age;                   // (N,) int64
  Tensor span;                  // (N, H)
  OptionalTensor table;         // (rows, D): position up to the farthest row needed, in reverse order
  OptionalTensor rows;          // (P,) int64: the row of position for distance j + 1 (none: row j)
  OptionalTensor reach;         // (B, T) int64
  OptionalTensor bias;          // (N, H)
  OptionalTensor min_distance;  // (N,) int64
  double ramp, dropout;
  int64_t seed;
  int64_t max_distance = 0;     // the largest distance that has a row in the table

  AttentionArgs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& offsets_,
                const Tensor& age_, const Tensor& span_, const OptionalTensor& position, const OptionalTensor& rows_,
                const OptionalTensor& reach_, const OptionalTensor& bias_, const OptionalTensor& min_distance_,
                double ramp, double dropout, int64_t seed)
      : offsets(offsets_.contiguous()), age(age_.contiguous()), ramp(ramp), dropout(dropout), seed(seed) {
    const auto dtype = at::promote_types(query_.scalar_type(), at::promote_types(span_.scalar_type(), at::kFloat));
    const auto per_head = [&](const Tensor& tensor) { return tensor.to(dtype).expand({key_.size(0), query_.size(1)}); };
    query = query_.to(dtype) / std::sqrt(query_.size(3));
    key = key_.to(dtype), value = value_.to(dtype), span = per_head(span_);
    if (reach_) reach = reach_->contiguous();
    if (bias_) bias = per_head(*bias_);
    if (min_distance_) min_distance = min_distance_->contiguous();
    check();
    if (position && position->size(0) > 0 && key.size(0) > 0) {
      if (rows_) rows = rows_->contiguous();
      check_position(*position);
      const int64_t farthest = std::max<int64_t>(1, age.max().item<int64_t>() + block());  // of any key
      max_distance = std::min(farthest, rows ? rows->size(0) : position->size(0));
      const int64_t num_rows = rows ? rows->data_ptr<int64_t>()[max_distance - 1] + 1 : max_distance;
      table = position->narrow(0, 0, num_rows).to(dtype).flip(0).contiguous();
    }
  }

  int64_t heads() const { return query.size(1); }
  int64_t block() const { return query.size(2); }
  int64_t head_dim() const { return query.size(3); }
  int64_t batch_heads() const { return query.size(0) * query.size(1); }
  int64_t parts() const { return offsets.size(0); }

  // The first row of a part of a sample, and the row where it ends.
  std::pair<int64_t, int64_t> row_range(int64_t part, int64_t sample) const {
    const auto start = offsets.data_ptr<int64_t>() + part * offsets.size(1) + sample;
    return {start[0], start[1]};
  }

  int64_t table_row(int64_t distance) const {
    return table->size(0) - 1 - (rows ? rows->data_ptr<int64_t>()[distance - 1] : distance - 1);
  }

  // (D, rows + PADDING): the transposed table, then zeros.
  OptionalTensor transposed_table() const {
    if (!table) return std::nullopt;
    return at::cat({table->t(), at::zeros({head_dim(), PADDING}, table->options())}, 1);
  }

  // How many heads of samples are enough work for a thread.
  int64_t grain_size() const {
    return 1 + MIN_THREAD_WORK / (1 + key.size(0) * block() * head_dim() / query.size(0));
  }

  int64_t max_tile_queries() const { return std::min(block(), MAX_TILE_QUERIES); }

  // Not fewer keys than queries: the position scores of a tile cover as many distances as it has keys and queries.
  int64_t max_tile_keys() const {
    const int64_t queries = std::max<int64_t>(1, max_tile_queries());
    const int64_t keys = TILE_SCORES / queries / MIN_TILE_KEYS * MIN_TILE_KEYS;
    return std::max({MIN_TILE_KEYS, keys, queries / MIN_TILE_KEYS * MIN_TILE_KEYS});
  }

  // Refuses whatever would be read out of bounds.
  void check() const {
    const int64_t total = key.size(0), samples = query.size(0);
    TORCH_CHECK(offsets.dim() == 2 && offsets.size(1) == samples + 1, "offsets must be (parts, ", samples + 1,
                "), got ", offsets.sizes());
    int64_t end = 0;
    bool contiguous = true;  // whether each part begins where the last one ends
    for (int64_t part = 0; part < parts(); ++part) {
      contiguous &= row_range(part, 0).first == end;
      for (int64_t b = 0; b < samples; ++b) {
        TORCH_CHECK(row_range(part, b).first <= row_range(part, b).second, "offsets must not decrease: ", offsets);
        end = row_range(part, b).second;
      }
    }
    TORCH_CHECK(contiguous && end == total, "offsets must run from 0 to the number of keys, ", total,
                ", part by part: ", offsets);
    TORCH_CHECK(key.sizes() == value.sizes() && key.size(1) == heads() && key.size(2) == head_dim(),
                "key and value must be (N, ", heads(), ", ", head_dim(), "), got ", key.sizes(), " and ",
                value.sizes());
    TORCH_CHECK(age.numel() == total && (!min_distance || min_distance->numel() == total),
                "age and min_distance must be (", total, ",)");
    TORCH_CHECK(!reach || (reach->size(0) == query.size(0) && reach->size(1) == block()), "reach must be (",
                query.size(0), ", ", block(), "), got ", reach->sizes());
  }

  void check_position(const Tensor& position) const {
    TORCH_CHECK(position.size(1) == head_dim(), "position must be (n, ", head_dim(), "), got ", position.sizes());
    if (!rows) return;
    const auto row = rows->data_ptr<int64_t>();
    bool valid = rows->numel() > 0 && row[0] >= 0 && row[rows->numel() - 1] < position.size(0);
    for (int64_t j = 1; j < rows->numel(); ++j) valid &= row[j] == row[j - 1] || row[j] == row[j - 1] + 1;
    TORCH_CHECK(valid, "rows must index the ", position.size(0), " rows of position, and each be the same as the last ",
                "one or one more, got ", *rows);
  }
};

// One head of one sample.
template <typename real>
struct Head {
  const AttentionArgs& args;
  const int64_t sample, head;
  at::Philox4_32 rng;

  Head(const AttentionArgs& args, int64_t batch_head)
      : args(args), sample(batch_head / args.heads()), head(batch_head % args.heads()), rng(args.seed, batch_head) {}

  // Calls visit(first query, number of queries) for one tile of the block after another.
  template <typename Visit>
  void for_query_tiles(const Visit& visit) const {
    const int64_t block = args.block(), n = args.max_tile_queries();
    for (int64_t first = 0; first < block; first += n) visit(first, std::min(n, block - first));
  }

  // Calls visit(first row, number of rows) for one tile of its keys after another.
  template <typename Visit>
  void for_key_tiles(const Visit& visit) const {
    for (int64_t part = 0; part < args.parts(); ++part) {
      auto [first, end] = args.row_range(part, sample);
      for (int64_t n; first < end; first += n) {
        n = tile_keys(first, std::min(end - first, args.max_tile_keys()));
        visit(first, n);
      }
    }
  }

  // How many of the next n keys make a tile: those of a run of consecutive ages, if MIN_TILE_KEYS or longer, which has
  // the cheaper position scores; or all keys before the next such run.
  int64_t tile_keys(int64_t first, int64_t n) const {
    const auto ages = args.age.data_ptr<int64_t>() + first;
    for (int64_t run = 0, s = 1; s <= n; ++s) {
      if (s < n && ages[s] == ages[s - 1] - 1) continue;
      if (s - run >= MIN_TILE_KEYS) return run > 0 ? run : s;
      run = s;
    }
    return n;
  }

  // This head's part of a tensor (B, H, T, D), (N, H, D), (B, H, T) or (H, N); of N, the rows from `first` on.
  Matrix<real> query_matrix(const Tensor& all) const {
    real* data = all.data_ptr<real>() + sample * all.stride(0) + head * all.stride(1);
    return {data, args.block(), args.head_dim(), all.stride(2), all.stride(3)};
  }
  Matrix<real> key_matrix(const Tensor& all, int64_t first, int64_t n) const {
    real* data = all.data_ptr<real>() + first * all.stride(0) + head * all.stride(1);
    return {data, n, args.head_dim(), all.stride(0), all.stride(2)};
  }
  real* query_vector(const Tensor& all) const {
    return all.data_ptr<real>() + (sample * args.heads() + head) * args.block();
  }
  real* key_vector(const Tensor& all, int64_t first) const {
    return all.data_ptr<real>() + head * all.size(1) + first;
  }

  // The greatest age of a key within the reach of query t, as of query `first_t`.
  real max_age(int64_t t, int64_t first_t) const {
    if (!args.reach) return std::numeric_limits<real>::infinity();
    return static_cast<real>(args.reach->accessor<int64_t, 2>()[sample][t] - (t - first_t));
  }

  // Draws the dropout factors of the next weights, 0 or 1 / (1 - dropout): the same in forward and backward.
  void draw_dropout(std::vector<real>& factors) {
    const auto threshold = static_cast<uint32_t>(args.dropout * 4294967295.0);
    const real scale = static_cast<real>(1 / (1 - args.dropout));
    for (auto& factor : factors) factor = rng() >= threshold ? scale : real(0);
  }
};
