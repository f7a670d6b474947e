// The largest singular value of a sparse matrix and its two vectors, in double.
// Bound by the indirect loads: two multiply-adds for each entry and step, some twenty times dearer than those of a dense one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/spectral_norm.h"

namespace fairkernels {

// Compressed rows.
struct SparseMatrix {
  int64_t columns = 0;
  std::vector<int64_t> start = {0};  // row -> its first entry
  std::vector<int64_t> column;       // entry -> column
  Vector value;

  int64_t rows() const { return start.size() - 1; }
  int64_t entries() const { return value.size(); }

  double row_product(int64_t i, const Vector& x) const {
    double sum = 0;
    for (int64_t e = start[i]; e < start[i + 1]; ++e) {
      sum += value[e] * x[column[e]];
    }
    return sum;
  }

  void add_row(int64_t i, double factor, Vector& y) const {
    for (int64_t e = start[i]; e < start[i + 1]; ++e) {
      y[column[e]] += factor * value[e];
    }
  }

  // y = M^T M x
  void normal_product(const Vector& x, Vector& y) const {
    std::fill(y.begin(), y.end(), 0.0);
    for (int64_t i = 0; i < rows(); ++i) {
      add_row(i, row_product(i, x), y);
    }
  }
};

// Whether so many entries are better kept as a dense matrix.
inline bool is_dense(const SparseMatrix& matrix) {
  return matrix.rows() * matrix.columns <= 16 * matrix.entries();
}

template <typename Real>
PackedMatrix<Real> to_dense(const SparseMatrix& matrix) {
  PackedMatrix<Real> dense(matrix.rows(), matrix.columns);
  for (int64_t i = 0; i < dense.rows; ++i) {
    std::fill_n(dense.row(i), dense.columns, Real(0));
    for (int64_t e = matrix.start[i]; e < matrix.start[i + 1]; ++e) {
      dense.row(i)[matrix.column[e]] = static_cast<Real>(matrix.value[e]);
    }
  }
  return dense;
}

// As the one of a dense matrix. `matrix` may be rescaled.
inline LeadingPair leading_pair(SparseMatrix& matrix, const IterationOptions& options, const double* hint = nullptr) {
  double largest = 0;
  double lowest = 0;
  double poison = 0;
  for (double x : matrix.value) {
    largest = std::max(largest, std::fabs(x));
    lowest = std::min(lowest, x);
    poison += x - x;
  }
  if (poison != 0 || largest == 0) {
    return constant_pair(matrix.rows(), matrix.columns, poison != 0 ? std::numeric_limits<double>::quiet_NaN() : 0);
  }
  const int exponent = std::ilogb(largest);
  for (double& x : matrix.value) {
    x = std::ldexp(x, -exponent);
  }
  const auto apply = [&](const Vector& x, Vector& y) { matrix.normal_product(x, y); };
  LeadingDirection direction(first_direction(matrix.columns, lowest >= 0, hint), apply, options);
  LeadingPair pair{0, Vector(matrix.rows()), direction.take(), direction.steps()};
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    pair.u[i] = matrix.row_product(i, pair.v);
  }
  pair.sigma = std::ldexp(normalise(pair.u), exponent);
  fix_sign(pair);
  return pair;
}

}  // namespace fairkernels
