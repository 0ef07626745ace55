// The update of flat rows: all of a row in registers, one row after the other.
#pragma once
#include "ahead.h"
#include "batch.h"
#include "rules.h"

namespace thresher::TH_ISA {

// Updates distinct rows from .. to - 1. Returns the first whose gradient is not finite, `to` if all are. `sums` are of
// squares over whole rows, null to take them over these columns.
template <int KIND, class S>
int64_t update_flat(const Table& table, const Source& source, const Constants& constants, const float* sums, int64_t from,
                    int64_t to, const Batch& batch) {
  const S shape(table.dim);
  const Constants c = constants;
  const float width = static_cast<float>(table.full_dim);
  constexpr int vectors = vectors_of(KIND);
  float* const states[2] = {table.vectors[0], table.vectors[1]};
  for (int64_t u = from; u < to; u++) {
    ask_flat_after(table, source, shape, vectors, u);
    Vec g_here[S::FIXED ? S::FIXED : 1], x_here[S::FIXED ? S::FIXED : 1];
    Vec* const g = S::FIXED ? g_here : batch.gradient(0);
    Vec* const x = S::FIXED ? x_here : batch.blocks(0).x;
    source.add_up(shape, u, g);
    if (!finite(shape, g)) return u;
    const int64_t at = source.rows[u] * table.dim;
    TH_BLOCKS(j, shape) x[j] = shape.load(table.weights + at, j);
    if (c.decay != NO_DECAY) TH_BLOCKS(j, shape) decayed(c, x[j], g[j]);
    Vec shared;
    if constexpr (has_scalar(KIND)) {
      const float mean_square = (sums ? sums[u] : squares(shape, g)) / width;
      shared = floats(move_scalar<KIND>(c.one, table.scalar + source.rows[u], mean_square));
    }
    TH_BLOCKS(j, shape) {
      Vec first, second;
      if constexpr (vectors > 0) first = shape.load(states[0] + at, j);
      if constexpr (vectors > 1) second = shape.load(states[1] + at, j);
      step<KIND>(c, shared, x[j], g[j], first, second);
      shape.store(table.weights + at, j, x[j]);
      if constexpr (vectors > 0) shape.store(states[0] + at, j, first);
      if constexpr (vectors > 1) shape.store(states[1] + at, j, second);
    }
  }
  return to;
}

}  // namespace thresher::TH_ISA
