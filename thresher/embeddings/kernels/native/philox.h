// Initial values of a row: embeddings/init.py's numbers, drawn for one row where that draws blocks of 1024.
//
// numpy's Philox4x64-10 (Salmon et al., 2011) counts up before each draw, so four words from counter (i + 1, 0, block, 0)
// are the words 4 i .. 4 i + 3 of a block; each gives two values, its lower half first.
#pragma once
#include "record.h"

namespace thresher::TH_ISA {

enum { BLOCK_ROWS_BITS = 10, DRAWN = 8 };  // rows of a block; values from one counter

static inline void philox_round(uint64_t counter[4], const uint64_t key[2]) {
  const unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * counter[0];
  const unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * counter[2];
  const uint64_t third = counter[3];
  counter[0] = static_cast<uint64_t>(second >> 64) ^ counter[1] ^ key[0];
  counter[1] = static_cast<uint64_t>(second);
  counter[2] = static_cast<uint64_t>(first >> 64) ^ third ^ key[1];
  counter[3] = static_cast<uint64_t>(first);
}

// Values 8 i .. 8 i + 7 of a block.
static inline void draw_values(const Table& table, uint64_t block, uint64_t i, float values[DRAWN]) {
  uint64_t words[4] = {i + 1, 0, block, 0};
  uint64_t key[2] = {table.init_key[0], table.init_key[1]};
  for (int round = 0; round < 10; ++round) {
    philox_round(words, key);
    key[0] += 0x9E3779B97F4A7C15u;
    key[1] += 0xBB67AE8584CAA73Bu;
  }
  for (int k = 0; k < DRAWN; ++k) {
    const uint32_t bits = static_cast<uint32_t>(words[k / 2] >> (k % 2 * 32));
    const float unit = static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f;
    values[k] = (unit * 2.0f - 1.0f) * table.init_scale;
  }
}

// The initial values [dim] of a row of a tiered table.
static inline void initial_row(const Table& table, int64_t row, float* values) {
  const uint64_t name = static_cast<uint64_t>(known_as(table, row));
  const uint64_t in_block = name & ((1u << BLOCK_ROWS_BITS) - 1);
  const uint64_t first = in_block * static_cast<uint64_t>(table.full_dim) + static_cast<uint64_t>(table.col0);
  const uint64_t end = first + static_cast<uint64_t>(table.dim);
  for (uint64_t at = first; at < end;) {
    float drawn[DRAWN];
    draw_values(table, name >> BLOCK_ROWS_BITS, at / DRAWN, drawn);
    for (uint64_t k = at % DRAWN; k < DRAWN && at < end; ++k, ++at) values[at - first] = drawn[k];
  }
}

}  // namespace thresher::TH_ISA
