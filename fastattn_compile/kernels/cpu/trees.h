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

// Gradients of vectors and planes from those of the scores at the nodes that the vectors passed.
struct PathArgs {
  const float *x, *weight, *slopes;             // as in RouteArgs; (b, h, t, n, height)
  const int64_t* leaf;                          // (b, h, t, n)
  float *grad_x, *grad_weight, *grad_offset;    // (b, h, n, d), and as weight and offset; contiguous, written
  int64_t x_strides[3];
  int64_t b, h, t, n, d, height;
  int32_t threads;
  Spread spread;
  void* pool;
};

struct ClimbArgs {
  const int64_t *key_leaf, *query_leaf;        // (u, m), (u, r, n)
  const int64_t *key_segment, *query_segment;  // (b, m), (b, n) from 0 to segments - 1, or null
  const uint8_t* gone;                         // (u, m) or null: keys that are in no node
  const int64_t *low, *high;                   // (n): positions of the keys that a query may meet; neither ever falls
  int64_t* order;                              // (u, lists, m): rows of keys, sorted by node, a list a level from the deepest on;
                                               // deepest + 1 lists with `ancestors`, else one
  int64_t *start, *stop;                       // (u, r, n) places in a unit's lists
  int64_t *level, *node;                       // (u, r, n): where that is, with the segment before the node; or null
  int64_t b, u, r, n, m, height, deepest, segments;
  int32_t ancestors, threads;                  // ancestors: up from the deepest level while a query finds no key there
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
void trees_path(const PathArgs* args);
int64_t trees_climb(const ClimbArgs* args);  // how many of the lists are sorted; those after are as keys stand
void trees_coarse(const CoarseArgs* args);
}
