// Weighted sums of rows and dot products with rows, over the entries of sparse codes (methods.md K1 to K3, K12).
//
// By latent: entry positions in `order`, those of latent f at starts[f] .. starts[f + 1], in token order, so sums come out the same with any
// number of threads.
#include "strips.h"

namespace {

// Weighted rows onto y, four at a time; those with weight 0 are left out.
struct Gather {
    float* y;
    int64_t width;
    float weights[4]{};
    const float* rows[4]{};
    int count = 0;
    Gather(float* y, int64_t width) : y(y), width(width) {}
    void add(float weight, const float* row) {
        if (weight == 0.f) return;
        weights[count] = weight;
        rows[count++] = row;
        if (count == 4) {
            add_scaled4(y, weights, rows, width);
            count = 0;
        }
    }
    void finish() {
        for (int i = 0; i < count; i++) add_scaled(y, weights[i], rows[i], width);
        count = 0;
    }
};

constexpr int64_t AHEAD = 8;  // entries whose rows are on their way from memory

// Onto each of the sums y the rows of a token's entries with these values, four at a time, while later rows are asked for. `last` is the end of
// all entries.
template <int SUMS>
void add_rows(const Entries& entries, const float* const (&values)[SUMS], int64_t token, int64_t last, const float* w, int64_t width,
              float* const (&y)[SUMS]) {
    int64_t e = entries.begin(token);
    const auto row = [&](int64_t entry) { return w + entries.indices[std::min(entry, last - 1)] * width; };
    for (; e + 4 <= entries.end(token); e += 4) {
        const float *rows[4], *later[4];
        Floats weights[SUMS][4];
        for (int i = 0; i < 4; i++) {
            rows[i] = row(e + i), later[i] = row(e + AHEAD + i);
            for (int n = 0; n < SUMS; n++) weights[n][i] = all(values[n][e + i]);
        }
        int64_t p = 0;
        for (; p + LANES <= width; p += LANES) {
            Floats at[4];
            for (int i = 0; i < 4; i++) __builtin_prefetch(later[i] + p), at[i] = load(rows[i] + p);
#pragma GCC unroll 2
            for (int n = 0; n < SUMS; n++)
                store(y[n] + p, load(y[n] + p) + ((weights[n][0] * at[0] + weights[n][1] * at[1]) + (weights[n][2] * at[2] + weights[n][3] * at[3])));
        }
        for (; p < width; p++)
            for (int n = 0; n < SUMS; n++) {
                const float* v = values[n] + e;
                y[n][p] += (v[0] * rows[0][p] + v[1] * rows[1][p]) + (v[2] * rows[2][p] + v[3] * rows[3][p]);
            }
    }
    for (; e < entries.end(token); e++)
        for (int n = 0; n < SUMS; n++) add_scaled(y[n], values[n][e], row(e), width);
}

// One token's products with the rows of all its entries; an entry of value 0 may stand for a window that wants its gradient.
void products(const Entries& entries, int64_t token, const float* row, const float* w, int64_t width, float* out) {
    int64_t e = entries.begin(token);
    for (; e + 4 <= entries.end(token); e += 4) {
        const float* of[4];
        for (int i = 0; i < 4; i++) of[i] = w + entries.indices[e + i] * width;
        dots<4>(&row, of, width, out + e);
    }
    for (; e < entries.end(token); e++) out[e] = dot(row, w + entries.indices[e] * width, width);
}

// Errors y_hat + bias - y of decoding with each of some values, of which the first is kept, their squares [SUMS, tokens] and products with the rows
// of entries [SUMS, N].
template <int SUMS>
void errors_in_strips(const Entries& entries, const float* const (&values)[SUMS], const float* w, const float* bias, const float* y,
                      int64_t tokens, int64_t width, int64_t d_sae, int threads, float* error, float* squares, float* out) {
    const int64_t last = entries.end(tokens - 1);
    std::fill(squares, squares + SUMS * tokens, 0.f);
    std::fill(out, out + SUMS * last, 0.f);
#pragma omp parallel num_threads(threads)
    {
        Strip strip(d_sae);
        Floats first[STRIP_VECTORS], sums[STRIP_VECTORS], wanted[STRIP_VECTORS];
        const int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
        for (int64_t column = 0; column < width; column += STRIP) {
            strip.copy(w, width, column);
            strip.read(bias + column, first);
            for (int64_t t = tokens * own / team; t < tokens * (own + 1) / team; t++) {
                strip.read(y + t * width + column, wanted);
                for (int n = 0; n < SUMS; n++) {
                    for (int v = 0; v < STRIP_VECTORS; v++) sums[v] = first[v] - wanted[v];
                    strip.decode(entries, values[n], t, sums);
                    if (n == 0) strip.write(sums, error + t * width + column);
                    squares[n * tokens + t] += sum((sums[0] * sums[0] + sums[1] * sums[1]) + (sums[2] * sums[2] + sums[3] * sums[3]));
                    strip.products(entries, t, sums, out + n * last);
                }
            }
        }
    }
}

template <int SUMS>
void errors(const Entries& entries, const float* const (&values)[SUMS], const float* w, const float* bias, const float* y, int64_t tokens,
            int64_t width, int64_t d_sae, int threads, float* error, float* squares, float* out) {
    if (in_strips(entries, tokens, d_sae))
        return errors_in_strips<SUMS>(entries, values, w, bias, y, tokens, width, d_sae, threads, error, squares, out);
    const int64_t last = entries.end(tokens - 1);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> others((SUMS - 1) * (width + LANES));
#pragma omp for schedule(dynamic, 16)
        for (int64_t t = 0; t < tokens; t++) {
            float* rows[SUMS];
            for (int n = 0; n < SUMS; n++) rows[n] = n ? others.data() + (n - 1) * (width + LANES) : error + t * width;
            for (int64_t p = 0; p < width; p++)
                for (int n = 0; n < SUMS; n++) rows[n][p] = bias[p] - y[t * width + p];
            add_rows<SUMS>(entries, values, t, last, w, width, rows);
            for (int n = 0; n < SUMS; n++) {
                squares[n * tokens + t] = dot(rows[n], rows[n], width);
                products(entries, t, rows[n], w, width, out + n * last);
            }
        }
    }
}

}  // namespace

