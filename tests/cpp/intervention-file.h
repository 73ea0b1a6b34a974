// Interventions, written as their file is.

#pragma once

#include "check.h"
#include "intervene.h"
#include "ring.h"

#include <cstring>
#include <vector>

namespace moetrace {

struct spec {
    intervention_kind kind;
    std::vector<uint16_t> ids;
    int32_t  sequence = -1;
    int32_t  layer    = -1;
    float    value    = 0;
    uint32_t n_rows   = 1;
    int32_t  position = 0;
};

inline std::vector<uint8_t> file_of(const std::vector<spec> & specs) {
    std::vector<uint8_t> body(specs.size()*sizeof(intervention_rule));
    for (size_t i = 0; i < specs.size(); i++) {
        const spec & s = specs[i];
        const intervention_rule rule = { s.kind, s.sequence, s.layer, s.layer, s.value, s.position, s.n_rows,
            (uint32_t) s.ids.size()/s.n_rows, sizeof(intervention_header) + body.size(), 0 };
        memcpy(body.data() + i*sizeof(rule), &rule, sizeof(rule));
        const uint8_t * ids = (const uint8_t *) s.ids.data();
        body.insert(body.end(), ids, ids + s.ids.size()*2);
    }
    intervention_header h = {};
    memcpy(h.magic, INTERVENTION_MAGIC, sizeof(h.magic));
    h.version   = INTERVENTION_VERSION;
    h.n_rules   = (uint32_t) specs.size();
    h.file_size = sizeof(h) + body.size();
    h.crc       = crc32(body.data(), body.size());
    std::vector<uint8_t> file(sizeof(h) + body.size());
    memcpy(file.data(), &h, sizeof(h));
    memcpy(file.data() + sizeof(h), body.data(), body.size());
    return file;
}

inline intervention make(const std::vector<spec> & specs) {
    intervention rules;
    std::string error;
    CHECK(rules.parse(file_of(specs), error));
    return rules;
}

} // namespace moetrace
