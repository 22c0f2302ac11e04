"""`cratelm import records`: create a run from activations harvested elsewhere, in OpenAI's NeuronRecord JSON.

Each activation record becomes an excerpt, and its text becomes a document:

| field of the file | kind of excerpt | rank | peak (token for which it was chosen) |
|---|---|---|---|
| most_positive_activation_records | top | 0, 2, 4 ... in `fit`, 1, 3, 5 ... in `held_out` | the highest |
| random_sample | random | within its split | the middle one |
| random_sample_by_quantile | openai_bin | within bin and split | the highest |

Even positions of a list go to `fit` and odd positions to `held_out`. A text that occurs in several records, of one
neuron or of many, stays in the split in which it first occurred. If no text moved, the ranks of `top` are the
positions in the file; in any case they are the ranks that `explain` and `score` expect. The files contain no
Anthropic bins, no tokens out of context and no range of the activation: these excerpts are missing, and the edges of
the Anthropic bins are NaN. Mean and moments are taken from the file. If it has none, they are estimated from the
random sample of the split, as are the firing rate and the histogram. `n_tokens` is the size of that sample, because
the files do not state how many tokens were searched.

Files are read three times. Memory holds one file at a time, 0.4 kB per distinct text, and the excerpts of a group
of neurons.
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
    """Result of `cratelm import records`."""

    path: Path
    """folder of the activations"""
    neurons: int
    left_out: int
    """neurons omitted because they have no excerpt in one of the splits: they have too few texts, or share them
    with other neurons"""
    documents: dict[str, int]
    """number of distinct texts, by split"""
    moved: int
    """activation records moved to the other split with their text"""
    repeated: int
    """activation records omitted because their list already contains the same text"""
    without_random: int
    """neurons, counted in each split, without a random excerpt: their statistics are over all excerpts"""
    without_mean: int
    """neurons whose file has no mean: it is estimated from the random sample"""


def import_records(config: ImportRecordsConfig) -> ImportRecordsResult:
    """Write `tokens/` and `activations/MODEL/` of a run, as if they had been harvested.

    Raises `InputError`, and writes nothing, if a file is not a NeuronRecord or contains a number that float32
    cannot represent, or if no neuron has two different texts.
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


def _find(paths: Iterable[Path]) -> list[Path]:
    """Return all files; the files of a folder are sorted by name."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.json") if p.is_file())
            if not inside:
                raise InputError(f"--files {path} has no .json file: name a folder of records")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"--files {path} does not exist: name a file or a folder of records")
    return files


def _survey(paths: Sequence[Path], config: ImportRecordsConfig) -> tuple[ImportedTexts, list[Path]]:
    """Return the texts of all files, and the usable files sorted by layer and index of their neurons."""
    texts, by_neuron, usable = ImportedTexts(), {}, {}
    for path in tqdm(paths, desc="read records", unit="file", disable=config.quiet):
        record = read_record(path)
        neuron = record.layer, record.index
        if neuron in by_neuron:
            raise InputError(
                f"{path} and {by_neuron[neuron]} are both of layer {neuron[0]}, neuron {neuron[1]}: name only"
                " one of them with --files"
            )
        by_neuron[neuron] = path
        for listed in listed_records(record):
            check(listed, path)
        texts.add(record)
        if len(splits_of(record, texts)) == len(IMPORT_SPLITS):
            usable[neuron] = path
    if not usable:
        raise InputError(
            f"none of the {len(paths):,} neurons has two texts, one to explain it from and one to score on:"
            " name records with more texts with --files"
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
    """Write the tables, one group of neurons at a time, and the unchanged records; return the counts."""
    counts = ImportCounts()
    records = map(read_record, tqdm(order, desc="import", unit="neuron", disable=config.quiet))
    with ExitStack() as stack:
        append = stack.enter_context(source_writer(draft.path))
        group = Path(stack.enter_context(TemporaryDirectory(dir=draft.path, prefix=".group")))
        tables = _open_tables(draft.path, stack)
        while of_group := list(islice(records, NEURONS_PER_GROUP)):
            by_split = [
                neuron_records(r, config.model, config.site, texts, counts) for r in of_group
            ]
            for split in IMPORT_SPLITS:
                # written in the format of a harvest, then appended to its tables as one row group
                write_records(group, split, [neuron[split] for neuron in by_split])
                for path_of in (summaries_path, excerpts_path):
                    tables[path_of(draft.path, split)].write_table(
                        pq.read_table(path_of(group, split))
                    )
            for record in of_group:
                append(record)
    return counts


def _open_tables(folder: Path, stack: ExitStack) -> dict[Path, pq.ParquetWriter]:
    opened = {}
    for split in IMPORT_SPLITS:
        for path, schema in (
            (summaries_path(folder, split), SUMMARIES.least),
            (excerpts_path(folder, split), EXCERPTS.schema),
        ):
            opened[path] = stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
    return opened
