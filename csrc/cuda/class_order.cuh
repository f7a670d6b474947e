// The samples of each class, side by side: `order`, the samples by class and within a class as they came, ignored ones
// last, and `starts`, where each class begins in it, the ignored ones being class K.
// Bound by its comparisons, (B + K + 1) B of them: the place of a sample is the number of those that sort before it, the
// start of a class the number of samples in classes before it. One launch, no memory but for the results.
#pragma once

#include "cuda/class_rows.cuh"

namespace fairkernels {

constexpr int kOrderThreads = 256;
constexpr int kQueries = device::kWarp;  // of a block, each compared by one lane of every warp
constexpr int kKeys = 1024;              // in shared memory at a time

struct ClassOrderTables {
  int64_t* order;   // [problems, B]
  int64_t* starts;  // [problems, K + 1]
};

inline int64_t order_blocks(const ClassTask& task) {
  return (task.samples + task.classes + kQueries) / kQueries;
}

// Sorts as (class, place) does.
FK_DEVICE int64_t key_of(const ClassTask& task, const ClassSamples& samples, int64_t b) {
  return class_of(task, samples, b) * task.samples + b;
}

FK_KERNEL(kOrderThreads) class_order(FK_CONSTANT(ClassTask) task, ClassOrderTables tables, int64_t blocks) {
  using Keys = int64_t[kKeys];
  using Counts = int64_t[kOrderThreads / device::kWarp][kQueries];
  FK_SHARED(Keys, keys);
  FK_SHARED(Counts, counts);
  const int64_t problem = device::block() / blocks;
  const int lane = device::thread() % device::kWarp;
  const int warp = device::thread() / device::kWarp;
  const ClassSamples samples(task, problem);
  const int64_t query = (device::block() - problem * blocks) * kQueries + lane;
  const int64_t own = query < task.samples ? key_of(task, samples, query) : (query - task.samples) * task.samples;

  int64_t before = 0;
  for (int64_t first = 0; first < task.samples; first += kKeys) {
    const int n = static_cast<int>(task.samples - first < kKeys ? task.samples - first : kKeys);
    device::barrier();
    for (int i = device::thread(); i < n; i += kOrderThreads) {
      keys[i] = key_of(task, samples, first + i);
    }
    device::barrier();
    int found = 0;
    for (int i = warp; i < n; i += kOrderThreads / device::kWarp) {
      found += keys[i] < own ? 1 : 0;
    }
    before += found;
  }
  counts[warp][lane] = before;
  device::barrier();
  if (warp != 0) {
    return;
  }
  int64_t place = 0;
  for (int w = 0; w < kOrderThreads / device::kWarp; ++w) {
    place += counts[w][lane];
  }
  if (query < task.samples) {
    tables.order[problem * task.samples + place] = query;
  } else if (query <= task.samples + task.classes) {
    tables.starts[problem * (task.classes + 1) + query - task.samples] = place;
  }
}

inline int launch_class_order(const ClassTask& task, const ClassOrderTables& tables, void* stream) {
  const int64_t blocks = order_blocks(task);
  return device::launch(class_order, {task.problems * blocks, kOrderThreads}, stream, task, tables, blocks);
}

}  // namespace fairkernels
