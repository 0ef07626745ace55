// Parts of an update: rows a few at a time, each in one pass through memory.
#include "update.h"

#include "batch.h"
#include "flat.h"
#include "promotion.h"
#include "scratch.h"

namespace thresher::TH_ISA {
namespace {

// What is done to rows of one width by one optimizer.
struct Stages {
  int64_t (*update_flat)(const Table&, const Source&, const Constants&, const float*, int64_t, int64_t, const Batch&);
  int (*gather)(const Table&, const Source&, int64_t, int, const Batch&);
  void (*fetch)(const Table&, const int64_t*, int, int, const Batch&);
  void (*sum_up)(int64_t, const Constants&, int, const Batch&, float*);
  void (*apply)(const Table&, const Constants&, const int64_t*, int, const Batch&, const float*);
  void (*store)(const Table&, const int64_t*, int, uint32_t, int, const Batch&);
};

template <int KIND, class S>
Stages stages_of_shape() {
  return {update_flat<KIND, S>, gather<S>, fetch<S>, sum_up<S>, apply_rule<KIND, S>, store<S>};
}

template <int KIND>
Stages stages_of_width([[maybe_unused]] int64_t dim) {
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
    const float* const sums = update_.row_sums ? update_.row_sums[number_] : nullptr;
    if (table_.desc) return update_tiered(from, to, sums);
    const int64_t bad = stages_.update_flat(table_, source_, constants_, sums, from, to, batch_);
    return bad == to || is_bad(bad);
  }

  // Sums of squares of rows from .. to - 1.
  void sum_up(int64_t from, int64_t to) {
    for (int64_t u = from; u < to; u += BATCH) {
      const int n = to - u < BATCH ? static_cast<int>(to - u) : BATCH;
      stages_.gather(table_, source_, u, n, batch_);
      if (rule_.decay == L2_DECAY) stages_.fetch(table_, source_.rows + u, n, 0, batch_);
      stages_.sum_up(table_.dim, constants_, n, batch_, update_.sums_out[number_] + u);
    }
  }

 private:
  bool is_bad(int64_t u) {
    part_.bad_table = number_;
    part_.bad_row = source_.rows[u];
    return false;
  }

  bool update_tiered(int64_t from, int64_t to, const float* sums) {
    float own[BATCH];
    for (int64_t u = from; u < to; u += BATCH) {
      const int n = to - u < BATCH ? static_cast<int>(to - u) : BATCH;
      const int64_t* const rows = source_.rows + u;
      const int bad = stages_.gather(table_, source_, u, n, batch_);
      if (bad < n) return is_bad(u + bad);
      stages_.fetch(table_, rows, n, vectors_, batch_);
      if (has_scalar(rule_.kind) && !sums) stages_.sum_up(table_.dim, constants_, n, batch_, own);
      stages_.apply(table_, constants_, rows, n, batch_, sums ? sums + u : own);
      if (!keep(u, n)) return false;
    }
    return true;
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
    if (stays) stages_.store(table_, source_.rows + u, n, stays, vectors_, batch_);
    return true;
  }

  bool stash(const Move& move, int b) {
    float* const to = push(part_, move);
    if (!to) return false;
    const size_t bytes = static_cast<size_t>(batch_.width()) * sizeof(float);
    const Blocks row = batch_.blocks(b);
    std::memcpy(to, row.x, bytes);
    for (int v = 0; v < vectors_; v++) std::memcpy(to + (v + 1) * batch_.width(), row.state[v], bytes);
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
