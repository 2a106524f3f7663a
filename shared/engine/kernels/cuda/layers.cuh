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
constexpr int MAX_SHARED_BYTES = 232448, MAX_DEPTH = 12, MAX_ROWS = 4, MAX_SPLITS = 16, MAX_QUERIES = 16;
constexpr int UNDER_WAY = 2;        // chunks at most: more would only make others wait for memory
constexpr int GROUP_VALUES = 2 * Packed::COLUMNS, PADDING = 8;  // of a warp's activations, for each chunk; behind all
constexpr int FEW = 2, AT_ONCE = 8;  // chunks, of which a warp stages all tokens at once, or one token
constexpr int NOBODYS = MAX_ROWS << 8;
constexpr int TOKENS = 8;           // that a warp attends to at once
constexpr int MERGED = 4, MERGED_STRIDE = HEAD + 4, MERGED_BYTES = WARPS * MERGED * MERGED_STRIDE * 4;  // queries whose values a block adds up at once

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
    int x_stride, x_at, parts_at, angles_at, layers_at;  // of shared memory, in bytes but for the first; see Shared
    float eps;
};

enum Part { QKV, OUTPUT, GATE_UP, DOWN };
constexpr int NUM_PARTS = 4;

// Which tiles a block has of a matrix, and how they come through the ring.
struct Share {
    int num_rows, num_columns, first, count, steps, groups;
    __device__ void find(int rows, int columns) {
        num_rows = rows, num_columns = columns;
        const int tiles = num_rows / ROWS, each = (tiles + gridDim.x - 1) / gridDim.x;
        first = min(static_cast<int>(blockIdx.x) * each, tiles), count = min(each, tiles - first);
        steps = num_columns / Packed::COLUMNS, groups = (steps + CHUNK_STEPS - 1) / CHUNK_STEPS;
    }
};

// A block's part of attention: a sequence, a head of keys and some of its tokens, of which the first `old` are in pages.
struct Split {
    bool is_there;
    int sequence, head, index, old, first, last;
    const int* table;
    __device__ void find(const Step& p) {
        index = blockIdx.x % p.splits, head = blockIdx.x / p.splits % p.num_kv, sequence = blockIdx.x / p.splits / p.num_kv;
        is_there = sequence < p.num_sequences, old = first = last = 0;
        if (!is_there) return;
        const int length = p.context_lens[sequence], each = ((length + p.splits - 1) / p.splits + TOKENS - 1) / TOKENS * TOKENS;
        old = length - p.width, first = min(index * each, length), last = min(first + each, length);
        table = p.page_ids + p.page_starts[sequence];
    }
};

// A place in the ring, and how often it has come by.
struct Cursor {
    int slot;
    uint32_t parity;
    __device__ __forceinline__ void advance(int depth) {
        if (++slot == depth) slot = 0, parity ^= 1;
    }
};

// What a block has in shared memory: this at its beginning, then the ring, and behind it what depends on the step: a warp's
// activations [WARPS][T][x_stride], of each chunk two steps, or of attention what a block adds up; a product's sums; cosines and sines [T, HEAD / 2]; the layers.
struct Shared {
    uint64_t full[MAX_DEPTH], empty[MAX_DEPTH];
    Step step;
    Share shares[NUM_PARTS];
    Split split;
    Cursor taken[WARPS];   // how far each warp is
    float kept[THREADS];   // of the residual stream, what each thread adds to
    uint16_t places[NUM_PARTS][THREADS];     // which row and token each thread finishes first, or NOBODYS
    int first_pages[THREADS], new_slots[8];  // of each lane's first tokens, and where new ones go
    float squares[WARPS][MAX_ROWS], maxima[WARPS][MAX_QUERIES], sums[WARPS][MAX_QUERIES];
    __device__ static __forceinline__ Shared& here() { return *reinterpret_cast<Shared*>(dynamic_shared()); }
    __device__ static __forceinline__ char* at(int place) { return reinterpret_cast<char*>(dynamic_shared()) + place; }
    __device__ static __forceinline__ char* chunk(int slot);
};
constexpr int RING_AT = (sizeof(Shared) + 15) / 16 * 16;
__device__ __forceinline__ char* Shared::chunk(int slot) { return at(RING_AT + slot * CHUNK_BYTES); }

