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

batch_entry * batch_mirror::entry(const void * batch, int32_t index) {
    const auto it = batches.find(batch);
    return it != batches.end() && index >= 0 && (size_t) index < it->second.size() ? &it->second[(size_t) index] : nullptr;
}

void batch_mirror::add_sequence(const void * batch, int32_t index) {
    if (batch_entry * e = entry(batch, index)) {
        e->n_sequences++;
    }
}

void batch_mirror::set_position(const void * batch, int32_t index, int32_t position) {
    if (batch_entry * e = entry(batch, index)) {
        e->position = position;
    }
}

void batch_mirror::set_output(const void * batch, int32_t index, uint8_t what, bool wanted) {
    if (batch_entry * e = entry(batch, index)) {
        e->outputs = (uint8_t) (wanted ? e->outputs | what : e->outputs & ~what);
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

static constexpr uint8_t EVERY = (1u << SPLIT_N) - 1;

void batch_matcher::begin() {
    one_sequence = std::all_of(batch.begin(), batch.end(), [&](const batch_entry & e) {
        return e.sequence == batch[0].sequence;
    });
    alive = EVERY;
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

// Cuts the next n rows off the batch in this way, as batch indices.
batch_matcher::fit batch_matcher::cut(split_kind kind, const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<uint32_t> & rows) {
    rows.clear();
    const uint32_t n_batch = (uint32_t) batch.size();
    const uint8_t  mine    = (uint8_t) (1u << kind);

    if (kind == SPLIT_SIMPLE || kind == SPLIT_SEQUENCE) {
        int32_t sequence = -1;
        bool    more     = false; // there would have been another row
        for (uint32_t i = 0; i < n_batch && !more; i++) {
            if ((batch[i].used & mine) || (kind == SPLIT_SEQUENCE && !rows.empty() && batch[i].sequence != sequence)) {
                continue;
            }
            more = rows.size() == n;
            if (!more) {
                sequence = batch[i].sequence;
                rows.push_back(i);
            }
        }
        if (rows.size() != n || !explains(rows, tokens, positions)) {
            return FIT_NONE;
        }
        return more && n < n_rows_max ? FIT_LOOSE : FIT_WHOLE;
    }

    // the sequences that take part, in order of their first unused token
    sequences.clear();
    for (uint32_t i = 0; i < n_batch; i++) {
        if (batch[i].used & mine) {
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
        const auto   last_member = members.begin() + (long) n_seqs;
        const bool enough = n % n_seqs == 0 && std::all_of(members.begin(), last_member, [&](const auto & m) {
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
            const bool over = (each + 1)*n_seqs > n_rows_max || std::any_of(members.begin(), last_member, [&](const auto & m) {
                return m.size() == each;
            });
            return over && (n_seqs == sequences.size() || n_seqs >= n_rows_max) ? FIT_WHOLE : FIT_LOOSE;
        }
    }
    return FIT_NONE;
}

static row_identity identity_of(const batch_entry & e) {
    return { e.sequence, e.n_sequences, false, true, e.token < 0, e.position };
}

void batch_matcher::match(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out) {
    out.assign(n, {});
    n_rows_max = std::max(n_rows_max, n);
    if (match_cut(tokens, positions, n, out)) {
        return;
    }
    // no way explains all of the batch: all go on from what the last one said
    for (auto & e : batch) {
        e.used = e.used >> last & 1 ? EVERY : 0;
    }
    alive = EVERY;
    if (!match_cut(tokens, positions, n, out)) {
        alive = EVERY;
        match_alone(tokens, positions, n, out);
    }
}

// By the ways that have explained the batch so far; false if none explains these rows.
bool batch_matcher::match_cut(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out) {
    // a way that has explained what the others could not is not doubted again while it fits
    const bool trusted = votes[SPLIT_SIMPLE] > 0 && votes[SPLIT_EQUAL] + votes[SPLIT_EQUAL_SEQUENTIAL] + votes[SPLIT_SEQUENCE] == 0;
    fit  found[SPLIT_N] = {};
    fit  most  = FIT_NONE;
    bool alone = false; // nothing else need be tried
    int  best  = -1;
    for (int kind = 0; kind < SPLIT_N && !alone; kind++) {
        if (alive >> kind & 1) {
            found[kind] = cut((split_kind) kind, tokens, positions, n, candidate[kind]);
        }
        if (found[kind] == FIT_NONE) {
            continue;
        }
        most = std::max(most, found[kind]);
        if (best < 0 || votes[kind] > votes[best] || (votes[kind] == votes[best] && found[kind] > found[best])) {
            best = kind;
        }
        alone = kind == SPLIT_SIMPLE && (one_sequence || (trusted && found[kind] == FIT_WHOLE));
    }
    if (best < 0) {
        return false;
    }
    last = best;

    if (!alone) {
        const bool told = std::any_of(found, found + SPLIT_N, [&](fit f) { return f < most; });
        for (int kind = 0; kind < SPLIT_N; kind++) {
            votes[kind] += told && found[kind] == most;
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        batch_entry & e = batch[candidate[best][r]];
        out[r] = identity_of(e);
        for (int kind = 0; kind < SPLIT_N && !alone; kind++) {
            out[r].uncertain |= found[kind] >= found[best] && votes[kind] >= votes[best] &&
                batch[candidate[kind][r]].sequence != e.sequence;
        }
        e.sure = !out[r].uncertain;
    }
    if (alone) {
        for (uint32_t r = 0; r < n; r++) {
            batch[candidate[best][r]].used = EVERY;
        }
        return true;
    }
    for (int kind = 0; kind < SPLIT_N; kind++) {
        if (found[kind] == FIT_NONE) {
            alive &= (uint8_t) ~(1u << kind);
            continue;
        }
        for (uint32_t r = 0; r < n; r++) {
            batch[candidate[kind][r]].used |= (uint8_t) (1u << kind);
        }
    }
    return true;
}

// Cut in no way that is known: the first unused token that fits each row.
void batch_matcher::match_alone(const int32_t * tokens, const int32_t * positions, uint32_t n, std::vector<row_identity> & out) {
    for (uint32_t r = 0; r < n; r++) {
        batch_entry * chosen = nullptr;
        bool others = false;
        for (int pass = 0; pass < 2; pass++) { // unused ones first, then those that were given away unsurely
            for (auto & e : batch) {
                if ((pass == 0 ? e.used != 0 : e.used == 0 || e.sure) || !fits(e, tokens, positions, r)) {
                    continue;
                }
                chosen = chosen ? chosen : &e;
                others |= e.sequence != chosen->sequence;
            }
        }
        if (chosen) {
            out[r] = identity_of(*chosen);
            out[r].uncertain = others;
            chosen->used = EVERY;
            chosen->sure = !others;
        }
    }
}

} // namespace moetrace
