// Packed attention on a CPU (../attention.py defines it), for one head of one sample at a time.
//
//     score = q . k + q . p + bias         m = clamp(1 + (span - distance) / R, 0, 1)
//     a' = m exp(score - lse)              out = a' v            lse = log sum m exp(score)
//     dP = dout v^T    dm = exp(score - lse) (dP - dout . out)     dscore = m dm     d span = sum_t dm / R, on the ramp
//
// Large matrix products are ATen's. What lies between two of them is done here, a row of scores at a time. m multiplies
// after the exponential, so nothing is divided by it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t TILE = 1 << 21;   // scores worked on at once
constexpr int64_t SMALL = 1 << 13;  // multiplications

// A matrix in memory that others own.
template <typename real>
struct Matrix {
  real* data;
  int64_t rows, columns, down, across = 1;  // down, across: steps in memory to the next row and column

  Matrix t() const { return {data, columns, rows, across, down}; }
  Matrix some_rows(int64_t first, int64_t n) const { return {data + first * down, n, columns, down, across}; }
  Matrix some_columns(int64_t first, int64_t n) const { return {data + first * across, rows, n, down, across}; }
  real* row(int64_t i) const { return data + i * down; }
  Tensor tensor() const {
    return at::from_blob(data, {rows, columns}, {down, across}, c10::CppTypeToScalarType<real>::value);
  }
};

// out = a b, or out += a b. Small products, and those of a single row, are not worth a call.
template <typename real>
void multiply(Matrix<real> a, Matrix<real> b, Matrix<real> out, bool add = false) {
  if (a.rows * a.columns * b.columns > SMALL && a.rows > 1 && a.columns > 1) {
    Tensor target = out.tensor();
    add ? at::addmm_out(target, target, a.tensor(), b.tensor()) : at::mm_out(target, a.tensor(), b.tensor());
    return;
  }
  for (int64_t i = 0; i < out.rows; ++i) {
    real* __restrict row = out.row(i);
    const real* left = a.row(i);
    if (!add) std::fill(row, row + out.columns, real(0));
    if (a.across == 1 && b.down == 1) {
      for (int64_t j = 0; j < out.columns; ++j) {
        const real* right = b.data + j * b.across;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < a.columns; ++k) sum += left[k] * right[k];
        row[j] += sum;
      }
    } else {
      for (int64_t k = 0; k < a.columns; ++k) {
        const real factor = left[k * a.across], *right = b.row(k);
        for (int64_t j = 0; j < out.columns; ++j) row[j] += factor * right[j * b.across];
      }
    }
  }
}

struct Call {
  Tensor query;    // (B, H, T, D), divided by sqrt(D)
  Tensor key;      // (N, H, D)
  Tensor value;    // (N, H, D)
  Tensor offsets;  // (B + 1,) int64
  Tensor age;      // (N,) int64
  Tensor span;     // (N, H)
  double ramp;
  Maybe table;     // (P, D): the position terms, the farthest first
  Maybe reach;     // (B, T) int64
  Maybe bias;      // (N, H)
  Maybe born;      // (N,) int64
  double dropout;
  int64_t seed;

  int64_t heads() const { return query.size(1); }
  int64_t block() const { return query.size(2); }
  int64_t size() const { return query.size(3); }
  int64_t tasks() const { return query.size(0) * query.size(1); }
  int64_t farthest() const { return table ? table->size(0) : 0; }             // P
  int64_t width() const { return table ? table->size(0) + 2 * block() : 0; }  // of `terms`, see Task
  int64_t longest() const {
    const auto ends = offsets.data_ptr<int64_t>();
    int64_t most = 0;
    for (int64_t b = 0; b < query.size(0); ++b) most = std::max(most, ends[b + 1] - ends[b]);
    return most;
  }
  int64_t rows() const {  // queries worked on at once
    const int64_t tiles = (block() * std::max(longest(), width()) + TILE - 1) / TILE;
    return (block() + tiles - 1) / tiles;
  }

  // What would be read beyond its end is refused.
  void check() const {
    const int64_t total = key.size(0);
    const auto ends = offsets.data_ptr<int64_t>();
    TORCH_CHECK(offsets.size(0) == query.size(0) + 1 && ends[0] == 0 && ends[query.size(0)] == total,
                "offsets must lead from 0 to the ", total, " keys, in one number more than the samples");
    for (int64_t b = 0; b < query.size(0); ++b) TORCH_CHECK(ends[b] <= ends[b + 1], "offsets must not fall: ", offsets);
    TORCH_CHECK(key.sizes() == value.sizes() && key.size(1) == heads() && key.size(2) == size(),
                "key and value must be (N, ", heads(), ", ", size(), "), got ", key.sizes(), " and ", value.sizes());
    TORCH_CHECK(age.numel() == total && (!born || born->numel() == total), "age and born must be (", total, ",)");
    TORCH_CHECK(!table || table->size(1) == size(), "position must be (n, ", size(), ")");
    TORCH_CHECK(!reach || (reach->size(0) == query.size(0) && reach->size(1) == block()), "reach must be (",
                query.size(0), ", ", block(), "), got ", reach->sizes());
  }
};

