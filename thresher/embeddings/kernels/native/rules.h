// The row optimizers, on rows of a Shape held in sixteen-lane blocks; kernels/rules.py has the formulas.
#pragma once
#include "shape.h"
#include "update_abi.h"

namespace thresher::TH_ISA {

// The constants of a rule, where no store can change them.
struct Constants {
  explicit Constants(const Rule& rule)
      : lr(floats(rule.lr)),
        eps(floats(rule.eps)),
        beta1(floats(rule.beta1)),
        rest1(floats(rule.rest1)),
        beta2(floats(rule.beta2)),
        rest2(floats(rule.rest2)),
        correction1(floats(rule.correction1)),
        correction2(floats(rule.correction2)),
        ftrl_beta(floats(rule.ftrl_beta)),
        l1(floats(rule.l1)),
        l2(floats(rule.l2)),
        weight_decay(floats(rule.weight_decay)),
        shrink(floats(rule.shrink)),
        one(rule),
        decay(rule.decay) {}
  Vec lr, eps, beta1, rest1, beta2, rest2, correction1, correction2, ftrl_beta, l1, l2, weight_decay, shrink;
  Rule one;
  int32_t decay;
};

static inline float root(float x) { return __builtin_sqrtf(x); }

constexpr int vectors_of(int kind) { return kind == ADAM || kind == FTRL ? 2 : kind == ADAGRAD || kind == ROWWISE_ADAM; }
constexpr bool has_scalar(int kind) { return kind == ROWWISE_ADAGRAD || kind == ROWWISE_ADAM; }

// The sum of squares of g in the order of the contract: sixteen partial sums, folded by halves.
template <class S>
TH_INLINE float squares(const S& shape, const Vec* g) {
  Vec total = zeros();
  TH_BLOCKS(j, shape) total = total + g[j] * g[j];
  return sum(total);
}

// Decay of sixteen columns, which comes before the rest.
TH_INLINE void decayed(const Constants& c, Vec& x, Vec& g) {
  if (c.decay == L2_DECAY) g = g + c.weight_decay * x;
  if (c.decay == DECOUPLED_DECAY) x = x * c.shrink;
}

// Moves the scalar of a row by the mean of the squares of its gradient. Returns what all its columns share in the step:
// the rate of row-wise Adagrad, the second moment of row-wise Adam.
template <int KIND>
TH_INLINE float move_scalar(const Rule& rule, float* scalar, float mean_square) {
  if (KIND == ROWWISE_ADAGRAD) {
    *scalar = *scalar + mean_square;
    return rule.lr / (root(*scalar) + rule.eps);
  }
  *scalar = rule.beta2 * *scalar + rule.rest2 * mean_square;
  return *scalar;
}

TH_INLINE Vec adam_step(const Constants& c, Vec x, Vec m, Vec second) {
  return x - (c.lr * (m * c.correction1)) / (sqrt(second * c.correction2) + c.eps);
}

TH_INLINE void ftrl_step(const Constants& c, Vec& x, Vec g, Vec& z, Vec& n) {
  const Vec before = sqrt(n);
  n = n + g * g;
  const Vec after = sqrt(n);
  z = (z + g) - ((after - before) / c.lr) * x;
  const Vec solved = (copysign(c.l1, z) - z) / ((c.ftrl_beta + after) / c.lr + c.l2);
  x = select(abs(z) <= c.l1, zeros(), solved);
}

// Sixteen columns of a row, decay done; `shared` is from move_scalar.
template <int KIND>
TH_INLINE void step(const Constants& c, Vec shared, Vec& x, Vec g, Vec& first, Vec& second) {
  if constexpr (KIND == SGD) {
    x = x - c.lr * g;
  } else if constexpr (KIND == ROWWISE_ADAGRAD) {
    x = x - shared * g;
  } else if constexpr (KIND == ADAGRAD) {
    first = first + g * g;
    x = x - (c.lr * g) / (sqrt(first) + c.eps);
  } else if constexpr (KIND == ADAM) {
    first = c.beta1 * first + c.rest1 * g;
    second = c.beta2 * second + c.rest2 * (g * g);
    x = adam_step(c, x, first, second);
  } else if constexpr (KIND == ROWWISE_ADAM) {
    first = c.beta1 * first + c.rest1 * g;
    x = adam_step(c, x, first, shared);
  } else {
    ftrl_step(c, x, g, first, second);
  }
}

}  // namespace thresher::TH_ISA
