// What the confusion operators have in common: logits [..., B, K], a class and perhaps a weight for every row of them.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "cpu/class_order.h"
#include "cpu/softmax.h"
#include "support/labels.h"
#include "support/tensor.h"

namespace fairkernels {

class ConfusionArguments {
 public:
  ConfusionArguments(const Tensor& logits, const Tensor& labels, const OptionalTensor& weights, double temperature,
                     int64_t ignore_index)
      : dtype(float_dtype_of(logits, "logits")),
        shape(checked_shape(logits)),
        samples(shape[shape.size() - 2]),
        classes(shape.back()),
        problems(product(reshaped(shape, 2, {}))),
        logits_(logits),
        labels_(labels),
        weights_(weights),
        temperature_(temperature),
        ignore_index_(ignore_index),
        logits_offset_(logits, 2),
        labels_offset_(checked_labels(labels), 1),
        weights_offset_(checked_weights(), 1) {}

  template <typename T>
  Logits<T> logits(int64_t problem) const {
    const T* data = data_of<T>(logits_) + logits_offset_(problem);
    return {data, logits_.stride(-2), logits_.stride(-1), classes, static_cast<Accumulator<T>>(temperature_)};
  }

  // In blocks only where samples have no weights.
  template <typename Real>
  ClassOrder<Real> order(int64_t problem, int64_t block = std::numeric_limits<int64_t>::max()) const {
    const LabelRow labels{data_of<int64_t>(labels_) + labels_offset_(problem), labels_.stride(-1), samples};
    if (!weights_) {
      return ClassOrder<Real>(labels, nullptr, classes, ignore_index_, block);
    }
    std::vector<Real> weights(samples);
    with_float_type(float_dtype_of(*weights_, "sample_weight"), [&](auto type) {
      const auto* data = data_of<decltype(type)>(*weights_) + weights_offset_(problem);
      load(data, weights_->stride(-1), samples, weights.data());
    });
    return ClassOrder<Real>(labels, weights.data(), classes, ignore_index_);
  }

  const Dtype dtype;
  const Shape shape;
  const int64_t samples;
  const int64_t classes;
  const int64_t problems;

 private:
  static Shape checked_shape(const Tensor& logits) {
    Shape shape = shape_of(logits);
    require(shape.size() >= 2 && shape.back() >= 1, "logits must be [..., B, K] with K >= 1, got ", shape);
    return shape;
  }

  const Tensor& checked_labels(const Tensor& labels) const {
    require_dtype(labels, Dtype::int64, "labels");
    require_shape(labels, reshaped(shape, 1, {}), "labels");
    require_device_of(logits_, "logits", labels, "labels");
    if (labels.is_cpu()) {  // on a GPU nobody waits for it: what such a label enters is NaN
      require_classes(labels, "labels", labels, classes, ignore_index_);
    }
    return labels;
  }

  const Tensor& checked_weights() const {
    if (!weights_) {
      return labels_;
    }
    float_dtype_of(*weights_, "sample_weight");
    require_shape(*weights_, reshaped(shape, 1, {}), "sample_weight");
    require_device_of(logits_, "logits", *weights_, "sample_weight");
    return *weights_;
  }

  Tensor logits_;
  Tensor labels_;
  OptionalTensor weights_;
  double temperature_;
  int64_t ignore_index_;
  ProblemOffset logits_offset_;
  ProblemOffset labels_offset_;
  ProblemOffset weights_offset_;
};

}  // namespace fairkernels
