// What all our nodes share: attributes, the sizes of their tensors, and how a kernel becomes a custom operator of the runtime.
//
// A kernel is a class: NAME of the node, BODY the version of the body whose meaning it has, a constructor that reads attributes
// and throws where it does not know one, and `run`. One operator a type: a runtime that knows a name takes no function for it.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t NONE = -1;

// A mask as its terms say; what nobody here knows is refused.
struct Mask {
  bool causal = false, padded = false, end_aligned = false;
  int64_t left = NONE, right = NONE;  // largest distances back and ahead, NONE without bound

  explicit Mask(const std::string& text) {
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find(" & ", at), text.size());
      const std::string term = text.substr(at, end - at);
      int64_t number = 0;
      if (term == "causal") causal = true, right = 0;
      else if (term == "key_padding") padded = true;
      else if (term == "end_aligned") end_aligned = true;
      else if (counts(term, "window", number) && number > 0) left = number - 1;
      else if (counts(term, "left", number)) left = number;
      else if (counts(term, "right", number)) right = number;
      else if (term != "none") throw std::runtime_error("the library does not know the mask '" + text + "'");
      at = end + 3;
    }
    known = text;
  }
  // For kernels of causal and bidirectional attention alone.
  void refuse_windows() const {
    if (left != NONE || right > 0) throw std::runtime_error("the library does not know the mask '" + known + "' here");
  }

 private:
  std::string known;
  static bool counts(const std::string& term, const std::string& name, int64_t& number) {
    if (term.size() < name.size() + 3 || term.compare(0, name.size() + 1, name + "(") || term.back() != ')') return false;
    const std::string digits = term.substr(name.size() + 1, term.size() - name.size() - 2);
    if (digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 15) return false;
    number = std::stoll(digits);
    return true;
  }
};

struct Attributes {
  ort::Api* api;
  const ort::Info* info;
  ort::Type type;

  int64_t integer(const char* name) const { return ort::integer(api, info, name); }
  int64_t positive(const char* name) const {
    const int64_t value = integer(name);
    if (value < 1) throw std::runtime_error(std::string(name) + " must be 1 or more, got " + std::to_string(value));
    return value;
  }
  std::string text(const char* name) const { return ort::text(api, info, name); }
  double scale() const { return type == ort::DOUBLE ? std::stod(text("scale_exact")) : ort::real(api, info, "scale"); }
};

struct Session {
  ort::Api* api;
  const ort::Context* context;
};
inline void spread(void* session, void (*work)(void*, size_t), size_t count, void* data) {
  const Session& mine = *(Session*)session;
  ort::spread(mine.api, mine.context, work, count, data);
}

// A run of a node: tensors that lie dense, and their sizes.
struct Call {
  Session session;
  ort::Type type;
  const void *query = nullptr, *key = nullptr, *value = nullptr;  // (b, h, n, d), (b, g, m, d), (b, g, m, e)
  const uint8_t* real = nullptr;                                  // (b, m), or null
  void* out = nullptr;                                            // (b, h, n, e)
  int64_t b, h, g, n, m, d, e;
  int32_t threads = (int32_t)std::max(1u, std::thread::hardware_concurrency());

  Call(ort::Api* api, ort::Context* context, ort::Type type, bool padded) : session{api, context}, type(type) {
    const std::vector<int64_t> q = read(0, query), k = read(1, key), v = read(2, value);
    if (q.size() != 4 || k.size() != 4 || v.size() != 4 || k[0] != q[0] || v[0] != q[0] || k[1] != v[1] || k[1] < 1 ||
        q[1] % k[1] || v[2] != k[2] || k[3] != q[3])
      throw std::runtime_error("takes query (b, h, n, d), key (b, g, m, d) and value (b, g, m, e), g dividing h");
    b = q[0], h = q[1], n = q[2], d = q[3], g = k[1], m = k[2], e = v[3];
    const void* given = nullptr;
    const bool there = ort::inputs(api, context) > 3 && ort::input(api, context, 3);
    if (padded != there) throw std::runtime_error("key_padding does not fit its mask");
    if (padded && read(3, given) != std::vector<int64_t>{b, m}) throw std::runtime_error("key_padding must be (b, m)");
    real = (const uint8_t*)given;
    out = ort::data(api, ort::output(api, context, 0, {b, h, n, e}));
  }
  bool empty() const { return !b || !h || !n || !e; }
  void refuse_other_lengths() const {
    if (n != m) throw std::runtime_error("takes query, key and value of one length");
  }
  std::vector<int64_t> read(size_t index, const void*& at) const {
    const ort::Tensor* given = ort::input(session.api, session.context, index);
    if (!given) throw std::runtime_error("input " + std::to_string(index) + " is missing");
    at = ort::data(session.api, given);
    return ort::sizes(session.api, given);
  }
  ort::Type type_of(size_t index) const { return ort::type_of(session.api, ort::input(session.api, session.context, index)); }
  template <typename T>
  const T* query_of(int64_t batch, int64_t head) const { return (const T*)query + (batch * h + head) * n * d; }
  template <typename T>
  const T* key_of(int64_t batch, int64_t head) const { return (const T*)key + (batch * g + head) * m * d; }
  template <typename T>
  const T* value_of(int64_t batch, int64_t head) const { return (const T*)value + (batch * g + head) * m * e; }
  template <typename T>
  T* out_of(int64_t batch, int64_t head) const { return (T*)out + (batch * h + head) * n * e; }

