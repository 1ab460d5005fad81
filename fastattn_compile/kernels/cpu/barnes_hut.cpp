// Barnes-Hut attention on a CPU, forward and backward: near blocks and sinks by tiles, far leaves by content.
//
// A tree of mean keys stands over the key positions. A group of queries descends it from the top: of the nodes that lie wholly
// in its far field the best of each level are expanded, the best leaves are opened, and every query meets their keys one by
// one. Near and far have a softmax each, without its division; the two are put together at the end.
//
// Sizes as in blocks.h.
#include "opened.h"
#include "gradients.h"

namespace {

// Who speaks for a group of queries, (heads, df), scaled: what the features of a node are multiplied with. Causal: the mean of
// the queries that end with the group's first one, nothing later, so that the choice is known when the first query is; else
// the mean of the group's own. For variances, half its square.
template <typename T>
void speak(const BarnesHutArgs& args, const Tree& tree, int64_t batch, int64_t g, int64_t first, float* voices, const T* query) {
  const BlockArgs& a = args.block;
  const int64_t heads = a.h / a.g, start = a.causal ? std::max<int64_t>(0, first - args.group + 1) : first;
  const int64_t stop = a.causal ? first + 1 : std::min(a.n, first + args.group);
  const float by = a.scale * LOG2E / (float)(stop - start);
  std::fill_n(voices, heads * tree.df, 0.f);
  for (int64_t h = 0; h < heads; h++) {
    float* voice = voices + h * tree.df;
    for (int64_t t = start; t < stop; t++) {
      const T* from = query + batch * a.query_strides[0] + (g * heads + h) * a.query_strides[1] + t * a.query_strides[2];
      for (int64_t c = 0; c < a.d; c++) voice[c] += widen(from[c]) * by;
    }
    for (int64_t c = tree.dk; c < tree.df; c++) voice[c] = 0.5f * LN2 * voice[c - tree.dk] * voice[c - tree.dk];
  }
}

// The tokens of some leaves in fours, with a bias that hides what is in no leaf of them.
struct Fours {
  std::vector<int64_t> token;
  Floats bias;

