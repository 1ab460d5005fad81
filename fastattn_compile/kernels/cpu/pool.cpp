// Learned pooled rows of fast multipole attention, and their gradients: for every group of every level some combinations of its
// tokens, channel by channel, with weights that all heads share.
//
// Of every block the tokens of some channels are transposed once, for all levels: a combination is then a product of two rows that
// lie side by side. A task has some channels to itself, of some heads; nothing is shared between tasks, so every sum has one order.
//
// Sizes: u heads, n tokens, c channels, m block, p rank. Rows stand as in blocks.h.
#include "blocks.h"

extern "C" {
struct PoolArgs {
  const void* x;          // (b, g, n, c)
  const uint8_t* pooled;  // (b, n): which tokens take part
  float* rows;            // (b, g, rows, c); backward: read, gradients of the combinations
  float* grad_x;          // backward: (b, g, n, c), contiguous, added to; else null
  const float* weight[40];  // of every level (c, p, m << level), contiguous
  float* grad_weight[40];   // backward: written
  int64_t strides[3];       // of b, head, n
  int64_t b, g, n, c, m, p;
  int32_t dtype, threads;
  Spread spread;
  void* pool;
};
}

namespace {

constexpr int64_t TOGETHER = 8;  // heads that a task pools while a block's weights are near

// Some channels of a block's tokens, (channel, head, token), 0 where a token takes no part: what one row of weights meets lies together.
template <typename T>
class Turned {
 public:
  const int64_t wide;  // tokens of a block up to whole vectors
  Floats x;

  Turned(const PoolArgs& a, int64_t from, int64_t to, int64_t first, int64_t channels)
      : wide(round_up(a.m, W)), x((to - from) * channels * round_up(a.m, W)), a(a), from(from), to(to), first(first), channels(channels), rows(4 * channels) {}

  const float* operator()(int64_t u, int64_t channel) const { return &x[(channel * (to - from) + u - from) * wide]; }

  void take(int64_t block) {
    for (int64_t u = from; u < to; u++) {
      const T* base = (const T*)a.x + u / a.g * a.strides[0] + u % a.g * a.strides[1] + first;
      const uint8_t* pooled = a.pooled + u / a.g * a.n;
      for (int64_t t = 0; t < wide; t += 4) {
        for (int64_t r = 0; r < 4; r++) {
          const int64_t token = block * a.m + t + r;
          __builtin_prefetch(base + std::min(a.n - 1, token + a.m) * a.strides[2]);
          if (t + r < a.m && token < a.n && pooled[token]) widen_row(base + token * a.strides[2], channels, &rows[r * channels]);
          else std::fill_n(&rows[r * channels], channels, 0.f);
        }
        transpose_rows(rows.data(), channels, channels, &x[(u - from) * wide + t], (to - from) * wide);
      }
    }
  }

