// JSON, as little of it as is needed.

#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace moetrace {

inline std::string json_string(const std::string & text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if ((unsigned char) c < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", (unsigned) c);
            out += code;
        } else {
            out += c;
        }
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
