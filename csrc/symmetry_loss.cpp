// symmetry_loss: checks and glue. The mathematics is in cpu/symmetry_loss.h.
#include "cpu/symmetry_loss.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "support/confusion_arguments.h"
#include "support/parallel.h"
#include "support/symmetry_options.h"
#include "support/symmetry_terms.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

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
  const Tensor loss = empty(reshaped(arguments.shape, 2, {}), arguments.dtype);
  const Tensor coefficients = empty(shape, accumulator_dtype(arguments.dtype));
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

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight, double eps,
                StringHandle absent, StringHandle reduction, double temperature, int64_t ignore_index,
                const Tensor& coefficients) {
  (void)eps;  // already in the coefficients, as is the reduction
  const SymmetryOptions options(absent, reduction);
  const ConfusionArguments arguments(logits, labels, sample_weight, temperature, ignore_index);
  const Shape shape = coefficients_shape(arguments, options.absent);
  require_dtype(grad, arguments.dtype, "grad");
  require_shape(grad, reshaped(arguments.shape, 2, {}), "grad");
  require_dtype(coefficients, accumulator_dtype(arguments.dtype), "coefficients");
  require_shape(coefficients, shape, "coefficients");
  const Tensor dense = coefficients.is_contiguous() ? coefficients : torch::stable::contiguous(coefficients);
  const Tensor grad_logits = empty(arguments.shape, arguments.dtype);
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = arguments.samples * arguments.classes;
    for_each_problem(arguments.problems, size, [&](int64_t problem) {
      const double factor = widen(data_of<T>(grad)[grad_offset(problem)]) / temperature;
      const auto matrix = problem_matrix(data_of<Accumulator<T>>(dense), shape, problem);
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
