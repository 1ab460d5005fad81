// Fast multipole attention on a CPU, forward and backward.
//
// A block of queries meets a short list of rows: near tokens, sinks, pooled rows. They stand in one buffer that is kept from
// block to block: a block lives at the same place while it is near, and the pooled rows of a level change only with the
// parent, so that little is copied. A tile of queries is transposed: scores stand as (row, query), every step of the softmax
// is a vector operation over queries, and keys and values are read as they lie.
//
// Sizes: b batch, g key heads, h query heads, n tokens, d channels of query and key, e of value, m block, p rank.
#include "gradients.h"

namespace {

constexpr int64_t CACHED = 16 << 20;  // bytes that a cache keeps, about

// Sums of the tokens of the finest parts from `from` to before `to`, each times its weight in `within` where there is one. False when a number or a sum is not finite: 0 times infinity
// and 0 times NaN are NaN.
template <typename T>
bool sum_parts(const BlockArgs& a, const Levels& levels, const Head& head, const uint8_t* real, Rows<T> x, int64_t from, int64_t to, float* rows,
               const float* within) {
  const int64_t c = x.channels, part = levels.part;
  Floats token(c), odd(c, 0.f);
  const auto check = [&](const float* row) {
    for (int64_t k = 0; k < c; k++) odd[k] += row[k] * 0.f;
  };
  constexpr int WIDE = 8;  // vectors that are summed side by side, so that a row is read as it lies
  for (int64_t r = from; r < to; r++) {
    const int64_t first = r * part, last = std::min(a.n, first + part);
    float* sums = levels.count && !a.pooled_key ? rows + r * c : nullptr;
    if (sums && !std::memchr(&head.pooled[first], 0, last - first)) {
      const auto add = [&](auto wide, int64_t k) {
        vec sum[wide.value] = {};
        for (int64_t i = first; i < last; i++)
          for (int j = 0; j < wide.value; j++) sum[j] += widen_vec(x[i] + k + j * W) * (within ? within[i] : 1.f);
        for (int j = 0; j < wide.value; j++) store(sums + k + j * W, sum[j]);
      };
      int64_t k = 0;
      for (; k + WIDE * W <= c; k += WIDE * W) add(std::integral_constant<int, WIDE>(), k);
      for (; k + 4 * W <= c; k += 4 * W) add(std::integral_constant<int, 4>(), k);
      for (; k + W <= c; k += W) add(std::integral_constant<int, 1>(), k);
      for (; k < c; k++)
        for (int64_t i = first; i < last; i++) sums[k] += widen(x[i][k]) * (within ? within[i] : 1.f);
    } else {  // some are sinks or padding, or nothing is pooled
      for (int64_t i = first; i < last; i++) {
        if (real && !real[i]) continue;
        widen_row(x[i], c, token.data());
        check(token.data());
        if (sums && head.pooled[i]) add_row(token.data(), c, sums, within ? within[i] : 1.f);
      }
    }
    if (sums) check(sums);
  }
  for (const float sum : odd)
    if (sum != 0.f) return false;
  return true;
}

// The parts of coarser levels, pairs of parts of the level below; then means of all. With shares the parts are means already.
void average(const BlockArgs& a, const Levels& levels, const Head& head, int64_t c, float* rows, const float* share) {
  for (int64_t l = 1; l < levels.count; l++)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++) {
      const int64_t part = levels.start[l - 1] + r;
      add_row(rows + part * c, c, rows + (levels.start[l] + r / 2) * c, share ? share[part] : 1.f);
    }
  for (int64_t r = 0; r < levels.rows && !share; r++) scale_row(rows + r * c, c, 1.f / std::max(1.f, head.counts[r]));
}

// The way back: from gradients of means to those of sums, from the coarsest level down, and from the finest to the tokens.
void spread(const BlockArgs& a, const Levels& levels, const Head& head, int64_t c, float* rows, float* tokens, const float* share,
            const float* within) {
  for (int64_t r = 0; r < levels.rows && !share; r++) scale_row(rows + r * c, c, 1.f / std::max(1.f, head.counts[r]));
  for (int64_t l = levels.count - 1; l > 0; l--)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++) {
      const int64_t part = levels.start[l - 1] + r;
      add_row(rows + (levels.start[l] + r / 2) * c, c, rows + part * c, share ? share[part] : 1.f);
    }
  for (int64_t t = 0; t < a.n && levels.count; t++)
    if (head.pooled[t]) add_row(rows + t / levels.part * c, c, tokens + t * c, within ? within[t] : 1.f);
}

