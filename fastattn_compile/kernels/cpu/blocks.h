// What attention by blocks of queries shares: its arguments, the rows that a block meets, tiles of queries, scores.
#pragma once
#include "simd.h"
#include "threads.h"

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
  Spread spread;  // null: the threads of OpenMP
  void* pool;
  // What an operator says of its pooled rows; all of this may be null or 0. `rows`: pooled rows of a head, levels by level.
  const float *pooled_key, *pooled_value;      // (b, g, rows, d) and (b, g, rows, e): rows that were made before, in place of means
  float *grad_pooled_key, *grad_pooled_value;  // their gradients
  const float *within, *share;                 // weighted means: of a token in its finest row (b, g, sides, blocks * m), and of a row in
                                               // the row above it (b, g, sides, rows)
  const float* row_bias;                       // (b, g, sides, rows), to the base of 2: what a row's bias has besides its count
  const float* slopes;                         // (h), to the base of 2: scores lose so much a token of distance
  const float* tables;                         // (h, levels + 1, table) by query - key, to the base of 2: for tokens, and for the rows
                                               // of each level by their first token; distance 0 at `table_zero`
  float* grad_tables;                          // (b, h, levels + 1, table)
  int64_t table, table_zero;
  int32_t whole;   // a pooled row covers its group, not its part of it
  int32_t closed;  // the log-sum-exp is of what is met here, nothing else
};
}

namespace {

// Where the parts of a level stand among the pooled rows: row r of group j of level l at start[l] + p * j + r.
struct Levels {
  int64_t blocks, count = 0, rows = 0, part;  // part: tokens of a finest part; of a block where there are no levels
                                              // rows: of one side, with room for whole parents
  std::vector<int64_t> start, groups;
  Levels(int64_t n, int64_t m, int64_t p) {  // no levels when p is 0
    blocks = (n + m - 1) / m;
    while (p && (blocks - 1) >> (count + 1)) count++;
    for (int64_t l = 0; l < count; l++) {
      start.push_back(rows);
      groups.push_back((blocks + (1ll << l) - 1) >> l);
      rows += 2 * p << (count - l);
    }
    part = count ? m / p : m;
  }
};

// Sets of pooled rows: weighted towards the queries behind a group, and towards those before it.
static inline int64_t side_count(const BlockArgs& a) { return a.within && !a.causal ? 2 : 1; }

// What all query heads of one key head share: pooled rows of each side, how many tokens each stands for and the bias that follows,
// where the sinks are.
struct Head {
  Floats key, value, counts, bias;
  std::vector<int64_t> sinks;
  std::vector<uint8_t> pooled;  // whether a token takes part in pooled rows
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

// A stretch of slots that a tile of queries meets, in fours; a slot of it that is not met has a bias of -inf.
struct Run {
  int64_t slot, rows;
  int64_t own = -1;  // of the block itself under a causal mask: which of its tokens is the first row; a query sees none after itself
  int vector = 0;    // queries before this vector of the tile meet nothing of it
};

// Calls work(vectors) with how many vectors of a tile meet a stretch, known to the compiler.
template <typename Work>
void by_vectors(const Run& run, const Work& work) {
  static_assert(NV == 2);
  if (run.vector) work(std::integral_constant<int, 1>());
  else work(std::integral_constant<int, 2>());
}

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
  const int64_t places, stride, sinks, total, dk, dv;  // dk, dv: channels filled up to whole vectors
  Floats k, v, key_rows, value_packed, bias;  // key_rows: as v; value_packed: as k, for gradients only
  std::vector<int64_t> held;  // what stands at a slot: a token, or n + a pooled row; -1 nothing
  std::vector<int64_t> from;  // where its distance to a query is counted from, given that it is met
  std::vector<int64_t> level;  // 0: a token; 1 and on: a pooled row

  Slots(const BlockArgs& a, const Levels& levels, const Head& head, Rows<T> key, Rows<T> value, const uint8_t* real)
      : a(a), levels(levels), head(head), key(key), value(value), real(real), places(a.causal ? 2 : 3), stride(round_up(a.m, G)),
        sinks(round_up(head.sinks.size(), 4)),
        total(round_up(places * stride + sinks + levels.count * places * a.p, G)), dk(round_up(a.d, W)), dv(round_up(a.e, W)), k(total * a.d), v(total * dv),
        key_rows(total * dk), bias(total, NEG_INF), held(total, -1), from(total), level(total), stale(total / 4) {
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
      if (a.causal && j == i) own = {place, round_up(rows, 4)};
      else runs.push_back({place, round_up(rows, 4)});
    }
    int64_t slot = places * stride;
    for (size_t s = 0; s < head.sinks.size(); s++) {
      const int64_t apart = i - head.sinks[s] / a.m;
      put(slot + s, head.sinks[s], leave);
      bias[slot + s] = (a.causal ? apart > 1 : std::abs(apart) > 1) ? 0.f : NEG_INF;
    }
    slot += sinks;
    std::fill(bias.begin() + slot, bias.end(), NEG_INF);
    // Of the children of the parent's neighbours those that do not lie beside the block's own group, which belong to a finer
    // level: one far on either side, and one in turn. Those of a kind stand side by side, so that whole fours are met.
    for (int64_t l = 0; l < levels.count; l++, slot += a.p) {
      const int64_t first = i >> (l + 1) << 1, second = (i >> l) & 1, apart = levels.count * a.p;
      far(l, slot, first - 2, true, leave);
      if (!a.causal) far(l, slot + apart, first + 3, false, leave);
      if (second) far(l, slot + (places - 1) * apart, first - 1, true, leave);
      else if (!a.causal) far(l, slot + 2 * apart, first + 2, false, leave);
    }
    pack();
    // Of sinks and pooled rows the fours that hold a slot that is met.
    const size_t near = runs.size();
    for (int64_t at = places * stride; at < total; at += 4) {
      bool met = false;
      for (int r = 0; r < 4; r++) met |= bias[at + r] > NEG_INF;
      if (!met) continue;
      if (runs.size() > near && runs.back().slot + runs.back().rows == at) runs.back().rows += 4;
      else runs.push_back({at, 4});
    }
  }

