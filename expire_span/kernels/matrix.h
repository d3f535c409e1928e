// Matrices in memory that others own, and their products, made for the sizes that attention has: some tens of rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int REGISTER = 64, ROWS = 8;  // bytes; rows of a product that are worked on at once
#elif defined(__AVX__)
constexpr int REGISTER = 32, ROWS = 4;
#else
constexpr int REGISTER = 16, ROWS = 4;
#endif

template <typename real>
struct Matrix {
  real* data;
  int64_t rows, columns, down, across = 1;  // down, across: steps in memory to the next row and column

  Matrix t() const { return {data, columns, rows, across, down}; }
  Matrix some_rows(int64_t first, int64_t n) const { return {data + first * down, n, columns, down, across}; }
  Matrix some_columns(int64_t first, int64_t n) const { return {data + first * across, rows, n, down, across}; }
  real* row(int64_t i) const { return data + i * down; }
};

constexpr int LINE = 32;  // columns: two registers of the widest
constexpr int64_t round_up(int64_t columns) { return (columns + LINE - 1) / LINE * LINE; }

// A matrix of its own, used again and again. Its rows have room for another LINE of columns, so that no matter how many
// columns there are, products need not care for the last few; and lie no power of two apart, which caches dislike.
template <typename real>
struct Scratch {
  std::vector<real> memory;

  Matrix<real> of(int64_t rows, int64_t columns) {
    int64_t apart = round_up(columns) + LINE;
    if (apart % (4 * LINE) == 0) apart += LINE;
    if (static_cast<int64_t>(memory.size()) < rows * apart) memory.resize(rows * apart);
    return {memory.data(), rows, columns, apart};
  }
};

// Of a scratch matrix: with columns that mean nothing, up to a full LINE.
template <typename real>
Matrix<real> whole(Matrix<real> matrix) {
  return {matrix.data, matrix.rows, round_up(matrix.columns), matrix.down};
}

template <typename real, int N>
using Lanes __attribute__((vector_size(N * sizeof(real)))) = real;

template <typename Vector, typename real>
Vector load(const real* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// out = a b or, to `add`, out += a b, for `height` rows and `width` vectors of columns: all sums stay in registers.
template <typename real, int lanes, int height, int width>
void accumulate(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool add) {
  using Vector = Lanes<real, lanes>;
  Vector sums[height][width], right[width];
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) sums[i][j] = add ? load<Vector>(out.row(i) + j * lanes) : Vector{};
  for (int64_t k = 0; k < a.columns; ++k) {
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) right[j] = load<Vector>(b.row(k) + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const real left = a.data[i * a.down + k * a.across];
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) std::memcpy(out.row(i) + j * lanes, &sums[i][j], sizeof(Vector));
}

// The same for all rows, `height` at a time and then fewer.
template <typename real, int lanes, int height, int width>
void accumulate_rows(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool add) {
  int64_t i = 0;
  for (; i + height <= a.rows; i += height)
    accumulate<real, lanes, height, width>(a.some_rows(i, height), b, out.some_rows(i, height), add);
  if constexpr (height > 1)
    if (const int64_t rest = a.rows - i)
      accumulate_rows<real, lanes, height / 2, width>(a.some_rows(i, rest), b, out.some_rows(i, rest), add);
}

// out = a b or, to `add`, out += a b. The rows of out lie in one piece; those of b had better.
template <typename real>
void multiply(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool add = false) {
  constexpr int lanes = REGISTER / sizeof(real);
  int64_t j = 0;
  if (b.across == 1) {
    for (; j + 2 * lanes <= out.columns; j += 2 * lanes)
      accumulate_rows<real, lanes, ROWS, 2>(a, b.some_columns(j, 2 * lanes), out.some_columns(j, 2 * lanes), add);
    for (; j + lanes <= out.columns; j += lanes)
      accumulate_rows<real, lanes, ROWS, 1>(a, b.some_columns(j, lanes), out.some_columns(j, lanes), add);
  }
  for (; j < out.columns; ++j)
    for (int64_t i = 0; i < out.rows; ++i) {
      const real *left = a.row(i), *right = b.data + j * b.across;
      real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < a.columns; ++k) sum += left[k * a.across] * right[k * b.down];
      out.row(i)[j] = add ? out.row(i)[j] + sum : sum;
    }
}

// out = a^T. Rows are asked for ahead: a's come from afar.
template <typename real>
void turn(Matrix<real> a, Matrix<real> out) {
  using Four = Lanes<real, 4>;
  const int64_t rows = a.rows / 4 * 4, columns = a.across == 1 ? a.columns / 4 * 4 : 0;
  for (int64_t i = 0; i < rows; i += 4) {
    for (int k = 0; k < 4; ++k)
      for (int64_t j = 0; j < columns; j += 64 / sizeof(real)) __builtin_prefetch(a.row(i + 16 + k) + j);
    for (int64_t j = 0; j < columns; j += 4) {
      Four x[4], pairs[4];
      for (int k = 0; k < 4; ++k) x[k] = load<Four>(a.row(i + k) + j);
      for (int k = 0; k < 4; k += 2) {
        pairs[k] = __builtin_shufflevector(x[k], x[k + 1], 0, 4, 1, 5);
        pairs[k + 1] = __builtin_shufflevector(x[k], x[k + 1], 2, 6, 3, 7);
      }
      for (int k = 0; k < 2; ++k) {
        x[2 * k] = __builtin_shufflevector(pairs[k], pairs[k + 2], 0, 1, 4, 5);
        x[2 * k + 1] = __builtin_shufflevector(pairs[k], pairs[k + 2], 2, 3, 6, 7);
      }
      for (int k = 0; k < 4; ++k) std::memcpy(out.row(j + k) + i, &x[k], sizeof(Four));
    }
  }
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = i < rows ? columns : 0; j < a.columns; ++j) out.row(j)[i] = a.row(i)[j * a.across];
}
