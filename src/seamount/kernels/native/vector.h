// Sixteen lanes at a time, on every chip: GCC's vector types become one AVX-512 register, two of AVX2, or four of SSE.
// Included by the `*.inc` files, which are compiled once per instruction set.
#pragma once

#include "common.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace seamount {
namespace SEAMOUNT_TARGET {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// As wide as the chip's registers: of wider vectors GCC compares one lane at a time, and sums of them lie in memory.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kRegisters = 64 / kRegisterBytes;
typedef float Register __attribute__((vector_size(kRegisterBytes), may_alias));
typedef int16_t ShortRegister __attribute__((vector_size(kRegisterBytes), may_alias));

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}
template <class V>
inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}
// By subtraction, which leaves minus zero as it is: so the compiler sees that nothing needs to be computed.
inline f32x16 splat(float value) { return value - f32x16{}; }

// The first `count` of sixteen floats, zeros behind them.
inline f32x16 load_part(const float* from, int count) {
    float values[16] = {};
    std::memcpy(values, from, size_t(count) * sizeof(float));
    return load<f32x16>(values);
}
inline void store_part(float* to, f32x16 value, int count) { std::memcpy(to, &value, size_t(count) * sizeof(float)); }

inline f32x16 absolute(f32x16 x) { return (f32x16)((u32x16)x & 0x7fffffffu); }

// a > b ? a : b in each lane: b where one is NaN.
template <class R, class V>
inline V larger_by_register(V a, V b) {
    R x[kRegisters], y[kRegisters];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    for (int r = 0; r < kRegisters; r++) x[r] = x[r] > y[r] ? x[r] : y[r];
    std::memcpy(&a, x, sizeof x);
    return a;
}
inline f32x16 larger(f32x16 a, f32x16 b) { return larger_by_register<Register>(a, b); }
inline i16x32 larger(i16x32 a, i16x32 b) { return larger_by_register<ShortRegister>(a, b); }

// Horizontal reductions in a fixed order.
inline float sum(f32x16 x) {
    float total[8];
    for (int i = 0; i < 8; i++) total[i] = x[i] + x[i + 8];
    return ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
}
inline float largest(f32x16 x) {
    float found = x[0];
    for (int i = 1; i < 16; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// a * b + c, rounded once where the chip can.
inline Register mul_add_register(Register a, Register b, Register c) {
#if defined(__AVX512F__)
    return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
inline f32x16 mul_add(f32x16 a, f32x16 b, f32x16 c) {
    Register x[kRegisters], y[kRegisters], z[kRegisters];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    std::memcpy(z, &c, sizeof z);
    for (int r = 0; r < kRegisters; r++) z[r] = mul_add_register(x[r], y[r], z[r]);
    std::memcpy(&c, z, sizeof z);
    return c;
}

// Nearest integer, ties to even, for |x| < 2^22.
inline f32x16 nearest(f32x16 x) { return (x + 12582912.0f) - 12582912.0f; }

// Rounded to the nearest integer, ties to even; |x| <= 127, or not a number, which gives any.
inline i8x16 to_int8(f32x16 x) {
#if defined(__AVX512F__)
    return (i8x16)_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x));
#else
    return __builtin_convertvector(__builtin_convertvector(nearest(x), i32x16), i8x16);
#endif
}

// Two bfloat16 columns that lie side by side in each 32-bit lane.
inline f32x16 even_bf16(u32x16 pairs) { return (f32x16)(pairs << 16); }
inline f32x16 odd_bf16(u32x16 pairs) { return (f32x16)(pairs & 0xffff0000u); }
inline f32x16 from_bf16(u16x16 x) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }

// Round to nearest even; NaN stays NaN.
inline u16x16 to_bf16(f32x16 x) {
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, u16x16);
}

// e^x to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
inline f32x16 exponential(f32x16 x) {
    x = larger(splat(-87.0f), x);
    x = -larger(splat(-88.0f), -x);
    const f32x16 n = nearest(x * 1.44269504088896341f);
    const f32x16 r = mul_add(n, splat(-1.42860682030941723e-6f), mul_add(n, splat(-0.693145751953125f), x));
    f32x16 p = splat(1.9875691500e-4f);
    p = mul_add(p, r, splat(1.3981999507e-3f));
    p = mul_add(p, r, splat(8.3334519073e-3f));
    p = mul_add(p, r, splat(4.1665795894e-2f));
    p = mul_add(p, r, splat(1.6666665459e-1f));
    p = mul_add(p, r, splat(5.0000001201e-1f));
    p = mul_add(p, r * r, r + 1.0f);
    i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return p * (f32x16)power;
}

inline f32x16 silu(f32x16 x) { return x / (1.0f + exponential(-x)); }

}  // namespace SEAMOUNT_TARGET
}  // namespace seamount
