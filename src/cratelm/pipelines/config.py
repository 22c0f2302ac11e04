"""Options of `cratelm demo` and `cratelm sae compare`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import aside
from cratelm.sae.train_config import Architecture, SaeTrainConfig


@dataclass(frozen=True)
class DemoConfig:
    """The whole line on a laptop: train CRATE and its GPT-2 twin, then compare their neurons.

    Tokenizes, trains both on the same tokens in the same order, harvests, explains, scores, measures
    what neurons write to the vocabulary and reports, with two randomly initialised models as controls;
    with --sae, autoencoders beside them. Killed and started again with the same command, it goes on
    where it was.
    """

    run: Path = aside(Path("runs/demo"))
    """run directory"""
    corpus: str = "builtin"
    """`builtin` (the Python standard library's sources), a file, a folder or `hub:ID`; see
    `cratelm tokenize --help`"""
    size: Literal["1l", "2l", "3l"] = "2l"
    """layers of the twins (width 128, 512 neurons a layer)"""
    vocab_size: int = 4096
    """tokens of the vocabulary, trained on the corpus"""
    steps: int = 600
    """training steps of 16 sequences of 256 tokens, for each twin"""
    tokens: int = 200_000
    """tokens searched in each of the splits fit and held_out"""
    neurons: int = 256
    """neurons explained and scored in each layer, drawn at random; 0 = all"""
    sae: bool = False
    """also train a small sparse autoencoder on both twins and compare its latents with the neurons; needs
    the extra `sae`"""
    seed: int = 0
    """of initial weights, order of the data, samples and intervals"""
    force: bool = aside(False)
    """redo every stage"""

    def __post_init__(self) -> None:
        for field, least in (("steps", 1), ("tokens", 1), ("neurons", 0), ("seed", 0)):
            if getattr(self, field) < least:
                raise InputError(
                    f"--{field} is {getattr(self, field)}: {least} or more was expected"
                )


@dataclass(frozen=True)
class SaeCompareConfig:
    """Neurons beside latents: train autoencoders on scored models, measure, harvest, explain, score, report.

    Latents are searched, explained and scored exactly as the model's own neurons were: the same tokens,
    excerpts, explainers and seeds, as many of them a layer. Finished parts are skipped, so that the
    same command goes on where it was.
    """

    run: Path = aside(Path("runs/default"))
    """run directory, in which the models are scored"""
    models: tuple[str, ...] = ()
    """models by their names in the run; left out: all that are scored, untrained ones not"""
    sae: str = ""
    """autoencoders that are there: their NAME in the run (`cratelm sae train`), for every model, or a
    folder in SAELens' format, for one; left out: trained with what follows"""
    architecture: Architecture = SaeTrainConfig.architecture
    """as in `cratelm sae train`, like all down to the batch size; for more give --sae"""
    expansion: int = SaeTrainConfig.expansion
    """latents by inputs"""
    l1: float | None = None
    """of l1 and gated"""
    k: int | None = None
    """of topk and batchtopk"""
    l0_coefficient: float | None = None
    """of jumprelu"""
    train_tokens: int = SaeTrainConfig.tokens
    """tokens trained on"""
    lr: float = SaeTrainConfig.lr
    """learning rate"""
    batch_size: int = SaeTrainConfig.batch_size
    """tokens of a step"""
    evaluate_tokens: int = 100_000
    """held-out tokens that reconstructions are measured on"""
    seed: int = 0
    """of training and measuring; harvest, explanations and scores take those of the neurons"""
    device: str = aside("auto")
    """auto: the GPU where there is one; cpu, cuda, cuda:1, mps"""
    force: bool = aside(False)
    """do every part again"""
    quiet: bool = aside(False)
    """no progress bars while training and measuring"""

    def __post_init__(self) -> None:
        if self.evaluate_tokens < 1:
            raise InputError(f"--evaluate-tokens is {self.evaluate_tokens}, 1 or more was expected")
        if len(set(self.models)) < len(self.models):
            raise InputError(f"--models {' '.join(self.models)}: name each once")
        if self.train_tokens < self.batch_size:
            raise InputError(
                f"--train-tokens {self.train_tokens} is less than one batch: lower --batch-size"
                f" (now {self.batch_size}) or raise --train-tokens"
            )
        self.training("")

    def training(self, model: str) -> SaeTrainConfig:
        """What `cratelm sae train` is told for one model."""
        return SaeTrainConfig(
            run=self.run,
            model=model,
            architecture=self.architecture,
            expansion=self.expansion,
            l1=self.l1,
            k=self.k,
            l0_coefficient=self.l0_coefficient,
            tokens=self.train_tokens,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            force=self.force,
            quiet=self.quiet,
        )
