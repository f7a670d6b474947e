// symmetry_gap: checks and glue. The mathematics is in support/pair_penalty.h, cpu/symmetry_gap.h and
// cuda/symmetry_gap.cuh.
#include "cpu/symmetry_gap.h"

#include <numeric>
#include <vector>

#include "cuda/symmetry_gap.h"
#include "support/gpu.h"
#include "support/gpu_problems.h"
#include "support/parallel.h"
#include "support/symmetry_options.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

class GapArguments {
 public:
  GapArguments(const Tensor& confusion, const OptionalTensor& counts, double eps, const SymmetryOptions& options)
      : dtype(float_dtype_of(confusion, "confusion")),
        shape(checked_shape(confusion)),
        classes(shape.back()),
        problems(product(reshaped(shape, 2, {}))),
        eps(eps),
        options(options),
        confusion_(confusion),
        counts_(counts),
        confusion_offset_(confusion, 2),
        counts_offset_(checked_counts(), counts ? 1 : 2) {}

  template <typename T>
  Matrix<const T> rates(int64_t problem) const {
    return {data_of<T>(confusion_) + confusion_offset_(problem), confusion_.stride(-2), confusion_.stride(-1)};
  }

  // 1 for the classes whose pairs are charged, 0 for the others.
  template <typename T>
  std::vector<Accumulator<T>> active(int64_t problem) const {
    std::vector<Accumulator<T>> active(classes, 1);
    if (options.absent == Absent::zero) {
      return active;
    }
    if (!counts_) {
      present_by_row_sum(rates<T>(problem), classes, active.data());
      return active;
    }
    with_float_type(float_dtype_of(*counts_, "counts"), [&](auto type) {
      const auto* counts = data_of<decltype(type)>(*counts_) + counts_offset_(problem);
      for (int64_t i = 0; i < classes; ++i) {
        active[i] = widen(counts[i * counts_->stride(-1)]) != 0;
      }
    });
    return active;
  }

  // Without what the backward has besides.
  SymmetryGapTask gpu_task() const {
    SymmetryGapTask task{};
    task.problems = problems;
    task.classes = classes;
    task.dtype = dtype;
    task.confusion = confusion_.const_data_ptr();
    task.row_stride = confusion_.stride(-2);
    task.column_stride = confusion_.stride(-1);
    task.confusion_at = problems_of(confusion_, 2);
    task.by_row = options.absent == Absent::ignore && !counts_;
    if (options.absent == Absent::ignore && counts_) {
      task.counts = counts_->const_data_ptr();
      task.counts_dtype = float_dtype_of(*counts_, "counts");
      task.count_stride = counts_->stride(-1);
      task.counts_at = problems_of(*counts_, 1);
    }
    task.eps = eps;
    task.mean = options.reduction == Reduction::mean;
    return task;
  }

  const Dtype dtype;
  const Shape shape;
  const int64_t classes;
  const int64_t problems;
  const double eps;
  const SymmetryOptions options;

 private:
  static Shape checked_shape(const Tensor& confusion) {
    Shape shape = shape_of(confusion);
    const bool square = shape.size() >= 2 && shape[shape.size() - 2] == shape.back();
    require(square, "confusion must be [..., K, K], got ", shape);
    return shape;
  }

  const Tensor& checked_counts() const {
    if (!counts_) {
      return confusion_;
    }
    float_dtype_of(*counts_, "counts");
    require_shape(*counts_, reshaped(shape, 1, {}), "counts");
    require_device_of(confusion_, "confusion", *counts_, "counts");
    return *counts_;
  }

  Tensor confusion_;
  OptionalTensor counts_;
  ProblemOffset confusion_offset_;
  ProblemOffset counts_offset_;
};

// What the sum over the pairs is multiplied by.
template <typename Real>
double reduction_scale(const GapArguments& arguments, const std::vector<Real>& active) {
  const double present = std::accumulate(active.begin(), active.end(), 0.0);
  return arguments.options.scale(present);
}

template <typename T>
double forward_problem(const GapArguments& arguments, int64_t problem) {
  using Real = Accumulator<T>;
  const auto rates = arguments.rates<T>(problem);
  const auto active = arguments.active<T>(problem);
  const Real eps = least_eps<Real>(arguments.eps);
  const double total = parallel_sum(tile_turns(arguments.classes), arguments.classes * kTile, [&](int64_t turn) {
    return turn_penalty(rates, arguments.classes, active.data(), eps, turn);
  });
  return total * reduction_scale(arguments, active);
}

