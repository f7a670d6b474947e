// Classes out of range are refused before any kernel runs, so that none of them can reach outside its matrices.
#pragma once

#include "support/tensor.h"

namespace fairkernels {

[[noreturn]] inline void fail_class(const Shape& shape, int64_t problem, int64_t sample, const char* name,
                                    int64_t found, int64_t classes, int64_t ignore_index) {
  Shape index(shape.size());
  index.back() = sample;
  for (size_t i = shape.size() - 1; i-- > 0;) {
    index[i] = problem % shape[i];
    problem /= shape[i];
  }
  fail("IndexError: ", name, index, " is ", found, ", expected a class in [0, ", classes,
       ") or ignore_index ", ignore_index);
}

// Every entry of `values` beside a label that counts must be a class; both are [..., B]. To check the labels, pass them
// twice.
inline void require_classes(const Tensor& values, const char* name, const Tensor& labels, int64_t classes,
                            int64_t ignore_index) {
  const Shape shape = shape_of(labels);
  const ProblemOffset value_offset(values, 1);
  const ProblemOffset label_offset(labels, 1);
  const int64_t samples = shape.back();
  const int64_t problems = samples == 0 ? 0 : labels.numel() / samples;
  const int64_t value_stride = values.stride(-1);
  const int64_t label_stride = labels.stride(-1);
  for (int64_t problem = 0; problem < problems; ++problem) {
    const int64_t* value = data_of<int64_t>(values) + value_offset(problem);
    const int64_t* label = data_of<int64_t>(labels) + label_offset(problem);
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t found = value[b * value_stride];
      const bool counts = label[b * label_stride] != ignore_index;
      if (counts && (found < 0 || found >= classes)) {
        fail_class(shape, problem, b, name, found, classes, ignore_index);
      }
    }
  }
}

}  // namespace fairkernels
