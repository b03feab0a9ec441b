// The emulator's scheduler. Threads run until they wait; then the next in line goes on. The line is
// put in another order after each round, as the seed says.
#include "tests/emulator/cuda_emulator.h"

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/emulator/thread.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace wise::cuda::emulator {

namespace {

constexpr int kWarp = 32;
constexpr int kNobody = -1;
// What every architecture we compile for offers a block, static and dynamic.
constexpr std::size_t kSharedBytes = 163 * 1024;
constexpr std::size_t kStaticSharedBytes = 48 * 1024;

// One WISE_SHARED variable; memory of its own, so that a sanitizer sees its end.
struct StaticShared {
  const void* tag;
  std::size_t size;
  std::unique_ptr<unsigned char[]> memory;
  bool in_use;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t below(uint64_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % bound;
  }

 private:
  uint64_t state_;
};

std::string text_of(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line());
}

unsigned char* poisoned(unsigned char* memory, std::size_t size) {
  std::memset(memory, 0xff, size);  // NaN in every floating-point type, -1 in integers
  return memory;
}

[[noreturn]] void enter();

class Engine {
 public:
  uint64_t seed = 0;
  uint64_t launches = 0;

  void run(const char* name, Extent grid, int threads, std::size_t shared_bytes,
           void (*call)(const void*), const void* thread) {
    const std::lock_guard<std::mutex> alone(mutex_);
    name_ = name;
    call_ = call;
    thread_ = thread;
    random_ = Random(seed);
    error_.clear();
    statics_.clear();
    shared_bytes_ = shared_bytes;
    dynamic_ = std::make_unique<unsigned char[]>(shared_bytes);
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
               static_cast<unsigned>(grid.z)};
    if (shared_bytes > kSharedBytes) {
      raise(std::to_string(shared_bytes) + " bytes of dynamic shared memory are too many");
    }
    ++launches;
    while (stacks_.size() < static_cast<std::size_t>(threads)) {
      stacks_.push_back(std::make_unique<Stack>());
    }
    threads_.resize(static_cast<std::size_t>(threads));
    std::vector<int64_t> blocks(static_cast<std::size_t>(grid.x * grid.y * grid.z));
    std::iota(blocks.begin(), blocks.end(), int64_t{0});
    permute(blocks);
    for (const int64_t block : blocks) {
      blockIdx = {static_cast<unsigned>(block % grid.x),
                  static_cast<unsigned>(block / grid.x % grid.y),
                  static_cast<unsigned>(block / (grid.x * grid.y))};
      run_block();
    }
  }

  // A thread's whole life.
  [[noreturn]] void live() {
    threads_[running_].fiber.arrived();
    call_(thread_);
    threads_[running_].state = State::kEnded;
    ended_[running_ / kWarp] |= 1u << running_ % kWarp;
    --alive_;
    // Those who wait at a barrier no longer wait for this thread.
    if (alive_ > 0 && waiting_ == alive_) release_barrier();
    leave();
    __builtin_unreachable();
  }

  uint64_t collective(Kind kind, unsigned mask, uint64_t value, int operand, int width,
                      const Place& place) {
    Thread& self = threads_[running_];
    const int lane = running_ % kWarp;
    const int first = running_ - lane;
    if ((mask >> lane & 1u) == 0) stop("the mask does not name the calling lane", place);
    if ((ended_[running_ / kWarp] & mask) != 0) stop("the mask names a lane that has ended", place);
    self.state = State::kAtCollective;
    self.kind = kind;
    self.mask = mask;
    self.value = value;
    self.operand = operand;
    self.width = width;
    self.place = place;
    unsigned& gathered = gathered_[running_ / kWarp];
    gathered |= 1u << lane;
    if ((gathered & mask) == mask && meet(&threads_[first], mask, self)) {
      const std::string failure = resolve(&threads_[first], mask);
      if (!failure.empty()) stop(failure, place);
      gathered &= ~mask;
      each_lane(mask, [&](int other) {
        threads_[first + other].state = State::kReady;
        if (first + other != running_) line_.push_back(first + other);
      });
    } else {
      leave();
    }
    return self.result;
  }

  int barrier(bool value, const Place& place) {
    Thread& self = threads_[running_];
    self.state = State::kAtBarrier;
    self.place = place;
    votes_ += value;
    ++waiting_;
    if (waiting_ == alive_) release_barrier();
    leave();
    return static_cast<int>(self.result);
  }

  [[noreturn]] void stop(const std::string& reason, const Place& place) {
    const uint3 at = threadIdx;
    error_ = reason + " at " + text_of(place) + ", block (" + std::to_string(blockIdx.x) + ", " +
             std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "), thread " +
             std::to_string(at.x);
    threads_[running_].fiber.switch_to(main_);
    __builtin_unreachable();
  }

  void* dynamic_shared() { return dynamic_.get(); }

  void* static_shared(const void* tag, std::size_t size) {
    StaticShared* found = nullptr;
    std::size_t total = size;
    for (StaticShared& variable : statics_) {
      total += variable.size;
      if (variable.tag == tag) found = &variable;
    }
    if (found == nullptr) {
      if (total > kStaticSharedBytes || total + shared_bytes_ > kSharedBytes) {
        stop("more shared memory than a block may have", Place::current());
      }
      statics_.push_back({tag, size, std::make_unique<unsigned char[]>(size), false});
      found = &statics_.back();
    }
    if (!found->in_use) poisoned(found->memory.get(), size);
    found->in_use = true;
    return found->memory.get();
  }

 private:
  void run_block() {
    poisoned(dynamic_.get(), shared_bytes_);
    for (StaticShared& variable : statics_) variable.in_use = false;
    const int count = static_cast<int>(threads_.size());
    alive_ = count;
    waiting_ = 0;
    votes_ = 0;
    gathered_.fill(0);
    ended_.fill(0);
    line_.clear();
    round_.resize(threads_.size());
    std::iota(round_.begin(), round_.end(), 0);
    permute(round_);
    position_ = 0;
    for (int i = 0; i < count; ++i) {
      threads_[i].state = State::kReady;
      threads_[i].fiber.prepare(*stacks_[i], [] { enter(); });
    }
    running_ = kNobody;
#if defined(__SANITIZE_ADDRESS__)
    describe_main();
#endif
    main_.switch_to(threads_[take_next()].fiber);
    if (alive_ == 0) return;
    for (const std::unique_ptr<Stack>& stack : stacks_) stack->abandon();
    raise(error_.empty() ? "threads wait for each other: " + who_waits() : error_);
  }

  // The next thread in line becomes the running one; kNobody at the end.
  int take_next() {
    if (position_ == round_.size()) {
      round_.swap(line_);
      line_.clear();
      position_ = 0;
      permute(round_);
      if (round_.empty()) return kNobody;
    }
    running_ = round_[position_++];
    threadIdx = {static_cast<unsigned>(running_), 0, 0};
    return running_;
  }

  // Lets others run until this thread is ready again.
  void leave() {
    Fiber& here = threads_[running_].fiber;
    const int before = running_;
    const int next = take_next();
    if (next == before) return;
    here.switch_to(next == kNobody ? main_ : threads_[next].fiber);
  }

  void release_barrier() {
    const Thread* first = nullptr;
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      if (thread.state != State::kAtBarrier) continue;
      if (first == nullptr) first = &thread;
      if (!same(thread.place, first->place)) {
        stop("threads meet at different barriers, one at " + text_of(first->place) + ", one",
             thread.place);
      }
      thread.state = State::kReady;
      thread.result = static_cast<uint64_t>(votes_);
      line_.push_back(static_cast<int>(i));
    }
    waiting_ = 0;
    votes_ = 0;
  }

  std::string who_waits() const {
    std::map<std::string, int> places;
    for (const Thread& thread : threads_) {
      if (thread.state == State::kEnded) continue;
      const char* kind = thread.state == State::kAtBarrier ? "a barrier" : "a warp function";
      ++places[std::string("at ") + kind + " at " + text_of(thread.place)];
    }
    std::ostringstream out;
    const char* separator = "";
    for (const auto& [place, count] : places) {
      out << separator << count << " " << place;
      separator = ", ";
    }
    return out.str();
  }

  [[noreturn]] void raise(const std::string& reason) const {
    throw std::runtime_error(std::string("wise_ext: ") + name_ + " on the emulator: " + reason);
  }

  template <typename T>
  void permute(std::vector<T>& order) {
    if (seed == 0) return;
    if (seed == 1) {
      std::reverse(order.begin(), order.end());
      return;
    }
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  }

