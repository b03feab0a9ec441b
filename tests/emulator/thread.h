// What the emulator knows of a CUDA thread, and what the lanes of a warp give one another.
#pragma once

#include <cstring>
#include <string>

#include "tests/emulator/cuda_emulator.h"
#include "tests/emulator/fiber.h"

namespace wise::cuda::emulator {

enum class State : uint8_t { kReady, kAtCollective, kAtBarrier, kEnded };

struct Thread {
  Fiber fiber;
  State state;
  // The call it waits in, and what came of it.
  Kind kind;
  unsigned mask;
  int operand;
  int width;
  uint64_t value;
  uint64_t result;
  Place place;
};

inline bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Calls f(lane) for the lanes of a mask, in ascending order.
template <typename F>
void each_lane(unsigned mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Whether the lanes of the mask, which all wait, wait in the same call.
inline bool meet(const Thread* warp, unsigned mask, const Thread& self) {
  bool all = true;
  each_lane(mask, [&](int lane) {
    const Thread& other = warp[lane];
    all = all && other.mask == mask && other.kind == self.kind && other.width == self.width &&
          same(other.place, self.place);
  });
  return all;
}

// As the PTX instruction has it: a lane whose source lies outside its segment keeps its own.
inline int source_of(const Thread& thread, int lane) {
  const int begin = lane & ~(thread.width - 1);
  const int last = begin + thread.width - 1;
  switch (thread.kind) {
    case Kind::kShuffle:
      return begin | (thread.operand & (thread.width - 1));
    case Kind::kShuffleUp:
      return lane - thread.operand >= begin ? lane - thread.operand : lane;
    case Kind::kShuffleDown:
      return lane + thread.operand <= last ? lane + thread.operand : lane;
    default:
      return (lane ^ thread.operand) <= last ? lane ^ thread.operand : lane;
  }
}

// What a collective makes of the values of all its lanes; the same for each of them.
inline uint64_t total_of(const Thread* warp, unsigned mask, Kind kind) {
  const int first = __builtin_ctz(mask);
  uint64_t total = warp[first].value;
  if (kind == Kind::kBallot) total = uint64_t{total != 0} << first;
  each_lane(mask & (mask - 1), [&](int lane) {
    const uint64_t value = warp[lane].value;
    const bool less = static_cast<int64_t>(value) < static_cast<int64_t>(total);
    switch (kind) {
      case Kind::kBallot:
        total |= uint64_t{value != 0} << lane;
        break;
      case Kind::kAdd:
        total += value;
        break;
      case Kind::kMin:
        total = less ? value : total;
        break;
      case Kind::kMax:
        total = less ? total : value;
        break;
      case Kind::kAnd:
        total &= value;
        break;
      case Kind::kOr:
        total |= value;
        break;
      case Kind::kXor:
        total ^= value;
        break;
      default:
        break;
    }
  });
  return total;
}

// Gives every lane of the mask its result; returns why that cannot be, or nothing.
inline std::string resolve(Thread* warp, unsigned mask) {
  const Kind kind = warp[__builtin_ctz(mask)].kind;
  std::string failure;
  if (kind == Kind::kMatchAny) {
    each_lane(mask, [&](int lane) {
      warp[lane].result = 0;
      each_lane(mask, [&](int other) {
        warp[lane].result |= uint64_t{warp[other].value == warp[lane].value} << other;
      });
    });
  } else if (kind >= Kind::kShuffle && kind <= Kind::kShuffleXor) {
    each_lane(mask, [&](int lane) {
      const int from = source_of(warp[lane], lane);
      warp[lane].result = warp[from].value;
      if ((mask >> from & 1u) == 0 && failure.empty()) {
        failure = "lane " + std::to_string(lane) + " reads from lane " + std::to_string(from) +
                  ", which takes no part,";
      }
    });
  } else {
    const uint64_t total = total_of(warp, mask, kind);
    each_lane(mask, [&](int lane) { warp[lane].result = total; });
  }
  return failure;
}

}  // namespace wise::cuda::emulator
