// Records of tiered rows to blocks of fp32 and back; rows/tiers.py has the formats.
#pragma once
#include "abi.h"
#include "generator.h"
#include "rounding.h"
#include "shape.h"

namespace thresher::TH_ISA {

// A row held in blocks: the weights and up to two optimizer vectors. `bytes` has room for a byte a column.
struct Blocks {
  Vec* x;
  Vec* state[2];
  int8_t* bytes;
};

// Where the bits of a row come from: streams `first_stream` + 0 for weights, + 1, + 2 for optimizer vectors.
struct Noise {
  uint64_t key;
  uint32_t first_stream;
};

static inline int tier_of(uint32_t place) { return static_cast<int>(place >> SLOT_BITS); }
static inline uint8_t* record_of(const Table& table, int tier, int64_t slot) {
  return table.slabs[tier] + slot * table.record_bytes[tier];
}
static inline int64_t known_as(const Table& table, int64_t row) {
  return table.identity ? table.identity[row] : table.row0 + row;
}
static inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// int4: byte i holds column i in its low and column i + half in its high bits.
static inline void unpack_int4(const uint8_t* packed, int64_t half, int8_t* q) {
  for (int64_t i = 0; i < half; i++) {
    q[i] = static_cast<int8_t>(static_cast<int8_t>(packed[i] << 4) >> 4);
    q[i + half] = static_cast<int8_t>(static_cast<int8_t>(packed[i]) >> 4);
  }
}
static inline void pack_int4(const int8_t* q, int64_t half, uint8_t* packed) {
  for (int64_t i = 0; i < half; i++) packed[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + half] << 4));
}

template <class S>
TH_INLINE void decode_whole(const S& shape, const int8_t* q, float scale, Vec* x) {
  const Vec factor = floats(scale);
  TH_BLOCKS(j, shape) x[j] = factor * to_floats(shape.load_int8(q, j));
}

// The row whose record is given; without one (`tier` NONE or DROPPED) zeros.
template <class S>
TH_INLINE void decode(const Table& table, int tier, const uint8_t* record, float scale, const S& shape, int vectors,
                      const Blocks& row) {
  switch (tier) {
    case FP32:
      TH_BLOCKS(j, shape) row.x[j] = shape.load(reinterpret_cast<const float*>(record), j);
      break;
    case FP16:
      TH_BLOCKS(j, shape) row.x[j] = shape.load_fp16(reinterpret_cast<const uint16_t*>(record), j);
      break;
    case INT8:
      decode_whole(shape, reinterpret_cast<const int8_t*>(record), scale, row.x);
      break;
    case INT4:
      unpack_int4(record, table.dim / 2, row.bytes);
      decode_whole(shape, row.bytes, scale, row.x);
      break;
    default:
      TH_BLOCKS(j, shape) row.x[j] = zeros();
  }
  for (int v = 0; v < vectors; v++) {
    const uint8_t* state = record + table.state_offset[tier] + v * table.dim * (tier == FP32 ? 4 : 2);
    if (tier == FP32) {
      TH_BLOCKS(j, shape) row.state[v][j] = shape.load(reinterpret_cast<const float*>(state), j);
    } else if (tier > DROPPED) {
      TH_BLOCKS(j, shape) row.state[v][j] = shape.load_bf16(reinterpret_cast<const uint16_t*>(state), j);
    } else {
      TH_BLOCKS(j, shape) row.state[v][j] = zeros();
    }
  }
}

template <bool RANDOM, class S>
TH_INLINE float encode_whole(const S& shape, float levels, float scale, const Draws& draws, const Vec* x, int8_t* q) {
  Vec size = zeros();
  TH_BLOCKS(j, shape) size = max(size, abs(x[j]));
  scale = kept_scale(largest(size), scale, levels);
  const Vec inverse = floats(inverse_of(scale));
  TH_BLOCKS(j, shape) {
    shape.store_bytes(q, j, RANDOM ? quantised(x[j], inverse, levels, draws.bits(j)) : quantised(x[j], inverse, levels));
  }
  return scale;
}

// Writes the record of a row in `tier`, one with records. `scale` is the old one, 0 for a fresh one; returns the one
// the record has, 0 in tiers without.
template <bool RANDOM, class S>
TH_INLINE float encode(const Table& table, int tier, uint8_t* record, float scale, const S& shape, int vectors,
                       const Noise& noise, const Blocks& row) {
  const Draws draws(noise.key, noise.first_stream + WEIGHTS, table.col0);
  switch (tier) {
    case FP32:
      TH_BLOCKS(j, shape) shape.store(reinterpret_cast<float*>(record), j, row.x[j]);
      scale = 0.0f;
      break;
    case FP16:
      TH_BLOCKS(j, shape) {
        const Vec x = RANDOM ? rounded_fp16(row.x[j], draws.bits(j)) : rounded_fp16(row.x[j]);
        shape.store_fp16(reinterpret_cast<uint16_t*>(record), j, x);
      }
      scale = 0.0f;
      break;
    case INT8:
      scale = encode_whole<RANDOM>(shape, levels_of(INT8), scale, draws, row.x, reinterpret_cast<int8_t*>(record));
      break;
    default:
      scale = encode_whole<RANDOM>(shape, levels_of(INT4), scale, draws, row.x, row.bytes);
      pack_int4(row.bytes, table.dim / 2, record);
  }
  for (int v = 0; v < vectors; v++) {
    uint8_t* state = record + table.state_offset[tier] + v * table.dim * (tier == FP32 ? 4 : 2);
    const Draws more(noise.key, noise.first_stream + FIRST_STATE + static_cast<uint32_t>(v), table.col0);
    if (tier == FP32) {
      TH_BLOCKS(j, shape) shape.store(reinterpret_cast<float*>(state), j, row.state[v][j]);
    } else {
      TH_BLOCKS(j, shape) {
        const Vec x = RANDOM ? rounded_bf16(row.state[v][j], more.bits(j)) : row.state[v][j];
        shape.store_bf16(reinterpret_cast<uint16_t*>(state), j, x);
      }
    }
  }
  return scale;
}

}  // namespace thresher::TH_ISA
