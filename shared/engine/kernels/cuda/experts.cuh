// A mixture of experts of up to 64 tokens in three kernels: who computes what, gate and up, and the way down.
//
// Tokens that chose the same expert are one group. A group's weights, codes of NVFP4, are read once, and tensor cores multiply
// them by eight tokens at the price of one: a warp takes 16 rows, tokens are the second operand's columns, and columns for which
// there is no token repeat the first. A code's bits are put where those of an fp16 are (`experts.Experts` says how they lie) and
// it is multiplied by its scale, exactly. Each thread asks at once for all weights that it will multiply. The shared expert, bfloat16, goes along: its weights are asked for
// before its input is there.
#pragma once
#include "codes.cuh"
#include "groups.cuh"

namespace forebay {

constexpr int VALUES = 8;               // inner values of a tile, whose rows are eight of gate's and eight of up's
constexpr int TILES = INNER / VALUES;   // of an expert
constexpr int PAIRS = 2;                // of a gate's and an up's row of the shared expert, of a block
constexpr int UNIT = 16;                // bytes that a lane takes at once: 32 codes, the second 16 half a row on
constexpr int FOUR = 4;                 // tokens of the shared expert at a time
constexpr float LARGEST_HALF = 65504.0f;

struct Experts {
    const __half* x;  // [tokens, hidden], behind the norm
    const uint8_t *gate_up, *gate_up_scale, *down, *down_scale;  // as `experts.Experts`
    const float* factors;                                        // [experts, 2]
    const __nv_bfloat16 *shared_gate_up, *shared_down;           // [2 INNER, hidden], [hidden, INNER]
    const Groups* groups;
    __half* inner;                // [members, INNER], times SMALLER
    __nv_bfloat16* shared_inner;  // [tokens, INNER]
    __nv_bfloat16* out;           // [tokens, hidden]
    int num_tokens, hidden, tiles_each;  // a block's tiles of an expert
};

// The scale of a lane's unit: byte q of a word, e4m3, to two equal fp16, as `decode` wants them.
__device__ __forceinline__ uint32_t scale_of(uint32_t word, int q) { return scale_for_codes(__byte_perm(word, 0, 0x4040 | q | q << 8) << 7); }

// PAIRS inner values of the shared expert for all tokens. Its rows are asked for before the kernel in front has ended.
template <int S>
__device__ __forceinline__ void shared_values(const Experts& p, int block) {
    constexpr int K = 1024 * S, ROWS = 2 * PAIRS, VECTORS = K / 8, EACH = (VECTORS + THREADS - 1) / THREADS;
    __shared__ float parts[2][WARPS][ROWS * FOUR];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint4 rows[EACH][ROWS];
    int columns[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int vector = threadIdx.x + i * THREADS;
        columns[i] = vector < VECTORS ? vector * 8 : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t row = r / PAIRS * INNER + block * PAIRS + r % PAIRS;
            rows[i][r] = stream(reinterpret_cast<const uint4*>(p.shared_gate_up + row * K + columns[i]));
            if (vector >= VECTORS) rows[i][r] = make_uint4(0, 0, 0, 0);
        }
    }
    wait_for_inputs(p.x);
    let_dependents_start();
    for (int first = 0, turn = 0; first < p.num_tokens; first += FOUR, turn ^= 1) {
        float sums[ROWS][FOUR] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int t = 0; t < FOUR; t++) {
                const auto* x = p.x + static_cast<int64_t>(min(first + t, p.num_tokens - 1)) * K + columns[i];
                const uint4 v = *reinterpret_cast<const uint4*>(x);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 both = from_halves(word_of(v, j));
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        sums[r][t] += of_pair(word_of(rows[i][r], j), 0) * both.x + of_pair(word_of(rows[i][r], j), 1) * both.y;
                }
            }
#pragma unroll
        for (int i = 0; i < ROWS * FOUR; i++) {
            float sum = sums[i / FOUR][i % FOUR];
            for (int j = 16; j; j /= 2) sum += __shfl_xor_sync(~0u, sum, j);
            if (lane == 0) parts[turn][warp][i] = sum;
        }
        __syncthreads();
        const int pair = threadIdx.x / FOUR, t = threadIdx.x % FOUR;
        if (pair >= PAIRS || first + t >= p.num_tokens) continue;
        float gate = 0, up = 0;
        for (int w = 0; w < WARPS; w++) gate += parts[turn][w][pair * FOUR + t], up += parts[turn][w][(PAIRS + pair) * FOUR + t];
        p.shared_inner[(first + t) * INNER + block * PAIRS + pair] = __float2bfloat16(gated(gate, up));
    }
}

