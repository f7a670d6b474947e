// Loops over several threads. Who computes what never changes a result: every loop's turns write to places of their
// own, and sums over turns are taken in their order afterwards.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fairkernels {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// Calls function(begin, end) for parts of [0, n); a turn works on about `elements_each` elements.
template <typename Function>
void parallel_ranges(int64_t n, int64_t elements_each, const Function& function) {
  const int64_t grain = kGrain / std::max<int64_t>(elements_each, 1) + 1;
  if (n > grain) {
    torch::stable::parallel_for(0, n, grain, function);
  } else if (n > 0) {
    function(int64_t{0}, n);  // a microsecond less than torch takes to come to the same conclusion
  }
}

template <typename Function>
void parallel_each(int64_t n, int64_t elements_each, const Function& function) {
  parallel_ranges(n, elements_each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      function(i);
    }
  });
}

// function(0) + ... + function(n - 1).
template <typename Function>
double parallel_sum(int64_t n, int64_t elements_each, const Function& function) {
  std::vector<double> terms(n);
  parallel_each(n, elements_each, [&](int64_t i) { terms[i] = function(i); });
  return std::accumulate(terms.begin(), terms.end(), 0.0);
}

// Problems side by side where there is one for every thread; otherwise one after the other, each on all threads (a
// parallel loop inside a parallel loop runs on the thread it is in).
template <typename Function>
void for_each_problem(int64_t problems, int64_t elements_each, const Function& function) {
  if (problems >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_each(problems, elements_each, function);
    return;
  }
  for (int64_t problem = 0; problem < problems; ++problem) {
    function(problem);
  }
}

}  // namespace fairkernels
