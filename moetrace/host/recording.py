"""A whole recording: a traced llama-server, a prompt set sent to it, a labelled trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from moetrace.host.client import Answer, drive
from moetrace.host.prompts import Prompt
from moetrace.host.server import ServeSettings, serve
from moetrace.trace.labels import append_labels


def record(
    model: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    output: Path,
    *,
    n_predict: int,
    arguments: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[ServeSettings],
) -> None:
    """Serve ``model`` under the tracer, send it ``prompts``, label their requests, and stop it.

    Parameters
    ----------
    n_predict
        Tokens to generate for prompts that do not say.
    arguments
        Of llama-server.
    on_progress
        Called with (prompts done, prompts), in the threads that drive.
    options
        As of :func:`moetrace.host.server.serve`.

    Raises MoetraceError as serve and drive do; what was captured until then is kept.
    """
    done = 0

    def on_answer(answer: Answer) -> None:
        nonlocal done
        append_labels(output, [answer.label_line()])
        done += 1
        server.count_done(done)
        on_progress(done, len(prompts))

    with serve(model, output=output, arguments=arguments, **options) as server:
        server.count_prompts(len(prompts))
        server.count_done(0)
        drive(server.client, prompts, n_predict=n_predict, on_answer=on_answer)
