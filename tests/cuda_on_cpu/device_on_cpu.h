// Stands in for the part of csrc/support/device.h that needs a GPU: blocks, or clusters of blocks, one after the other,
// their threads as fibers on one thread of the CPU, in forward, reversed or random order (FAIRKERNELS_FIBERS). A fiber
// runs until it waits for others, so races in memory do not show; what shows are barriers and votes that not all take
// part in, wrong lane masks, shared memory that is written out of bounds (under AddressSanitizer also read) or read
// before it is written: it begins as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FK_SANITIZED true
#define FK_TELL_SANITIZER(call) call
#else
#define FK_SANITIZED false
#define FK_TELL_SANITIZER(call)
#endif

#define FK_DEVICE inline
#define FK_KERNEL(threads) [[maybe_unused]] static void
#define FK_CROWDED_KERNEL(threads, blocks) FK_KERNEL(threads)
#define FK_CONSTANT(Type) const Type
#define FK_SHARED(Type, name) Type& name = *static_cast<Type*>(device::shared_at(__FILE__, __LINE__, sizeof(Type)))

namespace fairkernels::device {

// Where the program is, for messages and to tell barriers apart.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

inline const std::string& order() {
  static const char* given = std::getenv("FAIRKERNELS_FIBERS");
  static const std::string order = given != nullptr ? given : "forward";
  return order;
}

constexpr size_t kMostShared = 99 << 10;  // the least that a GPU has; most have more

#define FK_SITE Site site = {__builtin_FILE(), __builtin_LINE()}

// Memory of a block, with a guard behind it where no sanitizer watches.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes + kGuard]) {
    std::memset(data_.get(), 0xff, bytes_);
    std::memset(data_.get() + bytes_, kPattern, kGuard);
  }

  unsigned char* data() { return data_.get(); }
  size_t bytes() const { return bytes_; }
  bool intact() const {
    const unsigned char* guard = data_.get() + bytes_;
    return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kPattern; });
  }

 private:
  static constexpr size_t kGuard = FK_SANITIZED ? 0 : 256;
  static constexpr unsigned char kPattern = 0xa5;
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

struct Block;

struct Fiber {
  int thread;
  Block* block;
  bool done = false;
  bool started = false;
  jmp_buf place;
  ucontext_t context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
};

// Where all threads of a block, or of a cluster of blocks, wait for each other.
struct Barrier {
  Site site{};
  std::vector<Fiber*> arrived;
};

// Lanes of a warp that have come to the same exchange.
struct Exchange {
  Site site{};
  unsigned arrived = 0;
  uint64_t given[kWarp];
  uint64_t taken[kWarp];
};

class Cluster;

struct Block {
  Cluster* cluster;
  int64_t number;
  SharedMemory dynamic;
  std::map<std::tuple<const char*, int, size_t>, std::unique_ptr<SharedMemory>> declared{};
  std::vector<Fiber*> fibers{};
  Barrier barrier{};
  std::vector<std::map<unsigned, Exchange>> exchanges{};  // of each warp, by their lanes
};

// Runs the fibers of blocks that know each other, mostly of a single one. The one that is running is current().
class Cluster {
 public:
  Cluster(int64_t first, const Grid& grid, const std::function<void()>& kernel) : grid_(grid), kernel_(kernel) {
    for (int i = 0; i < grid.cluster * grid.threads; ++i) {
      if (i % grid.threads == 0) {
        const int64_t number = first + i / grid.threads;
        blocks_.push_back(std::make_unique<Block>(Block{this, number, SharedMemory(grid.shared_bytes)}));
        blocks_.back()->exchanges.resize((grid.threads + kWarp - 1) / kWarp);
      }
      Block* block = blocks_.back().get();
      fibers_.push_back(std::make_unique<Fiber>(Fiber{i % grid.threads, block}));
      fibers_.back()->stack = stack_of(i);
      block->fibers.push_back(fibers_.back().get());
      ready_.push_back(fibers_.back().get());
    }
  }

  static Fiber*& current() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  // The error, empty for none.
  std::string run() {
    while (!ready_.empty() && error_.empty()) {
      resume(next());
    }
    current() = nullptr;
    for ([[maybe_unused]] auto& fiber : fibers_) {
      FK_TELL_SANITIZER(__asan_unpoison_memory_region(fiber->stack, kStack));
    }
    if (error_.empty() && finished_ < fibers_.size()) {
      error_ = waiting_text();
    }
    return error_.empty() ? overwritten() : error_;
  }

  const Grid& grid() const { return grid_; }
  Block* block(int rank) { return blocks_.at(rank).get(); }

