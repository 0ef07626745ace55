// Rows of a part of an update: gradient, optimizer, rounding and priority in one pass over each row.
#include "update.h"

#include <cstdlib>

#include "gradients.h"
#include "philox.h"
#include "record.h"
#include "rules.h"
#include "scratch.h"

namespace thresher::TH_ISA {
namespace {

// Rows whose memory is asked for before they are used; of tiered rows the header first, then the record it names.
enum { ROWS_AHEAD = 12, HEADERS_AHEAD = 24 };

TH_INLINE void ask_for(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 1);
}

// Decay and optimizer. `sums` holds the sum of squares over the whole row, or is null to take it over these columns.
template <int KIND, class S>
TH_INLINE void apply(const S& shape, const Constants& c, float width, const float* sums, Vec* x, Vec* g, Vec* first,
                     Vec* second, float* scalar) {
  apply_decay(shape, c, x, g);
  float mean_square = 0.0f;
  if constexpr (has_scalar(KIND)) mean_square = (sums ? *sums : squares(shape, g)) / width;
  apply_rule<KIND>(shape, c, x, g, first, second, scalar, mean_square);
}

bool bad_gradient(Part& part, int table, int64_t row) {
  part.bad_table = table;
  part.bad_row = row;
  return false;
}

template <int KIND, class S>
bool update_flat(const Update& update, Part& part, const Scratch& scratch, int number, int64_t from, int64_t to) {
  const Table& table = update.tables[number];
  const S shape(table.dim);
  const Constants c(update.rules[number]);
  const Source source(update, number);
  const float width = static_cast<float>(table.full_dim);
  const float* sums = update.row_sums ? update.row_sums[number] : nullptr;
  constexpr int vectors = vectors_of(KIND);
  float* const state[2] = {table.vectors[0], table.vectors[1]};
  for (int64_t u = from; u < to; u++) {
    const int64_t next = source.rows[u + ROWS_AHEAD < source.unique ? u + ROWS_AHEAD : source.unique - 1];
    ask_for(table.weights + next * table.dim, shape.blocks() * 64);
    for (int v = 0; v < vectors; v++) ask_for(state[v] + next * table.dim, shape.blocks() * 64);
    if constexpr (has_scalar(KIND)) __builtin_prefetch(table.scalar + next, 1);

    TH_ROW(S, scratch);
    const int64_t row = source.rows[u];
    source.add_up(shape, u, g);
    if (!finite(shape, g)) return bad_gradient(part, number, row);
    float* const weights = table.weights + row * table.dim;
    TH_BLOCKS(j, shape) x[j] = shape.load(weights, j);
    if constexpr (vectors > 0) TH_BLOCKS(j, shape) first[j] = shape.load(state[0] + row * table.dim, j);
    if constexpr (vectors > 1) TH_BLOCKS(j, shape) second[j] = shape.load(state[1] + row * table.dim, j);
    apply<KIND>(shape, c, width, sums ? sums + u : nullptr, x, g, first, second, table.scalar + row);
    TH_BLOCKS(j, shape) shape.store(weights, j, x[j]);
    if constexpr (vectors > 0) TH_BLOCKS(j, shape) shape.store(state[0] + row * table.dim, j, first[j]);
    if constexpr (vectors > 1) TH_BLOCKS(j, shape) shape.store(state[1] + row * table.dim, j, second[j]);
  }
  return true;
}

// The priorities above which rows move.
class Promotion {
 public:
  Promotion(const Table& table, const Rule& rule) : table_(table), rule_(rule) {
    float lowest = __builtin_inff();
    for (int tier = FP32; tier >= NONE; tier--) {
      above_[tier] = lowest;
      if (table.slabs[tier] && rule.promote_above[tier] < lowest) lowest = rule.promote_above[tier];
    }
  }

  // The highest tier that a row of `tier` has the priority for.
  int wanted(int tier, float priority) const {
    if (!(priority > above_[tier])) return tier;
    int level = FP32;
    while (level > tier && !(table_.slabs[level] && priority > rule_.promote_above[level])) level--;
    return level;
  }

  // Whether there is no slot for a row that wants to go there.
  bool full(int tier) const {
    const int64_t* count = table_.count + 2 * tier;
    return count[FREE] == 0 && count[HIGH] >= table_.slots[tier];
  }

