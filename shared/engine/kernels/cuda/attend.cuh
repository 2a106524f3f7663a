// Latent attention of a row's heads to the tokens that it has selected, in splits.
//
// A split of the selection is a cluster of blocks. A block brings its tokens into shared memory by bulk copies, in a layer that keeps
// a selection before the queries are there; tensor cores multiply them with eight heads' queries, and, turned, with
// eight heads' weights, once or twice: what has been brought serves sixteen heads. Then each block has one head of
// eight: it reads what all blocks of the cluster have found for it from their shared memory, so that memory is told of
// splits of several hundred tokens only.
#pragma once
#include <device.cuh>

namespace forebay {

constexpr int ATTENDERS = 8, ATTEND_THREADS = 256, ATTEND_WARPS = ATTEND_THREADS / 32;  // blocks of a cluster, and what they have
constexpr int HEADS = ATTENDERS, TILE = 16, MOST_TOKENS = TILE * ATTEND_WARPS;           // of a block
constexpr int LATENT = 512, TURNED = 64, WIDTH = LATENT + TURNED;                        // of a token
constexpr int TOKEN_BYTES = WIDTH * 2, ROW_BYTES = TOKEN_BYTES + 16;  // in shared memory rows begin in other banks
constexpr int PIECES = TOKEN_BYTES / 16, MEAN_STRIDE = LATENT + 4, WEIGHT_STRIDE = MOST_TOKENS + 8;

struct Attend {
    const __nv_bfloat16 *latent, *turned;  // queries [rows, heads, LATENT], [rows, heads, TURNED]
    const __nv_bfloat16* tokens;           // pages of so many tokens
    const int *slots, *counts;             // [rows, top_k], [rows]
    float *parts, *maxima, *sums;          // as `Merge`
    int64_t page_stride, latent_row, latent_head;
    int num_heads, num_splits, top_k, page_size, early;
    float scale;  // of scores of base 2
};
template <int EIGHTS>  // of heads
struct AttendMemory {
    static constexpr int MEANS_BYTES = EIGHTS * HEADS * MEAN_STRIDE * 4;
    float maxima[EIGHTS * HEADS], sums[EIGHTS * HEADS];  // of this block's tokens, for all blocks
    float of_warps[2][ATTEND_WARPS][EIGHTS * HEADS];
    __nv_bfloat16 weights[EIGHTS * HEADS * WEIGHT_STRIDE];
    alignas(16) char queries[EIGHTS * HEADS * ROW_BYTES];
    alignas(16) uint64_t signal;
    // and tokens, of ROW_BYTES each; in the end their means, for all blocks

    __device__ __forceinline__ char* tokens() { return reinterpret_cast<char*>(this + 1); }
    __device__ __forceinline__ float* means() { return reinterpret_cast<float*>(this + 1); }
};

__device__ __forceinline__ float largest_of_tokens(float value) {
    for (int i = 4; i < 32; i *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, i));
    return value;
}
__device__ __forceinline__ float sum_of_tokens(float value) {
    for (int i = 4; i < 32; i *= 2) value += __shfl_xor_sync(~0u, value, i);
    return value;
}

// Ask for a block's tokens: each warp for some, since a copy holds up the warp that asks for it (docs/LOG.md).
__device__ __forceinline__ void ask(const Attend& p, const int* slots, int size, char* tokens, uint64_t* signal) {
    if (threadIdx.x == 0) signal_expect(signal, size * TOKEN_BYTES);
    for (int i = threadIdx.x % 32 * ATTEND_WARPS + threadIdx.x / 32; i < size; i += ATTEND_THREADS) {
        const int slot = fresh(slots + i);
        const __nv_bfloat16* from = p.tokens + slot / p.page_size * p.page_stride + slot % p.page_size * WIDTH;
        copy_again(tokens + i * ROW_BYTES, from, TOKEN_BYTES, signal);
    }
}

// The queries of so many heads, from `first` on, all asked for before any has come; heads that there are not are zeros.
template <int COUNT>
__device__ __forceinline__ void bring_queries(const Attend& p, int row, int first, char* queries) {
    constexpr int EACH = (COUNT * PIECES + ATTEND_THREADS - 1) / ATTEND_THREADS;
    uint4 words[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = min(static_cast<int>(threadIdx.x) + i * ATTEND_THREADS, COUNT * PIECES - 1), piece = at % PIECES;
        const int head = min(first + at / PIECES, p.num_heads - 1);
        const __nv_bfloat16* const from = piece < LATENT / 8
            ? p.latent + row * p.latent_row + head * p.latent_head + piece * 8
            : p.turned + (static_cast<int64_t>(row) * p.num_heads + head) * TURNED + (piece - LATENT / 8) * 8;
        words[i] = fresh(static_cast<const void*>(from));
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = threadIdx.x + i * ATTEND_THREADS, h = at / PIECES;
        if (at < COUNT * PIECES) *reinterpret_cast<uint4*>(queries + h * ROW_BYTES + at % PIECES * 16) = first + h < p.num_heads ? words[i] : make_uint4(0, 0, 0, 0);
    }
}

