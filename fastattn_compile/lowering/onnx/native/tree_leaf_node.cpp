// Leaf attention as a node: every query meets the keys of its leaf, or of the deepest node above that shows it one, and what is
// near.
#include "nodes.h"
#include "ranges.h"
#include "routing.h"

namespace {

// For every query a range of lists of keys, one list a level: as RangeArgs has it.
struct Lists {
  int64_t count = 0;                       // lists of a unit
  std::vector<int64_t> order, start, stop;
};

class TreeLeaf {
 public:
  static constexpr const char* NAME = "TreeLeaf";
  static constexpr int64_t BODY = 1;
  static constexpr size_t PARAMETERS = 4;

  TreeLeaf(const Attributes& given, const Mask& mask)
      : trees(given), scale(given.scale()), window(given.integer("window")), sinks(given.integer("sinks")), right(mask.right),
        end_aligned(mask.end_aligned) {
    const std::string fallback = given.text("fallback");
    if (mask.left != NONE) throw std::runtime_error("the library knows no sliding window here");
    if (fallback != "ancestor" && fallback != "zero") throw std::runtime_error("the library does not know the fallback '" + fallback + "'");
    if (trees.count > 1 && given.text("combine") != "mean") throw std::runtime_error("the library takes the mean of several trees alone");
    if (window < 0 || sinks < 0 || (sinks && !window)) throw std::runtime_error("sinks stand beside a window alone");
    climbs = fallback == "ancestor";
  }

  void run(Call& call) const {
    if (call.empty()) return;
    const std::vector<Leaves> leaves = call.type == ort::DOUBLE ? trees.route<double>(call) : trees.route<float>(call);
    std::vector<Lists> lists;
    for (const Leaves& of : leaves) lists.push_back(sorted(call, of));
    if (call.type == ort::DOUBLE || !fast(call, lists))
      by_type(call.type, [&](auto t) {
        call.parallel(call.b * call.g, [&](int64_t u) { plain<decltype(t)>(call, lists, u); });
      });
    lose_nonfinite(call, [&](int64_t i) { return high(call, i); });
  }

 private:
  Trees trees;
  double scale;
  int64_t window, sinks, right;
  bool end_aligned, climbs;

