// Which experts a token chooses, and what all kernels of a mixture share.
#pragma once
#include <device.cuh>
#include <stdint.h>

namespace forebay {

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int MAX_EXPERTS = 256, MAX_CHOSEN = 8;  // all, and of a token
constexpr int INNER = 256;                        // values of a routed expert, and of the shared one
constexpr float SMALLER = 1.0f / 64;              // what inner values are kept as fp16 by

struct Scoring {
    int num_experts, num_chosen, normalize;
    float factor;
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ float of_pair(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }
__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// A token's experts into `chosen`, by one warp: those of the largest score with its bias, of equal ones the first.
__device__ __forceinline__ void choose(const Scoring& p, const float* logits, const float (&bias)[MAX_EXPERTS / 32], int* chosen) {
    constexpr int EACH = MAX_EXPERTS / 32;
    const int lane = threadIdx.x % 32;
    uint32_t order[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) order[j] = __float_as_uint(fresh(logits + min(lane + 32 * j, p.num_experts - 1)));
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const uint32_t bits = __float_as_uint(1.0f / (1.0f + __expf(-__uint_as_float(order[j]))) + bias[j]);
        order[j] = lane + 32 * j < p.num_experts ? (bits >> 31 ? ~bits : bits | 0x80000000u) : 0;
    }
#pragma unroll 1
    for (int turn = 0; turn < p.num_chosen; turn++) {
        uint32_t best = max(max(max(order[0], order[1]), max(order[2], order[3])), max(max(order[4], order[5]), max(order[6], order[7])));
        const uint32_t most = largest_of_warp(best), lanes = __ballot_sync(~0u, best == most);
        uint32_t which = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) which |= (order[j] == most ? 1u : 0u) << j;
        const int own = lane + 32 * (__ffs(which) - 1);
        int expert = own;
        if (lanes & (lanes - 1)) expert = MAX_EXPERTS - static_cast<int>(largest_of_warp(best == most ? MAX_EXPERTS - own : 0));  // seldom
        if (best == most && own == expert) {
            chosen[turn] = own;
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (own == lane + 32 * j) order[j] = 0;
        }
    }
    __syncwarp();
}

// What they weigh: lane i has the i-th's.
__device__ __forceinline__ float weigh(const Scoring& p, const float* logits, const int* chosen) {
    const int lane = threadIdx.x % 32;
    const float score = lane < p.num_chosen ? 1.0f / (1.0f + __expf(-fresh(logits + chosen[lane]))) : 0;
    float total = score;
    for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
    return (p.normalize ? score / (total + 1e-20f) : score) * p.factor;
}

}  // namespace forebay
