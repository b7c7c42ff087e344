// Encode and select without ever holding the scores (methods.md K4, K11, K13).
//
// A block of latents is packed once, all tokens pass over it in tiles whose sums stay in registers, and a score that is not selected
// leaves no trace. Scores are screened in few bits: tokens and latents are rounded to 8 or 16 bit integers with a known error, so a score
// has an upper bound by Cauchy-Schwarz:
//     z = (x . w + b) s,   |x . w - x~ . w~| <= |x - x~| |w| + |x| |w - w~|
// and only where the bound reaches what a token still has room for, x . w is computed in float32, by `dot`. So what is selected, and
// its value, does not depend on the bits of the screen, on the number of threads or on the order of the blocks.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "simd.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define BYTES_AND_PAIRS 1
static inline Ints step8(Ints c, Ints a, Ints b) { return (Ints)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
static inline Ints step16(Ints c, Ints a, Ints b) { return (Ints)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
#elif defined(__AVX512BW__)
#define PAIRS 1
static inline Ints step16(Ints c, Ints a, Ints b) { return c + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVXVNNI__) && defined(__AVX2__)
#define BYTES_AND_PAIRS 1
static inline Ints step8(Ints c, Ints a, Ints b) { return (Ints)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b); }
static inline Ints step16(Ints c, Ints a, Ints b) { return (Ints)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b); }
#elif defined(__AVX2__)
#define PAIRS 1
static inline Ints step16(Ints c, Ints a, Ints b) { return c + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

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
            const float* of[4] = {w + rows[i] * width, w + rows[i + 1] * width, w + rows[i + 2] * width, w + rows[i + 3] * width};
            dots<4>(x_row, of, width, z + i);
        }
        for (; i < count; i++) z[i] = dot(x_row, w + rows[i] * width, width);
        for (i = 0; i < count; i++) z[i] = scale ? (z[i] + b[rows[i]]) * scale[rows[i]] : z[i] + b[rows[i]];
    }
};

// --- the three ways to screen: what is multiplied, and in which units ---

struct Float32 {
    typedef float word;  // one element
    typedef Floats sums;
    typedef float element;
    static constexpr bool EXACT = true, SHIFTED = false;
    static sums step(sums c, word a, const word* b) { return c + all(a) * load(b); }
    static Floats value(sums c) { return c; }
    static float unit(float, float) { return 1.f; }
};

#if defined(PAIRS) || defined(BYTES_AND_PAIRS)
struct Pairs {
    typedef int32_t word;  // two elements of 16 bits
    typedef Ints sums;
    typedef int16_t element;
    static constexpr bool EXACT = false, SHIFTED = false;
    static sums step(sums c, word a, const word* b) { return step16(c, all(a), load(b)); }
    static Floats value(sums c) { return to_floats(c); }
    // short enough that no sum of products, which is at most |x~| |w~|, leaves 32 bits
    static float unit(float largest, float norm) { return std::max(largest / 32767, norm / 46300); }
};
#endif
#if defined(BYTES_AND_PAIRS)
struct Bytes {
    typedef int32_t word;  // four elements of 8 bits
    typedef Ints sums;
    typedef int8_t element;
    // the instruction wants one factor without a sign: 128 is added to tokens, and what that adds to a sum is where the sum starts
    static constexpr bool EXACT = false, SHIFTED = true;
    static sums step(sums c, word a, const word* b) { return step8(c, all(a), load(b)); }
    static Floats value(sums c) { return to_floats(c); }
    static float unit(float largest, float) { return largest / 127; }
};
#endif

template <class Screen>
constexpr int PER_WORD = sizeof(typename Screen::word) / sizeof(typename Screen::element);

struct Row {
    float unit, norm, missed;  // value of 1 in the packed form, length, length of what rounding left out
    int32_t total;             // sum of the packed elements
    bool finite;
};

struct Size {
    float largest, norm;
};

