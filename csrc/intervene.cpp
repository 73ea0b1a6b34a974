#include "intervene.h"

#include "ring.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <limits>
#include <sys/stat.h>
#include <unistd.h>

namespace moetrace {

static constexpr size_t   MAX_FILE   = 1u << 30;
static constexpr uint32_t MAX_FORCED = 1024; // that forced_score tells apart

// Above every score that a router gives, and for i = 0, 1, ... falling.
static float forced_score(uint32_t i) {
    return std::ldexp(1.0f + (float) (MAX_FORCED - i)/(float) MAX_FORCED, 100);
}

bool intervention::parse(std::vector<uint8_t> bytes, std::string & error) {
    clear();
    intervention_header h;
    if (bytes.size() < sizeof(h)) {
        error = "it is too short";
        return false;
    }
    memcpy(&h, bytes.data(), sizeof(h));
    if (memcmp(h.magic, INTERVENTION_MAGIC, sizeof(h.magic)) != 0 || h.version != INTERVENTION_VERSION) {
        error = "it is not an intervention of version " + std::to_string(INTERVENTION_VERSION);
        return false;
    }
    if (h.file_size != bytes.size() || crc32(bytes.data() + sizeof(h), bytes.size() - sizeof(h)) != h.crc ||
            h.n_rules > (bytes.size() - sizeof(h))/sizeof(intervention_rule)) {
        error = "it is damaged";
        return false;
    }
    std::vector<intervention_rule> found(h.n_rules);
    if (h.n_rules) {
        memcpy(found.data(), bytes.data() + sizeof(h), h.n_rules*sizeof(intervention_rule));
    }
    for (const auto & rule : found) {
        const uint64_t n = (uint64_t) rule.n_rows*rule.n_ids; // 32-bit each: no overflow
        const bool ok = rule.kind <= INTERVENE_REPLAY && rule.n_ids > 0 && rule.n_rows > 0 &&
            (rule.kind == INTERVENE_REPLAY || rule.n_rows == 1) && rule.first_layer <= rule.last_layer &&
            !std::isnan(rule.value) && rule.position >= 0 && n <= MAX_FILE && rule.offset <= bytes.size() && (rule.offset & 1) == 0 &&
            n*2 <= bytes.size() - rule.offset;
        if (!ok) {
            error = "a rule of it makes no sense";
            return false;
        }
    }
    file  = std::move(bytes);
    rules = std::move(found);
    return true;
}

bool intervention::read(const std::string & path, std::string & error) {
    const int fd = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > (off_t) MAX_FILE) {
        error = fd < 0 ? strerror(errno) : "it is not a file of at most 1 GiB";
        if (fd >= 0) {
            ::close(fd);
        }
        return false;
    }
    std::vector<uint8_t> bytes((size_t) info.st_size);
    size_t have = 0;
    while (have < bytes.size()) {
        const ssize_t n = ::read(fd, bytes.data() + have, bytes.size() - have);
        if (n <= 0) {
            break;
        }
        have += (size_t) n;
    }
    ::close(fd);
    bytes.resize(have); // one that is cut short does not fit its header
    return parse(std::move(bytes), error);
}

const uint16_t * intervention::ids_at(const intervention_rule & rule, int64_t position) const {
    const int64_t row = rule.kind == INTERVENE_REPLAY ? position - rule.position : 0;
    if (row < 0 || row >= rule.n_rows) {
        return nullptr;
    }
    const uint16_t * ids = (const uint16_t *) (file.data() + rule.offset) + row*rule.n_ids;
    return ids[0] == NO_EXPERT ? nullptr : ids;
}

//
// what routers can do
//

