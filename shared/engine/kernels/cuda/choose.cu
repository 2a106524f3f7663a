// A token for each row of logits, from the logits to the token in one launch: the C side of `kernels.cuda_choice`.
//
// A row is a cluster of blocks. Each keeps the weights of its share of the tokens in shared memory, where all passes over
// them are made: nothing is sorted, and memory is read once. What a cut keeps is found bit by bit, the highest first: the
// largest threshold with enough tokens, or enough weight, from it upwards. Weights are added up as whole numbers, so that
// their sums do not depend on any order, and a threshold keeps exactly what a sorted list would have up to there.
#include "launch.cuh"

#include <algorithm>

namespace forebay {

constexpr int CHOOSERS = 8, MOST_CHOOSE_WARPS = 16, TOKENS_OF_THREAD = 16;
constexpr float UNITS_OF_ONE = 0x1p44f;        // as `distribution.UNITS`
constexpr int KEY_BITS = 30, PLACE_BITS = 20;  // of a weight up to 1, and of a token's place in a vocabulary
constexpr double SLACK = 1 + 1e-6;             // what is compared without a logarithm passes if it may be within the rounding
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST_FACTOR = 0xBF58476D1CE4E5B9, LAST_FACTOR = 0x94D049BB133111EB;  // as `splitmix`

// What a row asks for: at a temperature of 0 the likeliest token. A cut that is none: `min_p` 0, `top_k` 0, `top_p` 1.
struct Asked {
    double temperature, min_p, top_p;
    int64_t top_k;
    uint64_t begin;  // of the position's noise, as `gumbel.start`
};
struct Choose {
    const float* logits;  // [rows, num_tokens], `stride` from one row to the next
    const Asked* asked;
    int64_t* out;
    int64_t stride;
    int num_tokens;
};

// What the blocks of a cluster tell each other, in the same place of the shared memory of each. It has two turns, so that
// nobody writes what others still read.
struct Exchange {
    uint64_t of_warps[MOST_CHOOSE_WARPS][3], of_block[2][3];
};

template <int N, class Combine>
__device__ __forceinline__ void over_lanes(uint64_t (&values)[N], Combine combine, int from) {
    for (int i = from; i; i /= 2) {
        uint64_t theirs[N];
        for (int n = 0; n < N; n++) theirs[n] = __shfl_xor_sync(~0u, values[n], i);
        combine(values, theirs);
    }
}

// All warps' values as one, for all of them. Every thread comes here equally often.
template <int N, class Combine>
__device__ __forceinline__ void over_warps(uint64_t (&values)[N], Combine combine, Exchange* exchange, int& turn) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0)
        for (int n = 0; n < N; n++) exchange->of_warps[warp][n] = values[n];
    __syncthreads();
    if (warp == 0) {
        for (int n = 0; n < N; n++) values[n] = exchange->of_warps[lane % warps][n];  // warps are a power of two
        over_lanes(values, combine, warps / 2);
        if (lane == 0)
            for (int n = 0; n < N; n++) exchange->of_block[turn][n] = values[n];
    }
    Cluster::sync_shared();
    const float* theirs = Cluster::of(reinterpret_cast<float*>(exchange->of_block[turn]), lane % CHOOSERS);
    for (int n = 0; n < N; n++) values[n] = reinterpret_cast<const uint64_t*>(theirs)[n];
    over_lanes(values, combine, CHOOSERS / 2);
    turn ^= 1;
}

// All threads' values as one.
template <int N, class Combine>
__device__ __forceinline__ void together(uint64_t (&values)[N], Combine combine, Exchange* exchange, int& turn) {
    over_lanes(values, combine, 16);
    over_warps(values, combine, exchange, turn);
}

template <int N>
__device__ __forceinline__ void add(uint64_t (&a)[N], const uint64_t (&b)[N]) {
    for (int n = 0; n < N; n++) a[n] += b[n];
}

// Their sum, of weights: a thread's is below 2**54, so that 32 of its halves fit into as many bits.
template <int N>
__device__ __forceinline__ void add_up(uint64_t (&values)[N], Exchange* exchange, int& turn) {
    constexpr int HALF = 27;
    for (int n = 0; n < N; n++) {
        const uint32_t low = static_cast<uint32_t>(values[n]) & ((1u << HALF) - 1), high = static_cast<uint32_t>(values[n] >> HALF);
        values[n] = (static_cast<uint64_t>(sum_of_warp(high)) << HALF) + sum_of_warp(low);
    }
    over_warps(values, add<N>, exchange, turn);
}
// Of counts, three of which share a word: no vocabulary has 2**21 tokens.
__device__ __forceinline__ void add_up(uint32_t (&counts)[3], Exchange* exchange, int& turn) {
    constexpr int THIRD = 21;
    uint64_t all[1] = {};
    for (int n = 0; n < 3; n++) all[0] |= static_cast<uint64_t>(sum_of_warp(counts[n])) << n * THIRD;
    over_warps(all, add<1>, exchange, turn);
    for (int n = 0; n < 3; n++) counts[n] = all[0] >> n * THIRD & ((1u << THIRD) - 1);
}

