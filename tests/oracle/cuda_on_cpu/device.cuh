// The part of CUDA that the kernels use, in C++: a coroutine for each lane, the blocks of a cluster or of a cooperative launch
// side by side, clusters one after the other. Whenever a lane waits, one that can go on is drawn by lot (the same each time), of
// its warp if there is one, else of its block, else of all: no order may be relied on that no barrier makes, warps and blocks
// are as far apart as barriers let them, and what a warp needs stays in the caches. It is exact, and says nothing of speed or of
// races within a warp.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __noinline__
#define __grid_constant__
#define __shared__ static  // blocks of a cluster would share it: only what is the same in all of them may be such

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct alignas(8) uint2 { uint32_t x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct float2 { float x, y; };

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline uint32_t __float_as_uint(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
    const uint32_t u = __float_as_uint(v);
    return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline __half __float2half(float v) {
    const auto value = static_cast<_Float16>(v);
    __half half;
    memcpy(&half, &value, 2);
    return half;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16(a), __float2bfloat16(b)}; }
inline float __expf(float v) { return expf(v); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) { return high << by | low >> (32 - by); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) found |= (bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return found;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __popcll(uint64_t v) { return __builtin_popcountll(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __ffsll(uint64_t v) { return __builtin_ffsll(static_cast<long long>(v)); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
using std::max;
using std::min;

// Lanes ------------------------------------------------------------------------------------------------------------------
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the lane that runs

struct Lane {
    int rank;  // of its block
    unsigned thread;
    size_t warp;  // of all that are side by side
    unsigned products = 0;
    bool has_begun = false;
    jmp_buf left;  // where it goes on, once it has begun: unlike swapcontext, longjmp asks nothing of the kernel
};
// Room for the stacks of lanes that are side by side, for one launch.
struct Stacks {
    // Not a power of two: their tops would all fall on the same few lines of the caches.
    static constexpr size_t BYTES = (256 << 10) + 1088;
    size_t bytes;
    char* at;
    explicit Stacks(size_t num_lanes) : bytes(num_lanes * BYTES) {
        at = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (at == MAP_FAILED) abort();
    }
    ~Stacks() { munmap(at, bytes); }
};
// All lanes that are side by side, and those of them that can go on. The host's thread runs them, one at a time.
struct Lanes {
    std::vector<Lane> all;
    Lane* running = nullptr;
    const unsigned first_block;

    Lanes(int num_blocks, int threads, unsigned first_block, const Stacks& stacks)
        : first_block(first_block), stacks(stacks), warps_of_block((threads + 31) / 32), ready(num_blocks * warps_of_block) {
        all.reserve(num_blocks * threads);
        for (int rank = 0; rank < num_blocks; rank++)
            for (int i = 0; i < threads; i++) {
                all.push_back({rank, static_cast<unsigned>(i), rank * warps_of_block + i / 32});
                let_go_on(&all.back());
            }
    }
    void run(void (*kernel)()) {
        volatile size_t num_ended = 0;
        this->kernel = kernel;
        getcontext(&begin);
        getcontext(&host);  // here again when a lane has ended
        if (num_ended < all.size()) num_ended = num_ended + 1, go_on();
    }
    void let_go_on(Lane* lane) { ready[lane->warp].push_back(lane); }
    void let_go_on(const std::vector<Lane*>& waiting) {
        for (Lane* lane : waiting) let_go_on(lane);
    }
    void wait() {
        if (!_setjmp(running->left)) go_on();
    }

  private:
    const Stacks& stacks;
    const size_t warps_of_block;
    std::vector<std::vector<Lane*>> ready;  // of each warp
    size_t warp = 0;                        // that is at work
    ucontext_t host, begin;
    void (*kernel)();
    uint64_t lot = 1;

    size_t drawn(size_t count) {
        lot = lot * 48271 % 0x7FFFFFFF;  // Park and Miller's
        return lot * count >> 31;
    }
    // One of so many warps from the first on that can go on.
    bool find_warp(size_t first, size_t count) {
        const size_t from = drawn(count);
        for (size_t i = 0; i < count; i++)
            if (const size_t found = first + (from + i) % count; !ready[found].empty()) return warp = found, true;
        return false;
    }
    void go_on() {
        if (ready[warp].empty() && !find_warp(warp / warps_of_block * warps_of_block, warps_of_block) && !find_warp(0, ready.size()))
            fprintf(stderr, "all lanes wait for each other\n"), abort();
        auto& some = ready[warp];
        std::swap(some[drawn(some.size())], some.back());
        running = some.back(), some.pop_back();
        threadIdx.x = running->thread, blockIdx.x = first_block + running->rank;
        if (running->has_begun) _longjmp(running->left, 1);
        running->has_begun = true;
        begin.uc_stack = {stacks.at + (running - all.data()) * Stacks::BYTES, 0, Stacks::BYTES};
        begin.uc_link = &host;
        makecontext(&begin, kernel, 0);
        setcontext(&begin);
    }
};
inline Lanes* lanes;

// Lanes that wait for a word, a signal's, a counter or one that is told, until somebody changes it.
inline std::unordered_map<const void*, std::vector<Lane*>> parked;
inline void park(const void* at) {
    parked[at].push_back(lanes->running);
    lanes->wait();
}
inline void wake(const void* at) {
    if (auto found = parked.extract(at)) lanes->let_go_on(found.mapped());
}

struct Barrier {
    size_t expected;
    std::vector<Lane*> waiting;
    explicit Barrier(int expected = 32) : expected(expected) {}
    void arrive_and_wait() {
        waiting.push_back(lanes->running);
        if (waiting.size() >= expected) lanes->let_go_on(waiting), waiting.clear();
        lanes->wait();
    }
};
struct Warp {
    Barrier meet;
    uint32_t words[32][2];
    float rows[2][16][16], columns[2][8][16];  // of two products in turns, so that lanes meet once for each
};
struct Block {
    Barrier meet, some_meet;
    std::vector<Warp> warps;
    std::vector<float> room;
    float* memory;  // where a swizzle of 128 bytes begins
    Block(int threads, size_t bytes) : meet(threads), some_meet(std::max(1, threads - 32)), warps(threads / 32), room(bytes / 4 + 256, NAN) {
        memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 1023) / 1024 * 1024);
    }
};
struct Blocks {
    Barrier meet;
    std::vector<Block> blocks;
    explicit Blocks(int threads) : meet(threads) {}
};
inline Blocks* my_cluster;
inline Block& my_block() { return my_cluster->blocks[lanes->running->rank]; }
inline Warp& my_warp() { return my_block().warps[threadIdx.x / 32]; }

inline void __syncthreads() { my_block().meet.arrive_and_wait(); }
inline void __syncwarp() { my_warp().meet.arrive_and_wait(); }
inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane) {
    Warp& warp = my_warp();
    warp.words[threadIdx.x % 32][0] = value;
    warp.meet.arrive_and_wait();
    const uint32_t theirs = warp.words[lane][0];
    warp.meet.arrive_and_wait();
    return theirs;
}
inline uint32_t __shfl_xor_sync(unsigned all, uint32_t value, int mask) {
    return __shfl_sync(all, value, threadIdx.x % 32 ^ mask);
}
inline uint64_t __shfl_xor_sync(unsigned, uint64_t value, int mask) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32;
    memcpy(warp.words[lane], &value, sizeof(value));
    warp.meet.arrive_and_wait();
    memcpy(&value, warp.words[lane ^ mask], sizeof(value));
    warp.meet.arrive_and_wait();
    return value;
}
inline float __shfl_xor_sync(unsigned all, float value, int mask) {
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), mask));
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t value, int by) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(~0u, value, lane < by ? lane : lane - by);
}
inline uint32_t __ballot_sync(unsigned, bool value) {
    Warp& warp = my_warp();
    warp.words[threadIdx.x % 32][0] = value;
    warp.meet.arrive_and_wait();
    uint32_t which = 0;
    for (int lane = 0; lane < 32; lane++) which |= warp.words[lane][0] << lane;
    warp.meet.arrive_and_wait();
    return which;
}
inline void atomicOr(uint32_t* at, uint32_t value) { __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
template <class T> T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }

