// Which chip this is: chosen once, when the library is loaded.

#include <sys/syscall.h>
#include <unistd.h>

#include "workspace.h"

namespace seamount {

Isa isa = kPlain;
const Functions* functions = &plain::table;

namespace {

#if defined(__x86_64__)
Functions amx_table;

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;

// The kernel must allow a process to use AMX's tiles, since they make its context switches dearer.
bool may_use_tiles() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

Isa best() {
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (has_avx512) {
        uint32_t a = 7, b = 0, c = 0, d = 0;
        __asm__ __volatile__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        const bool has_amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);  // bf16, tile, int8
        return has_amx && may_use_tiles() ? kAmx : kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? kAvx2
                                                                                                         : kPlain;
}
#else
Isa best() { return kPlain; }
#endif

}  // namespace
}  // namespace seamount

using namespace seamount;

// Uses the best instruction set up to `most` that this chip has; returns which.
SEAMOUNT_API int32_t seamount_choose_isa(int32_t most) {
    const Isa found = best();
    isa = found < most ? found : Isa(most);
    functions = &plain::table;
#if defined(__x86_64__)
    if (isa == kAvx2) functions = &avx2::table;
    if (isa == kAvx512) functions = &avx512::table;
    if (isa == kAmx) {
        amx_table = avx512::table;
        amx_table.multiply = amx::multiply;
        functions = &amx_table;
    }
#endif
    return isa;
}

SEAMOUNT_API void seamount_set_threads(int32_t count) { set_threads(count < kMostThreads ? count : kMostThreads); }
