// Sums in sixteen lanes. The compiler turns sixteen neighbouring additions into one or two instructions of whatever
// width it has, and the order of the additions is the same on all of them. Rows padded to whole lanes need no remainder
// loops, which would cost a row of ten or a hundred classes more than its vectors do.
#pragma once

#include <cstdint>

#include "support/platform.h"

namespace fairkernels {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64 * kLanes;  // long sums are taken in blocks, and these added in double

FK_INLINE int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

template <typename Real>
FK_INLINE Real add_lanes(Real (&lane)[kLanes]) {
#pragma omp simd
  for (int j = 0; j < 8; ++j) {
    lane[j] += lane[j + 8];
  }
#pragma omp simd
  for (int j = 0; j < 4; ++j) {
    lane[j] += lane[j + 4];
  }
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

template <typename Real>
FK_INLINE void see_lanes(const Real* seen, Real (&lane)[kLanes]) {
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    const Real a = seen[j];
    const Real b = lane[j];
    lane[j] = b < a ? a : b;  // of values at hand gcc 12 makes one instruction, of elements masks and stores
  }
}

// The largest lane; NaN never is.
template <typename Real>
FK_INLINE Real max_lanes(Real (&lane)[kLanes]) {
#pragma omp simd
  for (int j = 0; j < 8; ++j) {
    lane[j] = lane[j + 8] > lane[j] ? lane[j + 8] : lane[j];
  }
#pragma omp simd
  for (int j = 0; j < 4; ++j) {
    lane[j] = lane[j + 4] > lane[j] ? lane[j + 4] : lane[j];
  }
  const Real even = lane[2] > lane[0] ? lane[2] : lane[0];
  const Real odd = lane[3] > lane[1] ? lane[3] : lane[1];
  return odd > even ? odd : even;
}

// term(0) + ... + term(n - 1), n a multiple of kLanes.
template <typename Real, typename Term>
FK_INLINE Real lane_sum(int64_t n, const Term& term) {
  Real lane[kLanes] = {};
  for (int64_t first = 0; first < n; first += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += term(first + j);
    }
  }
  return add_lanes(lane);
}

// The same for any n.
template <typename Real, typename Term>
FK_INLINE Real ragged_sum(int64_t n, const Term& term) {
  const int64_t whole = n / kLanes * kLanes;
  Real sum = lane_sum<Real>(whole, term);
  for (int64_t i = whole; i < n; ++i) {
    sum += term(i);
  }
  return sum;
}

// The same for long sums, n a multiple of kLanes: by blocks.
template <typename Real, typename Term>
FK_INLINE double blocked_sum(int64_t n, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t terms = n - first < kBlock ? n - first : kBlock;
    total += lane_sum<Real>(terms, [&](int64_t i) { return term(first + i); });
  }
  return total;
}

}  // namespace fairkernels
