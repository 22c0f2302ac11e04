"""Cost of a harvest, compared with a plain forward pass, and with storing all activations and sorting them.

    python benchmarks/harvest.py                     # crate-2l (d 128), then two layers of d 768
    python benchmarks/harvest.py --sizes crate-12l --device cuda --dtype bfloat16
    python benchmarks/harvest.py --sort              # 1M tokens x 3,072 neurons against sorting
    python benchmarks/harvest.py --merge 4           # what merging the shares of 4 processes adds

Ratios are of times measured alternately in one process; the median and the range over the turns are printed. Tokens are
random: the cost of a harvest depends on the distribution of the activations, not on the text.
"""

import argparse
import pickle
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from common import CPU, figures, random_split, timed, timed_result

from cratelm.activations.batches import SearchPlan, random_positions
from cratelm.activations.calibration import Calibration, calibrate
from cratelm.activations.layer_harvest import ExcerptSizes, LayerHarvest
from cratelm.models import Site, build, site_of
from cratelm.models.sites import hooked
from cratelm.runs.ranks import Share

SIZES = {
    "crate-2l": {"name": "crate-2l"},
    "gpt2-2l": {"name": "gpt2-2l"},
    "crate-768": {"name": "crate-6l", "num_hidden_layers": 2},
    "gpt2-768": {"name": "gpt2-6l", "num_hidden_layers": 2},
    "crate-12l": {"name": "crate-12l"},
    "gpt2-12l": {"name": "gpt2-12l"},
}


def layer_harvest(kind: str) -> type[LayerHarvest]:
    """Return the kind of layer harvest, `torch` or `fused`, the latter if numba is installed."""
    if kind == "torch":
        return LayerHarvest
    from cratelm.activations.fused_harvest import FusedLayerHarvest

    return FusedLayerHarvest


def load(kind: str) -> float:
    """Compile the loops, or load what an earlier process compiled; return the seconds that it took."""
    split = random_split(2_000, 4096)
    plan = SearchPlan.of(split, "fit", 0, 64, 2_000, 0)
    activations = torch.randn(2_000, 4).relu()
    places = random_positions(plan.text_spans(), 0, 4, 1, 0)
    harvest = layer_harvest(kind)(Calibration.of(activations), places, ExcerptSizes(), 0)
    batch = next(plan.batches(1_024, CPU))
    rows = activations[batch.position].view(*batch.input_ids.shape, -1)
    return timed(lambda: harvest.add(rows, batch))


class Setting:
    """A model with a search plan over random tokens, prepared for a harvest batch by batch."""

    def __init__(self, size: str, arguments: argparse.Namespace, share: Share | None = None):
        self.share = share or Share()
        fields = dict(SIZES[size])
        self.device = torch.device(arguments.device)
        self.model = (
            build(fields.pop("name"), vocab_size=4096, **fields)
            .to(self.device, getattr(torch, arguments.dtype))
            .eval()
        )
        self.site: Site = site_of(self.model)
        length = min(arguments.sequence_length, self.model.config.max_position_embeddings)
        split = random_split(arguments.tokens, 4096)
        self.plan = SearchPlan.of(split, "fit", 0, length, arguments.tokens, 0)
        self.batch_tokens = arguments.batch_tokens
        pilots = calibrate(self.model, self.site, self.plan, 8_192, self.batch_tokens)
        spans = self.plan.text_spans()
        self.layers = [
            layer_harvest(arguments.kind)(
                p,
                random_positions(spans, i, len(p.mean), 50, 0),
                ExcerptSizes(),
                i,
                is_first=self.share.is_first,
            )
            for i, p in enumerate(pilots)
        ]

    @torch.no_grad()
    def forward(self, batches) -> None:
        """Run only the forward passes of the batches."""
        for batch in batches:
            self.model.base_model(input_ids=batch.input_ids, use_cache=False)

    @torch.no_grad()
    def harvest(self, batches) -> None:
        """Harvest the batches."""
        for batch in batches:
            with hooked(self.model, self.site, lambda i, a, b=batch: self.layers[i].add(a, b)):
                self.model.base_model(input_ids=batch.input_ids, use_cache=False)

    def harvest_share(self) -> None:
        """Harvest the batches of the share, block by block."""
        blocks = self.plan.blocks(self.batch_tokens)
        for block in (blocks[i] for i in self.share.between(len(blocks))):
            self.harvest(self.plan.batches(self.batch_tokens, self.device, block))
            for layer in self.layers:
                layer.end_block()


