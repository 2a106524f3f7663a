// Products of few tokens with a large matrix: y[n][row] = sum over k of w[row][k] x[n][k], for n < 8 MT tokens.
//
// Reading the weights once is all that such a product must do, so everything serves that: each warp takes whole tiles of
// 16 rows straight from memory into the registers in which the tensor cores want them (as the first operand, tokens being
// the second one's columns), several steps ahead; those of the first steps before it waits for the kernel that it depends
// on (programmatic dependent launch), since weights depend on nothing. Which columns of a tile share an instruction
// does not matter as long as weights and activations agree, so each lane takes columns that lie side by side.
//
// A block's warps share out rows (`warps_rows`) and columns (the rest); so do the blocks of a cluster columns. Their parts
// are added up in a fixed order. Norms cost no kernel: whoever changes the residual stream also writes it times the next
// norm's weight and, block by block, sums of squares; the next product divides by the root of their mean.
#pragma once
#include <device.cuh>
#include <stdint.h>

namespace forebay {

constexpr int WARPS = 8, THREADS = WARPS * 32, ROWS = 16;
constexpr int MAX_TOKENS = 64;

// SPLIT is PLAIN for packed weights whose tiles have eight rows of gate and eight of up.
enum Epilogue { PLAIN = 0, GATED = 1, RESIDUAL = 2, SPLIT = 3 };

// One product. All strides count elements.
struct Product {
    const void* weights;      // packed codes, or bf16 [N, K]
    const uint32_t* scales;   // packed, or none
    const float* factors;     // of each row, or none
    const __nv_bfloat16* bias;
    const __nv_bfloat16* x;   // [tokens, K]
    const float* squares_in;  // [tokens, num_squares_in], or none
    const __nv_bfloat16* next_norm;  // [N]
    __nv_bfloat16* out;       // [tokens, N]; gated: [tokens, N / 2]
    __nv_bfloat16* residual;  // [tokens, N], added to and written
    float* squares_out;       // [tokens, num_squares_out]
    int num_tokens, num_rows, num_columns, num_squares_in, num_squares_out;
    int epilogue, warps_rows, cluster;
    int arranged;  // 0, or for how many tokens `out` is arranged (`place`)
    float eps;
};

// Where in bytes a token's column is if activations are arranged for wide products (`wide.cu`) of so many tokens: 64 columns of all
// tokens together, in the order in which lanes have weights. Of 16 columns, lane q of four has those from 16 q on, and of these, pairs are
// an instruction's first eight columns and its last eight in turn.
__device__ inline int64_t place(int num_tokens, int token, int column) {
    const int64_t chunk = column / 64;
    return chunk * num_tokens * 128 + swizzled(token, column % 16 / 2) + column % 64 / 16 * 4 + column % 2 * 2;
}

// bf16 [N, K] as it is. A step is 64 columns: of each row a lane takes 8 of the first 32 and 8 of the last.
struct Dense {
    static constexpr int COLUMNS = 64, TILES = 1;
    static constexpr float FACTOR = 1.0f;
    uint4 words[4];  // row g, row g + 8: two each

    struct Source {
        const uint4* first;
        int64_t second;  // row g + 8, from row g
        int per_step, per_tile;

        __device__ Source(const Product& p, int lane) {
            const int g = lane / 4, q = lane % 4, row = p.num_columns / 8;  // in uint4
            const bool gated = p.epilogue == GATED;
            first = static_cast<const uint4*>(p.weights) + static_cast<int64_t>(g) * row + q;
            second = static_cast<int64_t>(gated ? p.num_rows / 2 : 8) * row;
            per_step = COLUMNS / 8, per_tile = (gated ? 8 : ROWS) * row;
        }
    };
    __device__ __forceinline__ void load(const Source& from, int tile, int step) {
        const uint4* at = from.first + (tile * from.per_tile + step * from.per_step);
        words[0] = stream(at), words[1] = stream(at + 4);
        words[2] = stream(at + from.second), words[3] = stream(at + from.second + 4);
    }
    // The operands of two of a tile's four instructions: a[s] is rows g and g + 8, then both again.
    __device__ __forceinline__ void operands(int, int piece, uint32_t (&a)[2][4]) const {
        const uint4 low = words[piece], high = words[2 + piece];
        a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
        a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
    }
    __device__ static int column(int step, int, int piece, int q) { return step * COLUMNS + piece * 32 + q * 8; }
};

// NVFP4 as `w4a16.pack` lays it out. A step is two tiles of 64 columns.
struct Packed {
    static constexpr int COLUMNS = 128, TILES = 2;
    static constexpr float FACTOR = 256.0f;
    uint4 codes[2];
    uint32_t scales;

    struct Source {
        const uint4* codes;
        const uint32_t* scales;
        int per_tile;  // in steps

