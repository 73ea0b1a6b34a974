// Batches and ubatches that have nothing to do with each other, or nearly everything: whoever a row is said to be,
// the batch has an entry of that sequence.

#include "batch-watch.h"
#include "input.h"

#include <algorithm>

using namespace moetrace;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in { data, size };
    batch_matcher matcher;
    batch_mirror mirror;
    std::vector<row_identity> who;
    const size_t n_batches = 1 + (size_t) in.below(4);
    for (size_t b = 0; b < n_batches; b++) {
        const void * handle = (const void *) (uintptr_t) (16 + b%2);
        const int n = (int) in.below(24);
        for (int i = 0; i < n; i++) {
            int32_t index = in.below(8) ? i : (int32_t) in.number();
            if (index > 4096 && index < 1 << 24) {
                index %= 4096; // a batch of millions is slow, and nothing else
            }
            const int32_t sequence = in.below(8) ? (int32_t) in.below(4) : (int32_t) in.number();
            mirror.add(handle, index, sequence, (int32_t) in.below(6) - 1);
            if (in.bit()) {
                mirror.set_position(handle, index, in.below(8) ? (int32_t) in.below(16) : (int32_t) in.number());
            }
            if (in.below(4) == 0) {
                mirror.add_sequence(handle, (int32_t) in.number());
            }
        }
        const auto * entries = mirror.find(handle);
        if (!entries) {
            continue;
        }
        matcher.entries().assign(entries->begin(), entries->end());
        matcher.begin();
        const size_t n_ubatches = (size_t) in.below(6);
        for (size_t u = 0; u < n_ubatches; u++) {
            const uint32_t rows = (uint32_t) in.below(24);
            std::vector<int32_t> tokens(rows), positions(rows);
            for (uint32_t i = 0; i < rows; i++) {
                tokens[i]    = (int32_t) in.below(6) - 1;
                positions[i] = in.below(8) ? (int32_t) in.below(16) : (int32_t) in.number();
            }
            matcher.match(in.below(8) ? tokens.data() : nullptr, in.below(8) ? positions.data() : nullptr, rows, who);
            CHECK(who.size() >= rows);
            for (uint32_t i = 0; i < rows; i++) {
                CHECK(!who[i].found || std::any_of(entries->begin(), entries->end(), [&](const batch_entry & e) {
                    return e.sequence == who[i].sequence;
                }));
            }
        }
        if (in.bit()) {
            mirror.clear(handle);
        } else {
            mirror.free(handle);
        }
    }
    return 0;
}
