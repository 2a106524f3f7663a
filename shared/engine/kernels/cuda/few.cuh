// A mixture of NVFP4 experts of a few tokens in one kernel behind the router: the choice, gate and up, the way down, the weighted sum.
//
// A block has two inner values of each expert and some rows of each one's way down, and all blocks are side by side. Weights come by
// bulk copies, asked for by a warp that does nothing else: the shared expert's before the router has ended, the
// chosen ones' as soon as they are known, at one token all before any has come. So what leads down comes while inner values are
// computed, and while blocks tell them to one another: through memory, each word standing for itself (`tell`), since a
// counter would be another way there and back. A choice is computed by itself, as in `kernels.gluon_experts`.
#pragma once
#include "chosen.cuh"

namespace forebay {

constexpr int FEW_TOKENS = 8, FEW_BLOCKS = INNER / 2;
constexpr int COMPUTING = 2 * THREADS, ASKERS = 2, FEW_THREADS = COMPUTING + 32 * ASKERS;  // a warp has an eighth of the columns of every second choice
constexpr int EXPERTS = MAX_CHOSEN + 1;             // of a token, the shared one last
constexpr int AT_ONCE = 8, MOST_SLOTS = 24;         // fills that are asked for together; slots of the ring
constexpr int WORDS = FEW_TOKENS * EXPERTS * FEW_BLOCKS;  // of pairs of inner values
constexpr float LARGEST = 10'000.0f;                // of inner values times SMALLER, so that sixteen products fit into an fp16

struct Few {
    const __half* x;       // [tokens, hidden], behind the norm
    const float* logits;   // [tokens, row_stride]
    const float* bias;     // [experts]
    const uint8_t *gate_up, *gate_up_scale, *down, *down_scale;  // as `experts.Experts`
    const float* factors;                                        // [experts, 2]
    const __nv_bfloat16 *shared_gate_up, *shared_down;           // [2 INNER, hidden], [hidden, INNER]
    uint32_t* state;     // how many mixtures there have been, and from the fourth word on twice WORDS, in turns: NOTHING before a mixture
    __nv_bfloat16* out;  // [tokens, hidden]
    Scoring scoring;
    int num_tokens, hidden, row_stride, num_slots;
};

// Where things lie in shared memory. S: 2048s of hidden. A fill is two rows of gate or of up, or all of a block's rows down: codes, then scales.
template <int S>
struct Room {
    static constexpr int K = 2048 * S, UNITS = K / 32, CODES = K, SCALES = K / 8, SLOT = CODES + SCALES;
    static constexpr int DOWN_ROWS = K / FEW_BLOCKS, SHARED_DOWN = DOWN_ROWS * INNER * 2, ROW = 2 * K;  // of the shared gate and up
    char *ring, *shared, *shared_down;  // the shared gate and up lie in the last slots at first
    float *parts, *down_parts;          // [tokens][EXPERTS][4][WARPS], [tokens][EXPERTS][DOWN_ROWS]
    float *factors, *weights;           // of a choice, for inner values and for sums
    int* chosen;
    uint64_t *full, *empty, *of_shared, *of_shared_down, *of_choice;
    char* end;