  void set(const Tree& tree, const std::vector<int32_t>& leaves, int64_t width) {
    token.clear(), bias.clear();
    for (const int32_t leaf : leaves)
      for (int64_t t = leaf * width; t < (leaf + 1) * width; t++) {
        if (token.empty() || token.back() != t / 4 * 4) token.push_back(t / 4 * 4), bias.insert(bias.end(), 4, NEG_INF);
        bias[bias.size() - 4 + t % 4] = tree.bias[t];
      }
  }
};

// A tile of queries of a head on its way, (channel, query): queries, the output without its division, and what it was taken over.
struct Tile {
  Floats query, out;
  alignas(64) float most[QT], sum[QT];
};

// The far field of the W queries of a tile from lane `lane` on, added to what the tile has.
void far_lanes(const Tree& tree, int64_t d, int64_t e, const Fours& opened, Tile& tile, int64_t lane, Floats& weights) {
  const int64_t count = opened.token.size();
  weights.resize((count + 1) * 4 * W);
  const float* queries = &tile.query[lane];
  vec top = load(tile.most + lane);
  for (int64_t i = 0; i < count; i += 2) {  // two fours at a time: eight sums hide how long one takes
    const float *one = &tree.fours[opened.token[i] * d], *two = &tree.fours[opened.token[std::min(i + 1, count - 1)] * d];
    // What is opened lies far apart: the keys that follow, and the values of these, for when the weights are known.
    for (int64_t j = i; j < std::min(i + 2, count); j++) {
      if (j + 4 < count) fetch(&tree.fours[opened.token[j + 4] * d], 4 * d);
      fetch(&tree.value[opened.token[j] * tree.dv], 4 * tree.dv);
    }
    vec s[8] = {};
    for (int64_t c = 0; c < d; c++, one += 4, two += 4) {
      const vec q = load(queries + c * QT);
      for (int r = 0; r < 4; r++) s[r] += splat(one[r]) * q, s[4 + r] += splat(two[r]) * q;
    }
    for (int r = 0; r < 8; r++) {
      if (i * 4 + r >= count * 4) break;
      s[r] += opened.bias[i * 4 + r];
      store(&weights[(i * 4 + r) * W], s[r]);
      top = vmax(top, s[r]);
    }
  }
  const vec before = load(tile.most + lane), base = top == NEG_INF ? vec{} : top, by = exp2v(before - base);
  vec sum = load(tile.sum + lane) * by;
  for (int64_t i = 0; i < count * 4; i++) {
    const vec weight = exp2v(load(&weights[i * W]) - base);
    store(&weights[i * W], weight);
    sum += weight;
  }
  store(tile.most + lane, base), store(tile.sum + lane, sum);
  for (int64_t c = 0; c < e; c += R) {
    vec out[R];
    for (int r = 0; r < R; r++) out[r] = load(&tile.out[(c + r) * QT + lane]) * by;
    for (int64_t i = 0; i < count; i++)
      for (int64_t t = 0; t < 4; t++) {
        const vec weight = load(&weights[(i * 4 + t) * W]);
        const float* value = &tree.value[(opened.token[i] + t) * tree.dv + c];
        for (int r = 0; r < R; r++) out[r] += splat(value[r]) * weight;
      }
    for (int r = 0; r < R; r++) store(&tile.out[(c + r) * QT + lane], out[r]);
  }
}

// So many queries wait for each other before their leaves are read: together with their weights they fill a cache.
constexpr int64_t WAITING = 2048;

constexpr int64_t TREES = 32 << 20;  // bytes of the trees that stand at a time, about, but one for every thread

// Near and far fields of some blocks of queries.
template <typename T>
class Walk {
 public:
  Walk(const BarnesHutArgs& args, const Levels& none, const Tree& tree, int64_t batch, int64_t g)
      : args(args), a(args.block), tree(tree), batch(batch), g(g), heads(a.h / a.g), parts((a.m + QT - 1) / QT),
        slots(a, none, tree.head, {at((const T*)a.key, a.key_strides), a.key_strides[2], a.d},
              {at((const T*)a.value, a.value_strides), a.value_strides[2], a.e}, a.real ? a.real + batch * a.n : nullptr),
        chooser(args, tree), opened(args, tree, batch), tiles(heads * parts), scores(slots.total * QT), rows(QT * std::max(tree.dk, tree.dv)),
        voices(heads * tree.df) {
    for (Tile& tile : tiles) tile.query.resize(a.d * QT), tile.out.resize(tree.dv * QT);
  }

  void block(int64_t i) {
    first_token = i * a.m, count = std::min(a.m, a.n - first_token);
    near(i);
    for (int64_t first = 0; first < count; first += args.group) {
      speak(args, tree, batch, g, first_token + first, voices.data(), (const T*)a.query);
      leaves = chooser.open(first_token + first, voices.data(), heads);
      std::sort(leaves.begin(), leaves.end());
      const int64_t stop = std::min(count, first + args.group);
      if (fills_vectors(args)) lanes(first, stop);
      else wait(first, stop);
    }
    if (fills_vectors(args)) give();
    else if (opened.waiting() >= WAITING) opened.give();
  }

  void done() {
    if (opened.waiting()) opened.give();
  }

 private:
  const BarnesHutArgs& args;
  const BlockArgs& a;
  const Tree& tree;
  const int64_t batch, g, heads, parts;
  Slots<T> slots;
  Ahead ahead;
  Chooser chooser;
  Fours fours;
  Opened<T> opened;
  std::vector<Tile> tiles;  // (heads, parts)
  Floats scores, rows, voices, weights, near_outs;
  std::vector<int32_t> leaves;
  int64_t first_token = 0, count = 0;

  const T* at(const T* base, const int64_t* strides) const { return base + batch * strides[0] + g * strides[1]; }
  const T* query(int64_t h, int64_t token) const {
    return (const T*)a.query + batch * a.query_strides[0] + (g * heads + h) * a.query_strides[1] + token * a.query_strides[2];
  }

