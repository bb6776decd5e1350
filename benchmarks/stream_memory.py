"""Memory of a stream as it goes on: resident MiB and tokens per second at each tenth of the way; should be flat.

    python benchmarks/stream_memory.py /scratch/stream --gib 10      # writes so many GiB of conversations there once
    python benchmarks/stream_memory.py out/stream --gib 0.5 --workers 2
    python benchmarks/stream_memory.py /scratch/ids --gib 4 --ids --workers 1      # token ids: six times as fast

Two sources are mixed, one of chats in 8 files, one of raw text; rows of 2048 tokens are packed by best fit and handed
out as training takes them. The tokenizer is demo/base's, in which a letter is about a token.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import psutil

from torchft import shipped, tokenizers
from torchft.data.datasets import chat, completion, tokenized
from torchft.data.prefetch import Prefetch
from torchft.data.stream import StreamConfig, gather
from torchft.data.stream_loader import StreamLoader

FILES = 8
TEXT = "the of and a to in is you that it he was for on are as with his they at be this have from or one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0, help="of data, all of which is read once")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="rows of token ids, which need no tokenising")
    given = parser.parse_args()
    make(given.folder, given.gib, ids=given.ids)
    tokenizer = tokenizers.load(shipped.config_path("demo/base"))
    how = {"tokenizer": tokenizer, "seq_len": 2048}
    kinds = (tokenized, tokenized) if given.ids else (chat, completion)
    files = (("chat-*.jsonl", 0.9), ("text.jsonl", 0.1))
    datasets = [kind(str(given.folder / name), weight=w, **how) for kind, (name, w) in zip(kinds, files)]
    stream = gather(datasets, streaming=StreamConfig(workers=given.workers))
    loader = StreamLoader(stream, batch_size=8, seed=0, packed=True)
    batches = Prefetch(loader, "cpu", depth=4)
    process = psutil.Process()
    total = sum(file.stat().st_size for file in given.folder.glob("*.jsonl"))
    rows_in_all, tenth, tokens, began = None, 0, 0, time.perf_counter()
    while tenth < 10:
        (batch,) = batches.take(1)
        tokens += sum(batch.lengths)
        first_pass = [position[0] for position in batches.state_dict()["cursor"]["positions"]]
        rows_in_all = rows_in_all or rows(given.folder)
        if loader.counts.rows >= rows_in_all * (tenth + 1) / 10:
            tenth += 1
            fill = sum(batch.lengths) / batch.num_tokens
            pace = tokens / (time.perf_counter() - began)
            state = len(json.dumps(batches.state_dict()))
            print(
                f"{tenth * total / 10 / 2**30:6.2f} GiB  {process.memory_info().rss >> 20:5} MiB  {pace:9,.0f} tokens/s"
                f"  last batch {fill:.1%} full  state {state / 1000:.0f} kB  passes {first_pass}",
                flush=True,
            )
    batches.close()


def rows(folder: Path) -> int:
    return sum(1 for file in folder.glob("*.jsonl") for _ in open(file, "rb"))


def make(folder: Path, gib: float, *, ids: bool) -> None:
    """Chats of about 300 words and texts of about 500, until the files have ``gib``; or as many token ids."""
    done = folder / "size.txt"
    if done.exists() and done.read_text() == f"{gib} {ids}":
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = TEXT.split()
    blocks = [" ".join(draw.choice(words) for _ in range(draw.randint(20, 300))) for _ in range(2000)]
    rows = [json.dumps({"input_ids": [draw.randint(10, 99) for _ in block[:1500]]}) for block in blocks]
    sizes = {f"chat-{i}.jsonl": 0.9 * gib / FILES for i in range(FILES)} | {"text.jsonl": 0.1 * gib}
    for name, size in sizes.items():
        with open(folder / name, "w") as f:
            while ids and f.tell() < size * 2**30:
                f.writelines(f"{row}\n" for row in draw.sample(rows, 500))
            while f.tell() < size * 2**30:
                ask, answer = draw.choice(blocks)[:200], draw.choice(blocks)
                turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
                f.write(json.dumps({"messages": turns} if name != "text.jsonl" else {"text": ask + answer}) + "\n")
    done.write_text(f"{gib} {ids}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
