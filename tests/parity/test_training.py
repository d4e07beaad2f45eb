"""Packing, masks, losses and gradients of the golden training batches."""

import pytest
import torch

from openbagel.attention import Execution, visible
from tests.parity.cases import Batch, padded_pictures, relative_error, special_tokens

TRAINABLE = [Execution.SPLITS, Execution.DENSE]


def losses(batch: Batch, execution: Execution) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.checkpoint.model.losses(
        batch.pack, execution=execution, freeze_und=batch.facts["freeze_und"]
    )


def total(ce: torch.Tensor, mse: torch.Tensor) -> torch.Tensor:
    return ce.mean() + mse.mean(dim=-1).sum() / len(mse)


def test_markers(batch: Batch) -> None:
    assert special_tokens(batch.checkpoint.codec) == batch.facts["special_tokens"]


def test_integers_of_packing(batch: Batch) -> None:
    p, golden = batch.pack, batch.golden
    ours = {
        "position_ids": p.position_ids[torch.argsort(p.logical)],
        "text_ids": p.text_ids,
        "text_indexes": p.logical[p.text_places],
        "vit_indexes": p.logical[p.patch_places],
        "vae_indexes": p.logical[p.num_und :],
        "vit_position_ids": p.patch_position_ids,
        "latent_position_ids": p.latent_position_ids,
        "mse_loss_indexes": p.logical[p.num_und + p.target_places],
        "ce_loss_indexes": p.logical[p.label_places],
        "label_ids": p.labels,
    }
    assert [name for name, value in ours.items() if not torch.equal(value, golden[name])] == []
    assert list(p.lengths) == batch.facts["sample_lens"]


def test_label_weights(batch: Batch) -> None:
    torch.testing.assert_close(batch.pack.label_weights, batch.golden["ce_loss_weights"], rtol=1e-6, atol=0)


def test_masks(batch: Batch) -> None:
    places = torch.argsort(batch.pack.logical).split(list(batch.pack.lengths))
    wrong = [
        i
        for i, q in enumerate(places)
        if not torch.equal(visible(batch.pack, q[:, None], q), batch.golden[f"mask.{i}"])
    ]
    assert wrong == []


def test_latents_of_padded_pictures(batch_with_autoencoder: Batch) -> None:
    batch = batch_with_autoencoder
    autoencoder = batch.checkpoint.autoencoder
    assert autoencoder is not None
    with torch.inference_mode():
        ours = autoencoder.encode(padded_pictures(batch), batch.golden["vae_eps"])
    assert relative_error(ours, batch.golden["padded_latent"]) <= 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("execution", Execution)
def test_losses(batch: Batch, execution: Execution) -> None:
    with torch.no_grad():
        ce, mse = losses(batch, execution)
    assert relative_error(ce, batch.golden["ce"]) <= 1e-5
    assert relative_error(mse, batch.golden["mse"]) <= 1e-5
    assert total(ce, mse).item() == pytest.approx(batch.facts["loss"], rel=1e-5)


@pytest.mark.parametrize("execution", TRAINABLE)
def test_gradients(batch: Batch, execution: Execution) -> None:
    parameters = {n: p for n, p in batch.checkpoint.model.named_parameters() if p.requires_grad}
    golden = batch.facts["grad_norms"]
    assert set(parameters) == set(golden)
    gradients = torch.autograd.grad(
        total(*losses(batch, execution)), list(parameters.values()), allow_unused=True
    )
    ours = {
        name: 0.0 if gradient is None else gradient.norm().item()
        for name, gradient in zip(parameters, gradients, strict=True)
    }
    wrong = [
        f"{name}: {ours[name]}, golden {norm}"
        for name, norm in golden.items()
        if abs(ours[name] - norm) > 1e-4 * abs(norm) + 1e-6
    ]
    assert wrong == []
