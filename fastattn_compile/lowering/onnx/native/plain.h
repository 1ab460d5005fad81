// Fast multipole attention a query at a time, in double precision: what serves float64, and keys or values that are NaN or
// infinite, where it must be said exactly which queries see them.
#pragma once

namespace {

inline double wide(double x) { return x; }
template <typename T>
double wide(T x) { return widen(x); }
inline void thin(double x, double& y) { y = x; }
template <typename T>
void thin(double x, T& y) { narrow((float)x, y); }

// Means of the tokens that the pooled rows of one key head stand for.
template <typename T>
std::vector<double> means(const BlockArgs& a, const Levels& levels, const Head& head, const T* x, int64_t stride, int64_t channels) {
  std::vector<double> rows(levels.rows * channels, 0.);
  if (!levels.count) return rows;
  for (int64_t i = 0; i < a.n; i++)
    if (head.pooled[i])
      for (int64_t c = 0; c < channels; c++) rows[i / (a.m / a.p) * channels + c] += wide(x[i * stride + c]);
  for (int64_t l = 1; l < levels.count; l++)
    for (int64_t r = 0; r < levels.groups[l - 1] * a.p; r++)
      for (int64_t c = 0; c < channels; c++)
        rows[(levels.start[l] + r / 2) * channels + c] += rows[(levels.start[l - 1] + r) * channels + c];
  for (int64_t r = 0; r < levels.rows; r++)
    for (int64_t c = 0; c < channels; c++) rows[r * channels + c] /= std::max(1.f, head.counts[r]);
  return rows;
}

// A row that the queries of a block meet: a token, or n + a pooled row, with the logarithm of what it stands for.
struct Met {
  int64_t id;
  double bias;
};

inline std::vector<Met> meet(const BlockArgs& a, const Levels& levels, const Head& head, const uint8_t* real, int64_t block) {
  std::vector<Met> rows;
  const int64_t stop = std::min(a.n, (block + (a.causal ? 1 : 2)) * a.m);
  for (int64_t i = std::max<int64_t>(0, (block - 1) * a.m); i < stop; i++)
    if (!real || real[i]) rows.push_back({i, 0.});
  for (const int64_t sink : head.sinks) {
    const int64_t apart = block - sink / a.m;
    if (a.causal ? apart > 1 : std::abs(apart) > 1) rows.push_back({sink, 0.});
  }
  for (int64_t l = 0; l < levels.count; l++) {
    const int64_t parent = block >> (l + 1), second = (block >> l) & 1;
    for (int side = -1; side <= (a.causal ? -1 : 1); side += 2)
      for (int child = 0; child < 2; child++) {
        const int64_t group = 2 * (parent + side) + child;
        if (!(side < 0 ? child <= second : child >= second) || group < 0 || group >= levels.groups[l]) continue;
        for (int64_t row = levels.start[l] + group * a.p; row < levels.start[l] + (group + 1) * a.p; row++)
          if (head.counts[row] > 0) rows.push_back({a.n + row, a.weighted ? std::log((double)head.counts[row]) : 0.});
      }
  }
  return rows;
}

template <typename T>
void plain_head(const BlockArgs& a, double scale, const Levels& levels, int64_t batch, int64_t g) {
  const uint8_t* real = a.real ? a.real + batch * a.n : nullptr;
  Head head;
  choose_sinks(a, batch, head);
  count(a, levels, head);
  const T* key = (const T*)a.key + batch * a.key_strides[0] + g * a.key_strides[1];
  const T* value = (const T*)a.value + batch * a.value_strides[0] + g * a.value_strides[1];
  const std::vector<double> far_keys = means(a, levels, head, key, a.key_strides[2], a.d);
  const std::vector<double> far_values = means(a, levels, head, value, a.value_strides[2], a.e);
  std::vector<double> scores, out(a.e);
  for (int64_t block = 0; block < levels.blocks; block++) {
    const std::vector<Met> rows = meet(a, levels, head, real, block);
    for (int64_t h = g * (a.h / a.g); h < (g + 1) * (a.h / a.g); h++)
      for (int64_t i = block * a.m; i < std::min(a.n, (block + 1) * a.m); i++) {
        const T* query = (const T*)a.query + batch * a.query_strides[0] + h * a.query_strides[1] + i * a.query_strides[2];
        scores.clear();
        double most = -std::numeric_limits<double>::infinity(), sum = 0.;
        for (const Met& row : rows) {
          if (a.causal && row.id > i && row.id < a.n) {
            scores.push_back(-std::numeric_limits<double>::infinity());
            continue;
          }
          double score = 0.;
          for (int64_t c = 0; c < a.d; c++)
            score += wide(query[c]) * (row.id < a.n ? wide(key[row.id * a.key_strides[2] + c]) : far_keys[(row.id - a.n) * a.d + c]);
          scores.push_back(score * scale + row.bias);
          most = scores.back() > most || std::isnan(scores.back()) ? scores.back() : most;
        }
        std::fill(out.begin(), out.end(), 0.);
        for (size_t r = 0; r < rows.size(); r++) {
          const int64_t id = rows[r].id;
          if (a.causal && id > i && id < a.n) continue;
          const double weight = std::exp(scores[r] - most);
          sum += weight;
          for (int64_t c = 0; c < a.e; c++)
            out[c] += weight * (id < a.n ? wide(value[id * a.value_strides[2] + c]) : far_values[(id - a.n) * a.e + c]);
        }
        T* to = (T*)a.out + batch * a.out_strides[0] + h * a.out_strides[1] + i * a.out_strides[2];
        for (int64_t c = 0; c < a.e; c++) thin(sum == 0. ? 0. : out[c] / sum, to[c]);
      }
  }
}

template <typename T>
void plain(const BlockArgs& a, double scale) {
  const Levels levels(a.n, a.m, a.p);
  parallel(a, a.b * a.g, [&](int64_t u) { plain_head<T>(a, scale, levels, u / a.g, u % a.g); });
}

}  // namespace
