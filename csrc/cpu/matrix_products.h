// A dense matrix packed for products, and the products that the spectral iterations need.
// Bound by loads: each row is multiplied with x and, while it is in the cache, added up for the transpose. Rows are taken by
// fours, so that x and the sums are loaded once for four of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

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

// What is to be known of the entries before the first product.
struct Extent {
  double largest = 0;  // absolute value
  double lowest = 0;   // 0 if none is negative
  double poison = 0;   // NaN if one is not finite

  void add(const Extent& other) {
    largest = std::max(largest, other.largest);
    lowest = std::min(lowest, other.lowest);
    poison += other.poison;
  }
};

}  // namespace fairkernels
