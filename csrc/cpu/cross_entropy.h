// torch.nn.functional.cross_entropy of a problem's rows, class by class, beside whatever else is made of their exponentials.
// Costs one logarithm for some dozens of rows and, with label smoothing, one more pass over logits that are in the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/softmax.h"
#include "support/lanes.h"
#include "support/platform.h"

namespace fairkernels {

// log x_1 + ... + log x_n of numbers in [1, 1e9], by as few logarithms as the range of a double allows.
class LogSum {
 public:
  void add(double x) {
    product_ *= x;
    if (!(product_ < 1e290)) {
      sum_ += std::log(product_);
      product_ = 1;
    }
  }

  double value() const { return sum_ + std::log(product_); }

 private:
  double product_ = 1;
  double sum_ = 0;
};

// sum over k of weight_k (top - z_k).
template <typename Real>
FK_INLINE double weighted_drop_body(const Real* logits, const Real* weight, Real top, int64_t classes) {
  double total = 0;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t n = classes - first < kBlock ? classes - first : kBlock;
    total += ragged_sum<Real>(n, [=](int64_t k) { return weight[first + k] * (top - logits[first + k]); });
  }
  return total;
}

FK_CLONES static double weighted_drop(const float* logits, const float* weight, float top, int64_t classes) {
  return weighted_drop_body(logits, weight, top, classes);
}

FK_CLONES static double weighted_drop(const double* logits, const double* weight, double top, int64_t classes) {
  return weighted_drop_body(logits, weight, top, classes);
}

template <typename Real>
class CrossEntropy {
 public:
  // `weight` may be empty: all ones.
  CrossEntropy(const ClassOrder<Real>& order, std::vector<Real> weight, double smoothing, bool mean)
      : classes_(order.classes), weight_(std::move(weight)), smoothing_(smoothing), all_weights_(order.classes), divisor_(1) {
    if (weight_.empty() && smoothing_ != 0) {
      weight_.assign(classes_, Real(1));
    }
    if (smoothing_ != 0) {  // an infinite one of an absent class counts for nothing else
      all_weights_ = std::accumulate(weight_.begin(), weight_.end(), 0.0);
    }
    if (mean) {
      divisor_ = 0;
      for (int64_t label : order.present) {
        divisor_ += weight_of(label) * order.count(label);
      }
    }
  }

  // The sum of the losses of one class's samples: sum_b log(sum_k exp(z_bk - top_b)) + top_b - z_by, all terms of one sign.
  class ClassTotal {
   public:
    ClassTotal(const CrossEntropy& entropy, int64_t label) : entropy_(entropy), label_(label) {}

    void add(const ExpRow<Real>& row) {
      logs_.add(row.sum);
      drop_ += static_cast<double>(row.top) - row.logits[label_];
      if (entropy_.smoothing_ != 0) {
        all_drops_ += weighted_drop(row.logits, entropy_.weight_.data(), row.top, entropy_.classes_);
      }
    }

    double value() const {
      const double s = entropy_.smoothing_;
      const double logs = logs_.value();
      const double own = (1 - s) * entropy_.weight_of(label_) * (logs + drop_);
      return s == 0 ? own : own + s / entropy_.classes_ * (entropy_.all_weights_ * logs + all_drops_);
    }

   private:
    const CrossEntropy& entropy_;
    int64_t label_;
    LogSum logs_;
    double drop_ = 0;
    double all_drops_ = 0;
  };

  // What the sum over all samples is divided by; 0 for a mean over none.
  double divisor() const { return divisor_; }

  // The gradient by a sample's logits, before that division, is by_rate(y) p_k - by_label(y) 1[k = y] - by_class(k).
  double by_rate(int64_t label) const { return by_label(label) + smoothing_ / classes_ * all_weights_; }
  double by_label(int64_t label) const { return (1 - smoothing_) * weight_of(label); }
  double by_class(int64_t k) const { return smoothing_ / classes_ * weight_of(k); }
  bool smooths() const { return smoothing_ != 0; }

 private:
  double weight_of(int64_t label) const { return weight_.empty() ? 1 : weight_[label]; }

  int64_t classes_;
  std::vector<Real> weight_;
  double smoothing_;
  double all_weights_;
  double divisor_;
};

}  // namespace fairkernels