// The shares of rows, and the weights of tokens, on one side of a head; null where means are plain.
const float* shares(const BlockArgs& a, const Levels& levels, int64_t u, int64_t side) {
  return a.share ? a.share + (u * side_count(a) + side) * levels.rows : nullptr;
}
const float* weights_within(const BlockArgs& a, const Levels& levels, int64_t u, int64_t side) {
  return a.within ? a.within + (u * side_count(a) + side) * levels.blocks * a.m : nullptr;
}

void count(const BlockArgs& a, const Levels& levels, int64_t u, Head& head) {
  head.counts.assign(levels.rows, 0.f);
  head.bias.resize(side_count(a) * levels.rows);
  if (!levels.count) return;
  for (int64_t r = 0, first = 0; first < a.n; r++, first += levels.part)
    head.counts[r] = std::accumulate(&head.pooled[first], &head.pooled[0] + std::min(a.n, first + levels.part), 0);
  for (int64_t l = 1; l < levels.count; l++)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
      head.counts[levels.start[l] + r / 2] += head.counts[levels.start[l - 1] + r];
  for (int64_t r = 0; r < levels.rows && a.whole; r += a.p) {
    float* counts = &head.counts[r];
    std::fill_n(counts, a.p, std::accumulate(counts, counts + a.p, 0.f) / a.p);
  }
  for (int64_t r = 0; r < side_count(a) * levels.rows; r++) {
    const float count = head.counts[r % levels.rows], met = a.weighted ? std::log2(count) : 0.f;
    head.bias[r] = count > 0.f ? met + (a.row_bias ? a.row_bias[u * side_count(a) * levels.rows + r] : 0.f) : NEG_INF;
  }
}

