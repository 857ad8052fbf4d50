"""The prompts of Piper Recording Studio (MIT licence) -> a file of language<TAB>text.

    git clone https://github.com/rhasspy/piper-recording-studio
    python experiments/prompts.py piper-recording-studio --out prompts.tsv
    python experiments/prompts.py piper-recording-studio --languages en es --short --out short2.tsv
"""
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.files import atomic_write  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402

WHISPER_CODES = {"nb-NO": "no", "zh-HK": "yue"}  # where they are not those of the folders
LONGEST, SHORT = 199, 61  # characters of a prompt


def read_prompts(folder: Path) -> list[tuple[str, str]]:
    """Language and text of each prompt, in the order of languages, equal ones once."""
    prompts = {}
    for file in sorted(folder.glob("prompts/*/*.txt")):
        if locale := re.search(r"_(([a-z]{2})-[A-Z]{2})$", file.parent.name):  # no rs_SR, Test_test
            code = WHISPER_CODES.get(locale[1], locale[2])
            try:
                lines = file.read_text("utf-8-sig").splitlines()
            except UnicodeError as error:
                raise BadInput(f"{file} is not UTF-8 ({error}); fetch the clone again") from error
            for line in lines:  # number<TAB>text, or text
                text = unicodedata.normalize("NFC", line.split("\t")[-1]).strip()
                if 0 < len(text) <= LONGEST:
                    prompts[code, text] = None
    if not prompts:
        raise BadInput(f"{folder} has no prompts/LANGUAGE_xx-YY/*.txt; give the folder of "
                       "`git clone https://github.com/rhasspy/piper-recording-studio`")
    return sorted(prompts, key=lambda prompt: prompt[0])


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=file_path, help="of the clone")
    add("--out", type=file_path, default=Path("prompts.tsv"), help="(default: %(default)s)")
    add("--languages", nargs="+", help="Whisper's codes (default: all)")
    add("--short", action="store_true", help=f"at most {SHORT} characters and no digits")
    args = parser.parse_args(argv)
    prompts = read_prompts(args.folder)
    codes = {code for code, _ in prompts}
    languages = {*(args.languages or codes)}
    if unknown := languages - codes:
        raise BadInput(f"no prompts are in {', '.join(sorted(unknown))}; there are "
                       + ", ".join(sorted(codes)))
    chosen = [(code, text) for code, text in prompts if code in languages
              and not (args.short and (len(text) > SHORT or any(map(str.isdigit, text))))]
    with atomic_write(args.out) as part:
        part.write_text("".join(f"{code}\t{text}\n" for code, text in chosen), "utf-8")
    print(f"wrote {args.out}: {len(chosen)} prompts in {len(languages)} languages")


if __name__ == "__main__":
    guard(main)