static Size measure(const float* row, int64_t width) {
    Floats squares{}, high{}, low{};
    int64_t p = 0;
    for (; p + LANES <= width; p += LANES) {
        const Floats v = load(row + p);
        squares += v * v;
        high = v > high ? v : high;
        low = v < low ? v : low;
    }
    float total = sum(squares), largest = 0;
    for (int i = 0; i < LANES; i++) largest = std::max({largest, high[i], -low[i]});
    for (; p < width; p++) {
        total += row[p] * row[p];
        largest = std::max(largest, std::fabs(row[p]));
    }
    if (std::isfinite(total) && total > 1e-30f) return {largest, std::sqrt(total) * 1.0001f};
    double exact = 0;  // squares beyond what float32 holds, or NaN
    for (p = 0; p < width; p++) exact += (double)row[p] * row[p];
    return {largest, (float)std::sqrt(exact) * 1.0001f};
}

// One row into words that lie `stride` apart; `scratch` holds a row, padded to whole vectors.
template <class Screen>
Row pack(const float* row, int64_t width, typename Screen::word* to, int64_t stride, typename Screen::element* scratch, bool token) {
    typedef typename Screen::element element;
    const int64_t words = (width + PER_WORD<Screen> - 1) / PER_WORD<Screen>;
    const auto [largest, norm] = measure(row, width);
    Row made{1.f, norm, 0.f, 0, std::isfinite(norm)};
    if (!made.finite) return made;
    if constexpr (Screen::EXACT) {
        for (int64_t g = 0; g < words; g++) to[g * stride] = row[g];
        return made;
    } else {
        const bool tiny = norm < 1e-30f;  // rounded to zero, which the bound knows
        made.unit = tiny ? 1.f : Screen::unit(largest, norm);
        const float per_unit = tiny ? 0.f : 1.f / made.unit;
        constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
        Floats squares{};
        Ints totals{};
        int64_t p = 0;
        typedef element Elements __attribute__((vector_size(LANES * sizeof(element))));
        for (; p + LANES <= width; p += LANES) {
            const Floats scaled = load(row + p) * all(per_unit), rounded = (scaled + all(ROUND)) - all(ROUND);
            squares += (scaled - rounded) * (scaled - rounded);
            const Ints q = __builtin_convertvector(rounded, Ints);
            totals += q;
            const Elements narrow = __builtin_convertvector(q, Elements);
            std::memcpy(scratch + p, &narrow, sizeof narrow);
        }
        float missed = sum(squares);
        for (int i = 0; i < LANES; i++) made.total += totals[i];
        for (; p < width; p++) {
            const float scaled = row[p] * per_unit, rounded = std::nearbyint(scaled);
            missed += (scaled - rounded) * (scaled - rounded);
            made.total += (int)rounded;
            scratch[p] = (element)rounded;
        }
        for (; p < words * PER_WORD<Screen>; p++) scratch[p] = 0;
        made.missed = tiny ? norm : std::sqrt(missed) * made.unit * 1.001f;
        const int32_t shift = Screen::SHIFTED && token ? (int32_t)0x80808080 : 0;
        for (int64_t g = 0; g < words; g++) {
            int32_t word;
            std::memcpy(&word, (const char*)scratch + 4 * g, 4);
            to[g * stride] = word ^ shift;
        }
        return made;
    }
}

// --- what is kept ---

