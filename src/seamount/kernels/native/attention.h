// Attention over the paged cache: what a call is, how it is cut into work, and what an instruction set implements.
//
// The bits of one row of the result (a token and a head) depend on its query and its own context alone:
//   - rows never mix: each is a lane or a row of a tile, computed in an order that only its own context decides;
//   - the context is cut into splits of `kSplit` keys, counted from position 0. Within a split, scores, then their
//     maximum, then their exponentials, then the weighted sum of values; splits are merged in order;
//   - a key beyond a row's position has weight 0 exactly, and a value beyond it that is not finite is never multiplied.
// So it does not matter who shares a unit, how a prompt was chunked, where blocks lie, or how many threads work.
#pragma once

#include <algorithm>

#include "common.h"

namespace seamount {

constexpr int kSplit = 256;

// The new tokens of a flat batch and where their contexts lie; block b owns the slots from b * block_size on.
// The ABI with `kernels/cpu_attention.py`: keep both in step.
struct Pages {
    int64_t num_sequences;
    const int32_t* block_table;  // [S, table_stride]
    int64_t table_stride;
    const int32_t* query_starts;  // [S + 1]
    const int32_t* context_lens;  // [S], the new tokens included
    int32_t block_size;
};

// Strides are in elements. Heads of a slot lie side by side: [slots, K, D] and [slots, K, Dv].
struct Attention {
    const float* q;  // [T, H, D]
    int64_t q_stride;
    const void* keys;
    int64_t key_stride;
    const void* values;
    int64_t value_stride;
    Kind kind;  // of the caches: f32, f16 or bf16
    const Pages* pages;
    int num_heads, num_kv_heads, width, value_width;
    float scale;
    float* out;  // [T, H, Dv]
    int64_t out_stride;

    int group() const { return num_heads / num_kv_heads; }
    size_t item_bytes() const { return kind == kF32 ? 4 : 2; }
};

// Some rows of one sequence that share a key-value head. Row r is new token r / group, head r % group of the group.
struct Unit {
    int sequence, kv_head, first_row, num_rows;
    int num_splits;  // that its last row sees
};

// One split of a unit: what a thread works on at a time.
struct Piece {
    const Unit* unit;
    int split;
};

inline int num_new_tokens(const Pages& pages, int sequence) {
    return pages.query_starts[sequence + 1] - pages.query_starts[sequence];
}

// How many keys row `row` of a sequence sees from `start` on: at most kSplit.
inline int num_visible(const Attention& a, const Unit& unit, int row, int start) {
    const Pages& pages = *a.pages;
    const int before = pages.context_lens[unit.sequence] - num_new_tokens(pages, unit.sequence);
    return std::clamp(before + row / a.group() + 1 - start, 0, kSplit);
}

inline const float* query_row(const Attention& a, const Unit& unit, int row) {
    const int64_t token = a.pages->query_starts[unit.sequence] + row / a.group();
    return a.q + token * a.q_stride + int64_t(unit.kv_head * a.group() + row % a.group()) * a.width;
}
inline float* out_row(const Attention& a, const Unit& unit, int row) {
    const int64_t token = a.pages->query_starts[unit.sequence] + row / a.group();
    return a.out + token * a.out_stride + int64_t(unit.kv_head * a.group() + row % a.group()) * a.value_width;
}

// Slots of the `count` keys of a sequence from position `start` on.
inline void find_slots(const Pages& pages, int sequence, int start, int count, int64_t* slots) {
    const int32_t* table = pages.block_table + sequence * pages.table_stride;
    int block = start / pages.block_size, offset = start % pages.block_size;
    for (int done = 0; done < count; block++, offset = 0) {
        const int take = std::min(count - done, pages.block_size - offset);
        const int64_t first = int64_t(table[block]) * pages.block_size + offset;
        for (int i = 0; i < take; i++) slots[done + i] = first + i;
        done += take;
    }
}

inline int round_to(int value, int step) { return (value + step - 1) / step * step; }

// One instruction set's arithmetic. A partial is what one split, or several merged, amount to: per row a maximum, a sum
// of exponentials and a weighted sum of values, in a layout of the implementation's own.
class AttentionKernel {
   public:
    virtual ~AttentionKernel() = default;
    virtual int max_rows(const Attention& a) const = 0;
    virtual size_t scratch_bytes(const Attention& a) const = 0;
    virtual size_t partial_floats(const Attention& a, int num_rows) const = 0;
    // Packs the unit's queries into scratch; every `attend` of the unit on this thread follows.
    virtual void prepare(const Attention& a, const Unit& unit, void* scratch) const = 0;
    // `next` is what this thread probably attends to after this: it may be fetched from memory meanwhile. May be null.
    virtual void attend(const Attention& a, const Piece& piece, const Piece* next, void* scratch,
                        float* partial) const = 0;
    virtual void merge(const Attention& a, const Unit& unit, float* into, const float* next) const = 0;
    virtual void finish(const Attention& a, const Unit& unit, const float* partial) const = 0;
};

namespace plain { const AttentionKernel& attention_kernel(); }
namespace avx2 { const AttentionKernel& attention_kernel(); }
namespace avx512 { const AttentionKernel& attention_kernel(); }
namespace amx { const AttentionKernel& attention_kernel(); }  // bf16 caches only

void attention(const Attention& a);

}  // namespace seamount
