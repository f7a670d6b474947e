// confusion_counts: checks and glue. The counting is in cpu/confusion_counts.h.
#include "cpu/confusion_counts.h"

#include "support/labels.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

Tensor forward(const Tensor& predictions, const Tensor& labels, int64_t num_classes, int64_t ignore_index) {
  const Shape shape = shape_of(labels);
  require_dtype(labels, Dtype::int64, "labels");
  require_dtype(predictions, Dtype::int64, "predictions");
  require(!shape.empty(), "labels must be [..., B], got ", to_string(shape));
  require_shape(predictions, shape, "predictions");
  require(num_classes >= 0, "num_classes must not be negative, got ", num_classes);
  require_classes(labels, "labels", labels, num_classes, ignore_index);
  require_classes(predictions, "predictions", labels, num_classes, ignore_index);
  const Tensor counts = empty(reshaped(shape, 1, {num_classes, num_classes}), Dtype::int64);
  const int64_t samples = shape.back();
  const int64_t size = num_classes * num_classes;
  const ProblemOffset prediction_offset(predictions, 1);
  const ProblemOffset label_offset(labels, 1);
  for_each_problem(product(reshaped(shape, 1, {})), samples + size, [&](int64_t problem) {
    const LabelRow predicted{data_of<int64_t>(predictions) + prediction_offset(problem), predictions.stride(-1),
                             samples};
    const LabelRow actual{data_of<int64_t>(labels) + label_offset(problem), labels.stride(-1), samples};
    count_pairs(predicted, actual, num_classes, ignore_index, mutable_data_of<int64_t>(counts) + problem * size);
  });
  return counts;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def("_confusion_counts_native(Tensor predictions, Tensor labels, int num_classes, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_confusion_counts_native", TORCH_BOX(&fairkernels::forward));
}
