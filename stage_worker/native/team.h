// The threads of one rank. Work is given to all of them at once; helpers spin for a moment between two pieces of work,
// which come microseconds apart within a step, and sleep between steps.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace stagemesh {

class Team {
 public:
  // `own` threads where the caller may run, the caller among them, and one more for each of `lent` cores, on these.
  Team(int own, const int32_t* lent, int lent_count) : size_(own + lent_count) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (int i = 0; i < lent_count; i++) CPU_SET(lent[i], &cores);
    for (int i = 1; i < size_; i++) {
      helpers_.emplace_back([this, i] { help(i); });
      // Refused, it runs where the caller does: slower, not wrong.
      if (i >= own) pthread_setaffinity_np(helpers_.back().native_handle(), sizeof cores, &cores);
    }
  }

  ~Team() {
    stop_ = true;
    round_.fetch_add(1);
    wake();
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return size_; }

  // Calls part(first, last, thread) for ranges that make up 0 .. total, on all threads at once; returns when all are
  // done. Whoever is free takes the next range, so a thread that the kernel took its core from holds up little, and
  // one that has not come yet nothing.
  template <class Part>
  void run(int total, Part&& part) {
    if (size_ <= 1 || total <= 1) {
      part(0, total, 0);
      return;
    }
    const int grain = std::max(1, total / (size_ * kRangesEach));
    std::atomic<int> next{0};
    std::function<void(int)> work = [&](int thread) {
      for (int at; (at = next.fetch_add(grain, std::memory_order_relaxed)) < total;)
        part(at, std::min(at + grain, total), thread);
    };
    work_ = &work;
    const uint32_t round = round_.load() + 1;
    open_.store(round);  // before the round is seen, or a helper would find it closed
    round_.store(round);
    if (sleeping_.load() > 0) wake();
    work(0);
    open_.store(0);
    // Who saw the round open before it closed is counted as inside by now, or will see that it is closed.
    while (inside_.load() != 0) _mm_pause();
  }

 private:
  static constexpr int kSpins = 4000;  // about 50 us
  static constexpr int kRangesEach = 4;

  void wake() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, size_, nullptr, nullptr, 0); }

  void help(int index) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; round_.load() == seen; spins++) {
        if (spins < kSpins) {
          _mm_pause();
          continue;
        }
        sleeping_.fetch_add(1);
        syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleeping_.fetch_sub(1);
      }
      seen = round_.load();
      if (stop_) return;
      inside_.fetch_add(1);
      if (open_.load() == seen) (*work_)(index);
      inside_.fetch_sub(1);
    }
  }

  const int size_;
  std::vector<std::thread> helpers_;
  std::function<void(int)>* work_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<uint32_t> open_{0};  // the round that may be joined; 0: none
  std::atomic<int> inside_{0};     // helpers in a round
  std::atomic<bool> stop_{false};
};

}  // namespace stagemesh