// Eight inner values of each member of a group.
template <int S>
__device__ __forceinline__ void tile_values(const Experts& p, int expert, int tile, int start, int end, float (*parts)[WARPS][16][9], int& turn) {
    constexpr int K = 1024 * S, UNITS = K / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int64_t row = static_cast<int64_t>(expert) * 2 * INNER + tile * VALUES + g;
    uint4 rows[S][2];
    uint32_t scales[S];  // lane q has those of row g + 8 (q / 2) in half q % 2, of all four lanes
    const uint8_t* scale = p.gate_up_scale + (row + q / 2 * INNER) * (K / 16) + q % 2 * UNITS + warp * S * 4;
#pragma unroll
    for (int i = 0; i < S; i++) {
        const uint8_t* at = p.gate_up + row * (K / 2) + ((warp * S + i) * 4 + q) * UNIT;
        rows[i][0] = stream(reinterpret_cast<const uint4*>(at));
        rows[i][1] = stream(reinterpret_cast<const uint4*>(at + static_cast<int64_t>(INNER) * (K / 2)));
        scales[i] = stream(reinterpret_cast<const uint32_t*>(scale + i * 4));
    }
    const float factor = p.factors[expert * 2];
    for (int first = start; first < end; first += 8, turn ^= 1) {
        const __half* x = p.x + static_cast<int64_t>(p.groups->tokens[first + g < end ? first + g : first]) * K;
        float low[4] = {}, high[4] = {};
        uint4 ahead[4];
        values_of(ahead, x, warp * S * 4 + q, K / 2);
#pragma unroll
        for (int i = 0; i < S; i++) {
            const uint4 b[4] = {ahead[0], ahead[1], ahead[2], ahead[3]};
            if (i + 1 < S) values_of(ahead, x, (warp * S + i + 1) * 4 + q, K / 2);
            in_order();
            uint32_t of_unit[4];
            anew(scales[i]);
#pragma unroll
            for (int c = 0; c < 4; c++) of_unit[c] = scale_of(__shfl_sync(~0u, scales[i], lane / 4 * 4 + c), q);
            anew(rows[i][0]), anew(rows[i][1]);
            multiply_units(low, high, rows[i][0], rows[i][1], of_unit, b);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) parts[turn][warp][i / 2 * 8 + g][q * 2 + i % 2] = low[i] + high[i];
        __syncthreads();
        const int value = threadIdx.x % VALUES, member = first + threadIdx.x / VALUES;
        if (threadIdx.x >= 8 * VALUES || member >= end) continue;
        float gate = 0, up = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) gate += parts[turn][w][value][threadIdx.x / VALUES], up += parts[turn][w][8 + value][threadIdx.x / VALUES];
        const float inner = gated(gate * factor, up * factor) * SMALLER;
        p.inner[member * INNER + tile * VALUES + value] = __float2half(fminf(fmaxf(inner, -LARGEST_HALF), LARGEST_HALF));
    }
}

// Blocks of the shared expert first, then `tiles_each` tiles each of the first group, of the second, and so on.
template <int S>
__global__ void __launch_bounds__(THREADS, 2) gate_up(const __grid_constant__ Experts p) {
    __shared__ float parts[2][WARPS][16][9];
    const int block = static_cast<int>(blockIdx.x) - INNER / PAIRS;
    if (block < 0) return shared_values<S>(p, blockIdx.x);
    wait_for_inputs(p.x);
    let_dependents_start();  // not before: what comes next finds the groups complete
    const int each = TILES / p.tiles_each, d = block / each;
    const int count = p.groups->count, expert = p.groups->experts[d], start = p.groups->starts[d], end = p.groups->starts[d + 1];
    if (d >= count) return;
    int turn = 0;
    for (int i = 0; i < p.tiles_each; i++) tile_values<S>(p, expert, block % each * p.tiles_each + i, start, end, parts, turn);
}

// A warp's columns of 16 rows of the shared expert's way down, for all tokens: into its sums [16][stride].
__device__ __forceinline__ void shared_down(const Experts& p, const uint4& row, const uint4& row_8, float* sums, int stride) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int first = 0; first < p.num_tokens; first += 8) {
        const auto* from = p.shared_inner + min(first + g, p.num_tokens - 1) * INNER + warp * 32 + q * 8;
        const uint4 b = *reinterpret_cast<const uint4*>(from);
        float sum[4] = {};
        const uint32_t a[4] = {row.x, row_8.x, row.y, row_8.y}, c[4] = {row.z, row_8.z, row.w, row_8.w};
        multiply(sum, a, b.x, b.y);
        multiply(sum, c, b.z, b.w);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (const int t = first + q * 2 + i % 2; t < p.num_tokens) sums[(i / 2 * 8 + g) * stride + t] = sum[i];
    }
}

