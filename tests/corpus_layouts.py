"""Every layout in which people have corpora, made of a few sentences, and what text.py makes of each.

    python tests/corpus_layouts.py

prints what was read, what was skipped and what was refused. test_text.py tests every row.
"""

import bz2
import gzip
import json
import lzma
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from text import InputError, find_text, read_documents

EN = [
    "A tram climbs the hill.\nIt stops at the school.",
    "Snow fell all night.\nThe bakery opened late.",
    "Bees sleep.",
]
SW = ["Basi linapanda mlima.\nLinasimama shuleni.", "Mvua ilinyesha usiku.", "Nyuki wamelala."]
HI = ["बस पहाड़ी पर चढ़ती है।\nवह स्कूल पर रुकती है।", "रात भर बर्फ़ गिरी।"]
DE = ["Die Straßenbahn fährt den Hügel hinauf.\nSie hält an der Schule.", "Die Bienen schlafen."]
NUMBERED = "".join(f"{i}\t{line}\n" for i, line in enumerate("\n".join(DE).split("\n"), 1)).encode()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5e' * 32}\nsize 31415926\n".encode()
TAGS = (
    b'<doc id="1" url="https://sw.wikipedia.org/wiki?curid=1" title="Basi">\nBasi\n\nBasi linapanda mlima.\n\n</doc>\n'
)


class Layout(NamedTuple):
    """Files (name: documents, bytes, or the Path that a link leads to), and what must come of the folder `text`."""

    files: dict[str, list[str] | bytes | Path]
    read: dict[str, list[str]] = {}  # noqa: RUF012
    skipped: dict[str, str] = {}  # noqa: RUF012
    refused: str = ""  # how the refusal goes on after the path
    text: str = ""


