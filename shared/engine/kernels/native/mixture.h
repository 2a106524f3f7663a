// A mixture of experts behind a sigmoid router with a correction bias (DeepSeek-V3's noaux_tc).
#pragma once
#include "crew.h"

namespace forebay {

struct Routing {
    int64_t num_experts, num_chosen, num_groups, num_chosen_groups, normalize;
    float scale;
    const float* bias;  // of the choice alone
};

// The highest of `num` values that are not taken yet, of equals the first; there is always one.
inline long take_highest(const float* values, bool* taken, long num) {
    long best = -1;
    for (long i = 0; i < num; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = true;
    return best;
}

// Leave in `choice` only what belongs to the best groups, by the sum of their two best (DeepSeek-V3, section 2.1.2).
inline void keep_best_groups(const Routing& r, float* choice, float* sums, bool* taken) {
    const long size = r.num_experts / r.num_groups;
    for (long g = 0; g < r.num_groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (long e = g * size; e < (g + 1) * size; e++) {
            if (choice[e] > best) second = best, best = choice[e];
            else if (choice[e] > second) second = choice[e];
        }
        sums[g] = best + second;
    }
    std::fill(taken, taken + r.num_groups, false);
    for (long i = 0; i < r.num_chosen_groups; i++) take_highest(sums, taken, r.num_groups);
    for (long g = 0; g < r.num_groups; g++)
        if (!taken[g]) std::fill(choice + g * size, choice + (g + 1) * size, -INFINITY);
}

// The experts of one token in rising order, and their weights, from `logits` [experts], which are overwritten.
// `room` holds twice as many floats, and `taken` as many flags.
inline void route(const Routing& r, float* logits, float* room, bool* taken, int32_t* experts, float* weights) {
    float *scores = logits, *choice = room;
    for (long e = 0; e < r.num_experts; e++) {
        scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        choice[e] = scores[e] + r.bias[e];
    }
    if (r.num_groups > 1) keep_best_groups(r, choice, room + r.num_experts, taken);
    std::fill(taken, taken + r.num_experts, false);
    for (long i = 0; i < r.num_chosen; i++) experts[i] = (int32_t)take_highest(choice, taken, r.num_experts);
    float total = 1e-20f;
    for (long i = 0; i < r.num_chosen; i++) total += scores[experts[i]];
    std::sort(experts, experts + r.num_chosen);
    for (long i = 0; i < r.num_chosen; i++)
        weights[i] = (r.normalize ? scores[experts[i]] / total : scores[experts[i]]) * r.scale;
}

// Which rows of a step go to which of a rank's experts: those of one expert lie together, in the order of tokens.
struct Dispatch {
    int32_t* experts;   // [T, k], rising
    float* weights;     // [T, k]
    int32_t* places;    // [T, k]: where a token's row for an expert lies; -1: not here
    int32_t* tokens;    // [places]
    int64_t* starts;    // [own experts + 1]: the first place of each
    int64_t* units;     // [own experts + 1]: the first unit of each, of one product

    void allocate(Room& room, int64_t num_tokens, int64_t num_chosen, int64_t num_own) {
        const int64_t most = num_tokens * num_chosen;
        room.place(experts, most);
        room.place(weights, most);
        room.place(places, most);
        room.place(tokens, most);
        room.place(starts, num_own + 1);
        room.place(units, num_own + 1);
    }

    void plan(long num_tokens, long num_chosen, long first, long num_own) const {
        const long most = num_tokens * num_chosen;
        std::fill(starts, starts + num_own + 1, 0);
        for (long i = 0; i < most; i++)
            if (const long own = experts[i] - first; own >= 0 && own < num_own) starts[own + 1]++;
        for (long own = 0; own < num_own; own++) starts[own + 1] += starts[own];
        std::copy(starts, starts + num_own, units);  // the next place of each, for now
        for (long i = 0; i < most; i++) {
            const long own = experts[i] - first;
            places[i] = own >= 0 && own < num_own ? (int32_t)units[own]++ : -1;
            if (places[i] >= 0) tokens[places[i]] = (int32_t)(i / num_chosen);
        }
        units[0] = 0;
        for (long own = 0; own < num_own; own++) units[own + 1] = units[own] + num_blocks(starts[own + 1] - starts[own]);
    }
};

}  // namespace forebay
