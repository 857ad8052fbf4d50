"""Make pocket/pocket.pt: a small but real Whisper, trained on speech that espeak-ng speaks.

    python pocket/make_pocket.py    # speaks, trains, saves, checks; after Ctrl-C run it again
    python pocket/make_pocket.py --seed 1 --out pocket/judge.pt     # another one, as a judge

Everything unfinished is kept in --work_dir. Needs espeak-ng (Debian: `apt-get install espeak-ng`).
"""
import io
import math
import random
import re
import shutil
import subprocess
import sys
import wave
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from whisper.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

HERE = Path(__file__).resolve().parent
SENTENCES, SPEECH = HERE / "sentences", HERE / "speech.npz"
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.files import atomic_write, fingerprint  # noqa: E402
from plumbing.flags import Parser, file_path, seed_number  # noqa: E402
from plumbing.weights import POCKET  # noqa: E402
from pocket.clips import mel_from_bytes  # noqa: E402
from speech.ear import Room, random_room, smooth, upsample  # noqa: E402
from speech.sound import resample  # noqa: E402
from text.durations import FRAMES_PER_SECOND, n_frames  # noqa: E402
from text.error_rates import error_rates  # noqa: E402
from text.sources import builtin  # noqa: E402
from text.spelling import between_words  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

DIMS = ModelDimensions(
    n_mels=80, n_audio_ctx=256, n_audio_state=128, n_audio_head=4, n_audio_layer=3,
    n_vocab=51865, n_text_ctx=128, n_text_state=128, n_text_head=4, n_text_layer=2,
)  # 256 positions are 5.12 s
MEL_FRAMES = 2 * DIMS.n_audio_ctx
LANGUAGES = ("en", "es", "de", "fr", "zh")
# espeak-ng's voices that are not named as Whisper's codes; "" where it cannot read the usual
# spelling: kanji (ja), vowels that are not written (he), syllables it drops or spells (th, my).
VOICES = {"zh": "cmn-latn-pinyin", "nn": "nb", "ja": "", "he": "", "th": "", "my": ""}
VARIANTS = ("m1 m2 m3 m4 m5 m6 m7 f1 f2 f3 f4 Annie Michael Lee linda paul steph zac david john "
            "pablo Andy").split()
HELD_OUT_VARIANTS = ("m8", "f5", "Andrea", "edward")  # heard in no training clip
# steps, share of corrupted decoder inputs, weight of the CTC loss, strength of the rooms at most,
# size of the adversary at most
PHASES = ((3500, 0.2, 0.0, 0.3, 0.0), (1500, 0.1, 0.3, 1.0, 0.0), (3200, 0.1, 0.0, 1.0, 0.08))
LAST_STEP = sum(phase[0] for phase in PHASES)
MAX_TAKES = 8  # of one sentence
N_SENTENCES = 6000  # per language
BATCH = 24
N_TEST, N_SHIPPED = 500, 50  # test sentences per language, and how many of them speech.npz has
SHARD = 1000  # clips per file, so that an interrupted run goes on where it stopped
SILENT_SHARE = 0.03  # share of clips that are noise or silence, and learn <|nospeech|>


# ---- sentences -------------------------------------------------------------------------------


def write_sentences():
    """pocket/grammar/*.txt -> pocket/sentences/*.txt, as many distinct ones in every language."""
    for path in sorted((HERE / "grammar").glob("*.txt")):
        rules, rng, texts = read_grammar(path), random.Random(path.stem), {}
        while len(texts) < N_SENTENCES:
            words = expand(rules, "sentence", rng).split()
            if 2 <= len(words) <= 12:
                texts[join_words(words, path.stem)] = None
        with atomic_write(SENTENCES / path.name) as part:
            part.write_text("".join(f"{text}\n" for text in texts), "utf-8")


def read_grammar(path):
    """`name = a | b`, `#` comments, indented lines go on: the rules of a context-free grammar."""
    lines = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.M)
    rules = [line.split(" =", 1) for line in re.sub(r"\n[ \t]+", " ", lines).splitlines() if line]
    return {name: [text.strip() for text in texts.split("|")] for name, texts in rules}


def expand(rules, name, rng):
    """One random reading of the rule `name`."""
    return re.sub(r"{(.+?)}", lambda m: expand(rules, m[1], rng), rng.choice(rules[name]))


def join_words(words, language):
    text = between_words(language).join(words)
    text = re.sub(r" ([.,])", r"\1", text)
    return re.sub(r"\w", lambda m: m[0].upper(), text, count=1)