  void wait_at(Barrier& barrier, size_t expected, Site site) {
    if (barrier.arrived.empty()) {
      barrier.site = site;
    } else if (!(barrier.site == site)) {
      stop("divergent barrier: threads wait at " + barrier.site.text() + " and at " + site.text());
    }
    barrier.arrived.push_back(current());
    if (barrier.arrived.size() == expected) {
      ready_.insert(ready_.end(), barrier.arrived.begin(), barrier.arrived.end());
      barrier.arrived.clear();
    }
    wait();
  }

  void wait_for_all(Site site) { wait_at(barrier_, fibers_.size(), site); }

  // Gives a value to the other lanes and returns theirs, once all of them have come.
  const uint64_t* exchange(uint64_t value, unsigned lanes, Site site) {
    const int lane = current()->thread % kWarp;
    const int warp = current()->thread / kWarp;
    if ((lanes >> lane & 1) == 0) {
      stop("wrong lane mask: lane " + std::to_string(lane) + " is not in its own mask at " + site.text());
    }
    Exchange& exchange = current()->block->exchanges[warp][lanes];
    if (exchange.arrived == 0) {
      exchange.site = site;
    } else if (!(exchange.site == site)) {
      stop("divergent exchange: lanes meet at " + exchange.site.text() + " and at " + site.text());
    }
    exchange.given[lane] = value;
    exchange.arrived |= 1u << lane;
    if (exchange.arrived == lanes) {
      std::memcpy(exchange.taken, exchange.given, sizeof(exchange.given));
      for (int other = 0; other < kWarp; ++other) {
        if ((lanes >> other & 1) != 0) {
          ready_.push_back(current()->block->fibers[warp * kWarp + other]);
        }
      }
      exchange.arrived = 0;
    }
    wait();
    return exchange.taken;
  }

  [[noreturn]] void stop(const std::string& error) {
    error_ = error;
    wait();
    std::abort();  // nobody resumes it
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  static unsigned char* stack_of(int fiber) {
    static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() <= static_cast<size_t>(fiber)) {
      stacks.emplace_back(new unsigned char[kStack]);
    }
    return stacks[fiber].get();
  }

  Fiber* next() {
    static std::minstd_rand random;
    const size_t place = order() == "reversed" ? ready_.size() - 1 : order() == "random" ? random() % ready_.size() : 0;
    Fiber* fiber = ready_[place];
    ready_.erase(ready_.begin() + static_cast<ptrdiff_t>(place));
    return fiber;
  }

  // Contexts are only begun with ucontext: its switches are system calls, those of setjmp are not. AddressSanitizer
  // takes a longjmp for an unwinding.
  void resume(Fiber* fiber) {
    current() = fiber;
    [[maybe_unused]] void* fake_stack = nullptr;
    FK_TELL_SANITIZER(__sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStack));
    if (FK_SANITIZED || _setjmp(scheduler_place_) == 0) {
      if (!FK_SANITIZED && fiber->started) {
        _longjmp(fiber->place, 1);
      }
      if (!fiber->started) {
        begin(fiber);
      }
      swapcontext(&scheduler_context_, &fiber->context);
    }
    FK_TELL_SANITIZER(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr));
  }

  void begin(Fiber* fiber) {
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &Cluster::enter, 0);
  }

  static void enter() {
    Fiber* fiber = current();
    Cluster* cluster = fiber->block->cluster;
    FK_TELL_SANITIZER(__sanitizer_finish_switch_fiber(nullptr, &cluster->scheduler_stack_, &cluster->scheduler_size_));
    cluster->kernel_();
    fiber->done = true;
    ++cluster->finished_;
    cluster->wait();
  }

  void wait() {
    Fiber* fiber = current();
    [[maybe_unused]] void** fake_stack = fiber->done ? nullptr : &fiber->fake_stack;
    FK_TELL_SANITIZER(__sanitizer_start_switch_fiber(fake_stack, scheduler_stack_, scheduler_size_));
    if (FK_SANITIZED) {
      swapcontext(&fiber->context, &scheduler_context_);
    } else if (_setjmp(fiber->place) == 0) {
      _longjmp(scheduler_place_, 1);
    }
    FK_TELL_SANITIZER(__sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack_, &scheduler_size_));
  }

  // Empty if nothing was written behind shared memory, and there is as much.
  std::string overwritten() const {
    std::string error;
    for (const auto& block : blocks_) {
      size_t bytes = block->dynamic.bytes();
      for (const auto& [place, memory] : block->declared) {
        bytes += memory->bytes();
        const Site site{std::get<0>(place), std::get<1>(place)};
        error = memory->intact() ? error : "shared memory is written out of bounds, declared at " + site.text();
      }
      error = block->dynamic.intact() ? error : "the shared memory of the launch is written out of bounds";
      error = bytes <= kMostShared ? error : "more shared memory than there is: " + std::to_string(bytes) + " bytes";
    }
    return error;
  }

  std::string waiting_text() const {
    const std::string count = std::to_string(fibers_.size() - finished_) + " of " + std::to_string(fibers_.size());
    const Barrier* barrier = &barrier_;
    for (const auto& block : blocks_) {
      barrier = block->barrier.arrived.empty() ? barrier : &block->barrier;
      for (const auto& warp : block->exchanges) {
        for (const auto& [lanes, exchange] : warp) {
          if (exchange.arrived != 0) {
            return "divergent exchange: not all lanes of the mask come to " + exchange.site.text();
          }
        }
      }
    }
    return "divergent barrier: not all threads come to " + barrier->site.text() + ", " + count + " wait";
  }

  Grid grid_;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  Barrier barrier_;
  size_t finished_ = 0;
  std::string error_;
  jmp_buf scheduler_place_;
  ucontext_t scheduler_context_;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;
};

