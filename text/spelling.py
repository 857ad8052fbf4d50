"""What of a text can be written, its letters and words, and the names of languages."""
import re
import unicodedata
from functools import cache

from whisper.tokenizer import TO_LANGUAGE_CODE

# Signs that `whisper.decode` never writes (suppress_tokens). Between words they become a blank.
SILENT_SIGNS = r"""["()\[\]{}<>*_`~^|「」『』\u2640-\u267f]"""
PARTING_SIGNS = r"[#+/:;=@\\]|(?<=\w)[()\[\]{}<>_`~^|]+(?=\w)|(?<=\d)\*(?=\d)"
JOINERS = "\u200c\u200d"  # of Persian and of the scripts of India: part of how a word is written
# A letter's Unicode name says how it sounds after such words, as HEBREW LETTER FINAL MEM.
QUALITY = (r"SMALL|FINAL|SHORT|DOTLESS|OPEN|STRAIGHT|BARRED|SUPERSCRIPT|FARSI|\S*UKRAINIAN|SARA"
           r"|CANDRA|VOCALIC|CHILLU|MEDIAL|TALL|GLOTTAL|PHARYNGEAL|\S*PRAANA|DANTAJA|\S*DHAJA"
           r"|KETTI|DIGA")
SOUND = re.compile(rf"(?:LETTER|LIGATURE|SIGN|SYLLABLE|CHARACTER) (?:(?:{QUALITY}) )*([A-Z])")
# Names of signs that do not sound; of signs that are an "n" or an "h" in many scripts.
SILENT = re.compile("MODIFIER|VIRAMA|COENG|ASAT|LAKUNA|NUKTA|AVAGRAHA|DOT BELOW|MAI |MAITAIKHU"
                    "|MAIYAMOK|PAIYANNOI|THANTHAKHAT|BANTOC|TOANDAKHIAT|(HARD|SOFT) SIGN")
NASAL, BREATHED = "ANUSVARA|CANDRABINDU|BINDI|NIKAHIT", "VISARGA|REAHMUK"
# Letters whose names do not begin with their sound (CYRILLIC ... EF); vowels of Sinhala and Lao.
NAMED = dict(zip("флмнрсңеєəәðŋ" "\u0dd4\u0dd6\u0dd9\u0dda\u0ddc\u0ddd\u0eb1\u0ebb",
                 "flmnrsneeaadn" "uueeooao"))
TWO_I = {"tr", "az"}  # with "i", whose capital is "İ", and "ı", whose capital is "I"
UNSPACED = {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}  # written without spaces


def strip_unspoken(text: str) -> str:
    """A text without the signs that `whisper.decode` never writes."""
    text = re.sub(SILENT_SIGNS, "", re.sub(PARTING_SIGNS, " ", text))
    text = re.sub("-{2,}", " ", text)
    return " ".join(re.sub(r"(?<!\S)[-']+", "", text).split())  # nor these before a word


def between_words(language: str) -> str:
    """A blank, or nothing."""
    return "" if language in UNSPACED else " "


def words(text: str, language: str) -> list[str]:
    """What the length rule counts: words, or characters in languages written without spaces."""
    return [c for c in text if c.isalnum()] if language in UNSPACED else letters(text).split()


def is_letter(c: str) -> bool:
    return unicodedata.category(c)[0] in "LMN"  # letters, digits and their marks


def letters(text: str) -> str:
    """Letters, digits, marks such as Hindi's vowel signs, joiners; a blank for anything else."""
    return "".join(c if is_letter(c) or c in JOINERS else " " for c in text)


@cache
def latin_letter(c: str) -> str:
    """What a letter of any alphabet sounds like, about, by its name in Unicode: "é" -> "e", "ж",
    CYRILLIC SMALL LETTER ZHE -> "z"; "" if it is silent, or no name says it, as of Chinese ones."""
    name = unicodedata.name(c, "").partition(" WITH ")[0]
    name = re.sub(BREATHED, "H", re.sub(NASAL, "N", name))
    sound = None if SILENT.search(name) else SOUND.search(name)
    return NAMED.get(c) or (sound[1].lower() if sound else "")


def language_code(name: str) -> str:
    """English, en-US or EN -> en; what is no language stays, in lower case."""
    name = name.strip().lower()
    tag = re.fullmatch(r"([a-z]{2,3})([-_]([a-z]{2}|\d{3}|hans|hant|latn|cyrl))*(\.utf-?8)?", name)
    return TO_LANGUAGE_CODE.get(name, tag[1] if tag else name)
