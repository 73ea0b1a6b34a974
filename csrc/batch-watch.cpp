#include "batch-watch.h"

#include <algorithm>

namespace moetrace {

//
// batch_mirror
//

static constexpr int32_t MAX_BATCH = 1 << 22; // tokens; an index beyond is none

int32_t batch_mirror::add(const void * batch, int32_t index, int32_t sequence, int32_t token) {
    if (index >= 0 && index < MAX_BATCH) {
        auto & entries = batches[batch];
        entries.resize((size_t) index + 1);
        entries.back() = {};
        entries.back().token       = token;
        entries.back().sequence    = sequence;
        entries.back().n_sequences = 1;
    }
    return index;
}

void batch_mirror::add_sequence(const void * batch, int32_t index) {
    const auto it = batches.find(batch);
    if (it != batches.end() && index >= 0 && (size_t) index < it->second.size()) {
        it->second[(size_t) index].n_sequences++;
    }
}

void batch_mirror::set_position(const void * batch, int32_t index, int32_t position) {
    const auto it = batches.find(batch);
    if (it != batches.end() && index >= 0 && (size_t) index < it->second.size()) {
        it->second[(size_t) index].position = position;
    }
}

void batch_mirror::clear(const void * batch) {
    const auto it = batches.find(batch);
    if (it != batches.end()) {
        it->second.clear();
    }
}

void batch_mirror::free(const void * batch) {
    batches.erase(batch);
}

const std::vector<batch_entry> * batch_mirror::find(const void * batch) const {
    const auto it = batches.find(batch);
    return it == batches.end() ? nullptr : &it->second;
}

//
// batch_matcher
//

void batch_matcher::begin() {
    one_sequence = std::all_of(batch.begin(), batch.end(), [&](const batch_entry & e) {
        return e.sequence == batch[0].sequence;
    });
}

bool batch_matcher::fits(const batch_entry & e, const int32_t * tokens, const int32_t * positions, uint32_t row) const {
    // a vector input leaves the token input unset
    return (!tokens || e.token < 0 || e.token == tokens[row]) &&
        (!positions || e.position == batch_entry::UNKNOWN || e.position == positions[row]);
}

bool batch_matcher::explains(const std::vector<uint32_t> & rows, const int32_t * tokens, const int32_t * positions) const {
    for (uint32_t r = 0; r < rows.size(); r++) {
        if (!fits(batch[rows[r]], tokens, positions, r)) {
            return false;
        }
    }
    return true;
}

// Cuts the next n rows off the batch in this way, as batch indices; false if that does not give these rows.
bool batch_matcher::cut(split_kind kind, const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<uint32_t> & rows) {
    rows.clear();
    const uint32_t n_batch = (uint32_t) batch.size();

    if (kind == SPLIT_SIMPLE || kind == SPLIT_SEQUENCE) {
        int32_t sequence = -1;
        for (uint32_t i = 0; i < n_batch && rows.size() < n; i++) {
            if (batch[i].used || (kind == SPLIT_SEQUENCE && !rows.empty() && batch[i].sequence != sequence)) {
                continue;
            }
            sequence = batch[i].sequence;
            rows.push_back(i);
        }
        return rows.size() == n && explains(rows, tokens, positions);
    }

    // the sequences that take part, in order of their first unused token
    sequences.clear();
    for (uint32_t i = 0; i < n_batch; i++) {
        if (batch[i].used) {
            continue;
        }
        const int32_t s = batch[i].sequence;
        const size_t at = (size_t) (std::find(sequences.begin(), sequences.end(), s) - sequences.begin());
        if (at == sequences.size()) {
            if (kind == SPLIT_EQUAL_SEQUENTIAL && !sequences.empty() && (int64_t) s != (int64_t) sequences.back() + 1) {
                continue;
            }
            sequences.push_back(s);
            if (members.size() < sequences.size()) {
                members.emplace_back();
            }
            members[at].clear();
        }
        members[at].push_back(i);
    }
    // equally many of each; of how many sequences does not show, so try, most first
    for (size_t n_seqs = sequences.size(); n_seqs > 0; n_seqs--) {
        const size_t each = n/n_seqs;
        const bool enough = n % n_seqs == 0 && std::all_of(members.begin(), members.begin() + (long) n_seqs, [&](const auto & m) {
            return m.size() >= each;
        });
        if (!enough) {
            continue;
        }
        rows.clear();
        for (size_t s = 0; s < n_seqs; s++) {
            rows.insert(rows.end(), members[s].begin(), members[s].begin() + (long) each);
        }
        if (explains(rows, tokens, positions)) {
            return true;
        }
    }
    return false;
}

static row_identity identity_of(const batch_entry & e) {
    return { e.sequence, e.n_sequences, false, true, e.token < 0, e.position };
}

void batch_matcher::match(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out) {
    out.assign(n, {});

    int best = -1;
    bool explained[SPLIT_N] = {};
    // a way that has explained what the others could not is not doubted again while it fits
    const bool trusted = votes[SPLIT_SIMPLE] > 0 && votes[SPLIT_EQUAL] + votes[SPLIT_EQUAL_SEQUENTIAL] + votes[SPLIT_SEQUENCE] == 0;
    int n_tried = 0;
    int n_explained = 0;
    for (int kind = 0; kind < SPLIT_N; kind++) {
        n_tried++;
        explained[kind] = cut((split_kind) kind, tokens, positions, n, candidate[kind]);
        if (explained[kind]) {
            n_explained++;
            if (best < 0 || votes[kind] > votes[best]) {
                best = kind;
            }
            if (kind == SPLIT_SIMPLE && (one_sequence || trusted)) {
                break;
            }
        }
    }

    if (best >= 0) {
        for (int kind = 0; kind < n_tried; kind++) {
            votes[kind] += explained[kind] && n_explained < n_tried;
        }
        for (uint32_t r = 0; r < n; r++) {
            const batch_entry & e = batch[candidate[best][r]];
            out[r] = identity_of(e);
            for (int kind = 0; kind < n_tried; kind++) {
                out[r].uncertain |= explained[kind] && votes[kind] >= votes[best] &&
                    batch[candidate[kind][r]].sequence != e.sequence;
            }
        }
        for (uint32_t r = 0; r < n; r++) {
            batch[candidate[best][r]].used = true;
        }
        return;
    }

    // cut in no way that is known: take the first unused token that fits each row
    for (uint32_t r = 0; r < n; r++) {
        batch_entry * chosen = nullptr;
        for (auto & e : batch) {
            if (e.used || !fits(e, tokens, positions, r)) {
                continue;
            }
            if (!chosen) {
                chosen = &e;
                out[r] = identity_of(e);
            } else {
                out[r].uncertain |= e.sequence != chosen->sequence;
            }
        }
        if (chosen) {
            chosen->used = true;
        }
    }
}

} // namespace moetrace
