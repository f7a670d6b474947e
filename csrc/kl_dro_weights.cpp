// kl_dro_weights: checks and glue. The mathematics is in cpu/kl_dro_weights.h.
#include "cpu/kl_dro_weights.h"

#include <vector>

#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

void load_problem(const Tensor& tensor, Dtype dtype, const ProblemOffset& offset, int64_t problem,
                  std::vector<double>& to) {
  with_float_type(dtype, [&](auto type) {
    load(data_of<decltype(type)>(tensor) + offset(problem), tensor.stride(-1), to.size(), to.data());
  });
}

Tensor forward(const Tensor& class_losses, const OptionalTensor& counts, double radius) {
  const Dtype dtype = float_dtype_of(class_losses, "class_losses");
  const Shape shape = shape_of(class_losses);
  require(!shape.empty() && shape.back() >= 1, "class_losses must be [..., K] with K >= 1, got ", shape);
  require(radius >= 0, "radius must be >= 0, got ", radius);
  const Tensor& beside = counts ? *counts : class_losses;
  const Dtype counts_dtype = float_dtype_of(beside, "counts");
  require_shape(beside, shape, "counts");
  const int64_t classes = shape.back();
  const Tensor weights = empty(shape, dtype);
  const ProblemOffset loss_offset(class_losses, 1);
  const ProblemOffset count_offset(beside, 1);
  parallel_ranges(product(reshaped(shape, 1, {})), 64 * classes, [&](int64_t begin, int64_t end) {
    DroWeights solve(classes);
    std::vector<double> losses(classes);
    std::vector<double> present(counts ? classes : 0);
    for (int64_t problem = begin; problem < end; ++problem) {
      load_problem(class_losses, dtype, loss_offset, problem, losses);
      load_problem(beside, counts_dtype, count_offset, problem, present);
      const double* solved = solve(losses.data(), counts ? present.data() : nullptr, radius);
      with_float_type(dtype, [&](auto type) {
        store_run(solved, classes, mutable_data_of<decltype(type)>(weights) + problem * classes);
      });
    }
  });
  return weights;
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def("_kl_dro_weights_native(Tensor class_losses, Tensor? counts, float radius) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_kl_dro_weights_native", TORCH_BOX(&fairkernels::forward));
}
