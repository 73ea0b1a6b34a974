"""How a model is run: llama.cpp's options for threads and devices."""

from __future__ import annotations

import argparse
from typing import Any

from moetrace.commands.options import add_option


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Add ``-t``, ``-ngl``, ``-cmoe``, ``-ncmoe`` and ``-nr``."""
    add_option(parser, "-t", "--threads", type=int, metavar="N", help="threads")
    add_option(parser, "-ngl", "--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPU")
    add_option(parser, "-cmoe", "--cpu-moe", action="store_true", help="keep all experts on the CPU")
    add_option(
        parser,
        "-ncmoe",
        "--n-cpu-moe",
        type=int,
        default=0,
        metavar="N",
        help="keep the experts of the first N layers on the CPU",
    )
    add_option(
        parser, "-nr", "--no-repack", action="store_true", help="leave quantised weights as they are stored"
    )


def placement(args: argparse.Namespace) -> dict[str, Any]:
    """Give what was chosen, as :class:`moetrace.host.llama.Llama` takes it."""
    return {
        "n_threads": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "n_cpu_moe": -1 if args.cpu_moe else args.n_cpu_moe,
        "repack": not args.no_repack,
    }


def server_arguments(args: argparse.Namespace) -> list[str]:
    """Give what was chosen, as llama-server takes it."""
    out = []
    if args.threads is not None:
        out += ["-t", str(args.threads)]
    if args.gpu_layers >= 0:
        out += ["-ngl", str(args.gpu_layers)]
    if args.cpu_moe:
        out.append("-cmoe")
    elif args.n_cpu_moe:
        out += ["-ncmoe", str(args.n_cpu_moe)]
    if args.no_repack:
        out.append("-nr")
    return out
