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

// The first direction. A hint (perhaps null) gets a tenth of it added: on disjoint blocks it may be orthogonal.
inline Vector first_direction(int64_t n, bool nonnegative, const double* hint) {
  Vector x(n);
  for (int64_t j = 0; j < n; ++j) {
    x[j] = first_entry(j, nonnegative);
  }
  const double weight = hint == nullptr ? 0 : hint_weight(std::sqrt(dot(hint, hint, n)));
  if (weight > 0) {
    combine(weight, hint, kBesideHint / norm(x), x.data(), n, x.data());
  }
  return x;
}

// Of the two signs, the one with sum(v) >= 0.
inline void fix_sign(LeadingPair& pair) {
  if (sum(pair.v.data(), pair.v.size()) < 0) {
    scale(pair.u, -1);
    scale(pair.v, -1);
  }
}

// Measured: a multiply-add of the Gram matrix, from registers, costs a quarter of one of a product; its own products are in
// double, twice as dear. So a square matrix never gains, 60 x 1000 does from eight steps on, which is what most take.
inline bool gram_pays(int64_t small, int64_t large) {
  const double m = static_cast<double>(small);
  const double n = static_cast<double>(large);
  const double steps = 8;
  return m * m * n / 4 + steps * 2 * m * m < steps * 2 * m * n;
}

// Brings entries to where neither their squares nor the sums of these leave the range of Real; returns the exponent of the
// power of two that was taken out.
template <typename Real, typename Parallel>
int rescale(PackedMatrix<Real>& matrix, double largest, const Parallel& parallel) {
  const int exponent = exponent_to_take_out(largest);
  if (exponent == 0) {
    return 0;
  }
  const double half = std::ldexp(1.0, -exponent / 2);
  const double rest = std::ldexp(1.0, -exponent - -exponent / 2);
  parallel(matrix.rows, matrix.width, [&](int64_t begin, int64_t end) {
    for (Real* x = matrix.row(begin); x < matrix.row(end); ++x) {
      *x = static_cast<Real>(*x * half * rest);
    }
  });
  return exponent;
}

// sigma = |Mv| and u = Mv / sigma, in place of Mv.
inline double normalise(Vector& image) {
  const double length = norm(image);
  scale(image, length > 0 ? 1 / length : 0);
  return length;
}

template <typename Real, typename Parallel>
LeadingPair pair_by_products(const PackedMatrix<Real>& matrix, Vector v, const IterationOptions& options,
                             const Parallel& parallel) {
  NormalProduct<Real, Parallel> normal_product(matrix, parallel);
  const auto apply = [&](const Vector& x, Vector& y) { normal_product(x, y); };
  LeadingDirection direction(std::move(v), apply, options);
  LeadingPair pair{0, {}, direction.take(), direction.steps()};
  pair.u = product(matrix, pair.v, parallel);
  pair.sigma = normalise(pair.u);
  return pair;
}

// From a first u, since the Gram matrix is one of the rows.
template <typename Real, typename Parallel>
LeadingPair pair_by_gram(const PackedMatrix<Real>& matrix, Vector u, const IterationOptions& options, const Parallel& parallel) {
  const PackedMatrix<double> square = gram(matrix, parallel);
  Vector padding(square.width);
  const auto apply = [&](const Vector& x, Vector& y) {
    std::copy(x.begin(), x.end(), padding.begin());
    multiply(square.row(0), square.rows, square.width, padding.data(), y.data());
  };
  LeadingDirection direction(std::move(u), apply, options);
  LeadingPair pair{0, direction.take(), {}, direction.steps()};
  pair.v = transposed_product(matrix, pair.u, parallel);
  pair.sigma = normalise(pair.v);
  return pair;
}

// Where the first direction happens to be one that the matrix maps to 0: the row with the largest entry is none.
template <typename Real>
int64_t largest_row(const PackedMatrix<Real>& matrix) {
  Vector largest(matrix.rows);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    largest[i] = extent(matrix.row(i), matrix.width).largest;
  }
  return std::max_element(largest.begin(), largest.end()) - largest.begin();
}

// Of a matrix that is finite and not 0. If it is `transposed`, so are u and v, and the hint is a direction u.
template <typename Real, typename Parallel>
LeadingPair iterate(const PackedMatrix<Real>& matrix, bool transposed, bool nonnegative, const IterationOptions& options,
                    const double* hint, const Parallel& parallel) {
  const auto from_v = [&](const Vector& v) { return pair_by_products(matrix, v, options, parallel); };
  const auto from_u = [&](const Vector& u) { return pair_by_gram(matrix, u, options, parallel); };
  const bool by_gram = transposed || (matrix.rows <= matrix.columns && gram_pays(matrix.rows, matrix.columns));
  const bool starts_at_u = by_gram && (transposed || hint == nullptr);
  Vector start = first_direction(starts_at_u ? matrix.rows : matrix.columns, nonnegative, hint);
  if (by_gram && !starts_at_u) {
    start = product(matrix, start, parallel);
  }
  LeadingPair pair = norm(start) > 0 ? (by_gram ? from_u(start) : from_v(start)) : constant_pair(0, 0, 0);
  if (pair.sigma > 0) {
    return pair;
  }
  Vector u(matrix.rows);
  u[largest_row(matrix)] = 1;
  return by_gram ? from_u(u) : from_v(transposed_product(matrix, u, parallel));
}

template <typename Real, typename Parallel>
LeadingPair leading_pair(PackedMatrix<Real>& matrix, bool transposed, const IterationOptions& options, const double* hint,
                         const Parallel& parallel) {
  const int64_t rows = transposed ? matrix.columns : matrix.rows;
  const int64_t columns = transposed ? matrix.rows : matrix.columns;
  const Extent entries = extent(matrix, parallel);
  if (entries.poison != 0) {
    return constant_pair(rows, columns, std::numeric_limits<double>::quiet_NaN());
  }
  if (entries.largest == 0) {
    return constant_pair(rows, columns, 0);
  }
  const int exponent = rescale(matrix, entries.largest, parallel);
  LeadingPair pair = iterate(matrix, transposed, entries.lowest >= 0, options, hint, parallel);
  pair.sigma = std::ldexp(pair.sigma, exponent);
  if (transposed) {
    std::swap(pair.u, pair.v);
  }
  fix_sign(pair);
  return pair;
}

// `matrix` may be rescaled. `hint`, perhaps null, holds a direction v to start from. Zeros for a zero matrix, NaN if an entry
// is not finite. parallel(n, elements_each, function(begin, end)) runs a loop; no result depends on how.
template <typename Real, typename Parallel = Serial>
LeadingPair leading_pair(PackedMatrix<Real>& matrix, const IterationOptions& options, const double* hint = nullptr,
                         const Parallel& parallel = {}) {
  return leading_pair(matrix, false, options, hint, parallel);
}

// The same of a matrix with any strides and type. Packed so that the rows are the smaller side where that is the Gram matrix's.
template <typename T, typename Parallel = Serial>
LeadingPair leading_pair(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                         const IterationOptions& options, const double* hint = nullptr, const Parallel& parallel = {}) {
  const bool transposed = rows > columns && gram_pays(columns, rows);
  PackedMatrix<Accumulator<T>> matrix(transposed ? columns : rows, transposed ? rows : columns);
  pack(data, transposed ? column_stride : row_stride, transposed ? row_stride : column_stride, parallel, matrix);
  return leading_pair(matrix, transposed, options, hint, parallel);
}

}  // namespace fairkernels