struct Entry {
    float value;
    int32_t latent;
};
static inline bool before(const Entry& a, const Entry& b) {  // the total order of selection
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// What all threads know of each token: how large a score must be to matter. `limit` rises to the k-th best score that some thread has
// found, and a guess from the first block makes it rise sooner; where the guess was too high, which the end shows, the token is done again.
struct Limits {
    std::vector<std::atomic<float>> limit;
    std::vector<std::atomic<float>> guess;
    explicit Limits(int64_t tokens) : limit(tokens), guess(tokens) {
        for (auto* each : {&limit, &guess})
            for (auto& value : *each) value.store(0.f, std::memory_order_relaxed);
    }
    static void raise(std::atomic<float>& at, float value) {
        float seen = at.load(std::memory_order_relaxed);
        while (value > seen && !at.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
        }
    }
};

// How many of a sample's best are likely to be enough to reach the k best of all, when the sample is this share of all.
static inline int64_t safe_rank(int64_t k, double share) {
    const double expected = k * share;
    return std::min<int64_t>(k, (int64_t)(expected + 4 * std::sqrt(expected) + 4));
}

// The k best of each token among the blocks of one thread, and some that were among them once.
struct Best {
    int64_t k, room;
    Limits& limits;
    std::vector<Entry> entries;
    std::vector<int32_t> sizes;
    bool guessing;

    Best(int64_t tokens, int64_t k, Limits& limits, bool guessing)
        : k(k), room(2 * k + 32), limits(limits), entries(tokens * room), sizes(tokens), guessing(guessing) {}
    Floats limit(int64_t token, int64_t) const { return all(limits.limit[token].load(std::memory_order_relaxed)); }
    void offer(int64_t token, int64_t row, float z) {
        if (!(z > 0 && z >= limits.limit[token].load(std::memory_order_relaxed))) return;
        Entry* found = entries.data() + token * room;
        found[sizes[token]++] = {z, (int32_t)row};
        if (sizes[token] == room) {
            std::nth_element(found, found + k - 1, found + room, before);
            sizes[token] = (int32_t)k;
            Limits::raise(limits.limit[token], found[k - 1].value);
        }
    }
    // Limits by what a thread has found in its part of all blocks so far.
    void look_back(double share) {
        const int64_t rank = safe_rank(k, share);
        for (size_t token = 0; token < sizes.size(); token++) {
            if (sizes[token] < rank) continue;
            Entry* found = entries.data() + token * room;
            std::nth_element(found, found + rank - 1, found + sizes[token], before);
            if (rank < k) Limits::raise(limits.guess[token], found[rank - 1].value);
            Limits::raise(limits.limit[token], found[rank - 1].value);
        }
    }
};

// All entries above a threshold of each latent.
struct Above {
    struct Found {
        int32_t token;
        Entry entry;
    };
    const float* threshold;               // [F]
    const float* block_limits = nullptr;  // of the block in work, padded to whole panels
    std::vector<Found> found;
    static constexpr bool guessing = false;

    explicit Above(const float* threshold) : threshold(threshold) {}
    Floats limit(int64_t, int64_t at) const { return load(block_limits + at); }
    void offer(int64_t token, int64_t row, float z) {
        if (z > threshold[row]) found.push_back({(int32_t)token, {z, (int32_t)row}});
    }
};

// --- the pass over all scores ---

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
    int64_t words, tiles;
    Aligned<typename Screen::word> packed;  // [tile][word][token of the tile]
    std::vector<float> unit, norm, missed;  // [B], padded to whole tiles
    bool finite = true;

    Tokens(const Problem& problem, int threads)
        : words((problem.width + PER_WORD<Screen> - 1) / PER_WORD<Screen>),
          tiles((problem.tokens + TILE_TOKENS - 1) / TILE_TOKENS),
          packed(tiles * TILE_TOKENS * words),
          unit(tiles * TILE_TOKENS), norm(unit), missed(unit) {
        const float float_error = (problem.width / 4 + 16) * 1.2e-7f;  // of float32 sums, here and in `dot`
        bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
        {
            Aligned<typename Screen::element> scratch(problem.width);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < tiles * TILE_TOKENS; token++) {
                auto* to = packed.data + token / TILE_TOKENS * TILE_TOKENS * words + token % TILE_TOKENS;
                if (token >= problem.tokens) {
                    for (int64_t g = 0; g < words; g++) to[g * TILE_TOKENS] = 0;
                    continue;
                }
                const Row row = pack<Screen>(problem.x + token * problem.width, problem.width, to, TILE_TOKENS, scratch.data, true);
                unit[token] = row.unit;
                norm[token] = row.norm + row.missed;
                missed[token] = row.missed + row.norm * float_error;
                good = good && row.finite;
            }
        }
        finite = good;
    }
};

