#include "config.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace moetrace {

static constexpr struct { channel bit; const char * name; } CHANNEL_NAMES[] = {
    { CHANNEL_EXPERTS,    "experts"    },
    { CHANNEL_WEIGHTS,    "weights"    },
    { CHANNEL_LOGITS,     "logits"     },
    { CHANNEL_SCORES,     "scores"     },
    { CHANNEL_GATE_INPUT, "gate_input" },
    { CHANNEL_ATTENTION,  "attention"  },
    { CHANNEL_OUTPUTS,    "outputs"    },
};

static constexpr const char * KEYS[] = {
    "trace", "capture", "layers", "collector", "on_full", "ring_size", "block_ms", "paused", "intervention",
};

const char * channel_name(channel c) {
    for (const auto & entry : CHANNEL_NAMES) {
        if (entry.bit == c) {
            return entry.name;
        }
    }
    return "?";
}

bool config::has_layer(int layer) const {
    if (layers.empty()) {
        return true;
    }
    for (const auto & range : layers) {
        if (layer >= range.first && layer <= range.second) {
            return true;
        }
    }
    return false;
}

static std::vector<std::string> string_split(const std::string & text, char sep) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, sep);) {
        if (!part.empty()) {
            parts.push_back(part);
        }
    }
    return parts;
}

static bool number_parse(const std::string & text, uint64_t & out) {
    if (text.empty() || text.size() > 18) {
        return false;
    }
    out = 0;
    for (char c : text) {
        if (!isdigit((unsigned char) c)) {
            return false;
        }
        out = out*10 + (uint64_t) (c - '0');
    }
    return true;
}

static bool capture_parse(const std::string & value, config & out, std::string & error) {
    out.channels = CHANNEL_EXPERTS; // always: the state of a (token, layer) hangs on its ids
    out.tensors.clear();
    for (const auto & part : string_split(value, ',')) {
        if (part.rfind("tensor:", 0) == 0 && part.size() > 7) {
            out.tensors.push_back(part.substr(7));
            continue;
        }
        bool known = false;
        for (const auto & entry : CHANNEL_NAMES) {
            if (part == entry.name) {
                out.channels |= entry.bit;
                known = true;
            }
        }
        if (!known) {
            error = "unknown channel '" + part + "'";
            return false;
        }
    }
    return true;
}

static bool layers_parse(const std::string & value, config & out, std::string & error) {
    out.layers.clear();
    for (const auto & part : string_split(value, ',')) {
        const size_t dash = part.find('-');
        uint64_t a = 0;
        uint64_t b = 0;
        const bool ok = dash == std::string::npos
            ? number_parse(part, a) && number_parse(part, b)
            : number_parse(part.substr(0, dash), a) && number_parse(part.substr(dash + 1), b);
        if (!ok || a > b || b > 1'000'000) {
            error = "bad layer range '" + part + "'";
            return false;
        }
        out.layers.emplace_back((int) a, (int) b);
    }
    return true;
}

template <typename T, size_t N>
static bool choice_parse(const std::string & value, const char * const (&names)[N], T & out, std::string & error) {
    for (size_t i = 0; i < N; i++) {
        if (value == names[i]) {
            out = (T) i;
            return true;
        }
    }
    error = "unknown value '" + value + "'";
    return false;
}

bool config_parse(const std::string & text, config & out, std::string & error) {
    static constexpr const char * COLLECTORS[] = { "auto", "tap", "callback" };
    static constexpr const char * ON_FULL[]    = { "block", "drop", "overwrite" };

    for (const auto & line : string_split(text, '\n')) {
        const size_t eq = line.find('=');
        const std::string key   = line.substr(0, eq);
        const std::string value = eq == std::string::npos ? "" : line.substr(eq + 1);

        uint64_t number = 0;
        bool ok = true;
        if      (key == "trace")     { out.dir = value; }
        else if (key == "capture")   { ok = capture_parse(value, out, error); }
        else if (key == "layers")    { ok = layers_parse(value, out, error); }
        else if (key == "collector") { ok = choice_parse(value, COLLECTORS, out.collector, error); }
        else if (key == "on_full")   { ok = choice_parse(value, ON_FULL, out.on_full, error); }
        else if (key == "ring_size") { ok = number_parse(value, number); out.ring_bytes = number; }
        else if (key == "block_ms")  { ok = number_parse(value, number) && number < 1'000'000'000'000ull; out.block_ns = number*1'000'000; }
        else if (key == "paused")    { ok = number_parse(value, number); out.paused = number != 0; }
        else if (key == "intervention") { ok = number_parse(value, number) && number <= UINT32_MAX; out.intervention = (uint32_t) number; }
        else                         { ok = false; }
        if (!ok) {
            error = key + ": " + (error.empty() ? "bad value '" + value + "'" : error);
            return false;
        }
    }
    if (out.collector == COLLECTOR_TAP && (out.channels & CHANNEL_ATTENTION)) {
        error = "the tap collector cannot keep attention alive for all layers at once; use callback";
        return false;
    }
    return true;
}

std::string config_from_env() {
    std::string text;
    for (const char * key : KEYS) {
        std::string name = "MOETRACE_";
        for (const char * c = key; *c; c++) {
            name += (char) toupper((unsigned char) *c);
        }
        const char * value = getenv(name.c_str());
        if (value && *value && !strchr(value, '\n')) {
            text += std::string(key) + "=" + value + "\n";
        }
    }
    return text;
}

} // namespace moetrace
