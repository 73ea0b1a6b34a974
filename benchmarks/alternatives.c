/* How people record routing today, with as little code as it takes: an evaluation callback of llama.cpp's own that
 * asks for the tensor it wants. To be compared with; see bench_overhead.py. */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ggml_tensor;
extern const char * ggml_get_name(const struct ggml_tensor * t);
extern size_t ggml_nbytes(const struct ggml_tensor * t);
extern void ggml_backend_tensor_get(const struct ggml_tensor * t, void * data, size_t offset, size_t size);

enum { OFF, CSV, LOGITS };

struct alternative {
    int     mode;
    int     n_expert, k;
    FILE *  out;
    char *  ids;       /* read buffer */
    size_t  ids_size;
    void ** logits;    /* every layer's logits of every step, kept as torch keeps router_logits */
    size_t  n_logits;
};

bool alternative_eval(struct ggml_tensor * t, bool ask, void * data) {
    struct alternative * a = data;
    const char * prefix = a->mode == CSV ? "ffn_moe_topk-" : "ffn_moe_logits-";
    const size_t length = strlen(prefix);
    if (a->mode == OFF || strncmp(ggml_get_name(t), prefix, length) != 0) {
        return !ask;
    }
    if (ask) {
        return true;
    }
    const size_t size = ggml_nbytes(t);
    if (a->mode == LOGITS) {
        void * copy = malloc(size);
        void ** list = realloc(a->logits, (a->n_logits + 1)*sizeof(void *));
        if (!copy || !list) {
            abort();
        }
        ggml_backend_tensor_get(t, copy, 0, size);
        a->logits = list;
        a->logits[a->n_logits++] = copy;
        return true;
    }
    if (size > a->ids_size) {
        a->ids = realloc(a->ids, a->ids_size = size);
        if (!a->ids) {
            abort();
        }
    }
    ggml_backend_tensor_get(t, a->ids, 0, size);
    /* a view of the k best of all experts: rows lie n_expert ids apart */
    const size_t stride = (size_t) a->n_expert*4;
    for (size_t row = 0; row*stride < size; row++) {
        const int32_t * ids = (const int32_t *) (a->ids + row*stride);
        fprintf(a->out, "%s,%zu", ggml_get_name(t) + length, row);
        for (int j = 0; j < a->k; j++) {
            fprintf(a->out, ",%d", ids[j]);
        }
        fputc('\n', a->out);
    }
    return true;
}

struct alternative * alternative_new(int n_expert, int k, const char * path) {
    struct alternative * a = calloc(1, sizeof *a);
    a->n_expert = n_expert;
    a->k = k;
    a->out = fopen(path, "w");
    return a;
}

void alternative_set(struct alternative * a, int mode) {
    a->mode = mode;
}

void alternative_forget(struct alternative * a) {
    for (size_t i = 0; i < a->n_logits; i++) {
        free(a->logits[i]);
    }
    a->n_logits = 0;
}
