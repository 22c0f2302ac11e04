"""Options of `cratelm demo` and `cratelm sae compare`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import Options, at_least, not_in_identity
from cratelm.sae.train_config import Architecture, Freeze, SaeTrainConfig
from cratelm.tokens.config import check_vocabulary_size


@dataclass(frozen=True)
class DemoConfig(Options):
    """Run every stage on a laptop: train CRATE and its GPT-2 twin, then compare their neurons.

    Tokenizes a corpus, trains both models on the same tokens in the same order, harvests, explains and
    scores their neurons, measures which tokens the neurons promote, and writes a report. Two randomly
    initialised models serve as controls. With --families, it does so for several families of models, and compares
    all of them. After an interruption, the same command resumes.
    """

    run: Path = not_in_identity(Path("runs/demo"))
    """run directory"""
    corpus: str = "builtin"
    """`builtin` (the source files of the Python standard library), a file, a folder or `hub:ID`; see
    `cratelm tokenize --help`"""
    size: Literal["1l", "2l", "3l"] = "2l"
    """number of layers of the twins (width 128, 512 neurons per layer)"""
    families: tuple[str, ...] | None = None
    """families to compare instead of the twins, such as crate gpt2 gpt2-solu, each with its untrained control; without
    names, all that differ. Explained by look-up and trie, and run on these explanations; give a --run of its own"""
    pretrained: bool = False
    """take the models that come with cratelm (`mini:crate-2l` and its twin) instead of training any, without untrained
    controls, and measure less: at most 60,000 tokens of each split, and 64 neurons per layer. From nothing to the browser
    in under three minutes"""
    vocab_size: int = 4096
    """number of tokens in the vocabulary, which is trained on the corpus"""
    steps: int = 500
    """training steps of each model, 16 sequences of 256 tokens per step"""
    tokens: int = 200_000
    """tokens harvested from each of the splits fit and held_out"""
    neurons: int = 256
    """neurons per layer to explain and score, drawn at random; 0 = all"""
    sae: bool = False
    """also train small sparse autoencoders on both twins and compare their latents with the neurons; requires
    the extra `sae`"""
    seed: int = 0
    """random seed for the initial weights, the order of the data, samples and intervals"""
    jobs: int = not_in_identity(0)
    """models that are made at the same time, each in a process with its share of the cores. Default: 2 on a CPU
    with at least two cores, otherwise 1"""
    force: bool = not_in_identity(False)
    """redo every stage, even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bars, no plan and no stage names"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"steps": 1, "tokens": 1, "neurons": 0, "seed": 0, "jobs": 0})
        check_vocabulary_size(self)
        if self.pretrained and (self.families is not None or self.sae):
            given = "sae" if self.sae else "families"
            raise InputError(
                f"--pretrained and --{given} cannot be combined: omit --pretrained, and models are trained"
            )
        if self.families is None:
            return
        if self.sae:
            raise InputError(
                "--sae and --families cannot be combined: type `cratelm sae compare` after the demo"
            )
        if len(set(self.families)) < len(self.families):
            raise InputError(f"--families {' '.join(self.families)}: name each family once")


@dataclass(frozen=True)
class SaeCompareConfig(Options):
    """Compare neurons with latents: train autoencoders on scored models, and score their latents in the same way.

    Latents are harvested, explained and scored exactly as the model's own neurons were: with the same tokens,
    excerpts, explainers and seeds, and the same number per layer. Finished stages are skipped, so that the same
    command resumes after an interruption.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory with the scored models"""
    models: tuple[str, ...] = ()
    """names of models in the run; default: all scored models, except untrained ones"""
    sae: str = ""
    """autoencoders to use: either their NAME in the run (`cratelm sae train`), for every model, or, for
    one model, a folder or RELEASE/ID of SAELens' registry; default: train new ones with the options below"""
    architecture: Architecture = SaeTrainConfig.architecture
    """this option and all options down to --batch-size are those of `cratelm sae train`; to use other options of
    that command, train with it first and name the autoencoders with --sae"""
    expansion: int = SaeTrainConfig.expansion
    """number of latents divided by number of inputs"""
    l1: float | None = None
    """sparsity weight for the architectures l1 and gated"""
    k: int | None = None
    """active latents per token for the architectures topk and batchtopk"""
    l0_coefficient: float | None = None
    """sparsity weight for the architecture jumprelu"""
    train_tokens: int = SaeTrainConfig.tokens
    """tokens on which each autoencoder is trained"""
    lr: float = SaeTrainConfig.lr
    """learning rate of Adam"""
    batch_size: int = SaeTrainConfig.batch_size
    """tokens per training step"""
    evaluate_tokens: int = 100_000
    """held-out tokens on which reconstructions are evaluated"""
    freeze: tuple[Freeze, ...] = ()
    """also compare random controls: the same autoencoders with a part that stays random, trained like the others;
    decoder, soft-decoder or encoder, as in `cratelm sae train`. For autoencoders on an untrained model, name
    it with --models"""
    seed: int = 0
    """random seed of training and evaluation; harvest, explanations and scores use the seeds of the neurons"""
    device: str = not_in_identity("auto")
    """auto (a GPU if there is one), cpu, cuda, cuda:1 or mps"""
    force: bool = not_in_identity(False)
    """redo every stage, even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bars"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"evaluate_tokens": 1})
        if len(set(self.models)) < len(self.models):
            raise InputError(f"--models {' '.join(self.models)}: name each model once")
        if len(set(self.freeze)) < len(self.freeze):
            raise InputError(f"--freeze {' '.join(self.freeze)}: name each part once")
        if self.freeze and self.sae:
            raise InputError(
                f"--sae {self.sae} names autoencoders that exist, and --freeze trains others: omit one of them"
            )
        if self.train_tokens < self.batch_size:
            raise InputError(
                f"--train-tokens {self.train_tokens} is less than one batch: lower --batch-size"
                f" (now {self.batch_size}) or raise --train-tokens"
            )
        self.training("any")  # refuses what `sae train` would refuse, for whichever model

    def training(self, model: str, freeze: Freeze | None = None) -> SaeTrainConfig:
        """Return the options of `cratelm sae train` for one model, of a random control with `freeze`."""
        return SaeTrainConfig(
            run=self.run,
            model=model,
            architecture=self.architecture,
            expansion=self.expansion,
            l1=self.l1,
            k=self.k,
            l0_coefficient=self.l0_coefficient,
            freeze=freeze,
            tokens=self.train_tokens,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            force=self.force,
            quiet=self.quiet,
        )
