// From tensors to the operands of an elementwise kernel over images.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "cpu/strided.h"
#include "support/tensor.h"

namespace fairkernels {

enum class Norm { linf, l2 };

inline Norm take_norm(StringHandle handle) {
  const std::string name = take_string(handle);
  require(name == "linf" || name == "l2", "norm must be linf or l2, got ", name);
  return name == "linf" ? Norm::linf : Norm::l2;
}

// The images' shape and the order in which their elements are visited: all of them together for linf, sample by sample,
// the first dimension, for l2.
class ImageWalk {
 public:
  ImageWalk(const Tensor& x, Norm norm, bool row_major, const Shape& result_strides)
      : x_(x), shape_(shape_of(x)), leading_(norm == Norm::l2 ? 1 : 0) {
    require(shape_.size() <= kMaxDims, "x has too many dimensions");
    require(static_cast<int64_t>(shape_.size()) >= leading_, "x must be [N, ...] for the l2 norm, got ",
            shape_);
    const Dims strides(result_strides.begin() + leading_, result_strides.end());
    order_ = row_major ? row_major_order(strides.size()) : memory_order(strides);
  }

  int64_t samples() const { return leading_ == 1 ? shape_[0] : 1; }
  int64_t elements() const { return product(Dims(shape_.begin() + leading_, shape_.end())); }
  int64_t chunks() const { return (elements() + kChunk - 1) / kChunk; }

  Source image(const Tensor& tensor, Dtype dtype, const char* name) const {
    require_dtype(tensor, dtype, name);
    require_shape(tensor, shape_, name);
    require_device_of(x_, "x", tensor, name);
    return source(tensor, dtype);
  }

  Sink result(const Tensor& tensor, Dtype dtype) const {
    require_dtype(tensor, dtype, "out");
    require_shape(tensor, shape_, "out");
    require_device_of(x_, "x", tensor, "out");
    const Shape strides = strides_of(tensor);
    const bool empty = tensor.numel() == 0;
    for (size_t d = 0; d < shape_.size(); ++d) {
      require(empty || shape_[d] == 1 || strides[d] != 0, "out must not be expanded: its elements would share memory");
    }
    return Sink(tensor.mutable_data_ptr(), walk(strides), sample_stride(strides));
  }

  // A parameter of as many dimensions as the images, each of size 1 or theirs; null without one.
  std::unique_ptr<Source> parameter(const OptionalTensor& tensor, const char* name) const {
    if (!tensor) {
      return nullptr;
    }
    const Dtype dtype = dtype_of(*tensor, name);
    require(dtype != Dtype::int64, name, " must be a floating point tensor");
    require_broadcasts(shape_of(*tensor), name);
    require_device_of(x_, "x", *tensor, name);
    return std::make_unique<Source>(source(*tensor, dtype));
  }

  std::unique_ptr<Source> per_sample_parameter(const OptionalTensor& tensor, const char* name) const {
    if (tensor && leading_ == 1) {
      const bool one_each = tensor->dim() >= 1 && tensor->numel() == tensor->size(0);
      require(one_each, name, " must hold one value for each sample, got ", shape_of(*tensor));
    }
    return parameter(tensor, name);
  }

 private:
  void require_broadcasts(const Shape& sizes, const char* name) const {
    bool fits = sizes.size() == shape_.size();
    for (size_t d = 0; fits && d < sizes.size(); ++d) {
      fits = sizes[d] == 1 || sizes[d] == shape_[d];
    }
    require(fits, name, " ", sizes, " does not broadcast to ", shape_);
  }

  Source source(const Tensor& tensor, Dtype dtype) const {
    Shape strides = strides_of(tensor);
    for (size_t d = 0; d < shape_.size(); ++d) {
      strides[d] = tensor.size(d) == 1 ? 0 : strides[d];
    }
    return Source(tensor.const_data_ptr(), dtype, walk(strides), sample_stride(strides));
  }

  Walk walk(const Shape& strides) const {
    return Walk(Dims(shape_.begin() + leading_, shape_.end()), Dims(strides.begin() + leading_, strides.end()), order_);
  }

  int64_t sample_stride(const Shape& strides) const { return leading_ == 1 ? strides[0] : 0; }

  Tensor x_;
  Shape shape_;
  int64_t leading_;
  std::vector<size_t> order_;
};

}  // namespace fairkernels
