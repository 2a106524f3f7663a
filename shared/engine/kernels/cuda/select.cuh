// The highest index scores of each row, and where their tokens lie: exactly so many, of equal scores the first, in the order of
// positions.
//
// A row is a cluster of blocks, each of which keeps its share of the scores in shared memory. The lowest one that is selected is found
// eight bits at a time, the highest first: all blocks count their scores by these bits, and every block adds up what all have counted.
// What ties is told apart by further bits, of the position. The search ends when just as many are left as are wanted, for
// scores that differ after three turns.
#pragma once
#include <device.cuh>

namespace forebay {

constexpr int SELECTORS = 8, SELECT_THREADS = 512, SELECT_WARPS = SELECT_THREADS / 32;  // blocks of a cluster, and what they have
constexpr int BINS = 256, COPIES = 8;      // of a count, so that lanes with equal bits seldom wait for one another
constexpr int KEY_BITS = 32, PLACE_BITS = 24, BITS = KEY_BITS + PLACE_BITS;  // of a score, and of a position

struct Select {
    const float* scores;                       // [rows, stride]
    const int *positions, *starts, *page_ids;  // of rows, as `inputs.Rows`
    int *slots, *counts;                       // [rows, top_k], [rows]
    int stride, top_k, page_size, first, held;  // `held`: scores that a block can keep
};

// float to uint32 in the same order; both zeros are one, and what is no number comes last.
__device__ __forceinline__ uint32_t in_order_of(float score) {
    const uint32_t bits = __float_as_uint((score > -INFINITY ? score : -INFINITY) + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// The sum of a value over this lane and those before it.
__device__ __forceinline__ uint32_t sum_so_far(uint32_t value) {
    for (int by = 1; by < 32; by *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, value, by);
        if (threadIdx.x % 32 >= by) value += before;
    }
    return value;
}

// What a turn of the search finds: the bits of the lowest score that is wanted, how many have these bits, how many have higher ones,
// and of both how many are in the blocks before this one.
struct Found {
    uint32_t bits, same, higher, same_before, higher_before;
};
struct SelectMemory {
    uint32_t counts[BINS * COPIES], of_block[2][BINS], of_warps[2][BINS / 32], kept[SELECT_WARPS];
    Found found;
};

// A block's share of a row's scores: `size` from position `first` on.
struct Scores {
    const float* global;
    const uint32_t* kept;  // or none
    int first, size;

    __device__ __forceinline__ uint32_t key(int i) const { return kept != nullptr ? kept[i] : in_order_of(global[i]); }
    // Score and position, of equal scores the first the highest.
    __device__ __forceinline__ uint64_t rank(int i) const {
        return static_cast<uint64_t>(key(i)) << PLACE_BITS | ((1u << PLACE_BITS) - 1 - (first + i));
    }
};

// Of all scores whose bits above `shift` + 8 are `prefix` the `wanted`th: its next eight bits.
__device__ __forceinline__ Found turn(const Scores& own, uint64_t prefix, int shift, uint32_t wanted, int parity, SelectMemory* memory) {
    const int thread = threadIdx.x, rank = Cluster::rank(), lane = thread % 32, warp = thread / 32;
    for (int i = thread; i < own.size; i += SELECT_THREADS) {
        const uint64_t bits = own.rank(i) >> shift;
        if (bits >> 8 == prefix) atomicAdd(&memory->counts[(bits & 255) * COPIES + lane % COPIES], 1u);
    }
    __syncthreads();
    if (thread < BINS) {
        uint32_t sum = 0;
#pragma unroll
        for (int copy = 0; copy < COPIES; copy++) {
            uint32_t& count = memory->counts[thread * COPIES + (copy + lane / 4) % COPIES];
            sum += count, count = 0;
        }
        memory->of_block[parity][thread] = sum;
    }
    Cluster::sync_shared();
    uint32_t all = 0, before = 0, all_so_far = 0, before_so_far = 0;
    if (thread < BINS) {  // from the highest on
        float* const mine = reinterpret_cast<float*>(&memory->of_block[parity][BINS - 1 - thread]);
        uint32_t theirs[SELECTORS];
#pragma unroll
        for (int r = 0; r < SELECTORS; r++) theirs[r] = *reinterpret_cast<const uint32_t*>(Cluster::of(mine, r));
#pragma unroll
        for (int r = 0; r < SELECTORS; r++) all += theirs[r], before += r < rank ? theirs[r] : 0;
        all_so_far = sum_so_far(all), before_so_far = sum_so_far(before);
        if (lane == 31) memory->of_warps[0][warp] = all_so_far, memory->of_warps[1][warp] = before_so_far;
    }
    __syncthreads();
    if (thread < BINS) {
        for (int w = 0; w < warp; w++) all_so_far += memory->of_warps[0][w], before_so_far += memory->of_warps[1][w];
        if (all_so_far >= wanted && all_so_far - all < wanted)
            memory->found = {static_cast<uint32_t>(BINS - 1 - thread), all, all_so_far - all, before, before_so_far - before};
    }
    __syncthreads();
    return memory->found;
}

__device__ __forceinline__ int slot_of(const Select& p, const int* table, int position) {
    return table[position / p.page_size] * p.page_size + position % p.page_size;
}

// Write the slots of those of the share that are no lower than `least`, the first of them at `place`. A warp has a span of the share.
__device__ __forceinline__ void keep(const Select& p, const Scores& own, uint64_t least, int place, const int* table, int* slots, SelectMemory* memory) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (own.size + SELECT_THREADS - 1) / SELECT_THREADS * 32;
    const int begin = warp * each, end = min(begin + each, own.size);
    uint32_t count = 0;
    for (int i = begin + lane; i < end; i += 32) count += own.rank(i) >= least;
    count = sum_so_far(count);
    if (lane == 31) memory->kept[warp] = count;
    __syncthreads();
    for (int w = 0; w < warp; w++) place += memory->kept[w];
    for (int base = begin; base < end; base += 32) {
        const int i = base + lane;
        const bool is_kept = i < end && own.rank(i) >= least;
        const uint32_t which = __ballot_sync(~0u, is_kept);
        if (is_kept) slots[place + __popc(which & ((1u << lane) - 1))] = slot_of(p, table, own.first + i);
        place += __popc(which);
    }
}

__global__ void __launch_bounds__(SELECT_THREADS) select(const __grid_constant__ Select p) {
    auto* const memory = reinterpret_cast<SelectMemory*>(dynamic_shared());
    auto* const keys = reinterpret_cast<uint32_t*>(memory + 1);
    const int row = blockIdx.x / SELECTORS, rank = Cluster::rank(), thread = threadIdx.x;
    const int visible = p.positions[row] + 1;  // older than the kernels in front
    const int* const table = p.page_ids + p.starts[row];
    int* const slots = p.slots + static_cast<int64_t>(row) * p.top_k;
    for (int i = thread; i < BINS * COPIES; i += SELECT_THREADS) memory->counts[i] = 0;
    let_dependents_start();
    wait_for_inputs(p.scores);
    if (visible <= p.top_k) {  // all of them: only the first layer of a step writes that
        if (p.first && rank == 0) {
            for (int i = thread; i < visible; i += SELECT_THREADS) slots[i] = slot_of(p, table, i);
            if (thread == 0) p.counts[row] = visible;
        }
        return;
    }
    const int most = (visible + SELECTORS - 1) / SELECTORS, first = min(rank * most, visible), size = min(most, visible - first);
    const Scores own{p.scores + static_cast<int64_t>(row) * p.stride + first, size <= p.held ? keys : nullptr, first, size};
    if (own.kept != nullptr) {
#pragma unroll 4
        for (int i = thread; i < size; i += SELECT_THREADS) keys[i] = in_order_of(own.global[i]);
    }
    __syncthreads();
    uint64_t prefix = 0;
    uint32_t wanted = p.top_k, before = 0;
    int shift = BITS;
    for (int parity = 0;; parity ^= 1) {
        shift -= 8;
        const Found found = turn(own, prefix, shift, wanted, parity, memory);
        prefix = prefix << 8 | found.bits;
        wanted -= found.higher, before += found.higher_before;
        if (found.same == wanted || shift == 0) {
            before += found.same_before;
            break;
        }
    }
    Cluster::arrive_shared();  // nobody leaves while others read what it has counted
    keep(p, own, prefix << shift, before, table, slots, memory);
    if (rank == 0 && thread == 0) p.counts[row] = p.top_k;
    Cluster::wait();
}

}  // namespace forebay
