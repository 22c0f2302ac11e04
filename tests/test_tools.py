"""Other people's tools on our models and files: what they read and edit is what our own hooks do.

B batch, T tokens, H neurons of a layer, D width.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import run_with_harvest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import cratelm
from cratelm.activations.store import read_records, read_summaries
from cratelm.explain.store import (
    write_explanations,
)
from cratelm.llm.ledger import _COLUMNS
from cratelm.models.sites import Site, hooked
from cratelm.records import Explanation, NeuronId, NeuronScore, Score, Status
from cratelm.runs import Completion
from cratelm.score.store import write_scores

VOCABULARY, WIDTH, HEADS, LAYERS = 101, 32, 4, 2
FAMILIES = ("crate-2l", "gpt2-2l")
NEURON, VALUE = 7, 5.0
FILES = (Path(__file__).parents[1] / "docs" / "files.md").read_text()


def tiny(family: str = "crate-2l", seed: int = 0):
    return cratelm.build(
        family,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        seed=seed,
    ).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """[B, T] without token 0."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, "0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0")


def neurons(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """[B, T, H] of each layer, by our own hooks."""
    return cratelm.capture(model, cratelm.site_of(model), ids)


def set_neuron(layer_wanted: int):
    """For `hooked`: sets the neuron in one layer at every position."""

    def see(layer: int, activations: torch.Tensor) -> torch.Tensor | None:
        if layer != layer_wanted:
            return None
        activations = activations.clone()
        activations[..., NEURON] = VALUE
        return activations

    return see


@torch.no_grad()
def steered(model, ids: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Logits [B, T, V] with the neuron set, by our own hooks."""
    with hooked(model, cratelm.site_of(model), set_neuron(layer)):
        return model(input_ids=ids).logits


# nnsight


@pytest.fixture
def nnsight():
    return pytest.importorskip("nnsight", reason="nnsight is not installed")


def test_nnsight_reads_and_edits_crate(nnsight):
    model, ids = tiny(), tokens()
    expected, edited = neurons(model, ids), steered(model, ids)
    traced = nnsight.NNsight(model)
    with traced.trace(input_ids=ids):
        found = traced.model.layers[1].ista.code.output.save()
    with traced.trace(input_ids=ids):
        traced.model.layers[0].ista.code.output[:, :, NEURON] = VALUE
        logits = traced.output.logits.save()
    assert torch.equal(found, expected[1])
    assert torch.equal(logits, edited)
    assert not torch.equal(logits, model(ids).logits)


def test_nnsight_reads_and_edits_the_twin(nnsight):
    model, ids = tiny("gpt2-2l"), tokens()
    expected, edited = neurons(model, ids), steered(model, ids)
    traced = nnsight.NNsight(model)
    with traced.trace(input_ids=ids):
        found = traced.transformer.h[1].mlp.c_proj.input.save()
    with traced.trace(input_ids=ids):
        traced.transformer.h[0].mlp.act.output[:, :, NEURON] = VALUE
        logits = traced.output.logits.save()
    assert torch.equal(found, expected[1])
    assert torch.equal(logits, edited)


def test_nnsight_edits_while_generating(nnsight):
    model, ids = tiny(), tokens(rows=1)
    with hooked(model, cratelm.site_of(model), set_neuron(0)):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    traced = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer())
    with traced.generate(ids, max_new_tokens=6, do_sample=False) as tracer:
        for _ in tracer.iter[:6]:
            traced.model.layers[0].ista.code.output[:, :, NEURON] = VALUE
        found = tracer.result.save()
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))


# SAELens


@pytest.fixture
def sae_lens():
    pytest.importorskip("datasets", reason="datasets is not installed")
    return pytest.importorskip("sae_lens", reason="sae-lens is not installed")


def sae_store(sae_lens, model, hook: str, width: int):
    """An SAE of `width` inputs at a hook, and the store that feeds it."""
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.saes.sae import SAEMetadata

    data = Dataset.from_dict({"tokens": tokens(rows=64, length=16).tolist()})
    about = SAEMetadata(hook_name=hook, context_size=16, prepend_bos=False)
    config = sae_lens.StandardTrainingSAEConfig(d_in=width, d_sae=2 * width, metadata=about)
    sae = sae_lens.StandardTrainingSAE(config)
    return sae, sae_lens.ActivationsStore.from_sae(
        HookedProxyLM(model, tokenizer(), hook_names=[hook]),
        sae,
        data,
        streaming=False,
        train_batch_size_tokens=64,
    )


@pytest.mark.parametrize(
    ("family", "hook"),
    [("crate-2l", "model.layers.1.ista.code"), ("gpt2-2l", "transformer.h.1.mlp.act")],
)
def test_sae_lens_stores_neurons(sae_lens, family, hook):
    model = tiny(family)
    _, store = sae_store(sae_lens, model, hook, 4 * WIDTH)
    ids = store.get_batch_tokens()
    assert ids.shape == (8, 16)
    assert torch.equal(store.get_activations(ids), neurons(model, ids)[1])


def test_sae_lens_trains_on_a_block(sae_lens, tmp_path):
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(0)
    sae, store = sae_store(sae_lens, tiny(), "model.layers.0", WIDTH)
    batch = store.next_batch()  # [64, D]
    before = (sae(batch) - batch).pow(2).mean()
    config = SAETrainerConfig(
        total_training_samples=640, train_batch_size_samples=64, lr=1e-2, lr_end=1e-3
    )
    sae_lens.SAETrainer(config, sae, store).fit()
    assert (sae(batch) - batch).pow(2).mean() < 0.8 * before
    sae.save_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    assert loaded.cfg.metadata.hook_name == "model.layers.0"
    assert torch.equal(loaded(batch), sae(batch))


def test_sae_lens_runner_and_evaluation(sae_lens, tmp_path):
    """From a folder alone, by SAELens's own loader; the loss without the SAE is the model's."""
    from datasets import Dataset
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    model, ids = tiny(), tokens(rows=64, length=16)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(d_in=WIDTH, d_sae=2 * WIDTH),
        model_name=str(tmp_path / "model"),
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.0",
        context_size=16,
        training_tokens=256,
        train_batch_size_tokens=64,
        prepend_bos=False,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path / "sae"),
    )
    data = Dataset.from_dict({"tokens": ids.tolist()})
    runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=data)
    sae = runner.run()
    store = sae_lens.ActivationsStore.from_config(runner.model, config, override_dataset=data)
    how = EvalConfig(
        compute_ce_loss=True, n_eval_reconstruction_batches=1, batch_size_prompts=len(ids)
    )
    figures, _ = run_evals(
        sae, store, runner.model, ActivationScaler(), how, exclude_special_tokens=False
    )
    losses = figures["model_performance_preservation"]
    assert losses["ce_loss_without_sae"] == pytest.approx(model(ids, labels=ids).loss.item())
    assert losses["ce_loss_with_sae"] != losses["ce_loss_without_sae"]
    saved = sae_lens.SAE.load_from_disk(tmp_path / "sae").cfg.metadata
    assert (saved.hook_name, saved.model_class_name) == ("model.layers.0", "AutoModelForCausalLM")


# TransformerLens


@pytest.fixture
def bridge():
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    from cratelm.interop.transformer_lens import bridge

    return bridge


@pytest.mark.parametrize(
    ("family", "hook"),
    [("crate-2l", "blocks.{}.hook_neurons"), ("gpt2-2l", "blocks.{}.mlp.hook_post")],
)
def test_transformer_lens_caches_and_edits(bridge, family, hook):
    model, ids = tiny(family), tokens()
    with torch.no_grad():
        logits, expected, edited = model(ids).logits, neurons(model, ids), steered(model, ids)
        wrapped = bridge(model)
        found, cache = wrapped.run_with_cache(ids)
        ran = wrapped.run_with_hooks(ids, fwd_hooks=[(hook.format(0), _set_under_transformer_lens)])
    off = 0.0 if family == "crate-2l" else 1e-5  # TransformerLens computes GPT-2's attention anew
    torch.testing.assert_close(found, logits, rtol=off, atol=off)
    torch.testing.assert_close(ran, edited, rtol=off, atol=off)
    for layer in range(LAYERS):
        torch.testing.assert_close(cache[hook.format(layer)], expected[layer], rtol=off, atol=off)


def _set_under_transformer_lens(activations: torch.Tensor, hook: object) -> torch.Tensor:
    activations[..., NEURON] = VALUE
    return activations


def test_transformer_lens_names_all_of_crate(bridge):
    model, ids = tiny(), tokens()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        sites = {
            hook: cratelm.capture(model, cratelm.site_of(model, site), ids)[1]
            for site, hook in (("mssa", "mssa.subspace.hook_out"), ("heads", "mssa.heads.hook_out"))
        }
        _, cache = bridge(model).run_with_cache(ids)
    assert torch.equal(cache["blocks.0.hook_resid_pre"], states[0])
    assert torch.equal(cache["blocks.0.hook_resid_post"], states[1])
    middle = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
    assert torch.equal(cache["blocks.1.hook_resid_mid"], middle)
    for hook, expected in sites.items():
        assert torch.equal(cache[f"blocks.1.{hook}"], expected)


# PEFT and Trainer


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["projection"]},
        {"target_modules": [], "target_parameters": ["ista.dictionary"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=["mssa", "dictionary", "head"],
)
def test_peft_trains_and_loads_back(targets, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = tokens(rows=4, length=16)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        if targets["target_modules"] != ["lm_head"]:
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, expected)
            assert len(neurons(merged, ids)) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_goes_on_from_a_checkpoint(family, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tiny(family).save_pretrained(tmp_path / "before")
    model = cratelm.load(tmp_path / "before")
    rows = tokens(rows=8, length=16).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    how = TrainingArguments(
        str(tmp_path / "after"),
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, how, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    trainer.save_model()
    ids = tokens()
    loaded = cratelm.load(tmp_path / "after")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    biases = [p for name, p in loaded.named_parameters() if name.endswith(".bias")]
    assert family == "crate-2l" or not any(bias.any() for bias in biases)


# torch.export and ONNX


@pytest.fixture(params=FAMILIES)
def exported(request):
    """The model and its program, for any batch and length."""
    model = tiny(request.param)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "use_cache": None},
    )
    return model, program


SHAPES = [(1, 1), (2, 9), (3, 64)]


def test_torch_export(exported):
    model, program = exported
    for shape in SHAPES:
        ids = tokens(*shape)
        found = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits)


def test_onnx(exported, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, program = exported
    torch.onnx.export(
        program,
        (),
        tmp_path / "model.onnx",
        kwargs={"input_ids": tokens(), "use_cache": False},
        input_names=["input_ids"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        ids = tokens(*shape)
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        np.testing.assert_allclose(found, model(ids).logits.detach(), rtol=1e-4, atol=1e-5)


# Files of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Twelve planted neurons in each of two layers, explained and scored in name only."""
    made = run_with_harvest(tmp_path_factory.mktemp("files") / "run")
    places = [NeuronId("m", "ista", layer, index) for layer in range(2) for index in range(12)]
    with made.stage("explanations", "m").write({}, {}) as draft:
        write_explanations(
            draft.path, [Explanation(n, "trie", f"says {n.index}", {}, (0, 2)) for n in places]
        )
    with made.stage("scores", "m").write({}, {}) as draft:
        write_scores(draft.path, [_score(n, control) for n in places for control in ("none", "shuffled")])  # fmt: skip
    return made.path


def _score(neuron: NeuronId, control) -> NeuronScore:
    value = Score(neuron.index / 12) if neuron.index > 2 else Score(None, Status.UNDEFINED, "why")
    return NeuronScore(neuron, "trie", "top_and_random", control, value, (1,))


def strongest(run: Path) -> list[tuple]:
    """Index, maximum and what is said of the five strongest of layer 1, by our own reading."""
    layer = [s for s in read_summaries(run / "activations/m", "held_out") if s.neuron.layer == 1]
    best = sorted(layer, key=lambda s: -s.maximum)[:5]
    return [(s.neuron.index, np.float32(s.maximum), f"says {s.neuron.index}") for s in best]


def test_pandas_joins_the_files(run):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    summaries = pandas.read_parquet(run / "activations/m/summaries-held_out.parquet")
    said = pandas.read_parquet(run / "explanations/m/explanations.parquet")
    scores = pandas.read_parquet(run / "scores/m/scores.parquet").query("control == 'none'")
    key = ["model", "site", "layer", "index"]
    joined = summaries.merge(said, on=key).merge(scores, on=[*key, "explainer"])
    assert len(joined) == 24
    best = joined.query("layer == 1").nlargest(5, "maximum")
    found = best[["index", "maximum", "text"]].itertuples(index=False, name=None)
    assert list(found) == strongest(run)
    assert joined["value"].isna().sum() == 6
    assert (joined["status"] == "undefined").sum() == 6


def test_polars_joins_the_files(run):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    key = ["model", "site", "layer", "index"]
    summaries = polars.scan_parquet(run / "activations/m/summaries-held_out.parquet")
    said = polars.scan_parquet(run / "explanations/m/explanations.parquet")
    scores = polars.scan_parquet(run / "scores/m/scores.parquet").filter(control="none")
    kept = scores.select(*key, "explainer", "value", "status")
    joined = summaries.join(said, on=key).join(kept, on=[*key, "explainer"])
    best = joined.filter(layer=1).sort("maximum", descending=True).head(5)
    rows = best.select("index", "maximum", "text").collect().rows()
    assert [(index, np.float32(most), text) for index, most, text in rows] == strongest(run)
    assert joined.filter(status="undefined").collect()["value"].null_count() == 6
    excerpts = polars.scan_parquet(run / "activations/m/excerpts-held_out.parquet")
    top = excerpts.filter(layer=1, index=4, kind="top").collect()
    (record,) = read_records(run / "activations/m", "held_out", [1], [4])
    expected = [e.activations.tolist() for e in record.of_kind("top")]
    assert top["activations"].to_list() == expected


def test_datasets_reads_excerpts(run, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    file = str(run / "activations/m/excerpts-held_out.parquet")
    excerpts = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path))
    records = list(read_records(run / "activations/m", "held_out"))
    assert len(excerpts) == sum(len(record.excerpts) for record in records)
    first, (expected, *_) = excerpts[0], records[0].excerpts
    assert (first["kind"], first["document"]) == (expected.kind, expected.document)
    assert first["token_ids"] == expected.token_ids.tolist()
    np.testing.assert_array_equal(np.float32(first["activations"]), expected.activations)


# docs/files.md


def described(file: str) -> dict[str, str]:
    """Keys of a file, with their types, as the page tells them."""
    (section,) = re.findall(rf"^### `{re.escape(file)}`\n(.*?)(?=^##|\Z)", FILES, re.M | re.S)
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", section, re.MULTILINE))


@pytest.mark.parametrize(
    ("file", "kind"), [("completed.json", Completion), ("sites.json", Site)], ids=str
)
def test_page_tells_every_key(file, kind):
    # what computes latents is no data, and the shape in the model is measured each time: they are not written
    fields = {field.name for field in dataclasses.fields(kind)} - {"autoencoders", "is_flat"}
    assert set(described(file)) == fields


def test_page_tells_every_column_of_the_ledger():
    """Its table is told in a sentence."""
    sentence = FILES[FILES.index("Table `calls`") : FILES.index("Table `models`")]
    assert re.findall(r"`(\w+)`", sentence)[1:] == _COLUMNS.split(", ")
