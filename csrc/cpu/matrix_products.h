// A dense matrix packed for products, and the products that the spectral iterations need.
// Bound by loads: sixteen rows are multiplied with x and, while they are in the cache, added up for the transpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/iteration.h"
#include "support/elements.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// Runs a loop on the thread it is in. Others are called in the same way, see support/parallel.h.
struct Serial {
  template <typename Function>
  void operator()(int64_t n, int64_t /*elements_each*/, const Function& function) const {
    if (n > 0) {
      function(0, n);
    }
  }
};

// Memory on a cache line, not initialised.
template <typename Real>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t n) : data_(static_cast<Real*>(::operator new(n * sizeof(Real), kLine))) {}

  Real* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};

  struct Free {
    void operator()(Real* data) const { ::operator delete(data, kLine); }
  };

  std::unique_ptr<Real, Free> data_;
};

// Rows padded with zeros to whole lanes. The entries themselves are whoever builds it to fill.
template <typename Real>
class PackedMatrix {
 public:
  PackedMatrix(int64_t n_rows, int64_t n_columns)
      : rows(n_rows), columns(n_columns), width(padded(n_columns)), data_(n_rows * width) {
    for (int64_t i = 0; i < rows; ++i) {
      std::fill(row(i) + columns, row(i) + width, Real(0));
    }
  }

  Real* row(int64_t i) { return data_.get() + i * width; }
  const Real* row(int64_t i) const { return data_.get() + i * width; }

  const int64_t rows;
  const int64_t columns;
  const int64_t width;

 private:
  AlignedArray<Real> data_;
};

template <typename T, typename Real, typename Parallel>
void pack(const T* matrix, int64_t row_stride, int64_t column_stride, const Parallel& parallel, PackedMatrix<Real>& packed) {
  parallel(packed.rows, packed.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      load(matrix + i * row_stride, column_stride, packed.columns, packed.row(i));
    }
  });
}

// What is to be known of the entries before the first product.
struct Extent {
  double largest;  // absolute value
  double lowest;   // 0 if none is negative
  double poison;   // NaN if one is not finite, else 0
};

template <typename Real>
FK_INLINE Extent extent_body(const Real* row, int64_t width) {
  Real largest = 0;
  Real lowest = 0;
  Real poison = 0;
  const int64_t n = width / kLanes * kLanes;
#pragma omp simd reduction(max : largest) reduction(min : lowest) reduction(+ : poison)
  for (int64_t k = 0; k < n; ++k) {
    const Real size = row[k] < 0 ? -row[k] : row[k];
    largest = size > largest ? size : largest;
    lowest = row[k] < lowest ? row[k] : lowest;
    poison += row[k] - row[k];
  }
  return {largest, lowest, poison};
}

FK_CLONES static Extent extent(const float* row, int64_t width) {
  return extent_body(row, width);
}

FK_CLONES static Extent extent(const double* row, int64_t width) {
  return extent_body(row, width);
}

// The rows as one: they lie one behind the other.
template <typename Real, typename Parallel>
Extent extent(const PackedMatrix<Real>& matrix, const Parallel& parallel) {
  std::vector<Extent> rows(matrix.rows);
  parallel(matrix.rows, matrix.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rows[i] = extent(matrix.row(i), matrix.width);
    }
  });
  Extent all{0, 0, 0};
  for (const Extent& row : rows) {
    all = {std::max(all.largest, row.largest), std::min(all.lowest, row.lowest), all.poison + row.poison};
  }
  return all;
}

// products[r] = <row r, x>, n_rows <= kGroup; blocks of columns are added in double.
constexpr int64_t kGroup = 16;

template <int64_t Rows, typename Real>
FK_INLINE void multiply_some(const Real* rows, int64_t width, const Real* x, double* products) {
  double total[Rows] = {};
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = first + kBlock < width ? first + kBlock : width;
    Real lane[Rows][kLanes] = {};
    for (int64_t k = first; k < end; k += kLanes) {
      for (int64_t r = 0; r < Rows; ++r) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) {
          lane[r][j] += rows[r * width + k + j] * x[k + j];
        }
      }
    }
    for (int64_t r = 0; r < Rows; ++r) {
      total[r] += add_lanes(lane[r]);
    }
  }
  for (int64_t r = 0; r < Rows; ++r) {
    products[r] = total[r];
  }
}