// What a warp multiplies of a group on its way down: 16 rows.
struct DownRows {
    uint4 rows[2][2];     // of units, and of rows g and g + 8
    uint32_t scales[2];   // lane q has word q of row g, and of g + 8

    __device__ __forceinline__ void load(const Experts& p, int expert, int tile) {
        const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        const int64_t row = static_cast<int64_t>(expert) * p.hidden + tile * 16 + g;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const uint8_t* codes = p.down + (row + side * 8) * (INNER / 2) + q * UNIT;
            rows[0][side] = stream(reinterpret_cast<const uint4*>(codes));
            rows[1][side] = stream(reinterpret_cast<const uint4*>(codes + 4 * UNIT));
            scales[side] = stream(reinterpret_cast<const uint32_t*>(p.down_scale + (row + side * 8) * (INNER / 16) + q * 4));
        }
    }
};

// A group in a word: its expert, its first member, how many there are.
__device__ __forceinline__ uint32_t pack(int expert, int start, int end) { return expert | start << 8 | (end - start) << 18; }
__device__ __forceinline__ int expert_of(uint32_t group) { return group & 255; }

// Add to a warp's sums [16][stride] what the members of a group give.
__device__ __forceinline__ void add_group(const Experts& p, DownRows& own, uint32_t group, float* sums, int stride) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, start = group >> 8 & 1023, end = start + (group >> 18);
    const float factor = fresh(p.factors + expert_of(group) * 2 + 1) / SMALLER;
#pragma unroll 1
    for (int first = start; first < end; first += 8) {
        const __half* inner = p.inner + (first + g < end ? first + g : first) * INNER;
        float sum[4] = {};
        int tokens[2];
        float weights[2];
#pragma unroll
        for (int u = 0; u < 2; u++) {
            uint4 b[4];
            values_of(b, inner, u * 4 + q, INNER / 2);
            uint32_t scales[4];
            anew(own.scales[0]), anew(own.scales[1]);
#pragma unroll
            for (int c = 0; c < 4; c++) scales[c] = scale_of(__shfl_sync(~0u, own.scales[c / 2], lane / 4 * 4 + c % 2 * 2 + u), q);
            anew(own.rows[u][0]), anew(own.rows[u][1]);
            multiply_units(sum, sum, own.rows[u][0], own.rows[u][1], scales, b);
            in_order();
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int member = min(first + q * 2 + j, end - 1);
                if (u == 0) tokens[j] = p.groups->tokens[member], weights[j] = p.groups->weights[member];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + q * 2 + i % 2 < end) sums[(i / 2 * 8 + g) * stride + tokens[i % 2]] += sum[i] * weights[i % 2] * factor;
        __syncwarp();
    }
}

// 16 rows of the result for all tokens, groups being shared out to warps.
__global__ void __launch_bounds__(THREADS, 3) down(const __grid_constant__ Experts p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x, stride = p.num_tokens | 1;
    float* const sums = dynamic_shared() + warp * 16 * stride;
    const auto* shared = reinterpret_cast<const uint4*>(p.shared_down + (tile * 16 + lane / 4) * INNER + warp * 32 + lane % 4 * 8);
    const uint4 row = stream(shared), row_8 = stream(shared + INNER);
    // Groups are older than the kernel in front.
    const int num = (fresh(&p.groups->count) - warp + WARPS - 1) / WARPS, mine = min(warp + WARPS * lane, MAX_EXPERTS - 1);
    const uint32_t all = pack(fresh(p.groups->experts + mine), fresh(p.groups->starts + mine), fresh(p.groups->starts + mine + 1));
    const auto own = [&](int i) { return __shfl_sync(~0u, all, i); };
    DownRows now, next;
    if (num > 0) now.load(p, expert_of(own(0)), tile);
    if (num > 1) next.load(p, expert_of(own(1)), tile);
    let_dependents_start();
    wait_for_inputs(p.inner);
    shared_down(p, row, row_8, sums, stride);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < num; i += 2) {
        add_group(p, now, own(i), sums, stride);
        if (i + 2 < num) now.load(p, expert_of(own(i + 2)), tile);
        if (i + 1 == num) break;
        add_group(p, next, own(i + 1), sums, stride);
        if (i + 3 < num) next.load(p, expert_of(own(i + 3)), tile);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * p.num_tokens; i += THREADS) {
        const int row = i % 16, t = i / 16;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += dynamic_shared()[(w * 16 + row) * stride + t];
        p.out[static_cast<int64_t>(t) * p.hidden + tile * 16 + row] = __float2bfloat16(sum);
    }
}

}  // namespace forebay
