// Packed attention on a CPU (../attention.py defines it), for one head of one sample at a time.
//
//     score = q . k + q . p + bias         m = clamp(1 + (span - distance) / R, 0, 1)
//     a' = m exp(score - lse)              out = a' v            lse = log sum m exp(score)
//     dP = dout v^T    dm = exp(score - lse) (dP - dout . out)     dscore = m dm     d span = sum_t dm / R, on the ramp
//
// Some keys at a time, so that their scores stay near the processor: forward, what a query has gathered so far shrinks
// as a higher score appears. m multiplies after the exponential, so nothing is divided by it.

#include "packed_call.h"
#include "packed_terms.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <bit>
#include <tuple>

namespace {

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

// Some of a head's keys: what they have, their scores with all queries, and what is made of these.
template <typename real>
struct Keys {
  int64_t n = 0;
  real ramp = 1;
  std::vector<real> age, remaining, from, bias;  // (n,): remaining is span - age; seen from query `from` on
  std::vector<real> kept;                        // (n,): the factors of dropout of one query's weights
  Matrix<real> score, dscore;                    // (T, n)
  Scratch<real> scores, dscores, turned;
  Terms<real> terms;

  // Takes up the `many` keys from row `first` on.
  void take(const Head<real>& head, int64_t first, int64_t many) {
    const Call& call = head.call;
    const auto ages = call.age.data_ptr<int64_t>() + first;
    const auto born = call.born ? call.born->data_ptr<int64_t>() + first : nullptr;
    const auto span = call.span.accessor<real, 2>();
    n = many, ramp = static_cast<real>(call.ramp);
    age.resize(n), remaining.resize(n), from.resize(n), bias.assign(n, 0), kept.assign(n, 1);
    real longest = 0;
    for (int64_t s = 0; s < n; ++s) {
      const real own = span[first + s][head.head];
      age[s] = static_cast<real>(ages[s]);
      remaining[s] = own - age[s];
      from[s] = static_cast<real>(born ? born[s] : 1) - age[s];
      if (call.bias) bias[s] = call.bias->accessor<real, 2>()[first + s][head.head];
      longest = std::max(longest, own);
    }
    score = scores.of(call.block(), n), dscore = dscores.of(call.block(), n);
    terms.take(call, ages, n, longest + ramp);
  }

  // out = a b^T
  void multiply_turned(Matrix<real> a, Matrix<real> b, Matrix<real> out) {
    const auto across = turned.of(b.columns, b.rows);
    turn(b, across);
    multiply(a, whole(across), whole(out));
  }

  // score = q . k + q . p
  void products(Matrix<real> query, Matrix<real> key, const Maybe& turned_table) {
    multiply_turned(query, key, score);
    if (terms.any()) terms.add(query, turned_table->data_ptr<real>(), turned_table->size(1), score);
  }

