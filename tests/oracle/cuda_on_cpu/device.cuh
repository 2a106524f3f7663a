// The part of CUDA that the kernels use, in C++: a thread for each lane, the blocks of a cluster side by side, clusters one
// after the other. It is slow and exact, and says nothing of speed or of races within a warp.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <barrier>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __device_and_host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks of a cluster would share it: only what is the same in all of them may be such

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct float2 { float x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

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
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
using std::max, std::min;

struct Warp {
    std::barrier<> meet{32};
    uint32_t words[32][6];
};
struct Block {
    std::barrier<> meet;
    std::vector<Warp> warps;
    std::vector<float> memory;
    Block(int threads, size_t bytes) : meet(threads), warps(threads / 32), memory(bytes / 4 + 1, NAN) {}
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
inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane) {
    Warp& warp = my_warp();
    warp.words[threadIdx.x % 32][0] = value;
    warp.meet.arrive_and_wait();
    const uint32_t theirs = warp.words[lane][0];
    warp.meet.arrive_and_wait();
    return theirs;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return __uint_as_float(__shfl_sync(~0u, __float_as_uint(value), threadIdx.x % 32 ^ mask));
}
inline uint32_t __ballot_sync(unsigned, bool mine) {
    uint32_t found = 0;
    for (int lane = 0; lane < 32; lane++) found |= __shfl_sync(~0u, mine, lane) << lane;
    return found;
}
inline void atomicOr(uint32_t* at, uint32_t value) { __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
template <class T> T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }

// The host's side --------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
struct cudaLaunchAttribute {
    int id;
    struct { int programmaticStreamSerializationAllowed; dim3 clusterDim; } val;
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
    *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 9;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "as told"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const int size = config->numAttrs > 1 ? config->attrs[1].val.clusterDim.x : 1, threads = config->blockDim.x;
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

template <class Wide>
void multiply_by(Wide half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& warp = my_warp();
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(warp.words[lane], words, sizeof(words));
    warp.meet.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        const int column = q * 2 + i % 2, side = i / 2;
        for (int k = 0; k < 16; k++) {
            const int owner = k % 8 / 2, late = k / 8;
            sum[i] += half(warp.words[g * 4 + owner][late * 2 + side], k % 2) * half(warp.words[column * 4 + owner][4 + late], k % 2);
        }
    }
    warp.meet.arrive_and_wait();
}
inline float of_pair(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }
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
inline float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }
inline uint32_t sum_of_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(of_pair(a, 0) + of_pair(b, 0), of_pair(a, 1) + of_pair(b, 1));
    return both.x.bits | static_cast<uint32_t>(both.y.bits) << 16;
}
inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_by(of_pair, sum, a, b0, b1); }
inline void multiply_half(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_by(of_halves, sum, a, b0, b1); }
inline uint32_t largest_of_warp(uint32_t value) {
    uint32_t found = 0;
    for (int lane = 0; lane < 32; lane++) found = max(found, __shfl_sync(~0u, value, lane));
    return found;
}
template <class Value> Value fresh(const Value* at) { return *at; }
// Bytes that are still to come, and above them how often all had come.
inline void begin_copies(uint64_t* come) { __atomic_store_n(come, 0, __ATOMIC_SEQ_CST); }
inline void announce_copies() {}
inline void finish_copies(uint64_t* come, int num_bytes) {
    const uint64_t left = __atomic_sub_fetch(come, num_bytes, __ATOMIC_SEQ_CST);
    if ((left & 0xFFFFFFFFu) == 0) __atomic_fetch_add(come, 1ull << 32, __ATOMIC_SEQ_CST);
}
inline void expect_copies(uint64_t* come, int num_bytes) {
    __atomic_fetch_add(come, num_bytes, __ATOMIC_SEQ_CST);
    if (num_bytes == 0) finish_copies(come, 0);
}
inline void copy_bulk(void* to, const void* from, int num_bytes, uint64_t* come) {
    memcpy(to, from, num_bytes);
    finish_copies(come, num_bytes);
}
inline void await_copies(const uint64_t* come, int turn) {
    for (uint64_t now; now = __atomic_load_n(come, __ATOMIC_SEQ_CST), (now >> 32) % 2 == static_cast<uint64_t>(turn);) std::this_thread::yield();
}
inline uint64_t next_meeting(const uint64_t* arrivals, int blocks) { return (__atomic_load_n(arrivals, __ATOMIC_SEQ_CST) / blocks + 1) * blocks; }
inline void arrive(uint64_t* arrivals) { __atomic_fetch_add(arrivals, 1, __ATOMIC_SEQ_CST); }
inline void meet(const uint64_t* arrivals, uint64_t meeting) {
    while (__atomic_load_n(arrivals, __ATOMIC_SEQ_CST) < meeting) std::this_thread::yield();
}
inline void all_at_once(cudaLaunchConfig_t& config) { config.attrs[1].val.clusterDim = config.gridDim, config.numAttrs = 2; }
inline uint4 stream(const uint4* at) { return *at; }
inline uint32_t stream(const uint32_t* at) { return *at; }
inline uint32_t times(uint32_t a, uint32_t b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                                                      __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u));
    return both.x.bits | static_cast<uint32_t>(both.y.bits) << 16;
}
inline void wait_for_inputs(const void*) {}
inline void wait_for_kernels() {}
inline void let_dependents_start() {}
inline float* dynamic_shared() { return my_block->memory.data(); }
struct Cluster {
    static void sync() { my_cluster->meet.arrive_and_wait(); }
    static int rank() { return my_rank; }
    static const float* of(float* mine, int rank) {
        return my_cluster->blocks[rank]->memory.data() + (mine - my_block->memory.data());
    }
};

}  // namespace forebay
