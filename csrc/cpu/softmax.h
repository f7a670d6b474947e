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

// The last elements of a row, which do not fill the lanes: only these are read.
template <typename Real>
FK_INLINE void load_tail(const Real* tail, int64_t n, Real filling, Real* lanes) {
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) {
    lanes[j] = j < n ? tail[j] : filling;
  }
}

// Of logits: what is not there has no probability.
template <typename Real>
FK_INLINE void load_tail(const Real* tail, int64_t n, Real* lanes) {
  load_tail(tail, n, -std::numeric_limits<Real>::infinity(), lanes);
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

// A row to be worked on, where its result goes, and the same of a row that comes later and is fetched on the way: in the order
// of the classes rows lie anywhere, which no hardware foresees, and from main memory they would take twice the time.
template <typename Real>
struct RowTask {
  const Real* logits;
  Real* out;
  const Real* logits_ahead;
  Real* out_ahead;
};

// out_k = exp((z_k - max) / temperature); if `pads`, zeros behind them up to whole lanes. The division comes after the
// subtraction, where it is exact for the largest. A NaN, whether or not it passes for the largest, enters the sum.
template <typename Real>
FK_INLINE void exp_row(const RowTask<Real>& task, int64_t classes, Real temperature, bool pads, Real& top, Real& sum) {
  const Real* logits = task.logits;
  Real* exps = task.out;
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
      FK_PREFETCH(task.logits_ahead + k);
      FK_PREFETCH_TO_WRITE(task.out_ahead + k);
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        sums[j] += exps[k + j] = exp_nonpositive(shifted(logits[k + j]));
      }
    }
    total += add_lanes(sums);
  }
  if (ragged) {
    total += lane_sum<Real>(kLanes, [&](int64_t j) { return tail[j] = exp_nonpositive(shifted(tail[j])); });
    store_tail(tail, pads ? kLanes : classes - whole, exps + whole);
  }
  top = shift;
  sum = static_cast<Real>(total);
}

// Rows of so few classes fill no vector; sixteen of them side by side do, a lane for each.
constexpr int64_t kNarrow = 8;

template <typename Real>
using Columns = Real[kNarrow][kLanes];

// The same of up to sixteen narrow rows.
template <typename Real>
FK_INLINE void exp_narrow(const RowTask<Real>* tasks, int64_t n_rows, int64_t classes, Real temperature, bool pads, Real* tops,
                          Real* sums) {
  Columns<Real> exps;
  for (int64_t k = 0; k < classes; ++k) {
    for (int64_t j = 0; j < kLanes; ++j) {
      exps[k][j] = tasks[j < n_rows ? j : 0].logits[k];
    }
  }
  Real top[kLanes];
  Real sum[kLanes] = {};
  std::fill_n(top, kLanes, -std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < classes; ++k) {
    see_lanes(exps[k], top);
  }
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const Real shifted = exps[k][j] - top[j];
      sum[j] += exps[k][j] = exp_nonpositive(temperature == 1 ? shifted : shifted / temperature);
    }
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t k = 0; k < classes; ++k) {
      tasks[r].out[k] = exps[k][r];
    }
    for (int64_t k = classes; pads && k < kLanes; ++k) {
      tasks[r].out[k] = 0;
    }
  }
  std::copy_n(top, n_rows, tops);
  std::copy_n(sum, n_rows, sums);
}

template <typename Real>
FK_INLINE void exp_rows_body(const RowTask<Real>* tasks, int64_t n_rows, int64_t classes, Real temperature, bool pads,
                             Real* tops, Real* sums) {
  if (classes <= kNarrow) {
    for (int64_t r = 0; r < n_rows; r += kLanes) {
      exp_narrow(tasks + r, n_rows - r < kLanes ? n_rows - r : kLanes, classes, temperature, pads, tops + r, sums + r);
    }
    return;
  }
  if (temperature == 1) {
    for (int64_t r = 0; r < n_rows; ++r) {
      exp_row(tasks[r], classes, Real(1), pads, tops[r], sums[r]);
    }
    return;
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    exp_row(tasks[r], classes, temperature, pads, tops[r], sums[r]);
  }
}

FK_CLONES static void exp_rows(const RowTask<float>* tasks, int64_t n_rows, int64_t classes, float temperature, bool pads,
                               float* tops, float* sums) {
  exp_rows_body(tasks, n_rows, classes, temperature, pads, tops, sums);
}

FK_CLONES static void exp_rows(const RowTask<double>* tasks, int64_t n_rows, int64_t classes, double temperature, bool pads,
                               double* tops, double* sums) {
  exp_rows_body(tasks, n_rows, classes, temperature, pads, tops, sums);
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

// A row of logits and its exponentials: exps = exp((logits - top) / temperature), p = exps / sum.
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

// One thread's exponentials of a chunk of samples: rows padded to whole lanes, zeros in the padding; or, if there is a place
// for all of them, B x K, each row at its own.
template <typename T>
class ExpChunk {
 public:
  using Real = Accumulator<T>;

  ExpChunk(const Logits<T>& logits, int64_t most_rows, Real* all_exps = nullptr)
      : classes_(logits.classes),
        temperature_(logits.temperature),
        reader_(logits, most_rows),
        all_exps_(all_exps),
        exps_(all_exps != nullptr ? nullptr : new Real[most_rows * padded(logits.classes)]),
        tasks_(most_rows),
        tops_(most_rows),
        sums_(most_rows) {}

  void compute(const ClassOrder<Real>& order, const Chunk& chunk) {
    const bool pads = all_exps_ == nullptr;
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t sample = order.sample[chunk.first + r];
      const int64_t ahead = order.ahead(chunk.first + r);
      Real* slot = exps_.get() + r * padded(classes_);
      tasks_[r] = {reader_(sample, r), pads ? slot : all_exps_ + sample * classes_, reader_.address(ahead),
                   pads ? slot : all_exps_ + ahead * classes_};
    }
    exp_rows(tasks_.data(), chunk.rows, classes_, temperature_, pads, tops_.data(), sums_.data());
  }

  ExpRow<Real> row(int64_t r) const { return {tasks_[r].logits, tasks_[r].out, tops_[r], sums_[r]}; }

 private:
  int64_t classes_;
  Real temperature_;
  RowReader<T> reader_;
  Real* all_exps_;
  std::unique_ptr<Real[]> exps_;
  std::vector<RowTask<Real>> tasks_;
  std::vector<Real> tops_;
  std::vector<Real> sums_;
};

}  // namespace fairkernels
