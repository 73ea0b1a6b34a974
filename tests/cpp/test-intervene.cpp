#include "check.h"
#include "intervention-file.h"

#include <cmath>
#include <cstring>
#include <random>

using namespace moetrace;

static std::vector<float> applied(intervention rules, uint32_t stages, int32_t sequence, int32_t position = 0, int layer = 1) {
    std::vector<float> scores { 0.1f, 0.4f, 0.2f, -INFINITY, 0.3f };
    rules.apply(layer, stages, sequence, position, scores.data(), (int) scores.size());
    return scores;
}

static void test_scores() {
    constexpr uint32_t ALL = STAGE_SCORES | STAGE_CHOICE;
    const intervention rules = make({
        { INTERVENE_ABLATE, { 1 } }, { INTERVENE_BIAS, { 0 }, 7, 1, 0.5f }, { INTERVENE_FORCE, { 2, 3, 4 }, -1, 1 },
    });
    auto s = applied(rules, ALL, 7);
    CHECK(std::isinf(s[1]) && s[1] < 0);
    CHECK(s[0] == 0.6f);
    CHECK(s[4] > s[2] && s[2] > s[3] && s[3] > 1e20f); // forced ones keep their order
    s = applied(rules, ALL, 6);
    CHECK(s[0] == 0.1f); // not its sequence
    s = applied(rules, ALL, 7, 0, 2);
    CHECK(s[0] == 0.1f && s[4] == 0.3f && std::isinf(s[1])); // not their layer
    s = applied(rules, STAGE_SCORES, 7);
    CHECK(s[0] == 0.6f && s[4] == 0.3f);
    s = applied(rules, STAGE_CHOICE, 7);
    CHECK(s[0] == 0.1f && s[1] == 0.4f && s[4] > 1e20f);
    CHECK(rules.touches(99, -1) && rules.has_layer(55));
}

static void test_replay() {
    const intervention rules = make({ { INTERVENE_REPLAY, { 4, 0, NO_EXPERT, NO_EXPERT, 3, 1 }, 2, 1, 0, 3, 10 } });
    auto s = applied(rules, STAGE_CHOICE, 2, 10);
    CHECK(s[4] > s[0] && s[0] > 1e20f && s[1] < 0 && std::isinf(s[1]) && std::isinf(s[2]));
    s = applied(rules, STAGE_CHOICE, 2, 12);
    CHECK(s[3] > s[1] && s[1] > 1e20f && std::isinf(s[4]));
    for (int32_t position : { -1, 9, 11, 13, INT32_MAX }) { // before, a hole, behind
        CHECK(applied(rules, STAGE_CHOICE, 2, position)[1] == 0.4f);
        CHECK(!rules.touches(2, position));
    }
    CHECK(rules.touches(2, 10) && !rules.touches(1, 10));
}

// whatever the bytes are: an answer, within bounds
static void test_fuzz() {
    std::mt19937 random(1);
    const std::vector<router_shape> routers = { { 0, 5, 2, 0, 0, true }, { 1, 8, 2, 4, 2, true } };
    int n_parsed = 0;
    for (int i = 0; i < 20000; i++) {
        auto file = file_of({ { INTERVENE_ABLATE, { 1, 2 } }, { INTERVENE_REPLAY, { 4, 0, 1, 2 }, 2, 1, 0, 2, 10 } });
        for (unsigned n = random() % 4; n > 0; n--) {
            file[sizeof(intervention_header) + random() % (file.size() - sizeof(intervention_header))] = (uint8_t) random();
        }
        const uint32_t crc = crc32(file.data() + sizeof(intervention_header), file.size() - sizeof(intervention_header));
        memcpy(file.data() + offsetof(intervention_header, crc), &crc, 4);
        intervention rules;
        std::string error;
        if (rules.parse(file, error)) {
            n_parsed++;
            rules.fits(routers, error);
            applied(rules, STAGE_SCORES | STAGE_CHOICE, 2, (int32_t) random());
            applied(rules, STAGE_SCORES | STAGE_CHOICE, 2, 10);
        } else {
            CHECK(!error.empty() && rules.is_empty());
        }
    }
    CHECK(n_parsed > 1000);
}

int main() {
    test_scores();
    test_replay();
    test_fuzz();
    return 0;
}
