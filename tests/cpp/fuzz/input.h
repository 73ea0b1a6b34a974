// What every fuzz target shares: numbers out of the input's bytes.

#pragma once

#include "../check.h"

#include <cstddef>
#include <cstdint>
#include <string>

// Hands the input out in pieces; after its end everything is 0.
struct fuzz_input {
    const uint8_t * bytes;
    size_t          left;

    uint8_t byte() {
        if (left == 0) {
            return 0;
        }
        left--;
        return *bytes++;
    }
    bool bit() { return byte() & 1; }
    uint64_t below(uint64_t n) { // n up to 65536
        const uint64_t value = n > 256 ? byte() | (uint64_t) byte() << 8 : byte();
        return value % n;
    }
    uint64_t word() {
        uint64_t value = 0;
        for (int i = 0; i < 8; i++) {
            value |= (uint64_t) byte() << 8*i;
        }
        return value;
    }
    uint64_t number() { // small as a rule, and now and then one at an edge
        static constexpr uint64_t EDGES[] = {
            0, 1, 2, 255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1ull << 32, 1ull << 62,
            0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFF0, 0xFFFFFFFFFFFFFFFF,
        };
        const uint8_t kind = byte();
        if (kind < 192) {
            return kind;
        }
        return kind < 248 ? EDGES[kind % 16] : word();
    }
    std::string text(size_t n) {
        n = n < left ? n : left;
        std::string out((const char *) bytes, n);
        bytes += n;
        left  -= n;
        return out;
    }
};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
