// From tensors to the operands of the GPU's kernels over images.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/strided.h"
#include "cuda/images.h"
#include "support/operands.h"
#include "support/tensor.h"

namespace fairkernels {

// Collects the operands, which have been checked, and joins the dimensions that lie like one in all of them.
class GpuImages {
 public:
  GpuImages(const Tensor& x, Norm norm, const Shape& result_strides)
      : shape_(shape_of(x)),
        leading_(norm == Norm::l2 ? 1 : 0),
        order_(memory_order(Dims(result_strides.begin() + leading_, result_strides.end()))) {}

  void image(const Tensor& tensor, ImageOperand& operand) {
    add(strides_of(tensor), tensor.const_data_ptr(), dtype_of(tensor, "image"), operand);
  }

  void parameter(const OptionalTensor& tensor, double value, ImageOperand& operand) {
    operand.value = value;
    if (!tensor) {
      add(Shape(shape_.size(), 0), nullptr, Dtype::float64, operand);
      return;
    }
    Shape strides = strides_of(*tensor);
    for (size_t d = 0; d < strides.size(); ++d) {
      strides[d] = tensor->size(d) == 1 ? 0 : strides[d];
    }
    add(strides, tensor->const_data_ptr(), dtype_of(*tensor, "parameter"), operand);
  }

  // An element's number in row-major order takes part like an operand.
  void numbers(ImageOperand& operand) { add(contiguous_strides(shape_), nullptr, Dtype::float64, operand); }

  int64_t samples() const { return leading_ == 1 ? shape_[0] : 1; }

  // After the last operand.
  ImageShape shape(int64_t vector) {
    ImageShape joined{1, {1}, 0};
    bool first = true;
    for (size_t d : order_) {
      const int64_t size = shape_[leading_ + d];
      if (size == 1) {
        continue;
      }
      const int last = joined.dims - 1;
      if (!first && joins(last, size, d)) {
        joined.sizes[last] *= size;
      } else {
        require(first || joined.dims < kImageDims, "x lies in memory in more than ", kImageDims, " pieces of pieces");
        joined.dims += first ? 0 : 1;
        joined.sizes[joined.dims - 1] = size;
      }
      for (auto& [operand, strides] : operands_) {
        operand->strides[joined.dims - 1] = strides[leading_ + d];
      }
      first = false;
    }
    joined.vectors_per_row = (joined.sizes[joined.dims - 1] + vector - 1) / vector;
    for (auto& [operand, strides] : operands_) {
      operand->wide = lies_wide(*operand, joined.dims, vector);
    }
    return joined;
  }

 private:
  void add(const Shape& strides, const void* data, Dtype dtype, ImageOperand& operand) {
    operand.data = data;
    operand.dtype = dtype;
    operand.sample_stride = leading_ == 1 && !strides.empty() ? strides[0] : 0;
    operand.strides[0] = 1;  // where all dimensions are of size 1
    operands_.emplace_back(&operand, strides);
  }

  bool joins(int outer, int64_t inner_size, size_t inner) const {
    for (const auto& [operand, strides] : operands_) {
      if (operand->strides[outer] != strides[leading_ + inner] * inner_size) {
        return false;
      }
    }
    return true;
  }

  bool lies_wide(const ImageOperand& operand, int dims, int64_t vector) const {
    bool wide = operand.strides[dims - 1] == 1 && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
    for (int d = 0; d + 1 < dims; ++d) {
      wide = wide && operand.strides[d] % vector == 0;
    }
    return wide && (samples() == 1 || operand.sample_stride % vector == 0);
  }

  Shape shape_;
  size_t leading_;
  std::vector<size_t> order_;
  std::vector<std::pair<ImageOperand*, Shape>> operands_;
};

}  // namespace fairkernels
