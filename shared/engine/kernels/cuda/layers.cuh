// All layers of a decode step in one kernel: a block on each multiprocessor from the first product to the last.
//
// A step of few tokens is bound by reading weights, and weights depend on nothing. So a warp of each block does nothing but
// copy its block's share of them into a ring in shared memory, product after product and layer after layer, as far ahead as
// the ring is long; the others multiply what has come. Between products all blocks wait for one another, and meanwhile
// memory goes on: that is what separate kernels cannot have.
//
// A layer is five parts: queries, keys and values; attention; its output, added to the residual stream; gate and up; down,
// added. Each block has the same tiles of 16 rows in every layer. What a block adds to the residual stream it keeps.
// Weights lie as `w4a16.pack` lays them out, for a tile's columns are one span of bytes there.
#pragma once
#include "products.cuh"

namespace forebay {

constexpr int ALL_THREADS = THREADS + 32;                // with the one that copies
constexpr int HEAD = 128;                               // values of a head
constexpr int CHUNK_STEPS = 16, STEP_BYTES = 1024, STEP_SCALES = 128;  // of one tile, by 128 columns
constexpr int CHUNK_CODES = CHUNK_STEPS * STEP_BYTES, CHUNK_BYTES = CHUNK_STEPS * (STEP_BYTES + STEP_SCALES);
constexpr int HELD_CHUNKS = 2;      // of a tile at most, where a warp keeps all activations that it needs
constexpr int HELD_TILES = 2;       // of a block at most, where it keeps all sums instead
constexpr int MAX_ROWS = 4, MAX_SPLITS = 16, MAX_QUERIES = 16;
constexpr int UNDER_WAY = 3;        // chunks at most: more would only make others wait for memory
constexpr int GROUP_VALUES = 2 * Packed::COLUMNS, PADDING = 8;  // of a warp's activations, for each chunk; behind all
constexpr int MERGED = 4, MERGED_STRIDE = HEAD + 4;  // queries whose values a block adds up at once

struct Matrix {
    const void* codes;
    const uint32_t* scales;
    const float* factors;
    const __nv_bfloat16* bias;  // or none
};

struct Layer {
    Matrix qkv, output, gate_up, down;
    const __nv_bfloat16 *input_norm, *post_norm, *q_norm, *k_norm;  // the last two: or none
};

// A step. All strides count elements.
struct Step {
    const Layer* layers;
    __nv_bfloat16* x;  // the residual stream [T, hidden]
    __nv_bfloat16 *qkv, *attended, *inner;
    float *parts, *maxima, *sums;  // [T, H, splits, HEAD], [T, H, splits] twice
    __nv_bfloat16* kv;
    const float *cos, *sin;  // [T, HEAD / 2]
    const int *slots, *page_ids, *page_starts, *context_lens;
    uint32_t* counters;  // zeros: of all blocks; then of those that share a sequence and a head. Zeros afterwards
    int64_t page_stride, layer_stride, kind_stride, head_stride;
    int num_layers, num_sequences, width, hidden, inner_size, num_q, num_kv, page_size, splits, depth;
    float eps;
};

// Which tiles a block has of a matrix, and how they come through the ring.
struct Share {
    int first, count, steps, groups;
    __device__ Share(int num_rows, int num_columns) {
        const int tiles = num_rows / ROWS, each = (tiles + gridDim.x - 1) / gridDim.x;
        first = min(static_cast<int>(blockIdx.x) * each, tiles), count = min(each, tiles - first);
        steps = num_columns / Packed::COLUMNS, groups = (steps + CHUNK_STEPS - 1) / CHUNK_STEPS;
    }
};

// What a block has in shared memory. What is the same in all layers is there from the beginning.
struct Shared {
    char* ring;
    uint64_t *full, *empty;
    Layer* layers;
    float *cos, *sin;                // [T, HEAD / 2]
    float *squares, *maxima, *sums;  // [WARPS][4], [WARPS][16] twice
    __nv_bfloat16* x;                // [WARPS][T][x_stride]: of each chunk two steps
    float* parts;
    int x_stride;
    __device__ Shared(const Step& p) {
        const int num_tokens = p.num_sequences * p.width, most = max(max(p.hidden, p.inner_size), p.num_q * HEAD);
        x_stride = (most + CHUNK_STEPS * Packed::COLUMNS - 1) / (CHUNK_STEPS * Packed::COLUMNS) * GROUP_VALUES + PADDING;
        ring = reinterpret_cast<char*>(dynamic_shared());
        x = reinterpret_cast<__nv_bfloat16*>(ring + p.depth * CHUNK_BYTES);
        full = reinterpret_cast<uint64_t*>(x + WARPS * num_tokens * x_stride), empty = full + p.depth;
        layers = reinterpret_cast<Layer*>(empty + p.depth);
        cos = reinterpret_cast<float*>(layers + p.num_layers), sin = cos + num_tokens * (HEAD / 2);
        squares = sin + num_tokens * (HEAD / 2), maxima = squares + WARPS * MAX_ROWS;
        sums = maxima + WARPS * MAX_QUERIES, parts = sums + WARPS * MAX_QUERIES;
    }
};

// A place in the ring, and how often it has come by.
struct Cursor {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int depth) {
        if (++slot == depth) slot = 0, parity ^= 1;
    }
};