template <class Screen>
struct Block {
    int64_t size = 0, most;
    Aligned<typename Screen::word> packed;     // [panel][word][latent of the panel]
    Aligned<typename Screen::element> scratch;
    std::vector<float> unit, bias, norm, missed, limits;
    std::vector<int32_t> start, row;           // what sums begin with; which row of the matrix
    float longest = 0, worst = 0;              // the largest of norm and missed

    Block(int64_t most, int64_t words, int64_t width)
        : most(most), packed(most * words), scratch(width), unit(most), bias(most), norm(most), missed(most), limits(most), start(most),
          row(most) {}

    // Every `stride`-th latent from `first`: neighbours are often alike, and a guess needs a fair sample.
    bool fill(const Problem& problem, int64_t first, int64_t stride, int64_t words, const float* threshold) {
        size = (problem.num - first + stride - 1) / stride;
        const int64_t padded = (size + PANEL - 1) / PANEL * PANEL;
        bool finite = true;
        longest = worst = 0;
        for (int64_t j = 0; j < padded; j++) {
            auto* to = packed.data + j / PANEL * PANEL * words + j % PANEL;
            if (j >= size) {
                for (int64_t g = 0; g < words; g++) to[g * PANEL] = 0;
                unit[j] = norm[j] = missed[j] = 0;
                bias[j] = -INFINITY;
                limits[j] = INFINITY;
                start[j] = 0;
                continue;
            }
            const int64_t f = row[j] = (int32_t)problem.row(first + j * stride);
            const Row made = pack<Screen>(problem.w + f * problem.width, problem.width, to, PANEL, scratch.data, false);
            const float scale = problem.scale ? problem.scale[f] : 1.f, b = problem.b[f] * scale;
            unit[j] = made.unit * scale;
            norm[j] = made.norm * scale;
            missed[j] = made.missed * scale;
            bias[j] = b + std::fabs(b) * 1e-6f;
            limits[j] = threshold ? threshold[f] : 0.f;
            start[j] = Screen::SHIFTED ? -128 * made.total : 0;
            longest = std::max(longest, norm[j]);
            worst = std::max(worst, missed[j]);
            finite = finite && made.finite && std::isfinite(b);
        }
        return finite;
    }
};

// Sums of a tile of tokens with a panel of latents, in registers.
template <class Screen>
static inline __attribute__((always_inline)) void multiply(const typename Screen::word* a, const typename Screen::word* b, const int32_t* start,
                                                           int64_t words, typename Screen::sums (&c)[TILE_TOKENS][2]) {
    typename Screen::sums c0{}, c1{};
    if constexpr (Screen::SHIFTED) c0 = load(start), c1 = load(start + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < TILE_TOKENS; i++) c[i][0] = c0, c[i][1] = c1;
    for (int64_t g = 0; g < words; g++, a += TILE_TOKENS, b += PANEL) {
#pragma GCC unroll 12
        for (int i = 0; i < TILE_TOKENS; i++) {
            c[i][0] = Screen::step(c[i][0], a[i], b);
            c[i][1] = Screen::step(c[i][1], a[i], b + LANES);
        }
    }
}

// What passed the screen, for each token of a tile, until its scores are computed all at once.
struct Pending {
    int64_t most;
    std::vector<int32_t> rows;
    std::vector<float> z;
    int32_t counts[TILE_TOKENS] = {};

    explicit Pending(int64_t most) : most(most), rows(TILE_TOKENS * most), z(most) {}
    void add(int i, int32_t row) { rows[i * most + counts[i]++] = row; }
    template <class Keep>
    int64_t settle(const Problem& problem, int64_t token, int i, Keep& keep) {
        const int32_t *of = rows.data() + i * most, count = counts[i];
        problem.scores(token, of, count, z.data());
        for (int32_t j = 0; j < count; j++) keep.offer(token, of[j], z[j]);
        counts[i] = 0;
        return count;
    }
};