// exp to 2e-7 of its value, in a form that compilers make vectors of; 0 below e^-87.
inline float exponential(float x) {
  const float inside = std::min(std::max(x, -87.0f), 88.0f), power = std::nearbyint(inside * 1.44269504f);
  const float r = inside - power * 0.693359375f + power * 2.12194440e-4f;  // ln 2 in two parts
  float y = 1.9875691500e-4f;
  for (const float each : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + each;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(power) + 127) << 23);  // 2^power
  return x < -87.0f ? 0.0f : (y * r * r + r + 1.0f) * scale;
}
inline double exponential(double x) { return std::exp(x); }

// What the n keys of a task have, and the queries make of it.
template <typename real>
struct Keys {
  int64_t n;
  std::vector<real> age, remaining, from, bias;  // (n,): remaining is span - age; seen from query `from` on
  real ramp;

  // Adds the bias to query t's scores x, takes `less` off, and makes -inf of what it does not see. Returns the highest.
  real mask(real t, real limit, real less, real* __restrict x) const {
    const real never = -std::numeric_limits<real>::infinity();
    const real *from_ = from.data(), *age_ = age.data(), *remaining_ = remaining.data(), *bias_ = bias.data();
    real high = never;
#pragma omp simd reduction(max : high)
    for (int64_t s = 0; s < n; ++s) {
      const bool seen = (from_[s] <= t) & (age_[s] <= limit) & (remaining_[s] - t > -ramp);
      x[s] = seen ? x[s] + bias_[s] - less : never;
      high = x[s] > high ? x[s] : high;
    }
    return high;
  }

  // x = m exp(x - high). Returns its sum.
  real weigh(real t, real high, real* __restrict x) const {
    const real *remaining_ = remaining.data(), slope = 1 / ramp;
    real total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < n; ++s) {
      const real m = std::min(std::max(1 + (remaining_[s] - t) * slope, real(0)), real(1));
      x[s] = m * exponential(x[s] - high);
      total += x[s];
    }
    return total;
  }

  // From scores x and dP: a' (dropped) in x, and dscore in dP; adds to dspan.
  void differentiate(
      real t, real mean, const real* __restrict kept, real* __restrict x, real* __restrict dP,
      real* __restrict dspan) const {
    const real *remaining_ = remaining.data(), slope = 1 / ramp;
#pragma omp simd
    for (int64_t s = 0; s < n; ++s) {
      const real left = 1 + (remaining_[s] - t) * slope, m = std::min(std::max(left, real(0)), real(1));
      const real weight = exponential(x[s]), dm = weight * (dP[s] * kept[s] - mean);
      dspan[s] += (left > 0) & (left <= 1) ? dm * slope : real(0);
      dP[s] = m * dm;
      x[s] = m * weight * kept[s];
    }
  }
};

// One head of one sample.
template <typename real>
struct Task {
  const Call& call;
  const int64_t sample, head, first, n;
  const Matrix<real> query, key, value, table;  // (T, D), (n, D) twice, (P, D)
  Keys<real> keys;
  std::vector<int32_t> column;  // (n,): in query 0's row of `terms`
  int64_t near = 0, far = 0;    // the keys that the table may reach are near to far
  std::vector<real> kept;       // (n,): the factors of dropout, 0 or 1 / (1 - p), of one query's weights
  at::Philox4_32 chance;

  Task(const Call& call, int64_t number)
      : call(call), sample(number / call.heads()), head(number % call.heads()),
        first(call.offsets.data_ptr<int64_t>()[sample]), n(call.offsets.data_ptr<int64_t>()[sample + 1] - first),
        query(of_queries(call.query)), key(of_keys(call.key)), value(of_keys(call.value)),
        table{call.table ? call.table->data_ptr<real>() : nullptr, call.farthest(), call.size(), call.size()},
        column(n), kept(n, 1), chance(call.seed, number) {
    const auto ages = call.age.data_ptr<int64_t>() + first;
    const auto born = call.born ? call.born->data_ptr<int64_t>() + first : nullptr;
    const auto span = call.span.accessor<real, 2>();
    const int64_t reached = call.farthest();
    keys = {n, std::vector<real>(n), std::vector<real>(n), std::vector<real>(n), std::vector<real>(n, 0),
            static_cast<real>(call.ramp)};
    near = n;
    for (int64_t s = 0; s < n; ++s) {
      keys.age[s] = static_cast<real>(ages[s]);
      keys.remaining[s] = span[first + s][head] - keys.age[s];
      keys.from[s] = static_cast<real>(born ? born[s] : 1) - keys.age[s];
      if (call.bias) keys.bias[s] = call.bias->accessor<real, 2>()[first + s][head];
      column[s] = static_cast<int32_t>(reached + call.block() - std::clamp(ages[s], 1 - call.block(), reached + 1));
      if (call.table && ages[s] <= reached) {
        near = std::min(near, s);
        far = s + 1;
      }
    }
    near = std::min(near, far);
  }

