"""Every verb of the command line as a function: `api.train(run="runs/mine", steps=500)`.

Arguments are the options of `cratelm VERB`, by the same names; `import records` is `import_records`.
Every function returns what the command prints, as a dataclass, and raises `InputError` for bad
input. Nothing heavy is imported before a function is called.

Written by scripts/write_api.py from the configurations of the verbs: change those, and run it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from cratelm.cli import config_class, run_verb

if TYPE_CHECKING:
    from cratelm.activations.harvest import HarvestResult
    from cratelm.analysis.analyze import AnalyzeResult
    from cratelm.evaluate.evaluate import EvaluateResult
    from cratelm.evaluate.predict import PredictResult
    from cratelm.explain.explain import ExplainResult
    from cratelm.interop.export_model import ExportModelResult
    from cratelm.interop.export_records import ExportRecordsResult
    from cratelm.interop.import_authors import ImportAuthorsResult
    from cratelm.interop.import_records import ImportRecordsResult
    from cratelm.interop.import_sae import ImportSaeResult
    from cratelm.interop.neuronpedia import ExportNeuronpediaResult
    from cratelm.llm.client import DryRun, WorkerResult
    from cratelm.pipelines.demo import DemoResult
    from cratelm.pipelines.sae_compare import SaeCompareResult
    from cratelm.report.report import ReportResult
    from cratelm.sae.evaluate import SaeEvaluateResult
    from cratelm.sae.train import SaeTrainResult
    from cratelm.score.score import ScoreResult
    from cratelm.steer.effects import EffectsResult
    from cratelm.steer.intervene import InterveneResult
    from cratelm.steer.steer import SteerResult
    from cratelm.tokens.tokenize import TokenizeResult
    from cratelm.train.loop import TrainResult

__all__ = [
    "analyze",
    "demo",
    "effects",
    "evaluate",
    "explain",
    "export_model",
    "export_neuronpedia",
    "export_records",
    "harvest",
    "import_authors",
    "import_records",
    "import_sae",
    "intervene",
    "predict",
    "report",
    "sae_compare",
    "sae_evaluate",
    "sae_train",
    "score",
    "steer",
    "tokenize",
    "train",
    "view",
]


def _run(verb: str, options: Mapping[str, Any]) -> Any:
    """Run a verb with its options, of which paths may be text."""
    config = config_class(verb)
    types = get_type_hints(config)
    return run_verb(verb, config(**{k: _path(types[k], v) for k, v in options.items()}))


def _path(kind: Any, value: Any) -> Any:
    if kind in (Path, Path | None):
        return Path(value) if isinstance(value, str) else value
    if kind == tuple[Path, ...]:
        return tuple(map(Path, [value] if isinstance(value, str | Path) else value))
    return value


def demo(
    *,
    run: str | Path = Path("runs/demo"),
    corpus: str = "builtin",
    size: Literal["1l", "2l", "3l"] = "2l",
    vocab_size: int = 4096,
    steps: int = 600,
    tokens: int = 200_000,
    neurons: int = 256,
    sae: bool = False,
    seed: int = 0,
    force: bool = False,
    quiet: bool = False,
) -> "DemoResult":
    """Run every stage on a laptop: train CRATE and its GPT-2 twin, then compare their neurons.

    Tokenizes a corpus, trains both models on the same tokens in the same order, harvests, explains and
    scores their neurons, measures which tokens these promote, and writes a report. Two randomly
    initialised models are controls. After an interruption the same command resumes.

    Args:
        run: run directory
        corpus: `builtin` (the source files of the Python standard library), a file, a folder or
            `hub:ID`; see `cratelm tokenize --help`
        size: layers of the twins (width 128, 512 neurons a layer)
        vocab_size: number of tokens in the vocabulary, which is trained on the corpus
        steps: training steps of each twin, 16 sequences of 256 tokens per step
        tokens: tokens harvested from each of the splits fit and held_out
        neurons: neurons per layer that are explained and scored, drawn at random; 0 = all
        sae: also train small sparse autoencoders on both twins and compare their latents with the
            neurons; needs the extra `sae`
        seed: seed of the initial weights, the order of the data, samples and intervals
        force: redo every stage, even if it is finished
        quiet: no progress bars, no plan and no names of the stages
    """
    return _run("demo", locals())


def tokenize(
    *,
    run: str | Path = Path("runs/default"),
    corpus: str = "builtin",
    text_field: str = "text",
    subset_field: str = "meta.pile_set_name",
    tokenizer: str = "train",
    vocab_size: int = 4096,
    sample_megabytes: float = 64.0,
    fit: float = 0.05,
    held_out: float = 0.05,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    sequence_length: int = 128,
    on_error: Literal["stop", "skip"] = "stop",
    force: bool = False,
    quiet: bool = False,
) -> "TokenizeResult":
    """Turn a corpus into token shards with document borders, split by the hash of each document.

    Args:
        run: run directory, in which `tokens/` is written
        corpus: `builtin` (the Python standard library's sources, about 12 MB), a file (.txt .text
            .md .rst .tex .py: one document; .jsonl .jsonl.zst .parquet: one per row), a folder of
            such files, or `hub:ID[:CONFIGURATION][@REVISION]` (the train split, streamed; needs the
            extra `hub`)
        text_field: field of a row that holds the text
        subset_field: field of a row that names its part of the corpus, kept with the document; a
            dot leads into a nested field; rows may lack it
        tokenizer: `train` (byte-level BPE, trained on documents of the train split only), `gpt2`
            (fetched from the Hub, else through tiktoken), or the path of a tokenizer.json
        vocab_size: size of a trained vocabulary, `<|endoftext|>` included; other tokenizers bring
            their own
        sample_megabytes: megabytes (10^6 bytes) of text that a tokenizer is trained on: the first
            of the train split
        fit: fraction of the documents from which neurons are explained
        held_out: fraction of the documents on which explanations are scored and the loss is
            measured; the rest trains
        max_documents: stop after this many documents. Default: all
        max_tokens: stop after the document that reaches this many tokens. Default: all
        sequence_length: in tokens; every split must hold at least one sequence of this length, and
            one token more
        on_error: what to do with a document that cannot be read: stop with its file and line, or
            skip and count it
        force: redo the stage even if it is finished
        quiet: show no progress bar
    """
    return _run("tokenize", locals())


def train(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    name: str = "",
    recipe: Literal["paper", "laptop"] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    sequence_length: int | None = None,
    optimizer: Literal["adamw", "muon"] | None = None,
    learning_rate: float | None = None,
    minimum_ratio: float = 0.1,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    precision: Literal["fp32", "bf16"] | None = None,
    compile: bool = False,
    log_every: int | None = None,
    validate_every: int | None = None,
    validation_sequences: int | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    model_overrides: tuple[str, ...] = (),
    device: Literal["auto", "cpu"] = "auto",
    tensorboard: bool = False,
    wandb: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> "TrainResult":
    """Train one model on the tokens of a run.

    Twins are trained by the same command with another `--model`: they see the same tokens in the
    same order. After an interruption the same command resumes from the last checkpoint.

    Args:
        run: run directory; its tokens must have been made by `cratelm tokenize`
        model: size by name: crate-1l, -2l, -3l, -6l, -12l, gpt2-1l, -2l, -3l, -6l, -12l
        name: name of the model's folder in the run. Default: --model, with `-init` if --steps is 0
        recipe: defaults of the options below. Default: `paper` for the sizes 6l and 12l, `laptop`
            for 1l, 2l and 3l (the paper trained those, too, with its one recipe)
        steps: number of steps of one batch each (paper 600,000; laptop 600); 0 saves the model as
            initialised
        batch_size: sequences per step, over all devices (paper 256; laptop 16)
        micro_batch_size: sequences that one device takes through the model at once; gradients are
            accumulated over several (paper 16; laptop 16)
        sequence_length: T, tokens of a sequence (paper 1,024; laptop 256)
        optimizer: muon: torch.optim.Muon for the matrices inside the blocks, AdamW for the
            embeddings, the head and the vectors (paper adamw; laptop muon)
        learning_rate: peak learning rate, the same for all parameters (paper 6e-4; laptop 1.5e-2,
            with adamw 3e-3)
        minimum_ratio: learning rate of the last step as a fraction of the peak; a cosine leads
            there
        warmup: steps over which the learning rate rises (paper 2,000; laptop 60; the same fraction
            of a run of another length)
        weight_decay: applied to tensors of 2 or more dimensions
        clip: largest norm of the gradient over all parameters; 0 means no limit
        precision: bf16: mixed precision, weights stay in float32 (paper bf16; laptop fp32)
        compile: use torch.compile: slow to start, but faster steps, above all on GPUs
        log_every: steps between two points of the training curve (paper 10; laptop 1)
        validate_every: steps between two points of the validation curve (paper 1,000; laptop 100)
        validation_sequences: sequences of the held-out split to validate on, always the same ones
            (paper 1,024; laptop 128)
        checkpoint_every: steps between two checkpoints (paper 1,000; laptop 50)
        seed: seed of the initial weights and of the order of the sequences
        model_overrides: fields of the model's configuration as key=value, such as
            ista_residual=true ista_steps=3
        device: auto uses a GPU if there is one; for several, launch with `torchrun` or `accelerate
            launch`
        tensorboard: curves for TensorBoard in the model's folder as well (needs the extra
            `tensorboard`)
        wandb: curves to Weights & Biases as well (needs the extra `wandb`)
        force: redo the stage even if it is finished
        quiet: show no progress bar
    """
    return _run("train", locals())


def evaluate(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    path: str | None = None,
    models: tuple[str, ...] = (),
    on: tuple[str, ...] = (),
    split: Literal["train", "fit", "held_out"] = "held_out",
    max_tokens: int | None = None,
    max_documents: int | None = None,
    text_field: str | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    output: str | Path | None = None,
    quiet: bool = False,
) -> "EvaluateResult":
    """Measure models on a run's tokens and on named sets, every token once, and compare them.

    Args:
        run: run directory: its models, and the tokens of its splits
        model: name of a model in the run
        path: a model folder or Hub id to measure instead of --model
        models: several models to compare, instead of --model: names in the run, model folders or
            Hub ids (OWNER/NAME). The first is compared with each of the others, document by
            document
        on: what to measure on, one or more: the run's train, fit and held_out; lambada,
            lambada_raw, wikitext2, wikitext103, ptb, openwebtext, pile, pile:SUBSET from the Hub;
            NAME=PATH reads one of these, or documents under any other name, from a local file or
            folder. Default: --split
        split: train, fit or held_out; used when --on is not given
        max_tokens: stop after this many tokens of a set (of texts: after the document that reaches
            it). Default: all
        max_documents: number of documents of each set of texts, from the first. Default: all, but
            1,000 of openwebtext and of the Pile, which are streamed
        text_field: field that holds the text in rows of local files. Default: the one that the set
            has on the Hub
        sequence_length: tokens of a sequence, the longest context a token can have. Default: the
            most that the model takes, at most 2,048; 1,024 where it names no limit
        stride: tokens by which the window moves: each token is still predicted once, from at least
            sequence_length - stride tokens. Default: sequence_length, no overlap
        batch_size: sequences at a time; fewer if their logits would exceed 1 GiB
        device: cpu, cuda, ...; auto takes an accelerator where there is one
        dtype: precision of the models; auto: that of their files
        output: also write the figures to this JSON file
        quiet: show no progress bar
    """
    return _run("evaluate", locals())


def predict(
    *,
    run: str | Path = Path("runs/default"),
    models: tuple[str, ...] = ("crate-2l", "gpt2-2l"),
    text: str | None = None,
    text_file: str | Path | None = None,
    document: int | None = None,
    split: Literal["train", "fit", "held_out"] = "held_out",
    seed: int = 0,
    tokens: int = 96,
    top: int = 5,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: str | Path | None = None,
    quiet: bool = False,
) -> "PredictResult":
    """Show what models predict after each token of the same text, as a page and a figure.

    Args:
        run: run directory: its models, and the documents of its splits
        models: names in the run, model folders, Hub ids (OWNER/NAME); each reads in its own tokens
        text: the text itself. Default: a document of the run
        text_file: a UTF-8 file with the text
        document: number of a document in its split, from 0. Default: drawn by --seed
        split: which documents: train, fit or held_out
        seed: draws the document
        tokens: number of tokens of the document to show, in the run's tokenizer; your own text is
            shown whole
        top: most likely next tokens shown for each token
        device: cpu, cuda, ...; auto takes an accelerator where there is one
        dtype: precision of the models; auto: that of their files
        out: path of the page. Default: predictions.html in the run. A PNG and a PDF of the same
            name go into the same folder
        quiet: show no progress bar; `predict` has none and takes the option as all verbs do
    """
    return _run("predict", locals())


def harvest(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    name: str | None = None,
    site: str | None = None,
    sae: str | None = None,
    tokens: int = 8_192_000,
    sequence_length: int | None = None,
    top: int = 50,
    random: int = 50,
    per_bin: int = 20,
    context: int = 32,
    short_context: int = 4,
    pilot_tokens: int = 8192,
    seed: int = 0,
    batch_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "HarvestResult":
    """Collect, in one pass over held-back tokens, the excerpts and statistics of every neuron.

    Args:
        run: run directory
        model: a model of the run by name, or any Hugging Face causal language model by folder or
            Hub id
        name: name of the harvest in the run. Default: the model's name; of latents `MODEL+SAE`
        site: where neurons live: ista, mssa, heads, mlp, or a module path such as
            'gpt_neox.layers.*.mlp.dense_4h_to_h:input'. Default: ista for CRATE, mlp for others
        sae: latents of sparse autoencoders instead of neurons: their name in the run (see `cratelm
            sae train`), or a folder in SAELens' format; needs the extra `sae`
        tokens: most tokens to search in each of the splits fit and held_out (the paper: 8,192,000)
        sequence_length: tokens the model sees at once. Default: the most that it takes, at most
            2,048; 1,024 where it names no limit
        top: excerpts with the highest activation, one per document
        random: excerpts around random tokens
        per_bin: excerpts from each bin of both binnings
        context: tokens before the chosen token in a long excerpt, and as many from it on
        short_context: the same in a short excerpt (Anthropic metric)
        pilot_tokens: tokens of the pilot sample that sets the edges of the bins
        seed: draws random excerpts and the order within bins; twins need the same
        batch_tokens: tokens per forward pass; more is faster and takes more memory
        dtype: precision of the model; statistics are always kept in float32 or more
        device: cpu, cuda, ...; auto takes an accelerator where there is one
        force: redo the stage even if it is finished
        quiet: show no progress bar
    """
    return _run("harvest", locals())


def explain(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    retry_failed: bool = False,
    shard: str = "",
    force: bool = False,
    base_url: str = "",
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    method: Literal["auto", "logprobs", "json"] = "auto",
    concurrency: int = 8,
    deadline: float = 120.0,
    retries: int = 4,
    offline: bool = False,
    dry_run: bool = False,
    max_calls: int = 0,
    max_tokens: int = 0,
    max_cost: float = 0.0,
    price_prompt: float = 0.0,
    price_completion: float = 0.0,
    quiet: bool = False,
    explainer: str = "",
    explainers: tuple[Literal["lookup", "trie"], ...] = ("lookup", "trie"),
    evidence: tuple[Literal["top", "anthropic"], ...] = ("top", "anthropic"),
    contrast: int = 0,
    max_entries: int = 200,
    depth: int = 4,
    neurons: int = 0,
    only: tuple[str, ...] = (),
    seed: int = 0,
    prompts: Literal["cratelm", "openai"] = "cratelm",
    answer_tokens: int = 60,
    temperature: float = 0.0,
    name: str = "",
) -> "ExplainResult | DryRun | WorkerResult":
    """Explain the neurons of one model from the excerpts of its fit split, with or without a language model.

    Args:
        run: run directory, holding the harvest of `--model`
        model: name of the model in the run
        retry_failed: ask again what failed in an earlier command
        shard: `I/N`, such as 0/4: only every N-th neuron, for the I-th of N workers, into a ledger
            of its own; the command without --shard then merges the ledgers and finishes the stage
        force: redo the stage even if it is finished
        base_url: for `openai:MODEL`: address of an OpenAI-compatible server, such as
            http://127.0.0.1:8000/v1; default: OpenAI's own. The key is read from the environment
            variable OPENAI_API_KEY only. Answers are stored by the model's name, not by the
            address: give other weights another name
        device: for `hf:`: device of the language model; `auto` takes a GPU where there is one
        dtype: for `hf:`: its precision; `auto` takes bfloat16 where the machine computes in it
        method: for `openai:`: how levels are asked for: prompt log-probabilities, or JSON; `auto`
            tries the first
        concurrency: for `openai:`: calls in flight at a time
        deadline: for `openai:`: seconds that a call may take, retries included
        retries: for `openai:`: times a call is repeated after 429, 5xx, a time-out or a lost
            connection
        offline: make no call and load no model: use the answers in the ledger only
        dry_run: make only a few probe calls: print how many calls and tokens it would take, and an
            estimate of cost and time
        max_calls: stop before the run's ledger holds more calls than this, those of all earlier
            commands included; 0 = no limit. With a higher limit the same command resumes; with
            --shard the ledger is the worker's own
        max_tokens: the same limit for tokens, prompt and completion together
        max_cost: the same limit for US dollars; needs the prices. Earlier calls cost what their own
            prices gave; calls of this model without prices cost what they cost at these
        price_prompt: US dollars per million prompt tokens
        price_completion: US dollars per million completion tokens
        quiet: no progress bar
        explainer: a language model that explains: `hf:ID_OR_PATH` (a Hub id, a folder, a GGUF file,
            or `smollm2`), or `openai:MODEL` at --base-url; default: the explainers below, which
            need none
        explainers: explainers without a language model. `lookup`: mean activation per token (Bills
            et al. 2023); `trie`: activation by context (Neuron-to-Graph, Foote et al. 2023)
        evidence: excerpts that a language model explains from: `top`, the strongest (for
            top-and-random and random-only), `anthropic`, the whole range in 8-token excerpts
        contrast: excerpts without a reaction that a language model is shown in addition to those
            with one
        max_entries: size of an explanation without a language model: rows of the look-up table,
            nodes of the trie
        depth: tokens of context in the trie, the activating one included
        neurons: neurons per layer, drawn at random; 0 = all. Models with as many neurons draw the
            same indices
        only: only these neurons, as LAYER:INDEX, such as 0:17 1:5
        seed: seed of that draw, and of the sampling of a language model
        prompts: our prompts, or OpenAI's published ones (extra `openai-prompts`)
        answer_tokens: longest explanation by a language model, in its tokens
        temperature: sampling temperature of explanations; the paper samples at 1
        name: name of the language model's explanations in folders and tables; default: the model's
            own name
    """
    return _run("explain", locals())


def score(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    retry_failed: bool = False,
    shard: str = "",
    force: bool = False,
    base_url: str = "",
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    method: Literal["auto", "logprobs", "json"] = "auto",
    concurrency: int = 8,
    deadline: float = 120.0,
    retries: int = 4,
    offline: bool = False,
    dry_run: bool = False,
    max_calls: int = 0,
    max_tokens: int = 0,
    max_cost: float = 0.0,
    price_prompt: float = 0.0,
    price_completion: float = 0.0,
    quiet: bool = False,
    simulator: str = "",
    explanations: str = "",
    metrics: tuple[
        Literal[
            "top_and_random",
            "random_only",
            "anthropic",
            "detection",
            "fuzzing",
            "intruder",
            "embedding",
        ],
        ...,
    ] = ("top_and_random", "random_only", "anthropic"),
    paper_compat: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    prompts: Literal["cratelm", "openai"] = "cratelm",
    name: str = "",
) -> "ScoreResult | DryRun | WorkerResult":
    """Score the explanations of one model on held-out excerpts, with null controls.

    Args:
        run: run directory, holding the harvest of `--model`
        model: name of the model in the run
        retry_failed: ask again what failed in an earlier command
        shard: `I/N`, such as 0/4: only every N-th neuron, for the I-th of N workers, into a ledger
            of its own; the command without --shard then merges the ledgers and finishes the stage
        force: redo the stage even if it is finished
        base_url: for `openai:MODEL`: address of an OpenAI-compatible server, such as
            http://127.0.0.1:8000/v1; default: OpenAI's own. The key is read from the environment
            variable OPENAI_API_KEY only. Answers are stored by the model's name, not by the
            address: give other weights another name
        device: for `hf:`: device of the language model; `auto` takes a GPU where there is one
        dtype: for `hf:`: its precision; `auto` takes bfloat16 where the machine computes in it
        method: for `openai:`: how levels are asked for: prompt log-probabilities, or JSON; `auto`
            tries the first
        concurrency: for `openai:`: calls in flight at a time
        deadline: for `openai:`: seconds that a call may take, retries included
        retries: for `openai:`: times a call is repeated after 429, 5xx, a time-out or a lost
            connection
        offline: make no call and load no model: use the answers in the ledger only
        dry_run: make only a few probe calls: print how many calls and tokens it would take, and an
            estimate of cost and time
        max_calls: stop before the run's ledger holds more calls than this, those of all earlier
            commands included; 0 = no limit. With a higher limit the same command resumes; with
            --shard the ledger is the worker's own
        max_tokens: the same limit for tokens, prompt and completion together
        max_cost: the same limit for US dollars; needs the prices. Earlier calls cost what their own
            prices gave; calls of this model without prices cost what they cost at these
        price_prompt: US dollars per million prompt tokens
        price_completion: US dollars per million completion tokens
        quiet: no progress bar
        simulator: a language model that reads explanations: `hf:ID_OR_PATH` (a Hub id, a folder, a
            GGUF file, or `smollm2`), or `openai:MODEL` at --base-url; default: look-up and trie
            simulate themselves
        explanations: which explanations: the name of a language model that explained, or `llm-free`
            for those made without one; default: those of the simulator itself
        metrics: `top_and_random`, `random_only` (64-token excerpts), `anthropic` (8-token
            excerpts): simulation. With a language model also `detection`, `fuzzing`, `intruder`,
            `embedding`
        paper_compat: also score with levels read as in the paper's code: only the five most likely
            tokens, a simulated 10 as 1
        resamples: bootstrap resamples behind the intervals of `summary.json`
        seed: seed of the shuffled control, of the bootstrap and of the scorers' draws
        prompts: how levels are asked for: our prompts, or OpenAI's published ones (extra
            `openai-prompts`)
        name: name of these scores in folders and tables; default: the explainer's name, and the
            simulator's where that is another
    """
    return _run("score", locals())


def report(
    *,
    run: str | Path = Path("runs/default"),
    models: tuple[str, ...] = (),
    explainer: str | None = None,
    rank_by: Literal[
        "top_and_random",
        "random_only",
        "anthropic",
        "detection",
        "fuzzing",
        "intruder",
        "embedding",
    ] = "top_and_random",
    neurons: int = 10,
    excerpts: int = 3,
    resamples: int = 2000,
    seed: int = 0,
    force: bool = False,
    quiet: bool = False,
) -> "ReportResult":
    """Write one page, tables and figures about all models of a run that have been scored.

    Args:
        run: run directory
        models: models to show, by name; default: all that are scored. `crate-X` and `gpt2-X` are
            compared as twins, and `NAME-init` is shown as the randomly initialised null of NAME
        explainer: explainer of the comparison table and of the neurons shown; default: `trie` if it
            was scored, else the first by name. The other tables show every explainer
        rank_by: metric by which the best neurons are chosen: top_and_random, random_only or
            anthropic
        neurons: neurons shown per model: this many with the highest score, and as many drawn at
            random
        excerpts: held-out excerpts shown per neuron, with true and simulated activations
        resamples: bootstrap and permutation resamples for the comparison of twins; the other
            intervals are those that `cratelm score` wrote
        seed: seed of the random neurons and of those resamples
        force: redo the report even if it is finished
        quiet: no progress bar: this verb has none, and takes the option as all verbs do
    """
    return _run("report", locals())


def view(
    *,
    runs: tuple[str | Path, ...] = (Path("runs/demo"),),
    host: str = "127.0.0.1",
    port: int = 8000,
    live: bool = True,
    static: str | Path | None = None,
    neurons: int = 64,
    force: bool = False,
    quiet: bool = False,
) -> "Any":
    """Browse the neurons of one or several runs in a web browser on this machine.

    Serves pages until Ctrl-C, or writes them into a folder with --static.

    Args:
        runs: run directories
        host: address to listen on. With any other than this machine's own, everyone who can reach
            it can read the runs and use the model: there is no password
        port: port to listen on
        live: enable the live page, which needs the model itself: activations of a typed text,
            steering
        static: write the pages into this new folder and stop: for any web host, or to open from
            disk
        neurons: with --static: neurons per layer that get a page, the best explained first; 0: all
        force: with --static: replace pages that an earlier export wrote
        quiet: with --static: no progress bar
    """
    return _run("view", locals())


def analyze(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    tokens: int = 50_000,
    sequence_length: int | None = None,
    ista_steps: int = 10,
    explainer: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    batch_tokens: int = 8192,
    memory_mib: int = 512,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "AnalyzeResult":
    """Measure on held-out text what CRATE's derivation promises, by layer, and where its neurons fire.

    Every quantity that exists for the model is measured: all of them for CRATE; sparsity, dictionary,
    groups of neurons, consistency and distinctiveness for others.

    Args:
        run: run directory, holding the harvest of `--model`
        model: name of the harvest, which is the name of the model
        tokens: held-out tokens to read
        sequence_length: tokens that the model reads at once; default: as in the harvest
        ista_steps: steps along which the lasso objective is followed; at least those that the model
            takes
        explainer: explainer whose explanations say which tokens a neuron covers: trie or lookup;
            default: trie where the run has it. Without explanations, consistency and
            distinctiveness are not measured
        resamples: bootstrap resamples over neurons
        seed: seed of held-out sequences, shuffled explanations, random subspaces and resamples
        batch_tokens: tokens per forward pass
        memory_mib: MiB of activations held at a time for consistency; where this is not enough for
            all neurons of a layer, they take several passes
        device: cpu, cuda, ...; auto: as in the harvest. The precision is the harvest's, too
        force: redo the stage even if it is finished
        quiet: no progress bar
    """
    return _run("analyze", locals())


def steer(
    *,
    neurons: tuple[str, ...],
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    path: str | None = None,
    site: str | None = None,
    sae: str | None = None,
    set: float | None = None,
    add: float | None = None,
    scale: float | None = None,
    zero: bool = False,
    positions: str = "all",
    text: str | None = None,
    text_file: str | Path | None = None,
    tokens: int = 48,
    top: int = 10,
    generate: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    output: str | Path | None = None,
) -> "SteerResult":
    """Edit neurons while a model reads a text, and show how the next token and the continuation change.

    Args:
        neurons: neurons to edit, as LAYER:INDEX, such as 1:32 0:7
        run: run directory
        model: name of a model in the run
        path: a model folder or Hub id, instead of a model of the run
        site: where neurons live: ista, mssa, heads, mlp, or a module path with * for the layer;
            default: ista for CRATE, mlp for others
        sae: steer latents of sparse autoencoders instead of neurons: their name in the run, or a
            folder
        set: value that the activation is set to
        add: value that is added to the activation
        scale: factor that the activation is multiplied by
        zero: set the activation to 0
        positions: tokens at which neurons are edited: all, last, generated, a span such as 5: or
            -3:, or numbers such as 2,5. Position 0 is the token that every text begins with;
            negative positions count from the end of the text
        text: the text; default: the beginning of a held-out document of the run
        text_file: UTF-8 file with the text
        tokens: tokens read from the beginning of the held-out document
        top: how many of the tokens that gain most, and of those that lose most, are shown
        generate: tokens generated after the text, with the edits and without; 0 = none
        temperature: sampling temperature of the continuation; 0: the most likely token each time
        seed: seed of the document drawn, and of the tokens at a temperature above 0: both
            continuations use the same random numbers
        device: cpu, cuda, ...; auto takes an accelerator where there is one
        dtype: precision of the models; auto: that of their files
        output: also write the figures to this JSON file
    """
    return _run("steer", locals())


def effects(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    neurons: int = 256,
    only: tuple[str, ...] = (),
    top: int = 10,
    positions: int = 16,
    tokens: int = 8192,
    ablation: Literal["zero", "mean"] = "zero",
    sequence_length: int | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "EffectsResult":
    """Measure what each neuron writes to the vocabulary, and the loss on held-out text without it.

    Args:
        run: run directory, holding the harvest of `--model`
        model: name of the harvest, which is the name of the model
        neurons: neurons per layer, drawn at random as `cratelm explain` draws them; 0 = all
        only: measure only these neurons, as LAYER:INDEX, such as 0:17 1:5
        top: how many of the tokens that a neuron promotes most, and of those it suppresses most,
            are stored
        positions: tokens of the fit split, of those where a neuron fires, over which its exact
            effect is averaged
        tokens: held-out tokens on which the loss without each neuron is measured
        ablation: what a neuron is set to: 0, or its mean on the fit split
        sequence_length: tokens that the model reads at once; default: as in the harvest
        seed: seed of neurons, positions and held-out sequences drawn, of shuffled explanations and
            of resamples
        batch_tokens: held-out tokens whose activations are held in memory at a time
        device: cpu, cuda, ...; auto: as in the harvest. The precision is the harvest's, too
        force: redo the stage even if it is finished
        quiet: no progress bar
    """
    return _run("effects", locals())


def intervene(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    retry_failed: bool = False,
    shard: str = "",
    force: bool = False,
    base_url: str = "",
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    method: Literal["auto", "logprobs", "json"] = "auto",
    concurrency: int = 8,
    deadline: float = 120.0,
    retries: int = 4,
    offline: bool = False,
    dry_run: bool = False,
    max_calls: int = 0,
    max_tokens: int = 0,
    max_cost: float = 0.0,
    price_prompt: float = 0.0,
    price_completion: float = 0.0,
    quiet: bool = False,
    judge: str = "",
    explanations: str = "llm-free",
    explainer: str = "",
    neurons: int = 8,
    only: tuple[str, ...] = (),
    texts: int = 4,
    prompt_tokens: int = 24,
    generate: int = 24,
    strength: float = 1.0,
    temperature: float = 1.0,
    name: str = "",
    resamples: int = 2000,
    seed: int = 0,
) -> "InterveneResult | DryRun | WorkerResult":
    """Ask a language model whether steering each neuron changes the text as its explanation says.

    Args:
        run: run directory, holding the harvest of `--model`
        model: name of the model in the run
        retry_failed: ask again what failed in an earlier command
        shard: `I/N`, such as 0/4: only every N-th neuron, for the I-th of N workers, into a ledger
            of its own; the command without --shard then merges the ledgers and finishes the stage
        force: redo the stage even if it is finished
        base_url: for `openai:MODEL`: address of an OpenAI-compatible server, such as
            http://127.0.0.1:8000/v1; default: OpenAI's own. The key is read from the environment
            variable OPENAI_API_KEY only. Answers are stored by the model's name, not by the
            address: give other weights another name
        device: of the steered model, and of a judge `hf:`; auto: as in the harvest, and for the
            judge a GPU where there is one. The steered model's precision is the harvest's, --dtype
            is the judge's
        dtype: for `hf:`: its precision; `auto` takes bfloat16 where the machine computes in it
        method: for `openai:`: how levels are asked for: prompt log-probabilities, or JSON; `auto`
            tries the first
        concurrency: for `openai:`: calls in flight at a time
        deadline: for `openai:`: seconds that a call may take, retries included
        retries: for `openai:`: times a call is repeated after 429, 5xx, a time-out or a lost
            connection
        offline: make no call and load no model: use the answers in the ledger only
        dry_run: make only a few probe calls: print how many calls and tokens it would take, and an
            estimate of cost and time
        max_calls: stop before the run's ledger holds more calls than this, those of all earlier
            commands included; 0 = no limit. With a higher limit the same command resumes; with
            --shard the ledger is the worker's own
        max_tokens: the same limit for tokens, prompt and completion together
        max_cost: the same limit for US dollars; needs the prices. Earlier calls cost what their own
            prices gave; calls of this model without prices cost what they cost at these
        price_prompt: US dollars per million prompt tokens
        price_completion: US dollars per million completion tokens
        quiet: no progress bar
        judge: language model that judges: `hf:ID_OR_PATH` (or hf:smollm2), or `openai:MODEL` at
            --base-url
        explanations: explanations to judge: `llm-free`, made without a language model; NAME of the
            set `explanations/MODEL@NAME`, made by a language model; or `promoted`, the tokens that
            `cratelm effects` found each neuron to promote
        explainer: explainer whose explanations are judged; default: the first of the set by name
        neurons: neurons per layer, drawn at random from those explained; 0 = all
        only: judge only these neurons, as LAYER:INDEX
        texts: held-out texts that are continued, per neuron
        prompt_tokens: tokens of each text
        generate: tokens generated after each text, with the neuron steered and without
        strength: the neuron is set to this multiple of its maximum on the fit split, at all
            positions
        temperature: sampling temperature of the continuations; 0: the most likely token each time
        name: NAME of the results, in the folder steer/MODEL@NAME; default: the name of the judge
        resamples: bootstrap resamples over neurons
        seed: seed of neurons, texts and continuations drawn, of shuffled explanations, random
            neurons and resamples
    """
    return _run("intervene", locals())


def sae_train(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    site: str | None = None,
    layers: tuple[int, ...] = (),
    name: str = "",
    architecture: Literal["l1", "topk", "batchtopk", "jumprelu", "gated"] = "l1",
    expansion: int = 16,
    d_sae: int | None = None,
    l1: float | None = None,
    k: int | None = None,
    l0_coefficient: float | None = None,
    tokens: int = 20_000_000,
    lr: float = 0.0001,
    lr_decay: float = 0.2,
    batch_size: int = 4096,
    normalize: bool = True,
    dead_after: int | None = None,
    sequence_length: int | None = None,
    buffer_mib: int = 512,
    batch_tokens: int = 8192,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    log_every: int | None = None,
    checkpoint_minutes: float = 2.0,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "SaeTrainResult":
    """Train sparse autoencoders on a site of a model, one per layer, from one pass over train tokens.

    The same command resumes an interrupted training.

    Args:
        run: run directory
        model: a model of the run, or a folder or Hub id of a causal language model of transformers
        site: ista, mssa, heads, mlp, or a module path with * for the layer: `model.layers.*` is
            CRATE's residual stream, `model.layers.*.ista` the output of its sparse block;
            `transformer.h.*` and `transformer.h.*.mlp` are GPT-2's. Default: ista for CRATE, mlp
            for others
        layers: layers to train on, from 0; default: all. One forward pass serves all of them
        name: NAME of the folder sae/MODEL@NAME in the run; default: architecture, size and site,
            such as l1-16x
        architecture: l1 (the paper's), topk (Gao et al. 2024), batchtopk (Bussmann et al. 2024),
            jumprelu (Rajamanoharan et al. 2024b), gated (2024a)
        expansion: latents per input; the paper has 1, 4 and 16
        d_sae: number of latents, instead of --expansion
        l1: for l1 and gated: weight of the sum of the latents, relative to the mean squared error
            of an input (default 3e-4, as in the paper)
        k: for topk: latents that are not 0 at a token; for batchtopk: their average (default 32)
        l0_coefficient: for jumprelu: weight of the number of latents that are not 0, likewise
            (default 1e-3)
        tokens: tokens trained on, repeats counted, rounded down to whole batches (paper
            2,000,000,000)
        lr: learning rate of Adam
        lr_decay: fraction of the steps, the last ones, in which the learning rate falls to 0; 0: it
            stays constant
        batch_size: tokens per step
        normalize: scale activations to a mean norm of sqrt(inputs), so that one --l1 means the same
            for every model and layer; the scale is folded into the weights at the end
        dead_after: tokens without a firing after which a latent counts as dead: the curve counts
            it, and it is revived; default: a twentieth of --tokens, at most 10 million
        sequence_length: T in tokens; default: the most that the model takes, 2,048 at most; 1,024
            where it names no limit
        buffer_mib: MiB of activations that are shuffled together; at least two batches are
        batch_tokens: tokens per forward pass of the model
        precision: bf16: matrix products in 16 bits; weights stay in float32
        seed: seed of the initial weights, the order of the tokens, and the reinitialisation of dead
            latents
        log_every: steps between two points of the curve; default: a hundredth of the steps
        checkpoint_minutes: minutes between two checkpoints; 0: a checkpoint after every step
        device: cpu, cuda, cuda:1 ...; auto: an accelerator where there is one
        force: train again even if the stage is finished
        quiet: no progress bar
    """
    return _run("sae train", locals())


def sae_evaluate(
    *,
    run: str | Path = Path("runs/default"),
    model: str = "crate-2l",
    sae: str = "",
    split: Literal["train", "fit", "held_out"] = "held_out",
    tokens: int = 100_000,
    sequence_length: int | None = None,
    batch_tokens: int = 8192,
    steered: int = 8,
    steered_tokens: int = 2048,
    seed: int = 0,
    device: str = "auto",
    output: str | Path | None = None,
    quiet: bool = False,
) -> "SaeEvaluateResult":
    """Measure sparse autoencoders on tokens they have not seen, next to the site's own activations.

    Args:
        run: run directory: of the tokens, and of the model where it is one of the run
        model: a model of the run, or a folder or Hub id of a causal language model of transformers
        sae: NAME or MODEL@NAME of `cratelm sae train`, or a folder in SAELens' format, or one with
            folders layer-0, layer-1, ...; default: the model's autoencoders in the run, where it
            has one set
        split: split to measure on: train, fit or held_out
        tokens: tokens to measure on, a random sample of whole sequences; fewer where the split has
            fewer
        sequence_length: T in tokens; default: the most that the model takes, 2,048 at most; 1,024
            where it names no limit
        batch_tokens: tokens per forward pass of the model; fewer where their logits would exceed 1
            GiB
        steered: how many latents of each layer, and as many neurons of the site, are set to their
            maximum one at a time to measure how faithful steering is; 0: none
        steered_tokens: tokens at which they are steered, a random sample of whole sequences
        seed: seed of the samples of sequences, latents and neurons
        device: cpu, cuda, cuda:1 ...; auto: an accelerator where there is one
        output: also write the figures to this JSON file; the run always keeps them, as
            sae/MODEL@NAME/evaluation.json, or as sae/MODEL@FOLDER.json for autoencoders from a
            folder elsewhere
        quiet: no progress bar
    """
    return _run("sae evaluate", locals())


def sae_compare(
    *,
    run: str | Path = Path("runs/default"),
    models: tuple[str, ...] = (),
    sae: str = "",
    architecture: Literal["l1", "topk", "batchtopk", "jumprelu", "gated"] = "l1",
    expansion: int = 16,
    l1: float | None = None,
    k: int | None = None,
    l0_coefficient: float | None = None,
    train_tokens: int = 20_000_000,
    lr: float = 0.0001,
    batch_size: int = 4096,
    evaluate_tokens: int = 100_000,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "SaeCompareResult":
    """Compare neurons with latents: train autoencoders on scored models, and score their latents alike.

    Latents are harvested, explained and scored exactly as the model's own neurons were: the same tokens,
    excerpts, explainers and seeds, and as many per layer. Finished stages are skipped, so that the same
    command resumes after an interruption.

    Args:
        run: run directory with the scored models
        models: names of models in the run; default: all that are scored, without untrained ones
        sae: autoencoders to use: their NAME in the run (`cratelm sae train`), for every model, or a
            folder in SAELens' format, for one model; default: new ones are trained with the options
            below
        architecture: see `cratelm sae train --help`, as for all options down to --batch-size; its
            other options need --sae
        expansion: number of latents divided by number of inputs
        l1: sparsity weight of l1 and gated
        k: active latents per token of topk and batchtopk
        l0_coefficient: sparsity weight of jumprelu
        train_tokens: tokens that each autoencoder is trained on
        lr: learning rate of Adam
        batch_size: tokens per training step
        evaluate_tokens: held-out tokens on which reconstructions are measured
        seed: seed of training and measuring; harvest, explanations and scores use those of the
            neurons
        device: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps
        force: redo every stage, even if it is finished
        quiet: no progress bars
    """
    return _run("sae compare", locals())


def import_authors(
    *,
    checkpoint: str,
    out: str | Path,
    tokenizer: str = "gpt2",
    force: bool = False,
) -> "ImportAuthorsResult":
    """Write a checkpoint of the paper's authors, CRATE or GPT-2, as a Hugging Face folder.

    Args:
        checkpoint: local file, or `hub:OWNER/REPO[@REVISION][/FILE]`; OWNER/REPO[/FILE] is looked
            up on the Hub if no local file has that name. Nothing in the file is executed
        out: folder to write: config.json, model.safetensors, the tokenizer, README.md
        tokenizer: `gpt2`, which the authors' models use (fetched from the Hub, else through
            tiktoken), the path of a tokenizer.json, or `none`
        force: replace the folder `--out` if an earlier import or export wrote it
    """
    return _run("import authors", locals())


def import_sae(
    *,
    file: str,
    out: str | Path,
    config: str | Path | None = None,
    site: str = "",
    force: bool = False,
) -> "ImportSaeResult":
    """Write a sparse autoencoder of the paper's authors as a folder that SAELens reads too.

    Args:
        file: local file NAME.pt, or `hub:OWNER/REPO[@REVISION][/FILE]`. Nothing in the file is
            executed
        out: folder to write: cfg.json, sae_weights.safetensors, README.md
        config: JSON file with its settings; default: NAME_cfg.json next to the file
        site: site of its inputs in the model, as for `cratelm harvest --site`; default: that of
            `act_name` in the settings
        force: replace the folder `--out` if an earlier import or export wrote it
    """
    return _run("import sae", locals())


def import_records(
    *,
    files: tuple[str | Path, ...],
    model: str,
    run: str | Path = Path("runs/elsewhere"),
    site: str = "mlp",
    force: bool = False,
    quiet: bool = False,
) -> "ImportRecordsResult":
    """Make a run from activations that were harvested elsewhere: OpenAI's NeuronRecord JSON files.

    Args:
        files: files with one neuron each, or folders that are searched for .json files at any depth
        model: name of the model in the run
        run: run directory in which `tokens/` and `activations/MODEL/` are written; a run holds one
            import
        site: site of these neurons, which the files do not name
        force: redo the import even if it is finished
        quiet: no progress bar
    """
    return _run("import records", locals())


def export_model(
    *,
    out: str | Path,
    model: str = "",
    run: str | Path = Path("runs/default"),
    path: str | Path | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    push: str = "",
    force: bool = False,
) -> "ExportModelResult":
    """Write a folder that transformers loads without cratelm, ready for the Hub.

    Args:
        out: folder to write: config.json, model.safetensors, the model's code, the tokenizer,
            README.md
        model: name of the model in the run
        run: run directory with `--model`
        path: a model folder to export instead of `--model` of `--run`
        dtype: precision of the weights; default: unchanged
        push: OWNER/REPO on the Hub to upload the folder to as well; a repository that does not
            exist is created, private
        force: replace the folder `--out` if an earlier import or export wrote it
    """
    return _run("export model", locals())


def export_records(
    *,
    model: str,
    out: str | Path,
    run: str | Path = Path("runs/default"),
    layers: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    force: bool = False,
    quiet: bool = False,
) -> "ExportRecordsResult":
    """Write the excerpts of a harvest as OpenAI's NeuronRecord JSON, one file per neuron.

    Args:
        model: name of the model in the run
        out: folder to write, as LAYER/NEURON.json
        run: run directory with the harvest of `--model`
        layers: layers to write, counted from 0; default: all
        only: only these neurons, as LAYER:INDEX, such as 0:17 1:5
        force: replace the folder `--out` if an earlier export wrote it
        quiet: no progress bar
    """
    return _run("export records", locals())


def export_neuronpedia(
    *,
    model: str,
    out: str | Path,
    run: str | Path = Path("runs/default"),
    layers: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    model_id: str = "",
    source_set: str = "",
    excerpts: int = 20,
    creator_id: str = "clkht01d40000jv08hvalcvly",
    creator_name: str = "cratelm",
    force: bool = False,
    quiet: bool = False,
) -> "ExportNeuronpediaResult":
    """Write neurons, excerpts, explanations and scores in the format of Neuronpedia's exports.

    Args:
        model: name of the model in the run
        out: folder to write, as MODEL_ID/SOURCE_ID/..., and config/
        run: run directory with the harvest of `--model`, its explanations and scores
        layers: layers to write, counted from 0; default: all
        only: only these neurons, as LAYER:INDEX, such as 0:17 1:5
        model_id: id of the model in Neuronpedia, of letters, digits, `-` and `_`; default: the
            model's name in lowercase, with `-` for other characters
        source_set: name of the set of neurons, whose layers become the sources LAYER-SET; default:
            the site
        excerpts: excerpts per kind, bin and split: those with the highest activation, or the first
            drawn
        creator_id: id of a user in the importing Neuronpedia; the default is the one that
            Neuronpedia's own conversion of dashboards falls back to
        creator_name: name shown as the creator
        force: replace the folder `--out` if an earlier export wrote it
        quiet: no progress bar
    """
    return _run("export neuronpedia", locals())
