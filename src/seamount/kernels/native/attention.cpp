// Attention over the paged cache: cuts a call into units and splits, and shares them out to the threads.

#include "attention.h"

#include <vector>

#include "replay.h"

namespace seamount {
namespace {

// Partials that wait to be merged take at most this much memory, whatever the context.
constexpr size_t kWaitingBytes = size_t(16) << 20;
// Units that one thread takes at a time, at most: it then knows what it will read next.
constexpr size_t kMostUnits = 8;

const AttentionKernel& choose_kernel(const Attention& a) {
#if defined(__x86_64__)
    if (isa == kAmx && a.kind == kBF16) return amx::attention_kernel();
    if (isa >= kAvx512) return avx512::attention_kernel();
    if (isa >= kAvx2) return avx2::attention_kernel();
#endif
    (void)a;
    return plain::attention_kernel();
}

// The rows with the longest contexts come first, so that threads finish together.
void cut_into_units(const Attention& a, int max_rows, std::vector<Unit>& units) {
    units.clear();
    for (int s = 0; s < a.pages->num_sequences; s++) {
        const int rows = num_new_tokens(*a.pages, s) * a.group();
        const int before = a.pages->context_lens[s] - num_new_tokens(*a.pages, s);
        for (int first = (rows - 1) / max_rows * max_rows; first >= 0 && rows > 0; first -= max_rows) {
            const int count = std::min(max_rows, rows - first);
            const int seen = before + (first + count - 1) / a.group() + 1;
            for (int head = 0; head < a.num_kv_heads; head++)
                units.push_back({s, head, first, count, (seen + kSplit - 1) / kSplit});
        }
    }
}

void* thread_scratch(size_t bytes) {
    thread_local Scratch scratch;
    return scratch.get(bytes);
}

// Each thread takes whole units, several at a time if there are many, and goes through a unit's splits in order.
void attend_units(const Attention& a, const AttentionKernel& kernel, const std::vector<Unit>& units) {
    const size_t scratch_bytes = (kernel.scratch_bytes(a) + 63) & ~size_t(63);
    const size_t run = std::clamp<size_t>(units.size() / (8 * size_t(num_threads())), 1, kMostUnits);
    parallel(int64_t((units.size() + run - 1) / run), [&](int64_t task, int) {
        const size_t end = std::min(units.size(), (size_t(task) + 1) * run);
        for (size_t u = size_t(task) * run; u < end; u++) {
            const Unit& unit = units[u];
            const size_t floats = kernel.partial_floats(a, unit.num_rows);
            char* scratch = static_cast<char*>(thread_scratch(scratch_bytes + 2 * floats * sizeof(float)));
            float* total = reinterpret_cast<float*>(scratch + scratch_bytes);
            kernel.prepare(a, unit, scratch);
            for (int split = 0; split < unit.num_splits; split++) {
                const bool last = split + 1 == unit.num_splits;
                const Piece next = last ? Piece{u + 1 < end ? &units[u + 1] : nullptr, 0} : Piece{&unit, split + 1};
                kernel.attend(a, {&unit, split}, next.unit ? &next : nullptr, scratch, split ? total + floats : total);
                if (split) kernel.merge(a, unit, total, total + floats);
            }
            kernel.finish(a, unit, total);
        }
    });
}

// Few units: the splits of one go to different threads, some at a time, and are merged in order when a wave of them is
// done.
void attend_splits(const Attention& a, const AttentionKernel& kernel, const std::vector<Unit>& units) {
    int rows = 0, most = 0;
    for (const Unit& unit : units) {
        rows = std::max(rows, unit.num_rows);
        most = std::max(most, unit.num_splits);
    }
    const int num_units = int(units.size());
    const size_t floats = kernel.partial_floats(a, rows);
    const size_t fitting = kWaitingBytes / (floats * sizeof(float) * units.size());
    const int wave = std::clamp(int(std::min(fitting, size_t(1) << 20)), std::min(most, 4 * num_threads()), most);
    thread_local Scratch waiting_memory;
    float* waiting = waiting_memory.get_as<float>(units.size() * size_t(wave + 1) * floats);
    // Place 0 of a unit holds its total.
    const auto place = [&](int unit, int i) {
        return waiting + (size_t(unit) * size_t(wave + 1) + size_t(i)) * floats;
    };
    for (int first = 0; first < most; first += wave) {
        const int count = std::min(wave, most - first);
        const int run = std::clamp(num_units * count / (4 * num_threads()), 1, count);
        const int num_runs = (count + run - 1) / run;
        parallel(int64_t(num_units) * num_runs, [&](int64_t task, int) {
            const int u = int(task / num_runs), begin = first + int(task % num_runs) * run;
            const Unit& unit = units[size_t(u)];
            const int end = std::min({begin + run, first + count, unit.num_splits});
            if (begin >= end) return;
            void* scratch = thread_scratch(kernel.scratch_bytes(a));
            kernel.prepare(a, unit, scratch);
            for (int split = begin; split < end; split++) {
                const Piece next = {&unit, split + 1};
                kernel.attend(a, {&unit, split}, split + 1 < end ? &next : nullptr, scratch,
                              place(u, split ? split - first + 1 : 0));
            }
        });
        parallel(num_units, [&](int64_t task, int) {
            const int u = int(task);
            const Unit& unit = units[size_t(u)];
            for (int split = std::max(first, 1); split < std::min(first + count, unit.num_splits); split++)
                kernel.merge(a, unit, place(u, 0), place(u, split - first + 1));
            if (unit.num_splits > first && unit.num_splits <= first + count) kernel.finish(a, unit, place(u, 0));
        });
    }
}

}  // namespace

void attention(const Attention& a) {
    const AttentionKernel& kernel = choose_kernel(a);
    thread_local std::vector<Unit> units;
    cut_into_units(a, kernel.max_rows(a), units);
    int64_t total = 0, most = 0;
    for (const Unit& unit : units) {
        total += unit.num_splits;
        most = std::max<int64_t>(most, unit.num_splits);
    }
    if (units.empty()) return;
    if (most == 1 || num_threads() == 1 || most * 2 * num_threads() <= total)
        attend_units(a, kernel, units);
    else
        attend_splits(a, kernel, units);
}

}  // namespace seamount

// Causal attention of new tokens to cached keys and values, their own included; see `kernels/cpu_attention.py`.
SEAMOUNT_API void seamount_attention(const float* q, int64_t q_stride, const void* keys, int64_t key_stride,
                                     const void* values, int64_t value_stride, int32_t kind,
                                     const seamount::Pages* pages, int32_t num_heads, int32_t num_kv_heads,
                                     int32_t width, int32_t value_width, float scale, float* out, int64_t out_stride) {
    seamount::attention({q, q_stride, keys, key_stride, values, value_stride, seamount::Kind(kind), pages, num_heads,
                         num_kv_heads, width, value_width, scale, out, out_stride});
}
SEAMOUNT_STEP(seamount_attention)
