// Stands in for the part of csrc/support/device.h that needs a GPU: blocks one after the other, the threads of a block
// as fibers on one thread of the CPU, in forward, reversed or random order (FAIRKERNELS_FIBERS). A fiber runs until it
// waits for others, so races in memory do not show; what shows are barriers and votes that not all take part in, wrong
// lane masks, shared memory that is written out of bounds (under AddressSanitizer also read) or read before it is
// written: it begins as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

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
#endif

#define FK_DEVICE inline
#define FK_KERNEL(threads) [[maybe_unused]] static void
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

#define FK_SITE Site site = {__builtin_FILE(), __builtin_LINE()}

// Memory of a block, with a guard behind it where no sanitizer watches.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes + kGuard]) {
    std::memset(data_.get(), 0xff, bytes_);
    std::memset(data_.get() + bytes_, kPattern, kGuard);
  }

  void* data() { return data_.get(); }
  bool intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (data_[bytes_ + i] != kPattern) {
        return false;
      }
    }
    return true;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif
  static constexpr unsigned char kPattern = 0xa5;
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

// Lanes of a warp that have come to the same exchange.
struct Exchange {
  Site site{};
  unsigned arrived = 0;
  uint64_t given[kWarp];
  uint64_t taken[kWarp];
};

class Block;

struct Fiber {
  int thread;
  Block* block;
  std::function<void()> body;
  bool done = false;
  bool started = false;
  jmp_buf place;
  ucontext_t context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
};

// Runs the fibers of one block; the one of this thread that is running is current().
class Block {
 public:
  Block(int64_t number, Grid grid, const std::function<void()>& body)
      : number_(number), grid_(grid), dynamic_(grid.shared_bytes), exchanges_((grid.threads + kWarp - 1) / kWarp) {
    for (int thread = 0; thread < grid.threads; ++thread) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->thread = thread;
      fibers_.back()->block = this;
      fibers_.back()->body = body;
      fibers_.back()->stack = stack_of(thread);
    }
  }

  static Fiber*& current() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  // The error, empty for none.
  std::string run() {
    for (auto& fiber : fibers_) {
      ready_.push_back(fiber.get());
    }
    while (!ready_.empty() && error_.empty()) {
      resume(next());
    }
    current() = nullptr;
    release_stacks();
    if (error_.empty() && finished_ < fibers_.size()) {
      error_ = waiting_text();
    }
    for (auto& memory : declared_) {
      if (error_.empty() && !memory.second->intact()) {
        error_ = "shared memory is written out of bounds, declared at " + std::string(std::get<0>(memory.first)) + ":" +
                 std::to_string(std::get<1>(memory.first));
      }
    }
    if (error_.empty() && !dynamic_.intact()) {
      error_ = "the shared memory of the launch is written out of bounds";
    }
    return error_;
  }

  int64_t number() const { return number_; }
  const Grid& grid() const { return grid_; }
  void* dynamic() { return dynamic_.data(); }

  void* declared(const char* file, int line, size_t bytes) {
    auto& memory = declared_[{file, line, bytes}];
    if (!memory) {
      memory = std::make_unique<SharedMemory>(bytes);
    }
    return memory->data();
  }

  void barrier(Site site) {
    if (arrived_.empty()) {
      barrier_site_ = site;
    } else if (!(barrier_site_ == site)) {
      stop("divergent barrier: threads wait at " + barrier_site_.text() + " and at " + site.text());
    }
    arrived_.push_back(current());
    if (arrived_.size() == fibers_.size()) {
      ready_.insert(ready_.end(), arrived_.begin(), arrived_.end());
      arrived_.clear();
    }
    wait();
  }

  // Gives a value to the other lanes and returns theirs, once all of them have come.
  const uint64_t* exchange(uint64_t value, unsigned lanes, Site site) {
    const int lane = current()->thread % kWarp;
    const int warp = current()->thread / kWarp;
    if ((lanes >> lane & 1) == 0) {
      stop("wrong lane mask: lane " + std::to_string(lane) + " is not in its own mask at " + site.text());
    }
    Exchange& exchange = exchanges_[warp][lanes];
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
          ready_.push_back(fibers_[warp * kWarp + other].get());
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

  static unsigned char* stack_of(int thread) {
    static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() <= static_cast<size_t>(thread)) {
      stacks.emplace_back(new unsigned char[kStack]);
    }
    return stacks[thread].get();
  }

  Fiber* next() {
    static const std::string order = std::getenv("FAIRKERNELS_FIBERS") ? std::getenv("FAIRKERNELS_FIBERS") : "forward";
    static std::minstd_rand random;
    size_t place = 0;
    if (order == "reversed") {
      place = ready_.size() - 1;
    } else if (order == "random") {
      place = random() % ready_.size();
    }
    Fiber* fiber = ready_[place];
    ready_.erase(ready_.begin() + static_cast<ptrdiff_t>(place));
    return fiber;
  }

  // Contexts are only begun with ucontext: its switches are system calls, those of setjmp are not. AddressSanitizer
  // takes a longjmp for an unwinding.
  void resume(Fiber* fiber) {
    current() = fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStack);
    if (!fiber->started) {
      begin(fiber);
    }
    swapcontext(&scheduler_context_, &fiber->context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    if (_setjmp(scheduler_place_) == 0) {
      if (fiber->started) {
        _longjmp(fiber->place, 1);
      }
      begin(fiber);
      setcontext(&fiber->context);
    }
#endif
  }

  void begin(Fiber* fiber) {
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &Block::enter, 0);
  }

  static void enter() {
    Fiber* fiber = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->block->scheduler_stack_, &fiber->block->scheduler_size_);
