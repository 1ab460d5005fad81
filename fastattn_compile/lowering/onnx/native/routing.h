// Queries and keys of a node on their way to the leaves of decision trees, for both forms of tree attention.
#pragma once
#include <memory>

#include "plain.h"
#include "trees.h"

namespace {

// Numbers of a node in the type that routing works in, float or double: as they lie, or a copy.
template <typename Real>
class As {
 public:
  As(ort::Type type, const void* from, size_t count) {
    if (type == (std::is_same_v<Real, double> ? ort::DOUBLE : ort::FLOAT)) {
      at = (const Real*)from;
      return;
    }
    copy.resize(count), at = copy.data();
    by_type(type, [&](auto t) {
      for (size_t i = 0; i < count; i++) copy[i] = (Real)wide(((const decltype(t)*)from)[i]);
    });
  }
  operator const Real*() const { return at; }

 private:
  const Real* at;
  std::vector<Real> copy;
};

template <typename Real>
As<Real> parameter(const Call& call, size_t index, const std::vector<int64_t>& sizes) {
  const void* from = nullptr;
  const std::vector<int64_t> found = call.read(4 + index, from);
  if (found != sizes) throw std::runtime_error("parameter " + std::to_string(index) + " has not the sizes of its trees");
  size_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return As<Real>(call.type_of(4 + index), from, count);
}

// Leaves of one tree: of keys (units, m), of queries (units, group, n). A unit is a key head of a sequence.
struct Leaves {
  std::vector<int64_t> key, query;
};

struct Trees {
  int64_t height, count;
  bool shared;  // queries go by the planes of the keys

  Trees(const Attributes& given) : height(given.positive("height")), count(given.positive("n_trees")), shared(given.integer("shared")) {
    if (height > 24) throw std::runtime_error("height must be 24 or less, got " + std::to_string(height));
  }
  int64_t parameters() const { return shared ? 2 : 4; }

  // The leaves of all trees.
  template <typename Real>
  std::vector<Leaves> route(Call& call) const {
    const As<Real> key(call.type, call.key, call.b * call.g * call.m * call.d), query(call.type, call.query, call.b * call.h * call.n * call.d);
    const int64_t group = call.h / call.g;
    const std::vector<int64_t> of_keys = follow<Real>(call, key, call.g, call.m, 0);
    // Query heads of a key head stand one after another: with the keys' planes they are one long head.
    const std::vector<int64_t> of_queries =
        shared ? follow<Real>(call, query, call.g, group * call.n, 0) : follow<Real>(call, query, call.h, call.n, 2);
    std::vector<Leaves> trees(count);
    const auto take = [&](const std::vector<int64_t>& from, int64_t heads, int64_t length, int64_t tree, std::vector<int64_t>& to) {
      for (int64_t head = 0; head < heads; head++) {
        const auto begin = from.begin() + (head * count + tree) * length;
        to.insert(to.end(), begin, begin + length);
      }
    };
    for (int64_t tree = 0; tree < count; tree++) {
      take(of_keys, call.b * call.g, call.m, tree, trees[tree].key);
      take(of_queries, call.b * (shared ? call.g : call.h), (shared ? group : 1) * call.n, tree, trees[tree].query);
    }
    return trees;
  }

 private:
  // Leaves (b, heads, trees, length).
  template <typename Real>
  std::vector<int64_t> follow(Call& call, const Real* x, int64_t heads, int64_t length, size_t first) const {
    const int64_t planes = (1ll << height) - 1;
    const As<Real> weight = parameter<Real>(call, first, {first ? call.h : call.g, count, planes, call.d});
    const As<Real> offset = parameter<Real>(call, first + 1, {first ? call.h : call.g, count, planes});
    std::vector<int64_t> leaf(call.b * heads * count * length);
    RouteArgs a{};
    a.x = x, a.weight = (const Real*)weight, a.offset = (const Real*)offset, a.leaf = leaf.data();
    a.x_strides[0] = heads * length * call.d, a.x_strides[1] = length * call.d, a.x_strides[2] = call.d;
    a.b = call.b, a.h = heads, a.t = count, a.n = length, a.d = call.d, a.height = height;
    a.threads = call.threads, a.dtype = std::is_same_v<Real, double>, a.spread = spread, a.pool = &call.session;
    trees_route(&a);
    return leaf;
  }
};

// A vector that is not finite has no leaf: a query like that, and every query that may see a key like that, gives NaN, so that no
// leaf hides it. `high(i)`: one past the last key that query i may see.
template <typename High>
void lose_nonfinite(Call& call, const High& high) {
  by_type(call.type, [&](auto t) {
    typedef decltype(t) T;
    const auto bad = [&](const T* x) {
      double sum = 0.;
      for (int64_t c = 0; c < call.d; c++) sum += wide(x[c]) * 0.;
      return sum != 0.;
    };
    call.parallel(call.b * call.g, [&](int64_t u) {
      const int64_t batch = u / call.g, g = u % call.g;
      int64_t first = 0;
      while (first < call.m && ((call.real && !call.real[batch * call.m + first]) || !bad(call.key_of<T>(batch, g) + first * call.d))) first++;
      for (int64_t h = g * (call.h / call.g); h < (g + 1) * (call.h / call.g); h++)
        for (int64_t i = 0; i < call.n; i++)
          if (first < high(i) || bad(call.query_of<T>(batch, h) + i * call.d))
            for (int64_t c = 0; c < call.e; c++)
              thin(std::numeric_limits<double>::quiet_NaN(), call.out_of<T>(batch, h)[i * call.e + c]);
    });
  });
}

}  // namespace