// Scores of a warp's sixteen tokens: lane 4 g + q has those of tokens g and g + 8 for heads 2 q and 2 q + 1 of each eight.
template <int EIGHTS>
__device__ __forceinline__ void score(float (&scores)[EIGHTS][4], const char* tokens, const char* queries) {
    const int lane = threadIdx.x % 32;
    const char* const a = tokens + lane % 16 * ROW_BYTES + lane / 16 * 16;
    const char* const b = queries + lane % 8 * ROW_BYTES + lane / 8 * 16;
    float sums[EIGHTS][4][4] = {};
#pragma unroll
    for (int k = 0; k < WIDTH / 32; k++) {
        const uint4 first = matrices(a + k * 64), second = matrices(a + k * 64 + 32);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            const uint4 both = matrices(b + e * HEADS * ROW_BYTES + k * 64);
            multiply(sums[e][k % 2 * 2], {first.x, first.y, first.z, first.w}, both.x, both.y);
            multiply(sums[e][k % 2 * 2 + 1], {second.x, second.y, second.z, second.w}, both.z, both.w);
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[e][i] = sums[e][0][i] + sums[e][1][i] + (sums[e][2][i] + sums[e][3][i]);
}

// What weights of all tokens come to for a warp's share of the latent, into the means, which lie where tokens have lain.
template <int EIGHTS>
__device__ __forceinline__ void average(AttendMemory<EIGHTS>* memory, int num_tiles) {
    constexpr int SHARE = LATENT / ATTEND_WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const char* const a = memory->tokens() + (lane % 8 + lane / 16 * 8) * ROW_BYTES + (warp * SHARE + lane / 8 % 2 * 8) * 2;
    const __nv_bfloat16* const b = memory->weights + g * WEIGHT_STRIDE + q * 2;
    float sums[EIGHTS][SHARE / 16][4] = {};
    for (int t = 0; t < num_tiles; t++) {
        uint32_t near[EIGHTS], far[EIGHTS];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            near[e] = *reinterpret_cast<const uint32_t*>(b + e * HEADS * WEIGHT_STRIDE + t * TILE);
            far[e] = *reinterpret_cast<const uint32_t*>(b + e * HEADS * WEIGHT_STRIDE + t * TILE + 8);
        }
#pragma unroll
        for (int m = 0; m < SHARE / 16; m++) {
            const uint4 w = matrices_turned(a + t * TILE * ROW_BYTES + m * 32);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) multiply(sums[e][m], {w.x, w.y, w.z, w.w}, near[e], far[e]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int m = 0; m < SHARE / 16; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                memory->means()[(e * HEADS + q * 2 + i % 2) * MEAN_STRIDE + warp * SHARE + m * 16 + g + i / 2 * 8] = sums[e][m][i];
}

// What all blocks of the cluster have found for heads `first`, eight more, and so on, of which a thread has two values; all of it is asked
// for before any has come. A block without tokens has no part.
template <int EIGHTS>
__device__ __forceinline__ void gather(AttendMemory<EIGHTS>* memory, int first, float (&best)[EIGHTS], float (&total)[EIGHTS], float (&mean)[EIGHTS][2]) {
    float maxima[EIGHTS][ATTENDERS], sums[EIGHTS][ATTENDERS];
    float2 theirs[EIGHTS][ATTENDERS];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        const int head = e * HEADS + first;
        float* const own = memory->means() + head * MEAN_STRIDE + threadIdx.x * 2;
#pragma unroll
        for (int r = 0; r < ATTENDERS; r++) {
            maxima[e][r] = *Cluster::of(memory->maxima + head, r), sums[e][r] = *Cluster::of(memory->sums + head, r);
            theirs[e][r] = *reinterpret_cast<const float2*>(Cluster::of(own, r));
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int r = 0; r < ATTENDERS; r++) best[e] = fmaxf(best[e], maxima[e][r]);
#pragma unroll
        for (int r = 0; r < ATTENDERS; r++) {
            if (maxima[e][r] == -INFINITY) continue;
            const float weight = exp2f(maxima[e][r] - best[e]);
            total[e] += weight * sums[e][r], mean[e][0] += weight * theirs[e][r].x, mean[e][1] += weight * theirs[e][r].y;
        }
    }
}

template <int EIGHTS>
__global__ void __launch_bounds__(ATTEND_THREADS) attend(const __grid_constant__ Attend p) {
    constexpr int COUNT = EIGHTS * HEADS;
    auto* const memory = reinterpret_cast<AttendMemory<EIGHTS>*>(dynamic_shared());
    char* const tokens = memory->tokens();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, rank = Cluster::rank();
    const int groups = (p.num_heads + COUNT - 1) / COUNT, place = blockIdx.x / ATTENDERS;
    const int split = place % p.num_splits, group = place / p.num_splits % groups, row = place / p.num_splits / groups;
    if (threadIdx.x == 0) signal_init(&memory->signal, 1), signals_ready();
    if (!p.early) wait_for_inputs(p.latent);
    const int count = fresh(p.counts + row), blocks = p.num_splits * ATTENDERS;
    const int each = ((count + blocks - 1) / blocks + TILE - 1) / TILE * TILE, first = min((split * ATTENDERS + rank) * each, count);
    const int size = min(each, count - first), num_tiles = (size + TILE - 1) / TILE;
    __syncthreads();
    copies_follow_inputs();
    ask(p, p.slots + static_cast<int64_t>(row) * p.top_k + first, size, tokens, &memory->signal);
    for (int i = threadIdx.x; i < (num_tiles * TILE - size) * PIECES; i += ATTEND_THREADS)
        *reinterpret_cast<uint4*>(tokens + (size + i / PIECES) * ROW_BYTES + i % PIECES * 16) = make_uint4(0, 0, 0, 0);
    if (p.early) wait_for_inputs(p.latent);
    bring_queries<COUNT>(p, row, group * COUNT, memory->queries);
    __syncthreads();
    signal_wait(&memory->signal, 0);

    float scores[EIGHTS][4] = {}, best[EIGHTS][2], sums[EIGHTS][2] = {};
    if (warp < num_tiles) {
        score(scores, tokens + warp * TILE * ROW_BYTES, memory->queries);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            best[e][0] = best[e][1] = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[e][i] = warp * TILE + g + i / 2 * 8 < size ? scores[e][i] * p.scale : -INFINITY;
                best[e][i % 2] = fmaxf(best[e][i % 2], scores[e][i]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                best[e][i] = largest_of_tokens(best[e][i]);
                if (g == 0) memory->of_warps[0][warp][e * HEADS + q * 2 + i] = best[e][i];
            }
        }
    }
    __syncthreads();
    if (warp < num_tiles) {
        for (int w = 0; w < num_tiles; w++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) best[e][i] = fmaxf(best[e][i], memory->of_warps[0][w][e * HEADS + q * 2 + i]);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float weight = exp2f(scores[e][i] - best[e][i % 2]);
                sums[e][i % 2] += weight;
                memory->weights[(e * HEADS + q * 2 + i % 2) * WEIGHT_STRIDE + warp * TILE + g + i / 2 * 8] = __float2bfloat16(weight);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sums[e][i] = sum_of_tokens(sums[e][i]);
                if (g == 0) memory->of_warps[1][warp][e * HEADS + q * 2 + i] = sums[e][i];
            }
        }
    }
    __syncthreads();
    average(memory, num_tiles);
    let_dependents_start();  // not before: their loads would delay these
    if (threadIdx.x < COUNT) {
        float largest = -INFINITY, sum = 0;
        for (int w = 0; w < num_tiles; w++) largest = fmaxf(largest, memory->of_warps[0][w][threadIdx.x]), sum += memory->of_warps[1][w][threadIdx.x];
        memory->maxima[threadIdx.x] = largest, memory->sums[threadIdx.x] = sum;
    }
    Cluster::sync_shared();
    float largest[EIGHTS], total[EIGHTS] = {}, mean[EIGHTS][2] = {};
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) largest[e] = -INFINITY;
    gather(memory, rank, largest, total, mean);
    Cluster::arrive();  // nobody leaves while others read what it has found, though they may not need it
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        const int head = group * COUNT + e * HEADS + rank;
        if (head >= p.num_heads) continue;
        const int64_t out = (static_cast<int64_t>(row) * p.num_heads + head) * p.num_splits + split;
        if (threadIdx.x == 0) p.maxima[out] = largest[e], p.sums[out] = total[e];
        *reinterpret_cast<float2*>(p.parts + out * LATENT + threadIdx.x * 2) = {mean[e][0], mean[e][1]};
    }
    Cluster::wait();
}

}  // namespace forebay