 private:
  const PoolArgs& a;
  const int64_t from, to, first, channels;
  Floats rows;
};

// What N rows of weights, `stride` apart, make of `count` tokens.
template <int N>
four combine(const float* x, const float* weight, int64_t stride, int64_t count) {
  vec sum[4] = {};
  int64_t t = 0;
  for (; t + W <= count; t += W) {
    const vec tokens = load(x + t);
    for (int r = 0; r < N; r++) sum[r] += tokens * load(weight + r * stride + t);
  }
  four total = sum4(sum);
  for (; t < count; t++)
    for (int r = 0; r < N; r++) total[r] += x[t] * weight[r * stride + t];
  return total;
}

// Asks for the weights of a channel from `offset` of its groups on: rows of a block's length that lie far apart, which a processor
// does not foresee.
void ahead(const PoolArgs& a, int64_t l, int64_t channel, int64_t offset) {
  for (int64_t r = 0; r < a.p; r++)
    for (int64_t t = 0; t < a.m; t += 16) __builtin_prefetch(a.weight[l] + (channel * a.p + r) * (a.m << l) + offset + t);
}

// The combinations of channels [first, first + channels) of heads [from, to).
template <typename T>
void pool(const PoolArgs& a, const Levels& levels, int64_t from, int64_t to, int64_t first, int64_t channels) {
  Turned<T> tokens(a, from, to, first, channels);
  const int64_t wide = round_up(a.p, 4);
  Floats sums(levels.count * (to - from) * channels * wide);  // of the groups at hand
  for (int64_t i = 0; i < levels.blocks; i++) {
    tokens.take(i);
    for (int64_t l = 0; l < levels.count; l++) {
      const int64_t group = i >> l, stride = a.m << l, offset = (i - (group << l)) * a.m;
      const bool last = i + 1 == levels.blocks || (i + 1) >> l != group;
      float* sum = &sums[l * (to - from) * channels * wide];
      for (int64_t c = 0; c < channels; c++) {
        if (c + 1 < channels) ahead(a, l, first + c + 1, offset);
        else if (l + 1 < levels.count) ahead(a, l + 1, first, (i - (i >> (l + 1) << (l + 1))) * a.m);
        for (int64_t u = from; u < to; u++) {
          const float *x = tokens(u, c), *weight = a.weight[l] + (first + c) * a.p * stride + offset;
          float *to_sum = sum + ((u - from) * channels + c) * wide, *row = a.rows + (u * levels.rows + levels.start[l] + group * a.p) * a.c + first + c;
          for (int64_t r = 0; r < a.p; r += 4) {
            four& so_far = *(four*)(to_sum + r);
            const float* weights = weight + r * stride;
            switch (std::min<int64_t>(4, a.p - r)) {
              case 1: so_far += combine<1>(x, weights, stride, a.m); break;
              case 2: so_far += combine<2>(x, weights, stride, a.m); break;
              case 3: so_far += combine<3>(x, weights, stride, a.m); break;
              default: so_far += combine<4>(x, weights, stride, a.m);
            }
          }
          if (!last) continue;
          for (int64_t r = 0; r < a.p; r++) row[r * a.c] = to_sum[r], to_sum[r] = 0.f;
        }
      }
    }
  }
}

// Gradients of tokens and weights of channels [first, first + channels), of all heads.
template <typename T>
void pool_backward(const PoolArgs& a, const Levels& levels, int64_t first, int64_t channels) {
  const int64_t heads = a.b * a.g;
  Turned<T> tokens(a, 0, heads, first, channels);
  Floats grads(heads * channels * tokens.wide), row(tokens.wide * 4), of_rows(levels.count * a.p);
  for (int64_t i = 0; i < levels.blocks; i++) {
    tokens.take(i);
    const auto gradient = [&](int64_t l, int64_t u, int64_t c, int64_t r) {
      return a.rows[(u * levels.rows + levels.start[l] + (i >> l) * a.p + r) * a.c + first + c];
    };
    const auto at = [&](int64_t l, int64_t c, int64_t r) { return ((first + c) * a.p + r) * (a.m << l) + (i - (i >> l << l)) * a.m; };
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t l = 0; l < levels.count && c + 1 < channels; l++) ahead(a, l, first + c + 1, (i - (i >> l << l)) * a.m);
      for (int64_t u = 0; u < heads; u++) {
        float* to = &grads[(c * heads + u) * tokens.wide];
        for (int64_t l = 0; l < levels.count; l++)
          for (int64_t r = 0; r < a.p; r++) of_rows[l * a.p + r] = gradient(l, u, c, r);
        constexpr int WIDE = 8;
        const auto add = [&](auto wide, int64_t t) {
          vec sum[wide.value] = {};
          for (int64_t l = 0; l < levels.count; l++)
            for (int64_t r = 0; r < a.p; r++) {
              const float* weight = a.weight[l] + at(l, c, r) + t;
              for (int j = 0; j < wide.value; j++) sum[j] += load(weight + j * W) * of_rows[l * a.p + r];
            }
          for (int j = 0; j < wide.value; j++) store(to + t + j * W, sum[j]);
        };
        int64_t t = 0;
        for (; t + WIDE * W <= a.m; t += WIDE * W) add(std::integral_constant<int, WIDE>(), t);
        for (; t + W <= a.m; t += W) add(std::integral_constant<int, 1>(), t);
        for (; t < a.m; t++) {
          to[t] = 0.f;
          for (int64_t l = 0; l < levels.count; l++)
            for (int64_t r = 0; r < a.p; r++) to[t] += a.weight[l][at(l, c, r) + t] * of_rows[l * a.p + r];
        }
      }
      for (int64_t l = 0; l < levels.count; l++)
        for (int64_t r = 0; r < a.p; r++) {
          float* to = a.grad_weight[l] + at(l, c, r);
          std::fill(row.begin(), row.end(), 0.f);
          for (int64_t u = 0; u < heads; u++) add_row(tokens(u, c), tokens.wide, row.data(), gradient(l, u, c, r));
          add_row(row.data(), a.m, to);
        }
    }
    for (int64_t u = 0; u < heads; u++) {
      const uint8_t* pooled = a.pooled + u / a.g * a.n;
      for (int64_t t = 0; t < a.m && i * a.m + t < a.n; t++) {
        const int64_t token = i * a.m + t;
        float* to = a.grad_x + (u * a.n + token) * a.c + first;
        for (int64_t c = 0; c < channels && pooled[token]; c++) to[c] += grads[(c * heads + u) * tokens.wide + t];
      }
    }
  }
}

template <typename T>
void run(const PoolArgs& a) {
  const Levels levels(a.n, a.m, a.p);
  // A cache line of channels a task, fewer where threads would have none.
  int64_t width = 16;
  while (width > 4 && (a.c + width - 1) / width < a.threads) width /= 2;
  const int64_t chunks = (a.c + width - 1) / width, heads = a.b * a.g, groups = a.grad_x ? 1 : (heads + TOGETHER - 1) / TOGETHER;
  parallel(a, chunks * groups, [&](int64_t task) {
    const int64_t first = task % chunks * width, channels = std::min(width, a.c - first), from = task / chunks * TOGETHER;
    if (a.grad_x) pool_backward<T>(a, levels, first, channels);
    else pool<T>(a, levels, from, std::min(heads, from + TOGETHER), first, channels);
  });
}

}  // namespace

extern "C" void pool_run(const PoolArgs* args) {
  switch (args->dtype) {
    case 0: return run<float>(*args);
    case 1: return run<bf16>(*args);
    default: return run<_Float16>(*args);
  }
}
