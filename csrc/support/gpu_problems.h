// From tensors to the problems of a batch as the GPU's kernels find them.
#pragma once

#include "cuda/problems.h"
#include "support/tensor.h"

namespace fairkernels {

// The last `inner` dimensions make up one problem. Neighbours that lie like one are joined.
inline Problems problems_of(const Tensor& tensor, int64_t inner) {
  Problems problems{1, {1}, {0}};
  for (int64_t d = 0; d < tensor.dim() - inner; ++d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    const int last = problems.dims - 1;
    if (size == 1) {
      continue;
    }
    if (problems.sizes[last] == 1 || problems.strides[last] == size * stride) {
      problems.sizes[last] *= size;
      problems.strides[last] = stride;
      continue;
    }
    require(problems.dims < kProblemDims, "problems lie in memory in more than ", kProblemDims, " pieces of pieces");
    problems.sizes[problems.dims] = size;
    problems.strides[problems.dims++] = stride;
  }
  return problems;
}

}  // namespace fairkernels
