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

// The same with half as many columns of a, and rows of b.
__device__ __forceinline__ void multiply_eight(float (&sum)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

// As `multiply`, of fp16.
__device__ __forceinline__ void multiply_half(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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

// Of two bf16 each, rounded.
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));  // plus -0
    return product;
}

// The same of two fp16 each.
__device__ __forceinline__ uint32_t times_half(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
__device__ __forceinline__ uint32_t as_halves(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t plus_half(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
__device__ __forceinline__ uint32_t times_plus_half(uint32_t a, uint32_t b, uint32_t c) {  // a b + c
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
__device__ __forceinline__ float2 from_halves(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Four e4m3 to fp16, which is exact: the first two, and the others.
__device__ __forceinline__ uint2 from_fp8(uint32_t four) {
    uint2 halves;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high;}"
        : "=r"(halves.x), "=r"(halves.y) : "r"(four));
    return halves;
}
#endif

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t value) { return __reduce_max_sync(~0u, value); }
__device__ __forceinline__ uint32_t sum_of_warp(uint32_t value) { return __reduce_add_sync(~0u, value); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // where a launch waits for the one before it
__device__ void wait_for_inputs(const void*) {}
__device__ void let_dependents_start() {}
#else
// A kernel that is on its multiprocessor early shares its L1 cache with kernels that still read what used to be at the
// addresses of its inputs. An acquiring load, of any input, forgets all that.
__device__ __forceinline__ void wait_for_inputs(const void* input) {
    uint32_t ignored;
    asm volatile("griddepcontrol.wait; ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ignored) : "l"(input) : "memory");
}
__device__ __forceinline__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

// The blocks that share out the columns of the same rows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
struct Cluster {
    __device__ static void sync_shared() { __syncthreads(); }
    __device__ static void arrive() {}
    __device__ static void arrive_shared() {}
    __device__ static void wait() { __syncthreads(); }
    __device__ static int rank() { return 0; }
    __device__ static const float* of(float* mine, int) { return mine; }
};
#else
struct Cluster {
    // A barrier in two: nobody is behind `wait` before all have arrived. Whoever arrives waits until all of the GPU sees what it has
    // written, and until what it has asked for has come, used or not.
    __device__ static void arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
    __device__ static void wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
    // The same where only shared memory matters: nobody waits until all of the GPU sees what has been written elsewhere. Nor for what has
    // been asked for and is not used: a block must not leave while others still read from it.
    __device__ static void arrive_shared() {
        asm volatile("fence.release.sync_restrict::shared::cta.cluster; barrier.cluster.arrive.relaxed;" ::: "memory");
    }
    __device__ static void sync_shared() { arrive_shared(), wait(); }
    __device__ static int rank() { return cooperative_groups::this_cluster().block_rank(); }
    __device__ static const float* of(float* mine, int rank) { return cooperative_groups::this_cluster().map_shared_rank(mine, rank); }
};
#endif

// Loads behind it are not made before it, where registers would be taken for what is needed later.
__device__ __forceinline__ void in_order() { asm volatile("" ::: "memory"); }
// What is computed of it is computed here each time, not once before a loop, where it would take more registers than itself.
__device__ __forceinline__ void anew(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
__device__ __forceinline__ void anew(uint32_t& v) { asm volatile("" : "+r"(v)); }

__device__ __forceinline__ float* dynamic_shared() {
    extern __shared__ float memory[];
    return memory;
}
__device__ __forceinline__ char* aligned_shared() {  // the same where a kernel has no other: as a swizzle wants it
    extern __shared__ __align__(1024) char aligned_memory[];
    return aligned_memory;
}

// What one kernel needs that stays on all multiprocessors for a whole step: copies that go on by themselves, signals in shared memory
// that they complete, and counters by which blocks wait for one another. Whoever waits for seconds ends in an error.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr long long LONGEST_WAIT = 8'000'000'000;  // in cycles: some seconds

__device__ __forceinline__ uint32_t in_shared(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void signal_init(uint64_t* signal, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(signal)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void signals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void signal_arrive(uint64_t* signal) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(in_shared(signal)) : "memory");
}
__device__ __forceinline__ void signal_expect(uint64_t* signal, uint32_t bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(signal)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void signal_wait(uint64_t* signal, uint32_t parity) {
    asm volatile(
        "{.reg .pred done, late; .reg .u64 start, now;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "mov.u64 start, %%clock64;\n"
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "mov.u64 now, %%clock64;\n"
        "sub.u64 now, now, start;\n"
        "setp.gt.u64 late, now, %2;\n"
        "@late trap;\n"
        "bra AGAIN;\n"
        "DONE: }" ::"r"(in_shared(signal)), "r"(parity), "n"(LONGEST_WAIT) : "memory");
}
// To shared memory, of bytes that are read once; all sixteen bytes apart.
__device__ __forceinline__ void copy_ahead(void* to, const void* from, uint32_t bytes, uint64_t* signal) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(in_shared(to)),
                 "l"(from), "r"(bytes), "r"(in_shared(signal)), "l"(policy) : "memory");
}
// The same of bytes that others read too.
__device__ __forceinline__ void copy_again(void* to, const void* from, uint32_t bytes, uint64_t* signal) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(in_shared(to)), "l"(from), "r"(bytes),
                 "r"(in_shared(signal)) : "memory");
}
// Of what a kernel before this one has written.
__device__ __forceinline__ void copies_follow_inputs() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Into what has been written just now.
__device__ __forceinline__ void copies_follow() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int THREADS_MEETING>
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS_MEETING) : "memory"); }

