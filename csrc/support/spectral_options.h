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

// A saved result as the backward reads it.
inline Tensor dense(const Tensor& tensor, const Shape& shape, Dtype dtype, const char* name) {
  require_dtype(tensor, dtype, name);
  require_shape(tensor, shape, name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The loops of the torch-free kernels, on several threads.
struct Threads {
  template <typename Function>
  void operator()(int64_t n, int64_t elements_each, const Function& function) const {
    parallel_ranges(n, elements_each, function);
  }
};

// The directions, perhaps absent, from which the problems' iterations start.
class Starts {
 public:
  Starts(const OptionalTensor& start, const Shape& shape) : start_(start) {
    if (start_) {
      float_dtype_of(*start_, "start");
      require_shape(*start_, shape, "start");
      offset_.emplace(*start_, 1);
    }
  }

  // Empty, and then data() null, without one.
  Vector operator()(int64_t problem) const {
    if (!start_) {
      return {};
    }
    Vector loaded(start_->size(-1));
    with_float_type(float_dtype_of(*start_, "start"), [&](auto type) {
      const auto* data = data_of<decltype(type)>(*start_) + (*offset_)(problem);
      load(data, start_->stride(-1), loaded.size(), loaded.data());
    });
    return loaded;
  }

 private:
  OptionalTensor start_;
  std::optional<ProblemOffset> offset_;
};

}  // namespace fairkernels
