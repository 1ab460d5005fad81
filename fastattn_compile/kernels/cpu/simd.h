// Portable vectors for AVX-512, AVX2 and NEON from one source, and the few functions attention needs of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

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

// A row as floats: itself, or widened into a buffer.
static inline const float* as_floats(const float* from, int64_t, float*) { return from; }
template <typename T>
static inline const float* as_floats(const T* from, int64_t count, float* buffer) {
  for (int64_t i = 0; i < count; i++) buffer[i] = widen(from[i]);
  return buffer;
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_at __attribute__((vector_size(16)));

// to[c * step + r] = from[r * stride + c] for 4 rows r and `columns` columns.
static inline void transpose_rows(const float* from, int64_t stride, int64_t columns, float* to, int64_t step) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4, from += 4, to += 4 * step) {
    const four a = *(const four*)from, b = *(const four*)(from + stride), d = *(const four*)(from + 2 * stride),
               e = *(const four*)(from + 3 * stride);
    const four ab = __builtin_shuffle(a, b, (four_at){0, 4, 1, 5}), de = __builtin_shuffle(d, e, (four_at){0, 4, 1, 5});
    const four ab2 = __builtin_shuffle(a, b, (four_at){2, 6, 3, 7}), de2 = __builtin_shuffle(d, e, (four_at){2, 6, 3, 7});
    *(four*)to = __builtin_shuffle(ab, de, (four_at){0, 1, 4, 5});
    *(four*)(to + step) = __builtin_shuffle(ab, de, (four_at){2, 3, 6, 7});
    *(four*)(to + 2 * step) = __builtin_shuffle(ab2, de2, (four_at){0, 1, 4, 5});
    *(four*)(to + 3 * step) = __builtin_shuffle(ab2, de2, (four_at){2, 3, 6, 7});
  }
  for (; c < columns; c++, from++, to += step)
    for (int r = 0; r < 4; r++) to[r] = from[r * stride];
}

// C (N rows of stride ldc, V vectors) = or += sum over k < depth of A[r * LDA + k * step] * B[k * ldb + column].
// A is read along rows that lie side by side (LDA 1: rows packed in groups, or a matrix read transposed) or apart by a number
// the compiler knows, so that every address is a base and a constant.
template <int N, int V, int LDA, bool ADD>
static inline void product_rows(const float* A, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t depth) {
  vec c[N][V];
  for (int r = 0; r < N; r++)
    for (int j = 0; j < V; j++) c[r][j] = ADD ? load(C + r * ldc + j * W) : vec{};
  for (int64_t k = 0; k < depth; k++, A += step, B += ldb) {
    vec b[V];
    for (int j = 0; j < V; j++) b[j] = load(B + j * W);
    for (int r = 0; r < N; r++) {
      const vec a = splat(A[r * LDA]);
      for (int j = 0; j < V; j++) c[r][j] += a * b[j];
    }
  }
  for (int r = 0; r < N; r++)
    for (int j = 0; j < V; j++) store(C + r * ldc + j * W, c[r][j]);
}

// Rows are packed in groups of G: element (row, k) at (row / G * depth + k) * G + row % G.
constexpr int G = 8;

static inline int64_t packed(int64_t row, int64_t k, int64_t depth) { return (row / G * depth + k) * G + row % G; }

// C (rows, QT) = A (rows, depth), packed, times B (depth, QT). Whole groups are written.
static inline void product_packed(const float* A, const float* B, float* C, int64_t rows, int64_t depth) {
  for (int64_t r = 0; r < rows; r += G)
    for (int part = 0; part < G; part += R)
      product_rows<R, NV, 1, false>(A + r * depth + part, G, B, QT, C + (r + part) * QT, QT, depth);
}

// C (columns, QT) = or += the transpose of A (rows, columns of stride lda), times B (rows, QT); whole groups of columns.
static inline void product_transposed(const float* A, int64_t lda, const float* B, float* C, int64_t rows, int64_t columns, bool add) {
  for (int64_t c = 0; c < columns; c += R)
    if (add) product_rows<R, NV, 1, true>(A + c, lda, B, QT, C + c * QT, QT, rows);
    else product_rows<R, NV, 1, false>(A + c, lda, B, QT, C + c * QT, QT, rows);
}

// C (rows, columns of stride ldc) += A (rows, QT) times B (QT, columns of stride ldc); columns a multiple of W, whole groups of rows.
static inline void product_wide(const float* A, const float* B, float* C, int64_t ldc, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += R) {
    int64_t c = 0;
    for (; c + 2 * W <= columns; c += 2 * W) product_rows<R, 2, QT, true>(A + r * QT, 1, B + c, ldc, C + r * ldc + c, ldc, QT);
    if (c < columns) product_rows<R, 1, QT, true>(A + r * QT, 1, B + c, ldc, C + r * ldc + c, ldc, QT);
  }
}

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
  const four x = __builtin_shuffle(part[0], part[1], (four_at){0, 4, 1, 5}) + __builtin_shuffle(part[0], part[1], (four_at){2, 6, 3, 7});
  const four y = __builtin_shuffle(part[2], part[3], (four_at){0, 4, 1, 5}) + __builtin_shuffle(part[2], part[3], (four_at){2, 6, 3, 7});
  return __builtin_shuffle(x, y, (four_at){0, 1, 4, 5}) + __builtin_shuffle(x, y, (four_at){2, 3, 6, 7});
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
