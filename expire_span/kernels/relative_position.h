// The position scores q . p of a tile of keys (section 4.2), with p the row of the table for the distance of q and key.
//
// One matrix product gives the scores of all queries with all distances in the tile. Column c is for the distance
// `farthest - c`, so that a key whose score with query 0 is in column c has that with query t in column c - t.

#pragma once

#include "attention_args.h"

#include <cmath>
#include <vector>

template <typename real>
struct PositionScores {
  std::vector<int32_t> column;            // (n,): of each key's score with query 0
  int64_t first_key = 0, end_key = 0;     // keys out of this range are beyond the table for all queries
  bool consecutive = true;                // whether each of these keys has the column after the last one's
  std::vector<int32_t> shared;            // (columns,): where distances share rows, each distance's column of `scores`
  int64_t first_row = 0, num_rows = 0;    // the rows of the table that are used
  int64_t first_column = 0;               // of `scores`, for the first of these rows
  Matrix<real> scores;                    // (T, ...); 0 in all columns without a row
  Scratch<real> scratch;

  bool any() const { return first_key < end_key; }

  // Prepares for n keys and `block` queries from query `first_t` on. The keys are invisible at distances of
  // `max_visible` or more.
  void load(
      const AttentionArgs& args, const int64_t* ages, int64_t n, int64_t first_t, int64_t block, double max_visible) {
    first_key = n, end_key = 0;
    if (!args.table) return;
    const double last_visible = std::ceil(max_visible * (1 + 1e-6)) - 1;  // with a margin for rounding
    const int64_t last = last_visible < args.max_distance ? static_cast<int64_t>(last_visible) : args.max_distance;
    int64_t min_age = last + 1, max_age = 1 - block;  // clamped to the ages that have a position score, and one more
    column.resize(n);
    for (int64_t s = 0; s < n; ++s) {
      const int64_t age = std::clamp(ages[s] + first_t, 1 - block, std::max(last + 1, 1 - block));
      min_age = std::min(min_age, age), max_age = std::max(max_age, age);
      column[s] = static_cast<int32_t>(-age);
      if (ages[s] + first_t <= last) first_key = std::min(first_key, s), end_key = s + 1;
    }
    const int64_t columns = max_age - min_age + block, farthest = max_age + block - 1;  // distance of column 0
    const int64_t begin = std::max<int64_t>(0, farthest - last), end = std::min(columns, farthest);  // have a row
    if (begin >= end) first_key = end_key;
    if (!any()) return;

    for (auto& c : column) c += static_cast<int32_t>(farthest);
    consecutive = true;
    for (int64_t s = first_key + 1; s < end_key; ++s) consecutive &= column[s] == column[s - 1] + 1;
    first_row = args.table_row(farthest - begin), num_rows = args.table_row(farthest - end + 1) - first_row + 1;
    first_column = begin;
    shared.clear();
    if (num_rows < end - begin) {  // distances share rows: score each row once, after a column of 0
      shared.resize(columns, 0);
      for (int64_t c = begin; c < end; ++c)
        shared[c] = static_cast<int32_t>(1 + args.table_row(farthest - c) - first_row);
      first_column = 1;
    }
    scores = scratch.matrix(block, shared.empty() ? columns : 1 + num_rows);
  }

  // score += q . p, with the transposed table (D, width).
  void add_to(Matrix<real> score, Matrix<real> query, real* transposed_table, int64_t width) {
    const int64_t cols = pad_cols(num_rows);
    const Matrix<real> position_t{transposed_table + first_row, query.cols, cols, width};
    scores.fill(0);
    gemm(query, position_t, scores.col_range(first_column, cols));
    const auto columns = column.data();
    for (int64_t t = 0; t < score.rows; ++t) {
      real* __restrict x = score.row(t);
      const real* from = scores.row(t);
      const int64_t shift = columns[first_key] - first_key - t;
      if (!shared.empty()) {
        const auto shared_t = shared.data() - t;
#pragma omp simd
        for (int64_t s = first_key; s < end_key; ++s) x[s] += from[shared_t[columns[s]]];
      } else if (consecutive) {
#pragma omp simd
        for (int64_t s = first_key; s < end_key; ++s) x[s] += from[s + shift];
      } else {
#pragma omp simd
        for (int64_t s = first_key; s < end_key; ++s) x[s] += from[columns[s] - t];
      }
    }
  }

  // Backward of `add_to`: adds to the gradients of query and of the table (rows, D).
  void add_gradients(Matrix<real> dscore, Matrix<real> query, real* table, Matrix<real> dquery, real* dtable) {
    scores.fill(0);
    const auto columns = column.data();
    for (int64_t t = 0; t < dscore.rows; ++t) {
      const real* __restrict dx = dscore.row(t);
      real* __restrict to = scores.row(t);
      const int64_t shift = columns[first_key] - first_key - t;
      if (!shared.empty()) {
        const auto shared_t = shared.data() - t;
        for (int64_t s = first_key; s < end_key; ++s) to[shared_t[columns[s]]] += dx[s];
      } else if (consecutive) {
#pragma omp simd
        for (int64_t s = first_key; s < end_key; ++s) to[s + shift] += dx[s];
      } else {
        for (int64_t s = first_key; s < end_key; ++s) to[columns[s] - t] += dx[s];
      }
    }
    const int64_t head_dim = query.cols;
    const auto by_row = scores.col_range(first_column, num_rows);
    gemm(by_row, Matrix<real>{table + first_row * head_dim, num_rows, head_dim, head_dim}, dquery, true);
    gemm(by_row.t(), query, Matrix<real>{dtable + first_row * head_dim, num_rows, head_dim, head_dim}, true);
  }
};