# ---- speech ----------------------------------------------------------------------------------


def voice_of(language):
    """espeak-ng's voice of a language; "" if it cannot read it."""
    return VOICES.get(language, language)


def voiceless(languages):
    """Those that espeak-ng, which must be there, cannot read."""
    need_espeak()
    command = ["espeak-ng", "-q", "-v"]  # fails where there is no such voice
    return [code for code in sorted(languages) if not voice_of(code)
            or subprocess.run([*command, voice_of(code), "a"], capture_output=True).returncode]


def read_aloud(text, voice, *options):
    """espeak-ng reads a text -> samples, int16, and their rate."""
    command = ["espeak-ng", "-b", "1", "-v", voice, *options, "--stdout"]
    command += ["--", text]  # which may begin with a dash
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(wav)) as clip:
        return np.frombuffer(clip.readframes(10**9), np.int16), clip.getframerate()


def speak(sentence, variant, speed, pitch):
    """espeak-ng reads the sentence -> 16 kHz samples, float32 in [-1, 1]."""
    voice = f"{voice_of(sentence.language)}+{variant}"
    samples, rate = read_aloud(sentence.text, voice, "-s", str(speed), "-p", str(pitch))
    return resample(samples / np.float32(32768), rate)


def speak_within(longest, sentence, variant, speed, pitch):
    """As `speak`, but faster if there would be more samples than `longest`."""
    while len(samples := speak(sentence, variant, speed, pitch)) > longest:
        speed += 15
    return samples


def need_espeak():
    if not shutil.which("espeak-ng"):
        raise BadInput("espeak-ng is missing; install it, e.g. `apt-get install espeak-ng` "
                       "(Debian, Ubuntu) or `brew install espeak-ng` (macOS)")


def random_samples(sentence, variants, seed, longest, lead=0.0):
    """A sentence in a random voice, after up to `lead` seconds of silence -> 16 kHz samples.

    It is spoken faster if there would be more than `longest`.
    """
    rng = random.Random(f"{seed} {sentence.language} {sentence.text}")
    variant, speed, pitch = rng.choice(variants), rng.randint(150, 210), rng.randint(30, 70)
    silence = np.zeros(int(rng.uniform(0, lead) * SAMPLE_RATE), np.float32)
    speech = speak_within(longest - len(silence), sentence, variant, speed, pitch)
    return np.concatenate([silence, speech])


def random_clip(sentence, variants, seed):
    """The same for pocket's window, as 8-bit log-mel (n_mels, n)."""
    samples = random_samples(sentence, variants, seed, MEL_FRAMES * HOP_LENGTH, lead=0.1)
    return quantize(log_mel_spectrogram(samples, DIMS.n_mels))


def quantize(mel):
    """Log-mel -> one byte a value, 0.5 dB a step; pocket/clips.py undoes it."""
    return ((mel + 1.5) * 85).round().clamp(0, 255).to(torch.uint8).numpy()


def speak_all(sentences, variants, seed, work, name):
    """All clips of `sentences`, in order, from shards on disk that are made where missing."""
    clips = []
    shards = range(0, len(sentences), SHARD)
    key = fingerprint((sentences, variants, seed))[:8]  # other ones, other files
    with ThreadPoolExecutor(2) as pool:
        for start in tqdm(shards, desc=f"speaking {name}", unit="shard"):
            path = work / f"{name}_{key}_{start:06d}.npz"
            if (made := read_clips(path)) is None:
                part = sentences[start : start + SHARD]
                made = list(pool.map(lambda s: random_clip(s, variants, seed), part))
                with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
                    np.savez(file, *made)
            clips += made
    return clips


def read_clips(path):
    """The clips of a shard; None if there is none, or a damaged one."""
    try:
        with np.load(path) as shard:
            return [shard[f"arr_{i}"] for i in range(len(shard.files))]
    except Exception:  # in one way or other
        return None


def takes(sentence):
    """How often it is spoken: few short sentences exist, and spoken once they are not learned."""
    seconds = n_frames(sentence) / FRAMES_PER_SECOND
    return min(max(round((3 / seconds) ** 2), 1), MAX_TAKES)


# ---- training --------------------------------------------------------------------------------