bool intervention::fits_router(const router_shape & router, int32_t sequence, std::string & error) const {
    const std::string where = "layer " + std::to_string(router.layer);
    std::vector<uint8_t> is_ablated((size_t) router.n_expert), is_forced((size_t) router.n_expert);
    bool any = false, replays = false;
    for (const auto & rule : rules) {
        if (!rule.has_layer(router.layer) || !rule.is_about(sequence)) {
            continue;
        }
        if (!router.selects) {
            error = where + ": how it chooses is not known"; // by no scores, or in a way that is not understood
            return false;
        }
        if (replays || (any && rule.kind == INTERVENE_REPLAY)) {
            error = where + ": a replay and another rule";
            return false;
        }
        any     = true;
        replays = rule.kind == INTERVENE_REPLAY;
        if (replays && rule.n_ids != (uint32_t) router.k) {
            error = where + " uses " + std::to_string(router.k) + " experts, not " + std::to_string(rule.n_ids);
            return false;
        }
        for (uint32_t row = 0; row < rule.n_rows; row++) {
            const uint16_t * ids = ids_at(rule, (int64_t) rule.position + row);
            for (uint32_t i = 0; ids && i < rule.n_ids; i++) {
                if (ids[i] >= router.n_expert) {
                    error = where + " has no expert " + std::to_string(ids[i]);
                    return false;
                }
                if (replays && std::find(ids, ids + i, ids[i]) != ids + i) {
                    error = where + ": an expert replayed twice";
                    return false;
                }
                is_ablated[ids[i]] |= rule.kind == INTERVENE_ABLATE;
                is_forced [ids[i]] |= rule.kind == INTERVENE_FORCE;
            }
        }
    }

    int n_forced = 0;
    for (int e = 0; e < router.n_expert; e++) {
        n_forced += is_forced[(size_t) e];
        if (is_forced[(size_t) e] && is_ablated[(size_t) e]) {
            error = where + ": expert " + std::to_string(e) + " ablated and forced";
            return false;
        }
    }
    if (n_forced > router.k || n_forced > (int) MAX_FORCED) {
        error = where + ": " + std::to_string(n_forced) + " forced, " + std::to_string(router.k) + " are used";
        return false;
    }
    // how many are left, in the worst choice of groups
    const int n_group = std::max(router.n_group, 1);
    std::vector<int> left((size_t) n_group, 0);
    for (int e = 0; e < router.n_expert; e++) {
        left[(size_t) (e/std::max(router.n_expert/n_group, 1)) % left.size()] += !is_ablated[(size_t) e];
    }
    std::sort(left.begin(), left.end());
    int n_left = 0;
    for (int g = 0; g < (router.n_group ? std::min(router.n_group_used, n_group) : 1); g++) {
        n_left += left[(size_t) g];
    }
    if (n_left < router.k) {
        error = where + (router.n_group ? ": groups may leave " : ": leaves ") + std::to_string(n_left) +
            " experts, " + std::to_string(router.k) + " are used";
        return false;
    }
    return true;
}

bool intervention::fits(const std::vector<router_shape> & routers, std::string & error) const {
    for (const auto & rule : rules) {
        if (std::none_of(routers.begin(), routers.end(), [&](const auto & r) { return rule.has_layer(r.layer); })) {
            error = "layer " + std::to_string(rule.first_layer) + " has no experts";
            return false;
        }
    }
    // everybody who is named, and everybody else
    std::vector<int32_t> whose { -1 };
    for (const auto & rule : rules) {
        whose.push_back(rule.sequence);
    }
    std::sort(whose.begin(), whose.end());
    whose.erase(std::unique(whose.begin(), whose.end()), whose.end());
    for (const auto & router : routers) {
        for (int32_t sequence : whose) {
            if (!fits_router(router, sequence, error)) {
                return false;
            }
        }
    }
    return true;
}

//
// the hot path
//

bool intervention::has_layer(int layer) const {
    return std::any_of(rules.begin(), rules.end(), [&](const auto & rule) { return rule.has_layer(layer); });
}

bool intervention::touches(int32_t sequence, int32_t position) const {
    return std::any_of(rules.begin(), rules.end(), [&](const auto & rule) {
        return rule.is_about(sequence) && ids_at(rule, position);
    });
}

void intervention::apply(int layer, uint32_t stages, int32_t sequence, int32_t position, float * scores, int n_expert) {
    static constexpr float INF = std::numeric_limits<float>::infinity();
    const auto order = [&](uint16_t e) { return std::isnan(scores[e]) ? -INF : scores[e]; };
    const auto each = [&](intervention_kind kind, intervention_stage stage, auto && use) {
        for (const auto & rule : rules) {
            if (rule.kind == kind && (stages & stage) && rule.has_layer(layer) && rule.is_about(sequence)) {
                const uint16_t * ids = ids_at(rule, position);
                for (uint32_t i = 0; ids && i < rule.n_ids; i++) {
                    if (ids[i] < n_expert) {
                        use(rule, ids[i], i);
                    }
                }
            }
        }
    };
    each(INTERVENE_BIAS, STAGE_SCORES, [&](const intervention_rule & rule, uint16_t e, uint32_t) {
        scores[e] += rule.value;
    });
    each(INTERVENE_ABLATE, STAGE_SCORES, [&](const intervention_rule &, uint16_t e, uint32_t) {
        scores[e] = -INF;
    });
    forced.clear();
    each(INTERVENE_FORCE, STAGE_CHOICE, [&](const intervention_rule &, uint16_t e, uint32_t) {
        forced.push_back(e);
    });
    // among themselves they keep their order
    std::sort(forced.begin(), forced.end(), [&](uint16_t a, uint16_t b) {
        return order(a) != order(b) ? order(a) > order(b) : a < b;
    });
    forced.erase(std::unique(forced.begin(), forced.end()), forced.end());
    for (uint32_t i = 0; i < forced.size(); i++) {
        scores[forced[i]] = forced_score(i);
    }
    each(INTERVENE_REPLAY, STAGE_CHOICE, [&](const intervention_rule &, uint16_t e, uint32_t i) {
        if (i == 0) {
            std::fill(scores, scores + n_expert, -INF);
        }
        scores[e] = forced_score(i);
    });
}

} // namespace moetrace
