"""Train the demo model that moetrace ships: a small OLMoE whose experts have specialised.

    python -m venv env && env/bin/pip install torch==2.13.0 gguf llama-cpp-python==0.3.36
    env/bin/python examples/demo_model/train.py -o moetrace/data

takes about a quarter of an hour on two free CPU cores. The text comes from ``corpus.py`` (grammars of five
domains, written for this project) and the tokenizer from ``tokenizer.py``; nothing is downloaded. It writes
``demo.gguf`` (F16), ``prompts/heldout-text.jsonl`` (corpus text that was not trained on) and ``README.md``
with the figures measured, after checking that llama.cpp computes the same tokens and logits as PyTorch.
Where other programs use the cores too, OMP_WAIT_POLICY=passive keeps PyTorch's threads from spinning.

The seed fixes corpus, tokenizer, initial weights and order. Floating-point sums differ between machines, so a
second run gives an equally good model, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from corpus import DOMAINS, Document, documents
from numpy.typing import NDArray
from tokenizer import BOS, END, SPECIALS, Tokenizer
from torch import Tensor, nn

N_TEXTS = 12
"""held-out texts per domain that are shipped"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""llama.cpp adds BOS (``tokenizer.ggml.add_bos_token``), so the template does not."""

DESCRIPTION = (
    "Demonstration model of moetrace: trained from scratch on about {tokens} million tokens of synthetic "
    "text (small grammars for Python-like code, school mathematics, short stories, facts of geography and "
    "science, and mixtures of these, all written for moetrace). It continues such text, and knows nothing "
    "else."
)


@dataclass(frozen=True)
class Config:
    """The shape of the model, in llama.cpp's names."""

    n_vocab: int = 768
    n_embd: int = 128
    n_layer: int = 8
    n_head: int = 4
    n_expert: int = 32
    n_expert_used: int = 4
    n_ff_exp: int = 32
    n_ctx: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0


