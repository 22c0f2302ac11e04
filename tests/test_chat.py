"""Tokenizers of models, and chats: the ids are those of `apply_chat_template`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.runs import Run
from cratelm.tokens.model_tokenizer import model_tokenizer
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenizer import train_tokenizer

SPECIAL = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_BEGIN = "{{ bos_token }}" + CHATML + "{{ eos_token }}"
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}"
    + CHATML
)
WORDS = ["cats", "dogs", "sit", "run", "on", "a", "mat", "hill", "why", "because", "größer", "日本"]


def write_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """The tokenizer of a model, which itself puts a begin token before every text."""
    tokenizer: Tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 300)
    tokenizer.add_special_tokens(SPECIAL)
    begin = tokenizer.token_to_id(SPECIAL[0])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], begin)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|endoftext|>")  # fmt: skip
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def chats(n: int, first: str = "user") -> list[dict]:
    generator = np.random.default_rng(0)

    def words() -> str:
        return " ".join(generator.choice(WORDS, 12))

    return [
        {
            "messages": [
                {"role": role, "content": words()} for role in (first, "assistant") * (1 + i % 2)
            ]
        }
        for i in range(n)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")  # fmt: skip
    return path


def tokenized(folder: Path, corpus: Path, tokenizer: str | Path, **options):
    return cratelm.api.tokenize(run=folder / "run", corpus=str(corpus), tokenizer=str(tokenizer), fit=0.3, held_out=0.3, sequence_length=16, quiet=True, **options)  # fmt: skip


def documents(run: Path) -> dict[tuple[str, int], list[int]]:
    """Token ids of each document without its end mark, by file and line."""
    import pyarrow.parquet as pq

    store = TokenStore(run / "tokens")
    found = {}
    for row in pq.read_table(run / "tokens" / "documents.parquet").to_pylist():
        start = row["start"]
        ids = store.split(row["split"]).read(start, start + row["n_tokens"])
        assert ids[-1] == store.eot_id
        found[row["name"], row["line"]] = ids[:-1].tolist()
    return found


@pytest.mark.parametrize("template", [CHATML, WITH_BEGIN])
@pytest.mark.parametrize("parts", [False, True])
def test_chats_have_the_ids_of_the_models_template(tmp_path, monkeypatch, template, parts):
    folder = write_tokenizer(tmp_path / "model", template)
    rows = chats(60)
    rows[3]["messages"][0]["content"] = "in a text <|im_end|> is a token, too, as for the model"
    if parts:
        monkeypatch.setattr("cratelm.tokens.tokenize.GROUP_BYTES", 1)
    (tmp_path / "corpus").mkdir()
    write_rows(tmp_path / "corpus" / "a.jsonl", rows[:40])
    write_rows(tmp_path / "corpus" / "b.jsonl", rows[40:])
    result = tokenized(tmp_path, tmp_path / "corpus", folder)
    assert result.chats == 60
    wrapped = AutoTokenizer.from_pretrained(folder)
    begin = wrapped.bos_token_id
    found = documents(tmp_path / "run")
    assert len(found) == 60
    for number, row in enumerate(rows):
        place = ("a.jsonl", number + 1) if number < 40 else ("b.jsonl", number - 39)
        expected = wrapped.apply_chat_template(row["messages"], return_dict=False)
        assert found[place] == expected
        assert found[place].count(begin) == (1 if template == WITH_BEGIN else 0)
        assert found[place].count(wrapped.convert_tokens_to_ids("<|im_start|>")) == len(row["messages"])  # fmt: skip
    stored = tmp_path / "run" / "tokens" / "chat_template.jinja"
    assert stored.read_text(encoding="utf-8") == template


def test_texts_beside_chats_stay_texts(tmp_path):
    """The name of a special token in a text is text, and no begin token is added to either."""
    folder = write_tokenizer(tmp_path / "model")
    texts = [{"text": "cats <|im_start|> sit " + " ".join(WORDS) * 2, "n": i} for i in range(40)]
    rows = [row for pair in zip(texts, chats(40), strict=True) for row in pair]
    result = tokenized(tmp_path, write_rows(tmp_path / "mixed.jsonl", rows), folder)
    assert result.chats == 40
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = tokenizer.encode(texts[0]["text"], add_special_tokens=False).ids
    found = documents(tmp_path / "run")
    assert found["mixed.jsonl", 1] == expected
    start = tokenizer.token_to_id("<|im_start|>")
    assert start not in found["mixed.jsonl", 1]
    assert start in found["mixed.jsonl", 2]


def test_chats_of_a_parquet_table_are_those_of_json_lines(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, rows = write_tokenizer(tmp_path / "model", WITH_BEGIN), chats(60)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenized(tmp_path / "one", write_rows(tmp_path / "a.jsonl", rows), folder)
    assert tokenized(tmp_path / "two", tmp_path / "a.parquet", folder).chats == 60
    one, two = (list(documents(tmp_path / n / "run").values()) for n in ("one", "two"))
    assert one == two


def test_chats_whose_text_is_empty_are_chats(tmp_path):
    """Tables of chats and texts have both fields in every row, one of which is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_tokenizer(tmp_path / "model")
    texts = [{"text": " ".join(WORDS) * 2, "messages": None, "n": i} for i in range(40)]
    odd = [{"role": "tool", "content": "größer"}, {"role": "", "content": ""}]
    rows = [*texts, *({"text": None, **row} for row in chats(40)), {"text": None, "messages": odd}]
    corpora = [write_rows(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"]
    pq.write_table(pa.Table.from_pylist(rows), corpora[1])
    wrapped = AutoTokenizer.from_pretrained(folder)
    for corpus in corpora:
        place = tmp_path / corpus.suffix
        assert tokenized(place, corpus, folder).chats == 41
        found = documents(place / "run")
        assert found[corpus.name, 81] == wrapped.apply_chat_template(odd, return_dict=False)
        assert len(found) == 81


def test_several_templates_by_name(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    wrapped = AutoTokenizer.from_pretrained(folder)
    corpus = write_rows(tmp_path / "a.jsonl", chats(40))
    for names, has_default in ((("default", "rag"), True), (("tool_use", "rag"), False)):
        wrapped.chat_template = dict.fromkeys(names, CHATML)
        wrapped.save_pretrained(tmp_path / names[0])
        if has_default:
            assert tokenized(tmp_path / "one", corpus, tmp_path / names[0]).chats == 40
            continue
        with pytest.raises(InputError, match="no default chat template"):
            tokenized(tmp_path / "two", corpus, tmp_path / names[0])
        write_rows(tmp_path / "b.jsonl", [{"text": " ".join(WORDS) + str(i)} for i in range(40)])
        assert tokenized(tmp_path / "two", tmp_path / "b.jsonl", tmp_path / names[0]).chats == 0


def test_a_corpus_without_chats_holds_no_template(tmp_path):
    rows = [{"text": " ".join(WORDS) * 3 + str(i)} for i in range(60)]
    result = tokenized(tmp_path, write_rows(tmp_path / "a.jsonl", rows), write_tokenizer(tmp_path / "model"))  # fmt: skip
    assert result.chats == 0
    assert not (tmp_path / "run" / "tokens" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("row", "template", "told"),
    [
        ({"messages": [{"role": "user", "content": "cats"}]}, None, "it is a chat, but the tokenizer has no default chat template: name the folder"),
        ({"messages": "cats"}, CHATML, "field 'messages' must be a list of messages, not 'cats'"),
        ({"messages": []}, CHATML, "must be a list of messages"),
        ({"messages": [{"content": "cats"}]}, CHATML, "has no role in message 1"),
        ({"messages": [{"role": "user"}]}, CHATML, "has no content in message 1"),
        ({"messages": [{"role": "assistant", "content": "cats"}]}, STRICT, "the chat template refuses it (a user speaks first)"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_written_is_one_line(tmp_path, capsys, row, template, told):
    folder = write_tokenizer(tmp_path / "model", template)
    corpus = write_rows(tmp_path / "a.jsonl", [row])
    arguments = ["tokenize", "--run", str(tmp_path / "run"), "--corpus", str(corpus), "--tokenizer", str(folder), "--quiet"]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert "a.jsonl, line 1" in error


def test_a_tokenizer_trained_here_has_no_template(tmp_path):
    with pytest.raises(InputError, match="line 1: it is a chat, but the tokenizer has no default chat template"):  # fmt: skip
        cratelm.api.tokenize(run=tmp_path / "run", corpus=str(write_rows(tmp_path / "a.jsonl", chats(9))), quiet=True)  # fmt: skip


# ---- the tokenizer of a model -------------------------------------------------------------------------


def test_the_tokenizer_of_a_folder_is_that_of_its_file(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    rows = write_rows(tmp_path / "a.jsonl", [{"text": " ".join(WORDS) * 3 + str(i)} for i in range(60)])  # fmt: skip
    tokenized(tmp_path / "one", rows, folder)
    tokenized(tmp_path / "two", rows, folder / "tokenizer.json")
    assert documents(tmp_path / "one" / "run") == documents(tmp_path / "two" / "run")
    before = Run(tmp_path / "one" / "run").stage("tokens").completion()
    (folder / "chat_template.jinja").write_text(WITH_BEGIN)
    with pytest.raises(InputError, match="input tokenizer that has changed since"):
        tokenized(tmp_path / "one", rows, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenized(tmp_path / "one", rows, folder)
    assert before == Run(tmp_path / "one" / "run").stage("tokens").completion()


def test_a_folder_without_tokenizer_json_is_one_line(tmp_path, capsys):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "a.txt").write_text("cats")
    arguments = ["tokenize", "--run", str(tmp_path / "run"), "--corpus", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "slow")]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "slow has no tokenizer.json, which is needed" in error


def test_a_name_that_is_nothing_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"is not a file: name a tokenizer\.json, or the folder or Hub id"):  # fmt: skip
        tokenized(tmp_path, write_rows(tmp_path / "a.jsonl", [{"text": "cats"}]), tmp_path / "nowhere.json")  # fmt: skip
    with pytest.raises(InputError, match="--revision is v1, but --tokenizer train is not on the Hub"):  # fmt: skip
        tokenized(tmp_path, write_rows(tmp_path / "a.jsonl", [{"text": "cats"}]), "train", revision="v1")  # fmt: skip


_OF_THE_HUB = """
import json, sys
import pytest
import cratelm
from cratelm.errors import InputError
from cratelm.runs import Run
from cratelm.tokens.model_tokenizer import model_tokenizer
one, two = "1" * 40, "2" * 40
assert model_tokenizer("me/talks").identity == "hub:me/talks@" + two
assert model_tokenizer("me/talks@v1").identity == "hub:me/talks@" + one
assert model_tokenizer("me/talks", "v1").chat.template != model_tokenizer("me/talks").chat.template
with pytest.raises(InputError, match="give one revision"):
    model_tokenizer("me/talks@v1", "main")
for name in ("me/unknown", "me/talks@v9"):
    with pytest.raises(InputError, match="no tokenizer can be read from"):
        model_tokenizer(name)
run, corpus = sys.argv[1:]
options = dict(run=run, corpus=corpus, tokenizer="me/talks", fit=0.3, held_out=0.3, sequence_length=16, quiet=True)
assert cratelm.api.tokenize(**options, revision="v1").chats == 60
record = Run(run).stage("tokens").completion()
assert record.inputs["tokenizer"] == "hub:me/talks@" + one
assert "--revision v1" in Run(run).stage("tokens").command()
with pytest.raises(InputError, match="input tokenizer that has changed since"):
    cratelm.api.tokenize(**options)
print("all is well")
"""


def test_the_tokenizer_of_the_hub_is_named_by_its_commit(tmp_path):
    cache = tmp_path / "hub" / "models--me--talks"
    (cache / "refs").mkdir(parents=True)
    for commit, ref, template in (("1" * 40, "v1", CHATML), ("2" * 40, "main", WITH_BEGIN)):
        (cache / "refs" / ref).write_text(commit)
        write_tokenizer(cache / "snapshots" / commit, template)
    corpus = write_rows(tmp_path / "a.jsonl", chats(60))
    done = subprocess.run(
        [sys.executable, "-c", _OF_THE_HUB, str(tmp_path / "run"), str(corpus)],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.endswith("all is well\n"), done.stderr[-3000:]


def test_paths_are_not_taken_for_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "models" / "mine")
    found = model_tokenizer("models/mine")
    assert found is not None
    assert not found.identity.startswith("hub:")
    assert model_tokenizer("models/mine/tokenizer.json") is None
