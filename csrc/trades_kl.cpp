// trades_kl: checks and glue. The mathematics is in cpu/trades_kl.h.
#include "cpu/trades_kl.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {
namespace {

enum class Reduction { batchmean, sum, none };

Reduction take_reduction(StringHandle handle) {
  const std::string name = take_string(handle);
  const bool known = name == "batchmean" || name == "sum" || name == "none";
  require(known, "reduction must be batchmean, sum or none, got ", name);
  return name == "batchmean" ? Reduction::batchmean : name == "sum" ? Reduction::sum : Reduction::none;
}

// Both logits, checked, problem by problem.
struct Arguments {
  Dtype dtype;
  Shape shape;
  int64_t problems;
  int64_t samples;
  int64_t classes;
  Reduction reduction;

  Arguments(const Tensor& natural, const Tensor& adversarial, StringHandle reduction_name)
      : reduction(take_reduction(reduction_name)), natural_(natural), adversarial_(adversarial) {
    dtype = float_dtype_of(natural, "natural_logits");
    shape = shape_of(natural);
    const bool fits = shape.size() >= 2 && shape.back() >= 1;
    require(fits, "natural_logits must be [..., B, K] with K >= 1, got ", shape);
    require_dtype(adversarial, dtype, "adversarial_logits");
    require_shape(adversarial, shape, "adversarial_logits");
    problems = product(reshaped(shape, 2, {}));
    samples = shape[shape.size() - 2];
    classes = shape.back();
  }

  Shape result_shape() const { return reshaped(shape, reduction == Reduction::none ? 1 : 2, {}); }
  int64_t results_each() const { return reduction == Reduction::none ? samples : 1; }
  double divisor() const { return reduction == Reduction::batchmean ? std::max<int64_t>(samples, 1) : 1; }

  // Calls function(tiles, natural, adversarial, first, n) for tiles [begin, end) of a problem.
  template <typename T, typename Function>
  void for_each_tile(int64_t problem, const Function& function) const {
    const Rows<const T> natural = rows<T>(natural_, problem);
    const Rows<const T> adversarial = rows<T>(adversarial_, problem);
    const bool across = rows_lie_across(samples, classes);
    const int64_t each = across ? 1 : kLanes;
    parallel_ranges((samples + each - 1) / each, each * classes, [&](int64_t begin, int64_t end) {
      LogitTiles<T> tiles(classes, across);
      for (int64_t first = begin * each; first < std::min(end * each, samples); first += each) {
        const int64_t n = std::min(each, samples - first);
        function(tiles, tiles.load(natural, adversarial, first, n), first, n);
      }
    });
  }

 private:
  template <typename T>
  static Rows<const T> rows(const Tensor& logits, int64_t problem) {
    return {data_of<T>(logits) + ProblemOffset(logits, 2)(problem), logits.stride(-2), logits.stride(-1)};
  }

  const Tensor& natural_;
  const Tensor& adversarial_;
};

Tensor forward(const Tensor& natural, const Tensor& adversarial, StringHandle reduction_name) {
  const Arguments arguments(natural, adversarial, reduction_name);
  const Tensor result = empty(arguments.result_shape(), arguments.dtype);
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    T* results = mutable_data_of<T>(result);
    for_each_problem(arguments.problems, arguments.samples * arguments.classes, [&](int64_t problem) {
      std::vector<double> rows(arguments.samples);
      arguments.for_each_tile<T>(problem, [&](const auto& tiles, const auto& tile, int64_t first, int64_t n) {
        double lanes[kLanes];
        divergence(tile, tiles.across(), lanes);
        std::copy_n(lanes, n, rows.data() + first);
      });
      T* to = results + problem * arguments.results_each();
      if (arguments.reduction == Reduction::none) {
        std::transform(rows.begin(), rows.end(), to, [](double row) { return narrow(row, T{}); });
      } else {
        *to = narrow(std::accumulate(rows.begin(), rows.end(), 0.0) / arguments.divisor(), T{});
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& natural, const Tensor& adversarial,
                                    StringHandle reduction_name) {
  const Arguments arguments(natural, adversarial, reduction_name);
  require_dtype(grad, arguments.dtype, "grad");
  require_shape(grad, arguments.result_shape(), "grad");
  const Tensor by_natural = empty(arguments.shape, arguments.dtype);
  const Tensor by_adversarial = empty(arguments.shape, arguments.dtype);
  const bool each = arguments.reduction == Reduction::none;
  const ProblemOffset grad_offset(grad, each ? 1 : 0);
  const int64_t grad_stride = each ? grad.stride(-1) : 0;
  with_float_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    const int64_t size = arguments.samples * arguments.classes;
    for_each_problem(arguments.problems, size, [&](int64_t problem) {
      const T* upstream = data_of<T>(grad) + grad_offset(problem);
      arguments.for_each_tile<T>(problem, [&](const auto& tiles, const auto& tile, int64_t first, int64_t n) {
        Real slope[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          const int64_t row = first + std::min(j, n - 1);  // across a row all lanes have the same
          slope[j] = static_cast<Real>(widen(upstream[row * grad_stride]) / arguments.divisor());
        }
        slopes(tile, tiles.across(), slope);
        tiles.store(tile.natural, first, n, mutable_data_of<T>(by_natural) + problem * size);
        tiles.store(tile.adversarial, first, n, mutable_data_of<T>(by_adversarial) + problem * size);
      });
    });
  });
  return {by_natural, by_adversarial};
}

}  // namespace
}  // namespace fairkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fairkernels, m) {
  m.def("_trades_kl_native(Tensor natural_logits, Tensor adversarial_logits, str reduction) -> Tensor");
  m.def(
      "_trades_kl_backward_native(Tensor grad, Tensor natural_logits, Tensor adversarial_logits, str reduction) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fairkernels, CPU, m) {
  m.impl("_trades_kl_native", TORCH_BOX(&fairkernels::forward));
  m.impl("_trades_kl_backward_native", TORCH_BOX(&fairkernels::backward));
}
