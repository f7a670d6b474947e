// The soft confusion matrix C_ij = (1 / n_i) sum over b of class i of w_b softmax(z_b / temperature)_j, row by row, and its
// backward (Sy-FAR, arXiv 2509.12939).
// Bound by the exp of the B * K logits, which either direction computes once; beyond it each direction reads the logits
// once. Forward writes K * K rates, backward reads the K rows of the incoming gradient that occur and writes B * K.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/softmax.h"
#include "support/elements.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// The largest number of rows whose sum is kept in their own type: 150 single-precision additions in a row would cost four
// units in the last place. Sums of so many are then added in double.
constexpr int64_t kRowsTogether = 16;

template <typename Real>
FK_INLINE void put_lanes(const Real* lane, bool adds, Real* sum) {
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    sum[j] = adds ? sum[j] + lane[j] : lane[j];
  }
}

// Four times the lanes of a weighted sum of rows: so many additions take place while one waits for the other.
template <typename Real>
FK_INLINE void sum_wide(const Real* const* rows, const Real* factors, int64_t n_rows, int64_t k, bool adds, Real* sum) {
  Real lane[4][kLanes] = {};
  for (int64_t r = 0; r < n_rows; ++r) {
    const Real factor = factors[r];
    const Real* row = rows[r] + k;
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        lane[n][j] += factor * row[n * kLanes + j];
      }
    }
  }
  for (int n = 0; n < 4; ++n) {
    put_lanes(lane[n], adds, sum + k + n * kLanes);
  }
}

// Up to n columns. Without the copy gcc 12 jams the loops into one without a vector.
template <typename Real>
FK_INLINE void sum_narrow(const Real* const* rows, const Real* factors, int64_t n_rows, int64_t k, int64_t n, bool adds,
                          Real* sum) {
  Real lane[kLanes] = {};
  for (int64_t r = 0; r < n_rows; ++r) {
    Real columns[kLanes];
    load_tail(rows[r] + k, n, Real(0), columns);
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += factors[r] * columns[j];
    }
  }
  put_lanes(lane, adds, sum + k);
}

// sum_k = sum over rows of factors[r] rows[r][k], up to whole lanes, added to what is there if `adds`.
template <typename Real>
FK_INLINE void sum_rows_body(const Real* const* rows, const Real* factors, int64_t n_rows, int64_t classes, bool adds,
                             Real* sum) {
  int64_t k = 0;
  for (; k + 4 * kLanes <= classes; k += 4 * kLanes) {
    sum_wide(rows, factors, n_rows, k, adds, sum);
  }
  for (; k < classes; k += kLanes) {
    sum_narrow(rows, factors, n_rows, k, classes - k, adds, sum);
  }
}

FK_CLONES static void sum_rows(const float* const* rows, const float* factors, int64_t n_rows, int64_t classes, bool adds,
                               float* sum) {
  sum_rows_body(rows, factors, n_rows, classes, adds, sum);
}

FK_CLONES static void sum_rows(const double* const* rows, const double* factors, int64_t n_rows, int64_t classes, bool adds,
                               double* sum) {
  sum_rows_body(rows, factors, n_rows, classes, adds, sum);
}

template <typename Real>
FK_INLINE void add_to_total_body(const Real* sum, int64_t width, double* total) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    total[k] += sum[k];
  }
}

FK_CLONES static void add_to_total(const float* sum, int64_t width, double* total) {
  add_to_total_body(sum, width, total);
}

FK_CLONES static void add_to_total(const double* sum, int64_t width, double* total) {
  add_to_total_body(sum, width, total);
}

// One thread's weighted sum of rows, padded to whole lanes: some rows at a time in their own type, these sums in double.
template <typename Real>
class RowSum {
 public:
  explicit RowSum(int64_t classes) : classes_(classes), sum_(padded(classes)) {}

  void clear() {
    together_ = 0;
    std::fill(total_.begin(), total_.end(), 0.0);
    is_total_ = false;
  }

  void add(const Real* const* rows, const Real* factors, int64_t n_rows) {
    for (int64_t first = 0, n = 0; first < n_rows; first += n) {
      n = std::min(kRowsTogether - together_, n_rows - first);
      sum_rows(rows + first, factors + first, n, classes_, together_ != 0, sum_.data());
      together_ += n;
      if (together_ == kRowsTogether) {
        flush();
      }
    }
  }

  // Until the next row is added.
  const Real* take() {
    if (!is_total_ && together_ != 0) {
      return sum_.data();
    }
    if (together_ != 0 || total_.empty()) {
      flush();
    }
    store_run(total_.data(), sum_.size(), sum_.data());
    return sum_.data();
  }

 private:
  void flush() {
    total_.resize(sum_.size());
    if (together_ != 0) {
      add_to_total(sum_.data(), sum_.size(), total_.data());
    }
    together_ = 0;
    is_total_ = true;
  }

  int64_t classes_;
  std::vector<Real> sum_;
  std::vector<double> total_;
  int64_t together_ = 0;
  bool is_total_ = false;
};

