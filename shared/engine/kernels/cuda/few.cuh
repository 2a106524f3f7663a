// A mixture of NVFP4 experts of a few tokens in one kernel behind the router: the choice, gate and up, the way down, the weighted sum.
//
// A block has two or four inner values of each expert and some rows of each one's way down, and all blocks are side by side. Weights
// come by bulk copies through a ring, a batch after the other that all multiply together, asked for by a warp that does little else: the
// shared expert's before the router has ended, a token's chosen ones' as soon as that token has chosen. Sixteen warps compute. Each has
// the same sixteenth of the columns of whatever comes, for all tokens, whose values it keeps in registers: tensor cores multiply
// sixteen rows by eight columns, which are the tokens, and what is wanted of them is the column of the token that chose. A last
// warp chooses for tokens behind the first, adds up what the sixteen have found, and tells all blocks: through memory, each word
// standing for itself (`tell`). So a token's inner values travel while those of the next are computed, and nobody waits but for the last.
#pragma once
#include "codes.cuh"

namespace forebay {

constexpr int FEW_TOKENS = 4, FEW_BLOCKS = 128;
constexpr int FEW_WARPS = 16, COMPUTING = FEW_WARPS * 32, FEW_THREADS = COMPUTING + 64;  // and who asks, and who tells
constexpr int EXPERTS = MAX_CHOSEN + 1;       // of a token, the shared one last
constexpr int SHARED_UP = 8, SHARED_DOWN = 4;  // fills of the shared expert
constexpr int MOST_BATCHES = 3;                // in the ring
constexpr float LARGEST = 65'504.0f;          // of inner values times SMALLER

struct Few {
    const __half* x;       // [tokens, hidden], behind the norm
    const float* logits;   // [tokens, row_stride]
    const float* bias;     // [experts]
    const uint8_t *gate_up, *gate_up_scale, *down, *down_scale;  // as `experts.Experts`
    const float* factors;                                        // [experts, 2]
    const __nv_bfloat16 *shared_gate_up, *shared_down;           // [2 inner, hidden], [hidden, inner]
    uint32_t* state;     // how many mixtures there have been, and from the fourth word on twice WORDS, in turns: NOTHING before a mixture
    __nv_bfloat16* out;  // [tokens, hidden]
    Scoring scoring;
    int num_tokens, hidden, inner, row_stride, num_batches;
};

// Sizes, and where things lie in shared memory. S: 2048s of hidden; R: a block's inner values of an expert. A fill is R rows of gate or of
// up, or all of a block's rows down, codes and then scales; or as many bytes of the shared expert as there are codes. A batch is sixteen
// rows of gates and ups, or what sixteen warps multiply at once on the way down.
template <int S, int R>
struct Room {
    static constexpr int K = 2048 * S, INNER = FEW_BLOCKS * R, CODES = R * K / 2, SCALES = R * K / 16, SLOT = CODES + SCALES;
    static constexpr int DOWN_ROWS = 16 * S, WORDS = INNER / 2;          // of a block; of an expert, pairs of inner values
    static constexpr int FILLS = 16 / R, BATCH = FILLS * SLOT;                                    // of a batch
    static constexpr int SHARED_BATCHES = SHARED_UP / FILLS, ROUNDS = MAX_CHOSEN / FILLS;        // and of batches; of a token's ways down
    char* ring;
    float *parts, *shared_parts, *down_parts;  // [tokens][R][warps][16 rows], [tokens][warps][8 rows], [tokens][warps][DOWN_ROWS]
    float *factors, *weights;                  // of a choice, for inner values and for sums
    int* chosen;
    uint32_t* turn;
    uint64_t *full, *empty, *of_choice, *of_weights, *of_shared_parts, *of_parts;
    char* end;

