#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace thresher {
namespace {

// Short work is over before a sleeping thread would be awake, so threads look for what they wait for for a moment (some
// 20 us) before they let others have the processor.
constexpr int SPINS = 500;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Work {
  void (*body)(void*, int64_t);
  void* context;
  int64_t parts;
  std::atomic<int64_t> next{0};

  void take() {
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) body(context, part);
  }
};

class Pool {
 public:
  void run(Work& work, int helpers) {
    grow(helpers);
    helpers = helpers < workers_ ? helpers : workers_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = helpers;
      busy_.store(helpers, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work.take();
    withdraw();
    for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < SPINS) pause();
      else std::this_thread::yield();
    }
  }

  std::mutex in_use;

 private:
  // Helpers that have not come by now are not waited for: there is nothing left for them to do.
  void withdraw() {
    std::lock_guard<std::mutex> lock(mutex_);
    busy_.fetch_sub(wanted_, std::memory_order_acq_rel);
    wanted_ = 0;
  }

  void grow(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {  // no more threads to be had: fewer share the work
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < SPINS && round_.load(std::memory_order_acquire) == seen; ++spin) pause();
      Work* work = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
        seen = round_.load(std::memory_order_relaxed);
        if (wanted_ == 0) continue;
        --wanted_;
        work = work_;
      }
      work->take();
      busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Work* work_ = nullptr;
  int wanted_ = 0;
  int workers_ = 0;
  std::atomic<int> busy_{0};
  std::atomic<uint64_t> round_{0};
};

std::atomic<Pool*> current{nullptr};

// A child has the parent's memory but none of its threads: it starts its own. The old pool's memory is left alone.
void forget() { current.store(nullptr); }

// Lives until the process ends, so that threads asleep in it need no farewell.
Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget);
  (void)registered;
  Pool* found = current.load();
  if (found == nullptr) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void run_parts(int64_t parts, int threads, void (*body)(void*, int64_t), void* context) {
  Work work{body, context, parts};
  const int64_t helpers = (parts < threads ? parts : threads) - 1;
  if (helpers > 0) {
    Pool& all = pool();
    std::unique_lock<std::mutex> lock(all.in_use, std::try_to_lock);
    if (lock.owns_lock()) return all.run(work, static_cast<int>(helpers));
  }
  work.take();
}

}  // namespace thresher
