"""The claim of a sentence that explains a neuron."""


def claim(text: str) -> str:
    """Return the claim of a sentence: what precedes its first semicolon or full stop outside of backticks."""
    quoted = False
    for i, character in enumerate(text):
        if character == "`":
            quoted = not quoted
        elif not quoted and (
            character == ";" or (character == "." and text[i + 1 : i + 2] in ("", " "))
        ):
            return text[:i]
    return text
