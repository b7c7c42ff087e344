// The k best of each token while only bounds of their scores are known.
//
// What passes the screen is written down with the bounds of its score. The k-th largest lower bound is a limit that all of the k best reach;
// what stays below it is struck out, and only what is left at the end, little more than k, is computed in float32. A higher limit is guessed
// from the middles of the bounds; where a guess was too high, which the end shows, the token is done again.
#pragma once

#include <functional>

#include "exact.h"

namespace {

// A score above zero and its latent as one number, in the order of selection: the larger score, of equal ones the lower latent.
static inline uint64_t key(float z, int32_t latent) {
    uint32_t bits;
    std::memcpy(&bits, &z, 4);
    return (uint64_t)bits << 32 | ~(uint32_t)latent;
}
static inline float score_of(uint64_t key) {
    const uint32_t bits = key >> 32;
    float z;
    std::memcpy(&z, &bits, 4);
    return z;
}
static inline int32_t latent_of(uint64_t key) { return (int32_t)~(uint32_t)key; }

// How many of a sample's best are likely to be enough to reach the k best of all, when the sample is this share of all. (It holds k times
// the share of those on average, with that variance times what is left out.)
static inline int64_t safe_rank(int64_t k, double share) {
    const double expected = k * share;
    return (int64_t)(expected + 4 * std::sqrt(expected * (1 - share)) + 4);
}

struct Contenders {
    int64_t k, room;
    Array<float> limits, guesses;  // [B]; limits padded to whole tiles
    Array<int32_t> sizes;          // [B]
    Aligned<float> upper, middle;        // bound of a score, and the middle of both bounds [B, room]
    Aligned<int32_t> latents;            // [B, room]
    bool guessing;

    // What a thread needs.
    struct Own {
        Array<float> lowers;  // of one token
        // Of tokens that are settled together, each from `begin` on: latents whose scores are computed, and these; how many.
        Array<int32_t> latents, begin, before, found;
        Array<float> z, likely;
        std::vector<uint64_t> best;                   // of one token, best first
        Exact exact;
        double share = 0;  // of all latents that the token at hand has passed
        Own(const Contenders& keep, int) : lowers(keep.room + LANES) {}
    };

    // Many that pass at first are struck out later: with less room, scores would be computed to make some.
    static int64_t room_for(int64_t k) { return (10 * k + 8 * LANES) / LANES * LANES; }

    Contenders(int64_t tokens, int64_t k, bool guessing)
        : k(k), room(room_for(k)), limits(tokens + MOST_TOKENS), guesses(tokens), sizes(tokens), upper(tokens * room), middle(tokens * room),
          latents(tokens * room), guessing(guessing) {}

    float limit(int64_t token) const { return limits[token]; }
    template <class Screen>
    Floats limit(const Block<Screen>&, int64_t) const { return Floats{}; }

    // The latents at the set bits; their bounds are `apart`.
    void add(Own& own, const Problem& problem, int64_t token, uint32_t bits, Floats most, Floats apart, Ints numbers) {
        const int64_t at = token * room + sizes[token];
        compress(upper.data + at, most, bits);
        compress(middle.data + at, most - apart * all(0.5f), bits);
        compress(latents.data + at, numbers, bits);
        sizes[token] += __builtin_popcount(bits);
        if (sizes[token] > room - LANES) make_room(own, problem, token);
    }
    void close(Own&, const Problem&, int64_t) {}

    void guess(int64_t token, float value) {
        guesses[token] = std::max(guesses[token], value);
        limits[token] = std::max(limits[token], value);
    }

    // The limit by what was found in this share of all latents.
    void look_back(int64_t token, double share) {
        float limit = limits[token];
        if (reached_by(middle.data + token * room, sizes[token], safe_rank(k, share), limit)) guess(token, limit);
    }