 private:
  const Table& table_;
  const Rule& rule_;
  float above_[TIERS];  // by tier of a row: the lowest threshold among higher levels
};

// Room for a move and its blocks at the end of the stash.
Move* push(Part& part, const Move& move) {
  Stash& stash = part.stash;
  const int64_t size = static_cast<int64_t>(sizeof(Move)) + move.floats * 4;
  if (stash.used + size > stash.room) {
    const int64_t room = 2 * stash.room + 64 * size;
    void* const bytes = std::realloc(stash.bytes, static_cast<size_t>(room));
    if (!bytes) {
      part.out_of_memory = true;
      return nullptr;
    }
    stash.bytes = static_cast<char*>(bytes);
    stash.room = room;
  }
  Move* const kept = reinterpret_cast<Move*>(stash.bytes + stash.used);
  *kept = move;
  stash.used += size;
  return kept;
}

template <class S>
bool stash_row(Part& part, const Move& move, const S& shape, const Vec* x, const Vec* first, const Vec* second,
               int vectors) {
  Move* const kept = push(part, move);
  if (!kept) return false;
  float* const to = reinterpret_cast<float*>(kept + 1);
  const int64_t size = LANES * shape.blocks();
  TH_BLOCKS(j, shape) store(to + LANES * j, x[j]);
  if (vectors > 0) TH_BLOCKS(j, shape) store(to + size + LANES * j, first[j]);
  if (vectors > 1) TH_BLOCKS(j, shape) store(to + 2 * size + LANES * j, second[j]);
  return true;
}

// A tiered row as it reads. Out of line, once for each shape and not for each optimizer.
template <class S>
__attribute__((noinline)) void unpack(const Table& table, int64_t row, const S& shape, int vectors, const Blocks& blocks,
                                      float* values) {
  const uint32_t* const desc = table.desc + 2 * row;
  const int tier = tier_of(desc[0]);
  const uint8_t* const record = tier > DROPPED ? record_of(table, tier, desc[0] & SLOT_MASK) : nullptr;
  decode(table, tier, record, bits_to_float(desc[1]), shape, vectors, blocks);
  if (tier != NONE) return;
  initial_row(table, row, values);
  TH_BLOCKS(j, shape) blocks.x[j] = shape.load(values, j);
}

// Stores a tiered row in the record it has.
template <class S>
__attribute__((noinline)) void pack(const Table& table, int64_t row, const S& shape, int vectors, const Blocks& blocks) {
  uint32_t* const desc = table.desc + 2 * row;
  const int tier = tier_of(desc[0]);
  const Noise noise = {row_key(table.round_key, known_as(table, row), table.step), WEIGHTS};
  uint8_t* const record = record_of(table, tier, desc[0] & SLOT_MASK);
  const float scale = encode<true>(table, tier, record, bits_to_float(desc[1]), shape, vectors, noise, blocks);
  if (float_to_bits(scale) != desc[1]) desc[1] = float_to_bits(scale);
}

TH_INLINE void ask_for_record(const Table& table, int64_t row) {
  const uint32_t place = table.desc[2 * row];
  const int tier = tier_of(place);
  if (tier > DROPPED) ask_for(record_of(table, tier, place & SLOT_MASK), table.record_bytes[tier]);
}

template <int KIND, class S>
bool update_tiered(const Update& update, Part& part, const Scratch& scratch, int number, int64_t from, int64_t to) {
  const Table& table = update.tables[number];
  const Rule& rule = update.rules[number];
  const S shape(table.dim);
  const Constants c(rule);
  const Source source(update, number);
  const Promotion promotion(table, rule);
  const float width = static_cast<float>(table.full_dim);
  const float* sums = update.row_sums ? update.row_sums[number] : nullptr;
  constexpr int vectors = vectors_of(KIND);
  const int64_t last = source.unique - 1;
  for (int64_t u = from; u < to; u++) {
    const int64_t later = source.rows[u + HEADERS_AHEAD < last ? u + HEADERS_AHEAD : last];
    __builtin_prefetch(table.desc + 2 * later, 1);
    __builtin_prefetch(table.stat + 2 * later, 1);
    ask_for_record(table, source.rows[u + ROWS_AHEAD < last ? u + ROWS_AHEAD : last]);

    TH_ROW(S, scratch);
    const int64_t row = source.rows[u];
    float* const stat = table.stat + 2 * row;
    const int tier = tier_of(table.desc[2 * row]);
    const Blocks blocks = {x, {first, second}, scratch.bytes()};
    source.add_up(shape, u, g);
    if (!finite(shape, g)) return bad_gradient(part, number, row);
    unpack(table, row, shape, vectors, blocks, scratch.floats());
    apply<KIND>(shape, c, width, sums ? sums + u : nullptr, x, g, first, second, stat);
    if (rule.priority_gain != 0.0f) {
      stat[1] = stat[1] + rule.priority_gain * source.increment(u, update.importance);
    }
    const int home = tier == NONE ? table.entry : tier;
    const int wanted = promotion.wanted(home, stat[1]);
    const bool refused = wanted != tier && wanted > DROPPED && promotion.full(wanted);
    if (tier != NONE && (wanted == tier || refused)) {
      part.refused += refused;
      if (tier != DROPPED) pack(table, row, shape, vectors, blocks);
    } else {
      const int32_t size = LANES * shape.blocks() * (1 + vectors);
      const float scale = bits_to_float(table.desc[2 * row + 1]);
      const Move move = {row, number, home, wanted, 0, scale, size};
      if (!stash_row(part, move, shape, x, first, second, vectors)) return false;
    }
  }
  return true;
}

// The sum of squares of each row's gradient, decay included.
template <class S>
bool sum_rows(const Update& update, Part&, const Scratch& scratch, int number, int64_t from, int64_t to) {
  const Table& table = update.tables[number];
  const Rule& rule = update.rules[number];
  const S shape(table.dim);
  const Source source(update, number);
  const Vec weight_decay = floats(rule.weight_decay);
  for (int64_t u = from; u < to; u++) {
    TH_ROW(S, scratch);
    source.add_up(shape, u, g);
    if (rule.decay == L2_DECAY) {
      const int64_t row = source.rows[u];
      const Blocks blocks = {x, {first, second}, scratch.bytes()};
      if (table.desc) {
        unpack(table, row, shape, 0, blocks, scratch.floats());
      } else {
        TH_BLOCKS(j, shape) x[j] = shape.load(table.weights + row * table.dim, j);
      }
      TH_BLOCKS(j, shape) g[j] = g[j] + weight_decay * x[j];
    }
    update.sums_out[number][u] = squares(shape, g);
  }
  return true;
}

// What is done to rows from .. to - 1 of a table; false stops the part.
using Rows = bool (*)(const Update&, Part&, const Scratch&, int number, int64_t from, int64_t to);

template <int KIND>
struct OfFlat {
  template <class S>
  static constexpr Rows rows = update_flat<KIND, S>;
};
template <int KIND>
struct OfTiered {
  template <class S>
  static constexpr Rows rows = update_tiered<KIND, S>;
};
struct OfSums {
  template <class S>
  static constexpr Rows rows = sum_rows<S>;
};

template <class Of>
Rows of_width(int64_t dim) {
#if TH_LEVEL > 0
  switch (dim) {
    case 16: return Of::template rows<Shape<1, false>>;
    case 32: return Of::template rows<Shape<2, false>>;
    case 64: return Of::template rows<Shape<4, false>>;
    case 128: return Of::template rows<Shape<8, false>>;
    default: if (dim < 16) return Of::template rows<Shape<1, true>>;
  }
#endif
  return Of::template rows<Shape<0, true>>;
}

template <int KIND>
Rows of_table(const Table& table) {
  return table.desc ? of_width<OfTiered<KIND>>(table.dim) : of_width<OfFlat<KIND>>(table.dim);
}

Rows of_rule(const Table& table, int32_t kind) {
  switch (kind) {
    case SGD: return of_table<SGD>(table);
    case ROWWISE_ADAGRAD: return of_table<ROWWISE_ADAGRAD>(table);
    case ADAGRAD: return of_table<ADAGRAD>(table);
    case ADAM: return of_table<ADAM>(table);
    case ROWWISE_ADAM: return of_table<ROWWISE_ADAM>(table);
    default: return of_table<FTRL>(table);
  }
}

// Calls act(table, from, to, scratch) for the rows of a part, table by table, until it returns false.
template <class Act>
void for_tables(const Update& update, Part& part, const Act& act) {
  int64_t before = 0;
  for (int t = 0; t < update.bags->n_tables && before < part.end; t++) {
    const int64_t rows = update.sorted->unique[t];
    const int64_t from = part.begin > before ? part.begin - before : 0;
    const int64_t to = part.end - before < rows ? part.end - before : rows;
    before += rows;
    if (from >= to) continue;
    const Scratch scratch(update.tables[t].dim);
    part.out_of_memory |= scratch.failed();
    if (scratch.failed() || !act(t, from, to, scratch)) return;
  }
}

}  // namespace

