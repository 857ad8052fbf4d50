"""Does a recogniser that is no Whisper understand an ear's English? PocketSphinx hears its sound.

    pip install pocketsphinx        # and espeak-ng
    python experiments/sphinx.py out/ear5/ckpt.pt --data en=en.txt --recordings human

It has Gaussian mixtures over cepstra and a trigram model of words (Huggins-Daines et al. 2006,
10.1109/ICASSP.2006.1659988), and shares nothing with a Whisper but the language. It is a weak
recogniser, so espeak-ng, which says the same sentences in its plain voice and in random ones, and
people stand beside the flows. All sound is made of a log-mel by Griffin-Lim. Chance: the same
readings, of other sentences.
"""
import sys
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import Sentence  # noqa: E402
from experiments.student import letters, others  # noqa: E402
from experiments.utterances import (  # noqa: E402
    ACCENTS, check_espeak, espeak, human_clips, latents, open_source,
)
from flow import Solver  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402
from pocket import make_pocket  # noqa: E402
from speech.ear import Ear  # noqa: E402
from speech.recordings import speech_span  # noqa: E402
from speech.sound import griffin_lim, log_mel  # noqa: E402
from text.error_rates import edit_distance  # noqa: E402
from text.sources import split_of  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

try:
    from pocketsphinx import Decoder
except ImportError:
    Decoder = None

RESAMPLED = 1000  # times, for the interval


def read(decoder, mel: Tensor) -> str:
    """What it writes for a log-mel (M, n), which becomes sound first."""
    samples = griffin_lim(mel).numpy()
    samples = np.pad(0.5 * samples / abs(samples).max().clip(1e-6), 3200)  # 0.2 s of silence around
    noise = np.random.default_rng(0).normal(0, 1e-3, len(samples))  # or silence is -inf to it
    decoder.reinit_feat()  # or it would still know the noise of the sound before
    decoder.start_utt()
    decoder.process_raw((32767 * (samples + noise)).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def rates(sentences: list[Sentence], texts: list[str]) -> np.ndarray:
    """Edits per letter, and between which bounds 95 % of resampled sets of sentences have it."""
    pairs = [(letters(s), letters(Sentence("en", text))) for s, text in zip(sentences, texts)]
    edits = np.array([edit_distance(*pair) for pair in pairs])
    lengths = np.array([len(reference) for reference, _ in pairs])
    picks = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLED, len(pairs)))
    resampled = edits[picks].sum(1) / lengths[picks].sum(1)
    return np.array([edits.sum() / lengths.sum(), *np.quantile(resampled, (0.025, 0.975))])


def spoken(mels: Iterable[Tensor]) -> Iterator[Tensor]:
    """Log-mels (M, 2P) -> what is speech in them (M, n)."""
    for mel in mels:
        span = speech_span(mel, tail=0)
        yield mel[:, 2 * span.start : 2 * span.stop]


def plain_voice(sentences: list[Sentence], whisper: FrozenWhisper) -> Iterator[Tensor]:
    """Log-mels (M, 2P) of espeak-ng as it speaks by default; faster, if the window is too short."""
    for sentence in sentences:
        samples = make_pocket.speak_within(
            whisper.n_samples, sentence._replace(language=ACCENTS["en"]), "", speed=175, pitch=50)
        yield log_mel(samples, whisper)[0]


def log_mels_of(flow: sample.Flow, sentences: list[Sentence]) -> Iterator[Tensor]:
    """Log-mels (M, n) of a flow."""
    for x1, frames in latents(flow, sentences, Solver()):
        yield from (flow.critic.log_mel_of(x[:n]) for x, n in zip(x1, frames))


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", type=file_path, help="of train.py --latent mel")
    add("--data", nargs="+", help="text, as for train.py (default: that of the first checkpoint)")
    add("--sentences", type=int, default=200, help="held-out ones, and clips of people, at most")
    add("--recordings", type=file_path, help="people: a folder with manifest.tsv")
    add("--work_dir", type=file_path, default=Path("out/sphinx"), help="for espeak-ng's sound")
    args = parser.parse_args(argv)
    if args.sentences < 2:
        raise BadInput(f"--sentences {args.sentences} are too few; at least 2")
    if not Decoder:
        raise BadInput("PocketSphinx is not installed; `pip install pocketsphinx`")
    checkpoint = train.load_checkpoint(args.checkpoints[0])
    whisper = FrozenWhisper(checkpoint["config"]["whisper"])
    held_out = split_of(checkpoint["config"], whisper, args.data)[1]
    sentences = sorted((s for s in held_out if s.language == "en"), key=data.hash_share)
    if len(sentences := sentences[: args.sentences]) < 2:
        raise BadInput("PocketSphinx knows English alone; give --data in it")
    check_espeak(sentences)
    flows = [open_source(str(path), sentences, whisper) for path in args.checkpoints]
    for path, flow in zip(args.checkpoints, flows):
        if not isinstance(flow.critic, Ear):
            raise BadInput(f"{path} makes features, which have no sound; give one of --latent mel")
    variants = make_pocket.VARIANTS
    rows = {"espeak-ng": (sentences, spoken(plain_voice(sentences, whisper))),
            f"espeak-ng, {len(variants)} voices": (
                sentences, spoken(espeak(sentences, variants, 0, whisper, args.work_dir)))}
    if args.recordings:
        clips = human_clips(args.recordings, whisper, {"en"}, args.sentences)
        rows["people"] = [s for s, _ in clips], spoken(mel for _, mel in clips)
    rows |= {str(path): (sentences, log_mels_of(flow, sentences))
             for path, flow in zip(args.checkpoints, flows)}
    decoder = Decoder(samprate=16000, loglevel="FATAL")
    print("| speech | CER | of resampled sentences 95 % | chance | sentences |\n| --- "
          "| --- | --- | --- | --- |")
    for name, (texts, mels) in rows.items():
        read_texts = [read(decoder, mel) for mel in tqdm(mels, name, len(texts), leave=False)]
        cer, low, high = rates(texts, read_texts)
        chance = rates(others(texts), read_texts)[0]
        print(f"| {name} | {cer:.1%} | {low:.1%} to {high:.1%} | {chance:.1%} | {len(texts)} |",
              flush=True)


if __name__ == "__main__":
    guard(main)
