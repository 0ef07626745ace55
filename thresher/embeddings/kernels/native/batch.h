// The stages of an update of tiered rows: add up the gradient, decode, optimizer, encode. Within a row each waits for the one
// before; done stage by stage for several rows, the processor works on all of them at once.
#pragma once
#include <cstdlib>

#include "ahead.h"
#include "philox.h"
#include "rules.h"

namespace thresher::TH_ISA {

constexpr int BATCH = 8;

// Memory for the gradients, weights and state of BATCH rows, in whole blocks.
class Batch {
 public:
  explicit Batch(int64_t dim) : width_((dim + LANES - 1) / LANES * LANES) {
    memory_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(width_) * ROOM * sizeof(float)));
  }
  ~Batch() { std::free(memory_); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  bool failed() const { return memory_ == nullptr; }
  int64_t width() const { return width_; }
  Vec* gradient(int b) const { return vector(b); }
  Blocks blocks(int b) const {
    return Blocks{vector(BATCH + b), {vector(2 * BATCH + b), vector(3 * BATCH + b)}, reinterpret_cast<int8_t*>(values() + width_)};
  }
  float* values() const { return memory_ + 4 * BATCH * width_; }

 private:
  static constexpr int ROOM = 4 * BATCH + 2;
  Vec* vector(int number) const { return reinterpret_cast<Vec*>(memory_ + number * width_); }

  int64_t width_;
  float* memory_;
};

// Adds up the gradients of distinct rows u .. u + n - 1. Returns the first of them that is not finite, n if all are.
template <class S>
int gather(const Table& table, const Source& source, int64_t u, int n, const Batch& batch) {
  const S shape(table.dim);
  int bad = n;
  for (int b = 0; b < n; b++) {
    if (table.desc) ask_tiered_after(table, source, u + b);
    Vec here[S::FIXED ? S::FIXED : 1];
    Vec* const g = S::FIXED ? here : batch.gradient(b);
    source.add_up(shape, u + b, g);
    if (!finite(shape, g) && bad == n) bad = b;
    if (S::FIXED) TH_BLOCKS(j, shape) batch.gradient(b)[j] = g[j];
  }
  return bad;
}

// Rows as they read, with as many optimizer vectors; zeros for what they do not have.
template <class S>
void fetch(const Table& table, const int64_t* rows, int n, int vectors, const Batch& batch) {
  const S shape(table.dim);
  for (int b = 0; b < n; b++) {
    const Blocks blocks = batch.blocks(b);
    const float* values = batch.values();
    const uint32_t* const desc = table.desc + 2 * rows[b];
    const int tier = table.desc ? tier_of(desc[0]) : NONE;
    if (!table.desc) {
      values = table.weights + rows[b] * table.dim;
    } else {
      const uint8_t* const record = tier > DROPPED ? record_of(table, tier, desc[0] & SLOT_MASK) : nullptr;
      decode(table, tier, record, bits_to_float(desc[1]), shape, vectors, blocks);
      if (tier == NONE) initial_row(table, rows[b], batch.values());
    }
    if (tier == NONE) TH_BLOCKS(j, shape) blocks.x[j] = shape.load(values, j);
  }
}

// Sums of squares of the gradients in the batch, decay included.
template <class S>
void sum_up(int64_t dim, const Constants& c, int n, const Batch& batch, float* sums) {
  const S shape(dim);
  for (int b = 0; b < n; b++) {
    const Vec* const x = batch.blocks(b).x;
    Vec total = zeros();
    TH_BLOCKS(j, shape) {
      Vec g = batch.gradient(b)[j];
      if (c.decay == L2_DECAY) g = g + c.weight_decay * x[j];
      total = total + g * g;
    }
    sums[b] = sum(total);
  }
}

// Decay and optimizer of the rows in the batch; sums are those of sum_up, needed by row-wise optimizers.
template <int KIND, class S>
void apply_rule(const Table& table, const Constants& c, const int64_t* rows, int n, const Batch& batch, const float* sums) {
  const S shape(table.dim);
  const float width = static_cast<float>(table.full_dim);
  Vec shared[BATCH];
  if constexpr (has_scalar(KIND)) {
    for (int b = 0; b < n; b++) shared[b] = floats(move_scalar<KIND>(c.one, table.stat + 2 * rows[b], sums[b] / width));
  }
  for (int b = 0; b < n; b++) {
    const Blocks row = batch.blocks(b);
    TH_BLOCKS(j, shape) {
      Vec g = batch.gradient(b)[j];
      decayed(c, row.x[j], g);
      step<KIND>(c, shared[b], row.x[j], g, row.state[0][j], row.state[1][j]);
    }
  }
}

// Encodes those rows of the batch that `stays` marks in the records they have.
template <class S>
void store(const Table& table, const int64_t* rows, int n, uint32_t stays, int vectors, const Batch& batch) {
  const S shape(table.dim);
  for (int b = 0; b < n; b++) {
    if (!(stays >> b & 1)) continue;
    uint32_t* const desc = table.desc + 2 * rows[b];
    const int tier = tier_of(desc[0]);
    const Noise noise = {row_key(table.round_key, known_as(table, rows[b]), table.step), WEIGHTS};
    uint8_t* const record = record_of(table, tier, desc[0] & SLOT_MASK);
    const float scale = bits_to_float(desc[1]);
    const uint32_t kept = float_to_bits(encode<true>(table, tier, record, scale, shape, vectors, noise, batch.blocks(b)));
    if (kept != desc[1]) desc[1] = kept;
  }
}

}  // namespace thresher::TH_ISA