// 1/n, and 0 for no samples; NaN stays NaN.
inline double inverse_count(double n) {
  return n != 0 ? 1 / n : 0;
}

// One thread's rows of a confusion matrix, one class at a time: factor * sum of its samples' weighted probabilities, padded
// to whole lanes.
template <typename T>
class ConfusionRow {
 public:
  using Real = Accumulator<T>;

  ConfusionRow(const Logits<T>& logits, int64_t most_rows)
      : rows_(logits, most_rows), exps_(most_rows), factors_(most_rows), sum_(logits.classes) {}

  const Real* operator()(const ClassOrder<Real>& order, const ClassGroup& group, double factor) {
    sum_.clear();
    order.for_each_chunk(group, [&](Chunk chunk) {
      rows_.compute(order, chunk);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const ExpRow<Real> row = rows_.row(r);
        exps_[r] = row.exps;
        factors_[r] = static_cast<Real>(factor * order.weight(chunk.first + r) / row.sum);
      }
      sum_.add(exps_.data(), factors_.data(), chunk.rows);
    });
    return sum_.take();
  }

 private:
  ExpChunk<T> rows_;
  std::vector<const Real*> exps_;
  std::vector<Real> factors_;
  RowSum<Real> sum_;
};

// Rows [begin, end) of one confusion matrix; factors[i] is what row i is multiplied by.
template <typename T>
void confusion_rows(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const double* factors, int64_t begin,
                    int64_t end, T* confusion) {
  const int64_t classes = logits.classes;
  ConfusionRow<T> confusion_row(logits, order.most_rows);
  for (int64_t label = begin; label < end; ++label) {
    T* row = confusion + label * classes;
    const ClassGroup group = order.group(label);
    const bool weightless = factors[label] == 0;  // whatever its samples hold
    if (weightless || group.rows == 0) {
      std::fill(row, row + classes, T{});
    } else {
      store_run(confusion_row(order, group, factors[label]), classes, row);
    }
  }
}

// A row's largest logit and the incoming gradient there; of several such gradients the largest.
template <typename Real>
struct Top {
  Real logit;
  Real gradient;
};

template <typename Real>
FK_INLINE Top<Real> find_top(const Real* logits, const Real* gradient, int64_t classes) {
  const int64_t whole = classes / kLanes * kLanes;
  Real highest[kLanes];
  Real there[kLanes] = {};
  load_tail(logits + whole, classes - whole, highest);
  if (whole != classes) {
    std::copy_n(gradient + whole, kLanes, there);
  }
  for (int64_t k = 0; k < whole; k += kLanes) {
    Real seen[kLanes];  // chosen into fresh memory: chosen in place, gcc 12 makes it a store behind a branch
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      seen[j] = logits[k + j] > highest[j] ? gradient[k + j] : there[j];
    }
    std::copy_n(seen, kLanes, there);
    see_lanes(logits + k, highest);
  }
  Real folded[kLanes];
  std::copy_n(highest, kLanes, folded);
  const Real top = max_lanes(folded);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    there[j] = highest[j] == top ? there[j] : -std::numeric_limits<Real>::infinity();
  }
  return {top, max_lanes(there)};
}

// The exponentials of a row, their sum and their product with the incoming gradient, shifted.
template <typename Real>
struct Moments {
  Real sum;
  Real product;
};

template <typename Real>
FK_INLINE Moments<Real> exp_moments(const RowTask<Real>& task, const Real* gradient, int64_t classes, Real temperature,
                                    Top<Real> top, Real* exps) {
  const int64_t whole = classes / kLanes * kLanes;
  const int64_t width = padded(classes);
  Real tail[kLanes];
  load_tail(task.logits + whole, classes - whole, tail);
  double sum = 0;
  double product = 0;
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t end = width - first < kBlock ? width : first + kBlock;
    Real sums[kLanes] = {};
    Real products[kLanes] = {};
    for (int64_t k = first; k < end; k += kLanes) {
      FK_PREFETCH(task.logits_ahead + k);
      FK_PREFETCH_TO_WRITE(task.out_ahead + k);
      const Real* from = k < whole ? task.logits + k : tail;
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const Real shifted = from[j] - top.logit;
        const Real e = exp_nonpositive(temperature == 1 ? shifted : shifted / temperature);
        exps[k + j] = e;
        sums[j] += e;
        products[j] += e * (gradient[k + j] - top.gradient);
      }
    }
    sum += add_lanes(sums);
    product += add_lanes(products);
  }
  return {static_cast<Real>(sum), static_cast<Real>(product)};
}

