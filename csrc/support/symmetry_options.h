// The options that symmetry_gap and symmetry_loss share.
#pragma once

#include <string>

#include "support/pair_penalty.h"
#include "support/tensor.h"

namespace fairkernels {

enum class Absent { ignore, zero };
enum class Reduction { sum, mean };

inline Absent absent_named(const std::string& name) {
  require(name == "ignore" || name == "zero", "absent must be ignore or zero, got ", name);
  return name == "ignore" ? Absent::ignore : Absent::zero;
}

inline Reduction reduction_named(const std::string& name) {
  require(name == "sum" || name == "mean", "reduction must be sum or mean, got ", name);
  return name == "sum" ? Reduction::sum : Reduction::mean;
}

struct SymmetryOptions {
  SymmetryOptions(const std::string& absent_name, const std::string& reduction_name)
      : absent(absent_named(absent_name)), reduction(reduction_named(reduction_name)) {}

  SymmetryOptions(StringHandle absent_name, StringHandle reduction_name)
      : SymmetryOptions(take_string(absent_name), take_string(reduction_name)) {}

  double scale(double active) const { return pair_scale(reduction == Reduction::mean, active); }

  Absent absent;
  Reduction reduction;
};

}  // namespace fairkernels