// A number that orders floats as argmax does: what is no number is the largest, and both zeros are one.
__device__ __forceinline__ uint32_t ordered(float v) {
    if (v != v) return ~0u;
    const uint32_t bits = __float_as_uint(v + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float unordered(uint32_t order) { return __uint_as_float(order >> 31 ? order ^ 1u << 31 : ~order); }

__device__ __forceinline__ uint64_t units(float weight) { return static_cast<uint64_t>(weight * UNITS_OF_ONE); }

// When a token arrives whose noise is u, as `gumbel`.
__device__ __forceinline__ double noise(uint64_t begin, int token) {
    uint64_t word = begin + static_cast<uint64_t>(token + 1) * GOLDEN;
    word = (word ^ word >> 30) * FIRST_FACTOR;
    word = (word ^ word >> 27) * LAST_FACTOR;
    word ^= word >> 31;
    return (static_cast<double>(word >> 12) + 0.5) * 0x1p-52;
}
__device__ __forceinline__ double arrival(double u, float weight) { return -log1p(-u) / weight; }

// A block's share of a row.
struct Share {
    float* weights;
    int first, size;
    Exchange* exchange;
    int turn = 0;

    // The largest threshold of `bits` bits so that the amounts of all tokens with a key from it upwards reach `target`, which those of
    // all do; `above` is what those above it amount to. `look` gives a token's key and amount.
    template <class Look>
    __device__ uint32_t threshold(int bits, uint64_t target, uint64_t& above, Look look) {
        uint32_t found = 0;
        above = 0;
        for (int shift = bits - 2; shift >= 0; shift -= 2) {
            decltype(look.amount(0)) sums[3] = {};
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                const uint32_t key = look.key(i), digit = key >> shift & 3;
                if (key >> shift >> 2 != found || digit == 0) continue;
                const auto amount = look.amount(i);
                sums[0] += digit == 1 ? amount : 0, sums[1] += digit == 2 ? amount : 0, sums[2] += digit == 3 ? amount : 0;
            }
            add_up(sums, exchange, turn);
            uint32_t digit = 3;
            while (digit && above + sums[digit - 1] < target) above += sums[--digit];
            found = found << 2 | digit;
        }
        return found;
    }

    // Keep the fewest of the largest weights whose amounts reach `target`; of equal ones those of lower ids. The others become 0.
    template <class Look>
    __device__ void cut(uint64_t target, Look look) {
        uint64_t above;
        uint32_t ties[3] = {};  // of which one is of use
        const uint32_t least = threshold(KEY_BITS, target, above, look);
        for (int i = threadIdx.x; i < size; i += blockDim.x) ties[0] += look.key(i) == least;
        add_up(ties, exchange, turn);
        const uint64_t each = look.amount_of(__uint_as_float(least)), wanted = (target - above + each - 1) / each;
        uint32_t from = 0;  // the higher the place counted from the vocabulary's end, the lower the id
        if (wanted < ties[0]) {
            struct Tied {
                const Share& share;
                uint32_t least;
                __device__ uint32_t key(int i) const { return place(share.first + i); }
                __device__ uint32_t amount(int i) const { return __float_as_uint(share.weights[i]) == least; }
            };
            from = threshold(PLACE_BITS, wanted, above, Tied{*this, least});
        }
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
            const uint32_t key = look.key(i);
            if (key < least || (key == least && place(first + i) < from)) weights[i] = 0;
        }
    }
    __device__ static uint32_t place(int token) { return (1u << PLACE_BITS) - 1 - token; }
};

// Tokens by their weights, counted.
struct Counted {
    const float* weights;
    __device__ uint32_t key(int i) const { return __float_as_uint(weights[i]); }
    __device__ static uint64_t amount_of(float) { return 1; }
    __device__ uint32_t amount(int) const { return 1; }
};
// The same, weighed.
struct Weighed {
    const float* weights;
    __device__ uint32_t key(int i) const { return __float_as_uint(weights[i]); }
    __device__ static uint64_t amount_of(float weight) { return units(weight); }
    __device__ uint64_t amount(int i) const { return units(weights[i]); }
};