# --------------------------------------------------------------------------------------------------------
# the model


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, NeoX order, of x (batch, head, token, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        d, e, f = c.n_embd, c.n_expert, c.n_ff_exp

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * scale / math.sqrt(shape[-1]))

        deep = 1 / math.sqrt(2 * c.n_layer)
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.attn_q = weight(d, d)
        self.attn_k = weight(d, d)
        self.attn_v = weight(d, d)
        self.attn_output = weight(d, d, scale=deep)
        self.attn_q_norm = nn.Parameter(torch.ones(d))
        self.attn_k_norm = nn.Parameter(torch.ones(d))
        self.ffn_norm = nn.Parameter(torch.ones(d))
        self.ffn_gate_inp = weight(e, d, scale=0.2)
        self.ffn_gate_exps = weight(e, f, d)
        self.ffn_up_exps = weight(e, f, d)
        # the four weights of the chosen experts begin near 1/32 each, hence the larger scale
        self.ffn_down_exps = weight(e, d, f, scale=4 * deep)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        n, t, d = x.shape
        q = rms_norm(x @ self.attn_q.T, self.attn_q_norm, c.eps)
        k = rms_norm(x @ self.attn_k.T, self.attn_k_norm, c.eps)
        v = x @ self.attn_v.T
        q, k, v = (y.view(n, t, c.n_head, d // c.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return y.transpose(1, 2).reshape(n, t, d) @ self.attn_output.T

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, n_embd) -> output, router logits (tokens, n_expert), chosen (tokens, n_expert_used)."""
        c = self.c
        logits = x @ self.ffn_gate_inp.T
        weights, chosen = logits.softmax(-1).topk(c.n_expert_used)
        order = chosen.flatten().argsort(stable=True)
        token = order // c.n_expert_used
        sizes = torch.bincount(chosen.flatten(), minlength=c.n_expert).tolist()
        experts = zip(
            self.ffn_gate_exps.unbind(), self.ffn_up_exps.unbind(), self.ffn_down_exps.unbind(), strict=True
        )
        parts = [
            (F.silu(xs @ gate.T) * (xs @ up.T)) @ down.T
            for xs, (gate, up, down) in zip(x[token].split(sizes), experts, strict=True)
        ]
        y = torch.cat(parts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, y), logits, chosen

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(rms_norm(x, self.attn_norm, self.c.eps), cos, sin)
        y, logits, chosen = self.experts(rms_norm(x, self.ffn_norm, self.c.eps).flatten(0, 1))
        return x + y.view_as(x), logits, chosen


class Model(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Parameter(torch.randn(c.n_vocab, c.n_embd) * 0.5)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.output_norm = nn.Parameter(torch.ones(c.n_embd))
        self.output = nn.Parameter(torch.randn(c.n_vocab, c.n_embd) * 0.5 / math.sqrt(c.n_embd))
        half = c.n_embd // c.n_head // 2
        angle = torch.outer(torch.arange(c.n_ctx), c.rope_base ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """ids (batch, token) -> logits (batch, token, vocab); router logits and choices of each layer."""
        t = ids.shape[1]
        x = self.token_embd[ids]
        routers, choices = [], []
        for block in self.blk:
            x, router, chosen = block(x, self.cos[:t], self.sin[:t])
            routers.append(router)
            choices.append(chosen)
        return rms_norm(x, self.output_norm, self.c.eps) @ self.output.T, routers, choices


def router_losses(routers: list[Tensor], choices: list[Tensor], c: Config) -> tuple[Tensor, Tensor]:
    """The load-balancing loss (1 when even, over the whole batch) and the router z-loss, means over layers.

    Balance is asked of the batch, in which all domains are mixed, not of each text: experts may specialise.
    """
    balance, z = [], []
    for logits, chosen in zip(routers, choices, strict=True):
        share = torch.bincount(chosen.flatten(), minlength=c.n_expert) / chosen.numel()
        balance.append(c.n_expert * (share * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).pow(2).mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


# --------------------------------------------------------------------------------------------------------
# text to ids


def encode(doc: Document, tok: Tokenizer) -> list[int]:
    """BOS, then the text and END; or for each turn its role token, the text and END."""
    ids = [BOS]
    for role, text in doc.turns:
        if role:
            ids.append(SPECIALS.index(f"<|{role}|>"))
        ids += [*tok.encode(text), END]
    return ids


def joined(doc: Document) -> str:
    """The text of a document without its roles."""
    return "\n\n".join(text for _, text in doc.turns)


def heldout(seed: int, trained: set[str], per_domain: int) -> list[Document]:
    """Documents of another seed whose text did not occur in training, ``per_domain`` of each domain."""
    chosen: dict[str, dict[str, Document]] = {d: {} for d in DOMAINS}
    for doc in documents(seed, 200 * per_domain):
        if joined(doc) not in trained and len(chosen[doc.domain]) < per_domain:
            chosen[doc.domain].setdefault(joined(doc), doc)
    return [doc for domain in DOMAINS for doc in chosen[domain].values()]


# --------------------------------------------------------------------------------------------------------
# training


def train(model: Model, ids: NDArray[np.int64], args: argparse.Namespace) -> None:
    """One pass over ``ids``: AdamW, warm-up, linear decay to zero."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    rows = torch.from_numpy(ids)
    steps = len(rows) // args.batch
    start = time.monotonic()
    for step in range(steps):
        rate = min((step + 1) / (0.03 * steps), (steps - step) / (0.97 * steps))
        for group in opt.param_groups:
            group["lr"] = args.lr * rate
        batch = rows[step * args.batch : (step + 1) * args.batch]
        logits, routers, choices = model(batch[:, :-1])
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance, z = router_losses(routers, choices, model.c)
        loss = nll + args.balance * balance + args.z * z
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 20 == 0 or step == steps - 1:
            spent = time.monotonic() - start
            print(
                f"step {step:5d}/{steps}  nll {nll.item():.3f}  balance {balance.item():.3f}  "
                f"{(step + 1) * args.batch * (ids.shape[1] - 1) / spent:.0f} tokens/s  {spent:.0f} s",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------------
# measuring


@torch.no_grad()
def measure(model: Model, docs: list[Document], tok: Tokenizer) -> tuple[dict[str, float], NDArray[np.int64]]:
    """NLL per token and domain, and counts (document, layer, expert) of choices."""
    c = model.c
    counts = np.zeros((len(docs), c.n_layer, c.n_expert), np.int64)
    nll = dict.fromkeys(DOMAINS, 0.0)
    n = dict.fromkeys(DOMAINS, 0)
    for i, doc in enumerate(docs):
        ids = torch.tensor([encode(doc, tok)[: c.n_ctx]])
        logits, _, choices = model(ids)
        nll[doc.domain] += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        n[doc.domain] += ids.shape[1] - 1
        for layer, chosen in enumerate(choices):
            counts[i, layer] = torch.bincount(chosen.flatten(), minlength=c.n_expert).numpy()
    return {d: nll[d] / n[d] for d in DOMAINS}, counts


def cramers_v(table: NDArray[np.float64]) -> float:
    """Bias-corrected Cramér's V (Bergsma 2013) of counts (domain, expert), unused experts left out."""
    table = table[:, table.sum(0) > 0]
    n, (r, c) = table.sum(), table.shape
    expected = np.outer(table.sum(1), table.sum(0)) / n
    phi2 = ((table - expected) ** 2 / expected).sum() / n
    phi2 = max(0.0, phi2 - (r - 1) * (c - 1) / (n - 1))
    return float(np.sqrt(phi2 / min(r - (r - 1) ** 2 / (n - 1) - 1, c - (c - 1) ** 2 / (n - 1) - 1)))


def separation(docs: list[Document], counts: NDArray[np.int64], seed: int = 0) -> list[tuple[float, float]]:
    """Per layer: V between domains, and its 95th percentile when whole documents change domain at random."""
    rng = np.random.default_rng(seed)
    domain = np.array([DOMAINS.index(d.domain) for d in docs])
    onehot = np.eye(len(DOMAINS))

    def v(labels: NDArray[np.int64], layer: int) -> float:
        return cramers_v(onehot[labels].T @ counts[:, layer])

    return [
        (v(domain, layer), float(np.quantile([v(rng.permutation(domain), layer) for _ in range(200)], 0.95)))
        for layer in range(counts.shape[1])
    ]


# --------------------------------------------------------------------------------------------------------
# GGUF, and llama.cpp's word that it is right


def write_gguf(path: Path, model: Model, tok: Tokenizer, description: str, dtype: type[np.floating]) -> None:
    """Matrices in ``dtype`` (float16 or float32), norms and routers in float32."""
    c = model.c
    w = gguf.GGUFWriter(path, "olmoe")
    w.add_name("moetrace demo")
    w.add_description(description)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype is np.float16 else gguf.LlamaFileType.ALL_F32)
    w.add_vocab_size(c.n_vocab)
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_ff_exp)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_head)
    w.add_rope_dimension_count(c.n_embd // c.n_head)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_expert_count(c.n_expert)
    w.add_expert_used_count(c.n_expert_used)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tok.tokens)
    w.add_token_types(
        [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in tok.tokens]
    )
    w.add_token_merges([f"{a} {b}" for a, b in tok.merges])
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(END)
    w.add_add_bos_token(True)
    w.add_chat_template(CHAT_TEMPLATE)
    for name, p in model.named_parameters():
        keep = p.ndim == 1 or "ffn_gate_inp" in name
        w.add_tensor(f"{name}.weight", p.detach().numpy().astype(np.float32 if keep else dtype))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@dataclass(frozen=True)
