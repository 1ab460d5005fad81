// What the rows of a mask show, read once: of every query how many keys it sees, the first and the last one; and which keys are seen.
#include "simd.h"
#include "threads.h"

extern "C" {
struct MaskArgs {
  const uint8_t* visible;         // (b, n, m), contiguous
  int64_t *count, *first, *last;  // (b, n); m and -1 where nothing is seen
  uint8_t* seen;                  // (stretches, b, m): by some query of a stretch of them
  int64_t b, n, m, stretches;
  int32_t threads;
  Spread spread;  // null: the threads of OpenMP
  void* pool;
};
}

static inline uint64_t word(const uint8_t* from) {
  uint64_t x;
  std::memcpy(&x, from, 8);
  return x;
}

extern "C" void masks_read(const MaskArgs* args) {
  const MaskArgs& a = *args;
  const int64_t each = (a.n + a.stretches - 1) / a.stretches;
  parallel(a, a.b * a.stretches, [&](int64_t task) {
    const int64_t batch = task / a.stretches, stretch = task % a.stretches;
    uint8_t* seen = a.seen + (stretch * a.b + batch) * a.m;
    std::memset(seen, 0, a.m);
    for (int64_t i = stretch * each; i < std::min(a.n, (stretch + 1) * each); i++) {
      const uint8_t* row = a.visible + (batch * a.n + i) * a.m;
      int64_t count = 0;
      for (int64_t j = 0; j < a.m;) {
        uint8_t some = 0;  // few enough for a byte, so that all lanes of a vector count
        for (const int64_t end = std::min(a.m, j + 255); j < end; j++) {
          const uint8_t here = row[j] != 0;
          some += here, seen[j] |= here;
        }
        count += some;
      }
      int64_t first = 0, stop = a.m;
      while (first + 8 <= a.m && !word(row + first)) first += 8;
      while (first < a.m && !row[first]) first++;
      while (stop - 8 >= first && !word(row + stop - 8)) stop -= 8;
      while (stop > first && !row[stop - 1]) stop--;
      const int64_t at = batch * a.n + i;
      a.count[at] = count, a.first[at] = first, a.last[at] = count ? stop - 1 : -1;
    }
  });
}
