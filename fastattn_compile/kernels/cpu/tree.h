// The tree of mean keys of Barnes-Hut attention, and the choice of leaves: what a group of queries opens. Sizes as in blocks.h.
#pragma once
#include "blocks.h"

extern "C" {
struct BarnesHutArgs {
  BlockArgs block;
  int64_t leaf, fanout, group, levels;
  int64_t cumulant;  // whether nodes are estimated by the variance of their keys beside the mean
  int64_t keep[40];  // candidates of each level that are expanded; of level 0 that are opened
};
}

namespace {

// The nodes of one level: features, mean keys filled up to whole vectors and perhaps variances as long, and the base-2
// logarithm of how many tokens a node holds.
struct Nodes {
  int64_t count, width;
  Floats key, log_count;
};

struct Tree {
  int64_t dk, dv;
  int64_t df;         // features of a node: dk, or twice that
  Floats key, value;  // all tokens, filled up to whole vectors and to whole leaves with 0; keys when they are met row by row
  Floats fours;       // keys of every four tokens, (channel, token), when groups of queries fill vectors
  Floats bias;        // 0 for a token that a leaf holds, -inf for sinks, padding and what does not exist
  std::vector<Nodes> levels;
  Head head;
};

// Whether a group of queries fills vectors: then they meet what they opened side by side, a query a lane.
bool fills_vectors(const BarnesHutArgs& args) { return args.group % W == 0; }

// Whether keys are read row by row: by single queries, and for gradients.
bool meets_rows(const BarnesHutArgs& args) { return args.block.grad_out || !fills_vectors(args); }

// Keys and values of one head, and the sums of leaves; false when a number is not finite.
template <typename T>
bool take_tokens(const BarnesHutArgs& args, Rows<T> key, Rows<T> value, const uint8_t* real, Tree& tree) {
  const BlockArgs& a = args.block;
  const int64_t tokens = round_up(round_up(a.n, args.leaf), 4) + 4, dk = tree.dk, dv = tree.dv;
  const bool fours = fills_vectors(args), rows = meets_rows(args);
  tree.value.resize(tokens * dv), tree.key.resize(rows ? tokens * dk : 0), tree.fours.resize(fours ? tokens * a.d : 0);
  tree.bias.assign(tokens, NEG_INF);
  Floats four_rows(4 * dk);
  vec odd = {};
  for (int64_t t = 0; t < tokens; t += 4) {
    for (int64_t i = t; i < t + 4; i++) {
      float *k = &four_rows[(i - t) * dk], *v = &tree.value[i * dv];
      if (i >= a.n || (real && !real[i])) {
        std::fill_n(k, dk, 0.f), std::fill_n(v, dv, 0.f);
        continue;
      }
      widen_row(key[i], a.d, k), widen_row(value[i], a.e, v);
      std::fill(v + a.e, v + dv, 0.f);
      for (int64_t c = 0; c < dk; c += W) odd += load(k + c) * splat(0.f);
      for (int64_t c = 0; c < dv; c += W) odd += load(v + c) * splat(0.f);
      if (!tree.head.pooled[i]) continue;
      tree.bias[i] = 0.f;
      float* to = &tree.levels[0].key[i / args.leaf * tree.df];
      tree.levels[0].log_count[i / args.leaf] += 1.f;
      for (int64_t c = 0; c < dk; c += W) store(to + c, load(to + c) + load(k + c));
      for (int64_t c = 0; c < dk && args.cumulant; c += W) store(to + dk + c, load(to + dk + c) + load(k + c) * load(k + c));
    }
    if (rows) std::copy(four_rows.begin(), four_rows.end(), &tree.key[t * dk]);
    if (fours) transpose_rows(four_rows.data(), dk, a.d, &tree.fours[t * a.d], 4);
  }
  for (int j = 0; j < W; j++)
    if (odd[j] != 0.f) return false;
  return true;
}

template <typename T>
bool build(const BarnesHutArgs& args, int64_t batch, int64_t g, Tree& tree) {
  const BlockArgs& a = args.block;
  tree.head = Head();
  choose_sinks(a, batch, tree.head);
  tree.dk = round_up(a.d, W), tree.df = args.cumulant ? 2 * tree.dk : tree.dk, tree.dv = round_up(a.e, W);
  const int64_t dk = tree.dk, df = tree.df;
  tree.levels.resize(args.levels);
  int64_t width = args.leaf;
  for (int64_t l = 0; l < args.levels; l++, width *= args.fanout) {
    Nodes& nodes = tree.levels[l];
    nodes.width = width;
    nodes.count = l ? (tree.levels[l - 1].count + args.fanout - 1) / args.fanout : (a.n + args.leaf - 1) / args.leaf;
    nodes.key.assign((nodes.count + 4) * df, 0.f), nodes.log_count.assign(nodes.count + 4, 0.f);
  }
  // Sums and counts first, of tokens and their squares, then level by level; then means and logarithms.
  const Rows<T> key{(const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1], a.key_strides[2], a.d};
  const Rows<T> value{(const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1], a.value_strides[2], a.e};
  if (!take_tokens(args, key, value, a.real ? a.real + batch * a.n : nullptr, tree)) return false;
  for (int64_t l = 1; l < args.levels; l++) {
    const Nodes& below = tree.levels[l - 1];
    Nodes& nodes = tree.levels[l];
    for (int64_t i = 0; i < below.count; i++) {
      nodes.log_count[i / args.fanout] += below.log_count[i];
      add_row(&below.key[i * df], df, &nodes.key[i / args.fanout * df]);
    }
  }
  for (Nodes& nodes : tree.levels)
    for (int64_t i = 0; i < nodes.count + 4; i++) {
      float& count = nodes.log_count[i];
      count = count > 0.f ? std::log2(count) : NEG_INF;
      if (count == NEG_INF) continue;
      const float by = std::exp2(-count);
      float* feature = &nodes.key[i * df];
      for (int64_t c = 0; c < df; c += W) store(feature + c, load(feature + c) * by);
      for (int64_t c = dk; c < df; c += W) store(feature + c, load(feature + c) - load(feature + c - dk) * load(feature + c - dk));
    }
  return true;
}

// Asks for `count` floats before they are read.
static inline void fetch(const float* from, int64_t count) {
  for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(from + c);
}

// The sum of the lanes of an integer vector.
static inline int64_t lanes_sum(veci x) {
  int32_t part[W];
  std::memcpy(part, &x, sizeof part);
  for (int wide = W / 2; wide >= 1; wide /= 2)
    for (int j = 0; j < wide; j++) part[j] += part[j + wide];
  return part[0];
}

// The k largest of some scores, by a search for the k-th in the order of their bits; of equals those that come first. No
// branch depends on a score: a processor could not foresee it.
class Best {
 public:
  const int32_t* ids() const { return id.data(); }
  int64_t size() const { return count; }

