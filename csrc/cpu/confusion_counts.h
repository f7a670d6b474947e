// How often each class is taken for each, rows the true class. 16 bytes are read for a sample and K * K counts of 8
// bytes written; in between, a load, an addition and a store for a sample, at random places. With few cells these wait
// for one another, so four tables take turns; with many they miss the cache, so they are bytes: a thousand classes then
// fit the second level, which their counts of 8 bytes would overflow eight times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/class_order.h"
#include "support/platform.h"

namespace fairkernels {

constexpr int64_t kPairs = 1024;     // whose cells are found at once
constexpr int64_t kFewCells = 2048;  // their tables fit the first-level cache together

// The cells of samples; one that is ignored gets the cell behind the last. False if one that counts has no class: its
// cell may then be anything.
FK_CLONES static bool find_cells(const int64_t* predictions, const int64_t* labels, int64_t n, int64_t classes,
                                 int64_t ignore_index, int64_t* cells) {
  const uint64_t most = classes;
  int64_t wrong = 0;
#pragma omp simd reduction(| : wrong)
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t label = labels[i];
    const uint64_t prediction = predictions[i];
    const bool counts = labels[i] != ignore_index;
    wrong |= counts & ((label >= most) | (prediction >= most));
    const uint64_t cell = uint64_t{static_cast<uint32_t>(label)} * static_cast<uint32_t>(most) + prediction;
    cells[i] = counts ? cell : most * most;
  }
  return wrong == 0;
}

// Calls count(cells, n) for samples [begin, end), some at a time; false, and no more calls, where one has no class.
template <typename Count>
bool for_cells(LabelRow predictions, LabelRow labels, int64_t begin, int64_t end, int64_t classes, int64_t ignore_index,
               const Count& count) {
  int64_t cells[kPairs];
  int64_t copies[2][kPairs];
  const auto run = [](LabelRow row, int64_t first, int64_t n, int64_t* copy) -> const int64_t* {
    if (row.stride == 1) {
      return row.data + first;
    }
    for (int64_t i = 0; i < n; ++i) {
      copy[i] = row[first + i];
    }
    return copy;
  };
  for (int64_t first = begin; first < end; first += kPairs) {
    const int64_t n = std::min(kPairs, end - first);
    const int64_t* predicted = run(predictions, first, n, copies[0]);
    const int64_t* actual = run(labels, first, n, copies[1]);
    if (!find_cells(predicted, actual, n, classes, ignore_index, cells)) {
      return false;
    }
    count(cells, n);
  }
  return true;
}

// Few samples for a large matrix: straight into it, which holds zeros.
inline bool count_directly(LabelRow predictions, LabelRow labels, int64_t classes, int64_t ignore_index,
                           int64_t* counts) {
  const int64_t all = classes * classes;
  return for_cells(predictions, labels, 0, labels.samples, classes, ignore_index, [=](const int64_t* cells, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (cells[i] != all) {
        ++counts[cells[i]];
      }
    }
  });
}

template <typename Count>
FK_INLINE void write_counts_body(const Count* table, int64_t n, bool first, int64_t* counts) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    counts[i] = (first ? 0 : counts[i]) + table[i];
  }
}

FK_CLONES static void write_counts(const uint8_t* table, int64_t n, bool first, int64_t* counts) {
  write_counts_body(table, n, first, counts);
}

FK_CLONES static void write_counts(const int64_t* table, int64_t n, bool first, int64_t* counts) {
  write_counts_body(table, n, first, counts);
}

// One thread's counts, in tables that take turns. A byte that has come round to 0 is noted.
template <typename Count, int64_t kTurns>
class PairCounts {
 public:
  PairCounts(int64_t classes, int64_t ignore_index)
      : classes_(classes), ignore_index_(ignore_index), cells_(classes * classes), tables_(kTurns * (cells_ + 1)) {}

  // Samples [begin, end); false if one of them that counts has no class.
  bool add(LabelRow predictions, LabelRow labels, int64_t begin, int64_t end) {
    return for_cells(predictions, labels, begin, end, classes_, ignore_index_, [&](const int64_t* cells, int64_t n) {
      int64_t i = 0;
      for (; i + kTurns <= n; i += kTurns) {
        for (int64_t turn = 0; turn < kTurns; ++turn) {
          add_one(cells[i + turn], table(turn));
        }
      }
      for (; i < n; ++i) {
        add_one(cells[i], table(0));
      }
    });
  }

  // Cells [begin, end) of the matrix become what was counted, or, unless these counts are the `first`, grow by it.
  void write(int64_t begin, int64_t end, bool first, int64_t* counts) const {
    for (int64_t turn = 0; turn < kTurns; ++turn) {
      write_counts(tables_.data() + turn * (cells_ + 1) + begin, end - begin, first && turn == 0, counts + begin);
    }
  }

  void write_rounds(int64_t* counts) const {
    for (int64_t cell : rounds_) {
      counts[cell] += 256;
    }
  }

 private:
  Count* table(int64_t turn) { return tables_.data() + turn * (cells_ + 1); }

  void add_one(int64_t cell, Count* table) {
    ++table[cell];
    if constexpr (std::is_same_v<Count, uint8_t>) {
      if (table[cell] == 0 && cell != cells_) {
        rounds_.push_back(cell);
      }
    }
  }

  int64_t classes_;
  int64_t ignore_index_;
  int64_t cells_;
  std::vector<Count> tables_;
  std::vector<int64_t> rounds_;
};

using CrowdedCounts = PairCounts<int64_t, 4>;
using SpreadCounts = PairCounts<uint8_t, 1>;

}  // namespace fairkernels
