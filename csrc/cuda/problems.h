// Where the problems of a batch begin, whatever the strides of their leading dimensions. Host and device, no torch.
#pragma once

#include <cstdint>

#include "support/platform.h"

namespace fairkernels {

constexpr int kProblemDims = 8;  // neighbours that lie like one are joined: more would be an odd layout

struct Problems {
  int dims;
  int64_t sizes[kProblemDims];
  int64_t strides[kProblemDims];
};

// In elements.
FK_HOST_DEVICE inline int64_t offset_of(const Problems& problems, int64_t problem) {
  int64_t offset = 0;
  for (int d = problems.dims - 1; d > 0; --d) {
    const int64_t outwards = problem / problems.sizes[d];
    offset += (problem - outwards * problems.sizes[d]) * problems.strides[d];
    problem = outwards;
  }
  return offset + problem * problems.strides[0];
}

}  // namespace fairkernels