  void near(int64_t i) {
    slots.enter(i, [](int64_t, int64_t) {});
    for (int64_t h = 0; h < heads; h++)
      for (int64_t first = 0; first < count; first += QT) {
        Tile& tile = tiles[h * parts + first / QT];
        const int64_t here = std::min<int64_t>(QT, count - first);
        transpose_in(query(h, first_token + first), a.query_strides[2], here, a.d, a.scale * LOG2E, rows.data(), tile.query.data());
        const std::vector<Run>& runs = slots.met(first);
        slots.announce(i, first, h == 0, Rows<T>{query(h, 0), a.query_strides[2], a.d}, ahead);
        score(slots, runs, tile.query.data(), first, scores.data(), ahead, ByDistance(a, 0, g * heads + h, first_token + first));
        vec most[NV], sum[NV];
        weigh(slots, runs, scores.data(), tile.out.data(), most, sum);
        for (int j = 0; j < NV; j++) {
          // Who met nothing near starts from nothing, not from a score of 0.
          store(tile.most + j * W, sum[j] > 0.f ? most[j] : splat(NEG_INF));
          store(tile.sum + j * W, sum[j]);
        }
      }
    if (!fills_vectors(args)) rows_of_queries();
  }

  // Near outputs as rows.
  void rows_of_queries() {
    near_outs.resize(heads * a.m * tree.dv, 0.f);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t first = 0; first < count; first += QT)
        transpose_out(tiles[h * parts + first / QT].out.data(), tree.dv, std::min<int64_t>(QT, count - first), a.e, nullptr, rows.data(),
                      &near_outs[(h * a.m + first) * tree.dv]);
  }

  void lanes(int64_t first, int64_t stop) {
    fours.set(tree, leaves, args.leaf);
    if (fours.token.empty()) return;
    for (int64_t h = 0; h < heads; h++)
      for (int64_t lane = first; lane < stop; lane += W)
        far_lanes(tree, a.d, a.e, fours, tiles[h * parts + lane / QT], lane % QT, weights);
  }

  void wait(int64_t first, int64_t stop) {
    opened.group(leaves);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = first; r < stop; r++) {
        const Tile& tile = tiles[h * parts + r / QT];
        opened.add(query(h, first_token + r), &near_outs[(h * a.m + r) * tree.dv], tile.most[r % QT], tile.sum[r % QT], g * heads + h,
                   first_token + r);
      }
  }

  // Divides, and writes outputs.
  void give() {
    for (int64_t h = 0; h < heads; h++)
      for (int64_t first = 0; first < count; first += QT) {
        Tile& tile = tiles[h * parts + first / QT];
        const int64_t here = std::min<int64_t>(QT, count - first), token = first_token + first;
        float by[QT] = {}, *lse = a.log_sum_exp + (batch * a.h + g * heads + h) * a.n + token;
        for (int64_t r = 0; r < here; r++) {
          by[r] = tile.sum[r] > 0.f ? 1.f / tile.sum[r] : 0.f;
          lse[r] = tile.sum[r] > 0.f ? (tile.most[r] + std::log2(tile.sum[r])) * LN2 : NEG_INF;
        }
        T* to = (T*)a.out + batch * a.out_strides[0] + (g * heads + h) * a.out_strides[1] + token * a.out_strides[2];
        transpose_out(tile.out.data(), a.out_strides[2], here, a.e, by, rows.data(), to);
      }
  }
};

// Gradients of one key head for the choice that the forward pass made: it is made again.
template <typename T>
class BackwardWalk {
 public:
  BackwardWalk(const BarnesHutArgs& args, const Levels& none, const Tree& tree, int64_t batch, int64_t g)
      : args(args), a(args.block), tree(tree), batch(batch), g(g), heads(a.h / a.g), blocks(none.blocks), chooser(args, tree),
        grads(a, none, tree.head, batch, g, tree.bias.size()), voices(heads * tree.df) {}

