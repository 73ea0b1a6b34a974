// Runs a fuzz target over stored inputs, without a fuzzer: what a compiler that has none tests with.
// Arguments: files, or folders of them.

#include "input.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

int main(int argc, char ** argv) {
    namespace fs = std::filesystem;
    size_t n = 0;
    const auto run = [&](const fs::path & path) {
        std::ifstream file(path, std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        LLVMFuzzerTestOneInput((const uint8_t *) bytes.data(), bytes.size());
        n++;
    };
    for (int i = 1; i < argc; i++) {
        if (fs::is_directory(argv[i])) {
            for (const auto & entry : fs::directory_iterator(argv[i])) {
                run(entry.path());
            }
        } else {
            run(argv[i]);
        }
    }
    CHECK(n > 0); // an empty corpus tests nothing
    printf("%zu inputs\n", n);
    return 0;
}
