// What csrc/pgd_step.cpp hands to the kernels of a GPU.
#pragma once

#include "cuda/images.h"

namespace fairkernels {

struct PgdStepTask {
  ImageShape shape;  // of a sample for l2, of everything for linf
  int64_t samples;   // 1 for linf
  ImageOperand x_adv;
  ImageOperand grad;
  ImageOperand x;
  ImageOperand alpha;
  ImageOperand eps;
  ImageOperand low;
  ImageOperand high;
  ImageOperand mask;
  ImageOperand out;
  double direction;  // +1 up the gradient, -1 down
  double* sums;      // l2, where samples are shared by several blocks: [samples, parts, 3]
};

}  // namespace fairkernels

// Blocks that share a sample.
extern "C" int64_t fk_pgd_step_l2_parts(const fairkernels::ImageShape* shape);

extern "C" int fk_pgd_step_linf(const fairkernels::PgdStepTask* task, void* stream);
extern "C" int fk_pgd_step_l2(const fairkernels::PgdStepTask* task, void* stream);
