// Portable vectors for AVX-512, AVX2 and NEON from one source, and the few functions attention needs of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t veci __attribute__((vector_size(4 * W), aligned(4), may_alias));

// Queries of a tile stand side by side in NV vectors; R rows are worked on at a time: R * NV accumulators fit the registers.
constexpr int NV = 2;
constexpr int R = W == 16 ? 8 : 4;
constexpr int QT = NV * W;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Memory from a cache line's start on, so that no vector lies across two lines; much of it from a large page's start on, and in such
// pages where the system has them: touching memory for the first time then costs a fault in 2 MB, not in 4 KB.
constexpr size_t LARGE_PAGE = 2 << 20;

static inline std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes < 2 * LARGE_PAGE ? 64 : LARGE_PAGE); }

static inline void* allocate_lines(size_t bytes) {
  void* p = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
  if (bytes >= 2 * LARGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

// Numbers in such memory.
template <typename E>
struct Lines {
  typedef E value_type;
  Lines() = default;
  template <typename Other>
  Lines(const Lines<Other>&) {}
  E* allocate(size_t count) { return (E*)allocate_lines(count * sizeof(E)); }
  void deallocate(E* p, size_t count) { ::operator delete(p, alignment(count * sizeof(E))); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
typedef std::vector<float, Lines<float>> Floats;

static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec x) { *(vec*)p = x; }
// Spelled out, since compilers see one broadcast in this and not in a loop; vec{} + x would first add 0 to keep the sign of -0.
static inline vec splat(float x) {
#if defined(__AVX512F__)
  return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return (vec){x, x, x, x, x, x, x, x};
#else
  return (vec){x, x, x, x};
#endif
}
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }

// 2^x to about 2e-7 for x <= 0; what is under -126 gives 0, -inf included.
static inline vec exp2v(vec x) {
  const veci small = x < -126.f;
  const vec y = small ? splat(-126.f) : x;
  const veci n = __builtin_convertvector(y - 0.5f, veci);  // truncates toward 0: the nearest integer for y <= 0
  const vec f = y - __builtin_convertvector(n, vec);
  vec p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.f;
  const veci power = (n + 127) << 23;
  const vec result = p * (vec)power;
  return small ? vec{} : result;
}

// Half precision by its bits: conversions are exact on the way in and round to nearest even on the way out.
struct bf16 {
  uint16_t bits;
};
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline float widen(_Float16 x) { return (float)x; }
static inline void narrow(float x, float& y) { y = x; }
static inline void narrow(float x, _Float16& y) { y = (_Float16)x; }
static inline void narrow(float x, bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// W numbers at a time, in and out. Loops over rows are written out with them: what builds us may not vectorize loops by itself.
typedef uint32_t vecu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t bits_of_halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef _Float16 halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
static inline vec widen_vec(const float* from) { return load(from); }
static inline vec widen_vec(const bf16* from) { return (vec)(__builtin_convertvector(*(const bits_of_halves*)from, vecu) << 16); }
static inline vec widen_vec(const _Float16* from) { return __builtin_convertvector(*(const halves*)from, vec); }
static inline void narrow_vec(vec x, float* to) { store(to, x); }
static inline void narrow_vec(vec x, _Float16* to) { *(halves*)to = __builtin_convertvector(x, halves); }
static inline void narrow_vec(vec x, bf16* to) {
  const vecu bits = (vecu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *(bits_of_halves*)to = __builtin_convertvector(x == x ? rounded : vecu{} + 0x7fc0u, bits_of_halves);
}

// to = from, as floats.
template <typename T>
static inline void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, widen_vec(from + i));
  for (; i < count; i++) to[i] = widen(from[i]);
}

// to = from, from floats.
template <typename T>
static inline void narrow_row(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) narrow_vec(load(from + i), to + i);
  for (; i < count; i++) narrow(from[i], to[i]);
}

// to += from * by.
static inline void add_row(const float* from, int64_t count, float* to, float by = 1.f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(to + i) + load(from + i) * by);
  for (; i < count; i++) to[i] += from[i] * by;
}

// x *= by.
static inline void scale_row(float* x, int64_t count, float by) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(x + i, load(x + i) * by);
  for (; i < count; i++) x[i] *= by;
}

static inline float dot(const float* a, const float* b, int64_t count) {
  vec sum = {};
  float total = 0.f;
  int64_t i = 0;
  for (; i + W <= count; i += W) sum += load(a + i) * load(b + i);
  for (; i < count; i++) total += a[i] * b[i];
  for (int j = 0; j < W; j++) total += sum[j];
  return total;
}

