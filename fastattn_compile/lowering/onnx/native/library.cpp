// Our nodes as custom operators of ONNX Runtime: what a session calls when the library is registered in its options.
#include "nodes.h"

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
    add_fma(ops), add_window(ops), add_barnes_hut(ops), add_tree_leaf(ops), add_tree_coarse(ops);
    ort::add_to_session(api, options, "fastattn", ops);
    return nullptr;
  } catch (const ort::Failure& failure) {
    return failure.status;
  }
}