    __host__ __device__ Room(char* at, int num_slots, int num_tokens) {
        const auto take = [&](auto*& part, size_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
            at += count * sizeof(*part);
        };
        take(ring, num_slots * SLOT);
        shared = ring + (num_slots - AT_ONCE) * SLOT;
        take(shared_down, SHARED_DOWN);
        take(parts, num_tokens * EXPERTS * 4 * WARPS), take(down_parts, num_tokens * EXPERTS * DOWN_ROWS);
        take(factors, FEW_TOKENS * MAX_CHOSEN), take(weights, FEW_TOKENS * MAX_CHOSEN), take(chosen, FEW_TOKENS * MAX_CHOSEN);
        take(full, MOST_SLOTS), take(empty, MOST_SLOTS), take(of_shared, 1), take(of_shared_down, 1), take(of_choice, 1);
        end = at;
    }
};

// A word of codes as fp16 times 1/16: of the four elements that come first, and of those half a row on.
__device__ __forceinline__ void sixteenths(uint32_t word, uint32_t (&first)[2], uint32_t (&second)[2]) {
    const uint32_t magnitudes = word & 0x77777777u;
    const uint32_t a = __byte_perm(0x2E2C2800u, 0x36343230u, magnitudes) | (word & 0x80808080u);
    const uint32_t b = __byte_perm(0x2E2C2800u, 0x36343230u, magnitudes >> 16) | ((word << 4) & 0x80808080u);
    first[0] = __byte_perm(a, 0, 0x1404), first[1] = __byte_perm(a, 0, 0x3424);
    second[0] = __byte_perm(b, 0, 0x1404), second[1] = __byte_perm(b, 0, 0x3424);
}

// e4m3 without a sign: the value times 2^-8.
__device__ __forceinline__ float scale_of(uint8_t bits) { return from_halves(static_cast<uint32_t>(bits) << 7).x; }

// A unit of codes times values, of which the lane has 16 from each half of the row.
__device__ __forceinline__ float unit(const uint4& codes, const uint4 (&low)[2], const uint4 (&high)[2], float low_scale, float high_scale) {
    uint32_t sums[2], high_sums[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t first[2], second[2];
        sixteenths(word_of(codes, i), first, second);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t a = word_of(low[i / 2], i % 2 * 2 + j), b = word_of(high[i / 2], i % 2 * 2 + j);
            sums[j] = i ? times_plus_half(first[j], a, sums[j]) : times_half(first[j], a);
            high_sums[j] = i ? times_plus_half(second[j], b, high_sums[j]) : times_half(second[j], b);
        }
    }
    const float2 one = from_halves(plus_half(sums[0], sums[1])), other = from_halves(plus_half(high_sums[0], high_sums[1]));
    return (one.x + one.y) * low_scale + (other.x + other.y) * high_scale;
}

// The sum of eight lanes.
__device__ __forceinline__ float eight(float value) {
#pragma unroll
    for (int i = 4; i; i /= 2) value += __shfl_xor_sync(~0u, value, i);
    return value;
}

// What a lane has of a token: the units of its eighth of a warp's columns, the same for four rows.
template <int S>
struct Values {
    uint4 low[S][2], high[S][2];

    __device__ static int place(int i) { return (static_cast<int>(threadIdx.x) / 32 % WARPS * S + i) * 8 + static_cast<int>(threadIdx.x) % 8; }
    __device__ __forceinline__ void load(const __half* x) {
#pragma unroll
        for (int i = 0; i < S; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const __half* const at = x + place(i) * 16 + j * 8;
                low[i][j] = fresh(static_cast<const void*>(at)), high[i][j] = fresh(static_cast<const void*>(at + Room<S>::K / 2));
            }
    }
    // A row of the shared expert.
    __device__ __forceinline__ float times_plain(const char* row) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 w = *reinterpret_cast<const uint4*>(row + place(i) * 32 + j / 2 * Room<S>::K + j % 2 * 16);
                const uint4 v = j / 2 ? high[i][j % 2] : low[i][j % 2];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float2 both = from_halves(word_of(v, k));
                    sum += of_pair(word_of(w, k), 0) * both.x + of_pair(word_of(w, k), 1) * both.y;
                }
            }
        return sum;
    }
    // A row of a chosen one.
    __device__ __forceinline__ float times_codes(const char* codes, const uint8_t* scales) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S; i++) {
            const uint4 v = *reinterpret_cast<const uint4*>(codes + place(i) * 16);
            sum += unit(v, low[i], high[i], scale_of(scales[place(i)]), scale_of(scales[Room<S>::UNITS + place(i)]));
        }
        return sum;
    }
};

