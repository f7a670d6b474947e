// The softmax's backward of rows whose exponentials were kept, in their place: no second exp, and no memory but the gradient's.
// Bound by memory: a row is read twice, the second time from the first-level cache, and written once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/soft_confusion.h"
#include "cpu/softmax.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// The gradient where an exponential is 1, that of the largest logit; of several such gradients the largest.
template <typename Real>
FK_INLINE void see_tops(const Real* exps, const Real* gradient, Real (&there)[kLanes]) {
  Real seen[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    seen[j] = exps[j] == 1 ? gradient[j] : -std::numeric_limits<Real>::infinity();
  }
  see_lanes(seen, there);
}

template <typename Real>
FK_INLINE Real gradient_at_top(const Real* exps, const Real* tail, const Real* gradient, int64_t whole) {
  Real there[kLanes];
  std::fill_n(there, kLanes, -std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < whole; k += kLanes) {
    see_tops(exps + k, gradient + k, there);
  }
  see_tops(tail, gradient + whole, there);
  return max_lanes(there);
}

// A row whose exponentials and their sum are known, and one that comes later and is fetched on the way.
template <typename Real>
struct KeptRow {
  Real* exps;
  Real sum;
  const Real* ahead;
};

// softmax_backward of such a row, whose exponentials give way to it; `gradient` has room for a tail. Where no class has more
// than half of the probability, or that class's gradient is 0 anyway, nothing is lost without the shift.
template <typename Real>
FK_INLINE void row_to_slopes(const KeptRow<Real>& row, int64_t classes, int64_t label, const Real* gradient,
                             Real scale, Real common) {
  Real* exps = row.exps;
  const Real sum = row.sum;
  const int64_t whole = classes / kLanes * kLanes;
  Real tail[kLanes];
  load_tail(exps + whole, classes - whole, Real(0), tail);
  const bool shifts = sum < 2 && !(exps[label] == 1 && gradient[label] == 0);
  const Real shift = shifts ? gradient_at_top(exps, tail, gradient, whole) : Real(0);
  for (int64_t k = 0; k < whole; k += kLanes) {
    FK_PREFETCH_TO_WRITE(row.ahead + k);
  }
  double product = blocked_sum<Real>(whole, [=](int64_t k) { return exps[k] * (gradient[k] - shift); });
  if (whole != classes) {
    product += lane_sum<Real>(kLanes, [&](int64_t j) { return tail[j] * (gradient[whole + j] - shift); });
  }
  slopes(exps, tail, gradient, classes, shift, {sum, static_cast<Real>(product)}, scale, common, exps);
}

// The same of up to sixteen narrow rows.
template <typename Real>
FK_INLINE void narrow_to_slopes(const KeptRow<Real>* rows, int64_t n_rows, int64_t classes, int64_t label,
                                const Real* gradient, Real scale, Real common) {
  Columns<Real> exps;
  Real sum[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    const KeptRow<Real>& row = rows[j < n_rows ? j : 0];
    sum[j] = row.sum;
    for (int64_t k = 0; k < classes; ++k) {
      exps[k][j] = row.exps[k];
    }
  }
  Real shift[kLanes];
  std::fill_n(shift, kLanes, -std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const Real seen = exps[k][j] == 1 ? gradient[k] : -std::numeric_limits<Real>::infinity();
      shift[j] = seen > shift[j] ? seen : shift[j];
    }
  }
  const bool own_is_zero = gradient[label] == 0;
  Real product[kLanes] = {};
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    const bool own_is_top = exps[label][j] == 1;
    shift[j] = sum[j] < 2 && !(own_is_top && own_is_zero) ? shift[j] : Real(0);
  }
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      product[j] += exps[k][j] * (gradient[k] - shift[j]);
    }
  }
  Real mean[kLanes];
  Real factor[kLanes];
  Real offset[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    const Real inverse = 1 / sum[j];
    mean[j] = product[j] * inverse;
    factor[j] = scale * inverse;
    offset[j] = common * inverse;
  }
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      exps[k][j] *= factor[j] * ((gradient[k] - shift[j]) - mean[j]) + offset[j];
    }
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t k = 0; k < classes; ++k) {
      rows[r].exps[k] = exps[k][r];
    }
  }
}

