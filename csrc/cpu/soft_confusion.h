// The soft confusion matrix C_ij = (1 / n_i) sum over b of class i of w_b softmax(z_b / temperature)_j, row by row, and
// its backward (Sy-FAR, arXiv 2509.12939). Bound by the exp of the B * K logits, which either direction computes once;
// beyond it each direction reads the logits once. Forward writes K * K rates, backward reads the K rows of the incoming
// gradient that occur and writes B * K.
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

// total_k += sum over rows of factors[r] exps[r, k]. Sixteen rows at most are added in their own type, for speed, and
// these sums in double: 150 single-precision additions in a row would cost four units in the last place.
template <typename Real>
FK_INLINE void add_rows_body(const Real* exps, const Real* factors, int64_t n_rows, int64_t width, double* total) {
  const int64_t most = 16;
  for (int64_t first = 0; first < n_rows; first += most) {
    const int64_t end = first + most < n_rows ? first + most : n_rows;
    for (int64_t k = 0; k < width; k += kLanes) {
      Real lane[kLanes] = {};
      for (int64_t r = first; r < end; ++r) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) {
          lane[j] += factors[r] * exps[r * width + k + j];
        }
      }
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        total[k + j] += lane[j];
      }
    }
  }
}

FK_CLONES static void add_rows(const float* exps, const float* factors, int64_t n_rows, int64_t width, double* total) {
  add_rows_body(exps, factors, n_rows, width, total);
}

FK_CLONES static void add_rows(const double* exps, const double* factors, int64_t n_rows, int64_t width,
                               double* total) {
  add_rows_body(exps, factors, n_rows, width, total);
}

// One thread's sums of weighted probabilities, S_i of one class i at a time.
template <typename T>
class ClassSum {
 public:
  using Real = Accumulator<T>;

  explicit ClassSum(const Logits<T>& logits)
      : chunk_(logits), factors_(rows_per_chunk(logits.classes)), total_(chunk_.width()) {}

  const double* operator()(const ClassOrder<Real>& order, int64_t label) {
    std::fill(total_.begin(), total_.end(), 0.0);
    order.for_each_chunk(label, [&](Chunk chunk) {
      chunk_.compute(&order.sample[chunk.first], chunk.rows);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        factors_[r] = order.weight[chunk.first + r] / chunk_.sums()[r];
      }
      add_rows(chunk_.exps(), factors_.data(), chunk.rows, chunk_.width(), total_.data());
    });
    return total_.data();
  }

 private:
  ExpChunk<T> chunk_;
  std::vector<Real> factors_;
  std::vector<double> total_;
};

// 1/n, and 0 for no samples; NaN stays NaN.
inline double inverse_count(double n) {
  return n != 0 ? 1 / n : 0;
}

template <typename Real>
FK_INLINE void scale_row_body(const double* total, double factor, int64_t n, Real* to) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    to[k] = static_cast<Real>(total[k] * factor);
  }
}

FK_CLONES static void scale_row(const double* total, double factor, int64_t n, float* to) {
  scale_row_body(total, factor, n, to);
}

FK_CLONES static void scale_row(const double* total, double factor, int64_t n, double* to) {
  scale_row_body(total, factor, n, to);
}

// Rows [begin, end) of one confusion matrix; factors[i] is what row i is multiplied by.
template <typename T>
void confusion_rows(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const double* factors,
                    int64_t begin, int64_t end, T* confusion) {
  const int64_t classes = logits.classes;
  ClassSum<T> class_sum(logits);
  std::vector<Accumulator<T>> scaled(classes);
  for (int64_t label = begin; label < end; ++label) {
    T* row = confusion + label * classes;
    const bool weightless = factors[label] == 0;  // whatever its samples hold
    if (weightless || order.start[label] == order.start[label + 1]) {
      std::fill(row, row + classes, T{});
    } else {
      scale_row(class_sum(order, label), factors[label], classes, scaled.data());
      store_run(scaled.data(), classes, row);
    }
  }
}

// The incoming gradient at the row's top class, whose exponential is 1. Of several, the largest gradient.
template <typename Real>
FK_INLINE Real gradient_at_top(const Real* exps, const Real* gradient, int64_t width) {
  const Real lowest = -std::numeric_limits<Real>::infinity();
  const int64_t n = width / kLanes * kLanes;
  Real top = lowest;
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < n; ++k) {
    const Real candidate = exps[k] >= 1 ? gradient[k] : lowest;
    top = candidate > top ? candidate : top;
  }
  return top;
}

// One row of the softmax's backward, in place of its exponentials: scale p_k (g_k - sum_j g_j p_j), p = exps / sum. The
// gradient is shifted by its value at the row's top class: for a confident row the difference in brackets is otherwise
// lost to rounding where p_k is close to 1 (100 % wrong at a margin of 20).
template <typename Real>
FK_INLINE void softmax_backward_row(Real* exps, Real sum, Real scale, const Real* gradient, int64_t width) {
  const int64_t n = width / kLanes * kLanes;
  const Real shift = gradient_at_top(exps, gradient, width);
  const double dot = blocked_sum<Real>(width, [=](int64_t k) { return exps[k] * (gradient[k] - shift); });
  const Real mean = static_cast<Real>(dot) / sum;
  const Real factor = scale / sum;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    exps[k] = factor * exps[k] * ((gradient[k] - shift) - mean);
  }
}

template <typename Real>
FK_INLINE void softmax_backward_body(Real* exps, const Real* sums, const Real* scales, const Real* gradient,
                                     int64_t n_rows, int64_t width) {
  for (int64_t r = 0; r < n_rows; ++r) {
    softmax_backward_row(exps + r * width, sums[r], scales[r], gradient, width);
  }
}

FK_CLONES static void softmax_backward(float* exps, const float* sums, const float* scales, const float* gradient,
                                       int64_t n_rows, int64_t width) {
  softmax_backward_body(exps, sums, scales, gradient, n_rows, width);
}

FK_CLONES static void softmax_backward(double* exps, const double* sums, const double* scales, const double* gradient,
                                       int64_t n_rows, int64_t width) {
  softmax_backward_body(exps, sums, scales, gradient, n_rows, width);
}

// Chunks [begin, end) of one problem. load_gradient(label, row) puts the incoming gradient of one class into `row`;
// class_scales[label] w_b is what each of its samples multiplies it by. `grad_logits` is a contiguous B x K.
template <typename T, typename LoadGradient>
void backward_chunks(const Logits<T>& logits, const ClassOrder<Accumulator<T>>& order, const Chunk* begin,
                     const Chunk* end, const double* class_scales, const LoadGradient& load_gradient, T* grad_logits) {
  using Real = Accumulator<T>;
  ExpChunk<T> rows(logits);
  std::vector<Real> gradient(rows.width());
  std::vector<Real> scales(rows_per_chunk(logits.classes));
  for (const Chunk* chunk = begin; chunk != end; ++chunk) {
    if (chunk == begin || chunk->label != chunk[-1].label) {
      load_gradient(chunk->label, gradient.data());
    }
    for (int64_t r = 0; r < chunk->rows; ++r) {
      scales[r] = static_cast<Real>(order.weight[chunk->first + r] * class_scales[chunk->label]);
    }
    const int64_t* samples = &order.sample[chunk->first];
    rows.compute(samples, chunk->rows);
    softmax_backward(rows.exps(), rows.sums(), scales.data(), gradient.data(), chunk->rows, rows.width());
    for (int64_t r = 0; r < chunk->rows; ++r) {
      store_run(rows.exps() + r * rows.width(), logits.classes, grad_logits + samples[r] * logits.classes);
    }
  }
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
