// Packed span attention on a CPU, as ../attention.py defines it, for one head of one sample at a time.
//
//     score = (q . k + q . p) / sqrt(D) + bias         m = clamp(1 + (span - distance) / R, 0, 1)
//     a' = m exp(score - lse)                          out = a' v            lse = log sum m exp(score)
//     dP = dout v^T    dm = exp(score - lse) (dP - dout . out)     dscore = m dm     dspan = sum_t dm / R, on the ramp
//
// Queries and keys come in tiles whose scores fit into the cache. Forward keeps a running maximum of each query's
// scores, and rescales what it has summed so far when a higher score appears. m multiplies after the exponential, so
// that nothing is ever divided by it.

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "g++ 12 or later is needed, for __builtin_shufflevector and std::bit_cast"
#endif

#include "attention_args.h"
#include "decode.h"  // here, since the headers of torch take most of the time to compile
#include "fast_exp.h"
#include "relative_position.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

namespace {

// A tile of a head's keys, and their scores with a tile of queries. Ages and query numbers t count from the first query
// of that tile.
template <typename real>
struct KeyTile {
  int64_t n = 0;
  real ramp = 1;
  std::vector<real> age, remaining, first_query, bias;  // (n,): remaining is span - age; visible from first_query on
  std::vector<real> dropout;                            // (n,): the dropout factors of one query's weights
  Matrix<real> score, dscore;                           // (T, n)
  Scratch<real> score_scratch, dscore_scratch, transpose_scratch;
  PositionScores<real> position_scores;

  // Loads the n_ keys from row `first` on, for num_queries queries from query `first_t` on. Returns whether one of
  // these may see one of the keys.
  bool load(const Head<real>& head, int64_t first, int64_t n_, int64_t first_t, int64_t num_queries) {
    const AttentionArgs& args = head.args;
    const auto ages = args.age.data_ptr<int64_t>() + first;
    const auto min_distance = args.min_distance ? args.min_distance->data_ptr<int64_t>() + first : nullptr;
    const auto spans = args.span.accessor<real, 2>();
    n = n_, ramp = static_cast<real>(args.ramp);
    age.resize(n), remaining.resize(n), first_query.resize(n), bias.assign(n, 0), dropout.assign(n, 1);
    constexpr real inf = std::numeric_limits<real>::infinity();
    real max_span = 0, max_remaining = -inf, min_first_query = inf;
    for (int64_t s = 0; s < n; ++s) {
      const real span = spans[first + s][head.head];
      age[s] = static_cast<real>(ages[s] + first_t);
      remaining[s] = span - age[s];
      first_query[s] = static_cast<real>(min_distance ? min_distance[s] : 1) - age[s];
      if (args.bias) bias[s] = args.bias->accessor<real, 2>()[first + s][head.head];
      max_span = std::max(max_span, span);
      max_remaining = std::max(max_remaining, remaining[s]);
      min_first_query = std::min(min_first_query, first_query[s]);
    }
    if (max_remaining <= -ramp || min_first_query >= num_queries) return false;
    score = score_scratch.matrix(num_queries, n), dscore = dscore_scratch.matrix(num_queries, n);
    position_scores.load(args, ages, n, first_t, num_queries, max_span + ramp);
    return true;
  }

  // out = a b^T
  void gemm_transposed(Matrix<real> a, Matrix<real> b, Matrix<real> out) {
    const auto b_t = transpose_scratch.matrix(b.cols, b.rows);
    transpose(b, b_t);
    gemm(a, padded(b_t), padded(out));
  }

  // score = q . k + q . p
  void compute_scores(Matrix<real> query, Matrix<real> key, const OptionalTensor& table_t) {
    gemm_transposed(query, key, score);
    if (position_scores.any()) position_scores.add_to(score, query, table_t->data_ptr<real>(), table_t->size(1));
  }

  // Backward of `compute_scores`: adds to the gradients of query and of the table; sets that of key, or adds to it.
  void compute_score_gradients(
      Matrix<real> query, Matrix<real> key, const OptionalTensor& table, Matrix<real> dquery, Matrix<real> dkey,
      bool add_to_dkey, real* dtable) {
    gemm(dscore, key, dquery, true);
    gemm(dscore.t(), query, dkey, add_to_dkey);
    if (position_scores.any()) position_scores.add_gradients(dscore, query, table->data_ptr<real>(), dquery, dtable);
  }

  // Turns query t's products x into scores, less `shift`: adds the bias, and masks what is invisible with -inf. Returns
  // the maximum.
  real mask(real t, real max_age, real shift, real* __restrict x) const {
    const real inf = std::numeric_limits<real>::infinity();
    const real *first_query_ = first_query.data(), *age_ = age.data();
    const real *remaining_ = remaining.data(), *bias_ = bias.data();
    real row_max = -inf;
#pragma omp simd reduction(max : row_max)
    for (int64_t s = 0; s < n; ++s) {
      const bool visible = (first_query_[s] <= t) & (age_[s] <= max_age) & (remaining_[s] - t > -ramp);
      x[s] = visible ? x[s] + bias_[s] - shift : -inf;
      row_max = x[s] > row_max ? x[s] : row_max;
    }
    return row_max;
  }

