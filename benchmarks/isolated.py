"""One piece of work in a process of its own, so that it can crash, hang or fill memory without ending the run."""

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
    """``work(*arguments)``, or why there is no result under ``failed``: an error, a crash, or too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(seconds) else {"failed": f"took over {seconds:.0f} s"}
    except EOFError:
        process.join()
        found = {"failed": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return dict(found)


def _child(to_parent: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch logs whatever a model raised
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    gc.set_threshold(100_000, 50, 50)
    try:
        found = work(*arguments)
    except Exception as error:
        found = {"failed": one_line(error)}
    to_parent.send(found)


def one_line(error: Exception) -> str:
    """An error of any library in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