def throughput(size: str, arguments: argparse.Namespace) -> None:
    """Time forward passes and harvest on the same batches, alternately, over the whole plan; print the ratio."""
    setting = Setting(size, arguments)
    batches = list(setting.plan.batches(setting.batch_tokens, setting.device))
    setting.forward(batches[:1])
    load(arguments.kind)
    turns = np.array_split(np.arange(len(batches)), arguments.turns)
    plain, harvested = [], []
    for turn in turns:
        of_turn = [batches[i] for i in turn]
        plain.append(timed(lambda b=of_turn: setting.forward(b), setting.device))
        harvested.append(timed(lambda b=of_turn: setting.harvest(b), setting.device))
    fractions = [p / h for p, h in zip(plain, harvested, strict=True)]
    tokens = setting.plan.n_tokens()
    print(
        f"{size}: {tokens:,} tokens, forward {tokens / sum(plain):,.0f} tokens/s,"
        f" harvest {tokens / sum(harvested):,.0f} tokens/s,"
        f" fraction over all turns {sum(plain) / sum(harvested):.2f},"
        f" by turn median {statistics.median(fractions):.2f}"
        f" ({min(fractions):.2f} to {max(fractions):.2f})",
        flush=True,
    )
    figures(
        size=size,
        kind=arguments.kind,
        tokens=tokens,
        forward=plain,
        harvest=harvested,
        fractions=fractions,
    )


def against_sorting(arguments: argparse.Namespace) -> None:
    """Time a harvest without the model, compared with storing all activations and sorting them; print the ratio.

    Storing and sorting is done for `--sort-neurons` of the `--layer-neurons` and scaled up, because the work is the
    same for each neuron, and storing all 3,072 would take 12.6 GB.
    """
    n_neurons, tokens = arguments.layer_neurons, arguments.sort_tokens
    batch_tokens = 8_192
    split = random_split(tokens, 4096)
    plan = SearchPlan.of(split, "fit", 0, 1024, tokens, 0)
    generator = torch.Generator().manual_seed(0)
    sample = (torch.randn(batch_tokens, n_neurons, generator=generator) - 1).relu()
    harvest = layer_harvest(arguments.kind)(
        Calibration.of(sample),
        random_positions(plan.text_spans(), 0, n_neurons, 50, 0),
        ExcerptSizes(),
        0,
    )
    loading, harvesting = load(arguments.kind), 0.0
    for batch in plan.batches(batch_tokens, CPU):
        rows = batch.input_ids.numel()
        fresh = (torch.randn(rows, n_neurons) - 1).relu().view(*batch.input_ids.shape, n_neurons)
        harvesting += timed(lambda a=fresh, b=batch: harvest.add(a, b), CPU)
    n_sorted = arguments.sort_neurons
    stored = torch.empty(tokens, n_sorted)
    storing = 0.0
    for first in range(0, tokens, batch_tokens):
        fresh = (torch.randn(min(batch_tokens, tokens - first), n_sorted) - 1).relu()
        storing += timed(lambda f=fresh, i=first: stored[i : i + len(f)].copy_(f), CPU)
    sorting = timed(lambda: [stored[:, i].sort(descending=True) for i in range(n_sorted)], CPU)
    scaled = (storing + sorting) * n_neurons / n_sorted
    print(
        f"{tokens:,} tokens x {n_neurons:,} neurons without the forward pass: harvest {harvesting:.1f} s,"
        f" store and sort {scaled:.1f} s (measured on {n_sorted} neurons): {scaled / harvesting:.1f} times less"
    )
    figures(
        kind=arguments.kind,
        tokens=tokens,
        neurons=n_neurons,
        loading=loading,
        harvest=harvesting,
        sort=scaled,
        neurons_sorted=n_sorted,
        ratio=scaled / harvesting,
    )


def merging(size: str, arguments: argparse.Namespace) -> None:
    """Harvest the shares of several processes one after another, then merge them as rank 0 does; print both times.

    What the ranks send is pickled and read again, as between processes; the connection itself is not measured.
    """
    shares = []
    for number in range(arguments.merge):
        setting = Setting(size, arguments, Share(number, arguments.merge))
        shares.append((timed(setting.harvest_share, setting.device), setting.layers))
    first = shares[0][1]
    sizes, seconds = [], 0.0
    for place, layer in enumerate(first):
        for _, layers in shares[1:]:
            spent, sent = timed_result(lambda i=place, h=layers: pickle.dumps(h[i].state()))
            sizes.append(len(sent) / layer.n_neurons)
            seconds += spent + timed(lambda h=layer, s=sent: h.merge(pickle.loads(s)))
    slowest = max(spent for spent, _ in shares)
    print(
        f"{size}: {arguments.merge} shares of {arguments.tokens:,} tokens, the slowest {slowest:.1f} s, merging"
        f" {seconds:.2f} s ({seconds / slowest:.1%} of it), sent {max(sizes) / 1000:.0f} kB per neuron and share",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["crate-2l", "gpt2-2l", "crate-768"])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8_192)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kind", choices=("torch", "fused"), default="fused")
    parser.add_argument("--sort", action="store_true")
    parser.add_argument("--sort-tokens", type=int, default=1_000_000)
    parser.add_argument(
        "--sort-neurons", type=int, default=128, help="neurons to sort; the time is scaled up"
    )
    parser.add_argument(
        "--layer-neurons", type=int, default=3_072, help="neurons of the layer, for --sort"
    )
    parser.add_argument("--merge", type=int, default=0, help="number of shares to merge")
    options = parser.parse_args(arguments)
    if options.sort:
        against_sorting(options)
        return
    for size in options.sizes:
        (merging if options.merge else throughput)(size, options)


if __name__ == "__main__":
    main()
