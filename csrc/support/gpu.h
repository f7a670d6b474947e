// Where the kernels of a call run: on the CPU, or on a GPU, on its current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "support/tensor.h"

#if defined(FK_WITH_CUDA)
extern "C" const char* fk_error_text(int code);

// A torch without CUDA lacks it. It is asked for only where a tensor lies on a GPU.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fairkernels {

// tests/cuda_on_cpu runs the kernels of the GPU on tensors of the CPU.
#if defined(FK_CUDA_ON_CPU)
constexpr bool kCudaOnCpu = true;
#else
constexpr bool kCudaOnCpu = false;
#endif

#if defined(FK_WITH_CUDA)

inline bool on_gpu(const Tensor& tensor) {
  return kCudaOnCpu || tensor.is_cuda();
}

// Calls launcher(stream) with the tensor's device as the current one; an error of a launch is raised.
template <typename Launcher>
void launch_on_device_of(const Tensor& tensor, const Launcher& launcher) {
  int code = 0;
  if (kCudaOnCpu) {
    code = launcher(nullptr);
  } else {
    require(&aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    const int32_t index = tensor.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    code = launcher(stream);
  }
  if (code != 0) {
    fail("a CUDA kernel could not be launched: ", fk_error_text(code));
  }
}

#else

inline bool on_gpu(const Tensor&) {
  return false;
}

#endif

}  // namespace fairkernels
