// The classes that occur in a problem of fewer samples than classes, as bits in shared memory: which row and column of
// the coefficients a class has is the number of those before it.
#pragma once

#include "cuda/class_rows.cuh"

namespace fairkernels {

inline int64_t class_words(int64_t classes) {
  return (classes + device::kWarp - 1) / device::kWarp;
}

inline size_t class_set_bytes(int64_t classes) {
  return 2 * 4 * static_cast<size_t>(class_words(classes));
}

class ClassSet {
 public:
  ClassSet() = default;

  // Whether there is one.
  FK_DEVICE explicit operator bool() const { return words_ != 0; }

  // All threads of a block come, once.
  FK_DEVICE ClassSet(const ClassTask& task, const ClassSamples& samples, unsigned* memory)
      : words_((task.classes + device::kWarp - 1) / device::kWarp), bits_(memory), before_(memory + words_) {
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

}  // namespace fairkernels
