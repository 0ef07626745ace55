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
// comes first, since it says where the record is; tiered rows are asked for in batches, which costs less for each.
constexpr int64_t BATCH = 4, RECORDS_AHEAD = 24, HEADERS_AHEAD = 56;
constexpr int64_t BYTES_AHEAD = 4096, FEWEST_AHEAD = 8, MOST_AHEAD = 24;

TH_INLINE void ask_lines(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

static inline int64_t weight_bytes(int tier, int64_t dim) {
  static const int64_t half_bytes[TIERS] = {0, 0, 1, 2, 4, 8};
  return half_bytes[tier] * dim / 2;
}

static inline int64_t rows_ahead(const Table& table) {
  if (table.desc) return RECORDS_AHEAD + BATCH;
  const int64_t rows = BYTES_AHEAD / (table.dim * 4);
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

// Calls of `visit` have a lambda and a shape in them that only pay if they are inlined.
#define TH_ALWAYS __attribute__((always_inline))

// The rows of a flat table.
template <class S>
class FlatRows {
 public:
  FlatRows(const Table& table, const Scratch&, const Ids& ids)
      : dim(table.dim), ahead_(rows_ahead(table)), weights_(table.weights), shape_(table.dim), ids_(ids) {}

  void begin(int64_t, int64_t) const {}

  // Asks for what comes some rows after position i, of positions that end at `end`.
  TH_INLINE_MEMBER void advance(int64_t i, int64_t end) const {
    if (i + ahead_ >= end) return;
    const float* row = weights_ + ids_[i + ahead_] * dim;
    if constexpr (S::FIXED) {
      for (int j = 0; j < S::FIXED; ++j) __builtin_prefetch(row + LANES * j);
    } else {
      ask_lines(reinterpret_cast<const uint8_t*>(row), dim * 4);
    }
  }

  // Calls each(j, columns 16 j .. 16 j + 15 of the row of position i) for all blocks j; zeros for row -1.
  template <class Each>
  TH_INLINE_MEMBER void visit(int64_t i, const Each& each) const {
    const float* row = weights_ + ids_[i] * dim;
    TH_BLOCKS(j, shape_) each(j, shape_.load(row, j));
  }

  const int64_t dim;

 private:
  const int64_t ahead_;
  const float* const weights_;
  const S shape_;
  const Ids ids_;
};

// A row of a tier that is rare in use, as fp32 in `scratch`.
static __attribute__((noinline)) const float* rare_row(const Table& table, int tier, const uint8_t* record, float scale,
                                                       int64_t row, const Scratch& scratch) {
  float* const x = scratch.floats();
  if (tier == NONE) {
    initial_row(table, row, x);
  } else if (tier == INT4) {
    unpack_int4(record, table.dim / 2, scratch.bytes());
    for (int64_t i = 0; i < table.dim; ++i) x[i] = scale * static_cast<float>(scratch.bytes()[i]);
  } else {
    memset(x, 0, sizeof(float) * static_cast<size_t>(table.dim));
  }
  return x;
}

// The rows of a tiered table. Where a row stands is found out once, when it is asked for, and kept until its turn.
template <class S>
class TieredRows {
 public:
  TieredRows(const Table& table, const Scratch& scratch, const Ids& ids)
      : dim(table.dim), table_(table), desc_(table.desc), shape_(table.dim), scratch_(scratch), ids_(ids) {
    for (int tier = 0; tier < TIERS; ++tier) {
      slabs_[tier] = table.slabs[tier];
      record_bytes_[tier] = table.record_bytes[tier];
      bytes_[tier] = weight_bytes(tier, dim);
    }
  }

  // Finds the first rows of positions begin .. end - 1, which have been asked for.
  TH_INLINE_MEMBER void begin(int64_t begin, int64_t end) {
    next_ = begin;
    find(begin, begin + RECORDS_AHEAD < end ? begin + RECORDS_AHEAD : end);
  }

  // See FlatRows.
  TH_INLINE_MEMBER void advance(int64_t i, int64_t end) {
    if (i < next_) return;
    next_ = i + BATCH;
    const int64_t last = i + HEADERS_AHEAD + BATCH < end ? i + HEADERS_AHEAD + BATCH : end;
    for (int64_t k = i + HEADERS_AHEAD; k < last; ++k) __builtin_prefetch(desc_ + 2 * ids_[k]);
    const int64_t begin = i + RECORDS_AHEAD;
    find(begin, begin + BATCH < end ? begin + BATCH : end);
  }

  // See FlatRows.
  template <class Each>
  TH_INLINE_MEMBER void visit(int64_t i, const Each& each) const {
    const Place& place = places_[static_cast<uint64_t>(i) % PLACES];
    const uint8_t* const record = place.record;
    if (__builtin_expect(place.tier == INT8, 1)) {
      const Vec factor = floats(place.scale);
      TH_BLOCKS(j, shape_) each(j, factor * to_floats(shape_.load_int8(reinterpret_cast<const int8_t*>(record), j)));
    } else if (place.tier == FP16) {
      TH_BLOCKS(j, shape_) each(j, shape_.load_fp16(reinterpret_cast<const uint16_t*>(record), j));
    } else {
      const float* x = reinterpret_cast<const float*>(record);
      if (__builtin_expect(place.tier != FP32, 0))
        x = rare_row(table_, place.tier, record, place.scale, ids_[i], scratch_);
      TH_BLOCKS(j, shape_) each(j, shape_.load(x, j));
    }
  }

  const int64_t dim;

 private:
  struct Place {
    const uint8_t* record;
    float scale;
    int32_t tier;
  };
  static constexpr int64_t PLACES = 32;  // a power of two
  static_assert(RECORDS_AHEAD + BATCH <= PLACES, "a place would be taken before its row's turn");


  // Finds out where rows begin .. end - 1 stand, whose headers must have come, and asks for their records.
  TH_INLINE_MEMBER void find(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = ids_[i];
      Place& place = places_[static_cast<uint64_t>(i) % PLACES];
      if (__builtin_expect(row < 0, 0)) {
        place = {nullptr, 0.0f, DROPPED};
        continue;
      }
      const uint32_t header = desc_[2 * row];
      const int tier = tier_of(header);
      const uint8_t* const record = slabs_[tier] + static_cast<int64_t>(header & SLOT_MASK) * record_bytes_[tier];
      place = {record, bits_to_float(desc_[2 * row + 1]), tier};
      ask(record, bytes_[tier]);
    }
  }

  // The first and the last line of most records are all there is; which ones have more is hard to predict.
  TH_INLINE_MEMBER static void ask(const uint8_t* record, int64_t bytes) {
    __builtin_prefetch(record);
    if (S::FIXED == 1) return;
    __builtin_prefetch(record + bytes - 4);
    if (S::FIXED == 2 || bytes <= 128) return;
    for (int64_t at = 64; at < bytes - 64; at += 64) __builtin_prefetch(record + at);
  }

  const Table& table_;
  const uint32_t* const desc_;
  const S shape_;
  const Scratch& scratch_;
  const Ids ids_;
  int64_t next_ = 0;  // position of the next batch
  const uint8_t* slabs_[TIERS];
  int64_t record_bytes_[TIERS];
  int64_t bytes_[TIERS];
  Place places_[PLACES];
};

}  // namespace thresher::TH_ISA
