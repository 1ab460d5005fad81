// What trees need besides attention: routing vectors to leaves, ranges of keys sorted by node, sums of nodes that queries read.
//
// Sizes: u units (a key head of a sequence), r query heads of a unit, n queries, m keys, d and e channels, L tokens.
#include "simd.h"
#include "trees.h"

namespace {

constexpr int64_t TALLEST = 32;  // levels of a tree, root included
typedef double wide __attribute__((vector_size(4 * W), aligned(8), may_alias));
constexpr int64_t DW = W / 2;

// Products of four vectors with a row of their own each.
static inline four dots(const float* const* x, const float* const* rows, int64_t d) {
  vec sum[4] = {};
  int64_t c = 0;
  for (; c + W <= d; c += W)
    for (int i = 0; i < 4; i++) sum[i] += load(x[i] + c) * load(rows[i] + c);
  four total = sum4(sum);
  for (; c < d; c++)
    for (int i = 0; i < 4; i++) total[i] += x[i][c] * rows[i][c];
  return total;
}

// In double a row after the other.
static inline void dots(const double* const* x, const double* const* rows, int64_t d, double* to) {
  for (int i = 0; i < 4; i++) {
    to[i] = 0.;
    for (int64_t c = 0; c < d; c++) to[i] += x[i][c] * rows[i][c];
  }
}
static inline void dots(const float* const* x, const float* const* rows, int64_t d, float* to) {
  const four found = dots(x, rows, d);
  for (int i = 0; i < 4; i++) to[i] = found[i];
}

// Sums of one unit along its sequence, for the channels from `from` to before `to`. In double: no sum of many keeps its noise.
template <typename Real>
void coarse(const CoarseArgs& a, int64_t unit, int64_t from, int64_t to) {
  const int64_t levels = a.height + 1, nodes = (2ll << a.height) - 1, e = round_up(to - from, DW);
  std::vector<double> sums(nodes * e, 0.), learned(a.r * levels), row(e, 0.);
  std::vector<int64_t> counts(nodes, 0);
  int64_t path[TALLEST];
  const auto climb = [&](int64_t leaf) {
    for (int64_t l = 0; l < levels; l++) path[l] = (leaf >> (a.height - l)) + (1ll << l) - 1;
  };
  for (int64_t r = 0; r < a.r; r++) {  // for a softmax exponentials of the learned numbers, the largest of them 1
    const Real* given = (const Real*)a.learned + (unit * a.r + r) * levels;
    Real most = NEG_INF;
    for (int64_t l = a.root ? 0 : 1; l < levels; l++) most = std::max(most, given[l]);
    for (int64_t l = 0; l < levels; l++) learned[r * levels + l] = a.softmax ? std::exp((double)given[l] - most) : given[l];
  }
  const auto add = [&](int64_t i) {
    if (a.real[unit * a.L + i] == 0.f) return;
    const Real* value = (const Real*)a.value + (unit * a.L + i) * a.e + from;
    for (int64_t c = 0; c < to - from; c++) row[c] = value[c];
    climb(a.key_leaf[unit * a.L + i]);
    for (int64_t l = 0; l < levels; l++) {
      counts[path[l]]++;
      double* sum = &sums[path[l] * e];
      for (int64_t c = 0; c < e; c += DW) *(wide*)(sum + c) += *(const wide*)(&row[c]);
    }
  };
  const auto read = [&](int64_t r, int64_t i) {
    const int64_t at = (unit * a.r + r) * a.n + i;
    double factor[TALLEST], total = 0.;
    climb(a.query_leaf[at]);
    for (int64_t l = 0; l < levels; l++) {
      const int64_t count = counts[path[l]];
      factor[l] = count && (l || a.root) ? learned[r * levels + l] : 0.;
      if (a.softmax) total += factor[l] * count;
      else factor[l] /= std::max<int64_t>(1, count);
    }
    if (a.softmax && total > 0.)
      for (int64_t l = 0; l < levels; l++) factor[l] *= a.share / total;
    Real* out = (Real*)a.out + at * a.e + from;
    for (int64_t c = 0; c < e; c += DW) {
      wide acc = {};
      for (int64_t l = a.root ? 0 : 1; l < levels; l++) acc += *(const wide*)(&sums[path[l] * e + c]) * factor[l];
      if (c + DW <= to - from)
        for (int64_t k = 0; k < DW; k++) out[c + k] = (Real)acc[k];
      else
        for (int64_t k = 0; c + k < to - from; k++) out[c + k] = (Real)acc[k];
    }
    if (from == 0 && a.seen) a.seen[at] = (float)counts[0];
  };
  if (!a.causal)
    for (int64_t i = 0; i < a.L; i++) add(i);
  for (int64_t i = 0; i < a.n; i++) {
    if (a.causal) add(i);
    for (int64_t r = 0; r < a.r; r++) read(r, i);
  }
}

template <typename Real>
void route(const RouteArgs& a) {
  const int64_t planes = (1ll << a.height) - 1, stretch = 512, stretches = (a.n + stretch - 1) / stretch;
  parallel(a, a.b * a.h * a.t * stretches, [&](int64_t task) {
    const int64_t row = task / stretches, first = task % stretches * stretch, head = row / a.t % a.h, tree = head * a.t + row % a.t;
    const Real* x = (const Real*)a.x + row / a.t / a.h * a.x_strides[0] + head * a.x_strides[1];
    const Real *weight = (const Real*)a.weight + tree * planes * a.d, *offset = (const Real*)a.offset + tree * planes;
    const int64_t last = std::min(a.n, first + stretch) - 1;
    for (int64_t i = first; i <= last; i += 4) {
      // Four vectors at a time; at the end the last one again.
      const Real *vectors[4], *rows[4];
      int64_t at[4], leaf[4] = {};
      for (int k = 0; k < 4; k++) at[k] = std::min(i + k, last), vectors[k] = x + at[k] * a.x_strides[2];
      for (int64_t l = 0; l < a.height; l++) {
        for (int k = 0; k < 4; k++) rows[k] = weight + ((1ll << l) - 1 + leaf[k]) * a.d;
        Real products[4];
        dots(vectors, rows, a.d, products);
        for (int k = 0; k < 4; k++) {
          const Real score = products[k] + offset[(1ll << l) - 1 + leaf[k]];
          if (a.scores) ((Real*)a.scores)[(row * a.n + at[k]) * a.height + l] = score;
          leaf[k] = 2 * leaf[k] + (score > 0);
        }
      }
      for (int k = 0; k < 4; k++) a.leaf[row * a.n + at[k]] = leaf[k];
    }
  });
}

// What the vectors from `first` to before `last` of one head of a sequence give and take. `planes` of all trees, then their offsets: sums of
// this stretch.
void path(const PathArgs& a, int64_t batch, int64_t head, int64_t first, int64_t last, float* planes) {
  const int64_t each = (1ll << a.height) - 1, passed = a.t * a.height, row = batch * a.h + head;
  const float* weight = a.weight + head * a.t * each * a.d;
  std::vector<int64_t> node(passed);
  Floats slope(passed);
  for (int64_t i = first; i < last; i++) {
    const float* x = a.x + batch * a.x_strides[0] + head * a.x_strides[1] + i * a.x_strides[2];
    float* grad = a.grad_x + (row * a.n + i) * a.d;
    for (int64_t t = 0, k = 0; t < a.t; t++)
      for (int64_t l = 0, at = (row * a.t + t) * a.n + i; l < a.height; l++, k++) {
        node[k] = t * each + (1ll << l) - 1 + (a.leaf[at] >> (a.height - l)), slope[k] = a.slopes[at * a.height + l];
        planes[a.t * each * a.d + node[k]] += slope[k];
      }
    int64_t c = 0;
    for (; c + W <= a.d; c += W) {
      const vec here = load(x + c);
      vec sum = {};
      for (int64_t k = 0; k < passed; k++) {
        float* plane = planes + node[k] * a.d + c;
        sum += load(weight + node[k] * a.d + c) * slope[k];
        store(plane, load(plane) + here * slope[k]);
      }
      store(grad + c, sum);
    }
    for (; c < a.d; c++) {
      grad[c] = 0.f;
      for (int64_t k = 0; k < passed; k++) grad[c] += weight[node[k] * a.d + c] * slope[k], planes[node[k] * a.d + c] += x[c] * slope[k];
    }
  }
}

// The keys of one unit sorted by node, a counting sort a level, and where its queries' nodes stand among them: from the deepest level
// up as long as a query finds nothing. How many levels that took.
int64_t climb(const ClimbArgs& a, int64_t unit) {
  const int64_t lists = a.ancestors ? a.deepest + 1 : 1, base = unit * lists * a.m, sequence = unit / (a.u / a.b);
  const int64_t *key_leaf = a.key_leaf + unit * a.m, *query_leaf = a.query_leaf + unit * a.r * a.n;
  const int64_t *key_segment = a.key_segment ? a.key_segment + sequence * a.m : nullptr;
  const int64_t *query_segment = a.query_segment ? a.query_segment + sequence * a.n : nullptr;
  const uint8_t* gone = a.gone ? a.gone + unit * a.m : nullptr;
  std::vector<int64_t> waiting(a.r * a.n);  // by token, so that what a query may see only grows
  for (int64_t i = 0; i < a.n; i++)
    for (int64_t r = 0; r < a.r; r++) waiting[i * a.r + r] = r * a.n + i;
  std::vector<int64_t> code(a.m), next, low, high;
  int64_t list = 0;
  for (; list < lists && !waiting.empty(); list++) {
    const int64_t level = a.deepest - list, shift = a.height - level, codes = (a.segments << level) + 1;
    next.assign(codes + 1, 0);
    for (int64_t j = 0; j < a.m; j++) {
      code[j] = gone && gone[j] ? codes - 1 : (key_leaf[j] >> shift) + (key_segment ? key_segment[j] << level : 0);
      next[code[j] + 1]++;
    }
    for (int64_t c = 0; c < codes; c++) next[c + 1] += next[c];
    low = high = next;
    int64_t* order = a.order + base + list * a.m;
    for (int64_t j = 0; j < a.m; j++) order[next[code[j]]++] = unit * a.m + j;
    int64_t below_low = 0, below_high = 0, still = 0;
    for (const int64_t id : waiting) {
      const int64_t i = id % a.n, at = unit * a.r * a.n + id;
      for (; below_low < a.low[i]; below_low++) low[code[below_low]]++;
      for (; below_high < a.high[i]; below_high++) high[code[below_high]]++;
      const int64_t node = (query_leaf[id] >> shift) + (query_segment ? query_segment[i] << level : 0);
      if (a.ancestors && level && low[node] == high[node]) {
        waiting[still++] = id;
        continue;
      }
      a.start[at] = list * a.m + low[node], a.stop[at] = list * a.m + high[node];
      if (a.level) a.level[at] = level, a.node[at] = node;
    }
    waiting.resize(still);
  }
  for (int64_t at = list * a.m; at < lists * a.m; at++) a.order[base + at] = unit * a.m + at % a.m;
  return list;
}

}  // namespace

