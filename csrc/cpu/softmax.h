// Softmax of rows picked from a matrix, unnormalised: exp((z - max z) / temperature) and its sum, which every confusion
// kernel divides by where that costs least.
// Bound by the exp, about 20 vector instructions for a vector of logits; these are read once and stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/class_order.h"
#include "support/elements.h"
#include "support/exp.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// The last logits of a row, which do not fill the lanes: only these are copied.
template <typename Real>
FK_INLINE void load_tail(const Real* tail, int64_t n, Real* lanes) {
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) {
    lanes[j] = j < n ? tail[j] : -std::numeric_limits<Real>::infinity();
  }
}

template <typename Real>
FK_INLINE void store_tail(const Real* lanes, int64_t n, Real* tail) {
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) {
    if (j < n) {
      tail[j] = lanes[j];
    }
  }
}

// exps_k = exp((z_k - max) / temperature), padded to whole lanes with zeros; the row `ahead` is fetched on the way. In the order
// of the classes rows lie anywhere, which no hardware foresees: from main memory they would take twice the time. The division
// comes after the subtraction, where it is exact for the largest. A NaN, whether or not it passes for the largest,
// enters the sum.
template <typename Real>
FK_INLINE void exp_row(const Real* logits, const Real* ahead, int64_t classes, Real temperature, Real* exps, Real& top,
                       Real& sum) {
  const int64_t whole = classes / kLanes * kLanes;
  const bool ragged = whole != classes;
  Real highest[kLanes];
  Real tail[kLanes];
  load_tail(logits + whole, classes - whole, highest);
  std::copy_n(highest, kLanes, tail);
  for (int64_t k = 0; k < whole; k += kLanes) {
    see_lanes(logits + k, highest);
  }
  const Real shift = max_lanes(highest);
  const auto shifted = [=](Real logit) { return temperature == 1 ? logit - shift : (logit - shift) / temperature; };
  double total = 0;
  for (int64_t first = 0; first < whole; first += kBlock) {
    const int64_t end = whole - first < kBlock ? whole : first + kBlock;
    Real sums[kLanes] = {};
    for (int64_t k = first; k < end; k += kLanes) {
      FK_PREFETCH(ahead + k);
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        sums[j] += exps[k + j] = exp_nonpositive(shifted(logits[k + j]));
      }
    }
    total += add_lanes(sums);
  }
  if (ragged) {
    total += lane_sum<Real>(kLanes, [&](int64_t j) { return exps[whole + j] = exp_nonpositive(shifted(tail[j])); });
  }
  top = shift;
  sum = static_cast<Real>(total);
}

// While a row is worked on, the one in `ahead` is fetched.
template <typename Real>
FK_INLINE void exp_rows_body(const Real* const* logits, const Real* const* ahead, int64_t n_rows, int64_t classes, Real temperature,
                             Real* exps, Real* tops, Real* sums) {
  if (temperature == 1) {
    for (int64_t r = 0; r < n_rows; ++r) {
      exp_row(logits[r], ahead[r], classes, Real(1), exps + r * padded(classes), tops[r], sums[r]);
    }
    return;
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    exp_row(logits[r], ahead[r], classes, temperature, exps + r * padded(classes), tops[r], sums[r]);
  }
}

FK_CLONES static void exp_rows(const float* const* logits, const float* const* ahead, int64_t n_rows, int64_t classes, float temperature,
                               float* exps, float* tops, float* sums) {
  exp_rows_body(logits, ahead, n_rows, classes, temperature, exps, tops, sums);
}

FK_CLONES static void exp_rows(const double* const* logits, const double* const* ahead, int64_t n_rows, int64_t classes, double temperature,
                               double* exps, double* tops, double* sums) {
  exp_rows_body(logits, ahead, n_rows, classes, temperature, exps, tops, sums);
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

// A row of logits and its exponentials, padded with zeros: exps = exp((logits - top) / temperature), p = exps / sum.
template <typename Real>
struct ExpRow {
  const Real* logits;
  const Real* exps;
  Real top;
  Real sum;
};

// Rows of logits one after the other in memory and in the type of the sums: read where they lie if they do so already, else
// copied, each into its own slot.
template <typename T>
class RowReader {
 public:
  using Real = Accumulator<T>;

  RowReader(const Logits<T>& logits, int64_t slots) : logits_(logits), copies_(copied() ? slots * logits.classes : 0) {}

  const Real* operator()(int64_t sample, int64_t slot) {
    const T* row = logits_.data + sample * logits_.row_stride;
    if constexpr (std::is_same_v<T, Real>) {
      if (!copied()) {
        return row;
      }
    }
    Real* copy = copies_.data() + slot * logits_.classes;
    load(row, logits_.column_stride, logits_.classes, copy);
    return copy;
  }

  // Where a sample lies, to fetch it; of no use where it is to be copied.
  const Real* address(int64_t sample) const {
    if constexpr (std::is_same_v<T, Real>) {
      return logits_.data + sample * logits_.row_stride;
    }
    return copies_.data();
  }

 private:
  bool copied() const { return logits_.column_stride != 1 || !std::is_same_v<T, Real>; }

  Logits<T> logits_;
  std::vector<Real> copies_;
};

// One thread's exponentials of a chunk of samples: rows padded to whole lanes, zeros in the padding.
template <typename T>
class ExpChunk {
 public:
  using Real = Accumulator<T>;

  ExpChunk(const Logits<T>& logits, int64_t most_rows)
      : classes_(logits.classes),
        temperature_(logits.temperature),
        reader_(logits, most_rows),
        rows_(most_rows),
        ahead_(most_rows),
        exps_(new Real[most_rows * padded(logits.classes)]),
        tops_(most_rows),
        sums_(most_rows) {}

  void compute(const ClassOrder<Real>& order, const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      rows_[r] = reader_(order.sample[chunk.first + r], r);
      ahead_[r] = reader_.address(order.ahead(chunk.first + r));
    }
    exp_rows(rows_.data(), ahead_.data(), chunk.rows, classes_, temperature_, exps_.get(), tops_.data(), sums_.data());
  }

  int64_t classes() const { return classes_; }
  int64_t width() const { return padded(classes_); }
  ExpRow<Real> row(int64_t r) const { return {rows_[r], exps_.get() + r * width(), tops_[r], sums_[r]}; }

 private:
  int64_t classes_;
  Real temperature_;
  RowReader<T> reader_;
  std::vector<const Real*> rows_;
  std::vector<const Real*> ahead_;
  std::unique_ptr<Real[]> exps_;
  std::vector<Real> tops_;
  std::vector<Real> sums_;
};

}  // namespace fairkernels
