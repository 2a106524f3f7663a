// The part of CUDA that the kernels use, in C++: a thread for each lane, the blocks of a cluster or of a cooperative launch
// side by side, clusters one after the other. It is slow and exact, and says nothing of speed or of races within a warp.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <barrier>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
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

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline uint32_t __float_as_uint(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
    const uint32_t u = __float_as_uint(v);
    return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16(a), __float2bfloat16(b)}; }
inline float __expf(float v) { return expf(v); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) { return high << by | low >> (32 - by); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
using std::max;
using std::min;

struct Warp {
    std::barrier<> meet{32};
    uint32_t words[32][6];
};
struct Block {
    std::barrier<> meet, some_meet;
    std::vector<Warp> warps;
    std::vector<float> room;
    float* memory;  // where a swizzle of 128 bytes begins
    Block(int threads, size_t bytes) : meet(threads), some_meet(std::max(1, threads - 32)), warps(threads / 32), room(bytes / 4 + 256, NAN) {
        memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 1023) / 1024 * 1024);
    }
};
struct Blocks {
    std::barrier<> meet;
    std::vector<std::unique_ptr<Block>> blocks;
    explicit Blocks(int threads) : meet(threads) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline thread_local Blocks* my_cluster;
inline thread_local Block* my_block;
inline thread_local int my_rank;
inline Warp& my_warp() { return my_block->warps[threadIdx.x / 32]; }

inline void __syncthreads() { my_block->meet.arrive_and_wait(); }
inline void __syncwarp() { my_warp().meet.arrive_and_wait(); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32;
    warp.words[lane][0] = value;
    warp.meet.arrive_and_wait();
    const uint32_t theirs = warp.words[lane ^ mask][0];
    warp.meet.arrive_and_wait();
    return theirs;
}
inline float __shfl_xor_sync(unsigned all, float value, int mask) {
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), mask));
}
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
    for (unsigned y = 0; y < config->gridDim.y; y++)
        for (unsigned x = 0; x < config->gridDim.x; x += size) {
            Blocks cluster(threads * size);
            for (int rank = 0; rank < size; rank++) cluster.blocks.push_back(std::make_unique<Block>(threads, config->dynamicSmemBytes));
            std::vector<std::jthread> lanes;
            for (int i = 0; i < threads * size; i++)
                lanes.emplace_back([&, i] {
                    my_rank = i / threads, my_cluster = &cluster, my_block = cluster.blocks[my_rank].get();
                    threadIdx = dim3(i % threads), blockIdx = dim3(x + my_rank, y), blockDim = config->blockDim, gridDim = config->gridDim;
                    kernel(static_cast<Parameters>(arguments)...);
                });
        }
    return cudaSuccess;
}

namespace forebay {

inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(warp.words[lane], words, sizeof(words));
    warp.meet.arrive_and_wait();
    const auto half = [](uint32_t word, int i) { return __uint_as_float(i ? word & 0xFFFF0000u : word << 16); };
    for (int i = 0; i < 4; i++) {
        const int column = q * 2 + i % 2, side = i / 2;
        for (int k = 0; k < 16; k++) {
            const int owner = k % 8 / 2, late = k / 8;
            sum[i] += half(warp.words[g * 4 + owner][late * 2 + side], k % 2) * half(warp.words[column * 4 + owner][4 + late], k % 2);
        }
    }
    warp.meet.arrive_and_wait();
}
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
inline float* dynamic_shared() { return my_block->memory; }
inline char* aligned_shared() { return reinterpret_cast<char*>(my_block->memory); }
struct Cluster {
    static void sync() { my_cluster->meet.arrive_and_wait(); }
    static int rank() { return my_rank; }
    static const float* of(float* mine, int rank) {
        return my_cluster->blocks[rank]->memory + (mine - my_block->memory);
    }
};

// A signal's word: arrivals still to come, how many there are each time, bytes still to come (of a copy, none: it is made at
// once), and whether its turn is an odd one.
inline std::mutex signals;
struct Signal { uint16_t pending, arrivals; int32_t bytes : 31; uint32_t parity : 1; };
inline void signal_change(uint64_t* at, int arrivals, int bytes) {
    const std::lock_guard<std::mutex> lock(signals);
    Signal& signal = *reinterpret_cast<Signal*>(at);
    signal.pending -= arrivals, signal.bytes += bytes;
    if (signal.pending == 0 && signal.bytes == 0) signal.pending = signal.arrivals, signal.parity ^= 1;
}
inline void signal_init(uint64_t* at, int arrivals) {
    *reinterpret_cast<Signal*>(at) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
}
inline void signals_ready() {}
inline void signal_arrive(uint64_t* at) { signal_change(at, 1, 0); }
inline void signal_expect(uint64_t* at, uint32_t bytes) { signal_change(at, 1, bytes); }
inline void signal_wait(uint64_t* at, uint32_t parity) {
    for (;; std::this_thread::yield()) {
        const std::lock_guard<std::mutex> lock(signals);
        if (reinterpret_cast<Signal*>(at)->parity != parity) return;
    }
}
inline void copy_ahead(void* to, const void* from, uint32_t bytes, uint64_t* at) {
    memcpy(to, from, bytes);
    signal_change(at, 0, -static_cast<int>(bytes));
}
inline void copy_again(void* to, const void* from, uint32_t bytes, uint64_t* at) { copy_ahead(to, from, bytes, at); }
inline void copies_follow() {}
inline void copies_follow_inputs() {}
template <int THREADS_MEETING> void meet() { my_block->some_meet.arrive_and_wait(); }
inline uint32_t counted(uint32_t* counter) { return atomicAdd(counter, 1u); }
inline void count(uint32_t* counter) { counted(counter); }
inline void wait_until(const uint32_t* counter, uint32_t target) {
    while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) < target) std::this_thread::yield();
}
inline void expect_soon(const void*) {}
inline uint4 fresh(const void* at) { return *static_cast<const uint4*>(at); }
inline float fresh(const float* at) { return *at; }
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
