// What Python needs from the native side: atomic words of a mapped ring, a producer for tests, and the analyses' loops.

#include "intervene.h"
#include "kernels/kernels.h"
#include "record.h"
#include "ring.h"
#include "signals.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace py = pybind11;
using namespace moetrace;

template <typename T>
static std::atomic<T> * word_at(const py::buffer & buffer, size_t offset, bool writable) {
    const py::buffer_info info = buffer.request(writable);
    const size_t size = (size_t) (info.size*info.itemsize);
    if (offset % sizeof(T) != 0 || offset > size || size - offset < sizeof(T)) {
        throw py::index_error("offset is not an aligned word of the buffer");
    }
    return (std::atomic<T> *) ((char *) info.ptr + offset);
}

template <typename T>
static T load_acquire(const py::buffer & buffer, size_t offset) {
    return word_at<T>(buffer, offset, false)->load(std::memory_order_acquire);
}

template <typename T>
static void store_release(const py::buffer & buffer, size_t offset, T value) {
    word_at<T>(buffer, offset, true)->store(value, std::memory_order_release);
}

// (name, numpy dtype code, shape)
using field_spec = std::tuple<std::string, std::string, std::vector<uint32_t>>;

static std::unique_ptr<ring_writer> ring_create(const std::string & path, const std::vector<field_spec> & fields,
        const std::string & meta, uint64_t capacity, uint32_t on_full, uint64_t block_ns) {
    ring_params params;
    params.meta     = meta;
    params.capacity = capacity;
    params.on_full  = (ring_on_full) on_full;
    params.block_ns = block_ns;
    for (const auto & [name, dtype, shape] : fields) {
        ring_field field = {};
        if (name.size() >= sizeof(field.name) || dtype.size() >= sizeof(field.dtype) || shape.empty() || shape.size() > 3) {
            throw py::value_error("bad field " + name);
        }
        memcpy(field.name,  name.data(),  name.size());
        memcpy(field.dtype, dtype.data(), dtype.size());
        field.n_dims = (uint32_t) shape.size();
        for (size_t d = 0; d < 3; d++) {
            field.shape[d] = d < shape.size() ? shape[d] : 1;
        }
        params.fields.push_back(field);
    }
    auto ring = std::make_unique<ring_writer>();
    std::string error;
    if (!ring->create(path, params, error)) {
        throw std::runtime_error(error);
    }
    return ring;
}

// Pushes records (bytes, a whole number of strides); returns how many were written. The caller's thread may wait.
static uint64_t ring_push(ring_writer & ring, const py::buffer & records) {
    const py::buffer_info info = records.request();
    const size_t size   = (size_t) (info.size*info.itemsize);
    const size_t stride = ring.stride();
    if (size % stride != 0) {
        throw py::value_error("not a whole number of records");
    }
    const py::gil_scoped_release unlocked;
    uint64_t n = 0;
    for (size_t offset = 0; offset < size; offset += stride) {
        const record_head * head = (const record_head *) ((const char *) info.ptr + offset);
        const bool row = head->kind == RECORD_ROW;
        const bool ok  = ring.push(head);
        if (row) {
            ring.count(COUNT_ROWS_PRODUCED);
        }
        ring.count(row ? (ok ? COUNT_ROWS_COMMITTED : COUNT_ROWS_LOST_FULL) : (ok ? COUNT_EVENTS_COMMITTED : COUNT_EVENTS_LOST));
        n += ok;
    }
    return n;
}

// layer, n_expert, k, n_group, n_group_used, selects
using router_spec = std::tuple<int, int, int, int, int, bool>;

// Why routers of these shapes cannot do what an intervention's file asks for; empty if they can.
static std::string intervention_check(const py::bytes & file, const std::vector<router_spec> & specs) {
    const std::string_view bytes = file;
    std::vector<router_shape> routers;
    for (const auto & [layer, n_expert, k, n_group, n_group_used, selects] : specs) {
        routers.push_back({ layer, n_expert, k, n_group, n_group_used, selects });
    }
    intervention rules;
    std::string error;
    return rules.parse({ bytes.begin(), bytes.end() }, error) && rules.fits(routers, error) ? "" : error;
}

// The first `size` bytes of a file, mapped read-only; unlike Python's own maps it does not keep the file open.
static py::array_t<uint8_t> map_file(const std::string & path, size_t size) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    void * mapped = fd < 0 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (mapped == MAP_FAILED) {
        errno = error;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        throw py::error_already_set();
    }
    struct owner { void * mapped; size_t size; };
    const py::capsule keeper(new owner { mapped, size }, [](void * p) {
        const std::unique_ptr<owner> mine((owner *) p);
        munmap(mine->mapped, mine->size);
    });
    py::array_t<uint8_t> bytes((py::ssize_t) size, (const uint8_t *) mapped, keeper);
    py::detail::array_proxy(bytes.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return bytes;
}

PYBIND11_MODULE(_native, m) {
    default_threads(); // before anything is forked
    m.def("set_default_threads", [](int n) { return default_threads().exchange(n); }, py::arg("n"));
    bind_caches(m);
    bind_kinds(m);
    bind_lags(m);
    bind_pairs(m);
    bind_splits(m);
    bind_tops(m);

    m.def("map_file", &map_file, py::arg("path"), py::arg("size"));
    m.def("intervention_check", &intervention_check, py::arg("file"), py::arg("routers"));
    m.def("load_acquire",    &load_acquire<uint64_t>,  py::arg("buffer"), py::arg("offset"));
    m.def("load_acquire32",  &load_acquire<uint32_t>,  py::arg("buffer"), py::arg("offset"));
    m.def("store_release",   &store_release<uint64_t>, py::arg("buffer"), py::arg("offset"), py::arg("value"));
    m.def("store_release32", &store_release<uint32_t>, py::arg("buffer"), py::arg("offset"), py::arg("value"));

    py::class_<signal_watch>(m, "SignalWatch")
        .def(py::init<const std::vector<int> &>(), py::arg("numbers"))
        .def("take", &signal_watch::take)
        .def("close", &signal_watch::close);

    py::class_<ring_writer>(m, "RingWriter")
        .def(py::init(&ring_create), py::arg("path"), py::arg("fields"), py::arg("meta") = "{}", py::arg("capacity") = 1024,
            py::arg("on_full") = (uint32_t) RING_BLOCK, py::arg("block_ns") = 10'000'000'000ull)
        .def("push", &ring_push, py::arg("records"))
        .def("count", [](ring_writer & ring, uint32_t counter, uint64_t n) {
            if (counter >= COUNT_N) {
                throw py::index_error("no such counter");
            }
            ring.count((ring_counter) counter, n);
        }, py::arg("counter"), py::arg("n") = 1)
        .def("close", [](ring_writer & ring, const std::string & status) { ring.close(status.c_str()); }, py::arg("status") = "")
        .def_property_readonly("stride", &ring_writer::stride);
}
