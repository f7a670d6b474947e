// The options that spectral_norm and spectral_loss share, and their start vectors.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/iteration.h"
#include "support/parallel.h"
#include "support/tensor.h"

namespace fairkernels {

inline IterationOptions take_iteration(StringHandle handle, std::optional<int64_t> iters, std::optional<double> tol,
                                       Dtype dtype) {
  const std::string method = take_string(handle);
  require(method == "locg" || method == "power", "method must be locg or power, got ", method);
  require(!iters || *iters >= 1, "iters must be >= 1");
  require(!tol || *tol >= 0, "tol must be >= 0");
  return iteration_options(method == "locg", dtype == Dtype::float64, iters.value_or(-1), tol.value_or(-1));
}

// The loops of the torch-free kernels, on several threads.
struct Threads {
  template <typename Function>
  void operator()(int64_t n, int64_t elements_each, const Function& function) const {
    parallel_ranges(n, elements_each, function);
  }
};

// One vector for each problem, of any floating type, perhaps none.
class SideVectors {
 public:
  SideVectors(const OptionalTensor& vectors, const Shape& shape, const char* name, const Tensor& first,
              const char* first_name)
      : vectors_(vectors) {
    if (vectors_) {
      dtype_ = float_dtype_of(*vectors_, name);
      require_shape(*vectors_, shape, name);
      require_device_of(first, first_name, *vectors_, name);
      offset_.emplace(*vectors_, 1);
    }
  }

  // Empty without one.
  Vector operator()(int64_t problem) const {
    if (!vectors_) {
      return {};
    }
    Vector loaded(vectors_->size(-1));
    with_float_type(dtype_, [&](auto type) {
      const auto* data = data_of<decltype(type)>(*vectors_) + (*offset_)(problem);
      load(data, vectors_->stride(-1), loaded.size(), loaded.data());
    });
    return loaded;
  }

 private:
  OptionalTensor vectors_;
  Dtype dtype_ = Dtype::float32;
  std::optional<ProblemOffset> offset_;
};

}  // namespace fairkernels
