// Gradients of matrices of latent rows, summed where they are used, and Adam's step with them (methods.md K3, K12).
//
// A sum has the order of a latent's entries, which is that of the tokens, so it comes out the same with any number of threads.
#include "strips.h"

// One part of a gradient that is not summed yet (primitives.py: Term).
struct Term {
    const int32_t *order, *starts, *tokens;  // by latent: entry, where a latent begins, token
    const float *values, *rows;              // by entry; by token
    int64_t num;                             // tokens
};

namespace {

struct Gradient {
    const Term* terms;
    int32_t num_terms;
    const float *dense, *own;
    int64_t d_sae, width;

    // What is no term; false: nothing.
    bool begin(int64_t f, const float* w_row, float* __restrict g) const {
        if (dense)
            std::memcpy(g, dense + f * width, width * sizeof(float));
        else
            std::memset(g, 0, width * sizeof(float));
        if (own && own[f] != 0.f) add_scaled(g, own[f], w_row, width);
        return dense || (own && own[f] != 0.f);
    }
    bool sum(int64_t f, const float* w_row, float* __restrict g) const {
        bool any = begin(f, w_row, g);
        for (int32_t i = 0; i < num_terms; i++) {
            const Term& term = terms[i];
            Gather gather(g, width);
            for (int32_t at = term.starts[f]; at < term.starts[f + 1]; at++)
                gather.add(term.values[term.order[at]], term.rows + (int64_t)term.tokens[at] * width);
            gather.finish();
            any = any || term.starts[f] < term.starts[f + 1];
        }
        return any;
    }
};

// The same gradient in strips of columns; terms of the same rows share their strips.
struct InStrips {
    const Gradient& gradient;
    std::vector<std::vector<int64_t>> starts;  // of each term
    std::vector<Array<float>> values;          // of each term, by latent
    std::vector<int64_t> first;                // of each term: where its rows begin among all
    std::vector<const float*> rows;            // all rows that are asked for
    int64_t entries = 0;

    explicit InStrips(const Gradient& gradient) : gradient(gradient) {
        for (int32_t i = 0; i < gradient.num_terms; i++) {
            const Term& term = gradient.terms[i];
            int32_t same = 0;
            while (same < i && (gradient.terms[same].rows != term.rows || gradient.terms[same].num != term.num)) same++;
            first.push_back(same < i ? first[same] : (int64_t)rows.size());
            if (same == i)
                for (int64_t t = 0; t < term.num; t++) rows.push_back(term.rows + t * gradient.width);
            entries += term.starts[gradient.d_sae];
        }
    }
    bool pays() const { return in_strips(entries, rows.size()) && entries > 4 * gradient.d_sae; }

