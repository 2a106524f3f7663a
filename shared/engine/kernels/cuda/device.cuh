// What the kernels ask of the GPU beyond C++. `tests/oracle/cuda_on_cpu` has the same in plain C++, a thread a lane.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
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

// Of two bf16 each, rounded.
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));  // plus -0
    return product;
}

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
