// What a context remembers of its sequences: which position was sampled from last, through all that can happen to them.

#include "check.h"
#include "context.h"

#include <initializer_list>

using namespace moetrace;

// a batch of tokens of these sequences, at unknown positions, the last of each an output
static void batch_of(context_trace & c, std::initializer_list<int32_t> sequences) {
    auto & entries = c.matcher.entries();
    entries.clear();
    for (int32_t sequence : sequences) {
        batch_entry e;
        e.token    = 5;
        e.sequence = sequence;
        entries.push_back(e);
    }
    for (size_t i = 0; i < entries.size(); i++) {
        entries[i].outputs = OUTPUT_LOGITS;
        for (size_t j = i + 1; j < entries.size(); j++) {
            entries[i].outputs = entries[j].sequence == entries[i].sequence ? 0 : entries[i].outputs;
        }
    }
}

// after sampling at position 6 of sequence 1
static int32_t sampled_after(context_event e) {
    context_trace c;
    context_sampled(c, 1, 6);
    context_event_push(c, e);
    return c.sampled[1];
}

int main() {
    // launches, cuts, shifts, divisions, and what is another sequence's
    CHECK(sampled_after({ EVENT_LAUNCH,   1, 0, 0, 0 }) == -2);
    CHECK(sampled_after({ EVENT_LAUNCH,   0, 0, 0, 0 }) == 6);
    CHECK(sampled_after({ EVENT_CLEAR,   -1, 0, -1, 0 }) == -2);
    CHECK(sampled_after({ EVENT_SEQ_RM,   1, 7, -1, 0 }) == 6);
    CHECK(sampled_after({ EVENT_SEQ_RM,   1, 6, -1, 0 }) == -2);
    CHECK(sampled_after({ EVENT_SEQ_RM,   1, -1, 6, 0 }) == 6);
    CHECK(sampled_after({ EVENT_SEQ_RM,  -1, 0, -1, 0 }) == -2);
    CHECK(sampled_after({ EVENT_SEQ_ADD,  1, 2, -1, -2 }) == 4);
    CHECK(sampled_after({ EVENT_SEQ_ADD,  1, 7, -1, -2 }) == 6);
    CHECK(sampled_after({ EVENT_SEQ_DIV,  1, 0, -1, 2 }) == 3);
    CHECK(sampled_after({ EVENT_SEQ_DIV,  1, 0, -1, 0 }) == 6);
    CHECK(sampled_after({ EVENT_SEQ_KEEP, 1, 0, -1, 0 }) == 6);
    CHECK(sampled_after({ EVENT_SEQ_KEEP, 0, 0, -1, 0 }) == -2);
    CHECK(sampled_after({ EVENT_PAUSE,   -1, 0, 0, 0 }) == 6);

    // positions that llama.cpp gives itself are those of the rows that were computed
    context_trace c;
    batch_of(c, { 0, 0, 3 });
    context_position(c, 0, 10);
    context_position(c, 0, 11);
    context_position(c, 3, 7);
    CHECK(context_sample(c, 0) == std::make_pair(0, 10));  // by its place in the batch
    CHECK(context_sample(c, -1) == std::make_pair(3, 7));  // the last output
    CHECK(context_sample(c, -2) == std::make_pair(0, 11)); // the one before
    CHECK(context_sample(c, -3).first == -1 && context_sample(c, 3).first == -1);
    CHECK(c.sampled[0] == 11 && c.sampled[3] == 7);

    // of a sequence of which nothing was computed, and of numbers that no sequence has, nothing is known
    batch_of(c, { 9 });
    CHECK(context_sample(c, -1).first == -1);
    context_position(c, -1, 3);
    context_position(c, INT32_MAX, 3);
    CHECK(c.positions_last.size() < 100);

    // all outputs at once: a sequence with several was not sampled from
    batch_of(c, { 0, 1, 1 });
    c.matcher.entries()[1].outputs = OUTPUT_LOGITS;
    context_position(c, 0, 20);
    context_position(c, 1, 30);
    context_sampled(c, 1, 5);
    context_sample_all(c);
    CHECK(c.sampled[0] == 20 && c.sampled[1] == 5);

    // what others tell waits until it is taken in, in order
    CHECK(!context_has_mail(c));
    c.inbox = { { EVENT_SEQ_RM, 0, 20, -1, 0 }, { EVENT_LAUNCH, 1, 0, 0, 0 } };
    CHECK(context_has_mail(c));
    context_inbox_take(c);
    CHECK(!context_has_mail(c) && c.sampled[0] == -2 && c.sampled[1] == -2 && c.launched);

    // before there is a ring events wait, up to a limit, and what is beyond it is counted
    context_trace early;
    for (int i = 0; i < 5000; i++) {
        context_event_push(early, { EVENT_SEQ_RM, 0, i, -1, 0 });
    }
    CHECK(early.early.size() + early.counts_early[COUNT_EVENTS_LOST] == 5000 && early.early.back().p0 == (int32_t) early.early.size() - 1);
    printf("ok\n");
    return 0;
}
