// JSON, as little of it as is needed.

#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace moetrace {

// bytes of the UTF-8 character (RFC 3629) that begins at text[i]; 0: none does
inline size_t utf8_length(const std::string & text, size_t i) {
    const auto byte = [&](size_t at) { return at < text.size() ? (uint8_t) text[at] : (uint8_t) 0; };
    const uint8_t a = byte(i);
    const size_t n = a < 0x80 ? 1 : a >= 0xC2 && a < 0xE0 ? 2 : a >= 0xE0 && a < 0xF0 ? 3 : a >= 0xF0 && a < 0xF5 ? 4 : 0;
    for (size_t j = 1; j < n; j++) {
        if ((byte(i + j) & 0xC0) != 0x80) {
            return 0;
        }
    }
    const uint8_t b = byte(i + 1); // neither overlong, nor a surrogate, nor beyond the last character
    const bool odd = (a == 0xE0 && b < 0xA0) || (a == 0xED && b >= 0xA0) || (a == 0xF0 && b < 0x90) || (a == 0xF4 && b >= 0x90);
    return odd ? 0 : n;
}

// A model's name may hold any bytes, or be cut within a character; what is no UTF-8 becomes U+FFFD, for otherwise
// nobody could read the ring.
inline std::string json_string(const std::string & text) {
    std::string out = "\"";
    for (size_t i = 0; i < text.size();) {
        const char c = text[i];
        const size_t n = utf8_length(text, i);
        if (n == 0) {
            out += "\\ufffd";
        } else if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if ((unsigned char) c < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", (unsigned) c);
            out += code;
        } else {
            out.append(text, i, n);
        }
        i += n ? n : 1;
    }
    return out + "\"";
}

template <typename T, typename F>
std::string json_list(const std::vector<T> & items, F && text) {
    std::string out = "[";
    for (const auto & item : items) {
        out += (out.size() > 1 ? "," : "") + text(item);
    }
    return out + "]";
}

} // namespace moetrace