// Copies a block's share of a matrix, tile after tile. `behind` is UNDER_WAY chunks behind.
__device__ inline void bring(const Matrix& matrix, const Share& share, int depth, Cursor& at, Cursor& behind, int& num_brought) {
    Shared& shared = Shared::here();
    for (int i = 0; i < share.count * share.groups; i++) {
        const int tile = share.first + i / share.groups, group = i % share.groups;
        const int steps = min(CHUNK_STEPS, share.steps - group * CHUNK_STEPS);
        const int64_t step = static_cast<int64_t>(tile) * share.steps + group * CHUNK_STEPS;
        char* to = Shared::chunk(at.slot);
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

// The weights of a warp's two steps of a chunk. What lies behind a matrix's end is what was there before, and finite.
struct Taken {
    Packed steps[2];
    __device__ __forceinline__ void take(int depth, Cursor& at, int warp, int lane) {
        Shared& shared = Shared::here();
        const char* from = Shared::chunk(at.slot);
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

// A word of two bf16 times a word of norms, each rounded; adds up the squares of what it was.
__device__ __forceinline__ uint32_t weighed(uint32_t word, uint32_t norm, float& squares) {
    const float low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xFFFF0000u);
    squares += low * low + high * high;
    return times(word, norm);
}

// One consumer's view of a step: the warps that multiply.
struct Worker {
    const Step& p;
    Shared& shared;
    int thread, warp, lane, g, q, num_tokens;
    uint32_t met;  // what the blocks' counter is once all are here

    __device__ Worker(uint32_t met)
        : p(Shared::here().step), shared(Shared::here()), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4),
          q(lane % 4), num_tokens(p.num_sequences * p.width), met(met) {}

    // What is the same in all layers.
    __device__ void begin() {
        for (int part = 0; part < NUM_PARTS; part++) {
            const Share& share = shared.shares[part];
            const int rows = share.count * (part == GATE_UP ? ROWS / 2 : ROWS);
            shared.places[part][thread] = rows && thread < THREADS / rows * rows ? thread % rows | thread / rows << 8 : NOBODYS;
        }
        if (lane == 0) shared.taken[warp] = {0, 0};
        for (int i = thread; i < p.num_layers * static_cast<int>(sizeof(Layer) / sizeof(void*)); i += THREADS)
            reinterpret_cast<void**>(Shared::at(p.layers_at))[i] = reinterpret_cast<void* const*>(p.layers)[i];
        const int num_angles = num_tokens * (HEAD / 2);
        for (int i = thread; i < num_angles; i += THREADS) angles()[i] = p.cos[i], angles()[num_angles + i] = p.sin[i];
        const int row = shared.places[OUTPUT][thread] & 255, of = shared.places[OUTPUT][thread] >> 8;
        if (of < num_tokens) shared.kept[thread] = __bfloat162float(p.x[static_cast<int64_t>(of) * p.hidden + shared.shares[OUTPUT].first * ROWS + row]);
        meet<THREADS>();
        const Split& split = shared.split;
        if (!split.is_there) return;
        const int token = split.first + warp * TOKENS + g;
        shared.first_pages[thread] = token < min(split.last, split.old) ? split.table[token / p.page_size] : 0;
        if (thread < p.width) shared.new_slots[thread] = p.slots[split.sequence * p.width + thread];
        meet<THREADS>();
    }
    __device__ __forceinline__ float* angles() const { return reinterpret_cast<float*>(Shared::at(p.angles_at)); }
    __device__ __forceinline__ float* merging() const { return reinterpret_cast<float*>(Shared::at(p.x_at)); }
    __device__ __forceinline__ float* parts() const { return reinterpret_cast<float*>(Shared::at(p.parts_at)); }
    __device__ __forceinline__ const Layer& layer(int index) const { return reinterpret_cast<const Layer*>(Shared::at(p.layers_at))[index]; }

    __device__ __forceinline__ void wait() const {
        if (thread == 0) wait_until(p.counters, met);
        meet<THREADS>();
    }
    __device__ __forceinline__ void done() {
        meet<THREADS>();
        if (thread == 0) count(p.counters);
    }

    // Which of a share's rows and tokens a thread finishes: `row`, and tokens from `token` on. Nothing is done yet with what is
    // loaded, so that nobody waits for it.
    struct Ending {
        int row, token;
        float factor[2];
        __nv_bfloat16 bias[2];
        __device__ Ending(const Matrix& matrix, const Share& share, int place, bool is_gated) : row(place & 255), token(place >> 8) {
            factor[0] = factor[1] = 0, bias[0] = bias[1] = __float2bfloat16(0);
            if (place == NOBODYS) return;
            const int of_all = share.first * (is_gated ? ROWS / 2 : ROWS) + row, half = share.num_rows / 2;
            factor[0] = matrix.factors[of_all];
            if (is_gated) factor[1] = matrix.factors[of_all + half];
            if (matrix.bias == nullptr) return;
            bias[0] = matrix.bias[of_all];
            if (is_gated) bias[1] = matrix.bias[of_all + half];
        }
    };

    // A tile's sums of tokens 2 q and 2 q + 1, rows g and g + 8.
    __device__ __forceinline__ void store(const float (&sums)[4][4], float* to, int rows) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (q * 2 + i % 2 < num_tokens) to[i % 2 * rows + i / 2 * 8] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    }

    // Adds up what all warps have found, and writes it.
    __device__ void finish(int part, const Ending& end, const Share& share) {
        const bool is_gated = part == GATE_UP, is_normed = part == QKV || part == GATE_UP;
        const int rows = share.count * ROWS, stride = rows ? THREADS / (is_gated ? rows / 2 : rows) : 1;
        meet<THREADS>();
        for (int n = end.token; n < num_tokens; n += stride) {
            float scale = 1, value[2] = {0, 0};
            if (is_normed) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += shared.squares[w][n];
                scale = rsqrtf(total / share.num_columns + p.eps);
            }
            const int local = is_gated ? end.row / 8 * ROWS + end.row % 8 : end.row;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                if (side && !is_gated) break;
#pragma unroll
                for (int w = 0; w < WARPS; w++) value[side] += parts()[(w * num_tokens + n) * rows + local + side * 8];
                value[side] = value[side] * scale * (end.factor[side] * Packed::FACTOR) + __bfloat162float(end.bias[side]);
            }
            if (part == QKV) {
                p.qkv[static_cast<int64_t>(n) * share.num_rows + share.first * ROWS + end.row] = __float2bfloat16(value[0]);
            } else if (part == GATE_UP) {
                p.inner[static_cast<int64_t>(n) * p.inner_size + share.first * 8 + end.row] = __float2bfloat16(gated(value[0], value[1]));
            } else {
                const __nv_bfloat16 sum = __float2bfloat16(shared.kept[thread] + value[0]);
                shared.kept[thread] = __bfloat162float(sum);
                p.x[static_cast<int64_t>(n) * p.hidden + share.first * ROWS + end.row] = sum;
            }
        }
        done();
    }

    __device__ __forceinline__ __nv_bfloat16* staged(int token) const {
        return reinterpret_cast<__nv_bfloat16*>(Shared::at(p.x_at)) + (warp * num_tokens + token) * p.x_stride;
    }
    // Of a lane's eight columns of a chunk.
    __device__ __forceinline__ int step_of(int group) const { return group * CHUNK_STEPS + lane / 16 * WARPS + warp; }
    __device__ __forceinline__ int column_of(int group) const { return step_of(group) * Packed::COLUMNS + lane % 16 * 8; }
    // Brings a warp's columns of N tokens and G chunks into shared memory, times a norm's weights where there is one, and adds up
    // squares. What lies behind the last step is zero.
    template <int N, int G>
    __device__ __forceinline__ void stage(int token, int group, const __nv_bfloat16* input, const __nv_bfloat16* norm, const Share& share,
                                          float (&squares)[MAX_ROWS]) const {
        uint4 values[N][G], weights[G];
#pragma unroll
        for (int i = 0; i < G; i++) {
            weights[i] = make_uint4(0, 0, 0, 0);
            if (norm != nullptr && step_of(group + i) < share.steps) weights[i] = fresh(norm + column_of(group + i));
#pragma unroll
            for (int n = 0; n < N; n++) {
                values[n][i] = make_uint4(0, 0, 0, 0);
                if (token + n < num_tokens && step_of(group + i) < share.steps)
                    values[n][i] = fresh(input + static_cast<int64_t>(token + n) * share.num_columns + column_of(group + i));
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (token + n >= num_tokens) break;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < G; i++) {
                if (group + i >= share.groups) break;
                uint4 v = values[n][i];
                const uint4 w = weights[i];
                if (norm != nullptr) v = make_uint4(weighed(v.x, w.x, sum), weighed(v.y, w.y, sum), weighed(v.z, w.z, sum), weighed(v.w, w.w, sum));
                *reinterpret_cast<uint4*>(staged(token + n) + (group + i) * GROUP_VALUES + lane * 8) = v;
            }
#pragma unroll
            for (int of = 0; of < MAX_ROWS; of++) squares[of] += token + n == of ? sum : 0;
        }
    }

    // A product, tile after tile; the next chunk is taken before this one is multiplied. `norm`: or none.
    __device__ void product(int part, const Matrix& matrix, const __nv_bfloat16* input, const __nv_bfloat16* norm) {
        const Share share = shared.shares[part];
        const Ending end(matrix, share, shared.places[part][thread], part == GATE_UP);
        if (norm != nullptr)
            for (int group = 0; group < share.groups; group++)
                if (step_of(group) < share.steps) expect_soon(norm + column_of(group));
        wait();
        float squares[MAX_ROWS] = {};
        if (share.groups <= FEW) {
            stage<MAX_ROWS, FEW>(0, 0, input, norm, share, squares);
        } else {
#pragma unroll 1
            for (int n = 0; n < num_tokens; n++)
#pragma unroll 1
                for (int group = 0; group < share.groups; group += AT_ONCE) stage<1, AT_ONCE>(n, group, input, norm, share, squares);
        }
        __syncwarp();
        if (norm != nullptr) {
#pragma unroll
            for (int n = 0; n < MAX_ROWS; n++) {
                if (n >= num_tokens) break;
                for (int i = 16; i; i /= 2) squares[n] += __shfl_xor_sync(~0u, squares[n], i);
                if (lane == 0) shared.squares[warp][n] = squares[n];
            }
        }
        const int num_chunks = share.count * share.groups;
        float sums[4][4] = {};
        Taken taken;
        Cursor at = shared.taken[warp];
        const int depth = p.depth, rows = share.count * ROWS;
        // What the tensor cores take of a token's columns. Lanes beyond the tokens bring some, and what comes of it is not used.
        const __nv_bfloat16* own = staged(g < num_tokens ? g : 0) + Packed::column(0, 0, 0, q);
        float* to = parts() + (warp * num_tokens + q * 2) * rows + g;
        if (num_chunks) taken.take(depth, at, warp, lane);
        int group = 0;
#pragma unroll 2
        for (int i = 0; i < num_chunks; i++) {
            uint4 x[2][4];
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int piece = 0; piece < 4; piece++)
                    x[u][piece] = *reinterpret_cast<const uint4*>(own + group * GROUP_VALUES + Packed::column(u, piece / 2, piece % 2, 0));
            const Taken now = taken;
            if (i + 1 < num_chunks) taken.take(depth, at, warp, lane);
#pragma unroll
            for (int piece = 0; piece < 4; piece++)
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    uint32_t a[2][4];
                    now.steps[u].operands(piece / 2, piece % 2, a);
                    multiply(sums[u * 2], a[0], x[u][piece].x, x[u][piece].y), multiply(sums[u * 2 + 1], a[1], x[u][piece].z, x[u][piece].w);
                }
            if (++group < share.groups) continue;
            store(sums, to, rows);
            to += ROWS, group = 0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int k = 0; k < 4; k++) sums[n][k] = 0;
        }
        __syncwarp();
        if (lane == 0) shared.taken[warp] = at;
        finish(part, end, share);
    }

    template <int SIDES>
    __device__ void attend(const Layer& layer, int index);
};

}  // namespace forebay
