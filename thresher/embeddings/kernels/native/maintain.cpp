// Records written outside of updates.
#include "maintain.h"

#include "record.h"
#include "scratch.h"

namespace thresher::TH_ISA {

bool write_rows(const Table& table, const int64_t* rows, const float* values, int64_t n) {
  const Shape<0, true> shape(table.dim);
  const Scratch scratch(table.dim);
  if (scratch.failed()) return false;
  const Blocks blocks = {scratch.vector(0), {scratch.vector(1), scratch.vector(2)}, scratch.bytes()};
  for (int j = 0; j < 2 * shape.blocks(); j++) scratch.vector(1)[j] = zeros();
  for (int64_t i = 0; i < n; i++) {
    uint32_t* const desc = table.desc + 2 * rows[i];
    const int tier = tier_of(desc[0]);
    if (tier <= DROPPED) continue;
    TH_BLOCKS(j, shape) blocks.x[j] = shape.load(values + i * table.dim, j);
    uint8_t* const record = record_of(table, tier, desc[0] & SLOT_MASK);
    desc[1] = float_to_bits(encode<false>(table, tier, record, 0.0f, shape, table.n_vectors, Noise{0, 0}, blocks));
  }
  return true;
}

bool transfer_rows(const Table& table, const Transfer* moves, int64_t n) {
  const Shape<0, true> shape(table.dim);
  const Scratch scratch(table.dim);
  if (scratch.failed()) return false;
  const Blocks blocks = {scratch.vector(0), {scratch.vector(1), scratch.vector(2)}, scratch.bytes()};
  for (int64_t i = 0; i < n; i++) {
    const Transfer& move = moves[i];
    uint32_t* const desc = table.desc + 2 * move.row;
    const int from = tier_of(desc[0]), to = tier_of(move.place);
    float scale = 0.0f;
    if (to > DROPPED) {
      const uint8_t* const old = record_of(table, from, desc[0] & SLOT_MASK);
      decode(table, from, old, bits_to_float(desc[1]), shape, table.n_vectors, blocks);
      const Noise noise = {row_key(table.round_key, known_as(table, move.row), table.step), DEMOTED};
      uint8_t* const record = record_of(table, to, move.place & SLOT_MASK);
      scale = encode<true>(table, to, record, 0.0f, shape, table.n_vectors, noise, blocks);
    }
    desc[0] = move.place;
    desc[1] = float_to_bits(scale);
  }
  return true;
}

}  // namespace thresher::TH_ISA
