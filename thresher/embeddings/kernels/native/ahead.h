// Memory of rows to come. A random row costs a trip to memory, so it is asked for some rows before its turn; of a tiered row
// the header first, which says where the record is.
#pragma once
#include "gradients.h"
#include "record.h"

namespace thresher::TH_ISA {

constexpr int64_t UPDATES_AHEAD = 16, UPDATE_HEADERS_AHEAD = 32;

TH_INLINE int64_t later_row(const Source& source, int64_t u) {
  return source.rows[u < source.unique ? u : source.unique - 1];
}

TH_INLINE void ask_to_write(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 1);
}

// Asks for what the update of a later row than u will touch.
template <class S>
TH_INLINE void ask_flat_after(const Table& table, const Source& source, const S& shape, int vectors, int64_t u) {
  const int64_t row = later_row(source, u + UPDATES_AHEAD);
  ask_to_write(table.weights + row * table.dim, shape.blocks() * 64);
  for (int v = 0; v < vectors; v++) ask_to_write(table.vectors[v] + row * table.dim, shape.blocks() * 64);
  if (table.scalar) __builtin_prefetch(table.scalar + row, 1);
}

TH_INLINE void ask_tiered_after(const Table& table, const Source& source, int64_t u) {
  const int64_t later = later_row(source, u + UPDATE_HEADERS_AHEAD);
  __builtin_prefetch(table.desc + 2 * later, 1);
  __builtin_prefetch(table.stat + 2 * later, 1);
  const uint32_t place = table.desc[2 * later_row(source, u + UPDATES_AHEAD)];
  const int tier = tier_of(place);
  if (tier > DROPPED) ask_to_write(record_of(table, tier, place & SLOT_MASK), table.record_bytes[tier]);
}

}  // namespace thresher::TH_ISA
