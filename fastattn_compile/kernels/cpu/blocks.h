// What attention by blocks of queries shares: its arguments, the rows that a block meets, tiles of queries, scores.
#pragma once
#include "simd.h"

extern "C" {
struct BlockArgs {
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
  // The caller's own threads, where it has some: calls work(data, i) for every i < count. Null: those of OpenMP.
  void (*spread)(void* pool, void (*work)(void* data, size_t i), size_t count, void* data);
  void* pool;
};
}

namespace {

// work(i) for every i < count, shared among threads.
template <typename Work>
void parallel(const BlockArgs& a, int64_t count, const Work& work) {
  if (a.spread) {
    a.spread(a.pool, [](void* data, size_t i) { (*(const Work*)data)((int64_t)i); }, (size_t)count, (void*)&work);
    return;
  }
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t i = 0; i < count; i++) work(i);
}

// Where the parts of a level stand among the pooled rows: row r of group j of level l at start[l] + p * j + r.
struct Levels {
  int64_t blocks, count = 0, rows = 0;
  std::vector<int64_t> start, groups;
  Levels(int64_t n, int64_t m, int64_t p) {  // no levels when p is 0
    blocks = (n + m - 1) / m;
    while (p && (blocks - 1) >> (count + 1)) count++;
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
void choose_sinks(const BlockArgs& a, int64_t batch, Head& head) {
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
  const BlockArgs& a;
  const Levels& levels;
  const Head& head;
  const Rows<T> key, value;
  const uint8_t* real;
  const int64_t places, stride, sinks, far, total, dk, dv;  // dk, dv: channels filled up to whole vectors
  std::vector<float> k, v, key_rows, value_packed, bias;  // key_rows: as v; value_packed: as k, for gradients only
  std::vector<int64_t> held;  // what stands at a slot: a token, or n + a pooled row; -1 nothing
  std::vector<Run> runs;
  std::vector<uint8_t> stale;

  Slots(const BlockArgs& a, const Levels& levels, const Head& head, Rows<T> key, Rows<T> value, const uint8_t* real)
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

// Softmax of a tile's scores without the division: weights in place, their sums and what they were taken over, and their
// product with the values, (channel, query).
template <typename T>
void weigh(const Slots<T>& slots, int64_t first, float* scores, float* out, vec* most, vec* sum) {
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
    product_transposed(&slots.v[run.slot * slots.dv], slots.dv, &scores[run.slot * QT], out, rows, slots.a.e, add);
    add = true;
  }
}

}  // namespace
