// Vectors of the width that this processor has, and the few operations on them that the kernels need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16, TILE_TOKENS = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, TILE_TOKENS = 6;  // 12 of 16
#else
constexpr int LANES = 4, TILE_TOKENS = 6;
#endif
constexpr int MOST_TOKENS = 32;  // of a tile, whatever the screen

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

// Bytes of a core's second-level cache.
static inline int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return 1 << 20;
}

// A vector of numbers that begins with a cache line: registers' worth of it that lie in two lines take twice as long to read.
template <class T>
struct OnLines {
    typedef T value_type;
    static constexpr std::align_val_t LINE{64};
    OnLines() = default;
    template <class Other>
    OnLines(const OnLines<Other>&) {}
    T* allocate(size_t count) { return (T*)operator new(count * sizeof(T), LINE); }
    void deallocate(T* p, size_t) { operator delete(p, LINE); }
    bool operator==(const OnLines&) const { return true; }
    bool operator!=(const OnLines&) const { return false; }
};
template <class T>
using Array = std::vector<T, OnLines<T>>;

static inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline Ints load(const int32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }
static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
static inline Floats all(float x) { return x - Floats{}; }
static inline Ints all(int32_t x) { return x - Ints{}; }
static inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// In one order, whatever the instructions: halves onto each other.
static inline float sum(Floats v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
#endif
}

// Adds to `out` the sums of four vectors.
static inline void add_sums(const Floats (&v)[4], float* out) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const auto halved = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512d low = (__m512d)halved((__m512)v[0], (__m512)v[1]), high = (__m512d)halved((__m512)v[2], (__m512)v[3]);
    const __m512 parts = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high), (__m512)_mm512_unpackhi_pd(low, high));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(parts), _mm512_extractf32x8_ps(parts, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), four));
#else
    for (int i = 0; i < 4; i++) out[i] += sum(v[i]);
#endif
}

// Bit i is set where v[i] >= limit[i]; never for NaN.
static inline uint32_t at_least(Floats v, Floats limit) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)limit, _CMP_GE_OQ);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)limit, _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(v[i] >= limit[i]) << i;
    return bits;
#endif
}

// The lowest `n` bits of LANES, n > 0.
static inline uint32_t below(int64_t n) { return n >= LANES ? (1u << LANES) - 1 : (1u << n) - 1; }

// The elements at the set bits, one after the other. Up to LANES elements are written, whatever their number.
template <class T, class Vector>
static inline void compress(T* to, Vector v, uint32_t bits) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m512i packed = _mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)v);
    std::memcpy(to, &packed, sizeof packed);
#else
    for (; bits; bits &= bits - 1) *to++ = v[__builtin_ctz(bits)];
#endif
}

// Raises `limit` to a value that at least `rank` of n values reach, close to the largest such; false where fewer reach it as it is. Ten
// halvings of what lies between it and the largest value take a fraction of the time of sorting. Reads whole vectors.
static inline bool reached_by(const float* values, int64_t n, int64_t rank, float& limit) {
    const auto reaching = [&](float least) {
        int64_t count = 0;
        const Floats bound = all(least);
        for (int64_t j = 0; j < n; j += LANES) count += __builtin_popcount(at_least(load(values + j), bound) & below(n - j));
        return count;
    };
    if (n < rank || reaching(limit) < rank) return false;
    Floats most = all(limit);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) most = load(values + j) > most ? load(values + j) : most;
    float high = limit;
    for (; j < n; j++) high = values[j] > high ? values[j] : high;
    for (int i = 0; i < LANES; i++) high = most[i] > high ? most[i] : high;
    for (int halving = 0; halving < 10; halving++) {
        const float middle = limit + (high - limit) * 0.5f;
        const int64_t count = reaching(middle);
        (count < rank ? high : limit) = middle;
        if (count == rank) break;
    }
    return true;
}

// Dot products of one vector with several rows, rounded in the same way whatever their number: all values that leave an encoder are made
// here. The rows `later` are asked for from memory.
template <int COUNT, int LATER = 0>
static inline void dots(const float* x, const float* const* rows, int64_t n, float* out, const float* const* later = nullptr) {
    Floats s[COUNT][4]{};
    int64_t p = 0;
    for (; p + 4 * LANES <= n; p += 4 * LANES)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
#pragma GCC unroll 4
            for (int i = 0; i < LATER; i++) __builtin_prefetch(later[i] + p + part * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; i++) s[i][part] += load(x + p + part * LANES) * load(rows[i] + p + part * LANES);
        }
    for (; p + LANES <= n; p += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) s[i][0] += load(x + p) * load(rows[i] + p);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) {
        float rest = 0;
        for (int64_t q = p; q < n; q++) rest += x[q] * rows[i][q];
        out[i] = sum((s[i][0] + s[i][1]) + (s[i][2] + s[i][3])) + rest;
    }
}

static inline float dot(const float* a, const float* b, int64_t n) {
    float out;
    dots<1>(a, &b, n, &out);
    return out;
}

// y += c x
static inline void add_scaled(float* __restrict y, float c, const float* __restrict x, int64_t n) {
    for (int64_t p = 0; p < n; p++) y[p] += c * x[p];
}

// y += sum of four c x, with one pass over y
static inline void add_scaled4(float* __restrict y, const float* c, const float* const* x, int64_t n) {
    const float *__restrict x0 = x[0], *__restrict x1 = x[1], *__restrict x2 = x[2], *__restrict x3 = x[3];
    const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    for (int64_t p = 0; p < n; p++) y[p] += (c0 * x0[p] + c1 * x1[p]) + (c2 * x2[p] + c3 * x3[p]);
}