// Copies a block's share of a matrix, tile by tile or, `across`, its tiles side by side. `behind` is UNDER_WAY chunks behind.
__device__ inline void bring(const Matrix& matrix, const Share& share, bool across, const Shared& shared, int depth, Cursor& at,
                             Cursor& behind, int& num_brought) {
    for (int i = 0; i < share.count * share.groups; i++) {
        const int tile = share.first + (across ? i % share.count : i / share.groups), group = across ? i / share.count : i % share.groups;
        const int steps = min(CHUNK_STEPS, share.steps - group * CHUNK_STEPS);
        const int64_t step = static_cast<int64_t>(tile) * share.steps + group * CHUNK_STEPS;
        char* to = shared.ring + at.slot * CHUNK_BYTES;
        signal_wait(&shared.empty[at.slot], at.parity ^ 1);
        if (num_brought++ >= UNDER_WAY) {
            signal_wait(&shared.full[behind.slot], behind.parity);
            behind.advance(depth);
        }
        signal_expect(&shared.full[at.slot], steps * (STEP_BYTES + STEP_SCALES));
        copy_ahead(to, static_cast<const char*>(matrix.codes) + step * STEP_BYTES, steps * STEP_BYTES, &shared.full[at.slot]);
        copy_ahead(to + CHUNK_CODES, reinterpret_cast<const char*>(matrix.scales) + step * STEP_SCALES, steps * STEP_SCALES,
                   &shared.full[at.slot]);
        at.advance(depth);
    }
}

// The weights of a warp's two steps of a chunk; what is behind a matrix's end is not looked at.
struct Taken {
    Packed steps[2];
    __device__ __forceinline__ Taken(const Shared& shared, int depth, Cursor& at, int warp, int lane) {
        const char* from = shared.ring + at.slot * CHUNK_BYTES;
        signal_wait(&shared.full[at.slot], at.parity);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int step = u * WARPS + warp;
            const uint4* codes = reinterpret_cast<const uint4*>(from + step * STEP_BYTES) + lane;
            steps[u].codes[0] = codes[0], steps[u].codes[1] = codes[32];
            steps[u].scales = reinterpret_cast<const uint32_t*>(from + CHUNK_CODES + step * STEP_SCALES)[lane];
        }
        __syncwarp();
        if (lane == 0) signal_arrive(&shared.empty[at.slot]);
        at.advance(depth);
    }
};

