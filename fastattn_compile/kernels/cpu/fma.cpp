// Fast multipole attention on a CPU, forward and backward.
//
// A block of queries meets a short list of rows: near tokens, sinks, pooled rows. They stand in one buffer that is kept from
// block to block: a block lives at the same place while it is near, and the pooled rows of a level change only with the
// parent, so that little is copied. A tile of queries is transposed: scores stand as (row, query), every step of the softmax
// is a vector operation over queries, and keys and values are read as they lie.
//
// Sizes: b batch, g key heads, h query heads, n tokens, d channels of query and key, e of value, m block, p rank.
#include "blocks.h"

namespace {

// Sums, then means, of the parts of every level; a level's parts are pairs of parts of the level below. False when a number
// is not finite: 0 times infinity and 0 times NaN are NaN.
template <typename T>
bool pool(const BlockArgs& a, const Levels& levels, const Head& head, const uint8_t* real, Rows<T> x, std::vector<float>& rows) {
  const int64_t c = x.channels, part = a.m / a.p;
  rows.assign(levels.rows * c, 0.f);
  const int64_t whole = c / W * W;
  std::vector<float> token(c);
  vec zeros = {};
  float zero = 0.f;
  for (int64_t i = 0; i < a.n; i++) {
    if (real && !real[i]) continue;
    const float* from = as_floats(x[i], c, token.data());
    for (int64_t k = 0; k < whole; k += W) zeros += load(from + k) * splat(0.f);
    for (int64_t k = whole; k < c; k++) zero += from[k] * 0.f;
    if (!levels.count || !head.pooled[i]) continue;
    float* to = &rows[(i / part) * c];
    for (int64_t k = 0; k < whole; k += W) store(to + k, load(to + k) + load(from + k));
    for (int64_t k = whole; k < c; k++) to[k] += from[k];
  }
  for (int j = 0; j < W; j++) zero += zeros[j];
  if (zero != 0.f) return false;
  for (int64_t l = 1; l < levels.count; l++) {
    const float* below = &rows[levels.start[l - 1] * c];
    float* here = &rows[levels.start[l] * c];
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
      for (int64_t k = 0; k < c; k++) here[(r / 2) * c + k] += below[r * c + k];
  }
  for (int64_t r = 0; r < levels.rows; r++) {
    const float by = 1.f / std::max(1.f, head.counts[r]);
    for (int64_t k = 0; k < c; k++) rows[r * c + k] *= by;
  }
  return true;
}

void count(const BlockArgs& a, const Levels& levels, Head& head) {
  head.counts.assign(levels.rows, 0.f);
  if (!levels.count) return;
  for (int64_t i = 0; i < a.n; i++) head.counts[i / (a.m / a.p)] += head.pooled[i];
  for (int64_t l = 1; l < levels.count; l++)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
      head.counts[levels.start[l] + r / 2] += head.counts[levels.start[l - 1] + r];
}

template <typename T>
void forward_blocks(const BlockArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g, int64_t from, int64_t to) {
  const T* key = (const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1];
  const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
  Slots<T> slots(a, levels, head, {key, a.key_strides[2], a.d}, {value, a.value_strides[2], a.e}, real);
  std::vector<float> queries(a.d * QT), scores(slots.total * QT), out(slots.dv * QT), rows_of_tile(QT * std::max(slots.dk, slots.dv));
  const int64_t group = a.h / a.g;
  for (int64_t i = from; i < to; i++) {
    slots.enter(i, [](int64_t, int64_t) {});
    const int64_t rows = std::min(a.m, a.n - i * a.m);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t first = 0; first < rows; first += QT) {
        const int64_t count = std::min<int64_t>(QT, rows - first), token = i * a.m + first;
        const T* q = (const T*)a.query + batch * a.query_strides[0] + h * a.query_strides[1] + token * a.query_strides[2];
        transpose_in(q, a.query_strides[2], count, a.d, a.scale * LOG2E, rows_of_tile.data(), queries.data());
        score(slots, queries.data(), first, scores.data());
        vec most[NV], sum[NV];
        weigh(slots, first, scores.data(), out.data(), most, sum);
        float factor[QT];
        float* lse = a.log_sum_exp + (batch * a.h + h) * a.n + token;
        for (int q = 0; q < QT; q++) {
          const float total = sum[q / W][q % W];
          factor[q] = total > 0.f ? 1.f / total : 0.f;
          if (q < count) lse[q] = total > 0.f ? (most[q / W][q % W] + std::log2(total)) * LN2 : NEG_INF;
        }
        T* o = (T*)a.out + batch * a.out_strides[0] + h * a.out_strides[1] + token * a.out_strides[2];
        transpose_out(out.data(), a.out_strides[2], count, a.e, factor, rows_of_tile.data(), o);
      }
  }
}

