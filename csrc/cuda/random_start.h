// What csrc/random_start.cpp hands to the kernels of a GPU.
#pragma once

#include "cuda/images.h"

namespace fairkernels {

struct RandomStartTask {
  ImageShape shape;  // of a sample for l2, of everything for linf
  int64_t samples;   // 1 for linf
  int64_t elements;  // of a sample
  ImageOperand x;
  ImageOperand eps;
  ImageOperand low;
  ImageOperand high;
  ImageOperand numbers;  // of the elements, row-major; no data
  ImageOperand out;
  uint64_t seed;
  double* sums;  // l2, where samples are shared by several blocks: [samples, parts]
};

}  // namespace fairkernels

// Blocks that share a sample.
extern "C" int64_t fk_random_start_l2_parts(const fairkernels::ImageShape* shape);

extern "C" int fk_random_start_linf(const fairkernels::RandomStartTask* task, void* stream);
extern "C" int fk_random_start_l2(const fairkernels::RandomStartTask* task, void* stream);
