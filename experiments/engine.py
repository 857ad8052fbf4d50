"""Does another engine read the same? CTranslate2, that of faster-whisper, beside openai-whisper.

    pip install ctranslate2
    python experiments/engine.py out/ckpt.pt --sentences 200
    python experiments/engine.py out/ckpt.pt --recordings FOLDER    # and people

Both have the same weights; its decoder and its search were written by others. It reads features,
and of --latent mel the spectrogram, which its own encoder hears.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from experiments.utterances import human_clips  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.flags import Parser, file_path, positive  # noqa: E402
from speech.ear import Ear  # noqa: E402
from text.error_rates import cer_by_language, edit_distance, error_rates  # noqa: E402
from text.greedy import make_task  # noqa: E402
from text.sources import split_of  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

try:
    import ctranslate2
    from ctranslate2.specs import WhisperSpec
except ImportError:
    ctranslate2 = None


def put(spec, *modules: nn.Module) -> None:
    """Weights and biases of layers side by side, as one."""
    weights = [m.weight.detach() for m in modules]
    biases = [torch.zeros(len(w)) if m.bias is None else m.bias.detach()
              for m, w in zip(modules, weights)]
    name = "gamma" if isinstance(modules[0], nn.LayerNorm) else "weight"
    setattr(spec, name, torch.cat(weights).float().numpy())
    setattr(spec, "beta" if name == "gamma" else "bias", torch.cat(biases).float().numpy())


def put_block(spec, block: nn.Module) -> None:
    """A layer of Whisper's encoder or decoder."""
    a, cross = block.attn, block.cross_attn
    put(spec.self_attention.layer_norm, block.attn_ln)
    put(spec.self_attention.linear[0], a.query, a.key, a.value)
    put(spec.self_attention.linear[1], a.out)
    if cross:
        put(spec.attention.layer_norm, block.cross_attn_ln)
        put(spec.attention.linear[0], cross.query)
        put(spec.attention.linear[1], cross.key, cross.value)
        put(spec.attention.linear[2], cross.out)
    put(spec.ffn.layer_norm, block.mlp_ln)
    put(spec.ffn.linear_0, block.mlp[0])
    put(spec.ffn.linear_1, block.mlp[2])


def convert(whisper: FrozenWhisper, folder: str):
    """The same weights and the same tokens that are never written -> CTranslate2's model."""
    encoder, decoder, d = whisper.model.encoder, whisper.model.decoder, whisper.dims
    spec = WhisperSpec(d.n_audio_layer, d.n_audio_head, d.n_text_layer, d.n_text_head)
    put(spec.encoder.conv1, encoder.conv1)
    put(spec.encoder.conv2, encoder.conv2)
    spec.encoder.position_encodings.encodings = encoder.positional_embedding.numpy()
    put(spec.encoder.layer_norm, encoder.ln_post)
    spec.decoder.embeddings.weight = decoder.token_embedding.weight.numpy()
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    spec.decoder.position_encodings.encodings = decoder.positional_embedding.numpy()
    put(spec.decoder.layer_norm, decoder.ln)
    for layer, block in zip([*spec.encoder.layer, *spec.decoder.layer],
                            [*encoder.blocks, *decoder.blocks]):
        put_block(layer, block)
    tokenizer = whisper.tokenizer("en")
    spec.config.suppress_ids = list(make_task(whisper)._get_suppress_tokens())
    spec.config.suppress_ids_begin = [*tokenizer.encode(" "), tokenizer.eot]
    spec.config.lang_ids = [whisper.language_token(code) for code in whisper.languages]
    spec.config.alignment_heads = [[0, 0]]
    names = {i: name for name, i in tokenizer.special_tokens.items()}  # others stay numbers
    spec.register_vocabulary([names.get(i, str(i)) for i in range(d.n_vocab)])
    spec.validate()
    spec.save(folder)
    return ctranslate2.models.Whisper(folder, compute_type="float32")


def transcribe(model, whisper: FrozenWhisper, trips: list[train.RoundTrip]) -> list[str]:
    """What the other engine reads of round trips, greedy."""
    texts = []
    for trip in trips:
        x = trip.features[None]
        if isinstance(whisper, Ear):
            x = whisper.spectrogram(trip.x1[None], torch.tensor([len(trip.x1)]), whisper.max_frames)
        x = ctranslate2.StorageView.from_array(np.ascontiguousarray(x.float().numpy()))
        result = model.generate(x, [whisper.prompt(trip.sentence.language)], beam_size=1,
                                max_length=whisper.dims.n_text_ctx)[0]
        texts.append(whisper.tokenizer("en").decode(result.sequences_ids[0]).strip())
    return texts


def people(folder: Path, whisper: FrozenWhisper, languages: set[str], n: int) -> list:
    """Round trips without a flow, of up to n clips."""
    trips = []
    for sentence, mel in human_clips(folder, whisper, languages, n):
        x1 = whisper.latents(mel[None])
        # What the other engine is given too: an ear's x1 is coarser than the log-mel.
        features = whisper.features(x1, torch.tensor([x1.shape[1]]))
        read = whisper.transcribe(features, [sentence.language])[0]
        trips.append(train.RoundTrip(sentence, x1[0], features[0], read))
    return trips


def compare(what: str, trips: list, theirs: list[str]) -> None:
    """Print how well both engines read, and whether they read the same."""
    sentences, ours = [trip.sentence for trip in trips], [trip.read.text for trip in trips]
    for name, texts in (("openai-whisper", ours), ("CTranslate2", theirs)):
        each = [f"{code} {cer:.1%}" for code, cer in cer_by_language(sentences, texts).items()]
        print(f"{what}, {name}: CER {error_rates(sentences, texts).cer:.2%} of {len(texts)} "
              f"sentences; {', '.join(each)}")
    same = np.mean([a == b for a, b in zip(ours, theirs)])
    edits = sum(map(edit_distance, ours, theirs)) / max(1, sum(map(len, ours)))
    print(f"letter by letter the same: {same:.1%}; letters that differ: {edits:.2%}")


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=file_path, help="of train.py")
    parser.add_argument("--data", nargs="+", help="of train.py; its held-out part is read")
    parser.add_argument("--sentences", type=positive, default=100)
    parser.add_argument("--recordings", type=file_path, help="a folder with manifest.tsv")
    args = parser.parse_args(argv)
    if not ctranslate2:
        raise BadInput("CTranslate2 is not installed; `pip install ctranslate2`")
    checkpoint = train.load_checkpoint(args.checkpoint)
    model, whisper, durations, speed = sample.load_flow(checkpoint, torch.device("cpu"))
    held_out = split_of(checkpoint["config"], whisper, args.data)[1]
    sentences = data.per_language(held_out, args.sentences)
    trips = list(train.round_trips(model, whisper, sentences,
                                   [durations(s, speed) for s in sentences]))
    with tempfile.TemporaryDirectory() as folder:
        other = convert(whisper, folder)
        compare("the flow", trips, transcribe(other, whisper, trips))
        if args.recordings:
            languages = {s.language for s in sentences}
            clips = people(args.recordings, whisper, languages, args.sentences)
            compare("people", clips, transcribe(other, whisper, clips))


if __name__ == "__main__":
    guard(main)
