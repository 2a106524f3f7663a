// What the kernels ask of the GPU beyond C++. `tests/oracle/cuda_on_cpu` has the same in plain C++, a thread a lane.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace forebay {

// sum += a b, a of 16 rows by 16, b of 16 by 8 columns; the PTX manual says which lane has what ("mma.m16n8k16").
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 stream(const uint4* at) {  // weights: read once
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ uint32_t stream(const uint32_t* at) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

#define __device_and_host__ __device__ __host__
constexpr long long PATIENCE = 4ll << 30;  // clocks

__device__ __forceinline__ void multiply_half(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t times_half(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
__device__ __forceinline__ uint32_t as_halves(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 from_halves(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// The first or second of two bf16.
__device__ __forceinline__ float of_pair(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }
__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }
__device__ __forceinline__ uint32_t sum_of_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(of_pair(a, 0) + of_pair(b, 0), of_pair(a, 1) + of_pair(b, 1));
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t value) { return __reduce_max_sync(~0u, value); }

// What other blocks have written, past L1.
template <class Value>
__device__ __forceinline__ Value fresh(const Value* at) { return __ldcg(at); }

// Bulk copies to shared memory, multiples of 16 bytes, that no thread waits for until it asks whether they have come: what is
// expected is said first, and then copied, by any threads. `begin_copies` once, then `announce_copies` by the same thread.
__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ void begin_copies(uint64_t* come) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(come)) : "memory");
}
__device__ __forceinline__ void announce_copies() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void expect_copies(uint64_t* come, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(come)), "r"(num_bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int num_bytes, uint64_t* come) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(num_bytes), "r"(shared_address(come)) : "memory");
}
// `turn`: of how many expectations before this one, the last bit.
__device__ __forceinline__ void await_copies(uint64_t* come, int turn) {
    uint32_t there = 0;
    for (long long begin = clock64(); !there;) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(there) : "r"(shared_address(come)), "r"(turn) : "memory");
        if (!there && clock64() - begin > PATIENCE) __trap();
    }
}

// All blocks of a grid meet when each has arrived. Arrivals are counted for ever, so a captured launch can be replayed; what
// they must come to is known before one's own. Whoever waits a thousand times as long as a step takes has met with a bug.
__device__ __forceinline__ uint64_t next_meeting(const uint64_t* arrivals, int blocks) {
    uint64_t count;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(arrivals) : "memory");
    return (count / blocks + 1) * blocks;
}
__device__ __forceinline__ void arrive(uint64_t* arrivals) {
    asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(arrivals), "l"(1ull) : "memory");
}
__device__ __forceinline__ void meet(const uint64_t* arrivals, uint64_t meeting) {
    const long long begin = clock64();
    for (uint64_t count = 0; count < meeting;) {
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(arrivals) : "memory");
        if (clock64() - begin > PATIENCE) __trap();
    }
}

// All blocks of a launch are on the GPU together, being no more than multiprocessors: nothing to be said.
inline void all_at_once(cudaLaunchConfig_t&) {}

// Of two bf16 each, rounded.
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));  // plus -0
    return product;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // where a launch waits for the one before it
__device__ void wait_for_inputs(const void*) {}
__device__ void let_dependents_start() {}
__device__ void wait_for_kernels() {}
#else
// A kernel that is on its multiprocessor early shares its L1 cache with kernels that still read what used to be at the
// addresses of its inputs. An acquiring load, of any input, forgets all that.
__device__ __forceinline__ void wait_for_inputs(const void* input) {
    uint32_t ignored;
    asm volatile("griddepcontrol.wait; ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ignored) : "l"(input) : "memory");
}
// The same for kernels that read all that others wrote past L1.
__device__ __forceinline__ void wait_for_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

// The blocks that share out the columns of the same rows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
struct Cluster {
    __device__ static void sync() { __syncthreads(); }
    __device__ static int rank() { return 0; }
    __device__ static const float* of(float* mine, int) { return mine; }
};
#else
struct Cluster {
    __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
    __device__ static int rank() { return cooperative_groups::this_cluster().block_rank(); }
    __device__ static const float* of(float* mine, int rank) { return cooperative_groups::this_cluster().map_shared_rank(mine, rank); }
};
#endif

__device__ __forceinline__ float* dynamic_shared() {
    extern __shared__ float memory[];
    return memory;
}

}  // namespace forebay
