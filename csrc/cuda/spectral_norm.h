// What csrc/spectral_norm.cpp hands to the kernels of a GPU.
#pragma once

#include "cuda/problems.h"
#include "support/elements.h"
#include "support/iteration_math.h"

namespace fairkernels {

struct SpectralNormTask {
  int64_t problems;
  int64_t rows;
  int64_t columns;
  Dtype dtype;

  const void* matrix;
  int64_t row_stride;
  int64_t column_stride;
  Problems matrix_at;

  const void* start;  // a vector v, or null
  Dtype start_dtype;
  int64_t start_stride;
  Problems start_at;

  IterationOptions options;

  void* sigma;  // [problems] in the type of the matrix
  void* u;      // [problems, rows] in the type in which sums are kept
  void* v;      // [problems, columns], likewise

  void* scratch;  // what the kernels leave for each other, if anything
};

struct OuterProductTask {
  int64_t problems;
  int64_t rows;
  int64_t columns;
  Dtype dtype;
  const void* grad;
  Problems grad_at;
  const void* u;
  const void* v;
  void* out;
};

}  // namespace fairkernels

// How many doubles the scratch memory has.
extern "C" int64_t fk_spectral_norm_scratch(const fairkernels::SpectralNormTask* task);

extern "C" int fk_spectral_norm(const fairkernels::SpectralNormTask* task, void* stream);
extern "C" int fk_spectral_norm_backward(const fairkernels::OuterProductTask* task, void* stream);