// The host's side --------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount,
       cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchAttribute {
    int id;
    struct { int programmaticStreamSerializationAllowed, cooperative; dim3 clusterDim; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    int numAttrs;
};
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
// A GPU of compute capability 9 with one multiprocessor, so that blocks have several groups of rows each.
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 9;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "as told"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const bool whole = config->numAttrs && config->attrs[0].id == cudaLaunchAttributeCooperative;
    const int size = whole ? config->gridDim.x : config->numAttrs > 1 ? config->attrs[1].val.clusterDim.x : 1, threads = config->blockDim.x;
    static std::function<void()> lane;
    lane = [&] { kernel(static_cast<Parameters>(arguments)...); };
    blockDim = config->blockDim, gridDim = config->gridDim;
    const Stacks stacks(threads * size);
    for (blockIdx.y = 0; blockIdx.y < config->gridDim.y; blockIdx.y++)
        for (unsigned x = 0; x < config->gridDim.x; x += size) {
            Blocks cluster(threads * size);
            Lanes beside(size, threads, x, stacks);
            for (int rank = 0; rank < size; rank++) cluster.blocks.emplace_back(threads, config->dynamicSmemBytes);
            my_cluster = &cluster, lanes = &beside;
            beside.run([] { lane(); });
        }
    return cudaSuccess;
}