template <typename T>
void forward_blocks(const BlockArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g, int64_t from, int64_t to) {
  const T* key = (const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1];
  const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
  Slots<T> slots(a, levels, head, {key, a.key_strides[2], a.d}, {value, a.value_strides[2], a.e}, real);
  Floats queries(a.d * QT), scores(slots.total * QT), out(slots.dv * QT), rows_of_tile(QT * std::max(slots.dk, slots.dv));
  const int64_t group = a.h / a.g;
  Ahead ahead;
  for (int64_t i = from; i < to; i++) {
    slots.enter(i, [](int64_t, int64_t) {});
    const int64_t rows = std::min(a.m, a.n - i * a.m);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t first = 0; first < rows; first += QT) {
        const int64_t count = std::min<int64_t>(QT, rows - first), token = i * a.m + first;
        const T* q = (const T*)a.query + batch * a.query_strides[0] + h * a.query_strides[1] + token * a.query_strides[2];
        transpose_in(q, a.query_strides[2], count, a.d, a.scale * LOG2E, rows_of_tile.data(), queries.data());
        slots.announce(i, first, h == g * group, Rows<T>{q - token * a.query_strides[2], a.query_strides[2], a.d}, ahead);
        const std::vector<Run>& runs = slots.met(first);
        score(slots, runs, queries.data(), first, scores.data(), ahead, ByDistance(a, levels.count, h, token));
        vec most[NV], sum[NV];
        weigh(slots, runs, scores.data(), out.data(), most, sum);
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

// Gradients of one key head.
template <typename T>
void backward_head(const BlockArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g) {
  TileGradients<T> grads(a, levels, head, batch, g, a.n + side_count(a) * levels.rows);
  const int64_t group = a.h / a.g;
  for (int64_t i = 0; i < levels.blocks; i++) {
    grads.enter(i);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t first = 0; first < std::min(a.m, a.n - i * a.m); first += QT) {
        grads.take(h, first);
        grads.meet();
        grads.give();
      }
  }
  grads.done();
  const int64_t u = batch * a.g + g;
  const auto give = [&](Floats& grad, int64_t wide, int64_t c, float* rows) {  // rows that were made before go back to who made them
    float* pooled = grad.data() + a.n * wide;
    for (int64_t side = 0; side < side_count(a) && !rows; side++)
      spread(a, levels, head, wide, pooled + side * levels.rows * wide, grad.data(), shares(a, levels, u, side), weights_within(a, levels, u, side));
    for (int64_t r = 0; r < levels.rows && rows; r++) std::copy_n(pooled + r * wide, c, rows + (u * levels.rows + r) * c);
  };
  give(grads.to_key, grads.dk, a.d, a.grad_pooled_key);
  give(grads.to_value, grads.dv, a.e, a.grad_pooled_value);
  grads.write();
}

template <typename T>
int run(const BlockArgs& a) {
  const Levels levels(a.n, a.m, a.p);
  const int64_t sides = side_count(a);
  const int64_t heads = a.b * a.g;
  std::vector<Head> all(heads);
  // Some heads at a time, one a thread at least: their keys and values, read to be pooled, are then still in a cache.
  const int64_t bytes = a.n * (a.d + a.e) * (int64_t)sizeof(T), least = std::clamp<int64_t>(a.threads, 1, heads);
  const int64_t wave = a.grad_out ? heads : std::clamp<int64_t>(CACHED / bytes, least, heads);
  const int64_t parts = (a.n + levels.part - 1) / levels.part, stretch = std::max<int64_t>(64, (parts + a.threads - 1) / a.threads);
  const int64_t stretches = (parts + stretch - 1) / stretch;
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t here = std::min(wave, heads - first);
    std::vector<uint8_t> finite(here * (1 + stretches), 1);  // of rows made before, head by head, then of tokens
    parallel(a, here, [&](int64_t task) {
      Head& head = all[first + task];
      choose_sinks(a, (first + task) / a.g, head);
      count(a, levels, first + task, head);
      const auto fill = [&](Floats& rows, int64_t c, const float* made) {
        if (made) rows.assign(made + (first + task) * levels.rows * c, made + (first + task + 1) * levels.rows * c);
        else rows.assign(sides * levels.rows * c, 0.f);
        finite[task] &= !made || dot(rows.data(), Floats(rows.size(), 0.f).data(), rows.size()) == 0.f;
      };
      fill(head.key, a.d, a.pooled_key);
      fill(head.value, a.e, a.pooled_value);
    });
    parallel(a, here * stretches, [&](int64_t task) {
      const int64_t u = first + task / stretches, from = task % stretches * stretch, to = std::min(parts, from + stretch);
      const int64_t batch = u / a.g, g = u % a.g;
      const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
      const Rows<T> key{(const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1], a.key_strides[2], a.d};
      const Rows<T> value{(const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1], a.value_strides[2], a.e};
      bool good = true;
      for (int64_t side = 0; side < sides; side++) {
        const float* within = weights_within(a, levels, u, side);
        good &= sum_parts(a, levels, all[u], real, key, from, to, &all[u].key[side * levels.rows * a.d], within);
        good &= sum_parts(a, levels, all[u], real, value, from, to, &all[u].value[side * levels.rows * a.e], within);
      }
      finite[here + task] = good;
    });
    if (std::count(finite.begin(), finite.end(), 0)) return 1;
    parallel(a, here, [&](int64_t task) {
      Head& head = all[first + task];
      for (int64_t side = 0; side < sides && !a.pooled_key; side++) {
        const float* share = shares(a, levels, first + task, side);
        average(a, levels, head, a.d, &head.key[side * levels.rows * a.d], share);
        average(a, levels, head, a.e, &head.value[side * levels.rows * a.e], share);
      }
    });
    if (a.grad_out) {
      parallel(a, here, [&](int64_t u) { backward_head<T>(a, levels, all[u], u / a.g, u % a.g); });
      continue;
    }
    // Stretches of blocks long enough that filling the first block's slots does not count.
    const int64_t chunk = std::max<int64_t>(8, (levels.blocks * here + 4 * a.threads - 1) / (4 * a.threads));
    const int64_t chunks = (levels.blocks + chunk - 1) / chunk;
    parallel(a, here * chunks, [&](int64_t task) {
      const int64_t u = first + task / chunks, from = task % chunks * chunk;
      forward_blocks<T>(a, levels, all[u], u / a.g, u % a.g, from, std::min(levels.blocks, from + chunk));
    });
    for (int64_t u = first; u < first + here; u++) all[u] = Head();
  }
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