  // x = m exp(x - row_max). Returns the sum.
  real exponentiate(real t, real row_max, real* __restrict x) const {
    const real *remaining_ = remaining.data(), slope = 1 / ramp;
    real row_sum = 0;
#pragma omp simd reduction(+ : row_sum)
    for (int64_t s = 0; s < n; ++s) {
      const real m = std::min(std::max(1 + (remaining_[s] - t) * slope, real(0)), real(1));
      x[s] = m * fast_exp(x[s] - row_max);
      row_sum += x[s];
    }
    return row_sum;
  }

  // From query t's scores, less lse, in x and dP in dx: sets x to a' after dropout and dx to dscore, and adds to dspan.
  void differentiate(real t, real delta, real* __restrict x, real* __restrict dx, real* __restrict dspan) const {
    const real *remaining_ = remaining.data(), *dropout_ = dropout.data(), slope = 1 / ramp;
#pragma omp simd
    for (int64_t s = 0; s < n; ++s) {
      const real unclamped = 1 + (remaining_[s] - t) * slope, m = std::min(std::max(unclamped, real(0)), real(1));
      const real weight = fast_exp(x[s]), dm = weight * (dx[s] * dropout_[s] - delta);
      dspan[s] += (unclamped > 0) & (unclamped <= 1) ? dm * slope : real(0);
      dx[s] = m * dm;
      x[s] = m * weight * dropout_[s];
    }
  }
};

template <typename real>
void forward_heads(const AttentionArgs& args, const Tensor& out_, const Tensor& lse_) {
  const real inf = std::numeric_limits<real>::infinity();
  const OptionalTensor table_t = args.transposed_table();
  at::parallel_for(0, args.batch_heads(), args.grain_size(), [&](int64_t first, int64_t end) {
    KeyTile<real> keys;
    std::vector<real> row_max(args.block()), row_sum(args.block());
    for (int64_t batch_head = first; batch_head < end; ++batch_head) {
      Head<real> head(args, batch_head);
      const auto all_queries = head.query_matrix(args.query), all_out = head.query_matrix(out_);  // (T, D)
      real* lse = head.query_vector(lse_);
      row_max.assign(args.block(), -inf), row_sum.assign(args.block(), 0);
      head.for_key_tiles([&](int64_t first, int64_t n) {
        const auto key = head.key_matrix(args.key, first, n), value = head.key_matrix(args.value, first, n);  // (n, D)
        head.for_query_tiles([&](int64_t first_t, int64_t queries) {
          if (!keys.load(head, first, n, first_t, queries)) return;
          const auto out = all_out.row_range(first_t, queries);  // (queries, D)
          keys.compute_scores(all_queries.row_range(first_t, queries), key, table_t);
          for (int64_t i = 0, t = first_t; i < queries; ++i, ++t) {
            real* x = keys.score.row(i);
            const real new_max = std::max(row_max[t], keys.mask(i, head.max_age(t, first_t), 0, x));
            const real finite_max = new_max == -inf ? 0 : new_max, rescale = fast_exp(row_max[t] - finite_max);
            row_max[t] = new_max;
            row_sum[t] = row_sum[t] * rescale + keys.exponentiate(i, finite_max, x);
            for (int64_t d = 0; rescale < 1 && d < out.cols; ++d) out.row(i)[d] *= rescale;
            if (args.dropout > 0) {
              head.draw_dropout(keys.dropout);
              for (int64_t s = 0; s < n; ++s) x[s] *= keys.dropout[s];
            }
          }
          gemm(keys.score, value, out, true);
        });
      });
      for (int64_t t = 0; t < args.block(); ++t) {
        if (row_sum[t] == 0) continue;  // no key is visible: out stays 0
        lse[t] = row_max[t] + std::log(row_sum[t]);
        for (int64_t d = 0; d < all_out.cols; ++d) all_out.row(t)[d] /= row_sum[t];
      }
    }
  });
}

struct Gradients {
  Tensor query, key, value;  // of the shapes that AttentionArgs has
  Tensor span, bias;         // (H, N)
  Tensor table;              // (threads, rows, D)
};

template <typename real>
void backward_heads(
    const AttentionArgs& args, const Tensor& dout_, const Tensor& delta_, const Tensor& lse_, const Gradients& grads) {
  const OptionalTensor table_t = args.transposed_table();
  at::parallel_for(0, args.batch_heads(), args.grain_size(), [&](int64_t first, int64_t end) {
    KeyTile<real> keys;
    real* dtable = args.table ? grads.table[at::get_thread_num()].data_ptr<real>() : nullptr;
    for (int64_t batch_head = first; batch_head < end; ++batch_head) {
      Head<real> head(args, batch_head);
      const auto all_queries = head.query_matrix(args.query), all_dout = head.query_matrix(dout_);  // (T, D)
      const auto all_dquery = head.query_matrix(grads.query);
      const real *lse = head.query_vector(lse_), *delta = head.query_vector(delta_);
      head.for_key_tiles([&](int64_t first, int64_t n) {
        const auto key = head.key_matrix(args.key, first, n), value = head.key_matrix(args.value, first, n);  // (n, D)
        const auto dkey = head.key_matrix(grads.key, first, n), dvalue = head.key_matrix(grads.value, first, n);
        real* dspan = head.key_vector(grads.span, first);
        bool add = false;  // whether dkey and dvalue hold the gradients of earlier queries
        head.for_query_tiles([&](int64_t first_t, int64_t queries) {
          if (!keys.load(head, first, n, first_t, queries)) return;
          const auto query = all_queries.row_range(first_t, queries), dout = all_dout.row_range(first_t, queries);
          keys.compute_scores(query, key, table_t);
          keys.gemm_transposed(dout, value, keys.dscore);  // dP
          for (int64_t i = 0, t = first_t; i < queries; ++i, ++t) {
            real *x = keys.score.row(i), *dx = keys.dscore.row(i);
            if (args.dropout > 0) head.draw_dropout(keys.dropout);
            keys.mask(i, head.max_age(t, first_t), lse[t], x);
            keys.differentiate(i, delta[t], x, dx, dspan);
            for (int64_t s = 0; args.bias && s < n; ++s) head.key_vector(grads.bias, first)[s] += dx[s];
          }
          gemm(keys.score.t(), dout, dvalue, add);
          const auto dquery = all_dquery.row_range(first_t, queries);
          keys.compute_score_gradients(query, key, args.table, dquery, dkey, add, dtable);
          add = true;
        });
        if (!add) dkey.fill(0), dvalue.fill(0);  // no query may see these keys
      });
    }
  });
}

// Returns out (B, H, T, D) in the dtype of query, and lse (B, H, T), the log-sum-exp of each query's scores.
std::tuple<Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets, const Tensor& age,
    const Tensor& span, const OptionalTensor& position, const OptionalTensor& rows, const OptionalTensor& reach,
    const OptionalTensor& bias, const OptionalTensor& min_distance, double ramp, double dropout, int64_t seed) {
  const AttentionArgs args(
      query, key, value, offsets, age, span, position, rows, reach, bias, min_distance, ramp, dropout, seed);
  const auto options = args.query.options();
  Tensor out = at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, options).transpose(1, 2);
  Tensor lse = at::full({query.size(0), query.size(1), query.size(2)}, INFINITY, options);
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(
        lse.scalar_type(), "expire_span", [&] { forward_heads<scalar_t>(args, out, lse); });
  return {out.to(query.scalar_type()), lse};
}

