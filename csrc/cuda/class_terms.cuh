// soft_confusion, symmetry_loss, spectral_loss and fair_cross_entropy: four choices among the terms of one computation.
// From logits and labels come sums by class, of probabilities, charges and losses, and from these the terms.
// Launches forward, of which one reads the logits: up to 64 classes, 32 in double, one (class_small.cuh; beyond 8,192
// samples, or 1,024 on GPUs without clusters, two). Beyond, those of class_sums.cuh, one as a rule; for the symmetry term
// one for its pairs; for the spectral one those of spectral_norm.cuh; and where there is more than a confusion matrix one
// for the terms (class_pairs.cuh). Backward one, and before it up to two that read labels (class_gradient.cuh).
#pragma once

#include "cuda/class_pairs.cuh"
#include "cuda/class_small.cuh"

namespace fairkernels {

template <typename Real>
int64_t class_terms_bytes(const ClassTask& task) {
  if (has_few_classes<Real>(task)) {
    return SmallWorkspace<Real>::bytes(task, small_shape<Real>(task));
  }
  return class_terms_large_bytes<Real>(task);
}

template <typename Real>
int launch_class_terms(const ClassTask& task, void* stream) {
  return has_few_classes<Real>(task) ? launch_class_terms_small<Real>(task, stream)
                                     : launch_class_terms_large<Real>(task, stream);
}

}  // namespace fairkernels
