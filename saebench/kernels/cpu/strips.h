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

constexpr int STRIP_VECTORS = 4;
constexpr int64_t STRIP = STRIP_VECTORS * LANES;  // columns whose sums stay in registers

// Whether rows are asked for so often that it pays to copy strips of them, which leave half of that cache to others.
bool in_strips(int64_t entries, int64_t rows) {
    return entries > 4 * rows && 2 * rows * STRIP * (int64_t)sizeof(float) <= second_level_cache();
}

// Room for so many floats, which the calling thread keeps from call to call: the system takes longer to hand out fresh memory than it takes
// to fill. One for each PURPOSE.
enum Purpose { STRIPS, SUMS };
template <Purpose PURPOSE>
float* kept(int64_t count) {
    static thread_local Array<float> memory;
    if ((int64_t)memory.size() < count) memory.resize(count);
    return memory.data();
}

// STRIP columns of some rows, one row after the other, the last ones 0 where there are fewer.
struct Strip {
    float* rows;  // [num, STRIP]
    int64_t num, count = 0;

    explicit Strip(int64_t num) : rows(kept<STRIPS>(num * STRIP)), num(num) {}
    // From a column on; `from` gives the i-th row of so many columns.
    template <class From>
    void copy(const From& from, int64_t width, int64_t column) {
        count = std::min(STRIP, width - column);
        if (count < STRIP) std::fill(rows, rows + num * STRIP, 0.f);
        for (int64_t i = 0; i < num; i++) std::copy_n(from(i) + column, count, rows + i * STRIP);
    }
    // The rows of a token's entries, times each of some values, onto sums, in the order of `add_rows`. Indices count from the `first` row on.
    template <int SUMS>
    void decode(const Entries& entries, const float* const (&values)[SUMS], int64_t token, Floats (&sums)[SUMS][STRIP_VECTORS],
                int64_t first = 0) const {
        const float* all_rows = rows + first * STRIP;
        const auto row = [&](int64_t e) { return all_rows + entries.indices[e] * STRIP; };
        int64_t e = entries.begin(token);
        for (const int64_t end = entries.end(token); e + 4 <= end; e += 4) {
            const float* of[4] = {row(e), row(e + 1), row(e + 2), row(e + 3)};
#pragma GCC unroll 4
            for (int n = 0; n < STRIP_VECTORS; n++) {
                const Floats at[4] = {load(of[0] + n * LANES), load(of[1] + n * LANES), load(of[2] + n * LANES), load(of[3] + n * LANES)};
#pragma GCC unroll 2
                for (int s = 0; s < SUMS; s++) {
                    const float* v = values[s] + e;
                    sums[s][n] += (all(v[0]) * at[0] + all(v[1]) * at[1]) + (all(v[2]) * at[2] + all(v[3]) * at[3]);
                }
            }
        }
        for (; e < entries.end(token); e++)
            for (int n = 0; n < STRIP_VECTORS; n++)
                for (int s = 0; s < SUMS; s++) sums[s][n] += all(values[s][e]) * load(row(e) + n * LANES);
    }
    // Onto `out` [SUMS, stride] the products of each `x` with the rows of a token's entries.
    template <int SUMS>
    void products(const Entries& entries, int64_t token, const Floats (&x)[SUMS][STRIP_VECTORS], float* out, int64_t stride) const {
        static_assert(STRIP_VECTORS == 4);
        const auto product = [&](int64_t e, int s) {
            const float* of = rows + entries.indices[e] * STRIP;
            return (x[s][0] * load(of) + x[s][1] * load(of + LANES)) + (x[s][2] * load(of + 2 * LANES) + x[s][3] * load(of + 3 * LANES));
        };
        int64_t e = entries.begin(token);
        for (; e + 4 <= entries.end(token); e += 4)
#pragma GCC unroll 2
            for (int s = 0; s < SUMS; s++)
                add_sums({product(e, s), product(e + 1, s), product(e + 2, s), product(e + 3, s)}, out + s * stride + e);
        for (; e < entries.end(token); e++)
            for (int s = 0; s < SUMS; s++) out[s * stride + e] += sum(product(e, s));
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
