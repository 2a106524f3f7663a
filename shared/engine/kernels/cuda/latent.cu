// Sparse latent attention of few rows, the C side of `kernels.cuda_latent`: what a row selects, what splits of its selection find, and
// here how that is merged and brought out of latent space, in one kernel.
//
// Each token's head is a cluster of blocks. A block merges its share of the latent of all splits, reading it once; they read
// one another's shares from shared memory, and each multiplies the whole by its rows of the matrix, which it asked for before
// the splits were there. Of few splits each lane merges by itself what it multiplies, and nobody waits for anybody.
#include "attend.cuh"
#include "launch.cuh"
#include "select.cuh"

namespace forebay {

constexpr int MERGERS = 8, MERGE_THREADS = 256, MERGE_WARPS = MERGE_THREADS / 32;  // blocks of a cluster, and what they have
constexpr int VALUE = 256, MAX_SPLITS = 64;
constexpr int SHARE = LATENT / MERGERS, LANES = SHARE / 4, BESIDE = MERGE_THREADS / LANES, TURNS = MAX_SPLITS / BESIDE;
constexpr int ROWS_OF_WARP = VALUE / MERGERS / MERGE_WARPS;

struct Merge {
    const float *parts, *maxima, *sums;  // [tokens, heads, splits, LATENT], and [tokens, heads, splits] of base 2
    const __nv_bfloat16* up_value;       // [heads, VALUE, LATENT]
    __nv_bfloat16* out;                  // [tokens, heads, VALUE]
    int num_tokens, num_heads, num_splits;
    int each, late;  // of few splits, tokens of a block; and what comes next starts when this kernel may read
};

__device__ __forceinline__ float half_of(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }

// The rows of the matrix that a warp multiplies.
struct Rows {
    uint4 words[ROWS_OF_WARP][2];

    __device__ __forceinline__ void load(const __nv_bfloat16* first) {
#pragma unroll
        for (int r = 0; r < ROWS_OF_WARP; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                words[r][h] = stream(reinterpret_cast<const uint4*>(first + r * LATENT + h * (LATENT / 2) + threadIdx.x % 32 * 8));
    }
    // Times what the lane has of the latent, eight values from each half, for the warp.
    __device__ __forceinline__ void multiply(const float* near, const float* far, __nv_bfloat16* out) const {
#pragma unroll
        for (int r = 0; r < ROWS_OF_WARP; r++) {
            float sum = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float* with = h ? far : near;
                const uint32_t pairs[4] = {words[r][h].x, words[r][h].y, words[r][h].z, words[r][h].w};
#pragma unroll
                for (int i = 0; i < 8; i++) sum += half_of(pairs[i / 2], i % 2) * with[i];
            }
            for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
            if (threadIdx.x % 32 == 0) out[r] = __float2bfloat16(sum);
        }
    }
};

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
    Rows rows;
    rows.load(p.up_value + row * LATENT);
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
    Cluster::sync_shared();
    for (int i = threadIdx.x; i < LATENT; i += MERGE_THREADS) mean[i] = Cluster::of(share, i / SHARE)[i % SHARE];
    __syncthreads();
    rows.multiply(mean + lane * 8, mean + LATENT / 2 + lane * 8, p.out + static_cast<int64_t>(place) * VALUE + value);
    Cluster::sync_shared();  // nobody leaves while others still read its share
}

// What a lane has of a head's few splits: sixteen values of each, and what they weigh.
template <int SPLITS>
struct FewSplits {
    float maxima[SPLITS], sums[SPLITS];
    float4 values[SPLITS][4];

    __device__ __forceinline__ void load(const Merge& p, int64_t place) {
        const int64_t first = place * SPLITS;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            maxima[s] = p.maxima[first + s], sums[s] = p.sums[first + s];
#pragma unroll
            for (int i = 0; i < 4; i++)
                values[s][i] = *reinterpret_cast<const float4*>(p.parts + (first + s) * LATENT + i / 2 * (LATENT / 2) + threadIdx.x % 32 * 8 + i % 2 * 4);
        }
    }
    __device__ __forceinline__ void average(float (&mean)[16]) const {
        float best = -INFINITY, total = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) mean[i] = 0;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) best = fmaxf(best, maxima[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            if (maxima[s] == -INFINITY) continue;  // a split that nothing fell to has no part
            const float weight = exp2f(maxima[s] - best);
            total += weight * sums[s];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mean[4 * i] += weight * values[s][i].x, mean[4 * i + 1] += weight * values[s][i].y;
                mean[4 * i + 2] += weight * values[s][i].z, mean[4 * i + 3] += weight * values[s][i].w;
            }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) mean[i] = __bfloat162float(__float2bfloat16(mean[i] / total));
    }
};

