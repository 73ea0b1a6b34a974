#include "ggml-abi.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace moetrace {

template <typename F>
static bool function_find(F *& out, const char * name) {
    out = (F *) symbol_find(name);
    return out != nullptr;
}

// Finds functions, and remembers the first that is not there.
struct function_finder {
    const char * missing = nullptr;

    template <typename F>
    void operator()(F *& out, const char * name) {
        if (!function_find(out, name) && !missing) {
            missing = name;
        }
    }
};

bool ggml_abi::functions_find(std::string & error) {
    function_finder need;
    need(graph_n_nodes,            "ggml_graph_n_nodes");
    need(graph_node,               "ggml_graph_node");
    need(graph_get_tensor,         "ggml_graph_get_tensor");
    need(set_output,               "ggml_set_output");
    need(tensor_get,               "ggml_backend_tensor_get");
    need(tensor_set,               "ggml_backend_tensor_set");
    need(tensor_get_async,         "ggml_backend_tensor_get_async");
    need(buffer_is_host,           "ggml_backend_buffer_is_host");
    need(sched_synchronize,        "ggml_backend_sched_synchronize");
    need(sched_get_tensor_backend, "ggml_backend_sched_get_tensor_backend");
    need(sched_get_n_backends,     "ggml_backend_sched_get_n_backends");
    need(sched_get_backend,        "ggml_backend_sched_get_backend");
    need(backend_name,             "ggml_backend_name");
    need(op_name,                  "ggml_op_name");
    need(view_1d,                  "ggml_view_1d");
    need(tensor_overhead,          "ggml_tensor_overhead");
    need(free,                     "ggml_free");
    need(init,                     "ggml_init");
    need(new_tensor_4d,            "ggml_new_tensor_4d");
    need(tensor_alloc,             "ggml_backend_tensor_alloc");
    need(buffer_free,              "ggml_backend_buffer_free");
    if (need.missing) {
        error = std::string("ggml has no function ") + need.missing;
        return false;
    }
    function_find(backend_get_device,   "ggml_backend_get_device");
    function_find(dev_host_buffer_type, "ggml_backend_dev_host_buffer_type");
    function_find(buft_alloc_buffer,    "ggml_backend_buft_alloc_buffer");
    function_find(buffer_get_base,      "ggml_backend_buffer_get_base");
    function_find(buffer_get_type,      "ggml_backend_buffer_get_type");
    function_find(buffer_clear,         "ggml_backend_buffer_clear");
    function_find(buft_get_alloc_size,  "ggml_backend_buft_get_alloc_size");
    function_find(buft_get_alignment,   "ggml_backend_buft_get_alignment");
    function_find(view_init,            "ggml_backend_view_init");
    function_find(build_forward_expand, "ggml_build_forward_expand");
    function_find(build_forward_select, "ggml_build_forward_select");
    function_find(graph_size,           "ggml_graph_size");
    return true;
}

//
// layout
//

namespace {

// what builds the probe graph, and is not needed afterwards
struct probe_functions {
    ggml_tensor *  (*mul_mat_id)(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *) = nullptr;
    ggml_tensor *  (*add)(ggml_context *, ggml_tensor *, ggml_tensor *) = nullptr;
    ggml_tensor *  (*get_rows)(ggml_context *, ggml_tensor *, ggml_tensor *) = nullptr;
    ggml_tensor *  (*soft_max)(ggml_context *, ggml_tensor *) = nullptr;
    ggml_tensor *  (*set_name)(ggml_tensor *, const char *) = nullptr;
    const char *   (*get_name)(const ggml_tensor *) = nullptr;
    const char *   (*type_name)(int32_t) = nullptr;
    void           (*set_input)(ggml_tensor *) = nullptr;
    void *         (*get_data)(const ggml_tensor *) = nullptr;
    ggml_backend_buffer * (*buffer_from_ptr)(void *, size_t) = nullptr;