// Gradients of one key head, block after block; sums over rows in a fixed order, nothing is shared between threads.
template <typename T>
void backward_head(const BlockArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g) {
  const T* key = (const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1];
  const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
  Slots<T> slots(a, levels, head, {key, a.key_strides[2], a.d}, {value, a.value_strides[2], a.e}, real);
  const int64_t dk = slots.dk, dv = slots.dv, group = a.h / a.g;
  std::vector<float> queries(a.d * QT), grads(a.e * QT), weights(slots.total * QT), slopes(slots.total * QT), dq(dk * QT);
  std::vector<float> rows_of_tile(QT * std::max(dk, dv)), query_rows(QT * dk), grad_rows(QT * dv), slot_key(slots.total * dk), slot_value(slots.total * dv);
  std::vector<float> to_key((a.n + levels.rows) * a.d), to_value((a.n + levels.rows) * a.e);
  const auto leave = [&](int64_t slot, int64_t id) {
    for (int64_t c = 0; c < a.d; c++) to_key[id * a.d + c] += slot_key[slot * dk + c];
    for (int64_t c = 0; c < a.e; c++) to_value[id * a.e + c] += slot_value[slot * dv + c];
    std::fill_n(&slot_key[slot * dk], dk, 0.f);
    std::fill_n(&slot_value[slot * dv], dv, 0.f);
  };
  for (int64_t i = 0; i < levels.blocks; i++) {
    slots.enter(i, leave);
    const int64_t rows = std::min(a.m, a.n - i * a.m);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t first = 0; first < rows; first += QT) {
        const int64_t count = std::min<int64_t>(QT, rows - first), token = i * a.m + first, at = (batch * a.h + h) * a.n + token;
        const T* q = (const T*)a.query + batch * a.query_strides[0] + h * a.query_strides[1] + token * a.query_strides[2];
        const T* o = (const T*)a.out + batch * a.out_strides[0] + h * a.out_strides[1] + token * a.out_strides[2];
        const T* dout = (const T*)a.grad_out + batch * a.grad_out_strides[0] + h * a.grad_out_strides[1] + token * a.grad_out_strides[2];
        transpose_in(q, a.query_strides[2], count, a.d, a.scale * LOG2E, rows_of_tile.data(), queries.data());
        transpose_in(dout, a.grad_out_strides[2], count, a.e, 1.f, rows_of_tile.data(), grads.data());
        float lse[QT], slope[QT];
        std::fill(query_rows.begin(), query_rows.end(), 0.f);
        std::fill(grad_rows.begin(), grad_rows.end(), 0.f);
        for (int64_t r = 0; r < QT; r++) {
          lse[r] = std::numeric_limits<float>::infinity();  // weights of 0 where there is no query, or nothing was seen
          slope[r] = 0.f;
          if (r >= count) continue;
          if (a.log_sum_exp[at + r] != NEG_INF) lse[r] = a.log_sum_exp[at + r] * LOG2E;
          slope[r] = a.grad_lse ? -a.grad_lse[at + r] : 0.f;
          for (int64_t c = 0; c < a.e; c++) {
            grad_rows[r * dv + c] = widen(dout[r * a.grad_out_strides[2] + c]);
            slope[r] += grad_rows[r * dv + c] * widen(o[r * a.out_strides[2] + c]);
          }
          for (int64_t c = 0; c < a.d; c++) query_rows[r * dk + c] = widen(q[r * a.query_strides[2] + c]);
        }
        score(slots, queries.data(), first, weights.data());
        bool add = false;
        for (const Run& run : slots.runs) {
          const int64_t rows = seen(run, first + QT - 1);
          float *p = &weights[run.slot * QT], *s = &slopes[run.slot * QT];
          product_packed(&slots.value_packed[run.slot * a.e], grads.data(), s, rows, a.e);
          for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < NV; j++) {
              const vec weight = exp2v(load(p + r * QT + j * W) - load(lse + j * W));
              store(p + r * QT + j * W, weight);
              store(s + r * QT + j * W, (load(s + r * QT + j * W) - load(slope + j * W)) * weight * a.scale);
            }
          product_wide(p, grad_rows.data(), &slot_value[run.slot * dv], dv, rows, dv);
          product_wide(s, query_rows.data(), &slot_key[run.slot * dk], dk, rows, dk);
          product_transposed(&slots.key_rows[run.slot * dk], dk, s, dq.data(), rows, a.d, add);
          add = true;
        }
        T* to = (T*)a.grad_query + batch * a.grad_query_strides[0] + h * a.grad_query_strides[1] + token * a.grad_query_strides[2];
        transpose_out(dq.data(), a.grad_query_strides[2], count, a.d, nullptr, rows_of_tile.data(), to);
      }
  }
  for (int64_t slot = 0; slot < slots.total; slot++)
    if (slots.held[slot] >= 0) leave(slot, slots.held[slot]);
  // From means back to sums, from the coarsest level down, and from the finest to the tokens.
  const auto spread = [&](std::vector<float>& grad, int64_t c, T* out, const int64_t* strides) {
    float* pooled = grad.data() + a.n * c;
    for (int64_t r = 0; r < levels.rows; r++) {
      const float by = 1.f / std::max(1.f, head.counts[r]);
      for (int64_t k = 0; k < c; k++) pooled[r * c + k] *= by;
    }
    for (int64_t l = levels.count - 1; l > 0; l--)
      for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
        for (int64_t k = 0; k < c; k++)
          pooled[(levels.start[l - 1] + r) * c + k] += pooled[(levels.start[l] + r / 2) * c + k];
    for (int64_t t = 0; t < a.n; t++)
      for (int64_t k = 0; k < c; k++) {
        float x = grad[t * c + k];
        if (levels.count && head.pooled[t]) x += pooled[t / (a.m / a.p) * c + k];
        narrow(real && !real[t] ? 0.f : x, out[t * strides[2] + k]);
      }
  };
  spread(to_key, a.d, (T*)a.grad_key + batch * a.grad_key_strides[0] + g * a.grad_key_strides[1], a.grad_key_strides);
  spread(to_value, a.e, (T*)a.grad_value + batch * a.grad_value_strides[0] + g * a.grad_value_strides[1], a.grad_value_strides);
}

