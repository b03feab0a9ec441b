// Fibers for the emulator: a stack each, and a switch that costs a few nanoseconds. swapcontext
// would ask the kernel for the signal mask at every switch; it is the fallback where the few
// instructions below are not for this processor.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace wise::cuda::emulator {

// Memory for one stack, with a page below it that must not be touched.
class Stack {
 public:
  static constexpr std::size_t kSize = 128 * 1024;

  Stack() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, page_ + kSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    if (mprotect(memory_, page_, PROT_NONE) != 0) throw std::bad_alloc();
  }
  ~Stack() { munmap(memory_, page_ + kSize); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + page_; }

  // Forgets frames that will never return, for a sanitizer that would still guard them.
  void abandon() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom(), kSize);
#endif
  }

 private:
  std::size_t page_;
  char* memory_;
};

#if defined(__x86_64__)

// Saves what a call preserves on the stack that is left, and takes it from the one that is entered.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*left*/, void* /*entered*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

#endif

// A point of execution. A default-constructed one is whoever switches away from it first.
class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which must never return.
  void prepare(const Stack& stack, void (*entry)()) {
    bottom_ = stack.bottom();
#if defined(__SANITIZE_ADDRESS__)
    fake_stack_ = nullptr;
    // A fiber ends in calls that never return, and whose frames would stay guarded.
    constexpr std::size_t kLastCalls = 4096;
    __asan_unpoison_memory_region(bottom_ + Stack::kSize - kLastCalls, kLastCalls);
#endif
#if defined(__x86_64__)
    // As if `entry` had been called and had pushed nothing: eight bytes off a multiple of sixteen.
    auto** top = reinterpret_cast<void**>(stack.bottom() + Stack::kSize);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    at_ = top;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack.bottom();
    at_.uc_stack.ss_size = Stack::kSize;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
  }

  // Leaves this fiber for `other`; returns when something switches back.
  void switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size());
#endif
#if defined(__x86_64__)
    switch_stacks(&at_, other.at_);
#else
    swapcontext(&at_, &other.at_);
#endif
    arrived();
  }

  // What `entry` does first.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  // The stack of a thread that was not made here, so that switching back to it can name it.
  void describe(const void* bottom, std::size_t size) {
    bottom_ = static_cast<const char*>(bottom);
    own_size_ = size;
  }
#endif

 private:
#if defined(__SANITIZE_ADDRESS__)
  std::size_t size() const { return own_size_; }
  std::size_t own_size_ = Stack::kSize;
  void* fake_stack_ = nullptr;
#endif
  const char* bottom_ = nullptr;
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
};

}  // namespace wise::cuda::emulator
