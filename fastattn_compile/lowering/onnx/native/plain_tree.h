// The tree of Barnes-Hut attention and what queries open, in double precision, by the rules of kernels/cpu/tree.h; also for the
// choice by mean and variance of a node's keys. A node whose estimate is not a number comes first: who could see it does see it.
#pragma once
#include "plain.h"
#include "tree.h"

namespace {

struct PlainLevel {
  int64_t count, width;
  std::vector<double> features, log_count;  // (count, f)
};

class PlainTree {
 public:
  // `taken`: tokens that belong to nodes.
  template <typename T>
  PlainTree(const BarnesHutArgs& args, bool cumulant, const Side<T>& key, const std::vector<uint8_t>& taken)
      : args(args), cumulant(cumulant), features(key.channels * (1 + cumulant)) {
    const int64_t n = key.tokens, d = key.channels;
    std::vector<double> sums(n * features, 0.), counts(n);
    for (int64_t i = 0; i < n; i++) {
      if (!(counts[i] = taken[i])) continue;
      for (int64_t c = 0; c < d; c++) {
        sums[i * features + c] = key(i, c);
        if (cumulant) sums[i * features + d + c] = key(i, c) * key(i, c);
      }
    }
    int64_t width = args.leaf;
    for (int64_t l = 0; l < args.levels; l++, width *= args.fanout) {
      const int64_t per = l ? args.fanout : args.leaf, below = counts.size(), count = (below + per - 1) / per;
      std::vector<double> above(count * features, 0.), number(count, 0.);
      for (int64_t i = 0; i < below; i++) {
        number[i / per] += counts[i];
        for (int64_t f = 0; f < features; f++) above[i / per * features + f] += sums[i * features + f];
      }
      sums = above, counts = number;
      for (int64_t i = 0; i < count; i++)
        for (int64_t f = 0; f < features; f++) {
          double& x = above[i * features + f];
          x /= std::max(1., number[i]);
          if (f >= d) x -= above[i * features + f - d] * above[i * features + f - d];
        }
      for (double& x : number) x = std::log(x);
      levels.push_back({count, width, above, number});
    }
  }

  // Leaves that the group of queries from `first` on opens; `voices` (heads, d), scaled.
  std::vector<int64_t> open(int64_t first, const std::vector<double>& voices, int64_t heads) const {
    const BlockArgs& a = args.block;
    const int64_t block = first / a.m, before = std::max<int64_t>(0, (block - 1) * a.m), after = a.causal ? a.n : (block + 2) * a.m;
    std::vector<int64_t> listed(levels.back().count);
    for (size_t i = 0; i < listed.size(); i++) listed[i] = i;
    for (int64_t l = args.levels - 1;; l--) {
      const PlainLevel& level = levels[l];
      std::vector<int64_t> far;
      for (const int64_t node : listed)
        if (level.log_count[node] > -INF && ((node + 1) * level.width <= before || (!a.causal && node * level.width >= after)))
          far.push_back(node);
      const std::vector<double> masses = estimate(level, far, voices, heads);
      std::vector<int64_t> best(far.size());
      for (size_t i = 0; i < best.size(); i++) best[i] = i;
      std::stable_sort(best.begin(), best.end(), [&](int64_t i, int64_t j) { return masses[i] > masses[j]; });
      best.resize(std::min<int64_t>(best.size(), args.keep[l]));
      for (int64_t& i : best) i = far[i];
      if (!l) return best;
      for (const int64_t edge : {before, after}) {  // nodes that reach beyond the far field
        const int64_t node = edge / level.width;
        if (edge < a.n && edge % level.width && std::find(best.begin(), best.end(), node) == best.end()) best.push_back(node);
      }
      listed.clear();
      for (const int64_t node : best)
        for (int64_t c = node * args.fanout; c < std::min(levels[l - 1].count, (node + 1) * args.fanout); c++) listed.push_back(c);
    }
  }

 private:
  static constexpr double INF = std::numeric_limits<double>::infinity();
  const BarnesHutArgs& args;
  const bool cumulant;
  const int64_t features;
  std::vector<PlainLevel> levels;

  // Logarithms of the masses of some nodes; of several heads of the sums of their shares.
  std::vector<double> estimate(const PlainLevel& level, const std::vector<int64_t>& nodes, const std::vector<double>& voices, int64_t heads) const {
    const int64_t d = args.block.d, count = nodes.size();
    std::vector<double> sums(count, 0.), masses(count);
    for (int64_t h = 0; h < heads; h++) {
      double most = -INF, total = 0.;
      for (int64_t i = 0; i < count; i++) {
        const double *x = &level.features[nodes[i] * features], *q = &voices[h * d];
        double score = 0.;
        for (int64_t c = 0; c < d; c++) score += q[c] * x[c] + (cumulant ? 0.5 * q[c] * q[c] * x[d + c] : 0.);
        masses[i] = std::isfinite(score) ? score + level.log_count[nodes[i]] : INF;
        if (masses[i] < INF) most = std::max(most, masses[i]);
      }
      if (heads == 1) return masses;
      for (const double mass : masses) total += mass < INF ? std::exp(mass - most) : 0.;
      for (int64_t i = 0; i < count; i++) sums[i] += masses[i] < INF ? std::exp(masses[i] - most) / total : INF;
    }
    return sums;
  }
};

}  // namespace
