// Confusional spectral regularisation (arXiv 2501.13273), its Sy-FAR baseline "kl-all", and CAR's "gated" (2603.16732): what
// one sample adds to the row of its class, and the gradient by its logits.
// Bound by the exp of the logits, of which "gated" takes two each and "kl" none for a sample without an error. Never K x K:
// the matrix has a row for each class that occurs, and of "kl" only an entry for each error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/soft_confusion.h"
#include "cpu/softmax.h"
#include "support/elements.h"
#include "support/exp.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

enum class Surrogate { kl, kl_all, soft, gated };

// ---- One sample: rows padded to whole lanes, with -inf among the logits and 0 among the exponentials

// gates_k = sigmoid(margin + z_k - z_y), 0 for the class itself.
template <typename Real>
FK_INLINE void gate_row_body(const Real* logits, int64_t classes, int64_t label, Real margin, Real* gates) {
  const Real own = logits[label];
#pragma omp simd
  for (int64_t k = 0; k < classes; ++k) {
    const Real x = margin + (logits[k] - own);
    const Real small = exp_nonpositive(x < 0 ? x : -x);
    gates[k] = (x < 0 ? small : Real(1)) / (1 + small);
  }
  gates[label] = 0;
  std::fill(gates + classes, gates + padded(classes), Real(0));
}

FK_CLONES static void gate_row(const float* logits, int64_t classes, int64_t label, float margin, float* gates) {
  gate_row_body(logits, classes, label, margin, gates);
}

FK_CLONES static void gate_row(const double* logits, int64_t classes, int64_t label, double margin, double* gates) {
  gate_row_body(logits, classes, label, margin, gates);
}

// hits_k = 1 where z_y <= margin + z_k or one of them is NaN, else 0; 0 for the class itself.
template <typename Real>
FK_INLINE void hit_row_body(const Real* scores, int64_t classes, int64_t label, Real margin, Real* hits) {
  const Real own = scores[label];
#pragma omp simd
  for (int64_t k = 0; k < classes; ++k) {
    hits[k] = own > margin + scores[k] ? Real(0) : Real(1);
  }
  hits[label] = 0;
  std::fill(hits + classes, hits + padded(classes), Real(0));
}

FK_CLONES static void hit_row(const float* scores, int64_t classes, int64_t label, float margin, float* hits) {
  hit_row_body(scores, classes, label, margin, hits);
}

FK_CLONES static void hit_row(const double* scores, int64_t classes, int64_t label, double margin, double* hits) {
  hit_row_body(scores, classes, label, margin, hits);
}

// a_k *= b_k
template <typename Real>
FK_INLINE void multiply_row_body(Real* a, const Real* b, int64_t width) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    a[k] *= b[k];
  }
}

FK_CLONES static void multiply_row(float* a, const float* b, int64_t width) {
  multiply_row_body(a, b, width);
}

FK_CLONES static void multiply_row(double* a, const double* b, int64_t width) {
  multiply_row_body(a, b, width);
}

// a_k *= factor
template <typename Real>
FK_INLINE void scale_in_place_body(Real* a, Real factor, int64_t width) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    a[k] *= factor;
  }
}

FK_CLONES static void scale_in_place(float* a, float factor, int64_t width) {
  scale_in_place_body(a, factor, width);
}

FK_CLONES static void scale_in_place(double* a, double factor, int64_t width) {
  scale_in_place_body(a, factor, width);
}

FK_CLONES static double row_sum(const float* a, int64_t width) {
  return blocked_sum<float>(width, [=](int64_t k) { return a[k]; });
}

FK_CLONES static double row_sum(const double* a, int64_t width) {
  return blocked_sum<double>(width, [=](int64_t k) { return a[k]; });
}

FK_CLONES static double row_dot(const float* a, const float* b, int64_t width) {
  return blocked_sum<float>(width, [=](int64_t k) { return a[k] * b[k]; });
}

FK_CLONES static double row_dot(const double* a, const double* b, int64_t width) {
  return blocked_sum<double>(width, [=](int64_t k) { return a[k] * b[k]; });
}

// The largest entry, or NaN if there is one.
template <typename Real>
FK_INLINE Real top_or_nan(const Real* row, int64_t width) {
  Real top = -std::numeric_limits<Real>::infinity();
  Real unordered = 0;
  const int64_t n = width / kLanes * kLanes;
#pragma omp simd reduction(max : top) reduction(+ : unordered)
  for (int64_t k = 0; k < n; ++k) {
    top = row[k] > top ? row[k] : top;
    unordered += row[k] == row[k] ? Real(0) : Real(1);
  }
  return unordered > 0 ? std::numeric_limits<Real>::quiet_NaN() : top;
}

FK_CLONES static float largest(const float* row, int64_t width) {
  return top_or_nan(row, width);
}

FK_CLONES static double largest(const double* row, int64_t width) {
  return top_or_nan(row, width);
}

