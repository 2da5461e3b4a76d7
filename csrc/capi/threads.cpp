// A pool of worker threads shared by all calls of the process.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "capi/internal.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace lfq_internal {
namespace {

// One parallel call. Workers and the caller take tasks from `next` until none are left.
struct job {
  int64_t n_tasks;
  task_fn fn;
  void* context;
  int helpers_wanted;
  std::atomic<int> helpers_inside{0};
  int next_thread = 1;
  std::atomic<int64_t> next{0};

  void work(int thread) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) fn(context, t, thread);
  }
};

// Calls come one after another in tight loops, and waking a sleeping thread takes longer than a small call:
// wait a little with open eyes first, some 30 microseconds.
template <class F>
void spin_until(F&& done) {
  for (int i = 0; i < 2000 && !done(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// The same for a lock that others hold for a moment only.
void take(std::unique_lock<std::mutex>& lock) {
  spin_until([&] { return lock.try_lock(); });
  if (!lock.owns_lock()) lock.lock();
}

class pool {
 public:
  void run(job& j) {
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    take(lock);
    while (int(workers_) < j.helpers_wanted) {
      std::thread([this] { loop(); }).detach();
      ++workers_;
    }
    queue_.push_back(&j);
    waiting_ = int(queue_.size());
    lock.unlock();
    wake_.notify_all();
    j.work(0);
    spin_until([&] { return j.helpers_inside == 0; });
    take(lock);
    const auto it = std::find(queue_.begin(), queue_.end(), &j);
    if (it != queue_.end()) queue_.erase(it);
    waiting_ = int(queue_.size());
    done_.wait(lock, [&] { return j.helpers_inside == 0; });
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (queue_.empty()) {
        lock.unlock();
        spin_until([this] { return waiting_ > 0; });
        take(lock);
      }
      wake_.wait(lock, [this] { return !queue_.empty(); });
      job* j = queue_.front();
      ++j->helpers_inside;
      const int thread = j->next_thread++;
      if (--j->helpers_wanted == 0) queue_.erase(queue_.begin());
      waiting_ = int(queue_.size());
      lock.unlock();
      j->work(thread);
      take(lock);
      if (--j->helpers_inside == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<job*> queue_;
  std::atomic<int> waiting_{0};  // jobs in the queue, for those who do not hold the lock
  int workers_ = 0;
};

// Never destroyed: detached workers may outlive static destruction. A forked child has no workers and
// possibly a locked mutex, so it starts a pool of its own.
pool* the_pool = nullptr;
std::once_flag once;

void new_pool() { the_pool = new pool; }

}  // namespace

void parallel(int64_t n_tasks, int n_threads, task_fn fn, void* context) {
  const int n = int(std::min<int64_t>(n_threads, n_tasks));
  if (n <= 1) {
    for (int64_t t = 0; t < n_tasks; ++t) fn(context, t, 0);
    return;
  }
  std::call_once(once, [] {
    new_pool();
    pthread_atfork(nullptr, nullptr, new_pool);
  });
  job j;
  j.n_tasks = n_tasks;
  j.fn = fn;
  j.context = context;
  j.helpers_wanted = n - 1;
  the_pool->run(j);
}

int max_threads() {
  if (const char* e = std::getenv("LFQ_NUM_THREADS")) {
    const int n = std::atoi(e);
    if (n > 0) return std::min(n, 1024);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace lfq_internal
