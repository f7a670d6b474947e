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
#include "support/surrogate.h"

namespace fairkernels {

// ---- One sample

// gates_k = sigmoid(margin + z_k - z_y), 0 for the class itself and in the padding.
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

// hits_k = 1 where z_y <= margin + z_k or one of them is NaN, else 0; 0 for the class itself and in the
// padding.
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

// a_k += factor b_k
template <typename Real>
FK_INLINE void add_scaled_body(Real* a, Real factor, const Real* b, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    a[k] += factor * b[k];
  }
}

FK_CLONES static void add_scaled(float* a, float factor, const float* b, int64_t n) {
  add_scaled_body(a, factor, b, n);
}

FK_CLONES static void add_scaled(double* a, double factor, const double* b, int64_t n) {
  add_scaled_body(a, factor, b, n);
}

FK_CLONES static double row_dot(const float* a, const float* b, int64_t width) {
  return blocked_sum<float>(width, [=](int64_t k) { return a[k] * b[k]; });
}

FK_CLONES static double row_dot(const double* a, const double* b, int64_t width) {
  return blocked_sum<double>(width, [=](int64_t k) { return a[k] * b[k]; });
}

// The sum of all entries but one; `width` is a multiple of kLanes.
template <typename Real>
FK_INLINE double sum_of_others_body(const Real* row, int64_t label, int64_t width) {
  return blocked_sum<Real>(width, [=](int64_t k) { return k == label ? Real(0) : row[k]; });
}

FK_CLONES static double sum_of_others(const float* row, int64_t label, int64_t width) {
  return sum_of_others_body(row, label, width);
}

FK_CLONES static double sum_of_others(const double* row, int64_t label, int64_t width) {
  return sum_of_others_body(row, label, width);
}

// The largest entry but one, or NaN if there is one among them.
template <typename Real>
FK_INLINE Real largest_of_others_body(const Real* row, int64_t label, int64_t classes) {
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real top[kLanes];
  Real unordered[kLanes] = {};
  std::fill(top, top + kLanes, lowest);
  for (int64_t first = 0; first < classes; first += kLanes) {
    const int64_t n = classes - first < kLanes ? classes - first : kLanes;
    Real others[kLanes];
    load_tail(row + first, n, others);
    if (label - first >= 0 && label - first < kLanes) {
      others[label - first] = lowest;
    }
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      unordered[j] += others[j] == others[j] ? Real(0) : Real(1);
    }
    see_lanes(others, top);
  }
  return add_lanes(unordered) > 0 ? std::numeric_limits<Real>::quiet_NaN() : max_lanes(top);
}

FK_CLONES static float largest_of_others(const float* row, int64_t label, int64_t classes) {
  return largest_of_others_body(row, label, classes);
}

FK_CLONES static double largest_of_others(const double* row, int64_t label, int64_t classes) {
  return largest_of_others_body(row, label, classes);
}

// The sum of all exponentials but that of one class: not by a difference where that is most of it.
template <typename Real>
double others_of(const ExpRow<Real>& row, int64_t label, int64_t classes) {
  const double own = row.exps[label];
  return own < 0.5 * row.sum ? row.sum - own : sum_of_others(row.exps, label, padded(classes));
}

// "kl-all": hits are the wrong classes whose probability is within the margin of the true one's. At margin 0 logits are
// compared, whose order rounding does not change.
template <typename Real>
void find_hits(const ExpRow<Real>& row, int64_t classes, int64_t label, Real margin, Real* hits) {
  if (margin == 0) {
    hit_row(row.logits, classes, label, margin, hits);
  } else {
    hit_row(row.exps, classes, label, margin * row.sum, hits);
  }
}

// -log p_y, finite where p_y underflows and exact where it is close to 1.
template <typename Real>
double charge_of(const ExpRow<Real>& row, int64_t classes, int64_t label) {
  const double below = static_cast<double>(row.top) - row.logits[label];
  return below + (below == 0 ? std::log1p(others_of(row, label, classes)) : std::log(static_cast<double>(row.sum)));
}

// out += slope (p - e_y) for p = exps / sum, whose exponentials but that of y add up to `others`.
template <typename Real>
void add_charge_gradient(const Real* exps, double sum, double others, double slope, int64_t classes, int64_t label, Real* out) {
  const Real own = static_cast<Real>(out[label] - slope * (others / sum));
  add_scaled(out, static_cast<Real>(slope / sum), exps, classes);
  out[label] = own;
}

