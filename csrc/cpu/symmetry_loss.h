// The symmetry gap of a batch straight from its logits (Sy-FAR, arXiv 2509.12939), without a K x K matrix: only the P <=
// min(B, K) classes that occur have a row, and unless absent classes are charged only they have a column.
// Bound by the exp of the B * K logits; the P * P pairs cost about 15 operations each. Memory: O(K) for each thread, and the
// matrix of coefficients dL/dC, in which the rates are first summed and then replaced by what the backward needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/soft_confusion.h"
#include "cpu/symmetry_gap.h"
#include "support/pair_penalty.h"

namespace fairkernels {

// Penalties of one present class against the absent ones, whose rows are 0: pairs (C_ik, 0). Their derivatives by C_ik
// replace the rates; entries of present classes are worthless afterwards.
template <typename Real>
FK_INLINE double absent_pairs_body(Real* rates, const Real* absent, int64_t classes, Real eps, Real scale) {
  const auto charge = [=](int64_t k) {
    const PairPenalty<Real> pair = pair_penalty(rates[k], Real(0), eps);
    rates[k] = scale * pair.by_forward;
    return absent[k] != 0 ? pair.value : Real(0);
  };
  double total = 0;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t n = classes - first < kBlock ? classes - first : kBlock;
    total += ragged_sum<Real>(n, [&](int64_t k) { return charge(first + k); });
  }
  return total;
}

FK_CLONES static double absent_pairs(float* rates, const float* absent, int64_t classes, float eps, float scale) {
  return absent_pairs_body(rates, absent, classes, eps, scale);
}

FK_CLONES static double absent_pairs(double* rates, const double* absent, int64_t classes, double eps, double scale) {
  return absent_pairs_body(rates, absent, classes, eps, scale);
}

// The columns of the present classes of a row of all classes, and back. Where all are present, rows are the same.
template <typename Real>
void gather(const Real* row, int64_t classes, const std::vector<int64_t>& present, Real* compact) {
  const int64_t n = present.size();
  if (n == classes) {
    std::copy_n(row, n, compact);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    compact[j] = row[present[j]];
  }
}

template <typename Real>
void scatter(const Real* compact, const std::vector<int64_t>& present, int64_t classes, Real* row) {
  const int64_t n = present.size();
  if (n == classes) {
    std::copy_n(compact, n, row);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    row[present[j]] = compact[j];
  }
}

// Rates of the present classes [begin, end), a row for each: among each other if `compact`, else towards every class.
template <typename T>
void rate_rows(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const std::vector<int64_t>& present, bool compact,
               int64_t begin, int64_t end, const Matrix<Accumulator<T>>& rates) {
  ConfusionRow<T> confusion_row(logits, order.most_rows);
  for (int64_t i = begin; i < end; ++i) {
    const ClassGroup group = order.group(present[i]);
    const Accumulator<T>* from = confusion_row(order, group, inverse_count(group.count));
    Accumulator<T>* row = rates.data + i * rates.row_stride;
    if (compact) {
      gather(from, order.classes, present, row);
    } else {
      std::copy_n(from, order.classes, row);
    }
  }
}

}  // namespace fairkernels
