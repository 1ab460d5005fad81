// Coarse tree attention as a node.
#include "nodes.h"
#include "routing.h"

namespace {

class TreeCoarse {
 public:
  static constexpr const char* NAME = "TreeCoarse";
  static constexpr int64_t BODY = 1;
  static constexpr size_t PARAMETERS = 5;

  TreeCoarse(const Attributes& given, const Mask& mask) : trees(given), root(given.integer("include_root")), causal(mask.causal) {
    mask.refuse_windows();
    const std::string weights = given.text("level_weights");
    if (weights != "free" && weights != "softmax") throw std::runtime_error("the library does not know level_weights '" + weights + "'");
    softmax = weights == "softmax";
  }

  void run(Call& call) const {
    if (causal) call.refuse_other_lengths();
    if (call.empty()) return;
    if (call.type == ort::DOUBLE) read<double>(call);
    else read<float>(call);
    lose_nonfinite(call, [&](int64_t i) { return causal ? i + 1 : call.m; });
  }

 private:
  Trees trees;
  bool root, causal, softmax;

  template <typename Real>
  void read(Call& call) const {
    const int64_t units = call.b * call.g, group = call.h / call.g, levels = trees.height + 1, rows = call.b * call.h * call.n;
    const As<Real> learned = parameter<Real>(call, trees.parameters(), {call.h, trees.count, levels});
    const As<Real> value(call.type, call.value, units * call.m * call.e);
    const std::vector<Leaves> leaves = trees.route<Real>(call);
    std::vector<float> real(units * call.m, 1.f);
    for (size_t i = 0; call.real && i < real.size(); i++) real[i] = call.real[(int64_t)i / (call.g * call.m) * call.m + i % call.m];
    std::vector<Real> own(units * group * levels), out(rows * call.e), total;
    for (int64_t tree = 0; tree < trees.count; tree++) {
      for (int64_t head = 0; head < units * group; head++)
        for (int64_t l = 0; l < levels; l++) own[head * levels + l] = learned[(head % call.h * trees.count + tree) * levels + l];
      CoarseArgs a{};
      a.key_leaf = leaves[tree].key.data(), a.query_leaf = leaves[tree].query.data();
      a.real = real.data(), a.value = (const Real*)value, a.learned = own.data(), a.out = out.data();
      a.u = units, a.r = group, a.n = call.n, a.L = call.m, a.e = call.e, a.height = trees.height;
      a.causal = causal, a.softmax = softmax, a.root = root, a.share = 1. / trees.count;
      a.threads = call.threads, a.dtype = std::is_same_v<Real, double>, a.spread = spread, a.pool = &call.session;
      trees_coarse(&a);
      if (!tree) total = out;
      else
        for (size_t i = 0; i < out.size(); i++) total[i] += out[i];
    }
    by_type(call.type, [&](auto t) {
      for (size_t i = 0; i < total.size(); i++) thin(total[i], ((decltype(t)*)call.out)[i]);
    });
  }
};

}  // namespace

void add_tree_coarse(std::vector<const ort::Op*>& to) { Operators<TreeCoarse>::add(to); }
