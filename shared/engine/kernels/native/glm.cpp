// A layer of a GLM-5 decoder in one call: latent attention over the tokens that its indexer, or an earlier one, selected,
// and a dense MLP or a mixture of experts.
//
// Ranks that share a layer out ask for its two parts one by one, and add up what each makes in between. What leaves a
// part, what enters a product and what is cached is T, as in layers/glm_layer.py, the twin; all between is float32, and
// every sum is taken in an order that depends on the token alone. Structures are mirrored in kernels/native_glm.py.
#include <optional>

#include "choosing.h"
#include "latent.h"
#include "mixture.h"
#include "rows.h"

namespace forebay {

struct GlmLayer {
    int64_t hidden, num_heads, q_lora, kv_lora, nope, rope, value_dim, index_heads, index_dim;
    int64_t inner, expert_inner, first_expert, num_own_experts;  // inner: of the dense MLP, or of the shared expert
    float eps, latent_eps, key_norm_eps;
    const float *input_norm, *query_norm, *latent_norm, *key_norm, *key_norm_bias, *post_norm;
    Linear low;               // to the low rank of queries, latent, rotary key; of an indexer its key, weights of heads
    Linear query;             // heads [nope + rope]; of an indexer its queries
    Linear up_key, up_value;  // of the first head; the others are behind it
    Linear output, gate_up, down;
    Linear router;  // float32; without panels: no mixture
    Linear expert_gate_up, expert_down;  // of the rank's first expert; the others are behind it
    Routing routing;