// A row as floats: itself, or widened into a buffer.
static inline const float* as_floats(const float* from, int64_t, float*) { return from; }
template <typename T>
static inline const float* as_floats(const T* from, int64_t count, float* buffer) {
  widen_row(from, count, buffer);
  return buffer;
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

// to[c * step + r] = from[r * stride + c] for 4 rows r and `columns` columns.
static inline void transpose_rows(const float* from, int64_t stride, int64_t columns, float* to, int64_t step) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4, from += 4, to += 4 * step) {
    const four a = *(const four*)from, b = *(const four*)(from + stride), d = *(const four*)(from + 2 * stride),
               e = *(const four*)(from + 3 * stride);
    const four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), de = __builtin_shufflevector(d, e, 0, 4, 1, 5);
    const four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), de2 = __builtin_shufflevector(d, e, 2, 6, 3, 7);
    *(four*)to = __builtin_shufflevector(ab, de, 0, 1, 4, 5);
    *(four*)(to + step) = __builtin_shufflevector(ab, de, 2, 3, 6, 7);
    *(four*)(to + 2 * step) = __builtin_shufflevector(ab2, de2, 0, 1, 4, 5);
    *(four*)(to + 3 * step) = __builtin_shufflevector(ab2, de2, 2, 3, 6, 7);
  }
  for (; c < columns; c++, from++, to += step)
    for (int r = 0; r < 4; r++) to[r] = from[r * stride];
}

// total (N rows, V vectors) += sum over k < depth of A[r * LDA + k * step] * B[k * ldb + column], in vectors from FROM on.
// A is read along rows that lie side by side (LDA 1: rows packed in groups, or a matrix read transposed) or apart by a number
// the compiler knows, so that every address is a base and a constant.
template <int LDA, int FROM, int N, int V>
static inline void add_products(const float* A, int64_t step, const float* B, int64_t ldb, int64_t depth, vec (&total)[N][V]) {
  for (int64_t k = 0; k < depth; k++, A += step, B += ldb) {
    vec b[V];
    for (int j = FROM; j < V; j++) b[j] = load(B + j * W);
    for (int r = 0; r < N; r++) {
      const vec a = splat(A[r * LDA]);
      for (int j = FROM; j < V; j++) total[r][j] += a * b[j];
    }
  }
}

// C (N rows of stride ldc, V vectors) = or += those sums.
template <int N, int V, int LDA, bool ADD>
static inline void product_rows(const float* A, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t depth) {
  vec c[N][V];
  for (int r = 0; r < N; r++)
    for (int j = 0; j < V; j++) c[r][j] = ADD ? load(C + r * ldc + j * W) : vec{};
  add_products<LDA, 0>(A, step, B, ldb, depth, c);
  for (int r = 0; r < N; r++)
    for (int j = 0; j < V; j++) store(C + r * ldc + j * W, c[r][j]);
}

// Scores (row, query) become weights: 2 to what they are over `over`, in vectors from FROM on; `total` takes their sums.
template <int FROM>
static inline void make_weights(float* scores, int64_t rows, const vec (&over)[NV], vec (&total)[NV]) {
  for (float *row = scores, *end = row + rows * QT; row < end; row += QT)
    for (int j = FROM; j < NV; j++) {
      const vec weight = exp2v(load(row + j * W) - over[j]);
      store(row + j * W, weight);
      total[j] += weight;
    }
}

// Rows are packed in groups of G: element (row, k) at (row / G * depth + k) * G + row % G. Work goes by fours of rows.
constexpr int G = 8;

static inline int64_t packed(int64_t row, int64_t k, int64_t depth) { return (row / G * depth + k) * G + row % G; }

// Calls work(rows, first) for stretches of R rows, and of four where R do not fit; `rows` is known to the compiler.
template <typename Work>
static inline void by_rows(int64_t rows, const Work& work) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) work(std::integral_constant<int, R>(), r);
  if (r < rows) work(std::integral_constant<int, 4>(), r);
}

