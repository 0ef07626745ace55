// What Python hands to the kernels: plain structs, mirrored field by field in library.py. No owner but Python.
//
// Files are compiled once (sort, threads, *_api) or three times, with TH_LEVEL 2, 1, 0 for AVX-512, AVX2, scalar (lookup,
// update, maintain). The latter include no C++ library header, and every function of a shared header is `static` or
// stands in namespace TH_ISA: the linker keeps one copy of an inline function, which might be the one for AVX-512.
#pragma once
#include <cstdint>

#define TH_ABI 1  // changes with every struct and signature here; library.py refuses another one

namespace thresher {

enum Tier : int32_t { NONE = 0, DROPPED = 1, INT4 = 2, INT8 = 3, FP16 = 4, FP32 = 5 };
enum Pooling : int32_t { SUM = 0, MEAN = 1, EACH = 2 };  // EACH is Python's Pooling.NONE
enum { TIERS = 6, SLOT_BITS = 29, SLOT_MASK = (1 << SLOT_BITS) - 1 };
enum { HIGH = 0, FREE = 1 };

// A rectangle of a table. Flat tables have `weights`, tiered ones `desc`.
struct Table {
  int64_t rows;
  int64_t dim;
  int64_t full_dim;  // columns of the whole table
  // flat
  float* weights;     // [rows, dim]
  float* scalar;      // [rows] or null
  float* vectors[2];  // [rows, dim] each, or null
  // tiered
  uint32_t* desc;              // [rows, 2]: tier << 29 | slot, scale as fp32 bits
  float* stat;                 // [rows, 2]: optimizer's scalar, priority x gain
  int64_t* count;              // [6, 2]: slots in use or free (HIGH), free ones (FREE)
  uint8_t* slabs[TIERS];       // null for tiers that are no level of this table
  int32_t* free[TIERS];        // stacks of free slots
  int64_t slots[TIERS];        // the most that each tier may hold
  int64_t record_bytes[TIERS];
  int64_t state_offset[TIERS];  // where a record's optimizer vectors start
  const int64_t* identity;      // [rows] what a row is known by to the generators, or null for row0 + row
  int64_t row0;
  int64_t col0;
  uint64_t init_key[2];  // of the Philox of initial values, low word first
  uint64_t round_key;    // of the generator of rounding bits
  uint64_t step;         // the update under way
  float init_scale;
  int32_t entry;      // tier of a row at its first update
  int32_t n_vectors;  // numbers the optimizer keeps for each weight
  int32_t has_scalar;
};

// A lookup. The vector of bag b of feature f stands at out + start[f] + (b - first_bag[f]) * stride[f], that of
// occurrence i (pooling EACH) at out + i * dim; gradients likewise.
struct Bags {
  const void* ids;         // [n] int32 or int64
  const int64_t* offsets;  // [first_bag[features] + 1]
  const float* weights;    // [n] or null
  const int32_t* tables;     // [features]
  const int64_t* first_bag;  // [features + 1]
  const int64_t* start;      // [features]
  const int64_t* stride;     // [features]
  int64_t n;
  int32_t features;
  int32_t wide_ids;  // whether ids are int64
  int32_t pooling;
  int32_t n_tables;
};

// The distinct rows of a lookup. Table t has occurrences first[t] .. first[t + 1] - 1 (id -1 left out at the end);
// its distinct rows are rows[first[t] + u], u < unique[t], ascending; row u occurs at
// payload[first[t] + segments[first[t] + t + u]] up to payload[first[t] + segments[first[t] + t + u + 1] - 1], in
// ascending order. A payload is a position in ids if `by_position`, else the number of the bag (over all features).
struct Sorted {
  int64_t* first;        // [n_tables + 1]
  int64_t* unique;       // [n_tables]
  int64_t* rows;         // [n]
  uint32_t* segments;    // [n + n_tables]
  uint32_t* payload;     // [n]
  uint32_t* bag_of;      // [n] bag of each position where pooled and weighted, else null
  int32_t by_position;   // pooling EACH, or weights given
};

enum Fault : int32_t { OK = 0, BAD_BAGS = 1, BAD_GRADIENT = 2, OUT_OF_MEMORY = 3 };

// The first fault: of gradients the table and the row (within the rectangle).
struct Error {
  int64_t row;
  int32_t fault;
  int32_t table;
};

}  // namespace thresher