  // What the tile from `first` on of the block after i will read: its queries, and with `new_keys` as many of the keys and values
  // that come near then.
  void announce(int64_t i, int64_t first, bool new_keys, Rows<T> query, Ahead& ahead) const {
    ahead.clear();
    const auto add = [&](Rows<T> rows, int64_t block) {
      const int64_t token = block * a.m + first, count = std::min({(int64_t)QT, a.m - first, a.n - token});
      if (count > 0) ahead.add(rows[token], rows.stride, count, rows.channels);
    };
    add(query, i + 1);
    if (!new_keys) return;
    const int64_t entering = i + (a.causal ? 1 : 2);
    add(key, entering), add(value, entering);
  }

  // What the tile of queries from `first` of the block on meets. The first stretch is met by all of them.
  const std::vector<Run>& met(int64_t first) {
    tile.clear();
    for (int j = 0; j < NV && own.rows; j++) {
      const int64_t from = j ? first + j * W : 0, to = std::min(own.rows, first + (j + 1) * W);
      if (from < to) tile.push_back({own.slot + from, to - from, from, j});
    }
    tile.insert(tile.end(), runs.begin(), runs.end());
    return tile;
  }

 private:
  std::vector<Run> runs, tile;
  Run own = {0, 0};
  std::vector<uint8_t> stale;

  // Group `group` of level l, if there is one. Its distance to a query is that of the nearest token a row covers, or in tables by
  // distance of the first.
  template <typename Leave>
  void far(int64_t l, int64_t slot, int64_t group, bool behind, Leave leave) {
    if (group < 0 || group >= levels.groups[l]) return;
    const int64_t side = behind ? 0 : (side_count(a) - 1) * levels.rows, cover = a.whole ? a.m << l : (a.m << l) / a.p;
    for (int64_t r = 0, row = side + levels.start[l] + group * a.p; r < a.p; r++, row++) {
      put(slot + r, a.n + row, leave);
      bias[slot + r] = head.bias[row];
      const int64_t first = group * (a.m << l) + (a.whole ? 0 : r * cover);
      from[slot + r] = std::min(a.n, a.slopes && behind ? first + cover : first + 1) - 1;
      level[slot + r] = l + 1;
    }
  }

  template <typename Leave>
  void put(int64_t slot, int64_t id, Leave leave) {
    if (held[slot] == id) return;
    if (held[slot] >= 0) leave(slot, held[slot]);
    held[slot] = id;
    if (id >= a.n) {
      keep(slot, &head.key[(id - a.n) * a.d], &head.value[(id - a.n) * a.e]);
    } else if (from[slot] = id; !real || real[id]) {
      keep(slot, key[id], value[id]);
    } else {  // hidden by its bias, but whatever stands at padding must not become NaN
      const Floats nothing(std::max(a.d, a.e), 0.f);
      keep(slot, nothing.data(), nothing.data());
    }
  }

