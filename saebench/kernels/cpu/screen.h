// The three ways to screen scores: what is multiplied, in which units, and what rounding leaves out.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "simd.h"

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

// What screens have in common unless they say otherwise.
struct Screened {
    static constexpr bool EXACT = false, SHIFTED = false, TILED = false;
    static constexpr int TOKENS = TILE_TOKENS;  // whose sums with a panel of latents are held together
    static constexpr int WORDS = 1;             // a packed row is as long as a multiple of these
    // Packed latents that all tokens pass over before the next are packed, and tokens that pass over them one after the other.
    static constexpr int64_t BATCH_BYTES = 8 << 20, GROUP_BYTES = 0;
};

struct Float32 : Screened {
    typedef float word;  // one element
    typedef Floats sums;
    typedef float element;
    static constexpr bool EXACT = true;
    static sums step(sums c, word a, const word* b) { return c + all(a) * load(b); }
    static Floats value(sums c) { return c; }
    static float unit(float, float) { return 1.f; }
};

#if defined(PAIRS) || defined(BYTES_AND_PAIRS)
struct Pairs : Screened {
    typedef int32_t word;  // two elements of 16 bits
    typedef Ints sums;
    typedef int16_t element;
    static sums step(sums c, word a, const word* b) { return step16(c, all(a), load(b)); }
    static Floats value(sums c) { return to_floats(c); }
    // short enough that no sum of products, which is at most |x~| |w~|, leaves 32 bits
    static float unit(float largest, float norm) { return std::max(largest / 32767, norm / 46300); }
};
#endif
#if defined(BYTES_AND_PAIRS)
struct Bytes : Screened {
    typedef int32_t word;  // four elements of 8 bits
    typedef Ints sums;
    typedef int8_t element;
    // the instruction wants one factor without a sign: 128 is added to tokens, and what that adds to a sum is where the sum starts
    static constexpr bool SHIFTED = true;
    static sums step(sums c, word a, const word* b) { return step8(c, all(a), load(b)); }
    static Floats value(sums c) { return to_floats(c); }
    static float unit(float largest, float) { return largest / 127; }
};
#endif

#if defined(BYTES_AND_PAIRS) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define MATRIX_UNIT 1
// Bytes for the processor's matrix unit, which multiplies 16 rows of 64 bytes with 16 such columns at once.
struct Tiles : Bytes {
    static constexpr bool SHIFTED = false, TILED = true;
    static constexpr int TOKENS = 32, WORDS = 16;
    static constexpr int64_t BATCH_BYTES = 800 << 10, GROUP_BYTES = 1 << 20;  // so fast that both must stay in the second-level cache

    // The kernel gives a process the unit when it is asked to.
    static bool granted() {
        static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
        return granted;
    }
};
#endif

// Around what a thread multiplies.
template <class Screen>
struct Multiplying {
#if defined(MATRIX_UNIT)
    Multiplying() {
        if constexpr (Screen::TILED) {
            struct {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t bytes_of_row[16] = {};
                uint8_t rows[16] = {};
            } shapes;
            for (int tile = 0; tile < 8; tile++) shapes.bytes_of_row[tile] = 64, shapes.rows[tile] = 16;
            __asm__ volatile("" : : "r"(&shapes) : "memory");  // gcc says of the next that it reads eight bytes, and leaves the others out
            _tile_loadconfig(&shapes);
        }
    }
    ~Multiplying() {
        if constexpr (Screen::TILED) _tile_release();
    }
#endif
};

template <class Screen>
constexpr int PER_WORD = sizeof(typename Screen::word) / sizeof(typename Screen::element);

// Words of a packed row.
template <class Screen>
int64_t words_of(int64_t width) {
    const int64_t words = (width + PER_WORD<Screen> - 1) / PER_WORD<Screen>;
    return (words + Screen::WORDS - 1) / Screen::WORDS * Screen::WORDS;
}

struct Row {
    float unit, norm, missed;  // value of 1 in the packed form, length, length of what rounding left out
    int32_t total;             // sum of the packed elements
    bool finite;
};

struct Size {
    float largest, norm;
};

// The row `next` is asked for from memory meanwhile.
static Size measure(const float* row, int64_t width, const float* next) {
    Floats squares{}, high{}, low{};
    int64_t p = 0;
    for (; p + LANES <= width; p += LANES) {
        __builtin_prefetch(next + p);
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

// One row as a packed one of so many words, before the row `next`.
template <class Screen>
Row pack(const float* row, int64_t width, int64_t words, typename Screen::word* to, const float* next) {
    typedef typename Screen::element element;
    const auto [largest, norm] = measure(row, width, next);
    Row made{1.f, norm, 0.f, 0, std::isfinite(norm)};
    if (!made.finite) return made;
    if constexpr (Screen::EXACT) {
        std::copy(row, row + width, to);
    } else {
        const bool tiny = norm < 1e-30f;  // rounded to zero, which the bound knows
        made.unit = tiny ? 1.f : Screen::unit(largest, norm);
        const float per_unit = tiny ? 0.f : 1.f / made.unit;
        constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
        Floats squares{};
        Ints totals{};
        char* out = (char*)to;  // words and elements are the same memory
        typedef element Elements __attribute__((vector_size(LANES * sizeof(element))));
        int64_t p = 0;
        for (; p + LANES <= width; p += LANES) {
            const Floats scaled = load(row + p) * all(per_unit), rounded = (scaled + all(ROUND)) - all(ROUND);
            squares += (scaled - rounded) * (scaled - rounded);
            const Ints q = __builtin_convertvector(rounded, Ints);
            totals += q;
            const Elements narrow = __builtin_convertvector(q, Elements);
            std::memcpy(out + p * sizeof(element), &narrow, sizeof narrow);
        }
        float missed = sum(squares);
        for (int i = 0; i < LANES; i++) made.total += totals[i];
        for (; p < width; p++) {
            const float scaled = row[p] * per_unit, rounded = std::nearbyint(scaled);
            missed += (scaled - rounded) * (scaled - rounded);
            made.total += (int)rounded;
            const element narrow = (element)rounded;
            std::memcpy(out + p * sizeof(element), &narrow, sizeof narrow);
        }
        made.missed = tiny ? norm : std::sqrt(missed) * made.unit * 1.001f;
    }
    std::memset((char*)to + width * sizeof(element), 0, words * sizeof *to - width * sizeof(element));
    return made;
}
