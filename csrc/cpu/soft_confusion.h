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

// Calls take(k, lanes) with lanes_j = sum over rows of factors[r] exps[r, k + j].
template <typename Real, typename Take>
FK_INLINE void weighted_sum(const Real* exps, const Real* factors, int64_t n_rows, int64_t width, const Take& take) {
  for (int64_t k = 0; k < width; k += kLanes) {
    Real lane[kLanes] = {};
    for (int64_t r = 0; r < n_rows; ++r) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        lane[j] += factors[r] * exps[r * width + k + j];
      }
    }
    take(k, lane);
  }
}

template <typename Real>
FK_INLINE void sum_rows_body(const Real* exps, const Real* factors, int64_t n_rows, int64_t width, Real* sum) {
  weighted_sum(exps, factors, n_rows, width, [=](int64_t k, const Real* lane) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      sum[k + j] = lane[j];
    }
  });
}

template <typename Real>
FK_INLINE void add_rows_body(const Real* exps, const Real* factors, int64_t n_rows, int64_t width, double* total) {
  for (int64_t first = 0; first < n_rows; first += kRowsTogether) {
    const int64_t rows = n_rows - first < kRowsTogether ? n_rows - first : kRowsTogether;
    weighted_sum(exps + first * width, factors + first, rows, width, [=](int64_t k, const Real* lane) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        total[k + j] += lane[j];
      }
    });
  }
}

FK_CLONES static void sum_rows(const float* exps, const float* factors, int64_t n_rows, int64_t width, float* sum) {
  sum_rows_body(exps, factors, n_rows, width, sum);
}

FK_CLONES static void sum_rows(const double* exps, const double* factors, int64_t n_rows, int64_t width, double* sum) {
  sum_rows_body(exps, factors, n_rows, width, sum);
}

FK_CLONES static void add_rows(const float* exps, const float* factors, int64_t n_rows, int64_t width, double* total) {
  add_rows_body(exps, factors, n_rows, width, total);
}

FK_CLONES static void add_rows(const double* exps, const double* factors, int64_t n_rows, int64_t width, double* total) {
  add_rows_body(exps, factors, n_rows, width, total);
}

// 1/n, and 0 for no samples; NaN stays NaN.
inline double inverse_count(double n) {
  return n != 0 ? 1 / n : 0;
}

// One thread's rows of a confusion matrix, one class at a time: factor * sum of its samples' weighted probabilities, padded
// to whole lanes. visit(rows, chunk) sees every chunk's exponentials on the way.
template <typename T>
class ConfusionRow {
 public:
  using Real = Accumulator<T>;

  ConfusionRow(const Logits<T>& logits, int64_t most_rows)
      : rows_(logits, most_rows), factors_(most_rows), total_(rows_.width()), row_(rows_.width()) {}

  const Real* operator()(const ClassOrder<Real>& order, int64_t label, double factor) {
    return (*this)(order, label, factor, [](const ExpChunk<T>&, Chunk) {});
  }

  template <typename Visit>
  const Real* operator()(const ClassOrder<Real>& order, int64_t label, double factor, const Visit& visit) {
    const int64_t samples = order.start[label + 1] - order.start[label];
    const bool few = samples <= std::min(kRowsTogether, rows_per_chunk(order.classes));
    if (!few) {
      std::fill(total_.begin(), total_.end(), 0.0);
    }
    order.for_each_chunk(label, [&](Chunk chunk) {
      rows_.compute(order, chunk);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        factors_[r] = static_cast<Real>(factor * order.weight[chunk.first + r] / rows_.row(r).sum);
      }
      if (few) {
        sum_rows(rows_.row(0).exps, factors_.data(), chunk.rows, rows_.width(), row_.data());
      } else {
        add_rows(rows_.row(0).exps, factors_.data(), chunk.rows, rows_.width(), total_.data());
      }
      visit(rows_, chunk);
    });
    if (!few) {
      store_run(total_.data(), rows_.width(), row_.data());
    }
    return row_.data();
  }

 private:
  ExpChunk<T> rows_;
  std::vector<Real> factors_;
  std::vector<double> total_;
  std::vector<Real> row_;
};