// Warps that only ask for weights.
template <int S>
__device__ __forceinline__ void ask_for_weights(const Few& p, const Room<S>& m) {
    constexpr int K = Room<S>::K;
    const int lane = threadIdx.x % 32, block = blockIdx.x, gates = 2 * MAX_CHOSEN * p.num_tokens, all = gates + MAX_CHOSEN * p.num_tokens;
    const int asker = (threadIdx.x - COMPUTING) / 32;
    if (lane == 0 && asker == 0) {
        signal_expect(m.of_shared, 4 * Room<S>::ROW);
        for (int side = 0; side < 2; side++)
            copy_ahead(m.shared + side * 2 * Room<S>::ROW, p.shared_gate_up + static_cast<int64_t>(side * INNER + 2 * block) * K, 2 * Room<S>::ROW, m.of_shared);
        signal_expect(m.of_shared_down, Room<S>::SHARED_DOWN);
        copy_ahead(m.shared_down, p.shared_down + static_cast<int64_t>(block) * Room<S>::DOWN_ROWS * INNER, Room<S>::SHARED_DOWN, m.of_shared_down);
    }
    signal_wait(m.of_choice, 0);
    for (int first = 0; first < all; first += AT_ONCE) {
        const int fill = first + lane * ASKERS + asker, slot = fill % p.num_slots, use = fill / p.num_slots + (slot >= p.num_slots - AT_ONCE);
        if (lane >= AT_ONCE / ASKERS) continue;
        const bool up = fill < gates;
        const int64_t expert = m.chosen[up ? fill / 2 : fill - gates];
        const int64_t row = up ? expert * 2 * INNER + fill % 2 * INNER + 2 * block : expert * K + block * Room<S>::DOWN_ROWS;
        const uint8_t* const codes = up ? p.gate_up + row * (K / 2) : p.down + row * (INNER / 2);
        const uint8_t* const scales = up ? p.gate_up_scale + row * (K / 16) : p.down_scale + row * (INNER / 16);
        if (use) signal_wait(m.empty + slot, (use - 1) % 2);
        signal_expect(m.full + slot, Room<S>::SLOT);
        copy_ahead(m.ring + slot * Room<S>::SLOT, codes, Room<S>::CODES, m.full + slot);
        copy_ahead(m.ring + slot * Room<S>::SLOT + Room<S>::CODES, scales, Room<S>::SCALES, m.full + slot);
    }
}

// The slot of a fill, once it has come.
template <int S>
__device__ __forceinline__ const char* await(const Few& p, const Room<S>& m, int fill, int& slot) {
    slot = fill % p.num_slots;
    signal_wait(m.full + slot, fill / p.num_slots % 2);
    return m.ring + slot * Room<S>::SLOT;
}

__device__ __forceinline__ uint32_t* words_of(const Few& p, uint32_t turn, int token, int expert) {
    return p.state + 4 + turn % 2 * WORDS + (token * EXPERTS + expert) * FEW_BLOCKS;
}

// Two inner values from their rows' parts, which four lanes have one of each, told to all.
__device__ __forceinline__ void tell_values(const float* parts, float factor, bool shared, uint32_t* word) {
    const float4 *of_warps = reinterpret_cast<const float4*>(parts), a = of_warps[0], b = of_warps[1];
    const float sum = (((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w))) * factor, up = __shfl_xor_sync(~0u, sum, 2);
    const float value = gated(sum, up), second = __shfl_xor_sync(~0u, value, 1);
    if (threadIdx.x % 4) return;
    const auto bounded = [](float v, float most) { return fminf(fmaxf(v, -most), most); };  // and a number
    if (shared) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(bounded(value, 1e38f), bounded(second, 1e38f));
        tell(word, *reinterpret_cast<const uint32_t*>(&pair));
    } else {
        tell(word, as_halves(bounded(value * SMALLER, LARGEST), bounded(second * SMALLER, LARGEST)));
    }
}

