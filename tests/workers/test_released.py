"""Released SpeechLLMs: what we make of their parts hears and answers as they do themselves."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from peft.tuners.lora import LoraLayer
from tiny_released import (
    ASR,
    CLIPS,
    FAMILIES,
    LAYERS,
    MAIN,
    RATE,
    TEXTS,
    made_when_asked_for,
    original,
    original_inputs,
    voice,
)

from workers.batches import Example, collate, encode
from workers.config import (
    Condition,
    DecodeSettings,
    PromptSettings,
)
from workers.decoding import end_tokens, greedy
from workers.encoder import SHORTEST
from workers.errors import InvalidInput
from workers.model_folder import model_kind, open_model
from workers.released import is_released
from workers.released.audio import OwnEncoder
from workers.released.logmel import LogMelExtractor
from workers.released.model import open_released
from workers.speechllm import SpeechLLM
from workers.surgery.cut import pruned
from workers.surgery.decoder_parts import unique_parameters
from workers.training import logits_at

AST = Condition(task="ast", source_language="de", target_language="en")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_when_asked_for(tmp_path_factory)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def opened(folder, **options):
    return open_released(str(folder), dtype=torch.float32, **options)


def examples(encoder, condition=ASR, clips=CLIPS):
    frames = encoder.encode(list(clips.values()))
    return [
        Example(
            id=name,
            condition=condition,
            frames=own,
            source_text=TEXTS[name],
            target_text=TEXTS[name],
            duration=len(waveform) / RATE,
        )
        for (name, waveform), own in zip(clips.items(), frames, strict=True)
    ]


# --- hearing and answering as the original does ---------------------------------------------------


@pytest.mark.parametrize("condition", [ASR, AST], ids=lambda c: c.label)
def test_logits_of_the_answer_are_the_originals(folders, family, condition):
    model = (released := opened(folders(family))).speechllm([ASR, AST])
    batch = examples(released.encoder, condition)
    inputs = collate(model, encode(model, batch), "right")
    with torch.no_grad():
        ours = logits_at(model, inputs, inputs.labels != -100).split(
            [len(model.tokenizer(e.target_text)["input_ids"]) + 1 for e in batch]
        )
    theirs, processor = original(folders(family))
    prompt = model.config.prompts.conditions[condition.label].text
    # transformers leaves this division of Granite's out of Granite-Speech: see `as_causal_lm`.
    scale = getattr(theirs.config.get_text_config(), "logits_scaling", 1.0)
    for example, logits in zip(batch, ours, strict=True):
        answer = model.tokenizer(example.target_text)["input_ids"]
        given = original_inputs(processor, prompt, CLIPS[example.id], answer)
        with torch.no_grad():
            expected = theirs(**given).logits[0, -len(answer) - 1 :] / scale
        assert (logits - expected).abs().max() <= 1e-4
        assert expected.std() > 0.05, "a test on flat logits would show nothing"
        heard = int((given["input_ids"] == theirs.config.audio_token_id).sum())
        assert heard == model.projector.output_length(len(example.frames))


def test_the_audio_matters(folders, family):
    """Or the test above would pass without any audio."""
    model = (released := opened(folders(family))).speechllm([ASR])
    batch = examples(released.encoder, clips={"a": CLIPS["a"]})
    other = released.encoder.encode([voice(0.6, seed=7)])[0]
    changed = Example(**{**vars(batch[0]), "frames": other})
    with torch.no_grad():
        inputs = [collate(model, encode(model, [e]), "right") for e in (batch[0], changed)]
        one, two = [logits_at(model, i, i.labels != -100) for i in inputs]
    assert (one - two).abs().max() > 1e-2


def test_greedy_decoding_writes_what_generate_writes(folders, family):
    model = (released := opened(folders(family))).speechllm([ASR])
    settings = DecodeSettings(tokens_per_second=1, extra_tokens=10)
    ours = greedy(model, examples(released.encoder), settings)
    theirs, processor = original(folders(family))
    prompt = model.config.prompts.conditions["asr-en"].text
    for hypothesis, waveform in zip(ours, CLIPS.values(), strict=True):
        given = original_inputs(processor, prompt, waveform)
        with torch.no_grad():
            written = theirs.generate(**given, max_new_tokens=10, do_sample=False)
        new = written[0, given["input_ids"].shape[1] :].tolist()
        ends = {0, 2} & {*np.ravel(theirs.generation_config.eos_token_id)}
        expected = [token for token in new if token not in ends]
        assert list(hypothesis.tokens[: len(expected)]) == expected
        assert len(expected) > 1


def test_an_utterances_frames_are_its_own(folders, family):
    encoder = opened(folders(family)).encoder
    together = encoder.encode(list(CLIPS.values()))
    for waveform, frames in zip(CLIPS.values(), together, strict=True):
        assert torch.equal(encoder.encode([waveform])[0], frames)


# --- the parts --------------------------------------------------------------------------------------


def test_no_weight_of_the_language_model_is_copied(folders, family):
    released = opened(folders(family))
    whole = released.encoder.model
    language = {id(p) for p in released.encoder.parts.language.parameters()}
    assert language <= {id(p) for p in released.decoder.parameters()}
    assert {id(p) for p in released.decoder.parameters()} <= {id(p) for p in whole.parameters()}
    assert unique_parameters(released.decoder)[0] == sum(
        p.numel() for p in {id(p): p for p in released.decoder.parameters()}.values()
    )
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert released.decoder.config.tie_word_embeddings == tied
    assert tied or not family.startswith("granite")


def test_a_block_comes_out_and_goes_back(folders, family):
    model = (released := opened(folders(family))).speechllm([ASR])
    batch = examples(released.encoder)
    before = {k: v.clone() for k, v in released.decoder.state_dict().items()}
    whole = greedy(model, batch, DecodeSettings())
    with pruned(model.decoder, [1, 2]):
        assert model.layer_count == LAYERS - 2
        assert len(greedy(model, batch, DecodeSettings())) == len(batch)
    assert greedy(model, batch, DecodeSettings()) == whole
    after = released.decoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_granites_own_adapter_counts_for_audio_and_not_for_text(folders):
    folder = folders("granite-speech-lora")
    theirs, _ = original(folder)
    ids = torch.arange(4, 16)[None]
    scale = theirs.config.get_text_config().logits_scaling
    with torch.no_grad():
        theirs.disable_adapters()
        plain = theirs(input_ids=ids).logits / scale
        theirs.enable_adapters()
        adapted = theirs(input_ids=ids).logits / scale
        for own_adapter, expected in ((True, adapted), (False, plain)):
            decoder = opened(folder, own_adapter=own_adapter).decoder
            assert not any(isinstance(m, LoraLayer) for m in decoder.modules())
            assert (decoder(input_ids=ids).logits - expected).abs().max() <= 1e-4
    assert (adapted - plain).abs().max() > 0.1


def test_a_missing_adapter_is_told(folders, tmp_path):
    folder = shutil.copytree(folders("granite-speech-lora"), tmp_path / "m")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InvalidInput, match="has_lora_adapter"):
        opened(folder)


def test_a_configuration_tells_what_a_folder_is(folders, family):
    assert is_released(json.loads((folders(family) / "config.json").read_text()))


@pytest.mark.parametrize(
    "config",
    [hf.LlamaConfig(), hf.Gemma3Config(), hf.WhisperConfig(), hf.Gemma3nConfig()],
    ids=lambda c: c.model_type,
)
def test_other_models_are_not_taken_for_released_speechllms(config):
    assert not is_released(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot be opened"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be opened"),
        (lambda f: (f / "processor_config.json").unlink(), "cannot be opened"),
        (lambda f: retype(f, "llama"), "cannot be opened|no model of the type 'llama'"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folders, tmp_path, change, message):
    folder = shutil.copytree(folders("qwen2-audio"), tmp_path / "m")
    change(folder)
    with pytest.raises(InvalidInput, match=message):
        opened(folder)


def retype(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))


# --- audio ----------------------------------------------------------------------------------------


def test_audio_that_a_processor_would_cut_off_is_refused(folders):
    encoder = opened(folders("qwen2-audio")).encoder
    with pytest.raises(InvalidInput, match=r"'long' has 2\.5 s, the model takes at most 2 s"):
        encoder.encode([voice(2.5)], ["long"])
    chunked = opened(folders("audioflamingo3")).encoder
    assert len(chunked.encode([voice(2.5)])[0]) > len(chunked.encode([voice(2.0)])[0])


@pytest.mark.parametrize(
    "change", [lambda found: 2 * found, lambda found: found + 1], ids=["scaled", "shifted"]
)
def test_a_model_that_does_more_to_its_audio_is_refused(folders, change):
    encoder = opened(folders("granite-speech")).encoder
    joint, as_it_is = encoder.parts.joint, encoder.parts.joint.get_audio_features

    @functools.wraps(as_it_is)
    def more(**inputs):
        found = as_it_is(**inputs)
        found.pooler_output = change(found.pooler_output)
        return found

    joint.get_audio_features = more
    with pytest.raises(InvalidInput, match="does more than put its projector's output"):
        encoder.encode([CLIPS["a"]])


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.zeros((2, 8), np.float32)])
def test_what_is_no_waveform_is_refused(folders, waveform):
    encoder = opened(folders("qwen2-audio")).encoder
    with pytest.raises(InvalidInput, match="'bad' is not a waveform of one channel"):
        encoder.encode([waveform], ["bad"])


def test_the_shortest_audio_is_heard(folders, family):
    model = opened(folders(family)).encoder
    assert len(model.encode([voice(SHORTEST / 10)])[0]) > 0


def test_log_mel_features_are_the_spectrogram_they_are_said_to_be():
    """Against the definition, summed up in float64: HTK triangles on the power of a Hann window."""
    waveform = np.concatenate([voice(0.2), np.zeros(1600)])  # silence meets the floor
    found = LogMelExtractor(n_mels=8)(waveform.astype(np.float32))
    padded = np.pad(waveform, 256, mode="reflect")
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 56)
    count = len(waveform) // 160 + 1
    power = np.stack(
        [np.abs(np.fft.rfft(padded[160 * i : 160 * i + 512] * window)) ** 2 for i in range(count)]
    )
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 10) / 2595) - 1)
    hertz = np.linspace(0, 8000, 257)
    rising = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    mel = np.log10(np.maximum(power @ np.maximum(0, np.minimum(rising, falling)), 1e-10))
    mel = np.maximum(mel, mel.max() - 8) / 4 + 1
    expected = mel[: count // 2 * 2].reshape(-1, 16)
    assert found["input_features"].shape == (1, *expected.shape)
    assert np.abs(found["input_features"][0].numpy() - expected).max() < 1e-4


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_of_the_users_goes_through_the_models_own_template(folders):
    settings = PromptSettings(asr="Write what {source} says: {audio}", target_prefix="Text: ")
    prompts = {
        family: opened(folders(family)).prompts(settings, [ASR]).conditions["asr-en"]
        for family in MAIN
    }
    assert prompts["voxtral"].text == "<s>[INST]Write what English says:[BEGIN_AUDIO]{audio}[/INST]"
    assert "user<|end_of_role|>Write what English says: {audio}<" in prompts["granite-speech"].text
    assert "Write what English says:Audio 1: <|audio_bos|>{audio}<" in prompts["qwen2-audio"].text
    assert {prompt.target_prefix for prompt in prompts.values()} == {"Text: "}


def test_an_answer_ends_as_a_turn_does(folders):
    """Qwen2-Audio's tokenizer names the end of a document, its chats end turns."""
    model = (released := opened(folders("qwen2-audio"))).speechllm([ASR])
    item = encode(model, examples(released.encoder))[0]
    assert model.tokenizer.decode([item.next_ids[-1]]) == "<|im_end|>"