  void run() {
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t count = std::min(a.m, a.n - i * a.m);
      opened.resize((count + args.group - 1) / args.group);
      for (size_t j = 0; j < opened.size(); j++) {
        const int64_t first = i * a.m + j * args.group;
        speak(args, tree, batch, g, first, voices.data(), (const T*)a.query);
        std::vector<int32_t> leaves = chooser.open(first, voices.data(), heads);
        std::sort(leaves.begin(), leaves.end());
        opened[j].set(tree, leaves, args.leaf);
      }
      grads.enter(i);
      for (int64_t h = 0; h < heads; h++)
        for (int64_t first = 0; first < count; first += QT) {
          grads.take(g * heads + h, first);
          grads.meet();
          for (int64_t lane = 0; lane < std::min<int64_t>(QT, count - first);) {
            const Fours& met = opened[(first + lane) / args.group];
            if (fills_vectors(args)) lanes(met, lane), lane += W;
            else one(met, lane), lane++;
          }
          grads.give();
        }
    }
    grads.done();
    grads.write();
  }

 private:
  const BarnesHutArgs& args;
  const BlockArgs& a;
  const Tree& tree;
  const int64_t batch, g, heads, blocks;
  Chooser chooser;
  TileGradients<T> grads;
  std::vector<Fours> opened;  // of the groups of the block
  Floats voices, weights, slopes, query, to_query;

  // The far field of W queries side by side, from `lane` of the tile on.
  void lanes(const Fours& met, int64_t lane) {
    const int64_t count = met.token.size(), dk = tree.dk, dv = tree.dv;
    if (weights.size() < (size_t)count * 4 * W) weights.resize(count * 4 * W), slopes.resize(count * 4 * W);
    const vec lse = load(grads.lse + lane), slope = load(grads.slope + lane);
    for (int64_t i = 0; i < count; i++) {
      const float *keys = &tree.fours[met.token[i] * a.d], *values = &tree.value[met.token[i] * dv];
      vec s[4] = {}, t[4] = {};
      for (int64_t c = 0; c < a.d; c++, keys += 4) {
        const vec q = load(&grads.queries[c * QT + lane]);
        for (int r = 0; r < 4; r++) s[r] += splat(keys[r]) * q;
      }
      for (int64_t c = 0; c < a.e; c++) {
        const vec grad = load(&grads.grads[c * QT + lane]);
        for (int r = 0; r < 4; r++) t[r] += splat(values[r * dv + c]) * grad;
      }
      for (int r = 0; r < 4; r++) {
        const vec weight = exp2v(s[r] + met.bias[i * 4 + r] - lse);
        store(&weights[(i * 4 + r) * W], weight);
        store(&slopes[(i * 4 + r) * W], (t[r] - slope) * weight * a.scale);
      }
      const float *p = &weights[i * 4 * W], *ds = &slopes[i * 4 * W];
      float *to_value = &grads.to_value[met.token[i] * dv], *to_key = &grads.to_key[met.token[i] * dk];
      for (int64_t c = 0; c < dv; c += W) product_rows<4, 1, W, true>(p, 1, &grads.grad_rows[lane * dv + c], dv, to_value + c, dv, W);
      for (int64_t c = 0; c < dk; c += W) product_rows<4, 1, W, true>(ds, 1, &grads.query_rows[lane * dk + c], dk, to_key + c, dk, W);
    }
    for (int64_t c = 0; c < a.d; c += R) {
      vec dq[R];
      for (int r = 0; r < R; r++) dq[r] = load(&grads.dq[(c + r) * QT + lane]);
      for (int64_t i = 0; i < count; i++)
        for (int64_t t = 0; t < 4; t++) {
          const vec grad = load(&slopes[(i * 4 + t) * W]);
          const float* key = &tree.key[(met.token[i] + t) * dk + c];
          for (int r = 0; r < R; r++) dq[r] += splat(key[r]) * grad;
        }
      for (int r = 0; r < R; r++) store(&grads.dq[(c + r) * QT + lane], dq[r]);
    }
  }

  // The far field of one query.
  void one(const Fours& met, int64_t lane) {
    const int64_t count = met.token.size(), dk = tree.dk, dv = tree.dv;
    const float *rows = &grads.query_rows[lane * dk], *grad = &grads.grad_rows[lane * dv];
    query.assign(rows, rows + dk);
    scale_row(query.data(), dk, a.scale * LOG2E);
    const int64_t room = round_up(count * 4, W);
    weights.assign(room, NEG_INF), slopes.assign(room, 0.f), to_query.assign(dk, 0.f);
    const float* q = query.data();
    for (int64_t i = 0; i < count; i++) {
      dot4<1>(&q, &tree.key[met.token[i] * dk], dk, dk, (four*)&weights[i * 4]);
      *(four*)&weights[i * 4] += *(const four*)&met.bias[i * 4];
      dot4<1>(&grad, &tree.value[met.token[i] * dv], dv, dv, (four*)&slopes[i * 4]);
    }
    for (int64_t i = 0; i < room; i += W) {
      const vec weight = exp2v(load(&weights[i]) - grads.lse[lane]);
      store(&weights[i], weight);
      store(&slopes[i], (load(&slopes[i]) - grads.slope[lane]) * weight * a.scale);
    }
    for (int64_t i = 0; i < count * 4; i++) {
      const int64_t token = met.token[i / 4] + i % 4;
      const vec weight = splat(weights[i]), slope = splat(slopes[i]);
      float *to_key = &grads.to_key[token * dk], *to_value = &grads.to_value[token * dv];
      for (int64_t c = 0; c < dk; c += W) {
        store(&to_query[c], load(&to_query[c]) + slope * load(&tree.key[token * dk + c]));
        store(to_key + c, load(to_key + c) + slope * load(rows + c));
      }
      for (int64_t c = 0; c < dv; c += W) store(to_value + c, load(to_value + c) + weight * load(grad + c));
    }
    for (int64_t c = 0; c < a.d; c++) grads.dq[c * QT + lane] += to_query[c];
  }
};