class Vocabulary:
    """The tokens that occur, and one row that stands for all the others.

    All unused rows of the embedding are one and the same vector, so their logits are equal and
    their share of the softmax is (number of unused rows) * exp(logit): adding log(number) to the
    one logit gives exactly the full softmax.
    """

    tokenize, prompt = FrozenWhisper.tokenize, FrozenWhisper.prompt  # one rule, before there is one

    def __init__(self, sentences):
        any_one = self.tokenizer("en")
        self.no_speech = [any_one.sot, any_one.no_speech]
        used = {any_one.eot, any_one.no_speech}
        for language, text in sentences:
            used.update(self.tokens(language, text))
        self.used = sorted(used)
        self.small = {token: i for i, token in enumerate(self.used)}
        self.log_unused = math.log(DIMS.n_vocab - len(self.used))

    def tokenizer(self, language):
        return get_tokenizer(True, language=language)

    def tokens(self, language, text):
        """Prompt, text and end."""
        tokens = self.tokenize(text, language)
        return [*self.prompt(language), *tokens, self.tokenizer(language).eot]

    def batch(self, rows):
        """Token lists -> (B, L) small ids, padded with -100."""
        ids = [torch.tensor([self.small[token] for token in row]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)

    def expand(self, model):
        """A model with the small vocabulary -> state dict with all n_vocab rows."""
        state = model.state_dict()
        small = state["decoder.token_embedding.weight"]
        full = small[-1].repeat(DIMS.n_vocab, 1)
        full[self.used] = small[:-1]
        return {**state, "decoder.token_embedding.weight": full}


def warp(mel, window, rng):
    """Vocal tract and tempo up to a tenth longer or shorter, (n_mels, n): more voices."""
    scale = 0.9 + 0.2 * torch.rand(2, generator=rng).numpy()
    bins, frames = (np.array(mel.shape) * scale).astype(int).tolist()
    mel = torch.from_numpy(mel)[None, None].float()
    mel = F.interpolate(mel, (bins, min(frames, window)), mode="bilinear", antialias=True)
    top = max(DIMS.n_mels - bins, 0)
    return F.pad(mel, (0, 0, 0, top), mode="replicate")[0, 0, : DIMS.n_mels].numpy()


def silent_clip(rng):
    """Silence, or noise of random loudness and colour (n_mels, MEL_FRAMES)."""
    if torch.rand((), generator=rng) < 0.5:
        level = -1.5 + 2 * torch.rand((), generator=rng).item()
        return torch.full((DIMS.n_mels, MEL_FRAMES), level)
    colour = torch.randn((DIMS.n_mels, 1), generator=rng) * 0.1
    return colour + 0.2 * torch.randn((DIMS.n_mels, MEL_FRAMES), generator=rng)


def phase_at(step):
    """Step -> share of corrupted inputs, weight of CTC, strength of rooms, size of adversary."""
    ends = np.cumsum([phase[0] for phase in PHASES])
    return PHASES[np.searchsorted(ends, step, side="right")][1:]


def rate_at(step):
    """Step -> factor of the learning rate: a warm-up, then half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / LAST_STEP, 1)))
    return min((step + 1) / 300, 1) * max(cosine, 0.01)


def optimizers(model, ctc_head):
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for everything else.

    With AdamW alone the first 1,200 steps come as far as 300 steps do with Muon.
    """
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    matrices = [x for block in blocks for x in block.parameters() if x.ndim == 2]
    known = set(matrices)
    others = [x for part in (model, ctc_head) for x in part.parameters() if x not in known]
    return [torch.optim.Muon(matrices, 4e-3, 0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, 1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)]


def new_model(vocabulary):
    model = Whisper(replace(DIMS, n_vocab=len(vocabulary.used) + 1))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)
    return model


def pick_clips(clips, batch, rng):
    """Clips of like length and a window for them: the model's own in a third of the steps."""
    pool = torch.randint(0, len(clips), (4 * batch,), generator=rng).tolist()
    pool.sort(key=lambda i: clips[i].shape[1])
    first = batch * int(torch.randint(4, (), generator=rng))
    picks = pool[first : first + batch]
    silence = int(torch.randint(8, 80, (), generator=rng))
    window = (clips[picks[-1]].shape[1] + silence) // 2 * 2
    if torch.rand((), generator=rng) < 1 / 3:
        window = MEL_FRAMES
    return picks, min(window, MEL_FRAMES)