template <typename Real>
FK_INLINE void exps_to_slopes_body(const KeptRow<Real>* rows, int64_t n_rows, int64_t classes, int64_t label,
                                   const Real* gradient, Real scale, Real common) {
  for (int64_t r = 0; classes > kNarrow && r < n_rows; ++r) {
    row_to_slopes(rows[r], classes, label, gradient, scale, common);
  }
  for (int64_t r = 0; classes <= kNarrow && r < n_rows; r += kLanes) {
    narrow_to_slopes(rows + r, n_rows - r < kLanes ? n_rows - r : kLanes, classes, label, gradient, scale, common);
  }
}

// Of rows of one class.
FK_CLONES static void exps_to_slopes(const KeptRow<float>* rows, int64_t n_rows, int64_t classes, int64_t label,
                                     const float* gradient, float scale, float common) {
  exps_to_slopes_body(rows, n_rows, classes, label, gradient, scale, common);
}

FK_CLONES static void exps_to_slopes(const KeptRow<double>* rows, int64_t n_rows, int64_t classes, int64_t label,
                                     const double* gradient, double scale, double common) {
  exps_to_slopes_body(rows, n_rows, classes, label, gradient, scale, common);
}

// The sum of a row's exponentials but for those that are 1.
template <typename Real>
FK_INLINE double sum_below_one_body(const Real* exps, int64_t classes) {
  double total = 0;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t n = classes - first < kBlock ? classes - first : kBlock;
    total += ragged_sum<Real>(n, [=](int64_t k) { return exps[first + k] == 1 ? Real(0) : exps[first + k]; });
  }
  return total;
}

FK_CLONES static double sum_below_one(const float* exps, int64_t classes) {
  return sum_below_one_body(exps, classes);
}

FK_CLONES static double sum_below_one(const double* exps, int64_t classes) {
  return sum_below_one_body(exps, classes);
}

template <typename Real>
FK_INLINE void multiply_run_body(Real* run, int64_t n, Real factor, const Real* ahead) {
  for (int64_t k = 0; k < n; k += kLanes) {
    FK_PREFETCH_TO_WRITE(ahead + k);
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    run[k] *= factor;
  }
}

// Multiplies a run in place; the one that lies `ahead` is fetched.
FK_CLONES static void multiply_run(float* run, int64_t n, float factor, const float* ahead) {
  multiply_run_body(run, n, factor, ahead);
}

FK_CLONES static void multiply_run(double* run, int64_t n, double factor, const double* ahead) {
  multiply_run_body(run, n, factor, ahead);
}

// What exps_to_slopes does to one row, for a gradient by the rates that is 0 but for the classes `places`; `picked` has room
// for as many.
template <typename Real>
void picked_to_slopes(const KeptRow<Real>& row, int64_t classes, const std::vector<int64_t>& places, const Real* gradient,
                      Real scale, Real common, Real* picked) {
  const int64_t n = places.size();
  Real shift = 0;
  for (int64_t j = 0; j < n; ++j) {
    picked[j] = row.exps[places[j]];
    shift = picked[j] == 1 && row.sum < 2 ? gradient[j] : shift;
  }
  double product = 0;
  double others = 0;
  for (int64_t j = 0; j < n; ++j) {
    product += static_cast<double>(picked[j]) * (gradient[j] - shift);
    others += picked[j] != 1 ? picked[j] : 0;
  }
  if (shift != 0) {
    product -= shift * (sum_below_one(row.exps, classes) - others);
  }
  const Real mean = static_cast<Real>(product) / row.sum;
  const Real factor = scale / row.sum;
  const Real offset = common / row.sum;
  multiply_run(row.exps, classes, factor * (-shift - mean) + offset, row.ahead);
  for (int64_t j = 0; j < n; ++j) {
    row.exps[places[j]] = picked[j] * (factor * ((gradient[j] - shift) - mean) + offset);
  }
}

}  // namespace fairkernels