// The first place of a value from `first` on, `n` if there is none: whole lanes at a time up to where it is.
template <typename Real>
FK_INLINE int64_t place_of_body(const Real* row, int64_t first, int64_t n, Real value) {
  for (; first + kLanes <= n; first += kLanes) {
    Real found = 0;
#pragma omp simd reduction(+ : found)
    for (int j = 0; j < kLanes; ++j) {
      found += row[first + j] == value ? Real(1) : Real(0);
    }
    if (found > 0) {
      break;
    }
  }
  return std::find(row + first, row + n, value) - row;
}

FK_CLONES static int64_t place_of(const float* row, int64_t first, int64_t n, float value) {
  return place_of_body(row, first, n, value);
}

FK_CLONES static int64_t place_of(const double* row, int64_t first, int64_t n, double value) {
  return place_of_body(row, first, n, value);
}

// The first of the other classes with this logit; the class itself if there is none, the logit being NaN.
template <typename Real>
int64_t strongest(const Real* logits, Real top, int64_t label, int64_t classes) {
  int64_t found = place_of(logits, 0, classes, top);
  if (found == label) {
    found = place_of(logits, label + 1, classes, top);
  }
  return found < classes ? found : label;
}

// "kl": the strongest wrong class, the lowest index of several, and the charge under the logits raised by the margin where
// they are wrong. -1 if the class is not within the margin; its own index if there is a NaN, and then so is the charge.
// The exponentials, of the wrong classes, are relative to the strongest of them.
template <typename Real>
struct Rival {
  int64_t column;
  double charge;
  const Real* exps;
  double sum;
  double others;
};

template <typename Real>
Rival<Real> rival_of(const Real* logits, Real top, const Real* exps, double others, int64_t classes, int64_t label, Real margin) {
  const double ahead = static_cast<double>(top) - logits[label] + margin;  // >= 0, or NaN
  const double sum = others + std::exp(-ahead);
  return {strongest(logits, top, label, classes), ahead + std::log(sum), exps, sum, others};
}

// Takes exponentials, into `exps`, of a sample with an error only.
template <typename Real>
Rival<Real> find_rival(const Real* logits, int64_t classes, int64_t label, Real margin, Real* exps) {
  const Real top = largest_of_others(logits, label, classes);
  if (is_ahead(logits[label], margin + top)) {
    return {-1, 0, nullptr, 0, 0};
  }
  std::copy_n(logits, classes, exps);
  exps[label] = -std::numeric_limits<Real>::infinity();
  const RowTask<Real> task{exps, exps, exps, exps};
  Real highest = 0;
  Real others = 0;
  exp_rows(&task, 1, classes, Real(1), true, &highest, &others);
  return rival_of(logits, top, exps, others, classes, label, margin);
}

// The same of a row that has exponentials: they will do where the strongest class is a wrong one.
template <typename Real>
Rival<Real> find_rival(const ExpRow<Real>& row, int64_t classes, int64_t label, Real margin, Real* exps) {
  if (row.logits[label] < row.top && margin >= 0) {
    return rival_of(row.logits, row.top, row.exps, others_of(row, label, classes), classes, label, margin);
  }
  return find_rival(row.logits, classes, label, margin, exps);
}

// ---- One class

// One thread's rows of the matrix but for their factors, one class at a time; not of "kl".
template <typename Real>
class SurrogateSum {
 public:
  SurrogateSum(Surrogate surrogate, double margin, int64_t classes, int64_t most_rows)
      : surrogate_(surrogate),
        margin_(static_cast<Real>(margin)),
        classes_(classes),
        marks_(surrogate == Surrogate::soft ? 0 : most_rows * padded(classes)),
        terms_(most_rows),
        factors_(most_rows),
        sum_(classes) {}

  void clear() { sum_.clear(); }

