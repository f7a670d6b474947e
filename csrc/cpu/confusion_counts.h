// How often each class is taken for each, rows the true class. Bound by memory: 16 bytes read for a sample, K * K
// counts of 8 bytes cleared and, at random, incremented. One thread for a problem: two would need a matrix each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/class_order.h"

namespace fairkernels {

inline void count_pairs(LabelRow predictions, LabelRow labels, int64_t classes, int64_t ignore_index, int64_t* counts) {
  std::fill(counts, counts + classes * classes, 0);
  for (int64_t b = 0; b < labels.samples; ++b) {
    if (labels[b] != ignore_index) {
      ++counts[labels[b] * classes + predictions[b]];
    }
  }
}

}  // namespace fairkernels
