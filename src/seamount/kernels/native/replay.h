// Calls written down as words, so that a whole step can be made again by one call from Python.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

namespace seamount {

// The ABI with `kernels/recording.py`: keep both in step. An argument is one word: an address, an integer, or the bits of
// a float.
constexpr size_t kMostArguments = 20;
struct Call {
    void (*run)(const uint64_t* arguments);
    uint64_t arguments[kMostArguments];
};

template <class T>
T from_word(uint64_t word) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(uintptr_t(word));
    } else if constexpr (std::is_floating_point_v<T>) {
        static_assert(sizeof(T) == 4, "a word holds a float");
        const auto bits = uint32_t(word);
        T value;
        std::memcpy(&value, &bits, 4);
        return value;
    } else {
        return T(word);
    }
}

template <class... Arguments, size_t... I>
void call_with(void (*function)(Arguments...), const uint64_t* words, std::index_sequence<I...>) {
    function(from_word<Arguments>(words[I])...);
}

template <class... Arguments>
void call_with(void (*function)(Arguments...), const uint64_t* words) {
    static_assert(sizeof...(Arguments) <= kMostArguments, "a call has no room for that many arguments");
    call_with(function, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace seamount

// Behind a function that is part of a step: exports the form of it that a recording calls.
#define SEAMOUNT_STEP(function) \
    SEAMOUNT_API void function##_from_words(const uint64_t* words) { seamount::call_with(function, words); }
