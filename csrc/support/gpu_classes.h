// From tensors to what the GPU's kernels on classified samples are handed.
#pragma once

#include "cuda/class_terms.h"
#include "support/gpu.h"
#include "support/gpu_problems.h"
#include "support/tensor.h"

namespace fairkernels {

inline ClassOperand class_operand(const Tensor& tensor, int64_t inner) {
  return {tensor.const_data_ptr(),           dtype_of(tensor, "tensor"),       inner > 1 ? tensor.stride(-2) : 0,
          inner > 0 ? tensor.stride(-1) : 0, problems_of(tensor, inner)};
}

inline ClassOperand class_operand(const OptionalTensor& tensor, int64_t inner) {
  return tensor ? class_operand(*tensor, inner) : ClassOperand{};
}

// What all operators have.
inline ClassTask class_task(const Tensor& logits, const Tensor& labels, double temperature, int64_t ignore_index) {
  ClassTask task{};
  task.logits = class_operand(logits, 2);
  task.labels = class_operand(labels, 1);
  task.samples = logits.size(-2);
  require(task.samples <= INT32_MAX, "there may be at most 2^31 - 1 samples of a problem on a GPU");  // they are counted
  require(logits.size(-1) <= 1 << 24, "there may be at most 2^24 classes on a GPU");  // what a float can number
  task.classes = static_cast<int>(logits.size(-1));
  task.problems = product(reshaped(shape_of(logits), 2, {}));
  task.temperature = temperature;
  task.ignore_index = ignore_index;
  return task;
}

inline void* results_of(const Tensor& tensor) {
  return tensor.mutable_data_ptr();
}

#if defined(FK_WITH_CUDA)

inline void run_class_terms(ClassTask& task, const Tensor& logits) {
  if (task.problems == 0) {
    return;
  }
  OptionalTensor workspace;
  launch_on_device_of(logits, [&](void* stream) {
    workspace = empty({fk_class_terms_bytes(&task)}, Dtype::byte, &logits);
    task.workspace = results_of(*workspace);
    return fk_class_terms(&task, stream);
  });
}

inline void run_class_gradient(ClassTask& task, const Tensor& logits, const Tensor& gradient) {
  if (gradient.numel() == 0) {
    return;
  }
  const Tensor workspace = empty({fk_class_gradient_bytes(&task)}, Dtype::byte, &logits);
  task.workspace = results_of(workspace);
  task.gradient = results_of(gradient);
  launch_on_device_of(logits, [&](void* stream) { return fk_class_gradient(&task, stream); });
}

#endif

}  // namespace fairkernels
