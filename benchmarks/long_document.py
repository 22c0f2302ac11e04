"""Peak memory of `cratelm tokenize` on a corpus with one long document, a single line of JSON.

    python benchmarks/long_document.py [--megabytes 60] [--kinds words letter wide]

The line consists of words, of one letter, or of words and an emoji, for which Python stores every character of the text
in 4 bytes. Prints the peak memory of the verb in a separate process (Linux), which trains the tokenizer, too.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--kinds", nargs="+", default=["words", "letter", "wide"])
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            short = [f"document {n} of a few words, ten or twelve of them" for n in range(1000)]
            with corpus.open("w", encoding="utf-8") as stream:
                for text in (*short, long_text(kind, int(options.megabytes * 1e6))):
                    stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            begun = time.monotonic()
            command = [sys.executable, "-c", _TOKENIZE, str(Path(folder) / "run"), str(corpus)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            imports, peak = (int(n) / 1000 for n in done.stdout.split()[-2:])
            print(
                f"{kind:7} {corpus.stat().st_size / 1e6:6.1f} MB: peak {peak:,.0f} MB"
                f" (imports {imports:,.0f}), {time.monotonic() - begun:.0f} s"
            )


def long_text(kind: str, n: int) -> str:
    """Return a text of about `n` bytes."""
    if kind == "letter":
        return "x" * n
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    return "🦀" * (kind == "wide") + " ".join(draw.choices(words, k=n // 7))


_TOKENIZE = """
import sys
from pathlib import Path
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
def peak():  # not getrusage, which would include the peak of the process that starts this one
    status = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return next(line.split()[1] for line in status if line.startswith("VmHWM"))
imports = peak()
run, corpus = sys.argv[1:]
tokenize(TokenizeConfig(run=Path(run), corpus=corpus, quiet=True))
print(imports, peak())
"""


if __name__ == "__main__":
    main()
