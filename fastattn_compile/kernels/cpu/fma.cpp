// Fast multipole attention on a CPU, forward and backward.
//
// A block of queries meets a short list of rows: near tokens, sinks, pooled rows. They stand in one buffer that is kept from
// block to block: a block lives at the same place while it is near, and the pooled rows of a level change only with the
// parent, so that little is copied. A tile of queries is transposed: scores stand as (row, query), every step of the softmax
// is a vector operation over queries, and keys and values are read as they lie.
//
// Sizes: b batch, g key heads, h query heads, n tokens, d channels of query and key, e of value, m block, p rank.
#include "simd.h"

extern "C" {
struct FmaArgs {
  const void *query, *key, *value;
  void* out;
  float* log_sum_exp;            // (b, h, n)
  const uint8_t* real;           // (b, n) or null
  const void* grad_out;          // backward: as out; else null
  const float* grad_lse;         // backward: (b, h, n) or null
  void *grad_query, *grad_key, *grad_value;
  int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3], grad_out_strides[3];  // of b, head, n
  int64_t grad_query_strides[3], grad_key_strides[3], grad_value_strides[3];
  int64_t b, h, g, n, d, e, m, p, sinks;
  int32_t causal, weighted, dtype, threads;
  float scale;
};
}

namespace {

// Where the parts of a level stand among the pooled rows: row r of group j of level l at start[l] + p * j + r.
struct Levels {
  int64_t blocks, count, rows;
  std::vector<int64_t> start, groups;
  Levels(int64_t n, int64_t m, int64_t p) {
    blocks = (n + m - 1) / m;
    count = 0;
    while ((blocks - 1) >> (count + 1)) count++;
    rows = 0;
    for (int64_t l = 0; l < count; l++) {
      start.push_back(rows);
      groups.push_back((blocks + (1ll << l) - 1) >> l);
      rows += groups[l] * p;
    }
  }
};

// What all query heads of one key head share: pooled rows, how many tokens each stands for, where the sinks are.
struct Head {
  std::vector<float> key, value, counts;
  std::vector<int64_t> sinks;
  std::vector<uint8_t> pooled;  // whether a token takes part in pooled rows
  bool finite = true;
};

template <typename T>
struct Rows {
  const T* base;
  int64_t stride, channels;
  const T* operator[](int64_t i) const { return base + i * stride; }
};

// Which tokens are pooled, and the sinks: the first real tokens.
void choose_sinks(const FmaArgs& a, int64_t batch, Head& head) {
  const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
  head.pooled.assign(a.n, 1);
  for (int64_t i = 0; i < a.n; i++) {
    if (real && !real[i]) head.pooled[i] = 0;
    else if ((int64_t)head.sinks.size() < a.sinks) {
      head.sinks.push_back(i);
      head.pooled[i] = 0;
    }
  }
}

// Sums, then means, of the parts of every level; a level's parts are pairs of parts of the level below. False when a number
// is not finite: 0 times infinity and 0 times NaN are NaN.
template <typename T>
bool pool(const FmaArgs& a, const Levels& levels, const Head& head, const uint8_t* real, Rows<T> x, std::vector<float>& rows) {
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

void count(const FmaArgs& a, const Levels& levels, Head& head) {
  head.counts.assign(levels.rows, 0.f);
  if (!levels.count) return;
  for (int64_t i = 0; i < a.n; i++) head.counts[i / (a.m / a.p)] += head.pooled[i];
  for (int64_t l = 1; l < levels.count; l++)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
      head.counts[levels.start[l] + r / 2] += head.counts[levels.start[l - 1] + r];
}

// A stretch of slots that a block meets, in whole groups; a slot of it that is not met has a bias of -inf.
struct Run {
  int64_t slot, rows;
  bool own;  // the block itself: under a causal mask a query sees only what is not after it
};

// The rows a block meets, side by side, kept from block to block: keys packed in groups, values row by row; for a backward
// pass both in both forms.
template <typename T>
class Slots {
 public:
  const FmaArgs& a;
  const Levels& levels;
  const Head& head;
  const Rows<T> key, value;
  const uint8_t* real;
  const int64_t places, stride, sinks, far, total, dk, dv;  // dk, dv: channels filled up to whole vectors
  std::vector<float> k, v, key_rows, value_packed, bias;  // key_rows: as v; value_packed: as k, for gradients only
  std::vector<int64_t> held;  // what stands at a slot: a token, or n + a pooled row; -1 nothing
  std::vector<Run> runs;
  std::vector<uint8_t> stale;

  Slots(const FmaArgs& a, const Levels& levels, const Head& head, Rows<T> key, Rows<T> value, const uint8_t* real)
      : a(a), levels(levels), head(head), key(key), value(value), real(real), places(a.causal ? 2 : 3), stride(round_up(a.m, G)),
        sinks(round_up(head.sinks.size(), G)), far(round_up(levels.count * (a.causal ? 2 : 4) * a.p, G)),
        total(places * stride + sinks + far), dk(round_up(a.d, W)), dv(round_up(a.e, W)), k(total * a.d), v(total * dv),
        key_rows(total * dk), bias(total, NEG_INF), held(total, -1), stale(total / 4) {
    if (a.grad_out) value_packed.resize(total * a.e);
  }

  // Brings the rows of block i into place. `leave(slot, id)` is called for what gives way.
  template <typename Leave>
  void enter(int64_t i, Leave leave) {
    runs.clear();
    for (int64_t j = std::max<int64_t>(0, i - 1); j <= std::min(levels.blocks - 1, i + (a.causal ? 0 : 1)); j++) {
      const int64_t place = j % places * stride, rows = std::min(a.m, a.n - j * a.m);
      if (held[place] != j * a.m)
        for (int64_t t = 0; t < rows; t++) {
          put(place + t, j * a.m + t, leave);
          bias[place + t] = real && !real[j * a.m + t] ? NEG_INF : 0.f;
        }
      std::fill(bias.begin() + place + rows, bias.begin() + place + stride, NEG_INF);
      runs.push_back({place, round_up(rows, G), a.causal && j == i});
    }
    int64_t slot = places * stride;
    for (size_t s = 0; s < head.sinks.size(); s++) {
      const int64_t apart = i - head.sinks[s] / a.m;
      put(slot + s, head.sinks[s], leave);
      bias[slot + s] = (a.causal ? apart > 1 : std::abs(apart) > 1) ? 0.f : NEG_INF;
    }
    slot += sinks;
    std::fill(bias.begin() + slot, bias.end(), NEG_INF);
    for (int64_t l = 0; l < levels.count; l++) {
      const int64_t parent = i >> (l + 1), second = (i >> l) & 1;
      for (int side = -1; side <= (a.causal ? -1 : 1); side += 2)
        for (int child = 0; child < 2; child++, slot += a.p) {
          const int64_t group = 2 * (parent + side) + child;
          // The child beside the block's own group belongs to a finer level.
          const bool allowed = side < 0 ? child <= second : child >= second;
          if (!allowed || group < 0 || group >= levels.groups[l]) continue;
          for (int64_t r = 0; r < a.p; r++) {
            const int64_t row = levels.start[l] + group * a.p + r;
            put(slot + r, a.n + row, leave);
            if (head.counts[row] > 0) bias[slot + r] = a.weighted ? std::log2(head.counts[row]) : 0.f;
          }
        }
    }
    pack();
    // Of sinks and pooled rows the groups that hold a slot that is met.
    for (int64_t at = places * stride; at < total; at += G) {
      bool met = false;
      for (int r = 0; r < G; r++) met |= bias[at + r] > NEG_INF;
      if (!met) continue;
      Run& last = runs.back();
      if (!last.own && last.slot + last.rows == at && last.slot >= places * stride) last.rows += G;
      else runs.push_back({at, G, false});
    }
  }

 private:
  template <typename Leave>
  void put(int64_t slot, int64_t id, Leave leave) {
    if (held[slot] == id) return;
    if (held[slot] >= 0) leave(slot, held[slot]);
    held[slot] = id;
    if (id >= a.n) {
      keep(slot, &head.key[(id - a.n) * a.d], &head.value[(id - a.n) * a.e]);
    } else if (!real || real[id]) {
      keep(slot, key[id], value[id]);
    } else {  // hidden by its bias, but whatever stands at padding must not become NaN
      const std::vector<float> nothing(std::max(a.d, a.e), 0.f);
      keep(slot, nothing.data(), nothing.data());
    }
  }

  template <typename S>
  void keep(int64_t slot, const S* from_key, const S* from_value) {
    for (int64_t c = 0; c < a.d; c++) key_rows[slot * dk + c] = widen(from_key[c]);
    for (int64_t c = 0; c < a.e; c++) v[slot * dv + c] = widen(from_value[c]);
    stale[slot / 4] = 1;
  }

  // Packs the fours of slots that have changed.
  void pack() {
    for (int64_t at = 0; at < total; at += 4)
      if (stale[at / 4]) {
        stale[at / 4] = 0;
        transpose_rows(&key_rows[at * dk], dk, a.d, &k[packed(at, 0, a.d)], G);
        if (a.grad_out) transpose_rows(&v[at * dv], dv, a.e, &value_packed[packed(at, 0, a.e)], G);
      }
  }
};

// A tile of queries, transposed: (channel, query), 0 past the end.
template <typename T>
void transpose_in(const T* from, int64_t stride, int64_t queries, int64_t channels, float factor, float* rows, float* to) {
  for (int64_t q = 0; q < QT; q++)
    for (int64_t c = 0; c < channels; c++) rows[q * channels + c] = q < queries ? widen(from[q * stride + c]) * factor : 0.f;
  for (int64_t q = 0; q < QT; q += 4) transpose_rows(rows + q * channels, channels, channels, to + q, QT);
}

// The way back: (channel, query) to rows, each times a factor of its query. `from` holds whole groups of channels.
template <typename T>
void transpose_out(const float* from, int64_t stride, int64_t queries, int64_t channels, const float* factor, float* rows, T* to) {
  const int64_t wide = round_up(channels, 4);
  for (int64_t c = 0; c < wide; c += 4) transpose_rows(from + c * QT, QT, QT, rows + c, wide);
  for (int64_t q = 0; q < queries; q++)
    for (int64_t c = 0; c < channels; c++) narrow(rows[q * wide + c] * (factor ? factor[q] : 1.f), to[q * stride + c]);
}

// How many rows of a stretch the queries up to `last` of the block may see.
inline int64_t seen(const Run& run, int64_t last) { return run.own ? std::min(run.rows, round_up(last + 1, G)) : run.rows; }

// Scores (slot, query) of a tile with the bias of its slots and the causal mask of the block's own.
template <typename T>
void score(const Slots<T>& slots, const float* queries, int64_t first, float* scores) {
  for (const Run& run : slots.runs) {
    const int64_t rows = seen(run, first + QT - 1);
    product_packed(&slots.k[run.slot * slots.a.d], queries, scores + run.slot * QT, rows, slots.a.d);
    for (int64_t r = 0; r < rows; r++) {
      float* row = scores + (run.slot + r) * QT;
      const float bias = slots.bias[run.slot + r];
      if (bias != 0.f)
        for (int j = 0; j < NV; j++) store(row + j * W, load(row + j * W) + bias);
      if (run.own)
        for (int64_t q = 0; q < std::min<int64_t>(QT, r - first); q++) row[q] = NEG_INF;
    }
  }
}

template <typename T>
void forward_blocks(const FmaArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g, int64_t from, int64_t to) {
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
        for (int j = 0; j < NV; j++) most[j] = splat(NEG_INF), sum[j] = vec{};
        for (const Run& run : slots.runs)
          for (int64_t r = 0, rows = seen(run, first + QT - 1); r < rows; r++)
            for (int j = 0; j < NV; j++) most[j] = vmax(most[j], load(&scores[(run.slot + r) * QT + j * W]));
        for (int j = 0; j < NV; j++) most[j] = most[j] == NEG_INF ? vec{} : most[j];
        bool add = false;
        for (const Run& run : slots.runs) {
          const int64_t rows = seen(run, first + QT - 1);
          for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < NV; j++) {
              float* at = &scores[(run.slot + r) * QT + j * W];
              const vec weight = exp2v(load(at) - most[j]);
              store(at, weight);
              sum[j] += weight;
            }
          product_transposed(&slots.v[run.slot * slots.dv], slots.dv, &scores[run.slot * QT], out.data(), rows, a.e, add);
          add = true;
        }
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
void backward_head(const FmaArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g) {
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
int run(const FmaArgs& a) {
  const Levels levels(a.n, a.m, a.p);
  const int64_t heads = a.b * a.g;
  std::vector<Head> all(heads);
  bool finite = true;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) reduction(&& : finite)
  for (int64_t u = 0; u < heads; u++) {
    const int64_t batch = u / a.g, g = u % a.g;
    const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
    const Rows<T> key{(const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1], a.key_strides[2], a.d};
    const Rows<T> value{(const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1], a.value_strides[2], a.e};
    choose_sinks(a, batch, all[u]);
    count(a, levels, all[u]);
    const bool good = pool(a, levels, all[u], real, key, all[u].key);
    finite = pool(a, levels, all[u], real, value, all[u].value) && good && finite;
  }
  if (!finite) return 1;
  if (a.grad_out) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
    for (int64_t u = 0; u < heads; u++) backward_head<T>(a, levels, all[u], u / a.g, u % a.g);
    return 0;
  }
  // Stretches of blocks long enough that filling the first block's slots does not count.
  const int64_t chunk = std::max<int64_t>(8, (levels.blocks * heads + 8 * a.threads - 1) / (8 * a.threads));
  const int64_t chunks = (levels.blocks + chunk - 1) / chunk;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t task = 0; task < heads * chunks; task++) {
    const int64_t u = task / chunks, from = task % chunks * chunk;
    forward_blocks<T>(a, levels, all[u], u / a.g, u % a.g, from, std::min(levels.blocks, from + chunk));
  }
  return 0;
}

}  // namespace

// 0: done. 1: a key or value is not finite, nothing was written that may be used.
extern "C" int fma_run(const FmaArgs* args) {
  switch (args->dtype) {
    case 0: return run<float>(*args);
    case 1: return run<bf16>(*args);
    default: return run<_Float16>(*args);
  }
}
