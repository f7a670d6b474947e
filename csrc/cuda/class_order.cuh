// The samples of each class side by side, as they came: a counting sort, of whole numbers, so that nothing depends on
// the order in which blocks run. And the parts that classes are divided into, so that no block has more than others.
// Bytes: the labels are read twice, 8 bytes each; tables of 12 bytes for each sample and of 4 K / 512 are written and
// read, most of them out of the cache. Operations: 256 comparisons for each sample. Four launches, whose
// latency is the floor up to some ten thousand samples.
#pragma once

#include "cuda/class_surrogates.cuh"

namespace fairkernels {

constexpr int kChunk = 512;         // samples, and threads, of a block
constexpr int kPartSamples = 128;   // of a part of a class
constexpr int kBeforeWarps = 8;
constexpr int kChunksAtOnce = 8;    // whose counts are read before one is written
constexpr int kStartThreads = 1024;

struct ClassOrderTables {
  int64_t* order;   // [problems, B], samples by class; nothing for those that are ignored
  int64_t* starts;  // [problems, K + 1], where each class begins in it
  double* weights;  // [problems, chunks], sums of those of samples, where anything is divided by all
  int64_t* parts;   // [problems, K + 1], how many parts the classes before have; each class has one at least
  int32_t* ranks;   // [problems, B], how many of its class come before a sample in its chunk
  int32_t* counts;  // [problems, chunks, K], samples of a class in a chunk, later in those before it
};

FK_HOST_DEVICE inline int64_t order_chunks(const ClassTask& task) {
  return (task.samples + kChunk - 1) / kChunk;
}

// Whether anything is divided by the weight of all samples.
FK_DEVICE bool needs_all(const ClassTask& task) {
  return (task.confusion != nullptr && task.normalize == Normalize::by_all) ||
         (has_charges(task) && task.surrogate == Surrogate::kl_all);
}

template <typename Real>
FK_KERNEL(kChunk) class_ranks(FK_CONSTANT(ClassTask) task, ClassOrderTables tables, int64_t chunks) {
  using Keys = int[kChunk];
  FK_SHARED(Keys, keys);
  const int64_t problem = device::block() / chunks;
  const int64_t chunk = device::block() - problem * chunks;
  const int64_t b = chunk * kChunk + device::thread();
  const ClassSamples samples(task, problem);
  const int key = b < task.samples ? class_of(task, samples, b) : task.classes;
  keys[device::thread()] = key;
  int32_t* counts = tables.counts + device::block() * task.classes;
  for (int label = device::thread(); label < task.classes; label += kChunk) {
    counts[label] = 0;
  }
  device::barrier();
  if (needs_all(task)) {
    const double weight = block_sum(key < task.classes ? static_cast<double>(weight_of<Real>(task, samples, b)) : 0.0);
    if (device::thread() == 0) {
      tables.weights[device::block()] = weight;
    }
  }
  if (key < task.classes) {
    int before = 0;
    for (int i = 0; i < device::thread(); ++i) {
      before += keys[i] == key ? 1 : 0;
    }
    tables.ranks[problem * task.samples + b] = before;
    device::raise_to(counts + key, before + 1);
  }
}

// A block has 32 classes, each warp of it some of the chunks.
FK_KERNEL(kBeforeWarps * device::kWarp) class_counts_before(FK_CONSTANT(ClassTask) task, ClassOrderTables tables,
                                                            int64_t chunks, int64_t blocks) {
  using Sums = int32_t[kBeforeWarps][device::kWarp];
  FK_SHARED(Sums, sums);
  const int64_t problem = device::block() / blocks;
  const int lane = device::thread() % device::kWarp;
  const int warp = device::thread() / device::kWarp;
  const int64_t label = (device::block() - problem * blocks) * device::kWarp + lane;
  int32_t* counts = tables.counts + problem * chunks * task.classes + label;
  const bool is_class = label < task.classes;
  const int64_t begin = chunks * warp / kBeforeWarps;
  const int64_t end = is_class ? chunks * (warp + 1) / kBeforeWarps : begin;
  int32_t sum = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    sum += counts[chunk * task.classes];
  }
  sums[warp][lane] = sum;
  device::barrier();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) {
    before += sums[w][lane];
  }
  for (int64_t first = begin; first < end; first += kChunksAtOnce) {
    int32_t count[kChunksAtOnce];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      count[i] = first + i < end ? counts[(first + i) * task.classes] : 0;
    }
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      if (first + i < end) {
        counts[(first + i) * task.classes] = before;
      }
      before += count[i];
    }
  }
  if (warp == kBeforeWarps - 1 && is_class) {
    tables.starts[problem * (task.classes + 1) + label + 1] = before;
  }
}

