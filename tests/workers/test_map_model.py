"""Maps of single models: every kind of model and data a user can name, and what is wrong with it."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_folders import (
    SENTENCES,
    read_rows,
    save_causal_lm,
    save_speechllm,
    write_manifest,
    write_rows,
    write_text,
)
from tiny_released import granite_speech, qwen2_audio, voxtral
from tiny_speechllm import tiny_decoder, tiny_tokenizer

from workers.errors import InvalidInput
from workers.maps import model_map as module
from workers.maps.model_map import MapRequest, conditions_of, map_model
from workers.maps.redundancy import Measure
from workers.model_folder import model_kind, open_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_causal_lm(root / "llama")
    save_causal_lm(root / "short", max_position_embeddings=6)
    save_speechllm(root / "speechllm")
    adapted = get_peft_model(tiny_decoder("llama", 4), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "llama")
    adapted.save_pretrained(root / "adapter")
    return {
        name: open_model(str(root / name)) for name in ("llama", "short", "speechllm", "adapter")
    }


def values_of(result, pool: str = "all", criterion: str = "angular") -> np.ndarray:
    return result.whole.measures[Measure(criterion, pool)].rows


def test_kinds_are_told_apart_by_what_lies_in_the_folder(models):
    assert {name: opened.kind for name, opened in models.items()} == {
        "llama": "causal-lm", "short": "causal-lm", "speechllm": "speechllm", "adapter": "adapter",
    }  # fmt: skip


def test_text_is_read_a_line_a_sample_and_jsonl_the_same(models, tmp_path):
    text = write_text(tmp_path / "lines.txt")
    rows = tmp_path / "lines.jsonl"
    write_rows(rows, [{"text": sentence, "other": 1} for sentence in SENTENCES])
    plain, json_lines = (map_model(models["llama"], MapRequest(text=path)) for path in (text, rows))
    assert plain.samples == len(SENTENCES)
    assert plain.modality == "text"
    assert plain.whole.pools == ("last", "target", "all")
    np.testing.assert_array_equal(values_of(plain), values_of(json_lines))
    few = map_model(models["llama"], MapRequest(text=text, samples=3, batch_size=2))
    assert few.whole.measures[Measure("angular", "all")].ids == ("line 1", "line 3", "line 6")


def test_a_causal_lm_reads_a_manifests_transcripts_in_its_prompts(models, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl")
    result = map_model(models["llama"], MapRequest(manifest=manifest))
    assert result.modality == "text"
    assert result.whole.pools == ("last", "prompt", "target", "all")


def test_a_speechllm_hears_or_reads(models, tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "m.jsonl")
    heard = map_model(models["speechllm"], MapRequest(manifest=manifest))
    assert heard.modality == "speech"
    assert heard.whole.pools == ("last", "prompt", "audio", "target", "all")
    read = map_model(models["speechllm"], MapRequest(manifest=manifest, modality="text"))
    assert read.modality == "text"
    assert "audio" not in read.whole.pools
    translated = map_model(models["speechllm"], MapRequest(manifest=manifest, target_language="de"))
    assert np.abs(values_of(translated) - values_of(heard)).max() > 1e-4
    # Neither the batch nor the window of audio in memory changes anything.
    monkeypatch.setattr(module, "WINDOW", 1)
    again = map_model(models["speechllm"], MapRequest(manifest=manifest, batch_size=3))
    np.testing.assert_allclose(values_of(again), values_of(heard), rtol=0, atol=1e-5)


def test_the_adapter_can_be_left_out(models, tmp_path):
    text = write_text(tmp_path / "lines.txt")
    plain = map_model(models["llama"], MapRequest(text=text))
    adapted = map_model(models["adapter"], MapRequest(text=text))
    without = map_model(models["adapter"], MapRequest(text=text, adapter=False))
    assert np.abs(values_of(adapted) - values_of(plain)).max() > 1e-4
    np.testing.assert_array_equal(values_of(without), values_of(plain))
    before = map_model(models["speechllm"], MapRequest(text=text, adapter=False))
    after = map_model(models["speechllm"], MapRequest(text=text))
    assert np.abs(values_of(before) - values_of(after)).max() > 1e-4
    np.testing.assert_allclose(values_of(before), values_of(plain), rtol=0, atol=1e-6)


def test_damage_stands_beside_the_criteria_or_alone(models, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl")
    request = MapRequest(manifest=manifest, criteria=("angular", "cka"), damage=True, depths=(2,))
    both = map_model(models["speechllm"], request)
    assert both.whole.criteria == ("angular", "cka", "damage")
    assert np.isfinite(both.damage.distances(2, "target", "damage")).all()
    alone = map_model(
        models["speechllm"], MapRequest(manifest=manifest, criteria=(), damage=True, depths=(2,))
    )
    assert alone.measured is None
    np.testing.assert_array_equal(
        values_of(alone, "target", "damage"), values_of(both, "target", "damage")
    )
    assert alone.whole.unpruned_loss.shape == (len(SENTENCES),)


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("llama", {"modality": "speech"}, "no speech to map: the model has no encoder"),
        ("llama", {"adapter": False}, "no adapter to switch off"),
        ("llama", {"depths": (4,)}, r"no block of 4 layers can be removed.*choose 1 to 3"),
        ("llama", {"depths": (0,)}, "no block of 0 layers"),
        ("speechllm", {"language": "xx"}, r"m\.jsonl:1: .*no name is known for the language 'xx'"),
        ("speechllm", {"target_language": "fr"}, r"m\.jsonl:1: .*no translation into fr"),
    ],
)
def test_requests_that_do_not_fit(models, tmp_path, name, request_, message):
    manifest = write_manifest(tmp_path / "m.jsonl")
    with pytest.raises(InvalidInput, match=message):
        map_model(models[name], MapRequest(manifest=manifest, **request_))


def test_text_that_cannot_be_used(models, tmp_path):
    for content, message in (
        (b"", "no text in it"),
        (b"\n \n", "no text in it"),
        (b"the house\n\xff\xfe\n", r"lines\.txt:2: not UTF-8"),
        (b"the red house is the red house and\n", r"txt:1: it takes 8 positions.*holds 6"),
    ):
        file = tmp_path / "lines.txt"
        file.write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            map_model(models["short"], MapRequest(text=file))
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        map_model(models["llama"], MapRequest(text=tmp_path))
    for row, message in (("{", "jsonl:2: not valid JSON"), ({"txt": "a"}, "jsonl:2: no text")):
        file = tmp_path / "lines.jsonl"
        write_rows(file, [{"text": "the house"}, row])
        with pytest.raises(InvalidInput, match=message):
            map_model(models["llama"], MapRequest(text=file))


def bad_manifest(path):
    """Good lines 1 and 10; every other is bad in a way of its own."""
    write_manifest(path)
    rows = read_rows(path)
    (path.parent / "noise.wav").write_text("this is no audio")
    rows[1]["audio_filepath"] = "noise.wav"
    rows[2]["sampling_rate"] = 8000
    rows[3]["offset"] = 60
    del rows[4]["lang"]
    rows[5]["audio_filepath"] = "nowhere.wav"
    rows[6]["text"] = " "
    rows[7] = "not JSON"
    write_rows(path, [*rows, {**rows[0], "id": "m-0.wav:0"}, {**rows[0], "id": "last"}])
    return path


BAD = {
    2: "noise.wav: cannot be read as audio",
    3: "the audio has 16000 Hz, the data say 8000 Hz (mend sampling_rate",
    4: "the clip starts at 60 s, but the audio has 0.4 s",
    5: "no language is named (add lang to the line, or give --language)",
    6: "no audio file",
    7: "no text",
    8: "not valid JSON",
    9: "id 'm-0.wav:0' stands twice",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_stops_the_map_with_its_place(models, tmp_path, line):
    path = bad_manifest(tmp_path / "m.jsonl")
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], *[""] * (line - 2), rows[line - 1]]) + "\n")
    with pytest.raises(InvalidInput) as caught:
        map_model(models["speechllm"], MapRequest(manifest=path))
    assert f"m.jsonl:{line}: " in str(caught.value)
    assert BAD[line] in str(caught.value)


def test_bad_lines_are_left_out_and_listed_in_order(models, tmp_path):
    path = bad_manifest(tmp_path / "m.jsonl")
    result = map_model(models["speechllm"], MapRequest(manifest=path, skip_bad=True, damage=True))
    assert result.samples == 2
    assert len(result.skipped) == len(BAD)
    for (line, problem), told in zip(BAD.items(), result.skipped, strict=True):
        assert f"m.jsonl:{line}: " in told
        assert problem in told
    good = write_manifest(tmp_path / "good.jsonl", count=1)
    write_rows(good, [{**read_rows(good)[0], "audio_filepath": "m-0.wav"}])
    alone = map_model(models["speechllm"], MapRequest(manifest=good))
    np.testing.assert_allclose(values_of(result)[:1], values_of(alone), rtol=0, atol=1e-5)


def test_audio_too_long_for_the_encoder_is_one_bad_line(models, tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "m.jsonl", count=4)
    encoder = models["speechllm"].speechllm.encoder
    monkeypatch.setattr(type(encoder), "limit", 0.31)  # as Whisper's 30 s
    with pytest.raises(InvalidInput, match=r"m\.jsonl:3: .*the encoder takes at most 0\.31 s"):
        map_model(models["speechllm"], MapRequest(manifest=manifest))
    result = map_model(models["speechllm"], MapRequest(manifest=manifest, skip_bad=True))
    assert result.samples == 2
    assert [line.rpartition("m.jsonl:")[2][0] for line in result.skipped] == ["3", "4"]


def test_when_all_are_bad_it_is_an_error_after_all(models, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", sampling_rate=8000)
    with pytest.raises(InvalidInput, match=r"none of the samples can be used: .*m\.jsonl:1: "):
        map_model(models["speechllm"], MapRequest(manifest=manifest, skip_bad=True))
    text = tmp_path / "lines.txt"
    text.write_bytes(b"\xff\n\xfe\n")
    with pytest.raises(InvalidInput, match="no text in it"):
        map_model(models["llama"], MapRequest(text=text, skip_bad=True))


def test_quantised_weights_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        models["llama"].decoder.config, "quantization_config", {"bits": 4}, raising=False
    )
    with pytest.raises(InvalidInput, match=r"quantised.*original precision"):
        map_model(models["llama"], MapRequest(text=write_text(tmp_path / "lines.txt")))


class TestFolders:
    def test_no_model(self, tmp_path):
        with pytest.raises(InvalidInput, match=r"there is none of speechllm\.json"):
            model_kind(str(tmp_path))
        for reference in ("nowhere", "./a/b", str(tmp_path / "gone")):
            with pytest.raises(InvalidInput, match=r"no folder .*name a model folder or a hub id"):
                model_kind(reference)

    def test_an_adapter_of_more_layers_is_never_loaded_shifted(self, tmp_path):
        save_causal_lm(tmp_path / "base", layers=3)
        adapted = get_peft_model(tiny_decoder("llama", 4), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
        with pytest.raises(InvalidInput, match="weights for layer 3, the decoder has 3 layers"):
            open_model(str(tmp_path / "adapter"))
        file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
        with pytest.raises(InvalidInput, match="does not say which model it belongs to"):
            open_model(str(tmp_path / "adapter"))

    def test_damaged_or_incomplete_weights(self, tmp_path):
        folder = save_causal_lm(tmp_path / "model")
        (folder / "model.safetensors").write_bytes(b"rubbish")
        with pytest.raises(InvalidInput, match="the model cannot be opened"):
            open_model(str(folder))
        tiny_decoder("llama", 2).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        tiny_tokenizer().save_pretrained(folder)
        with pytest.raises(InvalidInput, match=r"weights are missing, such as model\.layers\.2"):
            open_model(str(folder))


@pytest.mark.parametrize("kind", [qwen2_audio, voxtral, granite_speech])
def test_released_speechllms_hear_in_their_own_prompts(kind, tmp_path):
    kind(tmp_path / "model")
    manifest = write_manifest(tmp_path / "m.jsonl", count=2)
    request = MapRequest(manifest=manifest, criteria=("angular", "influence"), damage=True)
    opened = open_model(str(tmp_path / "model"), conditions=conditions_of(request))
    assert opened.kind == "released"
    result = map_model(opened, request)
    assert result.modality == "speech"
    assert result.whole.pools == ("last", "prompt", "audio", "target", "all")
    layers = result.whole.layers
    assert len(result.whole.table()) == (2 * 5 + 1) * layers * (layers + 1) // 2
    lines = map_model(opened, MapRequest(text=write_text(tmp_path / "lines.txt")))
    assert lines.modality == "text"
    assert lines.samples == len(SENTENCES)


def test_a_request_says_what_a_model_will_be_asked(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl")
    rows = read_rows(manifest)
    rows[1]["lang"], rows[2] = "de", "not JSON"
    write_rows(manifest, rows)
    labels = [c.label for c in conditions_of(MapRequest(manifest=manifest))]
    assert labels == ["asr-en", "asr-de"]
    chosen = MapRequest(manifest=manifest, language="fr", target_language="en")
    assert [c.label for c in conditions_of(chosen)] == ["ast-fr-en"]
    assert conditions_of(MapRequest(text=tmp_path / "lines.txt")) == []
