"""Speech encoders of several architectures, tiny and random: lengths, independence, saving."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    PreTrainedConfig,
    Qwen2AudioEncoder,
    Qwen2AudioEncoderConfig,
    SeamlessM4TFeatureExtractor,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from workers.audio import read_audio
from workers.encoder import SpeechEncoder
from workers.errors import InvalidInput, NotFinite
from workers.features import Features, write_features

RATE = 16_000
WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
}
LAYER = {**WAVE, "feat_extract_norm": "layer", "conv_bias": True}
GROUP = {**WAVE, "feat_extract_norm": "group", "do_stable_layer_norm": False}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MASKED_WAVE = Wav2Vec2FeatureExtractor(return_attention_mask=True)
PLAIN_WAVE = Wav2Vec2FeatureExtractor()
WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=48,
    max_source_positions=150,
    vocab_size=60,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, object]] = {
    "whisper": (WHISPER, WhisperFeatureExtractor(chunk_length=3)),
    "wav2vec2": (Wav2Vec2Config(**LAYER), MASKED_WAVE),
    "wav2vec2-group": (Wav2Vec2Config(**GROUP), PLAIN_WAVE),
    "hubert": (HubertConfig(**LAYER), MASKED_WAVE),
    "hubert-group": (HubertConfig(**GROUP), PLAIN_WAVE),
    "wavlm": (WavLMConfig(**LAYER), MASKED_WAVE),
    "unispeech-sat": (UniSpeechSatConfig(**LAYER), MASKED_WAVE),
    "data2vec": (Data2VecAudioConfig(**WAVE), MASKED_WAVE),
    "conformer": (Wav2Vec2ConformerConfig(**LAYER), MASKED_WAVE),
    "w2v-bert": (
        Wav2Vec2BertConfig(**BERT, intermediate_size=48, feature_projection_input_dim=160),
        SeamlessM4TFeatureExtractor(),
    ),
    "w2v-bert-adapter": (
        Wav2Vec2BertConfig(
            **BERT, intermediate_size=48, feature_projection_input_dim=160, add_adapter=True
        ),
        SeamlessM4TFeatureExtractor(),
    ),
}
SECONDS = (0.031, 0.5, 0.513, 0.8, 1.37, 1.372, 2.0)


def _speechlike(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    saved = {}
    for name, (config, extractor) in ARCHITECTURES.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        AutoModel.from_config(config).save_pretrained(folder)
        extractor.save_pretrained(folder)
        saved[name] = folder
    return saved


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frames_do_not_depend_on_the_batch_and_last_as_long_as_the_audio(
    folders: dict[str, Path], name: str
) -> None:
    encoder = SpeechEncoder.from_pretrained(folders[name])
    waveforms = [_speechlike(s, i) for i, s in enumerate(SECONDS)]
    together = encoder.encode(waveforms)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    for seconds, waveform, frames in zip(SECONDS, waveforms, together, strict=True):
        alone = encoder.encode([waveform])[0]
        assert frames.shape == alone.shape
        assert torch.allclose(frames, alone, atol=1e-5)
        assert frames.shape[1] == encoder.dim
        # Convolutions without padding eat up to two frames; silence is never added to the result.
        expected = max(seconds, 0.1) * encoder.frame_rate
        assert expected - 2.1 <= len(frames) <= expected + 1
        assert len(frames) >= 1
    assert (together[0] - together[1][: len(together[0])]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm", "w2v-bert"])
def test_frames_equal_those_of_the_plain_model(folders: dict[str, Path], name: str) -> None:
    _, extractor = ARCHITECTURES[name]
    model = AutoModel.from_pretrained(folders[name]).eval()
    waveforms = [_speechlike(s, i) for i, s in enumerate(SECONDS[1:])]
    results = SpeechEncoder.from_pretrained(folders[name]).encode(waveforms)
    for waveform, frames in zip(waveforms, results, strict=True):
        inputs = extractor(waveform, sampling_rate=RATE, return_tensors="pt")  # type: ignore[operator]
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0]
        assert torch.allclose(frames, expected[: len(frames)], atol=1e-4)


def test_whisper_frames_equal_those_of_the_plain_model_on_audio_of_full_length(
    folders: dict[str, Path],
) -> None:
    _, extractor = ARCHITECTURES["whisper"]
    waveform = _speechlike(3.0, 1)
    model = AutoModel.from_pretrained(folders["whisper"]).eval()
    inputs = extractor(waveform, sampling_rate=RATE, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        expected = model.get_encoder()(**inputs).last_hidden_state[0]
    encoder = SpeechEncoder.from_pretrained(folders["whisper"])
    encoder.encode([_speechlike(0.7, 2)])  # leaves the position table as it was
    assert torch.allclose(encoder.encode([waveform])[0], expected, atol=1e-5)


def test_whisper_audio_beyond_the_table_is_refused(folders: dict[str, Path]) -> None:
    encoder = SpeechEncoder.from_pretrained(folders["whisper"])
    assert encoder.limit == 3.0
    with pytest.raises(InvalidInput, match=r"'long one' has 3\.5 s, .* at most 3 s"):
        encoder.encode([_speechlike(3.5, 0)], ["long one"])


def test_an_encoder_inside_a_larger_checkpoint_is_found() -> None:
    torch.manual_seed(0)
    config = Qwen2AudioEncoderConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=80,
        max_source_positions=150,
    )
    encoder = SpeechEncoder(Qwen2AudioEncoder(config), WhisperFeatureExtractor(chunk_length=3))
    long, short = encoder.encode([_speechlike(2.0, 0), _speechlike(1.0, 1)])
    assert (len(long), len(short)) == (50, 25)
    assert torch.allclose(short, encoder.encode([_speechlike(1.0, 1)])[0], atol=1e-5)


@pytest.mark.parametrize("name", ["whisper", "wavlm", "w2v-bert"])
def test_saved_and_opened_again_it_says_the_same(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    encoder = SpeechEncoder.from_pretrained(folders[name])
    encoder.save_pretrained(tmp_path)
    again = SpeechEncoder.from_pretrained(tmp_path)
    waveform = _speechlike(1.1, 3)
    assert torch.equal(again.encode([waveform])[0], encoder.encode([waveform])[0])


@pytest.mark.parametrize("break_it", ["missing folder", "no extractor", "missing weights"])
def test_what_is_no_encoder_is_refused(
    folders: dict[str, Path], tmp_path: Path, break_it: str
) -> None:
    folder = tmp_path / "encoder"
    if break_it != "missing folder":
        SpeechEncoder.from_pretrained(folders["wavlm"]).save_pretrained(folder)
    if break_it == "no extractor":
        (folder / "preprocessor_config.json").unlink()
    if break_it == "missing weights":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["encoder.layers.1.feed_forward.output_dense.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput) as refused:
        SpeechEncoder.from_pretrained(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("shape", [(0,), (2, 800)])
def test_what_is_no_waveform_is_refused(folders: dict[str, Path], shape: tuple[int, ...]) -> None:
    encoder = SpeechEncoder.from_pretrained(folders["wavlm"])
    with pytest.raises(InvalidInput, match="'a' is not a waveform"):
        encoder.encode([np.zeros(shape, np.float32)], ["a"])


def test_features_read_back_what_the_encoder_said(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = SpeechEncoder.from_pretrained(folders["w2v-bert"])
    clips = [(f"clip-{i}", _speechlike(s, i)) for i, s in enumerate(SECONDS)]
    summary = write_features(encoder, iter(clips), tmp_path)
    features = Features(tmp_path)
    expected = dict(zip((i for i, _ in clips), encoder.encode([w for _, w in clips]), strict=True))
    assert list(features) == [i for i, _ in clips]
    assert summary["frames"] == sum(len(f) for f in expected.values())
    assert features.dim == summary["dim"] == encoder.dim
    for name, frames in expected.items():
        assert features[name].dtype == torch.float32
        assert torch.allclose(features[name], frames, atol=2e-3)
    index = pq.read_table(tmp_path / "index.parquet")
    assert index.schema.field("id").type == pa.string()
    assert index["seconds"].to_pylist() == pytest.approx(SECONDS, abs=1e-4)
    with pytest.raises(InvalidInput, match="'clip-99' was not encoded"):
        features["clip-99"]


def test_features_refuse_an_id_that_stands_twice_and_nothing_at_all(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = SpeechEncoder.from_pretrained(folders["w2v-bert"])
    clip = _speechlike(0.5, 0)
    with pytest.raises(InvalidInput, match="'a' stands twice"):
        write_features(encoder, [("a", clip), ("a", clip)], tmp_path)
    with pytest.raises(InvalidInput, match="no utterances"):
        write_features(encoder, [], tmp_path)
    with pytest.raises(InvalidInput, match="no features can be read"):
        Features(tmp_path)


def test_features_that_do_not_fit_their_precision_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = SpeechEncoder.from_pretrained(folders["w2v-bert"])
    with torch.no_grad():
        for weights in encoder.model.encoder.layers[-1].final_layer_norm.parameters():
            weights.fill_(1e6)
    with pytest.raises(NotFinite, match="'a' is not finite in float16"):
        write_features(encoder, [("a", _speechlike(0.5, 0))], tmp_path)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_audio_of_any_rate_is_the_same_tone(rate: int) -> None:
    samples = read_audio(_wav(_tone(rate), rate), RATE)
    assert samples.dtype == np.float32
    assert abs(len(samples) - RATE) <= 1
    expected = _tone(RATE)[: len(samples)]
    assert np.abs(samples - expected)[400:-400].max() < 0.01


def test_channels_are_mixed_down() -> None:
    left = _tone(RATE)
    mixed = read_audio(_wav(np.stack([left, np.zeros_like(left)], 1), RATE), RATE)
    assert np.allclose(mixed, left / 2, atol=1e-6)


def test_a_clip_is_cut_out_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, _tone(RATE, 3.0), RATE)
    clip = read_audio(path, RATE, offset=1.25, duration=0.5)
    assert np.allclose(clip, _tone(RATE, 3.0)[20_000:28_000], atol=1e-4)
    assert len(read_audio(path, RATE, offset=2.5, duration=9.0)) == 8_000


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (b"this is no audio at all", {}, "cannot be read as audio"),
        (b"", {}, "cannot be read as audio"),
        (_wav(_tone(RATE), RATE), {"offset": 1.5}, r"starts at 1\.5 s, but the audio has 1 s"),
        (_wav(_tone(RATE), RATE), {"offset": -1.0}, "no clip from -1"),
        (_wav(np.full(800, np.nan), RATE), {}, "not finite"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, content: bytes, options: dict[str, float], problem: str
) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=problem) as refused:
        read_audio(path, RATE, **options)
    assert "bad.wav" in str(refused.value)
    with pytest.raises(InvalidInput, match=problem):
        read_audio(content, RATE, **options)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.wav: cannot be read"):
        read_audio(tmp_path / "nowhere.wav", RATE)
