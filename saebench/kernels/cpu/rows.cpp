// Weighted sums of rows and dot products with rows, over the entries of sparse codes (methods.md K1 to K3, K12).
//
// By latent: entry positions in `order`, those of latent f at starts[f] .. starts[f + 1], in token order, so sums come out the same with any
// number of threads.
#include "strips.h"

namespace {

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
        dots<4>(row, of, width, out + e);
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
        Floats first[STRIP_VECTORS], sums[SUMS][STRIP_VECTORS], wanted[STRIP_VECTORS];
        const int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
        for (int64_t column = 0; column < width; column += STRIP) {
            strip.copy([&](int64_t f) { return w + f * width; }, width, column);
            strip.read(bias + column, first);
            for (int64_t t = tokens * own / team; t < tokens * (own + 1) / team; t++) {
                strip.read(y + t * width + column, wanted);
                for (int n = 0; n < SUMS; n++)
                    for (int v = 0; v < STRIP_VECTORS; v++) sums[n][v] = first[v] - wanted[v];
                strip.decode<SUMS>(entries, values, t, sums);
                strip.write(sums[0], error + t * width + column);
                for (int n = 0; n < SUMS; n++) {
                    const Floats(&s)[STRIP_VECTORS] = sums[n];
                    squares[n * tokens + t] += sum((s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]));
                }
                strip.products<SUMS>(entries, t, sums, out, last);
            }
        }
    }
}

template <int SUMS>
void errors(const Entries& entries, const float* const (&values)[SUMS], const float* w, const float* bias, const float* y, int64_t tokens,
            int64_t width, int64_t d_sae, int threads, float* error, float* squares, float* out) {
    if (in_strips(entries.end(tokens - 1), d_sae))
        return errors_in_strips<SUMS>(entries, values, w, bias, y, tokens, width, d_sae, threads, error, squares, out);
    const int64_t last = entries.end(tokens - 1);
#pragma omp parallel num_threads(threads)
    {
        Array<float> others((SUMS - 1) * (width + LANES));
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
    if (in_strips(entries.end(tokens - 1), d_sae)) {
#pragma omp parallel num_threads(threads)
        {
            Strip strip(d_sae);
            Floats first[STRIP_VECTORS], sums[1][STRIP_VECTORS];
#pragma omp for schedule(dynamic, 1)
            for (int64_t column = 0; column < width; column += STRIP) {
                strip.copy([&](int64_t f) { return w + f * width; }, width, column);
                strip.read(bias + column, first);
                for (int64_t t = 0; t < tokens; t++) {
                    std::copy(first, first + STRIP_VECTORS, sums[0]);
                    strip.decode<1>(entries, {values}, t, sums);
                    strip.write(sums[0], out + t * width + column);
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
    Array<float> sums(PARTS * width);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        Gather gather(sums.data() + part * width, width);
        for (int64_t i = num * part / PARTS; i < num * (part + 1) / PARTS; i++) gather.add(weights[i], rows + i * width);
        gather.finish();
    }
    std::memset(out, 0, width * sizeof(float));
    for (int64_t part = 0; part < PARTS; part++) add_scaled(out, 1.f, sums.data() + part * width, width);
}

// The sum of the values of each latent's entries: of every fourth, and then these, so that one addition need not wait for the last.
void saebench_totals(const int32_t* order, const int32_t* starts, const float* values, int64_t d_sae, int threads, float* out) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (int64_t f = 0; f < d_sae; f++) {
        float parts[4]{};
        const int32_t end = starts[f + 1];
        int32_t at = starts[f];
        for (; at + 4 <= end; at += 4)
            for (int i = 0; i < 4; i++) parts[i] += values[order[at + i]];
        for (; at < end; at++) parts[0] += values[order[at]];
        out[f] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
}

// Stable counting sort of entries by latent: starts [F + 1], order [N].
void saebench_by_latent(const int32_t* indices, int64_t count, int64_t d_sae, int32_t* starts, int32_t* order) {
    std::fill(starts, starts + d_sae + 1, 0);
    for (int64_t e = 0; e < count; e++) starts[indices[e] + 1]++;
    for (int64_t f = 0; f < d_sae; f++) starts[f + 1] += starts[f];
    Array<int32_t> next(starts, starts + d_sae);
    for (int64_t e = 0; e < count; e++) order[next[indices[e]]++] = (int32_t)e;
}
}