template <class Screen, class Keep>
void pass(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, Pending& pending, Keep& keep, int64_t& dots) {
    for (int64_t tile = 0; tile < tokens.tiles; tile++) {
        const int64_t token0 = tile * TILE_TOKENS;
        const int rows = (int)std::min<int64_t>(TILE_TOKENS, problem.tokens - token0);
        for (int64_t at = 0; at < block.size; at += PANEL) {
            typename Screen::sums c[TILE_TOKENS][2];
            multiply<Screen>(tokens.packed.data + token0 * tokens.words, block.packed.data + at * tokens.words, block.start.data() + at,
                             tokens.words, c);
            uint32_t bits[TILE_TOKENS][2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const int64_t j = at + half * LANES;
                const Floats block_unit = load(block.unit.data() + j), block_bias = load(block.bias.data() + j),
                             block_norm = load(block.norm.data() + j), block_missed = load(block.missed.data() + j);
#pragma GCC unroll 12
                for (int i = 0; i < TILE_TOKENS; i++) {
                    const int64_t token = token0 + (i < rows ? i : 0);
                    const Floats slack = all(tokens.missed[token]) * block_norm + all(tokens.norm[token]) * block_missed;
                    const Floats most = Screen::value(c[i][half]) * (all(tokens.unit[token]) * block_unit) + (block_bias + slack);
                    bits[i][half] = at_least(most, keep.limit(token, j));
                }
            }
            for (int i = 0; i < rows; i++)
                for (uint64_t left = bits[i][0] | (uint64_t)bits[i][1] << LANES; left; left &= left - 1)
                    pending.add(i, block.row[at + __builtin_ctzll(left)]);
        }
        for (int i = 0; i < rows; i++) dots += pending.settle(problem, token0 + i, i, keep);
    }
}

// The first block of a thread, for `Best`: nothing is known of a token yet, so scores are written down, and what is likely to be
// enough is read off from them.
template <class Screen>
void first_pass(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, Pending& pending, Best& keep,
                int64_t& dots) {
    const int64_t padded = (block.size + PANEL - 1) / PANEL * PANEL;
    const int64_t rank = std::min(block.size, safe_rank(keep.k, (double)block.size / problem.num));
    const bool certain = rank == keep.k;
    // of the largest of each group, the rank-th is no larger than that of all scores, and there are fewer to sort
    int64_t groups = padded;
    while (groups % (2 * LANES) == 0 && groups >= 8 * rank) groups /= 2;
    Aligned<float> scores(TILE_TOKENS * padded), best(groups);
    for (int64_t tile = 0; tile < tokens.tiles; tile++) {
        const int64_t token0 = tile * TILE_TOKENS;
        const int rows = (int)std::min<int64_t>(TILE_TOKENS, problem.tokens - token0);
        for (int64_t at = 0; at < block.size; at += PANEL) {
            typename Screen::sums c[TILE_TOKENS][2];
            multiply<Screen>(tokens.packed.data + token0 * tokens.words, block.packed.data + at * tokens.words, block.start.data() + at,
                             tokens.words, c);
            for (int i = 0; i < rows; i++)
                for (int half = 0; half < 2; half++) {
                    const int64_t j = at + half * LANES;
                    const Floats z = Screen::value(c[i][half]) * (all(tokens.unit[token0 + i]) * load(block.unit.data() + j)) +
                                     load(block.bias.data() + j);
                    store(scores.data + i * padded + j, z);
                }
        }
        for (int i = 0; i < rows; i++) {
            const int64_t token = token0 + i;
            const float* z = scores.data + i * padded;
            const float slack = tokens.missed[token] * block.longest + tokens.norm[token] * block.worst;
            for (int64_t j = 0; j < groups; j += LANES) {
                Floats most = load(z + j);
                for (int64_t other = j + groups; other < padded; other += groups) most = load(z + other) > most ? load(z + other) : most;
                store(best.data + j, most);
            }
            std::nth_element(best.data, best.data + rank - 1, best.data + groups, [](float a, float b) { return a > b; });
            const float reached = best.data[rank - 1];
            if (!certain) Limits::raise(keep.limits.guess[token], reached);
            Limits::raise(keep.limits.limit[token], certain ? reached - slack : reached);
            const Floats limit = all(keep.limits.limit[token].load(std::memory_order_relaxed) - slack);
            for (int64_t at = 0; at < padded; at += LANES)
                for (uint32_t left = at_least(load(z + at), limit); left; left &= left - 1)
                    pending.add(i, block.row[at + __builtin_ctz(left)]);
            dots += pending.settle(problem, token, i, keep);
        }
    }
}