  template <typename S>
  void keep(int64_t slot, const S* from_key, const S* from_value) {
    widen_row(from_key, a.d, &key_rows[slot * dk]);
    widen_row(from_value, a.e, &v[slot * dv]);
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

// A tile of queries, transposed and times a factor: (channel, query), 0 past the end.
template <typename T>
void transpose_in(const T* from, int64_t stride, int64_t queries, int64_t channels, float factor, float* rows, float* to) {
  for (int64_t q = 0; q < QT; q += 4) {
    if constexpr (std::is_same_v<T, float>)
      if (q + 4 <= queries) {
        transpose_rows(from + q * stride, stride, channels, to + q, QT);
        continue;
      }
    for (int64_t r = 0; r < 4; r++)
      if (q + r < queries) widen_row(from + (q + r) * stride, channels, rows + r * channels);
      else std::fill_n(rows + r * channels, channels, 0.f);
    transpose_rows(rows, channels, channels, to + q, QT);
  }
  scale_row(to, channels * QT, factor);
}

// The way back: (channel, query) to rows, each times a factor of its query. `from` holds whole groups of channels.
template <typename T>
void transpose_out(float* from, int64_t stride, int64_t queries, int64_t channels, const float* factor, float* rows, T* to) {
  const int64_t wide = round_up(channels, 4);
  if (factor)
    for (int64_t c = 0; c < channels; c++)
      for (int j = 0; j < NV; j++) store(from + c * QT + j * W, load(from + c * QT + j * W) * load(factor + j * W));
  if constexpr (std::is_same_v<T, float>)
    if (wide == channels) {
      for (int64_t c = 0; c < wide; c += 4) transpose_rows(from + c * QT, QT, queries, to + c, stride);
      return;
    }
  for (int64_t c = 0; c < wide; c += 4) transpose_rows(from + c * QT, QT, QT, rows + c, wide);
  for (int64_t q = 0; q < queries; q++) narrow_row(rows + q * wide, channels, to + q * stride);
}

// The queries of a tile, numbered.
constexpr float LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
static_assert(QT <= 32);

// What scores of one head gain by distance, for the queries of a tile from `token` on.
struct ByDistance {
  float slope = 0.f;
  const float* table = nullptr;  // where the first query's distance to token 0 stands, for tokens
  int64_t token, level;          // level: from a table to the next

  ByDistance(const BlockArgs& a, int64_t levels, int64_t head, int64_t token) : token(token), level(a.table) {
    if (a.slopes) slope = a.slopes[head];
    if (a.tables) table = a.tables + head * (levels + 1) * a.table + a.table_zero + token;
  }

  // Adds to the vectors of a row of scores from `lane` on, of what stands at `from`.
  void add(float* row, int64_t lane, int64_t from, int64_t at_level) const {
    for (int64_t q = lane; q < QT; q += W) {
      const vec distance = load(LANES + q) + (float)(token - from);
      const vec gain = table ? load(table + at_level * level - from + q) : vmax(distance, -distance) * -slope;
      store(row + q, load(row + q) + gain);
    }
  }
};

// Scores (slot, query) of a tile with the bias of its slots and the causal mask of the block's own.
template <typename T>
void score(const Slots<T>& slots, const std::vector<Run>& runs, const float* queries, int64_t first, float* scores, Ahead& ahead,
           const ByDistance& by_distance) {
  const bool by = by_distance.slope != 0.f || by_distance.table;
  for (const Run& run : runs) {
    const int64_t lane = run.vector * W;
    by_vectors(run, [&](auto v) {
      product_packed<v.value>(slots.k.data(), run.slot, queries + lane, scores + run.slot * QT + lane, run.rows, slots.a.d, [&] { ahead.some(); });
    });
    for (int64_t r = 0; r < run.rows; r++) {
      float* row = scores + (run.slot + r) * QT;
      const float bias = slots.bias[run.slot + r];
      if (bias != 0.f)
        for (int j = run.vector; j < NV; j++) store(row + j * W, load(row + j * W) + bias);
      if (by) by_distance.add(row, lane, slots.from[run.slot + r], slots.level[run.slot + r]);
      if (run.own < 0) continue;
      const vec hidden = splat((float)(run.own + r - first));
      for (int j = run.vector; j < NV; j++) store(row + j * W, load(LANES + j * W) < hidden ? splat(NEG_INF) : load(row + j * W));
    }
  }
}

// Sums over what a tile meets of rows, `wide` apart, times numbers (slot, query): (channel, query). Sums of some channels stay in registers
// over all stretches.
static inline void sum_rows(const std::vector<Run>& runs, const float* rows, int64_t wide, int64_t channels, const float* by, float* out) {
  for (int64_t c = 0; c < channels; c += R) {
    vec total[R][NV] = {};
    for (const Run& run : runs)
      by_vectors(run, [&](auto v) {
        add_products<1, NV - v.value>(rows + run.slot * wide + c, wide, by + run.slot * QT, QT, run.rows, total);
      });
    for (int r = 0; r < R; r++)
      for (int j = 0; j < NV; j++) store(out + (c + r) * QT + j * W, total[r][j]);
  }
}

// Softmax of a tile's scores without the division: weights in place, their sums and what they were taken over, and their
// product with the values, (channel, query).
template <typename T>
void weigh(const Slots<T>& slots, const std::vector<Run>& runs, float* scores, float* out, vec* most, vec* sum) {
  vec top[NV], weights[NV] = {};  // of our own, so that they stay in registers
  for (int j = 0; j < NV; j++) top[j] = splat(NEG_INF);
  for (const Run& run : runs)
    by_vectors(run, [&](auto v) {
      for (const float *row = scores + run.slot * QT, *end = row + run.rows * QT; row < end; row += QT)
        for (int j = NV - v.value; j < NV; j++) top[j] = vmax(top[j], load(row + j * W));
    });
  for (int j = 0; j < NV; j++) top[j] = top[j] == NEG_INF ? vec{} : top[j];
  for (const Run& run : runs)
    by_vectors(run, [&](auto v) { make_weights<NV - v.value>(scores + run.slot * QT, run.rows, top, weights); });
  for (int j = 0; j < NV; j++) most[j] = top[j], sum[j] = weights[j];
  sum_rows(runs, slots.v.data(), slots.dv, slots.a.e, scores, out);
}

}  // namespace
