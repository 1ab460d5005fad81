// Softmax attention of every query to a range of a list of keys, and to a few keys besides, forward and backward: leaves of trees,
// windows with sinks.
//
// The keys of a list are packed once, in the list's order. Queries are sorted by where their range starts and cut into tiles
// of queries whose ranges overlap; a tile is transposed as in fma.cpp, so that every step of the softmax is a vector
// operation over queries. Keys are taken in chunks counted from the tile's first key, so that neither where a list lies in
// memory nor what comes after a query changes the order of its sums.
//
// Sizes: b batch, g key heads, h query heads, n queries, m keys, d channels of query and key, e of value.
#include "ranges.h"

namespace {

// What a tile has summed so far: values (channel, query), and weights, over `most`.
struct Sums {
  vec most[NV], sum[NV];
  bool any = false;
};

struct Buffers {
  Floats rows, queries, scores, out;
  Ahead ahead;
  explicit Buffers(const RangeArgs& a)
      : rows(QT * round_up(std::max(a.d, a.e), R)), queries(a.d * QT), scores((CHUNK + 2 * G) * QT), out(round_up(a.e, R) * QT) {}
};

// Meets `rows` rows, whole groups, from `slot` on; `hide(r, scores)` hides what row r does not show.
template <typename Hide>
static inline void meet(const RangeArgs& a, const Keys& keys, int64_t slot, int64_t rows, Buffers& b, Sums& sums, Hide hide) {
  product_packed(keys.key.data(), slot, b.queries.data(), b.scores.data(), rows, a.d, [&] { b.ahead.some(); });
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
  vec over[NV], total[NV];  // of our own, so that they stay in registers
  for (int j = 0; j < NV; j++) sums.most[j] = top[j], over[j] = top[j] == NEG_INF ? vec{} : top[j], total[j] = sums.sum[j];
  make_weights<0>(b.scores.data(), rows, over, total);
  for (int j = 0; j < NV; j++) sums.sum[j] = total[j];
  product_transposed(&keys.value[slot * keys.dv], keys.dv, b.scores.data(), b.out.data(), rows, a.e, sums.any);
  sums.any = true;
}

// Rows of a tile's queries, times a factor, 0 past the end; and the same transposed.
template <typename T>
void take_queries(const RangeArgs& a, const Tiled& tiled, float factor, float* rows, int64_t stride, float* transposed) {
  std::fill_n(rows, QT * stride, 0.f);
  for (int64_t i = 0; i < tiled.count; i++) {
    widen_row(tiled.query<T>(i), a.d, rows + i * stride);
    scale_row(rows + i * stride, a.d, factor);
  }
  for (int64_t i = 0; i < QT; i += 4) transpose_rows(rows + i * stride, stride, a.d, transposed + i, QT);
}

template <typename T>
void attend(const RangeArgs& a, const Keys& keys, const Keys& extra, const Queries& queries, int64_t t, Buffers& b) {
  const Tiled tiled(a, keys, queries, t);
  take_queries<T>(a, tiled, a.scale * LOG2E, b.rows.data(), a.d, b.queries.data());
  tiled.announce<T>(b.ahead);
  Sums sums;
  for (int j = 0; j < NV; j++) sums.most[j] = splat(NEG_INF), sums.sum[j] = vec{};
  tiled.walk(keys, extra, [&](const Keys& met, int64_t slot, int64_t rows, const auto& hide) { meet(a, met, slot, rows, b, sums, hide); });

  alignas(64) float by[QT] = {};
  for (int i = 0; i < tiled.count; i++) {
    const float weight = sums.sum[i / W][i % W];
    by[i] = weight > 0.f ? 1.f / weight : 0.f;
    a.log_sum_exp[tiled.at(i)] = weight > 0.f ? sums.most[i / W][i % W] * LN2 + std::log(weight) : NEG_INF;
  }
  const int64_t wide = round_up(a.e, 4);
  for (int64_t c = 0; c < wide; c += 4) transpose_rows(&b.out[c * QT], QT, QT, &b.rows[c], wide);
  for (int64_t i = 0; i < tiled.count; i++) {
    float* row = &b.rows[i * wide];
    scale_row(row, a.e, by[i]);
    narrow_row(row, a.e, a.out + tiled.at(i) * a.e);
  }
}

// Gradients of kept rows from `first` on, of those that some tiles that follow each other meet, and of the keys besides.
struct Gradients {
  int64_t first;
  Floats key, value, of_key, extra_key, extra_value;
};

struct BackwardBuffers {
  Floats query_rows, grad_rows, queries, grads, weights, slopes, to_query;
  explicit BackwardBuffers(const RangeArgs& a)
      : query_rows(QT * round_up(a.d, W)), grad_rows(QT * round_up(a.e, W)), queries(a.d * QT), grads(a.e * QT), weights((CHUNK + 2 * G) * QT),
        slopes(weights.size()), to_query(round_up(a.d, R) * QT) {}
};

// Gradients of one tile: its queries' are added where they belong, those of what it meets to `to`.
template <typename T>
void attend_backward(
    const RangeArgs& a, const Keys& keys, const Keys& extra, const Queries& queries, int64_t t, BackwardBuffers& b, Gradients& to) {
  const Tiled tiled(a, keys, queries, t);
  const int64_t dk = keys.dk, dv = keys.dv;
  // Scores as the forward pass makes them, so that weights add up to 1; keys' gradients are sums over queries times the scale.
  take_queries<T>(a, tiled, a.scale * LOG2E, b.query_rows.data(), dk, b.queries.data());
  for (int64_t i = 0; i < tiled.count; i++) {
    widen_row(tiled.query<T>(i), a.d, &b.query_rows[i * dk]);
    scale_row(&b.query_rows[i * dk], a.d, a.scale);
  }
  std::fill(b.grad_rows.begin(), b.grad_rows.end(), 0.f);
  alignas(64) float lse[QT], slope[QT] = {};
  for (int64_t i = 0; i < QT; i++) {
    lse[i] = std::numeric_limits<float>::infinity();  // weights of 0 where there is no query, or it met nothing
    if (i >= tiled.count) continue;
    const int64_t at = tiled.at(i);
    if (a.log_sum_exp[at] != NEG_INF) lse[i] = a.log_sum_exp[at] * LOG2E;
    slope[i] = a.slope[at];
    std::copy(a.grad_out + at * a.e, a.grad_out + (at + 1) * a.e, &b.grad_rows[i * dv]);
  }
  for (int64_t i = 0; i < QT; i += 4) transpose_rows(&b.grad_rows[i * dv], dv, a.e, &b.grads[i], QT);

  vec of_query[NV] = {};
  bool any = false;
  tiled.walk(keys, extra, [&](const Keys& met, int64_t slot, int64_t rows, const auto& hide) {
    float *p = b.weights.data(), *s = b.slopes.data();
    product_packed(met.key.data(), slot, b.queries.data(), p, rows, a.d);
    product_packed(met.value_packed.data(), slot, b.grads.data(), s, rows, a.e);
    for (int64_t r = 0; r < rows; r++) {
      hide(r, p + r * QT);
      for (int j = 0; j < NV; j++) {
        float *weight = p + r * QT + j * W, *grad = s + r * QT + j * W;
        const vec x = exp2v(load(weight) - load(lse + j * W)), y = (load(grad) - load(slope + j * W)) * x;
        store(weight, x), store(grad, y);
        of_query[j] += y;
      }
    }
    const bool besides = &met == &extra;
    float* of_keys = besides ? to.extra_key.data() : &to.key[(slot - to.first) * dk];
    float* of_values = besides ? to.extra_value.data() : &to.value[(slot - to.first) * dv];
    product_wide(p, b.grad_rows.data(), of_values, dv, rows, dv);
    product_wide(s, b.query_rows.data(), of_keys, dk, rows, dk);
    product_transposed(&met.key_rows[slot * dk], dk, s, b.to_query.data(), rows, a.d, any);
    any = true;
    if (a.of_key && !besides)
      for (int64_t r = 0; r < rows; r += 4) {
        vec four_rows[4];
        for (int k = 0; k < 4; k++) four_rows[k] = load(s + (r + k) * QT) + load(s + (r + k) * QT + W);
        four* sum = (four*)&to.of_key[slot - to.first + r];
        *sum += sum4(four_rows);
      }
  });
  if (!any) return;
  const int64_t wide = round_up(a.d, 4);
  Floats& rows = b.query_rows;  // no longer needed
  for (int64_t c = 0; c < wide; c += 4) transpose_rows(&b.to_query[c * QT], QT, QT, &rows[c], wide);
  for (int64_t i = 0; i < tiled.count; i++) {
    scale_row(&rows[i * wide], a.d, a.scale);
    add_row(&rows[i * wide], a.d, a.grad_query + tiled.at(i) * a.d);
    if (a.of_query) a.of_query[tiled.at(i)] += of_query[i / W][i % W];
  }
}

// Gradients of one key head. Its tiles are cut into stretches, as many on any number of threads, whose sums are added in order.
template <typename T>
void backward_unit(const RangeArgs& a, const Keys& keys, const Keys& extra, const Queries& queries) {
  static_assert(NV == 2);
  const int64_t tiles = queries.tiles.size() - 1, dk = keys.dk, dv = keys.dv, kept = keys.groups.size() * G;
  std::vector<Gradients> parts;
  int64_t each;
  const auto slots_of = [&](int64_t part, int64_t* first, int64_t* stop) {
    *first = kept, *stop = 0;
    for (int64_t t = part * each; t < std::min(tiles, (part + 1) * each); t++)
      for (int64_t i = queries.tiles[t]; i < queries.tiles[t + 1]; i++) {
        if (queries.stop[i] <= queries.start[i]) continue;
        *first = std::min(*first, keys.slot[queries.start[i] / G] * G);
        *stop = std::max(*stop, keys.slot[(queries.stop[i] - 1) / G] * G + G);
      }
    *stop = std::max(*stop, *first);
  };
  // As few as keep the sums of all stretches small: wide ranges meet the same keys in every one of them.
  for (int64_t wanted = 16;; wanted /= 2) {
    each = std::max<int64_t>(1, (tiles + wanted - 1) / wanted);
    int64_t total = 0, first, stop;
    for (int64_t part = 0; part * each < tiles; part++) slots_of(part, &first, &stop), total += stop - first;
    if (wanted <= 4 || total <= 4 * kept) break;
  }
  parts.resize((tiles + each - 1) / each);
#pragma omp parallel num_threads(a.threads)
  {
    BackwardBuffers buffers(a);
#pragma omp for schedule(dynamic)
    for (size_t part = 0; part < parts.size(); part++) {
      Gradients& to = parts[part];
      int64_t stop;
      slots_of(part, &to.first, &stop);
      to.key.assign((stop - to.first) * dk, 0.f), to.value.assign((stop - to.first) * dv, 0.f);
      if (a.of_key) to.of_key.assign(stop - to.first, 0.f);
      to.extra_key.assign(round_up(a.s, G) * dk, 0.f), to.extra_value.assign(round_up(a.s, G) * dv, 0.f);
      for (int64_t t = part * each; t < std::min<int64_t>(tiles, (part + 1) * each); t++) attend_backward<T>(a, keys, extra, queries, t, buffers, to);
    }
    // A key is once in each list; the lists come one after the other.
    for (int64_t list = 0; list < a.lists; list++)
#pragma omp for schedule(static)
      for (int64_t row = list * a.m; row < (list + 1) * a.m; row++) {
        if (keys.slot[row / G] < 0) continue;
        const int64_t slot = keys.slot[row / G] * G + row % G, token = keys.position[slot];
        if (token < 0) continue;
        for (const Gradients& from : parts) {
          const int64_t at = slot - from.first;
          if (at < 0 || (at + 1) * dk > (int64_t)from.key.size()) continue;
          add_row(&from.key[at * dk], a.d, a.grad_key + (keys.unit * a.m + token) * a.d);
          add_row(&from.value[at * dv], a.e, a.grad_value + (keys.unit * a.m + token) * a.e);
          if (a.of_key) a.of_key[(keys.unit * a.m + token) * a.lists + list] += from.of_key[at];
        }
      }
  }
  for (int64_t r = 0; r < a.s; r++)
    for (const Gradients& from : parts) {
      if (extra.position[r] < 0) continue;
      const int64_t at = keys.unit * a.m + extra.position[r];
      add_row(&from.extra_key[r * dk], a.d, a.grad_key + at * a.d);
      add_row(&from.extra_value[r * dv], a.e, a.grad_value + at * a.e);
    }
}

template <typename T>
int run(const RangeArgs& a) {
  Keys keys, extra;
  keys.rows = a.lists * a.m, extra.rows = a.s, keys.dk = extra.dk = round_up(a.d, W), keys.dv = extra.dv = round_up(a.e, W);
  keys.slot.resize(keys.rows / G + 1);
  for (int64_t group = 0; group * G < a.s; group++) extra.groups.push_back(group);
  Queries queries;
  for (int64_t unit = 0; unit < a.b * a.g; unit++) {
    keys.unit = extra.unit = unit;
    sort_queries(a, unit, keys.rows, queries);
    const int64_t tiles = queries.tiles.size() - 1;
    keys.groups.clear();
    std::fill(keys.slot.begin(), keys.slot.end(), -1);
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
    if (a.grad_out) {
      backward_unit<T>(a, keys, extra, queries);
      continue;
    }
    const int64_t share = std::max<int64_t>(4, tiles / (8 * a.threads));  // tiles that a thread takes at a time
    parallel(a, (tiles + share - 1) / share, [&](int64_t task) {
      Buffers buffers(a);
      for (int64_t t = task * share; t < std::min(tiles, (task + 1) * share); t++) attend<T>(a, keys, extra, queries, t, buffers);
    });
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