template <class Screen, class Keep, class Make>
bool run(const Problem& problem, int threads, std::vector<std::unique_ptr<Keep>>& kept, Make make, const float* threshold, int64_t& dots) {
    const Tokens<Screen> tokens(problem, threads);
    if (!tokens.finite) return false;
    const int64_t row_bytes = tokens.words * sizeof(typename Screen::word);
    const int64_t most = std::max<int64_t>(PANEL, std::min<int64_t>(BLOCK_LATENTS, BLOCK_BYTES / row_bytes / PANEL * PANEL));
    const int64_t blocks = (problem.num + most - 1) / most;
    std::atomic<bool> finite{true};
    int64_t count = 0;
#pragma omp parallel num_threads(threads) reduction(+ : count)
    {
        auto& keep = kept[omp_get_thread_num()];
        keep = make();
        Block<Screen> block((problem.num / blocks + 1 + PANEL) / PANEL * PANEL, tokens.words, problem.width);
        Pending pending(block.most);
        int64_t done = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < blocks; number++) {
            if (!finite.load(std::memory_order_relaxed)) continue;
            if (!block.fill(problem, number, blocks, tokens.words, threshold)) {
                finite.store(false);
                continue;
            }
            if constexpr (std::is_same_v<Keep, Above>)
                keep->block_limits = block.limits.data();
            else if (keep->guessing && !done++) {
                first_pass(problem, tokens, block, pending, *keep, count);
                continue;
            }
            pass(problem, tokens, block, pending, *keep, count);
            if constexpr (std::is_same_v<Keep, Best>)
                if (keep->guessing && (done & (done - 1)) == 0) keep->look_back((double)done / blocks);
        }
    }
    dots += count;
    return finite.load();
}

template <class Keep, class Make>
bool run_screened(int bits, const Problem& problem, int threads, std::vector<std::unique_ptr<Keep>>& kept, Make make,
                  const float* threshold, int64_t& dots) {
#if defined(BYTES_AND_PAIRS)
    if (bits == 8) return run<Bytes>(problem, threads, kept, make, threshold, dots);
#endif
#if defined(PAIRS) || defined(BYTES_AND_PAIRS)
    if (bits == 16) return run<Pairs>(problem, threads, kept, make, threshold, dots);
#endif
    return run<Float32>(problem, threads, kept, make, threshold, dots);
}

// The k best of every token; with `guessing`, `again` are tokens for which a guess was too high.
bool best(const Problem& problem, int64_t k, int bits, int threads, bool guessing, float* values, int32_t* indices,
          std::vector<int64_t>& again, int64_t& dots) {
    Limits limits(problem.tokens);
    std::vector<std::unique_ptr<Best>> kept(threads);
    const auto make = [&] { return std::make_unique<Best>(problem.tokens, k, limits, guessing); };
    if (!run_screened<Best>(bits, problem, threads, kept, make, nullptr, dots)) return false;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Entry> all;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < problem.tokens; token++) {
            all.clear();
            for (const auto& each : kept)
                if (each) all.insert(all.end(), &each->entries[token * each->room], &each->entries[token * each->room] + each->sizes[token]);
            const int64_t count = std::min<int64_t>(k, all.size());
            std::partial_sort(all.begin(), all.begin() + count, all.end(), before);
            for (int64_t j = 0; j < k; j++) {
                values[token * k + j] = j < count ? all[j].value : 0.f;
                indices[token * k + j] = j < count ? all[j].latent : (int32_t)problem.row(0);
            }
            const float guess = limits.guess[token].load(std::memory_order_relaxed);
            if (guess > 0 && (count < k || all[k - 1].value < guess)) {
#pragma omp critical
                again.push_back(token);
            }
        }
    }
    return true;
}

}  // namespace