    bool selects() const { return index_heads > 0; }
    bool mixes() const { return router.num_panels > 0; }
    long latent_dim() const { return kv_lora + rope; }
    long head_dim() const { return nope + rope; }
};

struct GlmStep {
    int64_t num_tokens, num_parts;
    const int64_t *positions, *first_pages, *page_ids, *own_pages, *own_offsets;  // [T], but all page_ids
    const int64_t* parts;      // [parts, 2]: rows of the sequences that are longer than what is selected
    const float* turns;        // [T, rope / 2], complex
    const void* x;             // [T, hidden]
    void* out;
    PagedRows latents;
    IndexKeys keys;            // no values: tokens are selected already
    int64_t* selection;        // [T, K], rising, behind -1
    int64_t num_selected;      // K
    char* workspace;
};

enum GlmPart { ATTENTION = 1, MLP = 2 };  // both: x is added to what each makes

constexpr int NUM_GLM_PHASES = 24;

// Rotary embedding of neighbouring pairs (Su et al. 2021, equation 34).
template <class T> inline void rotate_pairs(const float* x, const float* turns, long dim, T* out) {
    float turned[512];
    for (long i = 0; i < dim; i += 2) {
        turned[i] = x[i] * turns[i] - x[i + 1] * turns[i + 1];
        turned[i + 1] = x[i] * turns[i + 1] + x[i + 1] * turns[i];
    }
    convert(turned, dim, out);
}

// (x - mean) / deviation * weight + bias, in place.
inline void layer_norm(float* x, const float* weight, const float* bias, long n, float eps) {
    float mean = 0, square = 0;
    for (long i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(square / n + eps);
    for (long i = 0; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// Where the intermediate results of a layer are.
template <class T> struct GlmBuffers {
    Phase* phases;
    float *low, *queries, *head_weights, *scratch, *logits, *routing, *shared, *made, *wide;
    T *normed, *q_low, *nope, *q, *index_q, *attended, *values, *middle, *inner, *gathered, *expert_inner;
    bool* taken;
    char* choosing;
    Dispatch dispatch;
    int64_t thread_floats, num_bytes;

    GlmBuffers(const GlmLayer& m, const GlmStep& s, int num_threads) {
        const int64_t tokens = s.num_tokens, most = tokens * m.routing.num_chosen, hidden = panels_of(m.hidden);
        Room room{s.workspace};
        thread_floats = LatentScratch<T>::num_floats(m.latent_dim(), m.kv_lora) + LANES;
        room.place(phases, NUM_GLM_PHASES);
        room.place(scratch, thread_floats * num_threads);
        room.place(low, tokens * m.low.num_panels * PANEL);
        room.place(queries, tokens * m.query.num_panels * PANEL);
        room.place(head_weights, tokens * m.index_heads);
        room.place(normed, tokens * m.hidden);
        room.place(q_low, tokens * m.q_lora);
        room.place(nope, tokens * m.num_heads * m.nope);
        room.place(q, tokens * m.num_heads * m.latent_dim());
        room.place(index_q, tokens * m.index_heads * m.index_dim);
        room.place(attended, tokens * m.num_heads * m.kv_lora);
        room.place(values, tokens * m.num_heads * m.value_dim);
        room.place(middle, tokens * m.hidden);
        room.place(inner, tokens * m.inner);
        if (m.mixes()) {
            room.place(wide, tokens * m.hidden);
            room.place(logits, tokens * m.router.num_panels * PANEL);
            room.place(routing, tokens * 2 * m.routing.num_experts);
            room.place(taken, tokens * m.routing.num_experts);
            room.place(shared, tokens * hidden);
            room.place(gathered, most * m.hidden);
            room.place(expert_inner, most * m.expert_inner);
            room.place(made, most * hidden);
            dispatch.allocate(room, tokens, m.routing.num_chosen, m.num_own_experts);
        }
        room.place(choosing, 0);
        num_bytes = room.num_bytes;
    }
};

// What is to be chosen in a layer that selects for itself.
template <class T> IndexStep index_step(const GlmLayer& m, const GlmStep& s, const GlmBuffers<T>& b) {
    return {s.num_tokens, s.num_parts, m.index_heads, s.num_selected, sizeof(T) == sizeof(bf16), (const uint32_t*)b.index_q,
            b.head_weights, s.positions, s.first_pages, s.page_ids, s.parts, s.keys, s.selection, b.choosing};
}

template <class T> struct GlmWorker : Member<T> {
    using Member<T>::each, Member<T>::product, Member<T>::project, Member<T>::phase, Member<T>::thread;

    const GlmLayer& m;
    const GlmStep& s;
    const GlmBuffers<T>& b;
    const Choosing* choosing;  // if there is anything to choose
    bool adds;                 // x to what is made
    long low_stride = m.low.num_panels * PANEL, query_stride = m.query.num_panels * PANEL;

    void run(int parts) {
        const T *x = (const T*)s.x, *middle = parts & ATTENTION ? b.middle : x;
        if (parts & ATTENTION) attention(x, parts & MLP ? b.middle : (T*)s.out);
        if (parts & MLP) m.mixes() ? mixture(middle) : dense(middle);
    }

    // Rows of T, and if there is room for them the same as floats.
    void norm(const T* x, const float* weight, float* wide = nullptr) {
        each(s.num_tokens, [&](long t) {
            float row[m.hidden];
            convert(x + t * m.hidden, m.hidden, row);
            rms_norm(row, weight, m.hidden, m.eps, b.normed + t * m.hidden);
            if (wide) convert(b.normed + t * m.hidden, m.hidden, wide + t * m.hidden);
        });
    }

    // As `finish` of a product: rows of T of so many columns, x added if that is wanted.
    auto rows_of(T* out, const T* x) {
        return [=, this](long row, long column, const float* sums) {
            for (long c = column; c < std::min(column + PANEL, m.hidden); c += LANES) {
                const int num = (int)std::min<long>(LANES, m.hidden - c);
                f32x16 v = load<f32x16>(sums + c - column);
                if (adds) v += widen_some(x + row * m.hidden + c, num);
                put_some(out + row * m.hidden + c, v, num);
            }
        };
    }

    void attention(const T* x, T* out) {
        norm(x, m.input_norm);
        project(b.normed, m.hidden, s.num_tokens, m.low, b.low, low_stride);
        each(s.num_tokens, [&](long t) { keep(t); });
        project(b.q_low, m.q_lora, s.num_tokens, m.query, b.queries, query_stride);
        each(s.num_tokens, [&](long t) { part_queries(t); });
        by_heads(b.nope, m.nope, m.up_key, b.q, m.latent_dim(), m.kv_lora);
        if (choosing) Chooser<T>(*choosing, thread).run();
        attend();
        by_heads(b.attended, m.kv_lora, m.up_value, b.values, m.value_dim, m.value_dim);
        product(b.values, m.num_heads * m.value_dim, s.num_tokens, m.output, rows_of(out, x));
    }

    // Norms; the latent and the keys of a token to its page.
    void keep(long t) {
        float *row = b.low + t * low_stride, *latent = row + m.q_lora, *key = latent + m.latent_dim();
        const float* turns = s.turns + t * m.rope;
        T* to = s.latents.template at<T>(s.own_pages[t], s.own_offsets[t]);
        rms_norm(row, m.query_norm, m.q_lora, m.latent_eps, b.q_low + t * m.q_lora);
        rms_norm(latent, m.latent_norm, m.kv_lora, m.latent_eps, to);
        rotate_pairs(latent + m.kv_lora, turns, m.rope, to + m.kv_lora);
        if (!s.keys.values) return;
        layer_norm(key, m.key_norm, m.key_norm_bias, m.index_dim, m.key_norm_eps);
        const PagedRows keys{(char*)s.keys.values, s.keys.page_bytes, s.keys.page_size, s.keys.row_bytes};
        T* key_to = keys.template at<T>(s.own_pages[t], s.own_offsets[t]);
        rotate_pairs(key, turns, m.rope, key_to);
        convert(key + m.rope, m.index_dim - m.rope, key_to + m.rope);
        const float scale = 1.0f / sqrtf((float)m.index_heads * m.index_dim);
        for (long h = 0; h < m.index_heads; h++) b.head_weights[t * m.index_heads + h] = key[m.index_dim + h] * scale;
        fill_visible(t);
    }

    // All that a token sees, if that is no more than is selected.
    void fill_visible(long t) {
        int64_t* to = s.selection + t * s.num_selected;
        for (long i = 0; i < s.num_selected; i++)
            to[i] = std::max<int64_t>(-1, s.positions[t] - (s.num_selected - 1 - i));
    }

    // Queries of heads apart: without position to b.nope [T, H, nope], rotated to b.q [T, H, latent]; those of the indexer.
    void part_queries(long t) {
        const float *row = b.queries + t * query_stride, *turns = s.turns + t * m.rope;
        for (long h = 0; h < m.num_heads; h++, row += m.head_dim()) {
            const long at = t * m.num_heads + h;
            convert(row, m.nope, b.nope + at * m.nope);
            rotate_pairs(row + m.nope, turns, m.rope, b.q + at * m.latent_dim() + m.kv_lora);
        }
        if (!s.keys.values) return;
        T* to = b.index_q + t * m.index_heads * m.index_dim;
        for (long h = 0; h < m.index_heads; h++, row += m.index_dim, to += m.index_dim) {
            rotate_pairs(row, turns, m.rope, to);
            convert(row + m.rope, m.index_dim - m.rope, to + m.rope);
        }
    }

    // Each head's rows with its own matrix: from a [T, H, dim] to the first `width` columns of out [T, H, stride].
    void by_heads(const T* a, long dim, const Linear& first, T* out, long stride, long width) {
        const long units = first.num_panels * num_blocks(s.num_tokens), heads = m.num_heads;
        share(*phase++, (int)heads, 1, [&](int h, int) {
            Linear w = first;
            w.panels += h * w.num_panels * w.num_words * PANEL;
            const auto finish = [&](long row, long column, const float* sums) {
                for (int c = 0; c < PANEL; c += LANES)
                    put_columns(out + (row * heads + h) * stride, column + c, width, load<f32x16>(sums + c));
            };
            multiply<T>((const uint32_t*)(a + h * dim), heads * dim / PER_WORD<T>, s.num_tokens, w, 0, units, finish);
        });
    }

    // b.attended [T, H, kv_lora]. A unit is a token and up to 48 heads.
    void attend() {
        const long chunks = (m.num_heads + MAX_QUERIES - 1) / MAX_QUERIES;
        const float scale = 1.0f / sqrtf((float)m.head_dim());
        LatentScratch<T> scratch(m.latent_dim(), m.kv_lora, b.scratch + thread * b.thread_floats);
        share(*phase++, (int)(s.num_tokens * chunks), 1, [&](int unit, int) {
            const long t = unit / chunks, first = t * m.num_heads + unit % chunks * MAX_QUERIES;
            const int num = (int)std::min<long>(MAX_QUERIES, (t + 1) * m.num_heads - first);
            const int64_t *chosen = s.selection + t * s.num_selected, *end = chosen + s.num_selected;
            while (chosen < end && *chosen < 0) chosen++;
            attend_chosen((const uint32_t*)(b.q + first * m.latent_dim()), num, chosen, end - chosen,
                          s.page_ids + s.first_pages[t], s.latents, scale, scratch, b.attended + first * m.kv_lora);
        });
    }

    void dense(const T* x) {
        norm(x, m.post_norm);
        this->project_gated(b.normed, m.hidden, s.num_tokens, m.gate_up, b.inner, m.inner);
        product(b.inner, m.inner, s.num_tokens, m.down, rows_of((T*)s.out, x));
    }

    void mixture(const T* x) {
        const long experts = m.routing.num_experts, chosen = m.routing.num_chosen, stride = m.router.num_panels * PANEL;
        const Dispatch& d = b.dispatch;
        norm(x, m.post_norm, b.wide);
        project(b.wide, m.hidden, s.num_tokens, m.router, b.logits, stride);
        each(s.num_tokens, [&](long t) {
            route(m.routing, b.logits + t * stride, b.routing + t * 2 * experts, b.taken + t * experts,
                  d.experts + t * chosen, d.weights + t * chosen);
        });
        each(1, [&](long) { d.plan(s.num_tokens, chosen, m.first_expert, m.num_own_experts); });
        each(d.starts[m.num_own_experts], [&](long place) {
            std::copy_n(b.normed + d.tokens[place] * m.hidden, m.hidden, b.gathered + place * m.hidden);
        });
        this->project_gated(b.normed, m.hidden, s.num_tokens, m.gate_up, b.inner, m.inner);
        project(b.inner, m.inner, s.num_tokens, m.down, b.shared, panels_of(m.hidden));
        by_experts(b.gathered, m.hidden, m.expert_gate_up, this->gated(m.expert_gate_up, b.expert_inner, m.expert_inner));
        float* made = b.made;
        const long width = panels_of(m.hidden);
        by_experts(b.expert_inner, m.expert_inner, m.expert_down, [=](long row, long column, const float* sums) {
            std::copy_n(sums, PANEL, made + row * width + column);
        });
        each(s.num_tokens, [&](long t) { join(x, t); });
    }

    // Each of the rank's experts with the rows that are its own; `finish` gets rows as they lie.
    template <class Finish> void by_experts(const T* a, long dim, const Linear& first, Finish finish) {
        const Dispatch& d = b.dispatch;
        const long total = d.units[m.num_own_experts] * first.num_panels;
        share(*phase++, (int)total, (int)this->chunk_of(total, 1), [&](int begin, int last) {
            for (long unit = begin; unit < last;) {
                const int64_t* next = std::upper_bound(d.units, d.units + m.num_own_experts + 1, unit / first.num_panels);
                const long expert = next - d.units - 1, start = d.starts[expert], before = d.units[expert] * first.num_panels;
                const long end = std::min<long>(last, *next * first.num_panels);
                Linear w = first;
                w.panels += expert * w.num_panels * w.num_words * PANEL;
                multiply<T>((const uint32_t*)(a + start * dim), dim / PER_WORD<T>, d.starts[expert + 1] - start, w,
                            unit - before, end - before,
                            [&](long row, long column, const float* sums) { finish(start + row, column, sums); });
                unit = end;
            }
        });
    }

    // The shared expert and, in rising order, the chosen ones of a token.
    void join(const T* x, long t) {
        const long width = panels_of(m.hidden), chosen = m.routing.num_chosen;
        float* total = b.shared + t * width;
        for (long i = t * chosen; i < (t + 1) * chosen; i++) {
            if (b.dispatch.places[i] < 0) continue;
            const float* made = b.made + b.dispatch.places[i] * width;
            for (long c = 0; c < width; c += LANES)
                store(total + c, load<f32x16>(total + c) + load<f32x16>(made + c) * b.dispatch.weights[i]);
        }
        const auto finish = rows_of((T*)s.out, x);
        for (long c = 0; c < width; c += PANEL) finish(t, c, total + c);
    }
};

template <class T> int64_t glm_workspace_bytes(const GlmLayer& m, const GlmStep& s, int num_threads) {
    const GlmBuffers<T> b(m, s, num_threads);
    return b.num_bytes + (s.keys.values && s.num_parts ? Choosing(index_step(m, s, b), num_threads).num_bytes : 0);
}

template <class T> void compute(const GlmLayer& m, const GlmStep& s, Team& team, int parts) {
    const GlmBuffers<T> b(m, s, team.size);
    for (int i = 0; i < NUM_GLM_PHASES; i++) new (b.phases + i) Phase;
    const IndexStep index = index_step(m, s, b);
    const bool chooses = parts & ATTENTION && s.keys.values && s.num_parts;
    std::optional<Choosing> choosing;
    if (chooses) choosing.emplace(index, team.size), choosing->begin();
    team.run([&](int thread) {
        GlmWorker<T>{{b.phases, thread, team.size}, m, s, b, chooses ? &*choosing : nullptr, parts == (ATTENTION | MLP)}
            .run(parts);
    });
}

}  // namespace forebay

using namespace forebay;

extern "C" {

int64_t forebay_glm_workspace_bytes(const GlmLayer* layer, const GlmStep* step, const Team* team, int is_bf16) {
    return is_bf16 ? glm_workspace_bytes<bf16>(*layer, *step, team->size)
                   : glm_workspace_bytes<float>(*layer, *step, team->size);
}

void forebay_glm_layer(const GlmLayer* layer, const GlmStep* step, Team* team, int is_bf16, int parts) {
    is_bf16 ? compute<bf16>(*layer, *step, *team, parts) : compute<float>(*layer, *step, *team, parts);
}
}
