// The far field of many queries that each opened their own leaves, leaf by leaf: what a leaf holds is read once for all queries
// that opened it. Opened leaves lie far apart; taken query by query every one of them would come from memory.
#pragma once
#include "tree.h"

namespace {

// A query that waits for its far field.
struct Waiting {
  float near_most, near_sum;
  int64_t head, token, group;  // `group`: which list of opened leaves is its own
};

template <typename T>
class Opened {
 public:
  Opened(const BarnesHutArgs& args, const Tree& tree, int64_t batch) : args(args), a(args.block), tree(tree), batch(batch) {
    starts.push_back(0);
  }

  int64_t waiting() const { return rows.size(); }

  // A list of opened leaves; the queries that are added next share it.
  void group(const std::vector<int32_t>& leaves) {
    listed.insert(listed.end(), leaves.begin(), leaves.end());
    starts.push_back(listed.size());
  }

  // A query, scaled, and its near output before the division, `tree.dv` long.
  void add(const T* query, const float* near, float near_most, float near_sum, int64_t head, int64_t token) {
    const size_t at = queries.size();
    queries.resize(at + tree.dk, 0.f);
    for (int64_t c = 0; c < a.d; c++) queries[at + c] = widen(query[c]) * (a.scale * LOG2E);
    outs.insert(outs.end(), near, near + tree.dv);
    rows.push_back({near_most, near_sum, head, token, (int64_t)starts.size() - 2});
  }

  // Far fields of all that wait, and their outputs.
  void give() {
    order();
    int64_t most = 0;
    for (size_t g = 0; g + 1 < starts.size(); g++) most = std::max<int64_t>(most, starts[g + 1] - starts[g]);
    room = round_up(most * args.leaf + 4, W);
    weights.resize(rows.size() * room);
    for (size_t r = 0; r < rows.size(); r++) {  // behind what it opened
      const int64_t own = (end(rows[r]) - begin(rows[r])) * args.leaf;
      std::fill(&weights[r * room + own], weights.data() + (r + 1) * room, NEG_INF);
    }
    by_leaf([&](auto n, int64_t leaf, const Visit* visits) { score<n.value>(leaf, visits); });
    for (size_t r = 0; r < rows.size(); r++) weigh(r);
    by_leaf([&](auto n, int64_t leaf, const Visit* visits) { sum<n.value>(leaf, visits); });
    for (size_t r = 0; r < rows.size(); r++) {
      T* to = (T*)a.out + batch * a.out_strides[0] + rows[r].head * a.out_strides[1] + rows[r].token * a.out_strides[2];
      for (int64_t c = 0; c < a.e; c++) narrow(outs[r * tree.dv + c] * by[r], to[c]);
    }
    rows.clear(), queries.clear(), outs.clear(), listed.clear();
    starts.assign(1, 0);
  }

 private:
  // A query that opened a leaf, and where among its weights those of the leaf stand.
  struct Visit {
    int32_t row, at;
  };

  const BarnesHutArgs& args;
  const BlockArgs& a;
  const Tree& tree;
  const int64_t batch;
  int64_t room = 0;
  std::vector<Waiting> rows;
  Floats queries, outs, weights, by;
  std::vector<int32_t> listed;
  std::vector<int64_t> starts, first;
  std::vector<Visit> visits;

  // Where the leaves of a query stand among all that are listed.
  int64_t begin(const Waiting& row) const { return starts[row.group]; }
  int64_t end(const Waiting& row) const { return starts[row.group + 1]; }

  // Sorts by leaf, by counting. Of one leaf the queries stay in order.
  void order() {
    first.assign(tree.levels[0].count + 1, 0);
    int64_t total = 0;
    for (const Waiting& row : rows) {
      total += end(row) - begin(row);
      for (int64_t i = begin(row); i < end(row); i++) first[listed[i] + 1]++;
    }
    for (size_t leaf = 1; leaf < first.size(); leaf++) first[leaf] += first[leaf - 1];
    visits.resize(total);
    for (size_t r = 0; r < rows.size(); r++)
      for (int64_t i = begin(rows[r]); i < end(rows[r]); i++)
        visits[first[listed[i]]++] = {(int32_t)r, (int32_t)((i - begin(rows[r])) * args.leaf)};
    by.resize(rows.size());
  }

