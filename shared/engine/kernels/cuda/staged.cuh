// Products of sixteen to sixty-four tokens with packed weights.
//
// So many activations are worth more than a warp's rows: a block's eight warps share 128 columns of them at a time in
// shared memory. Four pairs of warps have 32 rows each, one of a pair the first 64 columns, the other the last.
// Units of work, 128 rows by 128 columns, are dealt out in order and in equal numbers ("Stream-K", Osama et al. 2023), so
// most blocks begin and end amid some rows. Their sums go to memory; the last block to come adds them up, in the order of
// columns whoever it is, so that a result does not depend on who was last.
#pragma once
#include <products.cuh>

namespace forebay {

constexpr int UNIT_ROWS = 128, ROW_PAIRS = 4, TILES_EACH = 2;
constexpr int X_ROW = Packed::COLUMNS * 2 + 16;               // bytes of a token, 16 of them for the banks
constexpr int HALF_TILE = 512 + 128, WARP_STAGE = TILES_EACH * HALF_TILE;  // bytes of codes and scales
constexpr int PART_ROW = UNIT_ROWS + 4, PART_TOKENS = 32;

constexpr int staged_bytes(int eights, int depth) {
    return depth * (WARPS * WARP_STAGE + eights * 8 * X_ROW) + (eights < 4 ? eights * 8 : PART_TOKENS) * PART_ROW * 4;
}

// Who works for which of the units.
struct Share {
    int64_t units, blocks;
    __device__ int first(int64_t block) const { return static_cast<int>(block * units / blocks); }
    __device__ int owner(int64_t unit) const { return static_cast<int>(((unit + 1) * blocks - 1) / units); }
};

// A unit's place, and where it lies in a ring.
struct Cursor {
    int block, step, slot;

    __device__ void next(int steps, int depth) {
        if (++step == steps) step = 0, block++;
        slot = slot + 1 == depth ? 0 : slot + 1;
    }
};

// partials [blocks, 2, tokens, 128]: of the rows that a block begins with, and of those it ends with.
template <int MT, int DEPTH>
__global__ void __launch_bounds__(THREADS, 2) staged(const __grid_constant__ Product p, float* partials, int* arrivals) {
    constexpr int PASS = MT < 4 ? MT : 4;  // eights of tokens that are finished together
    __shared__ float scales[MT * 8];
    __shared__ int arrived;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int pair = warp / 2, side = warp % 2, count = p.num_tokens;
    const int tiles = (p.num_rows + ROWS - 1) / ROWS, steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    const Share share{static_cast<int64_t>((p.num_rows + UNIT_ROWS - 1) / UNIT_ROWS) * steps, gridDim.x};
    const int begin = share.first(blockIdx.x), end = share.first(blockIdx.x + 1);
    char* const memory = reinterpret_cast<char*>(dynamic_shared());
    char* const weights = memory + warp * (DEPTH * WARP_STAGE);
    char* const activations = memory + WARPS * DEPTH * WARP_STAGE;
    float* const parts = reinterpret_cast<float*>(activations + DEPTH * MT * 8 * X_ROW);
    let_dependents_start();

    const auto* codes = static_cast<const uint4*>(p.weights) + side * 32 + lane;
    const auto load_weights = [&](const Cursor& of) {
        const int tile = of.block * (UNIT_ROWS / ROWS) + pair * TILES_EACH;
        char* to = weights + of.slot * WARP_STAGE;
#pragma unroll
        for (int r = 0; r < TILES_EACH; r++) {
            const int64_t place = static_cast<int64_t>(tile + r) * steps + of.step;
            if (tile + r >= tiles) continue;
            copy_async(reinterpret_cast<uint4*>(to + r * HALF_TILE) + lane, codes + place * 64);
            copy_async(reinterpret_cast<uint32_t*>(to + r * HALF_TILE + 512) + lane, p.scales + place * 32 + lane);
        }
    };
    const auto load_activations = [&](const Cursor& of) {
        const int first = of.step * Packed::COLUMNS;
        char* to = activations + of.slot * (MT * 8 * X_ROW);
        for (int i = threadIdx.x; i < count * 16; i += THREADS) {
            const int n = i / 16, column = first + i % 16 * 8;
            auto* place = reinterpret_cast<uint4*>(to + n * X_ROW) + i % 16;
            if (column < p.num_columns)
                copy_async(place, reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(n) * p.num_columns + column));
            else
                *place = make_uint4(0, 0, 0, 0);
        }
    };
    Cursor at{begin / steps, begin % steps, 0}, coming = at;
    for (int d = 0; d < DEPTH - 1; d++, coming.next(steps, DEPTH))
        if (begin + d < end) load_weights(coming);
    wait_for_inputs(p.x);
    coming = at;
    for (int d = 0; d < DEPTH - 1; d++, coming.next(steps, DEPTH)) {
        if (begin + d < end) load_activations(coming);
        commit_copies();
    }
    find_scales(p, count, scales, WARPS);