#if defined(FK_WITH_CUDA)

// Calls launcher(task, stream) with memory for what blocks leave for each other.
template <typename Launcher>
void launch(SymmetryGapTask& task, bool sums, const Tensor& confusion, const Launcher& launcher) {
  const int64_t parts = fk_symmetry_gap_parts(&task);
  OptionalTensor part_sums;
  OptionalTensor row_sums;
  if (parts > 1 && sums) {
    part_sums = empty({task.problems, parts}, Dtype::float64, &confusion);
    task.sums = mutable_data_of<double>(*part_sums);
  }
  if (parts > 1 && task.by_row) {
    row_sums = empty({task.problems, task.classes}, accumulator_dtype(task.dtype), &confusion);
    task.row_sums = row_sums->mutable_data_ptr();
  }
  launch_on_device_of(confusion, [&](void* stream) { return launcher(&task, stream); });
}

#endif

Tensor forward(const Tensor& confusion, const OptionalTensor& counts, double eps, StringHandle absent,
               StringHandle reduction) {
  const SymmetryOptions options(absent, reduction);
  const GapArguments arguments(confusion, counts, eps, options);
  const Tensor gap = empty(reshaped(arguments.shape, 2, {}), arguments.dtype, &confusion);
#if defined(FK_WITH_CUDA)
  if (on_gpu(confusion)) {
    SymmetryGapTask task = arguments.gpu_task();
    task.out = gap.mutable_data_ptr();
    launch(task, true, confusion, fk_symmetry_gap);
    return gap;
  }
#endif
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = mutable_data_of<T>(gap);
    for_each_problem(arguments.problems, arguments.classes * arguments.classes,
                     [&](int64_t problem) { out[problem] = narrow(forward_problem<T>(arguments, problem), T{}); });
  });
  return gap;
}

template <typename T>
void backward_problem(const GapArguments& arguments, int64_t problem, double grad, T* grad_confusion) {
  using Real = Accumulator<T>;
  const auto rates = arguments.rates<T>(problem);
  const auto active = arguments.active<T>(problem);
  const Matrix<T> slopes{grad_confusion, arguments.classes, 1};
  const Real eps = least_eps<Real>(arguments.eps);
  const Real scale = static_cast<Real>(grad * reduction_scale(arguments, active));
  parallel_each(tile_turns(arguments.classes), arguments.classes * kTile, [&](int64_t turn) {
    turn_slopes(rates, arguments.classes, active.data(), eps, scale, turn, slopes);
  });
}

Tensor backward(const Tensor& grad, const Tensor& confusion, const OptionalTensor& counts, double eps,
                StringHandle absent, StringHandle reduction) {
  const SymmetryOptions options(absent, reduction);
  const GapArguments arguments(confusion, counts, eps, options);
  require_dtype(grad, arguments.dtype, "grad");
  require_shape(grad, reshaped(arguments.shape, 2, {}), "grad");
  const Tensor grad_confusion = empty(arguments.shape, arguments.dtype, &confusion);
#if defined(FK_WITH_CUDA)
  if (on_gpu(confusion)) {
    SymmetryGapTask task = arguments.gpu_task();
    task.grad = grad.const_data_ptr();
    task.grad_at = problems_of(grad, 0);
    task.out = grad_confusion.mutable_data_ptr();
    launch(task, false, confusion, fk_symmetry_gap_backward);
    return grad_confusion;
  }
#endif
  const ProblemOffset grad_offset(grad, 0);
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = arguments.classes * arguments.classes;
    for_each_problem(arguments.problems, size, [&](int64_t problem) {
      const double upstream = widen(data_of<T>(grad)[grad_offset(problem)]);
      backward_problem(arguments, problem, upstream, mutable_data_of<T>(grad_confusion) + problem * size);
    });
  });
  return grad_confusion;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def("_symmetry_gap_native(Tensor confusion, Tensor? counts, float eps, str absent, str reduction) -> Tensor");
  m.def(
      "_symmetry_gap_backward_native(Tensor grad, Tensor confusion, Tensor? counts, float eps, str absent, "
      "str reduction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_symmetry_gap_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_symmetry_gap_backward_native", TORCH_BOX(&fairkernels::backward));
}

#if defined(FK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fairkernels, CUDA, m) {
  m.impl("_symmetry_gap_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_symmetry_gap_backward_native", TORCH_BOX(&fairkernels::backward));
}
#endif
