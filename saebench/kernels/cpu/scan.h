// What passes over all latents share: rows packed for the screen, in blocks and tiles, and the sums of a tile with a panel.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "screen.h"
#include "simd.h"

namespace {

constexpr int PANEL = 2 * LANES;        // latents whose sums are held together
constexpr int BLOCK_BYTES = 384 << 10;  // of packed latents: they stay in the second-level cache
constexpr int BLOCK_LATENTS = 512;

struct Problem {
    const float *x, *w, *b, *scale;  // [B, D], [F, D], [F], [F] or null
    const int32_t* latents;          // [M] or null: which rows of w take part
    int64_t tokens, width, num;      // B, D, M or F

    int64_t row(int64_t f) const { return latents ? latents[f] : f; }
    // Scores of one token with several latents, in float32.
    void scores(int64_t token, const int32_t* rows, int64_t count, float* z) const {
        const float* x_row = x + token * width;
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float *of[4], *later[4];
            for (int64_t j = 0; j < 4; j++) of[j] = w + rows[i + j] * width, later[j] = w + rows[std::min(i + 4 + j, count - 1)] * width;
            dots<4, 4>(x_row, of, width, z + i, later);
        }
        for (; i < count; i++) z[i] = dot(x_row, w + rows[i] * width, width);
        for (i = 0; i < count; i++) z[i] = finished(z[i], rows[i]);
    }
    // A score, of a token's product with a row.
    float finished(float product, int64_t row) const { return scale ? (product + b[row]) * scale[row] : product + b[row]; }
    // One more than the last row of w that takes part.
    int64_t end() const { return latents ? latents[num - 1] + 1 : num; }
};

template <class T>
struct Aligned {
    T* data;
    explicit Aligned(int64_t count) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, (count + 64) * sizeof(T))) throw std::bad_alloc();
        data = (T*)memory;
    }
    ~Aligned() { free(data); }
    Aligned(const Aligned&) = delete;
};

template <class Screen>
struct Tokens {
    static constexpr int TILE = Screen::TOKENS, STEP = Screen::WORDS;
    int64_t words, tiles;
    Aligned<typename Screen::word> packed;  // [tile][word / STEP][token of the tile][STEP]
    Array<float> unit, norm, missed;  // [B], padded to whole tiles
    bool finite = true;

    Tokens(const Problem& problem, int threads)
        : words(words_of<Screen>(problem.width)), tiles((problem.tokens + TILE - 1) / TILE), packed(tiles * TILE * words),
          unit(tiles * TILE), norm(unit), missed(unit) {
        const float float_error = (problem.width / 4 + 16) * 1.2e-7f;  // of float32 sums, here and in `dot`
        bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
        {
            Aligned<typename Screen::word> row_words(words);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < tiles * TILE; token++) {
                auto* to = packed.data + token / TILE * TILE * words + token % TILE * STEP;
                Row row{};
                const float* x = problem.x + token * problem.width;
                if (token < problem.tokens)
                    row = pack<Screen>(x, problem.width, words, row_words.data, x + problem.width);
                else
                    std::fill(row_words.data, row_words.data + words, 0);
                for (int64_t g = 0; g < words; g += STEP, to += TILE * STEP)
                    for (int64_t i = 0; i < STEP; i++) to[i] = shifted(row_words.data[g + i]);
                if (token >= problem.tokens) continue;
                unit[token] = row.unit;
                norm[token] = row.norm + row.missed;
                missed[token] = row.missed + row.norm * float_error;
                good = good && row.finite;
            }
        }
        finite = good;
    }

    static typename Screen::word shifted(typename Screen::word word) {
        if constexpr (Screen::SHIFTED)
            return word ^ (int32_t)0x80808080;
        else
            return word;
    }
};

