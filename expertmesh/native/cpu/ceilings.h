// What no kernel can be faster than: reading memory and nothing else.
#pragma once
#include "vectors.h"

// Four streams side by side: more than one is what it takes to have enough reads on their way.
inline uint32_t read_streams(const char* from, i64 bytes) {
    const i64 far = 4 * 1024, quarter = bytes / 4 / 64 * 64;
    U16 found[4] = {};
    for (i64 i = 0; i < quarter; i += 64)
        for (int s = 0; s < 4; ++s) {
            const char* at = from + s * quarter + i;
            __builtin_prefetch(at + far);
            found[s] ^= *reinterpret_cast<const U16*>(at);
        }
    U16 all_ = found[0] ^ found[1] ^ found[2] ^ found[3];
    uint32_t out = 0;
    for (int i = 0; i < LANES; ++i) out ^= all_[i];
    return out;
}
