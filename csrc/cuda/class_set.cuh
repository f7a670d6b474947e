// The classes that occur in a problem of fewer samples than classes, as bits: which row and column of the coefficients a
// class has is the number of those before it. Each block makes the bits in shared memory while they are few and read from
// few labels; a launch before makes those of larger problems, once.
// Bytes: 8 of each label, by each block or once, and K / 4 that stay in the cache. Operations: a search of the words, some
// 12 reads, where a class is asked for by its rank. Floor of the launch before: its latency.
#pragma once

#include "cuda/class_rows.cuh"

namespace fairkernels {

constexpr int64_t kMostScanned = 2048;  // samples whose labels every block reads
constexpr int kMostInBlock = 8192;      // classes whose words a warp of the block adds up
constexpr int kSetThreads = 1024;

FK_HOST_DEVICE inline int class_words(int classes) {
  return (classes + device::kWarp - 1) / device::kWarp;
}

// Of a set: the bits, and how many classes come before those of each word.
FK_HOST_DEVICE inline int64_t words_of_set(const ClassTask& task) {
  return 2 * class_words(task.classes);
}

// Whether a launch before makes the sets.
FK_HOST_DEVICE inline bool makes_sets_before(const ClassTask& task) {
  return task.samples > kMostScanned || task.classes > kMostInBlock;
}

// In global memory, for the sets of all problems.
FK_HOST_DEVICE inline int64_t words_of_sets(const ClassTask& task) {
  return makes_sets_before(task) ? task.problems * words_of_set(task) : 0;
}

// In shared memory, for one.
inline size_t set_bytes_in_block(const ClassTask& task) {
  return makes_sets_before(task) ? 0 : words_of_set(task) * sizeof(unsigned);
}

class ClassSet {
 public:
  ClassSet() = default;

  // Whether there is one.
  FK_DEVICE explicit operator bool() const { return words_ != 0; }

  // That of a problem: it lies in `sets`, or comes to lie in shared memory.
  FK_DEVICE ClassSet(const ClassTask& task, const ClassSamples& samples, int64_t problem, unsigned* sets,
                     unsigned* shared)
      : ClassSet(task, makes_sets_before(task) ? sets + problem * words_of_set(task) : shared) {
    if (!makes_sets_before(task)) {
      make(task, samples);
    }
  }

  FK_DEVICE ClassSet(const ClassTask& task, unsigned* memory)
      : words_(class_words(task.classes)), bits_(memory), before_(memory + words_) {}

  // All threads of a block come, once.
  FK_DEVICE void make(const ClassTask& task, const ClassSamples& samples) {
    for (int word = device::thread(); word < words_; word += device::threads()) {
      bits_[word] = 0;
    }
    device::barrier();
    for (int64_t b = device::thread(); b < task.samples; b += device::threads()) {
      const int label = class_of(task, samples, b);
      if (label < task.classes) {
        device::set_bits(bits_ + label / device::kWarp, 1u << label % device::kWarp);
      }
    }
    device::barrier();
    if (device::thread() < device::kWarp) {
      add_up();
    }
    device::barrier();
  }

  FK_DEVICE bool has(int label) const { return (bits_[label / device::kWarp] >> label % device::kWarp & 1u) != 0; }

  // How many classes before this one there are.
  FK_DEVICE int rank(int label) const {
    const int word = label / device::kWarp;
    return before_[word] + device::bits_set(bits_[word] & ((1u << label % device::kWarp) - 1));
  }

  FK_DEVICE int size() const { return before_[words_ - 1] + device::bits_set(bits_[words_ - 1]); }

  // The class of this rank.
  FK_DEVICE int select(int rank) const {
    int low = 0;  // the last word with no more than `rank` classes before it
    int high = words_;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (static_cast<int>(before_[middle]) <= rank ? low : high) = middle;
    }
    unsigned word = bits_[low];
    for (int i = before_[low]; i < rank; ++i) {
      word &= word - 1;
    }
    return low * device::kWarp + device::bits_set((word & -word) - 1);
  }

 private:
  // One warp: how many classes come before each word.
  FK_DEVICE void add_up() {
    const int lane = device::thread();
    unsigned before = 0;
    for (int first = 0; first < words_; first += device::kWarp) {
      const unsigned own = first + lane < words_ ? device::bits_set(bits_[first + lane]) : 0;
      const unsigned sum = warp_sum_up_to(own);
      if (first + lane < words_) {
        before_[first + lane] = before + sum - own;
      }
      before += device::from_lane(sum, device::kWarp - 1);
    }
  }

  int words_ = 0;
  unsigned* bits_ = nullptr;
  unsigned* before_ = nullptr;
};

// A block has a problem. A template, so that several sources can have it.
template <int kThreads>
FK_KERNEL(kThreads) class_sets(FK_CONSTANT(ClassTask) task, unsigned* sets) {
  const int64_t problem = device::block();
  ClassSet(task, sets + problem * words_of_set(task)).make(task, ClassSamples(task, problem));
}

// Where blocks do not make them.
inline int launch_class_sets(const ClassTask& task, unsigned* sets, void* stream) {
  return makes_sets_before(task) ? device::launch(class_sets<kSetThreads>, {task.problems, kSetThreads}, stream, task, sets) : 0;
}

}  // namespace fairkernels
