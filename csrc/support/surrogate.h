// Which matrix of a batch's errors the spectral term is the norm of, see cpu/spectral_loss.h. Host and device.
#pragma once

namespace fairkernels {

enum class Surrogate { kl, kl_all, soft, gated };

}  // namespace fairkernels
