"""The gate notices every way in which a saved folder is not the model that was cut."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import LAYERS, tiny_lm, token_ids

from workers.errors import InvalidInput
from workers.surgery.cut import remove_layers
from workers.surgery.decoder_parts import decoder_layers
from workers.surgery.gate import reload_gate, save_pruned


class TestGate:
    @pytest.fixture
    def saved(self, tmp_path):
        model = tiny_lm("llama")
        remove_layers(model, [2])
        save_pruned(model, None, tmp_path / "cut")
        return model, tmp_path / "cut"

    def refuse(self, saved, match, model=None):
        with pytest.raises(InvalidInput, match=match) as caught:
            reload_gate(model or saved[0], saved[1], {"input_ids": token_ids()})
        return caught.value

    def test_padded_batches_pass(self, saved):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        reload_gate(*saved, {"input_ids": token_ids(), "attention_mask": mask})

    def test_layers_added_by_a_stale_count(self, saved):
        self.edit_config(saved[1], num_hidden_layers=LAYERS)
        assert str(saved[1]) in str(self.refuse(saved, "missing keys: model.layers.5"))

    def test_layers_left_over(self, saved):
        self.edit_config(saved[1], num_hidden_layers=4)
        self.refuse(saved, "unexpected keys: model.layers.4")

    def test_changed_weights(self, saved):
        file = saved[1] / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, file, metadata={"format": "pt"})
        self.refuse(saved, "logits differ by up to")

    def test_stale_layer_numbers(self, saved):
        for index, layer in enumerate(decoder_layers(saved[0])):
            layer.self_attn.layer_idx = max(index - 1, 0)
        self.refuse(saved, "model in memory decodes differently with the cache")

    def test_layer_numbers_beyond_the_cache(self, saved):
        decoder_layers(saved[0])[4].self_attn.layer_idx = 7
        assert str(saved[1]) in str(self.refuse(saved, "decoding with the cache fails"))

    def test_not_a_model(self, saved):
        shutil.rmtree(saved[1])
        self.refuse(saved, "does not open")

    def test_a_folder_in_use_is_not_overwritten(self, saved):
        with pytest.raises(InvalidInput, match="not empty"):
            save_pruned(*[saved[0], None, saved[1]])

    @staticmethod
    def edit_config(folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
