"""OpenAI's own prompts, where their package is installed (it wants NumPy below 2)."""

import numpy as np
import planted
import pytest

from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.selection import explained_from
from cratelm.llm.prompts import openai as openai_prompts


def test_without_the_package_the_extra_is_named(tmp_path):
    try:
        import neuron_explainer  # noqa: F401
    except ImportError:
        run = planted.run_with_harvest(tmp_path / "run", n_neurons=3, layers=1)
        config = ExplainConfig(run=run.path, model="m", explainer="hf:x", prompts="openai")
        with pytest.raises(InputError, match=r"\.\[openai-prompts\]"):
            explain(config)
    else:
        openai_prompts.require()


def test_contrast_is_refused():
    with pytest.raises(InputError, match="--contrast"):
        ExplainConfig(explainer="hf:x", prompts="openai", contrast=2)


def test_prompts_are_those_of_the_package():
    pytest.importorskip("neuron_explainer", reason="automated-interpretability is not installed")
    from neuron_explainer.explanations.prompt_builder import PromptFormat
    from neuron_explainer.explanations.simulator import ExplanationNeuronSimulator

    strings = [*planted.STRINGS[:4], ' "quoted"', " é", "unknown"]
    ids = np.arange(len(strings))
    read = openai_prompts.openai_simulate_read("import statements", ids, strings)
    shown = [s.replace("\n", "\\n").replace("\t", "\\t") for s in strings]
    theirs = ExplanationNeuronSimulator(
        "", "import statements", prompt_format=PromptFormat.NONE
    ).make_simulation_prompt(shown)
    assert read.text == theirs
    lines = [read.body[:slot].rpartition("\n")[2] for slot in read.slots]
    assert lines == [f"{s}\t" for s in shown]
    other = openai_prompts.openai_simulate_read("cities", ids[:2], strings)
    assert other.preamble == read.preamble
    assert other.context != read.context


def test_explainer_messages_hold_levels_of_what_is_shown():
    pytest.importorskip("neuron_explainer", reason="automated-interpretability is not installed")
    record = planted.harvested(planted.activations("fit", 5))
    shown = explained_from(record, "top_and_random")
    chat = openai_prompts.openai_explain_request(
        shown, planted.STRINGS, max_tokens=60, temperature=1.0, seed=0
    )
    roles = [role for role, _ in chat.messages]
    assert roles[0] == "system"
    assert roles[1::2] == ["user"] * (len(roles) // 2)
    assert " w5\t10" in chat.messages[-1][1]
    assert chat.messages[-1][1].endswith("the main thing this neuron does is find")
