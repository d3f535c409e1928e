// Packed attention on a CPU (../attention.py defines it), for one head of one sample at a time.
//
//     score = q . k + q . p + bias         m = clamp(1 + (span - distance) / R, 0, 1)
//     a' = m exp(score - lse)              out = a' v            lse = log sum m exp(score)
//     dP = dout v^T    dm = exp(score - lse) (dP - dout . out)     dscore = m dm     d span = sum_t dm / R, on the ramp
//
// Some keys at a time, so that their scores stay near the processor: forward, what a query has gathered so far shrinks
// as a higher score appears. m multiplies after the exponential, so nothing is divided by it.

#include "matrix.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t SCORES = 1 << 15, LEAST = 64;  // scores worked on at once, and keys

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
  int64_t farthest() const { return table ? table->size(0) : 0; }  // P
  // (D, P + LINE): the table turned, and zeros.
  Maybe turned_table() const {
    if (!table) return std::nullopt;
    return at::cat({table->t(), at::zeros({size(), LINE}, table->options())}, 1);
  }
  int64_t keys_at_once() const { return std::max(LEAST, SCORES / block() / LEAST * LEAST); }

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

// One head of one sample.
template <typename real>
struct Head {
  const Call& call;
  const int64_t sample, head, first, n;
  at::Philox4_32 chance;

  Head(const Call& call, int64_t number)
      : call(call), sample(number / call.heads()), head(number % call.heads()),
        first(call.offsets.data_ptr<int64_t>()[sample]), n(call.offsets.data_ptr<int64_t>()[sample + 1] - first),
        chance(call.seed, number) {}

  // Its part of what has the shape (B, H, T, D), (N, H, D), (B, H, T) or (H, N).
  Matrix<real> of_queries(const Tensor& all) const {
    real* data = all.data_ptr<real>() + sample * all.stride(0) + head * all.stride(1);
    return {data, call.block(), call.size(), all.stride(2), all.stride(3)};
  }
  Matrix<real> of_keys(const Tensor& all) const {
    real* data = all.data_ptr<real>() + first * all.stride(0) + head * all.stride(1);
    return {data, n, call.size(), all.stride(0), all.stride(2)};
  }
  real* by_query(const Tensor& all) const {
    return all.data_ptr<real>() + (sample * call.heads() + head) * call.block();
  }
  real* by_key(const Tensor& all) const { return all.data_ptr<real>() + head * all.size(1) + first; }

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

// Some of a head's keys: what they have, their scores with all queries, and what is made of these.
template <typename real>
struct Keys {
  int64_t n = 0;
  real ramp = 1;
  std::vector<real> age, remaining, from, bias;  // (n,): remaining is span - age; seen from query `from` on
  std::vector<real> kept;                        // (n,): the factors of dropout of one query's weights
  std::vector<int64_t> column;                   // (n,): of query 0 in `terms`; the next query's is one less
  int64_t near = 0, far = 0;                     // the keys that the table may reach are near to far
  bool neighbours = true;                        // whether the column of each of these follows the last one's
  int64_t row = 0, begin = 0, end = 0;           // columns begin to end of `terms` are the table's rows from `row` on
  Matrix<real> score, dscore;                    // (T, n)
  Matrix<real> terms;                            // (T, columns): q . p by distance, the farthest first, between zeros
  Scratch<real> scores, dscores, all_terms, turned;

