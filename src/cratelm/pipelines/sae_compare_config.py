"""What `cratelm sae compare` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity
from cratelm.sae.train_config import Architecture, SaeTrainConfig


@dataclass(frozen=True)
class SaeCompareConfig:
    """Neurons beside latents: train autoencoders on scored models, measure, harvest, explain, score, report.

    Latents are searched, explained and scored exactly as the model's own neurons were: the same tokens,
    excerpts, explainers and seeds, as many of them a layer. Finished parts are skipped, so that the
    same command goes on where it was.
    """

    run: Path = not_in_identity(Path("runs/default"))
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
    device: str = not_in_identity("auto")
    """auto: the GPU where there is one; cpu, cuda, cuda:1, mps"""
    force: bool = not_in_identity(False)
    """do every part again"""
    quiet: bool = not_in_identity(False)
    """no progress bars"""

    def __post_init__(self) -> None:
        at_least(self, {"evaluate_tokens": 1})
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