        __device__ Source(const Product& p, int lane) {
            per_tile = (p.num_columns + COLUMNS - 1) / COLUMNS;
            codes = static_cast<const uint4*>(p.weights) + lane, scales = p.scales + lane;
        }
    };
    __device__ __forceinline__ void load(const Source& from, int tile, int step) {
        const int at = tile * from.per_tile + step;
        codes[0] = stream(from.codes + at * 64), codes[1] = stream(from.codes + at * 64 + 32);
        scales = stream(from.scales + at * 32);
    }
    // A code is 2^-126 of its value, a scale 2^118 of its own: together exact, and 2^-8 of what they mean.
    __device__ __forceinline__ void operands(int tile, int piece, uint32_t (&a)[2][4]) const {
        const uint32_t words[2] = {piece ? codes[tile].z : codes[tile].x, piece ? codes[tile].w : codes[tile].y};
        const uint32_t stored = scales >> (16 * tile);
        const uint32_t low = (stored & 255) * 0x00100010u + 0x75807580u;
        const uint32_t high = ((stored >> 8) & 255) * 0x00100010u + 0x75807580u;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            // Multiplications where they will do: logical operations and shifts run at half the rate.
            const uint32_t w = words[s], rotated = __funnelshift_l(w, w, 6);
            a[s][0] = times(w & 0x81C081C0u, low);
            a[s][1] = times((w * 8) & 0x81C081C0u, high);
            a[s][2] = times(rotated & 0x81C081C0u, low);
            a[s][3] = times(((rotated & 0x001B001Bu) * 0x1084u) & 0x81C081C0u, high);  // bits 3, 1, 0, 4 to 15, 8, 7, 6
        }
    }
    __device__ static int column(int step, int tile, int piece, int q) { return step * COLUMNS + tile * 64 + q * 16 + piece * 8; }
};

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// What divides the tokens of an input that went through a norm.
__device__ inline void find_scales(const Product& p, float* scales) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int n = warp; n < p.num_tokens; n += WARPS) {
        float total = 0;
        if (p.squares_in != nullptr)
            for (int i = lane; i < p.num_squares_in; i += 32) total += p.squares_in[n * p.num_squares_in + i];
        for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
        if (lane == 0) scales[n] = p.squares_in == nullptr ? 1.0f : rsqrtf(total / p.num_columns + p.eps);
    }
}

// Add up the parts of all warps and of all blocks of the cluster; scale and write them. `parts` [warps of a row][TOKENS][rows],
// `group` names the rows. Warps take turns with the tokens.
template <int TOKENS>
__device__ void finish(const Product& p, int group, float* parts, const float* scales, int block_rows,
                       int warps_columns, float factor) {
    const int warp = (threadIdx.x / 32 + group) % WARPS, lane = threadIdx.x % 32, stride = block_rows + 4;
    const int ranks = p.cluster, rank = ranks > 1 ? Cluster::rank() : 0, share = block_rows / ranks, half = p.num_rows / 2;
    const bool gate = p.epilogue == GATED, paired = gate || p.epilogue == SPLIT;
    for (int n = warp; n < p.num_tokens; n += WARPS) {
        const float scale = scales[n] * factor;
        const int64_t out_row = static_cast<int64_t>(n) * (gate ? half : p.num_rows);
        float squares = 0;
        for (int i = lane; i < (paired ? share / 2 : share); i += 32) {
            // Row within the block: a paired tile has eight of gate's rows and then up's.
            const int local = rank * share + (paired ? i / 8 * ROWS + i % 8 : i);
            const int row = paired ? group * block_rows / 2 + local / ROWS * 8 + local % 8 : group * block_rows + local;
            if (row >= (paired ? half : p.num_rows)) continue;
            float value[2] = {0, 0};
#pragma unroll
            for (int side = 0; side < 2; side++) {
                if (side && !paired) break;
                for (int r = 0; r < ranks; r++) {
                    const float* theirs = (ranks > 1 ? Cluster::of(parts, r) : parts) + n * stride + local + side * 8;
#pragma unroll 8
                    for (int w = 0; w < warps_columns; w++) value[side] += theirs[w * TOKENS * stride];
                }
                const int true_row = row + side * half;
                value[side] *= scale;
                if (p.factors != nullptr) value[side] *= p.factors[true_row];
                if (p.bias != nullptr) value[side] += __bfloat162float(p.bias[true_row]);
            }
            const int64_t to = out_row + row;
            if (gate) {
                p.out[to] = __float2bfloat16(gated(value[0], value[1]));
            } else if (p.epilogue == SPLIT) {
                p.out[to] = __float2bfloat16(value[0]), p.out[to + half] = __float2bfloat16(value[1]);
            } else if (p.epilogue == RESIDUAL) {
                const __nv_bfloat16 sum = __float2bfloat16(__bfloat162float(p.residual[to]) + value[0]);
                const float wide = __bfloat162float(sum);
                p.residual[to] = sum;
                p.out[to] = __float2bfloat16(wide * __bfloat162float(p.next_norm[row]));
                squares += wide * wide;
            } else {
                p.out[to] = __float2bfloat16(value[0]);
            }
        }
        if (p.epilogue == RESIDUAL) {
            for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
            if (lane == 0) p.squares_out[n * p.num_squares_out + group * ranks + rank] = squares;
        }
    }
}

