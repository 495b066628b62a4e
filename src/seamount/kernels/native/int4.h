// Four-bit weights become eight-bit ones, a tile at a time: value = round(code * multiplier / 16) - zero level.
//
// Each group of a column has its multiplier (1..255) and zero level (0..255). The arithmetic is exact in integers, so
// everything behind it is that of int8. Included by `*.inc` files and `gemm_amx.cpp`.
#pragma once

#include "matrix.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace seamount {
namespace SEAMOUNT_TARGET {

// `packed` 512 bytes -> `out` 1024 bytes; `groups` are the panel's [group][32] bytes.
inline void unpack_int4(const uint8_t* packed, const uint8_t* groups, int64_t tile, int32_t group, uint8_t* out) {
    const int rows_per_group = group == 32 ? 8 : 16;
#if defined(__AVX512BW__)
    const __m512i low = _mm512_set1_epi16(0x0F), high = _mm512_set1_epi16(0x0F00), byte = _mm512_set1_epi16(0xFF);
    for (int begin = 0; begin < 16; begin += rows_per_group) {
        const uint8_t* of_group = groups + (tile * 64 + begin * 4) / group * 32;
        __m512i scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_group)));
        scale = _mm512_or_si512(scale, _mm512_slli_epi32(scale, 16));
        __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_group + 16)));
        zero = _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
        for (int row = begin; row < begin + rows_per_group; row += 2) {
            __m512i both = _mm512_loadu_si512(packed + row * 32);
            for (int half = 0; half < 2; half++) {
                __m512i codes = half ? _mm512_srli_epi16(both, 4) : both;
                // Multiplying and rounding keeps bits 15 and up of the doubled product: codes sit at bit 11.
                __m512i first = _mm512_mulhrs_epi16(_mm512_slli_epi16(_mm512_and_si512(codes, low), 11), scale);
                __m512i second = _mm512_mulhrs_epi16(_mm512_slli_epi16(_mm512_and_si512(codes, high), 3), scale);
                __m512i levels = _mm512_ternarylogic_epi32(byte, first, _mm512_slli_epi16(second, 8), 0xCA);
                _mm512_storeu_si512(out + (row + half) * 64, _mm512_sub_epi8(levels, zero));
            }
        }
    }
#else
    for (int row = 0; row < 16; row++) {
        const uint8_t* of_group = groups + (tile * 64 + row / rows_per_group * rows_per_group * 4) / group * 32;
        for (int i = 0; i < 64; i++) {
            int code = packed[row / 2 * 64 + i] >> (row % 2 * 4) & 15;
            int level = (code * of_group[i / 4] + 8) >> 4;
            out[row * 64 + i] = uint8_t(level - of_group[16 + i / 4]);
        }
    }
#endif
}

}  // namespace SEAMOUNT_TARGET
}  // namespace seamount
