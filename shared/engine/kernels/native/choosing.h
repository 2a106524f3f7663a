// The choice of tokens of sparse attention (DSA): index scores of a step's rows against the keys in their pages, and the
// best of each row. Twin of `select` in kernels/sparse_reference.py.
//
// A unit of work is (up to 240 successive rows of a sequence, a range of its keys). It walks its keys in spans of 32, each
// packed once, and of a row keeps only what may yet be chosen, which are the scores above the K-th best so far: few,
// behind the first keys. The order of additions depends on nothing but the model's shape, and a choice is that of all
// scores however rows and keys are shared out. Structures and signatures are mirrored in kernels/native.py.
#pragma once
#include <new>

#include "crew.h"
#include "index.h"
#include "team.h"

namespace forebay {

constexpr long LEAST_KEYS = 4096;  // of a range: each finds the best of its own
// Rows that share a pass over the keys: as many as what is found for them lets stay in a core's cache, or nearly.
constexpr long MOST_ROWS = 240, LEAST_ROWS = 60, FOUND_BYTES = 1 << 20;

struct IndexStep {
    int64_t num_rows, num_parts, num_heads, top_k, q_is_bf16;
    const uint32_t* q;          // [T, heads, dim]
    const float* head_weights;  // [T, heads], scaled
    const int64_t* positions;   // [T], successive in a sequence
    const int64_t* first_pages; // [T], places in page_ids
    const int64_t* page_ids;
    const int64_t* parts;       // [parts, 2]: sequences to choose for, by their first rows and those behind their last
    IndexKeys keys;
    int64_t* chosen;            // [T, K]
    char* workspace;
};

// Rows [first, last) of one sequence.
struct Block {
    long first, last;
};

// How a step is divided, and where its intermediate results are.
struct Choosing {
    const IndexStep& s;
    const long capacity = 2 * s.top_k + 2 * SPAN;  // of what is found for a row
    const long most_rows = std::clamp<long>(FOUND_BYTES / (capacity * sizeof(uint64_t)), LEAST_ROWS, MOST_ROWS);
    long num_blocks = 0, num_ranges = 1;
    int64_t thread_bytes, num_bytes;
    Phase* phases;
    char* scratch;
    int64_t* num_found;  // [T, ranges]
    uint64_t* found;     // [T, ranges, K]

    Choosing(const IndexStep& s, int num_threads) : s(s) {
        long most_keys = 0;
        for (long part = 0; part < s.num_parts; part++) {
            num_blocks += blocks_of(part);
            most_keys = std::max<long>(most_keys, s.positions[s.parts[2 * part + 1] - 1] + 1);
        }
        if (num_threads > 1) num_ranges = std::clamp(4 * num_threads / num_blocks, 1L, most_keys / LEAST_KEYS + 1);
        thread_bytes = align(s.keys.dim * (2 * SPAN + 1) * sizeof(float)) +
                       align((most_rows + 1) * capacity * sizeof(uint64_t));
        const int64_t lists = num_ranges > 1 ? s.num_rows * num_ranges : 0;
        Room room{s.workspace};
        room.place(phases, 2);
        room.place(scratch, num_threads * thread_bytes);
        room.place(num_found, lists);
        room.place(found, lists * s.top_k);
        num_bytes = room.num_bytes;
    }

    // Before any thread chooses.
    void begin() const {
        for (int i = 0; i < 2; i++) new (phases + i) Phase;
    }

    long num_units() const { return num_blocks * num_ranges; }

    long blocks_of(long part) const {
        return (s.parts[2 * part + 1] - s.parts[2 * part] + most_rows - 1) / most_rows;
    }

