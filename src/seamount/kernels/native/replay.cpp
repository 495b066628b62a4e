// Makes the calls of a recorded step again: see `kernels/recording.py`.

#include "replay.h"

SEAMOUNT_API void seamount_replay(const seamount::Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].run(calls[i].arguments);
}
