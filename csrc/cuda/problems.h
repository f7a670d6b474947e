// Where the problems of a batch begin, whatever the strides of their leading dimensions. No torch.
#pragma once

#include <cstdint>

namespace fairkernels {

constexpr int kProblemDims = 8;  // neighbours that lie like one are joined: more would be an odd layout

struct Problems {
  int dims;
  int64_t sizes[kProblemDims];
  int64_t strides[kProblemDims];
};

}  // namespace fairkernels