  // This task's part of what has the shape (B, H, T, D), or (N, H, D).
  Matrix<real> of_queries(const Tensor& all) const {
    real* data = all.data_ptr<real>() + sample * all.stride(0) + head * all.stride(1);
    return {data, call.block(), call.size(), all.stride(2), all.stride(3)};
  }
  Matrix<real> of_keys(const Tensor& all) const {
    real* data = all.data_ptr<real>() + first * all.stride(0) + head * all.stride(1);
    return {data, n, call.size(), all.stride(0), all.stride(2)};
  }

  // The farthest age at which query t sees a key.
  real limit(int64_t t) const {
    if (!call.reach) return std::numeric_limits<real>::infinity();
    return static_cast<real>(call.reach->accessor<int64_t, 2>()[sample][t] - t);
  }

  // q . k + q . p of the queries from t on, into score (rows, n). terms (rows, P + 2 T) holds q . p by distance, the
  // farthest first, between zeros; one step to the next query shifts a key by one column.
  void products(int64_t t, Matrix<real> score, Matrix<real> terms) const {
    const auto part = query.some_rows(t, score.rows);
    multiply(part, key.t(), score);
    if (near == far) return;
    multiply(part, table.t(), terms.some_columns(call.block(), call.farthest()));
    const auto columns = column.data();
    for (int64_t i = 0; i < score.rows; ++i) {
      real* __restrict x = score.row(i);
      const real* row = terms.row(i) - (t + i);
#pragma omp simd
      for (int64_t s = near; s < far; ++s) x[s] += row[columns[s]];
    }
  }

  // The reverse: the gradient of terms, given that of the scores.
  void terms_gradient(int64_t t, Matrix<real> dscore, Matrix<real> dterms) const {
    for (int64_t i = 0; i < dscore.rows; ++i) {
      const real* __restrict ds = dscore.row(i);
      real* row = dterms.row(i) - (t + i);
      std::fill(dterms.row(i), dterms.row(i) + dterms.columns, real(0));
      for (int64_t s = near; s < far; ++s) row[column[s]] += ds[s];
    }
  }

  // Draws `kept` for the next query: the same numbers forward and backward.
  void drop() {
    const auto bar = static_cast<uint32_t>(call.dropout * 4294967295.0);
    const real scale = static_cast<real>(1 / (1 - call.dropout));
    for (auto& each : kept) each = chance() >= bar ? scale : real(0);
  }
};

template <typename real>
void forward_of(const Call& call, const Tensor& out, const Tensor& lse) {
  const int64_t block = call.block(), most = call.rows(), width = call.width();
  at::parallel_for(0, call.tasks(), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<real> scores(most * call.longest()), around(most * width, 0);
    for (int64_t number = begin; number < end; ++number) {
      Task<real> task(call, number);
      if (task.n == 0) continue;
      real* logs = lse.data_ptr<real>() + number * block;
      for (int64_t start = 0; start < block; start += most) {
        const int64_t rows = std::min(most, block - start);
        const Matrix<real> score{scores.data(), rows, task.n, task.n}, terms{around.data(), rows, width, width};
        const auto part = task.of_queries(out).some_rows(start, rows);  // (rows, D)
        std::vector<real> scale(rows, 1);
        task.products(start, score, terms);
        for (int64_t i = 0; i < rows; ++i) {
          const real t = static_cast<real>(start + i);
          real* x = score.row(i);
          const real high = task.keys.mask(t, task.limit(start + i), 0, x);
          if (std::isinf(high)) {  // nothing is seen; what is not a number stays so
            std::replace(x, x + task.n, -std::numeric_limits<real>::infinity(), real(0));
            continue;
          }
          const real total = task.keys.weigh(t, high, x);
          if (total == 0) continue;
          logs[start + i] = high + std::log(total);
          scale[i] = 1 / total;
          if (call.dropout > 0) {
            task.drop();
            for (int64_t s = 0; s < task.n; ++s) x[s] *= task.kept[s];
          }
        }
        multiply(score, task.value, part);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t d = 0; d < part.columns; ++d) part.row(i)[d] *= scale[i];
      }
    }
  });
}