extern "C" {

// The fewest bits that scores can be screened with here: 8, 16 or 32.
int saebench_screen_bits() {
#if defined(BYTES_AND_PAIRS)
    return 8;
#elif defined(PAIRS)
    return 16;
#else
    return 32;
#endif
}

// Values and indices [B, K], best first. Returns how many scores were computed in float32, or -1 where x, w, b are not finite.
int64_t saebench_topk(const float* x, const float* w, const float* b, const float* scale, const int32_t* latents, int64_t tokens,
                      int64_t width, int64_t num, int64_t k, int bits, int threads, float* values, int32_t* indices) {
    const Problem problem{x, w, b, scale, latents, tokens, width, num};
    int64_t dots = 0;
    std::vector<int64_t> again;
    const bool finite = best(problem, k, bits, threads, true, values, indices, again, dots);
    if (finite && !again.empty()) {
        std::vector<float> x_again(again.size() * width), values_again(again.size() * k);
        std::vector<int32_t> indices_again(again.size() * k);
        for (size_t i = 0; i < again.size(); i++) std::memcpy(&x_again[i * width], x + again[i] * width, width * sizeof(float));
        Problem rest = problem;
        rest.x = x_again.data();
        rest.tokens = (int64_t)again.size();
        std::vector<int64_t> none;
        best(rest, k, bits, threads, false, values_again.data(), indices_again.data(), none, dots);
        for (size_t i = 0; i < again.size(); i++) {
            std::memcpy(values + again[i] * k, &values_again[i * k], k * sizeof(float));
            std::memcpy(indices + again[i] * k, &indices_again[i * k], k * sizeof(int32_t));
        }
    }
    return finite ? dots : -1;
}

struct Selection {
    std::vector<std::unique_ptr<Above>> kept;
};

// Entries above thresholds, to be fetched by `saebench_take`; fills offsets [B + 1]. Null where x, w, b are not finite.
Selection* saebench_above(const float* x, const float* w, const float* b, const float* scale, const float* threshold, int64_t tokens,
                          int64_t width, int64_t num, int bits, int threads, int64_t* offsets, int64_t* dots) {
    const Problem problem{x, w, b, scale, nullptr, tokens, width, num};
    auto selection = std::make_unique<Selection>();
    selection->kept.resize(threads);
    const auto make = [&] { return std::make_unique<Above>(threshold); };
    if (!run_screened<Above>(bits, problem, threads, selection->kept, make, threshold, *dots)) return nullptr;
    std::fill(offsets, offsets + tokens + 1, 0);
    for (const auto& each : selection->kept)
        if (each)
            for (const auto& found : each->found) offsets[found.token + 1]++;
    for (int64_t token = 0; token < tokens; token++) offsets[token + 1] += offsets[token];
    return selection.release();
}

// Copies the entries, ascending in each row, and frees the selection.
void saebench_take(Selection* taken, int64_t tokens, const int64_t* offsets, int threads, int32_t* indices, float* values) {
    std::unique_ptr<Selection> selection(taken);
    std::vector<Entry> entries(offsets[tokens]);
    std::vector<int64_t> next(offsets, offsets + tokens);
    for (const auto& each : selection->kept)
        if (each)
            for (const auto& found : each->found) entries[next[found.token]++] = found.entry;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        std::sort(entries.begin() + offsets[token], entries.begin() + offsets[token + 1],
                  [](const Entry& a, const Entry& b) { return a.latent < b.latent; });
        for (int64_t e = offsets[token]; e < offsets[token + 1]; e++) indices[e] = entries[e].latent, values[e] = entries[e].value;
    }
}
}
