// Which experts compute which tokens, in one block: every token's choice, and then the tokens of each expert together.
#pragma once
#include "chosen.cuh"

namespace forebay {

constexpr int ROUTE_THREADS = 1024;
constexpr int MAX_TOKENS = 64;  // of a step
constexpr int MAX_MEMBERS = MAX_CHOSEN * MAX_TOKENS;

// Experts that were chosen, and the tokens of each one behind the other: those of the d-th are members starts[d] to
// starts[d + 1]. A member has a row of inner values, and its weight in its token's sum.
struct Groups {
    int count;
    int experts[MAX_EXPERTS];
    int starts[MAX_EXPERTS + 1];
    int tokens[MAX_MEMBERS];
    float weights[MAX_MEMBERS];
};

struct Routing {
    const float* logits;  // [tokens, row_stride]
    const float* bias;    // [experts]
    Groups* groups;
    int num_tokens, num_experts, num_chosen, row_stride, normalize;
    float factor;
};

// The same into shared memory, and the token into the set of each.
__device__ __forceinline__ void choose(const Routing& p, int t, const float (&bias)[MAX_EXPERTS / 32], int* chosen, float* weights,
                                       uint32_t (*tokens_of)[2]) {
    const Scoring scoring{p.num_experts, p.num_chosen, p.normalize, p.factor};
    const float* const logits = p.logits + static_cast<int64_t>(t) * p.row_stride;
    choose(scoring, logits, bias, chosen + t * MAX_CHOSEN);
    const float weight = weigh(scoring, logits, chosen + t * MAX_CHOSEN);
    const int lane = threadIdx.x % 32;
    if (lane >= p.num_chosen) return;
    weights[t * MAX_CHOSEN + lane] = weight;
    atomicOr(&tokens_of[chosen[t * MAX_CHOSEN + lane]][t / 32], 1u << t % 32);
}

// The tokens of expert threadIdx.x behind those of all before it.
__device__ __forceinline__ void group(const Routing& p, const int* chosen, const float* weights, uint64_t tokens) {
    __shared__ uint32_t totals[WARPS];
    const int expert = threadIdx.x, lane = expert % 32;  // and threads that have none
    const uint32_t own = static_cast<uint32_t>(tokens != 0) << 16 | __popcll(tokens);  // groups, and members
    uint32_t before = own;
    for (int i = 1; i < 32; i *= 2) {
        const uint32_t theirs = __shfl_up_sync(~0u, before, i);
        if (lane >= i) before += theirs;
    }
    if (lane == 31 && expert < MAX_EXPERTS) totals[expert / 32] = before;
    __syncthreads();
    for (int w = 0; w < min(expert / 32, WARPS); w++) before += totals[w];
    Groups& to = *p.groups;
    if (expert == MAX_EXPERTS - 1) to.count = before >> 16, to.starts[before >> 16] = before & 0xFFFF;
    if (!tokens) return;
    before -= own;
    int member = before & 0xFFFF;
    to.experts[before >> 16] = expert, to.starts[before >> 16] = member;
    for (; tokens; tokens &= tokens - 1, member++) {
        const int t = __ffsll(tokens) - 1;
        int place = 0;
#pragma unroll
        for (int i = 0; i < MAX_CHOSEN; i++)
            if (i < p.num_chosen && chosen[t * MAX_CHOSEN + i] == expert) place = i;
        to.tokens[member] = t, to.weights[member] = weights[t * MAX_CHOSEN + place];
    }
}

// One block. Nobody may find groups before it that this has not written, so what follows waits for it.
__global__ void __launch_bounds__(ROUTE_THREADS) route(const __grid_constant__ Routing p) {
    __shared__ int chosen[MAX_MEMBERS];
    __shared__ float weights[MAX_MEMBERS];
    __shared__ uint32_t tokens_of[MAX_EXPERTS][2];
    float bias[MAX_EXPERTS / 32];
#pragma unroll
    for (int j = 0; j < MAX_EXPERTS / 32; j++) bias[j] = p.bias[min(static_cast<int>(threadIdx.x) % 32 + 32 * j, p.num_experts - 1)];
    if (threadIdx.x < MAX_EXPERTS) tokens_of[threadIdx.x][0] = tokens_of[threadIdx.x][1] = 0;
    let_dependents_start();
    wait_for_inputs(p.logits);
    __syncthreads();
    for (int t = threadIdx.x / 32; t < p.num_tokens; t += static_cast<int>(blockDim.x) / 32) choose(p, t, bias, chosen, weights, tokens_of);
    __syncthreads();
    const uint32_t* tokens = tokens_of[min(static_cast<int>(threadIdx.x), MAX_EXPERTS - 1)];
    group(p, chosen, weights, threadIdx.x < MAX_EXPERTS ? static_cast<uint64_t>(tokens[1]) << 32 | tokens[0] : 0);
}

}  // namespace forebay