  // Empty, with room for so many.
  void clear(int64_t most) {
    count = 0;
    if ((int64_t)id.size() < most + W) id.resize(most + W), score.resize(most + W), keys.resize(most + W);
  }

  // One that has no score is not taken.
  void add(int64_t i, float s) {
    id[count] = (int32_t)i, score[count] = s;
    count += s > NEG_INF;
  }

  // Cuts to the best, in the order in which they came.
  void keep(int64_t k) {
    if (count <= k) return;
    constexpr int32_t LEAST = std::numeric_limits<int32_t>::min();
    veci most = veci{} + LEAST, least = veci{} + std::numeric_limits<int32_t>::max();
    for (int64_t i = count; i < round_up(count, W); i++) score[i] = NEG_INF;
    for (int64_t i = 0; i < count; i += W) {
      const veci bits = *(const veci*)&score[i], key = bits ^ ((bits >> 31) & 0x7fffffff);
      *(veci*)&keys[i] = key;
      const veci real = *(const vec*)&score[i] > NEG_INF;
      most = key > most ? key : most;
      least = (real & (key < least)) ? key : least;
    }
    int64_t low = std::numeric_limits<int32_t>::max(), high = LEAST;
    for (int j = 0; j < W; j++) low = std::min<int64_t>(low, least[j]), high = std::max<int64_t>(high, most[j]);
    high++;
    while (high - low > 1) {  // at least k at `low` and above, fewer at `high`
      const int64_t middle = low + (high - low) / 2, there = at_least((int32_t)middle);
      if (there == k) {
        low = middle;
        break;
      }
      (there > k ? low : high) = middle;
    }
    int64_t spare = k - (low < std::numeric_limits<int32_t>::max() ? at_least((int32_t)low + 1) : 0), to = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t equal = (keys[i] == low) & (spare > 0);
      id[to] = id[i], score[to] = score[i];
      to += (keys[i] > low) | equal;
      spare -= equal;
    }
    count = to;
  }

 private:
  int64_t count = 0;
  std::vector<int32_t> id, keys;
  Floats score;

  int64_t at_least(int32_t bound) const {
    veci found = {};
    for (int64_t i = 0; i < count; i += W) found -= *(const veci*)&keys[i] >= bound;
    return lanes_sum(found);
  }
};

// A stretch of keys outside the near field, [begin, end).
struct Stretch {
  int64_t begin, end;
};

