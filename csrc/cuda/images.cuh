// Vectors of 16 bytes of images, and the parameters that go with them.
#pragma once

#include <cstring>

#include "cuda/elements.cuh"
#include "cuda/images.h"
#include "support/device.h"

namespace fairkernels {

// Where a vector lies in each operand, and how many elements it has.
template <int kOperands>
struct VectorPlace {
  int64_t offset[kOperands];
  int count;
};

template <typename T, typename... Operands>
FK_DEVICE VectorPlace<sizeof...(Operands)> vector_place(const ImageShape& shape, int64_t sample, int64_t vector,
                                                        const Operands&... operands) {
  VectorPlace<sizeof...(Operands)> place;
  const int inner = shape.dims - 1;
  int64_t rest = inner > 0 ? vector / shape.vectors_per_row : 0;
  const int64_t column = (vector - rest * shape.vectors_per_row) * kVector<T>;
  const int64_t left = shape.sizes[inner] - column;
  place.count = left < kVector<T> ? static_cast<int>(left) : kVector<T>;
  int at = 0;
  ((place.offset[at++] = sample * operands.sample_stride + column * operands.strides[inner]), ...);
  for (int d = inner - 1; d >= 0; --d) {
    const int64_t outwards = rest / shape.sizes[d];
    const int64_t index = rest - outwards * shape.sizes[d];
    at = 0;
    ((place.offset[at++] += index * operands.strides[d]), ...);
    rest = outwards;
  }
  return place;
}

// A vector of an image; zeros behind its end.
template <typename T>
struct ImageVector {
  T element[kVector<T>];
};

template <typename T>
FK_DEVICE ImageVector<T> load_vector(const ImageShape& shape, const ImageOperand& image, int64_t offset, int count,
                                     bool again) {
  const T* from = static_cast<const T*>(image.data) + offset;
  ImageVector<T> vector{};
  if (image.wide && count == kVector<T>) {
    const device::Bytes16 bytes = again ? device::load16(from) : device::load16_once(from);
    memcpy(&vector, &bytes, sizeof(vector));
  } else {
    const int64_t stride = image.strides[shape.dims - 1];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < count) {
        vector.element[e] = from[e * stride];
      }
    }
  }
  return vector;
}

template <typename T>
FK_DEVICE void store_vector(const ImageShape& shape, const ImageOperand& image, int64_t offset, int count,
                            const ImageVector<T>& vector) {
  T* to = static_cast<T*>(const_cast<void*>(image.data)) + offset;
  if (image.wide && count == kVector<T>) {
    device::Bytes16 bytes;
    memcpy(&bytes, &vector, sizeof(bytes));
    device::store16_once(to, bytes);
  } else {
    const int64_t stride = image.strides[shape.dims - 1];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < count) {
        to[e * stride] = vector.element[e];
      }
    }
  }
}

template <typename Real>
FK_DEVICE Real parameter_at(const ImageOperand& parameter, int64_t offset) {
  return element_at<Real>(parameter.data, parameter.dtype, offset);
}

// A parameter of the elements of a vector: mostly one value.
template <typename Real, int kCount>
FK_DEVICE void load_parameter(const ImageShape& shape, const ImageOperand& parameter, int64_t offset, int count,
                              Real (&values)[kCount]) {
  if (parameter.data == nullptr) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      values[e] = static_cast<Real>(parameter.value);
    }
    return;
  }
  const int64_t stride = parameter.strides[shape.dims - 1];
  Real value = parameter_at<Real>(parameter, offset);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e > 0 && stride != 0 && e < count) {
      value = parameter_at<Real>(parameter, offset + e * stride);
    }
    values[e] = value;
  }
}

// A parameter of a whole sample.
FK_DEVICE double sample_parameter(const ImageOperand& parameter, int64_t sample) {
  return parameter.data == nullptr ? parameter.value : parameter_at<double>(parameter, sample * parameter.sample_stride);
}

FK_HOST_DEVICE inline int64_t vectors_of(const ImageShape& shape) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < shape.dims; ++d) {
    rows *= shape.sizes[d];
  }
  return rows * shape.vectors_per_row;
}

// --- who works on what

constexpr int kImageThreads = 256;   // a vector each
constexpr int kSampleThreads = 512;  // of a block that works on one sample, or on a part of it
constexpr int64_t kAlone = 16;       // most vectors of a thread of a block that has a sample for itself
constexpr int64_t kShared = 4;       // vectors of a thread of one that shares it
constexpr int64_t kMostParts = 64;

inline int64_t image_blocks(const ImageShape& shape) {
  return (vectors_of(shape) + kImageThreads - 1) / kImageThreads;
}

// Blocks that share a sample.
inline int64_t sample_parts(const ImageShape& shape) {
  const int64_t vectors = vectors_of(shape);
  if (vectors <= kSampleThreads * kAlone) {
    return 1;
  }
  const int64_t parts = (vectors + kSampleThreads * kShared - 1) / (kSampleThreads * kShared);
  return parts < kMostParts ? parts : kMostParts;
}

// The vectors [begin, end) of a sample that this block works on.
struct SamplePart {
  int64_t sample;
  int64_t begin;
  int64_t end;
};

FK_DEVICE SamplePart sample_part(const ImageShape& shape, int64_t parts) {
  const int64_t vectors = vectors_of(shape);
  const int64_t part = device::block() % parts;
  return {device::block() / parts, vectors * part / parts, vectors * (part + 1) / parts};
}

}  // namespace fairkernels
