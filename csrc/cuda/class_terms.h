// What the operators on classified samples hand to the kernels of a GPU: soft_confusion, symmetry_loss, spectral_loss
// and fair_cross_entropy are four choices among the terms of one computation. Host and device, no torch.
#pragma once

#include <cstdint>

#include "cuda/problems.h"
#include "support/elements.h"
#include "support/iteration_math.h"
#include "support/platform.h"
#include "support/surrogate.h"

namespace fairkernels {

// What a confusion matrix is divided by: each row by the weight of its class, all by that of all samples, or nothing.
enum class Normalize { by_true_class, by_all, none };

// A matrix, a vector or a number of each problem; any strides, in elements.
struct ClassOperand {
  const void* data;  // null: there is none
  Dtype dtype;
  int64_t row_stride;
  int64_t stride;
  Problems at;
};

// A term that is not wanted is not computed; one of weight 0 is left out of the total. Results are contiguous, and null
// where nobody asks for them.
struct ClassTask {
  int64_t problems;
  int64_t samples;
  int classes;

  ClassOperand logits;         // [..., B, K]
  ClassOperand labels;         // [..., B], int64
  ClassOperand sample_weight;  // [..., B]
  ClassOperand weight;         // [..., K], of the cross-entropy
  ClassOperand class_weight;   // [..., K], of the rows of the surrogate's matrix
  ClassOperand start;          // [..., K], where the spectral iteration starts
  ClassOperand grad;           // backward: [...], of soft_confusion [..., K, K]; none: 1

  void* total;          // [...], in the type of the logits; all below in its accumulator
  void* cross_entropy;  // [...]
  void* symmetry;       // [...]
  void* spectral;       // [...]
  void* confusion;      // [..., K, K]
  bool confusion_as_logits;
  void* counts;        // [..., K]
  void* coefficients;  // [..., min(B, K), min(B, K) or K]
  void* u;             // [..., K]
  void* v;             // [..., K]
  void* gradient;      // backward: [..., B, K], in the type of the logits
  void* workspace;     // as many bytes as fk_class_terms_bytes() says, on 16 bytes

  int64_t ignore_index;
  double temperature;
  Normalize normalize;

  bool wants_cross_entropy;
  bool mean_of_samples;
  double ce_weight;
  double label_smoothing;

  bool wants_symmetry;
  bool mean_of_pairs;
  bool ignores_absent;
  double sym_weight;
  double eps;

  bool wants_spectral;
  bool divides_u;  // u, as it is kept, is divided by the samples of each class, or by all, as the backward wants it
  Surrogate surrogate;
  double margin;
  double spec_weight;
  IterationOptions iteration;
};

}  // namespace fairkernels

extern "C" int64_t fk_class_terms_bytes(const fairkernels::ClassTask* task);
extern "C" int64_t fk_class_gradient_bytes(const fairkernels::ClassTask* task);
extern "C" int fk_class_terms(const fairkernels::ClassTask* task, void* stream);
extern "C" int fk_class_gradient(const fairkernels::ClassTask* task, void* stream);