  // Takes up the `many` keys from `start` on.
  void take(const Head<real>& head, int64_t start, int64_t many) {
    const Call& call = head.call;
    const int64_t block = call.block(), reached = call.farthest(), first = head.first + start;
    const auto ages = call.age.data_ptr<int64_t>() + first;
    const auto born = call.born ? call.born->data_ptr<int64_t>() + first : nullptr;
    const auto span = call.span.accessor<real, 2>();
    int64_t nearest = reached + 1, farthest = 1 - block;  // of the ages, as far as they matter to the table
    n = many, ramp = static_cast<real>(call.ramp), near = n, far = 0;
    age.resize(n), remaining.resize(n), from.resize(n), column.resize(n), bias.assign(n, 0), kept.assign(n, 1);
    for (int64_t s = 0; s < n; ++s) {
      age[s] = static_cast<real>(ages[s]);
      remaining[s] = span[first + s][head.head] - age[s];
      from[s] = static_cast<real>(born ? born[s] : 1) - age[s];
      if (call.bias) bias[s] = call.bias->accessor<real, 2>()[first + s][head.head];
      column[s] = std::clamp(ages[s], 1 - block, reached + 1);
      nearest = std::min(nearest, column[s]), farthest = std::max(farthest, column[s]);
      if (call.table && ages[s] <= reached) near = std::min(near, s), far = s + 1;
    }
    for (auto& each : column) each = farthest - each + block - 1;
    score = scores.of(block, n), dscore = dscores.of(block, n);
    if (near >= far) return;
    neighbours = true;
    for (int64_t s = near + 1; s < far; ++s) neighbours &= column[s] == column[s - 1] + 1;
    const int64_t columns = farthest - nearest + block, before = reached - farthest - block + 1;
    begin = std::max<int64_t>(0, -before), end = std::min(columns, reached - before), row = before + begin;
    terms = all_terms.of(block, columns);
  }

  // out = a b^T. For a few rows, turning b is not worth it.
  void multiply_turned(Matrix<real> a, Matrix<real> b, Matrix<real> out) {
    if (a.rows < ROWS) return multiply(a, b.t(), out);
    const auto across = turned.of(b.columns, b.rows);
    turn(b, across);
    multiply(a, whole(across), whole(out));
  }

  // score = q . k + q . p
  void products(Matrix<real> query, Matrix<real> key, const Maybe& turned_table) {
    multiply_turned(query, key, score);
    if (near >= far) return;
    for (int64_t t = 0; t < terms.rows; ++t) std::fill(terms.row(t), terms.row(t) + terms.columns, real(0));
    const int64_t all = turned_table->size(1), columns = round_up(end - begin);
    const Matrix<real> table{turned_table->data_ptr<real>() + row, query.columns, columns, all};
    multiply(query, table, terms.some_columns(begin, columns));
    for (int64_t t = 0; t < score.rows; ++t) add_terms(score.row(t), terms.row(t) - t);
  }

  void add_terms(real* __restrict x, const real* from) const {
    const auto columns = column.data();
    if (neighbours) {
      from += columns[near] - near;
#pragma omp simd
      for (int64_t s = near; s < far; ++s) x[s] += from[s];
    } else {
#pragma omp simd
      for (int64_t s = near; s < far; ++s) x[s] += from[columns[s]];
    }
  }

  // The reverse of `products`: adds to the gradients of query and table, given that of the scores.
  void products_gradient(
      Matrix<real> query, Matrix<real> key, const Maybe& table, Matrix<real> dquery, Matrix<real> dkey, real* dtable) {
    multiply(dscore, key, dquery, true);
    multiply(dscore.t(), query, dkey);
    if (near >= far) return;
    for (int64_t t = 0; t < terms.rows; ++t) {
      std::fill(terms.row(t), terms.row(t) + terms.columns, real(0));
      gather_terms(dscore.row(t), terms.row(t) - t);
    }
    const int64_t size = query.columns, rows = end - begin;
    const auto middle = terms.some_columns(begin, rows);
    multiply(middle, Matrix<real>{table->data_ptr<real>() + row * size, rows, size, size}, dquery, true);
    multiply(middle.t(), query, Matrix<real>{dtable + row * size, rows, size, size}, true);
  }

