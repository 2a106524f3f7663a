// Products of one to eight tokens with packed weights. All warps of a block share out the columns of R tiles of rows.
//
// Weights pass through shared memory, where each lane reads only what it copied itself: no barrier between warps but at
// the end of rows, few registers, and so two blocks for each multiprocessor. The second is the next kernel's: it has
// begun to copy its first weights while this one computes, and so the memory is busy while kernels follow each other.
#pragma once
#include <products.cuh>

namespace forebay {

constexpr int TILE_BYTES = 1024 + 128;  // of codes and scales, for one step

// Where a block has what in its shared memory, in bytes. Activations lie there if they are `staged`.
struct Places {
    int x_row, ring, parts, end;

    __host__ __device__ Places(bool staged, int tokens, int columns, int warps, int depth, int row_tiles) {
        x_row = staged ? (columns + Packed::COLUMNS - 1) / Packed::COLUMNS * Packed::COLUMNS * 2 + 16 : 0;  // 16: for the banks
        ring = x_row * tokens;
        parts = ring + warps * depth * row_tiles * TILE_BYTES;
        end = parts + 2 * warps * tokens * (row_tiles * ROWS + 4) * 4;
    }
};

template <int R, int W, int DEPTH, bool STAGED>
__global__ void __launch_bounds__(W * 32, 2) streamed(const __grid_constant__ Product p) {
    constexpr int AHEAD = 2, PIECES = 4;
    __shared__ float scales[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int tiles = (p.num_rows + ROWS - 1) / ROWS, num_groups = (tiles + R - 1) / R;
    const int all_steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    const int num_steps = all_steps > warp ? (all_steps - warp + W - 1) / W : 0;
    const Places places(STAGED, p.num_tokens, p.num_columns, W, DEPTH, R);
    char* const memory = reinterpret_cast<char*>(dynamic_shared());
    char* const ring = memory + places.ring + warp * (DEPTH * R * TILE_BYTES);
    float* parts = reinterpret_cast<float*>(memory + places.parts);
    let_dependents_start();

    const auto* codes = static_cast<const uint4*>(p.weights) + warp * 64 + lane;
    const auto* tile_scales = p.scales + warp * 32 + lane;
    int coming_group = blockIdx.x, coming_step = 0;
    const auto load = [&](char* slot) {
        if (coming_group < num_groups && num_steps > 0) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const int tile = coming_group * R + r, at = tile * all_steps + coming_step * W;
                if (R > 1 && tile >= tiles) continue;
                copy_async(reinterpret_cast<uint4*>(slot + r * TILE_BYTES) + lane, codes + at * 64);
                copy_async(reinterpret_cast<uint4*>(slot + r * TILE_BYTES) + 32 + lane, codes + at * 64 + 32);
                copy_async(reinterpret_cast<uint32_t*>(slot + r * TILE_BYTES + 1024) + lane, tile_scales + at * 32);
            }
            if (++coming_step == num_steps) coming_step = 0, coming_group += gridDim.x;
        }
        commit_copies();
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load(ring + d * R * TILE_BYTES);
    wait_for_inputs(p.x);
    find_scales(p, p.num_tokens, scales, W);
    if (STAGED) {
        const int units = (places.x_row - 16) / 16;
        for (int n = 0; n < p.num_tokens; n++)
            for (int i = threadIdx.x; i < units; i += W * 32) {
                const auto* from = reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(n) * p.num_columns) + i;
                reinterpret_cast<uint4*>(memory + n * places.x_row)[i] = i * 8 < p.num_columns ? *from : make_uint4(0, 0, 0, 0);
            }
    }
    __syncthreads();

    const int own = min(g, p.num_tokens - 1);  // sums of tokens that there are not are not looked at
    const auto* token = STAGED ? reinterpret_cast<const __nv_bfloat16*>(memory + own * places.x_row)
                               : p.x + static_cast<int64_t>(own) * p.num_columns;
    token += warp * Packed::COLUMNS + q * 16;
    uint4 ahead[AHEAD];
    const auto fetch = [&](uint4& into, int step, int piece) {
        const int column = step * (W * Packed::COLUMNS) + piece / 2 * 64 + piece % 2 * 8;
        const bool inside = STAGED || warp * Packed::COLUMNS + q * 16 + column < p.num_columns;
        into = inside ? *reinterpret_cast<const uint4*>(token + column) : make_uint4(0, 0, 0, 0);
    };
    if (num_steps > 0) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) fetch(ahead[i], 0, i);
    }
    char* slot = ring;
    for (int group = blockIdx.x; group < num_groups; group += gridDim.x) {
        float sums[R][4] = {};
        for (int step = 0; step < num_steps; step++) {
            wait_for_copies<DEPTH - 1>();
            Packed stage[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                const char* tile = slot + r * TILE_BYTES;
                stage[r].codes[0] = reinterpret_cast<const uint4*>(tile)[lane];
                stage[r].codes[1] = reinterpret_cast<const uint4*>(tile)[32 + lane];
                stage[r].scales = reinterpret_cast<const uint32_t*>(tile + 1024)[lane];
            }
            const int next_step = step + 1 < num_steps ? step + 1 : 0;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    uint32_t a[2][4];
                    stage[r].operands(piece / 2, piece % 2, a);
                    const uint4 x = ahead[piece % AHEAD];
                    multiply(sums[r], a[0], x.x, x.y), multiply(sums[r], a[1], x.z, x.w);
                }
                const bool later = piece + AHEAD >= PIECES;
                fetch(ahead[piece % AHEAD], later ? next_step : step, (piece + AHEAD) % PIECES);
            }
            load(slot);
            slot = slot == ring + (DEPTH - 1) * R * TILE_BYTES ? ring : slot + R * TILE_BYTES;
        }
        constexpr int STRIDE = R * ROWS + 4;
        float* mine = parts + warp * p.num_tokens * STRIDE;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = q * 2 + i % 2, row = r * ROWS + g + i / 2 * 8;
                if (n < p.num_tokens) mine[n * STRIDE + row] = sums[r][i];
            }
        __syncthreads();
        finish(p, Part{0, p.num_tokens, nullptr}, group, parts, scales, R * ROWS, W, p.num_tokens, W, Packed::FACTOR, 0, p.num_tokens);
        const int size = W * p.num_tokens * STRIDE;  // the next parts go beside these: see `product`
        parts = reinterpret_cast<char*>(parts) == memory + places.parts ? parts + size : parts - size;
    }
}

}  // namespace forebay
