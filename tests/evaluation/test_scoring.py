"""Models streamed side by side, against whole models in memory."""

import pytest
import torch

from benchmarks.whole_model import window_losses
from stages.checkpoint.model import load_model
from stages.errors import SparsesweepError
from stages.evaluation.metric import Corpus, window_means
from stages.evaluation.metrics import METRICS
from stages.evaluation.scoring import DENSE, StreamedModels
from stages.streaming.decoder import Decoder
from tests.evaluation import delta as deltas

CPU = torch.device("cpu")


def corpora(*lengths: int) -> list[Corpus]:
    generator = torch.Generator().manual_seed(0)
    return [
        Corpus(name=f"of {length}", windows=torch.randint(3, 400, (3, length), generator=generator), clusters=[0, 1, 2])
        for length in lengths
    ]


def models(base, scratch, **variants) -> StreamedModels:
    return StreamedModels(decoder=Decoder(base, torch.float32, CPU), variants=variants, scratch=scratch)


@pytest.mark.parametrize("at_once", [2**24, 400 * 7])  # all tokens of a window, and seven at a time
def test_losses_are_those_of_whole_models_and_divergence_that_of_their_logits(base, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("stages.evaluation.scoring.LOGITS_AT_ONCE", at_once)
    apply = deltas.write(tmp_path / "sparse", base).apply
    observed = models(base, tmp_path, **{DENSE: None, "sparse": apply}).observe(corpora(40, 24), list(METRICS.values()))
    whole = {name: load_model(base, change, dtype=torch.float32, device=CPU) for name, change in ((DENSE, None), ("sparse", apply))}
    for corpus in corpora(40, 24):
        for name, model in whole.items():
            wanted = [model(window[None], labels=window[None]).loss.item() for window in corpus.windows]
            assert window_means(observed[name][corpus.name]["nll"]) == pytest.approx(wanted, rel=1e-5)
            assert window_losses(model, corpus.windows) == pytest.approx(wanted, rel=1e-5)
        ours, dense = (torch.log_softmax(whole[name](corpus.windows).logits[:, :-1], dim=-1) for name in ("sparse", DENSE))
        wanted = torch.nn.functional.kl_div(ours, dense, reduction="none", log_target=True).sum(dim=-1)
        assert torch.allclose(observed["sparse"][corpus.name]["kld"], wanted, atol=1e-5)
        assert (wanted > 1e-3).any()
        assert "kld" not in observed[DENSE][corpus.name]
        assert torch.allclose(observed["sparse"][corpus.name]["dense_nll"], observed[DENSE][corpus.name]["nll"])


def test_one_model_alone_needs_no_other(base, tmp_path):
    (observed,) = models(base, tmp_path, sparse=None).observe(corpora(24), [METRICS["perplexity"]]).values()
    assert set(observed["of 24"]) == {"nll"}


def test_a_model_does_not_diverge_from_itself(base, tmp_path):
    observed = models(base, tmp_path, **{DENSE: None, "same": None}).observe(corpora(24), list(METRICS.values()))
    assert observed["same"]["of 24"]["kld"].abs().max() < 1e-6


def broken(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, 1e38) if name.endswith("down_proj.weight") else tensor


def test_a_loss_that_is_not_finite_is_refused_and_says_of_which_model_it_is(base, tmp_path):
    with pytest.raises(SparsesweepError, match="block 0: found NaN or infinity") as raised:
        models(base, tmp_path, whole=None, broken=broken).observe(corpora(24), [METRICS["perplexity"]])
    assert raised.value.model == "broken"