def test_answers_end_where_the_models_generation_settings_say(folders):
    model = opened(folders("qwen2-audio")).speechllm([ASR])
    assert end_tokens(model) == {0, 2}


def test_a_condition_without_a_prompt_is_named(folders):
    model = (released := opened(folders("qwen2-audio"))).speechllm([ASR])
    with pytest.raises(InvalidInput, match=r"no prompt for ast-de-en.*asr-en"):
        encode(model, examples(released.encoder, AST))


def test_a_template_that_cannot_hold_audio_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders("voxtral"), tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(InvalidInput, match="chat template cannot be filled in"):
        opened(folder).speechllm([ASR])


# --- folders --------------------------------------------------------------------------------------


def test_a_whole_model_is_saved_and_opened_again(folders, family, tmp_path):
    model = (released := opened(folders(family))).speechllm([ASR])
    with torch.no_grad():
        for part in ("decoder", "projector"):
            for parameter in model.parameters_of(part):
                parameter.add_(0.05)
    with pruned(model.decoder, [1]):
        model.save_pretrained(tmp_path)
        expected = greedy(model, examples(released.encoder), DecodeSettings())
    again = SpeechLLM.from_pretrained(tmp_path)
    assert again.layer_count == LAYERS - 1
    assert again.config == model.config
    for own, theirs in zip(
        again.encoder.encode(list(CLIPS.values())),
        released.encoder.encode(list(CLIPS.values())),
        strict=True,
    ):
        assert torch.equal(own, theirs)
    assert greedy(again, examples(again.encoder), DecodeSettings()) == expected
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert plain.config.num_hidden_layers == LAYERS - 1
    on_disk = sum(f.stat().st_size for f in (tmp_path / "encoder").glob("*.safetensors"))
    tower = sum(p.numel() * 4 for p in released.encoder.parts.tower.parameters())
    assert on_disk < 1.5 * tower + 10_000, "the encoder's folder holds no language model"


@pytest.mark.parametrize("file", ["encoder.safetensors", "config.json", "tokenizer.json"])
def test_an_encoders_folder_that_is_damaged_is_refused(folders, tmp_path, file):
    opened(folders("qwen2-audio")).encoder.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InvalidInput, match="encoder cannot be read"):
        OwnEncoder.from_pretrained(tmp_path)


# --- as a MODEL of the commands -------------------------------------------------------------------


@pytest.mark.parametrize("family", MAIN)
def test_a_released_model_opens_by_its_reference(folders, family):
    found = open_model(str(folders(family)), conditions=[ASR])
    assert found.kind == "released"
    assert found.speechllm.config.prompts.conditions.keys() == {"asr-en"}
    assert found.speechllm.layer_count == LAYERS


def test_an_adapter_beside_it_does_not_hide_what_a_model_is(folders):
    assert model_kind(str(folders("granite-speech-lora"))) == "released"
