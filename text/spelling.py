"""What of a text can be written, and what its languages write between words."""
import re

from whisper.tokenizer import TO_LANGUAGE_CODE

# Signs that `whisper.decode` never writes (suppress_tokens). Between words they become a blank.
SILENT_SIGNS = r"""["()\[\]{}<>*_`~^|「」『』♩♪♫♬♭♮♯]"""
PARTING_SIGNS = r"[#+/:;=@\\]|-{2,}|(?<=\w)[()\[\]{}<>_`~^|]+(?=\w)|(?<=\d)\*(?=\d)"
UNSPACED = {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}  # written without spaces


def strip_unspoken(text: str) -> str:
    """A text without the signs that `whisper.decode` never writes."""
    text = re.sub(SILENT_SIGNS, "", re.sub(PARTING_SIGNS, " ", text))
    return " ".join(re.sub(r"(?<!\S)[-']+", "", text).split())  # nor these before a word


def language_code(name: str) -> str:
    """English, en-US or EN -> en; what is no language stays, in lower case."""
    name = name.strip().lower()
    tag = re.fullmatch(r"([a-z]{2,3})([-_][a-z0-9]{2,8})*(\.utf-?8)?", name)
    return TO_LANGUAGE_CODE.get(name, tag[1] if tag else name)
