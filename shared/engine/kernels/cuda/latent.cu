// What splits of a selection found, merged and brought out of latent space, in one kernel: the C side of
// `kernels.cuda_latent`.
//
// Each token's head is a cluster of blocks. A block merges its share of the latent of all splits, reading it once; they read
// one another's shares from shared memory, and each multiplies the whole by its rows of the matrix, which it asked for before
// the splits were there.
#include <device.cuh>

namespace forebay {

constexpr int MERGERS = 8, MERGE_THREADS = 256, MERGE_WARPS = MERGE_THREADS / 32;  // blocks of a cluster, and what they have
constexpr int LATENT = 512, VALUE = 256, MAX_SPLITS = 64;
constexpr int SHARE = LATENT / MERGERS, LANES = SHARE / 4, BESIDE = MERGE_THREADS / LANES, TURNS = MAX_SPLITS / BESIDE;
constexpr int ROWS_OF_WARP = VALUE / MERGERS / MERGE_WARPS;

struct Merge {
    const float *parts, *maxima, *sums;  // [tokens, heads, splits, LATENT], and [tokens, heads, splits] of base 2
    const __nv_bfloat16* up_value;       // [heads, VALUE, LATENT]
    __nv_bfloat16* out;                  // [tokens, heads, VALUE]
    int num_heads, num_splits;
};

__device__ __forceinline__ float half_of(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }

// The weights of all splits into shared memory, by each warp; what their sums come to.
__device__ __forceinline__ float weigh(const Merge& p, int64_t first, float* weights) {
    const int lane = threadIdx.x % 32;
    float maxima[2], sums[2], best = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int split = lane + 32 * i, at = min(split, p.num_splits - 1);
        maxima[i] = p.maxima[first + at], sums[i] = p.sums[first + at];
        if (split >= p.num_splits) maxima[i] = -INFINITY;
        best = fmaxf(best, maxima[i]);
    }
    for (int i = 16; i; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float weight = exp2f(maxima[i] - best);
        weights[lane + 32 * i] = weight;
        if (weight > 0) total += weight * sums[i];
    }
    for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
    return total;
}

// Shared memory: weights of a warp [MERGE_WARPS][MAX_SPLITS], sums [BESIDE][SHARE], this block's share [SHARE], all [LATENT].
__global__ void __launch_bounds__(MERGE_THREADS) merge(const __grid_constant__ Merge p) {
    float* const weights = dynamic_shared() + threadIdx.x / 32 * MAX_SPLITS;
    float* const beside = dynamic_shared() + MERGE_WARPS * MAX_SPLITS;
    float* const share = beside + BESIDE * SHARE;
    float* const mean = share + SHARE;
    const int rank = Cluster::rank(), place = blockIdx.x / MERGERS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int value = rank * (VALUE / MERGERS) + warp * ROWS_OF_WARP;
    const int64_t row = static_cast<int64_t>(place % p.num_heads) * VALUE + value;
    uint4 rows[ROWS_OF_WARP][2];
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            rows[r][h] = stream(reinterpret_cast<const uint4*>(p.up_value + (row + r) * LATENT + h * (LATENT / 2) + lane * 8));
    let_dependents_start();
    wait_for_inputs(p.parts);

    const int64_t first = static_cast<int64_t>(place) * p.num_splits;
    const int group = threadIdx.x / LANES, column = threadIdx.x % LANES * 4;
    uint4 found[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int split = min(group + i * BESIDE, p.num_splits - 1);
        found[i] = *reinterpret_cast<const uint4*>(p.parts + (first + split) * LATENT + rank * SHARE + column);
    }
    const float total = weigh(p, first, weights);
    __syncwarp();
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const float weight = weights[group + i * BESIDE];
        if (weight == 0) continue;  // a split that nothing fell to has no part
        sums[0] += weight * __uint_as_float(found[i].x), sums[1] += weight * __uint_as_float(found[i].y);
        sums[2] += weight * __uint_as_float(found[i].z), sums[3] += weight * __uint_as_float(found[i].w);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) beside[group * SHARE + column + i] = sums[i];
    __syncthreads();
    if (threadIdx.x < SHARE) {
        float sum = 0;
        for (int i = 0; i < BESIDE; i++) sum += beside[i * SHARE + threadIdx.x];
        share[threadIdx.x] = __bfloat162float(__float2bfloat16(sum / total));
    }
    Cluster::sync();
    for (int i = threadIdx.x; i < LATENT; i += MERGE_THREADS) mean[i] = Cluster::of(share, i / SHARE)[i % SHARE];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        float sum = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float* with = mean + h * (LATENT / 2) + lane * 8;
            const uint32_t words[4] = {rows[r][h].x, rows[r][h].y, rows[r][h].z, rows[r][h].w};
#pragma unroll
            for (int i = 0; i < 8; i++) sum += half_of(words[i / 2], i % 2) * with[i];
        }
        for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane == 0) p.out[static_cast<int64_t>(place) * VALUE + value + r] = __float2bfloat16(sum);
    }
    Cluster::sync();  // nobody leaves while others still read its share
}

}  // namespace forebay

extern "C" {

// Returns a cudaError_t.
int forebay_merge(const forebay::Merge* p, int num_tokens, int early, void* stream) {
    if (p->num_splits > forebay::MAX_SPLITS) return cudaErrorInvalidValue;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = early;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = forebay::MERGERS, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_tokens * p->num_heads * forebay::MERGERS), config.blockDim = dim3(forebay::MERGE_THREADS);
    config.dynamicSmemBytes = sizeof(float) * (forebay::MERGE_WARPS * forebay::MAX_SPLITS + (forebay::BESIDE + 1) * forebay::SHARE + forebay::LATENT);
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = attributes, config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, forebay::merge, *p);
}
}