namespace forebay {

template <class Wide>
void multiply_by(Wide half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int turn = lanes->running->products++ % 2;
    for (int late = 0; late < 2; late++)
        for (int i = 0, k = late * 8 + q * 2; i < 2; i++, k++) {
            for (int side = 0; side < 2; side++) warp.rows[turn][side * 8 + g][k] = half(a[late * 2 + side], i);
            warp.columns[turn][g][k] = half(late ? b1 : b0, i);
        }
    warp.meet.arrive_and_wait();
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 4; i++) sum[i] += warp.rows[turn][i / 2 * 8 + g][k] * warp.columns[turn][q * 2 + i % 2][k];
}
inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_by([](uint32_t word, int i) { return __uint_as_float(i ? word & 0xFFFF0000u : word << 16); }, sum, a, b0, b1);
}
inline float of_halves(uint32_t pair, int i) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * i);
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
}
inline float2 from_halves(uint32_t pair) { return {of_halves(pair, 0), of_halves(pair, 1)}; }
inline uint32_t as_halves(float a, float b) {
    const _Float16 pair[2] = {static_cast<_Float16>(a), static_cast<_Float16>(b)};
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return bits;
}
inline uint32_t times_half(uint32_t a, uint32_t b) { return as_halves(of_halves(a, 0) * of_halves(b, 0), of_halves(a, 1) * of_halves(b, 1)); }
inline uint32_t plus_half(uint32_t a, uint32_t b) { return as_halves(of_halves(a, 0) + of_halves(b, 0), of_halves(a, 1) + of_halves(b, 1)); }
inline uint32_t times_plus_half(uint32_t a, uint32_t b, uint32_t c) {
    return as_halves(of_halves(a, 0) * of_halves(b, 0) + of_halves(c, 0), of_halves(a, 1) * of_halves(b, 1) + of_halves(c, 1));
}
inline void multiply_half(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_by(of_halves, sum, a, b0, b1); }
inline float of_fp8(uint32_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return (code & 127) == 127 ? NAN : code & 128 ? -value : value;
}
inline uint2 from_fp8(uint32_t four) {
    return {as_halves(of_fp8(four & 255), of_fp8(four >> 8 & 255)), as_halves(of_fp8(four >> 16 & 255), of_fp8(four >> 24))};
}
template <class Combine>
uint32_t of_warp(uint32_t value, Combine combine) {
    Warp& warp = my_warp();
    warp.words[threadIdx.x % 32][0] = value;
    warp.meet.arrive_and_wait();
    uint32_t found = 0;
    for (int lane = 0; lane < 32; lane++) found = combine(found, warp.words[lane][0]);
    warp.meet.arrive_and_wait();
    return found;
}
inline uint32_t largest_of_warp(uint32_t value) {
    return of_warp(value, [](uint32_t a, uint32_t b) { return max(a, b); });
}
inline uint32_t sum_of_warp(uint32_t value) { return of_warp(value, std::plus<uint32_t>()); }
inline void multiply_eight(float (&sum)[4], const uint32_t (&a)[2], uint32_t b) { multiply(sum, {a[0], a[1], 0, 0}, b, 0); }
inline uint4 stream(const uint4* at) { return *at; }
inline uint32_t stream(const uint32_t* at) { return *at; }
inline uint32_t times(uint32_t a, uint32_t b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                                                      __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u));
    return both.x.bits | static_cast<uint32_t>(both.y.bits) << 16;
}
inline void wait_for_inputs(const void*) {}
inline void let_dependents_start() {}
inline void in_order() {}
template <class Value> void anew(Value&) {}
inline float* dynamic_shared() { return my_block().memory; }
inline char* aligned_shared() { return reinterpret_cast<char*>(my_block().memory); }
struct Cluster {
    static void sync_shared() { my_cluster->meet.arrive_and_wait(); }
    static void arrive() {}
    static void arrive_shared() {}
    static void wait() { sync_shared(); }
    static int rank() { return lanes->running->rank; }
    static const float* of(float* mine, int rank) {
        return my_cluster->blocks[rank].memory + (mine - my_block().memory);
    }
};