template <typename Real>
FK_INLINE void multiply_body(const Real* rows, int64_t n_rows, int64_t width, const Real* x, double* products) {
  int64_t r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    multiply_some<4>(rows + r * width, width, x, products + r);
  }
  for (; r < n_rows; ++r) {
    multiply_some<1>(rows + r * width, width, x, products + r);
  }
}

FK_CLONES static void multiply(const float* rows, int64_t n_rows, int64_t width, const float* x, double* products) {
  multiply_body(rows, n_rows, width, x, products);
}

FK_CLONES static void multiply(const double* rows, int64_t n_rows, int64_t width, const double* x, double* products) {
  multiply_body(rows, n_rows, width, x, products);
}

// total[k] += the sum over rows of factors[r] rows[r][k], n_rows <= kGroup, which is added up in Real. Two vectors of
// columns side by side, since the additions to one wait for each other.
template <int64_t Vectors, typename Real>
FK_INLINE void add_columns(const Real* rows, int64_t stride, const Real* factors, int64_t n_rows, double* total) {
  Real lane[Vectors][kLanes] = {};
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t i = 0; i < Vectors; ++i) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        lane[i][j] += factors[r] * rows[r * stride + i * kLanes + j];
      }
    }
  }
  for (int64_t i = 0; i < Vectors; ++i) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      total[i * kLanes + j] += lane[i][j];
    }
  }
}

template <typename Real>
FK_INLINE void add_group_body(const Real* rows, int64_t stride, const Real* factors, int64_t n_rows, int64_t width,
                              double* total) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    add_columns<2>(rows + k, stride, factors, n_rows, total + k);
  }
  if (k < width) {
    add_columns<1>(rows + k, stride, factors, n_rows, total + k);
  }
}

FK_CLONES static void add_group(const float* rows, int64_t stride, const float* factors, int64_t n_rows, int64_t width,
                                double* total) {
  add_group_body(rows, stride, factors, n_rows, width, total);
}

FK_CLONES static void add_group(const double* rows, int64_t stride, const double* factors, int64_t n_rows, int64_t width,
                                double* total) {
  add_group_body(rows, stride, factors, n_rows, width, total);
}

// y = M x.
template <typename Real, typename Parallel>
Vector product(const PackedMatrix<Real>& matrix, const Vector& x, const Parallel& parallel) {
  std::vector<Real> rounded(matrix.width);
  std::copy(x.begin(), x.end(), rounded.begin());
  Vector y(matrix.rows);
  parallel(matrix.rows, matrix.width, [&](int64_t begin, int64_t end) {
    multiply(matrix.row(begin), end - begin, matrix.width, rounded.data(), &y[begin]);
  });
  return y;
}

// y = M^T x, a stretch of columns at a time, with room for whole lanes.
template <typename Real, typename Parallel>
Vector transposed_product(const PackedMatrix<Real>& matrix, const Vector& x, const Parallel& parallel) {
  Vector y(matrix.width);
  const int64_t stretches = (matrix.width + kBlock - 1) / kBlock;
  parallel(stretches, matrix.rows * kBlock, [&](int64_t begin, int64_t end) {
    const int64_t k = begin * kBlock;
    const int64_t width = std::min(end * kBlock, matrix.width) - k;
    for (int64_t first = 0; first < matrix.rows; first += kGroup) {
      Real factors[kGroup];
      const int64_t n = std::min(kGroup, matrix.rows - first);
      std::copy_n(x.begin() + first, n, factors);
      add_group(matrix.row(first) + k, matrix.width, factors, n, width, &y[k]);
    }
  });
  y.resize(matrix.columns);
  return y;
}

