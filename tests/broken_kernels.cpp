// Kernels that are wrong on purpose, one by name: prints what the stand-in for the GPU says of it.
#include <cstdio>
#include <string>

#include "cuda/reduce.cuh"
#include "support/device.h"

namespace fairkernels {

using device::kAllLanes;

using Row = float[32];

FK_KERNEL(64) right(float* out) {
  out[device::thread()] = block_sum(static_cast<float>(device::thread()));
}

FK_KERNEL(64) one_thread_stays_away(float*) {
  if (device::thread() != 3) {
    device::barrier();
  }
}

FK_KERNEL(64) one_warp_at_another_barrier(float*) {
  if (device::thread() < 32) {
    device::barrier();
  } else {
    device::barrier();
  }
}

FK_KERNEL(64) half_a_warp_exchanges(float* out) {
  if (device::thread() < 16) {
    out[device::thread()] = device::from_partner(1.0f, 1, kAllLanes);
  }
}

FK_KERNEL(64) not_in_its_own_mask(float* out) {
  out[device::thread()] = device::from_partner(1.0f, 1, 0xffffu);
}

FK_KERNEL(64) partner_outside_the_mask(float* out) {
  if (device::thread() < 8) {
    out[device::thread()] = device::from_partner(1.0f, 8, 0xffu);
  }
}

FK_KERNEL(64) past_the_end(float*) {
  FK_SHARED(Row, row);
  row[device::thread() / 2 + 1] = 1;
}

FK_KERNEL(64) past_the_end_of_the_launch(float*) {
  device::shared_memory<float>()[device::thread() + 1] = 1;
}

FK_KERNEL(64) read_before_written(float* out) {
  FK_SHARED(Row, row);
  out[device::thread()] = row[device::thread() / 2];
}

// Clusters of two blocks: each adds what the other has in its shared memory.
FK_KERNEL(64) right_in_clusters(float* out) {
  float* own = device::shared_memory<float>();
  own[device::thread()] = static_cast<float>(device::block());
  device::cluster_barrier();
  out[device::thread()] += device::shared_of(0, own)[63] + device::shared_of(1, own)[63];
}

FK_KERNEL(64) no_barrier_in_clusters(float* out) {
  float* own = device::shared_memory<float>();
  own[device::thread()] = static_cast<float>(device::block());
  out[device::thread()] += device::shared_of(0, own)[63] + device::shared_of(1, own)[63];
}

FK_KERNEL(64) one_block_stays_away(float*) {
  if (device::block() != 1) {
    device::cluster_barrier();
  }
}

}  // namespace fairkernels

int main(int, char** arguments) {
  using namespace fairkernels;
  using Kernel = void (*)(float*);
  const std::map<std::string, Kernel> kernels{
      {"right", right},
      {"one_thread_stays_away", one_thread_stays_away},
      {"one_warp_at_another_barrier", one_warp_at_another_barrier},
      {"half_a_warp_exchanges", half_a_warp_exchanges},
      {"not_in_its_own_mask", not_in_its_own_mask},
      {"partner_outside_the_mask", partner_outside_the_mask},
      {"past_the_end", past_the_end},
      {"past_the_end_of_the_launch", past_the_end_of_the_launch},
      {"read_before_written", read_before_written},
      {"right_in_clusters", right_in_clusters},
      {"no_barrier_in_clusters", no_barrier_in_clusters},
      {"one_block_stays_away", one_block_stays_away},
  };
  const std::string name = arguments[1];
  const int blocks = name.find("cluster") != std::string::npos || name == "one_block_stays_away" ? 2 : 1;
  std::vector<float> out(64);
  const int code = device::launch(kernels.at(name), {blocks, 64, 64 * sizeof(float), blocks}, nullptr, out.data());
  std::printf("%s\n", code != 0 ? device::error_text(code) : std::to_string(out[63]).c_str());
}