    // To be called before `sum`.
    void order() {
        for (int32_t i = 0; i < gradient.num_terms; i++) {
            const Term& term = gradient.terms[i];
            starts.emplace_back(term.starts, term.starts + gradient.d_sae + 1);
            values.emplace_back(starts[i].back());
            for (int64_t at = 0; at < starts[i].back(); at++) values[i][at] = term.values[term.order[at]];
        }
    }
    void sum(const Strip& strip, int64_t f, Floats (&sums)[1][STRIP_VECTORS]) const {
        for (Floats& each : sums[0]) each = Floats{};
        for (int32_t i = 0; i < gradient.num_terms; i++)
            strip.decode<1>({gradient.terms[i].tokens, nullptr, starts[i].data(), 0}, {values[i].data()}, f, sums, first[i]);
    }
};

static inline void remove_along(float* __restrict g, const float* __restrict w_row, int64_t width) {
    const float square = std::max(dot(w_row, w_row, width), 1e-24f);
    add_scaled(g, -dot(g, w_row, width) / square, w_row, width);
}

static inline float widened(uint16_t bits) {
    const uint32_t all = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
}

static inline uint16_t rounded(float x) {  // to the nearest bfloat16, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Adam's step: weights, momentum in float32 or in bfloat16 (`m16`), mean of squares (null: no step is taken).
struct Step {
    float* w;
    float* m;
    uint16_t* m16;
    float* v;
    float size, beta1, beta2, less1, less2, per_root, eps;

    float operator()(float& m, float& v, float g) const {
        m = beta1 * m + less1 * g;
        v = beta2 * v + less2 * (g * g);
        return size * m / (std::sqrt(v) * per_root + eps);
    }
    // Of n weights from the `at`-th on, whose gradient is g.
    void take(int64_t at, int64_t n, const float* __restrict g) const {
        float *__restrict w_row = w + at, *__restrict v_row = v + at;
        if (m) {
            float* __restrict m_row = m + at;
            for (int64_t p = 0; p < n; p++) w_row[p] -= (*this)(m_row[p], v_row[p], g[p]);
        } else {
            uint16_t* __restrict m_row = m16 + at;
            for (int64_t p = 0; p < n; p++) {
                float now = widened(m_row[p]);
                w_row[p] -= (*this)(now, v_row[p], g[p]);
                m_row[p] = rounded(now);
            }
        }
    }
};

static inline float length_of(const float* row, int64_t width) { return std::sqrt(dot(row, row, width)); }

// What is done with the gradient of a row: Adam's step, of rows that are kept at length 1 along them.
struct Rows {
    const Step& step;
    int64_t width;
    bool unit;
    float *squares, *lengths;  // [d_sae]: of the gradient; of the new rows, or null

    void take(int64_t f, float* __restrict g, bool any) const {
        float* __restrict w_row = step.w + f * width;
        if (any) {
            if (unit) remove_along(g, w_row, width);
            squares[f] = dot(g, g, width);
        }
        if (!step.v) return;
        step.take(f * width, width, g);
        if (unit) {
            const float length = std::max(length_of(w_row, width), 1e-12f);
            for (int64_t p = 0; p < width; p++) w_row[p] /= length;
        }
        if (lengths) lengths[f] = length_of(w_row, width);
    }
};

void step_by_rows(const Gradient& gradient, const Rows& rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Array<float> g(gradient.width);
#pragma omp for schedule(dynamic, 32)
        for (int64_t f = 0; f < gradient.d_sae; f++) {
            const bool any = gradient.sum(f, rows.step.w + f * gradient.width, g.data());
            rows.take(f, g.data(), any);
        }
    }
}

constexpr int64_t GROUP_BYTES = 8 << 20;  // of gradients that are summed in strips before their rows take a step

// Sums of a group of latents, strip by strip, and then the steps of their rows.
void step_in_strips(InStrips& parts_of, const Rows& rows, int threads) {
    const Gradient& gradient = parts_of.gradient;
    const int64_t width = gradient.width, d_sae = gradient.d_sae;
    const int64_t group = std::min(d_sae, std::max<int64_t>(64, GROUP_BYTES / (width * (int64_t)sizeof(float))));
    const int64_t strips = (width + STRIP - 1) / STRIP;
    const int64_t parts = std::max<int64_t>(2, 2 * threads / strips);  // of a group, so that all threads have work
    float* const sums = kept<SUMS>(strips * group * STRIP);            // [strip, latent, STRIP]
    parts_of.order();
#pragma omp parallel num_threads(threads)
    {
        Array<float> g(width);
        Strip strip(parts_of.rows.size());
        int64_t held = -1;  // the number of the strip at hand
        for (int64_t first = 0; first < d_sae; first += group) {
            const int64_t some = std::min(group, d_sae - first);
#pragma omp for schedule(dynamic, 1)
            for (int64_t part = 0; part < strips * parts; part++) {
                const int64_t number = part / parts;
                if (number != held) strip.copy([&](int64_t t) { return parts_of.rows[t]; }, width, number * STRIP), held = number;
                for (int64_t i = some * (part % parts) / parts; i < some * (part % parts + 1) / parts; i++) {
                    Floats found[1][STRIP_VECTORS];
                    parts_of.sum(strip, first + i, found);
                    for (int n = 0; n < STRIP_VECTORS; n++) store(sums + (number * group + i) * STRIP + n * LANES, found[0][n]);
                }
            }
#pragma omp for schedule(dynamic, 32)
            for (int64_t i = 0; i < some; i++) {
                gradient.begin(first + i, rows.step.w + (first + i) * width, g.data());
                for (int64_t number = 0; number < strips; number++)
                    add_scaled(g.data() + number * STRIP, 1.f, sums + (number * group + i) * STRIP, std::min(STRIP, width - number * STRIP));
                rows.take(first + i, g.data(), true);
            }
        }
    }
}

}  // namespace

