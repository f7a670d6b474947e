// spectral_norm: checks and glue. The mathematics is in cpu/spectral_norm.h and cpu/iteration.h.
#include "cpu/spectral_norm.h"

#include <tuple>

#include "support/parallel.h"
#include "support/spectral_options.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

Shape matrix_shape(const Tensor& matrix) {
  Shape shape = shape_of(matrix);
  require(shape.size() >= 2, "matrix must be [..., M, N], got ", shape);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& matrix, const OptionalTensor& start, StringHandle method,
                                           std::optional<int64_t> iters, std::optional<double> tol) {
  const Dtype dtype = float_dtype_of(matrix, "matrix");
  const IterationOptions options = take_iteration(method, iters, tol, dtype);
  const Shape shape = matrix_shape(matrix);
  const int64_t columns = shape.back();
  const int64_t rows = shape[shape.size() - 2];
  const SideVectors starts(start, reshaped(shape, 2, {columns}), "start");
  const Tensor sigma = empty(reshaped(shape, 2, {}), dtype);
  const Tensor u = empty(reshaped(shape, 2, {rows}), accumulator_dtype(dtype));
  const Tensor v = empty(reshaped(shape, 2, {columns}), accumulator_dtype(dtype));
  const ProblemOffset offset(matrix, 2);
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    for_each_problem(product(reshaped(shape, 2, {})), rows * columns, [&](int64_t problem) {
      const Vector hint = starts(problem);
      const T* data = data_of<T>(matrix) + offset(problem);
      const LeadingPair pair = leading_pair(data, rows, columns, matrix.stride(-2), matrix.stride(-1), options,
                                            hint.empty() ? nullptr : hint.data(), Threads{});
      mutable_data_of<T>(sigma)[problem] = narrow(pair.sigma, T{});
      std::copy(pair.u.begin(), pair.u.end(), mutable_data_of<Real>(u) + problem * rows);
      std::copy(pair.v.begin(), pair.v.end(), mutable_data_of<Real>(v) + problem * columns);
    });
  });
  return {sigma, u, v};
}

template <typename T, typename Real>
void outer_product(double factor, const Real* u, const Real* v, int64_t rows, int64_t columns, T* out) {
  parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) {
    std::vector<Real> row(columns);
    for (int64_t i = begin; i < end; ++i) {
      const Real scale = static_cast<Real>(factor * u[i]);
      std::transform(v, v + columns, row.begin(), [=](Real x) { return scale * x; });
      store_run(row.data(), columns, out + i * columns);
    }
  });
}

Tensor backward(const Tensor& grad, const Tensor& matrix, const OptionalTensor& start, StringHandle method,
                std::optional<int64_t> iters, std::optional<double> tol, const Tensor& u, const Tensor& v) {
  (void)start;
  const Dtype dtype = float_dtype_of(matrix, "matrix");
  take_iteration(method, iters, tol, dtype);
  const Shape shape = matrix_shape(matrix);
  const int64_t columns = shape.back();
  const int64_t rows = shape[shape.size() - 2];
  require_dtype(grad, dtype, "grad");
  require_shape(grad, reshaped(shape, 2, {}), "grad");
  const Tensor left = dense(u, reshaped(shape, 2, {rows}), accumulator_dtype(dtype), "u");
  const Tensor right = dense(v, reshaped(shape, 2, {columns}), accumulator_dtype(dtype), "v");
  const Tensor grad_matrix = empty(shape, dtype);
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    for_each_problem(product(reshaped(shape, 2, {})), rows * columns, [&](int64_t problem) {
      const double factor = widen(data_of<T>(grad)[grad_offset(problem)]);
      outer_product(factor, data_of<Real>(left) + problem * rows, data_of<Real>(right) + problem * columns, rows, columns,
                    mutable_data_of<T>(grad_matrix) + problem * rows * columns);
    });
  });
  return grad_matrix;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def(
      "_spectral_norm_native(Tensor matrix, Tensor? start, str method, int? iters, float? tol) "
      "-> (Tensor sigma, Tensor u, Tensor v)");
  m.def(
      "_spectral_norm_backward_native(Tensor grad, Tensor matrix, Tensor? start, str method, int? iters, float? tol, "
      "Tensor u, Tensor v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_spectral_norm_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_spectral_norm_backward_native", TORCH_BOX(&fairkernels::backward));
}