    // The best of tokens from `first` on: calls `take` with each token and how many there are in own.best.
    template <class Take>
    void settle(Own& own, const Problem& problem, int64_t first, int64_t last, Take take) {
        const int64_t tokens = last - first;
        own.begin.assign(1, 0);
        for (int64_t token = first; token < last; token++) {
            if (guessing) look_back(token, 1);
            strike(own, token);
            own.begin.push_back(own.begin.back() + sizes[token]);
        }
        own.latents.resize(own.begin.back() + LANES);
        own.z.resize(own.begin.back() + LANES);
        own.likely.resize(tokens);
        own.before.assign(tokens, 0);
        own.found.assign(tokens, 0);
        for (int64_t t = 0; t < tokens; t++) {  // the scores of those that may be better than what the k-th is likely to be,
            own.likely[t] = limits[first + t];
            reached_by(middle.data + (first + t) * room, sizes[first + t], k, own.likely[t]);
            choose(own, first + t, t, own.likely[t], INFINITY);
        }
        compute(own, problem, first, tokens);
        for (int64_t t = 0; t < tokens; t++) {  // then of the few that may be better than what it is
            float limit = limits[first + t];
            reached_by(own.z.data() + own.begin[t], own.found[t], k, limit);
            own.before[t] = own.found[t];
            choose(own, first + t, t, limit, own.likely[t]);
        }
        compute(own, problem, first, tokens);
        for (int64_t t = 0; t < tokens; t++) {
            const float* z = own.z.data() + own.begin[t];
            float limit = limits[first + t];
            reached_by(z, own.found[t], k, limit);
            own.best.clear();
            for (int64_t i = 0; i < own.found[t]; i++)
                if (z[i] > 0 && z[i] >= limit) own.best.push_back(key(z[i], own.latents[own.begin[t] + i]));
            std::sort(own.best.begin(), own.best.end(), std::greater<>());
            take(first + t, std::min<int64_t>(k, own.best.size()));
        }
    }

   private:
    // Only what may be among the k best stays.
    void strike(Own& own, int64_t token) {
        const int64_t at = token * room, end = at + sizes[token];
        for (int64_t j = at; j < end; j += LANES) {
            const Floats centre = load(middle.data + j);
            store(own.lowers.data() + (j - at), centre + centre - load(upper.data + j));  // the lower bound
        }
        reached_by(own.lowers.data(), end - at, k, limits[token]);
        int64_t left = at;
        for (int64_t j = at; j < end; j += LANES) {
            const Floats most = load(upper.data + j), centre = load(middle.data + j);
            const Ints numbers = load(latents.data + j);
            const uint32_t bits = at_least(most, all(limits[token])) & below(end - j);
            compress(upper.data + left, most, bits);
            compress(middle.data + left, centre, bits);
            compress(latents.data + left, numbers, bits);
            left += __builtin_popcount(bits);
        }
        sizes[token] = (int32_t)(left - at);
    }

    // Those whose upper bound is in [from, to) are to be computed.
    void choose(Own& own, int64_t token, int64_t t, float from, float to) const {
        const int64_t at = token * room, end = at + sizes[token];
        for (int64_t j = at; j < end; j += LANES) {
            const Floats most = load(upper.data + j);
            for (uint32_t bits = at_least(most, all(from)) & ~at_least(most, all(to)) & below(end - j); bits; bits &= bits - 1)
                own.latents[own.begin[t] + own.found[t]++] = latents.data[j + __builtin_ctz(bits)];
        }
    }

    // The scores of all that was chosen since the last time.
    void compute(Own& own, const Problem& problem, int64_t first, int64_t tokens) const {
        const auto chosen = [&](const auto& use) {
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t i = own.begin[t] + own.before[t]; i < own.begin[t] + own.found[t]; i++) use(i, first + t, own.latents[i]);
        };
        own.exact.compute(problem, chosen, own.z.data());
    }

    void make_room(Own& own, const Problem& problem, int64_t token) {
        if (guessing) look_back(token, own.share);
        strike(own, token);
        if (sizes[token] <= room - 4 * LANES) return;
        settle(own, problem, token, token + 1, [&](int64_t, int64_t count) {  // so many are within the screen's error of each other
            const int64_t at = token * room;
            for (int64_t j = 0; j < count; j++) {
                upper.data[at + j] = middle.data[at + j] = score_of(own.best[j]);
                latents.data[at + j] = latent_of(own.best[j]);
            }
            sizes[token] = (int32_t)count;
            if (count == k) limits[token] = std::max(limits[token], score_of(own.best[k - 1]));
        });
    }
};

}  // namespace