// MT: eights of tokens; R: tiles of rows a warp has; DEPTH: steps under way; AHEAD: pieces of activations, of which a
// step has 2 TILES.
template <class Weights, int MT, int R, int DEPTH, int AHEAD, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) product(const __grid_constant__ Product p) {
    constexpr int PIECES = 2 * Weights::TILES;
    __shared__ float scales[MAX_TOKENS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int warps_columns = WARPS / p.warps_rows, along = warp % warps_columns, across = warp / warps_columns;
    const int block_rows = p.warps_rows * R * ROWS, row_stride = block_rows + 4, tiles = (p.num_rows + ROWS - 1) / ROWS;
    const int num_groups = (p.num_rows + block_rows - 1) / block_rows, num_bands = gridDim.x / p.cluster;
    const int stride = p.cluster * warps_columns, begin = blockIdx.x % p.cluster * warps_columns + along;
    const int all_steps = (p.num_columns + Weights::COLUMNS - 1) / Weights::COLUMNS;
    const int num_steps = all_steps > begin ? (all_steps - begin + stride - 1) / stride : 0;
    float* parts = dynamic_shared();
    Weights stage[DEPTH][R];
    const typename Weights::Source source(p, lane);
    int group = blockIdx.x / p.cluster;
    const auto load = [&](Weights (&into)[R], int of_group, int step) {
        const int tile = (of_group * p.warps_rows + across) * R;
#pragma unroll
        for (int r = 0; r < R; r++)
            if (tile + r < tiles) into[r].load(source, tile + r, begin + step * stride);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < num_steps) load(stage[d], group, d);
    if constexpr (Weights::TILES == 1) let_dependents_start();  // of bf16, memory is busy whoever it serves
    wait_for_inputs(p.x);
    find_scales(p, scales);

    const __nv_bfloat16* tokens[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int n = m * 8 + g;
        tokens[m] = n < p.num_tokens ? p.x + static_cast<int64_t>(n) * p.num_columns : nullptr;
    }
    uint4 ahead[AHEAD][MT];
    const auto fetch = [&](uint4 (&into)[MT], int step, int piece) {
        const int column = Weights::column(begin + step * stride, piece / 2, piece % 2, q);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            into[m] = make_uint4(0, 0, 0, 0);
            if (tokens[m] != nullptr && column < p.num_columns) into[m] = *reinterpret_cast<const uint4*>(tokens[m] + column);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(ahead[i], 0, i);
    for (; group < num_groups; group += num_bands) {
        float sums[R][MT][4] = {};
        for (int base = 0; base < num_steps; base += DEPTH) {
            const bool last = base + DEPTH >= num_steps;
            const int next_group = last ? group + num_bands : group, next_base = last ? 0 : base + DEPTH;
            if (Weights::TILES == 2 && next_group >= num_groups) let_dependents_start();  // whose loads could have delayed these
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int step = base + d, next_step = step + 1 < num_steps ? step + 1 : 0;
                if (step < num_steps) {
#pragma unroll
                    for (int piece = 0; piece < PIECES; piece++) {
                        uint32_t a[R][2][4];
#pragma unroll
                        for (int r = 0; r < R; r++) stage[d][r].operands(piece / 2, piece % 2, a[r]);
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            const uint4 x = ahead[piece % AHEAD][m];
#pragma unroll
                            for (int r = 0; r < R; r++) multiply(sums[r][m], a[r][0], x.x, x.y), multiply(sums[r][m], a[r][1], x.z, x.w);
                        }
                        const bool later = piece + AHEAD >= PIECES;
                        fetch(ahead[piece % AHEAD], later ? next_step : step, (piece + AHEAD) % PIECES);
                    }
                }
                if (next_group < num_groups && next_base + d < num_steps) load(stage[d], next_group, next_base + d);
            }
        }
        float* mine = parts + along * MT * 8 * row_stride + across * R * ROWS;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = m * 8 + q * 2 + i % 2, row = r * ROWS + g + i / 2 * 8;
                    if (n < p.num_tokens) mine[n * row_stride + row] = sums[r][m][i];
                }
        if (p.cluster > 1) Cluster::sync_shared();
        else __syncthreads();
        finish<MT * 8>(p, group, parts, scales, block_rows, warps_columns, Weights::FACTOR);
        // The next parts go beside these, and the ones after them here again: whoever is that far has passed the barrier
        // between, and so has everybody who reads from here.
        const int size = warps_columns * MT * 8 * row_stride;
        parts = parts == dynamic_shared() ? parts + size : parts - size;
    }
    if (p.cluster > 1) Cluster::sync_shared();  // nobody leaves while others read from it
}

}  // namespace forebay