class Chooser {
 public:
  Chooser(const BarnesHutArgs& args, const Tree& tree) : args(args), a(args.block), tree(tree) {}

  // The leaves that the queries from `first` on open. `voices` are (heads, df), scaled to base-2 scores.
  const std::vector<int32_t>& open(int64_t first, const float* voices, int64_t heads) {
    const int64_t block = first / a.m;
    stretches.clear();
    stretches.push_back({0, std::max<int64_t>(0, (block - 1) * a.m)});
    if (!a.causal) stretches.push_back({(block + 2) * a.m, std::numeric_limits<int64_t>::max()});
    const int64_t top = args.levels - 1;
    listed.clear();
    for (int64_t i = 0; i < tree.levels[top].count; i++) listed.push_back((int32_t)i);
    for (int64_t l = top; l >= 0; l--) {
      rank(l, voices, heads);
      best.keep(args.keep[l]);
      if (l) expand(l);
    }
    chosen.assign(best.ids(), best.ids() + best.size());
    return chosen;
  }

 private:
  const BarnesHutArgs& args;
  const BlockArgs& a;
  const Tree& tree;
  std::vector<Stretch> stretches;
  std::vector<int32_t> listed, chosen;
  Floats scores;  // (heads, listed)
  Best best;

  // Estimated masses of the listed nodes that lie in the far field.
  void rank(int64_t l, const float* voices, int64_t heads) {
    const Nodes& nodes = tree.levels[l];
    const int64_t count = listed.size();
    best.clear(count);
    scores.resize(heads * count);
    // Nodes before the first of these and from the second on lie wholly in the far field; an end of it may cut one.
    const int64_t before = stretches[0].end / nodes.width;
    const int64_t after = stretches.size() > 1 ? (stretches[1].begin + nodes.width - 1) / nodes.width : nodes.count;
    for (int64_t i = 0; i < count;) {  // children of a node follow each other
      int64_t run = 1;
      while (run < 4 && i + run < count && listed[i + run] == listed[i] + run) run++;
      if (i + 8 < count) fetch(&nodes.key[listed[i + 8] * tree.df], 4 * tree.df);
      for (int64_t h = 0; h < heads; h++) {
        four s;
        const float* voice = voices + h * tree.df;
        dot4<1>(&voice, &nodes.key[listed[i] * tree.df], tree.df, tree.df, &s);
        for (int64_t r = 0; r < run; r++) {
          const int64_t node = listed[i + r];
          scores[h * count + i + r] = ((node < before) | (node >= after)) ? s[r] + nodes.log_count[node] : NEG_INF;
        }
      }
      i += run;
    }
    if (heads == 1) {
      for (int64_t i = 0; i < count; i++) best.add(listed[i], scores[i]);
      return;
    }
    // Several heads: the sum of the shares each gives a node, as a logarithm.
    for (int64_t h = 0; h < heads; h++) {
      float* s = &scores[h * count];
      float most = NEG_INF, total = 0.f;
      for (int64_t i = 0; i < count; i++) most = std::max(most, s[i]);
      if (most == NEG_INF) return;
      for (int64_t i = 0; i < count; i++) total += std::exp2(s[i] - most);
      const float whole = most + std::log2(total);
      for (int64_t i = 0; i < count; i++) s[i] -= whole;
    }
    for (int64_t i = 0; i < count; i++) {
      float most = NEG_INF, total = 0.f;
      for (int64_t h = 0; h < heads; h++) most = std::max(most, scores[h * count + i]);
      if (most == NEG_INF) continue;
      for (int64_t h = 0; h < heads; h++) total += std::exp2(scores[h * count + i] - most);
      best.add(listed[i], most + std::log2(total));
    }
  }

  // Children of what was kept on a level, and of the nodes that reach beyond the far field.
  void expand(int64_t l) {
    const int64_t below = tree.levels[l - 1].count, width = tree.levels[l].width;
    listed.resize((best.size() + 4) * args.fanout);
    int32_t* to = listed.data();
    const auto children = [&](int64_t node) {
      for (int64_t c = node * args.fanout, end = std::min(below, c + args.fanout); c < end; c++) *to++ = (int32_t)c;
    };
    for (int64_t i = 0; i < best.size(); i++) children(best.ids()[i]);
    int64_t crossed[4], count = 0;
    for (const Stretch& s : stretches)
      for (const int64_t edge : {s.begin, s.end}) {
        if (edge >= a.n || edge % width == 0) continue;
        const int64_t node = edge / width;
        if (std::find(crossed, crossed + count, node) == crossed + count) children(crossed[count++] = node);
      }
    listed.resize(to - listed.data());
  }
};

}  // namespace
