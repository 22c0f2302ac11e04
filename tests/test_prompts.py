"""Prompts: shown in the docs word for word, and what they show of a neuron."""

from pathlib import Path

import numpy as np
import planted

from cratelm.explain.llm_explainer import parse_explanation
from cratelm.explain.selection import contrasting, explained_from
from cratelm.llm.prompts import neurons as prompts
from cratelm.llm.prompts import scorers as scorer_prompts
from cratelm.llm.prompts.excerpts import excerpt_text
from cratelm.llm.requests import Answer, Failure, FailureKind, key
from cratelm.records import Excerpt
from cratelm.text.display import printable

DOCS = Path(__file__).parents[1] / "docs" / "prompts.md"


def excerpt(token_ids, activations) -> Excerpt:
    ids, values = np.array(token_ids, np.int32), np.array(activations, np.float32)
    return Excerpt("top", 0, -1, ids, values, int(values.argmax()), 0, 0)


def request(shown, contrast=(), strings=planted.STRINGS):
    return prompts.explain_request(shown, contrast, strings, max_tokens=60, temperature=0.0, seed=0)


def as_text(messages) -> str:
    return "\n\n".join(f"[{role}]\n{text}" for role, text in messages)


def documented() -> list[str]:
    """Every text that is sent to a language model, but for what a neuron puts into it."""
    shown = [excerpt([5, 6, 7], [0, 1, 0])]
    explain = request(shown).messages
    fill = prompts.simulate_fill("EXPLANATION", np.arange(4, 7), planted.STRINGS, 10).messages
    read = prompts.simulate_read("EXPLANATION", np.arange(4, 7), planted.STRINGS, 9)
    wordings = (scorer_prompts.DETECTION, scorer_prompts.FUZZING)
    return [
        as_text(explain[:-1]),
        read.text,
        as_text(fill),
        *(w.preamble.rstrip("\n") for w in wordings),
        *(w.system for w in wordings),
        scorer_prompts._INTRUDER_PREAMBLE.rstrip("\n"),
    ]


def test_every_prompt_is_in_the_docs_with_its_version():
    text = DOCS.read_text()
    for prompt in documented():
        assert prompt in text
    assert f"version `{prompts.VERSION}`" in text
    assert f"version `{scorer_prompts.VERSION}`" in text


def test_an_excerpt_is_shown_with_its_strongest_tokens_marked():
    asked = request([excerpt([5, 2, 1, 6], [0.0, 4.0, 1.0, 2.0]), excerpt([3, 3], [0.0, 3.9])])
    assert asked.messages[-1][1] == (
        "1.  w5« import»\\n« w6»\n2. \\tfrom«\\tfrom»\n"
        "Strongest: « import» 10, «\\tfrom» 9, « w6» 5, «\\n» 2\n\n"
        "In a few words, what does the neuron react to?"
    )


def test_a_silent_neuron_marks_nothing():
    asked = request([excerpt([5, 6], [0.0, -1.0])])
    assert "Strongest: nothing" in asked.messages[-1][1]


def test_contrast_excerpts_carry_no_marks_and_stay_silent():
    record = planted.harvested(planted.activations("fit", 5))
    silent = contrasting(record, "top_and_random", 4)
    assert len(silent) == 4
    shown = explained_from(record, "top_and_random")
    assert not {e.position for e in silent} & {e.position for e in shown}
    assert max(float(e.activations.max()) for e in silent) < record.summary.maximum / 2
    assert [float(e.activations.max()) for e in silent] == sorted(
        float(e.activations.max()) for e in silent
    )
    part = request(shown, silent).messages[-1][1].partition("No reaction in:")[2]
    assert part.split("Strongest")[0].count("«") == 0
    assert all(len(e) <= 8 for e in contrasting(record, "anthropic", 4))


def test_each_word_of_a_prompt_counts_in_the_key():
    shown = [excerpt([5, 6], [0.0, 1.0])]
    assert key(request(shown), {}) != key(request([excerpt([5, 6], [1.0, 0.0])]), {})


def test_escapes_keep_a_text_on_its_line():
    assert printable("a\tb\r\n\x00\u2028\x1b[0m é中😀") == "a\\tb\\r\\n\\x00\\u2028\\x1b[0m é中😀"
    strings = ["«", "x", "\n"]
    assert excerpt_text(np.array([1, 0, 2]), strings, [False, True, True]) == "x««\\n»"


def test_an_answer_is_its_first_line_that_says_something():
    def of(text: str):
        return parse_explanation(Answer(text, 1, 1))

    assert of('\n\n "names of cities." \nand more') == "names of cities."
    assert of("The neuron reacts to the token ` import`") == "the token ` import`"
    assert of("`x` and `y`") == "`x` and `y`"
    assert len(of("a" * 5000)) == 600
    for nothing in ("...", "\n-\n", "«»"):
        assert isinstance(of(nothing), Failure)
    failure = Failure(FailureKind.STATUS, "status 500")
    assert parse_explanation(failure) is failure
