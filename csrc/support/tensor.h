// Thin helpers over the stable-ABI tensor: checks, types, allocation, and where a problem of a batch starts.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/elements.h"

namespace fairkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  for (size_t i = 0; i < shape.size(); ++i) {
    text << (i == 0 ? "[" : ", ") << shape[i];
  }
  return text << (shape.empty() ? "[]" : "]");
}

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (!holds) {
    fail(parts...);
  }
}

// A string argument. Declared as std::string, every call would leak one: torch's own conversion (as of 2.13)
// copies it to the heap and returns a copy of the copy.
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* characters = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
  std::string taken(characters, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return taken;
}

inline int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return aoti_torch_dtype_float64();
    case Dtype::float32:
      return aoti_torch_dtype_float32();
    case Dtype::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::float16:
      return aoti_torch_dtype_float16();
    case Dtype::int64:
      return aoti_torch_dtype_int64();
    default:
      return aoti_torch_dtype_uint8();
  }
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  for (Dtype dtype : {Dtype::float32, Dtype::int64, Dtype::float64, Dtype::bfloat16, Dtype::float16, Dtype::byte}) {
    if (code == torch_dtype(dtype)) {
      return dtype;
    }
  }
  require(code == aoti_torch_dtype_bool(), name, " has a dtype that this kernel does not take");
  return Dtype::byte;
}

inline bool is_float(Dtype dtype) {
  return dtype != Dtype::int64 && dtype != Dtype::byte;
}

inline Dtype float_dtype_of(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  require(is_float(dtype), name, " must be a floating point tensor");
  return dtype;
}

inline Dtype accumulator_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline Shape strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return Shape(strides.begin(), strides.end());
}

inline void require_shape(const Tensor& tensor, const Shape& shape, const char* name) {
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(name, " must be ", shape, ", got ", shape_of(tensor));
  }
}

inline void require_dtype(const Tensor& tensor, Dtype dtype, const char* name) {
  require(dtype_of(tensor, name) == dtype, name, " has the wrong dtype");
}

// A kernel that is handed an address of elsewhere takes the process, or its GPU, along.
inline void require_device_of(const Tensor& first, const char* first_name, const Tensor& tensor, const char* name) {
  const bool same = tensor.is_cuda() == first.is_cuda() &&
                    (!first.is_cuda() || tensor.get_device_index() == first.get_device_index());
  require(same, name, " must be on the device of ", first_name);
}

// Of numbers that are not negative: sizes come from outside, and no tensor with a 0 among them is too large for torch.
inline int64_t checked_product(int64_t a, int64_t b) {
  require(a == 0 || b <= std::numeric_limits<int64_t>::max() / a, "more than 2^63 elements");
  return a * b;
}

inline int64_t product(const Shape& shape) {
  int64_t numel = 1;
  for (int64_t size : shape) {
    numel = checked_product(numel, size);
  }
  return numel;
}

// `shape` without its last `dropped` sizes, then `appended`.
inline Shape reshaped(const Shape& shape, int64_t dropped, std::initializer_list<int64_t> appended) {
  Shape result(shape.begin(), shape.end() - dropped);
  result.insert(result.end(), appended);
  return result;
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride = checked_product(stride, std::max<int64_t>(shape[i], 1));
  }
  return strides;
}

// Uninitialised, on the device of `beside` or, without one, on the CPU. The boxed torch::stable::new_empty costs 2 us
// more.
inline Tensor empty_strided(const Shape& shape, const Shape& strides, Dtype dtype, const Tensor* beside = nullptr) {
  const bool elsewhere = beside != nullptr && !beside->is_cpu();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), torch_dtype(dtype),
      elsewhere ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
      elsewhere ? beside->get_device_index() : 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Shape& shape, Dtype dtype, const Tensor* beside = nullptr) {
  return empty_strided(shape, contiguous_strides(shape), dtype, beside);
}

// A saved result as the backward reads it.
inline Tensor dense(const Tensor& tensor, const Shape& shape, Dtype dtype, const char* name) {
  require_dtype(tensor, dtype, name);
  require_shape(tensor, shape, name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Where the p-th problem of a batch starts, in elements: the last `inner` dimensions make up one problem.
class ProblemOffset {
 public:
  ProblemOffset(const Tensor& tensor, int64_t inner)
      : sizes_(tensor.sizes().begin(), tensor.sizes().end() - inner),
        strides_(tensor.strides().begin(), tensor.strides().end() - inner) {}

  int64_t operator()(int64_t problem) const {
    int64_t offset = 0;
    for (size_t i = sizes_.size(); i-- > 0;) {
      offset += problem % sizes_[i] * strides_[i];
      problem /= sizes_[i];
    }
    return offset;
  }

 private:
  Shape sizes_;
  Shape strides_;
};

}  // namespace fairkernels
