// Our nodes as custom operators of ONNX Runtime. One operator a type: a runtime that knows a name takes no function for it.
#include "fma.cpp"
#include "runtime.h"
#include "plain.h"
#include <thread>

namespace {

constexpr int64_t FMA_BODY = 1;  // the body whose meaning the kernel has

struct Fma {
  ort::Api* api;
  int type;
  int64_t block, rank, sinks;
  bool causal, weighted, padded;
  double scale;
};

// The terms of a mask, of which the kernel must know every one.
bool read_mask(const std::string& mask, Fma& fma) {
  for (size_t at = 0; at < mask.size();) {
    const size_t end = std::min(mask.find(" & ", at), mask.size());
    const std::string term = mask.substr(at, end - at);
    if (term == "causal") fma.causal = true;
    else if (term == "key_padding") fma.padded = true;
    else if (term != "none" && term != "end_aligned") return false;
    at = end + 3;
  }
  return true;
}

ort::Status* create(const ort::Op* op, ort::Api* api, const ort::Info* info, void** kernel) {
  try {
    Fma fma{api, op->input_type(op, 0), 0, 0, 0, false, false, false, 0.};
    const int64_t version = ort::integer(api, info, "body_version");
    if (version != FMA_BODY)
      return ort::status(api, ort::FAIL, "fastattn::FMA: this library computes body_version " + std::to_string(FMA_BODY) +
                                             ", the model has " + std::to_string(version) +
                                             "; update fastattn-compile, or run the model without the library");
    const std::string mask = ort::text(api, info, "mask");
    if (!read_mask(mask, fma)) return ort::status(api, ort::FAIL, "fastattn::FMA: the library does not know the mask '" + mask + "'");
    fma.block = ort::integer(api, info, "block"), fma.rank = ort::integer(api, info, "rank");
    fma.sinks = ort::integer(api, info, "sinks"), fma.weighted = ort::integer(api, info, "scale_attn");
    fma.scale = fma.type == ort::DOUBLE ? std::stod(ort::text(api, info, "scale_exact")) : ort::real(api, info, "scale");
    if (fma.block < 1 || fma.rank < 1 || fma.block % fma.rank || fma.sinks < 0 || fma.sinks > fma.block)
      return ort::status(api, ort::INVALID_ARGUMENT, "fastattn::FMA: rank must divide block, and sinks be at most block");
    *kernel = new Fma(fma);
    return nullptr;
  } catch (const ort::Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::status(api, ort::INVALID_ARGUMENT, std::string("fastattn::FMA: ") + error.what());
  }
}

struct Pool {
  ort::Api* api;
  const ort::Context* context;
};

void spread(void* pool, void (*work)(void*, size_t), size_t count, void* data) {
  const Pool& mine = *(Pool*)pool;
  ort::spread(mine.api, mine.context, work, count, data);
}

ort::Status* compute(void* kernel, ort::Context* context) {
  const Fma& fma = *(Fma*)kernel;
  ort::Api* api = fma.api;
  try {
    std::vector<int64_t> sizes[3];
    const void* at[3];
    for (size_t i = 0; i < 3; i++) {
      const ort::Tensor* given = ort::input(api, context, i);
      sizes[i] = ort::sizes(api, given), at[i] = ort::data(api, given);
    }
    const auto &q = sizes[0], &k = sizes[1], &v = sizes[2];
    if (q.size() != 4 || k.size() != 4 || v.size() != 4 || k[0] != q[0] || v[0] != q[0] || k[1] != v[1] || k[1] < 1 ||
        q[1] % k[1] || k[2] != q[2] || v[2] != q[2] || k[3] != q[3])
      return ort::status(api, ort::INVALID_ARGUMENT,
                         "fastattn::FMA takes query (b, h, n, d), key (b, g, n, d) and value (b, g, n, e) of one length, g dividing h");
    const ort::Tensor* padding = ort::inputs(api, context) > 3 ? ort::input(api, context, 3) : nullptr;
    if (fma.padded != (padding != nullptr)) return ort::status(api, ort::INVALID_ARGUMENT, "fastattn::FMA: key_padding does not fit its mask");
    if (padding && ort::sizes(api, padding) != std::vector<int64_t>{q[0], q[2]})
      return ort::status(api, ort::INVALID_ARGUMENT, "fastattn::FMA: key_padding must be (b, n)");
    void* out = ort::data(api, ort::output(api, context, 0, {q[0], q[1], q[2], v[3]}));
    if (!q[0] || !q[1] || !q[2] || !v[3]) return nullptr;
    Pool pool{api, context};
    BlockArgs a{};
    a.query = at[0], a.key = at[1], a.value = at[2], a.out = out;
    a.real = padding ? (const uint8_t*)ort::data(api, padding) : nullptr;
    a.b = q[0], a.h = q[1], a.g = k[1], a.n = q[2], a.d = q[3], a.e = v[3];
    const auto strides = [&](int64_t* to, int64_t heads, int64_t channels) {
      to[0] = heads * a.n * channels, to[1] = a.n * channels, to[2] = channels;
    };
    strides(a.query_strides, a.h, a.d), strides(a.key_strides, a.g, a.d);
    strides(a.value_strides, a.g, a.e), strides(a.out_strides, a.h, a.e);
    a.m = fma.block, a.p = fma.rank, a.sinks = fma.sinks, a.causal = fma.causal, a.weighted = fma.weighted, a.scale = (float)fma.scale;
    a.threads = (int32_t)std::max(1u, std::thread::hardware_concurrency());
    a.spread = spread, a.pool = &pool;
    if (fma.type == ort::DOUBLE) {
      plain<double>(a, fma.scale);
      return nullptr;
    }
    std::vector<float> log_sum_exp(a.b * a.h * a.n);
    a.log_sum_exp = log_sum_exp.data();
    a.dtype = fma.type == ort::FLOAT ? 0 : fma.type == ort::BFLOAT16 ? 1 : 2;
    if (fma_run(&a) == 0) return nullptr;
    switch (a.dtype) {  // NaN or infinity somewhere
      case 0: plain<float>(a, fma.scale); break;
      case 1: plain<bf16>(a, fma.scale); break;
      default: plain<_Float16>(a, fma.scale);
    }
    return nullptr;
  } catch (const ort::Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::status(api, ort::FAIL, std::string("fastattn::FMA: ") + error.what());
  }
}

template <int TYPE>
constexpr ort::Op fma_op() {
  return {
      ort::VERSION,
      nullptr,
      [](const ort::Op*) { return "FMA"; },
      [](const ort::Op*) { return "CPUExecutionProvider"; },
      [](const ort::Op*, size_t index) { return index == 3 ? (int)ort::BOOL : TYPE; },
      [](const ort::Op*) { return (size_t)4; },
      [](const ort::Op*, size_t) { return TYPE; },
      [](const ort::Op*) { return (size_t)1; },
      nullptr,
      [](void* kernel) { delete (Fma*)kernel; },
      [](const ort::Op*, size_t index) { return index == 3 ? (int)ort::OPTIONAL : (int)ort::REQUIRED; },
      [](const ort::Op*, size_t) { return (int)ort::REQUIRED; },
      [](const ort::Op*, size_t) { return 0; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
      create,
      compute,
      nullptr,
      [](const ort::Op*) { return 1; },
      [](const ort::Op*) { return 1; },
  };
}

const ort::Op OPS[] = {fma_op<ort::FLOAT>(), fma_op<ort::FLOAT16>(), fma_op<ort::BFLOAT16>(), fma_op<ort::DOUBLE>()};

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options, const ort::Base* base) {
  ort::Api* api = base->api(ort::VERSION);
  if (!api) {
    ort::Api* first = base->api(1);
    const std::string found = base->version();
    return first ? ort::status(first, ort::FAIL, "fastattn: ONNX Runtime 1.17 or later is needed, this is " + found) : nullptr;
  }
  if (!ort::understood(api)) return ort::status(api, ort::FAIL, std::string("fastattn: unknown C interface in ONNX Runtime ") + base->version());
  try {
    std::vector<const ort::Op*> ops;
    for (const ort::Op& op : OPS) ops.push_back(&op);
    ort::add_to_session(api, options, "fastattn", ops);
    return nullptr;
  } catch (const ort::Failure& failure) {
    return failure.status;
  }
}