    // gives the name of one that is missing
    const char * find() {
        function_finder need;
        need(mul_mat_id,      "ggml_mul_mat_id");
        need(add,             "ggml_add");
        need(get_rows,        "ggml_get_rows");
        need(soft_max,        "ggml_soft_max");
        need(set_name,        "ggml_set_name");
        need(get_name,        "ggml_get_name");
        need(type_name,       "ggml_type_name");
        need(set_input,       "ggml_set_input");
        need(get_data,        "ggml_get_data");
        need(buffer_from_ptr, "ggml_backend_cpu_buffer_from_ptr");
        return need.missing;
    }
};

// a tensor's bytes as words of type T at every offset aligned for T
template <typename T>
struct words {
    const ggml_tensor * t;
    size_t size;
    T at(size_t offset) const {
        T value;
        memcpy(&value, (const char *) t + offset, sizeof(T));
        return value;
    }
    template <typename F> std::vector<size_t> where(F match, size_t span = sizeof(T)) const {
        std::vector<size_t> found;
        for (size_t offset = 0; offset + span <= size; offset += sizeof(T)) {
            if (match(offset)) {
                found.push_back(offset);
            }
        }
        return found;
    }
};

std::vector<size_t> intersect(const std::vector<size_t> & a, const std::vector<size_t> & b) {
    std::vector<size_t> both;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    return both;
}

bool same_text(const char * a, const char * b) { // neither need be there
    return a && b && strcmp(a, b) == 0;
}

template <typename T>
std::vector<size_t> run_find(const ggml_tensor * t, size_t size, const std::vector<T> & run) {
    const words<T> w { t, size };
    return w.where([&](size_t offset) {
        for (size_t i = 0; i < run.size(); i++) {
            if (w.at(offset + i*sizeof(T)) != run[i]) {
                return false;
            }
        }
        return true;
    }, run.size()*sizeof(T));
}

bool unique(const std::vector<size_t> & found, size_t & out) {
    if (found.size() != 1) {
        return false;
    }
    out = found[0];
    return true;
}

} // namespace

// Tensors of known values, and each step finds a field by them. A step gives the name of what it does not find.
struct ggml_abi::layout_probe {
    ggml_abi & abi;
    probe_functions f;
    std::vector<uint64_t> arena;
    ggml_context *        ctx    = nullptr;
    ggml_backend_buffer * buffer = nullptr;
    ggml_tensor * a = nullptr, * b = nullptr, * ids = nullptr;

    explicit layout_probe(ggml_abi & abi) : abi(abi) {}
    ~layout_probe() {
        if (buffer) {
            abi.buffer_free(buffer);
        }
        if (ctx) {
            abi.free(ctx);
        }
    }

    bool         begin(std::string & error);
    const char * shape_find();
    const char * name_find();
    const char * op_find(const std::array<std::pair<ggml_tensor *, const char *>, 5> & nodes);
    const char * nodes_find();
    const char * view_find(const ggml_tensor * view, const ggml_tensor * nested, const ggml_tensor * no_view);
    const char * flags_find();
    const char * place_find();
};

bool ggml_abi::layout_probe::begin(std::string & error) {
    const char * missing = f.find();
    if (missing) {
        error = std::string("ggml has no function ") + missing;
        return false;
    }
    for (const auto & [number, name] : { std::pair<int32_t, const char *> { TYPE_F32, "f32" },
            { TYPE_F16, "f16" }, { TYPE_I32, "i32" }, { TYPE_I64, "i64" } }) {
        if (!same_text(f.type_name(number), name)) {
            error = std::string("type number ") + std::to_string(number) + " is not " + name;
            return false;
        }
    }
    constexpr size_t OBJECT_SIZE = 32; // ggml_object, part of ggml_tensor_overhead
    const size_t overhead = abi.tensor_overhead();
    if (overhead < 200 || overhead > 4096) {
        error = "a tensor takes " + std::to_string(overhead) + " bytes";
        return false;
    }
    abi.tensor_size = overhead - OBJECT_SIZE;

    // zeroed, so that looking one struct too far reads zeros
    arena.assign(overhead*32/8 + 4096, 0);
    ctx = abi.init({ overhead*32, arena.data(), true });
    if (!ctx) {
        error = "ggml_init failed";
        return false;
    }
    a   = abi.new_tensor_4d(ctx, TYPE_F32, 3, 5, 7, 11);
    b   = abi.new_tensor_4d(ctx, TYPE_F16, 13, 17, 2, 19);
    ids = abi.new_tensor_4d(ctx, TYPE_I32, 2, 3, 1, 1);
    if (!a || !b || !ids) {
        error = "ggml could not make the probe tensors";
        return false;
    }
    return true;
}