HELD_OUT, ABOUT, OTHER = "held out by the corpus", "about the corpus", "not a format that data.py reads"
C4 = "c4-train.00000-of-01024.json.gz"
LAYOUTS = {
    "cc100": Layout(
        {"en.txt.xz": EN, "zh-Hans.txt.xz": DE, "hi_rom.txt.xz": HI}, {"en": EN, "hi_rom": HI, "zh-Hans": DE}
    ),
    "opus-mono": Layout(
        {"en.txt.gz": "\n".join(EN).encode(), "en.tok.gz": b"a tram", "en.freq.gz": b"3 the"},
        {"en": ["\n".join(EN)]},
        {"en.freq.gz": OTHER, "en.tok.gz": OTHER},
    ),
    "leipzig": Layout({"de/deu_news_2023_10K-sentences.txt": NUMBERED}, refused="every line begins .* `cut -f2 FILE`"),
    "culturax": Layout(
        {"en/en_part_00000.parquet": EN, "en/en_part_00001.parquet": DE, "sw/sw_part_00000.parquet": SW},
        {"en": EN + DE, "sw": SW},
    ),
    "fineweb2": (
        fineweb2 := Layout(
            {
                "README.md": b"# A data set",
                "data/swh_Latn/train/000_00000.parquet": SW,
                "data/swh_Latn/test/000_00000.parquet": EN,
                "data/swh_Latn_removed/train/000_00000.parquet": DE,
                "data/hin_Deva/train/000_00000.parquet": HI,
            },
            {"hin_Deva": HI, "swh_Latn": SW},
            {
                "README.md": ABOUT,
                "data/swh_Latn/test": HELD_OUT,
                "data/swh_Latn_removed": "filtered out by FineWeb-2",
            },
        )
    ),
    "fineweb2/data": fineweb2._replace(
        text="data", skipped={name: why for name, why in fineweb2.skipped.items() if name.startswith("data")}
    ),
    "hub-wikipedia": Layout(
        {f"20231101.{x}/train-00000-of-00001.parquet": docs for x, docs in (("sw", SW), ("hi", HI))},
        {"hi": HI, "sw": SW},
    ),
    "hub-wikipedia, two dumps": Layout(
        {f"{date}.sw/train-00000-of-00001.parquet": SW for date in (20231101, 20220301)}, refused="two folders for 'sw'"
    ),
    "hub-cache": Layout(
        {"datasets--x--y/blobs/aa": b"{}", "datasets--x--y/snapshots/01/sw/train.jsonl": Path("../../../blobs/aa")},
        refused=r"a cache of the .*name a snapshot in it, like .*datasets--x--y/snapshots/01",
    ),
    "hub-cache, a snapshot": Layout(
        {
            "datasets--x--y/blobs/aa": json.dumps({"text": SW[0]}).encode(),
            "datasets--x--y/snapshots/01/sw/train.jsonl": Path("../../../blobs/aa"),
            "datasets--x--y/snapshots/01/more": Path("../../../elsewhere"),
            "elsewhere/a.txt": EN,
        },
        {"more": EN, "sw": SW[:1]},
        text="datasets--x--y/snapshots/01",
    ),
    "hplt-v3": Layout(
        {"deu_Latn/9_1.jsonl.zst": DE, "deu_Latn/10_1.jsonl.zst": EN, "deu_Latn.map": b"https://example.org"},
        {"deu_Latn": EN + DE},
        {"deu_Latn.map": OTHER},
    ),
    "oscar-2301": Layout(
        {"sw_meta/sw_meta_part_1.jsonl.zst": [{"content": x} for x in SW], "sw_meta/checksum.sha256": b"0 x"},
        {"sw": SW},
        {"sw_meta/checksum.sha256": OTHER},
    ),
    "madlad400": Layout(
        {f"data/sw/sw_{x}_0000.jsonl.gz": [d.replace("\n", r"\n") for d in SW] for x in ("clean", "noisy")},
        {"sw": SW},
        {"data/sw/sw_noisy_0000.jsonl.gz": "MADLAD-400 before cleaning; the clean files are read"},
    ),
    "madlad400, noisy alone": Layout({"sw/sw_noisy_0001.jsonl.gz": [r"Basi.\nMvua."]}, {"sw": ["Basi.\nMvua."]}),
    "mc4": Layout(
        {
            "multilingual/c4-hi.tfrecord-00000-of-01024.json.gz": HI,
            "multilingual/c4-sw.tfrecord-00000-of-00256.json.gz": SW,
            "c4-hi-Latn.tfrecord-00000-of-00032.json.gz": DE,
            "c4-sw-validation.tfrecord-00000-of-00001.json.gz": EN,
        },
        {"hi": HI, "hi-Latn": DE, "sw": SW},
        {"c4-sw-validation.tfrecord-00000-of-00001.json.gz": HELD_OUT},
    ),
    "c4": Layout(
        {f"en/{C4}": EN, "en/c4-validation.00000-of-00008.json.gz": DE, f".git/lfs/{C4}": DE},
        {"en": EN},
        {".git": "hidden", "en/c4-validation.00000-of-00008.json.gz": HELD_OUT},
    ),
    "c4, a variant": Layout({f"en.noblocklist/{C4}": EN}, {"en": EN}),
    "c4, variants": Layout({f"{x}/{C4}": EN for x in ("en", "en.noclean")}, refused="two folders for 'en'"),
    "c4, news": Layout({f"{x}/{C4}": EN for x in ("en", "realnewslike")}, refused="two folders for 'en'"),
    "mixed-formats": Layout(
        {"sw.txt": SW, "en.txt.bz2": EN, "de.ndjson.zst": DE, "hi.parquet": HI},
        {"de": DE, "en": EN, "hi": HI, "sw": SW},
    ),
    "mixed-within-language": Layout(
        {"sw/a.txt": SW, "sw/b.jsonl.zst": EN, "sw/c/d.parquet": DE, "sw/e.pdf": b"%PDF"},
        {"sw": SW + EN + DE},
        {"sw/e.pdf": OTHER},
    ),
    "upper-case-extension": Layout({"EN.TXT": EN, "sw.Jsonl.GZ": SW}, {"EN": EN, "sw": SW}),
    "wikiextractor --json": Layout({"sw/AA/wiki_00": SW, "sw/AB/wiki_00.bz2": EN}, {"sw": SW + EN}),
    "wikiextractor": Layout({"sw/AA/wiki_00": TAGS}, refused="has the tags of WikiExtractor; run it again with --json"),
    "wikiextractor, renamed": Layout({"sw/AA/wiki_00.txt": TAGS}, refused="has the tags of WikiExtractor"),
    "readme-in-language-folder": Layout(
        {"en/README.txt": EN, "en/LICENSE.txt": EN, "en/a.txt": EN, "en/.ipynb_checkpoints/a-checkpoint.txt": EN},
        {"en": EN},
        {"en/.ipynb_checkpoints": "hidden", "en/LICENSE.txt": ABOUT, "en/README.txt": ABOUT},
    ),
    "lfs-pointer": Layout({"gu.txt": POINTER, "hi.txt": HI}, refused="a git-lfs pointer.* run `git lfs pull`"),
    "lfs-pointer, packed": Layout({"gu.jsonl.xz": POINTER}, refused="a git-lfs pointer"),
    "one-array": Layout(
        {"en.json": json.dumps([{"text": x} for x in EN]).encode()}, refused=r"not a JSON .*`jq -c '.\[\]'"
    ),
    "one-array, indented": Layout(
        {"en.json": json.dumps([{"text": x} for x in EN], indent=1).encode()}, refused=r"not a JSON .*`jq -c '.\[\]'"
    ),
    "object-over-lines": Layout(
        {"en.json": json.dumps({"text": EN[0]}, indent=1).encode()}, refused="not a .*`jq -c . F"
    ),
    "splits": Layout(
        {"en/train.txt": EN, "en/valid.txt": DE, "en/test.txt": DE},
        {"en": EN},
        {"en/test.txt": HELD_OUT, "en/valid.txt": HELD_OUT},
    ),
    "packed-twice": Layout(
        {"en/a.txt": EN, "en/a.txt.zst": EN}, refused="the same file, packed and unpacked; remove one"
    ),
    "nothing-read": Layout(
        {"en/a.txt": EN, "sw/pages/a.pdf": b"%PDF"}, refused=r"nothing in it is read \(pages/a.pdf: not"
    ),
    "no-text": Layout({"notes.doc": b"x"}, refused="no text in it; it should hold <lang>"),
}


