// Rows of a table, flat or tiered, by sixteen columns at a time; and their memory asked for in time.
#pragma once
#include "philox.h"
#include "record.h"
#include "scratch.h"

namespace thresher::TH_ISA {

// Row numbers: an array of int64 or int32.
class Ids {
 public:
  Ids(const void* ids, bool wide) : ids_(ids), wide_(wide) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(ids_)[i] : static_cast<const int32_t*>(ids_)[i];
  }

 private:
  const void* ids_;
  bool wide_;
};

// Random rows cost a trip to memory each, so they are asked for some rows before their turn. Of a tiered row the header
// comes first, since it says where the record is.
constexpr int64_t HEADERS_AHEAD = 40, BYTES_AHEAD = 4096, FEWEST_AHEAD = 8, MOST_AHEAD = 24;

TH_INLINE void ask_lines(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

static inline int64_t weight_bytes(int tier, int64_t dim) {
  static const int64_t half_bytes[TIERS] = {0, 0, 1, 2, 4, 8};
  return half_bytes[tier] * dim / 2;
}

static inline int64_t rows_ahead(const Table& table) {
  const int64_t rows = BYTES_AHEAD / (table.desc ? table.dim : table.dim * 4);
  return rows < FEWEST_AHEAD ? FEWEST_AHEAD : rows > MOST_AHEAD ? MOST_AHEAD : rows;
}

TH_INLINE void ask_flat(const Table& table, int64_t row) {
  ask_lines(reinterpret_cast<const uint8_t*>(table.weights + row * table.dim), table.dim * 4);
}

// The header must have come.
TH_INLINE void ask_tiered(const Table& table, int64_t row) {
  if (row < 0) return;
  const uint32_t place = table.desc[2 * row];
  const int tier = tier_of(place);
  ask_lines(record_of(table, tier, place & SLOT_MASK), weight_bytes(tier, table.dim));
}

// Calls of `visit` and `ask` alike have a lambda or a shape in them that only pays if it is inlined.
#define TH_ALWAYS __attribute__((always_inline))

template <class S, bool IS_TIERED>
class Rows {
 public:
  static constexpr bool TIERED = IS_TIERED;

  Rows(const Table& table, const Scratch& scratch)
      : dim(table.dim), ahead(rows_ahead(table)), table_(table), shape_(table.dim), scratch_(scratch) {}

  TH_INLINE_MEMBER void ask_header(int64_t row) const { __builtin_prefetch(table_.desc + 2 * row); }

  TH_INLINE_MEMBER void ask_record(int64_t row) const {
    if constexpr (TIERED) {
      ask_tiered(table_, row);
    } else if constexpr (S::FIXED) {
      for (int j = 0; j < S::FIXED; ++j) __builtin_prefetch(table_.weights + row * dim + LANES * j);
    } else {
      ask_flat(table_, row);
    }
  }

  const int64_t dim;
  const int64_t ahead;  // how many rows before its turn a record is asked for

  // Calls each(j, columns 16 j .. 16 j + 15 of the row) for all blocks j; zeros for row -1.
  template <class Each>
  TH_INLINE_MEMBER void visit(int64_t row, const Each& each) const {
    if constexpr (TIERED) {
      visit_tiered(row, each);
    } else {
      visit_floats(table_.weights + row * dim, each);
    }
  }

 private:
  template <class Each>
  TH_INLINE_MEMBER void visit_floats(const float* x, const Each& each) const {
    TH_BLOCKS(j, shape_) each(j, shape_.load(x, j));
  }

  template <class Each>
  TH_INLINE_MEMBER void visit_whole(const int8_t* q, float scale, const Each& each) const {
    const Vec factor = floats(scale);
    TH_BLOCKS(j, shape_) each(j, factor * to_floats(shape_.load_int8(q, j)));
  }

  template <class Each>
  TH_INLINE_MEMBER void visit_tiered(int64_t row, const Each& each) const {
    const uint32_t place = row < 0 ? DROPPED << SLOT_BITS : table_.desc[2 * row];
    const int tier = tier_of(place);
    const uint8_t* record = record_of(table_, tier, place & SLOT_MASK);
    switch (tier) {
      case INT8:
        visit_whole(reinterpret_cast<const int8_t*>(record), bits_to_float(table_.desc[2 * row + 1]), each);
        break;
      case FP16:
        TH_BLOCKS(j, shape_) each(j, shape_.load_fp16(reinterpret_cast<const uint16_t*>(record), j));
        break;
      case FP32:
        visit_floats(reinterpret_cast<const float*>(record), each);
        break;
      case INT4:
        unpack_int4(record, dim / 2, scratch_.bytes());
        visit_whole(scratch_.bytes(), bits_to_float(table_.desc[2 * row + 1]), each);
        break;
      case NONE:
        initial_row(table_, row, scratch_.floats());
        visit_floats(scratch_.floats(), each);
        break;
      default:
        TH_BLOCKS(j, shape_) each(j, zeros());
    }
  }

  const Table& table_;
  const S shape_;
  const Scratch& scratch_;
};

}  // namespace thresher::TH_ISA