template <typename T>
int run(const BarnesHutArgs& args) {
  const BlockArgs& a = args.block;
  const Levels none(a.n, a.m, 0);
  const int64_t heads = a.b * a.g;
  // Some heads at a time, so that their trees stand where those before them stood: memory that is new costs as much as filling it.
  const int64_t bytes = a.n * (a.d + a.e) * (int64_t)sizeof(float), threads = a.threads;
  const int64_t wave = a.grad_out ? heads : std::min(heads, std::max<int64_t>(1, TREES / bytes / threads) * threads);
  std::vector<Tree> trees(wave);
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t here = std::min(wave, heads - first);
    std::vector<uint8_t> finite(here);
    parallel(a, here, [&](int64_t i) { finite[i] = build<T>(args, (first + i) / a.g, (first + i) % a.g, trees[i]); });
    for (const uint8_t good : finite)
      if (!good) return 1;
    if (a.grad_out) {
      parallel(a, here, [&](int64_t i) { BackwardWalk<T>(args, none, trees[i], (first + i) / a.g, (first + i) % a.g).run(); });
      continue;
    }
    const int64_t chunk = std::max<int64_t>(2, (none.blocks * here + 16 * threads - 1) / (16 * threads));
    const int64_t chunks = (none.blocks + chunk - 1) / chunk;
    parallel(a, here * chunks, [&](int64_t task) {
      const int64_t i = task / chunks, u = first + i, from = task % chunks * chunk;
      Walk<T> walk(args, none, trees[i], u / a.g, u % a.g);
      for (int64_t block = from; block < std::min(none.blocks, from + chunk); block++) walk.block(block);
      walk.done();
    });
  }
  return 0;
}

}  // namespace

// 0: done. 1: a key or value is not finite, nothing was written that may be used.
extern "C" int barnes_hut_run(const BarnesHutArgs* args) {
  switch (args->block.dtype) {
    case 0: return run<float>(*args);
    case 1: return run<bf16>(*args);
    default: return run<_Float16>(*args);
  }
}
