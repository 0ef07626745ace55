// What Python hands to an update, besides abi.h; mirrored field by field in update.py.
#pragma once
#include "abi.h"

namespace thresher {

enum RuleKind : int32_t { SGD = 0, ROWWISE_ADAGRAD = 1, ADAGRAD = 2, ADAM = 3, ROWWISE_ADAM = 4, FTRL = 5, RULES = 6 };
enum DecayKind : int32_t { NO_DECAY = 0, L2_DECAY = 1, DECOUPLED_DECAY = 2 };

// kernels/rules.py's UpdateRule in fp32. rest = 1 - beta, shrink = 1 - lr * weight_decay.
struct Rule {
  int32_t kind;
  int32_t decay;
  float lr;
  float eps;
  float beta1;
  float rest1;
  float beta2;
  float rest2;
  float correction1;
  float correction2;
  float ftrl_beta;
  float l1;
  float l2;
  float weight_decay;
  float shrink;
  float priority_gain;
  float promote_above[TIERS];
};

// A backward over rows that Sorted found.
struct Update {
  const Table* tables;
  const Bags* bags;
  const Sorted* sorted;
  const float* grad;               // see Bags
  const Rule* rules;               // [n_tables]
  const float* importance;         // [largest batch] or null for ones
  const float* const* row_sums;    // for each table [unique] or null to sum up here
  float* const* sums_out;          // th_row_sums only: for each table [unique]
  int64_t threads;
};

struct UpdateCounts {
  int64_t rows;
  int64_t promoted;
  int64_t refused;
};

}  // namespace thresher