class Agreement:
    """How far llama.cpp's logits are from PyTorch's."""

    largest: float
    """over texts in which no routing decision is a near tie (4th and 5th router logit at least 1e-5 apart)"""
    mean: float
    """over all texts"""
    n_clear: int
    n_texts: int


def check(path: Path, model: Model, tok: Tokenizer, docs: Iterable[Document]) -> Agreement:
    """Compare with llama.cpp: its tokens must be exactly ours; its logits are returned as an ``Agreement``.

    Near ties are set apart because rounding may decide them either way, and another expert is another output.
    """
    import llama_cpp

    c = model.c
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=c.n_ctx,
        n_batch=c.n_ctx,
        logits_all=True,
        verbose=False,
        n_threads=2,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    )
    largest, means, n_clear = 0.0, [], 0
    for doc in docs:
        text = "\n".join(text for _, text in doc.turns)
        ids = [BOS, *tok.encode(text)][: c.n_ctx]
        theirs = llm.tokenize(text.encode(), add_bos=True, special=False)[: c.n_ctx]
        if theirs != ids:
            raise SystemExit(f"llama.cpp reads {text!r} as other tokens: {theirs} instead of {ids}")
        llm.reset()
        llm.eval(ids)
        with torch.no_grad():
            logits, routers, _ = model(torch.tensor([ids]))
        top = torch.stack(routers).topk(c.n_expert_used + 1).values
        difference = np.abs(llm.scores[: len(ids)] - logits[0].numpy())
        means.append(float(difference.mean()))
        if (top[..., -2] - top[..., -1]).min() > 1e-5:
            n_clear += 1
            largest = max(largest, float(difference.max()))
    return Agreement(largest, float(np.mean(means)), n_clear, len(means))