const char * ggml_abi::layout_probe::shape_find() {
    const size_t size = abi.tensor_size;
    if (!unique(intersect(run_find<int64_t>(a, size, { 3, 5, 7, 11 }), run_find<int64_t>(b, size, { 13, 17, 2, 19 })), abi.off_ne)) {
        return "ne";
    }
    if (!unique(intersect(run_find<size_t>(a, size, { 4, 12, 60, 420 }), run_find<size_t>(b, size, { 2, 26, 442, 884 })), abi.off_nb)) {
        return "nb";
    }
    // the word that follows all of three types
    const auto type_at = [&](const ggml_tensor * t, int32_t type) { return run_find<int32_t>(t, size, { type }); };
    const auto found = intersect(intersect(type_at(a, TYPE_F32), type_at(b, TYPE_F16)), type_at(ids, TYPE_I32));
    return unique(found, abi.off_type) ? nullptr : "type";
}

const char * ggml_abi::layout_probe::name_find() {
    const size_t size = abi.tensor_size;
    f.set_name(a, "moetrace-probe");
    abi.off_name = (size_t) (f.get_name(a) - (const char *) a);
    const bool found = abi.off_name <= size && size - abi.off_name >= 15 && strcmp((const char *) a + abi.off_name, "moetrace-probe") == 0;
    return found ? nullptr : "name";
}

// Every node's operation differs, and a leaf's is zero.
const char * ggml_abi::layout_probe::op_find(const std::array<std::pair<ggml_tensor *, const char *>, 5> & nodes) {
    const words<int32_t> leaf { a, abi.tensor_size };
    const auto candidates = leaf.where([&](size_t offset) {
        std::vector<int32_t> seen { 0 };
        if (leaf.at(offset) != 0) {
            return false;
        }
        for (const auto & node : nodes) {
            const int32_t value = words<int32_t> { node.first, abi.tensor_size }.at(offset);
            if (value <= 0 || value > 255 || std::find(seen.begin(), seen.end(), value) != seen.end()) {
                return false;
            }
            seen.push_back(value);
        }
        return true;
    });
    if (!unique(candidates, abi.off_op)) {
        return "op";
    }
    for (const auto & node : nodes) {
        if (!same_text(abi.op_name(abi.op_number(node.first)), node.second)) {
            return "op";
        }
    }
    return nullptr;
}

// Operations, their sources, and views.
const char * ggml_abi::layout_probe::nodes_find() {
    ggml_tensor * experts = abi.new_tensor_4d(ctx, TYPE_F32, 8, 4, 6, 1);
    ggml_tensor * x       = abi.new_tensor_4d(ctx, TYPE_F32, 8, 1, 3, 1);
    ggml_tensor * routed  = experts && x ? f.mul_mat_id(ctx, experts, x, ids) : nullptr;
    ggml_tensor * sum     = f.add(ctx, a, a);
    ggml_tensor * prob    = f.soft_max(ctx, a);
    ggml_tensor * view    = abi.view_1d(ctx, a, 2, 12);
    ggml_tensor * nested  = view ? abi.view_1d(ctx, view, 1, 4) : nullptr;
    ggml_tensor * picked  = abi.new_tensor_4d(ctx, TYPE_I32, 4, 7, 11, 1);
    ggml_tensor * rows    = picked ? f.get_rows(ctx, a, picked) : nullptr;
    if (!routed || !sum || !prob || !view || !nested || !rows) {
        return "op";
    }
    if (const char * missing = op_find({{
            { routed, "MUL_MAT_ID" }, { sum, "ADD" }, { prob, "SOFT_MAX" }, { view, "VIEW" }, { rows, "GET_ROWS" } }})) {
        return missing;
    }
    if (!unique(run_find<const ggml_tensor *>(routed, abi.tensor_size, { experts, x, ids }), abi.off_src) || abi.src(sum, 0) != a || abi.src(sum, 1) != a) {
        return "src";
    }
    return view_find(view, nested, sum);
}