  // `first` holds where each leaf ends by now.
  template <typename F>
  void by_leaf(F&& visit) const {
    int64_t at = 0;
    for (int64_t leaf = 0; leaf < tree.levels[0].count; leaf++) {
      const int64_t end = first[leaf];
      for (; at + 4 <= end; at += 4) visit(std::integral_constant<int, 4>(), leaf, &visits[at]);
      for (; at + 2 <= end; at += 2) visit(std::integral_constant<int, 2>(), leaf, &visits[at]);
      for (; at < end; at++) visit(std::integral_constant<int, 1>(), leaf, &visits[at]);
    }
  }

  template <int N>
  void score(int64_t leaf, const Visit* visit) {
    const float* q[N];
    for (int n = 0; n < N; n++) q[n] = &queries[visit[n].row * tree.dk];
    for (int64_t t = leaf * args.leaf, end = t + args.leaf, at = 0; t < end; t += 4, at += 4) {
      four s[N];
      dot4<N>(q, &tree.key[t * tree.dk], tree.dk, tree.dk, s);
      for (int n = 0; n < N; n++) {
        s[n] += *(const four*)&tree.bias[t];
        float* to = &weights[visit[n].row * room + visit[n].at + at];
        for (int64_t r = 0; r < std::min<int64_t>(4, end - t); r++) to[r] = s[n][r];
      }
    }
  }

  // The softmax over near and far of one query: its weights, what its near output counts, and its log-sum-exp.
  void weigh(int64_t r) {
    const Waiting& row = rows[r];
    float *w = &weights[r * room], *out = &outs[r * tree.dv];
    vec high = splat(NEG_INF), sums = {};
    for (int64_t c = 0; c < room; c += W) high = vmax(high, load(w + c));
    float most = row.near_sum > 0.f ? row.near_most : NEG_INF;
    for (int j = 0; j < W; j++) most = std::max(most, high[j]);
    const float base = most == NEG_INF ? 0.f : most, near = row.near_sum > 0.f ? std::exp2(row.near_most - base) : 0.f;
    for (int64_t c = 0; c < room; c += W) {
      const vec weight = exp2v(load(w + c) - base);
      store(w + c, weight);
      sums += weight;
    }
    float total = row.near_sum * near;
    for (int j = 0; j < W; j++) total += sums[j];
    by[r] = total > 0.f ? 1.f / total : 0.f;
    for (int64_t c = 0; c < tree.dv; c += W) store(out + c, load(out + c) * near);
    a.log_sum_exp[(batch * a.h + row.head) * a.n + row.token] = total > 0.f ? (base + std::log2(total)) * LN2 : NEG_INF;
  }

  template <int N>
  void sum(int64_t leaf, const Visit* visit) {
    int64_t c = 0;
    for (; c + 2 * W <= tree.dv; c += 2 * W) columns<N, 2>(leaf, visit, c);
    for (; c < tree.dv; c += W) columns<N, 1>(leaf, visit, c);
  }

  template <int N, int V>
  void columns(int64_t leaf, const Visit* visit, int64_t c) {
    vec out[N][V];
    for (int n = 0; n < N; n++)
      for (int j = 0; j < V; j++) out[n][j] = load(&outs[visit[n].row * tree.dv + c + j * W]);
    for (int64_t r = 0; r < args.leaf; r++) {
      const float* value = &tree.value[(leaf * args.leaf + r) * tree.dv + c];
      vec v[V];
      for (int j = 0; j < V; j++) v[j] = load(value + j * W);
      for (int n = 0; n < N; n++) {
        const vec weight = splat(weights[visit[n].row * room + visit[n].at + r]);
        for (int j = 0; j < V; j++) out[n][j] += weight * v[j];
      }
    }
    for (int n = 0; n < N; n++)
      for (int j = 0; j < V; j++) store(&outs[visit[n].row * tree.dv + c + j * W], out[n][j]);
  }
};

}  // namespace