    __host__ __device__ Room(char* at, int num_batches, int num_tokens) {
        const auto take = [&](auto*& part, size_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
            at += count * sizeof(*part);
        };
        take(ring, num_batches * BATCH);
        take(parts, num_tokens * R * FEW_WARPS * 16), take(shared_parts, num_tokens * FEW_WARPS * 8);
        take(down_parts, num_tokens * FEW_WARPS * DOWN_ROWS);
        take(factors, FEW_TOKENS * MAX_CHOSEN), take(weights, FEW_TOKENS * MAX_CHOSEN), take(chosen, FEW_TOKENS * MAX_CHOSEN), take(turn, 4);
        take(full, MOST_BATCHES), take(empty, MOST_BATCHES), take(of_choice, FEW_TOKENS), take(of_weights, 1);
        take(of_shared_parts, 1), take(of_parts, FEW_TOKENS);
        end = at;
    }
};

// Where a batch is in the ring, and for the how manieth time that place is used.
struct Place {
    int at = 0, use = 0;
    __device__ __forceinline__ void next(const Few& p) {
        if (++at == p.num_batches) at = 0, use++;
    }
};

template <int S, int R>
__device__ __forceinline__ const char* await(const Room<S, R>& m, const Place& place) {
    signal_wait(m.full + place.at, place.use % 2);
    return m.ring + place.at * Room<S, R>::BATCH;
}

// A warp has done with a batch.
template <int S, int R>
__device__ __forceinline__ void leave(const Few& p, const Room<S, R>& m, Place& place) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) signal_arrive(m.empty + place.at);
    place.next(p);
}

// Pairs of inner values of a token and an expert.
template <int S, int R>
__device__ __forceinline__ uint32_t* words_of(const Few& p, uint32_t turn, int token, int expert) {
    return p.state + 4 + (turn % 2 * FEW_TOKENS * EXPERTS + token * EXPERTS + expert) * Room<S, R>::WORDS;
}

__device__ __forceinline__ void bring_bias(const Few& p, float (&bias)[MAX_EXPERTS / 32]) {
#pragma unroll
    for (int j = 0; j < MAX_EXPERTS / 32; j++) bias[j] = p.bias[min(static_cast<int>(threadIdx.x % 32) + 32 * j, p.scoring.num_experts - 1)];
}

// The choice of a token, by one warp.
template <int S, int R>
__device__ __forceinline__ void choose_for(const Few& p, const Room<S, R>& m, int token, const float (&bias)[MAX_EXPERTS / 32]) {
    choose(p.scoring, p.logits + static_cast<int64_t>(token) * p.row_stride, bias, m.chosen + token * MAX_CHOSEN);
    if (threadIdx.x % 32 == 0) signal_arrive(m.of_choice + token);
}

// Where what a fill brings is in memory; without scales it is of the shared expert.
struct Source {
    const void *codes, *scales;
};

// The warp that asks for weights, and chooses for the first token. A lane asks for a fill.
template <int S, int R>
__device__ __forceinline__ void ask_for_weights(const Few& p, const Room<S, R>& m) {
    using Room = Room<S, R>;
    constexpr int K = Room::K, INNER = Room::INNER, FILLS = Room::FILLS;
    const int lane = threadIdx.x % 32, block = blockIdx.x;
    Place place;
    const auto ask = [&](int count, int bytes, const Source& from) {
        if (place.use) signal_wait(m.empty + place.at, (place.use - 1) % 2);
        if (lane == 0) signal_expect(m.full + place.at, count * bytes);
        __syncwarp();
        if (lane < count) {
            char* const to = m.ring + place.at * Room::BATCH + lane * Room::SLOT;
            copy_ahead(to, from.codes, Room::CODES, m.full + place.at);
            if (from.scales != nullptr) copy_ahead(to + Room::CODES, from.scales, Room::SCALES, m.full + place.at);
        }
        place.next(p);
    };
    for (int batch = 0; batch < Room::SHARED_BATCHES; batch++) {
        const int fill = batch * FILLS + lane % FILLS;
        const int64_t row = fill / (SHARED_UP / 2) * INNER + R * block;
        ask(FILLS, Room::CODES, {p.shared_gate_up + row * K + fill % (SHARED_UP / 2) * (Room::CODES / 2), nullptr});
    }
    float bias[MAX_EXPERTS / 32];
    bring_bias(p, bias);
    wait_for_kernel();
    choose_for(p, m, 0, bias);
    for (int batch = 0; batch < R * p.num_tokens; batch++) {
        if (batch % R == 0) signal_wait(m.of_choice + batch / R, 0);
        const int fill = batch * FILLS + lane % FILLS;
        const int64_t row = static_cast<int64_t>(m.chosen[fill / 2]) * 2 * INNER + fill % 2 * INNER + R * block;
        ask(FILLS, Room::SLOT, {p.gate_up + row * (K / 2), p.gate_up_scale + row * (K / 16)});
    }
    ask(SHARED_DOWN, Room::CODES, {p.shared_down + static_cast<int64_t>(block) * Room::DOWN_ROWS * INNER + lane % SHARED_DOWN * (Room::CODES / 2), nullptr});
    for (int batch = 0; batch < Room::ROUNDS * p.num_tokens; batch++) {
        const int64_t row = static_cast<int64_t>(m.chosen[batch * FILLS + lane % FILLS]) * K + block * Room::DOWN_ROWS;
        ask(FILLS, Room::SLOT, {p.down + row * (INNER / 2), p.down_scale + row * (INNER / 16)});
    }
}

