// Four-bit weights become eight-bit ones, a tile at a time: value = round(code * multiplier / 16) - zero level.
//
// Each group of a column has its multiplier (1..255) and zero level (0..255). The arithmetic is exact in integers, so
// everything behind it is that of int8. Included by `*.inc` files and `multiply_amx.cpp`.
//
// A tile's rows 2i and 2i + 1 share 64 bytes. In each group of 16 bytes of a row, its first 8 bytes come from one
// nibble of 8 words and its last 8 from another, where `pack` instructions put them; and the nibbles are those that a
// multiplication alone brings into place:
//
//   nibble of the word    3              2             1             0
//   holds                 row 2i+1, 0-7  row 2i, 8-15  row 2i, 0-7   row 2i+1, 8-15
#pragma once

#include "matrix.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace seamount {
namespace SEAMOUNT_TARGET {

// Where byte `column_byte` (0..63) of tile row `row` lies: the byte of the packed tile, and the shift of its nibble.
struct Nibble {
    int byte, shift;
};
inline Nibble nibble_of(int row, int column_byte) {
    const int word = column_byte / 16 * 8 + column_byte % 8;
    const bool back = column_byte % 16 >= 8;
    const int place = row % 2 ? (back ? 0 : 3) : (back ? 2 : 1);
    return {row / 2 * 64 + word * 2 + place / 2, place % 2 * 4};
}

#if defined(__AVX512VBMI__)
// The rows of a tile, two at a time, in registers.
class Unpacker {
   public:
    // For the group of the columns' multipliers and zero levels at `of_group`.
    explicit Unpacker(const uint8_t* of_group) {
        alignas(64) static const uint16_t front_columns[32] = {0, 0, 0, 0, 1, 1, 1, 1, 4,  4,  4,  4,  5,  5,  5,  5,
                                                               8, 8, 8, 8, 9, 9, 9, 9, 12, 12, 12, 12, 13, 13, 13, 13};
        alignas(64) static const uint8_t byte_columns[64] = {
            0,  0,  0,  0,  1,  1,  1,  1,  2,  2,  2,  2,  3,  3,  3,  3,  4,  4,  4,  4,  5,  5,
            5,  5,  6,  6,  6,  6,  7,  7,  7,  7,  8,  8,  8,  8,  9,  9,  9,  9,  10, 10, 10, 10,
            11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15};
        const __m512i front = _mm512_load_si512(front_columns), back = _mm512_add_epi16(front, _mm512_set1_epi16(2));
        const __m512i scale = _mm512_castsi256_si512(
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_group))));
        // A rounding multiplication gives (2 a b + 2^15) / 2^16: with the code at bit 4 the multiplier must be at bit
        // 7 for a product in sixteenths, with the code at bit 8 at bit 3.
        front7_ = _mm512_slli_epi16(_mm512_permutexvar_epi16(front, scale), 7);
        back3_ = _mm512_slli_epi16(_mm512_permutexvar_epi16(back, scale), 3);
        zero_ = _mm512_permutexvar_epi8(
            _mm512_load_si512(byte_columns),
            _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_group + 16))));
    }
    // `packed` holds the codes of an even row and the odd one behind it. Gives levels before the zero level is taken
    // off, 0 to 239.
    inline void levels(const uint8_t* packed, __m512i* even, __m512i* odd) const {
        const __m512i swap = _mm512_set4_epi32(0x0E0F0C0D, 0x0A0B0809, 0x06070405, 0x02030001);
        const __m512i both = _mm512_loadu_si512(packed);
        *even = level(both);
        *odd = level(_mm512_shuffle_epi8(both, swap));
    }

    // The zero level of each weight of a row.
    __m512i zero() const { return zero_; }

   private:
    inline __m512i level(__m512i codes) const {
        const __m512i front = _mm512_mulhrs_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x00F0)), front7_);
        const __m512i back = _mm512_mulhrs_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x0F00)), back3_);
        return _mm512_packus_epi16(front, back);
    }
    __m512i front7_, back3_, zero_;
};
#endif

// The group that half a tile (32 k) belongs to. Of 32 bits, since dividing 64 takes several times as long.
inline int64_t group_of(int32_t group, int64_t half) { return uint32_t(half) / (uint32_t(group) / 32); }

// `packed` 512 bytes -> `out` 1024 bytes; `groups` are the panel's [group][32] bytes.
inline void unpack_int4(const uint8_t* packed, const uint8_t* groups, int64_t tile, int32_t group, uint8_t* out) {
    const int rows_per_group = group == 32 ? 8 : 16;
#if defined(__AVX512VBMI__)
    for (int begin = 0; begin < 16; begin += rows_per_group) {
        const Unpacker unpacker(groups + group_of(group, 2 * tile + begin / 8) * 32);
#pragma GCC unroll 4
        for (int row = begin; row < begin + rows_per_group; row += 2) {
            __m512i even, odd;
            unpacker.levels(packed + row * 32, &even, &odd);
            _mm512_storeu_si512(out + row * 64, _mm512_sub_epi8(even, unpacker.zero()));
            _mm512_storeu_si512(out + row * 64 + 64, _mm512_sub_epi8(odd, unpacker.zero()));
        }
    }
#else
    for (int row = 0; row < 16; row++) {
        const uint8_t* of_group = groups + group_of(group, 2 * tile + row / 8) * 32;
        for (int i = 0; i < 64; i++) {
            const Nibble at = nibble_of(row, i);
            int code = packed[at.byte] >> at.shift & 15;
            int level = (code * of_group[i / 4] + 8) >> 4;
            out[row * 64 + i] = uint8_t(level - of_group[16 + i / 4]);
        }
    }
#endif
}

}  // namespace SEAMOUNT_TARGET
}  // namespace seamount
