// The largest singular value of a matrix and its two vectors.
// Bound by the products with the matrix, 2 * M * N multiply-adds a step; or, where its smaller side P is so small that this
// is cheaper, by its P x P Gram matrix: one read of the matrix, then P * P a step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/iteration.h"
#include "cpu/matrix_products.h"

namespace fairkernels {

struct LeadingPair {
  double sigma;
  Vector u;
  Vector v;
  int64_t steps;
};

inline LeadingPair constant_pair(int64_t rows, int64_t columns, double value) {
  return {value, Vector(rows, value), Vector(columns, value), 0};
}

// The first direction. Ones always overlap with the leading vector of a nonnegative matrix; a signed one may turn them into
// 0, so there every entry differs. A hint (perhaps null) gets a tenth of it added: on disjoint blocks it may be orthogonal.
inline Vector first_direction(int64_t n, bool nonnegative, const double* hint) {
  Vector x(n, 1.0);
  for (int64_t j = 0; j < n && !nonnegative; ++j) {
    const double turn = 0.618034 * static_cast<double>(j);
    x[j] += 0.5 * (turn - std::floor(turn));
  }
  const double length = hint == nullptr ? 0 : std::sqrt(dot(hint, hint, n));
  if (length > 0 && length < std::numeric_limits<double>::infinity()) {
    combine(1 / length, hint, 0.1 / norm(x), x.data(), n, x.data());
  }
  return x;
}

// Of the two signs, the one with sum(v) >= 0.
inline void fix_sign(LeadingPair& pair) {
  double sum = 0;
  for (double x : pair.v) {
    sum += x;
  }
  if (sum < 0) {
    scale(pair.u, -1);
    scale(pair.v, -1);
  }
}

// `matrix` may be rescaled. `hint`, perhaps null, holds a direction v to start from. Zeros for a zero matrix, NaN if an entry
// is not finite. parallel(n, elements_each, function(begin, end)) runs a loop; no result depends on how.
template <typename Real, typename Parallel = Serial>
LeadingPair leading_pair(PackedMatrix<Real>& matrix, const IterationOptions& options, const double* hint = nullptr,
                         const Parallel& parallel = {});

// The same of a matrix with any strides and type.
template <typename T, typename Parallel = Serial>
LeadingPair leading_pair(const T* matrix, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                         const IterationOptions& options, const double* hint = nullptr, const Parallel& parallel = {});

}  // namespace fairkernels