// The root stands beside the source.
const char * ggml_abi::layout_probe::view_find(const ggml_tensor * view, const ggml_tensor * nested, const ggml_tensor * no_view) {
    const size_t size = abi.tensor_size;
    auto found = run_find<const ggml_tensor *>(view, size, { a });
    found.erase(std::remove(found.begin(), found.end(), abi.off_src), found.end());
    if (!unique(found, abi.off_view_src) || abi.view_src(nested) != a || abi.view_src(no_view) != nullptr) {
        return "view_src";
    }
    return unique(intersect(run_find<size_t>(view, size, { 12 }), run_find<size_t>(nested, size, { 16 })), abi.off_view_offs) ? nullptr : "view_offs";
}

// The word that marking changes.
const char * ggml_abi::layout_probe::flags_find() {
    const size_t size = abi.tensor_size;
    const std::vector<char> before((const char *) b, (const char *) b + size);
    abi.set_output(b);
    int n_changed = 0;
    for (size_t offset = 0; offset + 4 <= size; offset += 4) {
        if (memcmp(before.data() + offset, (const char *) b + offset, 4) != 0) {
            abi.off_flags = offset;
            n_changed++;
        }
    }
    if (n_changed != 1) {
        return "flags";
    }
    const int32_t with_output = field<int32_t>(b, abi.off_flags);
    f.set_input(b);
    const int32_t with_both = field<int32_t>(b, abi.off_flags);
    return with_both != with_output && (with_both & with_output) == with_output ? nullptr : "flags";
}

// Data and buffer: places a tensor and looks; and a second look at everything, through the offsets.
const char * ggml_abi::layout_probe::place_find() {
    char memory[4096 + 64] = {};
    char * base = memory + (64 - ((uintptr_t) memory & 63));
    buffer = f.buffer_from_ptr(base, 2048);
    ggml_tensor * placed = abi.new_tensor_4d(ctx, TYPE_F32, 4, 4, 1, 1);
    if (!buffer || !placed) {
        return "buffer";
    }
    abi.tensor_alloc(buffer, placed, base + 128);
    const auto at_data   = run_find<const void *>(placed, abi.tensor_size, { base + 128 });
    const auto at_buffer = run_find<const void *>(placed, abi.tensor_size, { (const void *) buffer });
    if (!unique(at_data, abi.off_data) || f.get_data(placed) != base + 128) {
        return "data";
    }
    if (!unique(at_buffer, abi.off_buffer) || !abi.buffer_is_host(abi.buffer(placed))) {
        return "buffer";
    }
    float values[16];
    for (int i = 0; i < 16; i++) {
        values[i] = (float) i;
    }
    abi.tensor_set(placed, values, 0, sizeof(values));
    const bool agrees = ((const float *) abi.data(placed))[13] == 13.0f && abi.ne(placed)[1] == 4 && abi.nb(placed)[1] == 16 &&
        abi.type(placed) == TYPE_F32;
    abi.buffer_free(buffer);
    buffer = nullptr; // its memory goes
    return agrees ? nullptr : "data";
}

bool ggml_abi::layout_discover(std::string & error) {
    layout_probe probe(*this);
    if (!probe.begin(error)) {
        return false;
    }
    using step = const char * (layout_probe::*)();
    for (const step find : { &layout_probe::shape_find, &layout_probe::name_find, &layout_probe::nodes_find, &layout_probe::flags_find,
            &layout_probe::place_find }) {
        if (const char * missing = (probe.*find)()) {
            error = std::string("the layout of ggml_tensor is not recognised: no field '") + missing + "'";
            return false;
        }
    }
    return true;
}