// The first place of a value, `width` if it has none: whole lanes at a time up to where it is.
template <typename Real>
FK_INLINE int64_t place_of_body(const Real* row, int64_t width, Real value) {
  for (int64_t first = 0; first < width; first += kLanes) {
    Real found = 0;
#pragma omp simd reduction(+ : found)
    for (int j = 0; j < kLanes; ++j) {
      found += row[first + j] == value ? Real(1) : Real(0);
    }
    if (found > 0) {
      return std::find(row + first, row + first + kLanes, value) - row;
    }
  }
  return width;
}

FK_CLONES static int64_t place_of(const float* row, int64_t width, float value) {
  return place_of_body(row, width, value);
}

FK_CLONES static int64_t place_of(const double* row, int64_t width, double value) {
  return place_of_body(row, width, value);
}

// What -log p_y becomes in the row of logits' place, its exponentials, and what its gradient is made of.
struct Charge {
  double loss;        // -log p_y, finite where p_y underflows and exact where it is close to 1
  double sum;         // p = exponentials / sum
  double complement;  // 1 - p_y
};

// "kl-all": hits are the wrong classes whose probability is within the margin of the true one's. At margin 0 logits are
// compared, whose order rounding does not change.
template <typename Real>
Charge charge_row(Real* row, int64_t classes, int64_t label, Real margin, Real* hits) {
  const int64_t width = padded(classes);
  const double below = static_cast<double>(largest(row, width)) - row[label];
  if (margin == 0) {
    hit_row(row, classes, label, margin, hits);
  }
  Real sum = 0;
  exp_rows(row, 1, width, Real(1), &sum);
  if (margin != 0) {
    hit_row(row, classes, label, margin * sum, hits);
  }
  const Real own = row[label];
  row[label] = 0;
  const double others = row_sum(row, width);
  row[label] = own;
  return {below + (below == 0 ? std::log1p(others) : std::log(static_cast<double>(sum))), sum, others / sum};
}

// "kl": the strongest wrong class, the lowest index of several, and the charge under the logits raised by the margin where
// they are wrong. -1 if the class is not within the margin; its own index if there is a NaN, and then so is the charge.
struct Rival {
  int64_t column;
  Charge charge;
};

template <typename Real>
Rival take_rival(Real* row, int64_t classes, int64_t label, Real margin) {
  const int64_t width = padded(classes);
  const Real own = row[label];
  row[label] = -std::numeric_limits<Real>::infinity();
  const Real top = largest(row, width);
  if (own > margin + top) {
    return {-1, {}};
  }
  const int64_t column = place_of(row, width, top);
  Real others = 0;
  exp_rows(row, 1, width, Real(1), &others);
  const double ahead = static_cast<double>(top) - own + margin;  // >= 0, or NaN
  const double sum = others + std::exp(-ahead);
  return {column < classes ? column : label, {ahead + std::log(sum), sum, others / sum}};
}

// The gradient of `slope` times a charge, in place of its row of exponentials: slope (p - e_y).
template <typename Real>
void charge_gradient(Real* row, int64_t width, int64_t label, const Charge& charge, double slope) {
  scale_in_place(row, static_cast<Real>(slope / charge.sum), width);
  row[label] = static_cast<Real>(-slope * charge.complement);
}

// ---- One class

// One thread's rows of the matrix but for their factors, one class at a time; not of "kl".
template <typename T>
class SurrogateSum {
 public:
  using Real = Accumulator<T>;

  SurrogateSum(const Logits<T>& logits, Surrogate surrogate, double margin)
      : surrogate_(surrogate),
        margin_(static_cast<Real>(margin)),
        classes_(logits.classes),
        chunk_(logits),
        marks_(rows_per_chunk(logits.classes) * chunk_.width()),
        factors_(rows_per_chunk(logits.classes)),
        total_(chunk_.width()) {}

  const double* operator()(const ClassOrder<Real>& order, int64_t label) {
    std::fill(total_.begin(), total_.end(), 0.0);
    order.for_each_chunk(label, [&](Chunk chunk) {
      chunk_.load_logits(&order.sample[chunk.first], chunk.rows);
      add_rows(surrogate_ == Surrogate::kl_all ? charge(chunk) : spread(chunk), factors_.data(), chunk.rows, chunk_.width(),
               total_.data());
    });
    total_[label] *= 0;  // but a NaN stays
    return total_.data();
  }

 private:
  Real* marks(int64_t r) { return &marks_[r * chunk_.width()]; }
  Real* row(int64_t r) { return chunk_.exps() + r * chunk_.width(); }

