// The symmetry gap of the classes that occur in one problem, and the matrix it is worked out in: what symmetry_loss and
// fair_cross_entropy share. Rates are summed into the matrix and there replaced by coefficients, derivatives by the rates.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/symmetry_loss.h"
#include "support/confusion_arguments.h"
#include "support/parallel.h"
#include "support/symmetry_options.h"

namespace fairkernels {

// A row for each class that occurs, in increasing order, and a column for each of those classes (absent classes ignored) or
// for every class (charged); as many rows as there may be classes that occur.
inline Shape coefficients_shape(const ConfusionArguments& arguments, Absent absent) {
  const int64_t rows = std::min(arguments.samples, arguments.classes);
  const int64_t columns = absent == Absent::ignore ? rows : arguments.classes;
  return reshaped(arguments.shape, 2, {rows, columns});
}

template <typename Real>
Matrix<Real> problem_matrix(Real* data, const Shape& shape, int64_t problem) {
  const int64_t rows = shape[shape.size() - 2];
  const int64_t columns = shape.back();
  return {data + problem * rows * columns, columns, 1};
}

// Pairs of present classes: replaces their rates by `scale` times the derivatives and returns the sum of the penalties.
template <typename Real>
double charge_present(const Matrix<Real>& matrix, int64_t present, Real eps, Real scale) {
  const std::vector<Real> active(present, 1);
  const Matrix<const Real> rates{matrix.data, matrix.row_stride, 1};
  return parallel_sum(tile_turns(present), present * kTile, [&](int64_t turn) {
    return turn_slopes(rates, present, active.data(), eps, scale, turn, matrix);
  });
}

// Pairs of a present and an absent class as well. Those of two present classes are worked on in a matrix of their own.
template <typename Real>
double charge_all(const Matrix<Real>& matrix, const std::vector<int64_t>& present, int64_t classes, Real eps, Real scale) {
  const int64_t n = present.size();
  std::vector<Real> absent(classes, 1);
  std::vector<Real> square(n * n);
  for (int64_t label : present) {
    absent[label] = 0;
  }
  const double with_absent = parallel_sum(n, classes, [&](int64_t i) {
    Real* row = matrix.data + i * matrix.row_stride;
    gather(row, classes, present, square.data() + i * n);
    return absent_pairs(row, absent.data(), classes, eps, scale);
  });
  const double among_present = charge_present(Matrix<Real>{square.data(), n, 1}, n, eps, scale);
  parallel_each(n, n, [&](int64_t i) { scatter(square.data() + i * n, present, classes, matrix.data + i * matrix.row_stride); });
  return with_absent + among_present;
}

// 0, or NaN if a rate is: a NaN logit is never lost, also where its class has no partner.
template <typename Real>
double zero_or_nan(const Matrix<Real>& rates, const std::vector<int64_t>& present, bool compact) {
  double sum = 0;
  for (size_t i = 0; i < present.size(); ++i) {
    sum += rates.data[i * rates.row_stride + (compact ? i : present[i])];
  }
  return 0 * sum;
}

// What no present class uses of the matrix, memory being fresh.
template <typename Real>
void clear_unused(const Matrix<Real>& matrix, const Shape& shape, int64_t used_rows, int64_t used_columns) {
  const int64_t rows = shape[shape.size() - 2];
  const int64_t columns = shape.back();
  for (int64_t i = 0; i < rows; ++i) {
    Real* row = matrix.data + i * columns;
    std::fill(row + (i < used_rows ? used_columns : 0), row + columns, Real(0));
  }
}

// The gap of the rates in `matrix`, which become `weight` times its derivatives by them.
template <typename Real>
double symmetry_gap_of(const Matrix<Real>& matrix, const std::vector<int64_t>& present, int64_t classes, double eps,
                       const SymmetryOptions& options, double weight) {
  const int64_t n = present.size();
  const bool compact = options.absent == Absent::ignore;
  const double poison = zero_or_nan(matrix, present, compact);
  const double scale = options.scale(compact ? n : classes);
  const Real narrow_eps = least_eps<Real>(eps);
  const Real narrow_scale = static_cast<Real>(weight * scale);
  const double total = compact ? charge_present(matrix, n, narrow_eps, narrow_scale)
                               : charge_all(matrix, present, classes, narrow_eps, narrow_scale);
  return total * scale + poison;
}

// The coefficients of one class towards all classes. Rows are dense: gathering probabilities in the inner loops costs more.
// If `compact`, `row` must hold zeros for absent classes.
template <typename Real>
void load_coefficients(const Matrix<const Real>& coefficients, const std::vector<int64_t>& present, int64_t classes, bool compact,
                       int64_t label, Real* row) {
  const size_t i = place_in(present, label);
  if (i == present.size() || present[i] != label) {
    std::fill(row, row + classes, Real(0));
    return;
  }
  const Real* stored = coefficients.data + i * coefficients.row_stride;
  if (compact) {
    scatter(stored, present, classes, row);
  } else {
    std::copy_n(stored, classes, row);
  }
}

}  // namespace fairkernels