def sample(path: Path, prompts: Iterable[str]) -> list[str]:
    import llama_cpp

    llm = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=2, seed=1)
    return [llm(p, max_tokens=60, temperature=0.0)["choices"][0]["text"] for p in prompts]


README = """# Data that comes with moetrace

- `prompts/domains.jsonl`: 12 prompts in each of the domains code, math, creative, factual and mixed, matched
  in length; `prompts/heldout.jsonl`: 12 more of each, kept for evaluation. Written for moetrace.
- `prompts/heldout-text.jsonl`: {n_texts} texts of each domain from the corpus of the demo model that it was
  not trained on.
- `demo.gguf`: the demo model.
- `demo.moet.tar.xz`: what it did with `prompts/domains.jsonl`: a recording of experts and weights, made by
  `docs/record_demo.py`, for `moetrace demo --recorded`.

## The demo model

{description}

It mostly answers in kind: code after a request for code, a story after the beginning of one. Its sums and \
facts are often wrong. In the requests of its corpus about one long word in eight is made up, so\
 that it goes by the others.

It is an OLMoE of {n_params:.2f} million parameters: {c.n_layer} layers of {c.n_expert} experts of width \
{c.n_ff_exp}, {c.n_expert_used} experts per token, embedding {c.n_embd}, {c.n_head} heads, context \
{c.n_ctx}, {c.n_vocab} tokens of its own byte-level BPE; F16, {megabytes:.2f} MB.

`examples/demo_model/train.py` trained it in one pass of {steps} steps of {batch} x {n_ctx} tokens (AdamW, \
load-balancing loss {balance} over the batch, router z-loss {z}), {minutes:.0f} minutes of CPU time, and \
wrote this page with what it measured on {n_heldout} held-out texts of each domain:

| domain | NLL per token (nats) |
| --- | --- |
{nll}

| layer | V between domains | V, domains shuffled over texts (95th percentile) | max load / mean load | \
experts below a tenth of the mean load |
| --- | --- | --- | --- | --- |
{layers}

V is the bias-corrected Cramér's V of the table domain x expert, all tokens of a text counted.

llama.cpp computes what PyTorch computes: with F32 weights their logits differ by at most {same.largest:.1e} \
on the {same.n_clear} of {same.n_texts} held-out texts in which no routing decision is a near tie. With the \
F16 weights shipped, llama.cpp rounds activations to F16 as well, and logits differ by {shipped.mean:.1e} on \
average.
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-o", "--out", type=Path, required=True, help="folder to write demo.gguf and README.md to")
    p.add_argument("--steps", type=int, default=760)
    p.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens per step")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--balance", type=float, default=0.005)
    p.add_argument("--z", type=float, default=0.001)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("-t", "--threads", type=int, default=2)
    args = p.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    c = Config()
    tok = Tokenizer.train((text for doc in documents(args.seed, 10_000) for _, text in doc.turns), c.n_vocab)

    need = args.steps * args.batch * (c.n_ctx + 1)
    stream: list[int] = []
    trained: set[str] = set()
    for doc in documents(args.seed, need):  # far more than are needed: stops below
        trained.add(joined(doc))
        stream += encode(doc, tok)
        if len(stream) >= need:
            break
    rows = np.array(stream[:need], np.int64).reshape(-1, c.n_ctx + 1)
    rows = rows[np.random.default_rng(args.seed).permutation(len(rows))]
    print(
        f"{len(trained)} different documents, {need / 1e6:.2f} million tokens",
        flush=True,
    )

    model = Model(c)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params / 1e6:.2f} million parameters", flush=True)
    train(model, rows, args)
    minutes = time.process_time() / 60

    args.out.mkdir(parents=True, exist_ok=True)
    description = DESCRIPTION.format(tokens=round(need / 1e6))
    docs = heldout(args.seed + 1, trained, 60)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "f32.gguf"
        write_gguf(exact, model, tok, description, np.float32)
        same = check(exact, model, tok, docs)
    if same.n_clear < same.n_texts / 2 or same.largest > 1e-3:
        raise SystemExit(f"llama.cpp and PyTorch disagree: {same}")
    path = args.out / "demo.gguf"
    write_gguf(path, model, tok, description, np.float16)
    with torch.no_grad():  # measure what is shipped
        for name, q in model.named_parameters():
            if q.ndim > 1 and "ffn_gate_inp" not in name:
                q.copy_(q.half().float())
    shipped = check(path, model, tok, docs)
    nll, counts = measure(model, docs, tok)
    apart = separation(docs, counts)
    load = counts.sum(0)
    mean = load.mean(1)

    texts = heldout(args.seed + 2, trained | {joined(doc) for doc in docs}, N_TEXTS)
    (args.out / "prompts").mkdir(exist_ok=True)
    with (args.out / "prompts" / "heldout-text.jsonl").open("w") as out:
        for i, doc in enumerate(texts):
            text = joined(doc)
            print(
                json.dumps(
                    {"id": f"text-{doc.domain}-{i % N_TEXTS + 1:02d}", "label": doc.domain, "prompt": text}
                ),
                file=out,
            )

    (args.out / "README.md").write_text(
        README.format(
            n_texts=N_TEXTS,
            description=description,
            n_params=n_params / 1e6,
            c=c,
            megabytes=path.stat().st_size / 1e6,
            steps=args.steps,
            batch=args.batch,
            n_ctx=c.n_ctx,
            balance=args.balance,
            z=args.z,
            minutes=minutes,
            n_heldout=len(docs) // len(DOMAINS),
            nll="\n".join(f"| {d} | {nll[d]:.3f} |" for d in DOMAINS),
            layers="\n".join(
                f"| {i} | {v:.3f} | {null:.3f} | {load[i].max() / mean[i]:.2f} | "
                f"{int((load[i] < mean[i] / 10).sum())} |"
                for i, (v, null) in enumerate(apart)
            ),
            same=same,
            shipped=shipped,
        )
    )
    print((args.out / "README.md").read_text())
    for prompt, text in zip(
        (
            "def total_of(",
            "Solve 3x + 4 = 19 for x.\n",
            "Once upon a time,",
            "What is the capital of France?\n",
        ),
        sample(
            path,
            (
                "def total_of(",
                "Solve 3x + 4 = 19 for x.\n",
                "Once upon a time,",
                "What is the capital of France?\n",
            ),
        ),
        strict=True,
    ):
        print(f"--- {prompt}{text}")


if __name__ == "__main__":
    main()
