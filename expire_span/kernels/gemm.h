// Views of matrices that others own, and their products, tuned for the sizes that attention has: some tens of rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8;  // of a register; rows of a product that are computed at a time
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4;
#endif

template <typename real>
struct Matrix {
  real* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  real* row(int64_t i) const { return data + i * row_stride; }
  real* col(int64_t j) const { return data + j * col_stride; }
  Matrix row_range(int64_t first, int64_t n) const { return {row(first), n, cols, row_stride, col_stride}; }
  Matrix col_range(int64_t first, int64_t n) const { return {col(first), rows, n, row_stride, col_stride}; }
  Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }
  void fill(real value) const {
    for (int64_t i = 0; i < rows; ++i) std::fill(row(i), row(i) + cols, value);  // of contiguous rows
  }
};

constexpr int PADDING = 32;  // columns: two registers of the widest kind
constexpr int64_t pad_cols(int64_t cols) { return (cols + PADDING - 1) / PADDING * PADDING; }

// A buffer for a matrix, reused from call to call. Its rows have room for PADDING more columns, so that products may
// compute whole registers whatever the number of columns; and the row stride is no power of two, which caches dislike.
template <typename real>
struct Scratch {
  std::vector<real> memory;

  Matrix<real> matrix(int64_t rows, int64_t cols) {
    int64_t stride = pad_cols(cols) + PADDING;
    if (stride % (4 * PADDING) == 0) stride += PADDING;
    if (static_cast<int64_t>(memory.size()) < rows * stride) memory.resize(rows * stride);
    return {memory.data(), rows, cols, stride};
  }
};

// A scratch matrix together with the meaningless columns that pad it.
template <typename real>
Matrix<real> padded(Matrix<real> matrix) {
  return {matrix.data, matrix.rows, pad_cols(matrix.cols), matrix.row_stride};
}

template <typename real, int N>
using Vec __attribute__((vector_size(N * sizeof(real)))) = real;

template <typename Vector, typename real>
Vector load(const real* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// out = a b, or out += a b, for a tile of `height` rows and `width` registers of columns. The sums stay in registers.
template <typename real, int lanes, int height, int width>
void gemm_tile(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool accumulate) {
  using Vector = Vec<real, lanes>;
  Vector acc[height][width], b_row[width];
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) acc[i][j] = accumulate ? load<Vector>(out.row(i) + j * lanes) : Vector{};
  for (int64_t k = 0; k < a.cols; ++k) {
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) b_row[j] = load<Vector>(b.row(k) + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const real a_ik = a.data[i * a.row_stride + k * a.col_stride];
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j) acc[i][j] += a_ik * b_row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) std::memcpy(out.row(i) + j * lanes, &acc[i][j], sizeof(Vector));
}

// The same for all rows: tiles of `height` rows, and then smaller ones.
template <typename real, int lanes, int height, int width>
void gemm_rows(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool accumulate) {
  int64_t i = 0;
  for (; i + height <= a.rows; i += height)
    gemm_tile<real, lanes, height, width>(a.row_range(i, height), b, out.row_range(i, height), accumulate);
  if constexpr (height > 1)
    if (const int64_t rest = a.rows - i)
      gemm_rows<real, lanes, height / 2, width>(a.row_range(i, rest), b, out.row_range(i, rest), accumulate);
}

// out = a b, or out += a b. The rows of out must be contiguous; those of b should be.
template <typename real>
void gemm(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool accumulate = false) {
  constexpr int lanes = VECTOR_BYTES / sizeof(real);
  int64_t j = 0;
  if (b.col_stride == 1) {
    for (; j + 2 * lanes <= out.cols; j += 2 * lanes)
      gemm_rows<real, lanes, TILE_ROWS, 2>(a, b.col_range(j, 2 * lanes), out.col_range(j, 2 * lanes), accumulate);
    for (; j + lanes <= out.cols; j += lanes)
      gemm_rows<real, lanes, TILE_ROWS, 1>(a, b.col_range(j, lanes), out.col_range(j, lanes), accumulate);
  }
  for (; j < out.cols; ++j)
    for (int64_t i = 0; i < out.rows; ++i) {
      const real *a_row = a.row(i), *b_col = b.col(j);
      real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < a.cols; ++k) sum += a_row[k * a.col_stride] * b_col[k * b.row_stride];
      out.row(i)[j] = accumulate ? out.row(i)[j] + sum : sum;
    }
}

// out = a^T, in tiles of 4 x 4. The rows of a are prefetched, as they are far apart in memory.
template <typename real>
void transpose(Matrix<real> a, Matrix<real> out) {
  using Vec4 = Vec<real, 4>;
  const int64_t rows = a.rows / 4 * 4, cols = a.col_stride == 1 ? a.cols / 4 * 4 : 0;
  for (int64_t i = 0; i < rows; i += 4) {
    for (int k = 0; k < 4; ++k)
      for (int64_t j = 0; j < cols; j += 64 / sizeof(real)) __builtin_prefetch(a.row(i + 16 + k) + j);
    for (int64_t j = 0; j < cols; j += 4) {
      Vec4 x[4], pairs[4];
      for (int k = 0; k < 4; ++k) x[k] = load<Vec4>(a.row(i + k) + j);
      for (int k = 0; k < 4; k += 2) {
        pairs[k] = __builtin_shufflevector(x[k], x[k + 1], 0, 4, 1, 5);
        pairs[k + 1] = __builtin_shufflevector(x[k], x[k + 1], 2, 6, 3, 7);
      }
      for (int k = 0; k < 2; ++k) {
        x[2 * k] = __builtin_shufflevector(pairs[k], pairs[k + 2], 0, 1, 4, 5);
        x[2 * k + 1] = __builtin_shufflevector(pairs[k], pairs[k + 2], 2, 3, 6, 7);
      }
      for (int k = 0; k < 4; ++k) std::memcpy(out.row(j + k) + i, &x[k], sizeof(Vec4));
    }
  }
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = i < rows ? cols : 0; j < a.cols; ++j) out.row(j)[i] = a.row(i)[j * a.col_stride];
}