__device__ __forceinline__ void accumulate(float (&sums)[2][4], const Packed& weights, const uint4 (&x)[4]) {
#pragma unroll
    for (int piece = 0; piece < 4; piece++) {
        uint32_t a[2][4];
        weights.operands(piece / 2, piece % 2, a);
        multiply(sums[0], a[0], x[piece].x, x[piece].y), multiply(sums[1], a[1], x[piece].z, x[piece].w);
    }
}

// A word of two bf16 times a word of norms, each rounded; adds up the squares of what it was.
__device__ __forceinline__ uint32_t weighed(uint32_t word, uint32_t norm, float& squares) {
    const float low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xFFFF0000u);
    squares += low * low + high * high;
    return times(word, norm);
}

enum Part { QKV, OUTPUT, GATE_UP, DOWN };

// A block's part of attention: a sequence, a head of keys and some of the tokens in its pages.
struct Split {
    bool is_there;
    int sequence, head, index, first, last;
    const int* table;
    __device__ Split(const Step& p) : table(nullptr) {
        index = blockIdx.x % p.splits, head = blockIdx.x / p.splits % p.num_kv, sequence = blockIdx.x / p.splits / p.num_kv;
        is_there = sequence < p.num_sequences, first = last = 0;
        if (!is_there) return;
        const int old = p.context_lens[sequence] - p.width, each = ((old + p.splits - 1) / p.splits + 15) / 16 * 16;
        first = min(index * each, old), last = min(first + each, old);
        table = p.page_ids + p.page_starts[sequence];
    }
};

// One consumer's view of a step: the warps that multiply.
struct Worker {
    const Step& p;
    Shared shared;
    int thread, warp, lane, g, q, num_tokens;
    Cursor at;
    uint32_t met = 0;  // what the blocks' counter is once all are here
    float kept = 0;    // of the residual stream, what this thread adds to

    Split split;
    int first_pages[2] = {0, 0}, new_slot = -1;  // of a lane's first tokens, and where its new one goes

