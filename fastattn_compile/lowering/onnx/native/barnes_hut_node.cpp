// Barnes-Hut attention as a node.
#include "barnes_hut.cpp"
#include "nodes.h"
#include "plain_tree.h"

namespace {

class BarnesHut {
 public:
  static constexpr const char* NAME = "BarnesHut";
  static constexpr int64_t BODY = 2;
  static constexpr size_t PARAMETERS = 0;

  BarnesHut(const Attributes& given, const Mask& mask)
      : scale(given.scale()), block(given.positive("block")), sinks(given.integer("sinks")), leaf(given.positive("leaf")),
        fanout(given.positive("fanout")), group(given.positive("group")), opened(given.positive("open")), beam(given.positive("beam")),
        causal(mask.causal), shared(given.integer("share_group")) {
    mask.refuse_windows();
    const std::string select = given.text("select");
    if (select != "mean" && select != "cumulant") throw std::runtime_error("the library does not choose by '" + select + "'");
    cumulant = select == "cumulant";
    if (block % leaf || block % group || fanout < 2 || sinks < 0 || sinks > block)
      throw std::runtime_error("leaf and group must divide block, fanout be 2 or more, and sinks be at most block");
  }

  void run(Call& call) const {
    call.refuse_other_lengths();
    if (call.empty()) return;
    std::vector<char> keys, values;
    if (!shared && call.h != call.g) {  // every query head chooses for itself: as if each had keys of its own
      call.key = repeated(call, call.key, call.d, keys), call.value = repeated(call, call.value, call.e, values);
      call.g = call.h;
    }
    BarnesHutArgs args{};
    BlockArgs& a = args.block = call.arguments<BlockArgs>(scale);
    a.out = call.out, a.real = call.real;
    a.out_strides[0] = a.h * a.n * a.e, a.out_strides[1] = a.n * a.e, a.out_strides[2] = a.e;
    a.m = block, a.sinks = sinks, a.causal = causal;
    args.leaf = leaf, args.fanout = fanout, args.group = group, args.cumulant = cumulant;
    // Levels whose nodes would all be kept decide nothing and are left out.
    for (int64_t width = leaf; (a.n + width - 1) / width > keep(args.levels) || !args.levels; width *= fanout) {
      if (args.levels == MOST_LEVELS) throw std::runtime_error("the tree has too many levels");
      args.keep[args.levels] = keep(args.levels), args.levels++;
    }
    if (call.type != ort::DOUBLE) {
      Floats log_sum_exp(a.b * a.h * a.n);
      a.log_sum_exp = log_sum_exp.data();
      if (barnes_hut_run(&args) == 0) return;
    }
    by_type(call.type, [&](auto t) {
      call.parallel(a.b * a.g, [&](int64_t u) { head<decltype(t)>(call, args, u / a.g, u % a.g); });
    });
  }

 private:
  static constexpr int64_t MOST_LEVELS = sizeof(BarnesHutArgs::keep) / sizeof(int64_t), LEAST_BEAM = 8;
  double scale;
  int64_t block, sinks, leaf, fanout, group, opened, beam;
  bool causal, shared, cumulant;

  // Rows of every key head as often as query heads read them.
  static const void* repeated(const Call& call, const void* from, int64_t channels, std::vector<char>& to) {
    const int64_t size = call.m * channels * (call.type == ort::DOUBLE ? 8 : call.type == ort::FLOAT ? 4 : 2);
    to.resize(call.b * call.h * size);
    for (int64_t i = 0; i < call.b * call.h; i++) std::memcpy(&to[i * size], (const char*)from + i / (call.h / call.g) * size, size);
    return to.data();
  }

  // Nodes of a level that are expanded, leaves that are opened.
  int64_t keep(int64_t level) const {
    if (!level) return opened;
    return std::max(std::min(beam, LEAST_BEAM), level > 62 ? 0 : beam >> (level - 1));
  }

  // Who speaks for the group of queries from `first` on, as in barnes_hut.cpp; what is not finite as 0.
  template <typename T>
  std::vector<double> voices(const Call& call, int64_t batch, int64_t g, int64_t first) const {
    const int64_t heads = call.h / call.g, start = causal ? std::max<int64_t>(0, first - group + 1) : first;
    const int64_t stop = causal ? first + 1 : std::min(call.n, first + group);
    std::vector<double> found(heads * call.d, 0.);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = start; t < stop; t++)
        for (int64_t c = 0; c < call.d; c++) {
          const double x = wide(call.query_of<T>(batch, g * heads + h)[t * call.d + c]);
          if (std::isfinite(x)) found[h * call.d + c] += x * scale / (double)(stop - start);
        }
    return found;
  }

  template <typename T>
  void head(const Call& call, const BarnesHutArgs& args, int64_t batch, int64_t g) const {
    const BlockArgs& a = args.block;
    const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
    Head head;
    choose_sinks(a, batch, head);
    const Side<T> key{call.key_of<T>(batch, g), a.n, a.d, {}}, value{call.value_of<T>(batch, g), a.n, a.e, {}};
    const PlainTree tree(args, cumulant, key, head.pooled);
    const int64_t heads = a.h / a.g;
    std::vector<double> room;
    for (int64_t first = 0; first < a.n; first += group) {
      const int64_t own = first / a.m;
      std::vector<Met> rows;
      for (int64_t i = std::max<int64_t>(0, (own - 1) * a.m); i < std::min(a.n, (own + (causal ? 1 : 2)) * a.m); i++)
        if (!real || real[i]) rows.push_back({i, 0.});
      for (const int64_t sink : head.sinks) {
        const int64_t apart = own - sink / a.m;
        if (causal ? apart > 1 : std::abs(apart) > 1) rows.push_back({sink, 0.});
      }
      for (const int64_t node : tree.open(first, voices<T>(call, batch, g, first), heads))
        for (int64_t i = node * leaf; i < std::min(a.n, (node + 1) * leaf); i++)
          if (head.pooled[i]) rows.push_back({i, 0.});
      for (int64_t h = g * heads; h < (g + 1) * heads; h++)
        for (int64_t i = first; i < std::min(a.n, first + group); i++)
          attend(call.query_of<T>(batch, h) + i * a.d, key, value, scale, rows, causal ? i : a.n, room, call.out_of<T>(batch, h) + i * a.e);
    }
  }
};

}  // namespace

void add_barnes_hut(std::vector<const ort::Op*>& to) { Operators<BarnesHut>::add(to); }
