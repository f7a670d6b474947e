// The spectral norm of a surrogate's matrix, for the classes that occur in one problem: what spectral_loss and
// fair_cross_entropy share.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/sparse_norm.h"
#include "cpu/spectral_loss.h"
#include "cpu/spectral_norm.h"
#include "support/spectral_options.h"
#include "support/tensor.h"

namespace fairkernels {

inline Surrogate surrogate_named(const std::string& name) {
  const bool known = name == "kl" || name == "kl-all" || name == "soft" || name == "gated";
  require(known, "surrogate must be kl, kl-all, soft or gated, got ", name);
  return name == "kl" ? Surrogate::kl : name == "kl-all" ? Surrogate::kl_all : name == "soft" ? Surrogate::soft : Surrogate::gated;
}

// A row for each class that occurs, in increasing order; of "kl" only the entries that are not 0.
template <typename Real>
struct SurrogateMatrix {
  SurrogateMatrix(Surrogate surrogate, int64_t rows, int64_t classes)
      : sparse(surrogate == Surrogate::kl), dense(sparse ? 0 : rows, classes), entries(sparse ? rows : 0) {}

  bool sparse;
  PackedMatrix<Real> dense;
  std::vector<std::vector<Entry>> entries;
};

// The columns that occur in any row.
inline std::vector<int64_t> used_columns(const std::vector<std::vector<Entry>>& rows) {
  std::vector<int64_t> columns;
  for (const auto& row : rows) {
    for (const Entry& entry : row) {
      columns.push_back(entry.column);
    }
  }
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  return columns;
}

inline SparseMatrix compress(const std::vector<std::vector<Entry>>& rows, const std::vector<int64_t>& columns) {
  SparseMatrix matrix;
  matrix.columns = columns.size();
  for (const auto& row : rows) {
    for (const Entry& entry : row) {
      matrix.column.push_back(std::lower_bound(columns.begin(), columns.end(), entry.column) - columns.begin());
      matrix.value.push_back(entry.value);
    }
    matrix.start.push_back(matrix.entries());
  }
  return matrix;
}

// The leading pair of such a matrix; v has an entry for each of the columns listed.
struct SurrogatePair {
  LeadingPair pair;
  std::vector<int64_t> columns;  // empty: all
};

// `hint`, perhaps empty, is a vector v of all classes to start from.
template <typename Real>
SurrogatePair leading_pair(SurrogateMatrix<Real>& matrix, const IterationOptions& options, const Vector& hint) {
  if (!matrix.sparse) {
    return {leading_pair(matrix.dense, options, hint.empty() ? nullptr : hint.data(), Threads{}), {}};
  }
  const std::vector<int64_t> columns = used_columns(matrix.entries);
  SparseMatrix sparse = compress(matrix.entries, columns);
  Vector start(hint.empty() ? 0 : columns.size());
  std::transform(columns.begin(), columns.begin() + start.size(), start.begin(), [&](int64_t j) { return hint[j]; });
  const double* first = start.empty() ? nullptr : start.data();
  if (!is_dense(sparse)) {
    return {leading_pair(sparse, options, first), columns};
  }
  auto dense = to_dense<Real>(sparse);
  return {leading_pair(dense, options, first, Threads{}), columns};
}

// The vector of all classes, 0 at those that are not listed; NaN throughout if sigma is.
template <typename Real>
void scatter_vector(const Vector& compact, const std::vector<int64_t>& listed, double sigma, int64_t classes, Real* out) {
  std::fill_n(out, classes, static_cast<Real>(0 * (sigma - sigma)));
  for (size_t i = 0; i < listed.size(); ++i) {
    out[listed[i]] = static_cast<Real>(compact[i]);
  }
}

template <typename Real>
void scatter_pair(const SurrogatePair& found, const std::vector<int64_t>& present, bool sparse, int64_t classes, Real* u,
                  Real* v) {
  scatter_vector(found.pair.u, present, found.pair.sigma, classes, u);
  if (sparse) {
    scatter_vector(found.pair.v, found.columns, found.pair.sigma, classes, v);
  } else {
    store_run(found.pair.v.data(), classes, v);
  }
}

}  // namespace fairkernels
