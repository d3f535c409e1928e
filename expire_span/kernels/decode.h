// One timestep of a layer's attention on a CPU, with a cache that is written in place, as ../decoding.py defines it.
//
// Each stream has its own columns of the cache, and those that are dead (min_distance is NEVER) cost no more than a look.

#pragma once

#include "fast_exp.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t NEVER = int64_t(1) << 40;  // as in packed_layout.py
constexpr int64_t MIN_DECODE_WORK = 1 << 17;    // multiplications that are worth a thread

template <typename real>
struct Layer {
  const real *new_hidden, *query_key_value, *new_span;              // (B, d), (B, 3 H D), (B, h)
  real *hidden, *key_value, *span;                                  // (B, C, d), (B, C, 2 H D), (B, C, h)
  int64_t *time, *min_distance;                                     // (B, C)
  const real* position;                                             // (n, D)
  const int64_t *rows, *reach;                                      // (P,), (B,), or null
  int64_t capacity, columns, step, heads, head_dim, span_heads, num_distances, max_distance;
  real ramp, span_cap;

  real mask(real span, int64_t distance) const {
    return std::min(std::max(1 + (std::min(span, span_cap) - static_cast<real>(distance)) / ramp, real(0)), real(1));
  }

  const real* position_row(int64_t distance) const {
    if (distance < 1 || distance > num_distances) return nullptr;
    return position + (rows ? rows[distance - 1] : distance - 1) * head_dim;
  }
};

// What one stream sees: the rows of the cache, their m for each head that has spans of its own, and each head's weights.
template <typename real>
struct Visible {
  std::vector<int64_t> row;
  std::vector<real> m, weight;  // (rows, h), (heads, rows)
};

// Appends the new memory as column `columns`.
template <typename real>
void append(const Layer<real>& layer, int64_t b) {
  const int64_t row = b * layer.capacity + layer.columns, size = layer.heads * layer.head_dim;
  std::copy_n(layer.new_hidden + b * size, size, layer.hidden + row * size);
  std::copy_n(layer.query_key_value + (3 * b + 1) * size, 2 * size, layer.key_value + 2 * row * size);
  std::copy_n(layer.new_span + b * layer.span_heads, layer.span_heads, layer.span + row * layer.span_heads);
  layer.time[row] = layer.step, layer.min_distance[row] = 1;
}

// Finds what the stream sees, and marks as dead what it will never see again. Sets the counts (3,): memories that are
// seen, the mean over heads; memories held from now on; the new memory's span, the mean over heads.
template <typename real>
void look(const Layer<real>& layer, int64_t b, Visible<real>& visible, double* counts) {
  const int64_t reach = std::min(layer.reach ? layer.reach[b] : NEVER, layer.max_distance);
  int64_t seen = 0, held = 0;
  visible.row.clear(), visible.m.clear();
  for (int64_t s = 0; s <= layer.columns; ++s) {
    const int64_t row = b * layer.capacity + s, nearest = layer.min_distance[row];
    if (nearest == NEVER) continue;
    const int64_t distance = layer.step - layer.time[row];
    const bool in_range = nearest <= distance && distance <= reach;
    bool sees = false, keep = false;
    for (int64_t h = 0; h < layer.span_heads; ++h) {
      const real span = layer.span[row * layer.span_heads + h], m = in_range ? layer.mask(span, distance) : 0;
      visible.m.push_back(m);
      seen += m > 0, sees |= m > 0, keep |= layer.mask(span, distance + 1) > 0;
    }
    if (sees)
      visible.row.push_back(row);
    else
      visible.m.resize(visible.m.size() - layer.span_heads);
    keep &= distance + 1 <= layer.max_distance && (!layer.reach || distance <= layer.reach[b]);
    held += keep;
    if (!keep) layer.min_distance[row] = NEVER;
  }
  double span_sum = 0;
  for (int64_t h = 0; h < layer.span_heads; ++h)
    span_sum += std::min(layer.new_span[b * layer.span_heads + h], layer.span_cap);
  counts[0] = double(seen) / layer.span_heads, counts[1] = held, counts[2] = span_sum / layer.span_heads;
}

// q . (k + p), or q . k without p; all (D,).
template <typename real>
real dot(const real* __restrict query, const real* __restrict key, const real* __restrict position, int64_t D) {
  real sum = 0;
  if (position) {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += query[d] * (key[d] + position[d]);
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += query[d] * key[d];
  }
  return sum;
}