#endif
    fiber->body();
    fiber->done = true;
    ++fiber->block->finished_;
    fiber->block->wait();
  }

  void wait() {
    Fiber* fiber = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake_stack, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber->context, &scheduler_context_);
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack_, &scheduler_size_);
#else
    if (_setjmp(fiber->place) == 0) {
      _longjmp(scheduler_place_, 1);
    }
#endif
  }

  void release_stacks() {
#if defined(__SANITIZE_ADDRESS__)
    for (auto& fiber : fibers_) {
      __asan_unpoison_memory_region(fiber->stack, kStack);
    }
#endif
  }

  std::string waiting_text() const {
    const std::string count = std::to_string(fibers_.size() - finished_) + " of " + std::to_string(fibers_.size());
    if (!arrived_.empty()) {
      return "divergent barrier: not all threads come to " + barrier_site_.text() + ", " + count + " wait";
    }
    for (const auto& warp : exchanges_) {
      for (const auto& [lanes, exchange] : warp) {
        if (exchange.arrived != 0) {
          return "divergent exchange: not all lanes of the mask come to " + exchange.site.text();
        }
      }
    }
    return count + " threads wait for nothing";
  }

  int64_t number_;
  Grid grid_;
  SharedMemory dynamic_;
  std::map<std::tuple<const char*, int, size_t>, std::unique_ptr<SharedMemory>> declared_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  std::vector<Fiber*> arrived_;
  Site barrier_site_{};
  std::vector<std::map<unsigned, Exchange>> exchanges_;
  size_t finished_ = 0;
  std::string error_;
  jmp_buf scheduler_place_;
  ucontext_t scheduler_context_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};

inline void* shared_at(const char* file, int line, size_t bytes) {
  return Block::current()->block->declared(file, line, bytes);
}

inline int thread() {
  return Block::current()->thread;
}

inline int threads() {
  return Block::current()->block->grid().threads;
}

inline int64_t block() {
  return Block::current()->block->number();
}

inline int64_t blocks() {
  return Block::current()->block->grid().blocks;
}

inline void barrier(FK_SITE) {
  Block::current()->block->barrier(site);
}

inline void warp_barrier(unsigned lanes = kAllLanes, FK_SITE) {
  Block::current()->block->exchange(0, lanes, site);
}

template <typename T>
T from_lane(T value, int lane, unsigned lanes = kAllLanes, FK_SITE) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  Block* block = Block::current()->block;
  const uint64_t* words = block->exchange(word, lanes, site);
  if ((lanes >> (lane & (kWarp - 1)) & 1) == 0) {
    block->stop("wrong lane mask: lane " + std::to_string(lane) + " is read at " + site.text() + ", it is not in the mask");
  }
  std::memcpy(&value, &words[lane & (kWarp - 1)], sizeof(T));
  return value;
}

template <typename T>
T from_partner(T value, int bits, unsigned lanes = kAllLanes, FK_SITE) {
  return from_lane(value, (Block::current()->thread % kWarp) ^ bits, lanes, site);
}

inline unsigned vote(bool yes, unsigned lanes = kAllLanes, FK_SITE) {
  const uint64_t* words = Block::current()->block->exchange(yes ? 1 : 0, lanes, site);
  unsigned result = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((lanes >> lane & 1) != 0 && words[lane] != 0) {
      result |= 1u << lane;
    }
  }
  return result;
}

inline int bits_set(unsigned word) {
  return __builtin_popcount(word);
}

inline void set_bits(unsigned* word, unsigned bits) {
  *word |= bits;
}

template <typename T>
T* shared_memory() {
  return static_cast<T*>(Block::current()->block->dynamic());
}

inline Bytes16 load16(const void* from) {
  return *static_cast<const Bytes16*>(from);
}

inline Bytes16 load16_once(const void* from) {
  return load16(from);
}

inline void store16_once(void* to, Bytes16 bytes) {
  *static_cast<Bytes16*>(to) = bytes;
}

inline std::string& last_error() {
  static std::string error;
  return error;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, void*, const typename AsGiven<Parameters>::Type&... arguments) {
  static const bool backwards = std::getenv("FAIRKERNELS_FIBERS") && std::string(std::getenv("FAIRKERNELS_FIBERS")) != "forward";
  for (int64_t i = 0; i < grid.blocks; ++i) {
    Block block(backwards ? grid.blocks - 1 - i : i, grid, [&] { kernel(arguments...); });
    last_error() = block.run();
    if (!last_error().empty()) {
      return 1;
    }
  }
  return 0;
}

// The least that a GPU has; most have more.
inline size_t most_shared_memory() {
  return 99 << 10;
}

inline const char* error_text(int) {
  return last_error().c_str();
}

}  // namespace fairkernels::device
