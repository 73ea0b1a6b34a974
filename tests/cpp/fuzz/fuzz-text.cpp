// Text from outside: the options, tensors' names, and what a model says of itself, which goes into the ring's JSON.

#include "attention.h"
#include "config.h"
#include "input.h"
#include "json.h"
#include "moe-plan.h"

using namespace moetrace;

// whether the bytes are UTF-8 (RFC 3629: nothing overlong, no surrogates)
static bool is_utf8(const std::string & text) {
    for (size_t i = 0; i < text.size();) {
        const uint8_t a = (uint8_t) text[i];
        const int n = a < 0x80 ? 0 : a >= 0xC2 && a < 0xE0 ? 1 : a >= 0xE0 && a < 0xF0 ? 2 : a >= 0xF0 && a < 0xF5 ? 3 : -1;
        if (n < 0 || i + (size_t) n >= text.size()) {
            return false;
        }
        for (int j = 1; j <= n; j++) {
            const uint8_t b = (uint8_t) text[i + (size_t) j];
            const uint8_t low  = j > 1 ? 0x80 : a == 0xE0 ? 0xA0 : a == 0xF0 ? 0x90 : 0x80;
            const uint8_t high = j > 1 ? 0xBF : a == 0xED ? 0x9F : a == 0xF4 ? 0x8F : 0xBF;
            if (b < low || b > high) {
                return false;
            }
        }
        i += (size_t) n + 1;
    }
    return true;
}

static void json_check(const std::string & text) {
    const std::string out = json_string(text);
    CHECK(out.size() >= 2 && out.front() == '"' && out.back() == '"');
    CHECK(is_utf8(out)); // or nobody can read the ring
    for (size_t i = 1; i + 1 < out.size(); i++) {
        CHECK((uint8_t) out[i] >= 0x20 && out[i] != '"');
        if (out[i] == '\\') {
            i++;
            CHECK(i + 1 < out.size() && (out[i] == '"' || out[i] == '\\' || out[i] == 'u'));
        }
    }
    CHECK(!is_utf8(text) || out.size() >= text.size() + 2); // nothing good is left out
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in { data, size };
    const uint8_t kind = in.byte();
    const std::string text = in.text(in.left);
    if (kind % 4 == 0) {
        config cfg;
        std::string error;
        const bool ok = config_parse(text, cfg, error);
        CHECK(ok || !error.empty());
        if (ok) {
            cfg.has_layer(0);
            CHECK(cfg.channels & CHANNEL_EXPERTS);
        }
    } else if (kind % 4 == 1) {
        int layer = -1;
        const char * tensor = nullptr;
        if (layer_name_parse(text.c_str(), layer, &tensor)) {
            CHECK(layer >= 0 && tensor >= text.c_str() && tensor <= text.c_str() + text.size());
        }
    } else {
        json_check(text);
    }
    return 0;
}