// 16 rows of 16 words the other way round; rows lie `from_row` and `to_row` words apart.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define TRANSPOSES 1
static inline void transpose(const void* from, int64_t from_row, void* to, int64_t to_row) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512((const int32_t*)from + i * from_row);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // parts of four words: of rows 0 to 3 and 4 to 7, 8 to 11 and 12 to 15
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512((int32_t*)to + i * to_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512((int32_t*)to + (i + 4) * to_row, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512((int32_t*)to + (i + 8) * to_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512((int32_t*)to + (i + 12) * to_row, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

// `count` of all latents, every `stride`-th from `first` on.
struct Share {
    int64_t first, stride, count;

    static Share range(int64_t first, int64_t last) { return {first, 1, last - first}; }
    // The b-th of `parts`, each a fair sample: neighbours are often alike.
    static Share sample(int64_t b, int64_t parts, int64_t num) { return {b, parts, (num - b + parts - 1) / parts}; }
    int64_t latent(int64_t j) const { return first + j * stride; }
};

template <class Screen>
struct Block {
    int64_t size = 0, most;
    Aligned<typename Screen::word> packed, flat;  // [panel][word][latent of the panel]; of one panel [latent][word]
    Array<float> unit, bias, norm, missed, vague, limits;  // `vague`: how much the bias widens the bounds of a score
    Array<int32_t> start, row;                             // what sums begin with; which row of the matrix
    float longest = 0, worst = 0;              // the largest of norm and missed,
    Array<float> longest_of, worst_of;   // of each panel

    Block(int64_t most, int64_t words)
        : most(most), packed(most * words), flat(PANEL * words), unit(most), bias(most), norm(most), missed(most),
          vague(most), limits(most), start(most), row(most), longest_of(most / PANEL), worst_of(most / PANEL) {}

    int64_t padded() const { return (size + PANEL - 1) / PANEL * PANEL; }

    bool fill(const Problem& problem, const Share& share, int64_t words, const float* threshold) {
        size = share.count;
        const int64_t padded = this->padded();
        bool finite = true;
        longest = worst = 0;
        for (int64_t j = 0; j < padded; j++) {
            auto* to = flat.data + j % PANEL * words;
            if (j >= size) {
                std::fill(to, to + words, 0);
                unit[j] = norm[j] = missed[j] = vague[j] = 0;
                bias[j] = -INFINITY;
                limits[j] = INFINITY;
                start[j] = 0;
            } else {
                const int64_t f = row[j] = (int32_t)problem.row(share.latent(j));
                const float* next = problem.w + problem.row(share.latent(std::min(j + 1, size - 1))) * problem.width;
                const Row made = pack<Screen>(problem.w + f * problem.width, problem.width, words, to, next);
                const float scale = problem.scale ? problem.scale[f] : 1.f, b = problem.b[f] * scale;
                unit[j] = made.unit * scale;
                norm[j] = made.norm * scale;
                missed[j] = made.missed * scale;
                bias[j] = b + std::fabs(b) * 1e-6f;
                vague[j] = std::fabs(b) * 4e-6f;
                limits[j] = threshold ? threshold[f] - std::fabs(threshold[f]) * 1e-6f : 0.f;
                start[j] = Screen::SHIFTED ? -128 * made.total : 0;
                finite = finite && made.finite && std::isfinite(b);
            }
            if (j % PANEL == PANEL - 1) close(j / PANEL, words);
        }
        return finite;
    }

    void close(int64_t panel, int64_t words) {
        longest_of[panel] = *std::max_element(&norm[panel * PANEL], &norm[panel * PANEL] + PANEL);
        worst_of[panel] = *std::max_element(&missed[panel * PANEL], &missed[panel * PANEL] + PANEL);
        longest = std::max(longest, longest_of[panel]);
        worst = std::max(worst, worst_of[panel]);
        turn(packed.data + panel * PANEL * words, words);
    }

    // The rows of a panel side by side, some words at a time, so that what is written stays in the first-level cache.
    void turn(typename Screen::word* to, int64_t words) const {
        int64_t g = 0;
#if defined(TRANSPOSES)
        for (; g + 16 <= words; g += 16)
            for (int64_t j = 0; j < PANEL; j += 16) transpose(flat.data + j * words + g, words, to + g * PANEL + j, PANEL);
#endif
        constexpr int64_t AT_ONCE = 64;
        for (; g < words; g += AT_ONCE)
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t word = g; word < std::min(words, g + AT_ONCE); word++) to[word * PANEL + j] = flat.data[j * words + word];
    }
};

// Sums of a tile of tokens with a panel of latents.
template <class Screen>
static inline __attribute__((always_inline)) void multiply(const typename Screen::word* a, const typename Screen::word* b, const int32_t* start,
                                                           int64_t words, typename Screen::sums (&c)[Screen::TOKENS][2]) {
#if defined(MATRIX_UNIT)
    if constexpr (Screen::TILED) {
        constexpr int HALF = Screen::TOKENS / 2, STEP = Screen::WORDS;
        static_assert(HALF == 16 && LANES == 16 && STEP == 16);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t g = 0; g < words; g += STEP, a += Screen::TOKENS * STEP, b += PANEL * STEP) {
            _tile_loadd(4, a, STEP * 4);
            _tile_loadd(6, b, PANEL * 4);
            _tile_loadd(7, b + LANES, PANEL * 4);
            _tile_loadd(5, a + HALF * STEP, STEP * 4);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, &c[0][0], PANEL * 4);
        _tile_stored(1, &c[0][1], PANEL * 4);
        _tile_stored(2, &c[HALF][0], PANEL * 4);
        _tile_stored(3, &c[HALF][1], PANEL * 4);
        return;
    }
#endif
    typename Screen::sums c0{}, c1{};  // c stays in registers
    if constexpr (Screen::SHIFTED) c0 = load(start), c1 = load(start + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < Screen::TOKENS; i++) c[i][0] = c0, c[i][1] = c1;
    for (int64_t g = 0; g < words; g++, a += Screen::TOKENS, b += PANEL) {
#pragma GCC unroll 12
        for (int i = 0; i < Screen::TOKENS; i++) {
            c[i][0] = Screen::step(c[i][0], a[i], b);
            c[i][1] = Screen::step(c[i][1], a[i], b + LANES);
        }
    }
}

// Screened scores of a token with half a panel, from the j-th latent of a block on.
template <class Screen>
static inline Floats score(typename Screen::sums c, float unit, const Block<Screen>& block, int64_t j) {
    return Screen::value(c) * (all(unit) * load(block.unit.data() + j)) + load(block.bias.data() + j);
}

// Screened scores of a tile of tokens with a block, [TOKENS, block.padded()], and a row of room behind them, which is returned.
template <class Screen>
static inline float* tile_scores(const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t tile, Array<float>& scores) {
    const int64_t padded = block.padded(), token0 = tile * Screen::TOKENS;
    scores.resize((Screen::TOKENS + 1) * padded);
    for (int64_t at = 0; at < block.size; at += PANEL) {
        typename Screen::sums c[Screen::TOKENS][2];
        multiply<Screen>(tokens.packed.data + token0 * tokens.words, block.packed.data + at * tokens.words, block.start.data() + at,
                         tokens.words, c);
#pragma GCC unroll 12
        for (int i = 0; i < Screen::TOKENS; i++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const int64_t j = at + half * LANES;
                store(scores.data() + i * padded + j, score<Screen>(c[i][half], tokens.unit[token0 + i], block, j));
            }
    }
    return scores.data() + Screen::TOKENS * padded;
}

// A score that at least `rank` of all reach, or 0: read off from the largest of each group, of which there are fewer.
static inline float rank_of_groups(const float* z, int64_t padded, int64_t rank, float* best) {
    int64_t groups = padded;
    while (groups % (2 * LANES) == 0 && groups >= 8 * rank) groups /= 2;
    for (int64_t j = 0; j < groups; j += LANES) {
        Floats most = load(z + j);
        for (int64_t other = j + groups; other < padded; other += groups) most = load(z + other) > most ? load(z + other) : most;
        store(best + j, most);
    }
    float limit = 0;
    reached_by(best, groups, rank, limit);
    return limit;
}

}  // namespace
