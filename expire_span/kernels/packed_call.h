// A call of packed attention on a CPU, and the part of it that one head of one sample has.

#pragma once

#include "matrix.h"

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t SCORES = 1 << 15, LEAST = 64;  // scores worked on at once, and keys
constexpr int64_t WORTH = 1 << 19;               // multiplications that are worth a thread

// What attention is asked, all floating numbers of one kind.
struct Call {
  Tensor query;    // (B, H, T, D), divided by sqrt(D)
  Tensor key;      // (N, H, D)
  Tensor value;    // (N, H, D)
  Tensor offsets;  // (parts, B + 1) int64
  Tensor age;      // (N,) int64
  Tensor span;     // (N, H)
  double ramp;
  Maybe table;     // the position terms (rows, D), the farthest first
  Maybe rows;      // (P,) int64: which row, counted from the nearest, tells distance j + 1 (none: row j)
  Maybe reach;     // (B, T) int64
  Maybe bias;      // (N, H)
  Maybe born;      // (N,) int64
  double dropout;
  int64_t seed;
  int64_t farthest = 0;  // the distance up to which the table tells

  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& offsets_, const Tensor& age_,
       const Tensor& span_, double ramp, const Maybe& position, const Maybe& rows_, const Maybe& reach_,
       const Maybe& bias_, const Maybe& born_, double dropout, int64_t seed)
      : offsets(offsets_.contiguous()), age(age_.contiguous()), ramp(ramp), dropout(dropout), seed(seed) {
    const auto kind = at::promote_types(query_.scalar_type(), at::promote_types(span_.scalar_type(), at::kFloat));
    const auto by_key = [&](const Tensor& rows) { return rows.to(kind).expand({key_.size(0), query_.size(1)}); };
    query = query_.to(kind) / std::sqrt(query_.size(3));
    key = key_.to(kind), value = value_.to(kind), span = by_key(span_);
    if (reach_) reach = reach_->contiguous();
    if (bias_) bias = by_key(*bias_);
    if (born_) born = born_->contiguous();
    check();
    if (position && position->size(0) > 0 && key.size(0) > 0) {
      if (rows_) rows = rows_->contiguous();
      check_table(*position);
      const int64_t needed = std::max<int64_t>(1, age.max().item<int64_t>() + block());  // no key is farther
      farthest = std::min(needed, rows ? rows->size(0) : position->size(0));
      const int64_t nearest = rows ? rows->data_ptr<int64_t>()[farthest - 1] + 1 : farthest;  // rows of the table
      table = position->narrow(0, 0, nearest).to(kind).flip(0).contiguous();
    }
  }

  int64_t heads() const { return query.size(1); }
  int64_t block() const { return query.size(2); }
  int64_t size() const { return query.size(3); }
  int64_t tasks() const { return query.size(0) * query.size(1); }
  int64_t parts() const { return offsets.size(0); }
  std::pair<int64_t, int64_t> ends(int64_t part, int64_t sample) const {
    const auto own = offsets.data_ptr<int64_t>() + part * offsets.size(1) + sample;
    return {own[0], own[1]};
  }
  int64_t row_of(int64_t distance) const {
    return table->size(0) - 1 - (rows ? rows->data_ptr<int64_t>()[distance - 1] : distance - 1);
  }
  // (D, rows + LINE): the table turned, and zeros.
  Maybe turned_table() const {
    if (!table) return std::nullopt;
    return at::cat({table->t(), at::zeros({size(), LINE}, table->options())}, 1);
  }
  // How many tasks are worth a thread of their own.
  int64_t grain() const { return 1 + WORTH / (1 + key.size(0) * block() * size() / query.size(0)); }
  // Not fewer than queries: their position terms are those of as many distances as there are keys and queries.
  int64_t keys_at_once() const {
    return std::max({LEAST, SCORES / std::max<int64_t>(1, block()) / LEAST * LEAST, block() / LEAST * LEAST});
  }

  // What would be read beyond its end is refused.
  void check() const {
    const int64_t total = key.size(0), samples = query.size(0);
    TORCH_CHECK(offsets.dim() == 2 && offsets.size(1) == samples + 1, "offsets must be (parts, ", samples + 1,
                "), got ", offsets.sizes());
    int64_t end = 0;
    bool whole = true;  // each part's begin where the last one's end
    for (int64_t part = 0; part < parts(); ++part) {
      whole &= ends(part, 0).first == end;
      for (int64_t b = 0; b < samples; ++b) {
        TORCH_CHECK(ends(part, b).first <= ends(part, b).second, "offsets must not fall: ", offsets);
        end = ends(part, b).second;
      }
    }
    TORCH_CHECK(whole && end == total, "offsets must lead from 0 to the ", total, " keys, part by part: ", offsets);
    TORCH_CHECK(key.sizes() == value.sizes() && key.size(1) == heads() && key.size(2) == size(),
                "key and value must be (N, ", heads(), ", ", size(), "), got ", key.sizes(), " and ", value.sizes());
    TORCH_CHECK(age.numel() == total && (!born || born->numel() == total), "age and born must be (", total, ",)");
    TORCH_CHECK(!reach || (reach->size(0) == query.size(0) && reach->size(1) == block()), "reach must be (",
                query.size(0), ", ", block(), "), got ", reach->sizes());
  }

  void check_table(const Tensor& position) const {
    TORCH_CHECK(position.size(1) == size(), "position must be (n, ", size(), "), got ", position.sizes());
    if (!rows) return;
    const auto row = rows->data_ptr<int64_t>();
    bool rising = rows->numel() > 0 && row[0] >= 0 && row[rows->numel() - 1] < position.size(0);
    for (int64_t j = 1; j < rows->numel(); ++j) rising &= row[j] == row[j - 1] || row[j] == row[j - 1] + 1;
    TORCH_CHECK(rising, "rows must be of position's ", position.size(0), ", each the last one's or the next, got ",
                *rows);
  }
};