  // What the arguments of all sources have by one name.
  template <typename Args>
  Args arguments(double scale) {
    Args a{};
    a.query = query, a.key = key, a.value = value;
    a.b = b, a.h = h, a.g = g, a.n = n, a.d = d, a.e = e;
    const auto dense = [](int64_t* to, int64_t heads, int64_t tokens, int64_t channels) {
      to[0] = heads * tokens * channels, to[1] = tokens * channels, to[2] = channels;
    };
    dense(a.query_strides, h, n, d), dense(a.key_strides, g, m, d), dense(a.value_strides, g, m, e);
    a.scale = (float)scale, a.threads = threads, a.spread = spread, a.pool = &session;
    a.dtype = type == ort::BFLOAT16 ? 1 : type == ort::FLOAT16 ? 2 : 0;
    return a;
  }
  template <typename Work>
  void parallel(int64_t count, const Work& work) {
    struct {
      Spread spread;
      void* pool;
      int32_t threads;
    } const mine{spread, &session, threads};
    ::parallel(mine, count, work);
  }
};

// work(number) with a number of the type at hand.
template <typename Work>
void by_type(ort::Type type, const Work& work) {
  switch (type) {
    case ort::FLOAT: return work(0.f);
    case ort::BFLOAT16: return work(bf16());
    case ort::FLOAT16: return work((_Float16)0);
    default: return work(0.);
  }
}

template <typename Kernel>
struct Node {
  ort::Api* api;
  ort::Type type;
  Mask mask;
  Kernel kernel;

  // What `work` throws as a status.
  template <typename Work>
  static ort::Status* checked(ort::Api* api, const Work& work) {
    try {
      work();
      return nullptr;
    } catch (const ort::Failure& failure) {
      return failure.status;
    } catch (const std::exception& error) {
      return ort::status(api, ort::FAIL, std::string("fastattn::") + Kernel::NAME + ": " + error.what());
    }
  }
  static ort::Status* create(const ort::Op* op, ort::Api* api, const ort::Info* info, void** node) {
    return checked(api, [&] {
      const Attributes given{api, info, (ort::Type)op->input_type(op, 0)};
      const int64_t version = given.integer("body_version");
      if (version != Kernel::BODY)
        throw std::runtime_error("this library computes body_version " + std::to_string(Kernel::BODY) + ", the model has " +
                                 std::to_string(version) + "; update fastattn-compile, or run the model without the library");
      const Mask mask(given.text("mask"));
      *node = new Node{api, given.type, mask, Kernel(given, mask)};
    });
  }
  static ort::Status* compute(void* node, ort::Context* context) {
    const Node& mine = *(Node*)node;
    return checked(mine.api, [&] {
      Call call(mine.api, context, mine.type, mine.mask.padded);
      mine.kernel.run(call);
    });
  }
};

template <typename Kernel, int TYPE>
constexpr ort::Op operator_of() {
  return {
      ort::VERSION,
      nullptr,
      [](const ort::Op*) { return Kernel::NAME; },
      [](const ort::Op*) { return "CPUExecutionProvider"; },
      [](const ort::Op*, size_t index) { return index == 3 ? (int)ort::BOOL : index > 3 ? (int)ort::ANY : TYPE; },
      [](const ort::Op*) { return (size_t)4 + Kernel::PARAMETERS; },
      [](const ort::Op*, size_t) { return TYPE; },
      [](const ort::Op*) { return (size_t)1; },
      nullptr,
      [](void* node) { delete (Node<Kernel>*)node; },
      [](const ort::Op*, size_t index) { return index < 3 ? (int)ort::REQUIRED : (int)ort::OPTIONAL; },
      [](const ort::Op*, size_t) { return (int)ort::REQUIRED; },
      [](const ort::Op*, size_t) { return 0; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      Node<Kernel>::create,
      Node<Kernel>::compute,
      nullptr,
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
  };
}

// The operators of a node, one a type.
template <typename Kernel>
struct Operators {
  static constexpr ort::Op ops[] = {operator_of<Kernel, ort::FLOAT>(), operator_of<Kernel, ort::FLOAT16>(),
                                    operator_of<Kernel, ort::BFLOAT16>(), operator_of<Kernel, ort::DOUBLE>()};
  static void add(std::vector<const ort::Op*>& to) {
    for (const ort::Op& op : ops) to.push_back(&op);
  }
};

}  // namespace