FK_DEVICE int64_t parts_of(int64_t samples) {
  return samples <= kPartSamples ? 1 : (samples + kPartSamples - 1) / kPartSamples;
}

// Numbers of samples become starts. A block has a problem, each thread a stretch of the classes.
FK_KERNEL(kStartThreads) class_starts(FK_CONSTANT(ClassTask) task, ClassOrderTables tables) {
  const int64_t stretch = (task.classes + kStartThreads - 1) / kStartThreads;
  const int64_t begin = device::thread() * stretch;
  const int64_t end = begin + stretch < task.classes ? begin + stretch : task.classes;
  int64_t* starts = tables.starts + device::block() * (task.classes + 1);
  int64_t* parts = tables.parts + device::block() * (task.classes + 1);
  int64_t samples = 0;
  int64_t divided = 0;
  for (int64_t label = begin; label < end; ++label) {
    samples += starts[label + 1];
    divided += parts_of(starts[label + 1]);
  }
  samples = block_sum_before(samples);
  divided = block_sum_before(divided);
  for (int64_t label = begin; label < end; ++label) {
    const int64_t count = starts[label + 1];
    samples += count;
    divided += parts_of(count);
    starts[label + 1] = samples;
    parts[label + 1] = divided;
  }
  if (device::thread() == 0) {
    starts[0] = 0;
    parts[0] = 0;
  }
}

FK_KERNEL(kChunk) class_places(FK_CONSTANT(ClassTask) task, ClassOrderTables tables, int64_t chunks) {
  const int64_t problem = device::block() / chunks;
  const int64_t b = (device::block() - problem * chunks) * kChunk + device::thread();
  const ClassSamples samples(task, problem);
  const int key = b < task.samples ? class_of(task, samples, b) : task.classes;
  if (key < task.classes) {
    const int64_t start = tables.starts[problem * (task.classes + 1) + key];
    const int64_t before = tables.counts[device::block() * task.classes + key];
    const int64_t place = start + before + tables.ranks[problem * task.samples + b];
    tables.order[problem * task.samples + place] = b;
  }
}

template <typename Real>
int launch_class_order(const ClassTask& task, const ClassOrderTables& tables, void* stream) {
  const int64_t chunks = order_chunks(task);
  const int64_t blocks = (task.classes + device::kWarp - 1) / device::kWarp;
  int error = device::launch(class_ranks<Real>, {task.problems * chunks, kChunk}, stream, task, tables, chunks);
  if (error == 0) {
    const device::Grid grid{task.problems * blocks, kBeforeWarps * device::kWarp};
    error = device::launch(class_counts_before, grid, stream, task, tables, chunks, blocks);
  }
  if (error == 0) {
    error = device::launch(class_starts, {task.problems, kStartThreads}, stream, task, tables);
  }
  return error != 0 ? error : device::launch(class_places, {task.problems * chunks, kChunk}, stream, task, tables, chunks);
}

// The part of a class that a block has.
struct ClassPart {
  int label;
  int64_t number;  // of all parts
  int64_t first;   // of the class
  int64_t parts;   // of the class, 0: the block has nothing to do

  // Where its sums lie: there are two places for each part of a class but the first, which is enough if it has several.
  FK_DEVICE int64_t place() const { return 2 * (first - label) + (number - first); }
};

inline int64_t most_parts(const ClassTask& task) {
  return task.classes + task.samples / kPartSamples;
}

FK_HOST_DEVICE inline int64_t most_divided(const ClassTask& task) {
  return 2 * (task.samples / kPartSamples);
}

FK_DEVICE ClassPart class_part(const ClassTask& task, const ClassOrderTables& tables, int64_t problem, int64_t number) {
  const int64_t* parts = tables.parts + problem * (task.classes + 1);
  if (number >= parts[task.classes]) {
    return {0, number, 0, 0};
  }
  int low = 0;  // the last class that begins with this part or before
  int high = task.classes;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (parts[middle] <= number ? low : high) = middle;
  }
  return {low, number, parts[low], parts[low + 1] - parts[low]};
}

}  // namespace fairkernels