__device__ __forceinline__ void count(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ uint32_t counted(uint32_t* counter) {  // what it was
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
__device__ __forceinline__ void wait_until(const uint32_t* counter, uint32_t target) {
    const long long start = clock64();
    for (;;) {
        uint32_t now;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        if (now >= target) return;
        if (clock64() - start > LONGEST_WAIT) __trap();
    }
}
// Words that blocks tell one another without a counter: each stands for itself once it is not NOTHING.
constexpr uint32_t NOTHING = ~0u;
__device__ __forceinline__ void tell(uint32_t* at, uint32_t word) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory"); }
template <int N>
__device__ __forceinline__ void hear(const uint32_t* const (&at)[N], uint4 (&words)[N]) {  // whatever is there by now
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w) : "l"(at[i]) : "memory");
}
template <int N>
__device__ __forceinline__ void hear_all(const uint32_t* const (&at)[N], uint4 (&words)[N]) {  // what has been heard, once it is complete
    const long long start = clock64();
    for (;;) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < N; i++) all &= words[i].x != NOTHING & words[i].y != NOTHING & words[i].z != NOTHING & words[i].w != NOTHING;
        if (all) return;
        if (clock64() - start > LONGEST_WAIT) __trap();
        hear(at, words);
    }
}
// The kernel in front has ended; what it has written must then be read past L1 (`fresh`).
__device__ __forceinline__ void wait_for_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// What another block has written, so not from L1.
__device__ __forceinline__ uint4 fresh(const void* at) { return __ldcg(static_cast<const uint4*>(at)); }
__device__ __forceinline__ float fresh(const float* at) { return __ldcg(at); }
__device__ __forceinline__ int fresh(const int* at) { return __ldcg(at); }
__device__ __forceinline__ void expect_soon(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// Four 8 by 8 matrices of 16 bits in shared memory: lane i says where row i % 8 of the (i / 8)th lies. Lane 4 g + q gets columns 2 q and
// 2 q + 1 of row g of each, or of what each is when turned.
__device__ __forceinline__ uint4 matrices(const void* row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(in_shared(row)) : "memory");
    return v;
}
__device__ __forceinline__ uint4 matrices_turned(const void* row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(in_shared(row)) : "memory");
    return v;
}
// An 8 by 8 matrix of bf16, of which lane 4 g + q has columns 2 q and 2 q + 1 of row g.
__device__ __forceinline__ uint32_t transposed(uint32_t word) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
    return result;
}
#endif

// Four warps' product with many tokens. sum += a b, a of 64 rows by 16, 16 rows of a warp as in `multiply`; b of 16 by TOKENS columns, of
// which a warp has its rows' sums as in so many `multiply`. b lies in shared memory, 64 values of each token one behind the other, sixteen
// bytes at a time where a swizzle of 128 bytes puts them (`swizzled`); `offset` bytes from `tokens` on are the first token's first. Nothing is
// waited for: what is multiplied stays as it is until `multiplied`.
__device__ __forceinline__ int swizzled(int token, int sixteen) { return token * 128 + (sixteen ^ token % 8) * 16; }

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_together() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LATER>  // groups that may still be under way
__device__ __forceinline__ void multiplied() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory"); }

#define FOUR(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
template <int TOKENS>
__device__ __forceinline__ void multiply_wide(float (&sum)[TOKENS / 2], const uint32_t (&a)[4], const void* tokens, int offset) {
    // Address, and 1024 bytes from eight tokens to the next, in sixteens; a swizzle of 128 bytes.
    const uint64_t b = static_cast<uint64_t>(64 | 1 << 30) << 32 | (((in_shared(tokens) & 0x3FFFF) >> 4 | 1 << 16) + offset / 16);
    if constexpr (TOKENS == 16) {
        asm volatile(
            "{.reg .pred add; setp.eq.u32 add, 0, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, add, 1, 1, 0;}"
            : FOUR(0), FOUR(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else if constexpr (TOKENS == 32) {
        asm volatile(
            "{.reg .pred add; setp.eq.u32 add, 0, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
            "{%16,%17,%18,%19}, %20, add, 1, 1, 0;}"
            : SIXTEEN(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        static_assert(TOKENS == 64);
        asm volatile(
            "{.reg .pred add; setp.eq.u32 add, 0, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
            "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, 0;}"
            : SIXTEEN(0), SIXTEEN(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}
#undef SIXTEEN
#undef FOUR
#endif

}  // namespace forebay
