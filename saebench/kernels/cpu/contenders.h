// The k best of each token while only bounds of their scores are known.
//
// What passes the screen is written down with an upper and a lower bound of its score. The k-th largest lower bound is a limit that all of
// the k best reach; what stays below it is struck out, and only what is left at the end, little more than k, is computed in float32. A limit
// comes sooner by a guess from the latents seen; where the guess was too high, which the end shows, the token is done again.
#pragma once

#include <functional>

#include "scan.h"

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

// How many of a sample's best are likely to be enough to reach the k best of all, when the sample is this share of all.
static inline int64_t safe_rank(int64_t k, double share) {
    const double expected = k * share;
    return std::min<int64_t>(k, (int64_t)(expected + 4 * std::sqrt(expected) + 4));
}

struct Contenders {
    int64_t k, room;
    std::vector<float> limits, guesses;  // [B]; limits padded to whole tiles
    std::vector<int32_t> sizes;          // [B]
    Aligned<float> upper, lower;         // bounds [B, room]
    Aligned<int32_t> latents;            // [B, room]
    bool guessing;

    // What a thread needs.
    struct Own {
        std::vector<int32_t> latents;
        std::vector<float> z;
        std::vector<uint64_t> best;  // of the token that was settled last, best first
        int64_t computed = 0;
        double share = 0;  // of all latents that the token at hand has passed
        Own(const Contenders& keep, int64_t, int) : latents(keep.room + LANES), z(keep.room + LANES) {}
    };

    // Many that pass at first are struck out later: with less room, scores would be computed to make some.
    static int64_t room_for(int64_t k) { return (12 * k + 8 * LANES) / LANES * LANES; }

    Contenders(int64_t tokens, int64_t k, bool guessing)
        : k(k), room(room_for(k)), limits(tokens + TILE_TOKENS), guesses(tokens), sizes(tokens), upper(tokens * room), lower(tokens * room),
          latents(tokens * room), guessing(guessing) {}

    template <class Screen>
    Floats limit(int64_t token, const Block<Screen>&, int64_t) const { return all(limits[token]); }

    // The latents at the set bits; their bounds are `apart`.
    void add(Own& own, const Problem& problem, int64_t token, uint32_t bits, Floats most, Floats apart, Ints numbers) {
        const int64_t at = token * room + sizes[token];
        compress(upper.data + at, most, bits);
        compress(lower.data + at, most - apart, bits);
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
        const int64_t rank = safe_rank(k, share), at = token * room;
        float limit = limits[token];
        if (rank < k && reached_by(lower.data + at, sizes[token], rank, limit))
            guess(token, limit + 0.5f * (upper.data[at] - lower.data[at]));
        else if (rank >= k)
            strike(token);
    }

    // The best of a token into own.best; returns how many.
    int64_t settle(Own& own, const Problem& problem, int64_t token) {
        strike(token);
        float likely = limits[token], limit = likely;
        reached_by(upper.data + token * room, sizes[token], k, likely);
        int64_t found = compute(own, problem, token, likely, INFINITY, 0);  // about k, and then what may be better than one of these
        reached_by(own.z.data(), found, k, limit);
        found = compute(own, problem, token, limit, likely, found);
        reached_by(own.z.data(), found, k, limit);
        own.best.clear();
        for (int64_t i = 0; i < found; i++)
            if (own.z[i] > 0 && own.z[i] >= limit) own.best.push_back(key(own.z[i], own.latents[i]));
        std::sort(own.best.begin(), own.best.end(), std::greater<>());
        own.computed += found;
        return std::min<int64_t>(k, own.best.size());
    }

   private:
    // Only what may be among the k best stays.
    void strike(int64_t token) {
        const int64_t at = token * room, end = at + sizes[token];
        reached_by(lower.data + at, end - at, k, limits[token]);
        int64_t left = at;
        for (int64_t j = at; j < end; j += LANES) {
            const Floats most = load(upper.data + j), least = load(lower.data + j);
            const Ints numbers = load(latents.data + j);
            const uint32_t bits = at_least(most, all(limits[token])) & below(end - j);
            compress(upper.data + left, most, bits);
            compress(lower.data + left, least, bits);
            compress(latents.data + left, numbers, bits);
            left += __builtin_popcount(bits);
        }
        sizes[token] = (int32_t)(left - at);
    }

    // The scores of those whose upper bound is in [from, to), behind the `found` that are there; returns how many there are then.
    int64_t compute(Own& own, const Problem& problem, int64_t token, float from, float to, int64_t found) const {
        const int64_t at = token * room, end = at + sizes[token];
        int64_t last = found;
        for (int64_t j = at; j < end; j += LANES) {
            const Floats most = load(upper.data + j);
            const uint32_t bits = at_least(most, all(from)) & ~at_least(most, all(to)) & below(end - j);
            compress(own.latents.data() + last, load(latents.data + j), bits);
            last += __builtin_popcount(bits);
        }
        problem.scores(token, own.latents.data() + found, last - found, own.z.data() + found);
        return last;
    }

    void make_room(Own& own, const Problem& problem, int64_t token) {
        if (guessing) look_back(token, own.share);
        strike(token);
        if (sizes[token] <= room - 4 * LANES) return;
        const int64_t count = settle(own, problem, token), at = token * room;  // so many are within the screen's error of each other
        for (int64_t j = 0; j < count; j++) {
            upper.data[at + j] = lower.data[at + j] = score_of(own.best[j]);
            latents.data[at + j] = latent_of(own.best[j]);
        }
        sizes[token] = (int32_t)count;
        if (count == k) limits[token] = std::max(limits[token], score_of(own.best[k - 1]));
    }
};

}  // namespace
