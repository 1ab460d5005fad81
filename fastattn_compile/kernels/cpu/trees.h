// The arguments of trees.cpp. Sizes as there; numbers are float32 where `dtype` is 0, float64 where it is 1.
#pragma once
#include "threads.h"

extern "C" {
struct RouteArgs {
  const void *x, *weight, *offset;  // (b, h, n, d), (h, t, planes, d), (h, t, planes); the last two contiguous
  int64_t* leaf;                    // (b, h, t, n)
  void* scores;                     // (b, h, t, n, height), or null
  int64_t x_strides[3];
  int64_t b, h, t, n, d, height;
  int32_t threads, dtype;
  Spread spread;  // null: the threads of OpenMP
  void* pool;
};

struct SortArgs {
  const int64_t *code, *wanted;  // (u, m), from 0 to codes - 1; (u, r, n)
  const int64_t *low, *high;     // (n): positions of the keys that a query may meet; neither ever falls
  int64_t *order, *start, *stop;  // (u, m); (u, r, n) places in a unit's order
  int64_t u, r, n, m, codes;
  int32_t threads;
  Spread spread;
  void* pool;
};

struct CoarseArgs {
  const int64_t *key_leaf, *query_leaf;     // (u, L), (u, r, n)
  const float* real;                        // (u, L)
  const void *value, *learned;              // (u, L, e), (u, r, height + 1)
  void* out;                                // (u, r, n, e)
  float* seen;                              // (u, r, n), or null
  int64_t u, r, n, L, e, height;
  int32_t causal, softmax, root, threads;
  double share;
  int32_t dtype;
  Spread spread;
  void* pool;
};
void trees_route(const RouteArgs* args);
void trees_sort(const SortArgs* args);
void trees_coarse(const CoarseArgs* args);
}
