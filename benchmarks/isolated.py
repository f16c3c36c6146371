"""Run a function in its own process, where it can crash, hang or run out of memory without ending the benchmark."""

from __future__ import annotations

import gc
import multiprocessing
import os
import textwrap
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.utils import logging


def isolated(work: Callable[..., dict[str, Any]], *arguments: Any, seconds: float) -> dict[str, Any]:
    """``work(*arguments)``; on an error, a crash or a timeout, the reason under ``failed`` instead."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(seconds) else {"failed": f"took over {seconds:.0f} s"}
    except EOFError:
        process.join()
        result = {"failed": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return dict(result)


def _child(to_parent: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch logs every exception of a model
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    gc.set_threshold(100_000, 50, 50)
    try:
        result = work(*arguments)
    except Exception as error:
        result = {"failed": one_line(error)}
    to_parent.send(result)


def one_line(error: Exception) -> str:
    """The type and message of an error in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
