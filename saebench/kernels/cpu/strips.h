// Entries of sparse codes, and weighted sums of rows in strips of columns that stay in the second-level cache.
//
// A row that is gathered from the third-level cache or from memory costs what its bytes cost. Where rows are asked for often, a strip of all of
// them is copied to memory of its own first: a few columns of rows that lie where they are would share few sets of the cache.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

// Those of token t are offsets[t] .. offsets[t + 1], or t k .. (t + 1) k where offsets is null.
struct Entries {
    const int32_t* indices;
    const float* values;
    const int64_t* offsets;
    int64_t k;
    int64_t begin(int64_t token) const { return offsets ? offsets[token] : token * k; }
    int64_t end(int64_t token) const { return offsets ? offsets[token + 1] : (token + 1) * k; }
};

constexpr int STRIP_VECTORS = 4;
constexpr int64_t STRIP = STRIP_VECTORS * LANES;  // columns whose sums stay in registers

// Whether rows are asked for so often that it pays to copy strips of them, which leave half of that cache to others.
bool in_strips(const Entries& entries, int64_t tokens, int64_t d_sae) {
    return entries.end(tokens - 1) > 4 * d_sae && 2 * d_sae * STRIP * (int64_t)sizeof(float) <= second_level_cache();
}

// `count` <= STRIP columns of all rows of a matrix, the rest 0, in memory that a thread keeps from call to call: the system takes longer to
// hand out fresh memory than a strip takes to fill.
struct Strip {
    float* rows;  // [num, STRIP]
    int64_t num, count = 0;

    explicit Strip(int64_t num) : num(num) {
        static thread_local std::vector<float> memory;
        if ((int64_t)memory.size() < num * STRIP) memory.resize(num * STRIP);
        rows = memory.data();
    }
    void copy(const float* from, int64_t width, int64_t column) {
        count = std::min(STRIP, width - column);
        if (count < STRIP) std::fill(rows, rows + num * STRIP, 0.f);
        for (int64_t i = 0; i < num; i++) std::copy_n(from + i * width + column, count, rows + i * STRIP);
    }

    const float* row(const Entries& entries, int64_t e) const { return rows + entries.indices[e] * STRIP; }

    // The rows of a token's entries, times values, onto sums, in the order of `add_rows`.
    void decode(const Entries& entries, const float* values, int64_t token, Floats (&sums)[STRIP_VECTORS]) const {
        int64_t e = entries.begin(token);
        for (const int64_t end = entries.end(token); e + 4 <= end; e += 4) {
            const float* of[4] = {row(entries, e), row(entries, e + 1), row(entries, e + 2), row(entries, e + 3)};
            const float* v = values + e;
#pragma GCC unroll 4
            for (int n = 0; n < STRIP_VECTORS; n++) {
                const auto part = [&](int i) { return all(v[i]) * load(of[i] + n * LANES); };
                sums[n] += (part(0) + part(1)) + (part(2) + part(3));
            }
        }
        for (; e < entries.end(token); e++)
            for (int n = 0; n < STRIP_VECTORS; n++) sums[n] += all(values[e]) * load(row(entries, e) + n * LANES);
    }
    // Onto `out` the products of `x` with the rows of a token's entries.
    void products(const Entries& entries, int64_t token, const Floats (&x)[STRIP_VECTORS], float* out) const {
        static_assert(STRIP_VECTORS == 4);
        const auto product = [&](int64_t e) {
            const float* of = row(entries, e);
            return (x[0] * load(of) + x[1] * load(of + LANES)) + (x[2] * load(of + 2 * LANES) + x[3] * load(of + 3 * LANES));
        };
        int64_t e = entries.begin(token);
        for (; e + 4 <= entries.end(token); e += 4) add_sums({product(e), product(e + 1), product(e + 2), product(e + 3)}, out + e);
        for (; e < entries.end(token); e++) out[e] += sum(product(e));
    }
    void read(const float* from, Floats (&to)[STRIP_VECTORS]) const {
        float padded[STRIP] = {};
        if (count < STRIP) from = std::copy_n(from, count, padded) - count;
        for (int n = 0; n < STRIP_VECTORS; n++) to[n] = load(from + n * LANES);
    }
    void write(const Floats (&from)[STRIP_VECTORS], float* to) const {
        float padded[STRIP];
        float* whole = count < STRIP ? padded : to;
        for (int n = 0; n < STRIP_VECTORS; n++) store(whole + n * LANES, from[n]);
        if (count < STRIP) std::copy_n(padded, count, to);
    }
};

}  // namespace