// One head of one sample.
template <typename real>
struct Head {
  const Call& call;
  const int64_t sample, head;
  at::Philox4_32 chance;

  Head(const Call& call, int64_t number)
      : call(call), sample(number / call.heads()), head(number % call.heads()), chance(call.seed, number) {}

  // Does some of its keys after another: work(first row, number of rows).
  template <typename Work>
  void for_keys(const Work& work) const {
    for (int64_t part = 0; part < call.parts(); ++part) {
      auto [first, last] = call.ends(part, sample);
      for (int64_t n; first < last; first += n) {
        n = alike(first, std::min(last - first, call.keys_at_once()));
        work(first, n);
      }
    }
  }

  // How many of these n keys to take at once: a run, LEAST or more whose ages fall by one, or all until the next.
  int64_t alike(int64_t first, int64_t n) const {
    const auto ages = call.age.data_ptr<int64_t>() + first;
    for (int64_t run = 0, s = 1; s <= n; ++s) {
      if (s < n && ages[s] == ages[s - 1] - 1) continue;
      if (s - run >= LEAST) return run > 0 ? run : s;
      run = s;
    }
    return n;
  }

  // Its own of what has the shape (B, H, T, D), (B, H, T), (N, H, D) or (H, N); of the last two, some rows.
  Matrix<real> of_queries(const Tensor& all) const {
    real* data = all.data_ptr<real>() + sample * all.stride(0) + head * all.stride(1);
    return {data, call.block(), call.size(), all.stride(2), all.stride(3)};
  }
  Matrix<real> of_keys(const Tensor& all, int64_t first, int64_t n) const {
    real* data = all.data_ptr<real>() + first * all.stride(0) + head * all.stride(1);
    return {data, n, call.size(), all.stride(0), all.stride(2)};
  }
  real* by_query(const Tensor& all) const {
    return all.data_ptr<real>() + (sample * call.heads() + head) * call.block();
  }
  real* by_key(const Tensor& all, int64_t first) const {
    return all.data_ptr<real>() + head * all.size(1) + first;
  }

  // The farthest age at which query t sees a key.
  real limit(int64_t t) const {
    if (!call.reach) return std::numeric_limits<real>::infinity();
    return static_cast<real>(call.reach->accessor<int64_t, 2>()[sample][t] - t);
  }

  // Draws the factors of dropout for the next weights, 0 or 1 / (1 - p): the same forward and backward.
  void drop(std::vector<real>& kept) {
    const auto bar = static_cast<uint32_t>(call.dropout * 4294967295.0);
    const real scale = static_cast<real>(1 / (1 - call.dropout));
    for (auto& each : kept) each = chance() >= bar ? scale : real(0);
  }
};