// The attention of all heads to what their stream sees; out (H, D) is 0 before.
template <typename real>
void attend(const Layer<real>& layer, int64_t b, Visible<real>& visible, real* __restrict out) {
  const int64_t H = layer.heads, D = layer.head_dim, n = visible.row.size();
  const real scale = 1 / std::sqrt(static_cast<real>(D));
  const real* __restrict query = layer.query_key_value + b * 3 * H * D;
  visible.weight.resize(H * n);
  for (int64_t i = 0; i < n; ++i) {
    const real* __restrict key = layer.key_value + visible.row[i] * 2 * H * D;
    const real* __restrict position = layer.position_row(layer.step - layer.time[visible.row[i]]);
    for (int64_t head = 0; head < H; ++head)
      visible.weight[head * n + i] = scale * dot(query + head * D, key + head * D, position, D);
  }
  for (int64_t head = 0; head < H; ++head) {
    real* __restrict weight = visible.weight.data() + head * n;
    const real* __restrict m = visible.m.data() + (layer.span_heads > 1 ? head : 0);
    const int64_t stride = layer.span_heads;
    real max_score = -std::numeric_limits<real>::infinity(), sum = 0;
    for (int64_t i = 0; i < n; ++i)
      if (m[i * stride] > 0) max_score = std::max(max_score, weight[i]);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const real m_i = m[i * stride];
      weight[i] = m_i * fast_exp(m_i > 0 ? weight[i] - max_score : real(0));
      sum += weight[i];
    }
    for (int64_t i = 0; sum > 0 && i < n; ++i) weight[i] /= sum;  // a head that sees nothing has the output 0
  }
  for (int64_t i = 0; i < n; ++i) {
    const real* __restrict value = layer.key_value + (visible.row[i] * 2 + 1) * H * D;
    for (int64_t head = 0; head < H; ++head) {
      const real weight = visible.weight[head * n + i];
      for (int64_t d = head * D; d < (head + 1) * D; ++d) out[d] += weight * value[d];
    }
  }
}

// Takes a layer's new hidden states (B, d), their query, key and value (B, 3 H D) and spans (B, h) into the cache, whose
// first `columns` columns are in use. Returns the attention's output (B, H D), and the counts of `look` (B, 3).
std::tuple<Tensor, Tensor> decode(
    const Tensor& hidden, const Tensor& query_key_value, const Tensor& span, Tensor cache_hidden,
    Tensor cache_key_value, Tensor cache_span, Tensor cache_time, Tensor cache_min_distance, int64_t columns,
    int64_t step, double ramp, int64_t max_distance, double span_cap, const Tensor& position, int64_t num_positions,
    const OptionalTensor& rows, const OptionalTensor& reach) {
  const int64_t streams = cache_key_value.size(0), heads = cache_key_value.size(3), head_dim = cache_key_value.size(4);
  const int64_t size = heads * head_dim;
  TORCH_CHECK(columns < cache_time.size(1), "the cache is full");
  TORCH_CHECK(query_key_value.sizes() == at::IntArrayRef({streams, 3 * size}), "query_key_value must be (B, 3 H D)");
  TORCH_CHECK(hidden.sizes() == at::IntArrayRef({streams, size}), "hidden must be (B, H D)");
  TORCH_CHECK(span.sizes() == at::IntArrayRef({streams, cache_span.size(2)}), "span must be (B, h)");
  TORCH_CHECK(num_positions <= position.size(0), "position must have num_positions rows");
  TORCH_CHECK(!reach || reach->numel() == streams, "reach must be (B,)");
  const Tensor hidden_ = hidden.contiguous(), qkv_ = query_key_value.contiguous(), span_ = span.contiguous();
  const Tensor position_ = position.contiguous();
  const OptionalTensor rows_ = rows ? OptionalTensor(rows->contiguous()) : std::nullopt;
  const OptionalTensor reach_ = reach ? OptionalTensor(reach->contiguous()) : std::nullopt;
  Tensor out = at::zeros({streams, size}, query_key_value.options());
  Tensor counts = at::empty({streams, 3}, out.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "expire_span_decode", [&] {
    using real = scalar_t;
    const Layer<real> layer{
        hidden_.data_ptr<real>(), qkv_.data_ptr<real>(), span_.data_ptr<real>(), cache_hidden.data_ptr<real>(),
        cache_key_value.data_ptr<real>(), cache_span.data_ptr<real>(), cache_time.data_ptr<int64_t>(),
        cache_min_distance.data_ptr<int64_t>(), position_.data_ptr<real>(), rows_ ? rows_->data_ptr<int64_t>() : nullptr,
        reach_ ? reach_->data_ptr<int64_t>() : nullptr, cache_time.size(1), columns, step, heads, head_dim,
        cache_span.size(2), rows_ ? rows_->size(0) : num_positions, max_distance, static_cast<real>(ramp),
        static_cast<real>(span_cap)};
    const int64_t grain = 1 + MIN_DECODE_WORK / (1 + columns * size);
    at::parallel_for(0, streams, grain, [&](int64_t first, int64_t end) {
      Visible<real> visible;
      for (int64_t b = first; b < end; ++b) {
        append(layer, b);
        look(layer, b, visible, counts.data_ptr<double>() + 3 * b);
        attend(layer, b, visible, out.data_ptr<real>() + b * size);
      }
    });
  });
  return {out, counts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(expire_span_cpp, library) {
  library.def("decode", &decode);
}