  int64_t place(const Call& call, int64_t i) const { return i + (end_aligned ? call.m - call.n : 0); }
  // One past the last key that query i may see.
  int64_t high(const Call& call, int64_t i) const {
    return right == NONE ? call.m : std::max<int64_t>(0, std::min(call.m, place(call, i) + right + 1));
  }
  std::vector<int64_t> sinks_of(const Call& call, int64_t batch) const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < call.m && (int64_t)found.size() < sinks; i++)
      if (!call.real || call.real[batch * call.m + i]) found.push_back(i);
    return found;
  }

  // Keys sorted by node, level by level from the leaves up while a query finds none that it may see.
  Lists sorted(Call& call, const Leaves& leaves) const {
    const int64_t units = call.b * call.g, m = call.m, n = call.n, rows = call.b * call.h * n, group = call.h / call.g;
    std::vector<int64_t> low(n, 0), highs(n);
    for (int64_t i = 0; i < n; i++) highs[i] = high(call, i);
    std::vector<uint8_t> gone(call.real ? units * m : 0);
    for (size_t i = 0; i < gone.size(); i++) gone[i] = !call.real[i / (call.g * m) * m + i % m];
    Lists made;
    made.count = climbs ? trees.height + 1 : 1;
    made.order.resize(units * made.count * m), made.start.resize(rows), made.stop.resize(rows);
    ClimbArgs a{};
    a.key_leaf = leaves.key.data(), a.query_leaf = leaves.query.data(), a.gone = call.real ? gone.data() : nullptr;
    a.low = low.data(), a.high = highs.data(), a.order = made.order.data(), a.start = made.start.data(), a.stop = made.stop.data();
    a.b = call.b, a.u = units, a.r = group, a.n = n, a.m = m, a.height = a.deepest = trees.height, a.segments = 1, a.ancestors = climbs;
    a.threads = call.threads, a.spread = spread, a.pool = &call.session;
    trees_climb(&a);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t base = i / (group * n) * made.count * m;
      made.start[i] += base, made.stop[i] += base;
    }
    return made;
  }

  // What is near: rows of tokens that a window or a sink shows.
  struct Near {
    std::vector<int64_t> start, stop, low, high, from, to, extra;
    std::vector<uint8_t> hidden;
  };

  // False when a key or value that is met is not finite.
  bool fast(Call& call, const std::vector<Lists>& lists) const {
    const int64_t rows = call.b * call.h * call.n;
    RangeArgs a = call.arguments<RangeArgs>(scale);
    a.m = call.m;
    Floats near, near_mass, out(rows * call.e), mass(rows), total(rows * call.e, 0.f);
    Near at;
    if (window) {
      at = near_of(call);
      near.resize(rows * call.e), near_mass.resize(rows);
      RangeArgs w = a;
      w.lists = 1, w.s = sinks, w.start = at.start.data(), w.stop = at.stop.data(), w.out = near.data(), w.log_sum_exp = near_mass.data();
      w.hidden = at.hidden.data();
      if (sinks) w.extra = at.extra.data(), w.extra_low = at.from.data(), w.extra_high = at.to.data();
      if (ranges_run(&w)) return false;
      a.low = at.low.data(), a.high = at.high.data(), a.hidden = at.hidden.data();
    }
    for (const Lists& list : lists) {
      a.order = list.order.data(), a.start = list.start.data(), a.stop = list.stop.data(), a.lists = list.count;
      a.out = out.data(), a.log_sum_exp = mass.data();
      if (ranges_run(&a)) return false;
      for (int64_t i = 0; i < rows; i++) {
        float own = 1.f, other = 0.f;
        if (window) {
          const float most = std::max(mass[i], near_mass[i]);
          own = most > NEG_INF ? std::exp(mass[i] - most) : 0.f, other = most > NEG_INF ? std::exp(near_mass[i] - most) : 0.f;
          const float by = own + other > 0.f ? 1.f / (own + other) : 0.f;
          own *= by, other *= by;
        }
        for (int64_t c = i * call.e; c < (i + 1) * call.e; c++) total[c] += window ? own * out[c] + other * near[c] : out[c];
      }
    }
    by_type(call.type, [&](auto t) {
      for (size_t i = 0; i < total.size(); i++) thin((double)total[i] / trees.count, ((decltype(t)*)call.out)[i]);
    });
    return true;
  }

  Near near_of(const Call& call) const {
    const int64_t rows = call.b * call.h * call.n;
    Near at;
    for (auto* x : {&at.start, &at.stop, &at.low, &at.high, &at.from, &at.to}) x->resize(rows);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t i = row % call.n, unit = row / (call.h / call.g * call.n), here = place(call, i), most = high(call, i);
      const int64_t start = std::min(most, std::max<int64_t>(0, here - window + 1));
      at.low[row] = here - window + 1, at.high[row] = here + window;
      at.start[row] = unit * call.m + start, at.stop[row] = unit * call.m + std::max(start, std::min(most, here + window));
      at.from[row] = 0, at.to[row] = most;
    }
    at.hidden.assign(call.b * call.m, 0);
    at.extra.assign(call.b * sinks, NONE);
    for (int64_t batch = 0; batch < call.b; batch++) {
      const std::vector<int64_t> first = sinks_of(call, batch);
      std::copy(first.begin(), first.end(), at.extra.begin() + batch * sinks);
      for (int64_t i = 0; i < call.m; i++) at.hidden[batch * call.m + i] = call.real && !call.real[batch * call.m + i];
      for (const int64_t sink : first) at.hidden[batch * call.m + sink] = 1;
    }
    return at;
  }

  template <typename T>
  void plain(const Call& call, const std::vector<Lists>& lists, int64_t u) const {
    const int64_t batch = u / call.g, g = u % call.g, group = call.h / call.g;
    const Side<T> key{call.key_of<T>(batch, g), call.m, call.d, {}}, value{call.value_of<T>(batch, g), call.m, call.e, {}};
    const std::vector<int64_t> first = sinks_of(call, batch);
    const auto real = [&](int64_t j) { return !call.real || call.real[batch * call.m + j]; };
    std::vector<Met> near, rows;
    std::vector<double> room, out(call.e), total(call.e);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t i = 0; i < call.n; i++) {
        const int64_t row = (batch * call.h + h) * call.n + i, here = place(call, i), most = high(call, i);
        const auto in_window = [&](int64_t j) { return window && j > here - window && j < here + window; };
        near.clear();
        for (int64_t j = std::max<int64_t>(0, here - window + 1); window && j < std::min(most, here + window); j++)
          if (real(j)) near.push_back({j, 0.});
        for (const int64_t j : first)
          if (j < most && !in_window(j)) near.push_back({j, 0.});
        std::fill(total.begin(), total.end(), 0.);
        for (const Lists& list : lists) {
          rows = near;
          for (int64_t at = list.start[row]; at < list.stop[row]; at++) {
            const int64_t j = list.order[at] - u * call.m;
            if (!in_window(j) && std::find(first.begin(), first.end(), j) == first.end()) rows.push_back({j, 0.});
          }
          attend(call.query_of<T>(batch, h) + i * call.d, key, value, scale, rows, call.m, room, out.data());
          for (int64_t c = 0; c < call.e; c++) total[c] += out[c] / lists.size();
        }
        for (int64_t c = 0; c < call.e; c++) thin(total[c], call.out_of<T>(batch, h)[i * call.e + c]);
      }
  }
};

}  // namespace

void add_tree_leaf(std::vector<const ort::Op*>& to) { Operators<TreeLeaf>::add(to); }
