// What attention to ranges of lists shares, forward and backward: arguments, keys in the order of lists, queries in tiles, and what a
// tile meets.
#pragma once
#include "simd.h"
#include "threads.h"

extern "C" {
struct RangeArgs {
  const void *query, *key, *value;
  float *out, *log_sum_exp;     // (b, h, n, e) and (b, h, n), contiguous; 0 and -inf where a query meets nothing
  const int64_t* order;         // rows of keys, counted through batch, heads and keys: `lists` lists of m for every key head;
                                // null: one list, as they stand
  const int64_t *start, *stop;  // (b, h, n) places in `order`
  const uint8_t* hidden;        // (b, m) or null: keys that no range meets
  const int64_t *low, *high;    // (b, h, n) or null: positions of keys that a query's range does not meet, from low to before high
  const int64_t* extra;         // (b, s) positions of keys besides, -1 for none
  const int64_t *extra_low, *extra_high;  // (b, h, n) positions between which a query meets those
  // Backward: what follows is added to `grad_*`. `out` is null then, `log_sum_exp` is read; over all that a query meets.
  const float *grad_out, *slope;            // (b, h, n, e) and (b, h, n), contiguous: dO and dO . o - dlse
  float *grad_query, *grad_key, *grad_value;  // (b, h, n, d), (b, g, m, d), (b, g, m, e), contiguous
  float *of_query, *of_key;                 // (b, h, n), (b, g, m, lists) or null: sums of the gradients of scores
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of b, head, token
  int64_t b, h, g, n, m, d, e, lists, s;
  int32_t dtype, threads;
  float scale;
  Spread spread;  // null: the threads of OpenMP; forward only
  void* pool;
};
int ranges_run(const RangeArgs* args);
}