extern "C" void trees_route(const RouteArgs* args) { args->dtype ? route<double>(*args) : route<float>(*args); }

extern "C" void trees_path(const PathArgs* args) {
  const PathArgs& a = *args;
  // Stretches that do not follow the threads: their sums are added in order, the same on any number of them.
  const int64_t planes = a.t * ((1ll << a.height) - 1), stretch = std::max<int64_t>(2048, 16 * planes), parts = (a.n + stretch - 1) / stretch;
  const int64_t size = planes * (a.d + 1);
  std::vector<Floats> sums(a.h * a.b * parts);
  parallel(a, sums.size(), [&](int64_t task) {
    const int64_t first = task % parts * stretch, batch = task / parts % a.b, head = task / parts / a.b;
    sums[task].assign(size, 0.f);
    path(a, batch, head, first, std::min(a.n, first + stretch), sums[task].data());
  });
  parallel(a, a.h, [&](int64_t head) {
    Floats& total = sums[head * a.b * parts];
    for (int64_t part = 1; part < a.b * parts; part++) add_row(sums[head * a.b * parts + part].data(), size, total.data());
    std::copy_n(total.data(), planes * a.d, a.grad_weight + head * planes * a.d);
    std::copy_n(total.data() + planes * a.d, planes, a.grad_offset + head * planes);
  });
}

extern "C" int64_t trees_climb(const ClimbArgs* args) {
  const ClimbArgs& a = *args;
  std::vector<int64_t> used(a.u);
  parallel(a, a.u, [&](int64_t unit) { used[unit] = climb(a, unit); });
  return *std::max_element(used.begin(), used.end());
}

extern "C" void trees_coarse(const CoarseArgs* args) {
  const CoarseArgs& a = *args;
  // Few units: their channels are shared out, in whole cache lines.
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>((a.threads + a.u - 1) / a.u, a.e / 16));
  const int64_t width = round_up((a.e + shares - 1) / shares, 16);
  parallel(a, a.u * shares, [&](int64_t task) {
    const int64_t unit = task / shares, from = task % shares * width, to = std::min(a.e, from + width);
    if (from < a.e) a.dtype ? coarse<double>(a, unit, from, to) : coarse<float>(a, unit, from, to);
  });
}