struct Gradients {
  Tensor query, key, value;  // as the call's
  Tensor span, bias;         // (H, N)
  Tensor table;              // (threads, P, D)
};

template <typename real>
void backward_of(const Call& call, const Tensor& dout, const Tensor& delta, const Tensor& lse, const Gradients& grad) {
  const int64_t block = call.block(), most = call.rows(), width = call.width();
  at::parallel_for(0, call.tasks(), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<real> scores(most * call.longest()), dscores(scores.size()), around(most * width, 0), daround(around);
    for (int64_t number = begin; number < end; ++number) {
      Task<real> task(call, number);
      if (task.n == 0) continue;
      const real *logs = lse.data_ptr<real>() + number * block, *means = delta.data_ptr<real>() + number * block;
      const int64_t own = task.head * call.key.size(0) + task.first;  // in (H, N)
      real* dspan = grad.span.data_ptr<real>() + own;
      real* dbias = grad.bias.defined() ? grad.bias.data_ptr<real>() + own : nullptr;
      for (int64_t start = 0; start < block; start += most) {
        const int64_t rows = std::min(most, block - start);
        const Matrix<real> score{scores.data(), rows, task.n, task.n}, dscore{dscores.data(), rows, task.n, task.n};
        const auto above = task.of_queries(dout).some_rows(start, rows);  // (rows, D)
        task.products(start, score, {around.data(), rows, width, width});
        multiply(above, task.value.t(), dscore);  // dP
        for (int64_t i = 0; i < rows; ++i) {
          const real t = static_cast<real>(start + i), log = logs[start + i];
          if (call.dropout > 0 && !std::isinf(log)) task.drop();
          task.keys.mask(t, task.limit(start + i), log, score.row(i));
          task.keys.differentiate(t, means[start + i], task.kept.data(), score.row(i), dscore.row(i), dspan);
          if (dbias)
            for (int64_t s = 0; s < task.n; ++s) dbias[s] += dscore.row(i)[s];
        }
        const auto query = task.query.some_rows(start, rows);  // (rows, D)
        const auto dquery = task.of_queries(grad.query).some_rows(start, rows);
        multiply(dscore, task.key, dquery);
        multiply(dscore.t(), query, task.of_keys(grad.key), start > 0);
        multiply(score.t(), above, task.of_keys(grad.value), start > 0);
        if (task.near < task.far) {
          const Matrix<real> dterms{daround.data(), rows, width, width};
          task.terms_gradient(start, dscore, dterms);
          const auto middle = dterms.some_columns(block, call.farthest());
          multiply(middle, task.table, dquery, true);
          multiply(middle.t(), query, {grad.table[at::get_thread_num()].data_ptr<real>(), call.farthest(), call.size(),
                                       call.size()}, true);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> forward(
    Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor age, Tensor span, double ramp, Maybe table,
    Maybe reach, Maybe bias, Maybe born, double dropout, int64_t seed) {
  const Call call{query, key, value, offsets, age, span, ramp, table, reach, bias, born, dropout, seed};
  call.check();
  Tensor out = at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, query.options()).transpose(1, 2);
  Tensor lse = at::full({query.size(0), query.size(1), query.size(2)}, INFINITY, query.options());
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "expire_span", [&] { forward_of<scalar_t>(call, out, lse); });
  return {out, lse};
}

std::vector<Tensor> backward(
    Tensor dout, Tensor delta, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor age,
    Tensor span, double ramp, Maybe table, Maybe reach, Maybe bias, Maybe born, double dropout, int64_t seed) {
  const Call call{query, key, value, offsets, age, span, ramp, table, reach, bias, born, dropout, seed};
  const auto like = query.options();
  Gradients grad{at::zeros_like(query), at::empty(key.sizes(), like), at::empty(value.sizes(), like),
                 at::zeros({query.size(1), key.size(0)}, like)};
  if (bias) grad.bias = at::zeros_like(grad.span);
  if (table) grad.table = at::zeros({at::get_num_threads(), table->size(0), table->size(1)}, like);
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(
        query.scalar_type(), "expire_span", [&] { backward_of<scalar_t>(call, dout, delta, lse, grad); });
  return {grad.query, grad.key, grad.value, grad.span.t(), table ? grad.table.sum(0) : at::empty({0}, like),
          bias ? grad.bias.t() : at::empty({0}, like)};
}

}  // namespace

TORCH_LIBRARY(expire_span_cpp, library) {
  library.def("forward", &forward);
  library.def("backward", &backward);
}
