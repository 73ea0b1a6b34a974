// Under the preloaded tracer, which is not told to trace: two llama.cpp in one process, each of which must be served by
// itself, whichever comes first.

#include "check.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

using use_fn = int (*)();

int main(int, char ** argv) {
    CHECK(dlsym(RTLD_DEFAULT, "moetrace_probe")); // preloaded
    std::vector<use_fn> uses;
    for (int i = 1; i <= 2; i++) {
        void * library = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
        CHECK(library);
        uses.push_back((use_fn) dlsym(library, "use"));
        CHECK(uses.back());
    }
    const int first = argv[3][0] - '0';
    CHECK(uses[0]() == first && uses[1]() == 3 - first && uses[0]() == first);

    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) {
        threads.emplace_back([&, i] {
            for (int n = 0; n < 10000; n++) {
                CHECK(uses[i % 2]() == (i % 2 ? 3 - first : first));
            }
        });
    }
    for (auto & thread : threads) {
        thread.join();
    }
    return 0;
}
