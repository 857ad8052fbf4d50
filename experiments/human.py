"""People's speech with its text, for --recordings: Debian's telephone prompts of Asterisk.

    python experiments/human.py --out human
    python experiments/human.py --out human --languages en fr

2,623 clips, about 120 minutes in five languages, one speaker each: Allison Smith (en, es), June
Wallack (fr) and Carlo Flora (it), all CC BY-SA 3.0, and Maxim Topal (ru), CC BY 3.0. In Spanish
about a fifth of the texts is not what is said.

It needs apt-get and dpkg, of Debian or Ubuntu, and ffmpeg. A run that was stopped goes on where it
was; manifest.tsv comes last and lists the languages of that run.
"""
import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterable, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.files import atomic_write, make_folder  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402

VOICES = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June",
          "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}  # folders in the packages
PROGRAMS = {"apt-get": "run this on Debian or Ubuntu", "dpkg": "run this on Debian or Ubuntu",
            "ffmpeg": "install it, e.g. `apt-get install ffmpeg`"}


class Clip(NamedTuple):
    source: Path
    name: str  # of the .wav
    language: str
    text: str


def run(command: list[str | Path], folder: Path, way_out: str) -> None:
    """A program in a folder, silent unless it fails: BadInput has the last line it wrote."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = (done.stdout.strip() or "it does not say why").splitlines()[-1]
        raise BadInput(f"{command[0]} failed ({last}); {way_out}")


def unpack(package: str, folder: Path) -> None:
    """Download a package and put its files below the folder."""
    run(["apt-get", "download", package], folder,
        "it needs a network, and `apt-get update` may be needed first")
    for file in folder.glob(f"{package}_*.deb"):
        run(["dpkg", "-x", file.name, "."], folder, "make room on the disk and run this again")


def read_table(file: Path) -> dict[str, str]:
    """Name of each prompt -> its (first) text; no remarks, none that describe a sound: `[beep]`."""
    prompts = {}
    with gzip.open(file, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            name, _, text = line.partition(":")
            if re.fullmatch(r"[\w/-]+", name) and text.strip() and not re.search(r"[\[(<{]", text):
                prompts.setdefault(name, text.strip().strip('"“”'))
    return prompts


def find_clips(root: Path, code: str) -> list[Clip]:
    """The prompts of a language that have a recording; BadInput if there is none."""
    package = f"asterisk-core-sounds-{code}"
    sounds = root / "usr/share/asterisk/sounds" / VOICES[code]
    table = root / "usr/share/doc" / package / f"core-sounds-{code}.txt.gz"
    clips = [Clip(sounds / f"{name}.g722", f"{code}_{name.replace('/', '_')}.wav", code, text)
             for name, text in (read_table(table) if table.exists() else {}).items()]
    clips = [clip for clip in clips if clip.source.exists()]
    if not clips:
        raise BadInput(f"{package} and {package}-g722 have no {table.name} with recordings of "
                       f"{VOICES[code]}; version 1.6.1 has, so try another release")
    return clips


def convert(source: Path, wav: Path) -> None:
    """G.722 -> 16 kHz, one channel; whole or not at all."""
    with atomic_write(wav) as part:
        run(["ffmpeg", "-loglevel", "error", "-f", "g722", "-i", source, "-ar", "16000", "-ac", "1",
             "-f", "wav", part.resolve()], source.parent, "run this again, and it goes on")


def write_manifest(folder: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Name of a .wav, language and text of each clip, as `train.py --speech FOLDER` reads them."""
    with atomic_write(folder / "manifest.tsv") as part:
        part.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=file_path, default=Path("human"), help="a folder (default: %(default)s)")
    add("--languages", nargs="+", choices=VOICES, default=[*VOICES], metavar="CODE",
        help=f"of {' '.join(VOICES)} (default: all)")
    args = parser.parse_args(argv)
    for program, way_out in PROGRAMS.items():
        if not shutil.which(program):
            raise BadInput(f"{program} is missing; {way_out}")
    make_folder(args.out)
    languages = [*dict.fromkeys(args.languages)]  # each once
    with TemporaryDirectory() as work:
        packages = [f"asterisk-core-sounds-{code}{end}" for code in languages
                    for end in ("", "-g722")]  # texts, sounds
        for package in tqdm(packages, "downloading", unit=" packages"):
            unpack(package, Path(work))
        clips = [clip for code in languages for clip in find_clips(Path(work), code)]
        for clip in tqdm(clips, "converting", unit=" clips"):
            if not (args.out / clip.name).exists():
                convert(clip.source, args.out / clip.name)
    write_manifest(args.out, [clip[1:] for clip in clips])
    print(f"wrote {args.out}: {len(clips)} clips, {' '.join(languages)}")


if __name__ == "__main__":
    guard(main)