// The choice of a token, and what it weighs, by one warp.
template <int S>
__device__ __forceinline__ void choose_for(const Few& p, const Room<S>& m, int token, const float (&bias)[MAX_EXPERTS / 32]) {
    const int lane = threadIdx.x % 32, at = token * MAX_CHOSEN + lane;
    const float* const logits = p.logits + static_cast<int64_t>(token) * p.row_stride;
    choose(p.scoring, logits, bias, m.chosen + token * MAX_CHOSEN);
    if (lane == 0) signal_arrive(m.of_choice);
    const float weight = weigh(p.scoring, logits, m.chosen + token * MAX_CHOSEN);
    if (lane >= MAX_CHOSEN) return;
    const float* const factors = p.factors + m.chosen[at] * 2;
    m.factors[at] = factors[0] * 16, m.weights[at] = weight * factors[1] * (16 / SMALLER);
}

// Inner values of all choices: this block's two of each.
template <int S>
__device__ __forceinline__ void gate_and_up(const Few& p, const Room<S>& m, uint32_t turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 8, half = warp / WARPS, chooses = 2 * WARPS - 1 - warp;
    float bias[MAX_EXPERTS / 32];
    if (chooses < p.num_tokens)
#pragma unroll
        for (int j = 0; j < MAX_EXPERTS / 32; j++) bias[j] = p.bias[min(lane + 32 * j, p.scoring.num_experts - 1)];
    wait_for_kernel();
    if (chooses < p.num_tokens) choose_for(p, m, chooses, bias);
    Values<S> x;
    const auto part = [&](int token, int expert) -> float* { return m.parts + ((token * EXPERTS + expert) * 4 + row) * WARPS + warp % WARPS; };
    for (int t = half; t < p.num_tokens; t += 2) {
        x.load(p.x + static_cast<int64_t>(t) * Room<S>::K);
        signal_wait(m.of_shared, 0);
        const float sum = eight(x.times_plain(m.shared + row * Room<S>::ROW));
        if (lane % 8 == 0) *part(t, MAX_CHOSEN) = sum;
    }
    meet<COMPUTING>();
    if (half == 0 && lane < AT_ONCE) signal_arrive(m.empty + p.num_slots - AT_ONCE + lane);
    if (warp < p.num_tokens)
        tell_values(m.parts + ((warp * EXPERTS + MAX_CHOSEN) * 4 + lane % 4) * WARPS, 1, true, words_of(p, turn, warp, MAX_CHOSEN) + blockIdx.x);
    for (int t = 0; t < p.num_tokens; t++) {
        if (p.num_tokens > 1 || half) x.load(p.x + static_cast<int64_t>(t) * Room<S>::K);
#pragma unroll 1
        for (int c = half; c < MAX_CHOSEN; c += 2) {
            int slot;
            const char* const fill = await(p, m, 2 * (t * MAX_CHOSEN + c) + row / 2, slot);
            const auto* const scales = reinterpret_cast<const uint8_t*>(fill + Room<S>::CODES) + row % 2 * (Room<S>::K / 16);
            const float sum = x.times_codes(fill + row % 2 * (Room<S>::K / 2), scales);
            __syncwarp();
            if (lane % 16 == 0) signal_arrive(m.empty + slot);
            const float all = eight(sum);
            if (lane % 8 == 0) *part(t, c) = all;
        }
    }
    meet<COMPUTING>();
    if (warp < p.num_tokens)
        tell_values(m.parts + (warp * EXPERTS * 4 + lane) * WARPS, m.factors[warp * MAX_CHOSEN + lane / 4], false, words_of(p, turn, warp, lane / 4) + blockIdx.x);
}