  template <typename T>
  void add(const ExpChunk<T>& rows, const Chunk& chunk) {
    const int64_t width = padded(classes_);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const ExpRow<Real> row = rows.row(r);
      Real* marks = marks_.data() + r * width;
      factors_[r] = 1 / row.sum;
      terms_[r] = surrogate_ == Surrogate::soft ? row.exps : marks;
      if (surrogate_ == Surrogate::kl_all) {
        find_hits(row, classes_, chunk.label, margin_, marks);
        factors_[r] = static_cast<Real>(charge_of(row, classes_, chunk.label));
      } else if (surrogate_ == Surrogate::gated) {
        gate_row(row.logits, classes_, chunk.label, margin_, marks);
        multiply_row(marks, row.exps, width);
      }
    }
    sum_.add(terms_.data(), factors_.data(), chunk.rows);
  }

  void take(int64_t label, double factor, Real* row) {
    const Real* sum = sum_.take();
    for (int64_t k = 0; k < classes_; ++k) {
      row[k] = static_cast<Real>(sum[k] * factor);
    }
    row[label] *= 0;  // but a NaN stays
  }

 private:
  Surrogate surrogate_;
  Real margin_;
  int64_t classes_;
  std::vector<Real> marks_;
  std::vector<const Real*> terms_;
  std::vector<Real> factors_;
  RowSum<Real> sum_;
};

// Entries of one row of the matrix of "kl" but for its factor, in increasing order of the columns.
struct Entry {
  int64_t column;
  double value;
};

// One thread's, one class at a time.
template <typename Real>
class RivalSum {
 public:
  RivalSum(double margin, int64_t classes) : classes_(classes), margin_(static_cast<Real>(margin)), exps_(padded(classes)) {}

  void clear() { entries_.clear(); }

  // `row` is an ExpRow, or logits alone.
  template <typename Row>
  void add(const Row& row, int64_t label) {
    const Rival<Real> rival = find_rival(row, classes_, label, margin_, exps_.data());
    if (rival.column >= 0) {
      entries_.push_back({rival.column, rival.charge});
    }
  }

  std::vector<Entry> take(double factor) {
    std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.column < b.column; });
    std::vector<Entry> merged;
    for (const Entry& entry : entries_) {
      if (!merged.empty() && merged.back().column == entry.column) {
        merged.back().value += factor * entry.value;
      } else {
        merged.push_back({entry.column, factor * entry.value});
      }
    }
    return merged;
  }

 private:
  int64_t classes_;
  Real margin_;
  std::vector<Real> exps_;
  std::vector<Entry> entries_;
};

// ---- Backward

// One thread's. "soft" and "gated" are linear in the rates: their derivatives by these go through the softmax together with
// those of other terms. "kl" and "kl-all" charge log-probabilities, whose gradients are added afterwards.
template <typename Real>
class SurrogateGradient {
 public:
  // `v` is the right singular vector, padded but for "soft".
  SurrogateGradient(Surrogate surrogate, double margin, int64_t classes, const Real* v)
      : surrogate_(surrogate),
        margin_(static_cast<Real>(margin)),
        classes_(classes),
        v_(v),
        marks_(surrogate == Surrogate::soft ? 0 : padded(classes)),
        exps_(marks_.size()) {}

  bool through_rates() const { return surrogate_ == Surrogate::soft || surrogate_ == Surrogate::gated; }

  // Adds slope times the derivatives by a sample's rates; for "soft" they are the same for all of a class.
  void add_by_rates(const Real* logits, int64_t label, Real slope, Real* gradient) {
    const Real own = gradient[label];
    if (surrogate_ == Surrogate::gated) {
      gate_row(logits, classes_, label, margin_, marks_.data());
      multiply_row(marks_.data(), v_, marks_.size());
      add_scaled(gradient, slope, marks_.data(), classes_);
    } else {
      add_scaled(gradient, slope, v_, classes_);
    }
    gradient[label] = own;
  }

  // Adds slope times the gradient by the logits, of "kl"; `row` is an ExpRow, or logits alone.
  template <typename Row>
  void add_by_rival(const Row& row, int64_t label, double slope, Real* out) {
    const Rival<Real> rival = find_rival(row, classes_, label, margin_, exps_.data());
    if (rival.column >= 0) {
      add_charge_gradient(rival.exps, rival.sum, rival.others, slope * v_[rival.column], classes_, label, out);
    }
  }

  // The same of "kl-all".
  void add_by_hits(const ExpRow<Real>& row, int64_t label, double slope, Real* out) {
    find_hits(row, classes_, label, margin_, marks_.data());
    const double hit = row_dot(marks_.data(), v_, marks_.size());
    add_charge_gradient(row.exps, row.sum, others_of(row, label, classes_), slope * hit, classes_, label, out);
  }

 private:
  Surrogate surrogate_;
  Real margin_;
  int64_t classes_;
  const Real* v_;
  std::vector<Real> marks_;
  std::vector<Real> exps_;
};

}  // namespace fairkernels