  // Probabilities, gated or not, as exponentials and factors.
  const Real* spread(const Chunk& chunk) {
    const bool gated = surrogate_ == Surrogate::gated;
    for (int64_t r = 0; r < chunk.rows && gated; ++r) {
      gate_row(row(r), classes_, chunk.label, margin_, marks(r));
    }
    chunk_.exponentiate(chunk.rows);
    for (int64_t r = 0; r < chunk.rows && gated; ++r) {
      multiply_row(row(r), marks(r), chunk_.width());
    }
    std::transform(chunk_.sums(), chunk_.sums() + chunk.rows, factors_.begin(), [](Real sum) { return 1 / sum; });
    return chunk_.exps();
  }

  // The classes within the margin as 0 and 1, and the losses as factors.
  const Real* charge(const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      factors_[r] = static_cast<Real>(charge_row(row(r), classes_, chunk.label, margin_, marks(r)).loss);
    }
    return marks_.data();
  }

  Surrogate surrogate_;
  Real margin_;
  int64_t classes_;
  ExpChunk<T> chunk_;
  std::vector<Real> marks_;
  std::vector<Real> factors_;
  std::vector<double> total_;
};

// Entries of one row of the matrix of "kl" but for its factor, in increasing order of the columns.
struct Entry {
  int64_t column;
  double value;
};

// One thread's.
template <typename T>
class RivalSum {
 public:
  using Real = Accumulator<T>;

  RivalSum(const Logits<T>& logits, double margin) : classes_(logits.classes), margin_(static_cast<Real>(margin)), chunk_(logits) {}

  std::vector<Entry> operator()(const ClassOrder<Real>& order, int64_t label) {
    std::vector<Entry> entries;
    order.for_each_chunk(label, [&](Chunk chunk) {
      chunk_.load_logits(&order.sample[chunk.first], chunk.rows);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const Rival rival = take_rival(chunk_.exps() + r * chunk_.width(), classes_, label, margin_);
        if (rival.column >= 0) {
          entries.push_back({rival.column, rival.charge.loss});
        }
      }
    });
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.column < b.column; });
    return merged(entries);
  }

 private:
  static std::vector<Entry> merged(const std::vector<Entry>& entries) {
    std::vector<Entry> result;
    for (const Entry& entry : entries) {
      if (!result.empty() && result.back().column == entry.column) {
        result.back().value += entry.value;
      } else {
        result.push_back(entry);
      }
    }
    return result;
  }

  int64_t classes_;
  Real margin_;
  ExpChunk<T> chunk_;
};

// ---- Backward

// One thread's gradients by the logits. `v` is the right singular vector, padded; slopes[label] is what its row of the matrix
// is multiplied by, times the entry of the left vector and the incoming gradient.
template <typename T>
class SurrogateGradient {
 public:
  using Real = Accumulator<T>;

  SurrogateGradient(const Logits<T>& logits, Surrogate surrogate, double margin, const Real* v, const double* slopes)
      : surrogate_(surrogate),
        margin_(static_cast<Real>(margin)),
        classes_(logits.classes),
        v_(v),
        slopes_(slopes),
        chunk_(logits),
        marks_(chunk_.width()) {}

  void operator()(const Chunk& chunk, const int64_t* samples, T* grad_logits) {
    chunk_.load_logits(samples, chunk.rows);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      Real* row = chunk_.exps() + r * chunk_.width();
      if (surrogate_ == Surrogate::kl) {
        rival_gradient(row, chunk.label);
      } else if (surrogate_ == Surrogate::kl_all) {
        hits_gradient(row, chunk.label);
      } else {
        softmax_gradient(row, chunk.label);
      }
      store_run(row, classes_, grad_logits + samples[r] * classes_);
    }
  }

 private:
  void rival_gradient(Real* row, int64_t label) {
    const Rival rival = take_rival(row, classes_, label, margin_);
    if (rival.column < 0) {
      std::fill(row, row + classes_, Real(0));
    } else {
      charge_gradient(row, chunk_.width(), label, rival.charge, slopes_[label] * v_[rival.column]);
    }
  }

  void hits_gradient(Real* row, int64_t label) {
    const Charge charge = charge_row(row, classes_, label, margin_, marks_.data());
    const double hit = row_dot(marks_.data(), v_, chunk_.width());
    charge_gradient(row, chunk_.width(), label, charge, slopes_[label] * hit);
  }

  void softmax_gradient(Real* row, int64_t label) {
    const int64_t width = chunk_.width();
    if (surrogate_ == Surrogate::gated) {
      gate_row(row, classes_, label, margin_, marks_.data());
      multiply_row(marks_.data(), v_, width);
    } else {
      std::copy_n(v_, width, marks_.data());
      marks_[label] = 0;
    }
    const Real slope = static_cast<Real>(slopes_[label]);
    Real sum = 0;
    exp_rows(row, 1, width, Real(1), &sum);
    softmax_backward(row, &sum, &slope, marks_.data(), 1, width);
  }

  Surrogate surrogate_;
  Real margin_;
  int64_t classes_;
  const Real* v_;
  const double* slopes_;
  ExpChunk<T> chunk_;
  std::vector<Real> marks_;
};

}  // namespace fairkernels
