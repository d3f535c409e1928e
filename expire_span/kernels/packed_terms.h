// The position terms of some keys of a head: q . p, with p the table's row for their distance from each query.

#pragma once

#include "packed_call.h"

#include <cmath>
#include <vector>

template <typename real>
struct Terms {
  std::vector<int32_t> column;            // (n,): of query 0 in a row of distances, the farthest first; next, one less
  int64_t near = 0, far = 0;              // the keys that the table may reach are near to far
  bool neighbours = true;                 // whether the column of each of these follows the last one's
  std::vector<int32_t> place;             // (columns,): which column of `terms` each is; empty: the same
  int64_t row = 0, begin = 0, shown = 0;  // `terms` has the table's rows `row` on, that many, from column `begin` on
  Matrix<real> terms;                     // (T, ...); its other columns are 0
  Scratch<real> scratch;

  bool any() const { return near < far; }

  // Takes up n keys, which no query sees from a distance of `longest` on.
  void take(const Call& call, const int64_t* ages, int64_t n, double longest) {
    near = n, far = 0;
    if (!call.table) return;
    const double seen = std::ceil(longest * (1 + 1e-6)) - 1;  // as their numbers are rounded
    const int64_t block = call.block();
    const int64_t reached = seen < call.farthest ? static_cast<int64_t>(seen) : call.farthest;
    int64_t nearest = reached + 1, farthest = 1 - block;  // of the ages, as far as they matter
    column.resize(n);
    for (int64_t s = 0; s < n; ++s) {
      const int64_t age = std::clamp(ages[s], 1 - block, std::max(reached + 1, 1 - block));
      nearest = std::min(nearest, age), farthest = std::max(farthest, age);
      column[s] = static_cast<int32_t>(-age);
      if (ages[s] <= reached) near = std::min(near, s), far = s + 1;
    }
    const int64_t columns = farthest - nearest + block, first = farthest + block - 1;  // column 0 is for this distance
    begin = std::max<int64_t>(0, first - reached);
    const int64_t end = std::min(columns, first);
    if (begin >= end) near = far;
    if (!any()) return;

    for (auto& each : column) each += static_cast<int32_t>(first);
    neighbours = true;
    for (int64_t s = near + 1; s < far; ++s) neighbours &= column[s] == column[s - 1] + 1;
    row = call.row_of(first - begin), shown = call.row_of(first - end + 1) - row + 1;
    place.clear();
    if (shown < end - begin) {  // distances share rows: each row once, after a column of 0
      place.resize(columns, 0);
      for (int64_t c = begin; c < end; ++c) place[c] = static_cast<int32_t>(1 + call.row_of(first - c) - row);
      begin = 1;
    }
    terms = scratch.of(block, place.empty() ? columns : 1 + shown);
  }

  // score += q . p; turned (D, width) is the table turned.
  void add(Matrix<real> query, real* turned, int64_t width, Matrix<real> score) {
    const int64_t many = round_up(shown);
    clear();
    multiply(query, Matrix<real>{turned + row, query.columns, many, width}, terms.some_columns(begin, many));
    const auto columns = column.data();
    for (int64_t t = 0; t < score.rows; ++t) {
      real* __restrict x = score.row(t);
      const real* from = terms.row(t);
      const int64_t shift = columns[near] - near - t;
      if (!place.empty()) {
        const auto places = place.data() - t;
#pragma omp simd
        for (int64_t s = near; s < far; ++s) x[s] += from[places[columns[s]]];
      } else if (neighbours) {
#pragma omp simd
        for (int64_t s = near; s < far; ++s) x[s] += from[s + shift];
      } else {
#pragma omp simd
        for (int64_t s = near; s < far; ++s) x[s] += from[columns[s] - t];
      }
    }
  }

  // Adds to the gradients of query and table (rows, D), given that of the scores.
  void gradient(Matrix<real> query, real* table, Matrix<real> dscore, Matrix<real> dquery, real* dtable) {
    clear();
    const auto columns = column.data();
    for (int64_t t = 0; t < dscore.rows; ++t) {
      const real* __restrict dx = dscore.row(t);
      real* __restrict to = terms.row(t);
      const int64_t shift = columns[near] - near - t;
      if (!place.empty()) {
        const auto places = place.data() - t;
        for (int64_t s = near; s < far; ++s) to[places[columns[s]]] += dx[s];
      } else if (neighbours) {
#pragma omp simd
        for (int64_t s = near; s < far; ++s) to[s + shift] += dx[s];
      } else {
        for (int64_t s = near; s < far; ++s) to[columns[s] - t] += dx[s];
      }
    }
    const int64_t size = query.columns;
    const auto own = terms.some_columns(begin, shown);
    multiply(own, Matrix<real>{table + row * size, shown, size, size}, dquery, true);
    multiply(own.t(), query, Matrix<real>{dtable + row * size, shown, size, size}, true);
  }

  void clear() const {
    for (int64_t t = 0; t < terms.rows; ++t) std::fill(terms.row(t), terms.row(t) + terms.columns, real(0));
  }
};