// C (rows, V vectors of QT lanes) = rows from `first` on of A, packed, of `depth`, times B (depth, V vectors of QT lanes).
// `first` and `rows` are multiples of four. `between` is called every few rows.
template <int V = NV, typename Between>
static inline void product_packed(
    const float* A, int64_t first, const float* B, float* C, int64_t rows, int64_t depth, const Between& between) {
  const int64_t lead = first % R ? std::min<int64_t>(4, rows) : 0;  // so that whole groups follow
  if (lead) product_rows<4, V, 1, false>(A + packed(first, 0, depth), G, B, QT, C, QT, depth);
  by_rows(rows - lead, [&](auto n, int64_t r) {
    product_rows<n.value, V, 1, false>(A + packed(first + lead + r, 0, depth), G, B, QT, C + (lead + r) * QT, QT, depth);
    between();
  });
}

template <int V = NV>
static inline void product_packed(const float* A, int64_t first, const float* B, float* C, int64_t rows, int64_t depth) {
  product_packed<V>(A, first, B, C, rows, depth, [] {});
}

// C (columns, QT lanes) = or += the transpose of A (rows, columns of stride lda), times B (rows, QT lanes); whole groups of columns.
static inline void product_transposed(const float* A, int64_t lda, const float* B, float* C, int64_t rows, int64_t columns, bool add) {
  for (int64_t c = 0; c < columns; c += R)
    if (add) product_rows<R, NV, 1, true>(A + c, lda, B, QT, C + c * QT, QT, rows);
    else product_rows<R, NV, 1, false>(A + c, lda, B, QT, C + c * QT, QT, rows);
}

// C (rows, columns of stride ldc) += A (rows, `depth` of QT lanes) times B (depth, columns of stride ldc); columns a multiple of W,
// rows of four.
static inline void product_wide(const float* A, const float* B, float* C, int64_t ldc, int64_t rows, int64_t columns, int64_t depth = QT) {
  by_rows(rows, [&](auto n, int64_t r) {
    int64_t c = 0;
    for (; c + 2 * W <= columns; c += 2 * W) product_rows<n.value, 2, QT, true>(A + r * QT, 1, B + c, ldc, C + r * ldc + c, ldc, depth);
    if (c < columns) product_rows<n.value, 1, QT, true>(A + r * QT, 1, B + c, ldc, C + r * ldc + c, ldc, depth);
  });
}

// Rows that will be read soon, asked for a little at a time between products, so that neither waits for the other.
class Ahead {
 public:
  void clear() { lines.clear(), next = 0; }

  template <typename T>
  void add(const T* from, int64_t stride, int64_t rows, int64_t channels) {
    for (int64_t r = 0; r < rows; r++, from += stride)
      for (const char *line = (const char*)from, *end = (const char*)(from + channels); line < end; line += 64) lines.push_back(line);
  }

  void some() {
    for (const size_t end = std::min(lines.size(), next + 16); next < end; next++) __builtin_prefetch(lines[next]);
  }

 private:
  std::vector<const char*> lines;
  size_t next = 0;
};

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The sums of four vectors.
static inline four sum4(const vec* a) {
  four part[4];
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    part[i] = __builtin_shufflevector(a[i], a[i], 0, 1, 2, 3) + __builtin_shufflevector(a[i], a[i], 4, 5, 6, 7) +
              (__builtin_shufflevector(a[i], a[i], 8, 9, 10, 11) + __builtin_shufflevector(a[i], a[i], 12, 13, 14, 15));
#elif defined(__AVX2__)
    part[i] = __builtin_shufflevector(a[i], a[i], 0, 1, 2, 3) + __builtin_shufflevector(a[i], a[i], 4, 5, 6, 7);
#else
    part[i] = a[i];
#endif
  }
  const four x = __builtin_shufflevector(part[0], part[1], 0, 4, 1, 5) + __builtin_shufflevector(part[0], part[1], 2, 6, 3, 7);
  const four y = __builtin_shufflevector(part[2], part[3], 0, 4, 1, 5) + __builtin_shufflevector(part[2], part[3], 2, 6, 3, 7);
  return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
}

// Products of N vectors with four rows that follow each other; `depth` and the strides are multiples of W. Each row is read
// once for all N.
template <int N>
static inline void dot4(const float* const* q, const float* rows, int64_t stride, int64_t depth, four* out) {
  vec sum[N][4] = {};
  for (int64_t c = 0; c < depth; c += W) {
    vec row[4];
    for (int r = 0; r < 4; r++) row[r] = load(rows + r * stride + c);
    for (int n = 0; n < N; n++) {
      const vec x = load(q[n] + c);
      for (int r = 0; r < 4; r++) sum[n][r] += x * row[r];
    }
  }
  for (int n = 0; n < N; n++) out[n] = sum4(sum[n]);
}
