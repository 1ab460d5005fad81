// The little of ONNX Runtime's C interface that custom operators need, declared here because no package ships its headers.
//
// The interface is a table of function pointers to which versions only append, so a place in it never changes meaning. What
// is used here has been there since version 17 (ONNX Runtime 1.17).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ort {

constexpr uint32_t VERSION = 17;
enum Type { ANY = 0, FLOAT = 1, BOOL = 9, FLOAT16 = 10, DOUBLE = 11, BFLOAT16 = 16 };
enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

struct Status;
struct Tensor;
struct Shape;
struct Info;       // of a node
struct Context;    // of a run
struct Inference;  // of shapes
struct Options;    // of a session
struct Domain;
using Api = void* const;  // the table

struct Base {
  Api* (*api)(uint32_t version);
  const char* (*version)();
};

// A custom operator as the runtime of version 17 and later reads it.
struct Op {
  uint32_t version;
  void* (*create)(const Op*, Api*, const Info*);
  const char* (*name)(const Op*);
  const char* (*provider)(const Op*);
  int (*input_type)(const Op*, size_t);
  size_t (*inputs)(const Op*);
  int (*output_type)(const Op*, size_t);
  size_t (*outputs)(const Op*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*input_presence)(const Op*, size_t);
  int (*output_presence)(const Op*, size_t);
  int (*input_memory)(const Op*, size_t);
  int (*least_inputs)(const Op*);
  int (*inputs_alike)(const Op*);
  int (*least_outputs)(const Op*);
  int (*outputs_alike)(const Op*);
  Status* (*create_checked)(const Op*, Api*, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer)(const Op*, Inference*);
  int (*first_version)(const Op*);
  int (*last_version)(const Op*);
};

// Thrown by calls into the runtime that fail; turned back into a status where the runtime called us.
struct Failure {
  Status* status;
};

template <typename Result, typename... Args>
Result slot(Api* api, size_t place, Args... args) {
  return ((Result(*)(Args...))api[place])(args...);
}
template <typename... Args>
void call(Api* api, size_t place, Args... args) {
  if (Status* status = slot<Status*>(api, place, args...)) throw Failure{status};
}

inline Status* status(Api* api, Code code, const std::string& message) {
  return slot<Status*>(api, 0, (int)code, message.c_str());
}
inline void release(Api* api, Status* status) { slot<void>(api, 93, status); }

// Whether the table is the one we think it is: a status gives back its code and text.
inline bool understood(Api* api) {
  Status* made = status(api, INVALID_ARGUMENT, "fastattn");
  const bool good = made && slot<int>(api, 1, (const Status*)made) == INVALID_ARGUMENT &&
                    std::string("fastattn") == slot<const char*>(api, 2, (const Status*)made);
  release(api, made);
  return good;
}

inline void add_to_session(Api* api, Options* options, const char* name, const std::vector<const Op*>& ops) {
  Domain* domain = nullptr;  // lives as long as the process: sessions keep pointers to it
  call(api, 26, name, &domain);
  for (const Op* op : ops) call(api, 27, domain, op);
  call(api, 28, options, domain);
}

// Attributes of a node. A missing one fails.
inline int64_t integer(Api* api, const Info* info, const char* name) {
  int64_t value = 0;
  call(api, 86, info, name, &value);
  return value;
}
inline float real(Api* api, const Info* info, const char* name) {
  float value = 0;
  call(api, 85, info, name, &value);
  return value;
}
inline std::string text(Api* api, const Info* info, const char* name) {
  size_t size = 0;
  call(api, 87, info, name, (char*)nullptr, &size);
  std::string value(size, '\0');
  call(api, 87, info, name, &value[0], &size);
  value.resize(size ? size - 1 : 0);  // the final 0 was counted
  return value;
}

inline size_t inputs(Api* api, const Context* context) {
  size_t count = 0;
  call(api, 88, context, &count);
  return count;
}
inline const Tensor* input(Api* api, const Context* context, size_t index) {
  const Tensor* value = nullptr;
  call(api, 90, context, index, &value);
  return value;
}
inline Tensor* output(Api* api, Context* context, size_t index, const std::vector<int64_t>& sizes) {
  Tensor* value = nullptr;
  call(api, 91, context, index, sizes.data(), sizes.size(), &value);
  return value;
}
inline void* data(Api* api, const Tensor* tensor) {
  void* pointer = nullptr;
  call(api, 51, (Tensor*)tensor, &pointer);
  return pointer;
}
inline std::vector<int64_t> sizes(Api* api, const Shape* shape) {
  size_t rank = 0;
  call(api, 61, shape, &rank);
  std::vector<int64_t> found(rank);
  call(api, 62, shape, found.data(), rank);
  return found;
}
inline std::vector<int64_t> sizes(Api* api, const Tensor* tensor) {
  Shape* shape = nullptr;
  call(api, 65, tensor, &shape);
  std::vector<int64_t> found = sizes(api, shape);
  slot<void>(api, 99, shape);
  return found;
}
inline Type type_of(Api* api, const Tensor* tensor) {
  Shape* shape = nullptr;
  call(api, 65, tensor, &shape);
  int found = ANY;
  call(api, 60, shape, &found);
  slot<void>(api, 99, shape);
  return (Type)found;
}

// work(data, i) for every i < count, by the threads of the session.
inline void spread(Api* api, const Context* context, void (*work)(void*, size_t), size_t count, void* data) {
  call(api, 274, context, work, count, (size_t)0, data);
}

}  // namespace ort