    __device__ Worker(const Step& p, const Shared& shared)
        : p(p), shared(shared), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4),
          num_tokens(p.num_sequences * p.width), split(p) {
        if (!split.is_there) return;
        for (int half = 0; half < 2; half++) {
            const int token = split.first + warp * 16 + half * 8 + g;
            if (token < split.last) first_pages[half] = split.table[token / p.page_size];
        }
        if (g < p.width) new_slot = p.slots[split.sequence * p.width + g];
    }

    __device__ __forceinline__ void wait() const {
        if (thread == 0) wait_until(p.counters, met);
        meet<THREADS>();
    }
    __device__ __forceinline__ void done() {
        meet<THREADS>();
        if (thread == 0) count(p.counters);
        met += gridDim.x;
    }

    // Which of a share's rows and tokens a thread finishes: `row`, and tokens from `token` on. Nothing is done yet with what is
    // loaded, so that nobody waits for it.
    struct Ending {
        int rows, row, token, stride;
        float factor[2];
        __nv_bfloat16 bias[2];
        __device__ Ending(const Matrix& matrix, const Share& share, int num_rows, bool is_gated, int thread) {
            rows = share.count * (is_gated ? ROWS / 2 : ROWS);
            factor[0] = factor[1] = 0, bias[0] = bias[1] = __float2bfloat16(0), row = stride = 0, token = MAX_ROWS;
            if (rows == 0 || thread >= THREADS / rows * rows) return;
            row = thread % rows, token = thread / rows, stride = THREADS / rows;
            const int of_all = share.first * (is_gated ? ROWS / 2 : ROWS) + row;
            factor[0] = matrix.factors[of_all];
            if (is_gated) factor[1] = matrix.factors[of_all + num_rows / 2];
            if (matrix.bias == nullptr) return;
            bias[0] = matrix.bias[of_all];
            if (is_gated) bias[1] = matrix.bias[of_all + num_rows / 2];
        }
    };

    __device__ __forceinline__ void store(const float (&sums)[2][4], int tile, int rows) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = q * 2 + i % 2;
            if (n < num_tokens) shared.parts[(warp * num_tokens + n) * rows + tile * ROWS + g + i / 2 * 8] = sums[0][i] + sums[1][i];
        }
    }

    // Adds up what all warps have found, and writes it.
    __device__ void finish(Part part, const Ending& end, const Share& share, int num_rows, int num_columns) {
        const bool is_gated = part == GATE_UP, is_normed = part == QKV || part == GATE_UP;
        const int rows = share.count * ROWS;
        meet<THREADS>();
        for (int n = end.token; n < num_tokens; n += end.stride) {
            float scale = 1, value[2] = {0, 0};
            if (is_normed) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += shared.squares[w * MAX_ROWS + n];
                scale = rsqrtf(total / num_columns + p.eps);
            }
            const int local = is_gated ? end.row / 8 * ROWS + end.row % 8 : end.row;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                if (side && !is_gated) break;
#pragma unroll
                for (int w = 0; w < WARPS; w++) value[side] += shared.parts[(w * num_tokens + n) * rows + local + side * 8];
                value[side] = value[side] * scale * (end.factor[side] * Packed::FACTOR) + __bfloat162float(end.bias[side]);
            }
            if (part == QKV) {
                p.qkv[static_cast<int64_t>(n) * num_rows + share.first * ROWS + end.row] = __float2bfloat16(value[0]);
            } else if (part == GATE_UP) {
                p.inner[static_cast<int64_t>(n) * p.inner_size + share.first * 8 + end.row] = __float2bfloat16(gated(value[0], value[1]));
            } else {
                const __nv_bfloat16 sum = __float2bfloat16(kept + value[0]);
                kept = __bfloat162float(sum);
                p.x[static_cast<int64_t>(n) * p.hidden + share.first * ROWS + end.row] = sum;
            }
        }
        done();
    }

    __device__ __forceinline__ __nv_bfloat16* staged(int token) const { return shared.x + (warp * num_tokens + token) * shared.x_stride; }
    // Of a lane's eight columns of a chunk.
    __device__ __forceinline__ int step_of(int group) const { return group * CHUNK_STEPS + lane / 16 * WARPS + warp; }
    __device__ __forceinline__ int column_of(int group) const { return step_of(group) * Packed::COLUMNS + lane % 16 * 8; }
    // What the tensor cores take of a token's staged columns. Lanes beyond the tokens bring some, and what comes of it is not used.
    __device__ __forceinline__ void operands(uint4 (&x)[4], int group, int u) const {
        const __nv_bfloat16* from = staged(g < num_tokens ? g : 0) + group * GROUP_VALUES + u * Packed::COLUMNS;
#pragma unroll
        for (int piece = 0; piece < 4; piece++) x[piece] = *reinterpret_cast<const uint4*>(from + Packed::column(0, piece / 2, piece % 2, q));
    }

    // A product whose inputs a warp keeps: tile after tile. `norm`: or none.
    __device__ void held(Part part, const Matrix& matrix, const __nv_bfloat16* input, const __nv_bfloat16* norm, int num_rows, int num_columns) {
        const Share share(num_rows, num_columns);
        const Ending end(matrix, share, num_rows, part == GATE_UP, thread);
        uint4 weights[HELD_CHUNKS], values[MAX_ROWS][HELD_CHUNKS], x[HELD_CHUNKS * 2][4];
#pragma unroll
        for (int group = 0; group < HELD_CHUNKS; group++) {
            weights[group] = make_uint4(0, 0, 0, 0);
            if (norm != nullptr && step_of(group) < share.steps) weights[group] = *reinterpret_cast<const uint4*>(norm + column_of(group));
        }
        wait();
#pragma unroll
        for (int n = 0; n < MAX_ROWS; n++)
#pragma unroll
            for (int group = 0; group < HELD_CHUNKS; group++) {
                values[n][group] = make_uint4(0, 0, 0, 0);
                if (n < num_tokens && step_of(group) < share.steps)
                    values[n][group] = fresh(input + static_cast<int64_t>(n) * num_columns + column_of(group));
            }
#pragma unroll
        for (int n = 0; n < MAX_ROWS; n++) {
            if (n >= num_tokens) break;
            float squares = 0;
#pragma unroll
            for (int group = 0; group < HELD_CHUNKS; group++) {
                uint4 v = values[n][group];
                const uint4 w = weights[group];
                if (norm != nullptr)
                    v = make_uint4(weighed(v.x, w.x, squares), weighed(v.y, w.y, squares), weighed(v.z, w.z, squares), weighed(v.w, w.w, squares));
                if (group < share.groups) *reinterpret_cast<uint4*>(staged(n) + group * GROUP_VALUES + lane * 8) = v;
            }
            if (norm == nullptr) continue;
            for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
            if (lane == 0) shared.squares[warp * MAX_ROWS + n] = squares;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < HELD_CHUNKS * 2; i++)
            if (i / 2 < share.groups) operands(x[i], i / 2, i % 2);
#pragma unroll 1
        for (int tile = 0; tile < share.count; tile++) {
            float sums[2][4] = {};
#pragma unroll
            for (int j = 0; j < HELD_CHUNKS; j++) {
                if (j >= share.groups) break;
                const Taken taken(shared, p.depth, at, warp, lane);
#pragma unroll
                for (int u = 0; u < 2; u++)
                    if ((j * 2 + u) * WARPS + warp < share.steps) accumulate(sums, taken.steps[u], x[j * 2 + u]);
            }
            store(sums, tile, share.count * ROWS);
        }
        finish(part, end, share, num_rows, num_columns);
    }

    // A product whose sums a warp keeps: all tiles of some columns, then the next columns.
    __device__ void flowing(Part part, const Matrix& matrix, const __nv_bfloat16* input, int num_rows, int num_columns) {
        constexpr int AT_ONCE = 8;
        const Share share(num_rows, num_columns);
        const Ending end(matrix, share, num_rows, false, thread);
        float sums[HELD_TILES][2][4] = {};
        wait();
#pragma unroll 1
        for (int n = 0; n < num_tokens; n++)
#pragma unroll 1
            for (int base = 0; base < share.groups; base += AT_ONCE) {
                uint4 values[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    values[i] = make_uint4(0, 0, 0, 0);
                    if (step_of(base + i) < share.steps) values[i] = fresh(input + static_cast<int64_t>(n) * num_columns + column_of(base + i));
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (base + i < share.groups) *reinterpret_cast<uint4*>(staged(n) + (base + i) * GROUP_VALUES + lane * 8) = values[i];
            }
        __syncwarp();
#pragma unroll 1
        for (int group = 0; group < share.groups; group++) {
            uint4 x[2][4];
            operands(x[0], group, 0), operands(x[1], group, 1);
#pragma unroll
            for (int tile = 0; tile < HELD_TILES; tile++) {
                if (tile >= share.count) break;
                const Taken taken(shared, p.depth, at, warp, lane);
#pragma unroll
                for (int u = 0; u < 2; u++)
                    if (group * CHUNK_STEPS + u * WARPS + warp < share.steps) accumulate(sums[tile], taken.steps[u], x[u]);
            }
        }
#pragma unroll
        for (int tile = 0; tile < HELD_TILES; tile++)
            if (tile < share.count) store(sums[tile], tile, share.count * ROWS);
        finish(part, end, share, num_rows, num_columns);
    }

    // What the residual stream is before the first layer, for the thread that adds to it.
    __device__ void begin() {
        const Share share(p.hidden, p.num_q * HEAD);
        const int rows = share.count * ROWS;
        kept = 0;
        if (rows && thread / rows < num_tokens)
            kept = __bfloat162float(p.x[static_cast<int64_t>(thread / rows) * p.hidden + share.first * ROWS + thread % rows]);
    }

    __device__ void attend(const Layer& layer, int index);
};

}  // namespace forebay