  void gather_terms(const real* __restrict ds, real* __restrict to) const {
    const auto columns = column.data();
    if (neighbours) {
      to += columns[near] - near;
#pragma omp simd
      for (int64_t s = near; s < far; ++s) to[s] += ds[s];
    } else {
      for (int64_t s = near; s < far; ++s) to[columns[s]] += ds[s];
    }
  }

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
  void differentiate(real t, real mean, real* __restrict x, real* __restrict dP, real* __restrict dspan) const {
    const real *remaining_ = remaining.data(), *kept_ = kept.data(), slope = 1 / ramp;
#pragma omp simd
    for (int64_t s = 0; s < n; ++s) {
      const real left = 1 + (remaining_[s] - t) * slope, m = std::min(std::max(left, real(0)), real(1));
      const real weight = exponential(x[s]), dm = weight * (dP[s] * kept_[s] - mean);
      dspan[s] += (left > 0) & (left <= 1) ? dm * slope : real(0);
      dP[s] = m * dm;
      x[s] = m * weight * kept_[s];
    }
  }
};

template <typename real>
void forward_of(const Call& call, const Tensor& out, const Tensor& lse) {
  const real never = -std::numeric_limits<real>::infinity();
  const Maybe turned_table = call.turned_table();
  at::parallel_for(0, call.tasks(), 1, [&](int64_t first, int64_t last) {
    Keys<real> keys;
    std::vector<real> high(call.block()), total(call.block());
    for (int64_t number = first; number < last; ++number) {
      Head<real> head(call, number);
      const auto query = head.of_queries(call.query), mixed = head.of_queries(out);  // (T, D)
      real* logs = head.by_query(lse);
      high.assign(call.block(), never), total.assign(call.block(), 0);
      for (int64_t start = 0; start < head.n; start += keys.n) {
        keys.take(head, start, std::min(head.n - start, call.keys_at_once()));
        keys.products(query, head.of_keys(call.key).some_rows(start, keys.n), turned_table);
        for (int64_t t = 0; t < call.block(); ++t) {
          real* x = keys.score.row(t);
          const real now = std::max(high[t], keys.mask(t, head.limit(t), 0, x));
          const real from = now == never ? 0 : now, shrunk = exponential(high[t] - from);
          high[t] = now;
          total[t] = total[t] * shrunk + keys.weigh(t, from, x);
          if (shrunk < 1 && start > 0)
            for (int64_t d = 0; d < mixed.columns; ++d) mixed.row(t)[d] *= shrunk;
          if (call.dropout > 0) {
            head.drop(keys.kept);
            for (int64_t s = 0; s < keys.n; ++s) x[s] *= keys.kept[s];
          }
        }
        multiply(keys.score, head.of_keys(call.value).some_rows(start, keys.n), mixed, true);
      }
      for (int64_t t = 0; t < call.block(); ++t) {
        if (total[t] == 0) continue;  // sees nothing: 0
        logs[t] = high[t] + std::log(total[t]);
        for (int64_t d = 0; d < mixed.columns; ++d) mixed.row(t)[d] /= total[t];
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
  const Maybe turned_table = call.turned_table();
  at::parallel_for(0, call.tasks(), 1, [&](int64_t first, int64_t last) {
    Keys<real> keys;
    real* dtable = call.table ? grad.table[at::get_thread_num()].data_ptr<real>() : nullptr;
    for (int64_t number = first; number < last; ++number) {
      Head<real> head(call, number);
      const auto query = head.of_queries(call.query), above = head.of_queries(dout);  // (T, D)
      const real *logs = head.by_query(lse), *means = head.by_query(delta);
      real *dspan = head.by_key(grad.span), *dbias = call.bias ? head.by_key(grad.bias) : nullptr;
      for (int64_t start = 0; start < head.n; start += keys.n) {
        keys.take(head, start, std::min(head.n - start, call.keys_at_once()));
        const auto some = [&](const Tensor& all) { return head.of_keys(all).some_rows(start, keys.n); };  // (n, D)
        keys.products(query, some(call.key), turned_table);
        keys.multiply_turned(above, some(call.value), keys.dscore);  // dP
        for (int64_t t = 0; t < call.block(); ++t) {
          real *x = keys.score.row(t), *dx = keys.dscore.row(t);
          if (call.dropout > 0) head.drop(keys.kept);
          keys.mask(t, head.limit(t), logs[t], x);
          keys.differentiate(t, means[t], x, dx, dspan + start);
          for (int64_t s = 0; dbias && s < keys.n; ++s) dbias[start + s] += dx[s];
        }
        multiply(keys.score.t(), above, some(grad.value));
        keys.products_gradient(query, some(call.key), call.table, head.of_queries(grad.query), some(grad.key), dtable);
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
  Gradients grad{at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, like).transpose(1, 2),
                 at::empty(key.sizes(), like), at::empty(value.sizes(), like),
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