def compress_zst(raw: bytes) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd.compress(raw)


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": compress_zst}


def write(path: Path, content: list[str] | list[dict] | bytes | Path) -> None:
    """Writes documents in the format of the file's name; or bytes, packed if no pointer; or a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    if isinstance(content, Path):
        os.symlink(content, path)
    elif name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        ids = [str(i) for i in range(len(content))]
        parquet.write_table(pyarrow.table({"id": ids, "text": content}), path)
    else:
        if not isinstance(content, bytes) and ".txt" in name:
            content = "\n\n".join(content).encode()
        elif not isinstance(content, bytes):
            rows = [{"id": "0", **(x if isinstance(x, dict) else {"text": x})} for x in content]
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(content if content == POINTER else PACK.get(path.suffix.lower(), bytes)(content))


def made(layout: Layout, folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Makes a layout in a folder; returns the documents of each language, and what was skipped and why."""
    for name, content in layout.files.items():
        write(folder / name, content)
    found, skipped = find_text(folder / layout.text)
    documents = {
        language: [document.text().strip() for path in files for document in read_documents(path)]
        for language, files in found.items()
    }
    return documents, {path.relative_to(folder).as_posix(): why for path, why in skipped}


def main() -> None:
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                read, skipped = made(layout, Path(folder))
                result = "read: " + ", ".join(f"{language} {len(texts)}" for language, texts in read.items())
                result += "".join(f"; skipped: {path} ({why})" for path, why in skipped.items())
            except ImportError as error:
                result = f"not tried: {error}"
            except InputError as error:
                result = f"refused: {error}".replace(f"{folder}/", "").replace(folder, "TEXT")
        print(f"{name:26} {result}")


if __name__ == "__main__":
    main()
