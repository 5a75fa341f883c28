// Sums partial results over the ranks of a tensor-parallel group on one host, through shared memory.
//
// Each rank has two rooms (buffers) that only it writes, and uses them in turn. It fills one, raises its counter, and
// waits until every counter has the same value. Then it adds up all rooms in the order of ranks, so every rank gets the
// same bits. A room is written again two rounds later. By then every rank has raised its counter once more, so it has
// read the room.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace stagemesh {

class Exchange {
 public:
  struct alignas(64) Counter {
    std::atomic<uint32_t> rounds;
  };
  Exchange(void* memory, int rank, int size, size_t room_bytes, double timeout_s)
      : counters_((Counter*)memory), rooms_((char*)memory + size * sizeof(Counter)), rank_(rank), size_(size),
        room_bytes_(room_bytes), timeout_s_(timeout_s) {}

  size_t room_floats() const { return room_bytes_ / sizeof(float); }
  float* of(int rank) { return (float*)(rooms_ + ((size_t)rank * 2 + round_ % 2) * room_bytes_); }
  float* mine() { return of(rank_); }

  // Announces that this rank's room is filled, and waits for the others. Returns false if one is late.
  bool meet() {
    const uint32_t target = round_ + 1;
    counters_[rank_].rounds.store(target, std::memory_order_release);
    std::chrono::steady_clock::time_point deadline{};
    for (int r = 0; r < size_; r++) {
      int spins = 0;
      while ((int32_t)(counters_[r].rounds.load(std::memory_order_acquire) - target) < 0) {
        _mm_pause();
        if (++spins % 1024) continue;
        const auto now = std::chrono::steady_clock::now();
        if (deadline == std::chrono::steady_clock::time_point{})
          deadline = now + std::chrono::microseconds((int64_t)(timeout_s_ * 1e6));
        if (now > deadline) return false;
        sched_yield();
      }
    }
    return true;
  }

  // Ends the round, after this rank has read its rooms.
  void leave() { round_++; }

 private:
  Counter* const counters_;
  char* const rooms_;
  const int rank_, size_;
  const size_t room_bytes_;
  const double timeout_s_;
  uint32_t round_ = 0;
};

}  // namespace stagemesh