def encode(encoder, mel):
    """AudioEncoder.forward, in shorter windows too, (B, n_mels, 2T) -> (B, T, width)."""
    positions = encoder.positional_embedding[: mel.shape[2] // 2]
    return torch.func.functional_call(encoder, dict(positional_embedding=positions), mel)


def loss_of(model, ctc_head, vocabulary, mel, targets, corrupt, ctc_weight, rng):
    """Cross-entropy of the decoder, and CTC on the encoder: two ways to make it listen.

    Template sentences are easy to guess from the words before, and short ones were read as other
    short ones. So a share `corrupt` of the decoder's text inputs are random tokens, and a linear
    layer, thrown away afterwards, must find the words in the encoder's output alone.
    """
    inputs = targets[:, :-1].clamp(min=0)
    wrong = torch.rand(inputs.shape, generator=rng) < corrupt
    wrong[:, :4] = False  # the prompt stays
    random_tokens = torch.randint(len(vocabulary.used), inputs.shape, generator=rng)
    features = encode(model.encoder, mel)
    logits = model.decoder(torch.where(wrong, random_tokens, inputs), features)
    offset = torch.zeros(logits.shape[-1])
    offset[-1] = vocabulary.log_unused
    loss = F.cross_entropy((logits + offset).flatten(0, 1), targets[:, 1:].flatten())
    if not ctc_weight:
        return loss
    log_probs = ctc_head(features).log_softmax(-1).transpose(0, 1)  # (T, B, blank + tokens)
    texts = [row[4:][row[4:] >= 0][:-1] + 1 for row in targets]  # without prompt and end
    n_frames, n_tokens = [len(log_probs)] * len(texts), [len(text) for text in texts]
    ctc = F.ctc_loss(log_probs, torch.cat(texts), n_frames, n_tokens, zero_infinity=True)
    return loss + ctc_weight * ctc


def adversary(loss, mel, size, rng):
    """Log-mel (B, n_mels, n) -> what raises the loss most, added to it; as smooth as an ear's x1.

    One step from a random start (Wong et al. 2020, arXiv 2001.03994); n is even, and the change has
    a root mean square of `size` (B, 1, 1) at most. The gradients of a network that hears the same
    in spite of it lead to what others hear too, instead of to what only it would notice (arXiv
    1910.08640).
    """
    rms = lambda x: x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-9)  # noqa: E731
    change = torch.randn(mel.shape[0], mel.shape[1], mel.shape[2] // 2, generator=rng)
    change = (0.5 * size / rms(upsample(change)) * change).requires_grad_()
    gradient, = torch.autograd.grad(loss(mel + upsample(change)), change)
    change = upsample(change.detach() + size / rms(upsample(gradient)) * gradient)
    return mel + (size / rms(change)).clamp(max=1) * change


def training_batch(sentences, clips, vocabulary, most, size, rng):
    """Log-mel in random rooms (`most`: strength), now and then of silence, and what it says."""
    picks, window = pick_clips(clips, size, rng)
    mel = torch.stack([mel_from_bytes(warp(clips[i], window, rng), window) for i in picks])
    amount = most * torch.rand((), generator=rng).item()
    mel = mel + 0.05 * torch.randn(mel.shape, generator=rng)
    mel = mel.lerp(smooth(mel), torch.rand((size, 1, 1), generator=rng))  # as an ear's are blurred
    mel = random_room(mel, Room(amount, rng))
    rows = [vocabulary.tokens(*sentences[i]) for i in picks]
    for i in range(size):
        if torch.rand((), generator=rng) < SILENT_SHARE:
            mel[i], rows[i] = silent_clip(rng)[:, :window], vocabulary.no_speech
    return mel, vocabulary.batch(rows)


def train(sentences, clips, vocabulary, args):
    """Plain training; the state is saved every 500 steps and picked up again."""
    torch.manual_seed(args.seed)
    model, first = new_model(vocabulary), 0
    key = fingerprint((sentences, args.seed, BATCH, PHASES))[:8]
    state_path = args.work_dir / f"state_{key}.pt"
    ctc_head = torch.nn.Linear(DIMS.n_audio_state, len(vocabulary.used) + 1)
    muon, adamw = optimizers(model, ctc_head)
    parts = dict(model=model, ctc_head=ctc_head, muon=muon, adamw=adamw)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    bar = tqdm(range(first, LAST_STEP), initial=first, total=LAST_STEP, desc="training")
    for step in bar:
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        corrupt, ctc, most, size = phase_at(step)
        mel, targets = training_batch(sentences, clips, vocabulary, most, BATCH, rng)
        hear = partial(loss_of, model, ctc_head, vocabulary, targets=targets, corrupt=corrupt,
                       rng=rng)
        if size:  # mostly small: real speech must still be read
            size = size * torch.rand((len(mel), 1, 1), generator=rng).square()
            mel = adversary(partial(hear, ctc_weight=0.0), mel, size, rng)
        loss = hear(mel, ctc_weight=ctc)
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *ctc_head.parameters()], 1.0)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate_at(step)
            optimizer.step()
        is_last = step + 1 == LAST_STEP
        if step % 100 == 0 or is_last:
            bar.write(f"step {step:5d}  loss {loss.item():.4f}")
        if (step + 1) % 500 == 0 or is_last:
            state = {name: part.state_dict() for name, part in parts.items()}
            with atomic_write(state_path) as part:
                torch.save({**state, "step": step + 1}, part)
    return model


