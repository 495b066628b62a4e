// What memory gives at best: all threads read a large array, each its own consecutive part.

#include "common.h"

// Returns the sum of the array's words, so that nothing of the reading can be left out. `bytes` is a multiple of 256.
SEAMOUNT_API uint64_t seamount_read(const void* array, int64_t bytes) {
    constexpr int64_t kPart = 1 << 20;
    typedef uint64_t Words __attribute__((vector_size(64)));
    std::atomic<uint64_t> total{0};
    seamount::parallel((bytes + kPart - 1) / kPart, [&](int64_t task, int) {
        auto* from = static_cast<const char*>(array) + task * kPart;
        auto* end = from + (bytes - task * kPart < kPart ? bytes - task * kPart : kPart);
        Words sums[4] = {};
        for (; from < end; from += sizeof sums)
            for (int i = 0; i < 4; i++) {
                Words words;
                std::memcpy(&words, from + i * 64, 64);
                sums[i] += words;
            }
        const Words all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        uint64_t sum = 0;
        for (int i = 0; i < 8; i++) sum += all[i];
        total += sum;
    });
    return total;
}
