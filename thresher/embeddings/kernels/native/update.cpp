// Parts of an update: rows a few at a time, each in one pass through memory.
#include "update.h"

#include <cstdlib>

#include "batch.h"
#include "promotion.h"

namespace thresher::TH_ISA {
namespace {

// Rows whose memory is asked for before they are used; of tiered rows the header first, then the record it names.
constexpr int64_t ROWS_AHEAD = 16, HEADERS_AHEAD = 32;

// The stages for rows of one width, and one optimizer.
struct Stages {
  int (*gather)(const Source&, int64_t dim, int64_t u, int n, const Batch&);
  void (*unpack)(const Table&, const int64_t* rows, int n, int vectors, const Batch&);
  void (*apply)(int64_t dim, float width, const Constants&, const RowAt*, int n, const Batch&);
  void (*pack)(const Table&, const int64_t* rows, int n, uint32_t stays, int vectors, const Batch&);
  void (*sum_up)(int64_t dim, const Constants&, const RowAt*, int n, const Batch&, float* sums);
};

template <int KIND, class S>
Stages stages_of_shape() {
  return {gather<S>, unpack<S>, apply_rule<KIND, S>, pack<S>, sum_up<S>};
}

template <int KIND>
Stages stages_of_width(int64_t dim) {
#if TH_LEVEL > 0
  switch (dim) {
    case 16: return stages_of_shape<KIND, Shape<1, false>>();
    case 32: return stages_of_shape<KIND, Shape<2, false>>();
    case 64: return stages_of_shape<KIND, Shape<4, false>>();
    case 128: return stages_of_shape<KIND, Shape<8, false>>();
    default: if (dim < 16) return stages_of_shape<KIND, Shape<1, true>>();
  }
#endif
  return stages_of_shape<KIND, Shape<0, true>>();
}

Stages stages_of(int64_t dim, int32_t kind) {
  switch (kind) {
    case SGD: return stages_of_width<SGD>(dim);
    case ROWWISE_ADAGRAD: return stages_of_width<ROWWISE_ADAGRAD>(dim);
    case ADAGRAD: return stages_of_width<ADAGRAD>(dim);
    case ADAM: return stages_of_width<ADAM>(dim);
    case ROWWISE_ADAM: return stages_of_width<ROWWISE_ADAM>(dim);
    default: return stages_of_width<FTRL>(dim);
  }
}

// The rows of one table in a part.
class TableRows {
 public:
  TableRows(const Update& update, Part& part, int number, const Batch& batch)
      : update_(update),
        part_(part),
        number_(number),
        table_(update.tables[number]),
        rule_(update.rules[number]),
        batch_(batch),
        stages_(stages_of(table_.dim, rule_.kind)),
        constants_(rule_),
        source_(update, number),
        promotion_(table_, rule_),
        vectors_(vectors_of(rule_.kind)) {}

  // Updates rows from .. to - 1; false stops the part.
  bool update(int64_t from, int64_t to) {
    for (int64_t u = from; u < to; u += BATCH) {
      const int n = to - u < BATCH ? static_cast<int>(to - u) : +BATCH;
      ask_ahead(u);
      const int bad = stages_.gather(source_, table_.dim, u, n, batch_);
      if (bad < n) {
        part_.bad_table = number_;
        part_.bad_row = source_.rows[u + bad];
        return false;
      }
      RowAt rows[BATCH];
      locate(u, n, vectors_, rows);
      stages_.apply(table_.dim, static_cast<float>(table_.full_dim), constants_, rows, n, batch_);
      if (table_.desc && !keep(u, n)) return false;
    }
    return true;
  }

  // Sums of squares of rows from .. to - 1.
  void sum_up(int64_t from, int64_t to) {
    for (int64_t u = from; u < to; u += BATCH) {
      const int n = to - u < BATCH ? static_cast<int>(to - u) : +BATCH;
      stages_.gather(source_, table_.dim, u, n, batch_);
      RowAt rows[BATCH];
      if (rule_.decay == L2_DECAY) locate(u, n, 0, rows);
      stages_.sum_up(table_.dim, constants_, rows, n, batch_, update_.sums_out[number_] + u);
    }
  }

 private:
  int64_t row_ahead(int64_t u) const { return source_.rows[u < source_.unique ? u : source_.unique - 1]; }

  TH_INLINE_MEMBER static void ask(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 1);
  }