namespace {

constexpr int64_t CHUNK = 256;   // keys between two corrections of the running sums
constexpr int64_t STRETCH = 32;  // groups of keys that a thread packs at a time

// The keys of one key head in the order of its lists, in whole groups: packed, values row by row, and their positions. Only
// groups that are in a range are kept; groups that follow each other stay side by side.
struct Keys {
  int64_t unit, rows, dk, dv;
  Floats key, value, key_rows, value_packed;  // the last two for gradients only
  std::vector<int32_t> position;
  std::vector<int64_t> groups;  // that are kept
  std::vector<int64_t> slot;    // where a group is kept, -1 nowhere
};

// Fills `keys`, whose rows stand at `position(row)`, below 0 for what is not met; false when a number is not finite: 0 times infinity and 0
// times NaN are NaN.
template <typename T, typename Position>
bool pack(const RangeArgs& a, Keys& keys, Position position) {
  const int64_t batch = keys.unit / a.g, head = keys.unit % a.g, dk = keys.dk;
  const T* key = (const T*)a.key + batch * a.key_strides[0] + head * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + head * a.value_strides[1];
  const size_t kept = keys.groups.size() * G;
  if (keys.position.size() < kept) {
    keys.key.resize(kept * a.d), keys.value.resize(kept * keys.dv), keys.position.resize(kept);
    if (a.grad_out) keys.key_rows.resize(kept * dk), keys.value_packed.resize(kept * a.e);
  }
  std::vector<uint8_t> odd((keys.groups.size() + STRETCH - 1) / STRETCH);
  parallel(a, odd.size(), [&](int64_t stretch) {
    Floats rows(G * dk, 0.f);
    vec odds = {};
    for (size_t group = stretch * STRETCH; group < std::min<size_t>(keys.groups.size(), (stretch + 1) * STRETCH); group++) {
      for (int64_t r = 0; r < G; r++) {
        const int64_t row = keys.groups[group] * G + r, to = group * G + r, token = row < keys.rows ? position(row) : -1;
        float *k_to = &rows[r * dk], *v_to = &keys.value[to * keys.dv];
        keys.position[to] = (int32_t)token;
        if (token < 0) {
          std::fill(k_to, k_to + a.d, 0.f);
          std::fill(v_to, v_to + a.e, 0.f);
          continue;
        }
        const T *k = key + token * a.key_strides[2], *v = value + token * a.value_strides[2];
        widen_row(k, a.d, k_to);
        widen_row(v, a.e, v_to);
        for (int64_t c = 0; c < dk; c += W) odds += load(k_to + c) * splat(0.f);
        for (int64_t c = 0; c < keys.dv; c += W) odds += load(v_to + c) * splat(0.f);
      }
      for (int64_t r = 0; r < G; r += 4) transpose_rows(&rows[r * dk], dk, a.d, &keys.key[packed(group * G + r, 0, a.d)], G);
      if (!a.grad_out) continue;
      std::copy(rows.begin(), rows.end(), &keys.key_rows[group * G * dk]);
      for (int64_t r = group * G; r < (int64_t)(group + 1) * G; r += 4)
        transpose_rows(&keys.value[r * keys.dv], keys.dv, a.e, &keys.value_packed[packed(r, 0, a.e)], G);
    }
    for (int j = 0; j < W; j++) odd[stretch] |= !(odds[j] == 0.f);
  });
  return std::find(odd.begin(), odd.end(), 1) == odd.end();
}

// The queries of one key head that may meet anything, by the start of their range; places are counted from its first list.
struct Queries {
  std::vector<int32_t> id, start, stop;  // id: query head of the key head * n + token
  std::vector<int64_t> tiles;            // first query of every tile, and the number of queries
};

void sort_queries(const RangeArgs& a, int64_t unit, int64_t rows, Queries& to) {
  const auto meets = [&](int64_t at) { return a.stop[at] > a.start[at] || a.s > 0; };
  const int64_t group = a.h / a.g, first = (unit / a.g * a.h + unit % a.g * group) * a.n, base = unit * rows;
  std::vector<int32_t> place(rows + 1, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < group * a.n; i++)
    if (meets(first + i)) place[a.start[first + i] - base]++, count++;
  int32_t sum = 0;
  for (int64_t i = 0; i <= rows; i++) {
    const int32_t here = place[i];
    place[i] = sum, sum += here;
  }
  for (auto* x : {&to.id, &to.start, &to.stop}) x->resize(count);
  const auto meets_nothing = [&](int64_t at) {
    if (a.grad_out) return;
    std::fill(a.out + at * a.e, a.out + (at + 1) * a.e, 0.f);
    a.log_sum_exp[at] = NEG_INF;
  };
  for (int64_t i = 0; i < group * a.n; i++) {
    if (!meets(first + i)) {
      meets_nothing(first + i);
      continue;
    }
    const int32_t at = place[a.start[first + i] - base]++;
    to.id[at] = (int32_t)i, to.start[at] = (int32_t)(a.start[first + i] - base), to.stop[at] = (int32_t)(a.stop[first + i] - base);
  }
  to.tiles.clear();
  int32_t reach = 0;
  for (int64_t i = 0; i < count; i++) {
    if (to.tiles.empty() || i - to.tiles.back() == QT || to.start[i] >= reach) to.tiles.push_back(i), reach = 0;
    reach = std::max({reach, to.stop[i], to.start[i] + 1});
  }
  to.tiles.push_back(count);
}

// A tile of queries: what each meets, one query a lane; lanes that are free meet nothing.
struct Tile {
  alignas(64) int32_t start[QT], stop[QT], low[QT], high[QT], extra_low[QT], extra_high[QT];
  int64_t from, to, all_from, all_to;  // rows that any of them meets, and that all do, as far as ranges tell
};

// Queries of a tile: which they are, and what they meet.
struct Tiled {
  const RangeArgs& a;
  const Queries& queries;
  int64_t batch, head, first, count;  // `head`: the key head's first query head
  Tile tile = {};