extern "C" {

void saebench_sums(const Term* term, int64_t d_sae, int64_t width, int threads, float* out) {
    const Gradient gradient{term, 1, nullptr, nullptr, d_sae, width};
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (int64_t f = 0; f < d_sae; f++) gradient.sum(f, nullptr, out + f * width);
}

// Of the rows, or with `from` of what they are beyond it.
void saebench_row_lengths(const float* w, const float* from, int64_t num, int64_t width, int threads, float* lengths) {
#pragma omp parallel num_threads(threads)
    {
        Array<float> beyond(from ? width : 0);
#pragma omp for schedule(dynamic, 64)
        for (int64_t f = 0; f < num; f++) {
            const float* row = w + f * width;
            if (from) {
                for (int64_t p = 0; p < width; p++) beyond[p] = row[p] - from[p];
                row = beyond.data();
            }
            lengths[f] = length_of(row, width);
        }
    }
}

// An upper bound of the gradient's norm from the lengths of rows alone; lengths[i] are those of term i's rows, w_norms those of w.
double saebench_gradient_bound(const Term* terms, int32_t num_terms, const float* const* lengths, const float* own, const float* w,
                               int64_t d_sae, int64_t width, int threads) {
    double total = 0;
#pragma omp parallel for schedule(dynamic, 256) num_threads(threads) reduction(+ : total)
    for (int64_t f = 0; f < d_sae; f++) {
        double most = own && own[f] != 0.f ? std::fabs(own[f]) * std::sqrt((double)dot(w + f * width, w + f * width, width)) : 0;
        for (int32_t i = 0; i < num_terms; i++)
            for (int32_t at = terms[i].starts[f]; at < terms[i].starts[f + 1]; at++)
                most += std::fabs((double)terms[i].values[terms[i].order[at]]) * lengths[i][terms[i].tokens[at]];
        total += most * most;
    }
    return total;
}

// One pass over the latents: Adam's step with momentum `m`, or `m16` in bfloat16, in place. Returns the sum of squares of the gradient (before
// `factor`): by latent first, then in order of the latents, so that threads do not change it. With `lengths`, those of the new rows.
double saebench_latents(float* w, float* m, uint16_t* m16, float* v, const Term* terms, int32_t num_terms, const float* dense, const float* own,
                        int64_t d_sae, int64_t width, int unit, float factor, float lr, float beta1, float beta2, float eps,
                        double correction1, double correction2, int threads, float* lengths) {
    const Gradient gradient{terms, num_terms, dense, own, d_sae, width};
    const Step step{w, m, m16, v, (float)(lr / correction1), beta1, beta2, (1 - beta1) * factor, (1 - beta2) * factor * factor,
                    (float)(1 / std::sqrt(correction2)), eps};
    std::vector<float> squares(d_sae);
    const Rows rows{step, width, (bool)unit, squares.data(), lengths};
    InStrips in_strips(gradient);
    if (in_strips.pays())
        step_in_strips(in_strips, rows, threads);
    else
        step_by_rows(gradient, rows, threads);
    double total = 0;
    for (int64_t f = 0; f < d_sae; f++) total += squares[f];
    return total;
}
}
