// Confusional spectral regularisation (arXiv 2501.13273), its Sy-FAR baseline "kl-all", and CAR's "gated" (2603.16732): what
// one sample adds to the row of its class, and the gradient by its logits.
#pragma once

#include <cstdint>

#include "cpu/softmax.h"
#include "support/platform.h"

namespace fairkernels {

enum class Surrogate { kl, kl_all, soft, gated };

// "kl": a sample's one entry. `column` is -1 where no class comes within the margin; a NaN logit gives a NaN charge.
struct Rival {
  int64_t column;
  double charge;
};

}  // namespace fairkernels
