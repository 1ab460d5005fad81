// Gradients of attention by blocks: what tiles of queries give to the rows they meet, and take from them. One key head is done by
// one thread, block after block: every sum over queries has one order, whatever the threads.
#pragma once
#include "blocks.h"

namespace {

template <typename T>
class TileGradients {
 public:
  const BlockArgs& a;
  Slots<T> slots;
  const int64_t dk, dv;
  Floats to_key, to_value;                         // of all a slot can hold: tokens, then pooled rows; (dk) and (dv) a row
  Floats queries, grads, query_rows, grad_rows;    // of the tile at hand: scaled queries and dO, (channel, query); both row by row
  Floats dq;                                       // (channel, query)
  alignas(64) float lse[QT], slope[QT];            // to the base of 2; dO . o - dlse

  // `ids`: how many tokens and pooled rows there are.
  TileGradients(const BlockArgs& a, const Levels& levels, const Head& head, int64_t batch, int64_t g, int64_t ids)
      : a(a), slots(a, levels, head, {at((const T*)a.key, a.key_strides, batch, g), a.key_strides[2], a.d},
                    {at((const T*)a.value, a.value_strides, batch, g), a.value_strides[2], a.e}, a.real ? a.real + batch * a.n : nullptr),
        dk(slots.dk), dv(slots.dv), to_key(ids * dk), to_value(ids * dv), queries(a.d * QT), grads(a.e * QT), query_rows(QT * dk),
        grad_rows(QT * dv), dq(dk * QT), batch(batch), g(g), weights(slots.total * QT), slopes(slots.total * QT), rows(QT * std::max(dk, dv)),
        slot_key(slots.total * dk), slot_value(slots.total * dv) {}

  void enter(int64_t i) {
    block = i;
    if (i % 4 == 0) empty(slots.places * slots.stride);  // sums of sums: what stays for long would gather the noise of a long one
    slots.enter(i, [&](int64_t slot, int64_t id) { leave(slot, id); });
  }

  // Takes up the tile of query head h from `from` of the block on.
  void take(int64_t h, int64_t from) {
    head = h, first = from, count = std::min<int64_t>(QT, std::min(a.m, a.n - block * a.m) - from);
    const int64_t token = block * a.m + first, place = (batch * a.h + h) * a.n + token;
    const T* q = at((const T*)a.query, a.query_strides, batch, h) + token * a.query_strides[2];
    const T* o = at((const T*)a.out, a.out_strides, batch, h) + token * a.out_strides[2];
    const T* dout = at((const T*)a.grad_out, a.grad_out_strides, batch, h) + token * a.grad_out_strides[2];
    transpose_in(q, a.query_strides[2], count, a.d, a.scale * LOG2E, rows.data(), queries.data());
    transpose_in(dout, a.grad_out_strides[2], count, a.e, 1.f, rows.data(), grads.data());
    std::fill(query_rows.begin(), query_rows.end(), 0.f);
    std::fill(grad_rows.begin(), grad_rows.end(), 0.f);
    for (int64_t r = 0; r < QT; r++) {
      lse[r] = std::numeric_limits<float>::infinity();  // weights of 0 where there is no query, or nothing was seen
      slope[r] = of_lse[r] = 0.f;
      if (r >= count) continue;
      if (a.log_sum_exp[place + r] != NEG_INF) lse[r] = a.log_sum_exp[place + r] * LOG2E;
      widen_row(dout + r * a.grad_out_strides[2], a.e, &grad_rows[r * dv]);
      widen_row(q + r * a.query_strides[2], a.d, &query_rows[r * dk]);
      of_lse[r] = a.grad_lse ? a.grad_lse[place + r] : 0.f;
      if (!a.closed) slope[r] = dot(&grad_rows[r * dv], as_floats(o + r * a.out_strides[2], a.e, rows.data()), a.e) - of_lse[r];
    }
  }

