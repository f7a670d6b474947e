// What csrc/symmetry_gap.cpp hands to the kernels of a GPU.
#pragma once

#include "cuda/problems.h"
#include "support/elements.h"

namespace fairkernels {

struct SymmetryGapTask {
  int64_t problems;
  int64_t classes;
  Dtype dtype;

  const void* confusion;
  int64_t row_stride;
  int64_t column_stride;
  Problems confusion_at;

  // 0 for a class that is absent. Null: all are present or, if `by_row`, those with a row sum that is not 0.
  const void* counts;
  Dtype counts_dtype;
  int64_t count_stride;
  Problems counts_at;
  bool by_row;

  double eps;
  bool mean;

  const void* grad;  // of the backward
  Problems grad_at;
  void* out;         // the gap [problems] or, of the backward, its gradient [problems, K, K]

  // Where matrices are shared by several blocks.
  double* sums;    // of the forward [problems, parts]
  void* row_sums;  // if `by_row` [problems, K], in the type in which sums are kept
};

}  // namespace fairkernels

// Blocks that share a matrix.
extern "C" int64_t fk_symmetry_gap_parts(const fairkernels::SymmetryGapTask* task);

extern "C" int fk_symmetry_gap(const fairkernels::SymmetryGapTask* task, void* stream);
extern "C" int fk_symmetry_gap_backward(const fairkernels::SymmetryGapTask* task, void* stream);