// Rows [begin, end) of one confusion matrix; factors[i] is what row i is multiplied by.
template <typename T>
void confusion_rows(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const double* factors, int64_t begin,
                    int64_t end, T* confusion) {
  const int64_t classes = logits.classes;
  ConfusionRow<T> confusion_row(logits, order.most_rows);
  for (int64_t label = begin; label < end; ++label) {
    T* row = confusion + label * classes;
    const bool weightless = factors[label] == 0;  // whatever its samples hold
    if (weightless || order.start[label] == order.start[label + 1]) {
      std::fill(row, row + classes, T{});
    } else {
      store_run(confusion_row(order, label, factors[label]), classes, row);
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

// A row whose gradient is wanted, where that goes, and the same of a row that comes later and is fetched on the way.
template <typename Real>
struct RowTask {
  const Real* logits;
  Real* out;
  const Real* logits_ahead;
  const Real* out_ahead;
};

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
// in `exps`. The gradient is shifted by its value at the row's top class: for a confident row the
// difference in brackets is otherwise lost to rounding where p_k is close to 1 (100 % wrong at a margin of 20).
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

// The gradient where an exponential is 1, that of the largest logit; of several such gradients the largest.
template <typename Real>
FK_INLINE void see_tops(const Real* exps, const Real* gradient, Real (&there)[kLanes]) {
  Real seen[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    seen[j] = exps[j] == 1 ? gradient[j] : -std::numeric_limits<Real>::infinity();
  }
  see_lanes(seen, there);
}

template <typename Real>
FK_INLINE Real gradient_at_top(const Real* exps, const Real* tail, const Real* gradient, int64_t whole) {
  Real there[kLanes];
  std::fill_n(there, kLanes, -std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < whole; k += kLanes) {
    see_tops(exps + k, gradient + k, there);
  }
  see_tops(tail, gradient + whole, there);
  return max_lanes(there);
}

// Copies a row to where it is kept, and fetches where a later one goes.
template <typename Real>
FK_INLINE void copy_row_body(const Real* from, int64_t n, Real* to, const Real* ahead) {
  for (int64_t k = 0; k < n; k += kLanes) {
    FK_PREFETCH_TO_WRITE(ahead + k);
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    to[k] = from[k];
  }
}

FK_CLONES static void copy_row(const float* from, int64_t n, float* to, const float* ahead) {
  copy_row_body(from, n, to, ahead);
}

FK_CLONES static void copy_row(const double* from, int64_t n, double* to, const double* ahead) {
  copy_row_body(from, n, to, ahead);
}

// softmax_backward of a row whose exponentials and their sum are there already, and give way to it; the row `ahead` is
// fetched; `gradient` has room for a tail. Where no class has more than half of the probability, or that class's gradient
// is 0 anyway, nothing is lost without the shift.
template <typename Real>
FK_INLINE void exps_to_slopes_body(Real* exps, const Real* ahead, Real sum, int64_t classes, int64_t label,
                                   const Real* gradient, Real scale, Real common) {
  const int64_t whole = classes / kLanes * kLanes;
  Real tail[kLanes];
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) {
    tail[j] = j < classes - whole ? exps[whole + j] : Real(0);
  }
  const bool shifts = sum < 2 && !(exps[label] == 1 && gradient[label] == 0);
  const Real shift = shifts ? gradient_at_top(exps, tail, gradient, whole) : Real(0);
  for (int64_t k = 0; k < whole; k += kLanes) {
    FK_PREFETCH_TO_WRITE(ahead + k);
  }
  double product = blocked_sum<Real>(whole, [=](int64_t k) { return exps[k] * (gradient[k] - shift); });
  if (whole != classes) {
    product += lane_sum<Real>(kLanes, [&](int64_t j) { return tail[j] * (gradient[whole + j] - shift); });
  }
  slopes(exps, tail, gradient, classes, shift, {sum, static_cast<Real>(product)}, scale, common, exps);
}

FK_CLONES static void exps_to_slopes(float* exps, const float* ahead, float sum, int64_t classes, int64_t label,
                                     const float* gradient, float scale, float common) {
  exps_to_slopes_body(exps, ahead, sum, classes, label, gradient, scale, common);
}

FK_CLONES static void exps_to_slopes(double* exps, const double* ahead, double sum, int64_t classes, int64_t label,
                                     const double* gradient, double scale, double common) {
  exps_to_slopes_body(exps, ahead, sum, classes, label, gradient, scale, common);
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
    const Real scale = static_cast<Real>(order.weight[position] * class_scale);
    softmax_backward(task, logits.classes, logits.temperature, gradient.data(), scale, Real(0), exps.data());
  };
  backward_chunks(logits, order, begin, end, enter, row, grad_logits);
}

// Exact zeros for the samples without a class, whatever their logits hold.
template <typename T, typename Real>
void clear_ignored(const ClassOrder<Real>& order, T* grad_logits) {
  for (size_t at = order.start[order.classes]; at < order.sample.size(); ++at) {
    T* row = grad_logits + order.sample[at] * order.classes;
    std::fill(row, row + order.classes, T{});
  }
}

}  // namespace fairkernels
