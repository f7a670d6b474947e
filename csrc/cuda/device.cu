// What the host asks of the runtime of the GPU.
#include "support/device.h"

extern "C" const char* fk_error_text(int code) {
  return fairkernels::device::error_text(code);
}
