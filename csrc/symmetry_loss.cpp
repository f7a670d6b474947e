// symmetry_loss: checks and glue. The mathematics is in cpu/symmetry_loss.h and cuda/class_terms.cuh.
#include "cpu/symmetry_loss.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "support/confusion_arguments.h"
#include "support/gpu_classes.h"
#include "support/parallel.h"
#include "support/symmetry_options.h"
#include "support/symmetry_terms.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

#if defined(FK_WITH_CUDA)

ClassTask symmetry_task(const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight, double eps,
                        const SymmetryOptions& options, double temperature, int64_t ignore_index) {
  ClassTask task = class_task(logits, labels, temperature, ignore_index);
  task.sample_weight = class_operand(sample_weight, 1);
  task.wants_symmetry = true;
  task.mean_of_pairs = options.reduction == Reduction::mean;
  task.ignores_absent = options.absent == Absent::ignore;
  task.sym_weight = 1;
  task.eps = eps;
  return task;
}

#endif

template <typename T>
double forward_problem(const ConfusionArguments& arguments, int64_t problem, const SymmetryOptions& options, double eps,
                       const Matrix<Accumulator<T>>& matrix, const Shape& shape) {
  using Real = Accumulator<T>;
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Real>(problem);
  const std::vector<int64_t>& present = order.present;
  const int64_t n = present.size();
  const bool compact = options.absent == Absent::ignore;
  clear_unused(matrix, shape, n, compact ? n : arguments.classes);
  parallel_ranges(n, arguments.samples + arguments.classes, [&](int64_t begin, int64_t end) {
    rate_rows(logits, order, present, compact, begin, end, matrix);
  });
  return symmetry_gap_of(matrix, present, arguments.classes, eps, options, 1.0);
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight, double eps,
                                   StringHandle absent, StringHandle reduction, double temperature, int64_t ignore_index) {
  const SymmetryOptions options(absent, reduction);
  const ConfusionArguments arguments(logits, labels, sample_weight, temperature, ignore_index);
  const Shape shape = coefficients_shape(arguments, options.absent);
  const Tensor loss = empty(reshaped(arguments.shape, 2, {}), arguments.dtype, &logits);
  const Tensor coefficients = empty(shape, accumulator_dtype(arguments.dtype), &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = symmetry_task(logits, labels, sample_weight, eps, options, temperature, ignore_index);
    task.total = results_of(loss);
    task.coefficients = results_of(coefficients);
    run_class_terms(task, logits);
    return {loss, coefficients};
  }
#endif
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    T* losses = mutable_data_of<T>(loss);
    auto* matrices = mutable_data_of<Accumulator<T>>(coefficients);
    for_each_problem(arguments.problems, arguments.samples * arguments.classes, [&](int64_t problem) {
      const auto matrix = problem_matrix(matrices, shape, problem);
      losses[problem] = narrow(forward_problem<T>(arguments, problem, options, eps, matrix, shape), T{});
    });
  });
  return {loss, coefficients};
}

template <typename T>
void backward_problem(const ConfusionArguments& arguments, int64_t problem, Absent absent, double factor,
                      const Matrix<const Accumulator<T>>& coefficients, T* grad_logits) {
  using Real = Accumulator<T>;
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Real>(problem);
  const std::vector<int64_t>& present = order.present;
  const std::vector<Chunk> chunks = order.chunks();
  const auto load_gradient = [&](int64_t label, Real* row) {
    load_coefficients(coefficients, present, arguments.classes, absent == Absent::ignore, label, row);
  };
  const auto class_scale = [&](int64_t label) { return factor * inverse_count(order.count(label)); };
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    backward_confusion(logits, order, chunks.data() + begin, chunks.data() + end, class_scale, load_gradient, grad_logits);
  });
  clear_ignored(order, grad_logits);
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight,
                [[maybe_unused]] double eps, StringHandle absent, StringHandle reduction, double temperature, int64_t ignore_index,
                const Tensor& coefficients) {
  const SymmetryOptions options(absent, reduction);
  const ConfusionArguments arguments(logits, labels, sample_weight, temperature, ignore_index);
  const Shape shape = coefficients_shape(arguments, options.absent);
  require_dtype(grad, arguments.dtype, "grad");
  require_shape(grad, reshaped(arguments.shape, 2, {}), "grad");
  const Tensor saved = dense(coefficients, shape, accumulator_dtype(arguments.dtype), "coefficients");
  const Tensor grad_logits = empty(arguments.shape, arguments.dtype, &logits);
#if defined(FK_WITH_CUDA)
  if (on_gpu(logits)) {
    ClassTask task = symmetry_task(logits, labels, sample_weight, eps, options, temperature, ignore_index);
    task.grad = class_operand(grad, 0);
    task.coefficients = const_cast<void*>(saved.const_data_ptr());
    run_class_gradient(task, logits, grad_logits);
    return grad_logits;
  }
#endif
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = arguments.samples * arguments.classes;
    for_each_problem(arguments.problems, size, [&](int64_t problem) {
      const double factor = widen(data_of<T>(grad)[grad_offset(problem)]) / temperature;
      const auto matrix = problem_matrix(data_of<Accumulator<T>>(saved), shape, problem);
      backward_problem(arguments, problem, options.absent, factor, matrix, mutable_data_of<T>(grad_logits) + problem * size);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_symmetry_loss_native(Tensor logits, Tensor labels, Tensor? sample_weight, float eps, str absent, str reduction, "
      "float temperature, int ignore_index) -> (Tensor loss, Tensor coefficients)");
  m.def(
      "_symmetry_loss_backward_native(Tensor grad, Tensor logits, Tensor labels, Tensor? sample_weight, float eps, str absent, "
      "str reduction, float temperature, int ignore_index, Tensor coefficients) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_symmetry_loss_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_symmetry_loss_backward_native", TORCH_BOX(&fairkernels::backward));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_symmetry_loss_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_symmetry_loss_backward_native", TORCH_BOX(&fairkernels::backward));
}
#endif