inline Block& here() {
  return *Cluster::current()->block;
}

inline void* shared_at(const char* file, int line, size_t bytes) {
  auto& memory = here().declared[{file, line, bytes}];
  memory = memory ? std::move(memory) : std::make_unique<SharedMemory>(bytes);
  return memory->data();
}

inline int thread() {
  return Cluster::current()->thread;
}

inline int threads() {
  return here().cluster->grid().threads;
}

inline int64_t block() {
  return here().number;
}

inline int64_t blocks() {
  return here().cluster->grid().blocks;
}

inline void barrier(FK_SITE) {
  here().cluster->wait_at(here().barrier, threads(), site);
}

inline void cluster_barrier(FK_SITE) {
  here().cluster->wait_for_all(site);
}

template <typename T>
T* shared_of(int rank, T* own) {
  Block* other = here().cluster->block(rank);
  return reinterpret_cast<T*>(other->dynamic.data() + (reinterpret_cast<unsigned char*>(own) - here().dynamic.data()));
}

inline void warp_barrier(unsigned lanes = kAllLanes, FK_SITE) {
  here().cluster->exchange(0, lanes, site);
}

template <typename T>
T from_lane(T value, int lane, unsigned lanes = kAllLanes, FK_SITE) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* words = here().cluster->exchange(word, lanes, site);
  if ((lanes >> (lane & (kWarp - 1)) & 1) == 0) {
    here().cluster->stop("wrong lane mask: lane " + std::to_string(lane) + " is read at " + site.text() +
                         ", it is not in the mask");
  }
  std::memcpy(&value, &words[lane & (kWarp - 1)], sizeof(T));
  return value;
}

template <typename T>
T from_partner(T value, int bits, unsigned lanes = kAllLanes, FK_SITE) {
  return from_lane(value, (thread() % kWarp) ^ bits, lanes, site);
}

inline unsigned vote(bool yes, unsigned lanes = kAllLanes, FK_SITE) {
  const uint64_t* words = here().cluster->exchange(yes ? 1 : 0, lanes, site);
  unsigned result = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    result |= (lanes >> lane & 1) != 0 && words[lane] != 0 ? 1u << lane : 0;
  }
  return result;
}

inline int bits_set(unsigned word) {
  return __builtin_popcount(word);
}

inline void set_bits(unsigned* word, unsigned bits) {
  *word |= bits;
}

inline void raise_to(int32_t* number, int32_t value) {
  *number = std::max(*number, value);
}

inline void add_to(int32_t* number, int32_t value) {
  *number += value;
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(here().dynamic.data());
}

inline Bytes16 load16(const void* from) {
  return *static_cast<const Bytes16*>(from);
}

constexpr auto load16_once = load16;

inline void store16_once(void* to, Bytes16 bytes) {
  *static_cast<Bytes16*>(to) = bytes;
}

inline std::string& last_error() {
  static std::string error;
  return error;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, void*, const typename AsGiven<Parameters>::Type&... arguments) {
  last_error() = grid.blocks % grid.cluster == 0 ? "" : "the last cluster has less blocks than the others";
  for (int64_t i = 0; i < grid.blocks && last_error().empty(); i += grid.cluster) {
    const int64_t first = order() == "forward" ? i : grid.blocks - grid.cluster - i;
    last_error() = Cluster(first, grid, [&] { kernel(arguments...); }).run();
  }
  return last_error().empty() ? 0 : 1;
}

inline size_t most_shared_memory() {
  return kMostShared;
}

// Read each time, so that a test can change it.
template <typename... Parameters>
int most_cluster(void (*)(Parameters...), int, size_t) {
  const char* given = std::getenv("FAIRKERNELS_CLUSTER");
  return given != nullptr ? std::atoi(given) : kPortableCluster;
}

inline const char* error_text(int) {
  return last_error().c_str();
}

}  // namespace fairkernels::device