  Tiled(const RangeArgs& a, const Keys& keys, const Queries& queries, int64_t t)
      : a(a), queries(queries), batch(keys.unit / a.g), head(keys.unit % a.g * (a.h / a.g)), first(queries.tiles[t]),
        count(queries.tiles[t + 1] - queries.tiles[t]) {
    tile.from = tile.all_to = keys.rows;
    for (int64_t i = 0; i < count; i++) {
      const int64_t start = queries.start[first + i], stop = queries.stop[first + i];
      tile.start[i] = (int32_t)start, tile.stop[i] = (int32_t)stop;
      if (a.low) tile.low[i] = (int32_t)a.low[at(i)], tile.high[i] = (int32_t)a.high[at(i)];
      if (a.s) tile.extra_low[i] = (int32_t)a.extra_low[at(i)], tile.extra_high[i] = (int32_t)a.extra_high[at(i)];
      tile.from = std::min(tile.from, start), tile.to = std::max(tile.to, stop);
      tile.all_from = std::max(tile.all_from, start), tile.all_to = std::min(tile.all_to, stop);
    }
  }

  // Where query i stands among (b, h, n).
  int64_t at(int64_t i) const { return (batch * a.h + head) * a.n + queries.id[first + i]; }

  template <typename T>
  const T* query(int64_t i) const {
    const int64_t id = queries.id[first + i];
    return (const T*)a.query + batch * a.query_strides[0] + (head + id / a.n) * a.query_strides[1] + id % a.n * a.query_strides[2];
  }

  // What will be touched soon, here and there in memory: the rows that this tile gives, and the queries of the next one.
  template <typename T>
  void announce(Ahead& ahead) const {
    ahead.clear();
    for (int64_t i = 0; i < count; i++) ahead.add(a.out + at(i) * a.e, 0, 1, a.e);
    for (int64_t i = count; i < std::min<int64_t>(count + QT, queries.id.size() - first); i++) ahead.add(query<T>(i), 0, 1, a.d);
  }

  // Calls meet(keys, slot, rows, hide) for stretches of rows, whole groups; hide(r, scores) hides what row r of it does not show.
  template <typename Meet>
  void walk(const Keys& keys, const Keys& extra, const Meet& meet) const {
    if (a.s)
      meet(extra, 0, round_up(a.s, G), [&](int64_t r, float* scores) {
        const int32_t place = extra.position[r];
        if (place < 0) return hide_row(scores);
        for (int j = 0; j < NV; j++) {
          const veci seen = (lanes(tile.extra_low, j) <= place) & (lanes(tile.extra_high, j) > place);
          store(scores + j * W, seen ? load(scores + j * W) : splat(NEG_INF));
        }
      });
    for (int64_t chunk = tile.from; chunk < tile.to; chunk += CHUNK) {
      const int64_t end = std::min(chunk + CHUNK, tile.to), begin = chunk / G * G, slot = keys.slot[begin / G] * G;
      meet(keys, slot, round_up(end - begin, G), [&](int64_t r, float* scores) {
        const int32_t row = (int32_t)(begin + r), position = keys.position[slot + r];
        if (row < chunk || row >= end || position < 0) return hide_row(scores);
        if (!a.low && row >= tile.all_from && row < tile.all_to) return;
        for (int j = 0; j < NV; j++) {
          veci seen = (lanes(tile.start, j) <= row) & (lanes(tile.stop, j) > row);
          if (a.low) seen &= (lanes(tile.low, j) > position) | (lanes(tile.high, j) <= position);
          store(scores + j * W, seen ? load(scores + j * W) : splat(NEG_INF));
        }
      });
    }
  }

 private:
  static veci lanes(const int32_t* of, int j) { return *(const veci*)(of + j * W); }
  static void hide_row(float* scores) {
    for (int j = 0; j < NV; j++) store(scores + j * W, splat(NEG_INF));
  }
};

}  // namespace