// y = M^T M x: block of rows by block, and then over the blocks, which depend on the matrix alone.
template <typename Real, typename Parallel>
class NormalProduct {
 public:
  NormalProduct(const PackedMatrix<Real>& matrix, const Parallel& parallel)
      : matrix_(matrix),
        parallel_(parallel),
        blocks_((matrix.rows + kRowsOfBlock - 1) / kRowsOfBlock),
        rounded_(matrix.width),
        sums_(blocks_ * matrix.width) {}

  // From one read of the matrix.
  void operator()(const Vector& x, Vector& y) {
    std::copy(x.begin(), x.end(), rounded_.begin());
    const int64_t width = matrix_.width;
    parallel_(blocks_, kRowsOfBlock * width, [&](int64_t begin, int64_t end) {
      std::fill(&sums_[begin * width], &sums_[begin * width] + (end - begin) * width, 0.0);
      for (int64_t first = begin * kRowsOfBlock; first < std::min(end * kRowsOfBlock, matrix_.rows); first += kGroup) {
        double products[kGroup];
        Real factors[kGroup];
        const int64_t n = std::min(kGroup, matrix_.rows - first);
        multiply(matrix_.row(first), n, width, rounded_.data(), products);
        std::copy_n(products, n, factors);
        add_group(matrix_.row(first), width, factors, n, width, &sums_[first / kRowsOfBlock * width]);
      }
    });
    for (int64_t block = 1; block < blocks_; ++block) {
      combine(1, sums_.data(), 1, &sums_[block * width], matrix_.columns, sums_.data());
    }
    std::copy_n(sums_.begin(), matrix_.columns, y.begin());
  }

 private:
  static constexpr int64_t kRowsOfBlock = 4 * kGroup;

  const PackedMatrix<Real>& matrix_;
  const Parallel& parallel_;
  int64_t blocks_;
  std::vector<Real> rounded_;
  Vector sums_;
};

// The scalar products of four rows with two, all of them loaded once.
template <typename Real>
FK_INLINE void multiply_tile_body(const Real* const* a, const Real* const* b, int64_t width, double* products) {
  double total[8] = {};
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = first + kBlock < width ? first + kBlock : width;
    Real lane[8][kLanes] = {};
    for (int64_t k = first; k < end; k += kLanes) {
      for (int64_t i = 0; i < 8; ++i) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) {
          lane[i][j] += a[i / 2][k + j] * b[i % 2][k + j];
        }
      }
    }
    for (int64_t i = 0; i < 8; ++i) {
      total[i] += add_lanes(lane[i]);
    }
  }
  std::copy_n(total, 8, products);
}

FK_CLONES static void multiply_tile(const float* const* a, const float* const* b, int64_t width, double* products) {
  multiply_tile_body(a, b, width, products);
}

FK_CLONES static void multiply_tile(const double* const* a, const double* const* b, int64_t width, double* products) {
  multiply_tile_body(a, b, width, products);
}

// G = M M^T.
template <typename Real, typename Parallel>
PackedMatrix<double> gram(const PackedMatrix<Real>& matrix, const Parallel& parallel) {
  const int64_t n = matrix.rows;
  PackedMatrix<double> result(n, n);
  const auto row = [&](int64_t i) { return matrix.row(std::min(i, n - 1)); };
  parallel((n + 3) / 4, 4 * matrix.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = 4 * begin; i < std::min(4 * end, n); i += 4) {
      const Real* a[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
      for (int64_t j = 0; j < std::min(i + 4, n); j += 2) {
        const Real* b[2] = {row(j), row(j + 1)};
        double products[8];
        multiply_tile(a, b, matrix.width, products);
        for (int64_t e = 0; e < 8; ++e) {
          if (i + e / 2 < n && j + e % 2 <= i + e / 2) {
            result.row(i + e / 2)[j + e % 2] = result.row(j + e % 2)[i + e / 2] = products[e];
          }
        }
      }
    }
  });
  return result;
}

}  // namespace fairkernels
