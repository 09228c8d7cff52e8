"""Small speech encoders for the lab, trained on the spot on the lab's speech, then frozen.

Two architectures: Whisper's on a log-mel spectrogram, and w2v-BERT's Conformer on stacked filter
banks. Both learn three things at once from the synthesiser's times: which words (CTC), and which
word and which phone at each frame. The heads are dropped; what is saved is a plain encoder.
"""

import io
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jiwer
import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.lab.muon import Muon

Kind = Literal["whisper", "conformer"]
Size = Literal["full", "tiny"]
Progress = Callable[[float, str], None]

FRAME_RATE = 25
"""Output frames a second of either encoder."""
STRIDE = 4
"""10 ms filter-bank frames that make one of the Conformer's inputs."""
NOISY = 0.5
"""Share of training clips whose spectrogram gets a noise floor."""
FRAME_WEIGHT = 0.5
"""Weight of each of the two frame losses beside the CTC loss."""


@dataclass(frozen=True)
class Recipe:
    """How an encoder of one size is made."""

    width: int
    feed_forward: int
    heads: int
    layers: int
    epochs: float
    batch_size: int
    bins: int
    """Mel bins of the Whisper type (the Conformer type takes half, four frames at a time)."""
    rate_vectors: float = 3e-3
    """AdamW's rate, for everything but the layers' matrices."""
    rate_matrices: float = 0.02
    """Muon's rate, for the layers' matrices."""


RECIPES: dict[tuple[Kind, Size], Recipe] = {
    ("whisper", "full"): Recipe(128, 512, 4, 3, epochs=3.5, batch_size=24, bins=80),
    ("conformer", "full"): Recipe(128, 512, 4, 3, epochs=2.5, batch_size=24, bins=80),
    ("whisper", "tiny"): Recipe(48, 96, 2, 2, epochs=5, batch_size=8, bins=80),
    ("conformer", "tiny"): Recipe(48, 96, 2, 2, epochs=5, batch_size=8, bins=80),
}


@dataclass(frozen=True)
class Clip:
    """One utterance as the encoder learns from it."""

    language: str
    text: str
    inputs: Tensor
    """`[time, bins]`."""
    frames: int
    """Output frames."""
    words: list[tuple[str, float, float]]
    phones: list[tuple[str, float, float]]


