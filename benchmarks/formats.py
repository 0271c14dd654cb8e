"""The same text in every format: whether data.py makes the same shards of it, how fast, and in how much memory.

    python benchmarks/formats.py TEXT --tokenizer DATA/tokenizer.model

TEXT is packed anew, a file for each language, and data.py encodes each copy with the same tokenizer. Printed are MB of
text a second of the clock and of the processors, and the peak of resident memory of the largest process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from corpus_layouts import write  # noqa: E402

from cli import run_command  # noqa: E402
from data import read_meta  # noqa: E402
from text import find_text, read_documents  # noqa: E402

FORMATS = ("txt", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet")


def pack(text: Path, out: Path) -> None:
    """Writes the documents of each language in each format."""
    for language, files in find_text(text)[0].items():
        documents = [document.text().strip() for path in files for document in read_documents(path)]
        for name in FORMATS:
            write(out / name / f"{language}.{name}", documents)


def encode(text: Path, data: Path, tokenizer: Path) -> tuple[float, float, float]:
    """Runs data.py. Seconds of the clock and of the processors, and the peak of memory in MB."""
    line = [sys.executable, str(ROOT / "data.py"), str(text), str(data), "--tokenizer", str(tokenizer)]
    began, process = time.perf_counter(), subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(line)}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="folder with text, as data.py reads it")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece unigram model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name), {}
        pack(args.text, folder)
        print("format        MB packed  MB/s   MB/s of a core  peak memory, MB  shards")
        for kind in FORMATS:
            packed = sum(path.stat().st_size for path in (folder / kind).iterdir()) / 1e6
            seconds, used, memory = encode(folder / kind, data := folder / f"{kind} data", args.tokenizer)
            shards[kind] = {path.name: path.read_bytes() for path in data.glob("*.bin")}
            if kind == "txt":
                size = sum(entry["bytes"] for entry in read_meta(data).values()) / 1e6
            same = "the same" if shards[kind] == shards["txt"] else "OTHERS"
            rates = f"{size / seconds:5.1f} {size / used:16.1f}"
            print(f"{kind:12} {packed:10.1f} {rates} {memory:16.0f}  {same}", flush=True)


if __name__ == "__main__":
    run_command(main)
