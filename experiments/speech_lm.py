"""The end use: a language model learns tokens -> text from synthetic speech, and hears real one.

    python experiments/tokens.py espeak --out out/tokens                     # its quantiser
    python experiments/speech_lm.py espeak out/mel/ckpt.pt out/ckpt.pt       # a row for each
    python experiments/speech_lm.py espeak out/tiny/ckpt.pt --whisper tiny.en --recordings human \
        --quantiser out/tokens_tiny/quantiser.pt

A decoder-only transformer reads the sound tokens of an utterance, then writes its text, letter by
letter. It learns from one kind of speech, and is tested on sentences that nothing was trained on,
of espeak-ng in unheard voices, or of people (--recordings): character error rate, greedy; and
perplexity of their tokens, which says how likely a model of synthetic ones finds them. All rows
have one quantiser. So small a model learns where to look only with CTC over the sound
as a second loss, as in hybrid recognisers (Watanabe et al. 2017, 10.1109/JSTSP.2017.2763455); it
writes without it.

B batch, L positions of a sequence, D width, H heads, V tokens of sound, marks and letters.
"""
import math
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from experiments.student import (  # noqa: E402
    Speech, edit_distance, letters, others, resample, update,
)
from experiments.tokens import (  # noqa: E402
    N_CODES, Quantiser, load_quantiser, note_unheard, tokenise,
)
from experiments.utterances import open_source, people, real_test, speak  # noqa: E402
from model import mlp, rotate, rotations  # noqa: E402
from plumbing.errors import guard  # noqa: E402
from plumbing.flags import Parser, file_path, positive, seed_number  # noqa: E402
from sample import Flow  # noqa: E402
from text.sources import load_sentences  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

TEXT, END = N_CODES, N_CODES + 1  # marks behind the sound tokens; letters follow
MAX_LETTERS = 120  # or as many as there are sounds
RATE = 3e-3  # of learning, at its peak


