"""What it costs to run a model on its explanations: `cratelm replace`, of a finished run and at the size of the paper.

    python benchmarks/replace.py --run runs/demo --models crate-2l gpt2-2l
    python benchmarks/replace.py --run runs/demo --together
    python benchmarks/replace.py --paper

With `--together`, the commands of all models start at the same time, with the cores divided among them, as `cratelm demo`
runs them, and the whole commands are timed until the last has ended. Otherwise the command runs without its start, next to
what a pass over the same fit and held-out tokens costs in which nothing is replaced, with the loss of every next token; and
`cratelm explain` of all neurons by its default explainers. At the size of the paper (12 layers of 3,072 neurons, width 768),
the model is untrained, because that changes no cost, and the explanations have a limit of their size.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path

import torch
from common import figures, peak_memory, timed
from measures import copied

from cratelm import api
from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import open_harvested
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models.partial_forward import next_logits
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.replace import replace
from cratelm.runs import Run
from cratelm.steer.ablation import token_losses


def plain(config: ReplaceConfig) -> None:
    """Run the model over as many fit and held-out tokens, with the loss of the latter."""
    opened = open_harvested(Run(config.run), config.model)
    model = opened.subject.model
    for split, tokens in (("fit", config.fit_tokens), ("held_out", config.tokens)):
        plan = SearchPlan.of(
            opened.store.split(split), split, opened.store.eot_id, opened.sequence_length, tokens,
            config.seed,
        )  # fmt: skip
        most = max(1, 2**26 // opened.store.vocab_size) if split == "held_out" else 8192
        with torch.no_grad():
            for batch in plan.batches(min(8192, most), model.device):
                ids = batch.input_ids
                if split == "fit":
                    model.base_model(input_ids=ids, use_cache=False)
                else:
                    token_losses(next_logits(model, ids, ids.shape[1])[:, :-1], ids[:, 1:])


def measure(config: ReplaceConfig, label: str, explaining: ExplainConfig | None = None) -> None:
    """Print the time and memory of the command, of the plain passes, and of explaining the neurons."""
    alone = timed(lambda: plain(config))
    cpu = time.process_time()
    seconds: list[float] = []
    memory = peak_memory(lambda: seconds.append(timed(lambda: replace(config))))
    cpu = time.process_time() - cpu
    explain_seconds = timed(lambda: explain(explaining)) if explaining else 0.0
    print(
        f"{label:<10} {seconds[0]:6.1f} s ({cpu:.1f} s of CPU), {seconds[0] / alone:.1f} times the plain passes"
        f" ({alone:.1f} s), peak memory {memory / 2**20:,.0f} MiB above that of the process"
        + (f"; `explain` of all neurons {explain_seconds:.1f} s" if explaining else "")
    )
    figures(
        model=label,
        seconds=seconds[0],
        cpu_seconds=cpu,
        plain_seconds=alone,
        explain_seconds=explain_seconds,
        ratio=seconds[0] / alone,
        peak_bytes=memory,
        tokens=config.tokens,
        fit_tokens=config.fit_tokens,
        explainers=config.explainers,
    )


def together(run: Path, models: Sequence[str]) -> None:
    """Print how long the commands of several models take that start at the same time, and their processor time."""
    threads = str(max(1, (os.cpu_count() or 1) // len(models)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "cratelm", "replace", "--run", str(run), "--model", model,
             "--force", "--quiet"],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.DEVNULL,
        )
        for model in models
    ]  # fmt: skip
    statuses = [command.wait() for command in commands]
    if any(statuses):
        raise SystemExit("a command failed")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{' and '.join(models)}: {seconds:.1f} s, {cpu:.1f} s of CPU")
    figures(
        models=models, seconds=seconds, cpu_seconds=cpu, peak_kib=after.ru_maxrss, threads=threads
    )


def paper_run(folder: Path, size: str, tokens: int) -> Run:
    """Return a run with tokens, an untrained model and a small harvest of it."""
    api.tokenize(
        run=folder, vocab_size=50_304, fit=0.15, held_out=0.15, sequence_length=256, quiet=True
    )
    api.train(run=folder, model=size, steps=0, sequence_length=256, quiet=True)
    api.harvest(
        run=folder, model=f"{size}-init", tokens=tokens, sequence_length=256, top=10, random=5,
        per_bin=1, quiet=True,
    )  # fmt: skip
    return Run(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--models", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--together", action="store_true", help="all models at the same time")
    parser.add_argument("--paper", action="store_true", help="12 layers of 3,072 neurons")
    parser.add_argument("--size", default="crate-12l", help="of the model with --paper")
    parser.add_argument("--fit-tokens", type=int)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args(arguments)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        if options.run and options.together:
            run = Path(folder) / "run"
            shutil.copytree(options.run, run)
            together(run, options.models)
        elif options.run:
            for model in options.models:
                run = copied(Run(options.run), model, Path(folder) / model)
                config = ReplaceConfig(run=run, model=model, force=True, quiet=True)
                config = changed(
                    config,
                    fit_tokens=options.fit_tokens or config.fit_tokens,
                    tokens=options.tokens or config.tokens,
                )
                # a run of its own: what `replace` keeps of the text for the next stage would help
                other = copied(Run(options.run), model, Path(folder) / f"{model}-explain")
                explaining = ExplainConfig(
                    run=other, model=model, neurons=0, force=True, quiet=True
                )
                measure(config, model, explaining)
        if options.paper:
            n_fit, n = options.fit_tokens or 20_000, options.tokens or 4096
            run = paper_run(Path(folder) / "paper", options.size, 2048)
            config = ReplaceConfig(
                run=run.path, model=f"{options.size}-init", explainers=("lookup:200", "trie:200"),
                layers=("all", "one"), fit_tokens=n_fit, tokens=n, curve_tokens=0, neuron_tokens=0,
                quiet=True,
            )  # fmt: skip
            measure(config, f"{options.size}-init")


if __name__ == "__main__":
    main()
