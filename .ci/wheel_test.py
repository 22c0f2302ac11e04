"""Try the wheel as somebody does who has not the repository: `make wheel-test`.

Builds the wheel, installs it with the extra `viewer` into an empty environment, and there, in a folder
elsewhere, runs `cratelm --help`, a small demo, `cratelm view --static` and the server, of which it fetches
the first page with everything that the page loads.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = "--size 1l --vocab-size 300 --steps 4 --tokens 2000 --neurons 4"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        command = install(folder)
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
        (folder / "elsewhere").mkdir()
        os.chdir(folder / "elsewhere")
        assert "usage: cratelm VERB" in run(command, "--help")
        corpus = Path(os.__file__).parent / "email"
        printed = run(command, "demo", "--run", "run", "--corpus", str(corpus), *DEMO.split())
        assert "top-and-random" in printed
        assert Path("run/report/report.html").stat().st_size > 10_000
        assert "models to train" in run(command, "study", "laptop", "--dry-run", "--tflops", "1")
        run(command, "view", "run", "--static", "pages", "--neurons", "2")
        check_static(Path("pages"))
        serve(command)
        print(f"the wheel works ({time.monotonic() - started:.0f} s)")


def install(folder: Path) -> Path:
    """Build the wheel, install it, and return the path of its command."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = folder.glob("cratelm-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-compile", "-c", str(ROOT / "constraints.txt")]  # compiling all of it takes longer
    subprocess.run([*pip, "torch"], check=True)  # first and alone, as in the Makefile
    subprocess.run([*pip, f"{wheel}[viewer]"], check=True)
    return python.with_name("cratelm")


def run(command: Path, *words: str) -> str:
    """What the command prints; an error shows all of it."""
    done = subprocess.run([command, *words], env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"cratelm {' '.join(words)} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def environment() -> dict[str, str]:
    """Without what would let Python find the repository."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}


def check_static(pages: Path) -> None:
    """Every file that a written page loads is there."""
    written = list(pages.rglob("*.html"))
    assert len(written) > 4
    for page in written:
        for address in loaded(page.read_text()):
            assert (page.parent / address).is_file(), f"{page} loads {address}, which is not there"


def loaded(page: str) -> list[str]:
    """Style sheets and scripts of a page; there must be one of each at least."""
    found = re.findall(r'<(?:link[^>]+href|script[^>]+src)="([^"?#]+\.(?:css|js))', page)
    assert {address.rpartition(".")[2] for address in found} == {"css", "js"}, page[:500]
    return found


def serve(command: Path) -> None:
    """Start the server, and fetch the first page and what it loads."""
    words = [command, "view", "run", "--port", "0"]
    server = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        first = server.stdout.readline()
        address = re.match(r"http://\S+?(?=/)", first)
        assert address, first
        page = fetch(f"{address[0]}/")
        assert "crate-1l" in page
        for path in loaded(page):
            assert fetch(urllib.parse.urljoin(f"{address[0]}/", path))
    finally:
        server.terminate()
        server.wait(30)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


if __name__ == "__main__":
    main()
