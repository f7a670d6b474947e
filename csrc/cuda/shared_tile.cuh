// A part of a matrix in shared memory.
#pragma once

#include "support/device.h"
#include "support/elements.h"

namespace fairkernels {

template <typename Element>
struct SharedTile {
  using Real = Element;

  Real* data;
  int rows;
  int columns;
  int pitch;

  FK_DEVICE Real& operator()(int i, int j) const { return data[i * pitch + j]; }
};

// By all threads, who have to meet before they read it. Lanes go along the rows or the columns, whichever lie side by
// side in memory, unless these are too short to keep them busy. A thread has `kInFlight` loads under way.
template <int kInFlight, typename T, typename Real>
FK_DEVICE void load_tile(const T* from, int64_t row_stride, int64_t column_stride, const SharedTile<Real>& tile) {
  const bool rows_are_near = row_stride < column_stride;
  const int near = rows_are_near ? tile.rows : tile.columns;
  const int far = rows_are_near ? tile.columns : tile.rows;
  const bool along_rows = rows_are_near == (near >= device::kWarp || near >= far);
  const int lines = along_rows ? tile.columns : tile.rows;
  const int length = along_rows ? tile.rows : tile.columns;
  const int64_t line_stride = along_rows ? column_stride : row_stride;
  const int64_t stride = along_rows ? row_stride : column_stride;
  const int line_pitch = along_rows ? 1 : tile.pitch;
  const int pitch = along_rows ? tile.pitch : 1;
  const int warps = device::threads() / device::kWarp;
  int shift = 0;  // 2^shift pieces of a line
  while ((device::kWarp << shift) < length) {
    ++shift;
  }
  const int pieces = lines << shift;
#pragma unroll 1
  for (int first = device::thread() / device::kWarp; first < pieces; first += kInFlight * warps) {
    Real value[kInFlight];
    int place[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int piece = first + k * warps;
      const int line = piece >> shift;
      const int at = (piece - (line << shift)) * device::kWarp + device::thread() % device::kWarp;
      const bool inside = line < lines && at < length;
      place[k] = inside ? line * line_pitch + at * pitch : -1;
      value[k] = inside ? widen(from[line * line_stride + at * stride]) : Real(0);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (place[k] >= 0) {
        tile.data[place[k]] = value[k];
      }
    }
  }
}

template <typename T, typename Real>
FK_DEVICE void store_tile(const SharedTile<Real>& tile, T* to, int64_t row_stride) {
  const int warps = device::threads() / device::kWarp;
  for (int i = device::thread() / device::kWarp; i < tile.rows; i += warps) {
    for (int j = device::thread() % device::kWarp; j < tile.columns; j += device::kWarp) {
      to[i * row_stride + j] = narrow(tile(i, j), T{});
    }
  }
}

}  // namespace fairkernels
