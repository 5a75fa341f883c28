// The threads of one rank. A part of the work is given to all of them at once; helpers spin for a moment between parts,
// which come microseconds apart within a step, and sleep between steps.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace stagemesh {

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int i = 1; i < size; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Team() {
    stop_ = true;
    wake();
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return size_; }

  // Calls part(i, n) for i in 0 .. n-1, each on a thread of its own; returns when all are done.
  template <class Part>
  void run(int n, Part&& part) {
    if (n > size_) n = size_;
    if (n <= 1) {
      part(0, 1);
      return;
    }
    std::function<void(int)> call = [&](int i) {
      if (i < n) part(i, n);
    };
    call_ = &call;
    left_.store(size_ - 1, std::memory_order_relaxed);
    wake();
    part(0, n);
    while (left_.load(std::memory_order_acquire) != 0) _mm_pause();
  }

 private:
  static constexpr int kSpins = 4000;  // about 50 us

  void wake() {
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, size_, nullptr, nullptr, 0);
  }

  void help(int index) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (round_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          _mm_pause();
          continue;
        }
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      (*call_)(index);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int size_;
  std::vector<std::thread> helpers_;
  std::function<void(int)>* call_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace stagemesh
