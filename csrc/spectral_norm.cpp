// spectral_norm: checks and glue. The mathematics is in support/iteration_math.h, cpu/iteration.h, cpu/spectral_norm.h
// and, for a GPU, cuda/spectral_iteration.cuh and cuda/spectral_norm.cuh.
#include "cpu/spectral_norm.h"

#include <tuple>

#include "cuda/spectral_norm.h"
#include "support/gpu.h"
#include "support/gpu_problems.h"
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

#if defined(FK_WITH_CUDA)

void launch_forward(const Tensor& matrix, const OptionalTensor& start, const IterationOptions& options,
                    const Tensor& sigma, const Tensor& u, const Tensor& v) {
  require(matrix.size(-2) <= INT32_MAX && matrix.size(-1) <= INT32_MAX, "on a GPU a matrix may have at most 2^31 - 1 rows ",
          "and columns, got ", shape_of(matrix));
  SpectralNormTask task{};
  task.problems = sigma.numel();
  task.rows = matrix.size(-2);
  task.columns = matrix.size(-1);
  task.dtype = dtype_of(matrix, "matrix");
  task.matrix = matrix.const_data_ptr();
  task.row_stride = matrix.stride(-2);
  task.column_stride = matrix.stride(-1);
  task.matrix_at = problems_of(matrix, 2);
  if (start) {
    task.start = start->const_data_ptr();
    task.start_dtype = dtype_of(*start, "start");
    task.start_stride = start->stride(-1);
    task.start_at = problems_of(*start, 1);
  }
  task.options = options;
  task.sigma = sigma.mutable_data_ptr();
  task.u = u.mutable_data_ptr();
  task.v = v.mutable_data_ptr();
  OptionalTensor scratch;
  launch_on_device_of(matrix, [&](void* stream) {
    const int64_t doubles = fk_spectral_norm_scratch(&task);
    if (doubles > 0) {
      scratch = empty({doubles}, Dtype::float64, &matrix);
      task.scratch = scratch->mutable_data_ptr();
    }
    return fk_spectral_norm(&task, stream);
  });
}

#endif

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& matrix, const OptionalTensor& start, StringHandle method,
                                           std::optional<int64_t> iters, std::optional<double> tol) {
  const Dtype dtype = float_dtype_of(matrix, "matrix");
  const IterationOptions options = take_iteration(method, iters, tol, dtype);
  const Shape shape = matrix_shape(matrix);
  const int64_t columns = shape.back();
  const int64_t rows = shape[shape.size() - 2];
  const SideVectors starts(start, reshaped(shape, 2, {columns}), "start", matrix, "matrix");
  const Tensor sigma = empty(reshaped(shape, 2, {}), dtype, &matrix);
  const Tensor u = empty(reshaped(shape, 2, {rows}), accumulator_dtype(dtype), &matrix);
  const Tensor v = empty(reshaped(shape, 2, {columns}), accumulator_dtype(dtype), &matrix);
#if defined(FK_WITH_CUDA)
  if (on_gpu(matrix)) {
    launch_forward(matrix, start, options, sigma, u, v);
    return {sigma, u, v};
  }
#endif
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
  const Tensor grad_matrix = empty(shape, dtype, &matrix);
#if defined(FK_WITH_CUDA)
  if (on_gpu(matrix)) {
    OuterProductTask task{};
    task.problems = grad.numel();
    task.rows = rows;
    task.columns = columns;
    task.dtype = dtype;
    task.grad = grad.const_data_ptr();
    task.grad_at = problems_of(grad, 0);
    task.u = left.const_data_ptr();
    task.v = right.const_data_ptr();
    task.out = grad_matrix.mutable_data_ptr();
    launch_on_device_of(matrix, [&](void* stream) { return fk_spectral_norm_backward(&task, stream); });
    return grad_matrix;
  }
#endif
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

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_spectral_norm_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_spectral_norm_backward_native", TORCH_BOX(&fairkernels::backward));
}
#endif
