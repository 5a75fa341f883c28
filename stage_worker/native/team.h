// The threads of one rank. All of them get work at once. Helpers spin briefly between two pieces of work, which come
// microseconds apart within a step. They sleep between steps.
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
  // Makes `own` threads on the caller's cores, including the caller, and one more thread for each of the `lent` cores.
  Team(int own, const int32_t* lent, int lent_count) : size_(own + lent_count) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (int i = 0; i < lent_count; i++) CPU_SET(lent[i], &cores);
    for (int i = 1; i < size_; i++) {
      helpers_.emplace_back([this, i] { help(i); });
      // If the call fails, the thread runs on the caller's cores: slower, but correct.
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

  // Calls part(first, last, thread) on all threads at once, for ranges that together are 0 .. total. Returns when all
  // are done. A free thread takes the next range. So a thread that lost its core delays the others only a little, and a
  // thread that has not woken up does not delay them.
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
    open_.store(round);  // Set first, or a helper could see the new round while it is closed.
    round_.store(round);
    if (sleeping_.load() > 0) wake();
    work(0);
    open_.store(0);
    // A helper that saw the round open is counted in `inside_` by now. Any other one will see that it is closed.
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
  std::atomic<uint32_t> open_{0};  // Round that helpers may join; 0 for none.
  std::atomic<int> inside_{0};     // Number of helpers in a round.
  std::atomic<bool> stop_{false};
};

}  // namespace stagemesh
