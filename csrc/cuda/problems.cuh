// Where a problem of a batch begins.
#pragma once

#include "cuda/problems.h"
#include "support/device.h"

namespace fairkernels {

// In elements.
FK_DEVICE int64_t offset_of(const Problems& problems, int64_t problem) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = problems.dims - 1; d > 0; --d) {
    const int64_t outwards = problem / problems.sizes[d];
    offset += (problem - outwards * problems.sizes[d]) * problems.strides[d];
    problem = outwards;
  }
  return offset + problem * problems.strides[0];
}

// Memory that is handed out piece by piece. There may be none yet, to learn how much is needed.
struct Workspace {
  void* memory;
  int64_t bytes = 0;  // that have been handed out

  template <typename Number>
  FK_HOST_DEVICE Number* take(int64_t count) {
    Number* taken = reinterpret_cast<Number*>(reinterpret_cast<uintptr_t>(memory) + bytes);
    bytes += count * static_cast<int64_t>(sizeof(Number));
    return taken;
  }
};

}  // namespace fairkernels