extern "C" {

// bias + the sums
void saebench_decode(const int32_t* indices, const float* values, const int64_t* offsets, int64_t k, const float* w, const float* bias,
                     int64_t tokens, int64_t width, int64_t d_sae, int threads, float* out) {
    const Entries entries{indices, values, offsets, k};
    if (in_strips(entries, tokens, d_sae)) {
#pragma omp parallel num_threads(threads)
        {
            Strip strip(d_sae);
            Floats first[STRIP_VECTORS], sums[STRIP_VECTORS];
#pragma omp for schedule(dynamic, 1)
            for (int64_t column = 0; column < width; column += STRIP) {
                strip.copy(w, width, column);
                strip.read(bias + column, first);
                for (int64_t t = 0; t < tokens; t++) {
                    std::copy(first, first + STRIP_VECTORS, sums);
                    strip.decode(entries, values, t, sums);
                    strip.write(sums, out + t * width + column);
                }
            }
        }
        return;
    }
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        std::memcpy(out + t * width, bias, width * sizeof(float));
        add_rows<1>(entries, {values}, t, entries.end(tokens - 1), w, width, {out + t * width});
    }
}

// The error of decoding, y_hat + bias - y [tokens, width], its squares by token, and its products with the rows that made it, while these are at
// hand.
void saebench_decode_error(const int32_t* indices, const float* values, const int64_t* offsets, int64_t k, const float* w,
                           const float* bias, const float* y, int64_t tokens, int64_t width, int64_t d_sae, int threads, float* error,
                           float* squares, float* out) {
    errors<1>({indices, values, offsets, k}, {values}, w, bias, y, tokens, width, d_sae, threads, error, squares, out);
}

// The same, and beside it squares and products for other values at the same entries, whose errors are not kept; squares and out hold both.
void saebench_decode_error_pair(const int32_t* indices, const float* values, const int64_t* offsets, int64_t k, const float* beside,
                                const float* w, const float* bias, const float* y, int64_t tokens, int64_t width, int64_t d_sae, int threads,
                                float* error, float* squares, float* out) {
    errors<2>({indices, values, offsets, k}, {values, beside}, w, bias, y, tokens, width, d_sae, threads, error, squares, out);
}

void saebench_dots(const int32_t* indices, const float* values, const int64_t* offsets, int64_t k, const float* rows, const float* w,
                   int64_t tokens, int64_t width, int threads, float* out) {
    const Entries entries{indices, values, offsets, k};
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) products(entries, t, rows + t * width, w, width, out);
}

// sum of weights[i] * row i: parts of the rows first, the same parts for any number of threads, and then these in order.
void saebench_weighted_sum(const float* weights, const float* rows, int64_t num, int64_t width, int threads, float* out) {
    constexpr int64_t PARTS = 64;
    std::vector<float> sums(PARTS * width);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        Gather gather(sums.data() + part * width, width);
        for (int64_t i = num * part / PARTS; i < num * (part + 1) / PARTS; i++) gather.add(weights[i], rows + i * width);
        gather.finish();
    }
    std::memset(out, 0, width * sizeof(float));
    for (int64_t part = 0; part < PARTS; part++) add_scaled(out, 1.f, sums.data() + part * width, width);
}