class Block(nn.Module):
    """Causal attention and MLP, with layer norms before them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, x: Tensor, turns: Tensor, cache: list | None = None) -> Tensor:
        """(B, L, D), (2, L, D / (2H)) -> (B, L, D). cache: keys and values of what came before."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], turns)
        v, is_causal = qkv[2], x.shape[1] > 1
        if cache is not None:
            cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))] or [k, v]
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SpeechLM(nn.Module):
    """Tokens -> logits of the next one."""

    def __init__(self, n_tokens: int, width: int = 128, depth: int = 4):
        super().__init__()
        self.width, self.heads = width, width // 32
        self.embedding = nn.Embedding(n_tokens, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, self.heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.ctc = nn.Linear(width, n_tokens - END)  # END is its blank

    def states(self, tokens: Tensor, first: int = 0, caches: list | None = None) -> Tensor:
        """(B, L) -> (B, L, D); with caches tokens go on at position `first`."""
        x = F.dropout(self.embedding(tokens), 0.1, self.training)
        turns = rotations(first + tokens.shape[1], self.width // self.heads, x.device)[:, first:]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, turns, cache)
        return self.norm(x)

    def forward(self, *args) -> Tensor:
        """As `states` -> (B, L, V)."""
        return self.states(*args) @ self.embedding.weight.T


def sequences(sounds: list[list[int]], texts: list[str], alphabet: dict) -> list[Tensor]:
    """Sound tokens, TEXT, letters, END of each utterance (L,)."""
    return [torch.tensor([*sound, TEXT, *(alphabet[c] for c in text if c in alphabet), END])
            for sound, text in zip(sounds, texts)]


def losses(model: SpeechLM, items: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of all sound tokens and of all letters, CTC of the letters: nats per token."""
    tokens = pad_sequence(items, True, padding_value=-1)
    targets = tokens[:, 1:]
    x = model.states(tokens[:, :-1].clamp(min=0))
    nll = F.cross_entropy((x @ model.embedding.weight.T).mT, targets.clamp(min=0), reduction="none")
    is_sound, is_text = (targets >= 0) & (targets < TEXT), targets > TEXT
    log_probs = model.ctc(x).log_softmax(2).transpose(0, 1)
    ctc = F.ctc_loss(log_probs, targets[targets > END] - END, is_sound.sum(1) + 1,
                     (targets > END).sum(1), zero_infinity=True)
    return nll[is_sound].mean(), nll[is_text].mean(), ctc


def uneven(x: Tensor, rng: torch.Generator) -> Tensor:
    """(T, C) at another pace, which makes other tokens of it."""
    pace = 0.8 + 0.4 * torch.rand((), generator=rng)
    return resample(x, torch.linspace(0, len(x) - 1, max(2, round(len(x) * pace.item()))))


def train_model(sounds: list[list[list[int]]], texts: list[str], alphabet: dict, codes: Tensor,
                steps: int, seed: int) -> SpeechLM:
    """Learns from versions of the utterances, sounds[version][utterance]."""
    torch.manual_seed(seed)
    model = SpeechLM(END + 1 + len(alphabet)).train()
    with torch.no_grad():  # sounds that are alike begin alike
        projection = 0.02 * torch.randn(codes.shape[1], model.width)
        model.embedding.weight[:N_CODES] = codes @ projection
    versions = [sequences(version, texts, alphabet) for version in sounds]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.98), weight_decay=0.1)
    lengths = torch.tensor([float(len(x)) for x in versions[0]])
    sums = torch.ones(len(lengths), dtype=torch.double).cumsum(0)  # all are drawn equally often
    for step in (bar := tqdm(range(steps), "language model")):
        picks = data.draw_similar(sums, lengths, 24, data.generator(seed, step))
        items = [versions[(step + i) % len(versions)][i] for i in picks]
        sound, text, ctc = losses(model, items)
        update(model, optimizer, text + 0.3 * sound + ctc,
               RATE * min(1, step / 100, 1.05 - step / steps))
        bar.set_postfix(sound=f"{sound.item():.2f}", text=f"{text.item():.2f}",
                        ctc=f"{ctc.item():.2f}")
    return model.eval()


@torch.no_grad()
def write_text(model: SpeechLM, sound: list[int], letter_of: dict) -> str:
    """What the model writes for an utterance, greedy."""
    caches = [[] for _ in model.blocks]
    tokens, written = torch.tensor([[*sound, TEXT]]), []
    for first in range(len(sound) + 1, len(sound) + 1 + max(MAX_LETTERS, len(sound))):
        logits = model(tokens, first - tokens.shape[1], caches)[0, -1]
        tokens = logits[END:].argmax().view(1, 1) + END  # no sound, no second TEXT
        if tokens.item() == END:
            break
        written.append(letter_of[tokens.item()])
    return "".join(written)


@torch.no_grad()
def test(model: SpeechLM, sounds: list[list[int]], texts: list[str],
         alphabet: dict) -> tuple[float, float]:
    """Character error rate, and perplexity of the sound tokens."""
    letter_of = {i: c for c, i in alphabet.items()}
    edits = sum(edit_distance(text, write_text(model, sound, letter_of))
                for sound, text in zip(sounds, texts))
    pairs = [(losses(model, [x])[0].item(), len(sound) - 1)
             for x, sound in zip(sequences(sounds, texts, alphabet), sounds) if len(sound) > 1]
    nll = sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)
    return edits / sum(map(len, texts)), math.exp(nll)


def versions_of(flow: Flow | None, sentences: list, quantiser: Quantiser,
                whisper: FrozenWhisper, work: Path) -> list[list[list[int]]]:
    """Tokens of a source, plain and in other voices, each also at other paces."""
    sounds, rng = [], data.generator(0, 0)
    for seed, amount in (0, 0.0), (20, 1.0):
        speech = speak(flow, sentences, whisper, work, seed, amount)
        for x1 in (speech.x1, [uneven(x, rng) for x in speech.x1]):
            sounds.append(tokenise(quantiser, Speech(sentences, x1), whisper))
    return sounds


def parse_args(argv=None) -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("sources", nargs="+", help="espeak, or checkpoints of train.py: a row each")
    add("--quantiser", type=file_path, default=Path("out/tokens/quantiser.pt"),
        help="of experiments/tokens.py")
    add("--whisper", default="pocket", help="whose features they are")
    add("--data", nargs="+", default=["builtin"], help="of train.py")
    add("--recordings", type=file_path, help="a folder, to test on (default: pocket's test)")
    add("--languages", nargs="+", help="of sentences and test (default: all); one learns faster")
    add("--sentences", type=positive, default=2000, help="that a model learns from")
    add("--steps", type=positive, default=1500)
    add("--seed", type=seed_number, default=0)
    add("--chance", action="store_true", help="a row more: the first source with other texts")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    whisper = FrozenWhisper(args.whisper)
    quantiser = load_quantiser(args.quantiser, whisper)
    codes = [whisper.check_language(code) for code in args.languages or whisper.languages]
    training = data.split([s for s in load_sentences(args.data, whisper)
                           if s.language in codes])[0]
    sentences = data.per_language(sorted(training, key=data.hash_share), args.sentences)
    texts = [letters(s) for s in sentences]
    alphabet = {c: END + 1 + i for i, c in enumerate(sorted(set("".join(map(letters, training)))))}
    known, codes = {*map(letters, training)}, sorted({s.language for s in sentences})
    real = (people(args.recordings, {*codes}, known, whisper)
            if args.recordings else real_test(whisper, codes, known))
    flows = {source: open_source(source, sentences, whisper) for source in args.sources}
    note_unheard(quantiser, sentences)
    real_tokens, work = tokenise(quantiser, real, whisper), args.quantiser.parent / "speech"
    print("| a language model of | CER on this test | on what it learned from | perplexity "
          "of its tokens | of its own |\n| --- | --- | --- | --- | --- |", flush=True)
    rows = [(source, source, texts) for source in args.sources]
    if args.chance:
        rows.insert(1, (args.sources[0], f"{args.sources[0]}, with other texts",
                        [letters(s) for s in others(sentences)]))
    for source, name, texts in rows:
        if name == source:  # the row of other texts has the sounds of the row before
            sounds = versions_of(flows[source], sentences, quantiser, whisper, work)
        model = train_model(sounds, texts, alphabet, quantiser.codes, args.steps, args.seed)
        cer, perplexity = test(model, real_tokens, [letters(s) for s in real.sentences], alphabet)
        every = max(1, len(texts) // 100)  # of all languages
        own, own_perplexity = test(model, sounds[0][::every], texts[::every], alphabet)
        print(f"| {name} | {cer:.1%} | {own:.1%} | {perplexity:.1f} | {own_perplexity:.1f} |",
              flush=True)


if __name__ == "__main__":
    guard(main)