// A signal's word: arrivals still to come, how many there are each time, bytes still to come (of a copy, none: it is made at
// once), and whether its turn is an odd one.
struct Signal { uint16_t pending, arrivals; int32_t bytes : 31; uint32_t parity : 1; };
inline void signal_change(uint64_t* at, int arrivals, int bytes) {
    Signal& signal = *reinterpret_cast<Signal*>(at);
    signal.pending -= arrivals, signal.bytes += bytes;
    if (signal.pending == 0 && signal.bytes == 0) signal.pending = signal.arrivals, signal.parity ^= 1, wake(at);
}
inline void signal_init(uint64_t* at, int arrivals) {
    *reinterpret_cast<Signal*>(at) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
}
inline void signals_ready() {}
inline void signal_arrive(uint64_t* at) { signal_change(at, 1, 0); }
inline void signal_expect(uint64_t* at, uint32_t bytes) { signal_change(at, 1, bytes); }
inline void signal_wait(uint64_t* at, uint32_t parity) {
    while (reinterpret_cast<Signal*>(at)->parity == parity) park(at);
}
inline void copy_ahead(void* to, const void* from, uint32_t bytes, uint64_t* at) {
    memcpy(to, from, bytes);
    signal_change(at, 0, -static_cast<int>(bytes));
}
inline void copy_again(void* to, const void* from, uint32_t bytes, uint64_t* at) { copy_ahead(to, from, bytes, at); }
inline void copies_follow() {}
inline void copies_follow_inputs() {}
template <int THREADS_MEETING> void meet() {
    my_block().some_meet.expected = THREADS_MEETING;
    my_block().some_meet.arrive_and_wait();
}
inline uint32_t counted(uint32_t* counter) {
    const uint32_t was = atomicAdd(counter, 1u);
    wake(counter);
    return was;
}
inline void count(uint32_t* counter) { counted(counter); }
inline void wait_until(const uint32_t* counter, uint32_t target) {
    while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) < target) park(counter);
}
constexpr uint32_t NOTHING = ~0u;
inline void tell(uint32_t* at, uint32_t word) {
    *at = word;
    wake(at);
}
template <int N> void hear(const uint32_t* const (&at)[N], uint4 (&words)[N]) {
    for (int i = 0; i < N; i++) memcpy(words + i, at[i], 16);
}
template <int N> void hear_all(const uint32_t* const (&at)[N], uint4 (&words)[N]) {
    for (int i = 0; i < 4 * N; i++)
        while (at[i / 4][i % 4] == NOTHING) park(at[i / 4] + i % 4);
    hear(at, words);
}
inline void wait_for_kernel() {}
inline void expect_soon(const void*) {}
inline uint4 fresh(const void* at) { return *static_cast<const uint4*>(at); }
inline float fresh(const float* at) { return *at; }
inline int fresh(const int* at) { return *at; }
inline uint32_t transposed(uint32_t word) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    warp.words[lane][0] = word;
    warp.meet.arrive_and_wait();
    const auto half = [&](int row) { return warp.words[row * 4 + g / 2][0] >> (g % 2 * 16) & 0xFFFF; };
    const uint32_t result = half(q * 2) | half(q * 2 + 1) << 16;
    warp.meet.arrive_and_wait();
    return result;
}

inline uint4 matrices_of(const void* row, bool turned) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    memcpy(warp.words[lane], &row, sizeof(row));
    warp.meet.arrive_and_wait();
    uint32_t found[4];
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 2; i++) {
            const uint16_t* values;
            memcpy(&values, warp.words[m * 8 + (turned ? q * 2 + i : g)], sizeof(values));
            memcpy(reinterpret_cast<uint16_t*>(found + m) + i, values + (turned ? g : q * 2 + i), 2);
        }
    warp.meet.arrive_and_wait();
    return make_uint4(found[0], found[1], found[2], found[3]);
}
inline uint4 matrices(const void* row) { return matrices_of(row, false); }
inline uint4 matrices_turned(const void* row) { return matrices_of(row, true); }

inline int swizzled(int token, int sixteen) { return token * 128 + (sixteen ^ token % 8) * 16; }
inline void multiplying() {}
inline void multiply_together() {}
template <int LATER> void multiplied() {}
template <int TOKENS>
void multiply_wide(float (&sum)[TOKENS / 2], const uint32_t (&a)[4], const void* tokens, int offset) {
    const auto at = reinterpret_cast<uintptr_t>(tokens) + offset;
    for (int m = 0; m < TOKENS / 8; m++) {
        const int lane = threadIdx.x % 32, token = m * 8 + lane / 4, sixteen = at / 16 % 8;
        const char* chunk = reinterpret_cast<const char*>(at / 1024 * 1024);
        uint32_t b[2];
        for (int late = 0; late < 2; late++) memcpy(b + late, chunk + swizzled(token, sixteen + late) + lane % 4 * 4, 4);
        multiply(reinterpret_cast<float (&)[4]>(sum[m * 4]), a, b[0], b[1]);
    }
}

}  // namespace forebay