    float sums[TILES_EACH][MT][4] = {};
    for (int unit = begin; unit < end; unit++, at.next(steps, DEPTH)) {
        wait_for_copies<DEPTH - 2>();
        __syncthreads();  // of everybody; and all are done with what the next copies overwrite
        if (unit + DEPTH - 1 < end) load_weights(coming), load_activations(coming);
        commit_copies();
        coming.next(steps, DEPTH);
        const char* slot = weights + at.slot * WARP_STAGE;
        const char* x = activations + at.slot * (MT * 8 * X_ROW) + g * X_ROW + side * 128 + q * 32;
        Packed stage[TILES_EACH];
#pragma unroll
        for (int r = 0; r < TILES_EACH; r++) {
            stage[r].codes[0] = reinterpret_cast<const uint4*>(slot + r * HALF_TILE)[lane];
            stage[r].scales = reinterpret_cast<const uint32_t*>(slot + r * HALF_TILE + 512)[lane] >> (16 * side);
        }
#pragma unroll
        for (int piece = 0; piece < 2; piece++) {
            uint32_t a[TILES_EACH][2][4];
#pragma unroll
            for (int r = 0; r < TILES_EACH; r++) stage[r].operands(0, piece, a[r]);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 b = *reinterpret_cast<const uint4*>(x + m * 8 * X_ROW + piece * 16);
#pragma unroll
                for (int r = 0; r < TILES_EACH; r++) multiply(sums[r][m], a[r][0], b.x, b.y), multiply(sums[r][m], a[r][1], b.z, b.w);
            }
        }
        const int block = at.block;
        if (unit + 1 < end && at.step + 1 < steps) continue;
        // The last unit of these rows that is this block's.
        const int64_t first_unit = static_cast<int64_t>(block) * steps;
        const int from = share.owner(first_unit), to = share.owner(first_unit + steps - 1);
        const auto partial_of = [&](int whose) {
            const int second = whose == from && share.first(whose) < first_unit;
            return partials + (static_cast<int64_t>(whose) * 2 + second) * count * UNIT_ROWS;
        };
        const Part part{0, count, nullptr};
#pragma unroll
        for (int pass = 0; pass < MT / PASS; pass++) {
            const int first = pass * PASS * 8, last = min(count, first + PASS * 8);
            for (int turn = 1; turn >= 0; turn--) {
                __syncthreads();
                if (side != turn) continue;
#pragma unroll
                for (int r = 0; r < TILES_EACH; r++)
#pragma unroll
                    for (int m = 0; m < PASS; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float* at = parts + (m * 8 + q * 2 + i % 2) * PART_ROW + (pair * TILES_EACH + r) * ROWS + g + i / 2 * 8;
                            const float sum = sums[r][pass * PASS + m][i];
                            *at = turn ? sum : *at + sum;
                        }
            }
            __syncthreads();
            if (from == to) {
                finish(p, part, block, parts - first * PART_ROW, scales, UNIT_ROWS, 1, 0, WARPS, Packed::FACTOR, first, last);
            } else {
                float* own = partial_of(blockIdx.x);
                for (int i = threadIdx.x; i < (last - first) * UNIT_ROWS; i += THREADS)
                    own[first * UNIT_ROWS + i] = parts[i / UNIT_ROWS * PART_ROW + i % UNIT_ROWS];
            }
        }
#pragma unroll
        for (int r = 0; r < TILES_EACH; r++)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[r][m][i] = 0;
        if (from == to) continue;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) arrived = atomicAdd(arrivals + block, 1);
        __syncthreads();
        if (arrived < to - from) continue;
        __threadfence();
        if (threadIdx.x == 0) arrivals[block] = 0;
        for (int first = 0; first < count; first += PASS * 8) {
            const int last = min(count, first + PASS * 8);
            __syncthreads();
            for (int whose = from; whose <= to; whose++) {
                const float* theirs = partial_of(whose) + first * UNIT_ROWS;
#pragma unroll 4
                for (int i = threadIdx.x; i < (last - first) * UNIT_ROWS; i += THREADS) {
                    float* sum = parts + i / UNIT_ROWS * PART_ROW + i % UNIT_ROWS;
                    *sum = (whose == from ? 0 : *sum) + __ldcg(theirs + i);
                }
            }
            __syncthreads();
            finish(p, part, block, parts - first * PART_ROW, scales, UNIT_ROWS, 1, 0, WARPS, Packed::FACTOR, first, last);
        }
    }
}

}  // namespace forebay
