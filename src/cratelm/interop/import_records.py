"""`cratelm import records`: a run of activations harvested elsewhere, from OpenAI's NeuronRecord JSON.

Each activation record becomes an excerpt and its text a document:

| field of the file | kind of excerpt | rank | token it was chosen for |
|---|---|---|---|
| most_positive_activation_records | top | 0, 2, 4 ... in `fit`, 1, 3, 5 ... in `held_out` | the highest |
| random_sample | random | within its split | the middle one |
| random_sample_by_quantile | openai_bin | within bin and split | the highest |

Even places of a list go to `fit` and odd ones to `held_out`. A text that several records show, of one
neuron or of many, stays in the split where it was met first. So the ranks of `top` are the file's places
where no text moved, and always those that `explain` and `score` take. The files hold no Anthropic bins, no
tokens out of context and no range of the activation: those excerpts are absent, and the edges of the
Anthropic bins NaN. The mean and the moments are the file's; where it has none, and for the firing
rate and the histogram, those of the random sample of the split stand in. `n_tokens` counts that
sample, because how many tokens were searched is not in the files.

Files are read three times. Memory holds one file at a time, 0.4 kB per different text, and the
excerpts of a group of neurons.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from tqdm import tqdm

from cratelm.activations.store import (
    EXCERPTS,
    NEURONS_PER_GROUP,
    SUMMARIES,
    excerpts_path,
    summaries_path,
    write_records,
)
from cratelm.errors import InputError
from cratelm.interop.config import ImportRecordsConfig
from cratelm.interop.imported_neuron import ImportCounts, check, neuron_records
from cratelm.interop.imported_texts import IMPORT_SPLITS, ImportedTexts, listed_records, splits_of
from cratelm.interop.openai_records import read_record, source_writer
from cratelm.records import SPLITS
from cratelm.runs import Completion, Draft, Inputs, Run, Stage, hash_file, hash_json


@dataclass(frozen=True)
class ImportRecordsResult:
    """What was imported."""

    path: Path
    """folder of the activations"""
    neurons: int
    left_out: int
    """neurons without an excerpt in one of the splits: their texts are too few, or all others' too"""
    documents: dict[str, int]
    """different texts, by split"""
    moved: int
    """activation records that followed their text into the other split"""
    repeated: int
    """activation records left out because their list holds the same text already"""
    without_random: int
    """neurons, in each split, with no random excerpt: statistics are those of all their excerpts"""
    without_mean: int
    """neurons whose file has no mean: it is that of the random sample"""


def import_records(config: ImportRecordsConfig) -> ImportRecordsResult:
    """Write `tokens/` and `activations/MODEL/` of a run, as if they had been harvested.

    Raises `InputError` for files that are no NeuronRecords, hold a number that float32 cannot, or
    show no neuron with two different texts; then nothing is written.
    """
    run = Run(config.run)
    paths = _find(config.files)
    inputs: dict[str, Completion | str] = {"files": hash_json([hash_file(path) for path in paths])}
    tokens, harvest = run.stage("tokens"), run.stage("activations", config.model)
    corpus = {"corpus": "activation records", "tokenizer": "token strings of the records"}
    settings = {
        "import": "records",
        "files": list(map(str, config.files)),
        "name": config.model,
        "site": config.site,
    }
    if tokens.is_finished(corpus, inputs, force=config.force):
        done = {**inputs, "tokens": tokens.require("import records")}
        if harvest.is_finished(settings, done, force=config.force):
            return harvest.result(ImportRecordsResult, path=harvest.path)
    texts, order = _survey(paths, config)
    _write_tokens(tokens, corpus, inputs, texts, order)
    inputs["tokens"] = tokens.require("import records")
    with harvest.write(settings, inputs) as draft:
        counts = _write_activations(draft, config, texts, order)
        draft.results = {
            "neurons": len(order),
            "left_out": len(paths) - len(order),
            "documents": {split: texts.n_documents(split) for split in IMPORT_SPLITS},
            "moved": texts.n_moved,
            **asdict(counts),
        }
    return ImportRecordsResult(harvest.path, **draft.results)


def _find(given: Iterable[Path]) -> list[Path]:
    """All files, those of a folder in the order of their names."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.json") if p.is_file())
            if not inside:
                raise InputError(f"--files {path} holds no .json file: name a folder of records")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"--files {path} is not there: a file or a folder was expected")
    return found


def _survey(paths: Sequence[Path], config: ImportRecordsConfig) -> tuple[ImportedTexts, list[Path]]:
    """The texts of all files, and the files that can be used, by layer and index of their neurons."""
    texts, places, usable = ImportedTexts(), {}, {}
    for path in tqdm(paths, desc="read records", unit="file", disable=config.quiet):
        record = read_record(path)
        place = record.layer, record.index
        if place in places:
            raise InputError(
                f"{path} is of layer {place[0]}, neuron {place[1]}, and so is {places[place]}: name"
                " one of them with --files"
            )
        places[place] = path
        for listed in listed_records(record):
            check(listed, path)
        texts.add(record)
        if len(splits_of(record, texts)) == len(IMPORT_SPLITS):
            usable[place] = path
    if not usable:
        raise InputError(
            f"none of the {len(paths):,} neurons has two texts, one to explain from and one to score"
            " on: name records with more different texts with --files"
        )
    return texts, [path for _, path in sorted(usable.items())]


def _write_tokens(
    stage: Stage, corpus: dict[str, str], inputs: Inputs, texts: ImportedTexts, order: list[Path]
) -> None:
    with stage.write(corpus, inputs) as draft:
        writer = texts.writer(draft.path)
        for path in order:
            texts.write(writer, read_record(path))
        writer.close()
        draft.results = {
            "vocab_size": writer.vocab_size,
            "tokens": {split: writer.n_tokens(split) for split in SPLITS},
            "documents": {split: writer.n_split_documents(split) for split in SPLITS},
        }


def _write_activations(
    draft: Draft, config: ImportRecordsConfig, texts: ImportedTexts, order: list[Path]
) -> ImportCounts:
    """Writes the tables, a group of neurons at a time, and the records as they were."""
    counts = ImportCounts()
    records = map(read_record, tqdm(order, desc="import", unit="neuron", disable=config.quiet))
    with ExitStack() as stack:
        keep = stack.enter_context(source_writer(draft.path))
        group = Path(stack.enter_context(TemporaryDirectory(dir=draft.path, prefix=".group")))
        tables = _open_tables(draft.path, stack)
        while some := list(islice(records, NEURONS_PER_GROUP)):
            made = [neuron_records(r, config.model, config.site, texts, counts) for r in some]
            for split in IMPORT_SPLITS:
                # written as the harvest's tables are, then added to them as one row group
                write_records(group, split, [one[split] for one in made])
                for path_of in (summaries_path, excerpts_path):
                    tables[path_of(draft.path, split)].write_table(
                        pq.read_table(path_of(group, split))
                    )
            for record in some:
                keep(record)
    return counts


def _open_tables(folder: Path, stack: ExitStack) -> dict[Path, pq.ParquetWriter]:
    opened = {}
    for split in IMPORT_SPLITS:
        for path, schema in (
            (summaries_path(folder, split), SUMMARIES.schema),
            (excerpts_path(folder, split), EXCERPTS.schema),
        ):
            opened[path] = stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
    return opened
