"""What each variant builds, what learns, and how training starts."""

import random

import pytest
import torch

from openbagel.attention import Execution
from openbagel.config import Experts, ViTConfig
from openbagel.images import sincos_table
from openbagel.model.bagel import BagelModel
from openbagel.model.transformer import Route
from openbagel.sequence import Segment, Text, VaeImage
from tests import tiny

EVERYTHING = [
    [segment for kind in tiny.KINDS for segment in tiny.segments(random.Random(7), 2, (kind,))],
    [Text((5, 6, 7), loss=True)],
]
UND_ONLY = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder", "lm_head")
"""Parts of names that freezing the understanding side leaves learning."""


def pack(samples: list[list[Segment]], experts: Experts = Experts.MOT):
    return tiny.packer(experts).pack(samples)


def gradients(model: BagelModel, *, freeze_und: bool) -> dict[str, float]:
    """Norm of each parameter's gradient; -1 where none arrives."""
    ce, mse = model.losses(pack(EVERYTHING, model.config.layer_module), freeze_und=freeze_und)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(ce.mean() + mse.mean(), list(parameters.values()), allow_unused=True)
    return {n: -1.0 if g is None else g.norm().item() for n, g in zip(parameters, found, strict=True)}


def doubled(experts: Experts) -> set[str]:
    """The decoder's modules that exist twice, without the layer's number."""
    names = (name for name, _ in tiny.model(experts).named_parameters() if "_moe_gen" in name)
    return {name.split("layers.")[-1].split(".", 1)[-1].rsplit(".", 1)[0] for name in names}


def test_dense_doubles_nothing() -> None:
    assert doubled(Experts.DENSE) == set()


def test_moe_doubles_the_feed_forward_and_the_last_norm() -> None:
    feed_forward = {f"mlp_moe_gen.{part}_proj" for part in ("gate", "up", "down")}
    assert doubled(Experts.MOE) == feed_forward | {"model.norm_moe_gen"}


def test_mot_doubles_all_but_embedding_and_head() -> None:
    names = {name for name, _ in tiny.model().named_parameters() if ".layers." in name or ".norm" in name}
    language = {name for name in names if name.startswith("language_model.")}
    generation = {name for name in language if "_moe_gen" in name}
    assert {name.replace("_moe_gen", "") for name in generation} == language - generation


def test_parts_left_out_are_not_built() -> None:
    blind = BagelModel(tiny.config().understanding_only())
    names = {name.split(".")[0] for name, _ in blind.named_parameters()}
    assert names == {"language_model", "vit_model", "connector", "vit_pos_embed"}


def test_every_parameter_is_registered_once() -> None:
    parameters = list(tiny.model().parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


def test_vision_encoder_drops_its_last_layer() -> None:
    layers = tiny.model().vit_model.vision_model.encoder.layers
    assert isinstance(tiny.config().vit, ViTConfig)
    assert len(layers) == tiny.VIT.num_hidden_layers - 1


@pytest.mark.parametrize("experts", Experts)
def test_everything_learns(experts: Experts) -> None:
    silent = {name for name, norm in gradients(tiny.model(experts), freeze_und=False).items() if norm < 0}
    assert silent == set()


def test_frozen_understanding_gets_no_gradient() -> None:
    found = gradients(tiny.model(), freeze_und=True)
    learning = {name for name, norm in found.items() if norm > 0}
    assert learning == {name for name in found if any(part in name for part in UND_ONLY)}


def test_freezing_changes_no_value() -> None:
    with torch.no_grad():
        free, frozen = (tiny.model().losses(pack(EVERYTHING), freeze_und=f) for f in (False, True))
    for a, b in zip(free, frozen, strict=True):
        assert torch.equal(a, b)


def test_position_tables_are_frozen() -> None:
    still = {name for name, p in tiny.model().named_parameters() if not p.requires_grad}
    assert still == {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}


@pytest.mark.parametrize("execution", [Execution.SPLITS, Execution.DENSE])
@pytest.mark.parametrize("kind", ["text", "vit", "clean", "noised"])
def test_packs_of_one_kind_work(kind: str, execution: Execution) -> None:
    """No picture, no text, no latents: nothing needs to be there."""
    sample = tiny.segments(random.Random(4), 2, (kind,))
    ce, mse = tiny.model().losses(pack([sample]), execution=execution)
    labels = sum(len(s.ids) + 1 for s in sample if isinstance(s, Text) and s.loss)
    targets = sum(len(f.tokens) for s in sample if isinstance(s, VaeImage) for f in s.frames if s.hidden)
    assert (len(ce), len(mse)) == (labels, targets)
    (ce.sum() + mse.sum()).backward()


def test_route_sends_tokens_to_their_owner() -> None:
    x = torch.zeros(5, 2)
    owners = Route(3)((1.0, 2.0), lambda expert, part: part + expert, x)
    assert owners[:, 0].tolist() == [1, 1, 1, 2, 2]
    assert Route(0)((1.0, 2.0), lambda expert, part: part + expert, x)[:, 0].tolist() == [2] * 5
    assert Route(5)((1.0, 2.0), lambda expert, part: part + expert, x)[:, 0].tolist() == [1] * 5


# starting from nothing --------------------------------------------------------------------------------------


def initialised(seed: int) -> BagelModel:
    """A model that held nothing but NaN before."""
    model = BagelModel(tiny.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def test_initialise_depends_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = initialised(0).state_dict()
    torch.manual_seed(2)
    second, other = initialised(0).state_dict(), initialised(1).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    name = "language_model.model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])


def test_experts_start_alike_and_velocities_at_zero() -> None:
    model = initialised(0)
    state = model.state_dict()
    twins = {name: name.replace("_moe_gen", "") for name in state if "_moe_gen" in name}
    assert twins
    assert all(torch.equal(state[twin], state[name]) for twin, name in twins.items())
    assert not state["llm2vae.weight"].any()
    assert not state["llm2vae.bias"].any()
    with torch.no_grad():
        sequence = pack(EVERYTHING)
        _, mse = model.losses(sequence)
    torch.testing.assert_close(mse, sequence.targets.square())


def test_matrices_start_with_the_promised_spread() -> None:
    state, width = initialised(0).state_dict(), tiny.config().llm.hidden_size
    layer = "language_model.model.layers.0."
    spread = {
        name: state[f"{layer}{name}.weight"].std().item() for name in ("self_attn.q_proj", "self_attn.o_proj")
    }
    residual = (2 * tiny.config().llm.num_hidden_layers) ** -0.5
    expected = {"self_attn.q_proj": width**-0.5, "self_attn.o_proj": width**-0.5 * residual}
    assert spread == pytest.approx(expected, rel=0.05)


def test_norms_start_at_one_and_tables_at_their_waves() -> None:
    state = initialised(0).state_dict()
    norms = [tensor for name, tensor in state.items() if "norm" in name and name.endswith("weight")]
    assert norms
    assert all((tensor == 1).all() for tensor in norms)
    side, width = tiny.config().max_latent_size, tiny.config().llm.hidden_size
    assert torch.equal(state["latent_pos_embed.pos_embed"], sincos_table(side, width))
