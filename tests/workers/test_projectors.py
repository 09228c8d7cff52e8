import pytest
import torch

from workers.config import ProjectorConfig
from workers.errors import InvalidInput
from workers.projectors import build_projector

KINDS = ["linear", "mlp", "conv", "qformer"]


def build(kind, **changes):
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, stack=3, hidden=8, heads=2, **changes)
    return build_projector(config, encoder_dim=5, decoder_dim=12, embedding_rms=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_changes_an_utterance(kind):
    projector = build(kind)
    short, long = torch.randn(4, 5), torch.randn(11, 5)
    padded = torch.full((2, 14, 5), float("nan"))
    padded[0, :4], padded[1, :11] = short, long
    together, lengths = projector(padded, torch.tensor([4, 11]))
    assert lengths.tolist() == [projector.output_length(4), projector.output_length(11)] == [2, 4]
    for row, frames in enumerate((short, long)):
        alone, _ = projector(frames[None], torch.tensor([len(frames)]))
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], rtol=1e-5, atol=1e-7)
    assert (together[0, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_beside_padding(kind):
    projector = build(kind)
    embeddings, _ = projector(torch.randn(2, 12, 5), torch.tensor([1, 12]))
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_have_the_size_of_the_decoders_own(kind):
    embeddings, _ = build(kind)(torch.randn(1, 300, 5), torch.tensor([300]))
    assert embeddings.dtype == torch.float32
    assert embeddings.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.1)


def test_qformer_gives_its_queries_for_each_window():
    projector = build("qformer", queries=2)
    embeddings, lengths = projector(torch.randn(2, 7, 5), torch.tensor([7, 2]))
    assert embeddings.shape == (2, 6, 12)
    assert lengths.tolist() == [6, 2]
    assert not torch.equal(embeddings[0, 0], embeddings[0, 1])


def test_heads_must_divide_the_width():
    with pytest.raises(InvalidInput, match=r"projector\.heads"):
        build_projector(ProjectorConfig(kind="qformer", hidden=8, heads=3), 5, 12, 1.0)
