#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

constexpr auto kSpinTime = std::chrono::microseconds(200);  // longer than the interval between two kernels of a step

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Work-sharing pool with one job at a time. Protocol: ``state_`` holds the job's number (high half) and its next piece
// (low half). The caller publishes the job's fields and then the state; a thread claims a piece by incrementing the
// state with compare-and-swap. A claim fails once the job has changed, so fields read of an old job are never used.
class Pool {
 public:
  void run(int64_t pieces, int threads, void (*piece)(void *, int64_t), void *context) {
    if (busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < pieces; i++) piece(context, i);
      return;
    }
    for (; workers_ < threads - 1; workers_++) std::thread(&Pool::work, this, workers_).detach();
    piece_.store(piece, std::memory_order_relaxed), context_.store(context, std::memory_order_relaxed);
    pieces_.store(pieces, std::memory_order_relaxed), helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = (state_.load(std::memory_order_relaxed) >> 32) + 1;
    state_.store(job << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> guard(sleep_);
      wake_.notify_all();
    }
    while (take(state_.load(std::memory_order_acquire))) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces; spins++)
      if (spins % 64 == 63)
        sched_yield();
      else
        pause();
    state_.store(job << 32 | kNothing, std::memory_order_release);  // no claims before the fields are overwritten
    busy_.store(false, std::memory_order_release);
  }

 private:
  static constexpr uint64_t kNothing = 0xffffffff;  // next piece of a job without pieces left

  // Claims and runs one piece of the job of ``state``; false when none is left. The fields may be those of a later job,
  // but then the compare-and-swap fails.
  bool take(uint64_t state) {
    while (static_cast<int64_t>(state & kNothing) < pieces_.load(std::memory_order_relaxed)) {
      const auto piece = piece_.load(std::memory_order_relaxed);
      const auto context = context_.load(std::memory_order_relaxed);
      const uint64_t job = state >> 32;
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
        piece(context, state & kNothing);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
      if (state >> 32 != job) return false;
    }
    return false;
  }

  void work(int number) {
    uint64_t seen = 0;
    for (;;) {
      auto until = std::chrono::steady_clock::now() + kSpinTime;
      uint64_t state;
      while ((state = state_.load(std::memory_order_acquire)) >> 32 == seen) {
        for (int i = 0; i < 32; i++) pause();
        if (std::chrono::steady_clock::now() < until) {
          sched_yield();
          continue;
        }
        std::unique_lock<std::mutex> guard(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(guard, [&] { return state_.load(std::memory_order_seq_cst) >> 32 != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = state >> 32;
      if (number >= helpers_.load(std::memory_order_relaxed)) continue;
      while (take(state_.load(std::memory_order_acquire))) {
      }
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{kNothing};  // job number << 32 | next piece
  std::atomic<void (*)(void *, int64_t)> piece_{nullptr};
  std::atomic<void *> context_{nullptr};
  std::atomic<int64_t> pieces_{0}, done_{0};
  std::atomic<int> helpers_{0}, sleepers_{0};
  int workers_ = 0;
};

// Never destroyed: its threads end with the process. A forked child has no threads and gets a new pool.
std::atomic<Pool *> pool{nullptr};

Pool *the_pool() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  (void)once;
  Pool *found = pool.load();
  if (!found) {
    Pool *made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return made;
    delete made;
  }
  return found;
}

}  // namespace

void run_pieces(int64_t pieces, int threads, void (*piece)(void *, int64_t), void *context) {
  the_pool()->run(pieces, threads, piece, context);
}