  // The reverse: adds to the gradients of query and table, given that of the scores.
  void products_gradient(
      Matrix<real> query, Matrix<real> key, const Maybe& table, Matrix<real> dquery, Matrix<real> dkey, real* dtable) {
    multiply(dscore, key, dquery, true);
    multiply(dscore.t(), query, dkey);
    if (terms.any()) terms.gradient(query, table->data_ptr<real>(), dscore, dquery, dtable);
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
  at::parallel_for(0, call.tasks(), call.grain(), [&](int64_t first, int64_t last) {
    Keys<real> keys;
    std::vector<real> high(call.block()), total(call.block());
    for (int64_t number = first; number < last; ++number) {
      Head<real> head(call, number);
      const auto query = head.of_queries(call.query), mixed = head.of_queries(out);  // (T, D)
      real* logs = head.by_query(lse);
      high.assign(call.block(), never), total.assign(call.block(), 0);
      head.for_keys([&](int64_t first, int64_t n) {
        keys.take(head, first, n);
        keys.products(query, head.of_keys(call.key, first, n), turned_table);
        for (int64_t t = 0; t < call.block(); ++t) {
          real* x = keys.score.row(t);
          const real now = std::max(high[t], keys.mask(t, head.limit(t), 0, x));
          const real from = now == never ? 0 : now, shrunk = exponential(high[t] - from);
          high[t] = now;
          total[t] = total[t] * shrunk + keys.weigh(t, from, x);
          for (int64_t d = 0; shrunk < 1 && d < mixed.columns; ++d) mixed.row(t)[d] *= shrunk;
          if (call.dropout > 0) {
            head.drop(keys.kept);
            for (int64_t s = 0; s < n; ++s) x[s] *= keys.kept[s];
          }
        }
        multiply(keys.score, head.of_keys(call.value, first, n), mixed, true);
      });
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
  Tensor table;              // (threads, rows, D)
};

template <typename real>
void backward_of(const Call& call, const Tensor& dout, const Tensor& delta, const Tensor& lse, const Gradients& grad) {
  const Maybe turned_table = call.turned_table();
  at::parallel_for(0, call.tasks(), call.grain(), [&](int64_t first, int64_t last) {
    Keys<real> keys;
    real* dtable = call.table ? grad.table[at::get_thread_num()].data_ptr<real>() : nullptr;
    for (int64_t number = first; number < last; ++number) {
      Head<real> head(call, number);
      const auto query = head.of_queries(call.query), above = head.of_queries(dout);  // (T, D)
      const real *logs = head.by_query(lse), *means = head.by_query(delta);
      head.for_keys([&](int64_t first, int64_t n) {
        const auto key = head.of_keys(call.key, first, n), value = head.of_keys(call.value, first, n);  // (n, D)
        real* dspan = head.by_key(grad.span, first);
        keys.take(head, first, n);
        keys.products(query, key, turned_table);
        keys.multiply_turned(above, value, keys.dscore);  // dP
        for (int64_t t = 0; t < call.block(); ++t) {
          real *x = keys.score.row(t), *dx = keys.dscore.row(t);
          if (call.dropout > 0) head.drop(keys.kept);
          keys.mask(t, head.limit(t), logs[t], x);
          keys.differentiate(t, means[t], x, dx, dspan);
          for (int64_t s = 0; call.bias && s < n; ++s) head.by_key(grad.bias, first)[s] += dx[s];
        }
        multiply(keys.score.t(), above, head.of_keys(grad.value, first, n));
        keys.products_gradient(
            query, key, call.table, head.of_queries(grad.query), head.of_keys(grad.key, first, n), dtable);
      });
    }
  });
}

// out (B, H, T, D), as query is, and the log-sum-exp of each query's scores (B, H, T).
std::tuple<Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets, const Tensor& age,
    const Tensor& span, double ramp, const Maybe& position, const Maybe& rows, const Maybe& reach, const Maybe& bias,
    const Maybe& born, double dropout, int64_t seed) {
  const Call call(query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed);
  const auto like = call.query.options();
  Tensor out = at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, like).transpose(1, 2);
  Tensor lse = at::full({query.size(0), query.size(1), query.size(2)}, INFINITY, like);
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(
        lse.scalar_type(), "expire_span", [&] { forward_of<scalar_t>(call, out, lse); });
  return {out.to(query.scalar_type()), lse};
}

// The gradients of query, key, value, span, position and bias.
std::vector<Tensor> backward(
    const Tensor& gradient, const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& offsets, const Tensor& age, const Tensor& span, double ramp,
    const Maybe& position, const Maybe& rows, const Maybe& reach, const Maybe& bias, const Maybe& born, double dropout,
    int64_t seed) {
  const Call call(query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed);
  const auto like = call.query.options();
  const Tensor dout = gradient.to(lse.scalar_type()), delta = (dout * out).sum(-1).contiguous();  // (B, H, T)
  Gradients grad{at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, like).transpose(1, 2),
                 at::empty(key.sizes(), like), at::empty(value.sizes(), like),
                 at::zeros({query.size(1), key.size(0)}, like)};
  if (bias) grad.bias = at::zeros_like(grad.span);
  if (call.table) grad.table = at::zeros({at::get_num_threads(), call.table->size(0), call.size()}, like);
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(
        lse.scalar_type(), "expire_span", [&] { backward_of<scalar_t>(call, dout, delta, lse, grad); });

  Tensor of_position, of_bias;
  if (position) {
    of_position = at::zeros(position->sizes(), position->options());
    if (call.table) of_position.narrow(0, 0, call.table->size(0)).copy_(grad.table.sum(0).flip(0));
  }
  if (bias) of_bias = grad.bias.t().sum_to_size(bias->sizes()).to(bias->scalar_type()).contiguous();
  return {(grad.query / std::sqrt(query.size(3))).to(query.scalar_type()), grad.key.to(key.scalar_type()),
          grad.value.to(value.scalar_type()), grad.span.t().sum_to_size(span.sizes()).to(span.scalar_type()).contiguous(),
          of_position, of_bias};
}

}  // namespace

TORCH_LIBRARY(expire_span_cpp, library) {
  library.def("forward", &forward);
  library.def("backward", &backward);
}
