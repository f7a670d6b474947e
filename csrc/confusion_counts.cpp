// confusion_counts: checks and glue. The counting is in cpu/confusion_counts.h.
#include "cpu/confusion_counts.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "support/labels.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

// As many threads as have more samples to count than cells to clear and to add.
int64_t count_parts(int64_t samples, int64_t cells) {
  return std::clamp<int64_t>(samples / std::max(kGrain, cells), 1, torch::stable::get_num_threads());
}

template <typename Counts>
bool count_in_parts(LabelRow predictions, LabelRow labels, int64_t classes, int64_t ignore_index, int64_t* counts) {
  const int64_t cells = classes * classes;
  std::vector<Counts> parts(count_parts(labels.samples, cells), Counts(classes, ignore_index));
  const int64_t n_parts = parts.size();
  std::atomic<bool> valid{true};
  parallel_each(n_parts, labels.samples / n_parts, [&](int64_t part) {
    const int64_t begin = labels.samples * part / n_parts;
    const int64_t end = labels.samples * (part + 1) / n_parts;
    if (!parts[part].add(predictions, labels, begin, end)) {
      valid = false;
    }
  });
  parallel_ranges(cells, n_parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < n_parts; ++part) {
      parts[part].write(begin, end, part == 0, counts);
    }
  });
  for (const Counts& part : parts) {
    part.write_rounds(counts);
  }
  return valid;
}

// False if a sample that counts has no class.
bool count_problem(LabelRow predictions, LabelRow labels, int64_t classes, int64_t ignore_index, int64_t* counts) {
  const int64_t cells = classes * classes;
  if (4 * labels.samples < cells) {  // tables of their own would cost more to clear and to add than they save
    parallel_ranges(cells, 1, [&](int64_t begin, int64_t end) { std::fill(counts + begin, counts + end, int64_t{0}); });
    return count_directly(predictions, labels, classes, ignore_index, counts);
  }
  const auto count = cells <= kFewCells ? count_in_parts<CrowdedCounts> : count_in_parts<SpreadCounts>;
  return count(predictions, labels, classes, ignore_index, counts);
}

Tensor forward(const Tensor& predictions, const Tensor& labels, int64_t num_classes, int64_t ignore_index) {
  const Shape shape = shape_of(labels);
  require_dtype(labels, Dtype::int64, "labels");
  require_dtype(predictions, Dtype::int64, "predictions");
  require(!shape.empty(), "labels must be [..., B], got ", shape);
  require_shape(predictions, shape, "predictions");
  require(num_classes >= 0, "num_classes must not be negative, got ", num_classes);
  const Tensor counts = empty(reshaped(shape, 1, {num_classes, num_classes}), Dtype::int64);
  const int64_t samples = shape.back();
  const int64_t size = num_classes * num_classes;
  const ProblemOffset prediction_offset(predictions, 1);
  const ProblemOffset label_offset(labels, 1);
  int64_t* matrices = mutable_data_of<int64_t>(counts);
  std::atomic<bool> valid{true};
  for_each_problem(product(reshaped(shape, 1, {})), samples + size, [&](int64_t problem) {
    const LabelRow predicted{data_of<int64_t>(predictions) + prediction_offset(problem), predictions.stride(-1),
                             samples};
    const LabelRow actual{data_of<int64_t>(labels) + label_offset(problem), labels.stride(-1), samples};
    if (!count_problem(predicted, actual, num_classes, ignore_index, matrices + problem * size)) {
      valid = false;
    }
  });
  if (!valid) {
    require_classes(labels, "labels", labels, num_classes, ignore_index);
    require_classes(predictions, "predictions", labels, num_classes, ignore_index);
  }
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
