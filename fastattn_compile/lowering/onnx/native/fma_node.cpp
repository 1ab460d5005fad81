// Fast multipole attention as a node.
#include "fma.cpp"
#include "nodes.h"
#include "plain.h"

namespace {

class Fma {
 public:
  static constexpr const char* NAME = "FMA";
  static constexpr int64_t BODY = 1;
  static constexpr size_t PARAMETERS = 0;

  Fma(const Attributes& given, const Mask& mask)
      : scale(given.scale()), block(given.positive("block")), rank(given.positive("rank")), sinks(given.integer("sinks")),
        weighted(given.integer("scale_attn")), causal(mask.causal) {
    mask.refuse_windows();
    if (block % rank || sinks < 0 || sinks > block) throw std::runtime_error("rank must divide block, and sinks be at most block");
  }

  void run(Call& call) const {
    call.refuse_other_lengths();
    if (call.empty()) return;
    BlockArgs a = call.arguments<BlockArgs>(scale);
    a.out = call.out, a.real = call.real;
    a.out_strides[0] = a.h * a.n * a.e, a.out_strides[1] = a.n * a.e, a.out_strides[2] = a.e;
    a.m = block, a.p = rank, a.sinks = sinks, a.causal = causal, a.weighted = weighted;
    if (call.type != ort::DOUBLE) {
      Floats log_sum_exp(a.b * a.h * a.n);
      a.log_sum_exp = log_sum_exp.data();
      if (fma_run(&a) == 0) return;
    }
    const Levels levels(a.n, a.m, a.p);
    by_type(call.type, [&](auto t) {
      call.parallel(a.b * a.g, [&](int64_t u) { head<decltype(t)>(call, a, levels, u / a.g, u % a.g); });
    });
  }

 private:
  double scale;
  int64_t block, rank, sinks;
  bool weighted, causal;

  // Appends the means of the tokens that the pooled rows of one key head stand for.
  template <typename T>
  static void pool(const BlockArgs& a, const Levels& levels, const Head& head, Side<T>& side) {
    const int64_t channels = side.channels;
    side.pooled.assign(levels.rows * channels, 0.);
    if (!levels.count) return;
    for (int64_t i = 0; i < a.n; i++)
      if (head.pooled[i])
        for (int64_t c = 0; c < channels; c++) side.pooled[i / (a.m / a.p) * channels + c] += side(i, c);
    for (int64_t l = 1; l < levels.count; l++)
      for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
        for (int64_t c = 0; c < channels; c++)
          side.pooled[(levels.start[l] + r / 2) * channels + c] += side.pooled[(levels.start[l - 1] + r) * channels + c];
    for (int64_t r = 0; r < levels.rows; r++)
      for (int64_t c = 0; c < channels; c++) side.pooled[r * channels + c] /= std::max(1.f, head.counts[r]);
  }

  static std::vector<Met> meet(const BlockArgs& a, const Levels& levels, const Head& head, const uint8_t* real, int64_t block) {
    std::vector<Met> rows;
    const int64_t stop = std::min(a.n, (block + (a.causal ? 1 : 2)) * a.m);
    for (int64_t i = std::max<int64_t>(0, (block - 1) * a.m); i < stop; i++)
      if (!real || real[i]) rows.push_back({i, 0.});
    for (const int64_t sink : head.sinks) {
      const int64_t apart = block - sink / a.m;
      if (a.causal ? apart > 1 : std::abs(apart) > 1) rows.push_back({sink, 0.});
    }
    for (int64_t l = 0; l < levels.count; l++) {
      const int64_t parent = block >> (l + 1), second = (block >> l) & 1;
      for (int side = -1; side <= (a.causal ? -1 : 1); side += 2)
        for (int child = 0; child < 2; child++) {
          const int64_t group = 2 * (parent + side) + child;
          if (!(side < 0 ? child <= second : child >= second) || group < 0 || group >= levels.groups[l]) continue;
          for (int64_t row = levels.start[l] + group * a.p; row < levels.start[l] + (group + 1) * a.p; row++)
            if (head.counts[row] > 0) rows.push_back({a.n + row, a.weighted ? std::log((double)head.counts[row]) : 0.});
        }
    }
    return rows;
  }

  template <typename T>
  void head(const Call& call, const BlockArgs& a, const Levels& levels, int64_t batch, int64_t g) const {
    Head head;
    choose_sinks(a, batch, head);
    count(a, levels, batch * a.g + g, head);
    Side<T> key{call.key_of<T>(batch, g), a.n, a.d, {}}, value{call.value_of<T>(batch, g), a.n, a.e, {}};
    pool(a, levels, head, key), pool(a, levels, head, value);
    std::vector<double> room;
    for (int64_t block = 0; block < levels.blocks; block++) {
      const std::vector<Met> rows = meet(a, levels, head, a.real ? a.real + batch * a.n : nullptr, block);
      for (int64_t h = g * (a.h / a.g); h < (g + 1) * (a.h / a.g); h++)
        for (int64_t i = block * a.m; i < std::min(a.n, (block + 1) * a.m); i++)
          attend(call.query_of<T>(batch, h) + i * a.d, key, value, scale, rows, causal ? i : a.n, room,
                 call.out_of<T>(batch, h) + i * a.e);
    }
  }
};

}  // namespace

void add_fma(std::vector<const ort::Op*>& to) { Operators<Fma>::add(to); }