// Returns the gradients of query, key, value, span, position and bias.
std::vector<Tensor> backward(
    const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& offsets, const Tensor& age, const Tensor& span, const OptionalTensor& position,
    const OptionalTensor& rows, const OptionalTensor& reach, const OptionalTensor& bias,
    const OptionalTensor& min_distance, double ramp, double dropout, int64_t seed) {
  const AttentionArgs args(
      query, key, value, offsets, age, span, position, rows, reach, bias, min_distance, ramp, dropout, seed);
  const auto options = args.query.options();
  const Tensor dout = grad_out.to(lse.scalar_type()), delta = (dout * out).sum(-1).contiguous();  // (B, H, T)
  Gradients grads{at::zeros({query.size(0), query.size(2), query.size(1), query.size(3)}, options).transpose(1, 2),
                  at::empty(key.sizes(), options), at::empty(value.sizes(), options),
                  at::zeros({query.size(1), key.size(0)}, options)};
  if (bias) grads.bias = at::zeros_like(grads.span);
  if (args.table) grads.table = at::zeros({at::get_num_threads(), args.table->size(0), args.head_dim()}, options);
  if (key.size(0) > 0)
    AT_DISPATCH_FLOATING_TYPES(
        lse.scalar_type(), "expire_span", [&] { backward_heads<scalar_t>(args, dout, delta, lse, grads); });

  const Tensor dquery = (grads.query / std::sqrt(query.size(3))).to(query.scalar_type());
  const Tensor dspan = grads.span.t().sum_to_size(span.sizes()).to(span.scalar_type()).contiguous();
  Tensor dposition, dbias;
  if (position) {
    dposition = at::zeros(position->sizes(), position->options());
    if (args.table) dposition.narrow(0, 0, args.table->size(0)).copy_(grads.table.sum(0).flip(0));
  }
  if (bias) dbias = grads.bias.t().sum_to_size(bias->sizes()).to(bias->scalar_type()).contiguous();
  return {dquery, grads.key.to(key.scalar_type()), grads.value.to(value.scalar_type()), dspan, dposition, dbias};
}

}  // namespace

TORCH_LIBRARY(expire_span_cpp, library) {
  library.def("forward", &forward);
  library.def("backward", &backward);
}