  // The tile meets what stands in the slots.
  void meet() {
    const std::vector<Run>& runs = slots.met(first);
    slots.announce(block, first, head == g * (a.h / a.g), {at((const T*)a.query, a.query_strides, batch, head), a.query_strides[2], a.d}, ahead);
    const int64_t token = block * a.m + first, levels = slots.levels.count;
    score(slots, runs, queries.data(), first, weights.data(), ahead, ByDistance(a, levels, head, token));
    weigh(runs);
    float* tables = a.grad_tables ? a.grad_tables + (batch * a.h + head) * (levels + 1) * a.table + a.table_zero + token : nullptr;
    for (const Run& run : runs) {
      const int64_t lane = run.vector * W;
      by_vectors(run, [&](auto v) {
        product_packed<v.value>(slots.value_packed.data(), run.slot, grads.data() + lane, &slopes[run.slot * QT + lane], run.rows, a.e);
      });
    }
    if (a.closed) balance(runs);
    for (const Run& run : runs) {
      const int64_t lane = run.vector * W, depth = QT - lane;
      float *p = &weights[run.slot * QT + lane], *s = &slopes[run.slot * QT + lane];
      for (int64_t r = 0; r < run.rows; r++) {
        float* to = tables ? tables + slots.level[run.slot + r] * a.table - slots.from[run.slot + r] + lane : nullptr;
        for (int64_t j = 0; j < depth; j += W) {
          const vec of_score = (load(s + r * QT + j) - load(slope + lane + j)) * load(p + r * QT + j);
          if (to) store(to + j, load(to + j) + of_score);
          store(s + r * QT + j, of_score * a.scale);
        }
      }
      product_wide(p, &grad_rows[lane * dv], &slot_value[run.slot * dv], dv, run.rows, dv, depth);
      product_wide(s, &query_rows[lane * dk], &slot_key[run.slot * dk], dk, run.rows, dk, depth);
    }
    sum_rows(runs, slots.key_rows.data(), dk, a.d, slopes.data(), dq.data());
  }

  // Gives the tile's queries their gradients.
  void give() {
    T* to = at((T*)a.grad_query, a.grad_query_strides, batch, head) + (block * a.m + first) * a.grad_query_strides[2];
    transpose_out(dq.data(), a.grad_query_strides[2], count, a.d, nullptr, rows.data(), to);
  }

  // To be called when the last block is done.
  void done() { empty(0); }

  // Writes what tokens got; nothing to padding.
  void write() {
    for (int64_t t = 0; t < a.n; t++) {
      float *k = &to_key[t * dk], *v = &to_value[t * dv];
      if (slots.real && !slots.real[t]) std::fill_n(k, dk, 0.f), std::fill_n(v, dv, 0.f);
      narrow_row(k, a.d, at((T*)a.grad_key, a.grad_key_strides, batch, g) + t * a.grad_key_strides[2]);
      narrow_row(v, a.e, at((T*)a.grad_value, a.grad_value_strides, batch, g) + t * a.grad_value_strides[2]);
    }
  }

 private:
  const int64_t batch, g;
  int64_t block = 0, head = 0, first = 0, count = 0;
  alignas(64) float of_lse[QT], by[QT];  // dlse; what weights are to be multiplied with so that they add up to 1
  Floats weights, slopes, rows, slot_key, slot_value;
  Ahead ahead;

  template <typename U>
  static U* at(U* base, const int64_t* strides, int64_t batch, int64_t head) {
    return base + batch * strides[0] + head * strides[1];
  }

  // Weights from scores. A number of 4 to 8 is stored to 2e-7, several times what a softmax errs: where the log-sum-exp is of what is
  // met here, what rounding it did to all weights of a query alike is taken back from what they are multiplied with.
  void weigh(const std::vector<Run>& runs) {
    vec total[NV] = {}, over[NV];
    for (int j = 0; j < NV; j++) over[j] = load(lse + j * W);
    for (const Run& run : runs)
      by_vectors(run, [&](auto v) { make_weights<NV - v.value>(&weights[run.slot * QT], run.rows, over, total); });
    if (!a.closed) return;
    for (int j = 0; j < NV; j++) store(by + j * W, total[j] > 0.f ? 1.f / total[j] : vec{} + 1.f);
    for (int64_t c = 0; c < a.e; c++)
      for (int j = 0; j < NV; j++) store(&grads[c * QT + j * W], load(&grads[c * QT + j * W]) * load(by + j * W));
    for (int64_t r = 0; r < count; r++) scale_row(&grad_rows[r * dv], dv, by[r]);
  }

  // Where the log-sum-exp is of what is met here, dO . o from the weights at hand: gradients of a query's scores then add up to 0 but for
  // their own rounding, not for that of the output.
  void balance(const std::vector<Run>& runs) {
    vec mean[NV] = {};
    for (const Run& run : runs)
      by_vectors(run, [&](auto v) {
        for (int64_t at = run.slot * QT; at < (run.slot + run.rows) * QT; at += QT)
          for (int j = NV - v.value; j < NV; j++) mean[j] += load(&weights[at + j * W]) * load(&slopes[at + j * W]);
      });
    for (int j = 0; j < NV; j++) store(slope + j * W, (mean[j] - load(of_lse + j * W)) * load(by + j * W));
  }

  void empty(int64_t first_slot) {
    for (int64_t slot = first_slot; slot < slots.total; slot++)
      if (slots.held[slot] >= 0) leave(slot, slots.held[slot]);
  }

  void leave(int64_t slot, int64_t id) {
    add_row(&slot_key[slot * dk], dk, &to_key[id * dk]);
    add_row(&slot_value[slot * dv], dv, &to_value[id * dv]);
    std::fill_n(&slot_key[slot * dk], dk, 0.f);
    std::fill_n(&slot_value[slot * dv], dv, 0.f);
  }
};

}  // namespace