  TH_INLINE_MEMBER void ask_ahead(int64_t u) const {
    for (int b = 0; b < BATCH; b++) {
      const int64_t row = row_ahead(u + ROWS_AHEAD + b);
      if (table_.desc) {
        const int64_t later = row_ahead(u + HEADERS_AHEAD + b);
        __builtin_prefetch(table_.desc + 2 * later, 1);
        __builtin_prefetch(table_.stat + 2 * later, 1);
        const uint32_t place = table_.desc[2 * row];
        const int tier = tier_of(place);
        if (tier > DROPPED) ask(record_of(table_, tier, place & SLOT_MASK), table_.record_bytes[tier]);
      } else {
        ask(table_.weights + row * table_.dim, table_.dim * 4);
        for (int v = 0; v < vectors_; v++) ask(table_.vectors[v] + row * table_.dim, table_.dim * 4);
        if (table_.scalar) __builtin_prefetch(table_.scalar + row, 1);
      }
    }
  }

  // Where rows u .. u + n - 1 are; tiered ones are decoded, with `vectors` of their optimizer's.
  void locate(int64_t u, int n, int vectors, RowAt* rows) const {
    if (table_.desc) stages_.unpack(table_, source_.rows + u, n, vectors, batch_);
    for (int b = 0; b < n; b++) {
      const int64_t row = source_.rows[u + b];
      if (table_.desc) {
        rows[b] = batch_.at(b, row);
        rows[b].scalar = table_.stat + 2 * row;
      } else {
        rows[b].x = table_.weights + row * table_.dim;
        for (int v = 0; v < vectors; v++) rows[b].state[v] = table_.vectors[v] + row * table_.dim;
        rows[b].scalar = table_.scalar + row;
      }
      rows[b].sums = update_.row_sums ? update_.row_sums[number_] + u + b : nullptr;
    }
  }

  // Stores updated rows of a tiered table, or stashes them where they need another record.
  bool keep(int64_t u, int n) {
    uint32_t stays = 0;
    for (int b = 0; b < n; b++) {
      const int64_t row = source_.rows[u + b];
      float* const priority = table_.stat + 2 * row + 1;
      if (rule_.priority_gain != 0.0f) {
        *priority = *priority + rule_.priority_gain * source_.increment(u + b, update_.importance);
      }
      const uint32_t* const desc = table_.desc + 2 * row;
      const int tier = tier_of(desc[0]), home = tier == NONE ? table_.entry : tier;
      const int wanted = promotion_.wanted(home, *priority);
      const bool refused = tier != NONE && wanted > tier && promotion_.full(wanted);
      part_.refused += refused;
      if (wanted == tier || refused) {
        stays |= static_cast<uint32_t>(tier > DROPPED) << b;
        continue;
      }
      const int32_t floats = static_cast<int32_t>(batch_.width()) * (1 + vectors_);
      if (!stash(Move{row, number_, home, wanted, 0, bits_to_float(desc[1]), floats}, b)) return false;
    }
    if (stays) stages_.pack(table_, source_.rows + u, n, stays, vectors_, batch_);
    return true;
  }

  bool stash(const Move& move, int b) {
    float* const to = push(part_, move);
    if (!to) return false;
    const size_t bytes = static_cast<size_t>(batch_.width()) * sizeof(float);
    std::memcpy(to, batch_.weights(b), bytes);
    for (int v = 0; v < vectors_; v++) std::memcpy(to + (v + 1) * batch_.width(), batch_.state(b, v), bytes);
    return true;
  }

  const Update& update_;
  Part& part_;
  const int number_;
  const Table& table_;
  const Rule& rule_;
  const Batch& batch_;
  const Stages stages_;
  const Constants constants_;
  const Source source_;
  const Promotion promotion_;
  const int vectors_;
};

// Calls act(rows, from, to) for the rows of a part, table by table, until it returns false.
template <class Act>
void for_tables(const Update& update, Part& part, const Act& act) {
  int64_t before = 0;
  for (int t = 0; t < update.bags->n_tables && before < part.end; t++) {
    const int64_t rows = update.sorted->unique[t];
    const int64_t from = part.begin > before ? part.begin - before : 0;
    const int64_t to = part.end - before < rows ? part.end - before : rows;
    before += rows;
    if (from >= to) continue;
    const Batch batch(update.tables[t].dim);
    part.out_of_memory |= batch.failed();
    if (batch.failed()) return;
    TableRows table(update, part, t, batch);
    if (!act(table, from, to)) return;
  }
}

}  // namespace

void update_part(const Update& update, Part& part) {
  for_tables(update, part, [](TableRows& table, int64_t from, int64_t to) { return table.update(from, to); });
}

void sum_part(const Update& update, Part& part) {
  for_tables(update, part, [](TableRows& table, int64_t from, int64_t to) {
    table.sum_up(from, to);
    return true;
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
    const int tier = tier_of(move.place);
    float scale = 0.0f;
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
