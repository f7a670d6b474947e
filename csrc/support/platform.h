// What the compiler is told beyond C++: where code runs, and which instruction sets it is compiled for.
#pragma once

#if defined(__CUDACC__)
#define FK_HOST_DEVICE __host__ __device__
#else
#define FK_HOST_DEVICE
#endif

#if defined(_MSC_VER)
#define FK_INLINE __forceinline
#else
#define FK_INLINE inline __attribute__((always_inline))
#endif

// Asks for memory that is to be read, or written, soon.
#if defined(__GNUC__)
#define FK_PREFETCH(address) __builtin_prefetch(address, 0)
#define FK_PREFETCH_TO_WRITE(address) __builtin_prefetch(address, 1)
#else
#define FK_PREFETCH(address) ((void)(address))
#define FK_PREFETCH_TO_WRITE(address) ((void)(address))
#endif

// A function marked FK_CLONES is compiled once per instruction set and bound to the best one at load time; whatever it
// calls must be FK_INLINE to be compiled along with it. The clones are plain functions: gcc 12 drops clones of
// templates. No clones under AddressSanitizer: they are chosen at load time by code that it would instrument, before it
// has started.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__) && !defined(__SANITIZE_ADDRESS__)
#define FK_CLONES [[maybe_unused]] __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FK_CLONES [[maybe_unused]]
#endif