#if defined(__SANITIZE_ADDRESS__)
  void describe_main() {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    std::size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
    main_.describe(bottom, size);
  }
#endif

  std::mutex mutex_;
  const char* name_ = "";
  void (*call_)(const void*) = nullptr;
  const void* thread_ = nullptr;
  Random random_{0};
  std::string error_;

  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Thread> threads_;
  Fiber main_;
  int running_ = kNobody;

  // Who still runs in this round, and who will in the next.
  std::vector<int> round_;
  std::size_t position_ = 0;
  std::vector<int> line_;

  int alive_ = 0;
  int waiting_ = 0;  // at the barrier
  int votes_ = 0;
  std::array<unsigned, 32> gathered_{};  // lanes at a warp function, by warp
  std::array<unsigned, 32> ended_{};     // lanes that have ended, by warp

  std::size_t shared_bytes_ = 0;
  std::unique_ptr<unsigned char[]> dynamic_;
  std::vector<StaticShared> statics_;
};

Engine& engine() {
  static Engine instance;
  return instance;
}

void enter() { engine().live(); }

}  // namespace

void run_grid(const char* name, Extent grid, int threads, std::size_t shared_bytes,
              void (*call)(const void*), const void* thread) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  engine().run(name, grid, threads, shared_bytes, call, thread);
}

void fail(const char* reason, const Place& place) { engine().stop(reason, place); }

uint64_t warp_collective(Kind kind, unsigned mask, uint64_t value, int operand, int width,
                         const Place& place) {
  return engine().collective(kind, mask, value, operand, width, place);
}

int block_barrier(bool value, const Place& place) { return engine().barrier(value, place); }

void* dynamic_shared() { return engine().dynamic_shared(); }

void* static_shared(const void* tag, std::size_t size) { return engine().static_shared(tag, size); }

}  // namespace wise::cuda::emulator

// For tests, by way of ctypes. Seed 0 runs threads and blocks in ascending order, 1 in descending
// order, every other seed in a random order of its own.
extern "C" __attribute__((visibility("default"))) void wise_emulator_schedule(uint64_t seed) {
  wise::cuda::emulator::engine().seed = seed;
}

// Kernels launched so far.
extern "C" __attribute__((visibility("default"))) uint64_t wise_emulator_launches() {
  return wise::cuda::emulator::engine().launches;
}
