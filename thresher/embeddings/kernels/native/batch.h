// A few rows at a time. An update has four stages (add up the gradient, decode, optimizer, encode), and within a row each
// waits for the one before; done stage by stage for several rows, the processor works on all of them at once.
#pragma once
#include "gradients.h"
#include "philox.h"
#include "record.h"
#include "rules.h"
#include "scratch.h"

namespace thresher::TH_ISA {

enum { BATCH = 8 };

// Where the numbers of a row are while it is updated: tables themselves, or a Batch's own memory.
struct RowAt {
  int64_t row;
  float* x;
  float* state[2];
  float* scalar;
  const float* sums;  // of squares over the whole row, null to take it over these columns
};

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
  Vec* weights(int b) const { return vector(BATCH + b); }
  Vec* state(int b, int v) const { return vector(2 * BATCH + 2 * b + v); }
  float* floats() const { return memory_ + 4 * BATCH * width_; }
  int8_t* bytes() const { return reinterpret_cast<int8_t*>(floats() + width_); }
  Blocks blocks(int b) const { return Blocks{weights(b), {state(b, 0), state(b, 1)}, bytes()}; }
  RowAt at(int b, int64_t row) const {
    return RowAt{row, floats_of(weights(b)), {floats_of(state(b, 0)), floats_of(state(b, 1))}, nullptr, nullptr};
  }

 private:
  enum { ROOM = 4 * BATCH + 2 };
  static float* floats_of(Vec* v) { return reinterpret_cast<float*>(v); }
  Vec* vector(int number) const { return reinterpret_cast<Vec*>(memory_ + number * width_); }

  int64_t width_;
  float* memory_;
};

// Adds up the gradients of distinct rows u .. u + n - 1. Returns the first of them that is not finite, n if all are.
template <class S>
int gather(const Source& source, int64_t dim, int64_t u, int n, const Batch& batch) {
  const S shape(dim);
  int bad = n;
  for (int b = 0; b < n; b++) {
    Vec here[S::FIXED ? S::FIXED : 1];
    Vec* const g = S::FIXED ? here : batch.gradient(b);
    source.add_up(shape, u + b, g);
    if (!finite(shape, g) && bad == n) bad = b;
    if (S::FIXED) TH_BLOCKS(j, shape) batch.gradient(b)[j] = g[j];
  }
  return bad;
}

// Decodes tiered rows into the batch; zeros for what they do not have.
template <class S>
void unpack(const Table& table, const int64_t* rows, int n, int vectors, const Batch& batch) {
  const S shape(table.dim);
  for (int b = 0; b < n; b++) {
    const uint32_t* const desc = table.desc + 2 * rows[b];
    const int tier = tier_of(desc[0]);
    const uint8_t* const record = tier > DROPPED ? record_of(table, tier, desc[0] & SLOT_MASK) : nullptr;
    const Blocks blocks = batch.blocks(b);
    decode(table, tier, record, bits_to_float(desc[1]), shape, vectors, blocks);
    if (tier != NONE) continue;
    initial_row(table, rows[b], batch.floats());
    TH_BLOCKS(j, shape) blocks.x[j] = shape.load(batch.floats(), j);
  }
}

// Encodes those rows of the batch that `stays` marks in the records they have.
template <class S>
void pack(const Table& table, const int64_t* rows, int n, uint32_t stays, int vectors, const Batch& batch) {
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

// Sums of squares of the gradients in the batch, decay included.
template <class S>
void sum_up(int64_t dim, const Constants& c, const RowAt* rows, int n, const Batch& batch, float* sums) {
  const S shape(dim);
  for (int b = 0; b < n; b++) {
    Vec total = zeros();
    TH_BLOCKS(j, shape) {
      Vec g = batch.gradient(b)[j];
      if (c.decay == L2_DECAY) g = g + c.weight_decay * shape.load(rows[b].x, j);
      total = total + g * g;
    }
    sums[b] = sum(total);
  }
}

// Decay and optimizer of the rows.
template <int KIND, class S>
void apply_rule(int64_t dim, float width, const Constants& c, const RowAt* rows, int n, const Batch& batch) {
  const S shape(dim);
  float sums[BATCH];
  if (has_scalar(KIND) && !rows[0].sums) sum_up<S>(dim, c, rows, n, batch, sums);
  Vec shared[BATCH];
  if constexpr (has_scalar(KIND)) {
    for (int b = 0; b < n; b++) {
      const float mean_square = (rows[b].sums ? *rows[b].sums : sums[b]) / width;
      shared[b] = floats(move_scalar<KIND>(c.one, rows[b].scalar, mean_square));
    }
  }
  for (int b = 0; b < n; b++) {
    const RowAt& row = rows[b];
    TH_BLOCKS(j, shape) {
      Vec x = shape.load(row.x, j), g = batch.gradient(b)[j], first, second;
      if (c.decay == L2_DECAY) g = g + c.weight_decay * x;
      if (c.decay == DECOUPLED_DECAY) x = x * c.shrink;
      if (vectors_of(KIND) > 0) first = shape.load(row.state[0], j);
      if (vectors_of(KIND) > 1) second = shape.load(row.state[1], j);
      step<KIND>(c, shared[b], x, g, first, second);
      shape.store(row.x, j, x);
      if (vectors_of(KIND) > 0) shape.store(row.state[0], j, first);
      if (vectors_of(KIND) > 1) shape.store(row.state[1], j, second);
    }
  }
}

}  // namespace thresher::TH_ISA