// The same of so many splits, without a cluster. A block has a head of `p.each` tokens.
template <int SPLITS>
__global__ void __launch_bounds__(MERGE_THREADS, 2) merge_few(const __grid_constant__ Merge p) {
    const int rank = blockIdx.x % MERGERS, head = blockIdx.x / MERGERS % p.num_heads, warp = threadIdx.x / 32;
    const int begin = blockIdx.x / MERGERS / p.num_heads * p.each, end = min(begin + p.each, p.num_tokens);
    const int value = rank * (VALUE / MERGERS) + warp * ROWS_OF_WARP;
    Rows rows;
    rows.load(p.up_value + (static_cast<int64_t>(head) * VALUE + value) * LATENT);
    if (!p.late) let_dependents_start();
    wait_for_inputs(p.parts);
    if (p.late) let_dependents_start();

    FewSplits<SPLITS> found;
    found.load(p, static_cast<int64_t>(begin) * p.num_heads + head);
    for (int token = begin; token < end; token++) {
        const int64_t place = static_cast<int64_t>(token) * p.num_heads + head;
        float mean[16];
        found.average(mean);
        if (token + 1 < end) found.load(p, place + p.num_heads);  // comes while this token's is multiplied
        rows.multiply(mean, mean + 8, p.out + place * VALUE + value);
    }
}

template <int SPLITS>
cudaError_t run_few(const Merge& p, bool early, void* stream) {
    const dim3 blocks((p.num_tokens + p.each - 1) / p.each * p.num_heads * MERGERS);
    return launch_beside(merge_few<SPLITS>, blocks, MERGE_THREADS, 0, 1, early, stream, p);
}

template <int EIGHTS>
cudaError_t run(const Attend& p, int num_rows, bool early, void* stream) {
    const int blocks = p.num_splits * ATTENDERS, most = ((p.top_k + blocks - 1) / blocks + TILE - 1) / TILE * TILE;
    if (most > MOST_TOKENS) return cudaErrorInvalidValue;
    const int groups = (p.num_heads + EIGHTS * HEADS - 1) / (EIGHTS * HEADS), behind = max(most * ROW_BYTES, AttendMemory<EIGHTS>::MEANS_BYTES);
    return launch_beside(attend<EIGHTS>, dim3(num_rows * groups * blocks), ATTEND_THREADS, sizeof(AttendMemory<EIGHTS>) + behind, ATTENDERS, early, stream, p);
}

}  // namespace forebay

extern "C" {

// Each returns a cudaError_t. Behind a selection of all tokens nothing of `scores` is read.
int forebay_select(const forebay::Select* p, int num_rows, int early, void* stream) {
    using namespace forebay;
    const size_t shared = sizeof(SelectMemory) + sizeof(uint32_t) * p->held;
    return launch_beside(select, dim3(num_rows * SELECTORS), SELECT_THREADS, shared, SELECTORS, early, stream, *p);
}

// Sixteen heads of a row are taken together where clusters for eight each would not all find a place.
int forebay_attend(const forebay::Attend* p, int num_rows, int early, void* stream) {
    using namespace forebay;
    return p->num_heads > HEADS && num_rows > 1 ? run<2>(*p, num_rows, early, stream) : run<1>(*p, num_rows, early, stream);
}

int forebay_merge(const forebay::Merge* p, int early, void* stream) {
    using namespace forebay;
    switch (p->num_splits) {
        case 1: return run_few<1>(*p, early, stream);
        case 2: return run_few<2>(*p, early, stream);
        case 4: return run_few<4>(*p, early, stream);
    }
    if (p->num_splits > MAX_SPLITS) return cudaErrorInvalidValue;
    const size_t shared = sizeof(float) * (MERGE_WARPS * MAX_SPLITS + (BESIDE + 1) * SHARE + LATENT);
    return launch_beside(merge, dim3(p->num_tokens * p->num_heads * MERGERS), MERGE_THREADS, shared, MERGERS, early, stream, *p);
}
}
