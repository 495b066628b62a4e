// Large pages for what is read from end to end in every step: a fetch ahead stops at the end of a page.

#include <sys/mman.h>

#include "common.h"

// Asks for 2 MB pages in the part of [start, start + bytes) that is made of whole ones. A wish: the system may not
// grant it, and nothing depends on it.
SEAMOUNT_API void seamount_want_large_pages(void* start, int64_t bytes) {
    constexpr uintptr_t kPage = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / kPage * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}