bool ggml_abi::attach(std::string & error) {
    if (attached) {
        return true;
    }
    std::fill(std::begin(kinds), std::end(kinds), OP_UNKNOWN);
    const char * (*ggml_version)() = nullptr;
    const char * (*ggml_commit)() = nullptr;
    version = function_find(ggml_version, "ggml_version") ? ggml_version() : "of unknown version";
    if (function_find(ggml_commit, "ggml_commit")) {
        version += std::string(" (") + ggml_commit() + ")";
    }
    attached = functions_find(error) && layout_discover(error);
    if (!attached) {
        error += "; ggml " + version;
    }
    return attached;
}

op_kind ggml_abi::op(const ggml_tensor * t) {
    static constexpr struct { const char * name; op_kind kind; } NAMES[] = {
        { "NONE", OP_NONE }, { "MUL_MAT", OP_MUL_MAT }, { "MUL_MAT_ID", OP_MUL_MAT_ID }, { "ADD", OP_ADD },
        { "ADD_ID", OP_ADD_ID }, { "MUL", OP_MUL }, { "DIV", OP_DIV }, { "SCALE", OP_SCALE },
        { "SOFT_MAX", OP_SOFT_MAX }, { "GET_ROWS", OP_GET_ROWS }, { "SET_ROWS", OP_SET_ROWS },
        { "ARGSORT", OP_ARGSORT }, { "TOP_K", OP_TOP_K }, { "VIEW", OP_VIEW }, { "RESHAPE", OP_RESHAPE },
        { "PERMUTE", OP_PERMUTE }, { "TRANSPOSE", OP_TRANSPOSE }, { "CONT", OP_CONT }, { "CPY", OP_CPY },
        { "CLAMP", OP_CLAMP }, { "UNARY", OP_UNARY }, { "ROPE", OP_ROPE }, { "REPEAT", OP_REPEAT },
    };
    const int32_t number = op_number(t);
    if (number < 0 || number > 255) {
        return OP_OTHER;
    }
    op_kind kind;
    __atomic_load(&kinds[number], &kind, __ATOMIC_RELAXED);
    if (kind == OP_UNKNOWN) {
        kind = OP_OTHER;
        const char * name = op_name(number);
        for (const auto & entry : NAMES) {
            if (same_text(name, entry.name)) {
                kind = entry.kind;
            }
        }
        __atomic_store(&kinds[number], &kind, __ATOMIC_RELAXED);
    }
    return kind;
}

void ggml_abi::set_name(ggml_tensor * t, const char * name) const {
    strncpy((char *) t + off_name, name, 15);
}

bool ggml_abi::is_host(const ggml_tensor * t) const {
    const ggml_tensor * owner = view_src(t) ? view_src(t) : t;
    return buffer(owner) && buffer_is_host(buffer(owner)) && data(t);
}

bool ggml_abi::is_readable(const ggml_tensor * t) const {
    const int32_t number = type(t);
    double bytes = 8;
    for (int d = 0; d < 4; d++) {
        if (ne(t)[d] < 0 || ne(t)[d] >= 1ll << 31) { // none at all: a ubatch without outputs
            return false;
        }
        bytes += (double) ne(t)[d]*(double) nb(t)[d];
    }
    return (number == TYPE_F32 || number == TYPE_F16 || number == TYPE_I32) && bytes < 0x1p46;
}

size_t ggml_abi::span(const ggml_tensor * t) const {
    size_t bytes = type(t) == TYPE_F16 ? 2 : type(t) == TYPE_I64 ? 8 : 4;
    for (int d = 0; d < 4; d++) {
        if (ne(t)[d] <= 0) {
            return 0;
        }
        bytes += (size_t) (ne(t)[d] - 1)*nb(t)[d];
    }
    return bytes;
}

} // namespace moetrace