def build_encoder(
    kind: Kind,
    size: Size,
    seed: int,
    speech: Mapping[str, Path],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train an encoder and write it as a plain Hugging Face folder.

    Args:
        kind: `whisper` or `conformer` (w2v-BERT).
        size: `full` or `tiny`.
        seed: the same seed gives the same bytes.
        speech: the lab's speech data sets by language.
        out: the folder.
        progress: called with the share done (0–1) and a line to show.

    Returns:
        `parameters`, `steps`, `seconds`, and the word error rate in percent of the CTC head on the
        development set by language (`dev_wer`).
    """
    started = time.perf_counter()
    recipe = RECIPES[kind, size]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads would change the bytes
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            extractor = _extractor(kind, recipe)
            progress(0.0, "reading speech")
            train = _clips(kind, extractor, speech, "train")
            dev = _clips(kind, extractor, speech, "dev")
            whole, encoder = _model(kind, recipe)
            learner = Learner(kind, recipe, encoder, train, seed)
            steps = learner.train(progress)
        errors = learner.word_error_rates(dev)
        whole.eval().save_pretrained(out)
        extractor.save_pretrained(out)
    finally:
        torch.set_num_threads(threads)
    return {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 2),
        "dev_wer": errors,
    }


class Learner:
    """An encoder with the heads it is trained through.

    Args:
        kind: of the encoder.
        recipe: sizes and rates.
        encoder: untrained.
        clips: training data; its words and phones are the heads' classes.
        seed: of the order of batches and of the noise.
    """

    def __init__(
        self, kind: Kind, recipe: Recipe, encoder: nn.Module, clips: Sequence[Clip], seed: int
    ) -> None:
        self.kind, self.recipe, self.encoder = kind, recipe, encoder
        self.clips = clips
        self.words = _classes(word for clip in clips for word in clip.text.split())
        self.phones = _classes(phone for clip in clips for phone, _, _ in clip.phones)
        self.heads = nn.ModuleDict(
            {
                "ctc": nn.Linear(recipe.width, len(self.words) + 1),
                "word": nn.Linear(recipe.width, len(self.words) + 1),
                "phone": nn.Linear(recipe.width, len(self.phones) + 1),
            }
        )
        for head in self.heads.values():
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.order = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.word_frames = [_frame_labels(c.words, c.frames, self.words) for c in clips]
        self.phone_frames = [_frame_labels(c.phones, c.frames, self.phones) for c in clips]
        self.targets = [torch.tensor([self.words[w] for w in c.text.split()]) for c in clips]

    def frames(self, inputs: Tensor) -> Tensor:
        """`[batch, time, bins]` to `[batch, frames, width]`, all rows of equal length."""
        if self.kind == "conformer":
            states: Tensor = self.encoder(inputs).last_hidden_state
            return states
        encoder: Any = self.encoder
        states = functional.gelu(encoder.conv1(inputs.transpose(1, 2)))
        states = functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for layer in encoder.layers:
            found = layer(states, None)
            states = found[0] if isinstance(found, tuple) else found
        normed: Tensor = encoder.layer_norm(states)
        return normed

    def train(self, progress: Progress) -> int:
        """Train for the recipe's epochs; returns the steps taken."""
        recipe = self.recipe
        modules = nn.ModuleList([self.encoder, self.heads])
        modules.train()
        parameters = [p for p in modules.parameters() if p.requires_grad]
        matrices = [
            p
            for name, p in self.encoder.named_parameters()
            if p.ndim == 2
            and p.requires_grad
            and "embed_pos" not in name
            and "distance" not in name
        ]
        in_muon = {id(p) for p in matrices}
        muon = Muon(matrices)
        adam = torch.optim.AdamW(
            [p for p in parameters if id(p) not in in_muon],
            lr=recipe.rate_vectors,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        steps = int(recipe.epochs * len(list(self._epoch())))
        for step, indices in enumerate(self._batches(steps)):
            warm = min(1.0, (step + 1) / min(100, steps / 5))
            rate = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            adam.param_groups[0]["lr"] = recipe.rate_vectors * rate
            loss = self._loss(indices)
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            muon.step(recipe.rate_matrices * rate)
            if step % 20 == 0:
                progress(step / steps, f"step {step} of {steps}, loss {loss.item():.2f}")
        modules.eval()
        return steps

    def word_error_rates(self, clips: Sequence[Clip]) -> dict[str, float]:
        """Word error rate in percent of greedy CTC decoding, by language."""
        names = {number: word for word, number in self.words.items()}
        said: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        with torch.inference_mode():
            for clip in clips:
                best = self.heads["ctc"](self.frames(clip.inputs[None]))[0].argmax(-1)
                numbers = torch.unique_consecutive(best).tolist()
                said[clip.language][0].append(clip.text)
                said[clip.language][1].append(" ".join(names[n] for n in numbers if n))
        return {
            language: round(100 * jiwer.wer(references, hypotheses), 2)
            for language, (references, hypotheses) in said.items()
        }

    def _loss(self, indices: Sequence[int]) -> Tensor:
        inputs = self._noised(torch.stack([self.clips[i].inputs for i in indices]))
        states = self.frames(inputs)
        loss = torch.zeros(())
        for head, labels in (("word", self.word_frames), ("phone", self.phone_frames)):
            logits = self.heads[head](states).flatten(0, 1)
            truth = torch.stack([labels[i] for i in indices]).flatten()
            loss = loss + FRAME_WEIGHT * functional.cross_entropy(logits, truth)
        log_probabilities = self.heads["ctc"](states).log_softmax(-1).transpose(0, 1)
        targets = [self.targets[i] for i in indices]
        ctc = functional.ctc_loss(
            log_probabilities,
            torch.cat(targets),
            torch.full((len(indices),), states.shape[1]),
            torch.tensor([len(t) for t in targets]),
            zero_infinity=True,
        )
        return loss + ctc

    def _noised(self, inputs: Tensor) -> Tensor:
        """A noise floor under half of the clips, tilted over the bins, in the log-mel domain.

        Makes unseen voices and real noise less strange; costs nothing beside mixing waveforms.
        """
        batch, time_, bins = inputs.shape
        # Whisper's log-mel is log10 / 4 + 1; the filter banks are natural logarithms, normalised.
        scale = 4 * math.log(10) if self.kind == "whisper" else 1.0
        spread = 1.0 if self.kind == "whisper" else 2.0

        def draw(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=self.noise)

        level = inputs.amax(dim=(1, 2), keepdim=True) - spread * (0.8 + 1.2 * draw(batch, 1, 1))
        tilt = (draw(batch, 1, 1) - 0.7) * (torch.arange(bins) / bins - 0.5) * 0.8
        floor = level + tilt + 0.06 * torch.randn(batch, time_, bins, generator=self.noise)
        mixed = torch.logaddexp(scale * inputs, scale * floor) / scale
        return torch.where(draw(batch, 1, 1) < NOISY, mixed, inputs)

    def _epoch(self) -> Iterator[list[int]]:
        """Batches of clips of equal length, in random order."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, clip in enumerate(self.clips):
            groups[clip.frames].append(index)
        batches = []
        for length in sorted(groups):
            members = groups[length]
            self.order.shuffle(members)
            size = self.recipe.batch_size
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        self.order.shuffle(batches)
        yield from batches

    def _batches(self, count: int) -> Iterator[list[int]]:
        done = 0
        while done < count:
            for batch in self._epoch():
                if done == count:
                    return
                yield batch
                done += 1


def _extractor(kind: Kind, recipe: Recipe) -> Any:
    from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

    if kind == "whisper":
        # Hops of 20 ms in place of Whisper's 10: the same accuracy here at half the cost.
        return WhisperFeatureExtractor(
            feature_size=recipe.bins, hop_length=320, n_fft=400, chunk_length=10
        )
    bins = recipe.bins // 2
    return SeamlessM4TFeatureExtractor(feature_size=bins, num_mel_bins=bins, stride=STRIDE)


def _model(kind: Kind, recipe: Recipe) -> tuple[Any, nn.Module]:
    """The model that is saved, and the encoder inside it that is trained."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel, WhisperConfig, WhisperModel

    if kind == "whisper":
        whisper = WhisperModel(
            WhisperConfig(
                d_model=recipe.width,
                encoder_layers=recipe.layers,
                encoder_attention_heads=recipe.heads,
                encoder_ffn_dim=recipe.feed_forward,
                num_mel_bins=recipe.bins,
                max_source_positions=10 * FRAME_RATE,
                dropout=0.0,
                # Whisper's format wants a decoder: the smallest there is, which nobody runs.
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=16,
                max_target_positions=8,
                vocab_size=8,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
                decoder_start_token_id=0,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
        return whisper, whisper.get_encoder()
    conformer = Wav2Vec2BertModel(
        Wav2Vec2BertConfig(
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.feed_forward,
            feature_projection_input_dim=recipe.bins // 2 * STRIDE,
            conv_depthwise_kernel_size=15,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            conformer_conv_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            position_embeddings_type="relative_key",
            left_max_position_embeddings=16,
            right_max_position_embeddings=8,
        )
    )
    return conformer, conformer


def _clips(kind: Kind, extractor: Any, speech: Mapping[str, Path], split: str) -> list[Clip]:
    clips = []
    for language in sorted(speech):
        for row in pq.read_table(speech[language] / f"{split}.parquet").to_pylist():
            waveform, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            inputs, frames = _inputs(kind, extractor, waveform)
            clips.append(
                Clip(
                    language,
                    row["text"],
                    inputs,
                    frames,
                    [(w["word"], w["start"], w["end"]) for w in row["words"]],
                    [(p["phone"], p["start"], p["end"]) for p in row["phones"]],
                )
            )
    return clips


def _inputs(kind: Kind, extractor: Any, waveform: np.ndarray) -> tuple[Tensor, int]:
    rate = extractor.sampling_rate
    if kind == "whisper":
        samples = rate // FRAME_RATE
        frames = -(-len(waveform) // samples)
        padded = np.pad(waveform, (0, frames * samples - len(waveform)))
        found = extractor(
            padded, sampling_rate=rate, padding=False, truncation=False, return_tensors="np"
        )
        return torch.from_numpy(found["input_features"][0]).T.contiguous(), frames
    found = extractor(waveform, sampling_rate=rate, return_tensors="np", pad_to_multiple_of=STRIDE)
    real = found["attention_mask"][0] > 0
    inputs = torch.from_numpy(found["input_features"][0][real]).contiguous()
    return inputs, len(inputs)


def _classes(names: Iterator[str]) -> dict[str, int]:
    """Class numbers from 1; 0 is CTC's blank, and no word or phone at a frame."""
    return {name: number for number, name in enumerate(sorted(set(names)), 1)}


def _frame_labels(
    spans: Sequence[tuple[str, float, float]], frames: int, classes: Mapping[str, int]
) -> Tensor:
    labels = torch.zeros(frames, dtype=torch.long)
    centres = (torch.arange(frames) + 0.5) / FRAME_RATE
    for name, start, end in spans:
        labels[(centres >= start) & (centres < end)] = classes.get(name, 0)
    return labels
