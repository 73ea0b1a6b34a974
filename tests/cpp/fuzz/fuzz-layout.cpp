// Discovery of ggml_tensor's layout in a ggml whose tensors are laid out anyhow and whose functions lie. Without a
// lie the layout is found; with one it is refused, or what was found is true all the same.

#include "fake-ggml.h"
#include "ggml-abi.h"
#include "input.h"

#include <utility>

using namespace moetrace;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in { data, size };
    fake_ggml f;

    // the fields in any order, with gaps
    std::vector<std::pair<size_t *, size_t>> fields = {
        { &f.type, 4 }, { &f.op, 4 }, { &f.flags, 4 }, { &f.buffer, 8 }, { &f.ne, 32 }, { &f.nb, 32 }, { &f.src, 80 },
        { &f.view_src, 8 }, { &f.view_offs, 8 }, { &f.data, 8 }, { &f.name, 64 },
    };
    size_t end = 0;
    while (!fields.empty()) {
        const size_t i = (size_t) in.below(fields.size());
        const auto [field, bytes] = fields[i];
        fields.erase(fields.begin() + (ptrdiff_t) i);
        const size_t align = bytes == 4 ? 4 : 8;
        end    = ((end + align - 1) & ~(align - 1)) + 4*(size_t) in.below(16)/align*align;
        *field = end;
        end   += bytes;
    }
    f.size     = ((end + 7) & ~(size_t) 7) + 8*(1 + (size_t) in.below(8)); // the last word is no field's: LIE_SET_OUTPUT_2
    f.first_op = 1 + (int) in.below(200);
    f.noise    = in.byte();
    f.lies     = (uint32_t) in.word() & LIE_ALL;
    f.n_tensors = (int) in.below(16);
    fake() = f;

    ggml_abi abi;
    std::string error;
    const bool ok = abi.attach(error);
    CHECK(ok || !error.empty());
    if (f.lies == 0 && f.noise == 0 && f.size >= 168) {
        CHECK(ok);
    }
    // these make a field unreadable, whatever the rest looks like
    constexpr uint32_t FATAL = LIE_TYPE_NAME | LIE_INIT | LIE_OP_NULL | LIE_VIEW | LIE_SOURCES | LIE_SET_OUTPUT |
        LIE_SET_INPUT | LIE_BUFFER | LIE_ALLOC | LIE_GET_DATA | LIE_HOST | LIE_SET_DATA | LIE_STRIDES | LIE_NODES |
        LIE_OP_NAME | LIE_GET_NAME | LIE_VIEW_OFFSET;
    CHECK(!ok || !(f.lies & FATAL));
    if (ok) {
        CHECK(abi.off_type == f.type && abi.off_ne == f.ne && abi.off_nb == f.nb && abi.off_op == f.op);
        CHECK(abi.off_src == f.src && abi.off_view_src == f.view_src && abi.off_view_offs == f.view_offs);
        CHECK(abi.off_data == f.data && abi.off_buffer == f.buffer && abi.off_name == f.name);
        CHECK(abi.off_flags == f.flags);
    }
    return 0;
}
