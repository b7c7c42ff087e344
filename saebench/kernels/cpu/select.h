// What is kept of the scores that pass the screen: the k best of each token, or all above a threshold.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

struct Entry {
    float value;
    int32_t latent;
};
static inline bool before(const Entry& a, const Entry& b) {  // the total order of selection
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// How many of a sample's best are likely to be enough to reach the k best of all, when the sample is this share of all.
static inline int64_t safe_rank(int64_t k, double share) {
    const double expected = k * share;
    return std::min<int64_t>(k, (int64_t)(expected + 4 * std::sqrt(expected) + 4));
}

// The k best of each token so far, and some that were among them once. A score matters where it reaches `limit`, which rises to the k-th
// best, and sooner by a guess from the blocks seen; where the guess was too high, which the end shows, the token is done again.
struct Best {
    int64_t k, room;
    std::vector<float> limits, guesses;
    std::vector<Entry> entries;
    std::vector<int32_t> sizes;
    bool guessing;

    Best(int64_t tokens, int64_t k, bool guessing)
        : k(k), room(2 * k + 32), limits(tokens), guesses(tokens), entries(tokens * room), sizes(tokens), guessing(guessing) {}
    void guess(int64_t token, float value) {
        guesses[token] = std::max(guesses[token], value);
        limits[token] = std::max(limits[token], value);
    }
    void offer(int64_t token, int64_t row, float z, int) {
        if (!(z > 0 && z >= limits[token])) return;
        Entry* found = entries.data() + token * room;
        found[sizes[token]++] = {z, (int32_t)row};
        if (sizes[token] == room) {
            std::nth_element(found, found + k - 1, found + room, before);
            sizes[token] = (int32_t)k;
            limits[token] = std::max(limits[token], found[k - 1].value);
        }
    }
    // The limit by what was found in this share of all latents.
    void look_back(int64_t token, double share) { look_back(token, safe_rank(k, share)); }
    void look_back(int64_t token, int64_t rank) {
        if (sizes[token] < rank) return;
        Entry* found = entries.data() + token * room;
        std::nth_element(found, found + rank - 1, found + sizes[token], before);
        if (rank < k)
            guess(token, found[rank - 1].value);
        else
            limits[token] = std::max(limits[token], found[rank - 1].value);
    }
};

// All entries above a threshold of each latent, as each thread finds them.
struct Above {
    struct Found {
        int32_t token;
        Entry entry;
    };
    const float* threshold;  // [F]
    std::vector<std::vector<Found>> found;

    Above(const float* threshold, int threads) : threshold(threshold), found(threads) {}
    void offer(int64_t token, int64_t row, float z, int thread) {
        if (z > threshold[row]) found[thread].push_back({(int32_t)token, {z, (int32_t)row}});
    }
};
