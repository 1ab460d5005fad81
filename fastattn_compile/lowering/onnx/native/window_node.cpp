// Local window attention as a node.
#include "nodes.h"
#include "plain.h"
#include "ranges.h"

namespace {

class Window {
 public:
  static constexpr const char* NAME = "Window";
  static constexpr int64_t BODY = 1;
  static constexpr size_t PARAMETERS = 0;

  Window(const Attributes& given, const Mask& mask)
      : scale(given.scale()), width(given.positive("width")), sinks(given.integer("sinks")), left(mask.left), right(mask.right) {
    if (sinks < 0) throw std::runtime_error("sinks must be 0 or more");
    if (mask.end_aligned) throw std::runtime_error("the library does not know a mask that is end_aligned here");
    back = mask.causal ? width - 1 : width / 2, ahead = mask.causal ? 0 : (width - 1) / 2;
  }

  void run(Call& call) const {
    call.refuse_other_lengths();
    if (call.empty()) return;
    if (call.type != ort::DOUBLE && fast(call)) return;
    by_type(call.type, [&](auto t) {
      call.parallel(call.b * call.g, [&](int64_t u) { head<decltype(t)>(call, u / call.g, u % call.g); });
    });
  }

 private:
  double scale;
  int64_t width, sinks, left, right, back, ahead;

  // What the mask shows of a query, and what of that is near: from the first to before the second.
  struct Sight {
    int64_t low, high, start, stop;
  };
  Sight sight(int64_t i, int64_t n) const {
    Sight s;
    s.low = left == NONE ? 0 : std::max<int64_t>(0, i - left), s.high = right == NONE ? n : std::min(n, i + right + 1);
    s.start = std::max(s.low, i - back), s.stop = std::max(s.start, std::min(s.high, i + ahead + 1));
    return s;
  }

  // The first real tokens of a sequence.
  std::vector<int64_t> sinks_of(const Call& call, int64_t batch) const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < call.n && (int64_t)found.size() < sinks; i++)
      if (!call.real || call.real[batch * call.n + i]) found.push_back(i);
    return found;
  }

  // False when a key or value is not finite.
  bool fast(Call& call) const {
    RangeArgs a = call.arguments<RangeArgs>(scale);
    a.m = call.m, a.lists = 1, a.s = sinks;
    const int64_t rows = call.b * call.h * call.n;
    std::vector<int64_t> start(rows), stop(rows), low(sinks ? rows : 0), high(low.size()), extra(call.b * sinks, NONE);
    for (int64_t row = 0; row < rows; row++) {
      const Sight s = sight(row % call.n, call.n);
      const int64_t head = row / call.n, base = (head / call.h * call.g + head % call.h / (call.h / call.g)) * call.n;
      start[row] = base + s.start, stop[row] = base + s.stop;
      if (sinks) low[row] = s.low, high[row] = s.high;
    }
    std::vector<uint8_t> hidden(sinks || call.real ? call.b * call.n : 0, 0);
    if (call.real)
      for (size_t i = 0; i < hidden.size(); i++) hidden[i] = !call.real[i];
    for (int64_t batch = 0; sinks && batch < call.b; batch++) {
      const std::vector<int64_t> found = sinks_of(call, batch);
      std::copy(found.begin(), found.end(), &extra[batch * sinks]);
      for (const int64_t sink : found) hidden[batch * call.n + sink] = 1;  // met besides
    }
    a.start = start.data(), a.stop = stop.data(), a.hidden = hidden.empty() ? nullptr : hidden.data();
    if (sinks) a.extra = extra.data(), a.extra_low = low.data(), a.extra_high = high.data();
    Floats out(call.type == ort::FLOAT ? 0 : rows * call.e), log_sum_exp(rows);
    a.out = call.type == ort::FLOAT ? (float*)call.out : out.data(), a.log_sum_exp = log_sum_exp.data();
    if (ranges_run(&a)) return false;
    by_type(call.type, [&](auto t) {
      decltype(t)* to = (decltype(t)*)call.out;
      for (size_t i = 0; i < out.size(); i++) thin(out[i], to[i]);
    });
    return true;
  }

  template <typename T>
  void head(const Call& call, int64_t batch, int64_t g) const {
    const Side<T> key{call.key_of<T>(batch, g), call.n, call.d, {}}, value{call.value_of<T>(batch, g), call.n, call.e, {}};
    const std::vector<int64_t> first = sinks_of(call, batch);
    std::vector<Met> rows;
    std::vector<double> room;
    for (int64_t i = 0; i < call.n; i++) {
      const Sight s = sight(i, call.n);
      rows.clear();
      for (int64_t j = s.start; j < s.stop; j++)
        if (!call.real || call.real[batch * call.n + j]) rows.push_back({j, 0.});
      for (const int64_t j : first)
        if (j >= s.low && j < s.high && (j < s.start || j >= s.stop)) rows.push_back({j, 0.});
      for (int64_t h = g * (call.h / call.g); h < (g + 1) * (call.h / call.g); h++)
        attend(call.query_of<T>(batch, h) + i * call.d, key, value, scale, rows, call.n, room, call.out_of<T>(batch, h) + i * call.e);
    }
  }
};

}  // namespace

void add_window(std::vector<const ort::Op*>& to) { Operators<Window>::add(to); }
