"""Run one text through a model in llama.cpp's plain Python API and save what its routers did.

    python reference_routing.py MODEL OUT.npz [N_GENERATE] < TEXT

It shares no code with moetrace, so that tests can hold moetrace's capture against it. Saved: ``tokens`` and
``generated`` (int32), ``text`` (the prompt's tokens written out again) and ``generated_text`` (bytes as
uint8), ``logits`` of every prompt token (an encoder: ``embeddings``), and per layer L with experts, in the
order of the prompt's tokens, ``logits_L`` (router logits before any bias, float32), ``order_L`` (all experts,
best first, int32) and ``weights_L`` (of the chosen experts, in that order, as they mix the outputs, float32).
All prompt tokens are outputs and in one ubatch, so that no row is missing.
"""

import ctypes
import os
import sys

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml as ggml

ggml.ggml_get_name.restype = ctypes.c_char_p
ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
ggml.ggml_nbytes.restype = ctypes.c_size_t
ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

WEIGHTS = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled")
WANTED = {
    b"ffn_moe_logits": ("logits", np.float32),
    b"ffn_moe_argsort": ("order", np.int32),
    # each step of the weights replaces the one before
    **{name.encode(): ("weights", np.float32) for name in WEIGHTS},
}


def read_key(model: object, key: str) -> str:
    value = ctypes.create_string_buffer(64)
    found = llama_cpp.llama_model_meta_val_str(model, key.encode(), value, len(value)) >= 0
    return value.value.decode() if found else ""


def stop(failure: object) -> None:
    """End at an exception in the callback, which ctypes would only print, leaving tensors out."""
    sys.__unraisablehook__(failure)
    os._exit(1)


def main(model_path: str, out_path: str, n_generate: int) -> None:
    text = sys.stdin.buffer.read()
    seen: dict[str, np.ndarray] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def observe(tensor: int, ask: bool, _: object) -> bool:
        name, _, layer = ggml.ggml_get_name(tensor).partition(b"-")
        if name not in WANTED or not layer.isdigit():  # a view is called "NAME-LAYER (reshaped)"
            return not ask
        if not ask:
            key, dtype = WANTED[name]
            rows = np.empty(ggml.ggml_nbytes(tensor), np.uint8)
            ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
            seen[f"{key}_{int(layer)}"] = rows.view(dtype)
        return True

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), model_params)
    if not model:
        sys.exit(f"llama.cpp cannot load {model_path}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    encoder = read_key(model, read_key(model, "general.architecture") + ".attention.causal") == "false"

    tokens = (ctypes.c_int32 * (len(text) + 8))()
    n_tokens = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, True)

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens + n_generate + 8
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = observe
    params.embeddings = encoder
    if encoder:
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp cannot make a context for {model_path}")

    batch = llama_cpp.llama_batch_init(n_tokens, 0, 1)
    batch.n_tokens = n_tokens
    for i in range(n_tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = tokens[i], i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if (llama_cpp.llama_encode if encoder else llama_cpp.llama_decode)(context, batch):
        sys.exit("llama.cpp cannot compute the prompt")
    saved = {name: values.reshape(n_tokens, -1) for name, values in seen.items()}
    saved["tokens"] = np.array(tokens[:n_tokens], np.int32)

    def write_out(ids: list[int]) -> np.ndarray:
        piece = ctypes.create_string_buffer(256)
        pieces = [piece[: llama_cpp.llama_token_to_piece(vocab, i, piece, 256, 0, True)] for i in ids]
        return np.frombuffer(b"".join(pieces), np.uint8)

    if encoder:
        width = llama_cpp.llama_model_n_embd(model)
        rows = (llama_cpp.llama_get_embeddings_ith(context, i) for i in range(n_tokens))
        saved["embeddings"] = np.stack([np.ctypeslib.as_array(row, (width,)) for row in rows])
    else:
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        logits = llama_cpp.llama_get_logits(context)
        saved["logits"] = np.ctypeslib.as_array(logits, (n_tokens, n_vocab)).copy()
        generated: list[int] = []
        last = saved["logits"][-1]
        for _ in range(n_generate):
            generated.append(int(last.argmax()))
            if llama_cpp.llama_vocab_is_eog(vocab, generated[-1]):
                break
            one = (ctypes.c_int32 * 1)(generated[-1])
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)):
                sys.exit("llama.cpp cannot compute a generated token")
            last = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n_vocab,))
        saved |= {"generated": np.array(generated, np.int32), "generated_text": write_out(generated)}
    saved["text"] = write_out(tokens[:n_tokens])
    np.savez(out_path, **saved)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    sys.unraisablehook = stop
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