// This block's rows of the way down.
template <int S>
__device__ __forceinline__ void way_down(const Few& p, const Room<S>& m, uint32_t turn) {
    constexpr int ROWS = Room<S>::DOWN_ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, u = lane % 8, expert = warp % WARPS, half = warp / WARPS;
    const auto places = [&](int token, const uint32_t* (&at)[4]) {
        const uint32_t* const first = words_of(p, turn, token, expert) + u * 8;
        at[0] = first, at[1] = first + 4, at[2] = first + 64, at[3] = first + 68;
    };
    signal_wait(m.of_shared_down, 0);
    for (int t = 0; t < p.num_tokens; t++) {
        const uint32_t* const at[1] = {words_of(p, turn, t, MAX_CHOSEN) + lane * 4};
        uint4 v[1];
        hear(at, v), hear_all(at, v);
#pragma unroll
        for (int r = 0; r < ROWS / (2 * WARPS); r++) {
            const int row = warp * (ROWS / (2 * WARPS)) + r;
            const uint4 w = *reinterpret_cast<const uint4*>(m.shared_down + row * INNER * 2 + lane * 16);
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) sum += of_pair(word_of(w, k / 2), k % 2) * of_pair(word_of(v[0], k / 2), k % 2);
#pragma unroll
            for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
            if (lane == 0) m.down_parts[(t * EXPERTS + MAX_CHOSEN) * ROWS + row] = sum;
        }
    }
    const uint32_t* at[4];
    uint4 ahead[4];
    places(0, at);
    hear(at, ahead);
#pragma unroll 1
    for (int t = 0; t < p.num_tokens; t++) {
        hear_all(at, ahead);
        const uint4 low[2] = {ahead[0], ahead[1]}, high[2] = {ahead[2], ahead[3]};
        if (t + 1 < p.num_tokens) places(t + 1, at), hear(at, ahead);
        int slot;
        const int choice = t * MAX_CHOSEN + expert;
        const char* const fill = await(p, m, 2 * MAX_CHOSEN * p.num_tokens + choice, slot);
        const auto* const scales = reinterpret_cast<const uint8_t*>(fill + Room<S>::CODES);
        const float weight = m.weights[choice];
#pragma unroll 2
        for (int r = half * (ROWS / 2) + lane / 8; r < (half + 1) * (ROWS / 2); r += 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(fill + r * (INNER / 2) + u * 16);
            const float sum = eight(unit(v, low, high, scale_of(scales[r * 16 + u]), scale_of(scales[r * 16 + 8 + u])));
            if (u == 0) m.down_parts[(t * EXPERTS + expert) * ROWS + r] = sum * weight;
        }
        __syncwarp();
        if (lane < WARPS / 2) signal_arrive(m.empty + slot);
    }
}

template <int S>
__global__ void __launch_bounds__(FEW_THREADS, 1) few(const __grid_constant__ Few p) {
    constexpr int ROWS = Room<S>::DOWN_ROWS;
    const Room<S> m(reinterpret_cast<char*>(aligned_shared()), p.num_slots, p.num_tokens);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.num_slots; i++) signal_init(m.full + i, 1), signal_init(m.empty + i, WARPS);
        signal_init(m.of_shared, 1), signal_init(m.of_shared_down, 1), signal_init(m.of_choice, p.num_tokens);
        signals_ready();
    }
    __syncthreads();
    if (threadIdx.x >= COMPUTING) return ask_for_weights(p, m);
    wait_for_kernel();
    const auto turn = static_cast<uint32_t>(fresh(reinterpret_cast<const int*>(p.state)));
    gate_and_up(p, m, turn);
    let_dependents_start();  // neither sooner nor later: what they ask for comes while blocks wait for one another
    // For the next mixture. The one before this has read all of it.
    if (threadIdx.x < FEW_TOKENS * EXPERTS) tell(words_of(p, turn + 1, 0, threadIdx.x) + blockIdx.x, NOTHING);
    way_down(p, m, turn);
    meet<COMPUTING>();
    for (int i = threadIdx.x; i < p.num_tokens * ROWS; i += COMPUTING) {
        const int t = i / ROWS, row = i % ROWS;
        const float* const part = m.down_parts + t * EXPERTS * ROWS + row;
        float sum = part[MAX_CHOSEN * ROWS];
#pragma unroll
        for (int c = 0; c < MAX_CHOSEN; c++) sum += part[c * ROWS];
        p.out[static_cast<int64_t>(t) * Room<S>::K + blockIdx.x * ROWS + row] = __float2bfloat16(sum);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.state = turn + 1;  // all have told, so all have read it
}

}  // namespace forebay