// What all warps have found of a row.
__device__ __forceinline__ float sum_of_warps(const float* parts, int stride) {
    float sums[4] = {};
#pragma unroll
    for (int w = 0; w < FEW_WARPS; w++) sums[w % 4] += parts[w * stride];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Two inner values of this lane's and the next one's gates, whose ups are R lanes on; only lanes that have a pair's first are right.
template <int R>
__device__ __forceinline__ float2 inner_values(float sum) {
    const float value = gated(sum, __shfl_xor_sync(~0u, sum, R));
    return {value, __shfl_xor_sync(~0u, value, 1)};
}
__device__ __forceinline__ float bounded(float v, float most) { return fminf(fmaxf(v, -most), most); }  // and a number

// The warp that chooses for all tokens but the first, weighs, and tells what all have found.
template <int S, int R>
__device__ __forceinline__ void tell_values(const Few& p, const Room<S, R>& m) {
    const int lane = threadIdx.x % 32, half = R / 2, word = blockIdx.x * half;
    float bias[MAX_EXPERTS / 32];
    bring_bias(p, bias);
    wait_for_kernel();
    const auto turn = static_cast<uint32_t>(fresh(reinterpret_cast<const int*>(p.state)));
    for (int t = 1; t < p.num_tokens; t++) choose_for(p, m, t, bias);
    signal_wait(m.of_choice, 0);
    for (int t = 0; t < p.num_tokens; t++) {
        const int at = t * MAX_CHOSEN + lane;
        const float weight = weigh(p.scoring, p.logits + static_cast<int64_t>(t) * p.row_stride, m.chosen + t * MAX_CHOSEN);
        if (lane >= MAX_CHOSEN) continue;
        const float* const factors = p.factors + m.chosen[at] * 2;
        m.factors[at] = factors[0], m.weights[at] = weight * factors[1] / SMALLER;
    }
    if (lane == 0) *m.turn = turn;
    __syncwarp();
    if (lane == 0) signal_arrive(m.of_weights);
    // For the next mixture. The one before this has read all of it.
    for (int i = lane; i < FEW_TOKENS * EXPERTS * half; i += 32) tell(words_of<S, R>(p, turn + 1, 0, i / half) + word + i % half, NOTHING);

    signal_wait(m.of_shared_parts, 0);
    {
        const int t = lane / 8, row = lane % 8;
        const float2 pair = inner_values<R>(sum_of_warps(m.shared_parts + min(t, p.num_tokens - 1) * FEW_WARPS * 8 + row, 8));
        const __nv_bfloat162 both = __floats2bfloat162_rn(bounded(pair.x, 1e38f), bounded(pair.y, 1e38f));
        if (t < p.num_tokens && row < R && row % 2 == 0) tell(words_of<S, R>(p, turn, t, MAX_CHOSEN) + word + row / 2, *reinterpret_cast<const uint32_t*>(&both));
    }
    for (int t = 0; t < p.num_tokens; t++) {
        signal_wait(m.of_parts + t, 0);
#pragma unroll
        for (int i = 0; i < half; i++) {
            const int group = 2 * i + lane / 16, row = lane % 16, expert = group * (8 / R) + row / (2 * R), of_gate = row % (2 * R);
            const float sum = sum_of_warps(m.parts + (t * R + group) * FEW_WARPS * 16 + row, 16);
            const float2 pair = inner_values<R>(sum * m.factors[t * MAX_CHOSEN + expert]);
            if (of_gate < R && of_gate % 2 == 0)
                tell(words_of<S, R>(p, turn, t, expert) + word + of_gate / 2, as_halves(bounded(pair.x * SMALLER, LARGEST), bounded(pair.y * SMALLER, LARGEST)));
        }
    }
}

// A scale's bits, e4m3 without a sign, as two equal fp16, as `decode` wants them.
__device__ __forceinline__ uint32_t twice(uint8_t bits) { return scale_for_codes(bits * 0x0080'0080u); }

// Rows g and g + 8 of sixteen, whose codes and scales are in shared memory, times the lane's values of a unit.
__device__ __forceinline__ void multiply_rows(float (&low)[4], float (&high)[4], const char* codes, const char* codes_8, const uint8_t* scales,
                                              const uint8_t* scales_8, int unit, int half_units, const uint4 (&b)[4]) {
    const uint4 row = *reinterpret_cast<const uint4*>(codes + unit * 16), row_8 = *reinterpret_cast<const uint4*>(codes_8 + unit * 16);
    const uint32_t of_units[4] = {twice(scales[unit]), twice(scales[half_units + unit]), twice(scales_8[unit]), twice(scales_8[half_units + unit])};
    multiply_units(low, high, row, row_8, of_units, b);
}

// Inner values of the shared expert. What has been kept of tokens is fp16, and this is a bf16 and another one, exactly: columns four to seven.
template <int S, int R>
__device__ __forceinline__ void shared_gate_and_up(const Few& p, const Room<S, R>& m, const uint4 (&x)[S][4], Place& place) {
    using Room = Room<S, R>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const char* const fills = await(m, place);  // in as many batches, which lie side by side
    Place last = place;
    for (int batch = 1; batch < Room::SHARED_BATCHES; batch++) last.next(p), await(m, last);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < S; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {  // eight columns of the first half of a row, eight more, and the same of its second half
            const int at = g % R * 2 * Room::K + j / 2 * Room::K + ((warp * S + i) * 4 + q) * 32 + j % 2 * 16;
            uint4 w = make_uint4(0, 0, 0, 0);
            if (g < 2 * R) w = *reinterpret_cast<const uint4*>(fills + (g / R * (SHARED_UP / 2) + at / Room::CODES) * Room::SLOT + at % Room::CODES);
            uint32_t b[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 both = from_halves(word_of(x[i][j], k));
                const __nv_bfloat162 near = __floats2bfloat162_rn(both.x, both.y);
                const uint32_t first = *reinterpret_cast<const uint32_t*>(&near);
                const __nv_bfloat162 rest = __floats2bfloat162_rn(both.x - of_pair(first, 0), both.y - of_pair(first, 1));
                b[k] = g < FEW_TOKENS ? first : *reinterpret_cast<const uint32_t*>(&rest);
            }
            multiply(sum, {w.x, 0, w.y, 0}, b[0], b[1]);
            multiply(sum, {w.z, 0, w.w, 0}, b[2], b[3]);
        }
    for (int batch = 0; batch < Room::SHARED_BATCHES; batch++) leave(p, m, place);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float both = sum[i] + __shfl_xor_sync(~0u, sum[i], 2);
        if (q < 2 && 2 * q + i < p.num_tokens) m.shared_parts[((2 * q + i) * FEW_WARPS + warp) * 8 + g] = both;
    }
    __syncwarp();
    if (lane == 0) signal_arrive(m.of_shared_parts);
}

// Inner values of all choices: this block's of each, from this warp's columns.
template <int S, int R>
__device__ __forceinline__ void gate_and_up(const Few& p, const Room<S, R>& m, Place& place) {
    using Room = Room<S, R>;
    constexpr int K = Room::K;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint4 x[S][4];  // of token g
    const __half* const own = p.x + static_cast<int64_t>(min(g % FEW_TOKENS, p.num_tokens - 1)) * K;
#pragma unroll
    for (int i = 0; i < S; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) x[i][j] = fresh(static_cast<const void*>(own + j / 2 * (K / 2) + ((warp * S + i) * 4 + q) * 16 + j % 2 * 8));
    shared_gate_and_up(p, m, x, place);
#pragma unroll 1
    for (int t = 0; t < p.num_tokens; t++) {
#pragma unroll 1
        for (int group = 0; group < R; group++) {
            const char *const fill = await(m, place) + g / R * Room::SLOT, *const fill_8 = fill + 8 / R * Room::SLOT;
            const auto *scales = reinterpret_cast<const uint8_t*>(fill) + Room::CODES + g % R * (K / 16),
                       *scales_8 = reinterpret_cast<const uint8_t*>(fill_8) + Room::CODES + g % R * (K / 16);
            float low[4] = {}, high[4] = {};
#pragma unroll
            for (int i = 0; i < S; i++)
                multiply_rows(low, high, fill + g % R * (K / 2), fill_8 + g % R * (K / 2), scales, scales_8, (warp * S + i) * 4 + q, K / 32, x[i]);
            leave(p, m, place);
            float* const part = m.parts + ((t * R + group) * FEW_WARPS + warp) * 16 + g;
            if (q == t / 2) part[0] = t % 2 ? low[1] + high[1] : low[0] + high[0], part[8] = t % 2 ? low[3] + high[3] : low[2] + high[2];
        }
        __syncwarp();
        if (lane == 0) signal_arrive(m.of_parts + t);
    }
}

// The shared expert's way down, of a warp's columns, into `down_parts`.
template <int S, int R>
__device__ __forceinline__ void shared_way_down(const Few& p, const Room<S, R>& m, uint32_t turn, Place& place) {
    using Room = Room<S, R>;
    constexpr int ROW = Room::INNER * 2, ROWS_OF_FILL = Room::DOWN_ROWS / SHARED_DOWN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int word = (warp * 4 + q) * R;
    const uint32_t* const heard[1] = {words_of<S, R>(p, turn, min(g % FEW_TOKENS, p.num_tokens - 1), MAX_CHOSEN) + word / 4 * 4};
    uint4 v[1];
    hear(heard, v);
    const char* const fills = await(m, place);
    hear_all(heard, v);
    const uint32_t b[4] = {R == 4 || q % 2 == 0 ? v[0].x : v[0].z, R == 4 || q % 2 == 0 ? v[0].y : v[0].w, v[0].z, v[0].w};
    const auto row_at = [&](int row) {
        return reinterpret_cast<const uint32_t*>(fills + row / ROWS_OF_FILL * Room::SLOT + row % ROWS_OF_FILL * ROW + word * 4);
    };
#pragma unroll
    for (int i = 0; i < S; i++) {
        const uint32_t *row = row_at(16 * i + g), *row_8 = row_at(16 * i + g + 8);
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < R; j += 2) multiply(sum, {row[j], row_8[j], row[j + 1], row_8[j + 1]}, b[j], b[j + 1]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int t = 2 * q + k % 2;
            if (t < p.num_tokens) m.down_parts[(t * FEW_WARPS + warp) * Room::DOWN_ROWS + 16 * i + g + k / 2 * 8] = sum[k];
        }
    }
    leave(p, m, place);
}

// This block's rows of the way down: each warp an R-th of the columns of some of a token's choices.
template <int S, int R>
__device__ __forceinline__ void way_down(const Few& p, const Room<S, R>& m, uint32_t turn, Place& place) {
    using Room = Room<S, R>;
    constexpr int INNER = Room::INNER;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, unit = warp % R * 4 + lane % 4;
    const auto places = [&](int item, const uint32_t* (&at)[4]) {
        const uint32_t* const from = words_of<S, R>(p, turn, item / Room::ROUNDS, item % Room::ROUNDS * Room::FILLS + warp / R) + unit * 8;
        at[0] = from, at[1] = from + 4, at[2] = from + INNER / 4, at[3] = from + INNER / 4 + 4;
    };
    const uint32_t* at[4];
    uint4 ahead[4];
    places(0, at);
    hear(at, ahead);
    float totals[S][2] = {};
#pragma unroll 1
    for (int item = 0; item < p.num_tokens * Room::ROUNDS; item++) {
        const int t = item / Room::ROUNDS;
        hear_all(at, ahead);
        const uint4 b[4] = {ahead[0], ahead[1], ahead[2], ahead[3]};
        if (item + 1 < p.num_tokens * Room::ROUNDS) places(item + 1, at), hear(at, ahead);
        const char* const fill = await(m, place) + warp / R * Room::SLOT;
        const auto* const scales = reinterpret_cast<const uint8_t*>(fill) + Room::CODES;
        const float weight = m.weights[item * Room::FILLS + warp / R];
#pragma unroll
        for (int i = 0; i < S; i++) {
            const int row = 16 * i + g, row_8 = row + 8;
            float low[4] = {}, high[4] = {};
            multiply_rows(low, high, fill + row * (INNER / 2), fill + row_8 * (INNER / 2), scales + row * (INNER / 16), scales + row_8 * (INNER / 16),
                          unit, INNER / 32, b);
            totals[i][0] += weight * (low[0] + high[0]), totals[i][1] += weight * (low[2] + high[2]);
        }
        leave(p, m, place);
        if (item % Room::ROUNDS < Room::ROUNDS - 1) continue;
#pragma unroll
        for (int i = 0; i < S; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (lane % 4 == 0) m.down_parts[(t * FEW_WARPS + warp) * Room::DOWN_ROWS + 16 * i + g + 8 * k] += totals[i][k];
                totals[i][k] = 0;
            }
    }
}

template <int S, int R>
__global__ void __launch_bounds__(FEW_THREADS, 1) few(const __grid_constant__ Few p) {
    using Room = Room<S, R>;
    const Room m(reinterpret_cast<char*>(aligned_shared()), p.num_batches, p.num_tokens);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.num_batches; i++) signal_init(m.full + i, 1), signal_init(m.empty + i, FEW_WARPS);
        for (int t = 0; t < FEW_TOKENS; t++) signal_init(m.of_choice + t, 1), signal_init(m.of_parts + t, FEW_WARPS);
        signal_init(m.of_weights, 1), signal_init(m.of_shared_parts, FEW_WARPS);
        signals_ready();
    }
    __syncthreads();
    if (threadIdx.x >= COMPUTING) return threadIdx.x < COMPUTING + 32 ? ask_for_weights(p, m) : tell_values(p, m);
    wait_for_kernel();
    Place place;
    gate_and_up(p, m, place);
    let_dependents_start();
    signal_wait(m.of_weights, 0);
    const uint32_t turn = *m.turn;
    shared_way_down(p, m, turn, place);
    way_down(p, m, turn, place);
    meet<COMPUTING>();
    for (int i = threadIdx.x; i < p.num_tokens * Room::DOWN_ROWS; i += COMPUTING) {
        const int t = i / Room::DOWN_ROWS, row = i % Room::DOWN_ROWS;
        const float sum = sum_of_warps(m.down_parts + t * FEW_WARPS * Room::DOWN_ROWS + row, Room::DOWN_ROWS);
        p.out[static_cast<int64_t>(t) * Room::K + blockIdx.x * Room::DOWN_ROWS + row] = __float2bfloat16(sum);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.state = turn + 1;  // all have told, so all have read it
}

}  // namespace forebay