template <typename T>
int run(const BlockArgs& a) {
  const Levels levels(a.n, a.m, a.p);
  const int64_t heads = a.b * a.g;
  std::vector<Head> all(heads);
  parallel(a, heads, [&](int64_t u) {
    const int64_t batch = u / a.g, g = u % a.g;
    const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
    const Rows<T> key{(const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1], a.key_strides[2], a.d};
    const Rows<T> value{(const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1], a.value_strides[2], a.e};
    choose_sinks(a, batch, all[u]);
    count(a, levels, all[u]);
    const bool good = pool(a, levels, all[u], real, key, all[u].key);
    all[u].finite = pool(a, levels, all[u], real, value, all[u].value) && good;
  });
  for (const Head& head : all)
    if (!head.finite) return 1;
  if (a.grad_out) {
    parallel(a, heads, [&](int64_t u) { backward_head<T>(a, levels, all[u], u / a.g, u % a.g); });
    return 0;
  }
  // Stretches of blocks long enough that filling the first block's slots does not count.
  const int64_t chunk = std::max<int64_t>(8, (levels.blocks * heads + 8 * a.threads - 1) / (8 * a.threads));
  const int64_t chunks = (levels.blocks + chunk - 1) / chunk;
  parallel(a, heads * chunks, [&](int64_t task) {
    const int64_t u = task / chunks, from = task % chunks * chunk;
    forward_blocks<T>(a, levels, all[u], u / a.g, u % a.g, from, std::min(levels.blocks, from + chunk));
  });
  return 0;
}

}  // namespace

// 0: done. 1: a key or value is not finite, nothing was written that may be used.
extern "C" int fma_run(const BlockArgs* args) {
  switch (args->dtype) {
    case 0: return run<float>(*args);
    case 1: return run<bf16>(*args);
    default: return run<_Float16>(*args);
  }
}
