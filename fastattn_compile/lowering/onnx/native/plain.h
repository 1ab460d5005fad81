// Attention a query at a time, in double precision: what serves float64, and keys or values that are NaN or infinite, where it
// must be said exactly which queries see them.
#pragma once
#include <limits>

#include "node.h"

namespace {

inline double wide(double x) { return x; }
template <typename T>
double wide(T x) { return widen(x); }
inline void thin(double x, double& y) { y = x; }
template <typename T>
void thin(double x, T& y) { narrow((float)x, y); }

// A row that a query meets: a token, or behind the tokens a pooled row, with the logarithm of what it stands for.
struct Met {
  int64_t id;
  double bias;
};

// Keys or values of a head: tokens, and pooled rows behind them.
template <typename T>
struct Side {
  const T* base;
  int64_t tokens, channels;
  std::vector<double> pooled;
  double operator()(int64_t id, int64_t c) const {
    return id < tokens ? wide(base[id * channels + c]) : pooled[(id - tokens) * channels + c];
  }
};

// One query. Tokens after `last` are not met. `scores` is room to work in.
template <typename T, typename Out>
void attend(const T* query, const Side<T>& key, const Side<T>& value, double scale, const std::vector<Met>& rows, int64_t last,
            std::vector<double>& scores, Out* to) {
  const auto hidden = [&](const Met& row) { return row.id > last && row.id < key.tokens; };
  scores.clear();
  double most = -std::numeric_limits<double>::infinity(), sum = 0.;
  for (const Met& row : rows) {
    double score = 0.;
    if (!hidden(row))
      for (int64_t c = 0; c < key.channels; c++) score += wide(query[c]) * key(row.id, c);
    scores.push_back(score * scale + row.bias);
    if (!hidden(row)) most = scores.back() > most || std::isnan(scores.back()) ? scores.back() : most;
  }
  std::vector<double> out(value.channels, 0.);
  for (size_t r = 0; r < rows.size(); r++) {
    if (hidden(rows[r])) continue;
    const double weight = std::exp(scores[r] - most);
    sum += weight;
    for (int64_t c = 0; c < value.channels; c++) out[c] += weight * value(rows[r].id, c);
  }
  for (int64_t c = 0; c < value.channels; c++) thin(sum == 0. ? 0. : out[c] / sum, to[c]);
}

}  // namespace
