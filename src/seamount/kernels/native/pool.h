// A pool of threads for one process, and one way to use it: parallel(tasks, body).
//
// The caller's thread works too. Waiting threads spin briefly, because the next operation of a step follows within
// microseconds, and then sleep in the kernel: an idle engine uses no processor.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace seamount {

// Sets the number of threads that the following calls use, the caller's included; at least 1.
void set_threads(int count);
int num_threads();

using Body = void (*)(void* context, int64_t task, int thread);
void run_parallel(int64_t tasks, Body body, void* context);

// Calls body(task, thread) for every task in [0, tasks), in no fixed order; returns when all are done.
// `thread` is in [0, num_threads()): it may index scratch memory. Not reentrant.
template <class F>
void parallel(int64_t tasks, F&& body) {
    using Closure = std::remove_reference_t<F>;
    run_parallel(
        tasks, [](void* context, int64_t task, int thread) { (*static_cast<Closure*>(context))(task, thread); }, &body);
}

}  // namespace seamount