// The weights that temperature and cuts leave of the share's logits, of which `largest` is the row's largest: as `distribution.weights`.
__device__ void weigh(Share& share, const Asked& asked, float largest) {
    const float temperature = static_cast<float>(asked.temperature), min_p = static_cast<float>(asked.min_p);
    for (int i = threadIdx.x; i < share.size; i += blockDim.x) {
        const float weight = expf((share.weights[i] - largest) / temperature);
        share.weights[i] = weight >= min_p ? weight : 0;
    }
    if (asked.top_k) share.cut(asked.top_k, Counted{share.weights});
    if (asked.top_p < 1) {
        uint64_t total[1] = {};
        for (int i = threadIdx.x; i < share.size; i += blockDim.x) total[0] += units(share.weights[i]);
        add_up(total, share.exchange, share.turn);
        const auto reached = static_cast<uint64_t>(ceil(asked.top_p * static_cast<double>(total[0])));
        share.cut(min(max(reached, static_cast<uint64_t>(1)), total[0]), Weighed{share.weights});
    }
}

// The token that arrives first. The likeliest one's time bounds the winner's, and so does the soonest that a thread has seen: as
// -log(1 - u) >= u, only tokens whose noise is small enough go through a logarithm.
__device__ int first_to_arrive(Share& share, uint64_t begin, int likeliest) {
    double soonest = arrival(noise(begin, likeliest), 1.0f);
    int winner = likeliest;
    for (int i = threadIdx.x; i < share.size; i += blockDim.x) {
        const float weight = share.weights[i];
        if (weight == 0) continue;
        const int token = share.first + i;
        const double u = noise(begin, token);
        if (u > weight * (soonest * SLACK)) continue;
        const double time = arrival(u, weight);
        if (time < soonest || (time == soonest && token < winner)) soonest = time, winner = token;
    }
    uint64_t both[2] = {0, static_cast<uint64_t>(winner)};
    memcpy(both, &soonest, sizeof(soonest));  // positive, so that its bits are in its order
    const auto sooner = [](uint64_t(&a)[2], const uint64_t(&b)[2]) {
        if (b[0] < a[0] || (b[0] == a[0] && b[1] < a[1])) a[0] = b[0], a[1] = b[1];
    };
    together(both, sooner, share.exchange, share.turn);
    return static_cast<int>(both[1]);
}

__global__ void __launch_bounds__(MOST_CHOOSE_WARPS * 32) choose(const __grid_constant__ Choose p) {
    auto* const exchange = reinterpret_cast<Exchange*>(dynamic_shared());
    const int rank = Cluster::rank(), row = blockIdx.x / CHOOSERS, most = (p.num_tokens + CHOOSERS - 1) / CHOOSERS;
    Share share{reinterpret_cast<float*>(exchange + 1), rank * most, max(0, min(most, p.num_tokens - rank * most)), exchange};
    let_dependents_start();
    wait_for_inputs(p.logits);
    const Asked asked = p.asked[row];
    const float* logits = p.logits + row * p.stride + share.first;
    uint64_t best[1] = {};
#pragma unroll 8
    for (int i = threadIdx.x; i < share.size; i += blockDim.x) {
        const float logit = logits[i];
        share.weights[i] = logit;
        best[0] = max(best[0], static_cast<uint64_t>(ordered(logit)) << 32 | ~static_cast<uint32_t>(share.first + i));
    }
    together(best, [](uint64_t(&a)[1], const uint64_t(&b)[1]) { a[0] = max(a[0], b[0]); }, exchange, share.turn);
    int token = static_cast<int>(~static_cast<uint32_t>(best[0]));
    const float largest = unordered(best[0] >> 32);
    // Where it is not finite all tokens are forbidden, or the model computes nonsense; one comes anyway.
    if (asked.temperature > 0 && fabsf(largest) < INFINITY) {
        weigh(share, asked, largest);
        token = first_to_arrive(share, asked.begin, token);
    }
    if (rank == 0 && threadIdx.x == 0) p.out[row] = token;
    Cluster::sync_shared();  // others may still read what this block has told them
}

}  // namespace forebay

using forebay::Choose;

extern "C" {

// The most tokens that a vocabulary may have.
int forebay_choose_most() { return std::min<int>(1 << forebay::PLACE_BITS, forebay::CHOOSERS * ((200 << 10) / sizeof(float))); }

// Returns a cudaError_t.
int forebay_choose(const Choose* p, int num_rows, void* stream) {
    const int most = (p->num_tokens + forebay::CHOOSERS - 1) / forebay::CHOOSERS;
    const size_t shared = sizeof(forebay::Exchange) + most * sizeof(float);
    int warps = 1;
    while (warps < forebay::MOST_CHOOSE_WARPS && warps * 32 * forebay::TOKENS_OF_THREAD < most) warps *= 2;
    const cudaError_t error =
        cudaFuncSetAttribute(forebay::choose, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    const dim3 grid(num_rows * forebay::CHOOSERS);
    return forebay::launch(forebay::choose, grid, warps * 32, shared, forebay::CHOOSERS, static_cast<cudaStream_t>(stream), *p);
}

const char* forebay_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
