// Images and the parameters broadcast over them, as kernels are handed them. Host and device, no torch.
#pragma once

#include <cstdint>

#include "support/elements.h"
#include "support/platform.h"

namespace fairkernels {

constexpr int kImageDims = 8;  // neighbours that lie like one are joined: more would be an odd layout

// Elements of all operands are numbered alike: dimensions from the outermost to the innermost in the memory of the
// result, the innermost cut into vectors of 16 bytes.
struct ImageShape {
  int dims;
  int64_t sizes[kImageDims];
  int64_t vectors_per_row;
};

struct ImageOperand {
  const void* data;  // null: one value for all
  double value;
  Dtype dtype;
  bool wide;  // whole vectors lie on 16 bytes
  int64_t sample_stride;
  int64_t strides[kImageDims];
};

}  // namespace fairkernels
