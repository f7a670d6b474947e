// symmetry_loss: checks and glue. The mathematics is in cpu/symmetry_loss.h.
#include "cpu/symmetry_loss.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "support/confusion_arguments.h"
#include "support/parallel.h"
#include "support/symmetry_options.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

// One problem's coefficients dL/dC: a row for each class that occurs, in increasing order, and a column for each of
// those classes (absent classes ignored) or for every class (charged).
Shape coefficients_shape(const ConfusionArguments& arguments, Absent absent) {
  const int64_t rows = std::min(arguments.samples, arguments.classes);
  const int64_t columns = absent == Absent::ignore ? rows : arguments.classes;
  return reshaped(arguments.shape, 2, {rows, columns});
}

template <typename Real>
Matrix<Real> problem_matrix(Real* data, const Shape& shape, int64_t problem) {
  const int64_t rows = shape[shape.size() - 2];
  const int64_t columns = shape.back();
  return {data + problem * rows * columns, columns, 1};
}

// Pairs of present classes: replaces their rates by `scale` times the derivatives and returns the sum of the penalties.
template <typename Real>
double charge_present(const Matrix<Real>& matrix, int64_t present, Real eps, Real scale) {
  const std::vector<Real> active(present, 1);
  const Matrix<const Real> rates{matrix.data, matrix.row_stride, 1};
  return parallel_sum(tile_rows(present), present * kTile, [&](int64_t row) {
    return tile_row_slopes(rates, present, active.data(), eps, scale, row, matrix);
  });
}

// Pairs of a present and an absent class as well. Those of two present classes are worked on in a matrix of their own.
template <typename Real>
double charge_all(const Matrix<Real>& matrix, const std::vector<int64_t>& present, int64_t classes, Real eps,
                  Real scale) {
  const int64_t n = present.size();
  std::vector<Real> absent(classes, 1);
  std::vector<Real> square(n * n);
  for (int64_t label : present) {
    absent[label] = 0;
  }
  const double with_absent = parallel_sum(n, classes, [&](int64_t i) {
    Real* row = matrix.data + i * matrix.row_stride;
    gather(row, present, 1, &square[i * n]);
    return absent_pairs(row, absent.data(), classes, eps, scale);
  });
  const double among_present = charge_present(Matrix<Real>{square.data(), n, 1}, n, eps, scale);
  parallel_each(n, n, [&](int64_t i) { scatter(&square[i * n], present, matrix.data + i * matrix.row_stride); });
  return with_absent + among_present;
}

// 0, or NaN if a rate is: a NaN logit is never lost, also where its class has no partner.
template <typename Real>
double zero_or_nan(const Matrix<Real>& rates, const std::vector<int64_t>& present, bool compact) {
  double sum = 0;
  for (size_t i = 0; i < present.size(); ++i) {
    sum += rates.data[i * rates.row_stride + (compact ? i : present[i])];
  }
  return 0 * sum;
}

// What no present class uses of the matrix, memory being fresh.
template <typename Real>
void clear_unused(const Matrix<Real>& matrix, const Shape& shape, int64_t used_rows, int64_t used_columns) {
  const int64_t rows = shape[shape.size() - 2];
  const int64_t columns = shape.back();
  for (int64_t i = 0; i < rows; ++i) {
    Real* row = matrix.data + i * columns;
    std::fill(row + (i < used_rows ? used_columns : 0), row + columns, Real(0));
  }
}

template <typename T>
double forward_problem(const ConfusionArguments& arguments, int64_t problem, const SymmetryOptions& options, double eps,
                       const Matrix<Accumulator<T>>& matrix, const Shape& shape) {
  using Real = Accumulator<T>;
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Real>(problem);
  const std::vector<int64_t> present = present_classes(order);
  const int64_t n = present.size();
  const bool compact = options.absent == Absent::ignore;
  clear_unused(matrix, shape, n, compact ? n : arguments.classes);
  parallel_ranges(n, arguments.samples + arguments.classes,
                  [&](int64_t begin, int64_t end) { rate_rows(logits, order, present, compact, begin, end, matrix); });
  const double poison = zero_or_nan(matrix, present, compact);
  const double scale = options.scale(compact ? n : arguments.classes);
  const double total =
      compact ? charge_present(matrix, n, static_cast<Real>(eps), static_cast<Real>(scale))
              : charge_all(matrix, present, arguments.classes, static_cast<Real>(eps), static_cast<Real>(scale));
  return total * scale + poison;
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight,
                                   double eps, StringHandle absent, StringHandle reduction, double temperature,
                                   int64_t ignore_index) {
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

// What w_b times the coefficients of a class are multiplied by in the gradient by its samples' logits.
std::vector<double> class_scales(const std::vector<double>& counts, double factor) {
  std::vector<double> scales(counts.size());
  std::transform(counts.begin(), counts.end(), scales.begin(), [=](double n) { return factor * inverse_count(n); });
  return scales;
}

template <typename T>
void backward_problem(const ConfusionArguments& arguments, int64_t problem, Absent absent, double factor,
                      const Matrix<const Accumulator<T>>& coefficients, T* grad_logits) {
  using Real = Accumulator<T>;
  const int64_t classes = arguments.classes;
  const auto logits = arguments.logits<T>(problem);
  const auto order = arguments.order<Real>(problem);
  const std::vector<int64_t> present = present_classes(order);
  const std::vector<double> scales = class_scales(order.count, factor);
  const std::vector<Chunk> chunks = order.chunks();
  // Rows are made dense, zeros for absent classes: gathering probabilities in the inner loops costs more.
  const auto load_gradient = [&](int64_t label, Real* row) {
    std::fill(row, row + classes, Real(0));
    const auto at = std::lower_bound(present.begin(), present.end(), label);
    if (at == present.end() || *at != label) {
      return;
    }
    const Real* stored = coefficients.data + (at - present.begin()) * coefficients.row_stride;
    if (absent == Absent::zero) {
      std::copy_n(stored, classes, row);
    } else {
      scatter(stored, present, row);
    }
  };
  parallel_ranges(chunks.size(), order.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    backward_chunks(logits, order, chunks.data() + begin, chunks.data() + end, scales.data(), load_gradient,
                    grad_logits);
  });
  clear_ignored(order, grad_logits);
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const OptionalTensor& sample_weight,
                double /*eps, in the coefficients*/, StringHandle absent, StringHandle reduction, double temperature,
                int64_t ignore_index, const Tensor& coefficients) {
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
      backward_problem(arguments, problem, options.absent, factor, matrix,
                       mutable_data_of<T>(grad_logits) + problem * size);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_symmetry_loss_native(Tensor logits, Tensor labels, Tensor? sample_weight, float eps, str absent, "
      "str reduction, float temperature, int ignore_index) -> (Tensor loss, Tensor coefficients)");
  m.def(
      "_symmetry_loss_backward_native(Tensor grad, Tensor logits, Tensor labels, Tensor? sample_weight, float eps, "
      "str absent, str reduction, float temperature, int ignore_index, Tensor coefficients) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_symmetry_loss_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_symmetry_loss_backward_native", TORCH_BOX(&fairkernels::backward));
}
