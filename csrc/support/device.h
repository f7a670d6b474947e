// What only a GPU has, each under one name. Kernels use nothing else of it, so that tests/cuda_on_cpu can stand in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "support/platform.h"

namespace fairkernels::device {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What is read or written in one access.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// As it is written, so that arguments need not be of exactly the types that a kernel takes.
template <typename T>
struct AsGiven {
  using Type = T;
};

constexpr int kPortableCluster = 8;  // blocks that every GPU with clusters can run together

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;  // of a block, beside what the kernel declares
  int cluster = 1;          // so many blocks in a row see each other's shared memory
};

}  // namespace fairkernels::device

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FK_DEVICE __device__ __forceinline__
#define FK_KERNEL(threads) FK_CROWDED_KERNEL(threads, 1)
// So many blocks must fit into a multiprocessor: they share its 65,536 registers.
#define FK_CROWDED_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FK_CONSTANT(Type) const __grid_constant__ Type  // a parameter of a kernel that is large
#define FK_SHARED(Type, name) __shared__ Type name

namespace fairkernels::device {

FK_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}

FK_DEVICE int threads() {
  return static_cast<int>(blockDim.x);
}

FK_DEVICE int64_t block() {
  return blockIdx.x;
}

FK_DEVICE int64_t blocks() {
  return gridDim.x;
}

FK_DEVICE void barrier() {
  __syncthreads();
}

// Of all threads of a cluster. Where there are none, nothing asks for it (most_cluster).
FK_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// What lies in the block `rank` of the cluster where `own` lies in this one, in the memory that the launch has asked for.
template <typename T>
FK_DEVICE T* shared_of(int rank, T* own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}

FK_DEVICE void warp_barrier(unsigned lanes = kAllLanes) {
  __syncwarp(lanes);
}

// The value of the lane whose number differs in the bits of `bits`.
template <typename T>
FK_DEVICE T from_partner(T value, int bits, unsigned lanes = kAllLanes) {
  return __shfl_xor_sync(lanes, value, bits);
}

template <typename T>
FK_DEVICE T from_lane(T value, int lane, unsigned lanes = kAllLanes) {
  return __shfl_sync(lanes, value, lane);
}

// A bit for each lane that says yes.
FK_DEVICE unsigned vote(bool yes, unsigned lanes = kAllLanes) {
  return __ballot_sync(lanes, yes);
}

FK_DEVICE int bits_set(unsigned word) {
  return __popc(word);
}

// Sets bits of a word in shared memory that other threads of the block may set bits of at the same time.
FK_DEVICE void set_bits(unsigned* word, unsigned bits) {
  atomicOr(word, bits);
}

// Likewise, in any memory: a number becomes larger, or stays. The order in which threads come does not matter.
FK_DEVICE void raise_to(int32_t* number, int32_t value) {
  atomicMax(number, value);
}

FK_DEVICE void add_to(int32_t* number, int32_t value) {
  atomicAdd(number, value);
}

// The memory of the block that its launch has asked for.
template <typename T>
FK_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char fk_shared_bytes[];
  return reinterpret_cast<T*>(fk_shared_bytes);
}

FK_DEVICE Bytes16 load16(const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}

// Of what nobody reads again soon: it leaves the cache first.
FK_DEVICE Bytes16 load16_once(const void* from) {
  const uint4 words = __ldcs(static_cast<const uint4*>(from));
  return {{words.x, words.y, words.z, words.w}};
}

FK_DEVICE void store16_once(void* to, Bytes16 bytes) {
  __stcs(static_cast<uint4*>(to), make_uint4(bytes.word[0], bytes.word[1], bytes.word[2], bytes.word[3]));
}

// Of a block, with what its kernel declares; 48 KiB where nobody knows.
inline size_t most_shared_memory() {
  int device = 0;
  int bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes;
}

// More than 48 KiB, with what it declares, a kernel must be allowed: once all that there is, so that no thread of the host
// takes back what another needs.
template <typename... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kThereAnyway = 48 << 10;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.sharedSizeBytes + bytes <= kThereAnyway) {
    return error;
  }
  const int most = static_cast<int>(most_shared_memory() - attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes == most) {
    return cudaSuccess;
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// A number of 16 bits, by its bits, in one instruction.
FK_DEVICE float from_half(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(raw);
}

FK_DEVICE uint16_t to_half(float value) {
  return static_cast<__half_raw>(__float2half_rn(value)).x;
}

// Returns an error code of the runtime, 0 for none.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, void* stream, const typename AsGiven<Parameters>::Type&... arguments) {
  if (grid.blocks == 0) {
    return cudaSuccess;
  }
  if (grid.blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  constexpr size_t kSurelyThere = 8 << 10;  // of the first 48 KiB a kernel declares less than the others
  if (grid.shared_bytes > kSurelyThere) {
    const cudaError_t error = allow_shared_memory(kernel, grid.shared_bytes);
    if (error != cudaSuccess) {
      return error;
    }
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid.blocks);
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters>
int asked_most_cluster(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion < 90) {
    return 1;
  }
  if (error == cudaSuccess) {
    error = allow_shared_memory(kernel, shared_bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = kPortableCluster;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  int most = 1;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // an answer, not an error of a later call
    return 1;
  }
  return most < 1 ? 1 : (most < kPortableCluster ? most : kPortableCluster);
}

// How many blocks of a kernel can form a cluster on this GPU, or the part of it that there is, in the code that it runs: 1
// where that knows none. The last answer is kept, it takes three calls of the runtime.
template <typename... Parameters>
int most_cluster(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  int device = 0;
  cudaGetDevice(&device);
  thread_local struct {
    int device = -1;
    void (*kernel)(Parameters...) = nullptr;
    int most = 1;
  } last;
  if (last.device != device || last.kernel != kernel) {
    last = {device, kernel, asked_most_cluster(kernel, threads, shared_bytes)};
  }
  return last.most;
}

inline const char* error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace fairkernels::device

#else
#include "device_on_cpu.h"
#endif
