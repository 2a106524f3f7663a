// What a step of `layers.cu` is made of, how its work is shared out, and how weights come.
#pragma once
#include "products.cuh"

namespace forebay {

constexpr int ALL_THREADS = THREADS + 32;  // with the warp that copies
constexpr int HEAD = 128;                  // values of a head
constexpr int CHUNK_STEPS = 16, STEP_BYTES = 1024, STEP_SCALES = 128;  // of one tile, by 128 columns
constexpr int CHUNK_CODES = CHUNK_STEPS * STEP_BYTES, CHUNK_BYTES = CHUNK_STEPS * (STEP_BYTES + STEP_SCALES);
constexpr int MAX_SHARED_BYTES = 232448, MAX_DEPTH = 12, MAX_ROWS = 4, MAX_SPLITS = 16, MAX_QUERIES = 16;
constexpr int UNDER_WAY = 2;  // chunks at most: more would only make others wait for memory
constexpr int GROUP_VALUES = 2 * Packed::COLUMNS, PADDING = 8;  // of a warp's activations, for each chunk; behind all
constexpr int FEW = 2, AT_ONCE = 8;  // chunks, of which a warp stages all tokens at once, or one token
constexpr int NOBODYS = MAX_ROWS << 8;  // a place of no row: a token that no step has
constexpr int TOKENS = 8;  // that a warp attends to at once
constexpr int MERGED = 4;  // queries whose values a block adds up at once
constexpr int MERGED_STRIDE = HEAD + 4, MERGED_BYTES = WARPS * MERGED * MERGED_STRIDE * 4;

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

// What a block has in shared memory: this at its beginning, then the ring, and behind it what depends on the step: each warp's
// activations [WARPS][T][x_stride], of each chunk two steps, or what a block adds up of attention; a product's sums [WARPS][T]
// [rows]; cosines and sines [T, HEAD / 2]; the layers.
struct Shared {
    uint64_t full[MAX_DEPTH], empty[MAX_DEPTH];
    Step step;
    Share shares[NUM_PARTS];
    Split split;
    Cursor taken[WARPS];                     // how far each warp is
    float kept[THREADS];                     // of the residual stream, what each thread adds to
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

}  // namespace forebay