    Block block_of(long index) const {
        long part = 0;
        for (; index >= blocks_of(part); part++) index -= blocks_of(part);
        const long first = s.parts[2 * part] + index * most_rows;
        return {first, std::min<long>(s.parts[2 * part + 1], first + most_rows)};
    }
};

// The best of one row of `num` found, in rising order behind as many -1 as are missing.
inline void put_chosen(const IndexStep& s, long row, const uint64_t* found, long num) {
    int64_t* chosen = s.chosen + row * s.top_k;
    std::fill(chosen, chosen + s.top_k - num, -1);
    for (long i = 0; i < num; i++) chosen[s.top_k - num + i] = position_of(found[i]);
}

// One thread's view of a step.
template <class T> struct Chooser {
    const IndexStep& s;
    const Choosing& c;
    uint32_t* panel;
    T *room, *zeros;
    uint64_t *found, *spare;  // [rows of a block, capacity], [capacity]
    long num_found[MOST_ROWS];
    float least[MOST_ROWS];

    Chooser(const Choosing& c, int thread) : s(c.s), c(c) {
        float* values = (float*)(c.scratch + thread * c.thread_bytes);
        panel = (uint32_t*)values;
        room = (T*)(values + s.keys.dim * SPAN);
        zeros = (T*)(values + 2 * s.keys.dim * SPAN);
        std::fill(zeros, zeros + s.keys.dim, T{});
        found = (uint64_t*)(c.scratch + thread * c.thread_bytes + align(s.keys.dim * (2 * SPAN + 1) * sizeof(float)));
        spare = found + c.most_rows * c.capacity;
    }

    void run() {
        share(c.phases[0], (int)c.num_units(), 1, [&](int unit, int) { search(unit); });
        if (c.num_ranges == 1) return;
        share(c.phases[1], (int)c.num_blocks, 1, [&](int index, int) {
            const Block block = c.block_of(index);
            for (long row = block.first; row < block.last; row++) merge(row);
        });
    }

    // The best of a block of rows in one range of keys.
    void search(long unit) {
        const Block block = c.block_of(unit / c.num_ranges);
        const long end = s.positions[block.last - 1] + 1, num_rows = block.last - block.first;
        const long spans = ((end + SPAN - 1) / SPAN + c.num_ranges - 1) / c.num_ranges, range = unit % c.num_ranges;
        std::fill(num_found, num_found + num_rows, 0);
        std::fill(least, least + num_rows, -INFINITY);
        const long stop = std::min(end, (range + 1) * spans * SPAN);
        for (long start = range * spans * SPAN; start < stop; start += SPAN) search_span(block, start, end);
        for (long i = 0; i < num_rows; i++) keep(i);
        for (long i = 0; i < num_rows; i++) {
            const long row = block.first + i, list = row * c.num_ranges + range;
            const uint64_t* own = found + i * c.capacity;
            if (c.num_ranges == 1) {
                put_chosen(s, row, own, num_found[i]);
            } else {
                c.num_found[list] = num_found[i];
                std::copy(own, own + num_found[i], c.found + list * s.top_k);
            }
        }
    }

    void search_span(const Block& block, long start, long end) {
        const long words = s.keys.dim / PER_WORD<T>, heads = s.num_heads;
        pack_span(s.keys, s.page_ids + s.first_pages[block.first], start, end, zeros, room, panel);
        // Rows before the first of these keys see none of them.
        long row = block.first + std::max(0L, start - s.positions[block.first]);
        for (int rows; row < block.last; row += rows) {
            rows = (int)std::min<long>(SCORED_ROWS, block.last - row);
            alignas(64) float scores[SCORED_ROWS * SPAN];
            uint32_t above[SCORED_ROWS];
            score_rows<T>(rows, s.q + row * heads * words, s.head_weights + row * heads, heads, words, panel,
                          least + (row - block.first), scores, above);
            for (int r = 0; r < rows; r++) {
                const long num_visible = s.positions[row + r] + 1 - start;
                if (num_visible < SPAN) above[r] &= (1u << num_visible) - 1;
                if (above[r]) add(row - block.first + r, scores + r * SPAN, above[r], start);
            }
        }
    }

    void add(long i, const float* scores, uint32_t above, long start) {
        uint64_t* own = found + i * c.capacity;
        for (; above; above &= above - 1) {
            const int at = __builtin_ctz(above);
            own[num_found[i]++] = found_at(scores[at], start + at);
        }
        if (num_found[i] > c.capacity - SPAN) keep(i);
    }

    void keep(long i) {
        if (num_found[i] <= s.top_k) return;
        num_found[i] = keep_highest(found + i * c.capacity, num_found[i], s.top_k, spare);
        least[i] = score_of(spare[s.top_k - 1]);
    }

    // The best of what was found for a row in all ranges, which are in the order of their keys.
    void merge(long row) {
        long num = 0;
        for (long range = 0; range < c.num_ranges; range++) {
            const long list = row * c.num_ranges + range;
            std::copy(c.found + list * s.top_k, c.found + list * s.top_k + c.num_found[list], found + num);
            num = keep_highest(found, num + c.num_found[list], s.top_k, spare);
        }
        put_chosen(s, row, found, num);
    }
};

}  // namespace forebay
