"""experiments/human.py without a network: the programs that it calls are small scripts here."""
import gzip
from pathlib import Path

import pytest

from experiments import human
from plumbing.errors import BadInput
from speech.recordings import read_manifest

TABLES = {
    "en": "\ufeff; Core sounds: English\n\nhello: Hello: world.  \nbeep: [a tone]\nahem: (ahooga)\n"
          "tags: <sound>\nbrace: {x}\nis:\nblank:   \ndigits/4: “four”\nquote: \"Say “no” now\"\n"
          "a remark: of two words\nunheard: Nobody recorded it.\n",
    "es": "hello: ¿Dígame?\nhello: Hola.\n"}
TEXTS = {"hello": "Hello: world.", "digits/4": "four", "quote": "Say “no” now",
         "unheard": "Nobody recorded it."}
MANIFEST = ["en_hello.wav\ten\tHello: world.", "en_digits_4.wav\ten\tfour",
            "en_quote.wav\ten\tSay “no” now", "es_hello.wav\tes\t¿Dígame?"]
SCRIPTS = {
    "apt-get": """echo "W: unsandboxed" >&2
                  if [ -e "$FAKE/offline" ]; then echo "E: no network" >&2; exit 100; fi
                  [ "$1" = download ] && : > "$2_1.6.1-1_all.deb" """,
    "dpkg": """[ "$1" = -x ] && cp -r "$FAKE/packages/${2%%_*}/." "$3" """,
    "ffmpeg": """while [ "$1" != -i ]; do shift; done
                 cp "$2" "$(for last; do :; done; echo "$last")"
                 basename "$2" >> "$FAKE/converted"
                 if [ -e "$FAKE/full" ] && [ $(wc -l < "$FAKE/converted") -ge 2 ]; then
                     echo "disk full" >&2; exit 1
                 fi"""}


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with the programs, first on PATH, and two packages for each language."""
    for name, script in SCRIPTS.items():
        write(tmp_path / "bin" / name, f"#!/bin/sh\n{script}\n".encode())
        (tmp_path / "bin" / name).chmod(0o755)
    for code, table in TABLES.items():
        package = f"asterisk-core-sounds-{code}"
        share = tmp_path / "packages" / package / "usr/share"
        write(share / "doc" / package / f"core-sounds-{code}.txt.gz",
              gzip.compress(table.encode()))
        sounds = tmp_path / f"packages/{package}-g722/usr/share/asterisk/sounds"
        for name in ["hello", "beep", "digits/4", "quote"] if code == "en" else ["hello"]:
            write(sounds / human.VOICES[code] / f"{name}.g722", f"{code} {name}".encode())
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def make(fake: Path, *languages: str) -> list[str]:
    """The lines of the manifest."""
    human.main(["--out", str(fake / "out"), "--languages", *languages])
    return (fake / "out/manifest.tsv").read_text("utf-8").splitlines()


def converted(fake: Path) -> list[str]:
    """The sounds that ffmpeg was given since the last call, in order."""
    lines = (fake / "converted").read_text().split()
    (fake / "converted").unlink()
    return lines


def test_table_has_what_is_said_and_nothing_else(tmp_path):
    write(tmp_path / "table.gz", gzip.compress(TABLES["en"].encode()))
    assert human.read_table(tmp_path / "table.gz") == TEXTS


def test_whole_run_makes_what_train_reads(fake, pocket, capfd):
    assert make(fake, "en", "es", "en") == MANIFEST
    out, err = capfd.readouterr()
    assert "4 clips, en es" in out and "W:" not in out + err
    entries, notes = read_manifest(fake / "out", pocket)
    assert [path.read_text() for path, _ in entries] == ["en hello", "en digits/4", "en quote",
                                                         "es hello"]
    assert entries[3][1] == ("es", "¿Dígame?") and not notes
    assert len([*(fake / "out").iterdir()]) == 5  # nothing temporary stays


def test_killed_run_has_no_manifest_and_the_next_goes_on(fake):
    write(fake / "full", b"")
    with pytest.raises(BadInput, match=r"ffmpeg failed \(disk full\); .*goes on"):
        make(fake, "en", "es")
    assert converted(fake) == ["hello.g722", "4.g722"]
    assert [file.name for file in (fake / "out").iterdir()] == ["en_hello.wav"]
    (fake / "full").unlink()
    assert make(fake, "en", "es") == MANIFEST
    assert converted(fake) == ["4.g722", "quote.g722", "hello.g722"]
    assert make(fake, "es") == MANIFEST[3:]


def test_without_network_the_last_line_of_apt_is_told(fake):
    write(fake / "offline", b"")
    with pytest.raises(BadInput, match=r"^apt-get failed \(E: no network\); .*apt-get update"):
        make(fake, "en")
    assert not (fake / "out/manifest.tsv").exists()


@pytest.mark.parametrize("program, way_out", [
    ("apt-get", "Debian or Ubuntu"), ("dpkg", "Debian or Ubuntu"), ("ffmpeg", "apt-get install")])
def test_missing_program_is_named_before_anything_is_done(fake, monkeypatch, program, way_out):
    (fake / "bin" / program).unlink()
    monkeypatch.setenv("PATH", str(fake / "bin"))
    with pytest.raises(BadInput, match=f"^{program} is missing; [^;]*{way_out}[^;]*$"):
        make(fake, "en")
    assert not (fake / "out").exists()


def test_out_that_is_no_folder_is_told_first(fake):
    write(fake / "out", b"")
    write(fake / "offline", b"")
    with pytest.raises(BadInput, match="out cannot be a folder"):
        make(fake, "en")


def test_another_layout_of_the_packages_is_told(fake):
    for package, missing in ("es-g722", "asterisk"), ("en", "doc"):
        share = fake / f"packages/asterisk-core-sounds-{package}/usr/share"
        (share / missing).rename(share / "other")
        with pytest.raises(BadInput, match=f"no core-sounds-{package[:2]}.txt.gz with recordings"):
            make(fake, package[:2])
