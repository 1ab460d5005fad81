// Softmax attention of every query to a range of a list of keys, and to a few keys besides, forward: leaves of trees, windows
// with sinks.
//
// The keys of a list are packed once, in the list's order. Queries are sorted by where their range starts and cut into tiles
// of queries whose ranges overlap; a tile is transposed as in fma.cpp, so that every step of the softmax is a vector
// operation over queries. Keys are taken in chunks counted from the tile's first key, so that neither where a list lies in
// memory nor what comes after a query changes the order of its sums.
//
// Sizes: b batch, g key heads, h query heads, n queries, m keys, d channels of query and key, e of value.
#include "simd.h"

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
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of b, head, token
  int64_t b, h, g, n, m, d, e, lists, s;
  int32_t dtype, threads;
  float scale;
};
}

namespace {

constexpr int64_t CHUNK = 256;  // keys between two corrections of the running sums

// The keys of one key head in the order of its lists, in whole groups: packed, values row by row, and their positions. Only
// groups that are in a range are kept; groups that follow each other stay side by side.
struct Keys {
  int64_t unit, rows, dv;
  Floats key, value;
  std::vector<int32_t> position;
  std::vector<int64_t> groups;  // that are kept
  std::vector<int64_t> slot;    // where a group is kept
};

// Fills `keys`, whose rows stand at `position(row)`, below 0 for what is not met; false when a number is not finite: 0 times infinity and 0
// times NaN are NaN.
template <typename T, typename Position>
bool pack(const RangeArgs& a, Keys& keys, Position position) {
  const int64_t batch = keys.unit / a.g, head = keys.unit % a.g, dk = round_up(a.d, W);
  const T* key = (const T*)a.key + batch * a.key_strides[0] + head * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + head * a.value_strides[1];
  const size_t kept = keys.groups.size() * G;
  if (keys.position.size() < kept) keys.key.resize(kept * a.d), keys.value.resize(kept * keys.dv), keys.position.resize(kept);
  bool finite = true;
#pragma omp parallel num_threads(a.threads) reduction(&& : finite)
  {
    Floats rows(G * dk, 0.f);
#pragma omp for schedule(static)
    for (size_t group = 0; group < keys.groups.size(); group++) {
      vec odd = {};
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
        for (int64_t c = 0; c < a.d; c++) k_to[c] = widen(k[c]);
        for (int64_t c = 0; c < a.e; c++) v_to[c] = widen(v[c]);
        for (int64_t c = 0; c < dk; c += W) odd += load(k_to + c) * splat(0.f);
        for (int64_t c = 0; c < keys.dv; c += W) odd += load(v_to + c) * splat(0.f);
      }
      for (int j = 0; j < W; j++) finite = finite && odd[j] == 0.f;
      for (int64_t r = 0; r < G; r += 4) transpose_rows(&rows[r * dk], dk, a.d, &keys.key[packed(group * G + r, 0, a.d)], G);
    }
  }
  return finite;
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

static inline veci lanes(const int32_t* of, int j) { return *(const veci*)(of + j * W); }

// What a tile has summed so far: values (channel, query), and weights, over `most`.
struct Sums {
  vec most[NV], sum[NV];
  bool any = false;
};

struct Buffers {
  Floats rows, queries, scores, out;
  explicit Buffers(const RangeArgs& a)
      : rows(QT * round_up(std::max(a.d, a.e), R)), queries(a.d * QT), scores((CHUNK + 2 * G) * QT), out(round_up(a.e, R) * QT) {}
};

static inline void hide_row(float* scores) {
  for (int j = 0; j < NV; j++) store(scores + j * W, splat(NEG_INF));
}

// Meets `rows` rows, whole groups, from `slot` on; `hide(r, scores)` hides what row r does not show.
template <typename Hide>
static inline void meet(const RangeArgs& a, const Keys& keys, int64_t slot, int64_t rows, Buffers& b, Sums& sums, Hide hide) {
  product_packed(keys.key.data(), slot, b.queries.data(), b.scores.data(), rows, a.d);
  vec top[NV];
  for (int j = 0; j < NV; j++) top[j] = sums.most[j];
  for (int64_t r = 0; r < rows; r++) {
    float* scores = &b.scores[r * QT];
    hide(r, scores);
    for (int j = 0; j < NV; j++) top[j] = vmax(top[j], load(scores + j * W));
  }
  if (sums.any) {  // what was summed so far was taken over another maximum
    vec by[NV];
    for (int j = 0; j < NV; j++) {
      by[j] = top[j] == NEG_INF ? vec{} : exp2v(sums.most[j] - top[j]);
      sums.sum[j] *= by[j];
    }
    for (int64_t c = 0; c < a.e; c++)
      for (int j = 0; j < NV; j++) store(&b.out[c * QT + j * W], load(&b.out[c * QT + j * W]) * by[j]);
  }
  vec over[NV];
  for (int j = 0; j < NV; j++) sums.most[j] = top[j], over[j] = top[j] == NEG_INF ? vec{} : top[j];
  for (int64_t r = 0; r < rows; r++)
    for (int j = 0; j < NV; j++) {
      const vec weight = exp2v(load(&b.scores[r * QT + j * W]) - over[j]);
      store(&b.scores[r * QT + j * W], weight);
      sums.sum[j] += weight;
    }
  product_transposed(&keys.value[slot * keys.dv], keys.dv, b.scores.data(), b.out.data(), rows, a.e, sums.any);
  sums.any = true;
}

template <typename T>
void attend(const RangeArgs& a, const Keys& keys, const Keys& extra, const Queries& queries, int64_t first, int64_t count, Buffers& b) {
  const int64_t batch = keys.unit / a.g, head = keys.unit % a.g * (a.h / a.g);
  const auto at = [&](int64_t i) { return (batch * a.h + head) * a.n + queries.id[first + i]; };
  Tile tile = {};
  tile.from = tile.all_to = keys.rows;
  for (int64_t i = 0; i < QT; i++) {
    float* row = &b.rows[i * a.d];
    if (i >= count) {
      std::fill(row, row + a.d, 0.f);
      continue;
    }
    const int64_t id = queries.id[first + i], start = queries.start[first + i], stop = queries.stop[first + i];
    tile.start[i] = (int32_t)start, tile.stop[i] = (int32_t)stop;
    if (a.low) tile.low[i] = (int32_t)a.low[at(i)], tile.high[i] = (int32_t)a.high[at(i)];
    if (a.s) tile.extra_low[i] = (int32_t)a.extra_low[at(i)], tile.extra_high[i] = (int32_t)a.extra_high[at(i)];
    tile.from = std::min(tile.from, start), tile.to = std::max(tile.to, stop);
    tile.all_from = std::max(tile.all_from, start), tile.all_to = std::min(tile.all_to, stop);
    const T* query = (const T*)a.query + batch * a.query_strides[0] + (head + id / a.n) * a.query_strides[1] + id % a.n * a.query_strides[2];
    for (int64_t c = 0; c < a.d; c++) row[c] = widen(query[c]) * (a.scale * LOG2E);
  }
  for (int64_t i = 0; i < QT; i += 4) transpose_rows(&b.rows[i * a.d], a.d, a.d, &b.queries[i], QT);

  Sums sums;
  for (int j = 0; j < NV; j++) sums.most[j] = splat(NEG_INF), sums.sum[j] = vec{};
  if (a.s)
    meet(a, extra, 0, round_up(a.s, G), b, sums, [&](int64_t r, float* scores) {
      const int32_t place = extra.position[r];
      if (place < 0) return hide_row(scores);
      for (int j = 0; j < NV; j++) {
        const veci seen = (lanes(tile.extra_low, j) <= place) & (lanes(tile.extra_high, j) > place);
        store(scores + j * W, seen ? load(scores + j * W) : splat(NEG_INF));
      }
    });
  for (int64_t chunk = tile.from; chunk < tile.to; chunk += CHUNK) {
    const int64_t end = std::min(chunk + CHUNK, tile.to), begin = chunk / G * G, slot = keys.slot[begin / G] * G;
    meet(a, keys, slot, round_up(end - begin, G), b, sums, [&](int64_t r, float* scores) {
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

  alignas(64) float lse[QT] = {}, by[QT] = {};
  for (int i = 0; i < count; i++) {
    const float weight = sums.sum[i / W][i % W];
    by[i] = weight > 0.f ? 1.f / weight : 0.f;
    lse[i] = weight > 0.f ? sums.most[i / W][i % W] * LN2 + std::log(weight) : NEG_INF;
  }
  const int64_t wide = round_up(a.e, 4);
  for (int64_t c = 0; c < wide; c += 4) transpose_rows(&b.out[c * QT], QT, QT, &b.rows[c], wide);
  for (int64_t i = 0; i < count; i++) {
    float* out = a.out + at(i) * a.e;
    for (int64_t c = 0; c < a.e; c++) out[c] = b.rows[i * wide + c] * by[i];
    a.log_sum_exp[at(i)] = lse[i];
  }
}

template <typename T>
int run(const RangeArgs& a) {
  Keys keys, extra;
  keys.rows = a.lists * a.m, extra.rows = a.s, keys.dv = extra.dv = round_up(a.e, W);
  keys.slot.resize(keys.rows / G + 1);
  for (int64_t group = 0; group * G < a.s; group++) extra.groups.push_back(group);
  Queries queries;
  for (int64_t unit = 0; unit < a.b * a.g; unit++) {
    keys.unit = extra.unit = unit;
    sort_queries(a, unit, keys.rows, queries);
    const int64_t tiles = queries.tiles.size() - 1;
    keys.groups.clear();
    for (int64_t t = 0; t < tiles; t++) {
      int32_t to = 0;
      for (int64_t i = queries.tiles[t]; i < queries.tiles[t + 1]; i++) to = std::max(to, queries.stop[i]);
      for (int64_t group = queries.start[queries.tiles[t]] / G; group * G < to; group++)
        if (keys.groups.empty() || keys.groups.back() < group) {
          keys.slot[group] = keys.groups.size();
          keys.groups.push_back(group);
        }
    }
    const int64_t base = unit * keys.rows, first = unit * a.m;
    const uint8_t* hidden = a.hidden ? a.hidden + unit / a.g * a.m : nullptr;
    const auto listed = [&](int64_t row) {
      const int64_t position = a.order ? a.order[base + row] - first : row;
      return hidden && hidden[position] ? -1 : position;
    };
    if (!pack<T>(a, keys, listed)) return 1;
    if (a.s && !pack<T>(a, extra, [&](int64_t row) { return a.extra[unit / a.g * a.s + row]; })) return 1;
#pragma omp parallel num_threads(a.threads)
    {
      Buffers buffers(a);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < tiles; t++)
        attend<T>(a, keys, extra, queries, queries.tiles[t], queries.tiles[t + 1] - queries.tiles[t], buffers);
    }
  }
  return 0;
}

}  // namespace

// 0: done. 1: a key or value that is met is not finite, nothing was written that may be used.
extern "C" int ranges_run(const RangeArgs* args) {
  switch (args->dtype) {
    case 0: return run<float>(*args);
    case 1: return run<bf16>(*args);
    default: return run<_Float16>(*args);
  }
}
