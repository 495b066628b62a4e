#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define SEAMOUNT_PAUSE() _mm_pause()
#else
#define SEAMOUNT_PAUSE() std::this_thread::yield()
#endif

namespace seamount {
namespace {

// About 200 microseconds: longer than the gap between two operations of a step, whose Python runs from cold caches;
// shorter than anyone would notice.
constexpr int kSpins = 4000;

struct Job {
    Body body = nullptr;
    void* context = nullptr;
    int64_t tasks = 0;
};

// One cache line each: they are written by different threads all the time.
struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};
struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};
};

void sleep_while(Word& word, uint32_t seen) {
    for (int i = 0; i < kSpins; i++) {
        if (word.value.load(std::memory_order_acquire) != seen) return;
        SEAMOUNT_PAUSE();
    }
    word.sleepers.fetch_add(1);
    while (word.value.load() == seen)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word.value), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    word.sleepers.fetch_sub(1);
}

void wake(Word& word) {
    word.value.fetch_add(1);
    if (word.sleepers.load())
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word.value), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

struct Pool {
    Job job;
    Counter next;
    Counter running;  // helpers that have not finished the current job
    Word begun;       // counts jobs
    Word ended;       // counts finished jobs
    std::atomic<bool> closing{false};
    std::vector<std::thread> helpers;

    explicit Pool(int count) {
        for (int i = 1; i < count; i++) helpers.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        closing = true;
        wake(begun);
        for (auto& helper : helpers) helper.join();
    }
    void work(int thread) {
        for (;;) {
            int64_t task = next.value.fetch_add(1, std::memory_order_relaxed);
            if (task >= job.tasks) return;
            job.body(job.context, task, thread);
        }
    }
    void serve(int thread) {
        uint32_t seen = 0;
        for (;;) {
            sleep_while(begun, seen);
            seen++;
            if (closing) return;
            work(thread);
            if (running.value.fetch_sub(1, std::memory_order_acq_rel) == 1) wake(ended);
        }
    }
    void run(int64_t tasks, Body body, void* context) {
        job = {body, context, tasks};
        next.value.store(0, std::memory_order_relaxed);
        running.value.store(int64_t(helpers.size()), std::memory_order_relaxed);
        uint32_t seen = ended.value.load();
        wake(begun);
        work(0);
        sleep_while(ended, seen);
    }
};

std::mutex guard;
std::unique_ptr<Pool> pool;
int threads = 1;

// Threads do not survive a fork; the child makes its own when it needs them.
void forget_pool() { (void)pool.release(); }

}  // namespace

void set_threads(int count) {
    std::lock_guard lock(guard);
    threads = count < 1 ? 1 : count;
    if (pool && int(pool->helpers.size()) + 1 != threads) pool.reset();
}

int num_threads() { return threads; }

void run_parallel(int64_t tasks, Body body, void* context) {
    std::lock_guard lock(guard);
    if (threads == 1 || tasks <= 1) {
        for (int64_t i = 0; i < tasks; i++) body(context, i, 0);
        return;
    }
    if (!pool) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
        (void)registered;
        pool = std::make_unique<Pool>(threads);
    }
    pool->run(tasks, body, context);
}

}  // namespace seamount
