"""Thoughts before an answer: every marker, unclosed ones, texts that only mention a marker."""

import pytest

from cratelm.llm.thinking import UnfinishedThoughts, answer_after_thoughts, prompt_opens_thoughts

ANSWER = "plural nouns"
THOUGHTS = "Okay. The tokens are\n\n1. cats, dogs\nso they are plural."


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THOUGHTS}</think>\n\n{ANSWER}",
        f"<think>{THOUGHTS}</think>{ANSWER}",
        f"\n <think>\n{THOUGHTS}\n</think>\n{ANSWER}\n",
        f"<think>\n\n</think>\n\n{ANSWER}",
        f"{THOUGHTS}\n</think>\n\n{ANSWER}",  # the prompt held the opening marker
        f"{THOUGHTS}</think>\n\n{ANSWER}",
        f"<think>a</think>\n<think>{THOUGHTS}</think>\n{ANSWER}",
        f"<thinking>{THOUGHTS}</thinking>\n<answer>{ANSWER}</answer>",
        f"<seed:think>{THOUGHTS}</seed:think>{ANSWER}",
        f"<reasoning>{THOUGHTS}</reasoning>\n{ANSWER}",
        f"[THINK]{THOUGHTS}[/THINK]{ANSWER}",
        f"◁think▷{THOUGHTS}◁/think▷{ANSWER}",
        f"<|START_THINKING|>{THOUGHTS}<|END_THINKING|><|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>",
        f"<|channel>thought\n{THOUGHTS}<channel|>{ANSWER}",
        f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{ANSWER}<|return|>",
        f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>commentary<|message|>x"
        f"<|end|><|start|>assistant<|channel|>final <|constrain|>JSON<|message|>{ANSWER}",
        f"analysis{THOUGHTS}assistantfinal{ANSWER}",
        f"Let me see.\n<think>{THOUGHTS}</think>\n{ANSWER}",
    ],
)
def test_the_answer_is_what_follows_the_thoughts(text):
    assert answer_after_thoughts(text) == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THOUGHTS}",
        f"<think>a</think>\n<think>{THOUGHTS}",
        f"[THINK]{THOUGHTS}",
        f"<|channel|>analysis<|message|>{THOUGHTS}",
        f"<|channel>thought\n{THOUGHTS}",
        f"analysis{THOUGHTS}",
    ],
)
def test_thoughts_that_do_not_end_are_no_answer(text):
    with pytest.raises(UnfinishedThoughts):
        answer_after_thoughts(text)


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        "the tag <think> and what follows it",
        "closing tags such as </think>",
        "tokens after `</think>` in transcripts of chats",
        "analysis of variance, and assistantfinal",
        "the marker [THINK]",
        "",
        "</b> and <b> tags\n<thin>",
    ],
)
def test_text_that_mentions_a_marker_stays(text):
    assert answer_after_thoughts(text) == text


def test_thoughts_that_the_prompt_opened():
    assert answer_after_thoughts(f"a</think>{ANSWER}", opened=True) == ANSWER
    with pytest.raises(UnfinishedThoughts):
        answer_after_thoughts(THOUGHTS, opened=True)
    assert answer_after_thoughts(f"{THOUGHTS}</think>", opened=True) == ""


def test_prompts_that_open_thoughts():
    assert prompt_opens_thoughts("<|im_start|>assistant\n<think>\n")
    assert prompt_opens_thoughts("<｜Assistant｜><think>\n")
    assert not prompt_opens_thoughts("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not prompt_opens_thoughts("<think> is a tag\nassistant:")
