// Work shared among threads: the caller's own, where it has some, else those of OpenMP.
#pragma once
#include <cstddef>
#include <cstdint>

// Calls work(data, i) for every i < count.
typedef void (*Spread)(void* pool, void (*work)(void* data, size_t i), size_t count, void* data);

namespace {

// work(i) for every i < count. Args: anything with `spread`, `pool` and `threads`.
template <typename Args, typename Work>
void parallel(const Args& a, int64_t count, const Work& work) {
  if (a.spread) {
    a.spread(a.pool, [](void* data, size_t i) { (*(const Work*)data)((int64_t)i); }, (size_t)count, (void*)&work);
    return;
  }
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (int64_t i = 0; i < count; i++) work(i);
}

}  // namespace
