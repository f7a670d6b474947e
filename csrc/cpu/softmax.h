// Softmax of rows picked from a matrix, unnormalised: exp((z - max z) / temperature) and its sum, which every confusion
// kernel divides by where that costs least.
// Bound by the exp, about 20 vector instructions for a vector of logits; these are read once and stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/class_order.h"
#include "support/elements.h"
#include "support/exp.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// NaN never becomes the maximum; it stays in its row and from there enters the sum.
template <typename Real>
FK_INLINE Real maximum(const Real* row, int64_t width) {
  Real top = -std::numeric_limits<Real>::infinity();
  const int64_t n = width / kLanes * kLanes;
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < n; ++k) {
    top = row[k] > top ? row[k] : top;
  }
  return top;
}

// Replaces a row of logits by exp((z - max) / temperature) and returns the sum. The division comes after the
// subtraction, where it is exact for the largest.
template <typename Real>
FK_INLINE Real exp_row(Real* row, int64_t width, Real temperature) {
  Real top = maximum(row, width);
  if (temperature != 1) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      row[k] = (row[k] - top) / temperature;
    }
    top = 0;
  }
  const double sum = blocked_sum<Real>(width, [=](int64_t k) { return row[k] = exp_nonpositive(row[k] - top); });
  return static_cast<Real>(sum);
}

template <typename Real>
FK_INLINE void exp_rows_body(Real* rows, int64_t n_rows, int64_t width, Real temperature, Real* sums) {
  for (int64_t r = 0; r < n_rows; ++r) {
    sums[r] = exp_row(rows + r * width, width, temperature);
  }
}

FK_CLONES static void exp_rows(float* rows, int64_t n_rows, int64_t width, float temperature, float* sums) {
  exp_rows_body(rows, n_rows, width, temperature, sums);
}

FK_CLONES static void exp_rows(double* rows, int64_t n_rows, int64_t width, double temperature, double* sums) {
  exp_rows_body(rows, n_rows, width, temperature, sums);
}

// The logits of one problem.
template <typename T>
struct Logits {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t classes;
  Accumulator<T> temperature;
};

// One thread's exponentials of a chunk of samples: rows padded to whole lanes, zeros in the padding.
template <typename T>
class ExpChunk {
 public:
  using Real = Accumulator<T>;

  explicit ExpChunk(const Logits<T>& logits)
      : logits_(logits),
        width_(padded(logits.classes)),
        exps_(rows_per_chunk(logits.classes) * width_),
        sums_(rows_per_chunk(logits.classes)) {}

  void compute(const int64_t* samples, int64_t n_rows) {
    load_logits(samples, n_rows);
    exponentiate(n_rows);
  }

  // The two halves of it, for who needs the logits as well: they stand in the place of the exponentials.
  void load_logits(const int64_t* samples, int64_t n_rows) {
    for (int64_t r = 0; r < n_rows; ++r) {
      Real* row = exps() + r * width_;
      load(logits_.data + samples[r] * logits_.row_stride, logits_.column_stride, logits_.classes, row);
      std::fill(row + logits_.classes, row + width_, -std::numeric_limits<Real>::infinity());
    }
  }

  void exponentiate(int64_t n_rows) { exp_rows(exps(), n_rows, width_, logits_.temperature, sums_.data()); }

  int64_t width() const { return width_; }
  Real* exps() { return exps_.data(); }
  const Real* sums() const { return sums_.data(); }

 private:
  Logits<T> logits_;
  int64_t width_;
  std::vector<Real> exps_;
  std::vector<Real> sums_;
};

}  // namespace fairkernels
