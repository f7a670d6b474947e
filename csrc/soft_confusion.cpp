// soft_confusion: checks and glue. The mathematics is in cpu/soft_confusion.h and cuda/class_terms.cuh.
#include "cpu/soft_confusion.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "support/confusion_arguments.h"
#include "support/gpu_classes.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

Normalize take_normalize(StringHandle handle) {
  const std::string name = take_string(handle);
  require(name == "true" || name == "all" || name == "none", "normalize must be true, all or none, got ", name);
  return name == "true" ? Normalize::by_true_class : name == "all" ? Normalize::by_all : Normalize::none;
}

// What each row of the matrix is multiplied by.
std::vector<double> row_factors(Normalize normalize, const std::vector<double>& counts) {
  std::vector<double> factors(counts.size(), 1.0);
  if (normalize == Normalize::by_true_class) {
    std::transform(counts.begin(), counts.end(), factors.begin(), inverse_count);
  }
  if (normalize == Normalize::by_all) {
    const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
    std::fill(factors.begin(), factors.end(), inverse_count(total));
  }
  return factors;
}

#if defined(FK_WITH_CUDA)

ClassTask confusion_task(const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight, Normalize normalize,
                         double temperature, int64_t ignore_index) {
  ClassTask task = class_task(logits, labels, temperature, ignore_index);
  task.sample_weight = class_operand(sample_weight, 1);
  task.confusion_as_logits = true;
  task.normalize = normalize;
  return task;
}

#endif

template <typename T>
void forward_problem(const ConfusionArguments& arguments, int64_t problem, Normalize normalize, T* confusion,
                     Accumulator<T>* counts) {
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Accumulator<T>>(problem);
  const std::vector<double> sums = order.counts();
  const auto factors = row_factors(normalize, sums);
  store_run(sums.data(), arguments.classes, counts);
  parallel_ranges(arguments.classes, arguments.samples + arguments.classes, [&](int64_t begin, int64_t end) {
    confusion_rows(logits, order, factors.data(), begin, end, confusion);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight,
                                   StringHandle normalize_name, double temperature, int64_t ignore_index) {
  const Normalize normalize = take_normalize(normalize_name);
  const ConfusionArguments arguments(logits, labels, sample_weight, temperature, ignore_index);
  const int64_t classes = arguments.classes;
  const Tensor confusion = empty(reshaped(arguments.shape, 2, {classes, classes}), arguments.dtype, &logits);
  const Tensor counts = empty(reshaped(arguments.shape, 2, {classes}), accumulator_dtype(arguments.dtype), &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = confusion_task(logits, labels, sample_weight, normalize, temperature, ignore_index);
    task.confusion = results_of(confusion);
    task.counts = results_of(counts);
    run_class_terms(task, logits);
    return {confusion, counts};
  }
#endif
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    T* matrices = mutable_data_of<T>(confusion);
    auto* vectors = mutable_data_of<Accumulator<T>>(counts);
    for_each_problem(arguments.problems, arguments.samples * classes, [&](int64_t problem) {
      forward_problem(arguments, problem, normalize, matrices + problem * classes * classes, vectors + problem * classes);
    });
  });
  return {confusion, counts};
}

// The incoming gradient of one problem, K x K, any strides.
template <typename T>
struct RateGradient {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
};

template <typename T>
void backward_problem(const ConfusionArguments& arguments, int64_t problem, const RateGradient<T>& gradient,
                      const std::vector<double>& scale, T* grad_logits) {
  using Real = Accumulator<T>;
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Real>(problem);
  const std::vector<Chunk> chunks = order.chunks();
  const auto load_gradient = [&](int64_t label, Real* row) {
    load(gradient.data + label * gradient.row_stride, gradient.column_stride, arguments.classes, row);
  };
  const auto class_scale = [&](int64_t label) { return scale[label]; };
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    backward_confusion(logits, order, chunks.data() + begin, chunks.data() + end, class_scale, load_gradient, grad_logits);
  });
  clear_ignored(order, grad_logits);
}

std::vector<double> load_counts(const Tensor& counts, int64_t offset, int64_t classes) {
  std::vector<double> loaded(classes);
  with_float_type(float_dtype_of(counts, "counts"), [&](auto type) {
    load(data_of<decltype(type)>(counts) + offset, counts.stride(-1), classes, loaded.data());
  });
  return loaded;
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight,
                StringHandle normalize_name, double temperature, int64_t ignore_index, const Tensor& counts) {
  const Normalize normalize = take_normalize(normalize_name);
  const ConfusionArguments arguments(logits, labels, sample_weight, temperature, ignore_index);
  const int64_t classes = arguments.classes;
  require_dtype(grad, arguments.dtype, "grad");
  require_shape(grad, reshaped(arguments.shape, 2, {classes, classes}), "grad");
  require_shape(counts, reshaped(arguments.shape, 2, {classes}), "counts");
  float_dtype_of(counts, "counts");
  const Tensor grad_logits = empty(arguments.shape, arguments.dtype, &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = confusion_task(logits, labels, sample_weight, normalize, temperature, ignore_index);
    const Tensor saved = dense(counts, reshaped(arguments.shape, 2, {classes}), accumulator_dtype(arguments.dtype), "counts");
    task.grad = class_operand(grad, 2);
    task.counts = const_cast<void*>(saved.const_data_ptr());
    run_class_gradient(task, logits, grad_logits);
    return grad_logits;
  }
#endif
  const ProblemOffset grad_offset(grad, 2);
  const ProblemOffset counts_offset(counts, 1);
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = arguments.samples * classes;
    for_each_problem(arguments.problems, size, [&](int64_t problem) {
      const RateGradient<T> gradient{data_of<T>(grad) + grad_offset(problem), grad.stride(-2), grad.stride(-1)};
      std::vector<double> scale = row_factors(normalize, load_counts(counts, counts_offset(problem), classes));
      for (double& factor : scale) {
        factor /= temperature;
      }
      backward_problem(arguments, problem, gradient, scale, mutable_data_of<T>(grad_logits) + problem * size);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_soft_confusion_native(Tensor logits, Tensor labels, Tensor? sample_weight, str normalize, float temperature, "
      "int ignore_index) -> (Tensor confusion, Tensor counts)");
  m.def(
      "_soft_confusion_backward_native(Tensor grad, Tensor logits, Tensor labels, Tensor? sample_weight, str normalize, "
      "float temperature, int ignore_index, Tensor counts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_soft_confusion_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_soft_confusion_backward_native", TORCH_BOX(&fairkernels::backward));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_soft_confusion_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_soft_confusion_backward_native", TORCH_BOX(&fairkernels::backward));
}
#endif
