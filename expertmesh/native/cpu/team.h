// The threads that compute an op together, and the memory that they share while they do.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__SANITIZE_ADDRESS__)
#include <mutex>
#include <sanitizer/asan_interface.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

using i64 = int64_t;

inline i64 up(i64 n, i64 step) { return (n + step - 1) / step; }

// Nobody goes on before all have come. Spins shortly, since phases are short, then lets others have the core.
struct Barrier {
    std::atomic<int> waiting{0};
    std::atomic<unsigned> round{0};

    void wait(int size) {
        if (size == 1) return;
        unsigned mine = round.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            waiting.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == mine; ++spins) {
            if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }
};

struct Range { i64 begin, end; };

struct Team {
    int me, size;
    Barrier* barrier;

    void sync() const { barrier->wait(size); }

    // My share of n pieces of work. Shares are contiguous: what lies side by side is read as one stream.
    Range share(i64 n) const { return {n * me / size, n * (me + 1) / size}; }
};

// Cuts a block of memory into arrays. With no block it only adds up what is needed.
struct Space {
    char* block;
    i64 used = 0;

    template <class T> T* take(i64 count) {
        i64 begin = used, bytes = count * i64(sizeof(T));
        used += up(bytes, 64) * 64 + GAP;
        if (!block) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
        static std::mutex one_at_a_time;  // all threads lay out the same memory
        std::lock_guard<std::mutex> own(one_at_a_time);
        __asan_unpoison_memory_region(block + begin, bytes);
        __asan_poison_memory_region(block + begin + bytes, used - begin - bytes);
#endif
        return reinterpret_cast<T*>(block + begin);
    }

private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr i64 GAP = 64;  // between arrays, where nobody may read
#else
    static constexpr i64 GAP = 0;
#endif
};
