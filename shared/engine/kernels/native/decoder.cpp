// A whole step of a dense decoder in one call: threads are called once, nothing is allocated.
//
// The residual stream is float32; what enters a matrix product is T. Structures and signatures are mirrored in
// kernels/native.py.
#include <new>

#include "attention.h"
#include "crew.h"
#include "rows.h"
#include "team.h"

namespace forebay {

struct Layer {
    const float* input_norm;
    Linear qkv;
    const float *q_norm, *k_norm;  // or null
    Linear output;
    const float* post_norm;
    Linear gate_up;  // a panel is 16 columns of gate, then the same 16 of up
    Linear down;
};

struct Model {
    int64_t hidden, num_heads, num_kv_heads, head_dim, inner, num_layers;
    float eps;
    const Layer* layers;
    const float* final_norm;
    Linear head;
    const void* embedding;
};

struct Step {
    int64_t num_tokens, num_sequences, num_sampled;
    const int32_t *token_ids, *positions, *query_starts, *context_lens, *page_starts, *page_ids, *sampled_rows;
    const float *cos, *sin;  // [T, head_dim / 2]
    char* pool;              // keys of layer 0 in page 0
    int64_t page_bytes, page_size, layer_stride, kind_stride, head_stride;  // strides in elements
    float* logits;  // [R, panels of the head * 32]
    char* workspace;
};

inline int64_t num_phases(const Model& m) { return 8 * m.num_layers + 3; }

// Where the intermediate results of a step are.
template <class T> struct Buffers {
    float *x, *qkv;
    T *normed, *q, *attended, *inner;
    Scratch<T>* scratch;
    Phase* phases;
    int64_t num_bytes;

    Buffers(const Model& m, int64_t tokens, int num_threads, char* base) {
        Room room{base};
        const int64_t q_size = m.num_heads * m.head_dim;
        room.place(scratch, num_threads);
        room.place(phases, num_phases(m));
        room.place(x, tokens * panels_of(m.hidden));
        room.place(qkv, tokens * panels_of(q_size + 2 * m.num_kv_heads * m.head_dim));
        room.place(normed, tokens * (m.hidden + 1));
        room.place(q, tokens * q_size);
        room.place(attended, tokens * q_size);
        room.place(inner, tokens * (m.inner + LANES));
        num_bytes = room.num_bytes;
    }
};

// One thread's view of a step.
template <class T> struct Worker : Member<T> {
    using Member<T>::each, Member<T>::product, Member<T>::project, Member<T>::words, Member<T>::phase;

    const Model& m;
    const Step& s;
    Buffers<T> b;
    // Rows of words: lengths in elements, made even for pairs.
    long x_stride = panels_of(m.hidden), q_size = m.num_heads * m.head_dim, kv_size = m.num_kv_heads * m.head_dim;
    long qkv_stride = panels_of(q_size + 2 * kv_size);
    long normed_stride = words(m.hidden) * PER_WORD<T>, inner_stride = words(m.inner) * PER_WORD<T>;

    void embed() {
        each(s.num_tokens, [&](long t) {
            convert((const T*)m.embedding + s.token_ids[t] * m.hidden, m.hidden, b.x + t * x_stride);
        });
    }

    void norm(const float* weight, const int32_t* rows, long num_rows) {
        each(num_rows, [&](long i) {
            T* out = b.normed + i * normed_stride;
            if (m.hidden < normed_stride) memset(out + m.hidden, 0, sizeof(T));
            rms_norm(b.x + (rows ? rows[i] : i) * x_stride, weight, m.hidden, m.eps, out);
        });
    }

    // x += a w' + bias.
    void project_residual(const T* a, long stride, const Linear& w) {
        float* x = b.x;
        const long out_stride = x_stride;
        product(a, stride, s.num_tokens, w, [=](long row, long column, const float* sums) {
            float* to = x + row * out_stride + column;
            for (int c = 0; c < PANEL; c += LANES) {
                f32x16 v = load<f32x16>(sums + c);
                if (w.bias) v += load<f32x16>(w.bias + column + c);
                store(to + c, load<f32x16>(to + c) + v);
            }
        });
    }

    // Queries to b.q as [Hkv][T][heads per KV head][D], keys and values to the pages.
    void rotate_and_append(const Layer& layer, const Pages& pages) {
        const long group = m.num_heads / m.num_kv_heads, dim = m.head_dim, half = dim / 2;
        long sequence = 0;
        each(s.num_tokens, [&](long t) {
            while (s.query_starts[sequence + 1] <= t) sequence++;
            const int32_t* page_ids = s.page_ids + s.page_starts[sequence];
            const float *row = b.qkv + t * qkv_stride, *cos = s.cos + t * half, *sin = s.sin + t * half;
            for (long h = 0; h < m.num_heads; h++) {
                T* out = b.q + ((h / group * s.num_tokens + t) * group + h % group) * dim;
                norm_rotate(row + h * dim, layer.q_norm, m.eps, cos, sin, dim, out);
            }
            for (long h = 0; h < m.num_kv_heads; h++) {
                T* key = pages.key<T>(page_ids, s.positions[t], h);
                norm_rotate(row + q_size + h * dim, layer.k_norm, m.eps, cos, sin, dim, key);
                convert(row + q_size + kv_size + h * dim, dim, key + pages.to_value());
            }
        });
    }

    // b.attended [T][H D]. A unit is a KV head of a tile of tokens.
    void attention(const Pages& pages) {
        const long heads = m.num_kv_heads, tile_tokens = MAX_QUERIES / (m.num_heads / heads);
        const auto tiles_of = [&](long q) {
            return (s.query_starts[q + 1] - s.query_starts[q] + tile_tokens - 1) / tile_tokens;
        };
        long count = 0, sequence = 0, before = 0;
        for (long q = 0; q < s.num_sequences; q++) count += tiles_of(q);
        share(*phase++, (int)(count * heads), 1, [&](int unit, int) {
            const long tile = unit / heads;
            while (tile >= before + tiles_of(sequence)) before += tiles_of(sequence++);
            const long first = s.query_starts[sequence] + (tile - before) * tile_tokens;
            const long left = s.query_starts[sequence + 1] - first;
            attend_tile(pages, sequence, unit % heads, first, std::min(left, tile_tokens));
        });
    }

    void attend_tile(const Pages& pages, long sequence, long head, long first, long num_tokens) const {
        const long group = m.num_heads / m.num_kv_heads, dim = m.head_dim;
        Scratch<T>& scratch = b.scratch[this->thread];
        int32_t positions[MAX_QUERIES];
        const int num_queries = (int)(num_tokens * group);
        for (int i = 0; i < num_queries; i++) positions[i] = s.positions[first + i / group];
        const T* q = b.q + (head * s.num_tokens + first) * group * dim;
        attend<T>((const uint32_t*)q, positions, num_queries, s.context_lens[sequence],
                  s.page_ids + s.page_starts[sequence], pages, head, scratch);
        for (int i = 0; i < num_queries; i++) {
            T* out = b.attended + (first + i / group) * q_size + (head * group + i % group) * dim;
            const f32x16 scale = splat(1.0f / scratch.totals[i]);
            for (long d = 0; d < dim; d += LANES)
                put(out + d, load<f32x16>(scratch.attended + i * MAX_HEAD_DIM + d) * scale);
        }
    }

    void layer(long index) {
        const Layer& layer = m.layers[index];
        char* first = s.pool + index * s.layer_stride * (long)sizeof(T);
        const Pages pages{first, s.page_bytes, s.page_size, s.kind_stride, s.head_stride, m.head_dim};
        norm(layer.input_norm, nullptr, s.num_tokens);
        project(b.normed, normed_stride, s.num_tokens, layer.qkv, b.qkv, qkv_stride);
        rotate_and_append(layer, pages);
        attention(pages);
        project_residual(b.attended, q_size, layer.output);
        norm(layer.post_norm, nullptr, s.num_tokens);
        this->project_gated(b.normed, normed_stride, s.num_tokens, layer.gate_up, b.inner, inner_stride);
        project_residual(b.inner, inner_stride, layer.down);
    }

    void run() {
        memset(b.scratch[this->thread].zeros, 0, sizeof b.scratch[this->thread].zeros);
        embed();
        for (long index = 0; index < m.num_layers; index++) layer(index);
        norm(m.final_norm, s.sampled_rows, s.num_sampled);
        project(b.normed, normed_stride, s.num_sampled, m.head, s.logits, m.head.num_panels * PANEL);
    }
};

template <class T> void forward(const Model& model, const Step& step, Team& team) {
    const Buffers<T> buffers(model, step.num_tokens, team.size, step.workspace);
    for (int64_t i = 0; i < num_phases(model); i++) new (buffers.phases + i) Phase;
    team.run([&](int thread) { Worker<T>{{buffers.phases, thread, team.size}, model, step, buffers}.run(); });
}

}  // namespace forebay

using namespace forebay;

extern "C" {

Team* forebay_team_create(int num_threads) { return new Team(num_threads); }

void forebay_team_destroy(Team* team) { delete team; }

int64_t forebay_workspace_bytes(const Model* model, const Team* team, int is_bf16, int64_t num_tokens) {
    return is_bf16 ? Buffers<bf16>(*model, num_tokens, team->size, nullptr).num_bytes
                   : Buffers<float>(*model, num_tokens, team->size, nullptr).num_bytes;
}

void forebay_forward(const Model* model, Team* team, int is_bf16, const Step* step) {
    is_bf16 ? forward<bf16>(*model, *step, *team) : forward<float>(*model, *step, *team);
}
}
