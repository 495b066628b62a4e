// Words that all kernels share: how a weight matrix lies in memory, how a batch is described, which chip this is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "pool.h"

// Callable from Python through ctypes.
#define SEAMOUNT_API extern "C" __attribute__((visibility("default")))

namespace seamount {

// Element types of weights and caches; the numbers are the ABI with `kernels/packed.py`.
enum Kind : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kInt8 = 3, kInt4 = 4 };

// The best instruction set that both the chip and the compiled library have; set once by `choose_isa`.
enum Isa : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
extern Isa isa;

inline float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Memory that grows and is kept; aligned to pages. One owner, no copies.
class Scratch {
   public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    void* get(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + bytes / 4 + 4095) & ~size_t(4095);
            data_ = std::aligned_alloc(4096, size_);
            if (!data_) std::abort();
        }
        return data_;
    }
    template <class T>
    T* get_as(size_t count) {
        return static_cast<T*>(get(count * sizeof(T)));
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace seamount
