"""Messages between ranks, and that none of them, and no file, is a pickle."""

from __future__ import annotations

import ast
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from commands import REPOSITORY

from raylway.train import messages

SOURCES = [*(REPOSITORY / "platform" / "raylway").rglob("*.py"), *(REPOSITORY / "serve_app").glob("*.py")]
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
OBJECT_COLLECTIVES = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_nothing_is_unpickled(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        assert not OBJECT_COLLECTIVES & set(names), file
        assert not {name.split(".")[0] for name in names} & UNPICKLING, file
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert ast.unparse(node.func) != "torch.load", file
            assert not any(word.arg == "allow_pickle" for word in node.keywords), file


def _rank(rank: int, workers: int, store: str, told: list[list[bytes]], pipe: Any) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    group = dist.new_group(backend="gloo")
    mine = [messages_of[rank] for messages_of in told]
    pipe.send([(messages.gathered(each, group), messages.from_rank_0(each, group)) for each in mine])
    dist.destroy_process_group()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_rank_hears_every_message_and_rank_0s(tmp_path: Path, workers: int) -> None:
    told = [[b""] * 3, [b"a", b"", b"\0\0"], [b"", bytes(range(256)) * 900, b"x"], [b"\0", b"b\0", b""]]
    told = [each[:workers] for each in told]
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(workers):
        mine, theirs = context.Pipe()
        store = f"file://{tmp_path}/rendezvous"
        processes.append(context.Process(target=_rank, args=(rank, workers, store, told, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    for pipe, process in zip(pipes, processes, strict=True):
        assert pipe.poll(60)
        assert pipe.recv() == [(each, each[0]) for each in told]
        process.join(30)