// scale p_k (g_k - sum_j g_j p_j) + common p_k. The last exponentials, which do not fill the lanes, are in `tail`; `out` may
// be `exps`.
template <typename Real>
FK_INLINE void slopes(const Real* exps, const Real* tail, const Real* gradient, int64_t classes, Real shift,
                      Moments<Real> moments, Real scale, Real common, Real* out) {
  const int64_t whole = classes / kLanes * kLanes;
  const Real inverse = 1 / moments.sum;
  const Real mean = moments.product * inverse;
  const Real factor = scale * inverse;
  const Real offset = common * inverse;
  const auto slope = [=](Real e, Real g) { return e * (factor * ((g - shift) - mean) + offset); };
#pragma omp simd
  for (int64_t k = 0; k < whole; ++k) {
    out[k] = slope(exps[k], gradient[k]);
  }
  if (whole != classes) {
    Real last[kLanes];
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      last[j] = slope(tail[j], gradient[whole + j]);
    }
    store_tail(last, classes - whole, out + whole);
  }
}

// One row of the softmax's backward, scale p_k (g_k - sum_j g_j p_j) + common p_k with p = exps / sum; the exponentials stay
// in `exps`. The gradient is shifted by its value at the row's top class: for a confident row the difference in brackets is
// otherwise lost to rounding where p_k is close to 1 (100 % wrong at a margin of 20).
template <typename Real>
FK_INLINE ExpRow<Real> softmax_backward_body(const RowTask<Real>& task, int64_t classes, Real temperature, const Real* gradient,
                                             Real scale, Real common, Real* exps) {
  const Top<Real> top = find_top(task.logits, gradient, classes);
  const Moments<Real> moments = exp_moments(task, gradient, classes, temperature, top, exps);
  slopes(exps, exps + classes / kLanes * kLanes, gradient, classes, top.gradient, moments, scale, common, task.out);
  return {task.logits, exps, top.logit, moments.sum};
}

FK_CLONES static ExpRow<float> softmax_backward(const RowTask<float>& task, int64_t classes, float temperature,
                                                const float* gradient, float scale, float common, float* exps) {
  if (temperature == 1) {
    return softmax_backward_body(task, classes, 1.0f, gradient, scale, common, exps);
  }
  return softmax_backward_body(task, classes, temperature, gradient, scale, common, exps);
}

FK_CLONES static ExpRow<double> softmax_backward(const RowTask<double>& task, int64_t classes, double temperature,
                                                 const double* gradient, double scale, double common, double* exps) {
  return softmax_backward_body(task, classes, temperature, gradient, scale, common, exps);
}

// The gradient by the logits of chunks [begin, end) of one problem, row by row. enter(label) is called before the first chunk
// of a class; row(task, position) works on the sample at this position in the order. `grad_logits` is a contiguous B x K.
template <typename T, typename Enter, typename Row>
void backward_chunks(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const Chunk* begin, const Chunk* end,
                     const Enter& enter, const Row& row, T* grad_logits) {
  using Real = Accumulator<T>;
  constexpr bool direct = std::is_same_v<T, Real>;
  RowReader<T> reader(logits, 1);
  std::vector<Real> wide(direct ? 0 : logits.classes);
  const auto out_of = [&](int64_t sample) {
    if constexpr (direct) {
      return grad_logits + sample * logits.classes;
    } else {
      return wide.data();
    }
  };
  for (const Chunk* chunk = begin; chunk != end; ++chunk) {
    if (chunk == begin || chunk->label != chunk[-1].label) {
      enter(chunk->label);
    }
    for (int64_t position = chunk->first; position < chunk->first + chunk->rows; ++position) {
      const int64_t sample = order.sample[position];
      const int64_t ahead = order.ahead(position);
      row(RowTask<Real>{reader(sample, 0), out_of(sample), reader.address(ahead), out_of(ahead)}, position);
      if constexpr (!direct) {
        store_run(wide.data(), logits.classes, grad_logits + sample * logits.classes);
      }
    }
  }
}

// The backward of a confusion matrix: load_gradient(label, row) puts the incoming gradient of one class into `row`;
// class_scale(label) w_b is what each of its samples multiplies it by.
template <typename T, typename ClassScale, typename LoadGradient>
void backward_confusion(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const Chunk* begin, const Chunk* end,
                        const ClassScale& class_scale_of, const LoadGradient& load_gradient, T* grad_logits) {
  using Real = Accumulator<T>;
  std::vector<Real> gradient(padded(logits.classes));
  std::vector<Real> exps(gradient.size());
  double class_scale = 0;
  const auto enter = [&](int64_t label) {
    load_gradient(label, gradient.data());
    class_scale = class_scale_of(label);
  };
  const auto row = [&](const RowTask<Real>& task, int64_t position) {
    const Real scale = static_cast<Real>(order.weight(position) * class_scale);
    softmax_backward(task, logits.classes, logits.temperature, gradient.data(), scale, Real(0), exps.data());
  };
  backward_chunks(logits, order, begin, end, enter, row, grad_logits);
}

// Exact zeros for the samples without a class, whatever their logits hold.
template <typename T, typename Real>
void clear_ignored(const ClassOrder<Real>& order, T* grad_logits) {
  for (size_t at = order.counted; at < order.sample.size(); ++at) {
    T* row = grad_logits + order.sample[at] * order.classes;
    std::fill(row, row + order.classes, T{});
  }
}

}  // namespace fairkernels