void update_part(const Update& update, Part& part) {
  for_tables(update, part, [&](int t, int64_t from, int64_t to, const Scratch& scratch) {
    return of_rule(update.tables[t], update.rules[t].kind)(update, part, scratch, t, from, to);
  });
}

void sum_part(const Update& update, Part& part) {
  for_tables(update, part, [&](int t, int64_t from, int64_t to, const Scratch& scratch) {
    return of_width<OfSums>(update.tables[t].dim)(update, part, scratch, t, from, to);
  });
}

void encode_moves(const Update& update, Part& part) {
  for (int64_t at = 0; at < part.stash.used;) {
    const Move& move = *reinterpret_cast<const Move*>(part.stash.bytes + at);
    const float* const values = reinterpret_cast<const float*>(&move + 1);
    at += static_cast<int64_t>(sizeof(Move)) + move.floats * 4;
    const Table& table = update.tables[move.table];
    const Scratch scratch(table.dim);
    part.out_of_memory |= scratch.failed();
    if (scratch.failed()) return;
    const Shape<0, true> shape(table.dim);
    const Blocks blocks = {scratch.vector(0), {scratch.vector(1), scratch.vector(2)}, scratch.bytes()};
    const int vectors = vectors_of(update.rules[move.table].kind);
    for (int j = 0; j < shape.blocks() * (1 + vectors); j++) blocks.x[j] = load(values + LANES * j);
    uint32_t* const desc = table.desc + 2 * move.row;
    float scale = 0.0f;
    const int tier = tier_of(move.place);
    if (tier > DROPPED) {
      const Noise noise = {row_key(table.round_key, known_as(table, move.row), table.step), WEIGHTS};
      uint8_t* const record = record_of(table, tier, move.place & SLOT_MASK);
      scale = encode<true>(table, tier, record, move.scale, shape, vectors, noise, blocks);
    }
    desc[0] = move.place;
    desc[1] = float_to_bits(scale);
  }
}

}  // namespace thresher::TH_ISA
