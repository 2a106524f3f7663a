// Dividing the phases of a step among threads that may lose their processor at any time.
//
// Threads take units of a phase as they come, and a phase is over when its units are done, not when all threads have come
// by: a thread that was put aside between units holds nobody up, which barriers would (docs/LOG.md has the numbers).
#pragma once
#include <atomic>
#include <cstdint>

namespace forebay {

// What threads write lies in lines of its own: as many bytes as whole pairs of them take.
inline int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

constexpr int SPINS = 4000;  // about 50 us: waking a sleeper takes as long

struct alignas(64) Phase {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Until `value` is not `seen`.
inline void await_change(std::atomic<int>& value, int seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (value.load(std::memory_order_acquire) != seen) return;
        pause();
    }
    value.wait(seen, std::memory_order_acquire);
}

// Until `value` is `wanted`; the change to it is notified, those on the way need not be.
inline void await(std::atomic<int>& value, int wanted) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (value.load(std::memory_order_acquire) == wanted) return;
        pause();
    }
    for (int seen; (seen = value.load(std::memory_order_acquire)) != wanted;) value.wait(seen);
}

// Runs body(first, last) over parts of [0, count), `chunk` at a time, in rising order; returns when all of it is done.
template <class Body> inline void share(Phase& phase, int count, int chunk, Body body) {
    for (int first; (first = phase.next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
        const int last = first + chunk < count ? first + chunk : count;
        body(first, last);
        const int before = phase.done.fetch_add(last - first, std::memory_order_acq_rel);
        if (before + last - first == count) phase.done.notify_all();
    }
    await(phase.done, count);
}

}  // namespace forebay