// Stable counting sort of entries by latent: starts [F + 1], order [N].
void saebench_by_latent(const int32_t* indices, int64_t count, int64_t d_sae, int32_t* starts, int32_t* order) {
    std::fill(starts, starts + d_sae + 1, 0);
    for (int64_t e = 0; e < count; e++) starts[indices[e] + 1]++;
    for (int64_t f = 0; f < d_sae; f++) starts[f + 1] += starts[f];
    std::vector<int32_t> next(starts, starts + d_sae);
    for (int64_t e = 0; e < count; e++) order[next[indices[e]]++] = (int32_t)e;
}

// One part of a gradient that is not summed yet (primitives.py: Term).
struct Term {
    const int32_t *order, *starts, *tokens;  // by latent: entry, where a latent begins, token
    const float *values, *rows;              // by entry; by token
};

}  // extern "C"

namespace {

struct Gradient {
    const Term* terms;
    int32_t num_terms;
    const float *dense, *own;
    int64_t width;

    bool sum(int64_t f, const float* w_row, float* __restrict g) const {  // false: all zero
        bool any = false;
        if (dense)
            std::memcpy(g, dense + f * width, width * sizeof(float)), any = true;
        else
            std::memset(g, 0, width * sizeof(float));
        if (own && own[f] != 0.f) add_scaled(g, own[f], w_row, width), any = true;
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

static inline void remove_along(float* __restrict g, const float* __restrict w_row, int64_t width) {
    const float square = std::max(dot(w_row, w_row, width), 1e-24f);
    add_scaled(g, -dot(g, w_row, width) / square, w_row, width);
}

}  // namespace

extern "C" {

void saebench_sums(const Term* term, int64_t d_sae, int64_t width, int threads, float* out) {
    const Gradient gradient{term, 1, nullptr, nullptr, width};
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (int64_t f = 0; f < d_sae; f++) gradient.sum(f, nullptr, out + f * width);
}

void saebench_row_lengths(const float* w, int64_t d_sae, int64_t width, int threads, float* lengths) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (int64_t f = 0; f < d_sae; f++) lengths[f] = std::sqrt(dot(w + f * width, w + f * width, width));
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

struct Step {
    float size, beta1, beta2, less1, less2, per_root, eps;
    float operator()(float& m, float& v, float g) const {
        m = beta1 * m + less1 * g;
        v = beta2 * v + less2 * (g * g);
        return size * m / (std::sqrt(v) * per_root + eps);
    }
};

// One pass over the latents. With `m`, or `m16` in bfloat16: Adam's step, in place. Returns the sum of squares of the gradient (before `factor`): by latent
// first, then in order of the latents, so that threads do not change it. With `lengths`, those of the new rows.
double saebench_latents(float* w, float* m, uint16_t* m16, float* v, const Term* terms, int32_t num_terms, const float* dense, const float* own,
                        int64_t d_sae, int64_t width, int unit, float factor, float lr, float beta1, float beta2, float eps,
                        double correction1, double correction2, int threads, float* lengths) {
    const Gradient gradient{terms, num_terms, dense, own, width};
    const Step step{(float)(lr / correction1), beta1, beta2, (1 - beta1) * factor, (1 - beta2) * factor * factor,
                    (float)(1 / std::sqrt(correction2)), eps};
    std::vector<float> squares(d_sae);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> memory(width);
        float* __restrict g = memory.data();
#pragma omp for schedule(dynamic, 32)
        for (int64_t f = 0; f < d_sae; f++) {
            float* __restrict w_row = w + f * width;
            const bool any = gradient.sum(f, w_row, g);
            if (any) {
                if (unit) remove_along(g, w_row, width);
                squares[f] = dot(g, g, width);
            }
            if (!v) continue;
            float* __restrict v_row = v + f * width;
            if (m) {
                float* __restrict m_row = m + f * width;
                for (int64_t p = 0; p < width; p++) w_row[p] -= step(m_row[p], v_row[p], g[p]);
            } else {
                uint16_t* __restrict m_row = m16 + f * width;
                for (int64_t p = 0; p < width; p++) {
                    float now = widened(m_row[p]);
                    w_row[p] -= step(now, v_row[p], g[p]);
                    m_row[p] = rounded(now);
                }
            }
            if (unit) {
                const float length = std::max(std::sqrt(dot(w_row, w_row, width)), 1e-12f);
                for (int64_t p = 0; p < width; p++) w_row[p] /= length;
            }
            if (lengths) lengths[f] = std::sqrt(dot(w_row, w_row, width));
        }
    }
    double total = 0;
    for (int64_t f = 0; f < d_sae; f++) total += squares[f];
    return total;
}
}