def save_deflated(checkpoint, path):
    """torch.save, then the same zip with compression: the equal rows shrink to almost nothing."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with (atomic_write(path) as part, zipfile.ZipFile(buffer) as plain,
          zipfile.ZipFile(part, "w") as packed):
        for entry in plain.infolist():
            info = zipfile.ZipInfo(entry.filename)  # a fixed date: same weights, same bytes
            packed.writestr(info, plain.read(entry), zipfile.ZIP_DEFLATED, compresslevel=9)


# ---- check and main --------------------------------------------------------------------------


def save_speech(sentences, clips, path):
    """The spoken test sentences that are shipped: 8-bit log-mel, one after another."""
    language, text = map(np.array, zip(*sentences))
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file, mel=np.concatenate([clip.T for clip in clips]),  # (all frames, n_mels) uint8
            n_frames=np.array([clip.shape[1] for clip in clips]), language=language, text=text)


def check(whisper, sentences, clips):
    """Word error rate (characters in Mandarin) and language identification per language."""
    read, languages = [], []
    for start in tqdm(range(0, len(clips), 50), desc="checking"):
        part, group = sentences[start : start + 50], clips[start : start + 50]
        mels = [mel_from_bytes(clip, 2 * whisper.max_frames) for clip in group]
        features = whisper.features_of_mel(torch.stack(mels))
        read += [t.text for t in whisper.transcribe(features, [s.language for s in part])]
        probabilities = whisper.model.detect_language(features)[1]
        languages += [max(p, key=p.get) for p in probabilities]
    print("| language | sentences | WER | CER | letter by letter | language identified |")
    print("| --- | --- | --- | --- | --- | --- |")
    for language in LANGUAGES:
        items = [i for i, s in enumerate(sentences) if s.language == language]
        rates = error_rates([sentences[i] for i in items], [read[i] for i in items])
        identified = sum(languages[i] == language for i in items) / len(items)
        print(f"| {language} | {len(items)} | {rates.wer:.2%} | {rates.cer:.2%} "
              f"| {rates.exact:.1%} | {identified:.1%} |")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=file_path, default=HERE / "build", help="for shards")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the network alone")
    parser.add_argument("--out", type=file_path, default=POCKET / "pocket.pt")
    args = parser.parse_args()
    need_espeak()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    write_sentences()
    everything = sorted(builtin(), key=lambda s: LANGUAGES.index(s.language))
    training, held_out = data.split(everything)
    vocabulary = Vocabulary(training)
    spoken, clips = [], []
    for take in range(MAX_TAKES):
        part = [s for s in training if takes(s) > take]
        clips += speak_all(part, VARIANTS, take, args.work_dir, f"train{take}")
        spoken += part
    model = train(spoken, clips, vocabulary, args)
    state = {name: x.half() for name, x in vocabulary.expand(model).items()}
    save_deflated({"dims": asdict(DIMS), "model_state_dict": state}, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")

    tests = [s for c in LANGUAGES for s in [s for s in held_out if s.language == c][:N_TEST]]
    whisper = FrozenWhisper(str(args.out))
    for name, variants in (("heard", VARIANTS), ("unheard", HELD_OUT_VARIANTS)):
        clips = speak_all(tests, variants, 0, args.work_dir, f"test_{name}")
        print(f"sentences that are not in the training text, in voices {name} in training:")
        check(whisper, tests, clips)
    if args.out.resolve() == (POCKET / "pocket.pt").resolve():
        shipped = [i for i in range(len(tests)) if i % N_TEST < N_SHIPPED]  # of each language
        save_speech([tests[i] for i in shipped], [clips[i] for i in shipped], SPEECH)
        print(f"{SPEECH}: {SPEECH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    guard(main)
